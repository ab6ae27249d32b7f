"""What every module needs: faults, messages, device, seeds, signals, files, and two checks on tensors."""

import contextlib
import csv
import errno
import glob
import hashlib
import os
import platform
import signal
import sys
import threading
import time
import types
from datetime import timedelta
from pathlib import Path

import numpy
import torch
import torchvision
from tqdm import tqdm

import distributed

LONGEST_LINE = 2000  # characters of a line that is printed
TELL_EVERY = 60.0  # seconds between lines of progress

# ---------------------------------------------------------------- faults


class Fault(Exception):
    """Something the user can mend. Its message is one line: the thing, the cause and the remedy."""

    exit_status = 1


class UsageError(Fault):  # an option that cannot be used
    exit_status = 2


class DataError(Fault):  # images or labels that cannot be used
    exit_status = 3


class CheckpointError(Fault):  # a checkpoint that cannot be read, or does not fit
    exit_status = 4


class DivergenceError(Fault):  # a number that became NaN or infinite, or ran away
    exit_status = 5


class FileSystemError(Fault):  # a file that cannot be written, or must not be replaced
    exit_status = 6


class Interrupted(Fault):  # by a signal, or (`signum` None) the end of its time; its state is saved
    def __init__(self, signum, message):
        super().__init__(message)
        self.exit_status = 128 + signum if signum else 75  # as sysexits.h has it: try again


def versions():
    """Return the versions and the machine behind a result, as plain strings."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": str(numpy.__version__),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        **(_gpu() if torch.cuda.is_initialized() else {}),
    }


def _gpu():
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"gpu": torch.cuda.get_device_name(), **{name: str(value) for name, value in versions.items()}}


# ---------------------------------------------------------------- messages


def printable(text, longest=300):
    """Return `text`, from a file or its name, for a message: control characters escaped, shortened."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return shown if len(shown) <= longest else f"{shown[: longest // 2 - 10]} ... {shown[-longest // 2 :]}"


@distributed.first_rank
def say(text="", log_path=None):
    """Print lines at once, and append them to `log_path`. A closed stdout (`| head`) stops nothing."""
    text = "\n".join(printable(line, LONGEST_LINE) for line in text.split("\n"))
    try:
        with tqdm.external_write_mode(file=sys.stdout):
            print(text, flush=True)
    except (OSError, ValueError):  # the reader has gone, or the disk that stdout leads to is full: go on
        silence_stdout()
    if log_path is not None:
        note(text, log_path)


@distributed.first_rank
def note(line, log_path):
    """Append a line to a log; FileSystemError when the file system refuses."""
    refusing, encoding = _refusing(log_path, "not written ({}); free some space"), "utf-8"
    with refusing, open(log_path, "a", encoding=encoding, errors="replace") as log:
        log.write(line + "\n")


def silence_stdout():
    """Point stdout at /dev/null, so that neither a later print nor the interpreter's exit complains."""
    null = open(os.devnull, "w")  # noqa: SIM115
    with contextlib.suppress(OSError, ValueError):  # closed, or a stream that is no file
        os.dup2(null.fileno(), sys.stdout.fileno())
    sys.stdout = null


def progress(iterable, total, description, initial=0):
    """Return an iterable that shows how far it is: a bar, or a line a minute where stderr is no terminal."""
    description = printable(description, 60)
    if sys.stderr.isatty() and not distributed.rank:
        return tqdm(iterable, total=total, initial=initial, desc=description, leave=False)
    return iterable if distributed.rank else _told_each_minute(iterable, total, description, initial)


def _told_each_minute(iterable, total, description, initial):
    began = told = time.monotonic()
    for done, item in enumerate(iterable, initial):
        if (now := time.monotonic()) - told >= TELL_EVERY:
            told = now
            left = timedelta(seconds=int((now - began) / max(done - initial, 1) * (total - done)))
            with contextlib.suppress(OSError, ValueError):  # the reader has gone
                print(f"{description}: {done} of {total}, {left} left", file=sys.stderr, flush=True)
        yield item


# ---------------------------------------------------------------- device and seeds


def select_device(name):
    """Return the torch.device for `auto`, `cpu`, `cuda`, `cuda:1`, ...; say what `auto` chose."""
    if (name := distributed.own_device(name, UsageError)) == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        threads = f"{torch.get_num_threads()} threads"
        say(f"device: {device} ({threads if device.type == 'cpu' else torch.cuda.get_device_name()})")
        return device
    try:
        device = torch.device(name)
        torch.empty(1, dtype=torch.float64, device=device).item()  # refuses "meta", and "mps" (no float64)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise UsageError(f"--device {name}: not on this machine; there is {', '.join(there)}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # pinned memory, for one, is allocated for the current device
    return device


def select_precision(name, device):
    """Return torch.bfloat16 or torch.float32; `auto` is bfloat16 where the hardware has it natively."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and native) else torch.float32


def generator(seed, *key):
    """Return a CPU torch.Generator that depends on (seed, *key) alone: counter-based randomness."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def uniform(low, high, generator):
    """Return a float drawn uniformly from [low, high]."""
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


# ---------------------------------------------------------------- tensors and modules


def check_features(features, labels, centers):
    """Raise ValueError unless `features` are N x feat_dim and `labels` (N,) name rows of `centers`.

    The range of labels is looked at on a CPU alone: elsewhere a look would make the host wait for the device.
    """
    num_classes, feat_dim = centers.shape
    if features.ndim != 2 or features.shape[1] != feat_dim or not len(features):
        raise ValueError(f"features are {tuple(features.shape)}: must be (N, {feat_dim}), N from 1 up")
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} {tuple(labels.shape)}: must be ({len(features)},), whole"
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = labels.min(), labels.max()
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels lie in [{low}, {high}]: must lie in [0, {num_classes - 1}]")


def distances(points, centers, squared):
    """Distance, squared or plain, of each of M points to each of K centers, both of D dimensions: M x K."""
    # By default cdist expands the square, |f|^2 + |v|^2 - 2fv, which cancels to noise for features far from
    # the origin. In this mode it subtracts, and keeps no difference for the backward; its gradient at 0 is 0.
    found = torch.cdist(points, centers.to(points.dtype), compute_mode="donot_use_mm_for_euclid_dist")
    return found.square() if squared else found


@contextlib.contextmanager
def evaluating(model):
    """Within it all modules of `model` are in eval mode; after it each is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.train(mode)  # a graph of torch.fx exchanges its forward here; parents come first


# ---------------------------------------------------------------- signals


@contextlib.contextmanager
def answering_signals(handler, signums=distributed.SIGNALS):
    """Within it `handler(signum, frame)` answers `signums`; in the main thread, others get none."""
    here = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, handler) for signum in signums if here}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


class StopSignals(contextlib.ExitStack):
    """Within it signals ask for a stop (`received`); a second one ends a process, but no rank of several."""

    received = None

    def __enter__(self):
        self.enter_context(answering_signals(self._handle))
        return self

    def _handle(self, signum, frame):
        if self.received is not None and distributed.world == 1:
            os._exit(128 + signum)
        self.received = signum


# ---------------------------------------------------------------- files


def sha256(path):
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def followed(path):
    """The file that is written under `path`: where a symbolic link leads, so that the link stays."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def prepare_output(path):
    """Make the folder of `path`, prove that a file can be written there, and clear stale temporary files.

    Raises FileSystemError, before any work is done rather than after it.
    """
    if Path(path).is_dir():
        raise FileSystemError(f"{path}: is a directory; name a file in it")
    file = followed(path)
    with _refusing(path, "cannot write there ({}); choose another path"):
        if file.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        file.parent.mkdir(parents=True, exist_ok=True)
        for stale in file.parent.glob(f"{glob.escape(file.name)}.*.tmp"):
            stale.unlink()
        probe = _temporary(file)
        probe.write_bytes(b"probe")
        probe.unlink()


@distributed.first_rank
def claim(outputs, may_replace, remedy):
    """Prove, before any work, that a run can write all its `outputs` and replaces no file of anybody else's.

    `may_replace(path)` says of a file that is there whether it is this run's own, or the user gave it up;
    `remedy` says what to do where it is not. Raises FileSystemError, also where two outputs are one file.
    """
    outputs = [Path(path) for path in outputs]
    for path in outputs:
        prepare_output(path)
    for path in outputs:
        if sum(path.resolve() == other.resolve() for other in outputs) > 1:
            raise FileSystemError(f"{path}: two outputs of this run have this name; name another")
        if path.is_dir() or (path.exists() and not may_replace(path)):
            raise FileSystemError(f"{path}: exists already; {remedy}")


def _temporary(path):
    return path.parent / f"{path.name}.{os.getpid()}.tmp"


@contextlib.contextmanager
def _refusing(path, words):
    """Within it an OSError becomes a FileSystemError of `path`, its reason put into `words`."""
    try:
        yield
    except OSError as error:
        raise FileSystemError(f"{path}: {words.format(error.strerror)}") from None


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; on success it is renamed over `path`, down to the disk.

    On any failure `path` stays byte for byte as it was and the temporary file is removed.
    Raises FileSystemError when the file system refuses.
    """
    temporary = _temporary(file := followed(path))
    words = "not written ({}); the old file, if any, is as it was: free some space or choose another path"
    try:
        with _refusing(path, words):
            yield temporary
            os.replace(temporary, file)
            with contextlib.suppress(PermissionError):  # Windows opens no folder
                folder = os.open(file.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)  # the rename itself survives a power cut
                finally:
                    os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@distributed.first_rank
@contextlib.contextmanager
def hold(path):
    """Within it no other process holds `path`: a lock file beside it is locked. Makes the folder.

    Raises FileSystemError when another process holds it. Where the file system cannot lock, nothing is held.
    """
    lock = Path(f"{followed(path)}.lock")
    with _refusing(path, "cannot write there ({}); choose another path"):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "ab")  # noqa: SIM115
    with file:
        if not _locked(file, lock):
            raise FileSystemError(f"{path}: another process is writing it; wait for its end, or name another")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows keeps what is open
                lock.unlink()


def _locked(file, path):
    """Take the lock of an open file, unless another process has it or has just removed the file."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
    except (ImportError, OSError):  # Windows, some network file systems
        return True


def markdown_table(rows):
    """Rows of text as a Markdown table, the first row its head; all columns but the first to the right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])


def csv_text(columns, rows):
    """Dicts as CSV text, None as an empty cell."""
    lines = []
    writer = csv.DictWriter(types.SimpleNamespace(write=lines.append), columns)
    writer.writeheader()
    writer.writerows(rows)
    # Written with \r\n, since with \n alone a lone \r in a cell would not be quoted, and would end the row.
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


def write_bytes(path, content):
    """Write a file down to the disk: after a return without error it outlives a power cut."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@distributed.first_rank
def write_text(path, text):
    """Write a text file atomically; what UTF-8 has no code for (names of files) is written as \\udcff."""
    with replacing(path) as temporary:
        write_bytes(temporary, text.encode("utf-8", errors="backslashreplace"))
