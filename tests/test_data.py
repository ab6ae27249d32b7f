"""Data: what is read, what is refused and how that is said, and that batches are what they should be."""

import hashlib
import itertools
import pickle
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

import data


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def refusal(*args, **options):
    """The message of the DataError that `load` raises: one line, exit status 3."""
    with pytest.raises(data.DataError) as error:
        data.load(*args, **options)
    assert error.value.exit_status == 3
    message = str(error.value)
    assert message and "\n" not in message
    return message


# CIFAR-10


PER_FILE = 20


def cifar_entry(index):
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
    return {"data": pixels, "labels": [(3 * i + index) % 10 for i in range(PER_FILE)]}


def write_cifar(root, monkeypatch, entries):
    """Write six files in CIFAR-10's format under `root`, and let their MD5 sums be the right ones."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    sums = []
    for name, entry in zip(names, entries, strict=True):
        content = pickle.dumps(entry)
        (folder / name).write_bytes(content)
        sums.append([name, hashlib.md5(content).hexdigest()])
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(CIFAR10, "url", "https://localhost:9/cifar-10-python.tar.gz")  # nobody listens there
    return folder


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    root = tmp_path / "données et plus"
    write_cifar(root, monkeypatch, [cifar_entry(i) for i in range(6)])
    return root


def test_cifar10_is_read_in_the_order_of_its_files(cifar):
    loaded = data.load("cifar10", cifar)
    assert loaded.name == "cifar10" and loaded.classes[3] == "cat" and len(loaded.classes) == 10
    for split, files in ((loaded.train, range(5)), (loaded.test, [5])):
        entries = [cifar_entry(i) for i in files]
        pixels = np.concatenate([entry["data"] for entry in entries]).reshape(-1, 3, 32, 32)
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert np.array_equal(split.images.numpy(), pixels)
        assert split.labels.tolist() == [label for entry in entries for label in entry["labels"]]
        assert len(split) == len(pixels)


def test_a_split_not_asked_for_is_neither_read_nor_needed(cifar):
    for i in range(1, 6):
        (cifar / "cifar-10-batches-py" / f"data_batch_{i}").unlink()
    loaded = data.load("cifar10", cifar, splits=("test",))
    assert loaded.train is None and len(loaded.test) == PER_FILE


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_with_a_wrong_md5_is_refused_before_it_is_unpickled(cifar, tmp_path):
    path, canary = cifar / "cifar-10-batches-py" / "data_batch_3", tmp_path / "canary"
    path.write_bytes(pickle.dumps(Canary(canary)))
    pickle.loads(pickle.dumps(Canary(tmp_path / "alive"))).close()
    assert (tmp_path / "alive").exists()  # the canary does sing
    message = refusal("cifar10", cifar)
    assert str(path) in message and "MD5" in message and "delete" in message
    assert not canary.exists()


def test_one_flipped_bit_is_noticed(cifar):
    path = cifar / "cifar-10-batches-py" / "test_batch"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert str(path) in refusal("cifar10", cifar, splits=("test",))


def test_without_files_and_network_one_line_says_where_they_are_looked_for(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(CIFAR10, "url", "https://localhost:9/cifar-10-python.tar.gz")
    message = refusal("cifar10", tmp_path / "none")
    assert str(tmp_path / "none" / "cifar-10-batches-py") in message
    assert "localhost" in message and "--data-dir" in message
    assert capfd.readouterr() == ("", "")


def test_the_address_named_is_the_universitys(monkeypatch, tmp_path):
    def no_network(*args, **options):
        raise OSError("Network is unreachable\n(really)")

    monkeypatch.setattr(data, "download_and_extract_archive", no_network)
    message = refusal("cifar10", tmp_path)
    assert "www.cs.toronto.edu" in message and "unreachable (really)" in message


def test_an_archive_that_is_already_there_is_unpacked(cifar, monkeypatch, capfd):
    archive = cifar / CIFAR10.filename
    folder = cifar / "cifar-10-batches-py"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    before = data.load("cifar10", cifar)
    (folder / "data_batch_2").unlink()
    after = data.load("cifar10", cifar)
    assert torch.equal(before.train.images, after.train.images)
    assert capfd.readouterr() == ("", "")


def test_a_data_dir_that_is_a_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    assert str(tmp_path / "file") in refusal("cifar10", tmp_path / "file")
    assert str(tmp_path / "file") in refusal("folder", tmp_path / "file")


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_refused(tmp_path, monkeypatch, label):
    entries = [cifar_entry(i) for i in range(6)]
    entries[2]["labels"][7] = label
    write_cifar(tmp_path, monkeypatch, entries)
    message = refusal("cifar10", tmp_path)
    assert str(label) in message and "train" in message and "0 to 9" in message


# Folders of images


def picture(seed, size=(32, 32), mode="RGB"):
    width, height = size
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folders(tmp_path):
    """Three classes with 4 training and 2 test images each; names in no particular order on disk."""
    for split, count in (("train", 4), ("test", 2)):
        for name in ("zebra", "ant", "moth"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in reversed(range(count)):
                picture(hash_of(split, name, i)).save(place / f"{i}.png")
            (place / "notes.txt").write_text("no image, and none of our business")
    return tmp_path


def hash_of(*parts):
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def test_folders_are_read_by_sorted_class_and_file(folders):
    loaded = data.load("folder", folders)
    assert loaded.classes == ("ant", "moth", "zebra")
    for split, count in (("train", 4), ("test", 2)):
        part = getattr(loaded, split)
        wanted = [np.asarray(picture(hash_of(split, c, i))) for c in loaded.classes for i in range(count)]
        assert part.labels.tolist() == [label for label in range(3) for _ in range(count)]
        assert np.array_equal(part.images.permute(0, 2, 3, 1).numpy(), np.stack(wanted))


def test_the_only_split_that_is_there_can_be_read_alone(folders):
    (folders / "train").rename(folders / "elsewhere")
    assert len(data.load("folder", folders, splits=("test",)).test) == 6
    message = refusal("folder", folders)
    assert str(folders / "train") in message and "--data-dir" in message


@pytest.mark.parametrize("splits", [("train", "test"), ("test",)])
@pytest.mark.parametrize("lacking", ["train", "test"])
def test_splits_with_different_classes_are_refused(folders, lacking, splits):
    other = {"train": "test", "test": "train"}[lacking]
    (folders / lacking / "moth").rename(folders / "moved away")
    message = refusal("folder", folders, splits=splits)
    assert f"'moth' is in {folders / other} but not in {folders / lacking}" in message


def test_an_empty_class_is_named(folders):
    for path in (folders / "train" / "moth").glob("*.png"):
        path.unlink()
    assert str(folders / "train" / "moth") in refusal("folder", folders)


def spoil_mode(path):
    picture(1, mode="L").save(path)


def spoil_alpha(path):
    picture(1, mode="RGBA").save(path)


def spoil_size(path):
    picture(1, size=(28, 28)).save(path)


def spoil_height(path):
    picture(1, size=(32, 31)).save(path)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def write_a_web_page(path):
    path.write_text("<!doctype html><title>404</title>")


FAULTS = [
    (spoil_mode, "mode L"),
    (spoil_alpha, "mode RGBA"),
    (spoil_size, "28x28"),
    (spoil_height, "32x31"),
    (cut_in_half, "no readable image"),
    (empty, "no readable image"),
    (write_a_web_page, "no readable image"),
]


@pytest.mark.parametrize("spoil, said", FAULTS)
def test_the_first_of_the_files_that_do_not_fit_is_named(folders, spoil, said):
    first, later = folders / "train" / "moth" / "2.png", folders / "train" / "zebra" / "0.png"
    spoil(first)
    spoil(later)
    message = refusal("folder", folders)
    assert str(first) in message and said in message and str(later) not in message


def test_splits_of_different_sizes_are_refused(folders):
    for path in (folders / "test").glob("*/*.png"):
        picture(1, size=(28, 28)).save(path)
    message = refusal("folder", folders)
    assert str(folders / "test") in message and "28x28" in message and "32x32" in message


def test_a_first_image_that_is_not_square_is_named(folders):
    spoil_height(folders / "train" / "ant" / "0.png")
    message = refusal("folder", folders)
    assert str(folders / "train" / "ant" / "0.png") in message and "32x31" in message


def test_nothing_is_written_to_a_stderr_that_is_no_terminal(folders, capfd):
    data.load("folder", folders)
    assert capfd.readouterr() == ("", "")


def test_a_limit_reads_no_more_files_than_it_keeps(folders):
    cut_in_half(folders / "train" / "zebra" / "3.png")
    assert data.load("folder", folders, limit=6).train.labels.tolist() == [0, 0, 1, 1, 2, 2]


# Names, limits


@pytest.mark.parametrize("name, near", [("cifar", "cifar10"), ("Folder", "folder"), ("synth", "synthetic")])
def test_an_unknown_data_set_is_answered_with_the_known_ones(name, near):
    message = refusal(name, "data")
    assert f"did you mean {near!r}" in message
    assert all(known in message for known in data.DATASETS)


@pytest.mark.parametrize("limit", [0, -1, 21, 10**9])
def test_limits_out_of_bounds_are_refused_with_the_bounds(cifar, limit):
    message = refusal("cifar10", cifar, limit=limit)
    assert str(limit) in message and "1" in message
    if limit > 0:
        split, size = ("test", 20) if limit <= 100 else ("train", 100)
        assert f"{split} split has 1 to {size} images" in message


def test_a_limit_keeps_the_first_images_of_each_class(cifar):
    whole, part = data.load("cifar10", cifar), data.load("cifar10", cifar, limit=13)
    for all_of, some in ((whole.train, part.train), (whole.test, part.test)):
        kept = round_robin(all_of.labels.tolist(), 13)
        assert torch.equal(some.images, all_of.images[kept])
        assert torch.equal(some.labels, all_of.labels[kept])
        assert sorted(Counter(some.labels.tolist()).values()) == [1] * 7 + [2] * 3


@pytest.mark.parametrize("count, limit", [(1, None), (13, None), (99, None), (30, 7), (5, 20)])
def test_held_out_images_are_the_last_of_each_class_and_nothing_else_changes(cifar, count, limit):
    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(b"never read")
    images, labels = (
        getattr(data.load("cifar10", cifar, splits=("train",)).train, n) for n in ("images", "labels")
    )
    held = data.load("cifar10", cifar, holdout=count, limit=limit)
    backwards = [len(labels) - 1 - i for i in round_robin(labels.flip(0).tolist(), count)]
    out = sorted(backwards)
    rest = [i for i in range(len(labels)) if i not in out]
    for split, whole in ((held.test, out), (held.train, rest)):
        kept = [whole[i] for i in round_robin(labels[whole].tolist(), min(limit or len(whole), len(whole)))]
        assert torch.equal(split.images, images[kept]) and torch.equal(split.labels, labels[kept])
    alone = data.load("cifar10", cifar, holdout=count, limit=limit, splits=("test",))
    assert torch.equal(alone.test.images, held.test.images)
    assert (alone.tested, data.load("synthetic", "", limit=10).tested) == ("held-out training", "test")


@pytest.mark.parametrize("dataset, size", [("cifar10", 100), ("synthetic", 10_000)])
def test_as_many_images_as_there_are_cannot_be_held_out(cifar, dataset, size):
    assert f"of {size} training images, 1 to {size - 1} can" in refusal(dataset, cifar, holdout=size)
    assert len(data.load(dataset, cifar, holdout=size - 1).train) == 1


def test_images_held_out_of_a_folder_need_no_test_folder(folders):
    shutil.rmtree(folders / "test")
    whole = data.load("folder", folders, splits=("train",)).train
    held = data.load("folder", folders, holdout=3)
    assert len(held.test) == 3 and len(held.train) == len(whole) - 3
    assert sorted(held.test.labels.tolist()) == [0, 1, 2]


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
    kept = data.balanced_indices(np.array(labels), limit, "train")
    assert kept.tolist() == round_robin(labels, limit)


def test_splits_are_checked():
    with pytest.raises(ValueError, match="train"):
        data.load("synthetic", "data", splits=("validation",))


# Pixels


def test_to_float_divides_exactly_and_keeps_the_memory_format():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    floats = data.to_float(values)
    assert floats.dtype == torch.float32
    assert np.array_equal(floats.numpy(), values.numpy().astype(np.float32) / np.float32(255))
    last = data.to_float(values.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, floats)


# Augmentation


def crop_by_hand(image, down, right, flip, padding):
    """One crop out of one framed image, pixel by pixel as the definition says."""
    channels, height, width = image.shape
    frame = np.zeros((channels, height + 2 * padding, width + 2 * padding), dtype=image.dtype)
    frame[:, padding : padding + height, padding : padding + width] = image
    crop = frame[:, down : down + height, right : right + width]
    return crop[:, :, ::-1] if flip else crop


def outcomes(before, after, padding):
    """For each image the only (down, right, flip) that makes `after` of it."""
    found = []
    choices = list(itertools.product(range(2 * padding + 1), range(2 * padding + 1), (False, True)))
    for image, result in zip(before.numpy(), after.numpy(), strict=True):
        fits = [c for c in choices if np.array_equal(crop_by_hand(image, *c, padding), result)]
        assert len(fits) == 1
        found.append(fits[0])
    return found


def noise_images(count, channels=3, height=32, width=32, dtype=torch.uint8, seed=0):
    images = torch.randint(1, 256, (count, channels, height, width), generator=seeded(seed))
    return images.to(dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_augmented_images_are_framed_crops_or_their_mirror_images(memory_format):
    images = noise_images(64).contiguous(memory_format=memory_format)
    original = images.clone()
    augmented = data.augment(images, seeded())
    assert torch.equal(images, original)
    assert augmented.dtype == torch.uint8 and augmented.stride() == images.stride()
    assert len(set(outcomes(images, augmented, 4))) > 40


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 5),
    channels=st.integers(1, 4),
    height=st.integers(5, 9),
    width=st.integers(5, 9),
    padding=st.integers(0, 3),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    last=st.booleans(),
)
def test_augment_takes_any_shape_type_and_memory_format(count, channels, height, width, padding, dtype, last):
    images = noise_images(count, channels, height, width, dtype)
    if last:
        images = images.contiguous(memory_format=torch.channels_last)
    augmented = data.augment(images, seeded(1), padding)
    assert augmented.dtype == dtype and augmented.stride() == images.stride()
    outcomes(images, augmented, padding)


def test_every_shift_and_both_directions_are_equally_likely():
    padding, size, expected = 4, 10, 60
    choices = list(itertools.product(range(9), range(9), (False, True)))
    image = noise_images(1, 1, size, size)
    augmented = data.augment(image.expand(expected * len(choices), -1, -1, -1), seeded(2), padding)
    table = {crop_by_hand(image[0].numpy(), *c, padding).tobytes(): c for c in choices}
    assert len(table) == 162
    counts = Counter(table[result.tobytes()] for result in augmented.numpy())
    assert set(counts) == set(choices)
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 161 + 5 * (2 * 161) ** 0.5


def test_augmentation_depends_on_the_generator_alone():
    images = noise_images(32)
    torch.manual_seed(1)
    first = data.augment(images, seeded(3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(data.augment(images, seeded(3)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(data.augment(images, seeded(4)), first)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(data.augment(last, seeded(3)), first)


# Batches


def numbered(count):
    """A split whose image i is filled with the number i, over two pixels, and whose label is i."""
    numbers = torch.arange(count)
    images = torch.stack([numbers // 256, numbers % 256], 1).to(torch.uint8).reshape(count, 1, 1, 2)
    return data.Split(images, numbers)


SIZES = {
    "count": st.integers(1, 300),
    "batch_size": st.integers(1, 120),
    "seed": st.integers(0, 3) | st.none(),
}


@given(**SIZES)
def test_an_epoch_holds_every_image_once_with_its_label(count, batch_size, seed):
    generator = None if seed is None else seeded(seed)
    batches = list(data.epoch_batches(numbered(count), batch_size, generator))
    assert [index for index, _, _ in batches] == list(range(data.num_batches(count, batch_size)))
    labels = torch.cat([labels for _, _, labels in batches])
    assert sorted(labels.tolist()) == list(range(count))
    if seed is None:
        assert labels.tolist() == list(range(count))
    pixels = torch.cat([images for _, images, _ in batches]).long().reshape(count, 2)
    assert torch.equal(256 * pixels[:, 0] + pixels[:, 1], labels)


@given(**SIZES)
def test_batches_are_full_but_the_last_and_none_holds_one_image(count, batch_size, seed):
    generator = None if seed is None else seeded(seed)
    sizes = [len(labels) for _, _, labels in data.epoch_batches(numbered(count), batch_size, generator)]
    assert all(size == batch_size for size in sizes[:-1])
    assert sizes[-1] <= batch_size + 1
    if count > 1 and batch_size > 1:
        assert min(sizes) > 1


def test_batch_counts_by_hand():
    counts = {
        (10, 5): 2,
        (11, 5): 2,
        (12, 5): 3,
        (1, 5): 1,
        (4, 5): 1,
        (6, 5): 1,
        (3, 1): 3,
        (50_000, 128): 391,
    }
    assert {key: data.num_batches(*key) for key in counts} == counts


@given(**SIZES, share=st.floats(0, 1))
def test_starting_in_the_middle_gives_the_rest_of_the_epoch(count, batch_size, seed, share):
    def epoch(start):
        generator = None if seed is None else seeded(seed)
        return list(data.epoch_batches(numbered(count), batch_size, generator, start))

    start = round(share * data.num_batches(count, batch_size))
    whole, rest = epoch(0)[start:], epoch(start)
    assert [b[0] for b in whole] == [b[0] for b in rest]
    for (_, images, labels), (_, same_images, same_labels) in zip(whole, rest, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


def test_the_order_depends_on_the_generator_alone():
    def order(seed):
        return torch.cat([labels for _, _, labels in data.epoch_batches(numbered(200), 32, seeded(seed))])

    torch.manual_seed(1)
    first = order(5)
    torch.manual_seed(2)
    assert torch.equal(order(5), first)
    assert not torch.equal(order(6), first)
    assert not torch.equal(first, torch.arange(200))


@pytest.mark.parametrize("batch_size, start", [(0, 0), (-1, 0), (4, -1), (4, 4)])
def test_impossible_batches_are_refused(batch_size, start):
    with pytest.raises(ValueError, match=f"not {batch_size if batch_size < 1 else start}"):
        next(data.epoch_batches(numbered(10), batch_size, None, start))


# Synthetic images


@pytest.fixture(scope="module")
def shapes():
    return data.load("synthetic", "unused", limit=2000)


def test_synthetic_sets_are_balanced(shapes):
    for split in (shapes.train, shapes.test):
        assert split.images.shape == (2000, 3, 32, 32) and split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.labels.bincount().tolist() == [200] * 10
        assert split.images.min() > 0 and split.images.max() < 255  # nothing is clipped away
    assert len(set(shapes.classes)) == 10


def test_no_synthetic_image_comes_twice(shapes):
    prints = {image.numpy().tobytes() for split in (shapes.train, shapes.test) for image in split.images}
    assert len(prints) == len(shapes.train) + len(shapes.test)


def test_part_of_a_synthetic_set_is_its_beginning(shapes):
    torch.manual_seed(123)
    part = data.load("synthetic", "elsewhere", limit=321)
    for whole, some in ((shapes.train, part.train), (shapes.test, part.test)):
        assert torch.equal(some.images, whole.images[:321]) and torch.equal(some.labels, whole.labels[:321])
        counts = some.labels.bincount()
        assert counts.max() - counts.min() <= 1


def test_a_synthetic_set_has_ten_thousand_images_to_train_on_and_two_thousand_to_test():
    assert len(data.load("synthetic", "unused", splits=("test",)).test) == 2000
    assert "test split has 1 to 2000 images" in refusal("synthetic", "x", limit=2001, splits=("test",))
    assert "train split has 1 to 10000 images" in refusal("synthetic", "x", limit=10_001, splits=("train",))


def test_seeds_make_different_synthetic_images(shapes):
    other = data.load("synthetic", "unused", seed=1, limit=100)
    known = {image.numpy().tobytes() for split in (shapes.train, shapes.test) for image in split.images}
    for split in (other.train, other.test):
        assert not any(image.numpy().tobytes() in known for image in split.images)


def test_synthetic_pixels_are_the_same_on_every_machine():
    part = data.load("synthetic", "unused", limit=200)
    content = part.train.images.numpy().tobytes() + part.test.images.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest() == SYNTHETIC_SHA256


SYNTHETIC_SHA256 = "d2667ca0701f9cbe8130751a0bcbf9c94f2cec2950e509e9e10c65d33f79468b"


@pytest.mark.parametrize("label, shape", list(enumerate(data.SHAPES)))
def test_shapes_are_lighter_than_what_is_behind_them(shapes, label, shape):
    """Where most of a class's shape lies, its mean image is lighter than at the corners."""
    mean = shapes.train.images[shapes.train.labels == label].float().mean((0, 1))
    corners = torch.stack([mean[:3, :3], mean[:3, -3:], mean[-3:, :3], mean[-3:, -3:]]).mean()
    assert mean.max() - corners > 5
