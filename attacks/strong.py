"""APGD, the Square attack, C&W-L2, and noise for comparison."""

import math
from bisect import bisect_left
from functools import reduce

import torch

from .common import ball_of, check_input, random_starts, random_streams, uniform
from .gradient import Candidates, cross_entropy, differentiator, evaluate, margin, misclassified, where, worse

APGD_RISING_SHARE = 0.75  # of the steps must raise the loss, or the step size halves; the paper's rho
APGD_INERTIA = 0.75  # weight of the new step, the rest is that of the last one; the paper's alpha
SQUARE_FIRST_AREA = 0.8  # of the first squares, as a share of the image; the authors' choice for L-infinity
# After so many of 10,000 queries the area halves, as in the authors' code (their paper leaves out 500).
SQUARE_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def apgd(
    model_fn, images, labels, epsilon, *,
    num_steps=100, restarts=1, generator=None, loss=cross_entropy, trace=None
):  # fmt: skip
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


def _apgd_restart(differentiate, start, labels, ball, step_size, num_steps):
    """The worst points of one restart of APGD, whose steps are `step_size` long at first: Candidates."""

    def ask(step, points):
        outputs, losses, gradient = differentiate(step, points)
        return Candidates(points, misclassified(outputs, labels), losses, gradient)

    checkpoints = set(_apgd_checkpoints(num_steps))
    # The algorithm goes back to the point of highest loss, which need not be a misclassified one.
    now = best = ask(0, start)
    worst = now._replace(gradient=None)
    previous, last_check, last_best = start, 0, best.loss
    sizes = torch.full_like(start[:, :1, :1, :1], step_size)
    halved, rises = torch.zeros_like(now.misclassified), torch.zeros_like(now.loss)
    for step in range(1, num_steps + 1):
        alpha = APGD_INERTIA if step > 1 else 1.0
        ahead = (now.images + sizes * now.gradient.sign()).clamp(*ball)
        moved = now.images + alpha * (ahead - now.images) + (1 - alpha) * (now.images - previous)
        last, now = now, ask(step, moved.clamp(*ball))
        previous, rises = last.images, rises + (now.loss > last.loss)
        worst = worse(worst, now)
        best = where(now.loss > best.loss, now, best)
        if step in checkpoints:
            stuck = ~halved & (best.loss == last_best)
            halved = (rises < APGD_RISING_SHARE * (step - last_check)) | stuck
            sizes = torch.where(halved[:, None, None, None], sizes / 2, sizes)
            now = where(halved, best, now)
            last_check, last_best, rises = step, best.loss, torch.zeros_like(rises)
    return worst


def _apgd_checkpoints(num_steps):
    """Yield the steps at which APGD looks back: at 22 %, then at intervals 3 points shorter, down to 6."""
    share = interval = 22  # in whole points: 0.22 + 0.19 is more than 0.41 in floating point
    while share < 100:
        yield -(-share * num_steps // 100)
        interval = max(interval - 3, 6)
        share += interval


def square(model_fn, images, labels, epsilon, *, num_queries=5000, restarts=1, generator=None):
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


def _square_restart(model_fn, labels, ball, streams, num_queries):
    """The worst points of one restart of the Square attack, all of them corners of `ball`: Candidates."""
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


def _window(draw, side, length):
    """Which of `length` places, the last dimension, a window of `side` covers, put by `draw` in [0, 1)."""
    places = length - side + 1
    start = (draw * places).long().clamp(max=places - 1)
    offset = torch.arange(length, device=draw.device) - start
    return (offset >= 0) & (offset < side)


def _update(worst, index, found):
    """`worst`, with the images at `index` replaced by those `found` for them where these are worse."""
    part = worse(Candidates(*(field[index] for field in worst[:3])), found)
    return Candidates(*(old.index_copy(0, index, new) for old, new in zip(worst[:3], part[:3], strict=True)))


def cw(model_fn, images, labels, epsilon=None, *, num_steps=1000, lr=0.01, c=1.0):
    """C&W-L2: lower ||x' - x||^2 + c * max(-margin, 0) by Adam (Carlini & Wagner 2017).

    x' = (tanh(w) + 1) / 2; `c` is the same for all images, without the paper's search; its confidence is 0.
    It returns the misclassified x' of least distance, or the image where there is none or where it is
    misclassified itself. The result is in [0, 1] but NOT within `epsilon`, which is there for the common
    signature alone.
    """
    check_input(images, labels)
    best = images.detach().clone()
    if num_steps == 0:
        return best
    clean = evaluate(model_fn, images.detach(), labels, margin)
    least = torch.where(clean.misclassified & (clean.loss >= 0), 0.0, torch.inf)
    # A little short of 1: the inverse of tanh is infinite for black and white.
    w = torch.atanh((2 * best - 1) * (1 - 1e-6)).requires_grad_()
    optimizer = torch.optim.Adam([w], lr=lr)
    for _ in range(num_steps):
        with torch.enable_grad():
            points = (w.tanh() + 1) / 2
            outputs = model_fn(points)
            lead = margin(outputs, labels)
            distance = (points - images.detach()).square().sum((1, 2, 3))
            cost = distance + c * (-lead).relu()
            w.grad = torch.autograd.grad(cost.sum(), w)[0]
        nearer = (lead >= 0) & misclassified(outputs, labels) & (distance < least)
        best = torch.where(nearer[:, None, None, None], points.detach(), best)
        least = torch.where(nearer, distance.detach(), least)
        optimizer.step()
    return best


def noise(model_fn, images, labels, epsilon, *, generator=None):
    """Move each pixel by `epsilon` up or down at random, without asking the model.

    FGSM moves pixels as far: what it does beyond noise is due to the gradient.
    """
    check_input(images, labels)
    if epsilon == 0:
        return images.detach().clone()
    lower, upper = ball_of(images, epsilon)
    draws = uniform(random_streams(generator, len(images)), images.shape[1:], images)
    return torch.where(draws < 0.5, lower, upper)
