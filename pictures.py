"""Pictures of an evaluation: accuracy curves, and images before and after an attack."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import reports
import utils

SHOWN = 10  # images in a picture
ENLARGED = 4  # times
MAGNIFIED = 10  # times the difference, around mid-grey


def curves(targets, points, progress, path):
    """Draw accuracy against epsilon and against the number of steps into a PNG file.

    Return False, having drawn nothing, where matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = [axis for axis in ("epsilon", "steps") if any(point.axis == axis for point in points)]
    figure = Figure(figsize=(5.5 * len(axes), 4), layout="constrained")
    rows = list(reports.curve_rows(targets, points, progress))
    for axis, panel in zip(axes, figure.subplots(1, len(axes), squeeze=False)[0], strict=True):
        lines = dict.fromkeys((row["training"], row["attack"]) for row in rows if row["axis"] == axis)
        for training, attack in lines:
            line = [r for r in rows if (r["training"], r["attack"], r["axis"]) == (training, attack, axis)]
            x = [255 * row["value"] if axis == "epsilon" else row["value"] for row in line]
            panel.plot(x, [row["accuracy"] for row in line], marker="o", label=f"{training}, {attack}")
            panel.fill_between(x, [r["low"] for r in line], [r["high"] for r in line], alpha=0.15)
        panel.set_xlabel("epsilon, 255ths" if axis == "epsilon" else "steps")
        panel.set_ylabel("accuracy, %")
        panel.set_ylim(0, 100)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    FigureCanvasAgg(figure)
    with utils.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return True


def sheet(folder):
    """Draw the first images kept in `folder` into FOLDER.png: clean, adversarial, difference x 10."""
    folder = Path(folder)
    block = torch.load(min(folder.glob("*.pt")), map_location="cpu", weights_only=True)
    clean, attacked = block["images"][:SHOWN], block["adversarial"][:SHOWN]
    difference = (0.5 + MAGNIFIED * (attacked - clean)).clamp(0, 1)
    rows = [torch.cat(list(row), dim=2) for row in (clean, attacked, difference)]
    pixels = (255 * torch.cat(rows, dim=1)).round().byte().permute(1, 2, 0).numpy()
    pixels = np.repeat(np.repeat(pixels, ENLARGED, axis=0), ENLARGED, axis=1)
    with utils.replacing(folder.with_suffix(".png")) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
