"""A run: where it stands, and how that is saved, resumed and logged."""

import math
import time
from dataclasses import dataclass, field, fields
from datetime import timedelta

import torch

import checkpoints
import data
import distributed
import utils
from utils import CheckpointError, DataError

from . import curves, files
from .identity import check_identity, identity_of
from .watch import Watch


@dataclass
class Progress:
    """Where a run stands; a checkpoint holds these fields under these names."""

    epoch: int = 0  # epochs that are done
    batch: int = 0  # batches of the present epoch that are done
    history: list = field(default_factory=list)  # the metrics: a row per epoch
    log: list = field(default_factory=list)  # the lines of the log
    sums: dict = field(default_factory=dict)  # of loss terms and right answers over this epoch's images
    images: int = 0  # of this epoch so far, adversarial ones too

    @property
    def place(self):
        return f"epoch {self.epoch + 1}, batch {self.batch}"

    def count(self, terms, correct, images):
        """Add a batch to the sums, on the device: its mean loss terms, and how many images were right."""
        totals = {name: value.double() * images for name, value in terms.items()}
        for name, total in {**totals, "correct": correct.double()}.items():
            self.sums[name] = self.sums.get(name, 0) + total
        self.images += images


class Run:
    """What is trained, where it stands, and the files it leaves: checkpoint, log and metrics."""

    def __init__(self, config, dataset, model, criterion, optimizer, scheduler):
        self.config, self.dataset = config, dataset
        self.device = dataset.train.images.device
        self.model = model.to(memory_format=torch.channels_last)
        self.criterion, self.optimizer, self.scheduler = criterion, optimizer, scheduler
        names = ("state_dict", "criterion", "optimizer", "scheduler")  # of their states in a checkpoint
        self.parts = dict(zip(names, (model, criterion, optimizer, scheduler), strict=True))
        self.dtype = utils.select_precision(config.precision, self.device)
        self.identity = identity_of(config, dataset, model, str(self.dtype).removeprefix("torch."))
        distributed.check_same("data", self.identity["data"], DataError)
        self.batches = data.num_batches(len(dataset.train), config.batch_size)  # of an epoch
        self.columns = ("epoch", "loss", *criterion.terms, "train_accuracy", "test_accuracy", "lr")
        self.progress, self.events = Progress(), curves.writer(config.tensorboard)
        torch.backends.cudnn.benchmark = self.device.type == "cuda"  # it tries which algorithms are fastest
        self.watch = Watch(optimizer, self.device, self.say, config.save_to)
        self.began = self.saved = time.monotonic()
        self.has_checkpoint = False  # whether the checkpoint at save_to is of this run

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    @property
    def finished(self):
        return self.progress.epoch >= self.config.epochs

    def open(self):
        """Resume if asked, and begin the log; return False when nothing is left to do."""
        config, path, progress = self.config, self.config.save_to, self.progress
        told = self.resume(path) if config.resumes else self.headlines()
        # Once more, in the hold of the files: another process may have ended a run of this name since.
        files.claim_files(config, progress.log, progress.history, self.has_checkpoint)
        # What a killed run logged after its last save is done again. The log is never there without its head,
        # by which a run that was killed before its first save knows it for its own.
        progress.log += told
        utils.write_text(config.log_path, files.log_text(progress.log))
        for line in told:
            utils.say(line)
        if self.finished:
            checkpoints.drop_previous(path)  # there still where the run was killed right after its end
            self.say(f"{path} is finished already ({progress.epoch} epochs); a larger --epochs goes on")
        return not self.finished

    def headlines(self):
        """The first lines of a log: what is trained on what, and the columns."""
        ranks = f" in {distributed.world} ranks" if distributed.world > 1 else ""
        dataset, parameters = self.dataset, sum(p.numel() for p in self.model.parameters())
        return (
            f"{self.identity['script']}: {self.model.label}, {parameters:,} parameters, "
            f"{self.identity['precision']} on {self.device}{ranks}; {len(dataset.train):,} training and "
            f"{len(dataset.test):,} {dataset.tested} images of {dataset.name}; seed {self.config.seed}",
            *self.config.preset_words,
            "  ".join(name.rjust(9) for name in self.columns),
        )

    def resume(self, path):
        """Go on from the checkpoint at `path`; return what there is to say of it.

        Raises CheckpointError when it is not of this run.
        """
        warnings = []
        state = checkpoints.load_newest(path, warn=warnings.append)
        if "optimizer" not in state or "criterion" not in state:
            raise CheckpointError(
                f"{path}: has no optimiser or prototypes to resume with; evaluate it, or start from it with "
                "--init-from and another --save-to"
            )
        with files.fitting(path):
            differing = check_identity(state, self.identity, path)
            self.identity["started_from"] = state.get("started_from", {})  # older code kept none
            checkpoints.check_finite({**state["state_dict"], **state["criterion"], **state["sums"]}, path)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            for name in (field.name for field in fields(Progress)):
                setattr(self.progress, name, state[name])
            self.progress.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.has_checkpoint = True
        return [*differing, *warnings, f"resumed {path} at {self.progress.place}"]

    def say(self, line):
        """Print a line, and log it."""
        self.progress.log.append(line)
        utils.say(line, self.config.log_path)

    @property
    def measures_now(self):
        """Whether the test accuracy is measured after the present epoch."""
        epoch = self.progress.epoch + 1
        return epoch % self.config.eval_every == 0 or epoch == self.config.epochs

    def begin_epoch(self):
        self.epoch_began = (time.monotonic(), self.progress.batch)

    def end_epoch(self, test_accuracy):
        """Log the epoch's row, step the schedule, save."""
        config, progress = self.config, self.progress
        seconds = max(time.monotonic() - self.epoch_began[0], 1e-9)
        batches = self.batches - self.epoch_began[1]
        row = {name: value.item() / progress.images for name, value in progress.sums.items()}
        row |= {"train_accuracy": 100 * row["correct"], "test_accuracy": test_accuracy}
        row |= {"epoch": progress.epoch + 1, "lr": self.optimizer.param_groups[0]["lr"]}
        self.scheduler.step()
        progress.history.append({name: row[name] for name in self.columns})
        progress.epoch, progress.batch, progress.sums, progress.images = progress.epoch + 1, 0, {}, 0
        left = timedelta(seconds=int(seconds / batches * self.batches * (config.epochs - progress.epoch)))
        cells = "  ".join(shown(name, row[name]) for name in self.columns)
        progress.log.append(f"{cells}  {batches * config.batch_size / seconds:7.0f} images/s  {left} left")
        self.save()  # the line with it: killed before the line is written, a resumed run writes it
        utils.say(progress.log[-1], config.log_path)
        curves.publish(progress.history, config.picture_path, self.events)

    def save_or_leave(self, stop):
        """Save when it is time to; when a signal or --max-minutes asks for a stop, save and leave."""
        config, progress, now = self.config, self.progress, time.monotonic()
        late = now - self.began > 60 * (config.max_minutes or math.inf)
        # An ended epoch is saved already.
        due = progress.batch and now - self.saved > 60 * (config.save_every_minutes or math.inf)
        signum, late, due = distributed.agree(stop.received or 0, late, due)
        if (signum or late) and not self.finished:
            message = f"stopped at {progress.place}; saved to {config.save_to}, --resume goes on"
            progress.log.append(message)
            self.save()
            utils.note(message, config.log_path)
            raise utils.Interrupted(signum, message)
        if due:
            self.save()

    def save(self):
        """Write the checkpoint, and the metrics beside the log; DivergenceError for NaN or infinity."""
        self.watch.check([*self.model.state_dict().values(), *self.criterion.state_dict().values()])
        states = {name: part.state_dict() for name, part in self.parts.items()}
        state = {**self.identity, **vars(self.progress), "finished": self.finished, **states}
        keep_previous = self.has_checkpoint and not self.finished
        checkpoints.save(state, self.config.save_to, keep_previous=keep_previous)
        distributed.note_save(self.config.save_to)
        self.has_checkpoint, self.saved = True, time.monotonic()
        utils.write_text(self.config.metrics_path, utils.csv_text(self.columns, self.progress.history))


def shown(name, value):
    """A metric as the log shows it, as wide as its name above it."""
    text = "-" if value is None else f"{value:.2f}" if name.endswith("accuracy") else f"{value:.5g}"
    return text.rjust(max(9, len(name)))
