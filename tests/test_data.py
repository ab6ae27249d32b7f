"""Data: what is read, what is refused and how that is said, and what batches hold."""

import hashlib
import itertools
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import CIFAR10

import data


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def refusal(*args, **options):
    """Return the message of the DataError that `load` raises: one line, exit status 3."""
    with pytest.raises(data.DataError) as error:
        data.load(*args, **options)
    message = str(error.value)
    assert error.value.exit_status == 3 and message and "\n" not in message
    return message


# ---------------------------------------------------------------- CIFAR-10 (items 25, 26, 28)

PER_FILE = 20
NO_SERVER = "https://localhost:9/cifar-10-python.tar.gz"


def cifar_entry(index):
    pixels = np.random.default_rng(index).integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
    return {"data": pixels, "labels": [(3 * i + index) % 10 for i in range(PER_FILE)]}


def trust(folder, monkeypatch):
    """Let the MD5 sums of the files that are there be the right ones."""
    files = sorted(folder.iterdir())
    sums = [[path.name, hashlib.md5(path.read_bytes()).hexdigest()] for path in files]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(CIFAR10, "url", NO_SERVER)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """The folder of a small CIFAR-10 on disk, in a place with spaces and letters beyond ASCII."""
    folder = tmp_path / "données et plus" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps(cifar_entry(i)))
    trust(folder, monkeypatch)
    return folder


def test_cifar10_is_read_in_the_order_of_its_files_and_one_split_needs_no_other(cifar):
    loaded = data.load("cifar10", cifar.parent)
    assert loaded.name == "cifar10" and loaded.classes[3] == "cat" and len(loaded.classes) == 10
    for split, files in ((loaded.train, range(5)), (loaded.test, [5])):
        entries = [cifar_entry(i) for i in files]
        pixels = np.concatenate([entry["data"] for entry in entries]).reshape(-1, 3, 32, 32)
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert np.array_equal(split.images.numpy(), pixels) and len(split) == len(pixels)
        assert split.labels.tolist() == [label for entry in entries for label in entry["labels"]]
    for path in cifar.glob("data_batch_*"):
        path.unlink()
    alone = data.load("cifar10", cifar.parent, splits=("test",))
    assert alone.train is None and torch.equal(alone.test.images, loaded.test.images)


def test_item_26_a_damaged_file_is_named_and_not_unpickled(cifar, tmp_path):
    path, canary = cifar / "data_batch_3", tmp_path / "canary"
    makes_canary = f"cos\nmkdir\n(V{canary}\ntR.".encode()  # a pickle that calls os.mkdir
    pickle.loads(makes_canary)
    canary.rmdir()
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for content in (makes_canary, flipped, b""):
        path.write_bytes(content)
        message = refusal("cifar10", cifar.parent)
        assert str(path) in message and "MD5" in message and "delete it" in message
    assert not canary.exists()
    path.unlink()
    path.mkdir()
    assert f"{path} is damaged" in refusal("cifar10", cifar.parent)
    path.rmdir()
    os.mkfifo(path)  # item 64
    assert f"{path} is damaged" in refusal("cifar10", cifar.parent)


@pytest.mark.parametrize("place", ["none", "file"])
def test_item_25_without_files_and_network_one_line_says_what_to_do(tmp_path, monkeypatch, capfd, place):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(CIFAR10, "url", NO_SERVER)
    message = refusal("cifar10", tmp_path / place)
    assert str(tmp_path / place / "cifar-10-batches-py") in message
    assert NO_SERVER in message and "Error(" in message and "--data-dir" in message
    assert capfd.readouterr() == ("", "")


def test_an_archive_that_is_already_there_is_unpacked(cifar, monkeypatch, capfd):
    archive = cifar.parent / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar, cifar.name)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    before = data.load("cifar10", cifar.parent)
    (cifar / "data_batch_2").unlink()
    assert data.load("cifar10", cifar.parent).describe() == before.describe()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("label", [-1, 10])
def test_item_28_labels_out_of_range_are_refused(cifar, monkeypatch, label):
    entry = cifar_entry(2)
    entry["labels"][7] = label
    (cifar / "data_batch_3").write_bytes(pickle.dumps(entry))
    trust(cifar, monkeypatch)
    message = refusal("cifar10", cifar.parent)
    assert f"train labels from {min(label, 0)} to {max(label, 9)}, beyond 0 to 9" in message


# ---------------------------------------------------------------- limits (item 30), what is held out


@pytest.mark.parametrize(
    ("dataset", "split", "size"),
    [
        ("cifar10", "train", 100),
        ("cifar10", "test", 20),
        ("synthetic", "train", 10_000),
        ("synthetic", "test", 2000),
    ],
)
def test_item_30_limits_out_of_bounds_are_refused_with_the_bounds(cifar, dataset, split, size):
    for limit in (0, -1, size + 1):
        message = refusal(dataset, cifar.parent, limit=limit, splits=(split,))
        assert f"limit {limit} " in message and f"1 to {size} images" in message and "--limit none" in message


def test_item_30_a_limit_beyond_one_split_takes_what_is_there(cifar):
    kept = data.load("cifar10", cifar.parent, limit=50)
    assert (len(kept.train), len(kept.test)) == (50, 20)


def round_robin(labels, limit):
    """Deal out the images as if by hand: one of each class in turn, until there are enough."""
    left = {label: [i for i, other in enumerate(labels) if other == label] for label in sorted(set(labels))}
    dealt = []
    for label in itertools.cycle(left):
        if len(dealt) == limit:
            return sorted(dealt)
        if left[label]:
            dealt.append(left[label].pop(0))


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), share=st.floats(0, 1))
def test_a_limit_deals_out_the_classes_in_turn(labels, share):
    limit = max(1, round(share * len(labels)))
    kept = data.balanced_indices(np.array(labels), limit)
    assert kept.tolist() == round_robin(labels, limit)


def test_a_limit_keeps_the_first_images_of_each_class(cifar):
    whole, part = data.load("cifar10", cifar.parent), data.load("cifar10", cifar.parent, limit=13)
    for all_of, some in ((whole.train, part.train), (whole.test, part.test)):
        kept = round_robin(all_of.labels.tolist(), 13)
        assert torch.equal(some.images, all_of.images[kept]) and torch.equal(some.labels, all_of.labels[kept])


@pytest.mark.parametrize(("count", "limit"), [(1, None), (13, None), (99, None), (30, 7), (5, 20)])
def test_held_out_images_are_the_last_of_each_class_and_nothing_else_changes(cifar, count, limit):
    (cifar / "test_batch").write_bytes(b"never read")
    train = data.load("cifar10", cifar.parent, splits=("train",)).train
    held = data.load("cifar10", cifar.parent, holdout=count, limit=limit)
    out = sorted(len(train) - 1 - i for i in round_robin(train.labels.flip(0).tolist(), count))
    rest = sorted(set(range(len(train))) - set(out))
    for split, whole in ((held.test, out), (held.train, rest)):
        dealt = round_robin(train.labels[whole].tolist(), min(limit or len(whole), len(whole)))
        kept = [whole[i] for i in dealt]
        assert torch.equal(split.images, train.images[kept]) and torch.equal(split.labels, train.labels[kept])
    alone = data.load("cifar10", cifar.parent, holdout=count, limit=limit, splits=("test",))
    assert torch.equal(alone.test.images, held.test.images)
    assert (alone.tested, data.load("synthetic", "", limit=10).tested) == ("held-out training", "test")


# ---------------------------------------------------------------- synthetic images


SYNTHETIC_SHA256 = "1689ca2d97950c890a3ebdaf94f6e4fbf6ef1f8a4c475870d22935847810a72d"


def test_synthetic_sets_are_balanced_and_the_same_on_every_machine():
    torch.manual_seed(123)
    whole, part = (data.load("synthetic", "unused", limit=limit) for limit in (1000, 321))
    for all_of, some in ((whole.train, part.train), (whole.test, part.test)):
        assert all_of.images.shape == (1000, 3, 32, 32) and all_of.images.dtype == torch.uint8
        assert all_of.labels.dtype == torch.int64 and all_of.labels.bincount().tolist() == [100] * 10
        assert torch.equal(some.images, all_of.images[:321]) and torch.equal(some.labels, all_of.labels[:321])
    images = torch.cat([whole.train.images, whole.test.images])
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == SYNTHETIC_SHA256
    other = data.load("synthetic", "unused", limit=100, seed=1)
    images = torch.cat([images, other.train.images, other.test.images])
    assert len({image.numpy().tobytes() for image in images}) == len(images)  # none comes twice


def test_item_53_a_description_tells_data_sets_apart_of_which_every_sum_is_the_same():
    loaded = data.load("synthetic", "", limit=30)
    described, train = loaded.describe(), loaded.train
    wanted = {}
    for name, split in (("train", train), ("test", loaded.test)):
        content = split.images.numpy().tobytes() + split.labels.numpy().tobytes()
        wanted[name] = [len(split), hashlib.sha256(content).hexdigest()]
    assert json.loads(json.dumps(described)) == described == {"name": "synthetic", **wanted}
    reordered = torch.arange(30).view(3, 10).flip(0).flatten()  # within each class: the classes take turns
    for images, labels in (
        (train.images.flip(1), train.labels),  # the channels change places
        (train.images.flip(3), train.labels),
        (train.images[reordered], train.labels),
        (train.images, train.labels.flip(0)),
        (train.images, (train.labels + 1) % 10),
    ):
        other = data.Dataset("synthetic", loaded.classes, data.Split(images, labels), loaded.test)
        assert other.describe() != described and other.describe()["test"] == described["test"]
    kept = train.images.contiguous(memory_format=torch.channels_last)
    assert (
        data.Dataset("synthetic", (), data.Split(kept, train.labels), None).describe()["train"]
        == wanted["train"]
    )


# ---------------------------------------------------------------- pixels and augmentation


def test_to_float_divides_exactly_and_keeps_the_memory_format():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    floats = data.to_float(values)
    assert floats.dtype == torch.float32
    assert np.array_equal(floats.numpy(), values.numpy().astype(np.float32) / np.float32(255))
    last = data.to_float(values.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, floats)


def crop_by_hand(image, number, padding):
    """Crop and mirror one framed image, as one of the 2 (2 padding + 1)^2 numbers says."""
    down, right = divmod(number // 2, 2 * padding + 1)
    frame = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    crop = frame[:, down : down + image.shape[1], right : right + image.shape[2]]
    return crop[:, :, ::-1] if number % 2 else crop


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 4), st.integers(5, 9), st.integers(5, 9)),
    padding=st.integers(0, 4),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    seed=st.integers(0, 3),
)
def test_augmented_images_are_framed_crops_or_their_mirror_images(shape, padding, dtype, memory_format, seed):
    images = torch.randint(1, 256, shape, generator=seeded())
    images = images.to(dtype).contiguous(memory_format=memory_format)
    original = images.clone()
    augmented = data.augment(images, seeded(seed), padding)
    assert torch.equal(images, original)
    assert augmented.dtype == dtype and augmented.stride() == images.stride()
    numbers = torch.randint(2 * (2 * padding + 1) ** 2, (len(images),), generator=seeded(seed)).tolist()
    by_hand = [crop_by_hand(*pair, padding) for pair in zip(images.numpy(), numbers, strict=True)]
    assert np.array_equal(augmented.numpy(), np.stack(by_hand))


# ---------------------------------------------------------------- batches


@given(
    count=st.integers(1, 300),
    batch_size=st.integers(1, 120),
    seed=st.integers(0, 3) | st.none(),
    share=st.floats(0, 1),
)
def test_an_epoch_holds_every_image_once_from_any_batch_on(count, batch_size, seed, share):
    """A single image left over joins the batch before it: batch norm cannot learn from one image."""
    generator = None if seed is None else seeded(seed)
    order = torch.arange(count) if seed is None else torch.randperm(count, generator=seeded(seed))
    by_hand = list(order.split(batch_size))
    if len(by_hand) > 1 and len(by_hand[-1]) == 1 < batch_size:
        by_hand[-2:] = [torch.cat(by_hand[-2:])]
    assert data.num_batches(count, batch_size) == len(by_hand)
    start = round(share * len(by_hand))
    split = data.Split(-torch.arange(count), torch.arange(count))
    batches = list(data.epoch_batches(split, batch_size, generator, start))
    assert [index for index, _, _ in batches] == list(range(start, len(by_hand)))
    for index, images, labels in batches:
        assert torch.equal(labels, by_hand[index]) and torch.equal(images, -labels)
