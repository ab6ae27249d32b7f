"""The first lines of a program, before torch is imported: its folder, its name, its signals, its faults."""

import os
import signal
import sys
from pathlib import Path


def begin():
    """Have a script run anywhere, and end with one line where a signal or a fault comes before `cli.run`.

    Call it under `if __name__ == "__main__"`, ahead of the imports that take seconds.
    """
    # What the options are read from: under a profiler the main module is the profiler's, and a script may
    # have been called by a symbolic link of another name.
    if os.path.isfile(sys.argv[0]):
        sys.modules["__main__"].__file__ = os.path.realpath(sys.argv[0])
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _interrupted)
    if "--debug" not in sys.argv:
        sys.excepthook = _fault


def _interrupted(signum, frame):
    _leave(128 + signum, "interrupted")  # an exception might get lost in an import


def _fault(kind, error, trace):
    remedy = "pip install -r requirements.txt" if isinstance(error, ImportError) else "--debug shows where"
    _leave(2, f"{kind.__name__}: {' '.join(str(error).split())}; {remedy}")


def _leave(status, message):
    try:
        os.write(2, f"{Path(sys.argv[0]).name}: {ascii(message)[1:-1]}\n".encode(errors="replace"))
    finally:
        os._exit(status)
