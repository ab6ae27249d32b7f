"""Small data sets in the formats that they have on disk."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
from torchvision.datasets import CIFAR100, MNIST, SVHN, FashionMNIST

NO_SERVER = "https://localhost:9/"
KINDS = {"mnist": MNIST, "fashion-mnist": FashionMNIST}


def pixels(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def idx(array):
    """An array of bytes as an IDX file: big-endian magic number and sizes, then the values."""
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def strokes(count, seed):
    """Grey images of noise on which a bright line tells the label, and the labels."""
    labels = (np.arange(count) % 10).astype(np.uint8)
    images = pixels(count, 28, 28, seed=seed) // 4
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 4 : 2 * label + 6] = 255
    return images, labels


def write_mnist(root, train=40, test=20, packed=True):
    """The four files of MNIST below `root`; return what is in them, by split."""
    root.mkdir(parents=True, exist_ok=True)
    written = {"train": strokes(train, 0), "test": strokes(test, 1)}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        for name, array in zip(("images-idx3", "labels-idx1"), written[split], strict=True):
            content = idx(array)
            path = root / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return written


def write_cifar100(root, monkeypatch):
    """CIFAR-100 in `root`, whose MD5 sums are from now on the right ones; return what is in it, by split."""
    folder, written = root / "cifar-100-python", {}
    folder.mkdir(parents=True)
    for split, count in (("train", 200), ("test", 100)):
        entry = {"data": pixels(count, 3072, seed=count), "fine_labels": [7 * i % 100 for i in range(count)]}
        (folder / split).write_bytes(pickle.dumps({**entry, "coarse_labels": [0] * count}))
        written[split] = entry["data"].reshape(-1, 3, 32, 32), np.array(entry["fine_labels"])
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    for split in ("train", "test"):
        monkeypatch.setattr(CIFAR100, f"{split}_list", [[split, sums[split]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    monkeypatch.setattr(CIFAR100, "url", NO_SERVER)
    return written


def write_svhn(root, monkeypatch):
    """SVHN in `root`, likewise; on disk the digit 0 is labelled 10 and images are H x W x C x N."""
    import scipy.io

    root.mkdir(parents=True, exist_ok=True)
    written, sums = {}, {}
    for split, count in (("train", 30), ("test", 20)):
        images, labels = pixels(count, 3, 32, 32, seed=count), np.arange(count) % 10
        path = root / f"{split}_32x32.mat"
        stored = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": stored})
        written[split], sums[split] = (images, labels), hashlib.md5(path.read_bytes()).hexdigest()
    lists = {split: [NO_SERVER, f"{split}_32x32.mat", md5] for split, md5 in sums.items()}
    monkeypatch.setattr(SVHN, "split_list", lists)
    return written
