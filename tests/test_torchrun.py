"""torchrun itself: a rank killed and restarted, a signal to the launcher, two launchers for one run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import LONGEST
from test_distributed import SHORT, apart, trained

import softmax_training

ROOT = Path(__file__).resolve().parent.parent
RUN = [*SHORT, "--limit", 24, "--batch-size", 6, "--warmup", 0]


def torchrun(launcher, *options, **how):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *launcher,
        ROOT / "softmax_training.py",
        *options,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], **pipes, **how)


def until(condition):
    """Wait for a condition, and return it; fail after LONGEST seconds."""
    deadline = time.monotonic() + LONGEST
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def children(process):
    """The process ids of a launcher's ranks, in their order."""
    there = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in there.read_text().split()] if there.exists() else []


def ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def said_by(output, text):
    return [line for line in output.splitlines() if line.startswith("softmax_training.py: ") and text in line]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_a_killed_rank_is_restarted_and_the_launcher_told_to_stop(tmp_path):
    """kill -9 of a rank, torchrun --max-restarts=1, SIGTERM to torchrun, --resume: as if nothing had been."""
    expected, _ = trained(2, softmax_training, tmp_path / "undisturbed.pth.tar", *RUN, "--epochs", 8)
    path, log = tmp_path / "softmax.pth.tar", tmp_path / "softmax.log"
    often = ("--save-every-minutes", 1e-9, "--save-to", path, "--epochs", 8)
    job = torchrun(["--nproc_per_node=2", "--max-restarts=1"], *RUN, *often)
    until(path.exists)
    ranks = children(job)
    os.kill(ranks[1], signal.SIGKILL)
    until(lambda: "resumed" in log.read_text())
    assert all(map(ended, ranks))
    ranks, before = children(job), path.stat().st_mtime_ns
    until(lambda: path.stat().st_mtime_ns != before)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=LONGEST)
    assert job.returncode and all(map(ended, ranks))
    assert len(said_by(said, "rank 1 of 2 has gone")) == 1 and len(said_by(said, "saved to")) == 1
    assert len(said_by(said, "")) == 2, said
    assert not list(tmp_path.glob("*.lock")) + list(tmp_path.glob("*.tmp"))
    ended_as, _ = trained(2, softmax_training, path, *RUN, "--epochs", 8, "--resume")
    assert apart(expected, ended_as) == 0 and ended_as["history"] == expected["history"]


SRUN = """#!/usr/bin/env bash
# Two machines in one: the command of each, and the signals that come for them.
shift
for machine in 1 2; do "$@" & done
trap 'kill -USR1 $(jobs -p)' USR1
while [ -n "$(jobs -pr)" ]; do wait; done
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) echo localhost ;; *) echo "$@" >> scontrol.log ;; esac
"""


def test_two_launchers_under_slurm_save_ahead_of_the_limit_and_are_queued_again(tmp_path):
    """The batch script with stand-ins for srun and scontrol: two launchers, which meet at an address."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": str(os.getpid()), "JOB_NODELIST": "two", "JOB_NUM_NODES": "2", "ARRAY_TASK_ID": "3"}
    slurm = {f"SLURM_{name}": value for name, value in slurm.items()}
    here = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    often = ("--save-every-minutes", 1e-9, "--epochs", 300, "--no-overwrite", "--save-to", "net.pth.tar")
    command = [ROOT / "benchmarks/slurm/train.sbatch", ROOT / "softmax_training.py", *RUN, *often]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(["bash", *map(str, command)], cwd=tmp_path, env=here, **pipes)
    path = tmp_path / "net_seed3.pth.tar"
    until(path.exists)
    job.send_signal(signal.SIGUSR1)
    out, said = job.communicate(timeout=LONGEST)
    assert "in 2 ranks" in out and len(said_by(said, f"saved to {path.name}")) == 1, said
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"
    epochs = torch.load(path, weights_only=True)["epoch"] + 1
    rest = ("--seed", 3, "--epochs", epochs)
    resumed, _ = trained(2, softmax_training, path, *RUN, *rest, "--resume")
    expected, _ = trained(2, softmax_training, tmp_path / "expected.pth.tar", *RUN, *rest)
    assert apart(expected, resumed) == 0
