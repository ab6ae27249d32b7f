"""Where a run begins: with its data and, in stage 2, with the weights of stage 1."""

import checkpoints
import data
import distributed
import models
import utils

from .loop import accuracy


def load(config, device):
    """Read a run's data set onto `device`; one rank of each machine goes first. Raises DataError."""
    with distributed.one_first():  # which may download
        return data.load(
            config.dataset, config.data_dir, limit=config.limit, holdout=config.holdout, device=device
        )


def start_from(model, config, dataset):
    """Begin stage 2 with the weights of `config.init_from`; a run that is resumed has its own already.

    Raises CheckpointError if network, class names or held-out images differ. An auxiliary branch that stage 1
    did not have keeps its fresh weights.
    """
    if config.resumes:
        return
    path = config.init_from
    read = checkpoints.read_network(path)
    ours = {"model": model.name, **model.arguments}
    models.check_images(read.arguments, path, dataset)
    for name, value in {"model": read.model, **read.arguments}.items():
        if value != ours.get(name) and not (name == "aux_dim" and value == 0):
            raise utils.CheckpointError(
                f"{path}: a network with {name} {value}, not {ours.get(name)}; give the settings it "
                "was trained with or another --init-from"
            )
    checkpoints.check_classes(read.state, path, dataset.classes)
    checkpoints.check_holdout(read.state, path, dataset)
    model.load_state_dict({**model.state_dict(), **read.weights})
    model.started_from = {"path": path, "sha256": read.sha256}
    percent = accuracy(model, dataset.test)
    epoch = read.state.get("epoch", "?")
    utils.say(f"starting from {path}, epoch {epoch}, right on {percent:.2f} % of the {dataset.tested} images")
