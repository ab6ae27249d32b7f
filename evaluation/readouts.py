"""Does an attack find an adversarial image that is known to be there?

The test of Zimmermann, Brendel, Tramèr & Carlini, Increasing Confidence in Adversarial Robustness Evaluations
(NeurIPS 2022). For an image that is classified right, inner points are drawn within 0.95 epsilon of it, and
one corner of its ball of radius epsilon. A linear read-out of the network's last features is fitted that
separates the corner from all inner points. Its threshold lies just short of the corner, and its logits are
scaled to the range of the network's own. It replaces the network's last layer: now the image is right, and
the corner is adversarial. An attack that finds no adversarial image here cannot be trusted to find those of
the network itself.
"""

import collections
import dataclasses
from typing import NamedTuple

import torch
from torch import nn

import attacks
import data
import utils

from .exact import exact_float32, memory_format
from .measure import attack_block
from .trials import ATTACKS, CROSS_ENTROPY, MARGIN, make

IMAGES = 50
INNER = (999, 499, 199, 49)  # inner points, the image among them; fewer where so many cannot be separated
INNER_RADIUS = 0.95  # of epsilon
THRESHOLD = 0.999  # of the way from the highest score of an inner point to the corner's
RIDGE = 1e-6  # of the mean variance: below it float32 features hold rounding errors alone
RANDOM_POINTS = 200  # on the ball's surface, and as many corners


class Found(NamedTuple):
    """The percentages of `images` for which attacks and random search found an adversarial image.

    images: those that have a read-out. inner: how many images by the number of inner points that their
    read-outs separate. attacks: percentages by name. surface, corners: percentages of random search.
    """

    images: int
    inner: dict[int, int]
    attacks: dict[str, float]
    surface: float
    corners: float


class ReadOuts(nn.Module):
    """A network with a read-out for each image of a batch: two classes, 1 where the score is above 0.

    weights: N x D. biases: (N,). Maps N images to logits, N x 2.
    """

    def __init__(self, network, weights, biases):
        super().__init__()
        self.network, self.weights, self.biases = network, weights, biases

    def forward(self, images):
        features, _ = last_features(self.network, images)
        score = (features.to(self.weights.dtype) * self.weights).sum(1) + self.biases
        return (
            torch.stack([-score, score], 1).div(2).float()
        )  # in float32, so that what underflows in the network underflows here


def last_features(network, images):
    """Return (features, N x D; logits): the input of the last linear layer called, or else the logits."""
    inputs = []
    layers = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    hooks = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in layers]
    try:
        logits = attacks.scores(network(images))
    finally:
        for hook in hooks:
            hook.remove()
    return (inputs[-1] if inputs else logits).flatten(1), logits


def search(target, split, config):
    """Run the table's attacks on cross-entropy and margin, PGD in any case, and random search on read-outs.

    split: images that the target classifies right. Returns a Found.
    """
    seed, size = config.seed, config.batch_size
    fits, inner = [], collections.Counter()
    images = data.to_float(split.images).contiguous(memory_format=memory_format(split.images.device))
    for index in utils.progress(range(len(images)), len(images), f"{target.label}: read-outs"):
        generator = utils.generator(seed, "read-out", index)
        fit, number = read_out(target.folded, images[index : index + 1], config.epsilon, generator, size)
        if fit is not None:
            fits.append((index, fit))
            inner[number] += 1
    names = [n for n in dict.fromkeys((*config.attacks, "pgd")) if ATTACKS[n].loss in (CROSS_ENTROPY, MARGIN)]
    hits = {name: [] for name in (*names, "surface", "corners")}
    for start in range(0, len(fits), size):
        block, fit = zip(*fits[start : start + size], strict=True)
        network = ReadOuts(target.folded, *map(torch.stack, zip(*fit, strict=True)))
        block = torch.tensor(block)
        part = data.Split(split.images[block], torch.zeros_like(split.labels[block]))
        probe = dataclasses.replace(target, model=network, folded=network)
        for name in names:
            _, attacked, labels, _ = attack_block(probe, make(name, config), part, 0, size, seed)
            hits[name].append(_wrong(probe, attacked, labels))
        for name, found in _random_search(probe, part, config.epsilon, seed).items():
            hits[name].append(found)
    shares = {name: 100 * torch.cat(h).double().mean().item() if h else 0.0 for name, h in hits.items()}
    return Found(len(fits), dict(inner), {n: shares[n] for n in names}, shares["surface"], shares["corners"])


@torch.no_grad()
def read_out(network, image, epsilon, generator, batch_size):
    """Fit a read-out for one image, 1 x C x H x W; return ((weights (D,), bias), number of inner points).

    Returns (None, 0) where no read-out separates the corner even from the fewest inner points.
    """
    steps = torch.rand(INNER[0] + 1, *image.shape[1:], generator=generator).mul_(2).sub_(1)
    steps[0], steps[-1] = 0, steps[-1].sign() / INNER_RADIUS  # the image itself, and the corner
    points = (image + INNER_RADIUS * epsilon * steps.to(image.device)).clamp(0, 1)
    with exact_float32():
        parts = [last_features(network, part) for part in points.split(batch_size)]
    features, logits = (torch.cat(values).double().cpu() for values in zip(*parts, strict=True))
    for number in INNER:
        keep = [*range(number), -1]
        fit = separate(features[keep], (logits[keep].amax() - logits[keep].amin()).item())
        if fit is not None:
            fit = tuple(value.to(image.device) for value in fit)
            ends = ReadOuts(network, *fit)(torch.stack([points[0], points[-1]]))
            if attacks.misclassified(ends, torch.zeros_like(ends[:, 0]).long()).tolist() == [False, True]:
                return fit, number
    return None, 0


def separate(features, reach):
    """Fit (weights (D,), bias) whose score is above 0 only for the last row of `features`, N x D, or None.

    The fit is by least squares on standardised features. `reach`: the lowest and the highest score differ by
    it.
    """
    deviation = features.std(0)
    scaled = (features - features.mean(0)) / deviation.where(deviation > 0, torch.inf)
    wanted = torch.full(features.shape[:1], -1 / len(features), dtype=features.dtype)
    wanted[-1] += 1
    narrow = scaled.shape[1] < len(scaled)  # the smaller of the two systems of equations
    gram = scaled.mT @ scaled if narrow else scaled @ scaled.mT
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    factor = torch.linalg.cholesky(gram)
    right = (scaled.mT @ wanted if narrow else wanted)[:, None]
    solved = torch.cholesky_solve(right, factor)[:, 0]
    weights = (solved if narrow else scaled.mT @ solved) / deviation.where(deviation > 0, torch.inf)
    scores = features @ weights
    inner, corner = scores[:-1].amax(), scores[-1]
    if not corner > inner:
        return None
    scale = reach / (scores.amax() - scores.amin())
    return weights * scale, -scale * (inner + THRESHOLD * (corner - inner))


def _random_search(probe, split, epsilon, seed):
    """Return for which images, (N,) bool, a random point of the surface is adversarial, and a corner."""
    images, generator = data.to_float(split.images), utils.generator(seed, "random search")
    hits = dict.fromkeys(("surface", "corners"), torch.zeros(len(images), dtype=torch.bool))
    for _ in range(RANDOM_POINTS):
        draw = torch.rand(images.shape, generator=generator).mul_(2).sub_(1)
        steps = {"surface": draw / draw.abs().amax((1, 2, 3), keepdim=True), "corners": draw.sign()}
        for name, step in steps.items():
            points = (images + epsilon * step.to(images.device)).clamp(0, 1)
            hits[name] = hits[name] | _wrong(probe, points, split.labels)
    return hits


@torch.no_grad()
def _wrong(probe, images, labels):
    with exact_float32():
        images = images.contiguous(memory_format=memory_format(images.device))
        return attacks.misclassified(probe.logits(images), labels).cpu()
