"""Attacks as pure functions: `attack(model_fn, images, labels, epsilon, ...) -> images`.

Every attack takes `model_fn`, which maps images to logits (N, K) or to a tuple with a field `logits`;
`images`, float, N x C x H x W in [0, 1]; `labels`, int64, (N,); and `epsilon`, the radius of the L-infinity
ball in pixel units, in [0, 1]. It returns new detached images in [0, 1], each within `epsilon` of its
original also in float arithmetic. No argument, mode, parameter or `.grad` changes, but for the state of a
generator that is passed; modes are the caller's business. What happens to an image does not depend on the
others in its batch: losses are summed, never averaged, and each image has its own stream of random numbers.

Images outside [0, 1] and options out of range raise ValueError. An `epsilon` of 0 or no steps return the
images bit for bit. A `loss` maps the model's outputs and the labels to one value per image, (N,), to be
raised. A `generator` keys the random numbers, None being a fresh one of seed 0; one on the CPU gives the same
numbers whatever device the images are on. `trace(step, gradient)`, where there is one, sees every gradient;
steps count from 0 in each restart. One attack strays from this: `cw` is not bound by epsilon.
"""

import contextlib
import contextvars
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

ModelFn = Callable[[Tensor], Any]
Loss = Callable[[Any, Tensor], Tensor]
Trace = Callable[[int, Tensor], None]
Direction = Callable[[int, Tensor], Tensor]
Ball = tuple[Tensor, Tensor]


class Verdict(NamedTuple):
    """Images, whether each is misclassified (N,), and its loss (N,)."""

    images: Tensor
    wrong: Tensor
    value: Tensor


class Iterate(NamedTuple):
    """Images, their losses (N,) and the gradients of these."""

    images: Tensor
    value: Tensor
    slope: Tensor


Some = TypeVar("Some", Verdict, Iterate)


# ---- losses: (outputs, labels) -> (N,), to be raised


def cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, (N,), in float32 or wider.

    In float32 its gradient starts to vanish where the margin passes about 17, and all of it has by 104.
    """
    return F.cross_entropy(scores(outputs), labels, reduction="none")


def margin(outputs: Any, labels: Tensor) -> Tensor:
    """Largest other logit minus the true one, (N,): above 0 where the image is misclassified."""
    logits = scores(outputs)
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - true[:, 0]


def dlr(outputs: Any, labels: Tensor) -> Tensor:
    """Difference of logits ratio, (N,): the margin over the first logit's lead on the third, so scale-free.

    Croce & Hein 2020, eq. 6. It is 1, and its gradient 0, wherever the true class comes third. Needs three
    classes or more.
    """
    logits = scores(outputs)
    if logits.shape[1] < 3:
        raise ValueError(f"dlr needs at least 3 classes, got logits of {logits.shape[1]}")
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def scores(outputs: Any) -> Tensor:
    """The logits of a model's outputs, in float32 or wider."""
    logits = getattr(outputs, "logits", outputs)
    return logits if logits.dtype == torch.float64 else logits.float()


def misclassified(outputs: Any, labels: Tensor) -> Tensor:
    """Which images, (N,) bool, the outputs get wrong; with a score of NaN always."""
    logits = scores(outputs).detach()
    return (logits.argmax(1) != labels) | logits.isnan().any(1)


# ---- attacks


def fgsm(
    model_fn: ModelFn,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    loss: Loss = cross_entropy,
    trace: Trace | None = None,
) -> Tensor:
    """Fast gradient sign method: one step of `epsilon` along the gradient's sign (Goodfellow et al. 2015)."""
    return bim(model_fn, images, labels, epsilon, num_steps=1, loss=loss, trace=trace)


def bim(
    model_fn: ModelFn,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    step_size: float | None = None,
    num_steps: int = 10,
    loss: Loss = cross_entropy,
    trace: Trace | None = None,
) -> Tensor:
    """Basic iterative method: `num_steps` FGSM steps, each clipped to the ball (Kurakin et al. 2016).

    A `step_size` of None is epsilon / num_steps.
    """
    _check(images, labels, epsilon=epsilon, step_size=step_size, num_steps=num_steps)
    if epsilon == 0 or num_steps == 0:
        return images.detach().clone()
    step_size = epsilon / num_steps if step_size is None else step_size
    gradient = _gradient_of(model_fn, labels, loss, trace)
    return _ascend(gradient, images, _ball(images, epsilon), step_size, num_steps)


def mim(
    model_fn: ModelFn,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    step_size: float | None = None,
    num_steps: int = 10,
    decay: float = 1.0,
    loss: Loss = cross_entropy,
    trace: Trace | None = None,
) -> Tensor:
    """Momentum iterative method: BIM along g <- decay * g + gradient / ||gradient||_1 (Dong et al. 2018).

    The L1 norm is each image's own; a gradient of zero adds nothing to g. A `step_size` of None is
    epsilon / num_steps.
    """
    _check(images, labels, epsilon=epsilon, step_size=step_size, num_steps=num_steps, decay=decay)
    if epsilon == 0 or num_steps == 0:
        return images.detach().clone()
    step_size = epsilon / num_steps if step_size is None else step_size
    gradient = _gradient_of(model_fn, labels, loss, trace)
    momentum = torch.zeros_like(images)

    def accumulated(step: int, points: Tensor) -> Tensor:
        nonlocal momentum
        slope = gradient(step, points)
        norm = slope.abs().sum((1, 2, 3), keepdim=True)
        norm = norm.clamp(max=torch.finfo(norm.dtype).max)  # by an infinite one the image would freeze
        momentum = decay * momentum + torch.where(norm > 0, slope / norm, 0)
        return momentum

    return _ascend(accumulated, images, _ball(images, epsilon), step_size, num_steps)


def pgd(
    model_fn: ModelFn,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    step_size: float = 2 / 255,
    num_steps: int = 10,
    random_start: bool = False,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    loss: Loss = cross_entropy,
    trace: Trace | None = None,
) -> Tensor:
    """Projected gradient descent: BIM, if asked from a random point of the ball (Madry et al. 2018).

    The random point is uniform in the ball. With `restarts`, which need `random_start`, it returns image by
    image the worst of the last iterates: a misclassified one before a correct one, then the one of higher
    loss.
    """
    _check(images, labels, epsilon=epsilon, step_size=step_size, num_steps=num_steps, restarts=restarts)
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts={restarts} without random_start would repeat one run")
    if epsilon == 0 or num_steps == 0:
        return images.detach().clone()
    ball = _ball(images, epsilon)
    gradient = _gradient_of(model_fn, labels, loss, trace)
    if not random_start:
        return _ascend(gradient, images, ball, step_size, num_steps)
    starts = _random_starts(images, epsilon, ball, restarts, generator)
    runs = (_ascend(gradient, start, ball, step_size, num_steps) for start in starts)
    if restarts == 1:
        return next(runs)
    return reduce(_worse, (_judge(model_fn, run, labels, loss) for run in runs)).images


def apgd(
    model_fn: ModelFn,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    num_steps: int = 100,
    rho: float = 0.75,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    loss: Loss = cross_entropy,
    trace: Trace | None = None,
) -> Tensor:
    """Auto-PGD: momentum, and a step size that halves on demand (Croce & Hein 2020, Algorithm 1).

    Each restart begins at a uniformly random point of the ball. It returns, image by image, the worst point
    ever seen, the image itself included: misclassified before correct, then of higher loss. `rho` is the
    share of steps that must raise the loss. `loss=dlr` is for where cross-entropy saturates.
    """
    _check(images, labels, epsilon=epsilon, num_steps=num_steps, rho=rho, restarts=restarts)
    if epsilon == 0 or num_steps == 0:
        return images.detach().clone()
    ball = _ball(images, epsilon)

    def probe(step: int, points: Tensor) -> tuple[Verdict, Tensor]:
        outputs, value, slope = _differentiate(model_fn, points, labels, loss)
        if trace is not None:
            trace(step, slope)
        return Verdict(points, misclassified(outputs, labels), value), slope

    starts = _random_starts(images, epsilon, ball, restarts, generator)
    runs = (_apgd_run(probe, start, ball, 2 * epsilon, num_steps, rho) for start in starts)
    return reduce(_worse, runs, _judge(model_fn, images.detach().clone(), labels, loss)).images


def _apgd_run(
    probe: Callable[[int, Tensor], tuple[Verdict, Tensor]],
    start: Tensor,
    ball: Ball,
    step_size: float,
    num_steps: int,
    rho: float,
) -> Verdict:
    """The worst points of one restart of APGD, whose steps are `step_size` long at first."""
    checkpoints = set(_apgd_checkpoints(num_steps))
    worst, slope = probe(0, start)
    # The algorithm goes back to the point of highest loss, which need not be a misclassified one.
    now = best = Iterate(start, worst.value, slope)
    previous, last_check, last_best = start, 0, best.value
    sizes = torch.full_like(start[:, :1, :1, :1], step_size)
    halved, rises = torch.zeros_like(worst.wrong), torch.zeros_like(worst.value)
    for step in range(1, num_steps + 1):
        alpha = 0.75 if step > 1 else 1.0
        ahead = (now.images + sizes * now.slope.sign()).clamp(*ball)
        moved = now.images + alpha * (ahead - now.images) + (1 - alpha) * (now.images - previous)
        verdict, slope = probe(step, moved.clamp(*ball))
        rises = rises + (verdict.value > now.value)
        previous, now = now.images, Iterate(verdict.images, verdict.value, slope)
        worst = _worse(worst, verdict)
        best = _where(now.value > best.value, now, best)
        if step in checkpoints:
            stuck = ~halved & (best.value == last_best)
            halved = (rises < rho * (step - last_check)) | stuck
            sizes = torch.where(halved[:, None, None, None], sizes / 2, sizes)
            now = _where(halved, best, now)
            last_check, last_best, rises = step, best.value, torch.zeros_like(rises)
    return worst


def _apgd_checkpoints(num_steps: int) -> Iterator[int]:
    """The steps at which APGD looks back: at 22 % of all, then at intervals 3 points shorter, down to 6."""
    share = interval = 22  # in whole points: 0.22 + 0.19 is more than 0.41 in floating point
    while share < 100:
        yield -(-share * num_steps // 100)
        interval = max(interval - 3, 6)
        share += interval


def square(
    model_fn: ModelFn,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    num_queries: int = 5000,
    p_init: float = 0.8,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Square attack: random search for a larger margin (Andriushchenko et al. 2020).

    An image gets `num_queries` in each restart until it is fooled, and none if misclassified as it comes.
    `p_init` is the area of the first squares as a share of the image. Random numbers take
    4 * num_queries * (channels + 2) bytes an image.
    """
    _check(images, labels, epsilon=epsilon, num_queries=num_queries, p_init=p_init, restarts=restarts)
    if epsilon == 0 or num_queries == 0:
        return images.detach().clone()
    lower, upper = _ball(images, epsilon)
    streams = _streams(generator, len(images))
    worst = _judge(model_fn, images.detach().clone(), labels, margin)
    for _ in range(restarts):
        left = (~worst.wrong).nonzero()[:, 0]
        if len(left) == 0:
            break
        still = [streams[index] for index in left.tolist()]
        found = _square_run(model_fn, labels[left], (lower[left], upper[left]), still, num_queries, p_init)
        worst = _put(worst, left, _worse(_take(worst, left), found))
    return worst.images


def _square_run(
    model_fn: ModelFn,
    labels: Tensor,
    ball: Ball,
    streams: list[torch.Generator],
    num_queries: int,
    p_init: float,
) -> Verdict:
    """One restart of the Square attack on the images in the middle of `ball`."""
    lower, upper = ball
    _, channels, height, width = lower.shape
    stripes = _uniform(streams, (channels, 1, width), lower) < 0.5
    draws = _uniform(streams, (num_queries - 1, channels + 2), lower)
    worst = _judge(model_fn, torch.where(stripes, lower, upper), labels, margin)
    for query in range(1, num_queries):
        left = (~worst.wrong).nonzero()[:, 0]
        if len(left) == 0:
            break
        area = p_init / 2 ** bisect_left(SQUARE_HALVINGS, 10_000 * query / num_queries)
        side = min(max(round(math.sqrt(area * height * width)), 1), height, width)
        draw = draws[left, query - 1][:, :, None, None]
        inside = _window(draw[:, :1], side, height).mT & _window(draw[:, 1:2], side, width)
        corner = torch.where(draw[:, 2:] < 0.5, lower[left], upper[left])
        before = _take(worst, left)
        found = _judge(model_fn, torch.where(inside, corner, before.images), labels[left], margin)
        worst = _put(worst, left, _worse(before, found))
    return worst


# On a scale of 10,000 queries, as in the authors' code (their paper leaves out 500).
SQUARE_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def _window(draw: Tensor, side: int, length: int) -> Tensor:
    """Which of `length` places, the last dimension, a window of `side` covers, put by `draw` in [0, 1)."""
    places = length - side + 1
    start = (draw * places).long().clamp(max=places - 1)
    offset = torch.arange(length, device=draw.device) - start
    return (offset >= 0) & (offset < side)


def cw(
    model_fn: ModelFn,
    images: Tensor,
    labels: Tensor,
    epsilon: float | None = None,
    *,
    num_steps: int = 1000,
    lr: float = 0.01,
    confidence: float = 0.0,
    c: float = 1.0,
    search_steps: int = 1,
) -> Tensor:
    """C&W-L2: lower ||x' - x||^2 + c * max(confidence - margin, 0) by Adam (Carlini & Wagner 2017).

    x' = (tanh(w) + 1) / 2. It returns the success of least distance, or the image where there is none; one
    misclassified as it comes is a success of distance 0. The result is in [0, 1] but NOT within an epsilon:
    the argument is there so that all attacks are called alike, and unused. `search_steps` above 1 search for
    each image's `c`: halfway down after a success, tenfold or halfway up after a failure.
    """
    options = {"num_steps": num_steps, "lr": lr, "confidence": confidence, "c": c}
    _check(images, labels, **options, search_steps=search_steps)
    images = images.detach()
    if num_steps == 0:
        return images.clone()
    clean = _judge(model_fn, images, labels, margin)
    least = torch.where(clean.wrong & (clean.value >= confidence), 0.0, torch.inf)
    best = images.clone()
    weight, low, high = (torch.full_like(least, value) for value in (c, 0.0, math.inf))
    for _ in range(search_steps):
        cost = partial(_cw_cost, model_fn, images, labels, weight, confidence)
        found, distance = _cw_run(cost, images, num_steps, lr)
        best = torch.where((distance < least)[:, None, None, None], found, best)
        least = torch.minimum(distance, least)
        success = distance < torch.inf
        low, high = torch.where(success, low, weight), torch.where(success, weight, high)
        weight = torch.where(high < torch.inf, (low + high) / 2, 10 * weight)
    return best


def _cw_cost(
    model_fn: ModelFn, images: Tensor, labels: Tensor, weight: Tensor, confidence: float, points: Tensor
) -> tuple[Tensor, Tensor]:
    """What C&W lowers, and the squared distance of each success, infinite for a failure: two (N,) tensors."""
    outputs = model_fn(points)
    lead = margin(outputs, labels)
    distance = (points - images).square().sum((1, 2, 3))
    success = (lead >= confidence) & misclassified(outputs, labels)
    return distance + weight * (confidence - lead).relu(), torch.where(success, distance, torch.inf).detach()


def _cw_run(
    cost_of: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor, num_steps: int, lr: float
) -> tuple[Tensor, Tensor]:
    """The successes of least squared distance on the way, and that distance (N,), infinite without one."""
    # Short of 1, or tanh's inverse were infinite for black and white.
    w = torch.atanh((2 * images - 1) * (1 - 1e-6)).requires_grad_()
    optimizer = torch.optim.Adam([w], lr=lr)
    best, least = images, torch.full_like(images[:, 0, 0, 0], torch.inf)
    for _ in range(num_steps):
        with torch.enable_grad():
            points = (w.tanh() + 1) / 2
            cost, distance = cost_of(points)
            w.grad = torch.autograd.grad(cost.sum(), w)[0]
        best = torch.where((distance < least)[:, None, None, None], points.detach(), best)
        least = torch.minimum(distance, least)
        optimizer.step()
    return best, least


def noise(
    model_fn: ModelFn,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Move each pixel by `epsilon` up or down at random, without asking the model.

    What FGSM does beyond this, which moves pixels as far, is the gradient's doing.
    """
    _check(images, labels, epsilon=epsilon)
    if epsilon == 0:
        return images.detach().clone()
    lower, upper = _ball(images, epsilon)
    draws = _uniform(_streams(generator, len(images)), images.shape[1:], images)
    return torch.where(draws < 0.5, lower, upper)


class ZeroGradients:
    """Watches, as the `trace` of one attack's call, which images had a gradient of exactly zero (or NaN).

    Three (N,) bool tensors on the images' device, over all steps of all restarts: `first` (the first
    gradient), `ever` and `always`; None before the first gradient. An image with `always` was never moved by
    its gradient: that it survived says nothing about robustness.
    """

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.ever: Tensor | None = None
        self.always: Tensor | None = None

    def __call__(self, step: int, gradient: Tensor) -> None:
        zero = (gradient == 0).flatten(1).all(1)
        if self.first is None:
            self.first = self.ever = self.always = zero
        else:
            self.ever, self.always = self.ever | zero, self.always & zero


ATTACKS: dict[str, Callable[..., Tensor]] = {
    "noise": noise,
    "fgsm": fgsm,
    "bim": bim,
    "mim": mim,
    "pgd": pgd,
    "apgd": apgd,
    "apgd_dlr": partial(apgd, loss=dlr),
    "square": square,
    "cw": cw,
}
UNBOUNDED = frozenset({"cw"})  # whose results are not within epsilon


# ---- what they share

_WHOLE_FROM_0 = (lambda value: isinstance(value, int) and value >= 0, "is a whole number, 0 or more")
_WHOLE_FROM_1 = (lambda value: isinstance(value, int) and value >= 1, "is a whole number, 1 or more")
_NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "is 0 or more")
_POSITIVE = (lambda value: 0 < value < math.inf, "is above 0")
_OPTIONS = {
    "epsilon": (lambda value: 0 <= value <= 1, "lies in [0, 1] (8 of 255 levels is 8/255)"),
    "step_size": (lambda value: value is None or 0 < value < math.inf, "is above 0"),
    "num_steps": _WHOLE_FROM_0,
    "num_queries": _WHOLE_FROM_0,
    "restarts": _WHOLE_FROM_1,
    "search_steps": _WHOLE_FROM_1,
    "decay": _NOT_NEGATIVE,
    "confidence": _NOT_NEGATIVE,
    "lr": _POSITIVE,
    "c": _POSITIVE,
    "rho": (lambda value: 0 <= value <= 1, "lies in [0, 1]"),
    "p_init": (lambda value: 0 < value <= 1, "lies in (0, 1]"),
}


_TRUSTING = contextvars.ContextVar("trusting", default=False)


@contextlib.contextmanager
def trusting() -> Iterator[None]:
    """Within it images are taken to lie in [0, 1] unseen: to look would wait for a GPU in every call."""
    token = _TRUSTING.set(True)
    try:
        yield
    finally:
        _TRUSTING.reset(token)


def _check(images: Tensor, labels: Tensor, **options: Any) -> None:
    """Raise ValueError for what no attack can work with; waits once for a GPU, unless `trusting`."""
    for name, value in options.items():
        allowed, words = _OPTIONS[name]
        if not allowed(value):
            raise ValueError(f"{name} {words}, got {value}")
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"images are N x C x H x W and labels (N,), got {shapes}")
    if not images.is_floating_point():
        raise ValueError(f"images are float in [0, 1], got {images.dtype}")
    if images.numel() == 0 or _TRUSTING.get():
        return
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if not (low >= 0 and high <= 1):  # so too where they are NaN
        observed = f"[{low:.4g}, {high:.4g}]"
        raise ValueError(f"pixels lie in [0, 1] before any normalisation, got {observed}")


def _ball(images: Tensor, epsilon: float) -> Ball:
    """Lowest and highest images within `epsilon` and [0, 1], also in float arithmetic."""
    images = images.detach()
    radius = torch.tensor(epsilon, dtype=images.dtype)
    if radius.item() > epsilon:
        radius = torch.nextafter(radius, torch.zeros_like(radius))
    radius = radius.item()
    lower, upper = images - radius, images + radius
    # A rounded sum can lie beyond the true one. One of the two differences is always exact (Dekker 1971).
    outside = (upper - images > radius) | (upper - radius > images)
    upper = torch.where(outside, torch.nextafter(upper, images), upper)
    lower = torch.where(images - lower > radius, torch.nextafter(lower, images), lower)
    return lower.clamp(min=0), upper.clamp(max=1)


def _ascend(direction: Direction, start: Tensor, ball: Ball, step_size: float, num_steps: int) -> Tensor:
    """`num_steps` steps along the sign of `direction(step, points)`, each clipped to the ball."""
    points = start.detach().clone()
    for step in range(num_steps):
        points = (points + step_size * direction(step, points).sign()).clamp(*ball)
    return points


def _gradient_of(model_fn: ModelFn, labels: Tensor, loss: Loss, trace: Trace | None) -> Direction:
    """The function (step, points) -> gradient of the loss there."""

    def gradient(step: int, points: Tensor) -> Tensor:
        slope = _differentiate(model_fn, points, labels, loss)[2]
        if trace is not None:
            trace(step, slope)
        return slope

    return gradient


def _differentiate(
    model_fn: ModelFn, points: Tensor, labels: Tensor, loss: Loss
) -> tuple[Any, Tensor, Tensor]:
    """Outputs, losses (N,), and the gradient of the summed losses, with 0 for NaN."""
    points = points.detach()
    with torch.enable_grad():
        points.requires_grad_()
        outputs = model_fn(points)
        values = _per_image(loss, outputs, labels)
        if not values.requires_grad:  # a model that ignores its input has nothing to differentiate
            return outputs, values, torch.zeros_like(points)
        (slope,) = torch.autograd.grad(values.sum(), points, allow_unused=True, materialize_grads=True)
    # Also a copy, which must be: the next replay of a CUDA graph overwrites what it returned.
    return outputs, values.detach(), slope.detach().nan_to_num()


@torch.no_grad()
def _judge(model_fn: ModelFn, images: Tensor, labels: Tensor, loss: Loss) -> Verdict:
    outputs = model_fn(images)
    return Verdict(images, misclassified(outputs, labels), _per_image(loss, outputs, labels))


def _per_image(loss: Loss, outputs: Any, labels: Tensor) -> Tensor:
    values = loss(outputs, labels)
    if values.shape != labels.shape:
        observed = f"{tuple(values.shape)} for {len(labels)} images"
        raise ValueError(f"the loss of an attack gives one value per image, got {observed}")
    return values


def _worse(old: Verdict, new: Verdict) -> Verdict:
    """Image by image the worse of two: misclassified first, then of higher loss, then the old one."""
    return _where((new.wrong & ~old.wrong) | ((new.wrong == old.wrong) & (new.value > old.value)), new, old)


def _where(mask: Tensor, new: Some, old: Some) -> Some:
    return type(new)._make(
        torch.where(mask.view(-1, *[1] * (b.ndim - 1)), a, b) for a, b in zip(new, old, strict=True)
    )


def _take(verdict: Verdict, index: Tensor) -> Verdict:
    return Verdict(*(field[index] for field in verdict))


def _put(verdict: Verdict, index: Tensor, part: Verdict) -> Verdict:
    return Verdict(*(field.index_copy(0, index, new) for field, new in zip(verdict, part, strict=True)))


# ---- randomness: one stream per image, so that neither batching nor the number of restarts moves it


def _streams(generator: torch.Generator | None, count: int) -> list[torch.Generator]:
    """One CPU generator per image, keyed by the next `count` draws of `generator` (None: of seed 0)."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    keys = torch.randint(2**32, (count,), generator=generator, device=generator.device)
    return [torch.Generator().manual_seed(key) for key in keys.tolist()]


def _uniform(streams: list[torch.Generator], shape: tuple[int, ...], images: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float32, (number of streams, *shape), on the device of `images`."""
    # From pinned memory the copy does not wait for what a GPU is still doing.
    numbers = torch.empty(len(streams), *shape, pin_memory=images.is_cuda)
    for row, stream in zip(numbers, streams, strict=True):
        row.uniform_(generator=stream)
    return numbers.to(images.device, non_blocking=images.is_cuda)


def _random_starts(
    images: Tensor, epsilon: float, ball: Ball, count: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """`count` uniformly random points of each image's ball, clipped to [0, 1]."""
    streams = _streams(generator, len(images))
    for _ in range(count):
        draws = _uniform(streams, images.shape[1:], images).to(images.dtype)
        yield (images.detach() + epsilon * (2 * draws - 1)).clamp(*ball)
