"""Folders of images: what is read, and what is refused by name (items 27, 53 to 55, 63, 64 and 67)."""

import io
import itertools
import os
import shutil
import socket
import struct
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cli
import data
import softmax_training

COUNTS = {"train": 4, "test": 2}


def picture(*parts, size=(32, 32), mode="RGB"):
    """An image of noise, for which `parts` are the seed."""
    generator = np.random.default_rng(list(repr(parts).encode()))
    return Image.frombytes(mode, size, generator.bytes(len(mode) * size[0] * size[1]))


def encoded(form="PNG", image=None, **options):
    file = io.BytesIO()
    (image or picture()).save(file, form, **options)
    return file.getvalue()


def png_of_16_bits():
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(32 * (1 + 32 * 6))))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


@pytest.fixture
def folders(tmp_path):
    """Three classes with 4 training and 2 test images each; names in no particular order on disk."""
    for split, name in itertools.product(COUNTS, ("zebra", "ant", "moth")):
        place = tmp_path / "images" / split / name
        place.mkdir(parents=True)
        for i in reversed(range(COUNTS[split])):
            picture(split, name, i).save(place / f"{i}.png")
    return tmp_path / "images"


def refusal(root, **options):
    """Return the message of the DataError that `load` raises: one line, exit status 3."""
    with pytest.raises(data.DataError) as error:
        data.load("folder", root, **options)
    message = str(error.value)
    assert error.value.exit_status == 3 and message.isprintable()
    return message


def train(root, monkeypatch, capsys, *words):
    """Run the first stage from the command line; return its exit status and what it wrote to stderr."""
    settings = [
        "--depth",
        "8",
        "--epochs",
        "1",
        "--batch-size",
        "6",
        "--device",
        "cpu",
        "--data-dir",
        str(root),
    ]
    monkeypatch.setattr("sys.argv", ["softmax_training.py", "--dataset", "folder", *settings, *words])
    with pytest.raises(SystemExit) as ended:
        cli.run(softmax_training.main, softmax_training.Config)
    return ended.value.code, capsys.readouterr().err


# ---------------------------------------------------------------- what is read


def test_folders_are_read_silently_by_sorted_class_folder_and_file(folders, capfd):
    (folders / "train" / "ant" / "more").mkdir()
    (folders / "train" / "ant" / "3.png").rename(folders / "train" / "ant" / "more" / "0.PNG")
    loaded = data.load("folder", folders)
    assert loaded.classes == ("ant", "moth", "zebra")
    for split, count in COUNTS.items():
        part = getattr(loaded, split)
        wanted = [np.asarray(picture(split, c, i)) for c in loaded.classes for i in range(count)]
        assert part.labels.tolist() == [label for label in range(3) for _ in range(count)]
        assert np.array_equal(part.images.permute(0, 2, 3, 1).numpy(), np.stack(wanted))
    assert capfd.readouterr() == ("", "")


def test_the_only_split_that_is_there_can_be_read_alone(folders):
    (folders / "train").rename(folders / "elsewhere")
    assert len(data.load("folder", folders, splits=("test",)).test) == 6
    for place in (folders, folders / "test" / "ant" / "0.png"):
        message = refusal(place)
        assert str(place / "train") in message and "--data-dir" in message


def test_images_beyond_a_limit_are_not_read_and_all_but_one_can_be_held_out(folders):
    shutil.rmtree(folders / "test")  # nobody needs it
    for holdout in (-1, 12, 13):
        assert f"holdout {holdout} is out of bounds: 1 to 11 " in refusal(folders, holdout=holdout)
    held = data.load("folder", folders, holdout=11)
    assert len(held.train) == 1 and held.test.labels.bincount().tolist() == [4, 4, 3]
    (folders / "train" / "zebra" / "3.png").write_bytes(b"never read")
    kept = data.load("folder", folders, limit=6, splits=("train",)).train
    assert kept.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_item_54_links_to_images_and_folders_elsewhere_are_followed(folders, tmp_path):
    before = data.load("folder", folders).describe()
    store = tmp_path / "store"
    store.mkdir()
    (folders / "train" / "ant").rename(store / "ants")
    (folders / "train" / "ant").symlink_to(store / "ants")
    for path in (folders / "train" / "moth").iterdir():
        path.rename(store / path.name)
        path.symlink_to(store / path.name)
    assert data.load("folder", folders).describe() == before


def test_item_55_files_that_are_left_out_are_counted_and_named(folders, capfd):
    for name in ("a.gif", "b.GIF", "c.jfif", "notes", "x\x1b[31m.\x1by"):
        (folders / "train" / "ant" / name).write_bytes(encoded("GIF"))
    (folders / "train" / "list.txt").write_text("beside the classes")
    assert len(data.load("folder", folders).train) == 12
    out, err = capfd.readouterr()
    assert out.startswith(f"{folders / 'train'}: 6 files are left out as no images: 2 .gif, ") and not err
    assert {"1 .jfif", "1 .txt", "1 without an ending", "1 .\\x1by"} <= set(
        out.strip().split(": ")[2].split(", ")
    )
    assert out.count("\n") == 1


# ---------------------------------------------------------------- pictures that do not fit (27, 55)


@pytest.mark.parametrize(
    ("said", "content"),
    [
        ("is 32x32 L, not 32x32 RGB", encoded(image=picture(mode="L"))),
        ("is 32x32 RGBA, not 32x32 RGB", encoded(image=picture(mode="RGBA"))),
        ("is 32x32 CMYK, not 32x32 RGB", encoded("JPEG", picture(mode="CMYK"))),
        ("is 32x31 RGB, not 32x32 RGB", encoded(image=picture(size=(32, 31)))),
        ("is 1x1 RGB, not 32x32 RGB", encoded(image=picture(size=(1, 1)))),
        ("is 32x32 RGB of other than 8 bits, not", png_of_16_bits()),
        ("is 32x32 RGB of other than 8 bits, not", b"P6 32 32 1023\n" + bytes(32 * 32 * 6)),
        ("is 32x32 RGB of other than 8 bits, not", b"P6 32 32 15\n" + bytes(32 * 32 * 3)),
        ("is 32x32 RGB of 2 pictures, not", encoded(save_all=True, append_images=[picture(1)])),
        ("is 32x32 RGB of 2 pictures, not", encoded("TIFF", save_all=True, append_images=[picture(1)])),
        ("is 32x32 RGB of 2 pictures, not", encoded("WEBP", save_all=True, append_images=[picture(1)])),
        ("is 32x32 RGB of 2 pictures, not", encoded("MPO", save_all=True, append_images=[picture(1)])),
        ("is 32x32 RGB with transparency, not", encoded(transparency=(1, 2, 3))),
        ("is 10000x9000 RGB, not", b"P6 10000 9000 255\n"),  # a tenth of a gigabyte, which is never decoded
        ("is no readable image", b"P6 99999 99999 255\n"),
        ("is no readable image", encoded("GIF")),
        ("is no readable image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n"),  # would be run
        ("is no readable image", encoded()[:1000]),
        ("is no readable image", b""),
        ("is no readable image", b"<!doctype html><title>404</title>"),
    ],
)
def test_the_first_of_the_pictures_that_do_not_fit_is_named(folders, capfd, said, content):
    first, later = folders / "train" / "moth" / "2.png", folders / "train" / "zebra" / "0.png"
    first.write_bytes(content)
    later.write_bytes(content)
    message = refusal(folders)
    assert message.startswith(f"{first} {said}") and str(later) not in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("options", [("JPEG",), ("BMP",), ("TIFF",), ("WEBP",), ("PPM",), ("PNG",)])
def test_ordinary_pictures_of_every_format_are_read(folders, options):
    (folders / "test" / "ant" / "0.jpg").write_bytes(encoded(*options))
    assert len(data.load("folder", folders).test) == 7


# ---------------------------------------------------------------- trees that do not fit (27, 54, 63, 64, 67)


def link(target):
    return lambda path: path.symlink_to(os.path.join(path.parent, target))


def bind(path):
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        listening.bind(path.name)
        os.chdir(here)


OFFENDERS = {  # name below train/moth -> how it is made, and what is said
    "pipe.png": (os.mkfifo, "is a pipe"),
    "pipe": (os.mkfifo, "is a pipe"),
    "socket.png": (bind, "a socket"),
    "device.png": (link("/dev/zero"), "a device"),
    "broken.png": (link("nowhere.png"), "a broken link"),
    "self.png": (link("self.png"), "symbolic links"),
    "loop": (link("."), "a link in a loop"),
    "up": (link("../../.."), "a link in a loop"),
    "root": (link("/"), "a link in a loop"),
    "again.png": (link("0.png"), "0.png once more"),
    "other.png": (link("../ant/0.png"), "0.png once more"),
    ".hidden": (Path.mkdir, "is a hidden folder"),
    "../.ipynb_checkpoints": (Path.mkdir, "is a hidden folder"),
    "../stray.png": (lambda path: picture().save(path), "lies in no class folder"),
}


@pytest.mark.parametrize("name", OFFENDERS)
def test_what_is_no_image_is_named_at_once(folders, name, monkeypatch, capsys, tmp_path):
    path = folders / "train" / "moth" / name
    OFFENDERS[name][0](path)
    status, error = train(folders, monkeypatch, capsys, "--save-to", str(tmp_path / "run.pth.tar"))
    assert status == 3 and error.count("\n") == 1
    assert os.path.normpath(path) in error.replace("moth/../", "") and OFFENDERS[name][1] in error


@pytest.mark.parametrize("target", ["moth", "../test/ant"])
def test_item_54_folders_that_links_lead_to_twice_are_named(folders, target):
    link = folders / "train" / "ant" / "link"
    link.symlink_to(folders / "train" / target)
    other = os.path.normpath(folders / "train" / target)
    message = refusal(folders)
    assert str(link) in message and other in message and "once more" in message


def test_item_54_training_images_cannot_be_the_test_images(folders):
    shutil.rmtree(folders / "test")
    (folders / "test").symlink_to(folders / "train")
    assert f"{folders / 'test' / 'ant'} is {folders / 'train' / 'ant'} once more" in refusal(folders)


@pytest.mark.parametrize(("has", "lacks"), [("train", "test"), ("test", "train")])
def test_item_27_a_class_that_is_empty_or_in_one_split_alone_is_named(folders, has, lacks):
    for path in (folders / lacks / "moth").glob("*.png"):
        path.unlink()
    message = refusal(folders)
    assert f"{folders / lacks / 'moth'} holds no image" in message and ".png" in message
    shutil.rmtree(folders / lacks / "moth")
    for splits in (data.SPLITS, ("test",)):
        message = refusal(folders, splits=splits)
        assert f"{folders / has / 'moth'} is a class that {lacks} lacks" in message


def test_item_63_one_class_or_none_is_refused(folders, monkeypatch, capsys):
    for count, name in ((2, "zebra"), (1, "moth"), (0, "ant")):
        for split in COUNTS:
            shutil.rmtree(folders / split / name)
        if count < 2:
            status, error = train(folders, monkeypatch, capsys)
            assert status == 3 and f"{folders / 'train'} holds {count} class folders" in error


def test_item_63_the_home_of_nobody_is_refused(monkeypatch, capsys):
    status, error = train("~nosuchuser/x", monkeypatch, capsys)
    assert status == 3 and "~nosuchuser/x" in error and "--data-dir" in error and error.count("\n") == 1


def test_item_67_names_from_the_disk_are_escaped_and_cut(folders):
    """They lie where an escape sequence would reach the terminal: in the name of a class, and of a file."""
    name = "\x1b[31mred\n\x9b\u202e"
    (folders / "test" / name).mkdir()
    assert "\\x1b[31mred\\n\\x9b\\u202e" in refusal(folders)
    (folders / "train" / name).mkdir()
    deep = folders / "train" / name / ("d" * 200) / ("e" * 200)
    deep.mkdir(parents=True)
    (deep / "\x07.png").write_bytes(b"")
    picture().save(folders / "test" / name / "0.png")
    message = refusal(folders)
    assert "\\x07.png is no readable image" in message and len(message) < 700


def test_item_53_a_run_does_not_go_on_with_other_pixels_of_the_same_sum(
    folders, monkeypatch, capsys, tmp_path
):
    path = tmp_path / "run.pth.tar"
    assert train(folders, monkeypatch, capsys, "--save-to", str(path)) == (0, "")
    before = path.read_bytes()
    (folders / "train" / "ant" / "0.png").rename(folders / "train" / "ant" / "9.png")
    words = ("--save-to", str(path), "--resume", "--epochs", "2")
    status, error = train(folders, monkeypatch, capsys, *words)
    assert status == 4 and "same data" in error and path.read_bytes() == before
    (folders / "train" / "ant" / "9.png").rename(folders / "train" / "ant" / "0.png")
    assert train(folders, monkeypatch, capsys, *words) == (0, "")


# ---------------------------------------------------------------- any tree

GOOD, SMALL = encoded(), encoded(image=picture(size=(8, 8)))
STRUCTURAL = {"pipe": os.mkfifo, "broken": link("nowhere"), "loop": link("."), "again": link("0.png")}
UNREADABLE = {"small": SMALL, "noise": b"noise"}
KINDS = ("image", "image", "image", "text", *STRUCTURAL, *UNREADABLE)


@settings(max_examples=80, deadline=None)
@given(
    entries=st.dictionaries(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["", "s", "s/t", "s-x", "é è"]), st.integers(1, 4)),
        st.sampled_from(KINDS),
        max_size=6,
    )
)
def test_any_tree_is_read_completely_or_its_first_offender_is_named(entries):
    with tempfile.TemporaryDirectory() as root:
        made = {}
        for name, folder, i in [*entries, ("a", "", 0), ("b", "", 0)]:
            kind = entries.get((name, folder, i), "image")
            path = Path(root, "train", name, folder, f"{i}.{'txt' if kind == 'text' else 'png'}")
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "again":
                path.symlink_to(Path(root, "train", name, "0.png"))
            elif kind in STRUCTURAL:
                STRUCTURAL[kind](path)
            else:
                path.write_bytes({"image": GOOD, "text": b"words", **UNREADABLE}[kind])
            made[path] = kind
        ordered = sorted(
            made, key=lambda path: (path.relative_to(root).parts[1], str(path.parent), path.name)
        )
        kinds = Counter(made.values())
        try:
            loaded = data.load("folder", root, splits=("train",)).train
        except data.DataError as error:
            message = str(error)
            named = [path for path in ordered if message.startswith(f"{path} ")]
            structural = [path for path in ordered if made[path] in STRUCTURAL]
            unreadable = [path for path in ordered if made[path] in UNREADABLE]
            assert named and (named[0] in structural if structural else named[0] == unreadable[0])
        else:
            assert kinds.keys() <= {"image", "text"} and len(loaded) == kinds["image"]
            images = [path for path in ordered if made[path] == "image"]
            assert loaded.labels.tolist() == ["ab".index(path.relative_to(root).parts[1]) for path in images]
            assert np.array_equal(loaded.images[-1].numpy(), np.asarray(picture()).transpose(2, 0, 1))
