"""The networks under test: a checkpoint as a `Target`, or as a plain module for other libraries."""

import collections
import dataclasses
import itertools
import types
from pathlib import Path

import torch
from torch import nn

import attacks
import checkpoints
import prototype_conformity
from models import build, folded
from prototype_conformity import PrototypeConformityLoss
from utils import CheckpointError

from .exact import memory_format

LABELS = {  # what a checkpoint's row is called, by the script that made it
    "softmax_training": "Softmax",
    "pcl_training": "PCL",
    "pcl_training_adversarial_fgsm": "PCL + FGSM images",
    "pcl_training_adversarial_pgd": "PCL + PGD images",
}


class NearestPrototype(nn.Module):
    """A network whose scores are minus the distances to the prototypes: the prediction of Eq. 6."""

    def __init__(self, network, prototypes):
        super().__init__()
        self.network, self.prototypes = network, prototypes

    def forward(self, images):
        outputs = self.network(images)
        scores = self.prototypes.nearest(outputs)
        if isinstance(outputs, tuple):
            return outputs._replace(logits=scores)
        return types.SimpleNamespace(**{**vars(outputs), "logits": scores})


@dataclasses.dataclass(frozen=True)
class Target:
    """A network under test: `model` decides on an attack's results, attacks differentiate `folded`.

    Both map images in [0, 1] to logits or to a tuple with a field `logits`; frozen, in eval mode. `folded` is
    `model` with its batch norms folded into the convolutions: the same function up to rounding, faster.
    """

    label: str
    sha256: str
    model: nn.Module
    folded: nn.Module
    path: str = ""
    depth: int | None = None
    prototypes: PrototypeConformityLoss | None = None
    origin: dict = dataclasses.field(default_factory=dict)  # the script, settings and data behind it
    arguments: dict = dataclasses.field(default_factory=dict)  # of its constructor

    @property
    def has_pull(self):
        """Whether the network has prototypes to which its features were pulled."""
        return self.prototypes is not None and bool(self.prototypes.proximity)

    def logits(self, images):
        """The model's scores of `images`, float32 or wider, N x num_classes."""
        return attacks.scores(self.model(images))

    def predicting(self, predict):
        """The same network, which predicts by `predict`: softmax, or prototype, if it has any."""
        if predict == "softmax" or not self.has_pull:
            return self
        model, fast = (NearestPrototype(one, self.prototypes).eval() for one in (self.model, self.folded))
        return dataclasses.replace(self, model=model, folded=fast)


def load_target(path, device, classes, predict="softmax"):
    """Read a checkpoint; depth and class count are its own. Raises CheckpointError.

    predict: "softmax", by the largest logit, or "prototype", by the nearest prototype.
    """
    read, model, prototypes = _load(path, device)
    state = read.state
    checkpoints.check_classes(state, path, classes)
    if model.num_classes != len(classes):
        raise CheckpointError(
            f"{path}: a network of {model.num_classes} classes, but the data set has {len(classes)}"
        )
    names = ("script", "epoch", "config", "data", "started_from", "versions")
    origin = {name: state[name] for name in names if name in state}
    fast = folded(model).network.to(memory_format=memory_format(device))
    label = label_of(path, origin)
    facts = (str(path), model.depth, prototypes, origin, read.arguments)
    target = Target(label, read.sha256, model, fast, *facts)
    if predict == "prototype" and not target.has_pull:
        raise CheckpointError(
            f"{path}: holds no prototypes to predict with; --predict softmax, or a checkpoint of stage 2"
        )
    return target.predicting(predict)


def label_of(path, origin=types.MappingProxyType({})):
    """What a checkpoint's row is called: by its script and settings, or else by its file."""
    label = LABELS.get(origin.get("script"), Path(path).name.split(".")[0])
    settings = origin.get("config", {})
    if label.startswith("PCL") and settings.get("weight_prox") == settings.get("weight_conprox") == 0:
        return f"No {label}"  # stage 2 as a control, with both terms switched off
    if label.startswith("PCL") and all(settings.get(name) for name in ("shared_prototypes", "separation")):
        return label.replace("PCL", "PCL by Eq. 5")
    return label


def labels_of(targets):
    """What their rows are called. Where two would be alike, the file's name is added, or else the hash."""
    called = []
    for target in targets:
        file = Path(target.path).name.removesuffix(".tar").removesuffix(".pth")
        called.append([target.label, f"{target.label} ({file})", f"{target.label} ({target.sha256[:8]})"])
    times = collections.Counter(itertools.chain(*called))
    return [next((name for name in names if times[name] == 1), names[-1]) for names in called]


def _load(path, device):
    """(what was read, its network in eval mode, its prototypes or None)."""
    read = checkpoints.read_network(path)
    model = build(read.model, read.arguments)
    model.load_state_dict(read.weights)
    model.to(device, memory_format=memory_format(device)).eval().requires_grad_(False)
    prototypes = _prototypes(path, read.criterion, read.state.get("config", {}), model)
    return read, model, None if prototypes is None else prototypes.to(device)


def _prototypes(path, criterion, config, model):
    """The joint loss of a checkpoint, None where it has none; CheckpointError where it fits nothing else."""
    try:
        prototypes = prototype_conformity.from_checkpoint(criterion, config)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: its prototypes do not fit its settings (weights, distance); use another copy"
        ) from None
    if prototypes is None:
        return None
    for layer, term in (*prototypes.proximity.items(), *prototypes.contrastive.items()):
        wanted = model.num_classes, model.feat_dims.get(layer)
        if tuple(term.centers.shape) != wanted:
            raise CheckpointError(
                f"{path}: its prototypes of {layer:.20} are {tuple(term.centers.shape)}, the network's "
                f"features {wanted}; they are of another network"
            )
    return prototypes


def classifier(path, device="cpu"):
    """The network of a checkpoint as a frozen nn.Module, images in [0, 1] -> logits, in eval mode.

    AutoAttack, torchattacks, foolbox and RobustBench take it as it is. Raises CheckpointError.
    """
    # Plain memory order: other libraries flatten gradients with `view`.
    return folded(_load(path, device)[1]).to(memory_format=torch.contiguous_format)
