"""Accuracy under attack: one row a checkpoint, one column an attack, and what is left under all of them.

    python robustness.py
    python robustness.py --attacks fgsm bim mim pgd pgd-margin apgd-dlr square autoattack --sanity

With no option it measures the checkpoints that the training scripts made, or else all in their folders:
without attack and under FGSM, BIM, MIM and PGD at 8/255 with the settings of the released evaluation, then
under PGD on the logit margin, which masked gradients do not stop. It prints the table in Markdown and writes
it, with all that is needed to repeat it, to a JSON file and CSV files beside it. Depth and class count come
from each checkpoint.

    python robustness.py --network my_module:build --checkpoints a.pth b.pth

measures networks of any kind: `build(path)`, or `build()` without checkpoints, returns an nn.Module, images
in [0, 1] to logits or to a tuple with a field `logits`. `evaluation.evaluate` does the same from Python.

Attacks: fgsm bim mim pgd, and apgd-ce, on cross-entropy; pgd-margin pgd-dlr apgd-dlr on losses that do not
saturate; joint-fgsm joint-bim joint-mim joint (by PGD), and nearest-prototype, on what stage 2 trains;
square by scores alone; transfer and transfer-pgd from another network; cw of least distance; noise;
autoattack, the reference implementation. Where a loss that does not saturate, or square, leaves less than
cross-entropy does, the lower number is the one to believe; --sanity looks for more.
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
from cli import Count, JsonFile, Whole
from evaluation import Settings, autoattack, files, networks, report

DEFAULT_CHECKPOINTS = (
    "Models_Softmax/CIFAR10_Softmax.pth.tar",
    "Models_PCL/CIFAR10_PCL.pth.tar",
    "Models_PCL/CIFAR10_PCL_AdvTrain_FGSM.pth.tar",
    "Models_PCL/CIFAR10_PCL_AdvTrain_PGD.pth.tar",
)


@dataclass(frozen=True)
class Config(Settings):
    # data and files
    dataset: Literal[data.DATASETS] = "cifar10"  # folder: DATA_DIR/test/<class>/*
    data_dir: str = "data"  # where the images are, or are downloaded to
    limit: Count | None = None  # so many test images, the first of each class; none: all
    holdout: Whole = 0  # measure on the training images that the training with this --holdout left out
    checkpoints: tuple[str, ...] = ()  # files to measure; none: the scripts' own, or all in their folders
    network: str | None = None  # MODULE:FUNCTION that makes a network of another kind, of a checkpoint's path
    resume: bool = False  # go on with a stopped evaluation of the same checkpoints, data and settings
    overwrite: bool = False  # start anew over a stopped or finished evaluation, or any file of these names
    results: JsonFile = "results/robustness.json"  # all numbers and settings; CSV files lie beside
    model_card: bool = False  # a file for each checkpoint with RobustBench's keys, beside the results
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...

    def follows(self, given):
        """What follows from the data set: on MNIST and Fashion-MNIST the paper's radius and step."""
        epsilon = given.get("epsilon", data.SETS[self.dataset].settings.get("epsilon"))
        grey = bool(data.SETS[self.dataset].settings)
        return {"epsilon": epsilon, "step_size": epsilon / self.num_steps or None} if grey else {}


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
    paths = (config.checkpoints or (None,)) if config.network else checkpoints_of(config)
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


def prepare(config: Config, paths: list[str | None]) -> evaluation.Results:
    """Everything that is measured, with all that could be in the way of it found before any attack."""
    for path in paths:
        if path is not None:
            checkpoints.check_file(path)
    if "autoattack" in config.attacks:
        autoattack.find()
    built = [networks.build(config.network, path) for path in paths if config.network]
    names = [path or config.network for path in paths]
    # With the path as it is written: what a function makes of it need not show in the weights.
    specs = [f"{config.network} {name}" for name in names if config.network]
    hashes = list(map(networks.fingerprint, built, specs))
    files.claim(config, dict(zip(names, hashes or map(utils.sha256, names), strict=True)))
    device = utils.select_device(config.device)
    select = {"limit": config.limit, "holdout": config.holdout, "device": device, "splits": ("test",)}
    with distributed.one_first():  # which may download
        dataset = data.load(config.dataset, config.data_dir, **select)
    if config.network:
        sample, classes = data.to_float(dataset.test.images[:2]), len(dataset.classes)
        label = None if config.checkpoints else config.network
        found = zip((network.to(device) for network in built), hashes, names, strict=True)
        targets = [networks.target_of(*each, sample, classes, label) for each in found]
    else:
        targets = [evaluation.load_target(path, device, dataset.classes, config.predict) for path in paths]
    for target in targets:
        checkpoints.check_holdout(target.origin, target.path, dataset)
    return evaluation.assemble(config, dataset, targets)


if __name__ == "__main__":
    cli.run(main, Config)
