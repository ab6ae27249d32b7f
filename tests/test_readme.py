"""The READMEs: commands that the scripts take, links that lead somewhere, tables of what was measured."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "results/README.md")
RESULTS = sorted(path.name for path in (ROOT / "results").glob("depth*.json"))
EVALUATIONS = [name for name in RESULTS if "sanity" not in name]
GREY = sorted(path.name for kind in ("mnist", "fashion") for path in (ROOT / "results").glob(f"{kind}*.json"))


def commands(page):
    """The command lines of a page that call Python, with its variables put in."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    variables = {}
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\w+)", lambda match: variables[match[1]], line)
        if found := re.match(r'(\w+)="(.*?)"', line):
            variables[found[1]] = found[2]
        elif line.startswith("python "):
            yield shlex.split(line, comments=True)[1:]
    for code in re.findall(r"(?<!`)`(python [^`]*)`", text):
        yield shlex.split(re.sub(r"\$(\w+)", lambda match: variables[match[1]], code))[1:]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_the_scripts_take(page):
    found = list(commands(page))
    assert len(found) >= 10
    for words in found:
        name, options = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        if name == "checkpoints.py":
            continue
        module = importlib.import_module(name.removesuffix(".py"))
        if not hasattr(module, "Config"):
            if all((ROOT / option).exists() for option in options):
                module.main([str(ROOT / option) for option in options])
            continue
        cli.parse_config(module.Config, options)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_every_file_named_is_there(page):
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    files = re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|sh|json|txt|cff))`", text)
    assert targets or page != "README.md"
    for target in targets:
        assert target.startswith("https://") or (folder / target).exists(), target
    for file in files:
        assert (ROOT / file).exists() or (folder / file).exists(), file
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }
    for anchor in re.findall(r"\]\(#([^)]*)\)", text):
        assert anchor in headings, anchor


def rows_of(page):
    """The cells of each row of the tables of a page, without the first, without stars and spaces."""
    lines = (ROOT / page).read_text().splitlines()
    return [re.sub(r"[*\s]", "", line).split("|")[2:] for line in lines if line.startswith("|")]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_tables_hold_what_was_measured(name):
    """Every network of an evaluation has a row of its accuracies in results/README.md, Worst included."""
    report = json.loads((ROOT / "results" / name).read_text())
    digits = 2 if report["checkpoints"][0]["attacks"]["clean"]["images"] == 10_000 else 1
    rows = rows_of("results/README.md")
    for entry in report["checkpoints"]:
        cells = [f"{attack['accuracy']:.{digits}f}" for attack in entry["attacks"].values()]
        worst = f"{entry['worst']['accuracy']:.{digits}f}"
        hidden = ("bim", "mim") if name == "depth20_strong.json" else ()
        cells = [c for c, key in zip(cells, entry["attacks"], strict=True) if key not in hidden]
        assert any(row[: len(cells)] == cells and row[len(cells)].startswith(worst) for row in rows), entry[
            "path"
        ]
    assert name in (ROOT / "results/README.md").read_text()


@pytest.mark.parametrize("name", GREY)
def test_the_grey_tables_hold_what_was_measured(name):
    """Each network of one seed has a row with its accuracies; those of several have one, mean ± deviation."""
    report = json.loads((ROOT / "results" / name).read_text())
    rows, groups = rows_of("results/README.md"), report.get("seeds", [])
    first = 0 if "_cw" not in name else 1 if name.startswith("mnist") else 5  # both sets' C&W share a table
    several = {weights for group in groups for weights in group["seeds"].values()}
    for group in groups:
        spread = [(f"{attack['mean']:.1f}", f"{attack['std']:.1f}") for attack in group["attacks"].values()]
        assert [mean if std == "0.0" else f"{mean}±{std}" for mean, std in spread] in (
            row[: len(spread)] for row in rows
        ), group["label"]
    for entry in report["checkpoints"]:
        if entry["sha256"] not in several:
            measured = [*entry["attacks"].values(), entry["worst"]]
            cells = [f"{attack['accuracy']:.1f}" for attack in measured]
            assert cells in (row[first : first + len(cells)] for row in rows), entry["path"]
    assert name in (ROOT / "results/README.md").read_text()


def test_the_first_table_holds_what_was_measured():
    """Every row of README.md that is ours is one network's: the five attacks, Worst, and AutoAttack."""
    measured, strong = {}, set()
    for name in EVALUATIONS:
        for entry in json.loads((ROOT / "results" / name).read_text())["checkpoints"]:
            attacks = {key: attack["accuracy"] for key, attack in entry["attacks"].items()}
            if list(attacks) == ["clean", "fgsm", "bim", "mim", "pgd", "pgd-margin"]:
                shown = (*attacks.values(), entry["worst"]["accuracy"])
                measured[tuple(f"{accuracy:.2f}" for accuracy in shown)] = entry["path"]
            strong |= {(entry["path"], f"{v:.1f}") for key, v in attacks.items() if key == "autoattack"}
    lines = (ROOT / "README.md").read_text().partition("\n\nPercent of")[0].splitlines()
    rows = [re.sub(r"[*\s]", "", line).split("|")[3:-1] for line in lines if re.match(r"\| [A-Z]", line)][1:]
    assert len(rows) > 8
    for *accuracies, autoattack in rows:
        assert (measured[tuple(accuracies)], autoattack) in strong


@pytest.mark.parametrize(("name", "first"), [("MNIST", 1), ("Fashion-MNIST", 6)])
def test_the_table_of_the_grey_sets_holds_what_was_measured(name, first):
    """Without attack, FGSM, PGD, PGD margin and AutoAttack, by the first table of its section."""
    text = (ROOT / "results/README.md").read_text()
    section = text.partition(f"\n### {name} with adversarial images")[2]
    first_table = section.partition("\n\n|")[2].partition("\n\n")[0]
    lines = [line.split(" | ")[1:] for line in re.findall(r"^\| ([NPS].*) \|$", first_table, re.MULTILINE)]
    expected = [[row[i] for i in (0, 1, 4, 5, 6)] for row in lines]
    table = (ROOT / "README.md").read_text().partition("| Epsilon 0.3 ")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[first : first + 5] for row in rows if not row[0].startswith("*")] == expected
    assert len(expected) == 7


def test_the_page_says_which_batch_was_tried():
    """results/batch.json: a run ended with an accuracy, or diverged; its command is one the scripts take."""
    page = (ROOT / "results/README.md").read_text()
    for run in json.loads((ROOT / "results/batch.json").read_text())["runs"]:
        words = shlex.split(run["command"])[1:]
        module = importlib.import_module(words[0].removesuffix(".py"))
        config = cli.parse_config(module.Config, words[1:])
        assert (config.batch_size, config.lr) == (run["batch_size"], run["lr"])
        accuracy, epoch = run["test_accuracy"], run["diverged_in_epoch"]
        if (history := run["history"]) is not None:  # two logs are not kept
            assert len(history) == (epoch - 1 if epoch else config.epochs)
            assert history[-1]["test_accuracy"] == accuracy
        assert (f"{accuracy:.2f}" if epoch is None else f"diverged in epoch {epoch}") in page


def test_the_snippets_run_as_they_stand_one_after_another(capsys):
    """With images that every snippet finds wrong already, so that AutoAttack has nothing to do."""
    codes = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    names = {"images": images, "labels": torch.arange(4), "batches": [(images, torch.arange(4))] * 2}
    torch.manual_seed(0)
    for code in codes:
        exec(code.replace("Models_PCL/", f"{ROOT}/Models_PCL/"), names)
    assert len(codes) == 2
    assert re.search(r"\| *PGD \| *PGD margin \| *AutoAttack \| *Worst \|", capsys.readouterr().out)
    assert set(names["terms"]) == {"cross_entropy", "proximity", "contrastive"}
    assert 512 / 2 < names["terms"]["proximity"] < 4 * 512 and names["loss"].isfinite()
