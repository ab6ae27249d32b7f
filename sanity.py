"""Checks of an evaluation: is it the network that withstands an attack, or the attack that fails?

`trials` are the attacks that the checks need, on a few images; `check` reads their outcomes. After Carlini et
al., On Evaluating Adversarial Robustness (2019), Athalye et al., Obfuscated Gradients Give a False Sense of
Security (2018), and the flags of AutoAttack.
"""

import dataclasses
import itertools
from typing import NamedTuple

import torch

import data
import reports
import suite
from evaluation import exact_float32

FAR, EVERYWHERE = 64 / 255, 1.0  # radii at which hardly anything, and nothing, withstands
MORE = 5  # times as many steps where more steps must not matter
SQUARE_QUERIES = 1000
# In percent of the images: what is noise (two images always are), and what is a defect.
NOISE, DEFECT = 1.0, 5.0
HARDLY = 5.0  # percent right at FAR that still is close to none


class Finding(NamedTuple):
    """One check: its `name`, PASS, WARN or FAIL, what was seen, and what that means and asks for."""

    name: str
    status: str
    seen: str
    meaning: str

    def __str__(self):
        advice = "" if self.status == "PASS" else f"; {self.meaning}"
        return f"{self.status:4}  {self.name}: {self.seen}{advice}"


# ---------------------------------------------------------------- what the checks need


def trials(config, num_classes, source=None):
    """The attacks that `check` reads, by their part in it, on `config.sanity_images` images."""
    found = {"clean": suite.clean()}
    if config.epsilon > 0:
        found |= _attacks(config, num_classes, source)
    return {
        part: dataclasses.replace(
            trial, key=f"sanity {part}", title=f"sanity, {part}", limit=config.sanity_images
        )
        for part, trial in found.items()
    }


def _attacks(config, num_classes, source):
    steps = MORE * config.num_steps
    thorough = {"num_steps": steps, "random_start": True, "restarts": 2}
    found = {
        "noise": suite.make("noise", config),
        "one step": suite.make("fgsm", config),
        "pgd": suite.gradient_descent("pgd", config),
        "more": suite.gradient_descent("pgd", config, **thorough),
        "margin": suite.gradient_descent("pgd-margin", config),
        "square": suite.square(config, min(config.num_queries, SQUARE_QUERIES)),
        "double": _at(config, min(2 * config.epsilon, 1.0), config.num_steps),
        "far": _at(config, FAR, steps),
        "everywhere": _at(config, EVERYWHERE, steps),
    }
    if num_classes >= 3:
        found["dlr"] = suite.gradient_descent("pgd-dlr", config)
    if source is not None:
        found["transfer"] = suite.make("transfer", config, source)
    return found


def _at(config, epsilon, steps):
    """PGD at another radius, in steps that can reach its edge two and a half times over."""
    step_size = max(2.5 * epsilon / steps, config.step_size or suite.PGD_STEP)
    return suite.gradient_descent("pgd", config, epsilon=epsilon, num_steps=steps, step_size=step_size)


# ---------------------------------------------------------------- the checks


def check(config, target, split, parts, progress):
    """Return the findings on one target; `parts` are the `trials`, whose outcomes are in `progress`."""
    outcomes = {part: progress.of(target, trial) for part, trial in parts.items()}
    sample = parts["clean"].of(split).images[: min(config.batch_size, 100)]
    with torch.no_grad(), exact_float32():
        images = data.to_float(sample).contiguous(memory_format=torch.channels_last)
        first, second = target.logits(images), target.logits(images)
    findings = [deterministic(first, second), are_logits(first)]
    if config.epsilon == 0:
        return findings  # nothing below can be told without an attack
    findings += [
        iterative(outcomes),
        falling(outcomes, config.epsilon),
        far(outcomes),
        everywhere(outcomes),
        converged(outcomes),
        noise_is_weak(outcomes),
        *(white_box(outcomes, part) for part in ("square", "transfer") if part in outcomes),
        losses_agree(outcomes),
        gradients(outcomes),
        margins(outcomes),
    ]
    return findings


def deterministic(first, second):
    largest = (first - second).abs().max().item()
    seen = "two passes agree bit for bit" if largest == 0 else f"two passes differ by up to {largest:.3g}"
    meaning = (
        "the network is random, so single gradients mislead: take the randomness out, or average gradients "
        "over draws (EOT)"
    )
    return Finding("deterministic", "PASS" if largest == 0 else "FAIL", seen, meaning)


def are_logits(scores):
    """Scores between 0 and 1 whose sum is 1 are probabilities."""
    sums = (scores.sum(1) - 1).abs().max().item()
    probabilities = scores.min() >= 0 and scores.max() <= 1 and sums < 1e-3
    low, high = scores.min().item(), scores.max().item()
    meaning = "they look like probabilities, and another softmax on top masks gradients: return the logits"
    seen = f"scores from {low:.3g} to {high:.3g}"
    return Finding("logits", "FAIL" if probabilities else "PASS", seen, meaning)


def iterative(outcomes):
    """Many steps do at least what one does."""
    one, many = outcomes["one step"].accuracy, outcomes["pgd"].accuracy
    meaning = "many steps do less than one: gradients mislead, so believe the margin, Square and AutoAttack"
    return _graded(
        "iterative attack",
        many - one,
        len(outcomes["pgd"]),
        f"one step leaves {one:.2f}, PGD {many:.2f}",
        meaning,
    )


def falling(outcomes, epsilon):
    """A larger ball leaves no more."""
    parts = ("clean", "pgd", "double", *(("far",) if 2 * epsilon <= FAR else ()))
    accuracies = [outcomes[part].accuracy for part in parts]
    rise = max(after - before for before, after in itertools.pairwise(accuracies))
    radii = [0, epsilon, min(2 * epsilon, 1.0), FAR]
    pairs = zip(radii, accuracies, strict=False)
    seen = ", ".join(f"{accuracy:.2f} at {suite.in_255ths(radius)}" for radius, accuracy in pairs)
    meaning = "a larger ball holds the smaller one, so the attack fails there: more steps, another loss"
    return _graded("falling with epsilon", rise, len(outcomes["pgd"]), seen, meaning)


def far(outcomes):
    accuracy = outcomes["far"].accuracy
    meaning = (
        "an image this far off shows nothing that a network could be right about: the attack fails, so the "
        "table overstates robustness; believe the margin, Square and AutoAttack"
    )
    status = "PASS" if accuracy <= HARDLY else "WARN" if accuracy <= 2 * HARDLY else "FAIL"
    return Finding("hardly any at 64/255", status, f"{accuracy:.2f} left", meaning)


def everywhere(outcomes):
    accuracy = outcomes["everywhere"].accuracy
    meaning = (
        "any image may become any other, so the attack, not the network, decides: its gradients are zero or "
        "mislead; believe the margin, Square and AutoAttack"
    )
    status = "PASS" if accuracy == 0 else "FAIL"
    return Finding("none without a bound", status, f"{accuracy:.2f} left", meaning)


def converged(outcomes):
    few, many = outcomes["pgd"].accuracy, outcomes["more"].accuracy
    meaning = "the table's PGD stops too early: raise --num-steps, add --random-start --restarts 5"
    seen = f"PGD leaves {few:.2f}, {MORE} times the steps and 2 restarts {many:.2f}"
    return _graded(
        "more steps change little", few - many, len(outcomes["pgd"]), seen, meaning, NOISE + 1, 2 * DEFECT
    )


def noise_is_weak(outcomes):
    random, gradient = outcomes["noise"].accuracy, outcomes["pgd"].accuracy
    meaning = (
        "random signs do more than the gradient's: the gradient is useless; believe Square and AutoAttack"
    )
    seen = f"noise leaves {random:.2f}, PGD {gradient:.2f}"
    return _graded("noise weaker than gradient", gradient - random, len(outcomes["pgd"]), seen, meaning)


def white_box(outcomes, part):
    """What an attack finds without the gradient, the one with it finds too, image by image."""
    right = outcomes["clean"].correct
    missed = right & ~outcomes[part].correct & outcomes["pgd"].correct
    share = reports.percent(missed)
    name = {"square": "Square", "transfer": "transfer"}[part]
    seen = f"{share:.2f} % of all images fall to {name} and not to PGD"
    meaning = "an attack that knows less finds more: gradients are masked, so believe Worst with it included"
    return _graded(f"white box beats {name}", share, len(right), seen, meaning)


def losses_agree(outcomes):
    """No other loss does much better than cross-entropy."""
    others = {name: outcomes[name].accuracy for name in ("margin", "dlr") if name in outcomes}
    plain = outcomes["pgd"].accuracy
    gap = plain - min(others.values())
    seen = f"PGD leaves {plain:.2f} on cross-entropy, " + ", ".join(
        f"{value:.2f} on the {'DLR loss' if name == 'dlr' else name}" for name, value in others.items()
    )
    meaning = "gradient masking: cross-entropy's columns overstate robustness, believe the lower number"
    return _graded("losses agree", gap, len(outcomes["pgd"]), seen, meaning)


def gradients(outcomes):
    right = outcomes["clean"].correct
    if not right.any():
        return Finding("gradients", "WARN", "no image is right without attack", "nothing is left to attack")
    first, ever, always = (
        reports.percent(column[right])
        for column in (outcomes["pgd"].zero_first, outcomes["pgd"].zero_ever, outcomes["pgd"].zero_always)
    )
    status = "PASS" if ever == 0 else "WARN" if first <= NOISE and ever <= DEFECT else "FAIL"
    seen = f"exactly zero for {first:.2f} % of the images at first, {ever:.2f} % ever, {always:.2f} % always"
    meaning = (
        "an image without a gradient is never changed and counts as robust: attack the margin or DLR loss, "
        "or by scores alone (square)"
    )
    return Finding("gradients", status, seen, meaning)


def margins(outcomes):
    found = reports.margin_quantiles(outcomes["clean"])
    vanishing, saturating = found["above_104"], found["above_17"]
    status = "FAIL" if vanishing > NOISE else "WARN" if saturating > reports.MANY else "PASS"
    median = found["quantiles"]["0.5"]
    seen = f"median {median:.3g}, {saturating:.2f} % above 17, {vanishing:.2f} % above 104"
    meaning = (
        "in float32 the cross-entropy's gradient fades from a margin of 17 on and is gone by 104: attack the "
        "margin or DLR loss, which do not"
    )
    return Finding("logit margins", status, seen, meaning)


def _graded(name, excess, images, seen, meaning, noise=NOISE, defect=DEFECT):
    """PASS up to `noise` percent too many of so many images, WARN up to `defect`, FAIL beyond."""
    noise = max(noise, 200 / images)
    status = "PASS" if excess < noise + 1e-9 else "WARN" if excess <= defect else "FAIL"
    return Finding(name, status, seen, meaning)
