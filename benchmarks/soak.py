"""Kill short training runs at random moments, resume them, and compare the end with an uninterrupted run.

    python benchmarks/soak.py

Each run is stopped again and again by SIGINT, SIGTERM or kill -9 at a random moment, resumed each time, and
must end with the weights, prototypes, optimiser state, metrics and log epochs of a run that nobody stopped,
bit for bit on a CPU. Exits 1 where one does not.
"""

import csv
import dataclasses
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoints  # noqa: E402
import cli  # noqa: E402
import utils  # noqa: E402

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


def start(script, options, cwd, output=os.devnull):
    """Start a script as a process of its own, its stdout and stderr appended to `output`."""
    prepare()
    options = [str(option) for option in options]
    process_began, began = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_become, args=(script, options, str(cwd), str(output), began))
    process.start()
    process.began = process_began  # readable when the script itself begins
    return process


def prepare():
    """Have the process that others are forked from import what they need."""
    FORKS.set_forkserver_preload(["torch", *SCRIPTS, "robustness"])


def _become(script, options, cwd, output, began=None):
    """In the new process: behave like `python SCRIPT OPTIONS` in `cwd`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    os.chdir(cwd)
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    module = importlib.import_module(script)
    sys.argv = [f"{script}.py", *options]
    try:
        if began is not None:
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


def differences(a, b, where=""):
    """The places where two nested structures differ, tensors bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [place for key in a for place in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [place for i in range(len(a)) for place in differences(a[i], b[i], f"{where}/{i}")]
    if hasattr(a, "shape") and hasattr(b, "shape"):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [where]
    return [] if type(a) is type(b) and a == b else [where]


def compare(path, expected):
    """The differences between what a run left at `path` and `expected` (path of an uninterrupted run)."""
    found = differences(outcome(path), outcome(expected))
    for suffix in (".csv", ".log"):
        mine, other = (_rows(Path(str(p).removesuffix(".pth.tar") + suffix)) for p in (path, expected))
        found += [] if mine == other else [f"rows of {suffix}"]
    folder = Path(path).parent
    strays = (".tmp", ".previous", ".lock")
    return found + [f"stray {file.name}" for file in folder.iterdir() if file.suffix in strays]


def _rows(path):
    """The rows of the metrics; of a log, the epochs' rows without their speed."""
    if path.suffix == ".csv":
        return list(csv.reader(path.open()))
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line[: line.index("images/s") - 1] for line in lines if "images/s" in line]


# ---------------------------------------------------------------- soak


def interrupted_run(script, options, folder, seconds, chance, budget):
    """Run a script to its end, killed at random moments at most `budget` times; return the signals sent."""
    sent, log = [], folder / "output.txt"
    while True:
        process = start(script, [*options, "--resume"], folder, log)
        process.began.poll(100)
        if len(sent) < budget:
            process.join(chance.uniform(0, 0.5 * seconds))
        if not process.is_alive() or len(sent) == budget:
            status = finish(process)
            if status == 0:
                return sent
            raise SystemExit(f"{script} ended with {status}:\n{log.read_text()[-2000:]}")
        signum = chance.choice(SIGNALS)
        os.kill(process.pid, signum)
        status = finish(process)
        if status == 0:
            return sent
        sent.append(signum)
        if status not in (128 + signum, -signum):
            raise SystemExit(
                f"{script} got {signum.name} and ended with {status}:\n{log.read_text()[-2000:]}"
            )


def main(config: Config) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    chance = random.Random(config.seed)
    folder = Path(tempfile.mkdtemp(prefix="soak "))
    sent, runs, bad = dict.fromkeys(SIGNALS, 0), 0, 0
    whole, seconds = {}, {}
    finish(start("softmax_training", ["--help"], folder))  # waits until torch is imported
    for script in SCRIPTS:
        whole[script] = folder / "whole" / f"{script}.pth.tar"
        started = time.monotonic()
        status = finish(start(script, options_of(script, whole[script], whole), folder, folder / "whole.txt"))
        seconds[script] = time.monotonic() - started
        if status:
            raise SystemExit(f"{script} ended with {status}:\n{(folder / 'whole.txt').read_text()[-2000:]}")
    while sum(sent.values()) < config.kills:
        script = SCRIPTS[runs % len(SCRIPTS)]
        place = folder / f"run {runs}"
        place.mkdir()
        path = place / f"{script}.pth.tar"
        options, budget = options_of(script, path, whole), chance.randint(3, 12)
        signals = interrupted_run(script, options, place, seconds[script], chance, budget)
        found = compare(path, whole[script])
        seconds[script] *= 1 if signals else 0.6  # it ended before its first signal: aim earlier
        for signum in signals:
            sent[signum] += 1
        names = " ".join(signum.name for signum in signals)
        utils.say(f"{script}: {len(signals)} kills ({names}): {', '.join(found[:5]) or 'identical'}")
        runs, bad = runs + 1, bad + bool(found)
        if not found:
            shutil.rmtree(place)
    kills = ", ".join(f"{count} {signum.name}" for signum, count in sent.items())
    utils.say(
        f"{sum(sent.values())} kills ({kills}) in {runs} runs: {runs - bad} ended identical, {bad} did not"
    )
    if bad:
        raise RuntimeError(f"what differs is kept in {folder}")
    shutil.rmtree(folder)


def options_of(script, path, whole):
    """The options of a tiny run of `script`; stage 2 starts from the uninterrupted stage 1."""
    more = {} if script == "softmax_training" else {"init_from": whole["softmax_training"]}
    more |= {"num_steps": 2} if script.endswith("pgd") else {}
    return tiny(path, **more, save_every_minutes=0.002)


if __name__ == "__main__":
    cli.run(main, Config)
