"""Accuracy under attack: one row a checkpoint, one column an attack, and what is left under all of them.

    python robustness.py
    python robustness.py --attacks fgsm bim mim pgd pgd-margin apgd-dlr square autoattack --sanity

With no option it measures the checkpoints that the training scripts made, or else all in their folders:
without attack and under FGSM, BIM, MIM and PGD at 8/255 with the settings of the released evaluation, then
under PGD on the logit margin, which masked gradients do not stop. It prints the table in Markdown and writes
it, with all that is needed to repeat it, to a JSON file and CSV files beside it. Depth and class count come
from each checkpoint.

Attacks: fgsm bim mim pgd, and apgd-ce, on cross-entropy; pgd-margin pgd-dlr apgd-dlr on losses that do not
saturate; joint and prototype on what stage 2 trains; square by scores alone; transfer from another network;
cw of least distance; noise; autoattack, the reference implementation. Where a loss that does not saturate, or
square, leaves less than cross-entropy does, the lower number is the one to believe; --sanity looks for more.
"""

import os
import sys

if __name__ == "__main__":  # before torch is imported, which takes seconds
    sys.path.insert(0, os.path.dirname(os.path.realpath(sys.argv[0])))
    import startup

    startup.begin()

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import checkpoints
import cli
import data
import distributed
import evaluation
import utils
from cli import Count, Epsilon, JsonFile, NotNegative, Positive, Seed, StepSize, Whole
from evaluation import autoattack, checks, files, report, trials

DEFAULT_CHECKPOINTS = (
    "Models_Softmax/CIFAR10_Softmax.pth.tar",
    "Models_PCL/CIFAR10_PCL.pth.tar",
    "Models_PCL/CIFAR10_PCL_AdvTrain_FGSM.pth.tar",
    "Models_PCL/CIFAR10_PCL_AdvTrain_PGD.pth.tar",
)

Attacks = tuple[Literal[tuple(evaluation.ATTACKS)], ...]
CurveAttacks = tuple[Literal[trials.CURVE_ATTACKS], ...]


@dataclass(frozen=True)
class Config:
    # data and files
    dataset: Literal[data.DATASETS] = "cifar10"  # folder: DATA_DIR/test/<class>/*
    data_dir: str = "data"  # where the images are, or are downloaded to
    limit: Count | None = None  # so many test images, the first of each class; none: all
    holdout: Whole = 0  # measure on the training images that the training with this --holdout left out
    checkpoints: tuple[str, ...] = ()  # files to measure; none: the scripts' own, or all in their folders
    source_checkpoint: str | None = None  # the network on which `transfer` makes its images
    results: JsonFile = "results/robustness.json"  # all numbers and settings; CSV files lie beside
    resume: bool = False  # go on with a stopped evaluation of the same checkpoints, data and settings
    overwrite: bool = False  # start anew over a stopped or finished evaluation, or any file of these names
    # attacks
    attacks: Attacks = ("fgsm", "bim", "mim", "pgd", "pgd-margin")  # the first four as published
    epsilon: Epsilon = 8 / 255  # L-infinity radius, of the pixel range [0, 1]; 0.3 on mnist, fashion-mnist
    num_steps: Count = 10  # of BIM, MIM, PGD on any loss, and transfer
    step_size: StepSize | None = None  # none: 2/255 for PGD as released, else, and there, epsilon / num_steps
    random_start: bool = False  # PGD from a random point of the ball; the released evaluation does not
    restarts: Count = 1  # of PGD with random_start, and of APGD; an image counts by its worst
    decay: NotNegative = 1.0  # of MIM's momentum
    apgd_steps: Count = 100  # of APGD, in each restart
    num_queries: Count = 5000  # of Square, for each image
    cw_steps: Count = 1000  # of C&W; paper: 1000
    cw_lr: Positive = 0.01  # of C&W's Adam; paper: 0.01
    predict: Literal["softmax", "prototype"] = "softmax"  # largest logit, or nearest prototype (Eq. 6)
    # more than the table
    sanity: bool = False  # check that it is not the attacks that fail: PASS, WARN or FAIL, a line each
    sanity_images: Count = 200  # for the checks of --sanity, class-balanced
    epsilons: tuple[Epsilon, ...] = ()  # accuracy against these radii, such as 0 1/255 2/255 4/255 8/255
    step_counts: tuple[Count, ...] = ()  # accuracy against these numbers of steps, such as 1 2 5 10 20 50 100
    curve_attacks: CurveAttacks = ("pgd", "pgd-margin")  # the attacks that these curves are drawn for
    save_images: str | None = None  # a folder for the adversarial images, float, and pictures of the first
    model_card: bool = False  # a file for each checkpoint with RobustBench's keys, beside the results
    # run
    batch_size: Count | None = None  # images at a time; none: 500 on a GPU, 100 on a CPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    seed: Seed = 0

    def follows(self, given):
        """What follows from the data set: on MNIST and Fashion-MNIST the paper's radius and step."""
        epsilon = given.get("epsilon", data.SETS[self.dataset].settings.get("epsilon"))
        grey = bool(data.SETS[self.dataset].settings)
        return {"epsilon": epsilon, "step_size": epsilon / self.num_steps or None} if grey else {}

    def check(self):
        """Raise UsageError for options that make no sense together."""
        if self.restarts > 1 and not self.random_start and not set(self.attacks) & {"apgd-ce", "apgd-dlr"}:
            raise utils.UsageError(f"--restarts {self.restarts}: would repeat one run; add --random-start")
        if "joint" in self.attacks and self.predict == "prototype":
            raise utils.UsageError(
                "--attacks joint: is a loss on the logits; --predict softmax, or prototype"
            )
        if "transfer" in self.attacks and self.source_checkpoint is None:
            raise utils.UsageError(
                "--attacks transfer: needs --source-checkpoint, the network to make images on"
            )


def checkpoints_of(config) -> list[str]:
    """The files to measure: those named, else the scripts' own that exist, else all in the scripts' folders.

    Raises CheckpointError when there is none.
    """
    stem = data.SETS[config.dataset].stem
    own = [path.replace("CIFAR10", stem) for path in DEFAULT_CHECKPOINTS]
    others = tuple(f"{kind.stem}_" for kind in data.SETS.values() if kind.stem != stem)
    folders = dict.fromkeys(Path(path).parent for path in own)
    there = [path for folder in folders for path in sorted(folder.glob("*.pth.tar"))]
    there = [str(path) for path in there if not path.name.startswith(others)]
    default = [path for path in own if Path(path).exists()]
    if not (found := list(config.checkpoints) or default or there):
        raise utils.CheckpointError(
            f"no checkpoint: none of {', '.join(own)} exists; "
            "python softmax_training.py makes the first, --checkpoints names others"
        )
    return found


def main(config: Config) -> None:
    config.check()
    distributed.check_same("options", {**cli.config_dict(config), "data_dir": None}, utils.UsageError)
    if distributed.restarted(files.partial(config)):
        config = dataclasses.replace(config, resume=True)
    paths = checkpoints_of(config)
    if "autoattack" in config.attacks:
        autoattack.find()
    with utils.hold(config.results):
        results = prepare(config, paths)
        finished = results.resume()
        distributed.check_same(
            "data or files", {**results.identity(), "done": results.done()}, utils.DataError
        )
        if finished:
            return utils.say(f"{config.results} is finished already; --overwrite starts anew")
        evaluation.measure_all(results)
        if not distributed.rank:
            report.publish(results)
            results.path.unlink(missing_ok=True)


def prepare(config: Config, paths: list[str]) -> evaluation.Results:
    """Everything that is measured, with all that could be in the way of it found before any attack."""
    for path in paths:
        checkpoints.check_file(path)
    files.claim(config, paths)
    device = utils.select_device(config.device)
    size = config.batch_size or (500 if device.type == "cuda" else 100)
    config = dataclasses.replace(config, batch_size=size)
    select = {"limit": config.limit, "holdout": config.holdout, "device": device, "splits": ("test",)}
    with distributed.one_first():  # which may download
        dataset = data.load(config.dataset, config.data_dir, **select)
    targets = [evaluation.load_target(path, device, dataset.classes, config.predict) for path in paths]
    for target in targets:
        checkpoints.check_holdout(target.origin, target.path, dataset)
    path, classes = config.source_checkpoint, len(dataset.classes)
    source = None if path is None else evaluation.load_target(path, device, dataset.classes)
    for target in (*targets, *([source] if source else [])):
        checkpoints.check_images(target.arguments, target.path, dataset)
    return evaluation.Results(
        config,
        dataset,
        targets,
        trials.table(config, classes, source),
        trials.curves(config, classes),
        checks.trials(config, classes, source) if config.sanity else {},
        source,
    )


if __name__ == "__main__":
    cli.run(main, Config)
