"""Checkpoints that differ in their seed alone: one row of the table, with mean and standard deviation."""

import statistics
from pathlib import Path

from .outcome import percent

NOTE = "±: standard deviation over the seeds; the rows of each seed are in the JSON and CSV files."
# Settings that do not change what is learned, and the seed itself.
NOT_COMPARED = {
    *("seed", "seeds", "seeds_per_rank", "sync_batchnorm", "data_dir", "init_from", "save_to", "log_to"),
    *("resume", "overwrite", "eval_every", "save_every_minutes", "max_minutes", "compile", "device"),
    "tensorboard",
}


def rows(results):
    """Yield (label, targets) of each row of the table: one target, or several with different seeds."""
    groups = {}
    for label, target in results.labeled():
        groups.setdefault(_family(target), []).append((label, target))
    called = [group[0][1].label for group in groups.values() if _differ(group)]
    for group in groups.values():
        first, targets = group[0][1], [target for _, target in group]
        if _differ(group):
            file = Path(first.path).name.split(".pth")[0]
            which = f" ({file}, ...)" if called.count(first.label) > 1 else ""
            yield f"{first.label}, {len(targets)} seeds{which}", targets
        else:  # runs of one seed have a row each
            yield from ((label, [target]) for label, target in group)


def _differ(group):
    """Return whether these are several targets whose seeds all differ."""
    return 1 < len(group) == len({target.origin.get("config", {}).get("seed") for _, target in group})


def _family(target):
    """Return what the targets of a row have in common; a checkpoint without a seed has its own row."""
    settings = target.origin.get("config", {})
    if "seed" not in settings:
        return target.sha256
    kept = {name: value for name, value in settings.items() if name not in NOT_COMPARED}
    return repr((target.origin.get("script"), target.origin.get("epoch"), sorted(kept.items())))


def spread(values):
    """Return mean and standard deviation as text; of a single value, the value."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def summary(results):
    """Return a dict for each row of several seeds, as the JSON file holds it."""
    found = []
    for label, targets in rows(results):
        if len(targets) > 1:
            accuracies = [
                {t.key: outcome.accuracy for t, outcome in results.row(target)} for target in targets
            ]
            for target, accuracy in zip(targets, accuracies, strict=True):
                accuracy["worst"] = percent(results.robust(target))
            attacks = {
                key: {
                    "mean": statistics.mean(values := [accuracy[key] for accuracy in accuracies]),
                    "std": statistics.stdev(values),
                }
                for key in accuracies[0]
            }
            seeds = {str(target.origin["config"]["seed"]): target.sha256 for target in targets}
            found.append({"label": label, "seeds": seeds, "attacks": attacks})
    return found
