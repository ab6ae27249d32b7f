"""The data sets that torchvision downloads, read from the files that it keeps, by its own readers.

`data.SETS` says which reader reads which set. A file is used only if its checksum is right: its MD5 sum or,
for a packed file of MNIST, the checksum that gzip stores. Each reader raises a DataError that names the file.
"""

import contextlib
import gzip
import hashlib
import importlib.util
import io
import pickle
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import SVHN
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import download_and_extract_archive

import utils
from image_folder import unusable
from utils import DataError, UsageError


def read_cifar(kind, title, classes, root, splits, seed=None):
    """Read CIFAR-10 or CIFAR-100, torchvision's class `kind`, from its archive's folder below ROOT.

    With `classes` None their names are read too: those of CIFAR-100's 100 fine classes.
    """
    if classes is None:
        path = root / kind.base_folder / kind.meta["filename"]
        if not path.exists():
            _download_cifar(kind, title, root)
        classes = tuple(_unpickle(path, kind.meta["md5"])[kind.meta["key"]])
    found = {}
    for split in splits:
        files = kind.train_list if split == "train" else kind.test_list
        paths = [root / kind.base_folder / name for name, _ in files]
        if not all(path.exists() for path in paths):
            _download_cifar(kind, title, root)
        batches = [_unpickle(path, md5) for path, (_, md5) in zip(paths, files, strict=True)]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        key = "labels" if "labels" in batches[0] else "fine_labels"
        labels = np.concatenate([batch[key] for batch in batches])
        found[split] = _checked(root, split, images, labels, classes)
    return classes, found


def read_mnist(kind, title, classes, root, splits, seed=None):
    """Read MNIST or Fashion-MNIST, torchvision's class `kind`, in ROOT or ROOT/<kind>/raw, packed or not."""
    found = {}
    for split in splits:
        prefix = "train" if split == "train" else "t10k"
        images = _idx(kind, title, root, f"{prefix}-images-idx3-ubyte", read_image_file)[:, None]
        labels = _idx(kind, title, root, f"{prefix}-labels-idx1-ubyte", read_label_file)
        found[split] = _checked(root, split, images.numpy(), labels.numpy(), classes)
    return classes, found


def _idx(kind, title, root, name, read):
    """Return what `read`, torchvision's reader, makes of the file called `name`.

    A packed file is unpacked in a temporary folder, since its own may be read-only. Its MD5 sum is checked
    only when it is downloaded: files that others packed have another sum.
    """
    raw = root / kind.__name__ / "raw"
    places = [folder / file for file in (f"{name}.gz", name) for folder in (root, raw)]
    if not any(path.exists() for path in places):
        with _downloading(title, raw, kind.mirrors[0], f"{name}.gz and the other three files"):
            kind(root, download=True)
    path = next((path for path in places if path.exists()), places[-1])
    content = _content(path)
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder, name)
        try:
            unpacked.write_bytes(gzip.decompress(content) if path.suffix == ".gz" else content)
            return read(unpacked)
        except Exception as cause:  # the reader raises exceptions of many types on a damaged file
            reason = utils.printable(repr(cause), 150)
            raise unusable(path, f"is damaged ({reason}); delete it to download it again") from cause


def read_svhn(classes, root, splits, seed=None):
    """Read SVHN, cropped digits, from ROOT/train_32x32.mat and ROOT/test_32x32.mat."""
    if importlib.util.find_spec("scipy") is None:
        raise UsageError("--dataset svhn: its files need a package: pip install scipy")
    found = {}
    for split in splits:
        url, name, md5 = SVHN.split_list[split]
        if not (root / name).exists():
            with _downloading("SVHN", root / name, url, name):
                SVHN(root, split=split, download=True)
        _content(root / name, md5)
        read = SVHN(root, split=split)
        found[split] = _checked(root, split, read.data, read.labels, classes)
    return classes, found


def _checked(root, split, images, labels, classes):
    """Return labels and a function from indices to images; DataError unless they belong together."""
    if len(images) != len(labels):
        raise unusable(root, f"has {len(images)} {split} images and {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= len(classes):
        span = f"{labels.min()} to {labels.max()}, beyond 0 to {len(classes) - 1}"
        raise unusable(root, f"has {split} labels from {span}")
    return labels, torch.from_numpy(np.ascontiguousarray(images)).__getitem__


def _unpickle(path, md5):
    """Return the content of a pickled file. Only bytes whose MD5 sum is right are unpickled."""
    return pickle.loads(_content(path, md5), encoding="latin1")


def _content(path, md5=None):
    """Return the bytes of a file; DataError unless they have the MD5 sum `md5`, if it is given."""
    try:
        content = path.read_bytes() if path.is_file() else b""  # a pipe would be waited for
    except OSError as cause:
        raise unusable(path, f"is unreadable ({cause.strerror}); delete it to unpack it again") from cause
    if md5 and (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise unusable(path, f"is damaged (MD5 {found}, not {md5}); delete it to unpack it again")
    return content


def _download_cifar(kind, title, root):
    """Unpack the archive of CIFAR in `root`; download it first unless it is there and whole."""
    with _downloading(title, root / kind.base_folder, kind.url, f"it, or {kind.filename},"):
        download_and_extract_archive(kind.url, root, filename=kind.filename, md5=kind.tgz_md5)


@contextlib.contextmanager
def _downloading(title, place, url, files):
    """Within it torchvision downloads silently and with a timeout; a failure becomes a DataError."""
    bars, quiet = sys.stderr if sys.stderr.isatty() else io.StringIO(), io.StringIO()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision would wait for ever on a silent network
    try:
        with contextlib.redirect_stderr(bars), contextlib.redirect_stdout(quiet):
            yield
    except Exception as cause:  # network, archive and disk raise exceptions of many types
        raise DataError(
            f"{title} is not at {utils.printable(place)} and could not be downloaded from {url} ({cause!r}); "
            f"give the folder that holds {files} with --data-dir"
        ) from cause
    finally:
        socket.setdefaulttimeout(timeout)
