"""The ledger of claims: its numbers are those of the results files, its table that of results/README.md."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cli
import robustness
import utils
from evaluation import claims, compare, report

ROOT = Path(__file__).resolve().parent.parent
LEDGER = json.loads(claims.LEDGER.read_text(encoding="utf-8"))
CLAIMS = LEDGER["claims"]
PAGE = (ROOT / "results" / "README.md").read_text(encoding="utf-8")


def named(claim):
    return f"{claim['source']}, {claim['network']}, {claim['measure']} {claim['published']}"


def each(chosen):
    return pytest.mark.parametrize("claim", [claim for claim in CLAIMS if chosen(claim)], ids=named)


def entry_of(found):
    """The results of a network, by the file and the path that a claim names."""
    report = json.loads((ROOT / found["file"]).read_text())
    (entry,) = [entry for entry in report["checkpoints"] if entry["path"] == found["network"]]
    return report, entry["attacks"][found["attack"]]


@each(lambda claim: True)
def test_every_claim_is_complete(claim):
    for name in ("source", "network", "measure", "published", "why"):
        assert claim[name] and claim[name] == claim[name].strip()
    assert re.match(r"\d", claim["published"]) and claim["verdict"] in LEDGER["verdicts"]
    assert bool(claim["command"]) == bool(claim["ours"])
    assert len({named(claim) for claim in CLAIMS}) == len(CLAIMS)


@each(lambda claim: claim["ours"])
def test_our_numbers_are_those_of_the_results_files(claim):
    for found in filter(None, (claim["ours"], claim.get("stronger"))):
        _, attack = entry_of(found)
        for name in ("title", "accuracy", "low", "high", "images"):
            assert found[name] == attack[name]
        assert found["low"] <= found["accuracy"] <= found["high"]


@each(lambda claim: claim["ours"])
def test_our_command_is_the_one_that_gave_them(claim):
    script, *options = shlex.split(claim["command"])[1:]
    assert script == "robustness.py"
    config = cli.config_dict(cli.parse_config(robustness.Config, options))
    made, _ = entry_of(claim["ours"])
    assert config["results"] == claim["ours"]["file"] and claim["ours"]["network"] in config["checkpoints"]
    for name in ("attacks", "limit", "epsilon", "num_steps", "step_size", "random_start", "predict", "seed"):
        assert config[name] == made["settings"][name], name


def agrees(claim):
    found, number = claim["ours"], float(claim["published"])
    return found["low"] <= number <= found["high"] or abs(found["accuracy"] - number) <= 0.1


@each(lambda claim: claim["verdict"] == "reproduced")
def test_what_is_called_reproduced_is_ours_too(claim):
    assert claim["ours"]["title"] == claim["measure"] and agrees(claim)


@each(lambda claim: claim["verdict"] == "not run" and claim["ours"])
def test_what_is_called_not_run_says_what_ours_is(claim):
    assert "ours" in claim["why"]
    assert claim["ours"]["title"] != claim["measure"] or claim["network"] != "PCL" or not agrees(claim)


@each(lambda claim: claim["verdict"].startswith("refuted"))
def test_what_is_called_refuted_names_the_stronger_attack(claim):
    if claim["ours"]:
        stronger = claim["stronger"]
        assert stronger["high"] < float(claim["published"]) / 10
        assert stronger["attack"] != claim["ours"]["attack"]
    assert claim["ours"] or "0.28" in claim["why"]


def test_the_table_is_made_from_the_ledger(capsys):
    claims.main()
    printed = capsys.readouterr().out.strip()
    assert f"\n\n{printed}\n\n" in PAGE
    for claim in CLAIMS:
        (row,) = [
            line
            for line in printed.splitlines()
            if line.startswith(f"| {claim['source']} | {claim['network']} | ")
            and re.search(rf"(\| |· ){re.escape(claim['measure'])} {re.escape(claim['published'])} ", line)
        ]
        assert f"**{claim['verdict']}**" in row
        for found in filter(None, (claim["ours"], claim.get("stronger"))):
            assert f"{found['title']} {found['accuracy']:.2f} ({found['low']:.2f} to" in row


def test_the_command_takes_help():
    command = [sys.executable, "-m", "evaluation.claims", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and "| Source |" not in ended.stdout
    assert "python -m evaluation.claims" in ended.stdout


@pytest.mark.parametrize("option", ["--jsn", "mine.json"])
def test_the_command_takes_nothing_else(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["claims.py", option])
    with pytest.raises(SystemExit) as end:
        cli.leave_with_status(claims.main)
    said = capsys.readouterr()
    assert end.value.code == 2 and "| Source |" not in said.out
    assert said.err.count("\n") == 1 and option in said.err


def test_every_number_that_the_authors_published_and_we_print_is_a_claim():
    known = {claim["published"] for claim in CLAIMS}
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| *authors")]
    numbers = re.findall(r"\d+\.\d+", "".join(rows) + report.PUBLISHED)
    assert len(rows) == 3 and len(numbers) > 20
    assert set(numbers) <= known


@pytest.mark.parametrize(
    ("first", "one", "second", "other"),
    [
        ("depth20_controls", "control_depth20", "depth20", "PCL_depth20"),
        ("depth20_control_long", "control_depth20_long", "depth20_long", "PCL_depth20_long"),
        ("depth20_full50", "control_depth20_full50", "depth20_full50", "PCL_depth20_full50"),
        ("depth110_control", "control_depth110", "depth110", "PCL_depth110"),
        ("depth20_controls", "PCL_AdvTrain_PGD_lr0.1_depth20", "depth20_controls",
         "AdvTrain_PGD_lr0.1_depth20"),
    ],
)  # fmt: skip
def test_with_and_without_pcl_differ_by_what_the_page_says(first, one, second, other):
    rows = []
    for file, name in ((first, one), (second, other)):
        _, found = compare.read(ROOT / "results" / f"{file}.json")
        rows.append([next(row for row in found if f"(CIFAR10_{name})" in row.label)])
    _, lines = compare.compared(*rows)
    assert utils.markdown_table(lines) in PAGE
