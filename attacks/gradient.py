"""FGSM, BIM, MIM and PGD, the losses that attacks raise, and what attacks do with a gradient."""

from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import ball_of, check_input, random_starts


def cross_entropy(outputs, labels):
    """Cross-entropy of each image, (N,), in float32 or wider.

    In float32 its gradient starts to vanish where the margin is below about -17, and is 0 below -104.
    """
    return F.cross_entropy(scores(outputs), labels, reduction="none")


def margin(outputs, labels):
    """Largest other logit minus the true one, (N,): above 0 where the image is misclassified."""
    logits = scores(outputs)
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - true[:, 0]


def dlr(outputs, labels):
    """Difference of logits ratio, (N,): the margin divided by (largest - third largest logit).

    It does not change with the scale of the logits (Croce & Hein 2020, eq. 6). Where the true class comes
    third it is 1 and its gradient 0. Needs three classes.
    """
    logits = scores(outputs)
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def scores(outputs):
    """The logits of a model's outputs, in float32 or wider."""
    logits = getattr(outputs, "logits", outputs)
    return logits if logits.dtype == torch.float64 else logits.float()


def misclassified(outputs, labels):
    """Which images, (N,) bool, are misclassified; an image with a logit of NaN always is."""
    logits = scores(outputs).detach()
    return (logits.argmax(1) != labels) | logits.isnan().any(1)


def fgsm(model_fn, images, labels, epsilon, *, loss=cross_entropy, trace=None):
    """Fast gradient sign method: one step of `epsilon` along the gradient's sign (Goodfellow et al. 2015)."""
    return bim(model_fn, images, labels, epsilon, num_steps=1, loss=loss, trace=trace)


def bim(model_fn, images, labels, epsilon, *, step_size=None, num_steps=10, **options):
    """Basic iterative method: `num_steps` FGSM steps, each clipped to the ball (Kurakin et al. 2016).

    A `step_size` of None is epsilon / num_steps. options: `loss` and `trace`.
    """
    step_size = epsilon / max(num_steps, 1) if step_size is None else step_size
    return pgd(model_fn, images, labels, epsilon, step_size=step_size, num_steps=num_steps, **options)


def mim(model_fn, images, labels, epsilon, *, decay=1.0, **options):
    """Momentum iterative method: BIM along g <- decay * g + gradient / ||gradient||_1 (Dong et al. 2018).

    The L1 norm is each image's own; a gradient of zero adds nothing to g. options: those of `bim`.
    """
    return bim(model_fn, images, labels, epsilon, decay=decay, **options)


def pgd(
    model_fn, images, labels, epsilon, *, step_size=2 / 255, num_steps=10, decay=None,
    random_start=False, restarts=1, generator=None, loss=cross_entropy, trace=None
):  # fmt: skip
    """Projected gradient descent: steps along the gradient's sign, clipped to the ball (Madry et al. 2018).

    With a `decay` along the sign of MIM's g. With `random_start` from a uniformly random point of the ball.
    With `restarts` above 1, which need `random_start`, it returns each image's worst last iterate: a
    misclassified one before a correct one, then the one of highest loss.
    """
    check_input(images, labels)
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts={restarts} without random_start would repeat one run")
    if epsilon == 0 or num_steps == 0:
        return images.detach().clone()
    ball = ball_of(images, epsilon)
    differentiate = differentiator(model_fn, labels, loss, trace)
    starts = random_starts(images, epsilon, ball, restarts, generator) if random_start else [images]
    results = (_ascend(differentiate, start, ball, step_size, num_steps, decay) for start in starts)
    if restarts == 1:
        return next(results)
    return reduce(worse, (evaluate(model_fn, result, labels, loss) for result in results)).images


def nearest_prototype(
    model_fn, images, labels, epsilon, *, loss, num_targets=3, generator=None, **options
):  # fmt: skip
    """PGD towards the prototypes of the `num_targets` nearest other classes; keeps each image's worst result.

    loss: maps outputs and labels to N x num_classes: how near the features are to each class's prototype. A
    try for a class raises that column. Misclassified is worse than correct; among equals the larger `margin`
    is worse. options: those of `pgd`. All tries have the same random starts.
    """
    check_input(images, labels)
    if epsilon == 0:
        return images.detach().clone()
    with torch.no_grad():
        come = loss(model_fn(images), labels)
        targets = come.topk(min(num_targets, come.shape[1] - 1)).indices  # the own class comes last
    state, found = generator and generator.get_state(), []
    for target in targets.T[:, :, None]:
        if state is not None:
            generator.set_state(state)
        towards = lambda outputs, labels, to=target: loss(outputs, labels).gather(1, to)[:, 0]  # noqa: E731
        tried = pgd(model_fn, images, labels, epsilon, loss=towards, generator=generator, **options)
        found.append(evaluate(model_fn, tried, labels, margin))
    return reduce(worse, found).images


def _ascend(differentiate, start, ball, step_size, num_steps, decay):
    """`num_steps` steps along the sign of the gradient or, with a `decay`, of MIM's g."""
    points, momentum = start.detach().clone(), 0
    for step in range(num_steps):
        direction = differentiate(step, points)[2]
        if decay is not None:
            norm = direction.abs().sum((1, 2, 3), keepdim=True)
            norm = norm.clamp(max=torch.finfo(norm.dtype).max)  # an infinite norm would freeze the image
            momentum = direction = decay * momentum + torch.where(norm > 0, direction / norm, 0)
        points = (points + step_size * direction.sign()).clamp(*ball)
    return points


class ZeroGradients:
    """A `trace` for one call of an attack: which images had a gradient of exactly zero (or NaN).

    Three (N,) bool tensors on the images' device, over all steps of all restarts: `first` (the first
    gradient), `ever` and `always`; None before the first gradient. An image with `always` was never moved by
    its gradient: that it survived says nothing about robustness.
    """

    first = ever = always = None

    def __call__(self, step, gradient):
        zero = (gradient == 0).flatten(1).all(1)
        if self.first is None:
            self.first = self.ever = self.always = zero
        self.ever, self.always = self.ever | zero, self.always & zero


class Candidates(NamedTuple):
    """Images, whether each is misclassified, (N,) bool, the losses, (N,), and perhaps their gradients."""

    images: Tensor
    misclassified: Tensor
    loss: Tensor
    gradient: Tensor | None = None


def differentiator(model_fn, labels, loss, trace):
    """The function (step, points) -> outputs, losses (N,), gradient of the summed losses with 0 for NaN."""

    def differentiate(step, points):
        points = points.detach()
        with torch.enable_grad():
            points.requires_grad_()
            outputs = model_fn(points)
            losses = _loss_per_image(loss, outputs, labels)
            gradient = torch.zeros_like(points)
            if losses.requires_grad:  # a constant model has nothing to differentiate
                (gradient,) = torch.autograd.grad(losses.sum(), points, materialize_grads=True)
        # `nan_to_num` also copies, as it must: the next replay of a CUDA graph overwrites what it returned.
        gradient = gradient.detach().nan_to_num()
        if trace is not None:
            trace(step, gradient)
        return outputs, losses.detach(), gradient

    return differentiate


@torch.no_grad()
def evaluate(model_fn, images, labels, loss):
    """What the model says of the images, without a gradient: Candidates."""
    outputs = model_fn(images)
    return Candidates(images, misclassified(outputs, labels), _loss_per_image(loss, outputs, labels))


def _loss_per_image(loss, outputs, labels):
    losses = loss(outputs, labels)
    if losses.shape != labels.shape:
        observed = f"{tuple(losses.shape)} for {len(labels)} images"
        raise ValueError(f"the loss of an attack gives one value per image, got {observed}")
    return losses


def worse(old, new):
    """Image by image the worse of two: misclassified before correct, then of higher loss, then `old`."""
    newly = new.misclassified & ~old.misclassified
    higher = (new.misclassified == old.misclassified) & (new.loss > old.loss)
    return where(newly | higher, new, old)


def where(mask, new, old):
    """Candidates: `new` for the images where `mask`, (N,), else `old`; a gradient only if `old` has one."""
    fields = [(a, b) for a, b in zip(new, old, strict=True) if b is not None]
    return Candidates(*(torch.where(mask.view(-1, *[1] * (b.ndim - 1)), a, b) for a, b in fields))
