"""Any network as a `Target`: one that a user's function returns, or one that a caller passes in."""

import hashlib
import importlib
import os
import sys
import types

import torch
from torch import nn

import attacks
import utils

from .exact import exact_float32
from .target import Target, label_of


class PlainOrder(nn.Module):
    """A network that gets its images in plain memory order, since other people's code flattens with `view`.

    If it returns a dict, the entries become fields.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        outputs = self.network(images.contiguous())
        return types.SimpleNamespace(**outputs) if isinstance(outputs, dict) else outputs


def build(spec, path=None):
    """Return the network, frozen and in eval mode, that `MODULE:FUNCTION` makes of a checkpoint's path.

    With `path` None the function is called without arguments. The module is looked for in the working
    directory first. Raises UsageError if there is no such module or function, if it raises, or if it returns
    no nn.Module.
    """
    name, _, function = spec.partition(":")
    thing = f"--network {spec}"
    if not name or not function:
        raise utils.UsageError(f"{thing}: is MODULE:FUNCTION, such as my_module:build")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _raised(thing, "import", error) from error
        there = f"no module {error.name} in {os.getcwd()} or on Python's path"
        raise utils.UsageError(f"{thing}: {there}; write {name}.py, or go where it is") from None
    except (Exception, SystemExit) as error:
        raise _raised(thing, "import", error) from error
    if not callable(make := getattr(module, function, None)):
        file = getattr(module, "__file__", name)
        raise utils.UsageError(f"{thing}: {file} has no function {function}; name one that is there")
    given = () if path is None else (str(path),)
    try:
        network = make(*given)
    except (Exception, SystemExit) as error:
        raise _raised(thing, f"{function}({', '.join(map(repr, given))})", error) from error
    if not isinstance(network, nn.Module):
        raise utils.UsageError(
            f"{thing}: {function} returned a {type(network).__name__}; it must return an nn.Module"
        )
    return network.eval().requires_grad_(False)


def _raised(thing, what, error):
    return utils.UsageError(
        f"{thing}: {what} raised {type(error).__name__}: {error}; mend it (--debug shows where)"
    )


def fingerprint(network, name=""):
    """Return the SHA-256 of `name` and a network's state_dict: names, types, shapes and bytes."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape"))
    for key, value in network.state_dict().items():
        if not isinstance(value, torch.Tensor):
            digest.update(f"{key} {value!r}".encode())
            continue
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def target_of(network, sha256, path, sample, num_classes=None, label=None):
    """Return any network as a `Target` in eval mode, after a check of its outputs on the images `sample`.

    Its row is called `label`, or by default after the file at `path`. Raises UsageError unless it returns
    finite scores, N x num_classes (None: any number from 2 up), as a tensor or in a field `logits`.
    """
    thing, label = path or label, label or label_of(path)
    model = PlainOrder(network).eval()
    try:
        with torch.no_grad(), exact_float32():
            outputs = model(sample)
    except Exception as error:
        raise _raised(thing, f"the network, on images {tuple(sample.shape)},", error) from error
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise utils.UsageError(
            f"{thing}: the network returned a {type(outputs).__name__}; it must return logits, or a tuple "
            "with a field logits"
        )
    found, wanted = tuple(logits.shape), (len(sample), num_classes or max(2, *logits.shape[-1:]))
    if found != wanted:
        raise utils.UsageError(
            f"{thing}: the network returned {found} for {len(sample)} images of {num_classes or 'two'} "
            f"classes; it must return {wanted}"
        )
    if not attacks.scores(outputs).isfinite().all():
        raise utils.UsageError(f"{thing}: the network returned NaN or Inf; give it other weights")
    return Target(label, sha256, model, model, path)
