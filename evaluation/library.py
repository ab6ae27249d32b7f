"""The evaluation as one call, on any network that a caller passes in."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

import cli
import data
import models
import utils
from attacks.common import check_input

from . import autoattack, checks, report, trials
from .measure import measure_each
from .networks import fingerprint, target_of
from .outcome import Outcome
from .results import Results
from .settings import Settings
from .target import load_target


class Evaluation(NamedTuple):
    """What `evaluate` found; `print` shows the table and the lines under it.

    table: in Markdown, as robustness.py prints it. notes: the lines under it. warnings: those of the notes
    that warn, or tell of a failed check.
    outcomes: from the name of an attack (`clean`: without) to its `Outcome`, with a value for each image.
    robust: which images, (N,) bool, are right without attack and under every one.
    json: the text of the JSON file that robustness.py writes.
    """

    table: str
    notes: list[str]
    warnings: list[str]
    outcomes: dict[str, Outcome]
    robust: Tensor
    json: str

    def __str__(self):
        return "\n".join([self.table, "", *self.notes])


def evaluate(
    model, images, labels, *,
    attacks=Settings.attacks, epsilon=8 / 255, classes=None, criterion=None, **settings
):  # fmt: skip
    """Attack `model`, an nn.Module, on `images` with `labels`; return an `Evaluation`.

    model: maps images to logits, N x num_classes, or to a tuple with a field `logits`. It is attacked in eval
        mode on its own device. Its weights do not change, and the mode of each module is restored.
    images: float in [0, 1], N x C x H x W; the model normalises them itself. labels: whole, (N,).
    attacks: names of ATTACKS, or one. classes: names, one for each logit.
    criterion: the PrototypeConformityLoss that the model was trained with, for the attacks on it.
    settings: fields of `Settings`, such as num_steps=50, random_start=True, sanity=True or seed=1.
    Raises UsageError for settings or a network that cannot be used, DataError for such images or labels.
    """
    attacks = (attacks,) if isinstance(attacks, str) else tuple(attacks)
    config = Settings(attacks=attacks, epsilon=epsilon, **settings)
    cli.validate(config)
    if not isinstance(model, torch.nn.Module):
        raise utils.UsageError(f"model is a {type(model).__name__}; it must be an nn.Module")
    for name, value in {"images": images, "labels": labels}.items():
        if not isinstance(value, Tensor):
            raise utils.DataError(f"{name} are a {type(value).__name__}; give torch.as_tensor({name})")
    with utils.evaluating(model):
        device = next((t.device for t in (*model.parameters(), *model.buffers())), images.device)
        images, labels = _checked(images.detach().to(device), labels.to(device))
        label, sample = type(model).__name__, images[:2]
        target = target_of(model, fingerprint(model), "", sample, classes and len(classes), label)
        target = dataclasses.replace(target, prototypes=criterion).predicting(config.predict)
        with torch.no_grad():
            classes = tuple(classes or map(str, range(target.logits(sample).shape[1])))
        if labels.max() >= len(classes) or labels.min() < 0:
            raise utils.DataError(
                f"labels lie in [{labels.min()}, {labels.max()}], of {len(classes)} classes"
            )
        dataset = data.Dataset("the caller", classes, None, data.Split(images, labels))
        results = assemble(config, dataset, [target])
        for _ in measure_each(results):
            pass
        findings = {target.sha256: checks.sanity(results, target)} if results.checks else {}
    return _evaluation(results, target, findings)


def _evaluation(results, target, findings):
    """Return the `Evaluation` of one target's results."""
    notes = list(report.footnotes(results)) + [str(f) for found in findings.values() for f in found]
    return Evaluation(
        report.table(results),
        notes,
        [note.strip() for note in notes if note.strip().startswith(("WARN", "FAIL"))],
        {trial.key: outcome for trial, outcome in results.row(target)},
        results.robust(target),
        report.as_json(results, findings),
    )


def _checked(images, labels):
    """Return images and int64 labels that an attack takes; DataError for others."""
    try:
        check_input(images, labels)
    except ValueError as error:
        raise utils.DataError(str(error)) from None
    if not len(images) or labels.is_floating_point():
        raise utils.DataError(
            f"there are {len(images)} images with {labels.dtype} labels: one or more, whole"
        )
    return images, labels.long()


def assemble(config, dataset, targets):
    """Return the `Results`, still without outcomes, of all that `config` asks for.

    Raises UsageError, and CheckpointError for a network that takes other images.
    """
    if "autoattack" in config.attacks:
        autoattack.find()
    if config.predict == "prototype" and not all(target.has_pull for target in targets):
        raise utils.UsageError("--predict prototype: such a network has no prototypes; --predict softmax")
    device, classes = dataset.test.images.device, len(dataset.classes)
    size = config.batch_size or (500 if device.type == "cuda" else 100)
    config = dataclasses.replace(config, batch_size=size)
    path = config.source_checkpoint
    source = None if path is None else load_target(path, device, dataset.classes)
    for target in (*targets, *([source] if source else [])):
        if target.arguments:  # `target_of` has checked other people's networks
            models.check_images(target.arguments, target.path, dataset)
    needed = checks.trials(config, classes, source) if config.sanity else {}
    table, curves = trials.table(config, classes, source), trials.curves(config, classes)
    return Results(config, dataset, targets, table, curves, needed, source)
