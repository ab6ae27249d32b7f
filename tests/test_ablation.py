"""The ablation: what its rows are, that the scripts made them, and that it goes on where it stopped."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from commands import run
from sets_on_disk import write_mnist

from benchmarks import ablation
from evaluation import claims

ROOT = Path(__file__).resolve().parent.parent

STAGES = ("--stage1", "--epochs 1 --batch-size 10 --lr 0.01", "--stage2")
STAGES = (*STAGES, "--epochs 1 --batch-size 10 --lr 1e-4 --weight-prox 0.02 --weight-conprox 0.004")


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "mnist", train=40)
    for path in (tmp_path / "mnist").glob("t10k-*"):
        path.unlink()  # no test image is read
    data = ("--dataset", "mnist", "--data-dir", "mnist", "--holdout", 20, "--attacks", "fgsm")
    return (*data, *STAGES, "--grid", "weight", "--seeds", 0, 1)


def test_each_row_is_a_setting_with_mean_and_spread_over_the_seeds(words, tmp_path):
    status, out, said = run(ablation, *words)
    assert status == 0, said
    begun = (tmp_path / "ablation/softmax-seed0.pth.tar").read_bytes()
    report = json.loads((tmp_path / "ablation/weight.json").read_text())
    assert list(report["rows"]) == ["weight 1", "weight 0.1", "weight 0.01", "weight 0.001"]
    table = (tmp_path / "ablation/weight.md").read_text()
    assert table in out and "held-out training images" in out
    for row, line in zip(report["rows"], table.splitlines()[2:], strict=True):
        for seed, found in enumerate(report["rows"][row]):
            stem = f"ablation/weight-{row.replace(' ', '')}-seed{seed}"
            config = torch.load(tmp_path / f"{stem}.pth.tar", weights_only=True)["config"]
            factor = float(row.split()[1])
            assert config["weight_prox"] == pytest.approx(0.02 * factor)
            assert config["weight_conprox"] == pytest.approx(0.004 * factor)
            assert (config["seed"], config["holdout"], config["model"]) == (seed, 20, "cnn6")
            (entry,) = json.loads((tmp_path / f"{stem}.json").read_text())["checkpoints"]
            assert found == {name: numbers["accuracy"] for name, numbers in entry["attacks"].items()}
            assert entry["attacks"]["clean"]["images"] == 20
        values = [found["clean"] for found in report["rows"][row]]
        low, high = min(values), max(values)
        assert f"| {statistics.mean(values):.2f} ± {(high - low) / 2:.2f} |" in line.replace("  ", "")

    # From another stage 1 it is another ablation.
    status, _, said = run(ablation, *words, "--stage1", f"{STAGES[1]} --epochs 2", "--seeds", 0)
    assert status == 4 and "began from another stage 1; name another --folder" in said
    (tmp_path / "ablation/softmax-seed0.pth.tar").write_bytes(begun)

    # The same command finds all done; where one run is gone, it alone is made again.
    lost, kept = "weight-weight0.01-seed1", tmp_path / "ablation/weight-weight1-seed0.pth.tar"
    before, made = report["rows"], kept.stat().st_mtime_ns
    for path in (tmp_path / "ablation").glob(f"{lost}.*"):
        path.unlink()
    status, _, said = run(ablation, *words)
    assert status == 0, said
    assert json.loads((tmp_path / "ablation/weight.json").read_text())["rows"] == before
    assert kept.stat().st_mtime_ns == made and (tmp_path / f"ablation/{lost}.json").exists()


def test_the_grid_of_layers_has_the_papers_rows():
    given = {"recipe": "pcl_training_adversarial_fgsm", "stage2": "--depth 20"}
    rows = ablation.settings(ablation.Config(**given))
    assert list(rows) == ["none", "fc", "layer3", "layer3 + fc", "all three"]
    assert rows["none"] == ["--weight-prox", "0", "--weight-conprox", "0"]
    assert rows["layer3 + fc"] == ["--layers", "layer3", "fc"]
    assert rows["all three"] == ["--layers", "layer2", "layer3", "fc", "--aux-dim", "512"]
    grey = ablation.settings(ablation.Config(dataset="mnist"))
    assert grey["all three"] == ["--layers", "layer2", "layer3", "fc"]  # CNN-6 needs no branch


@pytest.mark.parametrize(("wrong", "said"), [
    (("--seeds",), "--seeds: one or more"), (("--seeds", 1, 1), "each once"), (("--grid", "x"), "layers"),
    (("--stage2", "--epochs 0"), "--epochs 0"),
])  # fmt: skip
def test_a_bad_option_is_one_line(wrong, said):
    status, _, error = run(ablation, *wrong)
    assert status == 2 and said in error


@pytest.mark.parametrize("name", ["layers", "weight", "fashion_layers", "fashion_weight"])
def test_the_page_holds_what_was_measured_beside_what_the_paper_says(name):
    page = (ROOT / "results/README.md").read_text(encoding="utf-8").splitlines()
    measured = json.loads((ROOT / f"results/ablation_{name}.json").read_text())["rows"]
    grid = name.removeprefix("fashion_")
    assert list(measured) == list(ablation.settings(ablation.Config(grid=grid)))
    published = [c for c in json.loads(claims.LEDGER.read_text())["claims"] if "ablation" in c["source"]]
    assert len(published) == 3 * len(ablation.settings(ablation.Config()))
    for place, (row, runs) in enumerate(measured.items()):
        paper = [claim["published"] for claim in published[3 * place :][:3]] if name == "layers" else []
        cells = [ablation.cell([run[attack] for run in runs]) for attack in runs[0]]
        assert len(runs) == 2 and f"| {' | '.join([row, *paper, *cells])} |" in page
