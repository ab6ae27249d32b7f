"""torchrun itself: a rank killed and restarted, a signal to the launcher, two launchers for one run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
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


def test_two_launchers_make_one_run(tmp_path):
    """As on two machines: one rank each, which meet at an address."""
    expected, _ = trained(2, softmax_training, tmp_path / "expected.pth.tar", *RUN)
    port = 20_000 + os.getpid() % 10_000
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
    path = tmp_path / "softmax.pth.tar"
    launchers = [torchrun([*meet, "--local_addr=localhost"], *RUN, "--save-to", path) for _ in range(2)]
    outputs = [launcher.communicate(timeout=LONGEST) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert sum("finished: " in out for out, _ in outputs) == 1
    found, _ = trained(1, softmax_training, path, *RUN, "--resume")
    assert apart(expected, found) == 0
