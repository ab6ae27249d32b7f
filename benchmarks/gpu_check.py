"""Whether this project works on your GPU, and how fast: one page to paste into an issue, in a few minutes.

    python -m benchmarks.gpu_check

It trains on noise with fresh weights, and reads and writes no file of yours. It checks that a step waits for
the GPU only to look at the loss, that nothing is compiled twice or kept out of a CUDA graph, that compiled
and plain training reach the same loss, that evaluation computes in float32, and that the tests of other
devices pass. Then it measures the speed of both beside the textbook way.
`--device cpu` tries the check itself; `--depth 110`, the released network, takes ten minutes.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch._dynamo.utils import counters

import cli
import data
import evaluation
import utils
from benchmarks import ours, throughput, timing
from cli import Count, Depth

ROWS = ("stage1", "stage2", "stage2_pgd", "pgd")  # what is timed
TRAINED = ("stage2", "stage2_pgd")  # what is trained step by step
MORE_ROUNDING = 30  # a GPU may be so many times as far from float64 as a CPU; with TF32 it is a thousand
SAME_LOSS_PERCENT = 5.0  # between mean losses, since compiled code rounds to bfloat16 in other places


@dataclass(frozen=True)
class Config:
    depth: Depth = 20  # compiling takes longer with depth
    batch_size: Count = 128
    steps: Count = 60  # of training; the loss is looked at every 50
    num_steps: Count = 10  # of PGD
    workers: cli.Whole = 2  # processes of the plain DataLoader
    device: str = "cuda"  # cuda, cuda:1, ..., cpu


# ---------------------------------------------------------------- what must be so


def learns(subject: ours.Subject, row: str) -> str:
    """Train an epoch of a row, compiled if possible, and once plain; AssertionError if a check fails."""
    plain = dataclasses.replace(subject, config=dataclasses.replace(subject.config, compile="off"))
    skipped = counters["inductor"]["cudagraph_skips"]
    run, losses, recompiled, seconds = trained(subject, row)
    skipped = counters["inductor"]["cudagraph_skips"] - skipped
    expected = trained(plain, row)[1]
    percent = 100 * abs(losses / expected - 1)
    found = (
        f"{run.identity['compiled']}; graphs skipped {skipped}, compiled anew {recompiled}; mean loss "
        f"{losses:.5g}, plain {expected:.5g} ({percent:.2f} %); {seconds:.0f} s to begin"
    )
    assert not (skipped or recompiled) and percent < SAME_LOSS_PERCENT, found
    assert run.identity["compiled"] == ("off" if run.device.type == "cpu" else "reduce-overhead"), found
    return found


def trained(subject: ours.Subject, row: str) -> tuple:
    """Train a row's epoch; return (run, mean loss, number of recompilations, seconds until it began)."""
    began, losses = time.monotonic(), []
    run, epoch, _ = ours.begin(subject, row)
    seconds, see, graphs = time.monotonic() - began, run.watch.see, counters["stats"]["unique_graphs"]

    def seen(terms, epoch, batch):
        with waiting(run.device, not run.watch.recent or batch % run.watch.look_every == 0):
            see(terms, epoch, batch)
        losses.append(terms["loss"].clone())
        allow_waiting(run.device, False)  # from the first batch to the end of the epoch

    with mock.patch.object(run.watch, "see", seen), waiting(run.device, True):
        epoch()
    return run, torch.stack(losses).mean().item(), counters["stats"]["unique_graphs"] - graphs, seconds


@contextlib.contextmanager
def waiting(device: torch.device, allowed: bool):
    """Within it an operation that waits for the GPU raises unless it is `allowed`; after it none does."""
    allow_waiting(device, allowed)
    try:
        yield
    finally:
        allow_waiting(device, True)


def allow_waiting(device: torch.device, allowed: bool) -> None:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default" if allowed else "error")


def evaluates_exactly(subject: ours.Subject) -> str:
    """Check that evaluation's logits and gradients repeat, and are as near to float64 as on a CPU."""
    images, far = data.to_float(subject.dataset.test.images[:16]), {}

    def computed(device, dtype):
        model, pixels = subject.model().eval().to(device, dtype), images.to(device, dtype).requires_grad_()
        with evaluation.exact_float32():
            logits = model.logits(pixels)
            return torch.cat([logits.flatten(), torch.autograd.grad(logits.sum(), pixels)[0].flatten()]).cpu()

    exact, twice = computed("cpu", torch.float64), [computed(subject.device, torch.float32) for _ in range(2)]
    for name, values in ((str(subject.device), twice[0]), ("cpu", computed("cpu", torch.float32))):
        far[name] = ((values - exact).norm() / exact.norm()).item()
    found = ", ".join(f"{name} {distance:.1e}" for name, distance in far.items()) + " from float64"
    assert torch.equal(*twice), f"not the same twice; {found}"
    assert far[str(subject.device)] < MORE_ROUNDING * far["cpu"], found
    return found


def passes(tests: str) -> str:
    """Run a file of the tests, which take the GPU where there is one; return pytest's last line."""
    if importlib.util.find_spec("pytest") is None:
        return "not run: pip install -r requirements-dev.txt"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tests]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    said = " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
    assert done.returncode == 0, said
    return said


# ---------------------------------------------------------------- how fast it is


def speeds(subject: ours.Subject) -> str:
    """Return the table of `throughput.py` for ROWS."""
    return throughput.comparison_table(subject.config, [throughput.compare(subject, row) for row in ROWS])


def orders(subject: ours.Subject) -> str:
    """Measure evaluation in both memory orders: is the rule of `memory_format` right on this GPU?"""
    works, images = {}, len(subject.split("pgd"))
    for name in ("contiguous_format", "channels_last"):
        with contextlib.ExitStack() as patches:
            for module in ("evaluation.measure", "evaluation.target"):
                rule = {"memory_format": lambda device, name=name: getattr(torch, name)}
                patches.enter_context(mock.patch.multiple(importlib.import_module(module), **rule))
            (numbers, _) = timing.in_turns({name: ours.epoch(subject, "pgd")}, images, 1, subject.device)[
                name
            ]
        works[name] = numbers["images_per_second"]
    return ", ".join(f"{name} {speed:.1f} images/s" for name, speed in works.items())


# ---------------------------------------------------------------- the page


def part(title: str, work: Callable[[], str]) -> bool:
    """Print a part of the page; return whether its checks passed. A failure is printed, too."""
    try:
        text, well = work(), True
    except Exception as error:
        text, well = (
            f"FAILED, {type(error).__name__}: {utils.printable(' '.join(str(error).split()), 600)}",
            False,
        )
    utils.say(f"## {title}\n\n{text}\n")
    return well


def main(config: Config) -> None:
    device = utils.select_device(config.device)
    sizes = {
        "images": config.steps * config.batch_size,
        "attack_images": config.steps * config.batch_size // 2,
    }
    same = {name: getattr(config, name) for name in ("depth", "batch_size", "num_steps", "workers")}
    settings = throughput.Config(**same, **sizes, repetitions=1, device=str(device))
    subject = ours.make_subject(settings, device)
    short = {name: max(size // 3, config.batch_size) for name, size in sizes.items()}
    timed = dataclasses.replace(subject, config=dataclasses.replace(settings, **short))
    facts = {**timing.hardware(device), **utils.versions()}
    utils.say("# GPU check\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n")
    wells = [
        part(f"{throughput.title(row, settings)}, {config.steps} steps", lambda row=row: learns(subject, row))
        for row in TRAINED
    ]
    wells.append(part("Evaluation computes in float32", lambda: evaluates_exactly(subject)))
    if device.type == "cuda":
        wells.append(part("Tests on this GPU", lambda: passes("tests/test_other_device.py")))
    wells.append(part("Speed beside the textbook way", lambda: speeds(timed)))
    wells.append(part("Evaluation under PGD in both memory orders", lambda: orders(timed)))
    if not all(wells):
        raise utils.Fault(f"{wells.count(False)} parts failed; please paste the page above into an issue")


if __name__ == "__main__":
    cli.run(main, Config)
