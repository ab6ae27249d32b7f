"""What `robustness.py` measures with: the networks under test, and what each attack did to each image.

`Target` is a network under test, `Trial` an attack with its settings (module `suite` makes them), `Outcome`
what one did to the other, image by image. `measure_all` fills a `Progress`, block by block, so that a stopped
evaluation goes on where it was. Modules `reports` and `sanity` read what is in there.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import attacks
import checkpoints
import cli
import data
import prototype_conformity
import utils
from prototype_conformity import PrototypeConformityLoss
from resnet_model import folded, resnet

FORMAT = 4  # of the file that a stopped evaluation leaves
LABELS = {  # what a checkpoint's row is called, by the script that made it
    "softmax_training": "Softmax",
    "pcl_training": "PCL",
    "pcl_training_adversarial_fgsm": "PCL + FGSM images",
    "pcl_training_adversarial_pgd": "PCL + PGD images",
}
SAVE_EVERY = 60.0  # seconds between saves of what is done
# What may differ between an evaluation and its continuation.
FREE_ON_RESUME = {
    *("data_dir", "checkpoints", "source_checkpoint", "results", "resume", "overwrite", "device"),
}


# ---------------------------------------------------------------- what is measured


class NearestPrototype(nn.Module):
    """A network whose scores are minus the distances to the prototypes: the prediction of Eq. 6."""

    def __init__(self, network, prototypes):
        super().__init__()
        self.network, self.prototypes = network, prototypes

    def forward(self, images):
        outputs = self.network(images)
        return outputs._replace(logits=self.prototypes.nearest(outputs))


@dataclasses.dataclass(frozen=True)
class Target:
    """A network under test. `view` is what attacks differentiate, `judge` what decides on their results.

    Both map images in [0, 1] to logits or to a tuple with a field `logits`; frozen, in eval mode. Of a
    checkpoint, `view` is `judge` with its batch norms folded: the same function up to rounding, faster.
    """

    label: str
    sha256: str
    judge: nn.Module
    view: nn.Module
    path: str = ""
    depth: int | None = None
    prototypes: PrototypeConformityLoss | None = None
    origin: dict = dataclasses.field(default_factory=dict)  # the script, settings and data behind it

    def logits(self, images):
        """The judge's scores of `images`, float32 or wider, (N, K)."""
        return attacks.scores(self.judge(images))


def load_target(path, device, classes, predict="softmax"):
    """Read a checkpoint; depth and class count are its own. Raises CheckpointError.

    `predict`: by the largest logit, `softmax`, or by the nearest `prototype`.
    """
    state, model, prototypes = _load(path, device)
    checkpoints.check_classes(state, path, classes)
    if model.num_classes != len(classes):
        raise utils.CheckpointError(
            f"{path}: a network of {model.num_classes} classes, but the data set has {len(classes)}"
        )
    judge, view = model, folded(model).network.to(memory_format=torch.channels_last)
    if predict == "prototype":
        if prototypes is None or not prototypes.proximity:
            raise utils.CheckpointError(
                f"{path}: holds no prototypes to predict with; --predict softmax, or a checkpoint of stage 2"
            )
        judge, view = NearestPrototype(judge, prototypes), NearestPrototype(view, prototypes)
    kept = {name: state[name] for name in ("script", "epoch", "config", "data", "versions") if name in state}
    label = LABELS.get(state.get("script"), Path(path).name.split(".")[0])
    settings = kept.get("config") or {}
    if label.startswith("PCL") and settings.get("weight_prox") == settings.get("weight_conprox") == 0:
        label = f"No {label}"  # stage 2 as a control, with both terms switched off
    elif label.startswith("PCL") and all(settings.get(name) for name in ("shared_prototypes", "separation")):
        label = label.replace("PCL", "PCL by Eq. 5")
    return Target(
        label, utils.sha256(path), judge.eval(), view.eval(), str(path), model.depth, prototypes, kept
    )


def _load(path, device):
    """(checkpoint, its network in eval mode, its prototypes or None)."""
    state, weights, network = checkpoints.read_network(path)
    model = resnet(**network)
    model.load_state_dict(weights)
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    criterion, config = state.get("criterion") or {}, state.get("config") or {}
    prototypes = prototype_conformity.from_checkpoint(criterion, config)
    return state, model, None if prototypes is None else prototypes.to(device)


def classifier(path, device="cpu"):
    """The network of a checkpoint as a frozen nn.Module, images in [0, 1] -> logits, in eval mode.

    What AutoAttack, torchattacks, foolbox and RobustBench take as it is. Raises CheckpointError.
    """
    # Plain memory order: other libraries flatten gradients with `view`.
    return folded(_load(path, device)[1]).to(memory_format=torch.contiguous_format)


@dataclasses.dataclass(frozen=True)
class Trial:
    """An attack with its settings: `attack(target, images, labels, generator, trace) -> images`.

    `attack` None changes nothing. `key` is the trial's name in files, `title` its heading, `settings` what a
    reader must know of it. Not `bounded`: its images may lie farther than `epsilon` away.
    """

    key: str
    title: str
    epsilon: float
    attack: Callable | None = None
    settings: str = ""
    bounded: bool = True
    needs_prototypes: bool = False
    limit: int | None = None  # the first so many images, class-balanced; None: all
    curve: bool = False  # a point of a curve, whose images nobody asks for

    def applies_to(self, target):
        return not self.needs_prototypes or (
            target.prototypes is not None and bool(target.prototypes.proximity)
        )

    def of(self, split):
        """The part of `split` that this trial is about."""
        if self.limit is None or self.limit >= len(split):
            return split
        keep = torch.from_numpy(data.balanced_indices(split.labels.cpu().numpy(), self.limit, "test"))
        keep = keep.to(split.labels.device)
        return data.Split(split.images[keep], split.labels[keep])


# ---------------------------------------------------------------- measuring


COLUMNS = {  # of an outcome, with a value an image
    "predicted": torch.int64,
    "correct": torch.bool,
    "margin": torch.float32,  # true logit less the largest other: below 0 is misclassified
    "linf": torch.float64,  # distance from the original; rounded, it could pass for beyond epsilon
    "l2": torch.float32,
    "zero_first": torch.bool,  # the attack's first gradient was exactly zero
    "zero_ever": torch.bool,  # one of them was
    "zero_always": torch.bool,  # all of them were: the attack never learned anything of this image
}


@dataclasses.dataclass
class Outcome:
    """What one trial did to the first images of a split: the tensors of COLUMNS, (N,), on the CPU.

    They are read as attributes, too.
    """

    columns: dict[str, Tensor] = dataclasses.field(
        default_factory=lambda: {name: torch.zeros(0, dtype=dtype) for name, dtype in COLUMNS.items()}
    )
    low: float = 1.0  # smallest and largest pixel of the results
    high: float = 0.0
    seconds: float = 0.0
    gradients: bool = False  # the attack showed its gradients

    def __getattr__(self, name):
        if name in COLUMNS:
            return self.columns[name]
        raise AttributeError(name)

    def __len__(self):
        return len(self.correct)

    @property
    def accuracy(self):
        """Percent of the images so far that are classified right."""
        return 100 * self.correct.double().mean().item()

    def fooled(self, epsilon):
        """Which images, (N,) bool, are misclassified within `epsilon` of the original."""
        return ~self.correct & (self.linf <= epsilon)

    def extend(self, **values):
        for name, dtype in COLUMNS.items():
            self.columns[name] = torch.cat([self.columns[name], values[name].cpu().to(dtype)])


@contextlib.contextmanager
def exact_float32():
    """Within it nothing computes in less than float32, and CUDA convolutions repeat themselves exactly."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    try:
        with cudnn, torch.autocast("cpu", enabled=False), torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(target, split, trial, outcome, *, batch_size, seed, keep_in=None):
    """Try `trial` on `split` block by block from where `outcome` stands; yield after each, it extended.

    With `keep_in`, a folder, each block's images are kept there. Raises ValueError when a result holds NaN,
    or leaves [0, 1] or the ball.
    """
    split = trial.of(split)
    if keep_in is not None and not len(outcome):
        for old in Path(keep_in).glob("*.pt"):  # of other settings, whose blocks may be others
            old.unlink()
    for start in range(len(outcome), len(split), batch_size):
        began = time.monotonic()
        images, labels = split.images[start : start + batch_size], split.labels[start : start + batch_size]
        generator = generator_at(seed, start)
        with exact_float32():
            images = data.to_float(images).contiguous(memory_format=torch.channels_last)
            attacked = try_block(target, trial, images, labels, generator, outcome)
        if keep_in is not None:
            keep_block(keep_in, start, images, attacked, labels, outcome)
        outcome.seconds += time.monotonic() - began
        yield outcome


def generator_at(seed, start):
    """The generator for the images from number `start` on: what one gets does not depend on the blocks."""
    generator = utils.generator(seed, "evaluation")
    torch.randint(2**32, (start,), generator=generator)  # an attack takes one number an image
    return generator


def try_block(target, trial, images, labels, generator, outcome):
    """Attack one block, check and judge the result, extend `outcome` by it and return the images."""
    attacks.check_pixels(images)
    zeros, attacked = attacks.ZeroGradients(), images
    if trial.attack is not None:
        attacked = trial.attack(target, images, labels, generator, zeros)
    check_result(attacked, images, trial.epsilon if trial.attack is not None else 0.0, trial.bounded)
    with torch.no_grad():
        logits = target.logits(attacked)
        change = (attacked.double() - images.double()).flatten(1)
    nothing, whens = torch.zeros_like(labels, dtype=torch.bool), ("first", "ever", "always")
    outcome.gradients = outcome.gradients or zeros.first is not None
    outcome.low = min(outcome.low, attacked.min().item())
    outcome.high = max(outcome.high, attacked.max().item())
    outcome.extend(
        predicted=logits.argmax(1),
        correct=~attacks.misclassified(logits, labels),
        margin=-attacks.margin(logits, labels),
        linf=change.abs().amax(1),
        l2=change.norm(dim=1),
        **{f"zero_{when}": nothing if zeros.first is None else getattr(zeros, when) for when in whens},
    )
    return attacked


def check_result(attacked, images, epsilon, bounded=True):
    """Raise ValueError when images hold NaN, leave [0, 1], or lie farther than `epsilon` away."""
    if attacked.isnan().any():
        raise ValueError("an attack made NaN; its result cannot be counted")
    if attacked.min() < 0 or attacked.max() > 1:
        raise ValueError(f"an attack left [0, 1]: [{attacked.min():.4g}, {attacked.max():.4g}]")
    farthest = (attacked.double() - images.double()).abs().max()
    if bounded and farthest > epsilon:
        raise ValueError(f"an attack went {farthest:.9g} far, beyond epsilon {epsilon:.9g}")


def keep_block(folder, start, images, attacked, labels, outcome):
    """Write a block's images, float32 in [0, 1], to FOLDER/NNNNN.pt, N being the first image's index."""
    path = Path(folder) / f"{start:05d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    block = {"index": start, "labels": labels.cpu().clone(), "predicted": outcome.predicted[start:].clone()}
    block |= {"images": images.cpu().contiguous(), "adversarial": attacked.cpu().contiguous()}
    with utils.replacing(path) as temporary:
        torch.save(block, temporary)


class Progress:
    """The outcomes so far, kept in a file beside the results so that a stopped evaluation goes on."""

    def __init__(self, results, fingerprint):
        self.path, self.fingerprint, self.outcomes = Path(f"{results}.partial"), fingerprint, {}
        self.saved = time.monotonic()

    def open(self, resume, overwrite=False):
        """Take over the outcomes of a stopped evaluation, if there is one and `resume` says so.

        Raises CheckpointError when it had other settings, FileSystemError when neither says what to do.
        """
        if not self.path.exists() or (overwrite and not resume):
            return
        if not resume:
            raise utils.FileSystemError(
                f"{self.path}: a stopped evaluation; --resume goes on with it, --overwrite starts anew"
            )
        state = checkpoints.load(self.path)
        before = state.get("fingerprint", {})
        if before != self.fingerprint:
            names = [n for n in self.fingerprint if before.get(n) != self.fingerprint[n]]
            raise utils.CheckpointError(
                f"{self.path}: begun with another {', '.join(names)}; give the old ones, or --overwrite"
            )
        for sha256, trials in state["outcomes"].items():
            self.outcomes[sha256] = {key: Outcome(**value) for key, value in trials.items()}
        images = sum(len(outcome) for trials in self.outcomes.values() for outcome in trials.values())
        utils.say(f"resumed {self.path}: {images:,} outcomes are there already")

    def of(self, target, trial):
        """The outcome of a trial on a target, empty where there is none yet."""
        return self.outcomes.setdefault(target.sha256, {}).setdefault(trial.key, Outcome())

    def save(self):
        outcomes = {
            sha256: {key: vars(outcome) for key, outcome in trials.items()}
            for sha256, trials in self.outcomes.items()
        }
        checkpoints.save({"fingerprint": self.fingerprint, "outcomes": outcomes}, self.path, False)
        self.saved = time.monotonic()

    def remove(self):
        self.path.unlink(missing_ok=True)


def fingerprint(config, dataset, targets, source=None):
    """What must agree for the outcomes of a stopped evaluation to be taken over."""
    settings = cli.config_dict(config)
    if "autoattack" not in config.attacks:  # the one whose seed goes by block
        del settings["batch_size"]
    return {
        "format": FORMAT,
        **{name: value for name, value in settings.items() if name not in FREE_ON_RESUME},
        "checkpoints": [target.sha256 for target in targets],
        "source_checkpoint": source.sha256 if source else None,
        "data": dataset.describe(),
    }


def measure_all(config, targets, split, trials, progress):
    """Try every trial on every target into `progress`, which is saved now and then, and in the end.

    Raises Interrupted on SIGINT or SIGTERM, with what is done saved.
    """
    with utils.StopSignals() as stop:
        for target in targets:
            for trial in trials:
                if trial.applies_to(target):
                    outcome = progress.of(target, trial)
                    _measure_one(config, target, split, trial, outcome, progress, stop)
    progress.save()  # a report that cannot be written must not cost the measurements


def _measure_one(config, target, split, trial, outcome, progress, stop):
    images = len(trial.of(split))
    keep_in = images_folder(config, target, trial)
    steps = {"batch_size": config.batch_size, "seed": config.seed, "keep_in": keep_in}
    blocks = measure(target, split, trial, outcome, **steps)
    total, start = -(-images // config.batch_size), len(outcome) // config.batch_size
    for _ in utils.progress(blocks, total, f"{target.label}: {trial.title}", start):
        if stop.received or time.monotonic() - progress.saved > SAVE_EVERY:
            progress.save()
        if stop.received:
            raise utils.Interrupted(
                stop.received,
                f"incomplete: stopped at {target.label}, {trial.title}, {len(outcome):,} of {images:,} "
                f"images; kept in {progress.path}, --resume goes on",
            )


def images_folder(config, target, trial):
    """Where the images of a trial are kept; None where they are not asked for."""
    folder = getattr(config, "save_images", None)
    if folder is None or trial.attack is None or trial.limit is not None or trial.curve:
        return None
    return Path(folder) / f"{Path(target.path).name.split('.')[0]}-{target.sha256[:8]}" / trial.key


def kept_folders(config, targets, trials):
    """The folders in which a finished evaluation has kept images."""
    folders = (images_folder(config, target, trial) for target in targets for trial in trials)
    return [folder for folder in folders if folder is not None and folder.is_dir()]
