"""Measuring: every trial on every target, block by block, so that it can be stopped and go on anywhere."""

import time
from pathlib import Path

import torch

import attacks
import data
import distributed
import utils

from .exact import exact_float32, memory_format
from .outcome import Outcome

SAVE_EVERY = 60.0  # seconds between saves of what is done


class Watch(attacks.ZeroGradients):
    """A trace that also keeps, for each image, the first point at which the attacked network was wrong.

    fooled: which images have such a point, (N,) bool. points: N x C x H x W. Both are None before the first
    forward pass.
    """

    fooled = points = None

    def watching(self, network, labels):
        """Return `network` as a function that also notes where each forward pass is wrong."""

        def model_fn(images):
            outputs = network(images)
            wrong = attacks.misclassified(outputs, labels)
            if self.fooled is None:
                self.fooled, self.points = torch.zeros_like(wrong), images.detach()
            new = (wrong & ~self.fooled)[:, None, None, None]
            self.points = torch.where(new, images.detach(), self.points)
            self.fooled = self.fooled | wrong
            return outputs

        return model_fn

    def lost(self, target, labels, right):
        """Return which images, (N,) bool, are `right` in the end but were wrong on the way.

        The target's own model decides on the points that are kept.
        """
        if self.fooled is None:
            return torch.zeros_like(right)
        lost = self.fooled & right
        if lost.any():
            lost[lost.clone()] = attacks.misclassified(target.logits(self.points[lost]), labels[lost])
        return lost


def eight_bit(attacked, images, epsilon):
    """Return `attacked` as a PNG holds it: each pixel is a multiple of 1/255 within `epsilon` of `images`.

    It is the nearest such multiple or, where there is none within epsilon, the nearest of all.
    """
    levels, exact = (255 * attacked.double()).round(), images.double()
    slack = 1e-4  # of a level: float32 has no multiples of 1/255
    lowest, highest = (255 * (exact - epsilon) - slack).ceil(), (255 * (exact + epsilon) + slack).floor()
    levels = torch.where(lowest <= highest, levels.clamp(lowest, highest), levels)
    return data.to_float(levels.clamp(0, 255).to(torch.uint8)).to(images.dtype)


def generator_at(seed, start):
    """Return the generator for the images from `start` on: no image's numbers depend on the blocks."""
    generator = utils.generator(seed, "evaluation")
    torch.randint(2**32, (start,), generator=generator)  # an attack takes one number for each image
    return generator


def attack_block(target, trial, split, start, batch_size, seed):
    """Attack the `batch_size` images of `split` from number `start` on.

    Returns (images, adversarial images, labels, the Watch on the attack); images are float in [0, 1],
    N x C x H x W. What an image becomes does not depend on the block that it is in. Raises ValueError when a
    result holds NaN, or leaves [0, 1] or the ball.
    """
    block = slice(start, start + batch_size)
    labels = split.labels[block]
    images = data.to_float(split.images[block])
    images = images.contiguous(memory_format=memory_format(images.device))
    zeros, attacked = Watch(), images
    if trial.attack is not None:
        with exact_float32():
            attacked = trial.attack(target, images, labels, generator_at(seed, start), zeros)
    check_result(attacked, images, trial.epsilon, trial.bounded)
    return images, attacked, labels, zeros


def check_result(attacked, images, epsilon, bounded=True):
    """Raise ValueError when images hold NaN, leave [0, 1], or lie farther than `epsilon` away."""
    if attacked.isnan().any():
        raise ValueError("an attack made NaN; its result cannot be counted")
    if attacked.min() < 0 or attacked.max() > 1:
        raise ValueError(f"an attack left [0, 1]: [{attacked.min():.4g}, {attacked.max():.4g}]")
    farthest = (attacked.double() - images.double()).abs().max()
    if bounded and farthest > epsilon:
        raise ValueError(f"an attack went {farthest:.9g} far, beyond epsilon {epsilon:.9g}")


def check_scores(logits, labels, path):
    """Raise CheckpointError unless a network's scores of clean images, and their margins, are finite.

    NaN counts as wrong, so without this check the network would only seem to be a bad one.
    """
    if not (logits.isfinite().all() and attacks.margin(logits, labels).isfinite().all()):
        raise utils.CheckpointError(
            f"{path}: its class scores of clean images are not finite, or too far apart; its weights are too "
            "large: use another copy, or an older file"
        )


def measure(target, split, trial, outcome, *, batch_size, seed, keep_in=None, round_too=False):
    """Try `trial` on `split`, block by block; extend `outcome` from where it stands, and yield it each time.

    Each rank takes a block at a time. `keep_in`: a folder for each block's images. With `round_too`, and for
    images that are kept, the network also judges them as a PNG holds them. Raises ValueError as
    `attack_block` does, and CheckpointError as `check_scores` does.
    """
    split = trial.of(split)
    if keep_in is not None and not len(outcome):
        for old in Path(keep_in).glob("*.pt"):  # of other settings, whose blocks may be others
            old.unlink(missing_ok=True)
        distributed.agree(0)
    for first in range(len(outcome), len(split), distributed.world * batch_size):
        start, found = first + distributed.rank * batch_size, Outcome()
        if start < len(split):
            began = time.monotonic()
            images, attacked, labels, zeros = attack_block(target, trial, split, start, batch_size, seed)
            with exact_float32(), torch.no_grad():
                logits = target.logits(attacked)
                if trial.attack is None:
                    check_scores(logits, labels, target.path)
                    found.see_clean(logits, target.logits(images))
                more = {"lost": zeros.lost(target, labels, ~attacks.misclassified(logits, labels))}
                if round_too:
                    rounded = target.logits(eight_bit(attacked, images, trial.radius))
                    more["right_8bit"] = ~attacks.misclassified(rounded, labels)
                if keep_in is not None:
                    block = {"images": images, "adversarial": attacked, "labels": labels}
                    block["predicted"] = logits.argmax(1)
                    _keep_block(keep_in, start, target, trial.radius, block)
            found.extend(images, attacked, labels, logits, zeros, **more)
            found.seconds = time.monotonic() - began
        for block in distributed.gather(found):
            outcome.add(block)
        yield outcome


def _keep_block(folder, index, target, radius, block):
    """Write a block's images, float32 in [0, 1], and the target's predictions to FOLDER/INDEX.pt.

    INDEX, five digits, is the number of the first image. `predicted_8bit` holds the predictions for the
    adversarial images as a PNG holds them.
    """
    path = Path(folder) / f"{index:05d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = eight_bit(block["adversarial"], block["images"], radius)
    for name, images in (("predicted_clean", block["images"]), ("predicted_8bit", rounded)):
        block[name] = target.logits(images).argmax(1)
    kept = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in block.items()}
    with utils.replacing(path) as temporary:
        torch.save({"index": index, **kept}, temporary)


def measure_each(results):
    """Fill `results`; yield (target, trial, its outcome) after each block of images."""
    config, split = results.config, results.dataset.test
    steps = {"batch_size": config.batch_size, "seed": config.seed, "round_too": config.eight_bit}
    for target, trial in results.pairs():
        outcome, images = results.of(target, trial), len(trial.of(split))
        folder = results.images_folder(target, trial)
        blocks = measure(target, split, trial, outcome, **steps, keep_in=folder)
        size = distributed.world * config.batch_size
        total, start = -(-images // size), len(outcome) // size
        for _ in utils.progress(blocks, total, f"{target.label}: {trial.title}", start):
            yield target, trial, outcome


def measure_all(results):
    """Fill `results`, which is saved now and then, and in the end.

    Raises Interrupted on SIGINT or SIGTERM, with what is done saved.
    """
    with utils.StopSignals() as stop:
        for target, trial, outcome in measure_each(results):
            images = len(trial.of(results.dataset.test))
            # Also at once: by this file a killed evaluation knows that its log and its images are its own.
            late = time.monotonic() - results.saved > SAVE_EVERY or not results.path.exists()
            signum, late = distributed.agree(stop.received or 0, late)
            if signum or late:
                results.save()
            if signum:
                raise utils.Interrupted(
                    signum,
                    f"incomplete: stopped at {target.label}, {trial.title}, {len(outcome):,} of "
                    f"{images:,} images; kept in {results.path}, --resume goes on",
                )
    results.save()  # a report that cannot be written must not cost the measurements
