"""The one registry of attacks: what their names on the command line mean, and with which settings."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import attacks

from . import autoattack

PGD_STEP = 2 / 255  # the released step of PGD; BIM and MIM take epsilon / num_steps


def in_255ths(value):
    """A distance in pixel units as a multiple of 1/255."""
    return f"{255 * value:.4g}/255"


# ---------------------------------------------------------------- settings: Config -> (keywords, in words)


def _steps(num_steps, step_size, epsilon):
    """The steps of an attack, with a word where they cannot reach the end of the ball."""
    reach = num_steps * step_size
    short = f" ({in_255ths(reach)} in all, less than epsilon)" if reach < epsilon * (1 - 1e-9) else ""
    return f"{num_steps} steps of {in_255ths(step_size)}{short}"


def _fgsm(config):
    return {}, "one step"


def _bim(config):
    step_size = config.step_size or config.epsilon / config.num_steps
    words = _steps(config.num_steps, step_size, config.epsilon)
    return {"step_size": config.step_size, "num_steps": config.num_steps}, words


def _mim(config):
    options, words = _bim(config)
    return {**options, "decay": config.decay}, f"{words}, decay {config.decay:g}"


def _pgd(config):
    options = {"num_steps": config.num_steps, "step_size": config.step_size or PGD_STEP}
    words = _steps(config.num_steps, options["step_size"], config.epsilon)
    if not config.random_start:
        return options, f"{words}, no random start"
    options |= {"random_start": True, "restarts": config.restarts}
    return options, f"{words}, random start, restarts {config.restarts}"


def _apgd(config):
    options = {"num_steps": config.apgd_steps, "restarts": config.restarts}
    return options, f"{config.apgd_steps} steps, restarts {config.restarts}"


def _square(config):
    return {"num_queries": config.num_queries}, f"{config.num_queries:,} queries, scores alone"


def _cw(config):
    words = (
        f"{config.cw_steps} steps, lr {config.cw_lr:g}, c 1 without a search, confidence 0, at any "
        "distance; Worst counts what it finds within epsilon"
    )
    return {"num_steps": config.cw_steps, "lr": config.cw_lr}, words


def _noise(config):
    return {}, "each pixel up or down at random"


def _transfer(config):
    return _mim(config)[0], f"made on {config.source_checkpoint} by MIM's settings"


def _autoattack(config):
    results = Path(config.results)
    log = results.with_name(results.name.removesuffix(".json") + ".autoattack.log")
    return {"log": log}, f"the reference implementation, standard version, its log in {log}"


# ---------------------------------------------------------------- the registry


class Loss(NamedTuple):
    """What an attack raises: in words, and as a function, target -> (outputs, labels) -> (N,)."""

    words: str
    of: Callable


CROSS_ENTROPY = Loss("cross-entropy", lambda target: attacks.cross_entropy)
MARGIN = Loss("logit margin", lambda target: attacks.margin)
DLR = Loss("DLR loss", lambda target: attacks.dlr)
JOINT = Loss("joint loss of the checkpoint", lambda target: target.prototypes.per_image)
PROTOTYPE = Loss(
    "margin of the distances to the prototypes",
    lambda target: lambda outputs, labels: attacks.margin(target.prototypes.nearest(outputs), labels),
)


class Attack(NamedTuple):
    """What a name on the command line means.

    function: `function(network, images, labels, epsilon, **options) -> images`.
    settings: Config -> (its options, the same in words).
    loss: what it raises with the network's gradient, None for attacks that see no gradient.
    seeded: it draws random numbers. least_classes: its loss sorts so many logits.
    """

    title: str
    function: Callable
    settings: Callable
    loss: Loss | None = None
    seeded: bool = False
    least_classes: int = 2
    bounded: bool = True
    needs_prototypes: bool = False


ATTACKS = {
    "fgsm": Attack("FGSM", attacks.fgsm, _fgsm, CROSS_ENTROPY),
    "bim": Attack("BIM", attacks.bim, _bim, CROSS_ENTROPY),
    "mim": Attack("MIM", attacks.mim, _mim, CROSS_ENTROPY),
    "pgd": Attack("PGD", attacks.pgd, _pgd, CROSS_ENTROPY, seeded=True),
    "pgd-margin": Attack("PGD margin", attacks.pgd, _pgd, MARGIN, seeded=True),
    "pgd-dlr": Attack("PGD DLR", attacks.pgd, _pgd, DLR, seeded=True, least_classes=3),
    "apgd-ce": Attack("APGD-CE", attacks.apgd, _apgd, CROSS_ENTROPY, seeded=True),
    "apgd-dlr": Attack("APGD-DLR", attacks.apgd, _apgd, DLR, seeded=True, least_classes=3),
    "square": Attack("Square", attacks.square, _square, seeded=True),
    "cw": Attack("C&W-L2", attacks.cw, _cw, bounded=False),
    "noise": Attack("Noise", attacks.noise, _noise, seeded=True),
    "transfer": Attack("Transfer", attacks.mim, _transfer),
    "joint": Attack("Joint loss", attacks.pgd, _pgd, JOINT, seeded=True, needs_prototypes=True),
    "prototype": Attack("Prototype", attacks.pgd, _pgd, PROTOTYPE, seeded=True, needs_prototypes=True),
    "autoattack": Attack("AutoAttack", autoattack.run, _autoattack, seeded=True, least_classes=4),
}
CURVE_ATTACKS = tuple(name for name, attack in ATTACKS.items() if attack.function is attacks.pgd)
