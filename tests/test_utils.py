"""What every module needs: generators, signals, messages."""

import os
import signal
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import utils


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


def test_without_a_terminal_a_line_a_minute_says_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(0, 1000, 25))  # an image takes 25 seconds
    monkeypatch.setattr(utils.time, "monotonic", lambda: next(clock))
    assert list(utils.progress("abcdef", 8, "row: PGD", initial=2)) == list("abcdef")
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("row: PGD: 4 of 8, 0:02:30 left\n")
    assert said.err.count("\n") <= 3


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


def test_a_line_goes_to_stdout_and_log_whatever_its_letters(tmp_path, capsys):
    utils.say("für alle", tmp_path / "log")
    utils.note("only the log \udcff", tmp_path / "log")
    assert capsys.readouterr().out == "für alle\n"
    assert (tmp_path / "log").read_text(encoding="utf-8") == "für alle\nonly the log ?\n"


@given(text=st.text())
def test_item_67_names_are_printed_on_one_line_without_control_characters(text):
    shown = utils.printable(text)
    assert shown.isprintable() and len(shown) <= 300
    assert shown == text or not text.isprintable() or len(text) > 300
    assert utils.printable("\x1b[31m\r\udcff é") == "\\x1b[31m\\r\\udcff é"
    assert len(utils.printable(1000 * text)) <= 300
