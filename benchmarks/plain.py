"""The textbook way of doing what this project does: what `throughput.py` measures the project against.

Float32 in PyTorch's default memory format, torchvision's transforms image by image in a DataLoader with
worker processes, distances in a loop over the batch, an optimiser for each set of prototypes, and attacks by
`loss.backward()`, which fills the gradients of all parameters too. It is meant to be what a competent user
writes who follows the tutorials; nothing in it is slow on purpose, and it computes what the project computes.
"""

import random
from collections.abc import Callable
from functools import partial
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


# ---------------------------------------------------------------- training


def proximity(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Mean over the batch of the squared distance to the own class's prototype."""
    pairs = zip(features, labels, strict=True)
    return torch.stack([(feature - centers[label]).pow(2).sum() for feature, label in pairs]).mean()


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


def make_terms(recipe, model, device) -> list[Term]:
    """The terms of a script's `Config`, with fresh prototypes; none where it has no PCL."""
    terms = []
    for layer in getattr(recipe, "layers", ()):
        for distance, weight, lr in (
            (proximity, recipe.weight_prox, recipe.lr_prox),
            (contrastive_proximity, -recipe.weight_conprox, recipe.lr_conprox),
        ):
            centers = nn.Parameter(torch.randn(model.num_classes, model.feat_dims[layer], device=device))
            terms.append(Term(layer, distance, weight, centers, torch.optim.SGD([centers], lr=lr)))
    return terms


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
        total += loss.item()
    return total / len(batches)


# ---------------------------------------------------------------- attacks


def gradient(model, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the mean cross-entropy with respect to the images."""
    images = images.clone().detach().requires_grad_(True)
    loss = F.cross_entropy(model(images).logits, labels)
    model.zero_grad()
    loss.backward()
    return images.grad


def pgd(model, images, labels, epsilon, num_steps, step_size, random_start=False, decay=None) -> Tensor:
    """Steps along the sign of the gradient, each brought back into the ball.

    One step of epsilon is FGSM, n steps of epsilon / n are BIM, and with `decay`, along a momentum of the
    gradients, each divided by its L1 norm, MIM.
    """
    points, momentum = images.clone().detach(), torch.zeros_like(images)
    if random_start:
        points = torch.clamp(points + torch.empty_like(points).uniform_(-epsilon, epsilon), 0, 1)
    for _ in range(num_steps):
        slope = gradient(model, points, labels)
        if decay is not None:
            norm = slope.abs().sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-30)
            slope = momentum = decay * momentum + slope / norm
        points = points + step_size * slope.sign()
        points = images + torch.clamp(points - images, -epsilon, epsilon)
        points = torch.clamp(points, 0, 1).detach()
    return points


def attack_of(row: str, model, recipe) -> Callable[[Tensor, Tensor], Tensor] | None:
    """`attack(images, labels)` of an evaluation or of adversarial training; None where a row has none."""
    name, steps, trains = row.split("_")[-1], getattr(recipe, "num_steps", 1), hasattr(recipe, "epsilon_min")
    if not trains and not hasattr(recipe, "epsilon"):
        return None
    step_size = getattr(recipe, "step_size", None) or 2 / 255  # as released

    def attack(images, labels):
        epsilon = random.uniform(recipe.epsilon_min, recipe.epsilon_max) if trains else recipe.epsilon
        settings = {
            "fgsm": {"num_steps": 1, "step_size": epsilon},
            "bim": {"num_steps": steps, "step_size": epsilon / steps},
            "mim": {"num_steps": steps, "step_size": epsilon / steps, "decay": 1.0},
            "pgd": {"num_steps": steps, "step_size": step_size, "random_start": trains},
        }
        return pgd(model, images, labels, epsilon, **settings[name])

    return attack


# ---------------------------------------------------------------- epochs


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


def read(batches, device) -> None:
    for images, labels in batches:
        images.to(device), labels.to(device)


def attack_all(model, batches, attack) -> None:
    model.eval()
    for images, labels in batches:
        attack(images, labels)


def epoch(subject, row: str) -> Callable[[], object]:
    """An epoch of a row, done the textbook way; evaluations return which images stay right."""
    device, model, recipe = subject.device, subject.model(), subject.recipe(row)
    trains = hasattr(recipe, "momentum") and not row.startswith("inner")
    batches = loader(subject.split(row), recipe.batch_size, augment=trains, workers=subject.config.workers)
    attack = attack_of(row, model, recipe)
    if hasattr(recipe, "epsilon"):
        return partial(evaluate, model, batches, device, attack)
    if row == "data":
        return partial(read, batches, device)
    if not trains:
        ready = [(images.to(device), labels.to(device)) for images, labels in batches]
        return partial(attack_all, model, ready, attack)
    rates = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    optimizer, terms = torch.optim.SGD(model.parameters(), **rates), make_terms(recipe, model, device)
    return partial(train_epoch, model, batches, optimizer, terms, device, attack)
