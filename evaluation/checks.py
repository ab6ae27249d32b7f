"""Is it the network that withstands an attack, or the attack that fails?

`trials` are the attacks that --sanity needs, on a few images; `sanity` gives all findings on them.
`under_table` is the short form: the same checks on the attacks that the table has anyway.
"""

import dataclasses

import torch

import data

from . import findings
from .findings import BLIND, EVERYWHERE, FAR, MORE_STEPS, OTHER_LOSSES
from .measure import exact_float32
from .registry import PGD_STEP
from .trials import CLEAN, clean, make

MOST_QUERIES = 1000  # of Square
GUIDED = ("bim", "mim", "pgd", "pgd-margin", "pgd-dlr", "apgd-ce", "apgd-dlr")  # by gradients, in many steps


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
        found["far"], found["everywhere"] = (_at(config, radius, steps) for radius in (FAR, EVERYWHERE))
        if source is not None:
            found["transfer"] = make("transfer", config, source)
    limit = config.sanity_images
    return {
        part: dataclasses.replace(trial, key=f"sanity {part}", title=f"sanity, {part}", limit=limit)
        for part, trial in found.items()
    }


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
        images = data.to_float(sample).contiguous(memory_format=torch.channels_last)
        first, second = target.logits(images), target.logits(images)
    found = [findings.deterministic(first, second), findings.are_logits(first)]
    if config.epsilon == 0:
        return found  # nothing below can be told without an attack
    return [
        *found,
        findings.iterative(outcomes),
        findings.falling(outcomes, config.epsilon),
        findings.far(outcomes),
        findings.everywhere(outcomes),
        findings.converged(outcomes),
        findings.noise_is_weak(outcomes),
        *(findings.white_box(outcomes, name) for name in BLIND if name in outcomes),
        findings.losses_agree(outcomes),
        findings.gradients(outcomes),
        findings.margins(outcomes),
    ]


def under_table(results, target):
    """What a reader of a row must be told: two facts, and a warning for each check that the row fails."""
    outcomes = {trial.key: outcome for trial, outcome in results.row(target)}
    shown = tuple(name for name, outcome in outcomes.items() if outcome.gradients)
    facts = [findings.margins(outcomes)]
    if shown and outcomes[CLEAN].correct.any():
        facts.insert(0, findings.gradients(outcomes, shown))
    for fact in facts:
        yield f"{fact.name}: {fact.seen}"
        if fact.status != "PASS":
            yield f"WARNING, check '{fact.name}': {fact.meaning}"
    plain = [name for name in OTHER_LOSSES if findings.others(outcomes, name)]
    compared = [findings.losses_agree(outcomes, name) for name in plain]
    if guided := tuple(name for name in GUIDED if name in outcomes):
        compared += [findings.white_box(outcomes, name, guided) for name in BLIND if name in outcomes]
        compared += [findings.noise_is_weak(outcomes, guided)] if "noise" in outcomes else []
    for finding in compared:
        if finding.status == "FAIL":  # a few points less are ordinary between attacks of the table
            yield f"WARNING, check '{finding.name}' fails: {finding.seen}; {finding.meaning}"
