"""Pictures of an evaluation: accuracy curves, and images before and after an attack."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import utils

SHOWN = 10  # images in a picture
ENLARGED = 4  # times
MAGNIFIED = 10  # times the difference, around mid-grey


def curves(rows, path):
    """Draw accuracy against epsilon and against the number of steps, `report.curve_rows`, into a PNG file.

    Return False, having drawn nothing, where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = [axis for axis in ("epsilon", "steps") if any(row["axis"] == axis for row in rows)]
    figure = Figure(figsize=(5.5 * len(axes), 4), layout="constrained")
    for axis, panel in zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True):
        _draw(panel, axis, [row for row in rows if row["axis"] == axis])
    FigureCanvasAgg(figure)
    with utils.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return True


def _draw(panel, axis, rows):
    """One panel: a line with its 95 % band for each checkpoint and attack."""
    scale, name = (255, "epsilon, 255ths") if axis == "epsilon" else (1, "steps")
    for training, attack in dict.fromkeys((row["training"], row["attack"]) for row in rows):
        line = [row for row in rows if (row["training"], row["attack"]) == (training, attack)]
        x = [scale * row["value"] for row in line]
        panel.plot(x, [row["accuracy"] for row in line], marker="o", label=f"{training}, {attack}")
        panel.fill_between(x, [row["low"] for row in line], [row["high"] for row in line], alpha=0.15)
    panel.set_xticks(sorted({round(scale * row["value"], 2) for row in rows}))
    panel.set_xlabel(name)
    panel.set_ylabel("accuracy, %")
    panel.set_ylim(0, 100)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")


def sheet(folder):
    """Draw the first images kept in `folder` into FOLDER.png: clean, adversarial, difference x 10."""
    folder = Path(folder)
    block = torch.load(min(folder.glob("*.pt")), map_location="cpu", weights_only=True)
    clean, attacked = block["images"][:SHOWN], block["adversarial"][:SHOWN]
    difference = (0.5 + MAGNIFIED * (attacked - clean)).clamp(0, 1)
    rows = [torch.cat(list(row), dim=2) for row in (clean, attacked, difference)]
    pixels = (255 * torch.cat(rows, dim=1)).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    pixels = np.repeat(np.repeat(pixels, ENLARGED, axis=0), ENLARGED, axis=1)
    with utils.replacing(folder.with_suffix(".png")) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
