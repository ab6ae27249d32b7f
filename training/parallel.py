"""A step on several ranks: each takes its part of the batch, and all get the gradient of the whole."""

import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distributed


def synchronize_batchnorm(model):
    """Have the batch norms of `model` learn from the images of all ranks."""
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():  # torch's own takes no tensors on a CPU
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncedBatchNorm


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all ranks, on a CPU. A rank may have none."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y, mean, var = _Normalize.apply(x, self.weight, self.bias, self.eps)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked += 1
        return y


class _Normalize(torch.autograd.Function):
    """(x, weight, bias, eps) -> (normalised x, mean and unbiased variance of each channel)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        wide = x.double()  # so that the difference of the squares does not cancel
        count = wide.new_tensor([x.numel() / x.shape[1]])
        sums = distributed.total(torch.cat([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3)), count]))
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        var = (square - mean.square()).clamp(min=0)
        scale = (var + eps).rsqrt()
        normal = (wide - mean[:, None, None]).mul_(scale[:, None, None]).to(x.dtype)
        ctx.save_for_backward(normal, weight, scale, count)
        y, unbiased = normal * weight[:, None, None] + bias[:, None, None], var * count / (count - 1)
        ctx.mark_non_differentiable(mean, unbiased)
        return y.to(x.dtype), mean, unbiased

    @staticmethod
    def backward(ctx, grad, *_):
        normal, weight, scale, count = ctx.saved_tensors
        wide = grad.double()
        sums = torch.stack([wide.sum((0, 2, 3)), (wide * normal).sum((0, 2, 3))])
        means = (distributed.total(sums.clone()) / count)[:, :, None, None]
        grad_x = (wide - means[0] - normal * means[1]) * (weight * scale)[:, None, None]
        return grad_x.to(grad.dtype), sums[1].to(weight.dtype), sums[0].to(weight.dtype), None


class Part(nn.Module):
    """`forward` on this rank's images, of which there may be none, with all the parameters that it trains."""

    def __init__(self, forward, run):
        super().__init__()
        self.function, self.autocast, self.synced = forward, run.autocast, run.config.sync_batchnorm
        self.model, self.criterion = run.model, run.criterion

    def forward(self, images, labels):
        if len(labels):
            return self.function(images, labels)
        # Gradients of zero, and batch norms that hear of the other ranks, or learn nothing of no image.
        self.model.train(self.synced)
        with self.autocast():
            outputs = self.model(images)
        self.model.train()
        layers = {**self.criterion.proximity, **self.criterion.contrastive}
        used = (outputs.logits, *(getattr(outputs, layer) for layer in layers), *self.criterion.parameters())
        loss = 0 * sum(tensor.float().sum() for tensor in used)
        return loss, dict.fromkeys(self.criterion.terms, loss.detach()), loss.detach()


def parallel(forward, run):
    """`forward` of a part: backward gives the gradient of the whole batch; terms and right answers are of it.

    forward(images, labels) -> (loss, its terms, how many are right), of the images it is given.
    """
    config = run.config
    if config.sync_batchnorm:
        synchronize_batchnorm(run.model)
    run.identity["compiled"] = "off"
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # a newer name from 2.14 on
        module = DistributedDataParallel(
            Part(forward, run),
            broadcast_buffers=not config.sync_batchnorm,
            find_unused_parameters=run.model.aux_dim > 0,  # the branch, where no loss supervises it
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
