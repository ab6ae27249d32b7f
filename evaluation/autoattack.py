"""AutoAttack (Croce & Hein 2020) by its authors' reference implementation, which is an optional package."""

import contextlib
import copy
import logging

import torch

import utils


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


def find():
    """Return the class AutoAttack; UsageError when it is not installed."""
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise utils.UsageError(
            "--attacks autoattack: not installed; pip install pyautoattack, or leave it out"
        ) from None
    return AutoAttack


def run(network, images, labels, epsilon, *, generator, log):
    """Images after the standard version of AutoAttack; its messages are appended to the file `log`.

    With less than ten classes, four at least, the targeted attacks take all there are as targets.
    """
    model, images = Logits(network), images.contiguous()
    seed = int(torch.randint(2**31, (), generator=generator))
    options = {"norm": "Linf", "eps": epsilon, "seed": seed, "version": "standard", "device": images.device}
    with appending(logging.getLogger("auto-attack"), log):
        adversary = find()(model, **options)
        with torch.no_grad():
            targets = min(9, model(images[:1]).shape[1] - 1)
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
        found, _ = adversary.run_standard_evaluation(images, labels, batch_size=len(images))
    return into_ball(found, images, epsilon)


@contextlib.contextmanager
def appending(logger, path):
    """Within it everything that `logger` says is appended to a file, and goes nowhere else."""
    handler, before = logging.FileHandler(path, encoding="utf-8"), (logger.level, logger.propagate)
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
