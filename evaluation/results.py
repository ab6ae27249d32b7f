"""Everything that an evaluation measures, kept in a file beside its results until it is finished."""

import dataclasses
import time
from functools import reduce

import torch

import checkpoints
import cli
import data
import distributed
import utils

from . import files
from .outcome import Outcome
from .target import Target, labels_of
from .trials import ATTACKS, Trial


@dataclasses.dataclass
class Results:
    """What is measured, by whom and how, and the outcomes so far.

    trials: those of the table, the first one without attack. points: those of the curves. checks: those that
    --sanity needs, by their part in it. source: the network that `transfer` makes its images on.
    outcomes: by the SHA-256 of a target and the key of a trial.
    """

    config: object
    dataset: data.Dataset
    targets: list[Target]
    trials: list[Trial]
    points: list[tuple] = dataclasses.field(default_factory=list)
    checks: dict[str, Trial] = dataclasses.field(default_factory=dict)
    source: Target | None = None
    outcomes: dict[str, dict[str, Outcome]] = dataclasses.field(default_factory=dict)
    saved: float = dataclasses.field(default_factory=time.monotonic)

    def pairs(self):
        """Every (target, trial) that there is something to measure of."""
        every = [*self.trials, *(point[-1] for point in self.points), *self.checks.values()]
        return [(target, trial) for target in self.targets for trial in every if trial.applies_to(target)]

    def of(self, target, trial):
        """The outcome of a trial on a target, empty where there is none yet."""
        return self.outcomes.setdefault(target.sha256, {}).setdefault(trial.key, Outcome())

    def row(self, target):
        """The (trial, outcome) pairs of a target's row in the table; the first one is without attack."""
        return [(trial, self.of(target, trial)) for trial in self.trials if trial.applies_to(target)]

    def robust(self, target, rounded=False):
        """Which images, (N,) bool, are right as they are and under every trial within its epsilon.

        With `rounded`, adversarial images are taken as a PNG holds them.
        """
        (_, clean), *attacked = self.row(target)
        held = (
            outcome.right_8bit | (outcome.linf > trial.epsilon) if rounded else ~outcome.fooled(trial.epsilon)
            for trial, outcome in attacked
        )
        return reduce(torch.logical_and, held, clean.correct)

    def labeled(self):
        """Each target after what its row is called."""
        return list(zip(labels_of(self.targets), self.targets, strict=True))

    def images_folder(self, target, trial):
        """Where the adversarial images of a trial are kept; None where they are not asked for."""
        if self.config.save_images is None or trial.key not in ATTACKS:  # a point of a curve keeps no images
            return None
        return files.images_folder(self.config, target.path or target.label, target.sha256, trial.key)

    # ------------------------------------------------------------ the file of a stopped evaluation

    @property
    def path(self):
        return files.partial(self.config)

    def identity(self):
        source = self.source and self.source.sha256
        hashes = [target.sha256 for target in self.targets]
        return files.identity(cli.config_dict(self.config), hashes, source, self.dataset.describe())

    def save(self):
        outcomes = {
            sha256: {key: vars(outcome) for key, outcome in trials.items()}
            for sha256, trials in self.outcomes.items()
        }
        state = {"identity": self.identity(), "outcomes": outcomes}
        checkpoints.save(state, self.path, False)
        distributed.note_save(self.path)
        self.saved = time.monotonic()

    def resume(self):
        """Take over the outcomes of a stopped evaluation, if the config says so; return whether all is done.

        Raises CheckpointError when it had other settings, networks or data.
        """
        if not self.config.resume:
            return False
        if not self.path.exists():
            done = files.finished(self.config)
            if done is not None:
                self._check(done, self.config.results)
            return done is not None
        state = checkpoints.load(self.path)
        self._check(state.get("identity"), self.path)
        for sha256, trials in state["outcomes"].items():
            self.outcomes[sha256] = {key: Outcome(**value) for key, value in trials.items()}
        utils.say(f"resumed {self.path}: {self.done():,} outcomes are there already")
        return False

    def done(self):
        """How many outcomes there are, of an image and a trial each."""
        return sum(len(outcome) for trials in self.outcomes.values() for outcome in trials.values())

    def _check(self, before, path):
        now = self.identity()
        if before != now:
            before = before or {}
            names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
            raise utils.CheckpointError(
                f"{path}: begun with another {', '.join(names)}; give the old ones, or --overwrite"
            )
