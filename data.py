"""Data sets as uint8 tensors on the device, and the batches that training and evaluation draw from them.

A whole data set fits on the device (CIFAR-10: 184 MB). It is read once, kept there as bytes, and cropped,
flipped and scaled in batches: no worker processes and no image library in the training loop. Networks and
attacks see floats in [0, 1], which `to_float` makes. Shuffles and augmentations draw from a `torch.Generator`
on the CPU that the caller seeds: a run can be repeated, or resumed within an epoch, on any device.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST

import image_folder
import torchvision_sets
from image_folder import SPLITS, unusable
from utils import DataError


@dataclass(frozen=True)
class Split:
    """Images, uint8 N x C x H x W, and their labels, int64 N, on one device."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    @functools.cached_property
    def sha256(self):
        """The SHA-256, in hexadecimal digits, of the bytes of the images and then of the labels."""
        digest = hashlib.sha256(self.images.cpu().contiguous().numpy())
        digest.update(self.labels.cpu().contiguous().numpy())
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A data set: its class names in the order of the labels, and its splits (None: not asked for).

    holdout: where it is not 0, `test` holds that many images taken from the training images.
    """

    name: str
    classes: tuple[str, ...]
    train: Split | None
    test: Split | None
    holdout: int = 0

    @property
    def shape(self):
        """Channels, height and width of its images."""
        return tuple((self.test if self.train is None else self.train).images.shape[1:])

    @property
    def kind(self):
        """Its entry in SETS; for the user's own images that of CIFAR-10 or, if they are grey, of MNIST."""
        like = "mnist" if self.shape[0] == 1 else "cifar10"
        return SETS[like if self.name == "folder" or self.name not in SETS else self.name]

    @property
    def tested(self):
        """What to call the images of `test`."""
        return "held-out training" if self.holdout else "test"

    def describe(self):
        """Return what tells this data set from others, in plain Python that a checkpoint and JSON can hold.

        It is the name and, of each split, its size and SHA-256. Equal data sets have equal descriptions.
        """
        splits = {name: getattr(self, name) for name in SPLITS}
        sums = {name: [len(split), split.sha256] for name, split in splits.items() if split is not None}
        return {"name": self.name, **sums}


def load(dataset, data_dir, *, limit=None, holdout=0, seed=0, device="cpu", splits=SPLITS):
    """Read the data set called `dataset`, one of DATASETS, onto `device`. Raises DataError.

    torchvision's data sets are read from where it keeps them below DATA_DIR, and downloaded if they are not
    there; `folder` is read from DATA_DIR/{train,test}/<class>/<image files>; `seed` decides on `synthetic`.
    `limit` keeps that many images of each split, the first of each class, in their order; a smaller split
    keeps all. `holdout` takes that many images, the last of each class, out of the training images. They take
    the place of the test images, which are not read, so that settings can be chosen by them.
    """
    try:
        root, loaded = Path(data_dir).expanduser(), dict.fromkeys(SPLITS)
    except RuntimeError as cause:
        raise unusable(data_dir, "begins with a user who has no home here; change --data-dir") from cause
    classes, found = SETS[dataset].read(root, ("train",) if holdout else splits, seed)
    if limit is not None:
        most = max(len(labels) for labels, _ in found.values())
        _check_count("limit", limit, most, "images can be kept; --limit none keeps all")
    for split in splits:
        labels, read = found["train" if holdout else split]
        kept = np.arange(len(labels))
        if holdout:
            _check_count("holdout", holdout, len(labels) - 1, "training images can be held out")
            held = np.sort(len(labels) - 1 - balanced_indices(labels[::-1], holdout))
            kept = held if split == "test" else np.setdiff1d(kept, held)
        kept = kept[balanced_indices(labels[kept], limit)]
        images, shape = read(kept), SETS[dataset].shape
        if shape and images.shape[1:] != shape:
            there, wanted = (" x ".join(map(str, sizes)) for sizes in (images.shape[1:], shape))
            raise unusable(root, f"has {split} images of {there}, not {wanted}")
        loaded[split] = Split(images.to(device), torch.from_numpy(labels[kept]).to(device, torch.int64))
    return Dataset(dataset, classes, **loaded, holdout=holdout)


def balanced_indices(labels, limit):
    """Return the sorted indices of `limit` of the labels, equally many of each class; None keeps all.

    They are the first of each class. What a division leaves over goes to the first classes, and what a class
    is short of to the others.
    """
    by_class = np.argsort(labels, kind="stable")
    rank = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])  # within the class
    return np.sort(by_class[np.argsort(rank, kind="stable")[:limit]])


def _check_count(name, count, most, words):
    if not 1 <= count <= most:
        raise DataError(f"{name} {count} is out of bounds: 1 to {most} {words}")


# Synthetic shapes need no download. Integers, and a sine rounded to one, give every machine the same pixels.

SYNTHETIC_SIZES = {"train": 10_000, "test": 2_000}
CHUNK = 250  # images drawn from one generator: part of a set is drawn without the rest


def _disc(u, v, radius):
    return (radius**2 - u**2 - v**2) // (2 * radius)  # exact at the rim, where it counts


def _square(u, v, radius):
    return radius - torch.maximum(u.abs(), v.abs())


# How far inside each shape the point (u, v) is, negative outside, in 64ths of the shape's radius.
SHAPES = {
    "disc": lambda u, v: _disc(u, v, 56),
    "ring": lambda u, v: torch.minimum(_disc(u, v, 60), -_disc(u, v, 34)),
    "square": lambda u, v: _square(u, v, 50),
    "frame": lambda u, v: torch.minimum(_square(u, v, 54), -_square(u, v, 30)),
    "triangle": lambda u, v: 34 - torch.maximum(v, (111 * u.abs() - 64 * v) // 128),  # 111/64: root of 3
    "cross": lambda u, v: torch.minimum(16 - torch.minimum(u.abs(), v.abs()), _square(u, v, 60)),
    "stripes": lambda u, v: torch.minimum(9 - (v % 36 - 18).abs(), _square(u, v, 58)),
    "checkerboard": lambda u, v: torch.minimum(28 * ((u // 28 + v // 28) % 2) - 14, _square(u, v, 56)),
    "dots": lambda u, v: torch.maximum(_disc(u - 38, v, 26), _disc(u + 38, v, 26)),
    "crescent": lambda u, v: torch.minimum(_disc(u, v, 60), -_disc(u - 30, v, 50)),
}


def _read_synthetic(root, splits, seed):
    found = {}
    for split in splits:
        labels = np.arange(SYNTHETIC_SIZES[split]) % len(SHAPES)  # the classes take turns
        found[split] = labels, functools.partial(_draw_synthetic, split, seed, labels)
    return tuple(SHAPES), found


def _draw_synthetic(split, seed, labels, indices):
    images = []
    for chunk in np.unique(indices // CHUNK):
        digest = hashlib.blake2b(f"{split} {chunk} {seed}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        drawn = _draw_shapes(torch.from_numpy(labels[chunk * CHUNK : (chunk + 1) * CHUNK]), generator)
        images.append(drawn[indices[indices // CHUNK == chunk] % CHUNK])
    return torch.cat(images)


def _draw_shapes(labels, generator):
    """Return an image of each label's shape, uint8 N x 3 x 32 x 32, on a cloudy, grainy background."""

    def uniform(low, high, *shape):
        return torch.randint(low, high + 1, (len(labels), *shape), generator=generator, dtype=torch.int32)

    # The shape's own coordinates (u, v) turn, grow and move with it. Radius and centre are in half pixels.
    angle, radius = 2 * math.pi / 64 * uniform(0, 63, 1, 1).double(), uniform(18, 26, 1, 1)
    axis = 2 * torch.arange(32, dtype=torch.int32) - 31
    x, y = axis - uniform(-7, 7, 1, 1), axis[:, None] - uniform(-7, 7, 1, 1)
    sine, cosine = ((1024 * wave).round().int() * 64 // radius for wave in (angle.sin(), angle.cos()))
    u, v = (cosine * x + sine * y) // 1024, (cosine * y - sine * x) // 1024
    depth = torch.empty_like(u)
    for label, shape in enumerate(SHAPES.values()):
        chosen = labels == label
        depth[chosen] = shape(u[chosen], v[chosen])
    cover = (2 * depth + 8).clamp(0, 16)[:, None]  # sixteenths of a pixel; edges are about a pixel wide

    # Brightnesses, of 255, in each channel by itself: background, clouds, grain, and the shape's contrast.
    clouds, ramp = uniform(-12, 12, 3, 5, 5), torch.arange(8, dtype=torch.int32)
    for _ in range(2):  # interpolate between corners 8 pixels apart, along one axis and then the other
        clouds = (clouds[..., :-1, None] * (8 - ramp) + clouds[..., 1:, None] * ramp).flatten(-2).mT
    behind = uniform(90, 165, 3, 1, 1) + clouds // 64 + uniform(-8, 8, 3, 32, 32)
    return (behind + uniform(14, 38, 3, 1, 1) * cover // 16).to(torch.uint8)


@dataclass(frozen=True)
class Kind:
    """What is known of a data set before it is read. The defaults are those of CIFAR-10.

    read: (root, splits, seed) -> the class names and, of each split, the labels of all images and a function
        that reads the images of given indices: none is read beyond the limit.
    shape: channels, height and width of an image; None: as the files have it.
    mean, std: one number a channel, with which its networks normalise images.
    padding, flip: arguments of `augment`.
    stem: the beginning of its checkpoints' names.
    settings: the scripts' defaults on it; an option that is given wins.
    """

    read: Callable
    shape: tuple[int, int, int] | None = (3, 32, 32)
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2023, 0.1994, 0.2010)
    padding: int = 4
    flip: bool = True
    stem: str = "CIFAR10"
    settings: dict = field(default_factory=dict)


CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
DIGITS = tuple("0123456789")
# The scripts' defaults on grey sets: the paper's radii. PGD in training: steps of epsilon / num_steps
GREY = {"model": "cnn6", "epsilon": 0.3, "epsilon_min": 0.1, "epsilon_max": 0.5, "step_size": None}
_cifar, _mnist = torchvision_sets.read_cifar, torchvision_sets.read_mnist
SETS = {
    "cifar10": Kind(functools.partial(_cifar, CIFAR10, "CIFAR-10", CIFAR10_CLASSES)),
    "cifar100": Kind(
        functools.partial(_cifar, CIFAR100, "CIFAR-100", None),  # its files hold the names of its classes
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        stem="CIFAR100",
    ),
    "svhn": Kind(
        functools.partial(torchvision_sets.read_svhn, DIGITS),
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        flip=False,
        stem="SVHN",
    ),
    "mnist": Kind(
        functools.partial(_mnist, MNIST, "MNIST", DIGITS),
        shape=(1, 28, 28),
        mean=(0.1307,),
        std=(0.3081,),
        padding=0,
        flip=False,
        stem="MNIST",
        settings=GREY,
    ),
    "fashion-mnist": Kind(
        functools.partial(_mnist, FashionMNIST, "Fashion-MNIST", tuple(FashionMNIST.classes)),
        shape=(1, 28, 28),
        mean=(0.2860,),
        std=(0.3530,),
        padding=0,
        stem="FashionMNIST",
        settings=GREY,
    ),
    "folder": Kind(image_folder.read, shape=None),
    "synthetic": Kind(_read_synthetic),
}
DATASETS = tuple(SETS)  # the names that `load` takes


# Batches


def to_float(images):
    """Return uint8 images as float32 in [0, 1]: value / 255, correctly rounded on every device.

    Images that are float already are returned as they are.
    """
    if images.is_floating_point():
        return images
    # CUDA replaces division by a number with multiplication by its rounded inverse: the last bit may differ.
    return images / torch.full((), 255.0, device=images.device)


def augment(images, generator, padding=4, flip=True):
    """Crop each image at random out of a black frame `padding` pixels wide; with `flip` mirror half of them.

    Takes and returns N x C x H x W of any type and memory format; all outcomes are equally likely. One number
    an image is drawn from `generator`, which is on the CPU whatever the device of the images.
    """
    shifts, ways = 2 * padding + 1, 2 if flip else 1
    if shifts == ways == 1:
        return images
    # From pinned memory a copy does not wait for what a GPU is still doing.
    drawn = torch.randint(ways * shifts**2, (len(images),), generator=generator, pin_memory=images.is_cuda)
    drawn = drawn.to(images.device, non_blocking=images.is_cuda)
    mirrored, down, right = drawn % ways == 1, drawn // ways // shifts, drawn // ways % shifts
    frame = F.pad(images, (padding,) * 4)
    # A view of every crop there is: N x C x down x right x H x W.
    windows = frame.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    crops = windows[torch.arange(len(images), device=images.device), :, down, right]
    return torch.where(mirrored[:, None, None, None], crops.flip(-1), crops, out=torch.empty_like(images))


def num_batches(num_images, batch_size):
    """Return how many batches `epoch_batches` makes: all full but the last, of 2 to batch_size + 1 images.

    A single image left over joins the batch before it, because batch norm cannot learn from one image.
    """
    full, rest = divmod(num_images, batch_size)
    return full + (rest > 1 or (rest == 1 and full == 0))


def epoch_batches(split, batch_size, generator=None, start_batch=0):
    """Yield (batch index, uint8 images, labels) over every image of the split once.

    The order is the split's, and the batches are views of it; or, with a `generator`, shuffled by one draw.
    From `start_batch` on, the batches are those of a whole epoch; the ones before it cost nothing.
    """
    size, count = len(split), num_batches(len(split), batch_size)
    order = None if generator is None else torch.randperm(size, generator=generator).to(split.labels.device)
    for batch in range(start_batch, count):
        chosen = slice(batch * batch_size, size if batch == count - 1 else (batch + 1) * batch_size)
        if order is not None:
            chosen = order[chosen]
        yield batch, split.images[chosen], split.labels[chosen]
