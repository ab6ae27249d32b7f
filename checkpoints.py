"""Checkpoints: one file format, read without running code, written so that no failure harms the old file.

    python checkpoints.py export CHECKPOINT PATH

writes the weights and prototypes alone, to pass on to others. Name a PATH with .safetensors for that format.
"""

import hashlib
import io
import json
import os
import pickle
import re
import reprlib
import warnings
import zipfile
from pathlib import Path

import torch

import cli
import utils
from resnet_model import clean_state_dict, network_of
from utils import CheckpointError, Fault, FileSystemError, UsageError

FORMAT = 2  # version of the checkpoint's layout
SCRIPTS = {  # the script that makes a checkpoint of this name
    "CIFAR10_Softmax": "softmax_training.py",
    "CIFAR10_PCL": "pcl_training.py",
    "CIFAR10_PCL_AdvTrain_FGSM": "pcl_training_adversarial_fgsm.py",
    "CIFAR10_PCL_AdvTrain_PGD": "pcl_training_adversarial_pgd.py",
}
EXPORTED = (
    *("format", "script", "network", "classes", "data", "config", "epoch", "finished", "history"),
    *("state_dict", "criterion", "versions"),
)
NOT_EXPORTED_SETTINGS = ("data_dir", "init_from", "save_to", "log_to", "resume", "overwrite", "device")


# ---------------------------------------------------------------- writing


def previous_of(path):
    """Where the checkpoint before the newest one is kept while a run is under way."""
    return Path(f"{path}.previous")


def exists(path):
    """Whether there is a run at `path` to resume: its checkpoint, or the one kept before it."""
    return Path(path).exists() or previous_of(path).exists()


def save(state, path, keep_previous=True):
    """Write `state` (tensors, plain Python) to `path` atomically, after a check of what reached the disk.

    During a run the checkpoint before is kept as `PATH.previous`; `keep_previous=False` removes it.
    """
    path, previous = Path(path), previous_of(path)
    content = io.BytesIO()
    torch.save({"format": FORMAT, **state, "versions": utils.versions()}, content)
    with utils.replacing(path) as temporary:
        utils.write_bytes(temporary, content.getbuffer())
        _check_zip(temporary)
        if keep_previous and _is_whole(path):
            os.replace(path, previous)
    if not keep_previous:
        previous.unlink(missing_ok=True)


def drop_previous(path):
    """Remove the checkpoint kept before the one at `path`, unless that one is damaged."""
    if _is_whole(path):
        previous_of(path).unlink(missing_ok=True)


def _is_whole(path):
    """Whether a checkpoint is there and undamaged: only such a one may replace the good one before it."""
    try:
        _check_zip(path)
    except CheckpointError:
        return False
    return True


# ---------------------------------------------------------------- reading


def load(path):
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
    version = state.get("format", FORMAT)
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        why = "is newer than this code reads; update the project" if newer else "is unknown"
        raise CheckpointError(f"{path}: format {reprlib.repr(version):.40} {why} (this is format {FORMAT})")
    return state


def _read_pickle(path):
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # torch warns of odd files; our error says what is wrong
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_foreign(error)}") from None


def _foreign(error):
    """What a refused pickle holds; unlike torch's message, without the advice to load it unsafely."""
    names = re.findall(r"(?:GLOBAL|global|class)\s+`?([\w.]+)", str(error))
    what = f"holds {', '.join(dict.fromkeys(names)):.150}, " if names else "holds something "
    return f"{what}not only tensors and plain Python; refused, since it could run code: ask for a state_dict"


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
    """Return the first bytes of a file; CheckpointError where they or its checksums show a fault."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a directory; name the checkpoint in it")
    if not path.exists():
        there = sorted(str(f) for f in path.parent.glob("*.pth*") if f.suffix not in (".lock", ".tmp"))
        script = SCRIPTS.get(path.name.split(".")[0])
        maker = f"python {script} makes it; " if script else ""
        raise CheckpointError(f"{path}: no such file; {maker}in its folder: {', '.join(there) or 'none'}")
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


# ---------------------------------------------------------------- networks in checkpoints


def read_network(path):
    """Return (checkpoint, clean weights, arguments of `resnet`) of a file of this project or the authors.

    Raises CheckpointError when there are no weights, they fit no network, or one is not a finite number.
    """
    state = load(path)
    weights = state.get("state_dict", state)
    if not (isinstance(weights, dict) and any(isinstance(value, torch.Tensor) for value in weights.values())):
        raise CheckpointError(f"{path}: holds no weights (no state_dict); is it a network's checkpoint?")
    try:
        weights = clean_state_dict({k: v for k, v in weights.items() if isinstance(v, torch.Tensor)})
        network = network_of(weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error!s:.200}; was it made by another network?") from None
    check_finite(weights, path)
    if not isinstance(state.get("config", {}), dict):  # not ours
        state = {name: value for name, value in state.items() if name != "config"}
    return state, weights, network


def check_finite(tensors, path):
    """Raise CheckpointError when one of the named tensors holds NaN or Inf, or is no ordinary tensor."""
    for name, value in tensors.items():
        try:
            stored = value.untyped_storage().nbytes() >= value.numel() * value.element_size()
            finite = bool(stored and value.isfinite().all())
        except RuntimeError:  # sparse, quantised, or on the meta device
            stored = finite = False
        if not stored:
            raise CheckpointError(f"{path}: {name:.100} is no ordinary tensor; save it as one")
        if not finite:
            raise CheckpointError(f"{path}: {name} holds NaN or Inf; the run diverged, use an older file")


def check_classes(state, path, classes):
    """Raise CheckpointError when a checkpoint says it was trained on other classes than `classes`."""
    there = state.get("classes")
    if isinstance(there, list | tuple) and list(there) != list(classes):
        there = [name[:40] if isinstance(name, str) else reprlib.repr(name)[:40] for name in there[:3]]
        raise CheckpointError(
            f"{path}: trained on other classes ({', '.join(there)}, ...) than this data set has "
            f"({', '.join(classes[:3])}, ...); give the --dataset it was trained on"
        )


def check_holdout(state, path, dataset):
    """Raise CheckpointError when a checkpoint says it was trained on the images that `dataset` holds out."""
    before = (state.get("config") or {}).get("holdout", 0)
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
    state, target = load(source), Path(target)
    state = state if "state_dict" in state else {"state_dict": state}
    kept = {name: state[name] for name in EXPORTED if name in state}
    for part in ("state_dict", "criterion"):
        tensors = kept.get(part, {}).items()
        kept[part] = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors}
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
    """SHA-256 of named tensors and a text: the safetensors format itself has no checksum."""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def main(argv):
    parser = cli.Parser(
        description="Write the weights and prototypes of a checkpoint, without the optimiser."
    )
    parser.add_argument("command", choices=("export",))
    parser.add_argument("checkpoint", help="what a training script saved")
    parser.add_argument("path", help="the file to write; .safetensors chooses that format")
    options = parser.parse_args(argv)
    digest = export(options.checkpoint, options.path)
    utils.say(f"exported {options.checkpoint} to {options.path}, sha256 {digest}")


if __name__ == "__main__":
    cli.leave_with_status(main)
