"""Several ranks of a script: forked here, where torch is imported already, or begun by torchrun."""

import faulthandler
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import cli
import utils

LONGEST = 60  # seconds that ranks may take


def run_ranks(count, module, *options, prepare=None, float64=False, local=None, launcher=None):
    """Run a script as `count` ranks; return the exit status, stdout and stderr of each.

    local: so many of them on a machine. launcher: the folder that a torchrun has for its ranks.
    prepare: called with the rank before the script, may change what it sees, and returns options of its own.
    """
    folder, pids = tempfile.mkdtemp(), []
    keeper, port = _store()
    for rank in range(count):
        if (pid := os.fork()) == 0:
            try:
                _become(rank, count, port, folder, local or count)
                if launcher is not None:
                    errors = launcher / "attempt" / str(rank) / "error.json"
                    errors.parent.mkdir(parents=True, exist_ok=True)
                    os.environ["TORCHELASTIC_ERROR_FILE"] = str(errors)
                _script(module, [*options, *((prepare and prepare(rank)) or ())], float64)
            except SystemExit as end:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code)
            finally:
                os._exit(99)
        pids.append(pid)
    statuses = _ends(pids)
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    texts = [[Path(folder, f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(count)]
    return [(status, *said) for status, said in zip(statuses, texts, strict=True)]


def _store():
    """Begin a process that keeps what ranks tell each other, as torchrun does; return its ID and its port.

    In this process its threads could hold a lock while a rank is forked, which then waits for ever.
    """
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, str(store.port).encode())
        signal.pause()
    port = int(os.read(read, 5))
    os.close(read)
    os.close(write)
    return pid, port


def _become(rank, count, port, folder, local):
    given = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    if count > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        os.environ |= {name: str(value) for name, value in given.items()}
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(Path(folder, f"{rank}.{name}"), os.O_CREAT | os.O_WRONLY), stream)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
    faulthandler.dump_traceback_later(LONGEST / 2, file=2)  # where one that hangs is


def _script(module, options, float64):
    if float64:
        torch.set_default_dtype(torch.float64)
        utils.select_precision = lambda name, device: torch.float64
    sys.argv = [f"{module.__name__}.py", *map(str, options)]
    cli.run(module.main, module.Config)


def _ends(pids):
    """The exit statuses of processes, in their order; none may take longer than LONGEST."""
    statuses, deadline = dict.fromkeys(pids), time.monotonic() + LONGEST
    while left := [pid for pid in pids if statuses[pid] is None]:
        for pid in left:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, 9)
        time.sleep(0.01)
    return list(statuses.values())
