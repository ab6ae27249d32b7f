"""Kill short training runs at random moments, resume them, and compare the end with an uninterrupted run.

    python -m benchmarks.soak

Each run is stopped again and again by SIGINT, SIGTERM or kill -9 at a random moment, resumed each time, and
must end with the weights, prototypes, optimiser state, metrics and log epochs of a run that nobody stopped,
bit for bit on a CPU. Exits 1 where one does not.
"""

import collections
import dataclasses
import importlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

import checkpoints
import cli
import utils

SCRIPTS = (
    "softmax_training",
    "pcl_training",
    "pcl_training_adversarial_fgsm",
    "pcl_training_adversarial_pgd",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
FORKS = multiprocessing.get_context("forkserver")  # torch is imported once: a process starts in milliseconds


@dataclasses.dataclass(frozen=True)
class Config:
    # run
    kills: cli.Count = 60  # signals to send in all, over the scripts in turn
    seed: cli.Seed = 0


# ---------------------------------------------------------------- processes


def start(script, options, cwd, output=os.devnull, memory=None):
    """Start a script as a process of its own, its stdout and stderr appended to `output`.

    It may take `memory` bytes more than it begins with. Its pipe `began` is readable when the script begins.
    """
    FORKS.set_forkserver_preload(["torch", *SCRIPTS, "robustness"])
    reader, began = FORKS.Pipe(duplex=False)
    arguments = (script, [str(option) for option in options], str(cwd), str(output), memory, began)
    process = FORKS.Process(target=_become, args=arguments)
    process.start()
    process.began = reader
    return process


def _become(script, options, cwd, output, memory, began):
    """In the new process: behave like `python SCRIPT OPTIONS` in `cwd`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    os.chdir(cwd)
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    module = importlib.import_module(script)
    sys.argv = [f"{script}.py", *options]
    if memory is not None:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
    try:
        began.send_bytes(b"began")
        cli.run(module.main, module.Config)
    except KeyboardInterrupt:  # between the lines
        os._exit(128 + signal.SIGINT)


def finish(process, timeout=120):
    """Wait for a process and return its exit status: minus the signal's number where one killed it."""
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"still running after {timeout} s")
    return process.exitcode


# ---------------------------------------------------------------- what a run leaves


def tiny(save_to, **more):
    """Options of a training run of a second or two: 5 epochs of 3 batches."""
    options = {
        "dataset": "synthetic", "limit": 20, "depth": 8, "epochs": 5, "batch_size": 8, "eval_every": 2,
        "precision": "float32", "device": "cpu", "save_to": save_to, **more,
    }  # fmt: skip
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
    return [str(part) for flag in flags for part in flag]


def outcome(path):
    """What must not depend on interruptions: everything in the checkpoint that the run computed."""
    state = checkpoints.load(path)
    names = ("state_dict", "criterion", "optimizer", "scheduler", "history", "epoch", "batch", "finished")
    return {name: state[name] for name in names}


def compare(path, expected):
    """The differences between what a run left at `path` and `expected` (path of an uninterrupted run)."""
    found = []
    for suffix in (".pth.tar", ".csv", ".log"):
        mine, other = (_parts(Path(str(p).removesuffix(".pth.tar") + suffix)) for p in (path, expected))
        places = {**mine, **other}
        found += [f"{suffix} {place}" for place in places if mine.get(place) != other.get(place)]
    strays = (".tmp", ".previous", ".lock")
    return found + [f"stray {file.name}" for file in Path(path).parent.iterdir() if file.suffix in strays]


def _parts(path):
    """What a file holds, by place: tensors as their bytes; of a log the epochs' rows without their speed."""
    if path.suffix == ".tar":
        leaves, structure = pytree.tree_flatten_with_path(outcome(path))
        return {"structure": structure, **{pytree.keystr(place): _bits(value) for place, value in leaves}}
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".log":
        rows = [line.split() for line in lines]
        lines = [row[: row.index("images/s") - 1] for row in rows if "images/s" in row]
    return dict(enumerate(lines))


def _bits(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    return type(value), value


# ---------------------------------------------------------------- soak


def run_once(script, place, whole, *flags):
    """Start a tiny run of a script in the folder `place`; stage 2 starts from the stage 1 in `whole`."""
    more = {} if script == SCRIPTS[0] else {"init_from": whole / f"{SCRIPTS[0]}.pth.tar"}
    more |= {"num_steps": 2} if script.endswith("pgd") else {}
    options = tiny(place / f"{script}.pth.tar", **more, save_every_minutes=0.002)
    return start(script, [*options, *flags], place, place / "output.txt")


def status_of(process, place, *allowed):
    """The exit status of a process; SystemExit with its last words when it is none of `allowed`."""
    status = finish(process)
    if status not in allowed:
        raise SystemExit(f"a run ended with {status}:\n{(place / 'output.txt').read_text()[-2000:]}")
    return status


def interrupted(script, place, whole, seconds, chance):
    """Run a script to its end, killed at random moments up to a dozen times; return the signals sent."""
    sent = []
    for signum in chance.choices(SIGNALS, k=chance.randint(3, 12)):
        process = run_once(script, place, whole, "--resume")
        process.began.poll(100)
        process.join(chance.uniform(0, 0.5 * seconds))
        if process.is_alive():
            os.kill(process.pid, signum)
        if status_of(process, place, 0, 128 + signum, -signum) == 0:
            return sent
        sent.append(signum.name)
    status_of(run_once(script, place, whole, "--resume"), place, 0)
    return sent


def main(config: Config) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    chance, folder = random.Random(config.seed), Path(tempfile.mkdtemp(prefix="soak "))
    sent, runs, bad, seconds, whole = collections.Counter(), 0, 0, {}, folder / "whole"
    whole.mkdir()
    finish(start(SCRIPTS[0], ["--help"], folder))  # waits until torch is imported
    for script in SCRIPTS:
        started = time.monotonic()
        status_of(run_once(script, whole, whole), whole, 0)
        seconds[script] = time.monotonic() - started
    while sent.total() < config.kills:
        script, place = SCRIPTS[runs % len(SCRIPTS)], folder / f"run {runs}"
        place.mkdir()
        signals = interrupted(script, place, whole, seconds[script], chance)
        found = compare(place / f"{script}.pth.tar", whole / f"{script}.pth.tar")
        seconds[script] *= 1 if signals else 0.6  # it ended before its first signal: aim earlier
        sent.update(signals)
        names = " ".join(signals)
        utils.say(f"{script}: {len(signals)} kills ({names}): {', '.join(found[:5]) or 'identical'}")
        runs, bad = runs + 1, bad + bool(found)
        if not found:
            shutil.rmtree(place)
    kills = ", ".join(f"{count} {name}" for name, count in sent.items())
    utils.say(f"{sent.total()} kills ({kills}) in {runs} runs: {runs - bad} ended identical, {bad} did not")
    if bad:
        raise RuntimeError(f"what differs is kept in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    cli.run(main, Config)
