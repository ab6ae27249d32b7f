"""The other data sets: what is read from their true formats, what is refused, and how each is augmented."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from sets_on_disk import KINDS, NO_SERVER, idx, pixels, write_cifar100, write_mnist, write_svhn
from torchvision.datasets import CIFAR100, MNIST, SVHN

import data
import resnet_model
import utils

GREY = ("mnist", "fashion-mnist")


def refusal(*args, fault=utils.DataError, **options):
    with pytest.raises(fault) as error:
        data.load(*args, **options)
    assert str(error.value).isprintable()
    return str(error.value)


def holds(loaded, written):
    for split, (images, labels) in written.items():
        part = getattr(loaded, split)
        assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
        assert np.array_equal(part.images.numpy(), images.reshape(part.images.shape))
        assert part.labels.tolist() == labels.tolist()
    return True


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("dataset", GREY)
@pytest.mark.parametrize("packed", [True, False])
def test_the_files_of_mnist_are_read_from_both_places_and_unpacked_out_of_sight(
    tmp_path, dataset, packed, capfd
):
    for folder in (tmp_path / "à part", tmp_path / KINDS[dataset].__name__ / "raw"):
        written = write_mnist(folder, packed=packed)
        before = sorted(folder.iterdir())
        loaded = data.load(dataset, folder if "part" in folder.name else tmp_path)
        assert holds(loaded, written) and loaded.shape == (1, 28, 28) and len(loaded.classes) == 10
        assert sorted(folder.iterdir()) == before
    for path in folder.glob("train-*"):
        path.unlink()
    assert holds(data.load(dataset, tmp_path, splits=("test",)), {"test": written["test"]})
    assert capfd.readouterr() == ("", "")


def test_cifar100_and_svhn_are_read_with_the_names_of_their_classes(tmp_path, monkeypatch, capfd):
    written = write_cifar100(tmp_path, monkeypatch)
    loaded = data.load("cifar100", tmp_path)
    assert holds(loaded, written) and loaded.classes == tuple(f"class {i}" for i in range(100))
    pytest.importorskip("scipy")
    written = write_svhn(tmp_path, monkeypatch)
    loaded = data.load("svhn", tmp_path)
    assert holds(loaded, written) and loaded.classes == tuple("0123456789")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dataset", ["mnist", "cifar100"])
def test_limits_and_held_out_images_work_as_on_cifar10(tmp_path, monkeypatch, dataset):
    written = write_mnist(tmp_path) if dataset == "mnist" else write_cifar100(tmp_path, monkeypatch)
    held = data.load(dataset, tmp_path, holdout=10, limit=20)
    assert len(held.train) == 20 and len(held.test) == 10
    images, labels = written["train"]
    last = sorted(max(np.flatnonzero(labels == label)) for label in np.unique(labels)[:10])
    assert np.array_equal(held.test.images.numpy().reshape(10, -1), images[last].reshape(10, -1))


def test_folders_of_grey_images_are_read_and_treated_as_mnist_is(tmp_path):
    noise = pixels(24, 28, 28)
    for i, image in enumerate(noise):
        path = tmp_path / ("train", "test")[i // 12] / f"class {i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    loaded = data.load("folder", tmp_path)
    assert loaded.shape == (1, 28, 28) and loaded.kind is data.SETS["mnist"]
    assert np.array_equal(loaded.train.images[:, 0].numpy(), np.concatenate([noise[0:12:2], noise[1:12:2]]))
    odd = tmp_path / "test" / "class 1" / "23.png"
    for shape, found in (((32, 32, 3), "32x32 RGB"), ((32, 32), "32x32 L")):
        Image.fromarray(pixels(1, *shape)[0]).save(odd)
        assert f"{odd} is {found}, not 28x28 L; convert it" in refusal("folder", tmp_path)


# ---------------------------------------------------------------- what is refused


def flipped(content):
    content = bytearray(content)
    content[2 * len(content) // 3] ^= 16
    return bytes(content)


DAMAGE = {
    "cut off": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + content[:100],
    "empty": lambda content: b"",
    "a web page": lambda content: b"<!doctype html><title>404</title>",
}


@pytest.mark.parametrize("damage", [*DAMAGE, "a bit flipped"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_file_of_mnist_is_named(tmp_path, damage, packed, name):
    if damage == "a bit flipped" and not packed:
        return  # nothing can tell: the format has no checksum
    write_mnist(tmp_path, packed=packed)
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes({**DAMAGE, "a bit flipped": flipped}[damage](path.read_bytes()))
    message = refusal("mnist", tmp_path)
    assert message.startswith(f"{path} is damaged (") and "delete it" in message


@pytest.mark.parametrize(("dataset", "name"), [
    ("cifar100", "cifar-100-python/train"),
    ("cifar100", "cifar-100-python/meta"),
    ("svhn", "test_32x32.mat"),
])  # fmt: skip
def test_a_damaged_file_of_cifar100_or_svhn_is_named(tmp_path, monkeypatch, dataset, name):
    {"cifar100": write_cifar100, "svhn": write_svhn}[dataset](tmp_path, monkeypatch)
    path = tmp_path / name
    path.write_bytes(flipped(path.read_bytes()))
    assert f"{path} is damaged (MD5 " in refusal(dataset, tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert f"{path} is damaged (MD5 " in refusal(dataset, tmp_path)


def test_files_of_mnist_that_do_not_belong_together_are_refused(tmp_path):
    write_mnist(tmp_path / "other", train=30)
    written = write_mnist(tmp_path)
    name = "train-labels-idx1-ubyte.gz"
    (tmp_path / name).write_bytes((tmp_path / "other" / name).read_bytes())
    assert f"{tmp_path} has 40 train images and 30 labels" in refusal("mnist", tmp_path)
    assert "has test labels from 0 to 9, beyond 0 to 4" in relabelled(tmp_path, written)
    images = (tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(images)
    assert "t10k-labels-idx1-ubyte.gz is damaged" in refusal("mnist", tmp_path, splits=("test",))


def relabelled(root, written):
    """What is said of labels that reach beyond the classes: here there are five."""
    five = data.Kind(lambda *args: data.torchvision_sets.read_mnist(MNIST, "MNIST", tuple("01234"), *args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SETS, "mnist", five)
        return refusal("mnist", root, splits=("test",))


def test_images_of_another_size_than_the_data_sets_are_refused(tmp_path):
    write_mnist(tmp_path, packed=False)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(pixels(20, 32, 32)))
    message = refusal("mnist", tmp_path)
    assert message == f"{tmp_path} has test images of 1 x 32 x 32, not 1 x 28 x 28"


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist", "cifar100", "svhn"])
def test_without_files_and_network_one_line_says_what_to_do(tmp_path, monkeypatch, capfd, dataset):
    for kind in KINDS.values():
        monkeypatch.setattr(kind, "mirrors", [NO_SERVER])
    monkeypatch.setattr(CIFAR100, "url", NO_SERVER)
    monkeypatch.setattr(SVHN, "split_list", {"train": [NO_SERVER, "train_32x32.mat", ""]})
    message = refusal(dataset, tmp_path / "nothing")
    assert str(tmp_path / "nothing") in message and NO_SERVER in message and "--data-dir" in message
    assert capfd.readouterr() == ("", "")


def test_svhn_without_scipy_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal("svhn", tmp_path, fault=utils.UsageError)
    assert message == "--dataset svhn: its files need a package: pip install scipy"


# ---------------------------------------------------------------- how each is normalised and augmented


def test_the_normalisation_of_cifar10_is_the_released_networks():
    model = resnet_model.resnet(10, 8)
    assert model.arguments["mean"] == list(data.SETS["cifar10"].mean)
    assert model.arguments["std"] == list(data.SETS["cifar10"].std)


@pytest.mark.parametrize(("dataset", "padding", "flip"), [
    ("cifar10", 4, True), ("cifar100", 4, True), ("synthetic", 4, True), ("folder", 4, True),
    ("svhn", 4, False), ("mnist", 0, False), ("fashion-mnist", 0, True),
])  # fmt: skip
def test_augmentation_follows_the_data_set(dataset, padding, flip):
    kind = data.SETS[dataset]
    assert (kind.padding, kind.flip) == (padding, flip)
    images = torch.from_numpy(pixels(400, 1, 9, 9))
    found = data.augment(images, torch.Generator().manual_seed(3), kind.padding, kind.flip)
    framed = torch.nn.functional.pad(images, (padding,) * 4)
    seen = set()
    for i, image in enumerate(found):
        for down in range(2 * padding + 1):
            for right in range(2 * padding + 1):
                crop = framed[i, :, down : down + 9, right : right + 9]
                for mirrored in (False, True):
                    if torch.equal(image, crop.flip(-1) if mirrored else crop):
                        seen.add((i, down, right, mirrored))
    assert {entry[0] for entry in seen} == set(range(400))  # each is one of the outcomes
    outcomes = {entry[1:] for entry in seen}
    assert {entry[2] for entry in outcomes} == ({False, True} if flip else {False})
    assert len(outcomes) > 0.9 * (2 * padding + 1) ** 2 * (1 + flip)
