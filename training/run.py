"""A run: where it stands, and how that is saved, resumed and logged."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import checkpoints
import data
import utils
from utils import CheckpointError, FileSystemError

from .identity import check_identity, identity_of
from .watch import Watch

WIDTHS = {"epoch": 5, "cross_entropy": 13, "contrastive": 11, "train_accuracy": 14, "test_accuracy": 13}
OTHER_WIDTH = 9  # of a column of the log


@dataclass
class Progress:
    """Where a run stands; a checkpoint holds these fields under these names."""

    epoch: int = 0  # epochs that are done
    batch: int = 0  # batches of the present epoch that are done
    history: list = field(default_factory=list)  # the metrics: a row per epoch
    log: list = field(default_factory=list)  # the lines of the log
    sums: dict = field(
        default_factory=dict
    )  # loss terms and right answers, added up over this epoch's images
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

    def end_epoch(self, row):
        self.history.append(row)
        self.epoch, self.batch, self.sums, self.images = self.epoch + 1, 0, {}, 0


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
        self.batches = data.num_batches(len(dataset.train), config.batch_size)  # of an epoch
        self.columns = ("epoch", "loss", *criterion.terms, "train_accuracy", "test_accuracy", "lr")
        self.progress = Progress()
        self.watch = Watch(optimizer, self.device, self.say, config.save_to)
        self.began = self.saved = time.monotonic()
        self.has_checkpoint = False  # whether the checkpoint at save_to is of this run

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    @property
    def finished(self):
        return self.progress.epoch >= self.config.epochs

    # ------------------------------------------------ opening and resuming

    def open(self):
        """Prove that outputs can be written, resume if asked; return False when nothing is left to do."""
        config, path = self.config, Path(self.config.save_to)
        for output in (path, config.log_path, config.metrics_path):
            utils.prepare_output(output)
        if config.resumes:
            self.resume(path)
        elif checkpoints.exists(path) and not config.overwrite:
            raise FileSystemError(
                f"{path}: exists; --resume goes on with it, --overwrite starts anew, --save-to names another"
            )
        else:
            self.start_log()
        if self.finished:
            checkpoints.drop_previous(path)  # there still where the run was killed right after its end
            done = self.progress.epoch
            self.say(f"{path} is finished already ({done} epochs); a larger --epochs goes on")
        return not self.finished

    def start_log(self):
        """Begin a new log with its headline; FileSystemError when that would lose a file that is no log."""
        path, script, dataset = self.config.log_path, self.identity["script"], self.dataset
        if path.exists() and not path.read_bytes().startswith(f"{script}: ".encode()):
            raise FileSystemError(f"{path}: exists and is no log of {script}.py; name another --log-to")
        path.unlink(missing_ok=True)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.say(
            f"{script}: depth {self.model.depth}, {parameters:,} parameters, {self.identity['precision']} on "
            f"{self.device}; {len(dataset.train):,} training and {len(dataset.test):,} {dataset.tested} "
            f"images of {dataset.name}; seed {self.config.seed}"
        )
        self.say(aligned({name: name for name in self.columns}))

    def resume(self, path):
        """Go on from the checkpoint at `path`; CheckpointError when it is not of this run."""
        warnings = []
        state = checkpoints.load_newest(path, warn=warnings.append)
        if "optimizer" not in state or "criterion" not in state:
            raise CheckpointError(
                f"{path}: has no optimiser or prototypes to resume with; evaluate it, or start from it with "
                "--init-from and another --save-to"
            )
        try:
            differing = check_identity(state, self.identity, path)
            self.restore(state, path)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:150]
            raise CheckpointError(
                f"{path}: does not fit this run ({type(error).__name__}: {reason}); use another copy, or "
                "--overwrite starts anew"
            ) from None
        # What a killed run logged after its last save is done again.
        utils.write_text(self.config.log_path, "".join(f"{line}\n" for line in self.progress.log))
        self.write_metrics()
        for line in (*differing, *warnings, f"resumed {path} at {self.progress.place}"):
            self.say(line)

    def restore(self, state, path):
        """Take over everything that `state` holds."""
        checkpoints.check_finite({**state["state_dict"], **state["criterion"], **state["sums"]}, path)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.progress = Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
        self.progress.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.has_checkpoint = True

    # ------------------------------------------------ logging and saving

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
        means = {name: value.item() / progress.images for name, value in progress.sums.items()}
        row = means | {"epoch": progress.epoch + 1, "lr": self.optimizer.param_groups[0]["lr"]}
        row |= {"train_accuracy": 100 * means["correct"], "test_accuracy": test_accuracy}
        self.scheduler.step()
        progress.end_epoch({name: row[name] for name in self.columns})
        left = seconds / batches * self.batches * (config.epochs - progress.epoch)
        speed = f"{batches * config.batch_size / seconds:7.0f} images/s  {clock(left)} left"
        progress.log.append(f"{aligned(progress.history[-1])}  {speed}")
        self.save()  # the line with it: killed before the line is written, a resumed run writes it
        utils.say(progress.log[-1], config.log_path)

    def save_or_leave(self, stop):
        """Save when it is time to; when a signal or --max-minutes asks for a stop, save and leave."""
        config, progress = self.config, self.progress
        if (stop.received or passed(config.max_minutes, self.began)) and not self.finished:
            message = f"stopped at {progress.place}; saved to {config.save_to}, --resume goes on"
            progress.log.append(message)
            self.save()
            utils.note(message, config.log_path)
            if not stop.received:
                utils.say(message)
            raise utils.Interrupted(stop.received, message)
        if (
            passed(config.save_every_minutes, self.saved) and progress.batch
        ):  # an ended epoch is saved already
            self.save()

    def save(self):
        """Write the checkpoint, and the metrics beside the log; DivergenceError when a number is lost."""
        self.watch.check([*self.model.state_dict().values(), *self.criterion.state_dict().values()])
        states = {name: part.state_dict() for name, part in self.parts.items()}
        state = {**self.identity, **vars(self.progress), "finished": self.finished, **states}
        keep_previous = self.has_checkpoint and not self.finished
        checkpoints.save(state, self.config.save_to, keep_previous=keep_previous)
        self.has_checkpoint, self.saved = True, time.monotonic()
        self.write_metrics()

    def write_metrics(self):
        utils.write_text(self.config.metrics_path, utils.csv_text(self.columns, self.progress.history))


def passed(minutes, since):
    """Whether so many minutes (None: never) have passed since a moment of `time.monotonic`."""
    return minutes is not None and time.monotonic() - since > 60 * minutes


def aligned(row):
    """A line of the log: an epoch's metrics, or their names above them."""
    cells = []
    for name, value in row.items():
        if not isinstance(value, str):
            digits = ".2f" if name.endswith("accuracy") else ".5g"
            value = "-" if value is None else f"{value:{digits}}"
        cells.append(f"{value:>{WIDTHS.get(name, OTHER_WIDTH)}}")
    return "  ".join(cells)


def clock(seconds):
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
