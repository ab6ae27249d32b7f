"""A step on several ranks: each takes its part of the batch, and all get the gradient of the whole batch."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distributed
from prototype_conformity import output


def synchronize_batchnorm(model):
    """Make the batch norms of `model` use the statistics of all ranks' images, in place."""
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():  # torch's own takes no CPU tensors
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncedBatchNorm


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all ranks, on a CPU. A rank may have no image."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y, mean, var = _Normalize.apply(x, self.weight, self.bias, self.eps)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1
        return y


class _Normalize(torch.autograd.Function):
    """Map (x, weight, bias, eps) to (normalised x, mean, unbiased variance); all but x and eps are (C,)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        count, mean, var = x.numel() // x.shape[1], *torch.zeros(2, len(weight), dtype=torch.float64)
        if count:
            _, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
            mean, var = mean.double(), scale.double() ** -2 - eps
        # The variance is E[x^2] - E[x]^2: in float64 the difference keeps float32's digits.
        sums = torch.cat([count * mean, count * (var + mean.square()), mean.new_tensor([count])])
        *moments, total = distributed.total(sums).split([len(weight), len(weight), 1])
        mean, square = (moment / total for moment in moments)
        var = (square - mean.square()).clamp(min=0)
        unbiased = var * total / (total - 1)
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, unbiased)
        narrow = mean.to(weight.dtype), var.to(weight.dtype)
        return F.batch_norm(x, *narrow, weight, bias, eps=eps) if count else x.clone(), mean, unbiased

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, var, total = ctx.saved_tensors
        grad_x, (grad_weight, grad_bias) = grad, torch.zeros_like(torch.stack([weight, weight]))
        if len(x):
            narrow = mean.to(weight.dtype), var.to(weight.dtype)
            backward = torch.ops.aten.native_batch_norm_backward  # with mean and variance as constants
            grads = backward(grad, x, weight, *narrow, None, None, False, ctx.eps, [True] * 3)
            grad_x, grad_weight, grad_bias = grads
        # The gradient through mean and variance, with z the normalised x:
        # -weight * scale * (mean of grad + z * mean of (grad * z)).
        means = distributed.total(torch.stack([grad_bias, grad_weight]).double()) / total
        scale = (var + ctx.eps).rsqrt()
        slope = -weight * scale.square() * means[1]
        offset = -weight * scale * means[0] - slope * mean
        slope, offset = (part.to(weight.dtype)[:, None, None] for part in (slope, offset))
        return (x * slope + offset + grad_x).to(x.dtype), grad_weight, grad_bias, None


class Part(nn.Module):
    """`forward` on this rank's images, which may be none, as a module that owns all trained parameters."""

    def __init__(self, forward, run):
        super().__init__()
        self.function, self.autocast, self.synced = forward, run.autocast, run.config.sync_batchnorm
        self.model, self.criterion = run.model, run.criterion

    def forward(self, images, labels):
        if len(labels):
            return self.function(images, labels)
        # All gradients are zero. Synchronised batch norms take part; others must learn nothing from no image.
        self.model.train(self.synced)
        with self.autocast():
            outputs = self.model(images)
        self.model.train()
        layers = {**self.criterion.proximity, **self.criterion.contrastive}
        used = (*(output(outputs, name) for name in ("logits", *layers)), *self.criterion.parameters())
        loss = 0 * sum(tensor.float().sum() for tensor in used)
        return loss, dict.fromkeys(self.criterion.terms, loss.detach()), loss.detach()


def parallel(forward, run):
    """Return `forward` for a rank's part of a batch; loss.backward() gives the gradient of the whole batch.

    forward(images, labels) -> (loss, its terms, how many are right) of the images it is given. The function
    returned takes a rank's part; its terms and its count are those of the whole batch.
    """
    config = run.config
    if config.sync_batchnorm:
        synchronize_batchnorm(run.model)
    run.identity["compiled"] = "off"
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # a newer name from 2.14 on
        module = DistributedDataParallel(
            Part(forward, run),
            broadcast_buffers=not config.sync_batchnorm,
            # Perhaps no loss supervises the branch.
            find_unused_parameters=run.model.arguments.get("aux_dim", 0) > 0,
        )

    def of_part(images, labels):
        loss, parts, correct = module(images, labels)
        terms = {"loss": loss.detach(), **parts}
        count = torch.full((), len(labels), dtype=torch.float64, device=images.device)
        sums = torch.stack([*(term * count for term in terms.values()), correct.double(), count])
        *sums, correct, total = distributed.total(sums)
        means = {name: value / total for name, value in zip(terms, sums, strict=True)}
        # DistributedDataParallel takes the mean over the ranks, whatever their numbers of images.
        return loss * (distributed.world * count / total), means, correct

    return of_part
