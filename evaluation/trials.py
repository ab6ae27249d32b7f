"""The registry of attacks, and trials: attacks with their settings, for the table and the curves."""

import dataclasses
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import attacks
import data
import utils

from . import autoattack

CLEAN = "clean"  # the trial that changes nothing
TARGETS = 3  # of nearest-prototype; on the committed networks a third class adds nothing to two
PGD_STEP = 2 / 255  # the released step of PGD; BIM and MIM take epsilon / num_steps


def in_255ths(value):
    """A distance in pixel units as a multiple of 1/255."""
    return f"{255 * value:.4g}/255"


# ---------------------------------------------------------------- settings: Config -> (keywords, in words)


def _steps(config, step_size):
    """The steps of an attack in words, with a word where they cannot reach the end of the ball."""
    reach = config.num_steps * step_size
    short = f" ({in_255ths(reach)} in all, less than epsilon)" if reach < config.epsilon * (1 - 1e-9) else ""
    return f"{config.num_steps} steps of {in_255ths(step_size)}{short}"


def _bim(config):
    words = _steps(config, config.step_size or config.epsilon / config.num_steps)
    return {"step_size": config.step_size, "num_steps": config.num_steps}, words


def _mim(config):
    options, words = _bim(config)
    return {**options, "decay": config.decay}, f"{words}, decay {config.decay:g}"


def _pgd(config):
    options = {"num_steps": config.num_steps, "step_size": config.step_size or PGD_STEP}
    words = _steps(config, options["step_size"])
    if not config.random_start:
        return options, f"{words}, no random start"
    options |= {"random_start": True, "restarts": config.restarts}
    return options, f"{words}, random start, restarts {config.restarts}"


def _nearest(config):
    options, words = _pgd(config)
    return {**options, "num_targets": TARGETS}, f"{words}, the worst of the {TARGETS} nearest classes"


def _apgd(config):
    options = {"num_steps": config.apgd_steps, "restarts": config.restarts}
    return options, f"{config.apgd_steps} steps, restarts {config.restarts}"


def _cw(config):
    words = (
        f"{config.cw_steps} steps, lr {config.cw_lr:g}, c {config.cw_c:g} without a search, confidence 0, "
        "at any distance; Worst counts what it finds within epsilon"
    )
    return {"num_steps": config.cw_steps, "lr": config.cw_lr, "c": config.cw_c}, words


def _transferred(settings, name):
    return lambda config: (settings(config)[0], f"made on {config.source_checkpoint} by {name}'s settings")


def _autoattack(config):
    log = beside(config, ".autoattack.log") if hasattr(config, "results") else os.devnull
    return {"log": log}, f"the reference implementation, standard version, its log in {log}"


def beside(config, suffix):
    """A path beside the results, with their name and another suffix."""
    path = Path(config.results)
    return path.with_name(path.name.removesuffix(".json") + suffix)


# ---------------------------------------------------------------- the registry


class Loss(NamedTuple):
    """What an attack raises: in words, and as a function, target -> (outputs, labels) -> (N,)."""

    words: str
    of: Callable


CROSS_ENTROPY = Loss("cross-entropy", lambda target: attacks.cross_entropy)
MARGIN = Loss("logit margin", lambda target: attacks.margin)
DLR = Loss("DLR loss", lambda target: attacks.dlr)
JOINT = Loss("joint loss of the checkpoint", lambda target: target.prototypes.per_image)
PROTOTYPE = Loss("approach to the prototypes of other classes", lambda target: target.prototypes.approach)


class Attack(NamedTuple):
    """What a name on the command line means.

    function: `function(network, images, labels, epsilon, **options) -> images`.
    settings: Config -> (its options, the same in words).
    loss: what it raises with the network's gradient, None for attacks that see no gradient.
    least_classes: its loss sorts so many logits.
    transfers: it attacks the network of `--source-checkpoint` instead.
    """

    title: str
    function: Callable
    settings: Callable
    loss: Loss | None = None
    least_classes: int = 2
    transfers: bool = False

    @property
    def needs_prototypes(self):
        return self.loss in (JOINT, PROTOTYPE)


ATTACKS = {
    "fgsm": Attack("FGSM", attacks.fgsm, lambda config: ({}, "one step"), CROSS_ENTROPY),
    "bim": Attack("BIM", attacks.bim, _bim, CROSS_ENTROPY),
    "mim": Attack("MIM", attacks.mim, _mim, CROSS_ENTROPY),
    "pgd": Attack("PGD", attacks.pgd, _pgd, CROSS_ENTROPY),
    "pgd-margin": Attack("PGD margin", attacks.pgd, _pgd, MARGIN),
    "pgd-dlr": Attack("PGD DLR", attacks.pgd, _pgd, DLR, least_classes=3),
    "apgd-ce": Attack("APGD-CE", attacks.apgd, _apgd, CROSS_ENTROPY),
    "apgd-dlr": Attack("APGD-DLR", attacks.apgd, _apgd, DLR, least_classes=3),
    "square": Attack(
        "Square",
        attacks.square,
        lambda config: ({"num_queries": config.num_queries}, f"{config.num_queries:,} queries, scores alone"),
    ),
    "cw": Attack("C&W-L2", attacks.cw, _cw),
    "noise": Attack("Noise", attacks.noise, lambda config: ({}, "each pixel up or down at random")),
    "transfer": Attack("Transfer", attacks.mim, _transferred(_mim, "MIM"), transfers=True),
    "transfer-pgd": Attack("Transfer PGD", attacks.pgd, _transferred(_pgd, "PGD"), transfers=True),
    "joint-fgsm": Attack("Joint FGSM", attacks.fgsm, lambda config: ({}, "one step"), JOINT),
    "joint-bim": Attack("Joint BIM", attacks.bim, _bim, JOINT),
    "joint-mim": Attack("Joint MIM", attacks.mim, _mim, JOINT),
    "joint": Attack("Joint loss", attacks.pgd, _pgd, JOINT),
    "nearest-prototype": Attack("Nearest prototype", attacks.nearest_prototype, _nearest, PROTOTYPE),
    "autoattack": Attack("AutoAttack", autoattack.run, _autoattack, least_classes=4),
}
ON_STEPS = (attacks.pgd, attacks.nearest_prototype)
CURVE_ATTACKS = tuple(name for name, a in ATTACKS.items() if a.function in ON_STEPS and not a.transfers)


def check_classes(names, num_classes):
    """Raise UsageError for an attack that `num_classes` are too few for."""
    for name in names:
        if num_classes < (least := ATTACKS[name].least_classes):
            raise utils.UsageError(
                f"--attacks {name}: needs {least} classes or more, the data have {num_classes}"
            )


# ---------------------------------------------------------------- trials


@dataclasses.dataclass(frozen=True)
class Trial:
    """An attack with its settings: `attack(target, images, labels, generator, trace) -> images`.

    `attack` None changes nothing. `key` is the trial's name in files, `title` its heading, `settings` what a
    reader must know of it. Not `bounded`: its images may lie farther than `epsilon` away.
    """

    key: str
    title: str
    epsilon: float
    attack: Callable | None = None
    settings: str = ""
    bounded: bool = True
    needs_prototypes: bool = False
    limit: int | None = None  # the first so many images, class-balanced; None: all

    @property
    def radius(self):
        """How far its images may lie from the originals."""
        return self.epsilon if self.bounded else 1.0

    def applies_to(self, target):
        return target.has_pull or not self.needs_prototypes

    def of(self, split):
        """The part of `split` that this trial is about."""
        if self.limit is None or self.limit >= len(split):
            return split
        keep = torch.from_numpy(data.balanced_indices(split.labels.cpu().numpy(), self.limit))
        keep = keep.to(split.labels.device)
        return data.Split(split.images[keep], split.labels[keep])


def clean():
    """The trial without an attack."""
    return Trial(CLEAN, "No attack", 0.0)


def make(name, config, source=None):
    """The trial that a name on the command line means. `source`: the Target that transfer attacks."""
    entry = ATTACKS[name]
    options, words = entry.settings(config)
    if entry.loss not in (None, CROSS_ENTROPY):
        words += f", on the {entry.loss.words}"
    random = "generator" in inspect.signature(entry.function).parameters

    def attack(target, images, labels, generator, trace):
        extra = {"generator": generator} if random else {}
        if entry.loss is not None:
            extra |= {"loss": entry.loss.of(target), "trace": trace}
        network = source.folded if entry.transfers else target.folded
        if entry.loss is not None and hasattr(trace, "watching"):
            network = trace.watching(network, labels)
        return entry.function(network, images, labels, config.epsilon, **options, **extra)

    flags = {"bounded": name != "cw", "needs_prototypes": entry.needs_prototypes}
    return Trial(name, entry.title, config.epsilon, attack, f"{entry.title}: {words}", **flags)


def table(config, num_classes, source=None):
    """The trials of the main table: no attack, then `config.attacks` in their order, each once."""
    check_classes(config.attacks, num_classes)
    return [clean(), *(make(name, config, source) for name in dict.fromkeys(config.attacks))]


def curves(config, num_classes):
    """The points of the curves that `config` asks for: (name of the attack, axis, value, trial) of each.

    The axis is `epsilon` or `steps`. Against epsilon the step is 2.5 * epsilon / num_steps (Madry et al.
    2018; 2/255 at 8/255 in 10 steps), against the number of steps it is that of the table.
    """
    settings = []
    for epsilon in sorted(set(config.epsilons)):
        step_size = min(2.5 * epsilon / config.num_steps, 1.0) or PGD_STEP
        settings.append(("epsilon", epsilon, {"epsilon": epsilon, "step_size": step_size}))
    settings += [("steps", steps, {"num_steps": steps}) for steps in sorted(set(config.step_counts))]
    check_classes(config.curve_attacks if settings else (), num_classes)
    points = []
    for name in dict.fromkeys(config.curve_attacks):
        for axis, value, changes in settings:
            trial = make(name, dataclasses.replace(config, **changes))
            trial = dataclasses.replace(trial, key=f"{name}@{axis}={value:.9g}")
            points.append((name, axis, value, trial))
    return points
