"""Pictures of an evaluation: accuracy curves, and images before and after an attack."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import utils

from .measure import eight_bit
from .trials import ATTACKS, in_255ths

SHOWN = 10  # images in a picture
ENLARGED = 4  # times
MAGNIFIED = 10  # times the difference, around mid-grey
CAPTION, LINE, TEXT = 130, 22, 15  # width of a row's caption, height of a line of text, size of its letters
BLACK, RED, GREY = "#000000", "#c00000", "#707070"
# Colours that colour-blind readers tell apart (Okabe & Ito 2008), dashes and marks that print in black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
MARKS = "os^Dvx"
WIDEST, THINNEST = 5.0, 1.2  # points; later lines are thinner, so that equal ones below them show


def curves(rows, path):
    """Draw accuracy against epsilon and against the number of steps, `report.curve_rows`, into PNG and PDF.

    A network has a colour, an attack a dash and a mark. Return False, having drawn nothing, where matplotlib
    is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = [axis for axis in ("epsilon", "steps") if any(row["axis"] == axis for row in rows)]
    figure = Figure(figsize=(1.8 + 4.4 * len(axes), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    lines = dict.fromkeys((row["training"], row["attack"]) for row in rows)
    styles = _styles(list(dict.fromkeys(n for n, _ in lines)), list(dict.fromkeys(a for _, a in lines)))
    for axis, panel in zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True):
        _draw(panel, axis, [row for row in rows if row["axis"] == axis], {k: styles[k] for k in lines})
    _legend(figure, lines, styles)
    with rc_context({"pdf.fonttype": 42}):  # letters that stay letters
        for name, kept in ((path, {}), (path.with_suffix(".pdf"), {"CreationDate": None})):
            with utils.replacing(name) as temporary:
                figure.savefig(temporary, format=name.suffix[1:], dpi=200, metadata=kept)
    return True


def _styles(networks, attacks):
    """Return the style of each (network, attack): later lines are thinner, and the last attack is opaque."""
    count, styles = len(networks) * len(attacks), {}
    for i, network in enumerate(networks):
        for k, attack in enumerate(attacks):
            share = (k * len(networks) + i) / max(count - 1, 1)
            look = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[k % len(DASHES)]}
            look |= {"marker": MARKS[k % len(MARKS)], "markersize": 5, "markerfacecolor": "white"}
            order = {"linewidth": WIDEST + share * (THINNEST - WIDEST), "zorder": 2 + share}
            styles[network, attack] = {**look, **order, "alpha": 1.0 if k + 1 == len(attacks) else 0.5}
    return styles


def _draw(panel, axis, rows, styles):
    """One panel: a line with its 95 % band for each checkpoint and attack."""
    scale, name = (255, "epsilon, in 1/255") if axis == "epsilon" else (1, "steps")
    for (training, attack), style in styles.items():
        line = [row for row in rows if (row["training"], row["attack"]) == (training, attack)]
        x = [scale * row["value"] for row in line]
        panel.plot(x, [row["accuracy"] for row in line], **style)
        band = {"color": style["color"], "alpha": 0.12, "linewidth": 0}
        panel.fill_between(x, [row["low"] for row in line], [row["high"] for row in line], **band)
    ticks = sorted({round(scale * row["value"], 2) for row in rows})
    if axis == "steps" and ticks[-1] >= 20 * ticks[0]:
        panel.set_xscale("log")
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel(name)
    panel.set_ylabel("accuracy, %")
    panel.set_ylim(-3, 103)
    panel.grid(alpha=0.3)


def _legend(figure, lines, styles):
    """What colours, dashes and marks mean, to the right of all panels."""
    from matplotlib.lines import Line2D

    plain, handles = {"linewidth": 2, "alpha": 1.0}, []
    for training, attack in {training: (training, attack) for training, attack in lines}.values():
        handles.append(Line2D([], [], color=styles[training, attack]["color"], linewidth=4, label=training))
    for training, attack in {attack: (training, attack) for training, attack in lines}.values():
        style = {**styles[training, attack], **plain, "color": BLACK}
        handles.append(Line2D([], [], **style, label=ATTACKS[attack].title))
    figure.legend(handles=handles, loc="outside right upper", fontsize="small", handlelength=3.5)


def sheet(folder, classes, title, epsilon):
    """Draw the first images kept in `folder` into FOLDER.png: the original, the adversarial, the difference.

    The text under an image is its class, true or predicted; under an original it is both where they differ.
    Adversarial images are drawn and classified as a PNG holds them. One that fools the network only before
    rounding is marked "not as PNG".
    """
    folder = Path(folder)
    block = torch.load(min(folder.glob("*.pt")), map_location="cpu", weights_only=True)
    clean, attacked = block["images"][:SHOWN], block["adversarial"][:SHOWN]
    difference = (0.5 + MAGNIFIED * (attacked - clean)).clamp(0, 1)
    names = ("labels", "predicted_clean", "predicted", "predicted_8bit")
    labels, before, predicted, rounded = (block[name][:SHOWN].tolist() for name in names)
    truths = [
        (classes[y], BLACK) if c == y else (f"{classes[y]} ({classes[c]})", RED)
        for y, c in zip(labels, before, strict=True)
    ]
    verdicts = [
        (classes[b], RED) if b != y else (f"{classes[b]}, right" if a == y else "not as PNG", GREY)
        for y, a, b in zip(labels, predicted, rounded, strict=True)
    ]
    rows = (
        ("original", "true (predicted)", clean, truths),
        (title.split(" on ")[0], "predicted class", eight_bit(attacked, clean, epsilon), verdicts),
        (f"difference x {MAGNIFIED}", "largest", difference, _distances(attacked - clean)),
    )
    picture = _page(title, rows)
    with utils.replacing(folder.with_suffix(".png")) as temporary:
        picture.save(temporary, format="PNG")


def _distances(change):
    return [(in_255ths(value), BLACK) for value in change.abs().amax((1, 2, 3)).tolist()]


def _page(title, rows):
    """Rows of (caption, what the words under its images are, images, words with their colour), drawn."""
    count, _, height, width = rows[0][2].shape
    height, width = ENLARGED * height, ENLARGED * width
    page = Image.new("RGB", (CAPTION + count * (width + 4), LINE + len(rows) * (height + LINE)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)

    def write(x, y, text, room, colour=BLACK):
        text = utils.printable(text)
        while draw.textlength(text, font) > room:
            text = text[:-2].rstrip() + "…"
        draw.text((x, y), text, colour, font)

    write(4, 2, title, page.width - 8)
    for row, (caption, meaning, images, words) in enumerate(rows):
        top = LINE + row * (height + LINE)
        write(4, top + height // 2 - TEXT, caption, CAPTION - 8)
        write(4, top + height + 1, f"{meaning}:", CAPTION - 8, GREY)
        pixels = (255 * images).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        for column, (image, (text, colour)) in enumerate(zip(pixels, words, strict=True)):
            left = CAPTION + column * (width + 4)
            large = np.repeat(np.repeat(image, ENLARGED, axis=0), ENLARGED, axis=1)
            page.paste(Image.fromarray(large), (left, top))
            write(left, top + height + 1, text, width, colour)
    return page
