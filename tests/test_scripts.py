"""The scripts as a user runs them: command lines, files on disk, the whole pipeline end to end."""

import ast
import contextlib
import csv
import difflib
import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import cli
from resnet_model import resnet

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = {
    "softmax_training": "Models_Softmax/CIFAR10_Softmax.pth.tar",
    "pcl_training": "Models_PCL/CIFAR10_PCL.pth.tar",
    "pcl_training_adversarial_fgsm": "Models_PCL/CIFAR10_PCL_AdvTrain_FGSM.pth.tar",
    "pcl_training_adversarial_pgd": "Models_PCL/CIFAR10_PCL_AdvTrain_PGD.pth.tar",
}
TINY = ("--depth", 8, "--epochs", 1, "--batch-size", 16)


def run(script, *options, cwd):
    """Run a script's command line in this process, which has torch imported already."""
    module = importlib.import_module(script)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(streams[0]):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, options)])
        with contextlib.redirect_stderr(streams[1]), pytest.raises(SystemExit) as ended:
            cli.run(module.main, module.Config)
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in streams)
    return SimpleNamespace(returncode=ended.value.code, stdout=stdout, stderr=stderr)


def run_process(script, *options, cwd):
    """Run a script as a real process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, options)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small data set on disk: two classes told apart by their brightness, below a path with spaces."""
    root = tmp_path_factory.mktemp("Bilder für alle")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("test", 10)):
        for name, level in (("dark", 60), ("light", 190)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(0, 50, (32, 32, 3), generator=generator)
                image = Image.fromarray((level + noise).to(torch.uint8).numpy())
                image.save(root / split / name / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def pipeline(folder, tmp_path_factory):
    """Every script once, at its default paths below an empty working directory: the first as a process."""
    cwd = tmp_path_factory.mktemp("work dir")
    data = ("--dataset", "folder", "--data-dir", folder)
    first, *others = CHECKPOINTS
    done = {first: run_process(first, *data, *TINY, cwd=cwd)}
    done |= {script: run(script, *data, *TINY, cwd=cwd) for script in others}
    done["robustness"] = run("robustness", *data, cwd=cwd)
    return cwd, done


@pytest.mark.parametrize("script", (*CHECKPOINTS, "robustness"))
def test_every_script_succeeds_silently_on_stderr(pipeline, script):
    _, done = pipeline
    assert done[script].returncode == 0, done[script].stderr
    assert done[script].stderr == ""
    start = "starting from Models_Softmax/CIFAR10_Softmax.pth.tar, epoch 1"
    assert (start in done[script].stdout) == script.startswith("pcl_training")


@pytest.mark.parametrize("path", CHECKPOINTS.values())
def test_every_training_leaves_a_checkpoint_a_log_and_metrics(pipeline, path):
    cwd, _ = pipeline
    state = torch.load(cwd / path, weights_only=True)
    assert state["epoch"] == 1 and state["finished"] and state["classes"] == ["dark", "light"]
    stem = path.removesuffix(".pth.tar")
    rows = list(csv.DictReader((cwd / f"{stem}.csv").open()))
    assert len(rows) == 1 and 0 <= float(rows[0]["test_accuracy"]) <= 100
    columns = {"proximity", "contrastive"} & rows[0].keys()
    assert columns == (set() if "Softmax" in path else {"proximity", "contrastive"})
    assert (cwd / f"{stem}.log").read_text().count("\n") >= 3
    assert not list((cwd / path).parent.glob("*.previous")) and not list((cwd / path).parent.glob("*.tmp"))


def test_the_table_has_a_row_for_each_checkpoint_and_agrees_with_the_json(pipeline):
    cwd, done = pipeline
    lines = [line for line in done["robustness"].stdout.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header[:6] == ["Training", "No attack", "FGSM", "BIM", "MIM", "PGD"]
    report = json.loads((cwd / "results/robustness.json").read_text())
    assert [entry["path"] for entry in report["checkpoints"]] == list(CHECKPOINTS.values())
    for line, entry in zip(lines[2:], report["checkpoints"], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        accuracies = [entry["attacks"][name]["accuracy"] for name in ("clean", "fgsm", "bim", "mim", "pgd")]
        assert cells[1:6] == [f"{accuracy:.2f}" for accuracy in accuracies]
        for attack in entry["attacks"].values():
            assert attack["max_delta"] <= 8 / 255 + 1e-7 and attack["images"] == 20


def test_weights_in_the_authors_format_are_measured(pipeline, folder, tmp_path):
    torch.manual_seed(1)
    model = resnet(num_classes=2, depth=8)
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    state = {"epoch": 3, "state_dict": weights, "optimizer_model": optimizer}
    torch.save(state, tmp_path / "robust.pth.tar")
    data = ("--dataset", "folder", "--data-dir", folder, "--attacks", "fgsm")
    done = run("robustness", *data, "--checkpoints", tmp_path / "robust.pth.tar", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| robust " in done.stdout and "depth 8" in done.stdout


@pytest.mark.parametrize(
    ("script", "options", "status", "said"),
    [
        ("robustness", (), 4, ["no checkpoint", "softmax_training.py"]),
        ("robustness", ("--checkpoints", "nowhere.pth.tar"), 4, ["nowhere.pth.tar: no such file"]),
        ("robustness", ("--attacks", "fgms"), 2, ["fgms", "did you mean fgsm?"]),
        ("robustness", ("--epsilon", "8"), 2, ["epsilon lies in [0, 1]; 8/255?"]),
        ("pcl_training", ("--dataset", "synthetic"), 4, ["python softmax_training.py makes it"]),
        ("softmax_training", ("--dataset", "folder", "--data-dir", "nowhere"), 3, ["nowhere"]),
        ("softmax_training", ("--batch-sise", "3"), 2, ["--batch-sise", "did you mean --batch-size?"]),
        ("softmax_training", ("--depth", "9"), 2, ["depth is 6n + 2"]),
    ],
)
def test_bad_input_is_one_line_and_a_status(tmp_path, script, options, status, said):
    done = run(script, *options, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    for words in said:
        assert words in done.stderr


def test_stage_2_refuses_a_network_of_another_depth_or_class_count(pipeline, folder, tmp_path):
    cwd, _ = pipeline
    data = ("--dataset", "folder", "--data-dir", folder, "--epochs", 1)
    start = ("--init-from", cwd / CHECKPOINTS["softmax_training"])
    done = run("pcl_training", *data, "--depth", 14, *start, cwd=tmp_path)
    assert done.returncode == 4 and "depth 8, not 14" in done.stderr and done.stderr.count("\n") == 1
    synthetic = ("--dataset", "synthetic", "--limit", 100, "--depth", 8, "--epochs", 1)
    done = run("pcl_training", *synthetic, *start, cwd=tmp_path)
    assert done.returncode == 4 and "num_classes 2, not 10" in done.stderr


def test_settings_can_be_chosen_without_a_test_image(pipeline, folder, tmp_path):
    (tmp_path / "train").symlink_to(folder / "train")
    held_out = ("--dataset", "folder", "--data-dir", tmp_path, "--holdout", 10)
    done = [run(script, *held_out, *TINY, cwd=tmp_path) for script in ("softmax_training", "pcl_training")]
    done.append(run("robustness", *held_out, "--limit", 4, "--attacks", "fgsm", cwd=tmp_path))
    assert [process.returncode for process in done] == [0, 0, 0], [process.stderr for process in done]
    assert "38 training and 10 held-out training images of folder" in done[1].stdout
    assert "% of the held-out training images" in done[1].stdout
    assert "on 4 held-out training images of folder" in done[2].stdout

    trained_on_all = pipeline[0] / CHECKPOINTS["softmax_training"]
    start = ("--depth", 8, "--init-from", trained_on_all, "--overwrite")
    for refused in (
        run("pcl_training", *held_out, *start, cwd=tmp_path),
        run("robustness", *held_out, "--overwrite", "--checkpoints", trained_on_all, cwd=tmp_path),
    ):
        assert refused.returncode == 4 and refused.stderr.count("\n") == 1
        assert "trained with holdout 0" in refused.stderr


def test_the_pcl_scripts_differ_in_the_science_alone():
    """`diff` between two of them shows what is trained on, and nothing else."""

    def changed(first, second):
        lines = [(ROOT / f"{name}.py").read_text().splitlines() for name in (first, second)]
        names = re.compile(r"FGSM|PGD|fgsm|pgd|adversarial_\w+|_AdvTrain_\w+")
        diff = difflib.ndiff(*[[names.sub("", line) for line in text] for text in lines])
        return [line for line in diff if line[0] in "+-" and line[2:].strip()]

    assert len(changed("pcl_training_adversarial_fgsm", "pcl_training_adversarial_pgd")) <= 15
    assert len(changed("pcl_training", "pcl_training_adversarial_fgsm")) <= 25


@pytest.mark.parametrize("script", CHECKPOINTS)
def test_no_number_with_a_meaning_stands_below_the_config(script):
    body = inspect.getsource(importlib.import_module(script).main)
    numbers = [node.value for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Constant)]
    assert not [number for number in numbers if type(number) in (int, float)]
