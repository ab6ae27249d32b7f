"""Stop, kill, pause and starve short runs, and compare their end with runs that nobody disturbed.

    python tests/soak.py

Each training is stopped again and again by SIGINT, SIGTERM or kill -9 at a random moment, after a pause by
SIGSTOP, resumed each time, and must end with the weights, prototypes, optimiser state, metrics and log epochs
of a run that nobody stopped, bit for bit on a CPU. An evaluation meets a full disk and a kill at each file it
writes, and checkpoints that are replaced under it. Exits 1 where something differs.
"""

import collections
import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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


def start(script, options, cwd, output=os.devnull, memory=None, first=None):
    """Start a script as a process of its own, its stdout and stderr appended to `output`.

    It may take `memory` bytes more than it begins with, and calls `first`, if given, before the script. Its
    pipe `began` is readable when the script begins.
    """
    FORKS.set_forkserver_preload(["torch", *SCRIPTS, "robustness"])
    reader, began = FORKS.Pipe(duplex=False)
    arguments = (script, [str(option) for option in options], str(cwd), str(output), memory, first, began)
    process = FORKS.Process(target=_become, args=arguments)
    process.start()
    process.began = reader
    return process


def _become(script, options, cwd, output, memory, first, began):
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
    if first is not None:
        first()
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


# ---------------------------------------------------------------- trainings


def run_once(script, place, whole, *flags, first=None):
    """Start a tiny run of a script in the folder `place`; stage 2 starts from the stage 1 in `whole`."""
    more = {} if script == SCRIPTS[0] else {"init_from": whole / f"{SCRIPTS[0]}.pth.tar"}
    more |= {"num_steps": 2} if script.endswith("pgd") else {}
    options = tiny(place / f"{script}.pth.tar", **more, save_every_minutes=0.002)
    return start(script, [*options, *flags], place, place / "output.txt", first=first)


def status_of(process, place, *allowed):
    """The exit status of a process; SystemExit with its last words when it is none of `allowed`."""
    status = finish(process)
    if status not in allowed:
        raise SystemExit(f"a run ended with {status}:\n{(place / 'output.txt').read_text()[-2000:]}")
    return status


def send(process, signum, seconds, chance):
    """After up to so many seconds, if the process is still there, send it a signal."""
    process.join(chance.uniform(0, seconds))
    if process.is_alive():
        os.kill(process.pid, signum)


def interrupted(script, place, whole, seconds, chance):
    """Run a script to its end, paused and killed at random moments a dozen times; return the signals sent."""
    sent = []
    for signum in chance.choices(SIGNALS, k=chance.randint(3, 12)):
        process = run_once(script, place, whole, "--resume")
        process.began.poll(100)
        send(process, signal.SIGSTOP, 0.25 * seconds, chance)
        send(process, signal.SIGCONT, 0.1, chance)
        send(process, signum, 0.25 * seconds, chance)
        if status_of(process, place, 0, 128 + signum, -signum) == 0:
            return sent
        sent.append(signum.name)
    status_of(run_once(script, place, whole, "--resume"), place, 0)
    return sent


def soak_trainings(config, folder, whole, chance):
    """Yield what differs, a list for each run, until so many signals are sent."""
    sent, runs, seconds = collections.Counter(), 0, {}
    for script in SCRIPTS:
        started = time.monotonic()
        status_of(run_once(script, whole, whole), whole, 0)
        seconds[script] = time.monotonic() - started
    while sent.total() < config.kills:
        script, place = SCRIPTS[runs % len(SCRIPTS)], folder / f"run {runs}"
        place.mkdir()
        signals = interrupted(script, place, whole, seconds[script], chance)
        seconds[script] *= 1 if signals else 0.6  # it ended before its first signal: aim earlier
        sent.update(signals)
        runs += 1
        yield (
            f"{script}, {' '.join(signals)}",
            compare(place / f"{script}.pth.tar", whole / f"{script}.pth.tar"),
        )
    utils.say(f"{sent.total()} kills ({', '.join(f'{n} {name}' for name, n in sent.items())}) in {runs} runs")


def with_other_threads(folder, whole):
    """What is wrong with a run that is resumed with two threads: it says so once, and learns the same."""
    script, place = SCRIPTS[1], folder / "threads"
    place.mkdir()
    status_of(run_once(script, place, whole, "--max-minutes", "1e-9"), place, 75)
    two = functools.partial(torch.set_num_threads, 2)
    status_of(run_once(script, place, whole, "--resume", first=two), place, 0)
    (mine, log), (other, _) = (
        (outcome(at / f"{script}.pth.tar")["state_dict"], (at / f"{script}.log").read_text())
        for at in (place, whole)
    )
    said = [line for line in log.splitlines() if "another threads" in line]
    wrong = [] if said == ["resumed with another threads 1 -> 2"] else [f"said {said}"]
    return wrong + [n for n in mine if not torch.allclose(mine[n].double(), other[n].double(), 0.01, 0.01)]


# ---------------------------------------------------------------- evaluations


def evaluate(place, networks, *flags, first=None):
    """Start a tiny evaluation of checkpoints in the folder `place`, with every kind of file it writes."""
    place.mkdir(exist_ok=True)
    options = "--dataset synthetic --limit 6 --batch-size 2 --num-steps 8 --attacks fgsm pgd --device cpu "
    options += "--epsilons 0 8/255 --model-card --results results.json --checkpoints"
    given = [*options.split(), *networks, *flags]
    return start("robustness", given, place, place / "output.txt", first=first)


def written(place):
    """What an evaluation left, by file: all but the clock and the options of resuming."""
    files = [file for file in place.iterdir() if file.name not in ("output.txt", "results.json.lock")]
    timed = re.compile(rb'"(seconds|resume|overwrite)"')
    return {f.name: [line for line in f.read_bytes().splitlines() if not timed.search(line)] for f in files}


def limit_files(size):
    """No file can grow beyond `size` bytes: what a full disk does, and needs no rights."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def die_at(name):
    """Be killed right after the file `name` is written."""
    replace = os.replace

    def replace_and_die(source, target):
        replace(source, target)
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_die


def soak_evaluations(folder, networks, chance):
    """Yield what differs, a list for each evaluation: a full disk and a kill at every file it writes."""
    status_of(evaluate(folder / "evaluated", networks), folder / "evaluated", 0)
    expected = written(folder / "evaluated")
    for name in expected:
        size = (folder / "evaluated" / name).stat().st_size
        for what, first in (("full disk", limit_files), ("kill", die_at)):
            place = folder / f"{what} at {name}"
            first = functools.partial(first, size - 1 if first is limit_files else name)
            status = status_of(evaluate(place, networks, first=first), place, 0, 6, -signal.SIGKILL)
            partly = written(place)
            wrong = [f"{n} is cut off" for n in partly.keys() & expected if partly[n] != expected[n]]
            wrong += [f"stray {n}" for n in partly if n.endswith(".tmp")]
            flag = "--overwrite" if status == 0 else "--resume"
            status_of(evaluate(place, networks, flag), place, 0)
            resumed = written(place)
            wrong += [n for n in {**resumed, **expected} if resumed.get(n) != expected.get(n)]
            yield f"{what} at {name}, status {status}", wrong
    entries = json.loads((folder / "evaluated" / "results.json").read_text())["checkpoints"]
    right = {entry["sha256"]: entry["worst"] for entry in entries}
    for number in range(3):
        place = folder / f"replaced {number}"
        place.mkdir()
        shutil.copy(networks[0], place / "network.pth.tar")
        shutil.copy(networks[1], place / "other")
        process = evaluate(place, [place / "network.pth.tar"])
        process.began.poll(100)
        process.join(chance.uniform(0, 0.5))
        os.replace(place / "other", place / "network.pth.tar")
        status_of(process, place, 0)
        (entry,) = json.loads((place / "results.json").read_text())["checkpoints"]
        same = right.get(entry["sha256"]) == entry["worst"]
        yield "checkpoint replaced", [] if same else [f"{entry['sha256']} has the outcome of another"]


def main(config: Config) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    chance, folder, bad = random.Random(config.seed), Path(tempfile.mkdtemp(prefix="soak ")), 0
    whole = folder / "whole"
    whole.mkdir()
    finish(start(SCRIPTS[0], ["--help"], folder))  # waits until torch is imported
    networks = [str(whole / f"{script}.pth.tar") for script in SCRIPTS[:2]]
    found = itertools.chain(
        soak_trainings(config, folder, whole, chance), soak_evaluations(folder, networks, chance)
    )
    for what, differing in found:
        utils.say(f"{what}: {', '.join(differing[:5]) or 'identical'}")
        bad += bool(differing)
    differing = with_other_threads(folder, whole)
    utils.say(f"two threads instead of one: {', '.join(differing[:5]) or 'said, and learns the same'}")
    if bad or differing:
        raise RuntimeError(f"what differs is kept in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    cli.run(main, Config)
