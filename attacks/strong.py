"""APGD, the Square attack, C&W-L2, and noise for comparison."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .common import Ball, ball_of, check_input, random_starts, random_streams, uniform
from .gradient import (
    Candidates,
    Differentiate,
    Loss,
    ModelFn,
    Trace,
    cross_entropy,
    differentiator,
    evaluate,
    margin,
    misclassified,
    where,
    worse,
)

APGD_RISING_SHARE = 0.75  # of the steps must raise the loss, or the step size halves; the paper's rho
APGD_INERTIA = 0.75  # weight of the new step, the rest is that of the last one; the paper's alpha
SQUARE_FIRST_AREA = 0.8  # of the first squares, as a share of the image; the authors' choice for L-infinity
# After so many of 10,000 queries the area halves, as in the authors' code (their paper leaves out 500).
SQUARE_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
CW_CONFIDENCE = 0.0  # margin that a success needs; as in the paper's comparison, any misclassification is one


# ---- APGD


def apgd(
    model_fn: ModelFn,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    num_steps: int = 100,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    loss: Loss = cross_entropy,
    trace: Trace | None = None,
) -> Tensor:
    """Auto-PGD: momentum, and a step size that halves on demand (Croce & Hein 2020, Algorithm 1).

    Each restart begins at a uniformly random point of the ball. Image by image it returns the worst point of
    all, the image itself included: misclassified before correct, then of higher loss. Use `loss=dlr` where
    cross-entropy saturates.
    """
    check_input(images, labels)
    if epsilon == 0 or num_steps == 0:
        return images.detach().clone()
    ball = ball_of(images, epsilon)

    differentiate = differentiator(model_fn, labels, loss, trace)
    starts = random_starts(images, epsilon, ball, restarts, generator)
    results = (_apgd_restart(differentiate, start, labels, ball, 2 * epsilon, num_steps) for start in starts)
    return reduce(worse, results, evaluate(model_fn, images.detach().clone(), labels, loss)).images


class Iterate(NamedTuple):
    """Images, their losses, (N,), and the gradients of these."""

    images: Tensor
    loss: Tensor
    gradient: Tensor


def _apgd_restart(
    differentiate: Differentiate,
    start: Tensor,
    labels: Tensor,
    ball: Ball,
    step_size: float,
    num_steps: int,
) -> Candidates:
    """The worst points of one restart of APGD, whose steps are `step_size` long at first."""
    checkpoints = set(_apgd_checkpoints(num_steps))
    outputs, losses, gradient = differentiate(0, start)
    worst = Candidates(start, misclassified(outputs, labels), losses)
    # The algorithm goes back to the point of highest loss, which need not be a misclassified one.
    now = best = Iterate(start, losses, gradient)
    previous, last_check, last_best = start, 0, best.loss
    sizes = torch.full_like(start[:, :1, :1, :1], step_size)
    halved, rises = torch.zeros_like(worst.misclassified), torch.zeros_like(losses)
    for step in range(1, num_steps + 1):
        alpha = APGD_INERTIA if step > 1 else 1.0
        ahead = (now.images + sizes * now.gradient.sign()).clamp(*ball)
        moved = now.images + alpha * (ahead - now.images) + (1 - alpha) * (now.images - previous)
        moved = moved.clamp(*ball)
        outputs, losses, gradient = differentiate(step, moved)
        rises = rises + (losses > now.loss)
        previous, now = now.images, Iterate(moved, losses, gradient)
        worst = worse(worst, Candidates(moved, misclassified(outputs, labels), losses))
        best = where(now.loss > best.loss, now, best)
        if step in checkpoints:
            stuck = ~halved & (best.loss == last_best)
            halved = (rises < APGD_RISING_SHARE * (step - last_check)) | stuck
            sizes = torch.where(halved[:, None, None, None], sizes / 2, sizes)
            now = where(halved, best, now)
            last_check, last_best, rises = step, best.loss, torch.zeros_like(rises)
    return worst


def _apgd_checkpoints(num_steps: int) -> Iterator[int]:
    """The steps at which APGD looks back: at 22 % of all, then at intervals 3 points shorter, down to 6."""
    share = interval = 22  # in whole points: 0.22 + 0.19 is more than 0.41 in floating point
    while share < 100:
        yield -(-share * num_steps // 100)
        interval = max(interval - 3, 6)
        share += interval


# ---- the Square attack


def square(
    model_fn: ModelFn,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    num_queries: int = 5000,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Square attack: random search for a larger margin (Andriushchenko et al. 2020).

    Each restart asks the model at most `num_queries` times about an image that is still classified right.
    Random numbers take 4 * num_queries * (channels + 2) bytes an image.
    """
    check_input(images, labels)
    if epsilon == 0 or num_queries == 0:
        return images.detach().clone()
    lower, upper = ball_of(images, epsilon)
    streams = random_streams(generator, len(images))
    worst = evaluate(model_fn, images.detach().clone(), labels, margin)
    for _ in range(restarts):
        left = (~worst.misclassified).nonzero()[:, 0]
        if len(left) == 0:
            break
        streams_left = [streams[index] for index in left.tolist()]
        found = _square_restart(model_fn, labels[left], (lower[left], upper[left]), streams_left, num_queries)
        worst = _update(worst, left, found)
    return worst.images


def _square_restart(
    model_fn: ModelFn, labels: Tensor, ball: Ball, streams: list[torch.Generator], num_queries: int
) -> Candidates:
    """One restart of the Square attack on the images in the middle of `ball`."""
    lower, upper = ball
    _, channels, height, width = lower.shape
    stripes = uniform(streams, (channels, 1, width), lower) < 0.5
    draws = uniform(streams, (num_queries - 1, channels + 2), lower)
    worst = evaluate(model_fn, torch.where(stripes, lower, upper), labels, margin)
    for query in range(1, num_queries):
        left = (~worst.misclassified).nonzero()[:, 0]
        if len(left) == 0:
            break
        area = SQUARE_FIRST_AREA / 2 ** bisect_left(SQUARE_HALVINGS, 10_000 * query / num_queries)
        side = min(max(round(math.sqrt(area * height * width)), 1), height, width)
        draw = draws[left, query - 1][:, :, None, None]
        inside = _window(draw[:, :1], side, height).mT & _window(draw[:, 1:2], side, width)
        corner = torch.where(draw[:, 2:] < 0.5, lower[left], upper[left])
        tried = torch.where(inside, corner, worst.images[left])
        worst = _update(worst, left, evaluate(model_fn, tried, labels[left], margin))
    return worst


def _window(draw: Tensor, side: int, length: int) -> Tensor:
    """Which of `length` places, the last dimension, a window of `side` covers, put by `draw` in [0, 1)."""
    places = length - side + 1
    start = (draw * places).long().clamp(max=places - 1)
    offset = torch.arange(length, device=draw.device) - start
    return (offset >= 0) & (offset < side)


def _update(worst: Candidates, index: Tensor, found: Candidates) -> Candidates:
    """`worst`, with the images at `index` replaced by those `found` for them where these are worse."""
    part = worse(Candidates(*(field[index] for field in worst)), found)
    return Candidates(*(old.index_copy(0, index, new) for old, new in zip(worst, part, strict=True)))


# ---- C&W


def cw(
    model_fn: ModelFn,
    images: Tensor,
    labels: Tensor,
    epsilon: float | None = None,
    *,
    num_steps: int = 1000,
    lr: float = 0.01,
    c: float = 1.0,
) -> Tensor:
    """C&W-L2: lower ||x' - x||^2 + c * max(confidence - margin, 0) by Adam (Carlini & Wagner 2017).

    x' = (tanh(w) + 1) / 2; `c` is the same for all images, without the paper's search. It returns the
    misclassified x' of least distance, or the image where there is none or where it is misclassified itself.
    The result is in [0, 1] but NOT within `epsilon`, which is unused and there for the common signature.
    """
    check_input(images, labels)
    best = images.detach().clone()
    if num_steps == 0:
        return best
    clean = evaluate(model_fn, images.detach(), labels, margin)
    least = torch.where(clean.misclassified & (clean.loss >= CW_CONFIDENCE), 0.0, torch.inf)
    # A little short of 1: the inverse of tanh is infinite for black and white.
    w = torch.atanh((2 * best - 1) * (1 - 1e-6)).requires_grad_()
    optimizer = torch.optim.Adam([w], lr=lr)
    for _ in range(num_steps):
        with torch.enable_grad():
            points = (w.tanh() + 1) / 2
            outputs = model_fn(points)
            lead = margin(outputs, labels)
            distance = (points - images.detach()).square().sum((1, 2, 3))
            cost = distance + c * (CW_CONFIDENCE - lead).relu()
            w.grad = torch.autograd.grad(cost.sum(), w)[0]
        nearer = (lead >= CW_CONFIDENCE) & misclassified(outputs, labels) & (distance < least)
        best = torch.where(nearer[:, None, None, None], points.detach(), best)
        least = torch.where(nearer, distance.detach(), least)
        optimizer.step()
    return best


# ---- noise


def noise(
    model_fn: ModelFn,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move each pixel by `epsilon` up or down at random, without asking the model.

    FGSM moves pixels as far: what it does beyond noise is due to the gradient.
    """
    check_input(images, labels)
    if epsilon == 0:
        return images.detach().clone()
    lower, upper = ball_of(images, epsilon)
    draws = uniform(random_streams(generator, len(images)), images.shape[1:], images)
    return torch.where(draws < 0.5, lower, upper)
