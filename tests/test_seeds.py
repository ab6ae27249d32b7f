"""--seeds: the same settings trained several times, and what an evaluation makes of them."""

import csv
import json
import os
import signal
import statistics

import pytest
import torch
from commands import run
from ranks import run_ranks
from test_distributed import SHORT, apart

import pcl_training
import robustness
import softmax_training
from training import loop

TRAIN = [*SHORT, "--limit", 20, "--batch-size", 10]


def states(folder, *seeds):
    return [torch.load(folder / f"net_seed{seed}.pth.tar", weights_only=True) for seed in seeds]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The runs of seeds 3 and 5, each begun by itself."""
    folder = tmp_path_factory.mktemp("alone")
    for seed in (3, 5):
        given = ("--warmup", 0, "--seed", seed, "--save-to", folder / f"net_seed{seed}.pth.tar")
        assert run(softmax_training, *TRAIN, *given)[0] == 0
    return states(folder, 3, 5)


def test_each_seed_is_the_run_that_it_would_be_alone(alone, tmp_path):
    given = ("--warmup", 0, "--seeds", 3, 5, "--save-to", tmp_path / "net.pth.tar")
    assert run(softmax_training, *TRAIN, *given)[0] == 0
    names = {f"net_seed{seed}.{end}" for seed in (3, 5) for end in ("pth.tar", "log", "csv")}
    assert {path.name for path in tmp_path.iterdir()} == names
    for one, other in zip(alone, states(tmp_path, 3, 5), strict=True):
        assert apart(one, other) == 0 and one["history"] == other["history"]


def test_each_seed_goes_on_from_its_own_checkpoint(alone, tmp_path, monkeypatch):
    """Told to stop in the second run; the first one is finished, the second resumes, the third begins."""
    given = ["--warmup", 0, "--seeds", 3, 5, 7, "--save-to", tmp_path / "net.pth.tar"]
    epochs, train_epoch = [], loop.train_epoch

    def interrupted(*arguments):
        epochs.append(1)
        if len(epochs) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        train_epoch(*arguments)

    monkeypatch.setattr(loop, "train_epoch", interrupted)
    assert run(softmax_training, *TRAIN, *given)[0] == 143
    assert not (tmp_path / "net_seed7.pth.tar").exists()
    code, out, _ = run(softmax_training, *TRAIN, *given, "--no-overwrite", "--resume")
    assert code == 0 and "net_seed3.pth.tar is finished already" in out and "seed 7" in out
    assert "net_seed5.pth.tar at epoch 1, batch 1" in out
    for one, other in zip(alone, states(tmp_path, 3, 5), strict=True):
        assert apart(one, other) == 0


def test_a_seed_a_rank(alone, tmp_path):
    given = ["--warmup", 0, "--seeds", 3, 5, 7, "--seeds-per-rank", "--save-to", tmp_path / "net.pth.tar"]
    ends = run_ranks(2, softmax_training, *TRAIN, *given)
    assert [end[0] for end in ends] == [0, 0], ends
    assert [out.count("finished: ") for _, out, _ in ends] == [2, 1]
    for one, other in zip(alone, states(tmp_path, 3, 5), strict=True):
        assert apart(one, other) == 0
    ends = run_ranks(4, softmax_training, *TRAIN, *given)
    assert [end[0] for end in ends] == [2] * 4 and "3 seeds for 4 ranks" in "".join(end[2] for end in ends), (
        ends
    )
    code, _, said = run(softmax_training, *TRAIN, "--seeds-per-rank", "--save-to", tmp_path / "net.pth.tar")
    assert code == 2 and "add --seeds" in said
    code, _, said = run(softmax_training, *TRAIN, "--save-to", tmp_path / "net.pth.tar", "--seeds")
    assert code == 2 and "--seeds: names none" in said and not (tmp_path / "net.pth.tar").exists()


def test_ranks_share_the_minutes_of_all_seeds(tmp_path):
    given = ["--warmup", 0, "--seeds", 3, 5, "--save-to", tmp_path / "net.pth.tar"]
    ends = run_ranks(2, softmax_training, *TRAIN, *given, "--max-minutes", 5)
    assert [end[0] for end in ends] == [0, 0], ends
    assert ends[0][1].count("finished: ") == 2
    ends = run_ranks(2, softmax_training, *TRAIN, *given, "--max-minutes", 1e-6)
    assert [end[0] for end in ends] == [75, 75], ends
    ends = run_ranks(2, softmax_training, *TRAIN, *given, prepare=lambda rank: ["--seeds", 3 + rank, 5])
    assert [end[0] for end in ends] == [2, 2] and "seeds" in "".join(end[2] for end in ends), ends


def test_files_in_the_way_of_a_later_seed_stop_the_first(alone, tmp_path):
    (tmp_path / "net_seed5.log").write_text("a diary\n")
    given = ["--no-overwrite", "--seeds", 3, 5, "--save-to", tmp_path / "net.pth.tar"]
    code, _, said = run(softmax_training, *TRAIN, *given)
    assert code == 6 and "net_seed5.log" in said and not (tmp_path / "net_seed3.log").exists()


def test_stage_2_can_start_from_the_same_seed_of_stage_1(alone, tmp_path):
    for seed, state in zip((3, 5), alone, strict=True):
        torch.save(state, tmp_path / f"net_seed{seed}.pth.tar")
    start = ("--init-from", tmp_path / "net_seed{seed}.pth.tar", "--seeds", 3, 5)
    code, out, said = run(pcl_training, *TRAIN, *start, "--save-to", tmp_path / "pcl.pth.tar")
    assert code == 0, said
    assert all(f"starting from {tmp_path}/net_seed{seed}.pth.tar" in out for seed in (3, 5))


def test_an_evaluation_shows_seeds_as_one_row(alone, tmp_path):
    paths = []
    for seed, state in zip((3, 5), alone, strict=True):
        paths.append(tmp_path / f"net_seed{seed}.pth.tar")
        torch.save(state, paths[-1])
    again = tmp_path / "again.pth.tar"  # of the first seed, once more
    torch.save({**alone[0], "log": []}, again)
    other = {**alone[0], "config": {**alone[0]["config"], "lr": 7.0}}
    torch.save(other, tmp_path / "other.pth.tar")
    given = ["--dataset", "synthetic", "--limit", 40, "--device", "cpu", "--attacks", "fgsm"]
    results = ("--results", tmp_path / "results.json", "--checkpoints", *paths, tmp_path / "other.pth.tar")
    code, out, said = run(robustness, *given, *results)
    assert code == 0, said
    report = json.loads((tmp_path / "results.json").read_text())
    rows = [line for line in out.splitlines() if line.startswith("| Softmax")]
    assert len(rows) == 2 and rows[0].startswith("| Softmax, 2 seeds ") and "±" not in rows[1]
    singles = [entry["attacks"]["clean"]["accuracy"] for entry in report["checkpoints"]][:2]
    assert f"{statistics.mean(singles):.2f} ± {statistics.stdev(singles):.2f}" in rows[0]
    (group,) = report["seeds"]
    assert group["seeds"] == {
        "3": report["checkpoints"][0]["sha256"],
        "5": report["checkpoints"][1]["sha256"],
    }
    assert group["attacks"]["clean"]["mean"] == pytest.approx(statistics.mean(singles))
    assert {"clean", "fgsm", "worst"} == group["attacks"].keys()
    table = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(table) == 9 and "standard deviation" in out
    given += ["--overwrite", "--results", tmp_path / "results.json"]
    _, out, _ = run(robustness, *given, "--checkpoints", *paths, again)
    assert sum(line.startswith("| Softmax") for line in out.splitlines()) == 3 and "±" not in out


def test_each_seed_has_its_own_events():
    one, other = (softmax_training.Config(tensorboard="events").of_seed(seed) for seed in (3, 5))
    assert (one.tensorboard, other.tensorboard) == ("events/seed3", "events/seed5")
