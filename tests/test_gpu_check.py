"""The check of a GPU, where there is one; on a CPU that it says what it sees, and leaves no file."""

import pytest
import torch
from commands import run

from benchmarks import gpu_check

SMALL = ["--device=cpu", "--depth=8", "--batch-size=4", "--steps=3", "--num-steps=1", "--workers=0"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; python -m benchmarks.gpu_check")
@pytest.mark.timeout(900)
def test_all_is_well_on_this_gpu():
    code, said, _ = run(gpu_check)
    assert code == 0 and "FAILED" not in said, said


def test_a_page_that_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    allowed = []
    monkeypatch.setattr(gpu_check, "allow_waiting", lambda device, value: allowed.append(value))
    code, said, _ = run(gpu_check, *SMALL)
    assert code == 0 and not list(tmp_path.iterdir()), said
    for words in (
        "torch: 2",
        "stage 2 + PGD-1, 3 steps",
        "mean loss",
        "from float64",
        "evaluation, PGD-1",
        "channels_last",
    ):
        assert words in said
    assert said.count("off; graphs skipped 0, compiled anew 0") == 2 and "(0.00 %)" in said
    # In each of four epochs, twice trained: allowed, at each of 3 looks allowed and then forbidden, allowed.
    assert allowed == [True, *[True, True, False] * 3, True] * 4


def test_what_fails_is_told_and_the_rest_goes_on(monkeypatch):
    def speeds(subject):
        raise RuntimeError("no kernel\nimage")

    monkeypatch.setattr(gpu_check, "speeds", speeds)
    monkeypatch.setattr(gpu_check, "SAME_LOSS_PERCENT", 0.0)
    monkeypatch.setattr(gpu_check, "MORE_ROUNDING", 1)
    code, said, complaint = run(gpu_check, *SMALL)
    assert code == 1 and "4 parts failed; please paste" in complaint
    assert said.count("FAILED, AssertionError: ") == 3 and "FAILED, RuntimeError: no kernel image" in said
    assert "channels_last" in said


def test_tests_are_run_as_a_part_of_it(tmp_path):
    good, bad = tmp_path / "test_good.py", tmp_path / "test_bad.py"
    good.write_text("def test_good():\n    assert 1 == 1\n")
    bad.write_text("def test_bad():\n    assert 1 == 2\n")
    assert "1 passed" in gpu_check.passes(str(good))
    with pytest.raises(AssertionError, match="test_bad"):
        gpu_check.passes(str(bad))


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, _, complaint = run(gpu_check, "--device", "cuda:9")
    assert code == 2 and "--device cuda:9: not on this machine" in complaint
