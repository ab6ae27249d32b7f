"""The textbook way of doing what this project does: what `throughput.py` measures the project against.

Float32 in PyTorch's default memory format, torchvision's transforms image by image in a DataLoader with
worker processes, distances in a loop over the batch, an optimiser for each set of prototypes, and attacks by
`loss.backward()`, which fills the gradients of all parameters too. It is meant to be what a competent user
writes who follows the tutorials; nothing in it is slow on purpose, and it computes what the project computes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


class Images(Dataset):
    """Images, N x H x W x 3 uint8, and labels, held as torchvision's CIFAR10 holds them."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def loader(split, batch_size: int, augment: bool, workers: int = 2) -> DataLoader:
    """A DataLoader over a `data.Split`; `augment` shuffles, crops and mirrors."""
    crop = [transforms.RandomCrop(split.images.shape[-1], padding=4), transforms.RandomHorizontalFlip()]
    transform = transforms.Compose([*(crop if augment else []), transforms.ToTensor()])
    images = split.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return DataLoader(
        Images(images, split.labels.tolist(), transform),
        batch_size,
        shuffle=augment,
        num_workers=workers,
        pin_memory=split.images.device.type == "cuda",
        persistent_workers=workers > 0,
    )


# ---- training


def proximity(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Mean over the batch of the squared distance to the own class's prototype."""
    distances = []
    for feature, label in zip(features, labels, strict=True):
        distances.append((feature - centers[label]).pow(2).sum())
    return torch.stack(distances).mean()


def contrastive_proximity(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Mean over the batch and the other classes of the squared distance to their prototypes."""
    classes = torch.arange(len(centers), device=labels.device)
    distances = []
    for feature, label in zip(features, labels, strict=True):
        others = centers[classes != label]
        distances.append((feature - others).pow(2).sum(1).mean())
    return torch.stack(distances).mean()


class Term(NamedTuple):
    """One part of the joint loss: weight * distance(features of `layer`, labels, centers)."""

    layer: str
    distance: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight: float  # negative for a push
    centers: nn.Parameter
    optimizer: torch.optim.Optimizer


def make_terms(prototypes: dict[str, tuple[Tensor, Tensor]], recipe) -> list[Term]:
    """The terms of a script's `Config`; `prototypes` maps a layer to those of its pull and of its push."""
    terms = []
    for layer, (pull, push) in prototypes.items():
        for centers, distance, weight, lr in (
            (pull, proximity, recipe.weight_prox, recipe.lr_prox),
            (push, contrastive_proximity, -recipe.weight_conprox, recipe.lr_conprox),
        ):
            centers = nn.Parameter(centers.detach().clone())
            terms.append(Term(layer, distance, weight, centers, torch.optim.SGD([centers], lr=lr)))
    return terms


def step(model, optimizer, terms: list[Term], images: Tensor, labels: Tensor) -> float:
    """One step on the joint loss, which without terms is cross-entropy; returns it."""
    outputs = model(images)
    loss = F.cross_entropy(outputs.logits, labels)
    for term in terms:
        loss = loss + term.weight * term.distance(getattr(outputs, term.layer), labels, term.centers)
    optimizer.zero_grad()
    for term in terms:
        term.optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for term in terms:
        term.centers.grad /= abs(term.weight)  # the prototypes learn from the unweighted term
        term.optimizer.step()
    return loss.item()


def train_epoch(model, batches, optimizer, terms: list[Term], device, attack=None) -> float:
    """Train on every batch, and on its images after `attack(images, labels)` too; returns the mean loss."""
    model.train()
    total = 0.0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        if attack is not None:
            model.eval()
            attacked = attack(images, labels)
            model.train()
            images, labels = torch.cat([images, attacked]), torch.cat([labels, labels])
        total += step(model, optimizer, terms, images, labels)
    return total / len(batches)


# ---- attacks


def gradient(model, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the mean cross-entropy with respect to the images."""
    images = images.clone().detach().requires_grad_(True)
    loss = F.cross_entropy(model(images).logits, labels)
    model.zero_grad()
    loss.backward()
    return images.grad


def fgsm(model, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """One step of `epsilon` along the sign of the gradient."""
    return torch.clamp(images + epsilon * gradient(model, images, labels).sign(), 0, 1).detach()


def pgd(model, images, labels, epsilon: float, step_size: float, num_steps: int, random_start=False):
    """Steps along the sign of the gradient, each brought back into the ball."""
    points = images.clone().detach()
    if random_start:
        points = torch.clamp(points + torch.empty_like(points).uniform_(-epsilon, epsilon), 0, 1)
    for _ in range(num_steps):
        points = points + step_size * gradient(model, points, labels).sign()
        points = images + torch.clamp(points - images, -epsilon, epsilon)
        points = torch.clamp(points, 0, 1).detach()
    return points


def bim(model, images: Tensor, labels: Tensor, epsilon: float, num_steps: int) -> Tensor:
    """PGD with steps of epsilon / num_steps, from the images themselves."""
    return pgd(model, images, labels, epsilon, epsilon / num_steps, num_steps)


def mim(model, images: Tensor, labels: Tensor, epsilon: float, num_steps: int, decay: float = 1.0) -> Tensor:
    """BIM along a momentum of the gradients, each divided by its L1 norm."""
    points, momentum = images.clone().detach(), torch.zeros_like(images)
    for _ in range(num_steps):
        slope = gradient(model, points, labels)
        norm = slope.abs().sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-30)
        momentum = decay * momentum + slope / norm
        points = points + epsilon / num_steps * momentum.sign()
        points = images + torch.clamp(points - images, -epsilon, epsilon)
        points = torch.clamp(points, 0, 1).detach()
    return points


def evaluate(model, batches, device, attack) -> Tensor:
    """Whether each image is still classified right after `attack(images, labels)`: bool, N, on the CPU."""
    model.eval()
    correct = []
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        attacked = attack(images, labels)
        with torch.no_grad():
            correct.append((model(attacked).logits.argmax(1) == labels).cpu())
    return torch.cat(correct)
