"""The attacks of an evaluation: what their names on the command line mean, and with which settings.

`table` makes the trials of the main table, `curves` those against epsilon and the number of steps.
"""

import contextlib
import copy
import importlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import attacks
import utils
from evaluation import Trial

CLEAN = "clean"  # the trial that changes nothing
PGD_STEP = 2 / 255  # the released step of PGD; BIM and MIM take epsilon / num_steps
TITLES = {
    "fgsm": "FGSM",
    "bim": "BIM",
    "mim": "MIM",
    "pgd": "PGD",
    "pgd-margin": "PGD margin",
    "pgd-dlr": "PGD DLR",
    "apgd-ce": "APGD-CE",
    "apgd-dlr": "APGD-DLR",
    "square": "Square",
    "cw": "C&W-L2",
    "noise": "Noise",
    "transfer": "Transfer",
    "joint": "Joint loss",
    "prototype": "Prototype",
    "autoattack": "AutoAttack",
}
ATTACKS = tuple(TITLES)
LEAST_CLASSES = {"pgd-dlr": 3, "apgd-dlr": 3, "autoattack": 4}  # of the logits that a loss sorts; else 2
LOSSES = {  # that PGD raises under its names
    "pgd": "cross-entropy",
    "pgd-margin": "logit margin",
    "pgd-dlr": "DLR loss",
    "joint": "joint loss of the checkpoint",
    "prototype": "margin of the distances to the prototypes",
}


def in_255ths(value):
    """A distance in pixel units as a multiple of 1/255."""
    return f"{255 * value:.4g}/255"


# ---------------------------------------------------------------- trials


def check(config):
    """Raise UsageError for options that make no sense, before anything is read."""
    if config.restarts > 1 and not config.random_start and not set(config.attacks) & {"apgd-ce", "apgd-dlr"}:
        raise utils.UsageError(f"--restarts {config.restarts}: would repeat one run; add --random-start")
    if "joint" in config.attacks and config.predict == "prototype":
        raise utils.UsageError("--attacks joint: is a loss on the logits; --predict softmax, or prototype")
    if "transfer" in config.attacks and config.source_checkpoint is None:
        raise utils.UsageError("--attacks transfer: needs --source-checkpoint, the network to make images on")
    if "autoattack" in config.attacks:
        find_autoattack()


def table(config, num_classes, source=None):
    """The trials of the main table: no attack, then `config.attacks` in their order, each once.

    `source`: the Target whose adversarial images `transfer` carries over. Raises UsageError for an attack
    that `num_classes` are too few for.
    """
    _check_classes(config.attacks, num_classes)
    named = dict.fromkeys(config.attacks)
    return [clean(), *(make(name, config, source) for name in named)]


def _check_classes(names, num_classes):
    for name in names:
        least = LEAST_CLASSES.get(name, 2)
        if num_classes < least:
            raise utils.UsageError(
                f"--attacks {name}: needs {least} classes or more, the data have {num_classes}"
            )


def clean(limit=None):
    return Trial(CLEAN, "No attack", 0.0, limit=limit)


def make(name, config, source=None):
    """The trial that a name on the command line means."""
    if name in LOSSES:
        return gradient_descent(name, config)
    return _MAKERS[name](name, config, source)


def gradient_descent(name, config, *, epsilon=None, **changes):
    """PGD on the loss that `name` means, with the settings of `config` but for `changes`."""
    epsilon = config.epsilon if epsilon is None else epsilon
    options = {
        "num_steps": config.num_steps,
        "step_size": config.step_size or PGD_STEP,
        "random_start": config.random_start,
        "restarts": config.restarts if config.random_start else 1,
        **changes,
    }

    def attack(target, images, labels, generator, trace):
        extra = {"generator": generator, "trace": trace, "loss": loss_of(name, target)}
        return attacks.pgd(target.view, images, labels, epsilon, **extra, **options)

    start = f"random start, restarts {options['restarts']}" if options["random_start"] else "no random start"
    settings = (
        f"{TITLES[name]}: {_steps(options['num_steps'], options['step_size'], epsilon)}, {start}"
        f"{'' if name == 'pgd' else ', on the ' + LOSSES[name]}"
    )
    prototypes = name in ("joint", "prototype")
    return Trial(name, TITLES[name], epsilon, attack, settings, needs_prototypes=prototypes)


def _steps(num_steps, step_size, epsilon):
    """The steps of an attack, with a word where they cannot reach the end of the ball."""
    reach = num_steps * step_size
    short = f" ({in_255ths(reach)} in all, less than epsilon)" if reach < epsilon * (1 - 1e-9) else ""
    return f"{num_steps} steps of {in_255ths(step_size)}{short}"


def loss_of(name, target):
    """The loss that PGD raises: (outputs, labels) -> (N,)."""
    if name == "joint":
        return target.prototypes.per_image
    if name == "prototype":
        return lambda outputs, labels: attacks.margin(target.prototypes.nearest(outputs), labels)
    losses = {"pgd": attacks.cross_entropy, "pgd-margin": attacks.margin, "pgd-dlr": attacks.dlr}
    return losses[name]


def _plain(name, config, source):
    """FGSM, BIM or MIM as released."""
    options = {} if name == "fgsm" else {"step_size": config.step_size, "num_steps": config.num_steps}
    if name == "mim":
        options["decay"] = config.decay

    def attack(target, images, labels, generator, trace):
        return attacks.ATTACKS[name](target.view, images, labels, config.epsilon, trace=trace, **options)

    return Trial(name, TITLES[name], config.epsilon, attack, _plain_settings(name, config))


def _plain_settings(name, config):
    if name == "fgsm":
        return "FGSM: one step"
    step_size = config.step_size or config.epsilon / config.num_steps
    decay = f", decay {config.decay:g}" if name == "mim" else ""
    return f"{TITLES[name]}: {_steps(config.num_steps, step_size, config.epsilon)}{decay}"


def _apgd(name, config, source):
    loss = attacks.dlr if name == "apgd-dlr" else attacks.cross_entropy
    options = {"num_steps": config.apgd_steps, "restarts": config.restarts, "loss": loss}

    def attack(target, images, labels, generator, trace):
        extra = {"generator": generator, "trace": trace}
        return attacks.apgd(target.view, images, labels, config.epsilon, **extra, **options)

    settings = f"{TITLES[name]}: {config.apgd_steps} steps, restarts {config.restarts}"
    return Trial(name, TITLES[name], config.epsilon, attack, settings)


def square(config, num_queries):
    """The Square attack, at most `num_queries` an image."""

    def attack(target, images, labels, generator, trace):
        options = {"num_queries": num_queries, "generator": generator}
        return attacks.square(target.view, images, labels, config.epsilon, **options)

    settings = f"Square: {num_queries:,} queries, scores alone"
    return Trial("square", TITLES["square"], config.epsilon, attack, settings)


def _cw(name, config, source):
    options = {"num_steps": config.cw_steps, "lr": config.cw_lr}

    def attack(target, images, labels, generator, trace):
        return attacks.cw(target.view, images, labels, **options)

    settings = (
        f"C&W-L2: {config.cw_steps} steps, lr {config.cw_lr:g}, c 1 without a search, confidence 0, at any "
        "distance; Worst counts what it finds within epsilon"
    )
    return Trial(name, TITLES[name], config.epsilon, attack, settings, bounded=False)


def _noise(name, config, source):
    def attack(target, images, labels, generator, trace):
        return attacks.noise(target.view, images, labels, config.epsilon, generator=generator)

    return Trial(name, TITLES[name], config.epsilon, attack, "Noise: each pixel up or down at random")


def _transfer(name, config, source):
    options = {"step_size": config.step_size, "num_steps": config.num_steps, "decay": config.decay}

    def attack(target, images, labels, generator, trace):
        return attacks.mim(source.view, images, labels, config.epsilon, **options)

    settings = f"Transfer: made on {source.path} by MIM's settings"
    return Trial(name, TITLES[name], config.epsilon, attack, settings)


def _autoattack(name, config, source):
    results = Path(config.results)
    log = results.with_name(results.name.removesuffix(".json") + ".autoattack.log")

    def attack(target, images, labels, generator, trace):
        seed = int(torch.randint(2**31, (), generator=generator))
        return run_autoattack(target.view, images, labels, config.epsilon, seed=seed, log=log)

    settings = f"AutoAttack: the reference implementation, standard version, its log in {log}"
    return Trial(name, TITLES[name], config.epsilon, attack, settings)


_MAKERS = {
    **dict.fromkeys(("fgsm", "bim", "mim"), _plain),
    **dict.fromkeys(("apgd-ce", "apgd-dlr"), _apgd),
    "square": lambda name, config, source: square(config, config.num_queries),
    "cw": _cw,
    "noise": _noise,
    "transfer": _transfer,
    "autoattack": _autoattack,
}


# ---------------------------------------------------------------- curves


class Point(NamedTuple):
    """One point of a curve: which attack, against what (`epsilon` or `steps`), where, and the trial."""

    attack: str
    axis: str
    value: float
    trial: Trial


def curves(config, num_classes):
    """The points of accuracy against epsilon and against the number of steps that `config` asks for.

    Against epsilon the step is 2.5 * epsilon / num_steps (Madry et al. 2018; 2/255 at 8/255 in 10 steps),
    against the number of steps it is that of the table.
    """
    if config.epsilons or config.step_counts:
        _check_classes(config.curve_attacks, num_classes)
    points = []
    for name in dict.fromkeys(config.curve_attacks):
        for epsilon in sorted(set(config.epsilons)):
            step_size = min(2.5 * epsilon / config.num_steps, 1.0) or PGD_STEP
            trial = gradient_descent(name, config, epsilon=epsilon, step_size=step_size)
            points.append(Point(name, "epsilon", epsilon, trial))
        for steps in sorted(set(config.step_counts)):
            points.append(Point(name, "steps", steps, gradient_descent(name, config, num_steps=steps)))
    return [
        p._replace(trial=replace(p.trial, key=f"{p.attack}@{p.axis}={p.value:.9g}", curve=True))
        for p in points
    ]


# ---------------------------------------------------------------- the reference implementation

AUTOATTACK_PACKAGES = ("pyautoattack", "autoattack")


class Logits(torch.nn.Module):
    """A frozen copy of a network whose forward gives the logits alone, in plain memory order.

    The reference implementation flattens gradients with `view`, which fails on channels-last ones.
    """

    def __init__(self, network):
        super().__init__()
        self.network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)

    def forward(self, images):
        outputs = self.network(images.contiguous())
        return getattr(outputs, "logits", outputs)


def find_autoattack():
    """Return (name of the package, its AutoAttack class); UsageError when none is installed."""
    for name in AUTOATTACK_PACKAGES:
        with contextlib.suppress(ImportError):
            return name, importlib.import_module(name).AutoAttack
    raise utils.UsageError("--attacks autoattack: not installed; pip install pyautoattack, or leave it out")


def run_autoattack(network, images, labels, epsilon, *, seed, log):
    """Images after the standard version of AutoAttack (Croce & Hein 2020); its messages go to the file `log`.

    With less than ten classes, four at least, the targeted attacks take all there are as targets.
    """
    name, autoattack = find_autoattack()
    model, images = Logits(network), images.contiguous()
    options = {"norm": "Linf", "eps": epsilon, "seed": seed, "version": "standard", "device": images.device}
    extra = {} if name == "pyautoattack" else {"log_path": str(log), "verbose": True}
    batch = {"batch_size" if name == "pyautoattack" else "bs": len(images)}
    with appending(logging.getLogger("auto-attack"), log) if not extra else contextlib.nullcontext():
        adversary = autoattack(model, **options, **extra)
        with torch.no_grad():
            targets = min(9, model(images[:1]).shape[1] - 1)
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
        found = adversary.run_standard_evaluation(images, labels, **batch)
    found = found[0] if isinstance(found, tuple) else found
    return into_ball(found, images, epsilon)


@contextlib.contextmanager
def appending(logger, path):
    """Within it everything that `logger` says is appended to a file, and goes nowhere else."""
    handler, before = logging.FileHandler(path, encoding="utf-8"), (logger.level, logger.propagate)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]


def into_ball(found, images, epsilon):
    """`found` moved to within `epsilon` of `images` and into [0, 1], also in float arithmetic.

    Other libraries go farther by their rounding errors.
    """
    exact = images.double()
    near = found.double().clamp(exact - epsilon, exact + epsilon).clamp(0, 1).to(images.dtype)
    outside = (near.double() - exact).abs() > epsilon
    return torch.where(outside, torch.nextafter(near, images), near)
