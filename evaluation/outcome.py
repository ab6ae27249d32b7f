"""What one attack did to the images, one by one, and the numbers that sum it up."""

import dataclasses
import math

import torch
from torch import Tensor

import attacks

COLUMNS = {  # of an outcome, with a value for each image
    "predicted": torch.int64,
    "correct": torch.bool,
    "margin": torch.float32,  # true logit less the largest other: below 0 is misclassified
    "linf": torch.float64,  # distance from the original; in float32 it could round to beyond epsilon
    "l2": torch.float32,
    "zero_first": torch.bool,  # the attack's first gradient was exactly zero
    "zero_ever": torch.bool,  # one of them was
    "zero_always": torch.bool,  # all of them were: the attack never learned anything of this image
    "lost": torch.bool,  # the attack had fooled the network on its way, and not in the end
    "right_8bit": torch.bool,  # right after rounding to 8 bits; False where that was not asked for
}
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
# Where float32 ends: past the first margin the cross-entropy's gradient with respect to the true logit is
# exactly 0, past the second all of it is.
SATURATED_MARGIN, VANISHED_MARGIN = 17.0, 104.0
Z = 1.959964  # standard deviations to the ends of a 95 % interval of the normal distribution


@dataclasses.dataclass
class Outcome:
    """What one trial did to the first images of a split: the tensors of COLUMNS, (N,), on the CPU.

    They are read as attributes, too.
    """

    columns: dict[str, Tensor] = dataclasses.field(
        default_factory=lambda: {name: torch.zeros(0, dtype=dtype) for name, dtype in COLUMNS.items()}
    )
    low: float = 1.0  # smallest and largest pixel of the results
    high: float = 0.0
    seconds: float = 0.0
    gradients: bool = False  # the attack showed its gradients
    changed: int = 0  # predictions of clean images that differ in a second pass
    probabilities: bool = False  # the scores of the clean images are probabilities

    def __getattr__(self, name):
        if name in COLUMNS:
            return self.columns[name]
        raise AttributeError(name)

    def __len__(self):
        return len(self.correct)

    @property
    def accuracy(self):
        """Percent of the images so far that are classified right."""
        return 100 * self.correct.double().mean().item()

    @property
    def frozen(self):
        """Images, (N,) bool, that count as robust only because their gradient was zero at every step."""
        return self.zero_always & self.correct

    def fooled(self, epsilon):
        """Return which images, (N,) bool, the attack fooled within `epsilon`, in the end or on its way."""
        return (~self.correct & (self.linf <= epsilon)) | self.lost

    def add(self, block):
        """Add the outcome of the next images."""
        if len(block):
            self.probabilities = block.probabilities and (self.probabilities or not len(self))
        self.changed += block.changed
        self.columns = {name: torch.cat([self.columns[name], block.columns[name]]) for name in COLUMNS}
        self.low, self.high = min(self.low, block.low), max(self.high, block.high)
        self.seconds += block.seconds
        self.gradients = self.gradients or block.gradients

    def see_clean(self, logits, again):
        """Compare two passes on a block of clean images, N x num_classes each; called before `extend`."""
        self.changed = int((logits.argmax(1) != again.argmax(1)).sum())
        self.probabilities = are_probabilities(logits)

    def extend(self, images, attacked, labels, logits, zeros, **more):
        """Add a block: its images, what an attack made of them, and the network's logits of that.

        more: the columns `lost` and `right_8bit`, where they are known.
        """
        change = (attacked.double() - images.double()).flatten(1)
        none = torch.zeros_like(labels, dtype=torch.bool)
        self.gradients = self.gradients or zeros.first is not None
        self.low = min(self.low, attacked.min().item())
        self.high = max(self.high, attacked.max().item())
        values = {
            "predicted": logits.argmax(1),
            "correct": ~attacks.misclassified(logits, labels),
            "margin": -attacks.margin(logits, labels),
            "linf": change.abs().amax(1),
            "l2": change.norm(dim=1),
            "zero_first": none if zeros.first is None else zeros.first,
            "zero_ever": none if zeros.ever is None else zeros.ever,
            "zero_always": none if zeros.always is None else zeros.always,
            **{"lost": none, "right_8bit": none, **more},
        }
        for name, dtype in COLUMNS.items():
            self.columns[name] = torch.cat([self.columns[name], values[name].cpu().to(dtype)])


def are_probabilities(scores):
    """Whether scores, N x num_classes, lie between 0 and 1 with a sum of 1."""
    return bool(scores.min() >= 0 and scores.max() <= 1 and ((scores.sum(1) - 1).abs() < 1e-3).all())


def percent(mask):
    """The share of a bool tensor that is true, in percent; None of an empty one."""
    return round(100 * mask.double().mean().item(), 4) if len(mask) else None


def wilson(correct, images):
    """The Wilson 95 % interval of an accuracy, in percent (Wilson 1927)."""
    share, unit = correct / images, Z * Z / images
    middle = (share + unit / 2) / (1 + unit)
    half = Z * math.sqrt(share * (1 - share) / images + unit / (4 * images)) / (1 + unit)
    # The ends themselves where rounding would miss them.
    return 100 * (middle - half) if correct else 0.0, 100 * (middle + half) if correct < images else 100.0


def counts(mask):
    """Accuracy in percent, its 95 % interval, and the numbers behind it."""
    correct, images = int(mask.sum()), len(mask)
    low, high = (round(end, 4) for end in wilson(correct, images))
    return {"accuracy": percent(mask), "low": low, "high": high, "correct": correct, "images": images}


def per_class(mask, labels, classes):
    """Accuracy in percent of each class by its name; None for a class without images."""
    return {name: percent(mask[labels == index]) for index, name in enumerate(classes)}


def margin_quantiles(outcome):
    """Quantiles of the logit margin, and the shares in percent past 17 and past 104."""
    margins = outcome.margin.double()
    values = torch.quantile(margins, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return {
        "quantiles": dict(zip(map(str, QUANTILES), values, strict=True)),
        "above_17": percent(margins > SATURATED_MARGIN),
        "above_104": percent(margins > VANISHED_MARGIN),
    }
