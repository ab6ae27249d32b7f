"""What an evaluation found, as a reader wants it: the table, its footnotes, JSON, CSV and pictures."""

import collections
import itertools
import json
import math
from functools import reduce
from pathlib import Path

import torch

import cli
import data
import utils
from suite import CLEAN, in_255ths

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
# Where float32 ends: past the first the cross-entropy's gradient with respect to the true logit is exactly 0,
# past the second all of it is.
SATURATES, VANISHES = 17.0, 104.0
# Attacks that differ in the loss alone, cross-entropy and one that does not saturate.
ALIKE = (("pgd", "pgd-margin"), ("pgd", "pgd-dlr"), ("apgd-ce", "apgd-dlr"))
GAP = 5.0  # percent between two that call for a warning; a network trained on PGD images shows 1 to 3
BLIND = ("noise", "square", "transfer")  # attacks that see no gradient of the network
GUIDED = {"bim", "mim", "pgd", "pgd-margin", "pgd-dlr", "apgd-ce", "apgd-dlr"}  # that follow it in many steps
MANY = 25.0  # percent of the images past the first that call for a warning


# ---------------------------------------------------------------- numbers


def wilson(correct, images, z=1.959964):
    """The Wilson 95 % interval of an accuracy, in percent (Wilson 1927)."""
    if images == 0:
        return 0.0, 100.0
    share, unit = correct / images, z * z / images
    middle = (share + unit / 2) / (1 + unit)
    half = z * math.sqrt(share * (1 - share) / images + unit / (4 * images)) / (1 + unit)
    # The ends themselves where rounding would miss them.
    return 100 * (middle - half) * (correct > 0), 100 * (middle + half) if correct < images else 100.0


def robust(target, trials, progress):
    """Which images, (N,) bool, are right as they are and under every trial within its epsilon."""
    outcomes = [(progress.of(target, trial), trial) for trial in trials if trial.applies_to(target)]
    held = [~o.fooled(trial.epsilon) if trial.key != CLEAN else o.correct for o, trial in outcomes]
    return reduce(torch.logical_and, held)


def percent(mask):
    return round(100 * mask.double().mean().item(), 4) if len(mask) else None


def per_class(mask, labels, classes):
    """Accuracy in percent of each class by its name; None for a class without images."""
    return {name: percent(mask[labels == index]) for index, name in enumerate(classes)}


def margin_quantiles(outcome):
    """Quantiles of the logit margin, and the shares in percent past 17 and past 104."""
    margins = outcome.margin.double()
    values = torch.quantile(margins, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return {
        "quantiles": dict(zip(map(str, QUANTILES), values, strict=True)),
        "above_17": percent(margins > SATURATES),
        "above_104": percent(margins > VANISHES),
    }


# ---------------------------------------------------------------- the table


def row_labels(targets):
    """What each target's row is called: with its file's name, or else its hash, where two would be alike."""
    called = []
    for target in targets:
        file = Path(target.path).name.removesuffix(".tar").removesuffix(".pth")
        called.append([target.label, f"{target.label} ({file})", f"{target.label} ({target.sha256[:8]})"])
    times = collections.Counter(itertools.chain(*called))
    return [next((name for name in names if times[name] == 1), names[-1]) for names in called]


def to_markdown(targets, trials, progress):
    """The table of the README: a row for each target, a column for each attack, accuracy in percent.

    The columns count as the paper does, each by itself; Worst is right without attack and under every one.
    """
    attacked = len(trials) > 1
    table = [["Training", *(trial.title for trial in trials), *(["Worst"] if attacked else [])]]
    for label, target in zip(row_labels(targets), targets, strict=True):
        cells = [
            f"{progress.of(target, trial).accuracy:.2f}" if trial.applies_to(target) else "-"
            for trial in trials
        ]
        worst = [f"{percent(robust(target, trials, progress)):.2f}"] if attacked else []
        table.append([label, *cells, *worst])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


PUBLISHED = (
    "Published by the authors for depth 110, without attack and under FGSM, BIM, MIM and PGD: Softmax 92.15, "
    "21.48, 0.01, 0.02, 0.00; PCL 89.55, 55.76, 39.75, 36.44, 31.10. Their robust checkpoint, under "
    "AutoAttack: 0.28."
)


def footnotes(config, dataset, targets, trials, progress):
    """The settings under a table, line by line, and what the results say of themselves."""
    if dataset.classes == data.CIFAR10_CLASSES and in_255ths(config.epsilon) == "8/255":
        yield PUBLISHED
    images = f"{len(dataset.test):,} {dataset.tested} images of {dataset.name}"
    rule = "" if config.predict == "softmax" else "; predicted by the nearest prototype (Eq. 6)"
    yield (
        f"Accuracy in percent on {images}; L-infinity, epsilon {in_255ths(config.epsilon)}; "
        f"seed {config.seed}{rule}."
    )
    if settings := "; ".join(trial.settings for trial in trials if trial.settings):
        yield settings + "."
    if len(trials) > 1:
        yield "Worst: right without attack and under every attack of the row, image by image."
    for label, target in zip(row_labels(targets), targets, strict=True):
        yield from _about(label, target, trials, progress)


def _about(label, target, trials, progress):
    depth = f", depth {target.depth}" if target.depth else ""
    yield f"{label}: {target.path}{depth}, sha256 {target.sha256[:12]}."
    done = [(trial, progress.of(target, trial)) for trial in trials if trial.applies_to(target)]
    attacked = [(trial, outcome) for trial, outcome in done if trial.key != CLEAN]
    if attacked:
        held = robust(target, trials, progress)
        low, high = wilson(int(held.sum()), len(held))
        largest = max((o.linf.max().item() for t, o in attacked if t.bounded and len(o)), default=0.0)
        yield (
            f"  Worst {percent(held):.2f} (95 % interval {low:.2f} to {high:.2f}); "
            f"largest change {in_255ths(largest)}"
        )
    right = done[0][1].correct
    seen = [(trial, outcome) for trial, outcome in attacked if outcome.gradients]
    if seen and right.any():
        zeros = ", ".join(
            f"{trial.title} {' / '.join(zero_shares(outcome, right))}" for trial, outcome in seen
        )
        flat = "; DLR is flat where the true class comes third" if "DLR" in zeros else ""
        yield (
            "  gradient exactly zero first / ever / always, % of the images right without attack: "
            f"{zeros}{flat}"
        )
    found = margin_quantiles(done[0][1])
    shown = ", ".join(f"{value:.3g}" for value in found["quantiles"].values())
    yield (
        f"  logit margin of the clean images, quantiles {' '.join(f'{q:g}' for q in QUANTILES)}: {shown}; "
        f"above {SATURATES:g}: {found['above_17']:.2f} %, above {VANISHES:g}: {found['above_104']:.2f} %"
    )
    yield from _warnings(found, attacked)


def zero_shares(outcome, among):
    """In how many percent of the images `among` the gradient was zero: first, ever and always, as text."""
    columns = (outcome.zero_first, outcome.zero_ever, outcome.zero_always)
    return [f"{percent(column[among]):.2f}" for column in columns]


def frozen(outcome):
    """Images, (N,) bool, that count as robust only because their gradient was zero at every step."""
    return outcome.zero_always & outcome.correct


def _warnings(found, attacked):
    """What a reader of the table must be told before believing it."""
    masked = [f"{t.title} {percent(frozen(o)):.2f} %" for t, o in attacked if frozen(o).any()]
    if masked:
        yield (
            "  WARNING, masked gradients: counted as robust for want of any gradient: "
            f"{', '.join(masked)}; believe Worst, with pgd-margin, apgd-dlr and square among the --attacks"
        )
    left = {t.key: o.accuracy for t, o in attacked}
    titles = {t.key: t.title for t, _ in attacked}
    pairs = [(a, b) for a, b in ALIKE if a in left and b in left and left[a] > left[b] + GAP]
    blind = [b for b in BLIND if b in left and GUIDED & left.keys()]
    guided = min((left[a] for a in GUIDED & left.keys()), default=0.0)
    for plain, other in pairs:
        yield (
            f"  WARNING, the losses differ: {titles[plain]} on cross-entropy leaves {left[plain]:.2f}, "
            f"{titles[other]} {left[other]:.2f}: "
            "cross-entropy guides no attack where the network is sure of itself; believe the lower number"
        )
    for name in blind:
        if guided > left[name] + GAP:
            yield (
                f"  WARNING, {titles[name]}, which sees no gradient, leaves {left[name]:.2f}, "
                f"those that follow it {guided:.2f}: it is masked; believe the lower number"
            )
    if not pairs and not masked and found["above_17"] > MANY:
        yield (
            f"  WARNING, saturated logits: {found['above_17']:.2f} % of margins pass {SATURATES:g}, where "
            "cross-entropy's gradient fades in float32; compare with pgd-margin or apgd-dlr"
        )


# ---------------------------------------------------------------- files


def write(config, dataset, targets, trials, points, findings, progress):
    """Write the JSON file at `config.results`; table, images, curves and model cards lie beside it."""
    found = (dataset, targets, trials, progress)
    write_rows(beside(config, ".csv"), list(table_rows(*found)))
    write_rows(beside(config, ".images.csv"), list(image_rows(*found)))
    more = {}
    if points and (rows := list(curve_rows(targets, points, progress))):
        write_rows(beside(config, ".curves.csv"), rows)
        more["curves"] = rows
    if findings:
        more["sanity"] = {sha256: [f._asdict() for f in checks] for sha256, checks in findings.items()}
    if config.model_card:
        for target in targets:
            card = model_card(config, dataset, target, trials, progress)
            utils.write_text(beside(config, f".{target.sha256[:8]}.card.json"), card)
    utils.write_text(config.results, to_json(config, *found, **more))


def write_rows(path, rows):
    utils.write_text(path, utils.csv_text(list(rows[0]), rows))


def outputs(config):
    """The files that an evaluation always writes, and the one of its curves."""
    return [Path(config.results), *(beside(config, end) for end in (".csv", ".images.csv", ".curves.csv"))]


def beside(config, suffix):
    """A path beside the results, with their name and another suffix."""
    path = Path(config.results)
    return path.with_name(path.name.removesuffix(".json") + suffix)


def to_json(config, dataset, targets, trials, progress, **more):
    """Everything a reader needs to repeat or check the table, as JSON text; `more` adds entries."""
    report = {
        "settings": cli.config_dict(config),
        "data": dataset.describe(),
        "classes": list(dataset.classes),
        "checkpoints": [_entry(dataset, t, trials, progress) for t in targets],
        **more,
        "versions": utils.versions(),
    }
    return json.dumps(_finite(report), indent=2, allow_nan=False, default=str) + "\n"


def _finite(value):
    """The same with null for what JSON has no word for: NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _entry(dataset, target, trials, progress):
    labels, classes = dataset.test.labels.cpu(), dataset.classes
    entry = {"path": target.path, "sha256": target.sha256, "label": target.label, "depth": target.depth}
    entry["origin"] = target.origin
    applied = [trial for trial in trials if trial.applies_to(target)]
    outcomes = {trial: progress.of(target, trial) for trial in applied}
    entry["attacks"] = {t.key: _summary(t, o, labels, classes) for t, o in outcomes.items()}
    held = robust(target, trials, progress)
    entry["worst"] = {**counts(held), "per_class": per_class(held, labels, classes), "robust": bits(held)}
    entry["margins"] = margin_quantiles(outcomes[applied[0]])
    return entry


def counts(mask):
    """Accuracy in percent, its 95 % interval, and the numbers behind it."""
    correct, images = int(mask.sum()), len(mask)
    low, high = wilson(correct, images)
    return {
        "accuracy": percent(mask),
        "low": round(low, 4),
        "high": round(high, 4),
        "correct": correct,
        "images": images,
    }


def bits(mask):
    """A bool tensor as a string of 0 and 1, one an image in the order of the split."""
    return "".join("01"[value] for value in mask.tolist())


def _summary(trial, outcome, labels, classes):
    return {
        **counts(outcome.correct),
        "title": trial.title,
        "settings": trial.settings,
        "epsilon": trial.epsilon,
        "per_class": per_class(outcome.correct, labels, classes),
        "zero_gradient": int(outcome.zero_first.sum()) if outcome.gradients else None,
        "zero_gradient_ever": int(outcome.zero_ever.sum()) if outcome.gradients else None,
        "zero_gradient_always": int(outcome.zero_always.sum()) if outcome.gradients else None,
        "frozen": int(frozen(outcome).sum()),
        "max_delta": outcome.linf.max().item() if len(outcome) else 0.0,
        "median_l2": outcome.l2.median().item() if len(outcome) else 0.0,
        "range": [outcome.low, outcome.high],
        "seconds": round(outcome.seconds, 2),
        "robust": bits(outcome.correct),
    }


def table_rows(dataset, targets, trials, progress):
    """A row for each checkpoint and attack, Worst included: accuracy, interval, per-class accuracy."""
    labels = dataset.test.labels.cpu()
    for name, target in zip(row_labels(targets), targets, strict=True):
        masks = {t.key: progress.of(target, t).correct for t in trials if t.applies_to(target)}
        for key, mask in {**masks, "worst": robust(target, trials, progress)}.items():
            start = {"training": name, "sha256": target.sha256, "attack": key}
            yield {**start, **counts(mask), **per_class(mask, labels, dataset.classes)}


def image_rows(dataset, targets, trials, progress):
    """A row for each checkpoint and image, numbered among those measured: what each attack made of it."""
    labels = dataset.test.labels.cpu().tolist()
    for name, target in zip(row_labels(targets), targets, strict=True):
        columns = {}
        for trial in trials:
            there = trial.applies_to(target)
            predicted = progress.of(target, trial).predicted.tolist() if there else [None] * len(labels)
            columns[f"{trial.key} predicts"] = predicted
        columns["clean margin"] = [f"{m:.6g}" for m in progress.of(target, trials[0]).margin.tolist()]
        columns["robust"] = robust(target, trials, progress).int().tolist()
        for index, label in enumerate(labels):
            values = {column: cells[index] for column, cells in columns.items()}
            yield {"training": name, "image": index, "label": label, **values}


def curve_rows(targets, points, progress):
    """A row for each checkpoint and point of a curve."""
    for name, target in zip(row_labels(targets), targets, strict=True):
        for attack, axis, value, trial in points:
            if trial.applies_to(target):
                start = {"training": name, "sha256": target.sha256, "attack": attack, "axis": axis}
                settings = {"epsilon": trial.epsilon, "settings": trial.settings}
                yield {**start, "value": value, **counts(progress.of(target, trial).correct), **settings}


def model_card(config, dataset, target, trials, progress):
    """What RobustBench's model_info files hold, as JSON text: accuracies in percent as text.

    `reported` is what the attacks of the table leave, each by itself the lowest; `autoattack_acc` is null
    where AutoAttack was not among them, and `unreliable` where another attack leaves much less than it.
    """
    accuracies = {t.key: progress.of(target, t).accuracy for t in trials if t.applies_to(target)}
    bounded = [accuracies[t.key] for t in trials if t.key in accuracies and t.bounded]
    autoattack = accuracies.get("autoattack")
    images = f"{len(dataset.test):,} {dataset.tested} images"
    card = {
        "link": "https://arxiv.org/abs/1904.00887",
        "name": "Adversarial Defense by Restricting the Hidden Space of Deep Neural Networks",
        "authors": "Aamir Mustafa, Salman Khan, Munawar Hayat, Roland Goecke, Jianbing Shen, Ling Shao",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": dataset.name,
        "venue": "ICCV 2019",
        "architecture": f"ResNet-{target.depth}",
        "eps": in_255ths(config.epsilon),
        "clean_acc": f"{accuracies[CLEAN]:.2f}",
        "reported": f"{min(bounded):.2f}",
        "autoattack_acc": None if autoattack is None else f"{autoattack:.2f}",
        "footnote": f"{target.label}, retrained; sha256 {target.sha256}; {images}.",
        "unreliable": autoattack is not None and min(bounded) < autoattack - 1,
    }
    return json.dumps(card, indent=2) + "\n"
