"""Data sets as uint8 tensors on the device, and the batches that training and evaluation draw from them.

A whole data set fits on the device (CIFAR-10: 184 MB), so it is read once, kept there as bytes, and cropped,
flipped and scaled in batches: no worker processes and no image library in the training loop. Networks and
attacks see floats in [0, 1]; `to_float` makes them, nothing here normalises.

Nothing here is random by itself: shuffles and augmentations draw from a `torch.Generator` on the CPU that the
caller seeds, so a run can be repeated, or resumed in the middle of an epoch, whatever device it is on.
"""

import contextlib
import difflib
import functools
import hashlib
import http.client
import io
import math
import pickle
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.datasets.utils import download_and_extract_archive
from tqdm import tqdm

SPLITS = ("train", "test")
Choice = Callable[[np.ndarray], np.ndarray]  # of a split's labels: the indices of the images to keep
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


class DataError(Exception):
    """Data that cannot be used: one line that names the thing, the cause and the remedy."""

    exit_status = 3


@dataclass(frozen=True)
class Split:
    """Images, uint8 N x 3 x H x W, and their labels, int64 N, on one device."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A data set: its class names in the order of the labels, and its splits (None: not asked for).

    holdout: where not 0, `test` is that many images held out of the training images, and no test image.
    """

    name: str
    classes: tuple[str, ...]
    train: Split | None
    test: Split | None
    holdout: int = 0

    @property
    def tested(self) -> str:
        """What to call the images of `test`."""
        return "held-out training" if self.holdout else "test"


def load(
    dataset: str,
    data_dir: str | Path,
    *,
    limit: int | None = None,
    holdout: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    splits: Sequence[str] = SPLITS,
) -> Dataset:
    """Read the data set called `dataset` onto `device`.

    `cifar10` is read from DATA_DIR/cifar-10-batches-py, downloaded when it is not there; `folder` from
    DATA_DIR/{train,test}/<class>/<image files>; `synthetic` is made from `seed`, the only one to use it.
    `limit` keeps that many images of each split, the first of each class, in their order. `holdout` takes the
    last so many training images, class-balanced, away from the training images and gives them in place of the
    test images, which are not read: to choose settings by. Raises DataError.
    """
    if dataset not in _READERS:
        near = difflib.get_close_matches(dataset, _READERS, 1, 0)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"unknown data set {dataset!r}: the data sets are {', '.join(_READERS)}{meant}")
    if not splits or set(splits) - set(SPLITS):
        raise ValueError(f"splits are some of {SPLITS}, not {splits!r}")
    if limit is not None and limit < 1:
        raise DataError(f"limit {limit} keeps no image: it is 1 or more, or left out to keep all")
    root = Path(data_dir).expanduser()
    loaded = {}
    for split in splits:
        choose = functools.partial(_choose, split=split, limit=limit, holdout=holdout)
        classes, images, labels = _READERS[dataset](root, "train" if holdout else split, choose, seed)
        loaded[split] = Split(images.to(device), labels.to(device))
    _check(root, classes, loaded)
    return Dataset(dataset, classes, loaded.get("train"), loaded.get("test"), holdout)


def _check(root: Path, classes: tuple[str, ...], splits: dict[str, Split]) -> None:
    """Raise DataError where labels name no class, or the images of the splits differ in size."""
    for name, split in splits.items():
        low, high = split.labels.min().item(), split.labels.max().item()
        if low < 0 or high >= len(classes):
            raise DataError(
                f"{root}: {name} labels run from {low} to {high}, {len(classes)} classes have labels 0 to "
                f"{len(classes) - 1}; that is another data set, --data-dir names another folder"
            )
    sizes = {name: "x".join(map(str, split.images.shape[2:])) for name, split in splits.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(
            f"images in {root / 'test'} are {sizes['test']} pixels, in {root / 'train'} {sizes['train']}; "
            "resize those of one of them"
        )


def _choose(labels: np.ndarray, split: str, limit: int | None, holdout: int) -> np.ndarray:
    """Return the sorted indices of the images that `load` gives as `split`; `labels` are those of all."""
    if not holdout:
        return balanced_indices(labels, limit, split)
    if not 0 < holdout < len(labels):
        raise DataError(
            f"holdout {holdout} is out of bounds: of {len(labels)} training images, 1 to {len(labels) - 1} "
            "can be held out"
        )
    held_out = np.sort(len(labels) - 1 - balanced_indices(labels[::-1], holdout, "train"))
    if split == "test":
        return held_out[balanced_indices(labels[held_out], limit and min(limit, holdout), split)]
    rest = np.setdiff1d(np.arange(len(labels)), held_out)
    return rest[balanced_indices(labels[rest], limit, split)]


def balanced_indices(labels: np.ndarray, limit: int | None, split: str) -> np.ndarray:
    """Return the sorted indices of `limit` of the labels, as many of each class as of any other.

    They are the first of each class; what a division leaves over goes to the first classes, and what a class
    is short of to the others. Raises DataError where there are not so many labels.
    """
    if limit is None:
        return np.arange(len(labels))
    if not 1 <= limit <= len(labels):
        raise DataError(
            f"limit {limit} is out of bounds: the {split} split has 1 to {len(labels)} images to keep"
        )
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], labels[by_class])
    rank = np.empty(len(labels), dtype=np.int64)  # of an image among those of its class
    rank[by_class] = np.arange(len(labels)) - starts
    return np.sort(np.lexsort((labels, rank))[:limit])


# CIFAR-10, in the binary format of its authors


def _read_cifar10(root: Path, split: str, choose: Choice, seed: int):
    folder = root / CIFAR10.base_folder
    files = CIFAR10.train_list if split == "train" else CIFAR10.test_list
    if not all((folder / name).exists() for name, _ in files):
        _download_cifar10(root)
    batches = [_unpickle(folder / name, md5) for name, md5 in files]
    labels = np.concatenate([np.asarray(batch["labels"], dtype=np.int64) for batch in batches])
    keep = choose(labels)
    images = np.concatenate([batch["data"] for batch in batches])[keep].reshape(-1, 3, 32, 32)
    return CIFAR10_CLASSES, torch.from_numpy(images), torch.from_numpy(labels[keep])


def _unpickle(path: Path, md5: str) -> dict:
    """Return what a CIFAR-10 file holds; nothing is unpickled but the very bytes whose MD5 is right."""
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise DataError(
            f"cannot read {path} ({cause.strerror}); delete it to have it unpacked again"
        ) from cause
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(
            f"{path} is damaged (MD5 {found}, not {md5}); delete that file to have it unpacked again"
        )
    return pickle.loads(content, encoding="latin1")


def _download_cifar10(root: Path) -> None:
    """Fetch and unpack CIFAR-10 under `root`; an archive that is already there and whole is only unpacked."""
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision itself would wait for ever on a silent network
    try:
        with quiet, contextlib.redirect_stdout(sys.stderr):
            download_and_extract_archive(CIFAR10.url, root, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError) as cause:
        raise DataError(
            f"CIFAR-10 is not at {root / CIFAR10.base_folder} and could not be downloaded from "
            f"{urlparse(CIFAR10.url).hostname} ({_one_line(cause)}); give the folder that holds "
            f"{CIFAR10.base_folder} or {CIFAR10.filename} with --data-dir"
        ) from cause
    finally:
        socket.setdefaulttimeout(patience)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# Folders of images


def _read_folder(root: Path, split: str, choose: Choice, seed: int):
    classes = _folder_classes(root, split)
    other = "test" if split == "train" else "train"
    if (root / other).is_dir() and (odd := set(classes) ^ set(_folder_classes(root, other))):
        first = min(odd)
        has, lacks = (split, other) if first in classes else (other, split)
        raise DataError(
            f"class {first!r} is in {root / has} but not in {root / lacks}; both need the same class folders"
        )
    index = {name: label for label, name in enumerate(classes)}
    listing = make_dataset(root / split, index, IMG_EXTENSIONS, allow_empty=True)
    labels = np.array([label for _, label in listing], dtype=np.int64)
    for label, name in enumerate(classes):
        if label not in labels:
            raise DataError(
                f"class folder {root / split / name} holds no image ({' '.join(IMG_EXTENSIONS)}); "
                f"fill it, or delete it in both train and test"
            )
    keep = choose(labels)
    images = _read_images([listing[i][0] for i in keep], split)
    return classes, torch.from_numpy(images), torch.from_numpy(labels[keep])


def _folder_classes(root: Path, split: str) -> tuple[str, ...]:
    try:
        return tuple(find_classes(root / split)[0])
    except OSError as cause:
        raise DataError(
            f"no class folders in {root / split} ({_one_line(cause)}); --data-dir names a folder that holds "
            "{train,test}/<class>/<image files>"
        ) from cause


def _read_images(paths: list[str], split: str) -> np.ndarray:
    """Return the images of `paths`, uint8 N x 3 x S x S; a DataError names the first that does not fit."""
    images = None
    for i, path in enumerate(tqdm(paths, desc=f"reading {split}", unit=" images", leave=False, disable=None)):
        try:
            with Image.open(path) as image:
                mode, (width, height) = image.mode, image.size
                pixels = np.asarray(image) if mode == "RGB" else None
        except Exception as cause:  # the image library raises nearly anything on a broken file
            raise DataError(
                f"{path} is no readable image ({_one_line(cause)}); replace or delete it"
            ) from cause
        if mode != "RGB":
            raise DataError(f"{path} has mode {mode}, not RGB; convert it to 8-bit RGB")
        if images is None:
            if width != height:
                raise DataError(f"{path} is {width}x{height} pixels; images are square, as the first of all")
            images = np.empty((len(paths), 3, height, width), dtype=np.uint8)
        elif (height, width) != images.shape[2:]:
            size = images.shape[-1]
            raise DataError(f"{path} is {width}x{height} pixels, {paths[0]} is {size}x{size}; resize it")
        images[i] = pixels.transpose(2, 0, 1)
    return images


# Synthetic shapes: nothing to download, and integer arithmetic alone, so every machine makes the same pixels

SHAPES = (
    "disc", "ring", "square", "frame", "triangle", "cross", "stripes", "checkerboard", "dots", "crescent",
)  # fmt: skip
SYNTHETIC_SIZES = {"train": 10_000, "test": 2_000}
CHUNK = 250  # images drawn from one generator, so that a part of the set is the beginning of the whole
UNIT = 64  # a shape's radius in its own coordinates, which turn and grow with it
DIRECTIONS = 64  # equally spaced angles a shape can be turned to
RADIUS = 18, 26  # half pixels
OFFSET = 7  # of a shape's centre from the image's, at most; half pixels
BACKGROUND = 90, 165  # of 255, each channel by itself
TEXTURE, GRAIN = 12, 8  # of 255: how far smooth clouds and single pixels stray from the background
CONTRAST = 14, 38  # of 255, by which a shape is lighter than what is behind it, each channel by itself
_SINES = torch.tensor(
    [round(1024 * math.sin(2 * math.pi * i / DIRECTIONS)) for i in range(DIRECTIONS)], dtype=torch.int32
)


def _read_synthetic(root: Path, split: str, choose: Choice, seed: int):
    """Make the split from `seed`, as far as it is needed; the classes take turns."""
    labels = np.arange(SYNTHETIC_SIZES[split]) % len(SHAPES)
    keep = choose(labels)
    chunks = []
    for chunk in range(keep[-1] // CHUNK + 1):
        digest = hashlib.blake2b(f"{split} {chunk} {seed}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        chunks.append(_draw_shapes(torch.from_numpy(labels[chunk * CHUNK : (chunk + 1) * CHUNK]), generator))
    return SHAPES, torch.cat(chunks)[torch.from_numpy(keep)], torch.from_numpy(labels[keep])


def _draw_shapes(labels: torch.Tensor, generator: torch.Generator, size: int = 32) -> torch.Tensor:
    """Return an image of each label's shape, uint8 N x 3 x size x size, on a cloudy, grainy background."""

    def uniform(low, high, *shape):
        return torch.randint(low, high + 1, (len(labels), *shape), generator=generator, dtype=torch.int32)

    turn, radius = uniform(0, DIRECTIONS - 1, 1, 1), uniform(*RADIUS, 1, 1)
    axis = 2 * torch.arange(size, dtype=torch.int32) - (size - 1)  # pixel centres, in half pixels
    x, y = axis - uniform(-OFFSET, OFFSET, 1, 1), axis[:, None] - uniform(-OFFSET, OFFSET, 1, 1)
    sine, cosine = (
        _SINES[turn] * UNIT // radius,
        _SINES[(turn + DIRECTIONS // 4) % DIRECTIONS] * UNIT // radius,
    )
    u, v = (cosine * x + sine * y) // 1024, (cosine * y - sine * x) // 1024
    depth = torch.empty_like(u)
    for label, shape in enumerate(SHAPES):
        chosen = labels == label
        depth[chosen] = _depth(shape, u[chosen], v[chosen])
    cover = (2 * depth + 8).clamp(0, 16)[:, None]  # sixteenths of a pixel; edges are about a pixel wide

    step = 8  # pixels between the corners that the clouds are interpolated from
    ramp = torch.arange(step, dtype=torch.int32)
    clouds = uniform(-TEXTURE, TEXTURE, 3, size // step + 1, size // step + 1)
    for _ in range(2):
        clouds = clouds[..., :-1, None] * (step - ramp) + clouds[..., 1:, None] * ramp
        clouds = clouds.flatten(-2).transpose(-1, -2)
    behind = uniform(*BACKGROUND, 3, 1, 1) + clouds // step**2 + uniform(-GRAIN, GRAIN, 3, size, size)
    return (behind + uniform(*CONTRAST, 3, 1, 1) * cover // 16).clamp(0, 255).to(torch.uint8)


def _depth(shape: str, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return how far inside a shape the points are, negative outside, in units of 1 / UNIT of its radius."""

    def disc(radius, right=0):  # exact at the rim, where it counts
        return (radius**2 - (u - right) ** 2 - v**2) // (2 * radius)

    across, least, most = torch.maximum(u.abs(), v.abs()), torch.minimum, torch.maximum
    match shape:
        case "disc":
            return disc(56)
        case "ring":
            return least(disc(60), -disc(34))
        case "square":
            return 50 - across
        case "frame":
            return least(54 - across, across - 30)
        case "triangle":
            return 34 - most(v, (111 * u.abs() - 64 * v) // 128)  # 111 / 64: the square root of 3
        case "cross":
            return least(16 - least(u.abs(), v.abs()), 60 - across)
        case "stripes":
            return least(9 - (v % 36 - 18).abs(), 58 - across)
        case "checkerboard":
            return least(28 * ((u // 28 + v // 28) % 2) - 14, 56 - across)
        case "dots":
            return most(disc(26, -38), disc(26, 38))
        case "crescent":
            return least(disc(60), -disc(50, 30))
    raise ValueError(f"no such shape: {shape!r}")


_READERS = {"cifar10": _read_cifar10, "folder": _read_folder, "synthetic": _read_synthetic}
DATASETS = tuple(_READERS)  # the names that `load` takes


# Batches


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images as float32 in [0, 1]: value / 255, correctly rounded on every device."""
    # CUDA replaces division by a number with multiplication by its rounded inverse: the last bit may differ.
    return images / torch.full((), 255.0, device=images.device)


def augment(images: torch.Tensor, generator: torch.Generator, padding: int = 4) -> torch.Tensor:
    """Crop each image at random out of a black frame `padding` pixels wide, and mirror one in two.

    Takes and returns N x C x H x W of any type, in the memory format it came in; all outcomes are equally
    likely. One number an image is drawn from `generator`, a CPU one whatever the device of the images.
    """
    shifts = 2 * padding + 1
    # From pinned memory a copy does not wait for what a GPU is still doing.
    drawn = torch.randint(
        2 * shifts * shifts, (len(images),), generator=generator, pin_memory=images.is_cuda
    ).to(images.device, non_blocking=images.is_cuda)
    flip, down, right = drawn % 2 == 1, drawn // 2 // shifts, drawn // 2 % shifts
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    frame = F.pad(images, (padding,) * 4)
    # A view of every crop there is: N x C x down x right x H x W.
    windows = frame.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    if channels_last:
        windows = windows.permute(0, 2, 3, 4, 5, 1)
        crops = windows[torch.arange(len(images), device=images.device), down, right].permute(0, 3, 1, 2)
    else:
        windows = windows.permute(0, 2, 3, 1, 4, 5)
        crops = windows[torch.arange(len(images), device=images.device), down, right]
    return torch.where(flip[:, None, None, None], crops.flip(-1), crops)


def num_batches(num_images: int, batch_size: int) -> int:
    """Return how many batches `epoch_batches` makes: all full but the last, of 2 to batch_size + 1 images.

    A single image left over joins the batch before it, because batch norm cannot learn from one image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is 1 or more, not {batch_size}")
    full, rest = divmod(num_images, batch_size)
    return full + (rest > 1 or (rest == 1 and full == 0))


def epoch_batches(
    split: Split, batch_size: int, generator: torch.Generator | None = None, start_batch: int = 0
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (batch index, uint8 images, labels) over every image of the split once.

    In the split's order (the batches are then views of it), or shuffled by one draw from `generator`. The
    batches from `start_batch` on are those of a whole epoch, and the ones before cost nothing.
    """
    size, count = len(split), num_batches(len(split), batch_size)
    if not 0 <= start_batch <= count:
        raise ValueError(f"start_batch is 0 to {count} in an epoch of {count} batches, not {start_batch}")
    order = None if generator is None else torch.randperm(size, generator=generator).to(split.labels.device)
    for batch in range(start_batch, count):
        chosen = slice(batch * batch_size, size if batch == count - 1 else (batch + 1) * batch_size)
        if order is not None:
            chosen = order[chosen]
        yield batch, split.images[chosen], split.labels[chosen]
