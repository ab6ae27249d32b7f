"""An ablation: one recipe under a grid of settings, measured on training images that were held out.

    python -m benchmarks.ablation --grid layers --dataset mnist --stage1 "--epochs 10" --stage2 "--epochs 10"

For each seed stage 1 is trained once. From it the recipe is trained under each setting and then attacked. A
table has a row for each setting, with mean and spread over the seeds. It is printed, and written as Markdown
and JSON to FOLDER, where each run has its own files. If it is stopped, the same command goes on. No test
image is read.
"""

import importlib
import json
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import checkpoints
import cli
import data
import evaluation
import robustness
import softmax_training
import utils
from cli import Count, Seed
from evaluation.settings import Attacks

LAYERS = {"fc": "fc", "layer3": "layer3", "layer3 + fc": "layer3 fc", "all three": "layer2 layer3 fc"}
WEIGHTS = (1.0, 0.1, 0.01, 0.001)  # of the whole loss: both terms are multiplied
AUX_DIM = 512  # of the ResNet's branch on layer2, as in the paper; CNN-6 needs none


@dataclass(frozen=True)
class Config:
    # what is compared
    grid: Literal["layers", "weight"] = "layers"  # layers: where the loss sits; weight: of the whole loss
    recipe: Literal["pcl_training", "pcl_training_adversarial_fgsm", "pcl_training_adversarial_pgd"] = (
        "pcl_training"
    )
    seeds: tuple[Seed, ...] = (0, 1)
    stage1: str | None = None  # options of softmax_training.py, in one argument: "--epochs 10 --depth 20"
    stage2: str | None = None  # options of the recipe, likewise
    attacks: Attacks = ("fgsm", "pgd", "pgd-margin")  # as robustness.py makes them
    # data and files
    dataset: Literal[data.DATASETS] = "cifar10"
    data_dir: str = "data"
    limit: Count | None = None  # so many images of each split; none: all
    holdout: Count = 5000  # training images that are measured and not trained on
    folder: str = "ablation"  # of everything that is written
    # run
    device: str = "auto"

    def check(self) -> None:
        """Raise UsageError for options that make no sense together."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise utils.UsageError("--seeds: one or more, each once")


def settings(config: Config) -> dict[str, list[str]]:
    """Return the rows of the grid: from a name to the recipe's options."""
    base = recipe_config(config)
    if config.grid == "weight":
        names = ("weight_prox", "weight_conprox")
        return {
            f"weight {w:g}": [f"--{n.replace('_', '-')}={w * getattr(base, n)!r}" for n in names]
            for w in WEIGHTS
        }
    rows = {"none": ["--weight-prox", "0", "--weight-conprox", "0"]}
    branch = ["--aux-dim", str(AUX_DIM)] if base.model == "resnet" else []
    for name, layers in LAYERS.items():
        rows[name] = ["--layers", *layers.split(), *(branch if "layer2" in layers else [])]
    return rows


def recipe_config(config: Config):
    """Return the recipe's settings before the grid changes any."""
    script = importlib.import_module(config.recipe)
    return cli.parse_config(script.Config, [*shared(config), *shlex.split(config.stage2 or "")])


def shared(config: Config) -> list[str]:
    """Return the options that training and evaluation have in common."""
    options = {"dataset": config.dataset, "data-dir": config.data_dir, "limit": config.limit}
    options |= {"holdout": config.holdout, "device": config.device}
    return [f"--{name}={value}" for name, value in options.items()]


def run(script, *options) -> None:
    """Run a script in this process; it resumes what was stopped, and does nothing if it is finished."""
    script.main(cli.parse_config(script.Config, [*map(str, options), "--resume"]))


def measure(config: Config, name: str, options: list[str], seed: int) -> dict[str, float]:
    """Train the recipe with `options` and a seed; return the accuracy in percent, clean and per attack."""
    folder, stem = Path(config.folder), f"{config.grid}-{name.replace(' ', '')}-seed{seed}"
    first, second, results = (
        folder / file for file in (f"softmax-seed{seed}.pth.tar", f"{stem}.pth.tar", f"{stem}.json")
    )
    common = [*shared(config), f"--seed={seed}"]
    run(softmax_training, *common, *shlex.split(config.stage1 or ""), f"--save-to={first}")
    script, stage2 = importlib.import_module(config.recipe), shlex.split(config.stage2 or "")
    log = folder / f"{stem}.training.log"  # the metrics beside it: RESULTS.csv is the evaluation's
    run(script, *common, *stage2, *options, f"--init-from={first}", f"--save-to={second}", f"--log-to={log}")
    if checkpoints.load(second)["started_from"]["sha256"] != utils.sha256(first):
        raise utils.CheckpointError(f"{second}: began from another stage 1; name another --folder")
    run(robustness, *common, "--attacks", *config.attacks, "--checkpoints", second, f"--results={results}")
    (entry,) = json.loads(results.read_text(encoding="utf-8"))["checkpoints"]
    return {attack: numbers["accuracy"] for attack, numbers in entry["attacks"].items()}


def table(config: Config, rows: dict[str, list[dict[str, float]]]) -> str:
    """Return the rows in Markdown: the mean over the seeds and, of several, half their range."""
    names = dict.fromkeys(name for found in rows.values() for name in found[0])
    titles = [evaluation.ATTACKS[n].title if n in evaluation.ATTACKS else "No attack" for n in names]
    lines = [["Setting", *titles]]
    for row, found in rows.items():
        values = [[one[name] for one in found] for name in names]
        lines.append([row, *(cell(numbers) for numbers in values)])
    return utils.markdown_table(lines)


def cell(values: list[float]) -> str:
    spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main(config: Config) -> None:
    path, rows = Path(config.folder, f"{config.grid}.json"), {}
    for name, options in settings(config).items():
        rows[name] = [measure(config, name, options, seed) for seed in config.seeds]
        text = table(config, rows)
        report = {"settings": cli.config_dict(config), "rows": rows, "versions": utils.versions()}
        utils.write_text(path, json.dumps(report, indent=2) + "\n")
        utils.write_text(path.with_suffix(".md"), text + "\n")
    utils.say(f"\n{text}\n")
    seeds = ", ".join(map(str, config.seeds))
    utils.say(
        f"{config.recipe} on {config.dataset}, % of {config.holdout:,} held-out training images; "
        f"mean over the seeds {seeds} ± half the range; {path}"
    )


if __name__ == "__main__":
    cli.run(main, Config)
