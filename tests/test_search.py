"""The search for settings: it trains by the scripts, reads no test image, and loses nothing when stopped."""

import json

import pytest

import data
import pcl_training
import training
import utils
from benchmarks import search

FEW = {"dataset": "synthetic", "limit": 40, "holdout": 20, "images": 10, "depth": 8, "device": "cpu"}
SHORT = {"epochs": 1, "milestones": (), "pcl_epochs": 1, "attacks": ("fgsm", "pgd-margin")}
SETTINGS = ("--weight-prox 0 --weight-conprox 0", "--weight-prox 0.1", "--lr 1e9 --weight-prox 1e9")


def config(path, **options):
    return search.Config(**{**FEW, **SHORT, "settings": SETTINGS, "results": str(path), **options})


@pytest.fixture
def no_test_images(monkeypatch):
    """Fails a test that reads a test image."""
    load = data._READERS["synthetic"]

    def guarded(root, split, choose, seed):
        assert split == "train"
        return load(root, split, choose, seed)

    monkeypatch.setitem(data._READERS, "synthetic", guarded)


def test_every_setting_is_trained_and_measured_on_held_out_images(tmp_path, capsys, no_test_images):
    path, load = tmp_path / "found.json", data.load
    search.main(config(path))
    assert data.load is load
    report = json.loads(path.read_text())
    stage1, control, pcl, lost = report["rows"]
    assert [row["name"] for row in report["rows"]] == ["stage 1", *SETTINGS]
    assert "proximity" not in control and "proximity" in pcl and "diverged" in lost
    out = capsys.readouterr().out
    assert "40 training and 20 held-out training images" in out and "on 10 held-out training images" in out
    assert path.with_suffix(".md").read_text() in out
    lines = path.with_suffix(".md").read_text().splitlines()
    assert "FGSM" in lines[0] and "PGD margin" in lines[0]
    assert len(lines) == 2 + len(report["rows"]) and "diverged" in lines[-1]
    for row, line in zip((stage1, control, pcl), lines[2:], strict=False):
        assert row["worst"] <= min(row["fgsm"], row["pgd-margin"]) and f"{row['clean']:.2f}" in line
    for name, weight in (("weight_prox_0_weight_conprox_0", 0), ("weight_prox_0.1", 0.1)):
        state = utils.load_checkpoint(tmp_path / "found" / f"{name}.pth.tar")
        assert state["config"]["weight_prox"] == weight and state["config"]["holdout"] == 20

    search.main(config(path))
    assert "held-out" not in capsys.readouterr().out  # nothing was trained or measured again
    assert json.loads(path.read_text())["rows"] == report["rows"]

    search.main(config(path, settings=SETTINGS[1:2], pcl_epochs=2))
    longer = json.loads(path.read_text())["rows"]
    assert longer[0] == stage1 and longer[1]["sha256"] != pcl["sha256"]


def test_a_search_that_runs_out_of_time_goes_on_where_it_was(tmp_path, monkeypatch):
    def rows(path):
        return [{**row, "sha256": None} for row in json.loads(path.read_text())["rows"]]

    whole, parts = tmp_path / "whole" / "found.json", tmp_path / "parts" / "found.json"
    search.main(config(whole, settings=SETTINGS[:2]))
    with pytest.raises(utils.Interrupted):  # in the midst of stage 1
        search.main(config(parts, settings=SETTINGS[:2], max_minutes=1e-6))

    left = search.Search.minutes_left

    def expires(self):  # after one training and its measurement
        self.calls = getattr(self, "calls", 0) + 1
        return left(self) if self.calls <= 2 else left(search.Search(config(parts, max_minutes=1e-9)))

    monkeypatch.setattr(search.Search, "minutes_left", expires)
    for _ in range(2):
        with pytest.raises(utils.Interrupted):
            search.main(config(parts, settings=SETTINGS[:2]))
    search.main(config(parts, settings=SETTINGS[:2]))
    assert rows(parts) == rows(whole)


def test_rows_of_another_training_are_not_taken_for_this_one(tmp_path):
    path = tmp_path / "found.json"
    search.main(config(path, settings=SETTINGS[:1]))
    with pytest.raises(utils.CheckpointError, match="trained on"):
        search.main(config(path, settings=SETTINGS[:1], limit=30))
    search.main(config(path, settings=SETTINGS[:1], images=5))
    measured = [
        json.loads(file.read_text())["settings"]["limit"]
        for file in sorted(path.with_suffix("").glob("*0.json"))
    ]
    assert measured == [5]


def test_a_slip_in_the_last_setting_is_told_before_anything_is_trained(tmp_path):
    with pytest.raises(utils.UsageError, match="weight-prox"):
        search.main(config(tmp_path / "found.json", settings=("--weight-prox 1", "--weigth-prox 1")))
    assert not list(tmp_path.rglob("*.pth.tar"))


def test_the_default_settings_are_options_of_the_script():
    for options in search.SETTINGS:
        parsed = utils.parse_config(pcl_training.Config, options.split())
        assert training.config_dict(parsed)


@pytest.mark.parametrize("setting", ["--depth 14", "--lr 0.1 --epochs=3", "--save-to elsewhere.pth.tar"])
def test_a_setting_cannot_be_what_all_runs_share(setting, tmp_path):
    with pytest.raises(utils.UsageError, match="is the same for all of a search"):
        search.main(config(tmp_path / "found.json", settings=("--weight-prox 1", setting)))
    assert not list(tmp_path.rglob("*.pth.tar"))
