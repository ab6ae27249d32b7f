"""Accuracy under attack: one row a checkpoint, one column an attack.

    python robustness.py

With no option it measures every default checkpoint that exists, with no attack and under FGSM, BIM, MIM and
PGD at 8/255 with the settings of the released evaluation, prints the table in Markdown, and writes it with
all that is needed to repeat it to a JSON file. Depth and class count come from each checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path

import attacks
import data
import evaluation
import utils

DEFAULT_CHECKPOINTS = (
    "Models_Softmax/CIFAR10_Softmax.pth.tar",
    "Models_PCL/CIFAR10_PCL.pth.tar",
    "Models_PCL/CIFAR10_PCL_AdvTrain_FGSM.pth.tar",
    "Models_PCL/CIFAR10_PCL_AdvTrain_PGD.pth.tar",
)


@dataclass(frozen=True)
class Config:
    # data and files
    dataset: str = "cifar10"  # cifar10, folder (DATA_DIR/test/<class>/*) or synthetic
    data_dir: str = "data"  # where the images are, or are downloaded to
    limit: int | None = None  # the first so many test images, class-balanced; none: all
    checkpoints: tuple[str, ...] = ()  # the files to measure; none given: the default ones that exist
    results: str = "results/robustness.json"  # the numbers with all settings and versions
    resume: bool = False  # go on with a stopped evaluation of the same checkpoints, data and settings
    # attacks
    attacks: tuple[str, ...] = ("fgsm", "bim", "mim", "pgd")
    epsilon: float = 8 / 255  # L-infinity radius, in units of the pixel range [0, 1]
    num_steps: int = 10  # of BIM, MIM and PGD
    step_size: float | None = None  # none: as released, epsilon / num_steps for BIM and MIM, 2/255 for PGD
    random_start: bool = False  # PGD from a random point of the ball; the released evaluation does not
    restarts: int = 1  # of PGD with random_start; an image counts by its worst
    decay: float = 1.0  # of MIM's momentum
    # run
    batch_size: int = 500
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    seed: int = 0


def main(config: Config) -> None:
    paths = config.checkpoints or [path for path in DEFAULT_CHECKPOINTS if Path(path).exists()]
    if not paths:
        raise utils.CheckpointError(
            f"no checkpoint to measure: none of {', '.join(DEFAULT_CHECKPOINTS)} exists; "
            "python softmax_training.py makes the first, --checkpoints names others"
        )
    if config.restarts > 1 and not config.random_start:
        raise utils.UsageError(f"--restarts {config.restarts}: would repeat one run; add --random-start")
    utils.prepare_output(config.results)
    device = utils.select_device(config.device)
    for path in paths:
        utils.check_file(path)
    dataset = data.load(
        config.dataset, config.data_dir, limit=config.limit, seed=config.seed, device=device, splits=("test",)
    )
    targets = [evaluation.load_target(path, device, dataset.classes) for path in paths]
    chosen = evaluation.choose_attacks(config)
    progress = evaluation.Progress(config.results, evaluation.fingerprint(config, dataset, targets))
    if config.resume:
        progress.resume()
    evaluation.measure_all(config, targets, dataset.test, chosen, progress)
    utils.write_text(config.results, evaluation.to_json(config, dataset, targets, chosen, progress))
    progress.remove()
    utils.say("\n" + evaluation.to_markdown(targets, chosen, progress) + "\n")
    for line in evaluation.footnotes(config, dataset, targets, chosen, progress):
        utils.say(line)


if __name__ == "__main__":
    utils.run(main, Config, {"attacks": tuple(attacks.ATTACKS)})
