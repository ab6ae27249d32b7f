"""FGSM, BIM, MIM and PGD, the losses that attacks raise, and what attacks do with a gradient."""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Ball, ball_of, check_input, random_starts

ModelFn = Callable[[Tensor], Any]
Loss = Callable[[Any, Tensor], Tensor]
Trace = Callable[[int, Tensor], None]
Differentiate = Callable[[int, Tensor], tuple[Any, Tensor, Tensor]]


# ---- losses: (outputs, labels) -> (N,)


def cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, (N,), in float32 or wider.

    In float32 its gradient starts to vanish where the margin is below about -17, and is 0 below -104.
    """
    return F.cross_entropy(scores(outputs), labels, reduction="none")


def margin(outputs: Any, labels: Tensor) -> Tensor:
    """Largest other logit minus the true one, (N,): above 0 where the image is misclassified."""
    logits = scores(outputs)
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - true[:, 0]


def dlr(outputs: Any, labels: Tensor) -> Tensor:
    """Difference of logits ratio, (N,): the margin divided by (largest - third largest logit).

    It does not change with the scale of the logits (Croce & Hein 2020, eq. 6). Where the true class comes
    third it is 1 and its gradient 0. ValueError for less than three classes.
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
    """Which images, (N,) bool, are misclassified; an image with a logit of NaN always is."""
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
    step_size = epsilon / max(num_steps, 1) if step_size is None else step_size
    options = {"step_size": step_size, "num_steps": num_steps, "loss": loss, "trace": trace}
    return pgd(model_fn, images, labels, epsilon, **options)


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
    check_input(images, labels)
    if epsilon == 0 or num_steps == 0:
        return images.detach().clone()
    step_size = epsilon / num_steps if step_size is None else step_size
    differentiate = differentiator(model_fn, labels, loss, trace)
    momentum = torch.zeros_like(images)

    def accumulate(gradient: Tensor) -> Tensor:
        nonlocal momentum
        norm = gradient.abs().sum((1, 2, 3), keepdim=True)
        norm = norm.clamp(max=torch.finfo(norm.dtype).max)  # an infinite norm would freeze the image
        momentum = decay * momentum + torch.where(norm > 0, gradient / norm, 0)
        return momentum

    return _ascend(differentiate, images, ball_of(images, epsilon), step_size, num_steps, accumulate)


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
    """Projected gradient descent: steps along the gradient's sign, clipped to the ball (Madry et al. 2018).

    With `random_start` from a uniformly random point of the ball. With `restarts` above 1, which need
    `random_start`, it returns each image's worst last iterate: a misclassified one before a correct one, then
    the one of highest loss.
    """
    check_input(images, labels)
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts={restarts} without random_start would repeat one run")
    if epsilon == 0 or num_steps == 0:
        return images.detach().clone()
    ball = ball_of(images, epsilon)
    differentiate = differentiator(model_fn, labels, loss, trace)
    if not random_start:
        return _ascend(differentiate, images, ball, step_size, num_steps)
    starts = random_starts(images, epsilon, ball, restarts, generator)
    results = (_ascend(differentiate, start, ball, step_size, num_steps) for start in starts)
    if restarts == 1:
        return next(results)
    return reduce(worse, (evaluate(model_fn, result, labels, loss) for result in results)).images


class ZeroGradients:
    """A `trace` for one call of an attack: which images had a gradient of exactly zero (or NaN).

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


def _ascend(
    differentiate: Differentiate,
    start: Tensor,
    ball: Ball,
    step_size: float,
    num_steps: int,
    direction_of: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """`num_steps` steps along the sign of `direction_of(gradient)`, each clipped to the ball."""
    points = start.detach().clone()
    for step in range(num_steps):
        gradient = differentiate(step, points)[2]
        points = (points + step_size * direction_of(gradient).sign()).clamp(*ball)
    return points


# ---- what the attacks of both modules do with a model


class Candidates(NamedTuple):
    """Images, whether each is misclassified, (N,) bool, and their losses, (N,)."""

    images: Tensor
    misclassified: Tensor
    loss: Tensor


def differentiator(model_fn: ModelFn, labels: Tensor, loss: Loss, trace: Trace | None) -> Differentiate:
    """The function (step, points) -> outputs, losses (N,), gradient of the summed losses with 0 for NaN."""

    def differentiate(step: int, points: Tensor) -> tuple[Any, Tensor, Tensor]:
        points = points.detach()
        with torch.enable_grad():
            points.requires_grad_()
            outputs = model_fn(points)
            losses = _loss_per_image(loss, outputs, labels)
            gradient = torch.zeros_like(points)
            if losses.requires_grad:  # a constant model has nothing to differentiate
                options = {"allow_unused": True, "materialize_grads": True}
                (gradient,) = torch.autograd.grad(losses.sum(), points, **options)
        # `nan_to_num` also copies, as it must: the next replay of a CUDA graph overwrites what it returned.
        gradient = gradient.detach().nan_to_num()
        if trace is not None:
            trace(step, gradient)
        return outputs, losses.detach(), gradient

    return differentiate


@torch.no_grad()
def evaluate(model_fn: ModelFn, images: Tensor, labels: Tensor, loss: Loss) -> Candidates:
    """What the model says of the images, without a gradient."""
    outputs = model_fn(images)
    return Candidates(images, misclassified(outputs, labels), _loss_per_image(loss, outputs, labels))


def _loss_per_image(loss: Loss, outputs: Any, labels: Tensor) -> Tensor:
    losses = loss(outputs, labels)
    if losses.shape != labels.shape:
        observed = f"{tuple(losses.shape)} for {len(labels)} images"
        raise ValueError(f"the loss of an attack gives one value per image, got {observed}")
    return losses


def worse(old: Candidates, new: Candidates) -> Candidates:
    """Image by image the worse of two: misclassified before correct, then of higher loss, then `old`."""
    newly = new.misclassified & ~old.misclassified
    higher = (new.misclassified == old.misclassified) & (new.loss > old.loss)
    return where(newly | higher, new, old)


def where(mask: Tensor, new: Any, old: Any) -> Any:
    """A named tuple of tensors with those of `new` for the images where `mask`, (N,), else those of `old`."""
    fields = zip(new, old, strict=True)
    return type(new)._make(torch.where(mask.view(-1, *[1] * (b.ndim - 1)), a, b) for a, b in fields)
