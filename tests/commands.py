"""Scripts run by their command line, in this process, and what they and checkpoints answer."""

import contextlib
import io
import json
import sys
from unittest import mock

import pytest
import torch

import checkpoints
import cli
import robustness
from utils import CheckpointError


def run(module, *options):
    """Run a script as `python MODULE.py OPTIONS`; return its exit status, its stdout and its stderr."""
    out, err = io.StringIO(), io.StringIO()
    argv = [f"{module.__name__}.py", *map(str, options)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.run(module.main, module.Config)
    assert "Traceback" not in err.getvalue() and err.getvalue().count("\n") <= 1
    return ended.value.code, out.getvalue(), err.getvalue()


def refused(path, status, *words, module=robustness):
    """The one line with which a script refuses a file, and leaves with `status`."""
    code, _, said = run(module, *(words or evaluation_of(path)))
    assert code == status, said
    assert len(said.removeprefix(f"{module.__name__}.py: ")) <= 301 and said[:-1].isprintable()
    return said


def evaluation_of(path):
    """Options that measure a checkpoint on four images under one attack."""
    given = ["--dataset", "synthetic", "--limit", "4", "--device", "cpu", "--overwrite", "--attacks", "fgsm"]
    return [*given, "--checkpoints", path, "--results", path.parent / "results.json"]


def measured(path):
    """What the evaluation of a checkpoint writes: its entry in the results."""
    code, _, said = run(robustness, *evaluation_of(path))
    assert code == 0, said
    return json.loads((path.parent / "results.json").read_text())["checkpoints"][0]


def message(path, read=checkpoints.load):
    """The one line that a refused file is answered with."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    text = str(caught.value)
    assert caught.value.exit_status == 4 and "\n" not in text and str(path) in text
    assert "weights_only" not in text and "unsafe" not in text.lower()
    return text


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b
