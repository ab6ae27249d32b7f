"""Data sets as uint8 tensors on the device, and the batches that training and evaluation draw from them.

A whole data set fits on the device (CIFAR-10: 184 MB). It is read once, kept there as bytes, and cropped,
flipped and scaled in batches: no worker processes and no image library in the training loop. Networks and
attacks see floats in [0, 1], which `to_float` makes. Shuffles and augmentations draw from a `torch.Generator`
on the CPU that the caller seeds: a run can be repeated, or resumed within an epoch, on any device.
"""

import contextlib
import functools
import hashlib
import io
import math
import pickle
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_and_extract_archive

import image_folder
import utils
from image_folder import SIDE, SPLITS, unusable
from utils import DataError

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Images, uint8 N x 3 x H x W, and their labels, int64 N, on one device."""

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

    `cifar10` is read from DATA_DIR/cifar-10-batches-py and downloaded when it is not there; `folder` is read
    from DATA_DIR/{train,test}/<class>/<image files>; `synthetic` is drawn, and `seed` decides what.
    `limit` keeps that many images of each split: the first of each class, in their order; all, where a split
    has fewer. `holdout` takes that many images, the last of each class, out of the training images. They take
    the place of the test images, which are not read, so that settings can be chosen by them.
    """
    try:
        root, loaded = Path(data_dir).expanduser(), dict.fromkeys(SPLITS)
    except RuntimeError as cause:
        raise unusable(data_dir, "begins with a user who has no home here; change --data-dir") from cause
    classes, found = _READERS[dataset](root, ("train",) if holdout else splits, seed)
    if limit is not None:
        _check_count("limit", limit, max(len(labels) for labels, _ in found.values()), "images can be kept")
    for split in splits:
        labels, read = found["train" if holdout else split]
        kept = np.arange(len(labels))
        if holdout:
            _check_count("holdout", holdout, len(labels) - 1, "training images can be held out")
            held = np.sort(len(labels) - 1 - balanced_indices(labels[::-1], holdout))
            kept = held if split == "test" else np.setdiff1d(kept, held)
        kept = kept[balanced_indices(labels[kept], limit)]
        loaded[split] = Split(read(kept).to(device), torch.from_numpy(labels[kept]).to(device, torch.int64))
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


# A reader takes (root, splits, seed). It returns the class names and, of each split, the
# labels of all images and a function that reads the images of given indices: none is read beyond the limit.


def _read_cifar10(root, splits, seed):
    found = {}
    for split in splits:
        files = CIFAR10.train_list if split == "train" else CIFAR10.test_list
        paths = [root / CIFAR10.base_folder / name for name, _ in files]
        if not all(path.exists() for path in paths):
            _download_cifar10(root)
        batches = [_unpickle(path, md5) for path, (_, md5) in zip(paths, files, strict=True)]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, SIDE, SIDE)
        labels = np.concatenate([batch["labels"] for batch in batches])
        if labels.min() < 0 or labels.max() > 9:
            raise unusable(root, f"has {split} labels from {labels.min()} to {labels.max()}, beyond 0 to 9")
        found[split] = labels, torch.from_numpy(images).__getitem__
    return CIFAR10_CLASSES, found


def _unpickle(path, md5):
    """Return the content of a CIFAR-10 file. Nothing is unpickled but the very bytes whose MD5 is right."""
    try:
        content = path.read_bytes() if path.is_file() else b""  # a pipe would be waited for
    except OSError as cause:
        raise unusable(path, f"is unreadable ({cause.strerror}); delete it to unpack it again") from cause
    if (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise unusable(path, f"is damaged (MD5 {found}, not {md5}); delete it to unpack it again")
    return pickle.loads(content, encoding="latin1")


def _download_cifar10(root):
    """Unpack CIFAR-10's archive in `root`; download it first unless it is there and whole."""
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision would wait for ever on a silent network
    try:
        with contextlib.redirect_stderr(bars):
            download_and_extract_archive(CIFAR10.url, root, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
    except Exception as cause:  # network, archive and disk raise exceptions of many types
        raise DataError(
            f"CIFAR-10 is not at {utils.printable(root / CIFAR10.base_folder)} and could not be downloaded "
            f"from {CIFAR10.url} ({cause!r}); give the folder that holds it, or {CIFAR10.filename}, with "
            "--data-dir"
        ) from cause
    finally:
        socket.setdefaulttimeout(timeout)


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


_READERS = {"cifar10": _read_cifar10, "folder": image_folder.read, "synthetic": _read_synthetic}
DATASETS = tuple(_READERS)  # the names that `load` takes


# Batches


def to_float(images):
    """Return uint8 images as float32 in [0, 1]: value / 255, correctly rounded on every device."""
    # CUDA replaces division by a number with multiplication by its rounded inverse: the last bit may differ.
    return images / torch.full((), 255.0, device=images.device)


def augment(images, generator, padding=4):
    """Crop each image at random out of a black frame `padding` pixels wide, and mirror one in two.

    Takes and returns N x C x H x W of any type and memory format; all outcomes are equally likely. One number
    an image is drawn from `generator`, which is on the CPU whatever the device of the images.
    """
    shifts = 2 * padding + 1
    # From pinned memory a copy does not wait for what a GPU is still doing.
    drawn = torch.randint(2 * shifts**2, (len(images),), generator=generator, pin_memory=images.is_cuda)
    drawn = drawn.to(images.device, non_blocking=images.is_cuda)
    flip, down, right = drawn % 2 == 1, drawn // 2 // shifts, drawn // 2 % shifts
    frame = F.pad(images, (padding,) * 4)
    # A view of every crop there is: N x C x down x right x H x W.
    windows = frame.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    crops = windows[torch.arange(len(images), device=images.device), :, down, right]
    return torch.where(flip[:, None, None, None], crops.flip(-1), crops, out=torch.empty_like(images))


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
