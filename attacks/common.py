"""What all attacks share and no model is needed for: the check of the input, the ball, random numbers."""

from collections.abc import Iterator

import torch
from torch import Tensor

Ball = tuple[Tensor, Tensor]


def check_input(images: Tensor, labels: Tensor) -> None:
    """Raise ValueError for images and labels of wrong shapes or types and, on a CPU, for wrong pixels."""
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"images are N x C x H x W and labels (N,), got {shapes}")
    if not images.is_floating_point():
        raise ValueError(f"images are float in [0, 1], got {images.dtype}")
    if images.device.type == "cpu":
        check_pixels(images)


def check_pixels(images: Tensor) -> None:
    """Raise ValueError with the observed range for pixels outside [0, 1] or NaN; the host waits for a GPU."""
    if images.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if not (low >= 0 and high <= 1):  # so written, NaN is refused too
        observed = f"[{low:.4g}, {high:.4g}]"
        raise ValueError(f"pixels lie in [0, 1] before any normalisation, got {observed}")


def ball_of(images: Tensor, epsilon: float) -> Ball:
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


# ---- randomness: one stream per image, so that results depend on neither batches nor the number of restarts


def random_streams(generator: torch.Generator | None, count: int) -> list[torch.Generator]:
    """One CPU generator per image, seeded by the next `count` draws of `generator` (None: of seed 0)."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    seeds = torch.randint(2**32, (count,), generator=generator, device=generator.device)
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def uniform(streams: list[torch.Generator], shape: tuple[int, ...], images: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float32, (number of streams, *shape), on the device of `images`."""
    # From pinned memory the copy does not wait for what a GPU is still doing.
    numbers = torch.empty(len(streams), *shape, pin_memory=images.is_cuda)
    for row, stream in zip(numbers, streams, strict=True):
        row.uniform_(generator=stream)
    return numbers.to(images.device, non_blocking=images.is_cuda)


def random_starts(
    images: Tensor, epsilon: float, ball: Ball, count: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """`count` uniformly random points of each image's ball, clipped to [0, 1]."""
    streams = random_streams(generator, len(images))
    for _ in range(count):
        draws = uniform(streams, images.shape[1:], images).to(images.dtype)
        yield (images.detach() + epsilon * (2 * draws - 1)).clamp(*ball)
