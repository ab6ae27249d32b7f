"""Stopped anywhere, by whatever, and resumed: the end of a run does not tell (items 15, 21, 22, 24, 46)."""

import os
import signal
import time

import pytest
import soak
import torch
from runs import SCRIPTS, options, stop, stopped, train

import checkpoints
import data
import utils

slow = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes; SLOW=1 runs it")
every_script = pytest.mark.parametrize("script", SCRIPTS)


def saved(path):
    """When a checkpoint was written, in ns; 0 where it is not there, as between the two renames of a save."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@every_script
def test_a_run_stopped_after_every_batch_ends_as_one_that_was_not(script, whole, tmp_path):
    """Every batch and every epoch boundary is a place to stop: the run is resumed after each one."""
    path, stops = tmp_path / "run.pth.tar", 0
    given = options(script, path, whole["softmax_training"])
    while not (path.exists() and checkpoints.load(path)["finished"]):
        stop(script, *given, "--resume")
        stops += 1
    assert stops == 6  # after each of 3 batches in 2 epochs
    assert soak.compare(path, whole[script]) == []


def test_two_threads_are_as_exact_as_one(whole, tmp_path, two_threads):
    """As long as there are two throughout; batches large enough for both threads to have work."""
    script, paths = "pcl_training", [tmp_path / name for name in ("whole", "stopped")]
    size = {"limit": 16, "batch_size": 8, "epochs": 1, "precision": "bfloat16"}
    given = [options(script, path / "run.pth.tar", whole["softmax_training"], **size) for path in paths]
    train(script, *given[0])
    stop(script, *given[1])
    train(script, *given[1], "--resume")
    assert soak.compare(*(path / "run.pth.tar" for path in paths)) == []


@pytest.mark.timeout(900)  # of the real compiler, the first time on a machine
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_a_compiled_run_learns_the_same_and_resumes_as_exactly(backend, whole, tmp_path, monkeypatch):
    real, paths = torch.compile, [tmp_path / name / "run.pth.tar" for name in ("whole", "stopped")]
    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: real(f, backend=backend, dynamic=dynamic))
    script = "pcl_training"
    given = [[*options(script, path, whole["softmax_training"]), "--compile", "on"] for path in paths]
    train(script, *given[0])
    stop(script, *given[1], looks=1)  # the first look is before it compiles
    train(script, *given[1], "--resume")
    assert soak.compare(*paths) == []
    assert losses(paths[0]) == pytest.approx(losses(whole[script]), rel=1e-3)


def losses(path):
    return [row["loss"] for row in soak.outcome(path)["history"]]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_items_21_22_and_24_a_real_signal_to_a_real_process(signum, whole, tmp_path):
    """In the middle of an epoch; the data are large enough for the signal to find the run at work."""
    script, path, log = "pcl_training_adversarial_fgsm", tmp_path / "run.pth.tar", tmp_path / "output.txt"
    given = options(script, path, whole["softmax_training"], save_every_minutes=1e-9)
    process = soak.start(script, [*given, "--epochs", "100000", "--resume"], tmp_path, log)
    wait_for(path.exists, process, log)
    os.kill(process.pid, signum)
    status = soak.finish(process)
    assert status == (-signum if signum == signal.SIGKILL else 128 + signum), log.read_text()
    state = checkpoints.load_newest(path)
    if signum != signal.SIGKILL:
        assert "stopped at epoch" in log.read_text().splitlines()[-1] and "Traceback" not in log.read_text()
    epochs = state["epoch"] + 2
    straight = tmp_path / "straight" / "run.pth.tar"
    changed = ("--epochs", str(epochs), "--eval-every", "1000000")
    train(script, *options(script, straight, whole["softmax_training"]), *changed)
    train(script, *given, *changed[:2], "--eval-every", "1000000", "--resume")
    assert soak.compare(path, straight) == []


def wait_for(happened, process, log, seconds=100):
    end = time.monotonic() + seconds
    while not happened():
        assert process.is_alive() and time.monotonic() < end, log.read_text()
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_item_22_a_second_signal_ends_at_once_and_writes_nothing(signum, whole, tmp_path):
    """The first is answered when the batch is done, here after a million steps; the second does not wait."""
    path, log = tmp_path / "run.pth.tar", tmp_path / "output.txt"
    more = {"init_from": whole["softmax_training"], "num_steps": 1_000_000, "log_to": tmp_path / "run.log"}
    process = soak.start("pcl_training_adversarial_pgd", soak.tiny(path, **more), tmp_path, log)
    wait_for((tmp_path / "run.log").exists, process, log)
    for _ in range(2):
        time.sleep(0.1)
        os.kill(process.pid, signum)
    assert soak.finish(process) == 128 + signum, log.read_text()
    assert not path.exists() and not list(tmp_path.glob("*.tmp"))
    assert "stopped at" not in log.read_text() and "Traceback" not in log.read_text()


@pytest.mark.parametrize("flags", [["--resume"], ["--overwrite"], ["--resume", "--log-to", "other.log"]])
def test_a_run_under_way_is_not_joined_by_a_second_process(flags, tmp_path):
    path, logs = tmp_path / "run.pth.tar", [tmp_path / "first.txt", tmp_path / "second.txt"]
    given = [*options("softmax_training", path), "--epochs", "100000"]
    first = soak.start("softmax_training", [*given, flags[0]], tmp_path, logs[0])
    wait_for(path.exists, first, logs[0])
    being_saved = path.with_name(f"{path.name}.1.tmp")  # as by the first: not the second's to clear away
    being_saved.touch()
    with pytest.raises(utils.FileSystemError, match=f"{path}: another process is writing it"):
        train("softmax_training", *given, *flags)
    other = options("softmax_training", tmp_path / "2.pth.tar", log_to=path.with_name("run.log"))
    with pytest.raises(utils.FileSystemError, match=r"run\.log: another process is writing it"):
        train("softmax_training", *other)
    assert being_saved.exists() and not (tmp_path / "2.pth.tar").exists()
    first.kill()
    soak.finish(first)
    lines = [line.split("images/s")[0] for line in path.with_name("run.log").read_text().splitlines()]
    assert len(lines) == len(set(lines))  # no epoch twice, nothing begun anew
    train("softmax_training", *options("softmax_training", path), "--epochs", "1", flags[0])


def test_item_24_killed_while_saving_the_newest_whole_checkpoint_is_there(tmp_path):
    """Saves follow one another without a pause, so kill -9 finds one under way."""
    path, log = tmp_path / "run.pth.tar", tmp_path / "output.txt"
    given = [*options("softmax_training", path, save_every_minutes=1e-9), "--epochs", "100000", "--resume"]
    for attempt in range(3):
        before = saved(path)
        process = soak.start("softmax_training", given, tmp_path, log)
        wait_for(lambda then=before: saved(path) > then, process, log)
        time.sleep(0.02 * attempt)
        process.kill()
        assert soak.finish(process) == -signal.SIGKILL
        assert checkpoints.load_newest(path)["script"] == "softmax_training"
    train("softmax_training", *options("softmax_training", path), "--epochs", "1", "--resume")
    assert not list(tmp_path.glob("*.tmp"))  # item 18: whatever was left behind is gone


def test_a_stop_in_the_last_epoch_still_tells_its_status(tmp_path):
    given = options("softmax_training", tmp_path / "run.pth.tar")
    assert "is finished" in stop("softmax_training", *given, looks=6)


def test_max_minutes_saves_says_how_to_go_on_and_that_work_is_left(whole, tmp_path):
    path, log = tmp_path / "run.pth.tar", tmp_path / "output.txt"
    given = [*options("softmax_training", path), "--resume", "--max-minutes", "1e-9"]
    process = soak.start("softmax_training", given, tmp_path, log)
    assert soak.finish(process) == 75, log.read_text()
    assert "stopped at epoch 1, batch 1" in log.read_text() and "--resume goes on" in log.read_text()
    for _ in range(4):
        with pytest.raises(utils.Interrupted) as caught:
            train("softmax_training", *given)
        assert caught.value.exit_status == 75
    train("softmax_training", *given)  # the last batch: nothing is left to go on with
    assert soak.compare(path, whole["softmax_training"]) == []


@pytest.mark.parametrize(("minutes", "batches"), [(1e-9, [1, 2, 0]), (60, [0]), ("none", [0])])
def test_a_period_in_minutes_saves_in_the_middle_of_an_epoch(minutes, batches, tmp_path, monkeypatch):
    saved, save = [], checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda s, *a, **k: saved.append(s["batch"]) or save(s, *a, **k))
    given = options("softmax_training", tmp_path / "run.pth.tar", save_every_minutes=minutes, epochs=1)
    train("softmax_training", *given)
    assert saved == batches


def test_resume_with_nothing_there_begins_and_a_finished_run_is_left_alone(whole, tmp_path, capsys):
    path = tmp_path / "run.pth.tar"
    given = options("softmax_training", path)
    train("softmax_training", *given, "--resume")
    assert soak.compare(path, whole["softmax_training"]) == []
    before = path.read_bytes()
    train("softmax_training", *given, "--resume")
    assert path.read_bytes() == before and "finished already" in capsys.readouterr().out
    train("softmax_training", *given, "--epochs", "3", "--resume")
    state = checkpoints.load(path)
    assert state["epoch"] == 3 and len(state["history"]) == 3


def test_item_24_killed_right_after_its_end_a_run_is_tidied_up_by_the_next(tmp_path):
    path = tmp_path / "run.pth.tar"
    train("softmax_training", *options("softmax_training", path, epochs=1))
    content, previous = path.read_bytes(), checkpoints.previous_of(path)
    previous.write_bytes(content)
    train("softmax_training", *options("softmax_training", path, epochs=1), "--resume")
    assert not previous.exists() and path.read_bytes() == content
    previous.write_bytes(content)
    path.write_bytes(content[:-100])  # damaged, the one before is all there is
    train("softmax_training", *options("softmax_training", path, epochs=1), "--resume")
    assert previous.read_bytes() == content


def test_item_15_a_corrupt_newest_checkpoint_gives_way_to_the_one_before(whole, tmp_path, capsys):
    path = stopped(tmp_path / "run.pth.tar")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    previous = checkpoints.previous_of(path)
    good = previous.read_bytes()
    checkpoints.save(checkpoints.load(previous), path)
    assert previous.read_bytes() == good  # a corrupt one does not push it out
    path.write_bytes(content)
    train("softmax_training", *options("softmax_training", path), "--resume")
    said = capsys.readouterr().out
    assert "warning: " in said and f"going on from {path}.previous" in said
    assert soak.compare(path, whole["softmax_training"]) == []


def test_a_run_that_starts_anew_never_falls_back_to_the_old_one(tmp_path):
    path = stopped(tmp_path / "run.pth.tar", seed=7)
    stop("softmax_training", *options("softmax_training", path), "--overwrite")
    assert not checkpoints.previous_of(path).exists() and checkpoints.load(path)["config"]["seed"] == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lr": 0.2}, "lr 0.1 -> 0.2"),
        ({"seed": 1}, "trained on|seed 0 -> 1"),
        ({"depth": 14}, "depth 8 -> 14"),
        ({"batch_size": 5}, "batch_size 4 -> 5"),
        ({"limit": 13}, "trained on .*12.* not .*13"),
        ({"precision": "bfloat16"}, "precision float32 -> bfloat16"),
        ({"warmup": 0}, "warmup 1 -> 0"),
    ],
)
def test_item_46_what_identifies_a_run_cannot_change(changed, said, tmp_path):
    path = stopped(tmp_path / "run.pth.tar")
    before = path.read_bytes()
    with pytest.raises(utils.CheckpointError, match=said):
        train("softmax_training", *options("softmax_training", path, **changed), "--resume")
    assert path.read_bytes() == before


def test_item_46_what_may_change_is_told_and_the_run_of_another_script_refused(whole, tmp_path, capsys):
    path = stopped(tmp_path / "run.pth.tar")
    with pytest.raises(utils.CheckpointError, match=r"made by softmax_training\.py"):
        train("pcl_training", *options("pcl_training", path, whole["softmax_training"]), "--resume")
    train("softmax_training", *options("softmax_training", path), "--eval-every", "1", "--resume")
    assert "resumed with another eval_every 2 -> 1" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["images", "labels"])
def test_other_images_or_labels_are_refused(part, tmp_path, monkeypatch):
    path, load = stopped(tmp_path / "run.pth.tar"), data.load

    def changed(*args, **options):
        dataset = load(*args, **options)
        getattr(dataset.train, part)[:2] = getattr(dataset.train, part)[:2].flip(0) + (part == "images")
        return dataset

    monkeypatch.setattr(data, "load", changed)
    with pytest.raises(utils.CheckpointError, match="trained on"):
        train("softmax_training", *options("softmax_training", path), "--resume")


def test_item_53_a_run_of_older_code_is_resumed_where_its_images_are_as_many(whole, tmp_path, capsys):
    path = stopped(tmp_path / "run.pth.tar")
    state = checkpoints.load(path)
    older = {"name": "synthetic", "train": [12, 345, 67], "test": [12, 345, 67]}
    checkpoints.save({**state, "data": {**older, "test": [13, 345, 67]}}, path)
    with pytest.raises(utils.CheckpointError, match="trained on"):
        train("softmax_training", *options("softmax_training", path), "--resume")
    checkpoints.save({**state, "data": older}, path)
    train("softmax_training", *options("softmax_training", path), "--resume")
    assert "its images are compared by their number alone" in capsys.readouterr().out
    assert soak.compare(path, whole["softmax_training"]) == []


def test_a_run_that_began_before_there_was_a_warm_up_had_none(tmp_path):
    path = stopped(tmp_path / "run.pth.tar")
    state = checkpoints.load(path)
    del state["config"]["warmup"]
    checkpoints.save(state, path)
    with pytest.raises(utils.CheckpointError, match="warmup 0 -> 1"):
        train("softmax_training", *options("softmax_training", path), "--resume")


@pytest.mark.parametrize("lacking", ["state_dict", "history", "sums", "epoch", "config", "data", "scheduler"])
def test_a_checkpoint_without_a_part_is_refused(lacking, tmp_path):
    path = stopped(tmp_path / "run.pth.tar")
    state = checkpoints.load(path)
    torch.save({k: v for k, v in state.items() if k != lacking}, path)
    checkpoints.previous_of(path).unlink(missing_ok=True)
    with pytest.raises(utils.CheckpointError, match=lacking):
        train("softmax_training", *options("softmax_training", path), "--resume")
