"""Comparing networks: the numbers against scipy, the command line on files as robustness.py writes them."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import cli
from evaluation import compare

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT / "results" / "depth20.json"


def bits(mask):
    return "".join(map(str, np.asarray(mask).astype(int)))


def outcomes(lost, won, agree):
    """Two outcomes: `lost` images that the first alone has right, `won` the second, the rest alike."""
    right = agree // 2
    alike = "1" * right + "0" * (agree - right)
    return "1" * lost + "0" * won + alike, "0" * lost + "1" * won + alike


counts = st.integers(0, 60)


@settings(max_examples=60, deadline=None)
@given(lost=counts, won=counts, agree=st.integers(1, 400))
def test_numbers_are_those_of_scipy(lost, won, agree):
    first, second = outcomes(lost, won, agree)
    found = compare.paired(first, second)
    steps = np.array(list(second), int) - np.array(list(first), int)
    assert found.difference == pytest.approx(100 * steps.mean())
    exact = stats.binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert found.p == pytest.approx(exact)
    padded = np.append(steps, [1, -1])  # Bonett & Price: one image more on either side
    wald = stats.norm.interval(0.95, padded.mean(), padded.std() / math.sqrt(len(padded)))
    assert (found.low, found.high) == pytest.approx([100 * min(max(end, -1), 1) for end in wald], abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(lost=counts, won=counts, agree=st.integers(1, 400))
def test_the_other_way_round_only_the_sign_changes(lost, won, agree):
    one, other = outcomes(lost, won, agree)
    there, back = compare.paired(one, other), compare.paired(other, one)
    assert (there.difference, there.low, there.high) == pytest.approx(
        (-back.difference, -back.high, -back.low)
    )
    assert (there.p, there.smallest) == pytest.approx((back.p, back.smallest))
    assert there.low <= there.difference <= there.high


def test_ten_thousand_images_are_no_more_than_floats_can_hold():
    assert compare.mcnemar(0, 10_000) == 0.0
    assert compare.mcnemar(4_900, 5_100) == pytest.approx(stats.binomtest(4_900, 10_000, 0.5).pvalue)


def draws(images, lost, won, times):
    """So many pairs of numbers (lost, won) when each image is either with these probabilities."""
    return np.random.default_rng(0).multinomial(images, [lost, won, 1 - lost - won], size=times)[:, :2]


@pytest.mark.parametrize("images", [100, 1000])
@pytest.mark.parametrize(("lost", "won"), [(0.001, 0.001), (0.02, 0.05), (0.0, 0.03), (0.2, 0.1), (0.3, 0.6)])
def test_the_interval_holds_the_true_difference_in_95_of_100_cases(images, lost, won):
    hits = 0
    for a, b in draws(images, lost, won, 400):
        found = compare.paired(*outcomes(a, b, images - a - b))
        hits += found.low <= 100 * (won - lost) <= found.high
    assert hits >= 370  # 0.925: of 400 draws that 95 % hold, fewer come once in a hundred times


@pytest.mark.parametrize(("images", "differing"), [(1000, 100), (10_000, 300), (10_000, 3000)])
def test_the_smallest_difference_is_found_in_80_of_100_cases(images, differing):
    smallest = compare.paired(*outcomes(differing // 2, differing // 2, images - differing)).smallest / 100
    share = differing / images
    cases = draws(images, (share - smallest) / 2, (share + smallest) / 2, 300)
    found = sum(compare.mcnemar(int(a), int(b)) < 0.05 for a, b in cases)
    assert 0.7 <= found / 300 <= 0.87
    smaller = draws(images, (share - smallest / 3) / 2, (share + smallest / 3) / 2, 300)
    assert sum(compare.mcnemar(int(a), int(b)) < 0.05 for a, b in smaller) / 300 < 0.35


def test_where_nothing_differs_six_images_would_have_to():
    found = compare.paired("1" * 50, "1" * 50)
    assert (found.difference, found.p, found.smallest) == (0, 1, pytest.approx(12))
    assert found.low < 0 < found.high
    assert compare.mcnemar(0, 6) < 0.05 <= compare.mcnemar(0, 5)


# ---------------------------------------------------------------- the command line


def run(capsys, monkeypatch, *paths):
    """Exit status, stdout and stderr of `python -m evaluation.compare PATHS`."""
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, paths)])
    with pytest.raises(SystemExit) as ended:
        cli.leave_with_status(compare.main)
    out, err = capsys.readouterr()
    assert err.count("\n") <= 1 and "Traceback" not in err
    return ended.value.code, out, err


@pytest.fixture
def call(capsys, monkeypatch):
    return lambda *paths: run(capsys, monkeypatch, *paths)


def written(path, change):
    """A results file like the committed one, but for what `change` does to it."""
    report = json.loads(REAL.read_text())
    change(report)
    path.write_text(json.dumps(report))
    return path


def only(*labels):
    def change(report):
        report["checkpoints"] = [entry for entry in report["checkpoints"] if entry["label"] in labels]

    return change


def cells(text, attack):
    """The cells of the first line of an attack."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {attack} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_each_pair_of_rows_is_compared(call):
    code, out, _ = call(REAL)
    assert code == 0
    headings = [line for line in out.splitlines() if " less " in line]
    rows = json.loads(REAL.read_text())["checkpoints"]
    assert len(headings) == math.comb(len(rows), 2) and len(set(headings)) == len(headings)
    assert headings[0].startswith("PCL (CIFAR10_PCL_depth20) less Softmax") and "10,000 images" in headings[0]
    accuracy = {row["label"]: row["attacks"]["fgsm"]["accuracy"] for row in rows}
    first, second, difference, *_ = map(float, cells(out, "FGSM")[:3])
    assert (first, second) == pytest.approx((accuracy["Softmax"], accuracy["PCL"]))
    assert difference == pytest.approx(second - first, abs=0.006)
    assert cells(out, "Worst")[:2] == ["0.00", "0.06"]


def test_rows_of_two_files_are_compared_in_their_order(call, tmp_path):
    softmax = written(tmp_path / "softmax.json", only("Softmax"))
    others = written(tmp_path / "others.json", only("Softmax", "PCL", "PCL + FGSM images"))
    _, out, _ = call(softmax, others)
    assert [line.split(" (")[0] for line in out.splitlines() if " less " in line] == [
        "PCL",
        "PCL + FGSM images",
    ]
    code, out, err = call(softmax, softmax)
    assert (code, out) == (3, "") and "no two networks" in err


def seeds_of(label, *seeds, wrong=300):
    """A change that leaves one row, once for each seed, each time with more images wrong under FGSM."""

    def change(report):
        only(label)(report)
        (entry,) = report["checkpoints"]
        report["checkpoints"] = []
        for number, seed in enumerate(seeds):
            row = copy.deepcopy(entry)
            row["sha256"], row["path"] = f"{label}{number}", f"Models/{label}{number}.pth.tar"
            row["origin"]["config"] |= {"seed": seed, "save_to": f"x{seed}"}
            right = row["attacks"]["fgsm"]["robust"]
            row["attacks"]["fgsm"]["robust"] = "0" * wrong * number + right[wrong * number :]
            report["checkpoints"].append(row)

    return change


def test_rows_that_differ_in_the_seed_alone_become_mean_and_deviation(call, tmp_path):
    three, one = tmp_path / "three.json", tmp_path / "one.json"
    _, out, _ = call(written(three, seeds_of("PCL", 0, 1, 2)))
    assert "3 rows that differ in the seed alone" in out and " less " not in out
    *values, mean, deviation = map(float, cells(out, "FGSM"))
    assert len(set(values)) == 3
    assert mean == pytest.approx(np.mean(values), abs=0.01)
    assert deviation == pytest.approx(np.std(values, ddof=1), abs=0.01)
    _, out, _ = call(three, written(one, seeds_of("Softmax", 0, 1)))
    last = out[out.index(" less ") :]
    *means, difference, error = map(float, cells(last, "FGSM"))
    assert difference == pytest.approx(means[1] - means[0], abs=0.011) and error > 0
    _, out, _ = call(three, written(one, only("Softmax")))
    assert cells(out[out.index(" less ") :], "FGSM")[-1] == "unknown: one seed"


def test_what_differs_in_more_than_the_seed_is_compared(call, tmp_path):
    def other_rate(report):
        seeds_of("PCL", 0, 1)(report)
        report["checkpoints"][1]["origin"]["config"]["lr"] = 0.5

    for change in (other_rate, seeds_of("PCL", 0, 0)):  # the same seed twice: something else differs
        _, out, _ = call(written(tmp_path / "rows.json", change))
        assert out.count(" less ") == 1 and "seed alone" not in out


def test_an_attack_of_other_settings_is_left_out(call, tmp_path):
    def more_steps(report):
        only("PCL")(report)
        report["checkpoints"][0]["attacks"]["pgd"]["settings"] = "PGD: 50 steps"

    code, out, _ = call(
        written(tmp_path / "a.json", only("Softmax")), written(tmp_path / "b.json", more_steps)
    )
    assert code == 0 and "settings differ: PGD, Worst" in out
    assert not any(line.startswith(("| PGD  ", "| Worst")) for line in out.splitlines())
    assert "| PGD margin" in out


def test_rows_on_other_images_are_refused(call):
    code, out, err = call(REAL, ROOT / "results" / "depth20_adaptive.json")
    assert (code, out) == (3, "") and "--limit" in err
    assert "measured on other images (10,000 of folder, checksum 37333741; 500 of folder, checksum " in err


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"checkpoints": 3}', "\xff" * 9, "[" * 100_000])
def test_any_other_file_is_refused(call, tmp_path, content):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    code, out, err = call(path)
    assert (code, out) == (3, "") and "other.json" in err and "robustness.py wrote" in err


def test_as_a_process_it_says_what_is_wrong_with_the_command():
    words = [sys.executable, "-m", "evaluation.compare", "a", "b", "c"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "unrecognized" in ended.stderr
