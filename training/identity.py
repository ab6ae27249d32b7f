"""What a run is, and whether a checkpoint is of the same run."""

import checkpoints
import cli
from utils import CheckpointError

NETWORK = ("depth", "num_classes", "aux_dim", "fc_dim")  # what a checkpoint says of its network
FREE_ON_RESUME = {  # settings that may differ between a run and its continuation
    *("data_dir", "init_from", "save_to", "log_to", "resume", "overwrite"),
    *("epochs", "eval_every", "device", "compile", "save_every_minutes", "max_minutes"),
}
MISSING = {"warmup": 0}  # settings of runs that began before the option was there
EACH_TIME = ("resume", "overwrite", "max_minutes")  # not worth a word when they differ


def identity_of(config, dataset, model, precision):
    """What a checkpoint says of the run that saved it, in plain Python."""
    return {
        "script": cli.script_name(config),
        "network": {name: getattr(model, name) for name in NETWORK},
        "classes": list(dataset.classes),
        "data": dataset.describe(),
        "config": cli.config_dict(config),
        "precision": precision,
    }


def check_identity(state, run, path):
    """Raise CheckpointError when `state`, read from `path`, is of another run than `run`, an identity.

    Returns a line for each other setting that differs.
    """
    if state["script"] != run["script"]:
        raise CheckpointError(f"{path}: made by {state['script']}.py; name another --save-to")
    checkpoints.check_classes(state, path, run["classes"])
    if state["data"] != run["data"]:
        raise CheckpointError(f"{path}: trained on {state['data']}, not {run['data']}; give the same data")
    before, now = ({**MISSING, **one["config"], "precision": one["precision"]} for one in (state, run))
    names = [name for name in now if name in before and now[name] != before[name]]
    differing = {name: f"{name} {before[name]} -> {now[name]}" for name in names}
    fixed = [words for name, words in differing.items() if name not in FREE_ON_RESUME]
    if fixed:
        raise CheckpointError(
            f"{path}: begun with other settings ({', '.join(fixed)}); resume with the old ones, or name "
            "another --save-to"
        )
    return [f"resumed with another {words}" for name, words in differing.items() if name not in EACH_TIME]
