"""The settings of an evaluation: what `robustness.py` takes as options, and `evaluate` as keywords."""

from dataclasses import dataclass
from typing import Literal

import utils
from cli import Count, Epsilon, NotNegative, Positive, Seed, StepSize

from .trials import ATTACKS, CURVE_ATTACKS, JOINT

Attacks = tuple[Literal[tuple(ATTACKS)], ...]
CurveAttacks = tuple[Literal[CURVE_ATTACKS], ...]


@dataclass(frozen=True)
class Settings:
    # attacks
    attacks: Attacks = ("fgsm", "bim", "mim", "pgd", "pgd-margin")  # the first four as published
    epsilon: Epsilon = 8 / 255  # L-infinity radius, of the pixel range [0, 1]; 0.3 on mnist, fashion-mnist
    num_steps: Count = 10  # of BIM, MIM, PGD on any loss, and both transfers
    step_size: StepSize | None = None  # none: PGD 2/255, others, and all on MNIST, epsilon / num_steps
    random_start: bool = False  # PGD from a random point of the ball; the released evaluation does not
    restarts: Count = 1  # of PGD with random_start, and of APGD; an image counts by its worst
    decay: NotNegative = 1.0  # of MIM's momentum
    apgd_steps: Count = 100  # of APGD, in each restart
    num_queries: Count = 5000  # of Square, for each image
    cw_steps: Count = 1000  # of C&W; paper: 1000
    cw_lr: Positive = 0.01  # of C&W's Adam; paper: 0.01
    cw_c: Positive = 1.0  # C&W's weight of the margin beside the squared distance: the same for all images
    source_checkpoint: str | None = None  # the network on which transfer and transfer-pgd make their images
    predict: Literal["softmax", "prototype"] = "softmax"  # largest logit, or nearest prototype (Eq. 6)
    # more than the table
    sanity: bool = False  # check that it is not the attacks that fail: PASS, WARN or FAIL, a line each
    sanity_images: Count = 200  # for the checks of --sanity, class-balanced
    eight_bit: bool = False  # judge each adversarial image once more, rounded to what a PNG can hold
    epsilons: tuple[Epsilon, ...] = ()  # accuracy against these radii, such as 0 1/255 2/255 4/255 8/255
    step_counts: tuple[Count, ...] = ()  # accuracy against these numbers of steps, such as 1 2 5 10 20 50 100
    curve_attacks: CurveAttacks = ("pgd", "pgd-margin")  # the attacks that these curves are drawn for
    save_images: str | None = None  # a folder for the adversarial images, float, and pictures of the first
    # run
    batch_size: Count | None = None  # images at a time; none: 500 on a GPU, 100 on a CPU
    seed: Seed = 0

    def check(self):
        """Raise UsageError for options that make no sense together."""
        if self.restarts > 1 and not self.random_start and not set(self.attacks) & {"apgd-ce", "apgd-dlr"}:
            raise utils.UsageError(f"--restarts {self.restarts}: would repeat one run; add --random-start")
        for name in self.attacks:
            if ATTACKS[name].loss is JOINT and self.predict == "prototype":
                raise utils.UsageError(f"--attacks {name}: is a loss on the logits; --predict softmax")
            if ATTACKS[name].transfers and self.source_checkpoint is None:
                raise utils.UsageError(
                    f"--attacks {name}: needs --source-checkpoint, the network to make images on"
                )
