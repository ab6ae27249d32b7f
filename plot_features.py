"""The hidden space in two dimensions: clean images above, the same images under attack below (Figure 1).

    python plot_features.py

One column a checkpoint, by default those that robustness.py measures. The axes of a column are the first two
principal ones of its clean features; a feature of two units is drawn as it is. Stars are the prototypes that
features were pulled to, where the checkpoint holds them. The numbers behind the picture, of the features as
they are and not of their projection, are printed and written as JSON beside it. The picture needs matplotlib
(`pip install matplotlib`), the numbers do not.
"""

import os
import sys

if __name__ == "__main__":  # before torch is imported, which takes seconds
    sys.path.insert(0, os.path.dirname(os.path.realpath(sys.argv[0])))
    import startup

    startup.begin()

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

import checkpoints
import cli
import data
import evaluation
import models
import robustness
import utils
from cli import Count, Epsilon, NotNegative, Seed, StepSize
from evaluation import report, trials
from evaluation.target import labels_of

SUFFIXES = (".png", ".pdf", ".svg")
LAYERS = ("layer2", "layer3", "fc")
# Noise, and what follows the gradient of a loss that every network has.
ATTACKS = (
    "noise",
    *(name for name, attack in evaluation.ATTACKS.items() if attack.loss and not attack.needs_prototypes),
)
# Petroff, "Accessible color sequences for data visualization" (2021), made for the colour-blind too; of its
# two greys, the pair most alike, the darker is near black here.
COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
    "#a96b59", "#e76300", "#b9ac70", "#222222", "#92dadd",
)  # fmt: skip
HEADINGS = {  # of the numbers in the table
    "accuracy": "Accuracy %",
    "within": "Within",
    "between": "Between",
    "ratio": "Within/between",
    "overlap": "Overlap %",
    "moved": "Moved",
    "shown": "Shown %",
}
LEGEND_LIMIT = 20  # classes beyond which a legend would say nothing
BLOCK = 1024  # rows of the distance matrix at a time


@dataclass(frozen=True)
class Config:
    # data and files
    dataset: Literal[data.DATASETS] = "cifar10"  # folder: DATA_DIR/test/<class>/*
    data_dir: str = "data"  # where the images are, or are downloaded to
    limit: Count | None = 1000  # so many test images, the first of each class; none: all
    checkpoints: tuple[str, ...] = ()  # the columns; none: the scripts' own, or all in their folders
    picture: str = "features.png"  # .png, .pdf or .svg; the numbers lie beside it as .json
    overwrite: bool = False  # replace picture and numbers that are there
    # features
    layer: Literal[LAYERS] = "fc"  # layer2, layer3 or fc, the penultimate one
    # attack
    attack: Literal[ATTACKS] = "pgd"  # by the names and with the settings of robustness.py
    epsilon: Epsilon = 8 / 255  # L-infinity radius, of the pixel range [0, 1]; 0.3 on mnist, fashion-mnist
    num_steps: Count = 10  # of all but FGSM
    step_size: StepSize | None = None  # none: as in robustness.py
    random_start: bool = False  # PGD from a random point of the ball; the released evaluation does not
    decay: NotNegative = 1.0  # of MIM's momentum
    # run
    batch_size: Count = 500
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    seed: Seed = 0

    follows = robustness.Config.follows


# ---------------------------------------------------------------- features


class Cloud(NamedTuple):
    """Features of N images, float64 N x D, and which images are classified right, bool (N,); on the CPU."""

    features: Tensor
    correct: Tensor


class Column(NamedTuple):
    """What the picture and the table show of one checkpoint: rows `clean` and `attacked`, in that order."""

    target: evaluation.Target
    width: int  # of the features
    points: dict[str, Tensor]  # name of the row: N x 2
    prototypes: Tensor | None  # num_classes x 2
    numbers: dict[str, dict[str, float | None]]


def collect(config, target, split):
    """The features of `split` at `config.layer`: `clean` and under the attack, in the order of the split.

    Float32 in eval mode; for the same settings and seed the images are those of `robustness.py`.
    """
    names = ("epsilon", "num_steps", "step_size", "random_start", "decay")
    same = {name: getattr(config, name) for name in names}
    trial = trials.make(config.attack, robustness.Config(**same, apgd_steps=config.num_steps))
    blocks = {"clean": [], "attacked": []}
    starts, size = range(0, len(split), config.batch_size), config.batch_size
    for start in utils.progress(starts, len(starts), target.label):
        clean, attacked, labels, _ = evaluation.attack_block(target, trial, split, start, size, config.seed)
        for name, images in (("clean", clean), ("attacked", attacked)):
            with evaluation.exact_float32(), torch.no_grad():
                outputs = target.model(images)
            if name == "clean":
                evaluation.check_scores(outputs.logits, labels, target.path)
            correct = outputs.logits.argmax(1) == labels
            blocks[name].append((getattr(outputs, config.layer).cpu().double(), correct.cpu()))
    rows = {name: Cloud(*map(torch.cat, zip(*parts, strict=True))) for name, parts in blocks.items()}
    for name, cloud in rows.items():
        if not cloud.features.isfinite().all():
            raise utils.DivergenceError(f"{target.path}: {name} {config.layer} features hold NaN or Inf")
    return rows


def prototypes_of(target, layer):
    """The prototypes that features at `layer` were pulled to, or else pushed from, float64; None without."""
    loss = target.prototypes
    for terms in () if loss is None else (loss.proximity, loss.contrastive):
        if layer in terms:
            return terms[layer].centers.cpu().double()
    return None


# ---------------------------------------------------------------- two dimensions


def principal_axes(features):
    """The frame in which N x D features, D from 2 up, are drawn: origin (D,) and axes (2, D), in float64.

    Orthonormal directions of largest variance, the larger first; of either direction's two signs the one
    where the entry of largest size is positive. Two units are drawn as they are: origin 0, unit axes.
    """
    features = features.double()
    if features.shape[1] == 2:
        return torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    origin = features.mean(0)
    rows = torch.cat([features - origin, torch.zeros(2, features.shape[1], dtype=torch.float64)])
    axes = torch.linalg.svd(rows, full_matrices=False).Vh[:2]  # two even of a single image: hence the zeros
    return origin, axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()


def project(features, origin, axes):
    """Coordinates, N x 2, of N x D features in the frame of `principal_axes`."""
    return (features.double() - origin) @ axes.T


# ---------------------------------------------------------------- numbers


def pair_distances(features, labels):
    """Mean Euclidean distance of two images of one class, and of two of different classes.

    Every pair counts once; an image and itself are no pair. None: there is no such pair.
    """
    features = features - features.mean(0)  # what cdist loses grows with the distance from the origin
    sums, counts = [0.0, 0.0], [0, 0]
    for start in range(0, len(labels), BLOCK):
        rows = slice(start, start + BLOCK)
        distances = torch.cdist(features[rows], features)
        same = labels[rows, None] == labels
        distances.diagonal(start).zero_()
        for index, mask in enumerate((same, ~same)):
            sums[index] += distances[mask].sum().item()
            counts[index] += mask.sum().item()
    counts[0] -= len(labels)
    return tuple(total / count if count else None for total, count in zip(sums, counts, strict=True))


def overlap(features, labels, clean):
    """Percent of the images nearer to the mean clean feature of another class than to that of their own."""
    present, places = labels.unique(return_inverse=True)
    means = torch.stack([clean[labels == label].mean(0) for label in present])
    return 100 * (torch.cdist(features, means).argmin(1) != places).double().mean().item()


def shown(features, points):
    """Percent of the variance of N x D features that their N x 2 projection holds; None: they do not vary."""
    total = features.var(0, correction=0).sum().item()
    return 100 * points.var(0, correction=0).sum().item() / total if total else None


def measure(rows, points, labels):
    """What the picture shows as numbers, for clean and attacked images, None where there is no such number.

    accuracy: percent classified right. within, between, ratio: `pair_distances` and their quotient. overlap:
    percent nearer to the clean mean of another class than to their own's. moved: mean distance between an
    image's feature and its clean feature. shown: percent of the variance that the `points` hold.
    """
    clean = rows["clean"].features
    numbers = {}
    for name, (features, correct) in rows.items():
        within, between = pair_distances(features, labels)
        numbers[name] = {
            "accuracy": 100 * correct.double().mean().item(),
            "within": within,
            "between": between,
            "ratio": within / between if within is not None and between else None,
            "overlap": overlap(features, labels, clean),
            "moved": (features - clean).norm(dim=1).mean().item(),
            "shown": shown(features, points[name]),
        }
    return numbers


def make_column(config, target, dataset):
    """Attack, project and measure one checkpoint."""
    rows = collect(config, target, dataset.test)
    clean = rows["clean"].features
    frame = principal_axes(clean)
    points = {name: project(cloud.features, *frame) for name, cloud in rows.items()}
    prototypes = prototypes_of(target, config.layer)
    drawn = None if prototypes is None else project(prototypes, *frame)
    return Column(target, clean.shape[1], points, drawn, measure(rows, points, dataset.test.labels.cpu()))


# ---------------------------------------------------------------- reports


def table(columns):
    """The numbers in Markdown: two rows a checkpoint, clean and attacked."""
    rows = [["Checkpoint", "Images", *HEADINGS.values()]]
    for column in columns:
        for name, numbers in column.numbers.items():
            cells = ["-" if numbers[key] is None else f"{numbers[key]:.4g}" for key in HEADINGS]
            rows.append([column.target.label, name, *cells])
    return utils.markdown_table(rows)


def attack_title(config):
    """The attack as a heading has it: its name and its radius."""
    return f"{evaluation.ATTACKS[config.attack].title}, ε = {evaluation.in_255ths(config.epsilon)}"


# ---------------------------------------------------------------- the picture


def palette(count):
    """`count` colours: the ten of the palette, or, where there are more classes, a walk round the hues."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    import matplotlib

    return [matplotlib.colormaps["hsv"](index / count) for index in range(count)]


def view(column):
    """Centre (x, y) and half the side of a square around 99 % of either row and all prototypes."""
    middle = torch.tensor([0.005, 0.995], dtype=torch.float64)
    clouds = [cloud.quantile(middle, 0) for cloud in column.points.values()]
    corners = torch.cat([*clouds, *([] if column.prototypes is None else [column.prototypes])])
    low, high = corners.amin(0), corners.amax(0)
    return ((low + high) / 2).tolist(), 0.54 * (high - low).max().item() or 1.0


def draw(config, dataset, columns, figure_class):
    """The picture as a matplotlib figure: a column a checkpoint, clean above and attacked below."""
    colours = palette(len(dataset.classes))
    names = dataset.classes if len(dataset.classes) <= LEGEND_LIMIT else ()
    legend_columns = min(3 * len(columns), 6)
    legend_rows = -(-(len(names) + 1) // legend_columns)
    size = 4.4 * len(columns) + 0.9, 10.3 + 0.3 * legend_rows  # inches: a panel is at most 4.4 by 4.4
    figure = figure_class(figsize=size, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    grid = figure.subplots(2, len(columns), squeeze=False)
    labels = dataset.test.labels.cpu()
    titles = {"clean": "no attack", "attacked": attack_title(config)}
    for panels, (name, title) in zip(grid, titles.items(), strict=True):
        panels[0].set_ylabel(title, fontsize=14, labelpad=8)
        for panel, column in zip(panels, columns, strict=True):
            draw_panel(panel, column, name, labels, colours)
    shown_names = dict(zip(names, colours, strict=False))
    legend(figure, shown_names, any(c.prototypes is not None for c in columns), legend_columns)
    return figure


def draw_panel(panel, column, name, labels, colours):
    """One row of one column: the points in random order, so that no class lies on top, and the prototypes."""
    order = torch.randperm(len(labels), generator=utils.generator(0, "order of drawing"))
    size = 14 if len(labels) <= 2000 else 6  # points squared
    dots = [colours[label] for label in labels[order]]
    panel.scatter(*column.points[name][order].T.numpy(), s=size, c=dots, alpha=0.6, linewidths=0)
    if column.prototypes is not None:
        stars = {"marker": "*", "s": 170, "edgecolors": "black", "linewidths": 0.9}
        panel.scatter(*column.prototypes.T.numpy(), c=colours, **stars)
    (x, y), half = view(column)
    panel.set(xlim=(x - half, x + half), ylim=(y - half, y + half), aspect="equal", xticks=[], yticks=[])
    panel.spines[:].set(color="#bbbbbb")
    numbers = column.numbers[name]
    panel.set_title(f"{column.target.label}: accuracy {numbers['accuracy']:.1f} %", fontsize=14)
    notes = {"ratio": "within/between {:.2f}", "overlap": "overlap {:.0f} %"}
    notes["shown"] = "variance shown {:.0f} %"
    known = [note.format(numbers[key]) for key, note in notes.items() if numbers[key] is not None]
    panel.set_xlabel("   ".join(known), fontsize=10.5, color="#444444")


def legend(figure, colours, prototypes, columns):
    """One legend for all panels, below them: `colours` by class name, and the star."""
    from matplotlib.lines import Line2D

    dot = {"linestyle": "none", "marker": "o", "markersize": 8, "markeredgecolor": "none"}
    star = {"linestyle": "none", "marker": "*", "markersize": 12, "markeredgecolor": "black"}
    handles = [Line2D([], [], color=colour, label=name, **dot) for name, colour in colours.items()]
    if prototypes:
        handles.append(Line2D([], [], color="white", label="prototype", **star))
    if handles:
        style = {"loc": "outside lower center", "frameon": False, "fontsize": 12}
        figure.legend(handles=handles, ncols=columns, columnspacing=1.5, handletextpad=0.2, **style)


def save_picture(config, dataset, columns):
    """Draw and write the picture; UsageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise utils.UsageError(
            f"{config.picture}: drawing needs matplotlib: pip install matplotlib; the numbers are written"
        ) from None
    figure = draw(config, dataset, columns, Figure)
    with utils.replacing(config.picture) as temporary:
        figure.savefig(temporary, format=Path(config.picture).suffix[1:], dpi=150)
    utils.say(f"picture: {config.picture}")


def main(config: Config) -> None:
    paths = robustness.checkpoints_of(config)
    if Path(config.picture).suffix not in SUFFIXES:
        raise utils.UsageError(f"--picture {config.picture}: picture ends in {', '.join(SUFFIXES)}")
    numbers = Path(config.picture).with_suffix(".json")
    remedy = "--overwrite replaces it, --picture names another"
    utils.claim((config.picture, numbers), lambda path: config.overwrite, remedy)
    device = utils.select_device(config.device)
    for path in paths:
        checkpoints.check_file(path)
    dataset = data.load(config.dataset, config.data_dir, limit=config.limit, device=device, splits=("test",))
    trials.check_classes([config.attack], len(dataset.classes))
    targets = [evaluation.load_target(path, device, dataset.classes) for path in paths]
    for target in targets:
        models.check_images(target.arguments, target.path, dataset)
    named = zip(targets, labels_of(targets), strict=True)
    targets = [dataclasses.replace(target, label=label) for target, label in named]
    columns = [make_column(config, target, dataset) for target in targets]
    entries = [
        {
            **report.about(c.target),
            "feature_width": c.width,
            "prototypes": c.prototypes is not None,
            **c.numbers,
        }
        for c in columns
    ]
    utils.write_text(numbers, report.to_json(config, dataset, entries))
    utils.say("\n" + table(columns) + "\n")
    utils.say(
        f"Features at {config.layer} of {len(dataset.test):,} test images of {dataset.name}; "
        f"attacked: {attack_title(config)}; seed {config.seed}; numbers: {numbers}"
    )
    save_picture(config, dataset, columns)


if __name__ == "__main__":
    cli.run(main, Config)
