"""Evaluations that are stopped, that would replace files, or are of odd classes and broken networks."""

import csv
import dataclasses
import json
import os
import re
import signal
import time

import pytest
import soak
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_scripts import run

import cli
import data
import evaluation
import robustness
import softmax_training
import utils
from evaluation import files, report, trials
from resnet_model import resnet

ATTACKS = ("fgsm", "pgd")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "softmax.pth.tar"
    options = soak.tiny(path, limit=24, epochs=1)
    softmax_training.main(cli.parse_config(softmax_training.Config, options))
    return path


def options(checkpoint, results):
    """Blocks of two images and many steps: there is time to stop it, and many places."""
    settings = {"dataset": "synthetic", "limit": 10, "batch_size": 2, "num_steps": 16, "device": "auto"}
    settings |= {"checkpoints": checkpoint, "results": results}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return [*words, "--attacks", *ATTACKS]


def evaluate(*words):
    robustness.main(cli.parse_config(robustness.Config, words))


def without_times(results):
    """The report, but for what the clock and the options of resuming say."""
    report = json.loads(results.read_text())
    for name in ("resume", "results"):
        report["settings"].pop(name)

    def cleaned(part):
        if isinstance(part, dict):
            return {key: cleaned(value) for key, value in part.items() if "seconds" not in key}
        return [cleaned(value) for value in part] if isinstance(part, list) else part

    return cleaned(report)


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    results = tmp_path_factory.mktemp("whole") / "results.json"
    evaluate(*options(checkpoint, results))
    return results


def signalled(words, signum, delay, folder, log):
    """Send a signal to an evaluation `delay` seconds after it chose its device; return its exit status."""
    process = soak.start("robustness", words, folder, log)
    end = time.monotonic() + 100
    while "device: " not in (log.read_text() if log.exists() else ""):
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    process.join(delay)
    if process.is_alive():
        os.kill(process.pid, signum)
    return soak.finish(process)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_items_23_and_24_a_real_signal_to_a_real_evaluation(signum, checkpoint, whole, tmp_path):
    results, log = tmp_path / "results.json", tmp_path / "output.txt"
    words = options(checkpoint, results)
    for delay in (0.2, 0.1, 0.0):  # a fast machine is done before the first
        status = signalled(words, signum, delay, tmp_path, log)
        if status:
            break
        results.unlink()
        log.unlink()
    assert status in (128 + signum, -signum), log.read_text()
    assert "Traceback" not in log.read_text()
    if "incomplete" in log.read_text():  # the signal found it measuring, not reading or writing
        assert re.search("incomplete: stopped at .* of 10 images", log.read_text().splitlines()[-1])
        assert not results.exists() and (tmp_path / "results.json.partial").exists()
    evaluate(*words, "--resume")
    assert without_times(results) == without_times(whole)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("results.json*.tmp"))


def test_items_47_and_59_a_stopped_evaluation_is_neither_lost_nor_mixed_with_another(checkpoint, tmp_path):
    results = tmp_path / "results.json"
    words = options(checkpoint, results)

    class Once(utils.StopSignals):
        received = signal.SIGINT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "StopSignals", Once)
        assert run("robustness", *words, cwd=tmp_path).returncode == 130
    partial = (tmp_path / "results.json.partial").read_bytes()
    goes_on = "--resume goes on with it, --overwrite starts anew"
    refused(run("robustness", *words, cwd=tmp_path), 6, "a stopped evaluation", goes_on)
    other = tmp_path / "other.pth.tar"
    torch.save(resnet(10, 8).state_dict(), other)
    for change, named in (
        (("--epsilon", "4/255"), "epsilon"),
        (("--seed", 1), "seed"),
        (("--limit", 9), "limit, data"),
        (("--attacks", "autoattack"), "attacks, batch_size"),  # of it alone the blocks are seeded
        (("--checkpoints", other), "checkpoints"),
    ):
        done = run("robustness", *words, "--resume", *change, cwd=tmp_path)
        refused(done, 4, f"begun with another {named}; give the old ones")
    assert (tmp_path / "results.json.partial").read_bytes() == partial and not results.exists()
    done = run("robustness", *words, "--resume", "--batch-size", 3, cwd=tmp_path)
    assert done.returncode == 0 and "2 outcomes are there already" in done.stdout


# ---------------------------------------------------------------- items 57 and 59: files that are there

TINY = ("--dataset", "synthetic", "--limit", 4, "--device", "cpu")


def refused(done, status, *words):
    """The one line of stderr of a command that was refused."""
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    return done.stderr


def test_item_57_the_metrics_of_a_training_run_are_not_replaced(checkpoint, tmp_path):
    training = soak.tiny(tmp_path / "O/s.pth.tar", limit=24, epochs=1)
    assert run("softmax_training", *training, cwd=tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "O").iterdir()}
    words = (*TINY, "--attacks", "fgsm", "--results", "O/s.json")
    for more in ((), ("--resume",)):
        done = run("robustness", *words, "--checkpoints", "O/s.pth.tar", *more, cwd=tmp_path)
        refused(done, 6, "O/s.csv: exists already", "--overwrite", "--results")
    assert {path: path.read_bytes() for path in (tmp_path / "O").iterdir()} == before
    assert (
        run("robustness", *words, "--checkpoints", "O/s.pth.tar", "--overwrite", cwd=tmp_path).returncode == 0
    )
    assert (tmp_path / "O/s.csv").read_bytes() != before[tmp_path / "O/s.csv"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mine.json", ()),
        ("mine.csv", ()),
        ("mine.curves.csv", ("--epsilons", 0)),
        ("mine.curves.png", ("--step-counts", 1)),
        ("mine.autoattack.log", ("--attacks", "autoattack")),
        ("mine.{sha256}.card.json", ("--model-card",)),
        ("kept/softmax-{sha256}/fgsm.png", ("--save-images", "kept")),
    ],
)
@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_item_57_no_file_of_the_users_is_replaced(name, options, more, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("data were read"))
    path = tmp_path / name.format(sha256=utils.sha256(checkpoint)[:8])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"mine": true}')
    words = (*TINY, "--checkpoints", checkpoint, "--attacks", "fgsm", *options, *more)
    done = run("robustness", *words, "--results", "mine.json", cwd=tmp_path)
    refused(done, 6, f"{path.relative_to(tmp_path)}: exists already; --overwrite")
    assert path.read_text() == '{"mine": true}'
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize("name", ["features.png", "features.json"])
def test_item_57_the_picture_replaces_nothing_either(name, checkpoint, tmp_path):
    words = (*TINY, "--checkpoints", checkpoint, "--attack", "fgsm")
    (tmp_path / name).write_text("mine")
    refused(run("plot_features", *words, cwd=tmp_path), 6, f"{name}: exists already; --overwrite")
    assert (tmp_path / name).read_text() == "mine"
    assert run("plot_features", *words, "--overwrite", cwd=tmp_path).returncode == 0
    assert (tmp_path / name).read_bytes() != b"mine"


def test_the_log_of_autoattack_which_is_appended_to_is_begun_anew(checkpoint, tmp_path):
    log, kept = tmp_path / "r.autoattack.log", tmp_path / "s.autoattack.log"
    for path in (log, kept, tmp_path / "s.json.partial"):
        path.write_text("before")
    config = robustness.Config(attacks=("autoattack",), results=str(tmp_path / "r.json"), overwrite=True)
    files.claim(config, {checkpoint: "0"})
    resumed = dataclasses.replace(config, results=str(tmp_path / "s.json"), overwrite=False, resume=True)
    files.claim(resumed, {checkpoint: "0"})
    assert not log.exists() and kept.read_text() == "before"


def test_item_24_killed_in_its_first_block_of_autoattack_it_goes_on(checkpoint, tmp_path, monkeypatch):
    words = (*TINY, "--checkpoints", checkpoint, "--attacks", "autoattack", "--resume")

    def killed(*network, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.autoattack, "find", lambda: killed)
    assert run("robustness", *words, cwd=tmp_path).returncode == 130
    assert (tmp_path / "results/robustness.autoattack.log").exists()
    done = run("robustness", *words, cwd=tmp_path)
    assert done.returncode == 130 and "4 outcomes are there already" in done.stdout, done.stderr


def test_item_57_two_outputs_of_one_name_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(utils.FileSystemError, match="two outputs of this run"):
        utils.claim([tmp_path / "a.csv", tmp_path / "link" / "a.csv"], lambda path: True, "")


def test_item_59_a_finished_evaluation_is_replaced_only_when_told(checkpoint, tmp_path):
    words = (*TINY, "--checkpoints", checkpoint, "--attacks", "fgsm")
    assert run("robustness", *words, "--resume", cwd=tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    refused(
        run("robustness", *words, cwd=tmp_path), 6, "results/robustness.json: exists already; --overwrite"
    )
    done = run("robustness", *words, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "results/robustness.json is finished already" in done.stdout
    for change in (("--epsilon", "4/255"), ("--seed", 1), ("--limit", 3)):
        refused(
            run("robustness", *words, "--resume", *change, cwd=tmp_path),
            4,
            "begun with another",
            "--overwrite",
        )
    assert {path: path.read_bytes() for path in (tmp_path / "results").iterdir()} == before
    done = run("robustness", *words, "--overwrite", "--epsilon", "4/255", cwd=tmp_path)
    assert done.returncode == 0
    report = json.loads((tmp_path / "results/robustness.json").read_text())
    assert report["settings"]["epsilon"] == 4 / 255


# ---------------------------------------------------------------- item 50: scores that are no numbers


@pytest.mark.parametrize("script", ["robustness", "plot_features"])
@pytest.mark.parametrize(("weight", "biases"), [(3e38, [0.0, 0.0]), (0.0, [2e38, -2e38])])
def test_item_50_clean_scores_that_are_not_finite_are_no_accuracy_of_0(script, weight, biases, tmp_path):
    """Weights that are finite, of which the scores, or the differences between two of them, are not."""
    weights = resnet(10, 8).state_dict()
    weights["fcf.weight"].fill_(weight)
    weights["fcf.bias"][:2] = torch.tensor(biases)
    torch.save(weights, tmp_path / "huge.pth.tar")
    done = run(script, *TINY, "--checkpoints", "huge.pth.tar", cwd=tmp_path)
    refused(done, 4, "huge.pth.tar: its class scores of clean images are not finite")
    assert "0.00" not in done.stdout
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["huge.pth.tar"]


# ---------------------------------------------------------------- item 49: any names of classes

COLUMNS = ("training", "sha256", "attack", "accuracy", "low", "high", "correct", "images")
CELLS = ("accuracy", "low", "high", "correct", "images")


def check_the_same_table(csv_path, json_path, classes):
    """CSV and JSON hold the same numbers, overall and of each class."""
    with open(csv_path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = json.loads(json_path.read_text())
    assert found["classes"] == list(classes)
    wanted = [
        (entry["sha256"], key, numbers)
        for entry in found["checkpoints"]
        for key, numbers in {**entry["attacks"], "worst": entry["worst"]}.items()
    ]
    written = [name.encode("utf-8", "backslashreplace").decode() for name in classes]  # as CSV has them
    for row, (sha256, key, numbers) in zip(rows, wanted, strict=True):
        assert list(row) == [*COLUMNS, *(f"class:{name}" for name in written)]
        assert (row["sha256"], row["attack"]) == (sha256, key)
        assert [float(row[name]) for name in CELLS] == [numbers[name] for name in CELLS]
        of_class = [row[f"class:{name}"] for name in written]
        assert [float(cell) if cell else None for cell in of_class] == list(numbers["per_class"].values())
        assert list(numbers["per_class"]) == list(classes)


def test_item_49_class_folders_named_like_columns(tmp_path):
    names = sorted((*COLUMNS, "class:low", "a,b", 'c"d', "e\rf", "g\nh", "ä|ö", " "))
    for index, name in enumerate(names):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (9 * index, 99, 0)).save(tmp_path / "test" / name / "0.png")
    torch.save(resnet(len(names), 8).state_dict(), tmp_path / "a|b.pth.tar")
    options = ("--dataset", "folder", "--data-dir", ".", "--attacks", "fgsm", "--checkpoints", "a|b.pth.tar")
    done = run("robustness", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_the_same_table(tmp_path / "results/robustness.csv", tmp_path / "results/robustness.json", names)
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


names_of_folders = st.one_of(
    st.sampled_from([*COLUMNS, "class:", "class:low", "worst", "None"]),
    st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=9),
    st.binary(min_size=1, max_size=4).map(
        lambda name: os.fsdecode(name.replace(b"\0", b"").replace(b"/", b"") or b"\xff")
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 200))
def test_item_49_any_class_names_give_the_same_table_in_csv_and_json(tmp_path_factory, drawn, count):
    key = lambda name: name.encode("utf-8", "backslashreplace")  # noqa: E731
    classes = drawn.draw(st.lists(names_of_folders, min_size=min(count, 9), max_size=9, unique_by=key))
    known = set(map(key, classes))
    classes += [name for number in range(count) if key(name := f"{number:03d}") not in known]
    labels = torch.arange(2 * len(classes)) % len(classes)
    split = data.Split(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels)
    folder = tmp_path_factory.mktemp("any")
    config = robustness.Config(attacks=("fgsm",), results=str(folder / "r.json"))
    target = evaluation.Target("net", "0", None, None, "net.pth.tar")
    results = evaluation.Results(
        config,
        data.Dataset("any", tuple(classes), None, split),
        [target],
        trials.table(config, len(classes) + 1),
    )
    for trial in results.trials:
        values = {name: torch.zeros(len(labels), dtype=dtype) for name, dtype in evaluation.COLUMNS.items()}
        correct = torch.rand(len(labels), generator=torch.Generator().manual_seed(count)) < 0.5
        results.outcomes.setdefault("0", {})[trial.key] = evaluation.Outcome({**values, "correct": correct})
    report.write(results, {})
    check_the_same_table(folder / "r.csv", folder / "r.json", classes)
