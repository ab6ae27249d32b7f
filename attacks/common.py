"""What all attacks share and no model is needed for: the check of the input, the ball, random numbers."""

import torch


def check_input(images, labels):
    """Raise ValueError for wrong shapes or types, on a CPU for pixels outside [0, 1], in inference mode."""
    if torch.is_inference_mode_enabled():
        raise ValueError("attacks need gradients, which inference mode forbids: use torch.no_grad")
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"images are N x C x H x W and labels (N,), got {shapes}")
    if not images.is_floating_point():
        raise ValueError(f"images are float in [0, 1], got {images.dtype}")
    if images.device.type == "cpu" and len(images):
        low, high = torch.stack(torch.aminmax(images.detach())).tolist()
        if not (low >= 0 and high <= 1):  # so written, NaN is refused too
            raise ValueError(f"pixels lie in [0, 1] before any normalisation, got [{low:.4g}, {high:.4g}]")


def ball_of(images, epsilon):
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


def random_streams(generator, count):
    """One CPU generator per image, seeded by the next `count` draws of `generator` (None: of seed 0).

    So an image's random numbers depend neither on its batch nor on the number of restarts.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    first = getattr(generator, "first", 0)  # of a rank's images within the batch
    seeds = torch.randint(2**32, (first + count,), generator=generator, device=generator.device)
    return [torch.Generator().manual_seed(seed) for seed in seeds[first:].tolist()]


def uniform(streams, shape, images):
    """Uniform numbers in [0, 1), float32, (number of streams, *shape), on the device of `images`."""
    # From pinned memory the copy does not wait for what a GPU is still doing.
    numbers = torch.empty(len(streams), *shape, pin_memory=images.is_cuda)
    for row, stream in zip(numbers, streams, strict=True):
        row.uniform_(generator=stream)
    return numbers.to(images.device, non_blocking=images.is_cuda)


def random_starts(images, epsilon, ball, count, generator):
    """Yield `count` times a uniformly random point of each image's ball, clipped to [0, 1]."""
    streams = random_streams(generator, len(images))
    for _ in range(count):
        draws = uniform(streams, images.shape[1:], images).to(images.dtype)
        yield (images.detach() + epsilon * (2 * draws - 1)).clamp(*ball)
