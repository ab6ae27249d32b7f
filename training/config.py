"""The options that every training script has besides its recipe."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import checkpoints
import data
import distributed
import models
from cli import Count, Positive, Seed, Whole
from utils import UsageError

FILES = {"save_to", "init_from"}  # settings that are named after the data set


@dataclass(frozen=True)
class RunConfig:
    """What the Config of each training script inherits.

    Settings that are not given follow from the data set (names of files, the network), from the network, and
    from the preset. `paper`: a script's differences under `--preset paper`; under "grey" those on grey sets.
    """

    paper: ClassVar[dict] = {}
    # recipe
    preset: Literal["released", "paper"] = "released"  # paper: its settings where none is given
    model: Literal[tuple(models.NETWORKS)] = "resnet"  # cnn6: the paper's, on mnist and fashion-mnist
    # data and files
    dataset: Literal[data.DATASETS] = "cifar10"  # folder: DATA_DIR/{train,test}/<class>/*
    data_dir: str = "data"  # where the images are, or are downloaded to
    limit: Count | None = None  # so many images of each split, the first of each class; none: all
    holdout: Whole = 0  # training images held out, and measured in place of the test images
    save_to: str = ""  # the checkpoint
    log_to: str | None = None  # the log; none: beside save_to. The metrics lie beside it as .csv
    tensorboard: str | None = None  # a folder for events of TensorBoard; none: no events
    resume: bool = False  # go on with the run at save_to, if there is one
    overwrite: bool = False  # start anew over the run at save_to
    # run
    eval_every: Count = 5  # epochs between measurements of the test accuracy, which chooses nothing
    save_every_minutes: Positive | None = 10.0  # saves within an epoch too; none: only after each
    max_minutes: Positive | None = None  # stop after so long, saved, to be resumed
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where the hardware has it
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on a GPU; several ranks do not compile
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    seed: Seed = 0
    seeds: tuple[Seed, ...] = ()  # train with each, in files named by it; {seed} in --init-from is it
    seeds_per_rank: bool = False  # under torchrun each rank trains with seeds of its own
    sync_batchnorm: bool = True  # of several ranks: batch norm over all their images; slower

    def follows(self, given):
        """Return the defaults that follow from the values `given` on the command line. Raises UsageError."""
        if given.get("seeds") == ():
            raise UsageError("--seeds: names none; such as --seeds 0 1 2, or leave it out")
        kind = data.SETS[self.dataset]
        model = given.get("model", kind.settings.get("model", self.model))
        for name in sorted(models.lacks(model) & given.keys()):
            raise UsageError(f"--{name.replace('_', '-')}: {model} has none; leave it out")
        found = {**kind.settings, **models.NETWORKS[model].SETTINGS, **self.preset_values(model)}
        for name in FILES & vars(self).keys():
            found[name] = getattr(self, name).replace("CIFAR10", kind.stem)
        return {name: value for name, value in found.items() if hasattr(self, name)}

    def preset_values(self, model=None):
        """Return the settings that the preset sets for `model`, or else for this config's network."""
        if self.preset == "released":
            return {}
        grey = self.paper.get("grey", {}) if data.SETS[self.dataset].settings else {}
        found = {**self.paper, **grey}
        return {n: v for n, v in found.items() if n not in ("grey", *models.lacks(model or self.model))}

    @property
    def preset_words(self):
        """The lines for the log on the preset and what it sets; none for the released one."""
        words, values = {True: [], False: []}, self.preset_values()
        for name, value in values.items():
            here = getattr(self, name)
            text = " ".join(map(str, here)) or "none" if type(here) is tuple else str(here)
            words[here == value].append(f"{name} {text}")
        line = f"preset {self.preset}: {', '.join(words[True])}"
        return [line + f"; otherwise: {', '.join(words[False])}" * bool(words[False])] if values else []

    @property
    def resumes(self):
        """Whether this run goes on from a checkpoint, which has weights and prototypes of its own."""
        asked = self.resume or distributed.restarted(self.save_to)
        return asked and checkpoints.exists(self.save_to)

    @property
    def log_path(self):
        return Path(self.log_to or self.save_to.removesuffix(".tar").removesuffix(".pth") + ".log")

    @property
    def metrics_path(self):
        return self.log_path.with_suffix(".csv")

    @property
    def picture_path(self):
        return self.log_path.with_suffix(".png")

    def of_seed(self, seed):
        """Return the settings for one of `seeds`, with the seed in the names of its files."""
        changes = {"seed": seed, "seeds": (), "seeds_per_rank": False}
        for name in ("save_to", "log_to"):
            if path := getattr(self, name):
                changes[name] = re.sub(r"((\.pth)?\.\w+)?$", rf"_seed{seed}\1", path, count=1)
        if self.tensorboard:
            changes["tensorboard"] = f"{self.tensorboard}/seed{seed}"
        if hasattr(self, "init_from"):
            changes["init_from"] = self.init_from.replace("{seed}", str(seed))
        return replace(self, **changes)

    def check(self):
        """Raise UsageError unless checkpoint, log, metrics and picture are files of their own."""
        if self.seeds_per_rank and not self.seeds:
            raise UsageError("--seeds-per-rank: has no seeds; add --seeds 0 1 2")
        log = self.log_path
        if not log.name:
            raise UsageError(f"--log-to {self.log_to}: names no file")
        outputs = (log, self.metrics_path, self.picture_path, self.save_to)
        outputs += (checkpoints.previous_of(self.save_to),)
        if len(set(map(os.path.realpath, outputs))) < len(outputs):
            raise UsageError(f"--log-to {log}: checkpoint, .csv and .png have names of their own")
