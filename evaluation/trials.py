"""Attacks with their settings: those of the main table, and those against epsilon and the number of steps."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

import data
import utils

from .registry import ATTACKS, CROSS_ENTROPY, PGD_STEP

CLEAN = "clean"  # the trial that changes nothing


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

    def applies_to(self, target):
        return target.has_pull or not self.needs_prototypes

    def of(self, split):
        """The part of `split` that this trial is about."""
        if self.limit is None or self.limit >= len(split):
            return split
        keep = torch.from_numpy(data.balanced_indices(split.labels.cpu().numpy(), self.limit, "test"))
        keep = keep.to(split.labels.device)
        return data.Split(split.images[keep], split.labels[keep])


def make(name, config, source=None):
    """The trial that a name on the command line means. `source`: the Target that `transfer` attacks."""
    entry = ATTACKS[name]
    options, words = entry.settings(config)
    if entry.loss not in (None, CROSS_ENTROPY):
        words += f", on the {entry.loss.words}"

    def attack(target, images, labels, generator, trace):
        extra = {"generator": generator} if entry.seeded else {}
        if entry.loss is not None:
            extra |= {"loss": entry.loss.of(target), "trace": trace}
        network = source.folded if name == "transfer" else target.folded
        return entry.function(network, images, labels, config.epsilon, **options, **extra)

    return Trial(
        name,
        entry.title,
        config.epsilon,
        attack,
        f"{entry.title}: {words}",
        bounded=entry.bounded,
        needs_prototypes=entry.needs_prototypes,
    )


def clean():
    """The trial without an attack."""
    return Trial(CLEAN, "No attack", 0.0)


def table(config, num_classes, source=None):
    """The trials of the main table: no attack, then `config.attacks` in their order, each once."""
    check_classes(config.attacks, num_classes)
    return [clean(), *(make(name, config, source) for name in dict.fromkeys(config.attacks))]


def check_classes(names, num_classes):
    """Raise UsageError for an attack that `num_classes` are too few for."""
    for name in names:
        if num_classes < ATTACKS[name].least_classes:
            raise utils.UsageError(
                f"--attacks {name}: needs {ATTACKS[name].least_classes} classes or more, the data have "
                f"{num_classes}"
            )


class Point(NamedTuple):
    """One point of a curve: which attack, against what (`epsilon` or `steps`), where, and the trial."""

    attack: str
    axis: str
    value: float
    trial: Trial


def curves(config, num_classes):
    """The points of accuracy against epsilon and against the number of steps that `config` asks for.

    Against epsilon the step is 2.5 * epsilon / num_steps (Madry et al. 2018; 2/255 at 8/255 in 10 steps),
    against the number of steps it is that of the table.
    """
    settings = []
    for epsilon in sorted(set(config.epsilons)):
        step_size = min(2.5 * epsilon / config.num_steps, 1.0) or PGD_STEP
        settings.append(("epsilon", epsilon, {"epsilon": epsilon, "step_size": step_size}))
    settings += [("steps", steps, {"num_steps": steps}) for steps in sorted(set(config.step_counts))]
    if settings:
        check_classes(config.curve_attacks, num_classes)
    points = []
    for name in dict.fromkeys(config.curve_attacks):
        for axis, value, changes in settings:
            trial = make(name, dataclasses.replace(config, **changes))
            trial = dataclasses.replace(trial, key=f"{name}@{axis}={value:.9g}")
            points.append(Point(name, axis, value, trial))
    return points
