"""A Config dataclass as a command line, and the exit status of a script.

A script declares its options as a frozen dataclass with fields `name: type = value  # reason`. The type says
which values are allowed: `lr: Positive`, `precision: Literal["auto", "float32"]`.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import inspect
import os
import re
import signal
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch

import distributed
from utils import LONGEST_LINE, UsageError, answering_signals, printable, silence_stdout

TORCH_FLOOR = (2, 10)  # as in requirements.txt
# In the error of a library that got no memory. The last words are all that oneDNN says of it.
OUT_OF_MEMORY = re.compile(
    "out of memory|not enough memory|can't allocate memory|ALLOC_FAILED|could not create a primitive$"
)


# ---------------------------------------------------------------- types of options


class Allowed(NamedTuple):
    """Which values an option takes: a test, and words that follow the option's name."""

    test: Callable[[object], bool]
    words: str


Count = Annotated[int, Allowed(lambda v: v >= 1, "is a whole number from 1 up")]
Whole = Annotated[int, Allowed(lambda v: v >= 0, "is a whole number from 0 up")]
Seed = Annotated[int, Allowed(lambda v: 0 <= v < 2**63, "is a whole number from 0 to 2^63 - 1")]
Positive = Annotated[float, Allowed(lambda v: v > 0, "is a number above 0")]
NotNegative = Annotated[float, Allowed(lambda v: v >= 0, "is a number from 0 up")]
Factor = Annotated[float, Allowed(lambda v: 0 < v <= 1, "lies in (0, 1]")]
Momentum = Annotated[float, Allowed(lambda v: 0 <= v < 1, "lies in [0, 1)")]
Epsilon = Annotated[float, Allowed(lambda v: 0 <= v <= 1, "lies in [0, 1]; 8/255?")]
StepSize = Annotated[float, Allowed(lambda v: 0 < v <= 1, "lies in (0, 1]; 2/255?")]
Depth = Annotated[int, Allowed(lambda v: v >= 8 and v % 6 == 2, "is 6n + 2: 8, 14, 20, ... 110")]
rising = Allowed(lambda v: sorted({0, *v}) == [0, *v], "are epochs from 1 up in rising order")
Milestones = Annotated[tuple[int, ...], rising]
distinct = Allowed(lambda v: len(v) == len(set(v)) > 0, "are one or more features, each named once")
Layers = Annotated[tuple[Literal["layer2", "layer3", "fc"], ...], distinct]
JsonFile = Annotated[str, Allowed(lambda v: v.endswith(".json"), "names a .json file; tables lie beside it")]


# ---------------------------------------------------------------- running a script


def run(main, config_class):
    """Parse the command line into `config_class`, call `main`, and leave with the exit status of the fault.

    Errors become one line on stderr; `--debug` shows the traceback as well.
    """

    def command(argv):
        distributed.begin(UsageError)
        config = parse_config(config_class, argv)
        keep_freed_memory()
        try:
            main(config)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
                raise
            size = getattr(config, "batch_size", None)
            used = f" with --batch-size {size}" if size else ""
            smaller = "no smaller one is possible" if size == 1 else f"try --batch-size {(size or 100) // 2}"
            raise UsageError(f"out of memory on the device{used}; {smaller}") from error

    leave_with_status(command)


def keep_freed_memory():
    """Have glibc keep freed memory: to get it anew from the system takes up to a fifth of a training step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other C libraries
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: allocate nothing by mmap, which free would undo
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def leave_with_status(command):
    """Call `command(argv)` and end the process: status 0, or one line and the status of the fault."""
    _prepare_streams()
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    status, message = 0, ""
    try:
        check_versions()
        with answering_signals(_interrupt):
            command(argv)
        distributed.end()
    except SystemExit as end:  # --help
        status = end.code
    except (Exception, KeyboardInterrupt) as error:
        status, message = distributed.last_words(*describe_error(error), error)
        if "--debug" in sys.argv:
            traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):  # closed
        if status and message:
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        silence_stdout()
    sys.exit(status)


def _prepare_streams():
    """Replace closed streams by /dev/null, and write letters that the locale lacks as question marks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Else the next file that is opened would get the closed stream's number.
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # a notebook's streams have none
            stream.reconfigure(errors="replace")


def _interrupt(signum, frame):
    """Answer a signal so that files are closed and locks removed."""
    raise KeyboardInterrupt(signum)


def describe_error(error):
    """Return (exit status, one line) for an exception; what came from a file is escaped and shortened."""
    context = error
    while context is not None:  # a library may have met the signal's exception with one of its own
        if isinstance(context, KeyboardInterrupt):
            return 128 + (context.args or (signal.SIGINT,))[0], "interrupted"
        context = context.__context__
    text, status = " ".join(str(error).split()), getattr(error, "exit_status", 1)
    if isinstance(error, OSError) and error.errno:
        status = 6
        text = f"{error.filename or 'a file'}: {error.strerror}; free some space or choose another path"
    elif status == 1:
        text = f"internal error, {type(error).__name__}: {text or 'no message'} (--debug shows where)"
    return status, printable(text, 300 if status in (3, 4) else LONGEST_LINE)


def check_versions():
    """Raise UsageError when torch is older than the floor in requirements.txt."""
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        raise UsageError(f"torch {torch.__version__} is too old: pip install 'torch>={floor}'")


# ---------------------------------------------------------------- parsing


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors, and which takes -1e-9 for a number."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self._negative_number_matcher = re.compile(r"-\.?\d|-inf|-nan")  # as argparse has it since 3.14

    def error(self, message):
        raise UsageError(message)


def parse_config(config_class, argv):
    """Turn a frozen dataclass into a command line and return an instance with the values of `argv`.

    `batch_size` is `--batch-size`; a field's trailing comment is its help, the comment line above a group its
    heading. Floats take fractions, booleans are flags, tuples take several values, `none` is None.
    A method `follows` of the Config, where there is one, takes the values of `argv` and returns defaults that
    follow from them. Raises UsageError for a bad value, typed or edited into the script.
    """
    parser = Parser(
        description=sys.modules[config_class.__module__].__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = get_type_hints(config_class, include_extras=True)
    comments, groups = field_comments(config_class), {}
    for field in dataclasses.fields(config_class):
        heading, written, comment = comments.get(field.name, ("", "", ""))
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        _add_option(groups[heading], field, hints[field.name], written, comment)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        raise UsageError(_unknown_name("option", unknown[0].split("=")[0], options))
    given = vars(values)
    config = config_class(**given)
    if hasattr(config, "follows"):
        check_values(config)
        config = config_class(**{**config.follows(given), **given})
    validate(config)
    return config


@functools.cache
def field_comments(config_class):
    """Map each field to (heading of its group, its default as written, its trailing comment).

    A field that a script sets again keeps the group, and without a comment the comment, that it inherits.
    """
    found = {}
    for base in reversed([base for base in config_class.__mro__ if dataclasses.is_dataclass(base)]):
        heading = ""
        try:
            lines = inspect.getsource(base).splitlines()
        except (OSError, TypeError):
            raise UsageError("options are read from the script's file: run it as python SCRIPT") from None
        for line in lines:
            if match := re.match(r"    # (.+)", line):
                heading = match[1]
            elif match := re.match(r"    (\w+): .*? = (.*?)(?:  # (.*))?$", line):
                name, written, comment = match.groups()
                group, _, inherited = found.get(name, (heading, "", ""))
                found[name] = group, written, comment or inherited
    return {
        field.name: found[field.name] for field in dataclasses.fields(config_class) if field.name in found
    }


def _add_option(group, field, hint, written, comment):
    """Add the option of a field, with its comment, the names to choose from and its default as help."""
    kind, default = _kind(hint), field.default
    part = _kind(get_args(kind.type)[0]) if get_origin(kind.type) is tuple else kind
    names = get_args(part.type) if get_origin(part.type) is Literal else ()
    if any(str(name) not in comment for name in names):
        comment = "; ".join(filter(None, (comment, f"of {', '.join(names)}")))
    shown = written.replace(" ", "") if isinstance(default, float) else str(default).replace("None", "none")
    if isinstance(default, tuple):
        shown = " ".join(map(str, default)) or "none"
    help_text = f"{comment} [{shown}]".strip().replace("%", "%%")
    how = {"metavar": "V", "type": functools.partial(_value, part.type, kind.optional)}
    if kind.type is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif part is not kind:
        how |= {"nargs": "*", "action": _ToTuple}
    group.add_argument(_option(field.name), dest=field.name, default=argparse.SUPPRESS, help=help_text, **how)


class _ToTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def _value(kind, optional, text):
    """The value of type `kind` that a text means, or the text itself, for `validate` to refuse."""
    if optional and text.lower() == "none":
        return None
    try:
        return {int: int, float: fraction}.get(kind, str)(text)
    except (ValueError, ArithmeticError):
        return text


def fraction(text):
    """Return the float that `8/255` or `0.03` means; ValueError or ZeroDivisionError for anything else."""
    numerator, denominator = text.split("/") if "/" in text else (text, 1)
    return float(numerator) / float(denominator)


# ---------------------------------------------------------------- checking values


class _Kind(NamedTuple):
    type: object  # without None and Annotated
    optional: bool = False  # whether None is allowed
    allowed: Allowed | None = None


OF_TYPE = {  # what every value of a type must satisfy
    int: Allowed(lambda v: abs(v) < 2**63, "is a whole number below 2^63 in size"),
    float: Allowed(lambda v: abs(v) < 2**63, "is a finite number below 2^63 in size"),
    bool: Allowed(lambda v: True, "is True or False"),
    str: Allowed(lambda v: v and "\0" not in v, "is a text, not empty and without a zero byte"),
    tuple: Allowed(lambda v: True, "is a tuple"),
}


def _kind(hint):
    if get_origin(hint) in (Union, types.UnionType):
        return _kind(get_args(hint)[0])._replace(optional=True)
    if get_origin(hint) is Annotated:
        kind, allowed = get_args(hint)
        return _Kind(kind, allowed=allowed)
    return _Kind(hint)


def check_values(config):
    """Raise UsageError for the first value of `config` that is of the wrong type or out of bounds."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        _check(field.name, getattr(config, field.name), hints[field.name])
    return hints


def validate(config):
    """Raise UsageError for values of `config` that cannot be, each by itself or together.

    Of two fields `x_min` and `x_max` the first must not be above the second. A method `check` of the Config
    may refuse values that make no sense together.
    """
    hints = check_values(config)
    for low in (name for name in hints if name.endswith("_min")):
        high = low.removesuffix("_min") + "_max"
        if getattr(config, low) > getattr(config, high):
            values = getattr(config, low), getattr(config, high)
            raise UsageError(f"{_option(low)} {values[0]} is above {_option(high)} {values[1]}")
    getattr(config, "check", bool)()


def _check(name, value, hint):
    kind = _kind(hint)
    plain = get_origin(kind.type) or kind.type
    if value is None and kind.optional:
        return
    if plain is Literal:
        if type(value) is not str or value not in get_args(kind.type):
            raise UsageError(_unknown_name(_option(name), value, get_args(kind.type)))
        return
    # The exact type: a numpy number would make a checkpoint that is no plain Python.
    fits = type(value) in ((int, float) if plain is float else (plain,)) and OF_TYPE[plain].test(value)
    if fits and plain is tuple:
        for part in value:
            _check(name, part, get_args(kind.type)[0])
    allowed = kind.allowed or OF_TYPE[plain]
    if not (fits and allowed.test(value)):
        text = " ".join(map(str, value)) if type(value) is tuple else str(value)
        text += "" if type(value) in (int, float, str, tuple) else f" ({type(value).__name__})"
        raise UsageError(f"{_option(name)} {text}: {name} {allowed.words}")


def _option(name):
    return "--" + name.replace("_", "-")


def _unknown_name(what, name, valid):
    """One line for a name that is not in `valid`: lists them and points at the nearest."""
    near = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{what} {name}: unknown; valid: {', '.join(map(str, valid))}{hint}"


def config_dict(config):
    """The settings as plain Python that a checkpoint and JSON can hold."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def script_name(config):
    """The name of the script that a Config was written in."""
    return Path(inspect.getfile(type(config))).stem
