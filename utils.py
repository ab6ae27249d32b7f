"""Plumbing that knows no machine learning: options, messages, seeds, signals and checkpoints."""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import errno
import glob
import hashlib
import inspect
import io
import json
import os
import pickle
import platform
import re
import signal
import sys
import threading
import traceback
import types
import typing
import warnings
import zipfile
from pathlib import Path

import numpy
import torch
import torchvision
from tqdm import tqdm

FORMAT = 2  # version of the checkpoint's layout
MIGRATIONS = {  # from a format to the next; format 2 holds the log's lines and the precision that was used
    1: lambda state: {**state, "format": 2, "log": [], "precision": None},
}
TORCH_FLOOR = (2, 10)
FILE_SYSTEM_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)


# ---------------------------------------------------------------- faults: one line and an exit status


class Fault(Exception):
    """Something the user can mend: the message names the thing, the cause and the remedy in one line."""

    exit_status = 1


class UsageError(Fault):
    exit_status = 2


class CheckpointError(Fault):
    """A checkpoint that cannot be read, or does not fit: names the file, the cause and the remedy."""

    exit_status = 4


class FileSystemError(Fault):
    exit_status = 6


class Interrupted(Fault):
    """A signal, or (`signum` None) the end of its time, stopped the run after its state was saved."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.exit_status = 128 + signum if signum else 0


def run(main, config_class, choices=None):
    """Parse the command line into `config_class`, call `main`, and leave with the status of `Fault`.

    Errors become one line on stderr; `--debug` shows the traceback as well. `choices` as in `parse_config`.
    """

    def command(argv):
        config = parse_config(config_class, argv, choices)
        keep_freed_memory()
        try:
            main(config)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            size = getattr(config, "batch_size", 1)
            if size is None:
                raise UsageError(
                    "out of memory on the device; try a small --batch-size, such as 50"
                ) from error
            smaller = f"try --batch-size {size // 2}" if size > 1 else "no smaller one is possible"
            raise UsageError(f"out of memory on the device with --batch-size {size}; {smaller}") from error

    leave_with_status(command)


def keep_freed_memory():
    """Have the C library keep memory that was freed, for what is needed next.

    By default glibc hands large pieces back, and taking them anew costs a training step up to a fifth of its
    time on a CPU. Other C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing by mmap, which free would undo
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def leave_with_status(command):
    """Call `command(argv)` and end the process: 0, or the status of what was raised, told in one line."""
    _mend_streams()
    debug = "--debug" in sys.argv
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    message = ""
    try:
        check_versions()
        command(argv)
        status = 0
    except SystemExit as end:  # --help
        status = end.code
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except Exception as error:
        status, message = describe_error(error)
        if debug:
            traceback.print_exc()
    if status and message:
        with contextlib.suppress(OSError):
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    flush_stdout()
    sys.exit(status)


def _mend_streams():
    """Make stdout and stderr writable: closed ones lead nowhere, and no locale stops a message."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: the next file opened would take its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")


def describe_error(error):
    """Return (exit status, one line) for an exception."""
    text = " ".join(str(error).split())
    status = getattr(error, "exit_status", None)
    if status is not None:
        return status, text
    if isinstance(error, OSError) and error.errno in FILE_SYSTEM_ERRORS:
        return 6, f"{error.filename or 'a file'}: {error.strerror}; free some space or choose another path"
    return 1, f"internal error, {type(error).__name__}: {text or 'no message'} (--debug shows where)"


def _is_out_of_memory(error):
    """Whether memory ran out: a GPU's has a class of its own, a CPU's is told by its words alone."""
    return not isinstance(error, RuntimeError) or any(
        words in str(error)
        for words in ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    )


def check_versions():
    """Raise UsageError when torch is older than the floor in requirements.txt."""
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        raise UsageError(f"torch {torch.__version__} is too old: pip install 'torch>={floor}'")


def versions():
    """Return the versions and the machine behind a result, as plain strings."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": str(numpy.__version__),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}),
    }


# ---------------------------------------------------------------- messages


def say(line="", log_path=None):
    """Print a line at once; append it to `log_path` too. A closed stdout (`| head`) stops nothing."""
    tqdm_safe_print(line)
    if log_path is not None:
        note(line, log_path)


def note(line, log_path):
    """Append a line to a log; FileSystemError when the file system refuses."""
    try:
        with open(log_path, "a", encoding="utf-8", errors="replace") as log:
            log.write(line + "\n")
    except OSError as error:
        raise FileSystemError(f"{log_path}: not written ({error.strerror}); free some space") from None


def tqdm_safe_print(line):
    try:
        with tqdm.external_write_mode(file=sys.stdout):
            print(line, flush=True)
    except OSError:  # nobody reads on, or the disk that stdout leads to is full: the run matters more
        silence_stdout()


def silence_stdout():
    """Point stdout at nothing, so that neither a later print nor the interpreter's exit complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flush_stdout():
    try:
        sys.stdout.flush()
    except OSError:
        silence_stdout()


def progress(iterable, total, description, initial=0):
    """A progress bar on stderr; silent where stderr is no terminal."""
    return tqdm(
        iterable, total=total, initial=initial, desc=description, leave=False, disable=not sys.stderr.isatty()
    )


# ---------------------------------------------------------------- options


def fraction(text):
    """Return the float that `8/255` or `0.03` means; ValueError for anything else."""
    numerator, slash, denominator = text.partition("/")
    if not slash:
        return float(text)
    if float(denominator) == 0:
        raise ValueError("division by zero")
    return float(numerator) / float(denominator)


def _in_unit(value):
    return 0 <= value <= 1


# What a value may be, by the option's name: (test, what is allowed). Every script shares these names.
RULES = {
    **dict.fromkeys(("epsilon", "epsilon_min", "epsilon_max"), (_in_unit, "lies in [0, 1]; 8/255?")),
    **dict.fromkeys(
        ("lr", "lr_prox", "lr_conprox", "gamma", "cw_lr"), (lambda v: v > 0, "is a number above 0")
    ),
    **dict.fromkeys(
        ("weight_prox", "weight_conprox", "weight_decay", "decay"),
        (lambda v: v >= 0, "is a number from 0 up"),
    ),
    "step_size": (lambda v: 0 < v <= 1, "lies in (0, 1]; 2/255?"),
    "momentum": (lambda v: 0 <= v < 1, "lies in [0, 1)"),
    **dict.fromkeys(
        (
            *("epochs", "batch_size", "num_steps", "restarts", "eval_every", "limit"),
            *("apgd_steps", "num_queries", "cw_steps", "sanity_images"),
            *("images", "attack_images", "test_images", "repetitions", "pcl_epochs"),
        ),
        (lambda v: v >= 1, "is a whole number from 1 up"),
    ),
    **dict.fromkeys(
        ("batch_sizes", "steps", "step_counts", "epoch_sizes"),
        (lambda v: all(n >= 1 for n in v), "are whole numbers from 1 up"),
    ),
    "epsilons": (lambda v: all(map(_in_unit, v)), "lie in [0, 1]; 0 2/255 4/255 8/255?"),
    "workers": (lambda v: v >= 0, "is a number of processes, from 0 up"),
    "results": (lambda v: v.endswith(".json"), "names a .json file; tables lie beside it"),
    "holdout": (lambda v: v >= 0, "is a number of training images, 0 to hold out none"),
    "seed": (lambda v: 0 <= v < 2**63, "is a whole number from 0 to 2^63 - 1"),
    "seeds": (lambda v: v and all(0 <= s < 2**63 for s in v), "are whole numbers from 0 to 2^63 - 1"),
    "aux_dim": (lambda v: v >= 0, "is a whole number from 0 up; 0 is without the branch"),
    "fc_dim": (lambda v: v >= 1, "is a whole number from 1 up; 1024 in the paper, 2 in its Figure 1"),
    "depth": (lambda v: v >= 8 and v % 6 == 2, "is 6n + 2: 8, 14, 20, ... 110"),
    **dict.fromkeys(
        ("save_every_minutes", "max_minutes"), (lambda v: v > 0, "is a number of minutes above 0")
    ),
    "layers": (
        lambda v: len(v) == len(set(v)) > 0,
        "are one or more of the network's features, each named once",
    ),
    "milestones": (
        lambda v: all(a < b for a, b in zip((0, *v), v, strict=False)),
        "are epochs from 1 up in rising order",
    ),
}
CHOICES = {
    "dataset": ("cifar10", "folder", "synthetic"),
    "precision": ("auto", "bfloat16", "float32"),
    "compile": ("auto", "on", "off"),
    "layers": ("layer2", "layer3", "fc"),
    "distance": ("squared", "plain"),
    "prototype_init": ("normal", "class-means"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def parse_config(config_class, argv=None, choices=None):
    """Turn a frozen dataclass into a command line and return an instance with its values.

    `batch_size` is `--batch-size`; a field's trailing comment is its help, the comment line above a group its
    heading. Floats take fractions, booleans are flags, tuples take several values, `none` is None.
    `choices` maps further option names to the values allowed. Raises UsageError for a bad value, typed or
    edited into the script, with the option, the value and what is allowed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(description=_docstring(config_class), allow_abbrev=False, add_help=True)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    hints, notes = typing.get_type_hints(config_class), _notes(config_class)
    named, group = {**CHOICES, **(choices or {})}, parser
    for field in dataclasses.fields(config_class):
        heading, written, note = notes.get(field.name, (None, "", ""))
        group = parser.add_argument_group(heading) if heading else group
        if any(name not in note for name in named.get(field.name, ())):
            note = "; ".join(filter(None, (note, f"of {', '.join(named[field.name])}")))
        default = written.replace(" ", "") if isinstance(field.default, float) else _show(field.default)
        default = "none" if field.default in (None, ()) else default
        _add_option(group, field, hints[field.name], f"{note} [{default}]")
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        raise UsageError(unknown_name("option", unknown[0].split("=")[0], options))
    config = config_class(**vars(values))
    validate(config, choices)
    return config


def _docstring(config_class):
    return sys.modules[config_class.__module__].__doc__


def _notes(config_class):
    """Map each field to (heading of the group it opens or None, its default as written, trailing comment)."""
    notes, heading = {}, None
    for line in inspect.getsource(config_class).splitlines():
        if match := re.match(r"    # (.+)", line):
            heading = match[1]
        elif match := re.match(r"    (\w+): [^=]*= (.*?)(?:  # (.*))?$", line):
            notes[match[1]] = (heading, match[2], match[3] or "")
            heading = None
    return notes


def _add_option(group, field, hint, note):
    option = "--" + field.name.replace("_", "-")
    common = {"dest": field.name, "default": field.default, "help": note.replace("%", "%%")}
    if hint is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, **common)
    elif typing.get_origin(hint) is tuple:
        convert = _converter(field.name, typing.get_args(hint)[0], optional=False)
        group.add_argument(option, nargs="*", type=convert, action=_ToTuple, metavar="V", **common)
    else:
        optional = isinstance(hint, types.UnionType)
        convert = _converter(field.name, typing.get_args(hint)[0] if optional else hint, optional)
        group.add_argument(option, type=convert, metavar="V", **common)


class _ToTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def _converter(name, kind, optional):
    def convert(text):
        if optional and text.lower() == "none":
            return None
        try:
            return fraction(text) if kind is float else kind(text)
        except (ValueError, OverflowError):
            allowed = RULES.get(name, (None, f"is a {'number' if kind is float else 'whole number'}"))[1]
            raise UsageError(f"--{name.replace('_', '-')} {text}: {name} {allowed}") from None

    return convert


def _show(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def validate(config, choices=None):
    """Raise UsageError for the first value of `config` that is of the wrong type or out of bounds."""
    hints = typing.get_type_hints(type(config))
    choices = {**CHOICES, **(choices or {})}
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        where = f"--{field.name.replace('_', '-')} {_show(value)}"
        if not _is_a(value, hint):
            kind = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
            raise UsageError(f"{where}: {field.name} is of type {kind}, not {type(value).__name__}")
        parts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, str) and (not v or "\0" in v) for v in parts):
            raise UsageError(f"{where}: {field.name} is a text, not empty and without a zero byte")
        test, allowed = RULES.get(field.name, (lambda v: True, "is a finite number below 2^63 in size"))
        if any(_is_number(v) and not abs(v) < 2**63 for v in parts) or not (value is None or test(value)):
            raise UsageError(f"{where}: {field.name} {allowed}")
        for name in parts:
            if field.name in choices and name is not None and name not in choices[field.name]:
                raise UsageError(unknown_name(where.split()[0], name, choices[field.name]))
    _validate_together(config)


def _validate_together(config):
    """Raise UsageError for values that are fine each and make no sense together."""
    if getattr(config, "epsilon_min", 0) > getattr(config, "epsilon_max", 1):
        raise UsageError(f"--epsilon-min {config.epsilon_min} is above --epsilon-max {config.epsilon_max}")
    log_to = getattr(config, "log_to", None)
    if log_to and not Path(log_to).name:
        raise UsageError(f"--log-to {log_to}: names no file")
    if log_to and len({Path(log_to), Path(log_to).with_suffix(".csv"), Path(config.save_to)}) < 3:
        raise UsageError(f"--log-to {log_to}: the checkpoint and the metrics (.csv) have names of their own")


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_a(value, hint):
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(v, typing.get_args(hint)[0]) for v in value)
    if hint is float:
        return _is_number(value)
    return isinstance(value, hint) and (hint is not int or not isinstance(value, bool))


def unknown_name(what, name, valid):
    """One line for a name that is not in `valid`: lists them and points at the nearest."""
    near = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{what} {name}: there is no such; valid: {', '.join(map(str, valid))}{hint}"


# ---------------------------------------------------------------- device and seeds


def select_device(name):
    """Return the torch.device for `auto`, `cpu`, `cuda`, `cuda:1`, ...; say what `auto` chose."""
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        detail = (
            torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        )
        say(f"device: {device} ({detail})")
        return device
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # refuses "meta" too, which holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError):
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise UsageError(f"--device {name}: not on this machine; there is {', '.join(there)}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what names no device, such as pinned memory, would go to the first
    return device


def generator(seed, *key):
    """Return a CPU torch.Generator that depends on (seed, *key) alone: counter-based randomness."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def uniform(low, high, generator):
    """Return a float drawn uniformly from [low, high]."""
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


# ---------------------------------------------------------------- signals


class StopSignals:
    """Within it SIGINT and SIGTERM ask for a stop (`received`); a second one ends the process at once."""

    def __init__(self):
        self.received = None

    def __enter__(self):
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._old[signum] = signal.signal(signum, self._handle)
        return self

    def _handle(self, signum, frame):
        if self.received is not None:
            os._exit(128 + signum)
        self.received = signum

    def __exit__(self, *error):
        for signum, handler in self._old.items():
            signal.signal(signum, handler)


# ---------------------------------------------------------------- files


def sha256(path):
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_output(path):
    """Make the folder of `path`, prove that a file can be written there, and clear stale temporary files.

    Raises FileSystemError, before any work is done rather than after it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            stale.unlink()
        probe = path.parent / f"{path.name}.{os.getpid()}.tmp"
        probe.write_bytes(b"probe")
        probe.unlink()
    except OSError as error:
        raise FileSystemError(f"{path}: cannot write there ({error.strerror}); choose another path") from None
    if path.is_dir():
        raise FileSystemError(f"{path}: is a directory; name a file in it")


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; on success it is fsynced and renamed over `path`.

    On any failure `path` stays byte for byte as it was and the temporary file is removed.
    Raises FileSystemError when the file system refuses.
    """
    path = Path(path)
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself survives a power cut
        finally:
            os.close(folder)
    except OSError as error:
        raise FileSystemError(
            f"{path}: not written ({error.strerror}); the old file, if any, is as it was: free some space or "
            "choose another path"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(path):
    """Within it no other process holds `path`, which a lock file beside it sees to; makes the folder.

    Raises FileSystemError when another process does hold it. Where files cannot be locked, none is.
    """
    lock = Path(f"{path}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "ab")  # noqa: SIM115
    except OSError as error:
        raise FileSystemError(f"{path}: cannot write there ({error.strerror}); choose another path") from None
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


def csv_text(columns, rows):
    """Dicts as CSV text, None as an empty cell."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_bytes(path, content):
    """Write a file down to the disk: after a return without error it outlives a power cut."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path, text):
    """Write a text file atomically."""
    with replacing(path) as temporary:
        write_bytes(temporary, text.encode("utf-8", errors="replace"))


# ---------------------------------------------------------------- checkpoints


def previous_of(path):
    """Where the checkpoint before the newest one is kept while a run is under way."""
    return Path(f"{path}.previous")


def any_checkpoint(path):
    """Whether there is a run to go on with at `path`: its checkpoint, or the one kept before it."""
    return Path(path).exists() or previous_of(path).exists()


def save_checkpoint(state, path, keep_previous=True):
    """Write `state` (tensors, plain Python) to `path` atomically, proven readable before it takes the name.

    While a run is under way the checkpoint before is kept as `PATH.previous`; `keep_previous=False` drops it.
    """
    path, previous = Path(path), previous_of(path)
    content = io.BytesIO()
    torch.save({"format": FORMAT, **state, "versions": versions()}, content)
    with replacing(path) as temporary:
        write_bytes(temporary, content.getbuffer())
        _check_zip(temporary)
        if keep_previous and _is_whole(path):
            _link(path, previous)
    if not keep_previous:
        previous.unlink(missing_ok=True)


def drop_previous(path):
    """Remove the checkpoint kept before the one at `path`, unless that one is damaged."""
    if _is_whole(path):
        previous_of(path).unlink(missing_ok=True)


def _is_whole(path):
    """Whether there is a checkpoint worth keeping: a damaged one must not push out the good one before it."""
    try:
        _check_zip(path)
    except CheckpointError:
        return False
    return True


def _link(source, target):
    if target.exists() and target.samefile(source):
        return  # killed between two renames; a rename of one link over another would do nothing
    temporary = Path(f"{target}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # no hard links here: `source` is gone only until the new file takes its name
        temporary = source
    os.replace(temporary, target)


def load_checkpoint(path):
    """Read a checkpoint or exported weights onto the CPU and return the dict; no code of it is ever run.

    Raises CheckpointError for anything that is not a whole, readable, current checkpoint.
    """
    path = Path(path)
    head = check_file(path)
    try:
        state = _read_safetensors(path) if head[8:9] == b"{" else _read_pickle(path)
    except Fault:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read ({reason}); the file is damaged, use another copy"
        ) from None
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise CheckpointError(
            f"{path}: holds a {kind}, not a checkpoint; save the model's state_dict instead"
        )
    return _migrated(state, path)


def _migrated(state, path):
    """Bring a checkpoint of an older format up to FORMAT; files of other origin have none and stay so."""
    version = state.get("format", FORMAT)
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"{path}: says it is of format {version!s:.20}, which never was; use another copy"
        )
    if version > FORMAT:
        raise CheckpointError(
            f"{path}: format {version} is newer than this code reads ({FORMAT}); update the project"
        )
    for older in range(version, FORMAT):
        state = MIGRATIONS[older](state)
    return state


def _read_pickle(path):
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, on odd files; what matters is told below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_foreign(error)}") from None


def load_newest(path, warn=say):
    """Read `path`, or the checkpoint kept before it when `path` is damaged, with a warning naming both."""
    previous = previous_of(path)
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        if not previous.exists():
            raise
        state = load_checkpoint(previous)
        warn(f"warning: {error}; going on from {previous}")
        return state


def check_file(path):
    """Return the first bytes of a file; CheckpointError for whatever they tell without unpickling it."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; name the checkpoint in it")
    if not path.exists():
        there = sorted(str(f) for f in path.parent.glob("*.pth*") if f.suffix not in (".lock", ".tmp"))
        raise CheckpointError(
            f"{path}: no such file; {_maker(path)}in its folder: {', '.join(there) or 'none'}"
        )
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if not head:
        raise CheckpointError(f"{path}: is empty; interrupted save? Use another copy or train again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a git-lfs pointer, not the file; run 'git lfs pull'")
    if re.match(rb"\s*(<!doctype|<html|<\?xml|<head)", head, re.IGNORECASE):
        raise CheckpointError(f"{path}: is a web page, not a checkpoint; download the file itself")
    if head.startswith(b"PK"):
        _check_zip(path)
    return head


def _maker(path):
    """The script that makes a checkpoint of this name, as part of a sentence."""
    scripts = {
        "CIFAR10_Softmax": "softmax_training.py",
        "CIFAR10_PCL": "pcl_training.py",
        "CIFAR10_PCL_AdvTrain_FGSM": "pcl_training_adversarial_fgsm.py",
        "CIFAR10_PCL_AdvTrain_PGD": "pcl_training_adversarial_pgd.py",
    }
    script = scripts.get(path.name.split(".")[0])
    return f"python {script} makes it; " if script else ""


def _check_zip(path):
    """Raise CheckpointError unless every record of a zip file has the checksum it was written with."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise zipfile.BadZipFile("it is compressed, as no checkpoint is")
            damaged = archive.testzip()
    except Exception as error:
        raise CheckpointError(
            f"{path}: is cut off or damaged ({error}); interrupted copy? Use another copy"
        ) from None
    if damaged:
        raise CheckpointError(f"{path}: {damaged} fails its checksum; the file is damaged, use another copy")


def _foreign(error):
    """What a refused pickle holds, without a word on how to load it all the same."""
    names = re.findall(r"(?:GLOBAL|global|class)\s+`?([\w.]+)", str(error))
    what = f"holds {', '.join(dict.fromkeys(names))}, " if names else "holds something "
    return f"{what}not only tensors and plain Python; refused, since it could run code: ask for a state_dict"


# ---------------------------------------------------------------- weights to hand on

HANDED_ON = (
    *("format", "script", "network", "classes", "data", "config", "epoch", "finished", "history"),
    *("state_dict", "criterion", "versions"),
)
OF_THE_MACHINE = ("data_dir", "init_from", "save_to", "log_to", "resume", "overwrite", "device")


def export(source, target):
    """Write the weights and prototypes of a checkpoint, without its optimiser and paths; return the SHA-256.

    A `target` that ends in .safetensors is of that format. Both kinds load wherever a checkpoint does.
    """
    state, target = load_checkpoint(source), Path(target)
    state = state if "state_dict" in state else {"state_dict": state}
    kept = {name: state[name] for name in HANDED_ON if name in state}
    for part in ("state_dict", "criterion"):
        tensors = kept.get(part, {}).items()
        kept[part] = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors}
    config = kept.get("config", {}).items()
    kept["config"] = {name: value for name, value in config if name not in OF_THE_MACHINE}
    if target.exists():
        raise FileSystemError(f"{target}: exists; remove it or name another file")
    prepare_output(target)
    content = io.BytesIO()
    if target.suffix == ".safetensors":
        content.write(_to_safetensors(kept))
    else:
        torch.save(kept, content)
    with replacing(target) as temporary:
        write_bytes(temporary, content.getbuffer())
    load_checkpoint(target)
    return sha256(target)


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UsageError(
            "reading and writing .safetensors needs a package: pip install safetensors"
        ) from None
    return safetensors


def _to_safetensors(state):
    """The weights under their own names, the prototypes as criterion.*, the rest as JSON in the header."""
    prototypes = {f"criterion.{name}": value for name, value in state["criterion"].items()}
    tensors = {**state["state_dict"], **prototypes}
    rest = json.dumps({name: state[name] for name in state if name not in ("state_dict", "criterion")})
    header = {"checkpoint": rest, "sha256": _digest(tensors, rest)}
    return _safetensors().torch.save(tensors, header)


def _read_safetensors(path):
    with _safetensors().safe_open(path, "pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rest = header.get("checkpoint", "{}")
    if "sha256" in header and header["sha256"] != _digest(tensors, rest):
        raise CheckpointError(f"{path}: fails its checksum; the file is damaged, use another copy")
    parts = {"state_dict": {}, "criterion": {}}
    for name, value in tensors.items():
        part = "criterion" if name.startswith("criterion.") else "state_dict"
        parts[part][name.removeprefix("criterion.")] = value
    return {**json.loads(rest), **parts}


def _digest(tensors, text):
    """SHA-256 of named tensors and a text: the format itself has no checksum."""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def main(argv):
    parser = _Parser(description="Write the weights and prototypes of a checkpoint, without the optimiser.")
    parser.add_argument("command", choices=("export",))
    parser.add_argument("checkpoint", help="what a training script saved")
    parser.add_argument("path", help="the file to write; .safetensors chooses that format")
    options = parser.parse_args(argv)
    digest = export(options.checkpoint, options.path)
    say(f"exported {options.checkpoint} to {options.path}, sha256 {digest}")


if __name__ == "__main__":
    leave_with_status(main)
