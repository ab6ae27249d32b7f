"""What an evaluation found, as a reader wants it: the table, its footnotes, JSON, CSV and model cards."""

import json

import cli
import data
import utils

from . import checks, pictures, seeds, signs
from .outcome import counts, margin_quantiles, per_class, percent
from .trials import CLEAN, beside, in_255ths

PUBLISHED = (
    "Published by the authors for depth 110, without attack and under FGSM, BIM, MIM and PGD: Softmax 92.15, "
    "21.48, 0.01, 0.02, 0.00; PCL 89.55, 55.76, 39.75, 36.44, 31.10. Their robust checkpoint, under "
    "AutoAttack: 0.28."
)

PAPER = {  # in a model card of a network with prototypes
    "link": "https://arxiv.org/abs/1904.00887",
    "name": "Adversarial Defense by Restricting the Hidden Space of Deep Neural Networks",
    "authors": "Aamir Mustafa, Salman Khan, Munawar Hayat, Roland Goecke, Jianbing Shen, Ling Shao",
    "venue": "ICCV 2019",
}


def publish(results):
    """Write all files, then print the table, its footnotes and the findings of --sanity."""
    findings = {t.sha256: checks.sanity(results, t) for t in results.targets if results.checks}
    write(results, findings)
    utils.say("\n" + table(results) + "\n")
    for line in footnotes(results):
        utils.say(line)
    for label, target in results.labeled():
        if findings:
            utils.say(f"\nsanity of {label}:")
        for finding in findings.get(target.sha256, ()):
            utils.say(str(finding))
    curves = list(curve_rows(results))
    if curves and not pictures.curves(curves, beside(results.config, ".curves.png")):
        utils.say("no picture of the curves: pip install matplotlib")
    labels = {target.sha256: label for label, target in results.labeled()}
    for target, trial in results.pairs():
        folder = results.images_folder(target, trial)
        if folder is not None and folder.is_dir():
            pictures.sheet(
                folder, results.dataset.classes, f"{trial.title} on {labels[target.sha256]}", trial.radius
            )


# ---------------------------------------------------------------- on the screen


def table(results):
    """The table of the README: a row for each target, a column for each attack, accuracy in percent.

    The columns count as the paper does, each by itself; Worst is right without attack and under every one.
    """
    attacked = len(results.trials) > 1
    worst = [False, *([True] if results.config.eight_bit else [])] if attacked else []  # rounded or not
    last = ["Worst, 8 bits" if rounded else "Worst" for rounded in worst]
    rows = [["Training", *(trial.title for trial in results.trials), *last]]
    for label, targets in seeds.rows(results):
        found = [{trial.key: outcome.accuracy for trial, outcome in results.row(t)} for t in targets]
        shown = {key: seeds.spread([accuracies[key] for accuracies in found]) for key in found[0]}
        last = [seeds.spread([percent(results.robust(t, rounded)) for t in targets]) for rounded in worst]
        rows.append([label, *(shown.get(trial.key, "-") for trial in results.trials), *last])
    return utils.markdown_table(rows)


def footnotes(results):
    """The settings under a table, line by line, and what the results say of themselves."""
    config, dataset = results.config, results.dataset
    resnets = all(target.depth for target in results.targets)
    if resnets and dataset.classes == data.CIFAR10_CLASSES and in_255ths(config.epsilon) == "8/255":
        yield PUBLISHED
    rule = "" if config.predict == "softmax" else "; predicted by the nearest prototype (Eq. 6)"
    yield (
        f"Accuracy in percent on {len(dataset.test):,} {dataset.tested} images of {dataset.name}; "
        f"L-infinity, epsilon {in_255ths(config.epsilon)}; seed {config.seed}{rule}."
    )
    if len(results.trials) > 1:
        yield "; ".join(trial.settings for trial in results.trials[1:]) + "."
        yield "Worst: right without attack and under every attack of the row, image by image."
    if seeds.summary(results):
        yield seeds.NOTE
    for label, target in results.labeled():
        depth = f", depth {target.depth}" if target.depth else ""
        yield f"{label}: {target.path or 'held by the caller'}{depth}, sha256 {target.sha256[:12]}."
        _, *attacked = results.row(target)
        if attacked:
            worst = counts(results.robust(target))
            largest = max((o.linf.max().item() for trial, o in attacked if trial.bounded), default=0.0)
            yield (
                f"  Worst {worst['accuracy']:.2f} (95 % interval {worst['low']:.2f} to {worst['high']:.2f}); "
                f"largest change {in_255ths(largest)}"
            )
        for line in (*checks.under_table(results, target), *signs.under_table(results, target)):
            yield f"  {line}"


# ---------------------------------------------------------------- files


def write(results, findings):
    """Write the JSON file at `config.results`; table, curves and model cards lie beside it."""
    config = results.config
    write_rows(beside(config, ".csv"), list(table_rows(results)))
    if rows := list(curve_rows(results)):
        write_rows(beside(config, ".curves.csv"), rows)
    for target in results.targets if config.model_card else ():
        card = json.dumps(model_card(results, target), indent=2) + "\n"
        utils.write_text(beside(config, f".{target.sha256[:8]}.card.json"), card)
    utils.write_text(config.results, as_json(results, findings))


def as_json(results, findings):
    """All numbers of an evaluation, and what it needs to be repeated, as JSON text."""
    more = {}
    if rows := list(curve_rows(results)):
        more["curves"] = rows
    if findings:
        more["sanity"] = {sha256: [f._asdict() for f in found] for sha256, found in findings.items()}
    if grouped := seeds.summary(results):
        more["seeds"] = grouped
    more["source_sha256"] = results.source and results.source.sha256
    entries = [_entry(results, target) for target in results.targets]
    return to_json(results.config, results.dataset, entries, **more)


def write_rows(path, rows):
    utils.write_text(path, utils.csv_text(list(rows[0]), rows))


def to_json(config, dataset, entries, **more):
    """Everything a reader needs to repeat or check a table, as JSON text: one entry for each checkpoint."""
    report = {
        "settings": cli.config_dict(config),
        "data": dataset.describe(),
        "classes": list(dataset.classes),
        "checkpoints": entries,
        **more,
        "versions": utils.versions(),
    }
    return json.dumps(report, indent=2, allow_nan=False, default=str) + "\n"


def about(target):
    """What identifies a checkpoint, and what it was made by."""
    return {name: getattr(target, name) for name in ("path", "sha256", "label", "depth", "origin")}


def _entry(results, target):
    labels, classes = results.dataset.test.labels.cpu(), results.dataset.classes
    row, held, rounded = results.row(target), results.robust(target), results.config.eight_bit
    return {
        **about(target),
        "attacks": {trial.key: _summary(trial, outcome, labels, classes, rounded) for trial, outcome in row},
        "worst": {**counts(held), "per_class": per_class(held, labels, classes), "robust": _bits(held)},
        **({"worst_8bit": counts(results.robust(target, True))} if rounded else {}),
        "margins": margin_quantiles(row[0][1]),
        "predictions_changed": row[0][1].changed,
    }


def _bits(mask):
    """A bool tensor as a string of 0 and 1, one an image in the order of the split."""
    return "".join("01"[value] for value in mask.tolist())


def _summary(trial, outcome, labels, classes, rounded):
    zeros = {"": outcome.zero_first, "_ever": outcome.zero_ever, "_always": outcome.zero_always}
    return {
        **counts(outcome.correct),
        "title": trial.title,
        "settings": trial.settings,
        "epsilon": trial.epsilon,
        "per_class": per_class(outcome.correct, labels, classes),
        **{f"zero_gradient{n}": int(zero.sum()) if outcome.gradients else None for n, zero in zeros.items()},
        "frozen": int(outcome.frozen.sum()),
        "lost": int(outcome.lost.sum()),
        **({"rounded_8bit": counts(outcome.right_8bit)} if rounded else {}),
        "max_delta": outcome.linf.max().item(),
        "median_l2": outcome.l2.median().item(),
        "range": [outcome.low, outcome.high],
        "seconds": round(outcome.seconds, 2),
        "robust": _bits(outcome.correct),
    }


def table_rows(results):
    """A row for each checkpoint and attack, Worst included; `class:X` is the accuracy of class X."""
    labels, classes = results.dataset.test.labels.cpu(), results.dataset.classes
    for name, target in results.labeled():
        masks = {trial.key: outcome.correct for trial, outcome in results.row(target)}
        masks["worst"] = results.robust(target)
        if results.config.eight_bit:
            masks["worst-8-bit"] = results.robust(target, rounded=True)
        for key, mask in masks.items():
            start = {"training": name, "sha256": target.sha256, "attack": key}
            by_class = per_class(mask, labels, classes)
            yield {**start, **counts(mask), **{f"class:{c}": percent for c, percent in by_class.items()}}


def curve_rows(results):
    """A row for each checkpoint and point of a curve."""
    for name, target in results.labeled():
        for attack, axis, value, trial in results.points:
            if trial.applies_to(target):
                start = {"training": name, "sha256": target.sha256, "attack": attack, "axis": axis}
                settings = {"epsilon": trial.epsilon, "settings": trial.settings}
                yield {**start, "value": value, **counts(results.of(target, trial).correct), **settings}


def model_card(results, target):
    """What RobustBench's model_info files hold: accuracies in percent as text.

    `reported` is what the attacks of the table leave, each by itself the lowest; `autoattack_acc` is null
    where AutoAttack was not among them, and `unreliable` where another attack leaves much less than it.
    """
    dataset, row = results.dataset, results.row(target)
    left = {trial.key: outcome.accuracy for trial, outcome in row if trial.bounded}
    lowest, autoattack = min(left.values()), left.get("autoattack")
    images = f"{len(dataset.test):,} {dataset.tested} images"
    other = "CNN-6" if target.arguments else target.label
    return {
        **(PAPER if target.has_pull else dict.fromkeys(PAPER) | {"name": target.label}),
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": dataset.name,
        "architecture": f"ResNet-{target.depth}" if target.depth else other,
        "eps": in_255ths(results.config.epsilon),
        "clean_acc": f"{left[CLEAN]:.2f}",
        "reported": f"{lowest:.2f}",
        "autoattack_acc": None if autoattack is None else f"{autoattack:.2f}",
        "footnote": f"{target.label}, retrained; sha256 {target.sha256}; {images}.",
        "unreliable": autoattack is not None and lowest < autoattack - 1,
    }
