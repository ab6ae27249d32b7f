"""Accuracy under attack: one row a checkpoint, one column an attack, and what is left under all of them.

    python robustness.py

With no option it measures every default checkpoint that exists with no attack and under FGSM, BIM, MIM and
PGD at 8/255 with the settings of the released evaluation, then under PGD on the logit margin, which masked
gradients do not stop. It prints the table in Markdown and writes it, with all that is needed to repeat it, to
a JSON file and CSV files beside it. Depth and class count come from each checkpoint.
"""

from dataclasses import dataclass
from pathlib import Path

import data
import evaluation
import reports
import suite
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
    source_checkpoint: str | None = None  # the network on which `transfer` makes its images
    results: str = "results/robustness.json"  # the numbers with all settings and versions; CSV files beside
    resume: bool = False  # go on with a stopped evaluation of the same checkpoints, data and settings
    # attacks
    attacks: tuple[str, ...] = ("fgsm", "bim", "mim", "pgd", "pgd-margin")  # the first four as published
    epsilon: float = 8 / 255  # L-infinity radius, in units of the pixel range [0, 1]
    num_steps: int = 10  # of BIM, MIM, PGD on any loss, and transfer
    step_size: float | None = None  # none: as released, epsilon / num_steps for BIM and MIM, 2/255 for PGD
    random_start: bool = False  # PGD from a random point of the ball; the released evaluation does not
    restarts: int = 1  # of PGD with random_start, and of APGD; an image counts by its worst
    decay: float = 1.0  # of MIM's momentum
    apgd_steps: int = 100  # of APGD, in each restart
    num_queries: int = 5000  # of Square, for each image
    cw_steps: int = 1000  # of C&W; paper: 1000
    cw_lr: float = 0.01  # of C&W's Adam; paper: 0.01
    predict: str = "softmax"  # the largest logit, or prototype: the nearest one (Eq. 6)
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
    suite.check(config)
    utils.prepare_output(config.results)
    device = utils.select_device(config.device)
    for path in paths:
        utils.check_file(path)
    dataset = data.load(
        config.dataset, config.data_dir, limit=config.limit, seed=config.seed, device=device, splits=("test",)
    )
    targets = [evaluation.load_target(path, device, dataset.classes, config.predict) for path in paths]
    source = None
    if config.source_checkpoint is not None:
        source = evaluation.load_target(config.source_checkpoint, device, dataset.classes)
    trials = suite.table(config, len(dataset.classes), source)
    identity = evaluation.fingerprint(config, dataset, targets, source)
    progress = evaluation.Progress(config.results, identity)
    if config.resume:
        progress.resume()
    evaluation.measure_all(config, targets, dataset.test, trials, progress)
    reports.write(config, dataset, targets, trials, progress)
    progress.remove()
    utils.say("\n" + reports.to_markdown(targets, trials, progress) + "\n")
    for line in reports.footnotes(config, dataset, targets, trials, progress):
        utils.say(line)


if __name__ == "__main__":
    utils.run(main, Config, {"attacks": suite.ATTACKS, "predict": ("softmax", "prototype")})
