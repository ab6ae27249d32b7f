"""A run's log and metrics: each epoch once, and nobody else's file is touched (item 57)."""

import os

import pytest
import soak
from runs import options, stopped, train

import checkpoints
import training
import utils


@pytest.mark.parametrize("ahead", [True, False])
def test_the_log_of_a_killed_run_has_each_epoch_once(ahead, whole, tmp_path):
    """Killed between the save and the line: the line comes from the checkpoint. After the line: it goes."""
    path = stopped(tmp_path / "run.pth.tar")
    log = path.with_name("run.log")
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines, "  9  of lost work  99 images/s"] if ahead else lines[:-2]))
    train("softmax_training", *options("softmax_training", path), "--resume")
    assert soak.compare(path, whole["softmax_training"]) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.log", "years of work\n"),
        ("run.log", "softmax_training: another run\n    1  2.3  99 images/s  0:00:01 left\n"),
        ("run.csv", "years,of,work\n"),
        ("run.csv", "training,sha256,attack,accuracy\n"),
    ],
)
def test_item_57_a_log_or_metrics_of_another_are_left_alone(name, content, tmp_path):
    path, file = tmp_path / "run.pth.tar", tmp_path / name
    file.write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loop, "train_epoch", lambda *_: pytest.fail("it trained"))
        with pytest.raises(utils.FileSystemError, match=f"{name}: exists already; it is not of this run"):
            train("softmax_training", *options("softmax_training", path))
    assert file.read_text() == content and not path.exists()
    file.unlink()
    before = stopped(path).read_bytes()
    file.write_text(content)
    with pytest.raises(utils.FileSystemError, match=f"{name}: exists already"):
        train("softmax_training", *options("softmax_training", path), "--resume")
    assert file.read_text() == content and path.read_bytes() == before
    train("softmax_training", *options("softmax_training", path), "--resume", "--overwrite")
    assert file.read_text() != content and checkpoints.load(path)["finished"]


def test_item_57_two_runs_do_not_share_a_log(tmp_path):
    train("softmax_training", *options("softmax_training", tmp_path / "m.pth", epochs=1))
    log, metrics = ((tmp_path / name).read_bytes() for name in ("m.log", "m.csv"))
    with pytest.raises(utils.FileSystemError, match="exists already"):
        train("softmax_training", *options("softmax_training", tmp_path / "m.pth.tar"))
    other = stopped(tmp_path / "other.pth.tar")
    with pytest.raises(utils.FileSystemError, match="exists already"):
        given = options("softmax_training", other, log_to=tmp_path / "m.log")
        train("softmax_training", *given, "--resume")
    assert (tmp_path / "m.log").read_bytes() == log and (tmp_path / "m.csv").read_bytes() == metrics


def test_item_57_the_log_of_a_run_killed_before_its_first_save_is_its_own(tmp_path):
    given = options("softmax_training", tmp_path / "run.pth.tar")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(checkpoints, "save", lambda *_, **__: 1 / 0)
        train("softmax_training", *given)
    train("softmax_training", *given, "--resume")
    assert (tmp_path / "run.log").read_text().count("softmax_training: ") == 1


@pytest.mark.parametrize("log", ["run.pth.tar", "run.csv", "x/../run.pth.tar", "run.pth.tar.previous"])
def test_item_57_checkpoint_log_and_metrics_are_three_files(log, tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(utils.UsageError, match="have names of their own"):
        given = options("softmax_training", tmp_path / "run.pth.tar", log_to=tmp_path / log)
        train("softmax_training", *given)


def test_item_57_a_pipe_is_no_log(tmp_path):
    os.mkfifo(tmp_path / "run.log")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(utils.FileSystemError, match=r"run\.log"):
            train("softmax_training", *options("softmax_training", tmp_path / "run.pth.tar"), *flags)
    assert (tmp_path / "run.log").is_fifo()
