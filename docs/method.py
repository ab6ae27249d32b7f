"""Draw the method: the network and its supervised features, and what the loss does to them.

python docs/method.py        writes docs/method.png; needs matplotlib
"""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

COLOURS = ("#3f90da", "#ffa90e", "#bd1f01")  # of three classes
PROTOTYPES = ((1.3, 3.5), (4.6, 4.1), (3.3, 1.0))
FEATURE = (2.45, 3.0)  # an image's feature, of the first class
GREY, DARK = "#f2f2f2", "#333333"


def box(panel, x, y, text, width=1.25, height=0.7, colour=GREY):
    style = {"boxstyle": "round,pad=0.04,rounding_size=0.1", "linewidth": 1.0, "edgecolor": DARK}
    panel.add_patch(FancyBboxPatch((x, y - height / 2), width, height, facecolor=colour, **style))
    panel.text(x + width / 2, y, text, ha="center", va="center", fontsize=9.5)


def arrow(panel, start, end, colour=DARK, **style):
    line = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0, **style}
    panel.annotate("", xy=end, xytext=start, arrowprops=line)


def draw_network(panel):
    """The forward pass from left to right; supervised features below the place where they are taken."""
    stages = ("image", "stage 1", "stage 2", "stage 3", "fully\nconnected", "class\nscores")
    for index, text in enumerate(stages):
        box(panel, 1.75 * index, 3.4, text)
        if index:
            arrow(panel, (1.75 * index - 0.44, 3.4), (1.75 * index - 0.05, 3.4))
    for x, text in ((5.25, "layer3\n256-d"), (7.0, "fc\n1024-d")):
        arrow(panel, (x + 0.62, 3.0), (x + 0.62, 2.22))
        box(panel, x, 1.8, text, colour="#dcebf8")
    arrow(panel, (9.37, 3.0), (9.37, 2.22))
    box(panel, 8.75, 1.8, "cross-\nentropy", colour="#fbe3c2")
    panel.text(6.87, 0.95, "Prototype Conformity Loss", ha="center", fontsize=11)
    panel.set(xlim=(-0.2, 10.2), ylim=(0.5, 4.4))
    panel.set_title("The loss supervises hidden features, not only the class scores", fontsize=11.5)


def draw_space(panel):
    """A feature is pulled to its own class's prototype and pushed from the others'."""
    for (x, y), colour in zip(PROTOTYPES, COLOURS, strict=True):
        panel.scatter(x, y, s=420, marker="*", c=colour, edgecolors="black", linewidths=0.8, zorder=3)
    panel.scatter(*FEATURE, s=80, c=COLOURS[0], edgecolors="white", zorder=3)
    x, y = FEATURE
    own, *others = PROTOTYPES
    arrow(panel, (x - 0.12, y + 0.05), (own[0] + 0.3, own[1] - 0.12), COLOURS[0], linewidth=2.6)
    for (px, py), colour in zip(others, COLOURS[1:], strict=True):
        panel.plot((px, x), (py, y), color=colour, linewidth=0.9, linestyle=":", zorder=1)
        dx, dy = x - px, y - py
        size = 0.75 / (dx * dx + dy * dy) ** 0.5
        arrow(panel, (x + 0.14 * dx * size, y + 0.14 * dy * size), (x + size * dx, y + size * dy), colour)
    panel.text(own[0], own[1] + 0.4, "own prototype w", ha="center", fontsize=10)
    panel.text(others[0][0], others[0][1] + 0.4, "v of another class", ha="center", fontsize=10)
    panel.text(others[1][0] + 0.35, others[1][1], "v of another class", va="center", fontsize=10)
    panel.text(x + 0.45, y - 0.15, "feature f", fontsize=10)
    panel.text(1.68, 2.98, "pull", fontsize=10, color=COLOURS[0], ha="center")
    panel.text(1.75, 2.3, "push", fontsize=10, color=DARK)
    panel.set(xlim=(0.2, 6.0), ylim=(0.6, 4.8), aspect="equal")
    panel.set_title("‖f − w‖ shrinks, ‖f − v‖ grows", fontsize=11.5)


def main():
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    network, space = figure.subplots(1, 2, width_ratios=(2, 1))
    draw_network(network)
    draw_space(space)
    for panel in (network, space):
        panel.set_axis_off()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
