"""The picture of a training run's metrics, and its events for TensorBoard."""

import csv
import sys

import pytest
import soak
from commands import run
from PIL import Image

import robustness
import softmax_training
from evaluation import compare
from training import curves


def test_ten_epochs_make_a_picture_and_events(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = soak.tiny(tmp_path / "run.pth", limit=20, epochs=curves.LEAST_EPOCHS)
    code, _, error = run(softmax_training, *words, "--tensorboard", tmp_path / "events")
    assert code == 0, error
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.width > 3 * picture.height
    events = loader.EventAccumulator(str(tmp_path / "events")).Reload()
    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("loss", "cross_entropy", "train_accuracy", "test_accuracy", "lr"):
        wanted = [(int(row["epoch"]), float(row[name])) for row in rows if row[name]]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [epoch for epoch, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-5)


def test_each_seed_has_events_of_its_own_and_is_still_a_run_of_the_same_row(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    words = soak.tiny(tmp_path / "run.pth", limit=20, epochs=1)
    code, _, error = run(softmax_training, *words, "--seeds", 3, 5, "--tensorboard", tmp_path / "events")
    assert code == 0, error
    assert {path.name for path in (tmp_path / "events").iterdir()} == {"seed3", "seed5"}
    assert all(len(list((tmp_path / "events" / name).iterdir())) == 1 for name in ("seed3", "seed5"))
    words = ["--dataset", "synthetic", "--limit", 4, "--device", "cpu", "--attacks", "fgsm"]
    paths = [tmp_path / f"run_seed{seed}.pth" for seed in (3, 5)]
    code, out, error = run(robustness, *words, "--checkpoints", *paths, "--results", tmp_path / "r.json")
    assert code == 0 and "| Softmax, 2 seeds |" in out, error
    compare.main([str(tmp_path / "r.json")])
    assert "Softmax (run_seed3, ...), 2 seeds: 2 rows that differ" in capsys.readouterr().out


def test_without_tensorboard_it_is_asked_for_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = soak.tiny(tmp_path / "run.pth", limit=20, epochs=1)
    code, _, error = run(softmax_training, *words, "--tensorboard", tmp_path / "events")
    assert code == 2 and "--tensorboard: pip install tensorboard" in error
    assert not (tmp_path / "events").exists() and not (tmp_path / "run.pth").exists()


def test_a_picture_of_anybody_else_is_not_replaced(tmp_path):
    (tmp_path / "run.png").write_text("mine")
    code, _, error = run(softmax_training, *soak.tiny(tmp_path / "run.pth", limit=20, epochs=1))
    assert code == 6 and "run.png: exists already" in error and (tmp_path / "run.png").read_text() == "mine"


def test_few_epochs_make_none(tmp_path):
    assert run(softmax_training, *soak.tiny(tmp_path / "run.pth", limit=20, epochs=2))[0] == 0
    assert not (tmp_path / "run.png").exists()
