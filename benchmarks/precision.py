"""Whether bfloat16 training ends where float32 training ends: several seeds of each, through both stages.

    python -m benchmarks.precision --dataset folder --data-dir data/cifar10

Trains stage 1 and stage 2 with each seed in each precision, by the two scripts themselves and on few images
and epochs, and measures in float32, on the test images, the accuracy without attack and under PGD. The radius
is small, so that PGD leaves something to compare. Prints a Markdown table and writes it, with every number,
to a JSON file and beside it. Stopped, it goes on where it was.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import data
import evaluation
import pcl_training
import robustness
import softmax_training
import suite
import training
import utils
from benchmarks.throughput import hardware, table

PRECISIONS = ("float32", "bfloat16")
STAGES = {"stage1": "softmax_training", "stage2": "pcl_training"}


@dataclass(frozen=True)
class Config:
    # data and files
    dataset: str = "cifar10"  # cifar10, folder (DATA_DIR/{train,test}/<class>/*) or synthetic
    data_dir: str = "data"
    limit: int | None = 10_000  # training images, class-balanced; none: all
    test_images: int | None = None  # none: all
    results: str = "results/precision.json"  # the numbers, .md beside it, and the checkpoints in its folder
    # training
    seeds: tuple[int, ...] = (0, 1, 2)
    depth: int = 20
    epochs: int = 12  # of stage 1
    milestones: tuple[int, ...] = (7, 10)  # of stage 1
    pcl_epochs: int = 6  # of stage 2
    # attack
    epsilon: float = 1 / 255
    step_size: float = 0.25 / 255
    num_steps: int = 10
    # run
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...


def train(config: Config, precision: str, seed: int) -> dict[str, Path]:
    """Run both stages, or what is left of them; return the checkpoint of each."""
    folder = Path(config.results).parent / f"precision_{precision}_{seed}"
    paths = {stage: folder / f"{stage}.pth.tar" for stage in STAGES}
    shared = {name: getattr(config, name) for name in ("dataset", "data_dir", "limit", "depth", "device")}
    shared |= {"precision": precision, "seed": seed, "eval_every": 100, "resume": True}
    softmax_training.main(
        softmax_training.Config(
            **shared, epochs=config.epochs, milestones=config.milestones, save_to=str(paths["stage1"])
        )
    )
    pcl_training.main(
        pcl_training.Config(
            **shared, epochs=config.pcl_epochs, init_from=str(paths["stage1"]), save_to=str(paths["stage2"])
        )
    )
    return paths


def measure(config: Config, path: Path, test: data.Split, classes: tuple[str, ...]) -> dict[str, float]:
    """Accuracy of a checkpoint in percent, without attack and under PGD."""
    target = evaluation.load_target(path, test.images.device, classes)
    settings = robustness.Config(
        epsilon=config.epsilon, step_size=config.step_size, num_steps=config.num_steps
    )
    measured = {}
    for name, trial in (("clean", suite.clean()), ("pgd", suite.make("pgd", settings))):
        outcome = evaluation.Outcome()
        for _ in evaluation.measure(target, test, trial, outcome, batch_size=100, seed=0):
            pass
        measured[name] = outcome.accuracy
    return measured


def summarise(runs: list[dict]) -> list[dict]:
    """Of each stage and column: the values of each precision, their means and whether the ranges meet."""
    rows = []
    for stage in STAGES:
        for column in ("clean", "pgd"):
            values = {
                precision: [r[stage][column] for r in runs if r["precision"] == precision]
                for precision in PRECISIONS
            }
            means = {precision: statistics.mean(values[precision]) for precision in PRECISIONS}
            meet = max(map(min, values.values())) <= min(map(max, values.values()))
            rows.append({"stage": stage, "column": column, "values": values, "means": means, "meet": meet})
    return rows


def to_markdown(rows: list[dict]) -> str:
    heads = ["accuracy", *(f"{precision}, each seed" for precision in PRECISIONS), "means", "ranges"]
    lines = [heads]
    for row in rows:
        each = [" ".join(f"{value:.2f}" for value in row["values"][precision]) for precision in PRECISIONS]
        means = " ".join(f"{row['means'][precision]:.2f}" for precision in PRECISIONS)
        column = {"clean": "no attack", "pgd": "PGD"}[row["column"]]
        lines.append([f"{row['stage']}, {column}", *each, means, "overlap" if row["meet"] else "apart"])
    return table(lines)


def main(config: Config) -> None:
    results = Path(config.results)
    utils.prepare_output(results)
    device = utils.select_device(config.device)
    loaded = data.load(
        config.dataset, config.data_dir, limit=config.test_images, device=device, splits=("test",)
    )
    runs = []
    for seed in config.seeds:
        for precision in PRECISIONS:
            paths = train(config, precision, seed)
            measured = {
                stage: measure(config, path, loaded.test, loaded.classes) for stage, path in paths.items()
            }
            runs.append({"precision": precision, "seed": seed, **measured})
            utils.say(f"{precision}, seed {seed}: {measured}")
    rows = summarise(runs)
    report = {"settings": training.config_dict(config), "hardware": hardware(device)}
    report |= {"versions": utils.versions(), "runs": runs, "summary": rows}
    utils.write_text(results, json.dumps(report, indent=2) + "\n")
    utils.write_text(results.with_suffix(".md"), to_markdown(rows) + "\n")
    utils.say("\n" + to_markdown(rows))


if __name__ == "__main__":
    utils.run(main, Config)
