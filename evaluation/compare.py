"""Do two networks differ? Every pair of rows of an evaluation, attack by attack, compared image by image.

    python -m evaluation.compare a.json          # each pair of its rows
    python -m evaluation.compare a.json b.json   # each row of the first with each row of the second

It prints, in percentage points: the difference of the accuracies, second less first; its 95 % interval; the
exact p-value of McNemar; and the smallest difference that so many images could show. Rows that differ in
their seed alone become one row, their mean and standard deviation. Both networks must have met the same
images; an attack that had other settings is left out.
"""

import os
import sys

if __name__ == "__main__":  # before torch is imported, which takes seconds
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(sys.argv[0]))))
    import startup

    startup.begin()

import argparse
import itertools
import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cli
import utils
from evaluation.outcome import Z
from evaluation.seeds import NOT_COMPARED

Z_POWER = 0.841621  # for a power of 80 %
FEWEST = 6  # so many images, all in one direction, give an exact p-value below 0.05
LEAST_P = 1e-4  # a smaller one is shown as below this


class Difference(NamedTuple):
    """Second less first in percentage points: 95 % interval, p-value, smallest to be found."""

    difference: float
    low: float
    high: float
    p: float
    smallest: float


class Row(NamedTuple):
    """A network: its name, what it was made by except the seed, and its results under each attack."""

    label: str
    made_by: str
    seed: int | None
    network: tuple  # the hash of the weights, and how they predict
    attacks: dict[str, tuple[str, str, str]]  # title, settings, and 1 for each image that is right, else 0


# ---------------------------------------------------------------- two outcomes, image by image


def paired(first, second):
    """Return the Difference of two outcomes on the same images; each is a text of 0 and 1, one an image.

    Only images count on which the two differ. The interval is that of Bonett & Price (2012): Wald's, after
    one more such image on either side. The smallest difference is found with a power of 80 %, if as many
    images differ as here.
    """
    images, cells = len(first), Counter(zip(first, second, strict=True))
    lost, won = cells["1", "0"], cells["0", "1"]
    shrunk, more = (won - lost) / (images + 2), (won + lost + 2) / (images + 2)
    half = Z * math.sqrt((more - shrunk**2) / (images + 2))
    smallest = max((Z + Z_POWER) * math.sqrt(more / (images + 2)), FEWEST / images)
    ends = max(shrunk - half, -1.0), min(shrunk + half, 1.0)
    percents = [100 * value for value in ((won - lost) / images, *ends)]
    return Difference(*percents, mcnemar(lost, won), min(100 * smallest, 100.0))


def mcnemar(lost, won):
    """Return McNemar's exact two-sided p-value: how likely fair coins split so unevenly."""
    flips, term, total = lost + won, 1, 0
    for heads in range(min(lost, won) + 1):
        total += term  # the binomial coefficient, in whole numbers
        term = term * (flips - heads) // (heads + 1)
    return min(1.0, 2 * total / 2**flips)


# ---------------------------------------------------------------- the rows of a file


def read(path):
    """Return (what identifies the images, the rows) of a results file; DataError for any other file."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        predict = report["settings"]["predict"]
        return report["data"], [_row(entry, predict) for entry in report["checkpoints"]]
    except OSError as error:
        raise utils.DataError(f"{path}: {error.strerror}; name a file that robustness.py wrote") from None
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise utils.DataError(
            f"{path}: holds no outcomes image by image; name a .json file that robustness.py wrote"
        ) from None


def _row(entry, predict):
    origin = entry["origin"]
    config = {k: value for k, value in origin.get("config", {}).items() if k not in NOT_COMPARED}
    seed = origin.get("config", {}).get("seed")
    made = [predict, entry["label"], entry["depth"], *map(origin.get, ("script", "epoch", "data")), config]
    attacks = {
        # The log of AutoAttack has another name in each evaluation.
        key: (found["title"], f"{found['epsilon']:.6g}, {found['settings'].split(', its log in ')[0]}")
        for key, found in entry["attacks"].items()
    }
    outcomes = {key: (*attacks[key], entry["attacks"][key]["robust"]) for key in attacks}
    outcomes["worst"] = "Worst", str(list(attacks.values())), entry["worst"]["robust"]
    network = entry["sha256"], predict
    return Row(_called(entry), json.dumps(made, sort_keys=True), seed, network, outcomes)


def _called(entry):
    """Return a row's label with the name of its file, since many networks have the same label."""
    return f"{entry['label']} ({Path(entry['path']).name.removesuffix('.tar').removesuffix('.pth')})"


def groups(rows):
    """Return the rows as a list of lists: rows that differ in the seed alone are together."""
    found = {}
    for row in rows:
        # One that has a seed for the second time differs in something else, such as what it started from.
        number = sum(
            other.seed == row.seed for other in itertools.chain(*found.get(row.made_by, {}).values())
        )
        key = number if row.seed is not None else row.network
        found.setdefault(row.made_by, {}).setdefault(key, []).append(row)
    return [group for parts in found.values() for group in parts.values()]


# ---------------------------------------------------------------- the tables


def tables(first, second=None):
    """Yield (heading, table) of each comparison: within the rows `first`, or of `first` with `second`."""
    if second is None:
        every = groups(first)
        pairs = list(itertools.combinations(every, 2))
    else:
        every = groups(first), groups(second)
        pairs, every = list(itertools.product(*every)), [*every[0], *every[1]]
    for group in every:
        if len(group) > 1:
            yield seeds(group)
    for one, other in pairs:
        if {row.network for row in one}.isdisjoint(row.network for row in other):
            yield compared(one, other)


def seeds(group):
    """Return (heading, table) of rows that differ in the seed alone."""
    rows = [["Attack", *(f"seed {row.seed}" for row in group), "mean", "deviation"]]
    for key, (title, *_) in group[0].attacks.items():
        values = accuracies(group, key)
        shown = [*values, statistics.mean(values), statistics.stdev(values)]
        rows.append([title, *(f"{value:.2f}" for value in shown)])
    return f"{name(group)}: {len(group)} rows that differ in the seed alone", rows


def compared(one, other):
    """Return (heading, table) of two groups of networks, on the attacks that have the same settings."""
    images = len(next(iter(one[0].attacks.values()))[-1])
    heading = f"{name(other)} less {name(one)}, {images:,} images"
    shared = [key for key in one[0].attacks if key in other[0].attacks]
    same = [key for key in shared if len({row.attacks[key][1] for row in (*one, *other)}) == 1]
    if different := [one[0].attacks[key][0] for key in shared if key not in same]:
        heading += f"; not compared, as the settings differ: {', '.join(different)}"
    if len(one) == len(other) == 1:
        lines = [_single(one[0], other[0], key) for key in same]
        head = ["first", "second", "difference", "95 % interval", "p", "could show"]
    else:
        lines = [_several(one, other, key) for key in same]
        head = ["first", "second", "difference of the means", "its standard error"]
    return heading, [["Attack", *head], *lines]


def _single(one, other, key):
    found = paired(one.attacks[key][-1], other.attacks[key][-1])
    accuracy = [f"{accuracies([row], key)[0]:.2f}" for row in (one, other)]
    interval = f"{found.low:+.2f} to {found.high:+.2f}"
    p = f"{found.p:.2g}" if found.p >= LEAST_P else f"below {LEAST_P:g}"
    shown = [f"{found.difference:+.2f}", interval, p, f"{found.smallest:.2f}"]
    return [one.attacks[key][0], *accuracy, *shown]


def _several(one, other, key):
    values = [accuracies(group, key) for group in (one, other)]
    means = [statistics.mean(group) for group in values]
    error = "unknown: one seed"
    if all(len(group) > 1 for group in values):
        error = f"{math.sqrt(sum(statistics.variance(group) / len(group) for group in values)):.2f}"
    return [one[0].attacks[key][0], *(f"{m:.2f}" for m in means), f"{means[1] - means[0]:+.2f}", error]


def accuracies(group, key):
    """Return the accuracy in percent of each row of a group."""
    return [100 * row.attacks[key][-1].count("1") / len(row.attacks[key][-1]) for row in group]


def name(group):
    return group[0].label if len(group) == 1 else f"{group[0].label[:-1]}, ...), {len(group)} seeds"


def main(argv):
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", metavar="A.json", help="the results of an evaluation")
    parser.add_argument("second", metavar="B.json", nargs="?", help="those of another one")
    options = parser.parse_args(argv)
    paths = [path for path in (options.first, options.second) if path is not None]
    images, rows = zip(*map(read, paths), strict=True)
    if images[0] != images[-1]:
        raise utils.DataError(
            f"{paths[0]}, {paths[-1]}: measured on other images ({_words(images[0])}; {_words(images[-1])}): "
            "measure both with the same data and --limit"
        )
    found = list(tables(*rows))
    if not found:
        raise utils.DataError(f"{' and '.join(paths)}: no two networks to compare; name a second file")
    utils.say("\n\n".join(f"{heading}\n\n{utils.markdown_table(rows)}" for heading, rows in found))


def _words(images):
    number, *sums = images["test"]
    return f"{number:,} of {images['name']}, checksum {str(sums[0])[:8]}"


if __name__ == "__main__":
    cli.leave_with_status(main)
