"""What the four training scripts share: the joint loss, one epoch, `fit` and `accuracy`."""

import collections
import functools
import importlib.util
import math
import os
import shutil
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import cli
import data
import utils
from cli import Count, Positive, Seed, Whole
from prototype_conformity import PrototypeConformityLoss  # noqa: F401
from resnet_model import folded

EVAL_BATCH = 1000  # images at a time when only accuracy is asked for
WATCH_EVERY = 50  # batches between looks at the loss where a look waits for the device
RUNAWAY_WARNING, RUNAWAY_STOP = 1e5, 1e9  # size of a loss term that is suspicious, and one that is lost
NETWORK = ("depth", "num_classes", "aux_dim", "fc_dim")  # what a checkpoint says of its network
LAST_GOOD = 3  # batches before a lost one whose loss terms are told

# What may differ between a run and its continuation; everything else identifies the run.
FREE_ON_RESUME = {
    *("data_dir", "init_from", "save_to", "log_to", "resume", "overwrite"),
    *("epochs", "eval_every", "device", "compile", "save_every_minutes", "max_minutes"),
}
EACH_TIME = ("resume", "overwrite", "max_minutes")  # not worth a word when they differ


# ---------------------------------------------------------------- criteria


@dataclass(frozen=True)
class RunConfig:
    """What every training script can be told of a run, besides its recipe."""

    # data and files
    dataset: Literal[data.DATASETS] = "cifar10"  # folder: DATA_DIR/{train,test}/<class>/*
    data_dir: str = "data"  # where the images are, or are downloaded to
    limit: Count | None = None  # so many images of each split, the first of each class; none: all
    holdout: Whole = 0  # training images held out, and measured in place of the test images
    save_to: str = ""  # the checkpoint
    log_to: str | None = None  # the log; none: beside save_to. The metrics lie beside it as .csv
    resume: bool = False  # go on with the run at save_to, if there is one
    overwrite: bool = False  # start anew over the run at save_to
    # run
    eval_every: Count = 5  # epochs between measurements of the test accuracy, which chooses nothing
    save_every_minutes: Positive | None = 10.0  # saves within an epoch too; none: only after each
    max_minutes: Positive | None = None  # stop after so long, saved, to be resumed
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where the hardware has it
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on a GPU
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    seed: Seed = 0

    def check(self):
        """Raise UsageError unless checkpoint, log and metrics are three files."""
        log = log_path_of(self)
        if not log.name:
            raise utils.UsageError(f"--log-to {self.log_to}: names no file")
        if len({log, log.with_suffix(".csv"), Path(self.save_to)}) < 3:
            raise utils.UsageError(
                f"--log-to {log}: the checkpoint and the metrics (.csv) have names of their own"
            )


class CrossEntropyLoss(nn.Module):
    """Stage 1's criterion, in the form that `fit` takes: `criterion(outputs, labels) -> (loss, parts)`."""

    terms = ("cross_entropy",)

    def forward(self, outputs, labels):
        loss = F.cross_entropy(outputs.logits.float(), labels)
        return loss, {"cross_entropy": loss.detach()}


# ---------------------------------------------------------------- modes and precision


def select_precision(name, device):
    """Return torch.bfloat16 or torch.float32; `auto` is bfloat16 where the hardware has it natively."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and native) else torch.float32


def compiles(name, device):
    """Whether to compile the step and the attack; `auto`: on a GPU that can, as on a CPU it gains nothing.

    Raises UsageError when it is to be `on` and what it needs is not there.
    """
    if device.type == "cuda":  # Triton builds what launches its kernels
        header = Path(sysconfig.get_path("include"), "Python.h").exists()
        compiler = any(map(shutil.which, (os.environ.get("CC", "gcc"), "cc", "clang")))
        able = importlib.util.find_spec("triton") is not None and header and compiler
        needs = "Triton, a C compiler and Python's headers"
    else:
        able = any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++")))
        needs = "a C++ compiler, such as g++"
    if name == "on" and not able:
        raise utils.UsageError(f"--compile on: needs {needs}, and not all of it is there; try auto")
    return name == "on" or (name == "auto" and device.type == "cuda" and able)


@torch.no_grad()
def accuracy(model, split):
    """Return the accuracy in percent on `split`: float32 (TF32 on a GPU), eval mode, argmax of the logits."""
    correct = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    with utils.evaluating(model):
        for _, images, labels in data.epoch_batches(split, EVAL_BATCH):
            images = data.to_float(images).contiguous(memory_format=torch.channels_last)
            correct += (model.logits(images).argmax(1) == labels).sum()
    return 100 * correct.item() / len(split)


# ---------------------------------------------------------------- starting points


def resumes(config):
    """Whether there is a run to go on with, which has weights and prototypes of its own."""
    return config.resume and checkpoints.exists(config.save_to)


def start_from(model, config, dataset):
    """Begin stage 2 with the weights of `config.init_from`; a run that is resumed has its own already.

    Raises CheckpointError when depth, class count, class names or held-out images differ. An auxiliary branch
    that stage 1 did not have keeps its fresh weights.
    """
    if resumes(config):
        return
    path = config.init_from
    state, weights, network = checkpoints.read_network(path)
    for name, value in network.items():
        if value != getattr(model, name) and not (name == "aux_dim" and value == 0):
            raise utils.CheckpointError(
                f"{path}: a network with {name} {value}, not {getattr(model, name)}; give the settings it "
                "was trained with or another --init-from"
            )
    checkpoints.check_classes(state, path, dataset.classes)
    checkpoints.check_holdout(state, path, dataset)
    model.load_state_dict({**model.state_dict(), **weights})
    percent = accuracy(model, dataset.test)
    epoch = state.get("epoch", "?")
    utils.say(f"starting from {path}, epoch {epoch}, right on {percent:.2f} % of the {dataset.tested} images")


# ---------------------------------------------------------------- one run


def fit(config, dataset, model, criterion, optimizer, scheduler, adversary=None):
    """Train to `config.epochs`; log a row and save a checkpoint each epoch; resume where `config` says so.

    `adversary(model_fn, images, labels, generator) -> images`, if given, doubles each batch with adversarial
    images; `model_fn` is the network as it stands, images to logits, frozen and in eval mode. Raises
    Interrupted after a saved stop (by a signal, or by --max-minutes), DivergenceError, and the faults of
    `utils`.
    """
    with utils.hold(config.save_to), utils.hold(log_path_of(config)):
        run = Run(config, dataset, model, criterion, optimizer, scheduler, adversary)
        if not run.open():
            return
        with utils.StopSignals() as stop:
            while run.epoch < config.epochs:
                run.train_epoch(stop)
                run.close_epoch()
                run.save_or_leave(stop)
    utils.say(f"finished: {config.save_to}, sha256 {utils.sha256(config.save_to)}")
    if stop.received:
        raise utils.Interrupted(
            stop.received, f"told to stop in its last epoch; {config.save_to} is finished"
        )


class Run:
    """Where a training run is, and everything needed to go on from there."""

    def __init__(self, config, dataset, model, criterion, optimizer, scheduler, adversary):
        self.config, self.dataset, self.adversary = config, dataset, adversary
        self.device = dataset.train.images.device
        self.model = model.to(memory_format=torch.channels_last)
        self.criterion, self.optimizer, self.scheduler = criterion, optimizer, scheduler
        self.dtype = select_precision(config.precision, self.device)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.precision = str(self.dtype).removeprefix("torch.")
        self.view = None if adversary is None else folded(self.model, self.dtype)  # what the attack sees
        self.compiled = None
        if compiles(config.compile, self.device):
            # On a GPU this mode also replays whole passes as CUDA graphs.
            compiled = functools.partial(torch.compile, mode="reduce-overhead", dynamic=False)
            self.compiled = (compiled(self.losses), self.view and compiled(self.view))
        self.epoch, self.batch, self.history = 0, 0, []
        self.sums, self.images = {}, 0  # of this epoch: loss terms added up over the images seen
        self.recent = collections.deque(maxlen=WATCH_EVERY + LAST_GOOD)  # (where, loss terms) of each batch
        # Whether a loss was NaN, or ran away: known to the device at once, to the host when it looks.
        self.lost = torch.zeros((), dtype=torch.bool, device=self.device)
        self.warned = False
        self.run_began = self.saved = time.monotonic()
        self.epoch_began = (self.run_began, 0)  # this epoch, or what was left of it: when, and at which batch
        self.has_checkpoint = False  # whether the checkpoint at save_to is of this run
        self.log = []  # the lines of the log, which a checkpoint holds and a resumed run restores
        self.log_path = log_path_of(config)

    # ------------------------------------------------ opening and resuming

    def open(self):
        """Prove that outputs can be written, resume if asked; return False when nothing is left to do."""
        config, path = self.config, Path(self.config.save_to)
        self.data = self.dataset.describe()
        for output in (path, self.log_path, self.log_path.with_suffix(".csv")):
            utils.prepare_output(output)
        if resumes(config):
            warnings = []
            self.restore(checkpoints.load_newest(path, warn=warnings.append))
            for line in (*warnings, f"resumed {path} at epoch {self.epoch + 1}, batch {self.batch}"):
                self.say(line)
        elif checkpoints.exists(path) and not config.overwrite:
            raise utils.FileSystemError(
                f"{path}: exists; --resume goes on with it, --overwrite starts anew, --save-to names another"
            )
        else:
            self.start_log()
        if self.epoch >= config.epochs:
            checkpoints.drop_previous(path)  # there still where the run was killed right after its end
            self.say(f"{path} is finished already ({self.epoch} epochs); a larger --epochs goes on")
            return False
        return True

    def start_log(self):
        """Begin a new log with its headline; FileSystemError when that would lose a file that is no log."""
        name = cli.script_name(self.config)
        if self.log_path.exists() and not self.log_path.read_bytes().startswith(f"{name}: ".encode()):
            raise utils.FileSystemError(
                f"{self.log_path}: exists and is no log of {name}.py; name another --log-to"
            )
        self.log_path.unlink(missing_ok=True)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.say(
            f"{name}: depth {self.model.depth}, {parameters:,} parameters, {self.precision} on "
            f"{self.device}; {len(self.dataset.train):,} training and {len(self.dataset.test):,} "
            f"{self.dataset.tested} images of {self.dataset.name}; seed {self.config.seed}"
        )
        self.say(header_row(self.columns()))

    def restore(self, state):
        """Take over everything `state` holds; CheckpointError when it is not of this run."""
        path = self.config.save_to
        if "optimizer" not in state or "criterion" not in state:
            raise utils.CheckpointError(
                f"{path}: has no optimiser or prototypes to resume with; evaluate it, or start from it with "
                "--init-from and another --save-to"
            )
        try:
            differing = self.check_identity(state, path)
            checkpoints.check_finite({**state["state_dict"], **state["criterion"]}, path)
            self.model.load_state_dict(state["state_dict"])
            self.criterion.load_state_dict(state["criterion"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.epoch, self.batch, self.history = state["epoch"], state["batch"], state["history"]
            self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
            self.images, self.log = state["images"], list(state["log"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise utils.CheckpointError(
                f"{path}: does not fit this run ({type(error).__name__}: {reason}); use another copy, or "
                "--overwrite starts anew"
            ) from None
        self.has_checkpoint = True
        if self.log:  # what a killed run logged after its last save is done again; format 1 held no log
            utils.write_text(self.log_path, "".join(f"{line}\n" for line in self.log))
        self.write_metrics()
        for line in differing:
            self.say(f"resumed with another {line}")

    def check_identity(self, state, path):
        """Refuse what identifies another run; return what else differs between its settings and these."""
        if state["script"] != cli.script_name(self.config):
            raise utils.CheckpointError(f"{path}: made by {state['script']}.py; name another --save-to")
        checkpoints.check_classes(state, path, self.dataset.classes)
        if not same_data(state["data"], self.data):
            raise utils.CheckpointError(
                f"{path}: trained on {state['data']}, not {self.data}; give the same data"
            )
        now = {**cli.config_dict(self.config), "precision": self.precision}
        before = {**state["config"], "precision": state["precision"] or self.precision}
        names = [name for name in now if name in before and now[name] != before[name]]
        differing = {name: f"{name} {before[name]} -> {now[name]}" for name in names}
        fixed = [line for name, line in differing.items() if name not in FREE_ON_RESUME]
        if fixed:
            raise utils.CheckpointError(
                f"{path}: begun with other settings ({', '.join(fixed)}); resume with the old ones, or name "
                "another --save-to"
            )
        return [line for name, line in differing.items() if name not in EACH_TIME]

    # ------------------------------------------------ training

    def train_epoch(self, stop):
        """Train from the current batch to the end of the epoch."""
        config, split = self.config, self.dataset.train
        total = data.num_batches(len(split), config.batch_size)
        self.epoch_began = (time.monotonic(), self.batch)
        order = utils.generator(config.seed, "order", self.epoch)
        batches = data.epoch_batches(split, config.batch_size, order, start_batch=self.batch)
        self.model.train()
        for index, images, labels in utils.progress(batches, total, f"epoch {self.epoch + 1}", self.batch):
            images = data.augment(images, utils.generator(config.seed, "augment", self.epoch, index))
            images = data.to_float(images).contiguous(memory_format=torch.channels_last)
            if self.adversary is not None:
                attacked = self.attack(images, labels, index)
                images, labels = torch.cat([images, attacked]), torch.cat([labels, labels])
            self.step(images, labels)
            self.batch = index + 1
            if self.batch < total:
                self.save_or_leave(stop)

    def losses_and_view(self, size):
        """(losses, view) for a batch of `size` clean images: compiled, where it is a full one.

        To compile for one other size, that of an epoch's last batch, would take as long again.
        """
        full = size == self.config.batch_size
        return self.compiled if self.compiled and full else (self.losses, self.view)

    def attack(self, images, labels, index):
        """Adversarial images for a batch, in the training precision."""
        _, view = self.losses_and_view(len(labels))
        generator = utils.generator(self.config.seed, "attack", self.epoch, index)
        self.view.refresh()
        with self.autocast():
            attacked = self.adversary(view, images, labels, generator)
        return attacked.contiguous(memory_format=torch.channels_last)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    def step(self, images, labels):
        """One optimisation step; the loss terms are added up on the device."""
        losses, _ = self.losses_and_view(len(labels) // (1 if self.adversary is None else 2))
        loss, terms, correct = losses(images, labels)
        terms = {"loss": loss.detach(), **terms}
        terms = {name: value.clone() for name, value in terms.items()}  # the next replay overwrites them
        self.watch(terms)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.images += len(labels)
        for name, value in {**terms, "correct": correct}.items():
            weighted = value.double() * (1 if name == "correct" else len(labels))
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted

    def losses(self, images, labels):
        """Return (loss, its terms, number of images classified right) of a batch."""
        with self.autocast():
            outputs = self.model(images)
        return *self.criterion(outputs, labels), (outputs.logits.detach().argmax(1) == labels).sum()

    # ------------------------------------------------ divergence

    def watch(self, terms):
        """See to it that no step follows a lost loss; warn of a term that runs away.

        Reading a loss waits for a GPU, so there the run ends at the next look, one in WATCH_EVERY batches, or
        before a save; until then an optimiser with `fused` leaves the weights as they were.
        """
        self.recent.append((f"epoch {self.epoch + 1}, batch {self.batch + 1}", terms))
        largest = torch.stack([value.abs() for value in terms.values()]).max()
        self.lost = self.lost | ~(largest <= RUNAWAY_STOP)  # so written, NaN is larger than anything
        if all(group.get("fused") for group in self.optimizer.param_groups):
            self.optimizer.found_inf = self.lost.float()  # where it is 1, a fused step does nothing
        if self.device.type == "cpu" or self.batch % WATCH_EVERY == 0:
            if self.lost:
                raise self.divergence()
            if not self.warned and largest > RUNAWAY_WARNING:
                self.warned = True
                self.say(f"warning: a loss term is running away: {terms_text(*self.recent[-1])}")

    def check_numbers(self):
        """Raise DivergenceError when a loss or a weight is lost: nothing lost is ever saved."""
        parts = (self.sums, self.model.state_dict(), self.criterion.state_dict())
        values = [value.flatten() for part in parts for value in part.values() if value.is_floating_point()]
        if self.lost or not torch.cat(values).isfinite().all():
            raise self.divergence()

    def divergence(self):
        """The error that tells the first lost batch of the recent ones, and the last good ones before it."""
        lost = next((i for i, (_, terms) in enumerate(self.recent) if is_lost(terms)), len(self.recent))
        recent = [terms_text(*entry) for entry in self.recent]
        what = (*recent[lost : lost + 1], "a weight or a loss is NaN or Inf")[0]
        before = " | ".join(recent[max(0, lost - LAST_GOOD) : lost]) or "none since the start"
        return utils.DivergenceError(
            f"diverged: {what}; the last good batches: {before}; lower --lr or the loss weights; "
            f"{self.config.save_to} is as it was last saved"
        )

    def means(self):
        """The epoch's means so far as floats."""
        return {name: value.item() / self.images for name, value in self.sums.items()} if self.images else {}

    # ------------------------------------------------ logging and saving

    def columns(self):
        return ["epoch", "loss", *self.criterion.terms, "train_accuracy", "test_accuracy", "lr"]

    def close_epoch(self):
        """Log the epoch's row, step the schedule, save."""
        config, means = self.config, self.means()
        total = data.num_batches(len(self.dataset.train), config.batch_size)
        batches = total - self.epoch_began[1]
        seconds = max(time.monotonic() - self.epoch_began[0], 1e-9)
        row = {name: means[name] for name in self.columns() if name in means}
        row["train_accuracy"] = 100 * means["correct"]
        row |= {"epoch": self.epoch + 1, "lr": self.optimizer.param_groups[0]["lr"], "test_accuracy": None}
        if (self.epoch + 1) % config.eval_every == 0 or self.epoch + 1 == config.epochs:
            row["test_accuracy"] = accuracy(self.model, self.dataset.test)
        if not all(map(math.isfinite, means.values())):
            raise self.divergence()
        self.scheduler.step()
        self.history.append({name: row[name] for name in self.columns()})
        self.epoch, self.batch, self.sums, self.images = self.epoch + 1, 0, {}, 0
        left = seconds / batches * total * (config.epochs - self.epoch)
        speed = f"{batches * config.batch_size / seconds:7.0f} images/s  {clock(left)} left"
        self.log.append(f"{format_row(self.history[-1])}  {speed}")
        self.save()  # the line with it: killed before the line is written, a resumed run writes it
        utils.say(self.log[-1], self.log_path)

    def save_or_leave(self, stop):
        """Save when it is time to; when a signal or --max-minutes asks for a stop, save and leave."""
        config, now = self.config, time.monotonic()
        out_of_time = config.max_minutes is not None and now - self.run_began > 60 * config.max_minutes
        if (stop.received or out_of_time) and self.epoch < config.epochs:
            where = f"epoch {self.epoch + 1}, batch {self.batch}"
            message = f"stopped at {where}; saved to {config.save_to}, --resume goes on"
            self.log.append(message)
            self.save()
            utils.note(message, self.log_path)
            if not stop.received:
                utils.say(message)
            raise utils.Interrupted(stop.received, message)
        due = config.save_every_minutes is not None and now - self.saved > 60 * config.save_every_minutes
        if due and self.batch:  # an epoch that is over is saved already
            self.save()

    def save(self):
        """Write the checkpoint, and the metrics that lie beside the log."""
        self.check_numbers()
        finished = self.epoch >= self.config.epochs
        state = {
            "script": cli.script_name(self.config),
            "network": {name: getattr(self.model, name) for name in NETWORK},
            "classes": list(self.dataset.classes),
            "data": self.data,
            "config": cli.config_dict(self.config),
            "precision": self.precision,
            "epoch": self.epoch,
            "batch": self.batch,
            "finished": finished,
            "history": self.history,
            "log": self.log,
            "sums": self.sums,
            "images": self.images,
            "state_dict": self.model.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        checkpoints.save(state, self.config.save_to, keep_previous=self.has_checkpoint and not finished)
        self.has_checkpoint, self.saved = True, time.monotonic()
        self.write_metrics()

    def write_metrics(self):
        utils.write_text(self.log_path.with_suffix(".csv"), utils.csv_text(self.columns(), self.history))

    def say(self, line):
        self.log.append(line)
        utils.say(line, self.log_path)


# ---------------------------------------------------------------- rows and names


def log_path_of(config):
    """Where a run's log lies: its metrics lie beside it."""
    return Path(config.log_to or config.save_to.removesuffix(".tar").removesuffix(".pth") + ".log")


def same_data(before, now):
    """Whether two descriptions agree, as far as both go: format 1 knew no sum of labels."""
    pairs = ((before.get(name), value) for name, value in now.items())
    return all(a == b[: len(a)] if isinstance(a, list) and a else a == b for a, b in pairs)


def is_lost(terms):
    return any(not abs(value.item()) <= RUNAWAY_STOP for value in terms.values())


def terms_text(where, terms):
    return f"{where}: " + ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())


WIDTHS = {"epoch": 5, "cross_entropy": 13, "contrastive": 11, "train_accuracy": 14, "test_accuracy": 13}


def header_row(columns):
    return "  ".join(f"{name:>{WIDTHS.get(name, 9)}}" for name in columns)


def format_row(row):
    """One aligned log row."""
    cells = []
    for name, value in row.items():
        width = WIDTHS.get(name, 9)
        text = "-" if value is None else f"{value:.2f}" if name.endswith("accuracy") else f"{value:.5g}"
        cells.append(f"{text:>{width}}")
    return "  ".join(cells)


def clock(seconds):
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
