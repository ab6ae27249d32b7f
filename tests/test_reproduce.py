"""`reproduce.sh`: in slices, each on a bare machine, it ends where it ends in one go."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import soak

import checkpoints
import robustness

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 1  # of the first slice: not enough for all five stages; each one is twice as long
# What PYTHON is here. It hands on its arguments and the signals it gets, and waits for the status.
CLIENT = """#!{python} -S
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
signal.signal(signal.SIGTERM, lambda *_: server.sendall(b"T"))
file = server.makefile("rw")
print(json.dumps([sys.argv[1:], os.getcwd()]), file=file, flush=True)
status, said = json.loads(file.readline())
print(said, end="", flush=True, file=sys.stderr if status else sys.stdout)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has torch imported already: its processes are forked from one that has."""
    folder = tmp_path_factory.mktemp("python")
    address, client = str(folder / "socket"), folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        threading.Thread(target=serve, args=(listener, folder / "said.txt"), daemon=True).start()
        yield client


def serve(listener, output):
    """Run what one client after the other asks for."""
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rw") as file:
            (first, *options), cwd = json.loads(file.readline())
            output.write_bytes(b"")
            if first == "-c":
                process = soak.FORKS.Process(target=run_code, args=(options, cwd, str(output)))
                process.start()
            else:
                process = soak.start(first.removesuffix(".py"), options, cwd, output)
            threading.Thread(target=hand_on_signals, args=(connection, process), daemon=True).start()
            process.join()
            print(json.dumps([process.exitcode, output.read_text()]), file=file, flush=True)


def hand_on_signals(connection, process):
    while connection.recv(1):
        process.terminate()


def run_code(arguments, cwd, output):
    """In a new process: behave like `python -c ARGUMENTS` in `cwd`."""
    os.chdir(cwd)
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["-c", *arguments[1:]]
    exec(arguments[0], {})
    sys.stdout.flush()


def reproduce(python, folder, *arguments):
    """Run the script in `folder`, a bare machine; return what it says last."""
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "reproduce.sh", folder)
    environment = {"PYTHON": str(python), "DATA": "--dataset synthetic --limit 10", **os.environ}
    environment |= {"TRAIN": "--depth 8 --epochs 1 --batch-size 4", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "reproduce.sh", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(os.name != "posix" or shutil.which("bash") is None, reason="no bash")
@pytest.mark.timeout(600)
def test_in_slices_on_bare_machines_it_ends_where_it_ends_in_one_go(python, tmp_path):
    whole, carried = tmp_path / "whole", tmp_path / "carried"
    assert reproduce(python, whole) == "complete"
    for number in range(1, 9):
        machine = tmp_path / f"machine {number}"
        if reproduce(python, machine, SECONDS * 2 ** (number - 1) / 60, carried) == "complete":
            break
    else:
        pytest.fail("it never came to an end")
    assert number > 1, "one slice did it all"
    for checkpoint in robustness.DEFAULT_CHECKPOINTS:
        assert soak.compare(whole / checkpoint, machine / checkpoint) == []
        assert soak.compare(whole / checkpoint, carried / checkpoint) == []
    rows = [
        list(csv.DictReader((folder / "results/robustness.csv").open()))
        for folder in (whole, machine, carried)
    ]
    # A checkpoint holds its log with the speeds, so its SHA-256 is its own.
    timeless = [[{k: v for k, v in row.items() if k != "sha256"} for row in table] for table in rows]
    assert timeless[0] == timeless[1] == timeless[2] and len(timeless[0]) >= 4


@pytest.mark.parametrize("minutes", ["soon", "0"])
def test_minutes_that_are_none(python, minutes, tmp_path):
    with pytest.raises(AssertionError, match=r"could not convert|slice over"):
        assert reproduce(python, tmp_path / "machine", minutes) == "complete"


def test_a_slice_too_short_to_begin_a_stage_in_loses_nothing(python, tmp_path):
    """What is finished is carried on; of two files the newer is gone on with; nothing else travels."""
    machine, carried = tmp_path / "machine", tmp_path / "carried"
    first, second = (Path(path) for path in robustness.DEFAULT_CHECKPOINTS[:2])
    for folder in (machine, carried):
        (folder / first.parent).mkdir(parents=True)
        (folder / second.parent).mkdir()
    checkpoints.save({"finished": True, "epoch": 3}, machine / first)
    checkpoints.save({"finished": True, "epoch": 1}, carried / first)
    os.utime(carried / first, (0, 0))
    checkpoints.save({"finished": False, "epoch": 1}, machine / second)
    os.utime(machine / second, (0, 0))
    checkpoints.save({"finished": False, "epoch": 2}, carried / second)
    for stray in (machine / second.parent / "CIFAR10_PCL_depth20.csv", Path(f"{machine / second}.previous")):
        stray.write_text("not of this run")
    assert reproduce(python, machine, 0.001, carried) == "slice over; the same command goes on"
    assert sorted(path.relative_to(carried) for path in carried.rglob("*.*")) == sorted([first, second])
    for folder in (machine, carried):
        assert checkpoints.load(folder / first)["epoch"] == 3
        assert checkpoints.load(folder / second)["epoch"] == 2


def test_what_was_compiled_is_carried_to_the_next_machine(tmp_path):
    """By an interpreter that does nothing but add its folder to a file in the compiler's cache."""
    python, lists = tmp_path / "python", []
    python.write_text(
        "#!/bin/bash\n"
        '[ "$1" != -c ] || { echo 60; exit; }\n'
        'mkdir -p "$TORCHINDUCTOR_CACHE_DIR/deep"; pwd >> "$TORCHINDUCTOR_CACHE_DIR/deep/kernels"\n'
    )
    python.chmod(0o755)
    for name in ("first", "second"):
        assert reproduce(python, tmp_path / name, 1, tmp_path / "carried") == "complete"
        lists.append((tmp_path / "carried" / "compiled" / "deep" / "kernels").read_text().splitlines())
    assert [len(names) for names in lists] == [1, 2] and lists[1][0] == lists[0][0] != lists[1][1]
    assert not list((tmp_path / "carried").glob("*.part"))
