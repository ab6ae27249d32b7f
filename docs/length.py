"""Draw what is left under attack against the length of stage 2, with PCL and without.

python docs/length.py        writes docs/length.png from results/depth20_full*.json; needs matplotlib
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "results"
FILES = {0: "depth20_full.json", 32: "depth20_full32.json", 50: "depth20_full50.json"}  # by epochs of stage 2
COLOURS = {
    "fgsm": "#bd1f01",
    "bim": "#3f90da",
    "mim": "#832db6",
    "pgd": "#ffa90e",
    "pgd-margin": "#222222",
}
SOURCE, PUBLISHED_AT = ("authors' repository, README", "PCL"), 400  # epochs
STYLES = {"PCL": "-", "control": "--"}
ROOT = (lambda value: np.sqrt(np.maximum(value, 0)), np.square)  # a scale, and its inverse
STAR = {"marker": "*", "markersize": 13, "markerfacecolor": "white", "linestyle": "none"}


def load(file):
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


def read():
    """Return {(network, attack): {epochs: accuracy in percent}} of PCL and its control, and the titles."""
    found, titles = {}, {}
    for epochs, file in FILES.items():
        for entry in load(file)["checkpoints"]:
            named = [network for network in STYLES if f"_{network}_" in entry["path"]]
            for attack, numbers in entry["attacks"].items():
                titles[attack] = numbers["title"]
                for network in named or STYLES:  # both begin with the network of stage 1
                    found.setdefault((network, attack), {})[epochs] = numbers["accuracy"]
    return found, titles


def published():
    """Return {title of the attack: accuracy in percent} of the PCL network, as the ledger has it."""
    claims = [
        claim for claim in load("claims.json")["claims"] if (claim["source"], claim["network"]) == SOURCE
    ]
    return {claim["measure"]: float(claim["published"]) for claim in claims}


def main():
    (found, titles), stars = read(), published()
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for attack, colour in COLOURS.items():
        for network, style in STYLES.items():
            epochs, accuracies = zip(*found[network, attack].items(), strict=True)
            label = titles[attack] if network == "PCL" else None
            panel.plot(epochs, accuracies, style, color=colour, marker="o", markersize=4, label=label)
        if titles[attack] in stars:
            panel.plot(PUBLISHED_AT, stars[titles[attack]], color=colour, **STAR)
    panel.plot([], [], "-", color="grey", label="with PCL")
    panel.plot([], [], "--", color="grey", label="without")
    panel.plot([], [], color="grey", label="published, depth 110", **STAR)
    panel.set_xscale("function", functions=ROOT)
    panel.set_yscale("function", functions=ROOT)
    panel.set_xticks([0, 10, 32, 50, 100, 200, 300, 400])
    panel.set_yticks([0, 1, 3, 10, 20, 30, 40, 50, 60])
    panel.set(
        xlim=(0, 420),
        ylim=(0, 62),
        xlabel="epochs of stage 2 (both axes: square root)",
        ylabel="accuracy under attack, %",
    )
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
