"""What `robustness.py` measures with: outcomes per image, checks of every attack's result, reports."""

import dataclasses
import json
import time
from pathlib import Path

import torch
from torch import Tensor

import attacks
import data
import training
import utils
from resnet_model import folded, resnet

CLEAN = "clean"  # the attack that changes nothing
NAMES = {CLEAN: "No attack", "fgsm": "FGSM", "bim": "BIM", "mim": "MIM", "pgd": "PGD"}  # table headings
LABELS = {  # what a checkpoint's row is called, by the script that made it
    "softmax_training": "Softmax",
    "pcl_training": "PCL",
    "pcl_training_adversarial_fgsm": "PCL + FGSM images",
    "pcl_training_adversarial_pgd": "PCL + PGD images",
}
SAVE_EVERY = 60.0  # seconds between saves of what is done
PGD_STEP = 2 / 255  # the released step of PGD; BIM and MIM take epsilon / num_steps


# ---------------------------------------------------------------- what is attacked


@dataclasses.dataclass(frozen=True)
class Target:
    """A checkpoint to be measured: its network in eval mode, and where it comes from."""

    path: str
    sha256: str
    label: str
    depth: int
    model: torch.nn.Module
    origin: dict  # the script, settings and data behind it, where the checkpoint says


def load_target(path, device, classes):
    """Read a checkpoint; depth and class count are its own. Raises CheckpointError."""
    state, weights, network = training.read_network(path)
    training.check_classes(state, path, classes)
    if network["num_classes"] != len(classes):
        raise utils.CheckpointError(
            f"{path}: a network of {network['num_classes']} classes, but the data set has {len(classes)}"
        )
    model = resnet(**network)
    model.load_state_dict(weights)
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    label = LABELS.get(state.get("script"), Path(path).name.split(".")[0])
    kept = {name: state[name] for name in ("script", "epoch", "config", "data", "versions") if name in state}
    return Target(str(path), utils.sha256(path), label, network["depth"], model, kept)


def choose_attacks(config):
    """Map names to functions (model_fn, images, labels, generator, trace); `clean`, the first, to None."""
    iterative = {"step_size": config.step_size, "num_steps": config.num_steps}
    options = {
        "fgsm": {},
        "bim": iterative,
        "mim": {**iterative, "decay": config.decay},
        "pgd": {
            "num_steps": config.num_steps,
            "step_size": config.step_size or PGD_STEP,
            "random_start": config.random_start,
            "restarts": config.restarts,
        },
    }

    def bound(name):
        def attack(model_fn, images, labels, generator, trace):
            extra = {"generator": generator} if name == "pgd" else {}
            function = attacks.ATTACKS[name]
            return function(model_fn, images, labels, config.epsilon, trace=trace, **options[name], **extra)

        return attack

    return {CLEAN: None, **{name: bound(name) for name in config.attacks}}


# ---------------------------------------------------------------- measuring


@dataclasses.dataclass
class Outcome:
    """What one attack did to the first images of a split, image by image, and the checks of its result."""

    correct: Tensor  # bool, one per image so far: still classified right
    zero_gradient: Tensor  # bool, one per image so far: the first gradient was exactly zero
    max_delta: float = 0.0  # largest |adversarial - clean|
    low: float = 1.0  # smallest and largest pixel of the adversarial images
    high: float = 0.0
    seconds: float = 0.0

    @classmethod
    def empty(cls):
        return cls(torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool))

    @property
    def accuracy(self):
        """Percent of the images so far that are still classified right."""
        return 100 * self.correct.float().mean().item()


def measure(target, split, attack, outcome, *, epsilon, batch_size, seed):
    """Attack `split` block by block from where `outcome` stands; yield after each block, `outcome` extended.

    Float32 in eval mode. The attack sees the network with its batch norms folded (the same function up to
    rounding, faster); what it made is judged by the network itself. Raises ValueError when a result leaves
    the ball or [0, 1].
    """
    model_fn = folded(target.model).to(memory_format=torch.channels_last)
    first = len(outcome.correct) // batch_size
    for block, images, labels in _blocks(split, batch_size, first):
        started = time.monotonic()
        images = data.to_float(images).contiguous(memory_format=torch.channels_last)
        zeros = attacks.ZeroGradients()
        attacked = images
        if attack is not None:
            attacked = attack(model_fn, images, labels, utils.generator(seed, "evaluation", block), zeros)
        check_result(attacked, images, epsilon if attack is not None else 0.0)
        with torch.no_grad():
            correct = target.model.logits(attacked).argmax(1) == labels
        zero = zeros.first if zeros.first is not None else torch.zeros_like(correct)
        outcome.correct = torch.cat([outcome.correct, correct.cpu()])
        outcome.zero_gradient = torch.cat([outcome.zero_gradient, zero.cpu()])
        outcome.max_delta = max(outcome.max_delta, (attacked - images).abs().max().item())
        outcome.low = min(outcome.low, attacked.min().item())
        outcome.high = max(outcome.high, attacked.max().item())
        outcome.seconds += time.monotonic() - started
        yield outcome


def _blocks(split, batch_size, first):
    """(index, images, labels) of each block of `batch_size` images from block `first` on."""
    for start in range(first * batch_size, len(split), batch_size):
        yield (
            start // batch_size,
            split.images[start : start + batch_size],
            split.labels[start : start + batch_size],
        )


def check_result(attacked, images, epsilon):
    """Raise ValueError when adversarial images hold NaN, leave [0, 1], or lie farther than `epsilon` away."""
    if attacked.isnan().any():
        raise ValueError("an attack made NaN; its result cannot be counted")
    if attacked.min() < 0 or attacked.max() > 1:
        raise ValueError(f"an attack left [0, 1]: [{attacked.min():.4g}, {attacked.max():.4g}]")
    if (attacked.double() - images.double()).abs().max() > epsilon:
        raise ValueError(
            f"an attack went {(attacked - images).abs().max():.6g} far, beyond epsilon {epsilon:.6g}"
        )


class Progress:
    """The outcomes so far, kept in a file beside the results so that a stopped evaluation goes on."""

    def __init__(self, results, fingerprint):
        self.path, self.fingerprint, self.outcomes = Path(f"{results}.partial"), fingerprint, {}
        self.saved = time.monotonic()

    def resume(self):
        """Take over the outcomes of a stopped evaluation; CheckpointError when it had other settings."""
        if not self.path.exists():
            return
        state = utils.load_checkpoint(self.path)
        before = state.get("fingerprint", {})
        if before != self.fingerprint:
            names = [n for n in self.fingerprint if before.get(n) != self.fingerprint[n]]
            raise utils.CheckpointError(
                f"{self.path}: begun with another {', '.join(names)}; give the old ones, or no --resume"
            )
        self.outcomes = {tuple(key.split("/")): Outcome(**value) for key, value in state["outcomes"].items()}
        images = sum(len(outcome.correct) for outcome in self.outcomes.values())
        utils.say(f"resumed {self.path}: {images:,} outcomes are there already")

    def of(self, target, attack):
        return self.outcomes.setdefault((target.sha256, attack), Outcome.empty())

    def save(self):
        outcomes = {"/".join(key): vars(outcome) for key, outcome in self.outcomes.items()}
        utils.save_checkpoint({"fingerprint": self.fingerprint, "outcomes": outcomes}, self.path, False)
        self.saved = time.monotonic()

    def remove(self):
        self.path.unlink(missing_ok=True)


def fingerprint(config, dataset, targets):
    """What must agree for the outcomes of a stopped evaluation to be taken over."""
    settings = training.config_dict(config)
    free = ("data_dir", "checkpoints", "results", "resume", "device")
    return {
        **{name: value for name, value in settings.items() if name not in free},
        "checkpoints": [target.sha256 for target in targets],
        "data": training.describe(dataset),
    }


def measure_all(config, targets, split, chosen, progress):
    """Measure every target under every attack into `progress`, which is saved now and then.

    Raises Interrupted on SIGINT or SIGTERM, with what is done saved.
    """
    total = -(-len(split) // config.batch_size)
    with utils.StopSignals() as stop:
        for target in targets:
            for name, attack in chosen.items():
                outcome = progress.of(target, name)
                blocks = measure(
                    target, split, attack, outcome,
                    epsilon=config.epsilon, batch_size=config.batch_size, seed=config.seed,
                )  # fmt: skip
                start = len(outcome.correct) // config.batch_size
                for _ in utils.progress(blocks, total, f"{target.label}: {NAMES[name]}", start):
                    if stop.received or time.monotonic() - progress.saved > SAVE_EVERY:
                        progress.save()
                    if stop.received:
                        raise utils.Interrupted(
                            stop.received,
                            f"incomplete: stopped at {target.label}, {NAMES[name]}, {len(outcome.correct):,} "
                            f"of {len(split):,} images; kept in {progress.path}, --resume goes on",
                        )


# ---------------------------------------------------------------- reports


def to_markdown(targets, chosen, progress):
    """The table of the README: a row for each target, a column for each attack, accuracy in percent."""
    table = [["Training", *(NAMES[name] for name in chosen)]]
    for target in targets:
        table.append([target.label, *(f"{progress.of(target, name).accuracy:.2f}" for name in chosen)])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def footnotes(config, dataset, targets, chosen, progress):
    """The settings under a table, line by line, and what the results say of themselves."""
    images = f"{len(dataset.test):,} test images of {dataset.name}"
    ball = f"L-infinity, epsilon {in_255ths(config.epsilon)}"
    yield f"Accuracy in percent on {images}; {ball}; seed {config.seed}."
    small_step = in_255ths(config.step_size or config.epsilon / config.num_steps)
    start = f"random start, restarts {config.restarts}" if config.random_start else "no random start"
    settings = {
        "fgsm": "FGSM: one step",
        "bim": f"BIM: {config.num_steps} steps of {small_step}",
        "mim": f"MIM: {config.num_steps} steps of {small_step}, decay {config.decay:g}",
        "pgd": f"PGD: {config.num_steps} steps of {in_255ths(config.step_size or PGD_STEP)}, {start}",
    }
    yield "; ".join(settings[name] for name in chosen if name in settings) + "."
    for target in targets:
        outcomes = {name: progress.of(target, name) for name in chosen if name != CLEAN}
        frozen = ", ".join(
            f"{NAMES[n]} {100 * o.zero_gradient.float().mean():.2f} %" for n, o in outcomes.items()
        )
        largest = max((o.max_delta for o in outcomes.values()), default=0.0)
        lines = [f"{target.label}: {target.path}, depth {target.depth}, sha256 {target.sha256[:12]}"]
        if outcomes:
            lines.append(f"largest change {in_255ths(largest)}; first gradient exactly zero: {frozen}")
        yield "; ".join(lines) + "."


def in_255ths(value):
    """A distance in pixel units as a multiple of 1/255."""
    return f"{255 * value:.4g}/255"


def to_json(config, dataset, targets, chosen, progress):
    """Everything a reader needs to repeat or check the table, as JSON text."""
    checkpoints = []
    for target in targets:
        entry = {"path": target.path, "sha256": target.sha256, "label": target.label, "depth": target.depth}
        entry["origin"] = target.origin
        entry["attacks"] = {name: _summary(progress.of(target, name)) for name in chosen}
        checkpoints.append(entry)
    report = {
        "settings": training.config_dict(config),
        "data": training.describe(dataset),
        "checkpoints": checkpoints,
        "versions": utils.versions(),
    }
    return json.dumps(report, indent=2) + "\n"


def _summary(outcome):
    return {
        "accuracy": outcome.accuracy if len(outcome.correct) else None,
        "correct": int(outcome.correct.sum()),
        "images": len(outcome.correct),
        "zero_gradient": int(outcome.zero_gradient.sum()),
        "max_delta": outcome.max_delta,
        "range": [outcome.low, outcome.high],
        "seconds": round(outcome.seconds, 2),
    }
