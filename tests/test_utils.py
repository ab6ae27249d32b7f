"""Plumbing: options from a Config, generators, signals, atomic files, messages."""

import dataclasses
import os
import signal
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
import cli
import utils


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
    words = ["--epsilon=4/255", "--num-steps", "3", "--resume", "--milestones", "5", "9", "--limit=7"]
    config = cli.parse_config(Config, [*words, "--data-dir", "a b"])
    assert config == Config(4 / 255, 3, True, (5, 9), 7, "a b")
    assert cli.parse_config(Config, ["--limit", "none", "--no-resume", "--milestones"]) == Config(
        milestones=()
    )
    assert cli.parse_config(Config, []) == Config()


def test_the_help_tells_groups_comments_and_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.parse_config(Config, ["--help"])
    said = capsys.readouterr().out
    first, second = said.index("first group"), said.index("second group")
    assert first < said.index("the radius, 100 % of it") < second < said.index("epochs [1 2]")


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6))
def test_fractions_are_divided_as_floats_are(numerator, denominator):
    assert cli.fraction(f"{numerator}/{denominator}") == numerator / denominator
    assert cli.fraction(repr(numerator / denominator)) == numerator / denominator


@given(st.integers(0, 2**63 - 1), st.text(), st.integers(0, 10**6))
def test_a_generator_depends_on_its_key_alone(seed, what, index):
    torch.manual_seed(seed % 1000)
    a = torch.rand(4, generator=utils.generator(seed, what, index))
    torch.rand(3)
    assert torch.equal(a, torch.rand(4, generator=utils.generator(seed, what, index)))
    for other in ((seed + 1, what, index), (seed, what + "x", index), (seed, what, index + 1), (seed, what)):
        assert not torch.equal(a, torch.rand(4, generator=utils.generator(*other)))


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**9))
def test_uniform_lies_between_its_bounds(low, high, seed):
    low, high = sorted((low, high))
    drawn = utils.uniform(low, high, utils.generator(seed))
    assert low <= drawn <= high + 1e-16
    assert utils.uniform(low, low, utils.generator(seed)) == low


def test_uniform_fills_its_interval_evenly():
    source = utils.generator(0)
    drawn = torch.tensor([utils.uniform(0.02, 0.05, source) for _ in range(4000)], dtype=torch.float64)
    counts = torch.histc(drawn, 10, 0.02, 0.05)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_ask_for_a_stop_inside_and_are_what_they_were_outside(signum):
    before = signal.getsignal(signum)
    with utils.StopSignals() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signum)
        assert stop.received == signum
    assert signal.getsignal(signum) is before


def test_signals_are_left_alone_outside_the_main_thread():
    failed = []

    def body():
        try:
            with utils.StopSignals() as stop:
                assert stop.received is None
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert failed == []


def test_the_same_state_gives_the_same_bytes_whatever_the_file_is_called(tmp_path):
    state = {"a": torch.arange(5), "b": [1, 2.5, None, "ü"], "c": {"d": True}}
    for name in ("one.pth.tar", "another name.pth.tar"):
        checkpoints.save(state, tmp_path / name)
    assert utils.sha256(tmp_path / "one.pth.tar") == utils.sha256(tmp_path / "another name.pth.tar")
    loaded = checkpoints.load(tmp_path / "one.pth.tar")
    assert torch.equal(loaded["a"], state["a"]) and loaded["b"] == state["b"] and loaded["c"] == state["c"]
    assert loaded["format"] == checkpoints.FORMAT and loaded["versions"] == utils.versions()


def test_the_checkpoint_before_is_kept_until_the_run_is_over(tmp_path):
    path = tmp_path / "run.pth.tar"
    for number in range(3):
        checkpoints.save({"number": number}, path)
    assert checkpoints.load(checkpoints.previous_of(path))["number"] == 1
    checkpoints.save({"number": 3}, path, keep_previous=False)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert checkpoints.load_newest(path)["number"] == 3


def test_item_18_a_save_that_was_killed_between_its_two_renames_leaves_nothing_behind(tmp_path):
    """The checkpoint and the one before are then two links of one file, which no rename tells apart."""
    path = tmp_path / "run.pth.tar"
    checkpoints.save({"number": 0}, path)
    os.link(path, checkpoints.previous_of(path))
    checkpoints.save({"number": 1}, path)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f"{path.name}.previous"}
    assert checkpoints.load(checkpoints.previous_of(path))["number"] == 0
    assert checkpoints.load(path)["number"] == 1


def test_a_line_goes_to_stdout_and_log_whatever_its_letters(tmp_path, capsys):
    utils.say("für alle", tmp_path / "log")
    utils.note("only the log \udcff", tmp_path / "log")
    assert capsys.readouterr().out == "für alle\n"
    assert (tmp_path / "log").read_text(encoding="utf-8") == "für alle\nonly the log ?\n"
