"""Lines under the table that tell of a failing attack, or of a network that cannot be judged so."""

from .checks import MEANINGS
from .outcome import percent


def under_table(results, target):
    """Yield lines on images lost on the way, on rounding, on a random network, and on probabilities."""
    (_, clean), *attacked = results.row(target)
    lost = {trial.title: int((outcome.lost & clean.correct).sum()) for trial, outcome in attacked}
    if any(lost.values()):
        counted = ", ".join(f"{title} {count}" for title, count in lost.items() if count)
        yield f"fooled on the way and right again in the end, which Worst counts as fooled: {counted}"
    if results.config.eight_bit and attacked:
        yield "accuracy after rounding to 8 bits: " + ", ".join(
            f"{trial.title} {percent(outcome.right_8bit):.2f}{_undone(outcome)}"
            for trial, outcome in attacked
        )
    if clean.changed:
        seen = f"{clean.changed} of {len(clean)} predictions change from pass to pass"
        yield f"WARNING, check 'deterministic': {seen}; {MEANINGS['deterministic']}"
    if clean.probabilities:
        yield f"WARNING, check 'logits': {MEANINGS['logits']}"


def _undone(outcome):
    """Return in words how many adversarial images rounding makes right again; empty for none."""
    count = int((outcome.right_8bit & ~outcome.correct).sum())
    return f" ({count} no longer adversarial)" if count else ""
