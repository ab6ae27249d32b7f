"""Checkpoints: one file format, read without running code, written so that no failure harms the old file.

    python checkpoints.py export CHECKPOINT PATH

writes the weights and prototypes alone, to pass on to others. Name a PATH with .safetensors for that format.
"""

import os
import sys

if __name__ == "__main__":  # before torch is imported, which takes seconds
    sys.path.insert(0, os.path.dirname(os.path.realpath(sys.argv[0])))
    import startup

    startup.begin()

import argparse
import hashlib
import io
import itertools
import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

import cli
import distributed
import utils
from models import network_of
from resnet_model import clean_state_dict
from utils import CheckpointError, Fault, FileSystemError, UsageError

FORMAT = 2  # version of the checkpoint's layout
LARGEST = 2**32  # bytes of a file; a whole run of depth 110 is 16 MB
LARGEST_CONTENT = 10**7  # characters of all texts, each number and container counting as ten
DEEPEST = 16  # containers within one another
SCRIPTS = {  # the script that makes a checkpoint of this name, after that of the data set
    "Softmax": "softmax_training.py",
    "PCL": "pcl_training.py",
    "PCL_AdvTrain_FGSM": "pcl_training_adversarial_fgsm.py",
    "PCL_AdvTrain_PGD": "pcl_training_adversarial_pgd.py",
}
FIELDS = {  # the types of what is read by name, here and in training and evaluation
    **dict.fromkeys(("state_dict", "criterion", "config", "network", "data", "versions"), dict),
    **dict.fromkeys(("optimizer", "scheduler", "sums", "fingerprint", "outcomes", "started_from"), dict),
    **dict.fromkeys(("classes", "history", "log"), list),
    **dict.fromkeys(("epoch", "batch", "images"), int),
    "script": str,
}
EXPORTED = (
    *("format", "script", "network", "classes", "data", "config", "started_from"),
    *("epoch", "finished", "history"),
    *("state_dict", "criterion", "versions"),
)
NOT_EXPORTED_SETTINGS = (
    *("data_dir", "init_from", "save_to", "log_to", "tensorboard", "resume", "overwrite", "device"),
)


# ---------------------------------------------------------------- writing


def previous_of(path):
    """Where the checkpoint before the newest one is kept while a run is under way."""
    return Path(f"{utils.followed(path)}.previous")


def exists(path):
    """Whether there is a run at `path` to resume: its checkpoint, or the one kept before it."""
    return Path(path).exists() or previous_of(path).exists()


@distributed.first_rank
def save(state, path, keep_previous=True):
    """Write `state` (tensors, plain Python) to `path` atomically, after a check of what reached the disk.

    During a run the checkpoint before is kept as `PATH.previous`; `keep_previous=False` removes it.
    """
    content = io.BytesIO()
    torch.save({"format": FORMAT, **state, "versions": utils.versions()}, content)
    with utils.replacing(path) as temporary:
        utils.write_bytes(temporary, content.getbuffer())
        _check_zip(temporary, temporary.read_bytes())
        if keep_previous and _is_whole(path):
            os.replace(utils.followed(path), previous_of(path))
    if not keep_previous:
        previous_of(path).unlink(missing_ok=True)


def drop_previous(path):
    """Remove the checkpoint kept before the one at `path`, unless that one is damaged."""
    if _is_whole(path):
        previous_of(path).unlink(missing_ok=True)


def _is_whole(path):
    """Whether a checkpoint is there and undamaged: only such a one may replace the good one before it."""
    try:
        _check_zip(path, Path(path).read_bytes())
    except (CheckpointError, OSError):
        return False
    return True


# ---------------------------------------------------------------- reading


def load(path):
    """Read a checkpoint or exported weights onto the CPU and return the dict; no code of it is ever run.

    Raises CheckpointError for anything that is not a whole, readable, current checkpoint.
    """
    return _load(path, check_file(path))


def _load(path, content):
    """The dict in the bytes `content` of the file at `path`."""
    try:
        state = (_read_safetensors if content[8:9] == b"{" else _read_pickle)(path, content)
    except Fault:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{path}: cannot be read ({reason}); it is damaged, use another copy") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a checkpoint; save a state_dict")
    _check_size(path, state)
    version = state.get("format", FORMAT)
    if type(version) is not int or version != FORMAT:
        newer = type(version) is int and version > FORMAT
        why = "is newer than this code reads; update the project" if newer else "is unknown"
        raise CheckpointError(f"{path}: format {version!r} {why} (this is format {FORMAT})")
    for name in FIELDS.keys() & state.keys() if "format" in state else ():
        if not isinstance(state[name], FIELDS[name]):
            raise CheckpointError(f"{path}: its {name} is no {FIELDS[name].__name__}; use another copy")
    return state


def _check_size(path, state):
    """Raise CheckpointError for content without end, which would fill the memory once it is printed."""
    level, size = [state], 0
    for _ in range(DEEPEST):
        size += sum(10 + (len(value) if isinstance(value, str | bytes) else 0) for value in level)
        if size > LARGEST_CONTENT or any(type(value) is int and abs(value) >> 64 for value in level):
            break
        inside = itertools.chain.from_iterable(map(_parts, level))
        if not (level := list(itertools.islice(inside, LARGEST_CONTENT // 10))):
            return
    raise CheckpointError(f"{path}: holds more than a checkpoint does: texts, lists or numbers without end")


def _parts(value):
    if isinstance(value, dict):
        return itertools.chain(value.keys(), value.values())
    return value if isinstance(value, list | tuple | set) else ()


def _read_pickle(path, content):
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd files; our error says what is wrong
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message advises to load it unsafely
        names = re.findall(r"(?:GLOBAL|class|function)\s+`?([\w.]+)", str(error))
        what = ", ".join(dict.fromkeys(names))[:150] or "something"
        raise CheckpointError(
            f"{path}: holds {what}, not only tensors and plain Python; refused, since it could run code: "
            "ask for a state_dict"
        ) from None


def load_newest(path, warn=utils.say):
    """Read `path`, or the checkpoint before it when `path` is damaged or gone: a warning names both."""
    previous = previous_of(path)
    try:
        return load(path)
    except CheckpointError as error:
        if not previous.exists():
            raise
        state = load(previous)
        warn(f"warning: {error}; going on from {previous}")
        return state


def check_file(path):
    """Return the bytes of a file; CheckpointError where they or their checksums show a fault."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; name the checkpoint in it")
    if not path.exists():
        there = sorted(str(f) for f in path.parent.glob("*.pth*") if f.suffix not in (".lock", ".tmp"))
        script = SCRIPTS.get(path.name.split(".")[0].partition("_")[2])
        maker = f"python {script} makes it; " if script else ""
        raise CheckpointError(f"{path}: no such file; {maker}in its folder: {', '.join(there) or 'none'}")
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:  # a pipe would make us wait
            raise CheckpointError(f"{path}: is no ordinary file of up to {LARGEST >> 30} GiB; name another")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if not content:
        raise CheckpointError(f"{path}: is empty; interrupted save? Use another copy or train again")
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: is a git-lfs pointer, not the file; run 'git lfs pull'")
    if re.match(rb"\s*(<!doctype|<html|<\?xml|<head)", content[:512], re.IGNORECASE):
        raise CheckpointError(f"{path}: is a web page, not a checkpoint; download the file itself")
    if content.startswith(b"PK"):
        _check_zip(path, content)
    return content


def _check_zip(path, content):
    """Raise CheckpointError unless every record of a zip file has the checksum it was written with."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise zipfile.BadZipFile("it is compressed, as no checkpoint is")
            damaged = archive.testzip()
    except Exception as error:
        raise CheckpointError(f"{path}: is cut off or damaged ({error}); use another copy") from None
    if damaged:
        raise CheckpointError(f"{path}: {damaged} fails its checksum; use another copy")


# ---------------------------------------------------------------- networks in checkpoints


class Network(NamedTuple):
    """A network in a file: all that was saved, float32 weights and prototypes, its name and arguments."""

    state: dict
    weights: dict
    model: str
    arguments: dict
    criterion: dict
    sha256: str  # of the bytes that were read


def read_network(path):
    """Read the network in a file of this project or the authors as a `Network`; all that is checked of it.

    Raises CheckpointError when there are no weights, they fit no network, or are no numbers to compute with.
    """
    content = check_file(path)
    state = _load(path, content)
    weights = state.get("state_dict", state)
    if not (isinstance(weights, dict) and any(isinstance(value, torch.Tensor) for value in weights.values())):
        raise CheckpointError(f"{path}: holds no weights (no state_dict); is it a network's checkpoint?")
    try:
        weights = clean_state_dict({k: v for k, v in weights.items() if isinstance(v, torch.Tensor)})
        said = state.get("network", {}) if "format" in state else {}
        model, arguments = network_of(weights, said)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; was it made by another network?") from None
    weights = check_finite(weights, path)
    if "format" not in state:  # another project's, where these names mean something else
        state = {name: state[name] for name in state if name not in FIELDS or name == "state_dict"}
    criterion = check_finite(state.get("criterion", {}), path)
    return Network(state, weights, model, arguments, criterion, hashlib.sha256(content).hexdigest())


def check_finite(tensors, path):
    """Return named tensors as float32 and batch counters as int64; CheckpointError where one is unusable.

    Unusable are bool, integer and complex numbers, NaN and Inf after the conversion, and a negative variance.
    """
    found = {}
    for name, value in tensors.items():
        try:
            stored = value.untyped_storage().nbytes() >= value.numel() * value.element_size()
            counts = str(name).endswith("num_batches_tracked")
            real = not value.is_complex() and value.is_floating_point() != counts
            found[name] = value.to(torch.int64 if counts else torch.float32) if stored and real else value
            usable = bool(stored and found[name].isfinite().all())
            usable = usable and not (str(name).endswith("running_var") and (value < 0).any())
        except (AttributeError, RuntimeError):  # no tensor; sparse, quantised, or on the meta device
            stored = usable = False
        if not stored:
            raise CheckpointError(f"{path}: {name} is no ordinary tensor; save it as one")
        if not real:
            raise CheckpointError(f"{path}: {name} is {value.dtype}; save it in floating point")
        if not usable:
            raise CheckpointError(f"{path}: {name} holds NaN, Inf or a variance below 0; use an older file")
    return found


def check_classes(state, path, classes):
    """Raise CheckpointError when a checkpoint says it was trained on other classes than `classes`."""
    there = list(state.get("classes", classes))
    if there != list(classes):
        there = ", ".join(map(str, there[:3]))
        raise CheckpointError(
            f"{path}: trained on other classes ({there}, ...) than this data set has "
            f"({', '.join(classes[:3])}, ...); give the --dataset it was trained on"
        )


def check_holdout(state, path, dataset):
    """Raise CheckpointError when a checkpoint says it was trained on the images that `dataset` holds out."""
    before = state.get("config", {}).get("holdout", 0)
    if dataset.holdout and "config" in state and before != dataset.holdout:
        raise CheckpointError(
            f"{path}: trained with holdout {before}, so on images that holdout {dataset.holdout} keeps for "
            f"measuring; train it with --holdout {dataset.holdout} as well"
        )


# ---------------------------------------------------------------- export


def export(source, target):
    """Write the weights and prototypes of a checkpoint, without its optimiser and paths; return the SHA-256.

    The format is safetensors where `target` ends so. Both formats load wherever a checkpoint does.
    """
    read, target = read_network(source), Path(target)
    kept = {name: read.state[name] for name in EXPORTED if name in read.state}
    for part, tensors in (("state_dict", read.weights), ("criterion", read.criterion)):
        plain = torch.contiguous_format
        kept[part] = {name: value.clone(memory_format=plain) for name, value in tensors.items()}
    config = kept.get("config", {}).items()
    kept["config"] = {name: value for name, value in config if name not in NOT_EXPORTED_SETTINGS}
    if target.exists():
        raise FileSystemError(f"{target}: exists; remove it or name another file")
    utils.prepare_output(target)
    content = io.BytesIO()
    if target.suffix == ".safetensors":
        content.write(_to_safetensors(kept))
    else:
        torch.save(kept, content)
    with utils.replacing(target) as temporary:
        utils.write_bytes(temporary, content.getbuffer())
    load(target)
    return utils.sha256(target)


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UsageError(".safetensors needs a package: pip install safetensors") from None
    return safetensors.torch


def _to_safetensors(state):
    """The weights under their own names, the prototypes as criterion.*, the rest as JSON in the header."""
    prototypes = {f"criterion.{name}": value for name, value in state["criterion"].items()}
    tensors = {**state["state_dict"], **prototypes}
    rest = json.dumps({name: state[name] for name in state if name not in ("state_dict", "criterion")})
    header = {"checkpoint": rest, "sha256": _digest(tensors, rest)}
    return _safetensors().save(tensors, header)


def _read_safetensors(path, content):
    tensors = _safetensors().load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    rest = header.get("checkpoint", "{}")
    if "sha256" in header and header["sha256"] != _digest(tensors, rest):
        raise CheckpointError(f"{path}: fails its checksum; the file is damaged, use another copy")
    parts = {"state_dict": {}, "criterion": {}}
    for name, value in tensors.items():
        part = "criterion" if name.startswith("criterion.") else "state_dict"
        parts[part][name.removeprefix("criterion.")] = value
    return {**json.loads(rest), **parts}


def _digest(tensors, text):
    """SHA-256 of named tensors and a text: the safetensors format itself has no checksum."""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def main(argv):
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("export",))
    parser.add_argument("checkpoint", help="what a training script saved")
    parser.add_argument("path", help="the file to write; .safetensors chooses that format")
    options = parser.parse_args(argv)
    digest = export(options.checkpoint, options.path)
    utils.say(f"exported {options.checkpoint} to {options.path}, sha256 {digest}")


if __name__ == "__main__":
    cli.leave_with_status(main)
