"""The networks by their names on the command line, and what they have in common.

Each has a module of its own. There `make` is its constructor, and `network_of` finds the constructor's
arguments from weights. `UNTOLD` holds the arguments that weights do not show, with their defaults. `SETTINGS`
are the scripts' defaults with this network, and `folded` makes a frozen copy for attacks.
A network maps images in [0, 1], N x C x H x W, to `Outputs`; it has `name`, `label`, `num_classes`,
`feat_dims`, `arguments` and `logits`.
"""

import inspect

import cnn6_model
import resnet_model
from utils import CheckpointError

NETWORKS = {"resnet": resnet_model, "cnn6": cnn6_model}


def for_data(config, dataset):
    """Return the network that `config` asks for, with fresh weights, for images and classes of `dataset`."""
    kind = dataset.kind
    known = {
        "num_classes": len(dataset.classes),
        "side": dataset.shape[-1],
        "mean": kind.mean,
        "std": kind.std,
    }
    known |= vars(config)
    make = NETWORKS[config.model].make
    return make(**{name: known[name] for name in inspect.signature(make).parameters if name in known})


def lacks(model):
    """Return the options of the training scripts that the network of that name does not have."""
    return {"depth", "aux_dim"} - inspect.signature(NETWORKS[model].make).parameters.keys()


def build(model, arguments):
    """Return the network of that name with fresh weights."""
    return NETWORKS[model].make(**arguments)


def check_images(arguments, path, dataset):
    """Raise CheckpointError if a network with these arguments takes other images than `dataset` has."""
    kinds = {1: "grey", 3: "colour"}
    takes, (found, _, side) = len(arguments["mean"]), dataset.shape
    if (takes, arguments.get("side", side)) != (found, side):
        size = f" of {arguments['side']} pixels" if "side" in arguments else ""
        raise CheckpointError(
            f"{path}: a network for {kinds.get(takes, takes)} images{size}, but those of {dataset.name} are "
            f"{kinds.get(found, found)}, of {side} pixels; give the --dataset it was trained on"
        )


def network_of(state_dict, said):
    """Return the name and the arguments of the network that `state_dict` fits.

    said: what the checkpoint says of its network; an empty one means a ResNet for CIFAR-10. Raises ValueError
    when no network fits.
    """
    name = said.get("model", "resnet")
    if name not in list(NETWORKS):  # a list, since a name from a file may be unhashable
        raise ValueError(f"a network called {name!r:.40}, which is unknown here")
    module = NETWORKS[name]
    untold = {key: said.get(key, value) for key, value in module.UNTOLD.items()}
    found = module.network_of(state_dict, **untold)
    return name, {**found, **{k: list(v) if isinstance(v, tuple) else v for k, v in untold.items()}}


def folded(model, dtype=None):
    """A frozen copy of `model` for attacks and evaluation, in eval mode; `refresh()` after a change of it."""
    return NETWORKS[model.name].folded(model, dtype)
