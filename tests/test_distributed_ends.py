"""How ranks evaluate, stop, die and are refused: one line, one save, and no one waits for ever."""

import functools
import json
import os
import signal
import time

import pytest
import torch
from commands import run
from ranks import run_ranks
from test_distributed import SHORT, apart, trained

import data
import pcl_training_adversarial_pgd
import robustness
import softmax_training

TRAIN = ("--limit", 24, "--batch-size", 6, "--warmup", 0)  # four batches


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "softmax.pth.tar"
    return trained(1, softmax_training, path, *TRAIN, float64=True)[0]


def at_call(number, function, of=data, name="augment"):
    """Call `function` at a call of `data.augment`: in the middle of a batch. For a forked rank alone."""
    before, calls = getattr(of, name), []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            function()
        return before(*arguments, **options)

    setattr(of, name, counted)


def hit(victim, signum, number=2):
    """What `run_ranks` calls first: in the rank `victim` a signal comes in the middle of a batch."""

    def prepare(rank):
        if rank == victim:
            at_call(number, functools.partial(os.kill, os.getpid(), signum))

    return prepare


def in_float32(state, folder):
    """A file with the weights of a checkpoint, whose batch counters stay whole numbers."""
    path, kept = folder / "network.pth.tar", state["state_dict"].items()
    weights = {name: value.float() if value.is_floating_point() else value for name, value in kept}
    torch.save({"state_dict": weights}, path)
    return path


def lines(ends):
    return [line for _, _, err in ends for line in err.splitlines()]


# ---------------------------------------------------------------- evaluation


def table_of(folder, ranks, networks, *options, **how):
    """Evaluate; return the status of all ranks, the table and what the files say, but for the times."""
    path, which = folder / "results.json", ["--checkpoints", *networks]
    given = ["--dataset", "synthetic", "--device", "cpu", "--limit", 50, "--batch-size", 8, "--results", path]
    settings = ["--attacks", "fgsm", "pgd", "square", "--num-queries", 5, "--random-start", "--num-steps", 2]
    ends = run_ranks(ranks, robustness, *given, *settings, *which, *options, **how)
    if any(end[0] for end in ends):
        return ends, lines(ends)
    report = json.loads(path.read_text())
    for entry in report["checkpoints"]:
        for attack in entry["attacks"].values():
            del attack["seconds"]
    said = ends[0][1][ends[0][1].index("| Training") :]
    report["settings"] = {name: value for name, value in report["settings"].items() if name != "resume"}
    return ends, (said, report["checkpoints"], path.with_suffix(".csv").read_text())


def test_ranks_evaluate_as_one_process_does(undisturbed, tmp_path):
    """The same table, JSON and CSV, in blocks of images and with random starts."""
    network = in_float32(undisturbed, tmp_path)
    _, one = table_of(tmp_path, 1, [network])
    for ranks in (2, 3):
        ends, found = table_of(tmp_path, ranks, [network], "--overwrite")
        assert found == one and len(one) == 3 and not any(out for _, out, _ in ends[1:])
    # Stopped with two ranks, resumed with three.
    ends, _ = table_of(tmp_path, 2, [network], "--overwrite", prepare=lambda rank: at_block(rank, 1))
    assert [end[0] for end in ends] == [143, 143], ends
    assert len(lines(ends)) == 1 and "incomplete" in lines(ends)[0]
    ends, found = table_of(tmp_path, 3, [network], "--resume")
    assert found == one and "outcomes are there already" in ends[0][1]


def at_block(rank, victim):
    if rank == victim:
        at_call(5, functools.partial(os.kill, os.getpid(), signal.SIGTERM), name="to_float")


# ---------------------------------------------------------------- stops


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_all_stop_at_the_batch_where_one_was_told_to(signum, undisturbed, tmp_path):
    path = tmp_path / "softmax.pth.tar"
    options = [*SHORT, *TRAIN, "--save-to", path]
    ends = run_ranks(2, softmax_training, *options, prepare=hit(1, signum), float64=True)
    assert [end[0] for end in ends] == [128 + signum] * 2
    assert len(lines(ends)) == 1 and "stopped at epoch 1, batch 2; saved" in lines(ends)[0]
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["softmax.csv", "softmax.log", path.name]
    for ranks in (1, 3):  # the file does not say how many ranks made it
        copy = tmp_path / f"{ranks}.pth.tar"
        for name in (path.name, "softmax.log", "softmax.csv"):
            copy.with_name(name.replace("softmax", str(ranks))).write_bytes((tmp_path / name).read_bytes())
        resumed, _ = trained(ranks, softmax_training, copy, *TRAIN, "--resume", float64=True)
        assert apart(undisturbed, resumed) < 1e-10
        row, expected = resumed["history"][-1], undisturbed["history"][-1]
        assert (
            row["loss"] == pytest.approx(expected["loss"])
            and row["train_accuracy"] == expected["train_accuracy"]
        )


def test_time_that_is_up_is_up_for_all(tmp_path):
    path = tmp_path / "softmax.pth.tar"
    ends = run_ranks(2, softmax_training, *SHORT, *TRAIN, "--max-minutes", 1e-6, "--save-to", path)
    assert [end[0] for end in ends] == [75] * 2
    assert len(lines(ends)) == 1 and "batch 1; saved" in lines(ends)[0]


def test_a_restart_is_for_ranks_that_were_killed(undisturbed, tmp_path):
    """A run that ended by itself ends again at once; one that was killed goes on from its last save."""
    options = [*SHORT, *TRAIN, "--save-every-minutes", 1e-9, "--save-to", tmp_path / "softmax.pth.tar"]
    for given, status in ((["--max-minutes", 1e-6], 75), (["--batch-size", 1], 2)):
        launcher = tmp_path / f"launcher{status}"
        for attempt in range(2):
            ends = run_ranks(2, softmax_training, *options, *given, launcher=launcher)
            assert [end[0] for end in ends] == [status] * 2 and len(lines(ends)) == 1 - attempt
        assert any(launcher.glob("attempt/*/error.json"))
    kill = hit(1, signal.SIGKILL, 3)
    ends = run_ranks(2, softmax_training, *options, prepare=kill, float64=True, launcher=tmp_path / "other")
    assert [end[0] for end in ends] == [143, -9] and len(lines(ends)) == 1
    ends = run_ranks(2, softmax_training, *options, float64=True, launcher=tmp_path / "other")
    assert "resumed" in ends[0][1] and "at epoch 1, batch 2" in ends[0][1]
    assert apart(undisturbed, torch.load(tmp_path / "softmax.pth.tar", weights_only=True)) < 1e-10


def test_one_rank_of_each_machine_reads_the_data_first(tmp_path):
    """Four ranks on two machines: it may be a download."""

    def watched(rank):
        load = data.load

        def timed(*arguments, **options):
            began = time.monotonic()
            time.sleep(0.3)
            loaded = load(*arguments, **options)
            (tmp_path / f"{rank}.json").write_text(json.dumps([began, time.monotonic()]))
            return loaded

        data.load = timed

    given = ("--save-to", tmp_path / "softmax.pth.tar")
    ends = run_ranks(4, softmax_training, *SHORT, *TRAIN, *given, prepare=watched, local=2)
    assert [end[0] for end in ends] == [0] * 4, ends
    times = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert max(times[0][1], times[2][1]) <= min(times[1][0], times[3][0])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(victim, tmp_path):
    path = tmp_path / "softmax.pth.tar"
    ends = run_ranks(
        3, softmax_training, *SHORT, *TRAIN, "--save-to", path, prepare=hit(victim, signal.SIGKILL)
    )
    assert ends[victim][0] == -signal.SIGKILL
    assert all(end[0] > 0 for rank, end in enumerate(ends) if rank != victim), ends
    assert len(lines(ends)) == 1 and f"rank {victim} of 3 has gone" in lines(ends)[0], ends
    assert "--resume" in lines(ends)[0]
    assert not path.exists()


# ---------------------------------------------------------------- bad input


def refused(ranks, *options, prepare=None, module=softmax_training, local=None, status=2):
    ends = run_ranks(ranks, module, *SHORT, *options, prepare=prepare, local=local)
    assert [end[0] for end in ends] == [status] * ranks, ends
    assert len(lines(ends)) == 1, ends
    return lines(ends)[0]


def test_bad_input_is_one_line_from_all_ranks(tmp_path):
    save = ("--save-to", tmp_path / "softmax.pth.tar")
    assert "fewer images than the 3 ranks" in refused(3, *TRAIN, "--batch-size", 2, *save)
    said = refused(2, *TRAIN, *save, prepare=lambda rank: ["--lr", 0.1 + rank])
    assert "rank 1 has other options than rank 0: lr 1.1, not 0.1" in said
    said = refused(2, *TRAIN, *save, prepare=other_images, status=3)
    assert "rank 1 has other data than rank 0: train" in said
    assert "several ranks do not compile" in refused(2, *TRAIN, *save, "--compile", "on")
    assert "--epochs x" in refused(2, *TRAIN, *save, "--epochs", "x")
    assert "2 ranks need a GPU each" in refused(2, *TRAIN, *save, "--device", "cuda")
    (tmp_path / "softmax.log").write_text("a diary\n")
    assert "softmax.log: exists already" in refused(2, *TRAIN, *save, "--no-overwrite", status=6)


def test_a_rank_without_an_address_is_told_so(tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    code, _, said = run(softmax_training, *SHORT, "--save-to", tmp_path / "softmax.pth.tar")
    assert code == 2 and "MASTER_ADDR" in said and "unset RANK" in said


def other_images(rank):
    if rank == 1:
        data.SYNTHETIC_SIZES["train"] = 23


def test_a_loss_that_diverges_on_one_rank_ends_all_at_that_batch(tmp_path):
    given = [*TRAIN, "--lr", 1e9, "--save-to", tmp_path / "softmax.pth.tar"]
    assert "diverged: epoch 1, batch" in refused(2, *given, status=5)


def test_adversarial_images_of_a_rank_without_images(undisturbed, tmp_path):
    """Nothing is attacked on the third rank in the last batch, and the run ends all the same."""
    start = in_float32(undisturbed, tmp_path)
    options = ("--init-from", start, "--limit", 8, "--batch-size", 6, "--num-steps", 1)
    state, _ = trained(3, pcl_training_adversarial_pgd, tmp_path / "pgd.pth.tar", *options)
    assert state["finished"] and state["epoch"] == 1
