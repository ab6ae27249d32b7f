"""Small networks and images for tests of attacks."""

import torch
from torch import nn


def small_net(dtype=torch.float32, size=8):
    """A smooth network of five classes with random weights, in eval mode."""
    torch.manual_seed(0)
    head = nn.Linear(6 * (size // 2) ** 2, 5)
    body = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, head).to(dtype).eval()


def batch(count=8, dtype=torch.float32, size=8):
    """Random images and labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, size, size, generator=generator, dtype=dtype)
    return images, torch.randint(5, (count,), generator=generator)


def right_batch(net, count=8):
    """Random images, and as labels what `net` says of them."""
    images, _ = batch(count, next(net.parameters()).dtype)
    return images, net(images).argmax(1)


def is_wrong(net, images, labels):
    return net(images).argmax(1) != labels
