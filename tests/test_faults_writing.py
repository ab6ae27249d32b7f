"""Writing: a full disk, a place that cannot be written, a file that is there already (items 16 to 20)."""

import contextlib
import json
import os
import resource
import signal
import subprocess

import pytest
import soak
from commands import evaluation_of, run

import checkpoints
import cli
import pcl_training
import robustness
import softmax_training
import utils

TINY = {"limit": 12, "batch_size": 6, "epochs": 1}


def train(path, *flags, module=softmax_training, **more):
    options = soak.tiny(path, **{**TINY, **more})
    module.main(cli.parse_config(module.Config, [*options, *flags]))


@contextlib.contextmanager
def full_disk(folder):
    """Within it a file system of 1 MB is mounted at `folder`; skips where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def small_files(size):
    """Within it no file can grow beyond `size` bytes: what a quota does, and needs no rights."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# ---------------------------------------------------------------- items 16, 18, 20: before any work


UNWRITABLE = ["/proc/run.pth.tar", "/dev/null/run.pth.tar", "/sys/run.pth.tar"]


@pytest.mark.parametrize("path", UNWRITABLE)
@pytest.mark.parametrize("which", ["save_to", "log_to"])
def test_item_16_a_place_that_cannot_be_written_is_found_before_the_first_epoch(
    path, which, tmp_path, monkeypatch
):
    monkeypatch.setattr(softmax_training.training.loop, "train_epoch", lambda *_: pytest.fail("it trained"))
    places = {"save_to": tmp_path / "run.pth.tar"} | {which: path}
    with pytest.raises(utils.FileSystemError, match="cannot write there") as caught:
        train(places.pop("save_to"), **places)
    assert path in str(caught.value) and caught.value.exit_status == 6


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_item_16_a_folder_without_the_right_to_write(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(utils.FileSystemError, match="Permission denied"):
        train(tmp_path / "run.pth.tar")


def test_item_16_a_missing_folder_is_made_and_a_directory_under_the_name_is_refused(tmp_path):
    path = tmp_path / "a" / "b ü" / "run.pth.tar"
    train(path)
    assert path.exists()
    with pytest.raises(utils.FileSystemError, match="is a directory"):
        train(tmp_path)


def test_item_18_stale_temporary_files_are_cleared_and_others_are_not(tmp_path):
    path = tmp_path / "run [1].pth.tar"
    stale = [tmp_path / "run [1].pth.tar.123.tmp", tmp_path / "run [1].pth.tar.previous.tmp"]
    other = [tmp_path / "run 1.pth.tar.5.tmp", tmp_path / "other.tmp"]
    for file in stale + other:
        file.write_bytes(b"half")
    train(path)
    assert not any(file.exists() for file in stale) and all(file.exists() for file in other)


@pytest.mark.parametrize("path", ["/proc/results.json", "/dev/null/results.json"])
def test_item_20_an_unwritable_results_path_is_found_before_the_attacks(path, tmp_path):
    train(tmp_path / "run.pth.tar")
    options = ["--checkpoints", str(tmp_path / "run.pth.tar"), "--dataset", "synthetic", "--results", path]
    with pytest.raises(utils.FileSystemError, match="cannot write there"):
        robustness.main(cli.parse_config(robustness.Config, [*options, "--limit", "4"]))


# ---------------------------------------------------------------- item 17: a full disk


def test_item_17_a_full_disk_leaves_the_old_file_and_stops_the_training(tmp_path):
    """A checkpoint is 1.3 MB, the disk 1 MB with a small good file on it."""
    with full_disk(tmp_path / "disk") as disk:
        path = disk / "run.pth.tar"
        path.write_bytes(b"the old file" * 1000)
        with pytest.raises(utils.FileSystemError, match="No space left") as caught:
            train(path, "--overwrite", epochs=3)
        assert str(path) in str(caught.value) and caught.value.exit_status == 6
        assert path.read_bytes() == b"the old file" * 1000
        assert sorted(file.name for file in disk.iterdir()) == ["run.log", "run.pth.tar"]


def test_item_17_a_quota_does_what_a_full_disk_does(tmp_path):
    path, second = tmp_path / "run.pth.tar", tmp_path / "pcl.pth.tar"
    train(path)
    before = path.read_bytes()
    with small_files(500_000):
        with pytest.raises(utils.FileSystemError, match="File too large"):
            train(path, "--resume", epochs=2)
        assert {file.name for file in tmp_path.iterdir()} == {"run.pth.tar", "run.log", "run.csv"}
        with pytest.raises(utils.FileSystemError, match="File too large"):  # stage 1 survives stage 2's fault
            train(second, module=pcl_training, init_from=path)
    assert path.read_bytes() == before and not second.exists()
    train(path, "--resume", epochs=2)  # with space again it goes on
    assert checkpoints.load(path)["epoch"] == 2


@pytest.mark.parametrize("size", [0, 1, 4096])
def test_item_17_texts_are_written_whole_or_not_at_all(tmp_path, size):
    path = tmp_path / "results.json"
    utils.write_text(path, "old")
    with small_files(size), pytest.raises(utils.FileSystemError):
        utils.write_text(path, "new" * 2000)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_item_17_a_log_that_cannot_grow_stops_the_training(tmp_path):
    with small_files(0), pytest.raises(utils.FileSystemError, match="File too large"):
        utils.say("a line", tmp_path / "run.log")


def test_an_error_inside_leaves_no_temporary_file(tmp_path):
    with pytest.raises(ZeroDivisionError), utils.replacing(tmp_path / "file") as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- item 19: what is there already


@pytest.mark.parametrize("content", [b"", b"a foreign file"])
def test_item_19_a_file_at_save_to_is_not_written_over(tmp_path, content):
    path = tmp_path / "run.pth.tar"
    path.write_bytes(content)
    with pytest.raises(utils.FileSystemError, match="--resume goes on with it, --overwrite starts anew"):
        train(path)
    assert path.read_bytes() == content
    with pytest.raises(utils.CheckpointError):
        train(path, "--resume")
    assert path.read_bytes() == content


@pytest.mark.parametrize("module", [softmax_training, pcl_training])
def test_item_19_before_an_image_is_read_or_stage_1_is_measured(module, tmp_path):
    path = tmp_path / "run.pth.tar"
    path.write_bytes(b"somebody's")
    given = ["--save-to", path, "--dataset", "folder", "--data-dir", tmp_path / "none"]
    status, out, said = run(module, *given)
    assert (status, out) == (6, "") and f"{path}: exists already" in said
    path.unlink()
    assert run(module, *given)[0] == 3  # what is wrong with the images is said after that


def test_item_19_a_finished_run_is_not_written_over(tmp_path):
    path = tmp_path / "run.pth.tar"
    train(path)
    before = [file.read_bytes() for file in sorted(tmp_path.iterdir())]
    with pytest.raises(utils.FileSystemError, match="exists"):
        train(path)
    assert [file.read_bytes() for file in sorted(tmp_path.iterdir())] == before
    train(path, "--overwrite", seed=1)
    assert checkpoints.load(path)["config"]["seed"] == 1


def test_a_file_that_is_no_log_is_not_replaced_by_one(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("years of work")
    with pytest.raises(utils.FileSystemError, match="exists already"):
        train(tmp_path / "run.pth.tar", log_to=notes)
    assert notes.read_text() == "years of work"


# ---------------------------------------------------------------- item 58: symbolic links


def test_item_58_the_file_that_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path):
    """The lock and the checkpoint before lie where the file lies, too."""
    place, there = tmp_path / "large disk" / "run.pth.tar", tmp_path / "run.pth.tar"
    there.symlink_to(place.relative_to(tmp_path))  # whose folder is not there yet
    train(there, epochs=1)
    train(there, "--resume", epochs=2, save_every_minutes=1e-9)
    results = tmp_path / "results.json"
    results.symlink_to("large disk/numbers.json")
    assert run(robustness, *evaluation_of(there))[0] == 0
    assert json.loads((place.parent / "numbers.json").read_text())
    assert there.is_symlink() and results.is_symlink() and not place.is_symlink()
    assert checkpoints.load(place)["epoch"] == 2
    assert {file.name for file in place.parent.iterdir()} == {place.name, "numbers.json"}
    with utils.hold(place):
        code, _, said = run(softmax_training, *soak.tiny(there, **TINY), "--overwrite")
    assert code == 6 and "another process is writing it" in said


def test_item_58_links_in_a_circle(tmp_path):
    path = tmp_path / "run.pth.tar"
    path.symlink_to("other.pth.tar")
    (tmp_path / "other.pth.tar").symlink_to(path)
    code, _, said = run(softmax_training, *soak.tiny(path, **TINY))
    assert code == 6 and "Too many levels of symbolic links" in said and path.is_symlink()
