"""White-box attacks as pure functions: `attack(model_fn, images, labels, epsilon, ...) -> images`.

Every attack takes `model_fn`, which maps images to logits (N, K), or to a tuple with a field `logits` where
`loss` takes that; `images`, float, N x C x H x W in [0, 1]; `labels`, int64, (N,); and `epsilon`, the L-infinity
radius in pixel units, in [0, 1]. It returns new detached images in [0, 1], each within `epsilon` of its
original also in float arithmetic. No argument, mode, parameter or `.grad` changes, but for the state of a
generator that is passed; modes are the caller's business. What happens to an image does not depend on the
others in its batch: losses are summed, never averaged, and each image has its own stream of random numbers.
Images outside [0, 1] and options out of range raise ValueError. An `epsilon` of 0 or no steps return the
images bit for bit. `trace(step, gradient)`, where there is one, sees every gradient; steps count from 0 in
each restart.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ModelFn = Callable[[Tensor], Any]
Loss = Callable[[Any, Tensor], Tensor]
Direction = Callable[[int, Tensor], Tensor]
Trace = Callable[[int, Tensor], None]


# ---- losses: (logits, labels) -> (N,), to be raised


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, (N,), in float32 or wider.

    In float32 its gradient starts to vanish where the margin passes about 17, and all of it has by 104.
    """
    return F.cross_entropy(_widen(logits), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the true one, (N,): above 0 exactly where the image is misclassified."""
    logits = _widen(logits)
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - true[:, 0]


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, (N,): the margin over the top logit's lead on the third, so scale-free.

    Croce & Hein 2020, eq. 6. Needs three classes or more.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"dlr needs at least 3 classes, got logits of {logits.shape[1]}")
    top = _widen(logits).topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


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
    _check(images, labels, epsilon, num_steps=num_steps, step_size=step_size)
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
    _check(images, labels, epsilon, num_steps=num_steps, step_size=step_size)
    if not 0 <= decay < torch.inf:
        raise ValueError(f"decay is 0 or more, got {decay}")
    if epsilon == 0 or num_steps == 0:
        return images.detach().clone()
    step_size = epsilon / num_steps if step_size is None else step_size
    gradient = _gradient_of(model_fn, labels, loss, trace)
    momentum = torch.zeros_like(images)

    def accumulated(step: int, points: Tensor) -> Tensor:
        nonlocal momentum
        slope = gradient(step, points)
        norm = slope.abs().sum((1, 2, 3), keepdim=True)
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
    loss. `generator` keys the noise, None being a fresh one of seed 0; one on the CPU gives the same noise
    whatever device the images are on.
    """
    _check(images, labels, epsilon, num_steps=num_steps, step_size=step_size, restarts=restarts)
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
    return next(runs) if restarts == 1 else _worst(model_fn, runs, labels, loss)


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


ATTACKS: dict[str, Callable[..., Tensor]] = {"fgsm": fgsm, "bim": bim, "mim": mim, "pgd": pgd}


# ---- what they share


def _check(
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    num_steps: int = 1,
    step_size: float | None = None,
    restarts: int = 1,
) -> None:
    """Raise ValueError for what no attack can work with; costs one device synchronisation."""
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon lies in [0, 1], got {epsilon}; 8 of 255 levels is 8/255")
    if num_steps < 0 or num_steps != int(num_steps):
        raise ValueError(f"num_steps is a whole number, 0 or more, got {num_steps}")
    if step_size is not None and not 0 < step_size < torch.inf:
        raise ValueError(f"step_size is above 0, got {step_size}")
    if restarts < 1 or restarts != int(restarts):
        raise ValueError(f"restarts is a whole number, 1 or more, got {restarts}")
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"images are N x C x H x W and labels (N,), got {shapes}")
    if not images.is_floating_point():
        raise ValueError(f"images are float in [0, 1], got {images.dtype}")
    if images.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if not (low >= 0 and high <= 1):  # also where either is NaN
        raise ValueError(
            f"pixels lie in [0, 1], got [{low:.4g}, {high:.4g}]; give images before normalisation"
        )


def _ball(images: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
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


def _gradient_of(model_fn: ModelFn, labels: Tensor, loss: Loss, trace: Trace | None) -> Direction:
    """The function (step, points) -> gradient of the summed loss there, 0 where it is NaN."""

    def gradient(step: int, points: Tensor) -> Tensor:
        points = points.detach()
        with torch.enable_grad():
            points.requires_grad_()
            total = _per_image(loss, model_fn(points), labels).sum()
            # A model that ignores its input has no graph to differentiate: its gradient is zero.
            slope = torch.autograd.grad(total, points, allow_unused=True)[0] if total.requires_grad else None
        slope = torch.zeros_like(points) if slope is None else slope.detach().nan_to_num()
        if trace is not None:
            trace(step, slope)
        return slope

    return gradient


def _per_image(loss: Loss, outputs: Any, labels: Tensor) -> Tensor:
    values = loss(outputs, labels)
    if values.shape != labels.shape:
        raise ValueError(
            f"a loss gives one value per image, {tuple(labels.shape)}, got {tuple(values.shape)}"
        )
    return values


def _ascend(
    direction: Direction, start: Tensor, ball: tuple[Tensor, Tensor], step_size: float, num_steps: int
) -> Tensor:
    """`num_steps` steps along the sign of `direction(step, points)`, each clipped to the ball."""
    points = start.detach().clone()
    for step in range(num_steps):
        points = (points + step_size * direction(step, points).sign()).clamp(*ball)
    return points


def _worst(model_fn: ModelFn, runs: Iterator[Tensor], labels: Tensor, loss: Loss) -> Tensor:
    """Of each image's candidates the worst: misclassified first, then of higher loss, then earlier."""
    worst = next(runs)
    worst_wrong, worst_loss = _judge(model_fn, worst, labels, loss)
    for candidate in runs:
        wrong, value = _judge(model_fn, candidate, labels, loss)
        better = (wrong & ~worst_wrong) | ((wrong == worst_wrong) & (value > worst_loss))
        worst = torch.where(better[:, None, None, None], candidate, worst)
        worst_wrong, worst_loss = worst_wrong | wrong, torch.where(better, value, worst_loss)
    return worst


@torch.no_grad()
def _judge(model_fn: ModelFn, images: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Whether each image is misclassified, and its loss: two (N,) tensors."""
    outputs = model_fn(images)
    wrong = getattr(outputs, "logits", outputs).argmax(1) != labels
    return wrong, _per_image(loss, outputs, labels)


# ---- randomness: one stream per image, so that neither batching nor the number of restarts moves it


def _streams(generator: torch.Generator | None, count: int) -> list[torch.Generator]:
    """One CPU generator per image, keyed by the next `count` draws of `generator` (None: of seed 0)."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    keys = torch.randint(2**32, (count,), generator=generator, device=generator.device)
    return [torch.Generator().manual_seed(key) for key in keys.tolist()]


def _uniform(streams: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0, 1), float32, (number of streams, *shape)."""
    return torch.stack([torch.rand(shape, generator=stream) for stream in streams])


def _random_starts(
    images: Tensor, epsilon: float, ball: tuple[Tensor, Tensor], count: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """`count` uniformly random points of each image's ball, clipped to [0, 1]."""
    streams = _streams(generator, len(images))
    for _ in range(count):
        noise = _uniform(streams, images.shape[1:]).to(images.device, images.dtype)
        yield (images.detach() + epsilon * (2 * noise - 1)).clamp(*ball)
