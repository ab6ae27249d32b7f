"""Which settings of stage 2 do what: each tried in a short run, measured on images held out of the training.

    python -m benchmarks.search --depth 20 --epochs 12 --milestones 7 10 --pcl-epochs 4

Trains stage 1 once, then stage 2 from it with each of the settings, by the scripts themselves, and measures
accuracy under attack by `robustness.py`, all on training images that were held out: no test image is read, so
none can choose. Settings are options as for the script. Prints a Markdown table of every setting tried, with
the cross-entropy of the end, and writes it and a JSON file. Stopped, or at --max-minutes, it goes on where it
was.
"""

import functools
import importlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import robustness
import softmax_training
import suite
import training
import utils
from benchmarks.throughput import hardware, table

SCRIPTS = ("pcl_training", "pcl_training_adversarial_fgsm", "pcl_training_adversarial_pgd")
SETTINGS = (
    "--weight-prox 1 --weight-conprox 1e-4",  # as released
    "--weight-prox 0 --weight-conprox 0",  # the control: as many more epochs of cross-entropy alone
    "--weight-prox 0.1",
    "--weight-prox 0.01",
    "--weight-prox 0.001",
    "--weight-conprox 0",
    "--weight-conprox 1e-3",
    "--weight-conprox 1e-2",
    "--weight-conprox 1e-1",
    "--prototype-init class-means",
    "--layers layer3",
    "--layers fc",
    "--layers layer2 layer3 fc --aux-dim 512",
    "--distance plain --shared-prototypes --separation --weight-conprox 1",  # Eq. 5
    "--distance plain --shared-prototypes --separation --weight-conprox 0.1",
    "--distance plain --shared-prototypes --separation --weight-conprox 0.01",
)
FIXED = (  # the same for all runs
    *("depth", "epochs", "init-from", "save-to", "dataset"),
    *("data-dir", "limit", "holdout", "device", "seed"),
)


@dataclass(frozen=True)
class Config:
    # data and files
    dataset: str = "cifar10"  # cifar10, folder (DATA_DIR/train/<class>/*) or synthetic
    data_dir: str = "data"
    limit: int | None = None  # training images, class-balanced; none: all that are not held out
    holdout: int = 5000  # training images held out
    images: int = 1000  # of them, to attack, class-balanced
    results: str = "results/search.json"  # the numbers, .md beside it, and the runs in a folder of its name
    # what is tried
    script: str = "pcl_training"  # of stage 2
    settings: tuple[str, ...] = SETTINGS  # options of the script, a text each
    # training
    depth: int = 110
    epochs: int = 164  # of stage 1
    milestones: tuple[int, ...] = (81, 122, 140)  # of stage 1
    pcl_epochs: int = 20  # of stage 2
    # attacks
    attacks: tuple[str, ...] = ("fgsm", "bim", "mim", "pgd", "pgd-margin")
    epsilon: float = 8 / 255
    # run
    max_minutes: float | None = None  # stop after so long, saved, to be gone on with
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    seed: int = 0


class Search:
    """The runs of one search, and the time they have."""

    def __init__(self, config: Config) -> None:
        self.config, self.opened = config, time.monotonic()
        self.folder = Path(config.results).with_suffix("")
        names = ("dataset", "data_dir", "limit", "holdout", "device", "seed")
        self.shared = {name: getattr(config, name) for name in names}
        self.measuring = {"limit": config.images, "attacks": config.attacks, "epsilon": config.epsilon}
        self.stage1 = str(self.folder / "softmax.pth.tar")

    def minutes_left(self) -> float | None:
        """None where time is no matter; raises Interrupted when none is left."""
        if self.config.max_minutes is None:
            return None
        left = self.config.max_minutes - (time.monotonic() - self.opened) / 60
        if left <= 0:
            raise utils.Interrupted(None, "time is over; the same command goes on")
        return left

    def train_stage1(self) -> dict:
        """Train stage 1, or what is left of it; return its row."""
        config = self.config
        given = {"depth": config.depth, "epochs": config.epochs, "milestones": config.milestones}
        return self.run(softmax_training, given, "stage 1", self.stage1)

    def train_stage2(self, options: str) -> dict:
        """Train stage 2 with `options`, or what is left of it; return its row."""
        config, module = self.config, importlib.import_module(self.config.script)
        typed = vars(utils.parse_config(module.Config, options.split()))
        given = {**typed, "depth": config.depth, "epochs": config.pcl_epochs, "init_from": self.stage1}
        name = re.sub(r"[^\w.]+", "_", options).strip("_")
        return self.run(module, given, options, str(self.folder / f"{name}.pth.tar"))

    def run(self, module, given: dict, name: str, path: str) -> dict:
        """Train by a script's own `main`, measure, and return the row, which is kept and not made again."""
        given = {**given, **self.shared, "save_to": path, "log_to": None, "resume": True}
        here = ("data_dir", "device")  # of the machine, not of the result
        trained = {name: value for name, value in given.items() if name not in here}
        what = json.loads(json.dumps({"trained": trained, "measured": self.measuring}))
        known = Path(path.replace(".pth.tar", ".row.json"))
        if known.exists() and (kept := json.loads(known.read_text()))["what"] == what:
            return kept["row"]
        utils.say(f"\n{name}")
        torch.compiler.reset()  # or what was compiled for the runs before would count as this one's
        try:
            module.main(module.Config(**{**given, "max_minutes": self.minutes_left()}))
        except training.DivergenceError as error:
            row = {"name": name, "diverged": str(error)}
        else:
            row = {"name": name, **last_losses(path), **self.measure(path)}
        utils.write_text(known, json.dumps({"what": what, "row": row}) + "\n")
        return row

    def measure(self, path: str) -> dict:
        """Accuracy in percent on held-out images, by attack, and the share that is right under all."""
        self.minutes_left()
        results = path.replace(".pth.tar", ".json")
        settings = {
            **self.shared,
            **self.measuring,
            "checkpoints": (path,),
            "results": results,
            "resume": True,
        }
        robustness.main(robustness.Config(**settings))
        (entry,) = json.loads(Path(results).read_text())["checkpoints"]
        accuracies = {name: attack["accuracy"] for name, attack in entry["attacks"].items()}
        return {"sha256": entry["sha256"], **accuracies, "worst": entry["worst"]["accuracy"]}


def last_losses(path: str) -> dict[str, float]:
    """The mean loss terms of a run's last epoch."""
    last = utils.load_checkpoint(path)["history"][-1]
    return {name: last[name] for name in ("cross_entropy", "proximity", "contrastive") if name in last}


def to_markdown(config: Config, rows: list[dict]) -> str:
    keys = ["cross_entropy", suite.CLEAN, *config.attacks, "worst"]
    heads = [
        "setting",
        "cross-entropy",
        "No attack",
        *(suite.TITLES[name] for name in config.attacks),
        "Worst",
    ]
    cells = [
        [row["name"], *("diverged" if "diverged" in row else f"{row[key]:.2f}" for key in keys)]
        for row in rows
    ]
    return table([heads, *cells])


def main(config: Config) -> None:
    results, search = Path(config.results), Search(config)
    utils.prepare_output(results)
    for options in config.settings:  # a slip in the last setting is told before the first is trained
        utils.parse_config(importlib.import_module(config.script).Config, options.split())
        if fixed := [f"--{name}" for name in FIXED if f"--{name}" in re.split(r"[\s=]", options)]:
            raise utils.UsageError(f"--settings {options!r}: {fixed[0]} is the same for all of a search")
    device, load = utils.select_device(config.device), data.load
    data.load = functools.cache(load)  # the images are read once, not for every run
    try:
        rows = [search.train_stage1()]
        for options in config.settings:
            rows.append(search.train_stage2(options))
            report = {"settings": training.config_dict(config), "hardware": hardware(device)}
            report |= {"versions": utils.versions(), "rows": rows}
            utils.write_text(results, json.dumps(report, indent=2) + "\n")
            utils.write_text(results.with_suffix(".md"), to_markdown(config, rows) + "\n")
        utils.say("\n" + to_markdown(config, rows))
    finally:
        data.load = load


if __name__ == "__main__":
    utils.run(main, Config, {"attacks": suite.ATTACKS, "script": SCRIPTS})
