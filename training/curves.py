"""A run's metrics as a picture beside its log, and as events for TensorBoard."""

import importlib.util

import distributed
import utils

LEAST_EPOCHS = 10  # with fewer, a picture tells no more than the log


def writer(folder):
    """Return torch's SummaryWriter for `folder`; None for None, and on all ranks but the first.

    Raises UsageError if tensorboard is not installed.
    """
    if folder is None or distributed.rank:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise utils.UsageError("--tensorboard: pip install tensorboard, or leave it out") from None
    return SummaryWriter(folder)


@distributed.first_rank
def publish(history, path, events):
    """Add the last row of `history` to TensorBoard's `events`, if any, and draw all rows in the PNG `path`.

    They are drawn from LEAST_EPOCHS rows on, if matplotlib is installed.
    """
    if events is not None:
        for name in history[-1].keys() - {"epoch"}:
            if history[-1][name] is not None:
                events.add_scalar(name, history[-1][name], history[-1]["epoch"])
        events.flush()
    if len(history) >= LEAST_EPOCHS and importlib.util.find_spec("matplotlib") is not None:
        _draw(history, path)


def _draw(history, path):
    """Draw loss terms, accuracies in percent and learning rate against the epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    accuracies = ["train_accuracy", "test_accuracy"]
    terms = [name for name in history[0] if name not in ("epoch", "lr", *accuracies)]
    parts = (
        ("loss and its terms, unweighted", terms),
        ("accuracy, %", accuracies),
        ("learning rate", ["lr"]),
    )
    for panel, (label, names) in zip(figure.subplots(1, 3), parts, strict=True):
        for name in names:
            rows = [row for row in history if row[name] is not None]
            x, y = [row["epoch"] for row in rows], [row[name] for row in rows]
            panel.plot(x, y, label=name.replace("_", " "), marker="o", markersize=3)
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        if len(names) > 1:
            panel.legend(fontsize="small")
    figure.axes[0].set_yscale("symlog", linthresh=0.1)
    figure.axes[2].set_ylim(bottom=0)
    with utils.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
