"""What a run is, and whether a checkpoint is of the same run."""

import os

import torch

import checkpoints
import cli
from utils import CheckpointError, sha256

FREE_ON_RESUME = {  # settings that may differ between a run and its continuation
    *("data_dir", "init_from", "save_to", "log_to", "tensorboard", "resume", "overwrite", "preset"),
    *("epochs", "eval_every", "device", "threads", "compile", "save_every_minutes", "max_minutes"),
}
MACHINE = ("precision", "threads")  # what a run was given, whatever was asked for
SINCE = {"warmup": 0, "model": "resnet"}  # what runs did that began before there was such a setting
NOT_REPORTED = ("resume", "overwrite", "max_minutes")  # of these: they differ at every resume


def identity_of(config, dataset, model, precision):
    """What a checkpoint says of the run that saved it, in plain Python."""
    return {
        "script": cli.script_name(config),
        "network": {"model": model.name, **model.arguments},
        "classes": list(dataset.classes),
        "data": dataset.describe(),
        "config": cli.config_dict(config),
        "started_from": getattr(model, "started_from", {}),  # the file of stage 1
        "precision": precision,
        "threads": torch.get_num_threads(),
    }


def check_identity(state, run, path):
    """Raise CheckpointError when `state`, read from `path`, is of another run than `run`, an identity.

    Returns a line for each other setting that differs, and for a file of stage 1 that has changed.
    """
    if state["script"] != run["script"]:
        raise CheckpointError(f"{path}: made by {state['script']}.py; name another --save-to")
    checkpoints.check_classes(state, path, run["classes"])
    there, here = state["data"], run["data"]
    if older := len(there["train"]) > len(here["train"]):  # by code that kept sums of pixels, not a SHA-256
        there, here = ({"name": d["name"], "images": (d["train"][0], d["test"][0])} for d in (there, here))
    if there != here:
        raise CheckpointError(f"{path}: trained on {there}, not {here}; give the same data")
    before, now = (
        {**SINCE, **one["config"], **{n: one[n] for n in MACHINE if n in one}} for one in (state, run)
    )
    names = [name for name in now if name in before and now[name] != before[name]]
    differing = {name: f"{name} {before[name]} -> {now[name]}" for name in names}
    fixed = [words for name, words in differing.items() if name not in FREE_ON_RESUME]
    if fixed:
        raise CheckpointError(
            f"{path}: begun with other settings ({', '.join(fixed)}); resume with the old ones, or name "
            "another --save-to"
        )
    words = [f"resumed with another {words}" for name, words in differing.items() if name not in NOT_REPORTED]
    words += [f"{start} has changed since this run began from it" for start in _changed(state, run)]
    return words + ["begun by older code: its images are compared by their number alone"] * older


def _changed(state, run):
    """The file of stage 1, if it is no longer the one from which `state` began."""
    begun = state.get("started_from", {})  # older code kept none
    path = begun.get("path", "")
    asked = path == run["config"].get("init_from") and os.path.isfile(path)
    return [path] if asked and sha256(path) != begun["sha256"] else []
