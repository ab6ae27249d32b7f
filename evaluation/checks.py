"""Is it the network that withstands an attack, or the attack that fails? Each check gives one Finding.

`trials` are the attacks that --sanity needs, on a few images; `sanity` gives all findings on them.
`under_table` is the short form: the same checks on the attacks that the table has anyway. `outcomes` are an
Outcome by the name of its attack, or by its part in `trials`. The thresholds are here and nowhere else.

After Carlini et al., On Evaluating Adversarial Robustness (2019), Athalye et al., Obfuscated Gradients Give a
False Sense of Security (2018), and the flags of AutoAttack.
"""

import dataclasses
import itertools
from typing import NamedTuple

import torch

import data

from . import readouts
from .exact import exact_float32, memory_format
from .outcome import (
    QUANTILES,
    SATURATED_MARGIN,
    VANISHED_MARGIN,
    are_probabilities,
    margin_quantiles,
    percent,
)
from .trials import ATTACKS, CLEAN, PGD_STEP, clean, in_255ths, make

FAR, EVERYWHERE = 64 / 255, 1.0  # radii at which hardly anything, and nothing, withstands
MORE_STEPS = 5  # times as many where more steps must not matter
MOST_QUERIES = 1000  # of Square
# In percent of the images: up to here a difference is noise, and from here on a defect.
NOISE_PERCENT, DEFECT_PERCENT = 1.0, 5.0
NOISE_IMAGES = 2  # so many images are noise whatever their share
GUARANTEED_PERCENT = 95.0  # of the adversarial images that are known to be there; Zimmermann et al. (2022)
FAR_WARN_PERCENT, FAR_FAIL_PERCENT = 5.0, 10.0  # right at FAR
SATURATED_WARN_PERCENT = 25.0  # of the margins above 17
OTHER_LOSSES = {"pgd": ("pgd-margin", "pgd-dlr"), "apgd-ce": ("apgd-dlr",)}  # the same attack on another loss
# Attacks that see no gradient of the network.
BLIND = {"square": "Square", "transfer": "transfer", "transfer-pgd": "transfer PGD"}
GUIDED = ("bim", "mim", "pgd", "pgd-margin", "pgd-dlr", "apgd-ce", "apgd-dlr")  # by gradients, in many steps
MEANINGS = {  # what a check that is not passed means and asks for
    "deterministic": "the network is random, so single gradients mislead: average them over draws (EOT)",
    "logits": "these are probabilities, and another softmax on top masks gradients: return the logits",
    "iterative attack": "many steps do less than one: gradients mislead, believe the margin and Square",
    "falling with epsilon": "a larger ball holds the smaller one, so the attack fails: more steps",
    "hardly any at 64/255": "so far off no network can be right: the attack fails, the table overstates",
    "none without a bound": "any image may become any other: gradients are zero or mislead, believe Square",
    "more steps change little": "PGD stops too early: raise --num-steps, add --random-start --restarts 5",
    "noise weaker than gradient": "random signs do more than the gradient's: believe Square and AutoAttack",
    **dict.fromkeys(
        (f"white box beats {title}" for title in BLIND.values()),
        "an attack that knows less finds more: gradients are masked, believe Worst",
    ),
    "losses agree": "gradient masking: cross-entropy overstates robustness, believe the lower number",
    "guaranteed adversarials": "an attack below 95 % misses what is there: do not believe its column, take "
    "the margin, more or longer steps, --random-start",
    "gradients": "masked gradients: an image without one is never changed and counts as robust, so "
    "believe Worst, with pgd-margin, apgd-dlr and square among the --attacks",
    "logit margins": "from 17 on cross-entropy's gradient fades, by 104 it is gone: attack the margin",
}


class Finding(NamedTuple):
    """One check: its `name`, PASS, WARN or FAIL, what was seen, and what that means and asks for."""

    name: str
    status: str
    seen: str
    meaning: str

    def __str__(self):
        advice = "" if self.status == "PASS" else f"; {self.meaning}"
        return f"{self.status:4}  {self.name}: {self.seen}{advice}"


def trials(config, num_classes, source=None):
    """The attacks that `sanity` reads, by their part in it, on `config.sanity_images` images."""
    found = {CLEAN: clean()}
    if config.epsilon > 0:
        few = dataclasses.replace(config, num_queries=min(config.num_queries, MOST_QUERIES))
        names = ("noise", "fgsm", "pgd", "pgd-margin", "square", *(("pgd-dlr",) if num_classes >= 3 else ()))
        found |= {name: make(name, few) for name in names}
        steps = MORE_STEPS * config.num_steps
        thorough = dataclasses.replace(config, num_steps=steps, random_start=True, restarts=2)
        found["more"] = make("pgd", thorough)
        found["double"] = _at(config, min(2 * config.epsilon, 1.0), config.num_steps)
        if config.epsilon < FAR:  # else it is not far: on grey images the table's own radius is larger
            found["far"] = _at(config, FAR, steps)
        found["everywhere"] = _at(config, EVERYWHERE, steps)
        if source is not None:
            found["transfer"] = make("transfer", config, source)
    for part, trial in found.items():
        names = {"key": f"sanity {part}", "title": f"sanity, {part}"}
        found[part] = dataclasses.replace(trial, **names, limit=config.sanity_images)
    return found


def _at(config, epsilon, steps):
    """PGD at another radius, in steps that can reach its edge two and a half times over."""
    step_size = max(2.5 * epsilon / steps, config.step_size or PGD_STEP)
    return make("pgd", dataclasses.replace(config, epsilon=epsilon, num_steps=steps, step_size=step_size))


def sanity(results, target):
    """All findings on one target, from the outcomes of `trials`."""
    config = results.config
    outcomes = {part: results.of(target, trial) for part, trial in results.checks.items()}
    sample = results.checks[CLEAN].of(results.dataset.test).images[: min(config.batch_size, 100)]
    with torch.no_grad(), exact_float32():
        images = data.to_float(sample).contiguous(memory_format=memory_format(sample.device))
        first, second = target.logits(images), target.logits(images)
    of_network = [deterministic(first, second), are_logits(first)]
    if config.epsilon == 0:
        return of_network  # nothing below can be told without an attack
    return [
        *of_network,
        iterative(outcomes),
        falling(outcomes, config.epsilon),
        *([far(outcomes)] if "far" in outcomes else []),
        everywhere(outcomes),
        converged(outcomes),
        noise_is_weak(outcomes),
        *(white_box(outcomes, name) for name in BLIND if name in outcomes),
        losses_agree(outcomes),
        guaranteed(found_in_readouts(results, target, outcomes[CLEAN])),
        gradients(outcomes),
        margins(outcomes),
    ]


def under_table(results, target):
    """What a reader of a row must be told: two facts, and a warning for each check that the row fails."""
    outcomes = {trial.key: outcome for trial, outcome in results.row(target)}
    shown = tuple(name for name, outcome in outcomes.items() if outcome.gradients)
    facts = [gradients(outcomes, shown)] if shown and outcomes[CLEAN].correct.any() else []
    for fact in (*facts, margins(outcomes)):
        yield f"{fact.name}: {fact.seen}"
        if fact.status != "PASS":
            yield f"WARNING, check '{fact.name}': {fact.meaning}"
    compared = [losses_agree(outcomes, name) for name in OTHER_LOSSES if _others(outcomes, name)]
    if guided := tuple(name for name in GUIDED if name in outcomes):
        compared += [white_box(outcomes, name, guided) for name in BLIND if name in outcomes]
        compared += [noise_is_weak(outcomes, guided)] if "noise" in outcomes else []
    for finding in compared:
        if finding.status == "FAIL":  # a few points less are ordinary between attacks of the table
            yield f"WARNING, check '{finding.name}' fails: {finding.seen}; {finding.meaning}"


def _finding(name, seen, warn, fail):
    """FAIL where `fail`, else WARN where `warn`, else PASS."""
    return Finding(name, "FAIL" if fail else "WARN" if warn else "PASS", seen, MEANINGS[name])


def _graded(name, excess, outcome, seen, noise=NOISE_PERCENT, defect=DEFECT_PERCENT):
    """PASS up to `noise` percent too many of an outcome's images, WARN up to `defect`, FAIL beyond."""
    warn = excess >= max(noise, 100 * NOISE_IMAGES / len(outcome)) + 1e-9
    return _finding(name, seen, warn, warn and excess > defect)


# ---------------------------------------------------------------- the network


def deterministic(first, second):
    """Two passes on the same images give the same scores."""
    largest = (first - second).abs().max().item()
    seen = "two passes agree bit for bit" if largest == 0 else f"two passes differ by up to {largest:.3g}"
    return _finding("deterministic", seen, False, largest != 0)


def are_logits(scores):
    """Scores are no probabilities."""
    low, high = scores.min().item(), scores.max().item()
    return _finding("logits", f"scores from {low:.3g} to {high:.3g}", False, are_probabilities(scores))


def margins(outcomes):
    """How far the true logit of the clean images leads, and whether float32 still has a gradient there."""
    found = margin_quantiles(outcomes[CLEAN])
    vanished, saturated = found["above_104"], found["above_17"]
    shown = ", ".join(f"{value:.3g}" for value in found["quantiles"].values())
    seen = (
        f"quantiles {' '.join(f'{q:g}' for q in QUANTILES)} of the clean images: {shown}; "
        f"above {SATURATED_MARGIN:g}: {saturated:.2f} %, above {VANISHED_MARGIN:g}: {vanished:.2f} %"
    )
    return _finding("logit margins", seen, saturated > SATURATED_WARN_PERCENT, vanished > NOISE_PERCENT)


def gradients(outcomes, shown=("pgd",)):
    """How many images had a gradient of exactly zero under the attacks `shown`: first, ever and always."""
    right = outcomes[CLEAN].correct
    if not right.any():
        return Finding("gradients", "WARN", "no image is right without attack", "nothing is left to attack")
    kinds = ("zero_first", "zero_ever", "zero_always")
    shares = {name: [percent(getattr(outcomes[name], kind)[right]) for kind in kinds] for name in shown}
    seen = "exactly zero first / ever / always, % of the images right without attack: " + ", ".join(
        f"{ATTACKS[name].title} {' / '.join(f'{share:.2f}' for share in found)}"
        for name, found in shares.items()
    )
    flat = [name for name in shown if name.endswith("dlr")]
    seen += "; DLR is flat where the true class comes third" if flat else ""
    first, ever = (max((shares[n][i] for n in shown if n not in flat), default=0.0) for i in (0, 1))
    masked = any(outcomes[name].frozen.any() for name in shown)
    return _finding("gradients", seen, ever > 0 or masked, first > NOISE_PERCENT or ever > DEFECT_PERCENT)


# ---------------------------------------------------------------- one attack against another


def iterative(outcomes):
    """Many steps do at least what one does."""
    one, many = outcomes["fgsm"].accuracy, outcomes["pgd"].accuracy
    seen = f"one step leaves {one:.2f}, PGD {many:.2f}"
    return _graded("iterative attack", many - one, outcomes["pgd"], seen)


def falling(outcomes, epsilon):
    """A larger ball leaves no more."""
    parts = (CLEAN, "pgd", "double", *(("far",) if 2 * epsilon <= FAR else ()))
    accuracies = [outcomes[part].accuracy for part in parts]
    rise = max(after - before for before, after in itertools.pairwise(accuracies))
    pairs = zip((0, epsilon, min(2 * epsilon, 1.0), FAR), accuracies, strict=False)
    seen = ", ".join(f"{accuracy:.2f} at {in_255ths(radius)}" for radius, accuracy in pairs)
    return _graded("falling with epsilon", rise, outcomes["pgd"], seen)


def far(outcomes):
    """An image 64/255 off shows nothing that a network could be right about."""
    left = outcomes["far"].accuracy
    warn, fail = left > FAR_WARN_PERCENT, left > FAR_FAIL_PERCENT
    return _finding("hardly any at 64/255", f"{left:.2f} left", warn, fail)


def everywhere(outcomes):
    """Where any image may become any other, none is left."""
    left = outcomes["everywhere"].accuracy
    return _finding("none without a bound", f"{left:.2f} left", False, left > 0)


def converged(outcomes):
    """More steps and restarts leave hardly less."""
    few, many = outcomes["pgd"].accuracy, outcomes["more"].accuracy
    seen = f"PGD leaves {few:.2f}, {MORE_STEPS} times the steps and 2 restarts {many:.2f}"
    limits = (NOISE_PERCENT + 1, 2 * DEFECT_PERCENT)
    return _graded("more steps change little", few - many, outcomes["pgd"], seen, *limits)


def noise_is_weak(outcomes, guided=("pgd",)):
    """Noise does less than the best attack that follows the gradient."""
    best = min(guided, key=lambda name: outcomes[name].accuracy)
    random, gradient = outcomes["noise"].accuracy, outcomes[best].accuracy
    seen = f"noise leaves {random:.2f}, {ATTACKS[best].title} {gradient:.2f}"
    return _graded("noise weaker than gradient", gradient - random, outcomes[best], seen)


def white_box(outcomes, blind, guided=("pgd",)):
    """What an attack finds without the gradient, those with it find too, image by image."""
    missed = outcomes[CLEAN].correct & ~outcomes[blind].correct
    for name in guided:
        missed = missed & outcomes[name].correct
    share, titles = percent(missed), ", ".join(ATTACKS[name].title for name in guided)
    seen = f"{share:.2f} % of all images fall to {BLIND[blind]} and not to {titles}"
    return _graded(f"white box beats {BLIND[blind]}", share, missed, seen)


def found_in_readouts(results, target, unattacked):
    """What the attacks of the table find with read-outs, on images of the sample that are right."""
    split = results.checks[CLEAN].of(results.dataset.test)
    right = unattacked.correct.nonzero()[:, 0]
    spread = torch.linspace(0, len(right) - 1, min(readouts.IMAGES, len(right))).round().long()
    chosen = right[spread].to(split.labels.device)
    return readouts.search(target, data.Split(split.images[chosen], split.labels[chosen]), results.config)


def guaranteed(found):
    """Each attack of many steps finds the adversarial images that are known to be there."""
    name = "guaranteed adversarials"
    if not found.images:
        return Finding(name, "WARN", "no verdict: no image has a read-out", "nothing is known to be there")
    random = max(found.surface, found.corners)
    lowest = min(share for attack, share in found.attacks.items() if attack != "fgsm")  # which is one step
    shares = {ATTACKS[attack].title: share for attack, share in found.attacks.items()}
    shares |= {"random points": found.surface, "corners": found.corners}
    fewer = ", ".join(
        f"{n} with {points} points" for points, n in found.inner.items() if points < max(readouts.INNER)
    )
    fewer = f" ({fewer})" if fewer else ""
    seen = f"found of {found.images}{fewer}: " + ", ".join(
        f"{who} {share:.0f} %" for who, share in shares.items()
    )
    if GUARANTEED_PERCENT <= lowest <= random:
        return Finding(name, "WARN", f"no verdict: {seen}", "random search finds as many, so it shows little")
    return _finding(name, seen, False, lowest < GUARANTEED_PERCENT)


def _others(outcomes, plain):
    """The attacks among `outcomes` that differ from `plain`, which is among them too, in the loss alone."""
    return [name for name in OTHER_LOSSES[plain] if name in outcomes] if plain in outcomes else []


def losses_agree(outcomes, plain="pgd"):
    """No other loss does much better than cross-entropy."""
    left = {name: outcomes[name].accuracy for name in _others(outcomes, plain)}
    on_others = ", ".join(f"{ATTACKS[name].title} {accuracy:.2f}" for name, accuracy in left.items())
    accuracy = outcomes[plain].accuracy
    seen = f"{ATTACKS[plain].title} leaves {accuracy:.2f} on cross-entropy, {on_others}"
    return _graded("losses agree", accuracy - min(left.values()), outcomes[plain], seen)
