"""Options and environment: what is typed, edited into a script, or amiss around it (items 38 to 48)."""

import dataclasses
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soak
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import cli
import data
import pcl_training
import pcl_training_adversarial_fgsm
import pcl_training_adversarial_pgd
import robustness
import softmax_training
import utils
from benchmarks import throughput
from utils import UsageError

ROOT = Path(__file__).resolve().parent.parent

MANY = int(os.environ.get("FUZZ", "200"))  # inputs to each fuzz test; FUZZ=10000 for the long form
fuzz = settings(
    max_examples=MANY,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TRAINING = (softmax_training, pcl_training, pcl_training_adversarial_fgsm, pcl_training_adversarial_pgd)
PGD = pcl_training_adversarial_pgd.Config


def option(name):
    return f"--{name.replace('_', '-')}"


def refusal(config_class, *argv):
    with pytest.raises(UsageError) as caught:
        cli.parse_config(config_class, argv)
    text = str(caught.value)
    assert caught.value.exit_status == 2 and "\n" not in text
    return text


# ---------------------------------------------------------------- a Config as a command line


@dataclasses.dataclass(frozen=True)
class Config:
    # first group
    epsilon: float = 8 / 255  # the radius, 100 % of it
    num_steps: int = 10
    # second group
    resume: bool = False  # go on
    milestones: tuple[int, ...] = (1, 2)  # epochs
    limit: int | None = None
    data_dir: str = "data"


def test_each_kind_of_field_is_an_option():
    words = "--epsilon=4/255 --num-steps 3 --resume --milestones 5 9 --limit=7 --data-dir"
    config = cli.parse_config(Config, [*words.split(), "a b"])
    assert config == Config(4 / 255, 3, True, (5, 9), 7, "a b")
    emptied = cli.parse_config(Config, ["--limit", "none", "--no-resume", "--milestones"])
    assert emptied == Config(milestones=()) and cli.parse_config(Config, []) == Config()


def test_the_help_tells_groups_comments_and_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.parse_config(Config, ["--help"])
    said = capsys.readouterr().out
    parts = ("first group", "the radius, 100 % of it", "second group", "epochs [1 2]")
    assert sorted(parts, key=said.index) == list(parts)


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_fractions_are_divided_as_floats_are(numerator, denominator):
    assert cli.fraction(f"{numerator}/{denominator}") == numerator / denominator
    assert cli.fraction(repr(numerator / denominator)) == numerator / denominator


# ---------------------------------------------------------------- items 38 to 40: values


def test_item_38_an_epsilon_is_a_fraction_or_a_number_in_0_to_1():
    for text in ("8", "-1", "nan", "inf", "8/0", "abc", "0,031", "1/2/3", "", "/", "0x1", "-1/255"):
        said = refusal(robustness.Config, f"--epsilon={text}")
        assert "--epsilon" in said and "lies in [0, 1]; 8/255?" in said
    for text, value in (("8/255", 8 / 255), ("0.0313725", 0.0313725), ("0", 0), ("1", 1)):
        assert cli.parse_config(robustness.Config, ["--epsilon", text]).epsilon == value


@pytest.mark.parametrize(
    ("config_class", "argv", "valid", "near"),
    [
        (PGD, ["--dataset", "cifar01"], data.DATASETS, "cifar10"),
        (PGD, ["--layers", "layer3", "layer5"], ("layer2", "layer3", "fc"), "layer"),
        (PGD, ["--precision", "bf16"], ("auto", "bfloat16", "float32"), "bfloat16"),
        (PGD, ["--numsteps", "3"], ("--num-steps", "--lr"), "--num-steps"),
        (PGD, ["--lr_prox=3"], ("--lr-prox",), "--lr-prox"),
        (robustness.Config, ["--attacks", "fgms"], ("fgsm", "autoattack"), "fgsm"),
    ],
)
def test_item_39_an_unknown_name_is_answered_with_the_valid_ones_and_the_nearest(
    config_class, argv, valid, near
):
    said = refusal(config_class, *argv)
    assert all(name in said for name in valid) and near in said.split("did you mean")[1]


BAD = [
    *(("num_steps", value) for value in (0, -3, 1.5, True, "3", 2**63)),
    *(("step_size", value) for value in (0.0, -0.1, 1.5, math.nan)),
    *((name, value) for name in ("lr", "lr_prox", "lr_conprox") for value in (0.0, -1.0, math.inf, "0.1")),
    *(("batch_size", value) for value in (0, -1, 2.0, 2**70)),
    *(("epochs", value) for value in (0, -1, None)),
    *(("milestones", value) for value in ((3, 2), (0, 1), (2, 2), (-1,), [1, 2], ("a",), (1.5,))),
    *(("weight_decay", value) for value in (-1e-4, math.nan)),
    *(("momentum", value) for value in (-0.1, 1.0, 2)),
    *(("seed", value) for value in (-1, 2**63, 0.5)),
    *(("depth", value) for value in (0, 2, 9, 110.0, -4)),
    *(("limit", value) for value in (0, -5, 1.0)),
    *(("layers", value) for value in ((), ("fc", "fc"), ("layer1",), "fc")),
    *(("save_to", value) for value in ("", "a\0b", None, 3)),
    *(("max_minutes", value) for value in (0, -1.0, math.nan)),
    *(("epsilon_min", value) for value in (-0.1, 1.5, 0.06)),
    *(("log_to", value) for value in ("metrics.csv", "Models_PCL/CIFAR10_PCL_AdvTrain_PGD.pth.tar")),
    *(("resume", value) for value in (1, "yes", None)),
    *(("aux_dim", value) for value in (-1, 1.0)),
    *(("fc_dim", value) for value in (0, -1, 2.0)),
    *(("eval_every", value) for value in (0, -1)),
    *(("gamma", value) for value in (0, math.nan, np.float64(0.1), np.float32(0.1))),
    *(("epochs", value) for value in (np.int64(3), np.array([3, 4]))),
    *(("dataset", value) for value in (np.str_("cifar10"), np.array(["cifar10", "folder"]), ["cifar10"])),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda part: str(part)[:20].replace("\0", "0"))
def test_item_40_a_bad_value_is_refused_typed_or_edited_into_the_config(name, value):
    with pytest.raises(UsageError) as caught:
        cli.validate(dataclasses.replace(PGD(), **{name: value}))
    assert option(name) in str(caught.value) and "\n" not in str(caught.value)
    if type(value) in (int, float, tuple) and name != "save_to":
        words = [option(name), *map(str, value)] if isinstance(value, tuple) else [f"{option(name)}={value}"]
        assert option(name) in refusal(PGD, *words)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (throughput, "--images=0 --workers=-1 --batch-sizes=0 --results=throughput.md"),
        (robustness, "--results=table.csv --sanity-images=0 --epsilons=8 --step-counts=0 --cw-lr=0 --cw-c=0"),
        (robustness, "--decay=-1 --decay=nan --restarts=0"),
    ],
)
def test_item_40_in_the_benchmarks_and_the_evaluation(module, words):
    for word in words.split():
        assert word.split("=")[0] in refusal(module.Config, word)


def test_the_log_its_metrics_and_the_checkpoint_are_three_files():
    for log_to in ("run.csv", "run.pth.tar"):
        assert "--log-to" in refusal(softmax_training.Config, "--save-to=run.pth.tar", f"--log-to={log_to}")
    assert "--log-to" in refusal(softmax_training.Config, "--save-to=run.csv", "--log-to=run.log")
    assert "names no file" in refusal(softmax_training.Config, "--log-to=.")


@pytest.mark.parametrize("module", [*TRAINING, robustness], ids=lambda module: module.__name__)
def test_the_defaults_of_every_script_are_valid_and_its_help_names_every_option(module, capsys):
    config = cli.parse_config(module.Config, [])
    assert config == module.Config()
    with pytest.raises(SystemExit) as ended:
        cli.parse_config(module.Config, ["--help"])
    said, names = capsys.readouterr().out, {field.name for field in dataclasses.fields(config)}
    assert ended.value.code == 0 and all(option(name) in said for name in names)
    notes = cli.field_comments(module.Config)
    assert set(notes) == names
    plain = {"lr", "momentum", "weight_decay", "gamma", "seed"}  # that need no word
    unexplained = {name for name, (_, _, note) in notes.items() if not note} - plain
    assert unexplained <= {"epochs", "attacks", "layers", "warmup_factor"}, unexplained


# ---------------------------------------------------------------- fuzz

NAMES = [option(field.name) for field in dataclasses.fields(PGD)]
values = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.tuples(st.integers(), st.integers()).map(lambda pair: f"{pair[0]}/{pair[1]}"),
    st.sampled_from(
        ["none", "None", "nan", "-inf", "1e999", "9" * 5000, "１２", "1_000", "fc", "layer3", "auto", "@x"]
    ),
)
words = st.one_of(
    st.sampled_from([*NAMES, "--no-resume", "--", "-", "--debug", "-x", "--epsilon"]),
    st.tuples(st.sampled_from(NAMES), values).map("=".join),
    values,
)


@fuzz
@given(argv=st.lists(words, max_size=6))
def test_any_command_line_is_valid_or_answered_with_one_line(argv):
    try:
        config = cli.parse_config(PGD, argv)
    except UsageError as error:
        status, text = cli.describe_error(error)
        assert status == 2 and "\n" not in text
    else:
        cli.validate(config)
        assert 0 <= config.epsilon_min <= config.epsilon_max <= 1


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.binary(max_size=3),
    st.lists(st.integers(), max_size=3), st.lists(st.integers() | st.text(max_size=3), max_size=3).map(tuple),
    st.just({}), st.just(torch.zeros(2)),
)  # fmt: skip


@fuzz
@given(name=st.sampled_from([field.name for field in dataclasses.fields(PGD)]), value=anything)
def test_any_edit_of_a_config_is_valid_or_answered_with_one_line(name, value):
    try:
        cli.validate(dataclasses.replace(PGD(), **{name: value}))
    except UsageError as error:
        assert name in str(error).replace("-", "_")
        assert "\n" not in cli.describe_error(error)[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data set of four images, and the bytes of one of them."""
    root = tmp_path_factory.mktemp("fuzzed images")
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (1, 2, 3)).save(root / split / name / "1.png")
    return root, (root / "train" / "a" / "1.png").read_bytes()


@fuzz
@given(content=st.data(), suffix=st.sampled_from([".png", ".jpg", ".ppm", ".bmp", ".tiff", ".webp"]))
def test_any_file_among_the_images_is_read_or_named(folders, content, suffix):
    """A picture with some bytes replaced, cut off or inserted, or the head of one and noise."""
    root, whole = folders
    file, changed = root / "train" / "a" / f"0{suffix}", bytearray(whole)
    place = content.draw(st.just(0) | st.integers(0, len(whole)))
    size = content.draw(st.sampled_from([0, 1, 2, len(whole)]))
    head = content.draw(st.sampled_from([b"", b"P6 32 32 255\n", b"BM", b"II*\0"]))
    changed[place : place + size] = head + content.draw(st.binary(max_size=64))
    file.write_bytes(changed)
    try:
        loaded = data.load("folder", root)
    except data.DataError as error:
        assert str(file) in str(error) and "\n" not in str(error) and error.exit_status == 3
    else:
        assert loaded.train.images.shape == (3, 3, 32, 32) and loaded.train.images.dtype == torch.uint8
    finally:
        file.unlink()


# ---------------------------------------------------------------- items 41 and 42: the device


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "tpu", "", "cpu:x"])
def test_item_41_a_device_that_is_not_there(name):
    with pytest.raises(UsageError, match="there is cpu"):
        utils.select_device(name)


def test_item_41_auto_says_what_it_chose(capsys):
    device = utils.select_device("auto")
    assert f"device: {device}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("could not create a primitive"), 2),  # oneDNN, of a process whose memory is used up
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), 1),
        (MemoryError(), 2),
    ],
)
def test_item_42_what_libraries_say_of_a_lack_of_memory(error, status, monkeypatch, capsys):
    def main(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["softmax_training.py", "--batch-size", "64"])
    with pytest.raises(SystemExit) as end:
        cli.run(main, softmax_training.Config)
    assert end.value.code == status
    assert ("with --batch-size 64; try --batch-size 32" in capsys.readouterr().err) == (status == 2)


def test_item_42_out_of_memory_names_the_batch_size_and_a_smaller_one(tmp_path):
    log, given = tmp_path / "output.txt", soak.tiny(tmp_path / "run.pth.tar", limit=1000, batch_size=1000)
    process = soak.start("softmax_training", given, tmp_path, log, memory=150_000_000)  # where 1 GB is needed
    assert soak.finish(process) == 2, log.read_text()
    said = "out of memory on the device with --batch-size 1000; try --batch-size 500"
    assert log.read_text().splitlines()[-1].endswith(said)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attacks": ("transfer",)}, "needs --source-checkpoint"),
        ({"attacks": ("transfer-pgd",)}, "needs --source-checkpoint"),
        ({"restarts": 3}, "add --random-start"),
        ({"attacks": ("joint",), "predict": "prototype"}, "joint: is a loss on the logits"),
        ({"attacks": ("joint-mim",), "predict": "prototype"}, "joint-mim: is a loss on the logits"),
        ({"apgd_steps": 0}, "--apgd-steps 0: apgd_steps is a whole number from 1 up"),
        ({"num_queries": -1}, "num_queries is"),
        ({"cw_lr": 0.0}, "cw_lr is a number above 0"),
        ({"sanity_images": 0}, "sanity_images is"),
        ({"epsilons": (0.0, 2.0)}, r"--epsilons 2.0: epsilons lies in \[0, 1\]"),
        ({"step_counts": (1, 0)}, "--step-counts 0"),
    ],
)
def test_senseless_options_are_refused_before_any_work(changes, words, tmp_path):
    config = robustness.Config(dataset="folder", results=str(tmp_path / "new" / "r.json"), **changes)
    with pytest.raises(utils.UsageError, match=words):
        cli.validate(config)
        robustness.main(config)
    assert not (tmp_path / "new").exists()
