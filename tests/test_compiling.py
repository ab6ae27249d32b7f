"""What is compiled, the rehearsal before the first batch, and what happens where compiling does not work."""

import contextlib
import itertools
import os
import signal
import time
from unittest import mock

import pytest
import soak
import torch
from commands import run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import checkpoints
import pcl_training_adversarial_fgsm as fgsm
import softmax_training
import training
import utils
from prototype_conformity import PrototypeConformityLoss
from resnet_model import resnet
from training import compiling

SIZE = {"limit": 12, "batch_size": 4, "epochs": 1}  # 3 batches
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    path = tmp_path_factory.mktemp("stage 1") / "run.pth.tar"
    assert run(softmax_training, *soak.tiny(path, **SIZE))[0] == 0
    return path


@pytest.fixture(scope="module")
def plain(stage_1, tmp_path_factory):
    """The checkpoint of a run that compiled nothing."""
    path = tmp_path_factory.mktemp("plain") / "run.pth.tar"
    assert train(path, stage_1, "off")[0] == 0
    return path


def train(path, stage_1, compiled, *flags):
    """Run a script with an attack, by its command line."""
    return run(fgsm, *soak.tiny(path, **SIZE, init_from=stage_1), "--compile", compiled, *flags)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """auto compiles here too."""
    monkeypatch.setattr(compiling, "wanted", lambda config, device: config.compile != "off")


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        *[("auto", "cpu", False), ("auto", "cuda", True), ("on", "cpu", True), ("on", "cuda", True)],
        *[("off", "cuda", False), ("off", "cpu", False)],
    ],
)
def test_what_is_compiled(name, device, expected):
    config = softmax_training.Config(compile=name)
    assert compiling.wanted(config, torch.device(device)) == expected


# ---------------------------------------------------------------- what does not work


class Backward(torch.autograd.Function):
    """The identity, whose backward does `action` to the gradient."""

    @staticmethod
    def forward(ctx, value, action):
        ctx.action = action
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.action(gradient), None


def raising(error):
    def action(*_):
        raise error

    return action


def compiler(
    monkeypatch, *, before=None, after=None, backward=None, attack=None, at=0, modes=compiling.MODES
):
    """Have torch.compile return functions with a fault, from call `at` on; return the modes tried."""
    tried = []

    def compile(function, mode, dynamic):
        calls = itertools.count()
        tried.append(mode)

        def call(*args):
            broken = mode in modes and next(calls) >= at
            if broken and before:
                before()
            out = function(*args)
            if broken and after:
                after()
            if broken and backward and isinstance(out, tuple):
                out = (Backward.apply(out[0], backward), *out[1:])
            if broken and attack and not isinstance(out, tuple):
                out = Backward.apply(out, attack)
            return out

        return call

    monkeypatch.setattr(torch, "compile", compile)
    return tried


FAILED = RuntimeError("capture failed\nin two lines")
FAULTS = {
    "the forward": {"before": raising(FAILED)},
    "the backward": {"backward": raising(FAILED)},
    "the second call": {"before": raising(FAILED), "at": 1},
    "a gradient of 0": {"backward": torch.zeros_like},
    "a doubled gradient": {"backward": lambda gradient: 2 * gradient},
    "NaN": {"backward": lambda gradient: torch.nan * gradient},
    "the attack": {"attack": lambda gradient: torch.nan * gradient},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_work_is_done_without(fault, as_on_a_gpu, plain, stage_1, tmp_path, monkeypatch):
    """Bit for bit what a run learns that never tried; the rehearsal leaves no trace but a line."""
    path = tmp_path / "run.pth.tar"
    tried = compiler(monkeypatch, **FAULTS[fault])
    code, said, _ = train(path, stage_1, "auto")
    assert code == 0 and soak.compare(path, plain) == []
    assert list(dict.fromkeys(tried)) == ["reduce-overhead", "default"]
    state = checkpoints.load(path)
    (line,) = (line for line in state["log"] if "compiled" in line)
    cause = "capture failed in two lines" if "raising" in str(FAULTS[fault]) else "differs by"
    cause = "its attack differs by 100 %" if fault == "the attack" else cause
    assert line.startswith("not compiled, which makes a GPU several times slower: ") and cause in line
    assert line.endswith("--compile off tries nothing") and line in said and state["compiled"] == "off"
    code, _, said = train(path, stage_1, "on", "--overwrite")
    assert code == 2 and "--compile on: " in said and cause in said and "--compile off" in said


def test_where_capture_alone_fails_it_compiles_without_graphs(as_on_a_gpu, stage_1, tmp_path, monkeypatch):
    path = tmp_path / "run.pth.tar"
    compiler(monkeypatch, before=raising(FAILED), modes=("reduce-overhead",))
    assert train(path, stage_1, "auto")[0] == 0
    state = checkpoints.load(path)
    assert state["compiled"] == "default" and any("without CUDA graphs" in line for line in state["log"])


def test_where_the_compiler_fails_it_is_not_asked_twice(as_on_a_gpu, plain, stage_1, tmp_path, monkeypatch):
    """As where Triton finds no libcuda, or the cache cannot be written."""
    path, real, asked = tmp_path / "run.pth.tar", torch.compile, []

    def backend(graph, inputs):
        asked.append(graph)
        raise OSError(30, "Read-only file system", "/cache")

    monkeypatch.setattr(torch, "compile", lambda function, mode, dynamic: real(function, backend=backend))
    assert train(path, stage_1, "auto")[0] == 0
    assert soak.compare(path, plain) == [] and len(asked) == 1
    assert any("Read-only file system" in line for line in checkpoints.load(path)["log"])


@pytest.mark.parametrize("compiled", ["auto", "on"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "out of memory on the device with --batch"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "try --compile off"),
        (RuntimeError("CUDA error: device-side assert triggered"), "try --compile off"),
    ],
)  # fmt: skip
def test_where_nothing_helps_it_ends(error, words, compiled, as_on_a_gpu, stage_1, tmp_path, monkeypatch):
    path = tmp_path / "run.pth.tar"
    tried = compiler(monkeypatch, after=raising(error))
    code, _, said = train(path, stage_1, compiled)
    assert code == 2 and words in said and "default" not in tried and not path.exists()


# ---------------------------------------------------------------- what works


def test_the_log_and_the_checkpoint_say_what_was_compiled(plain, stage_1, tmp_path, monkeypatch):
    path = tmp_path / "run.pth.tar"
    compiler(monkeypatch)
    code, said, _ = train(path, stage_1, "on")
    assert code == 0 and "compiling, which takes about 0.2 minutes" in said
    state = checkpoints.load(path)
    assert state["compiled"] == "reduce-overhead" and state["log"].count("compiled") == 1
    assert soak.compare(path, plain) == []
    assert checkpoints.load(plain)["compiled"] == "off"
    compiler(monkeypatch, before=raising(FAILED))  # no batch is full
    assert train(path, stage_1, "on", "--overwrite", "--batch-size", "13")[0] == 0
    assert train(path, stage_1, "off", "--overwrite", "--epochs", "2")[0] == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, None])
def test_a_stop_while_compiling_is_answered_at_once(signum, plain, stage_1, tmp_path, monkeypatch):
    """By a signal, or by --max-minutes; the run that is resumed ends as one that was never stopped."""
    path, handler = tmp_path / "run.pth.tar", signal.getsignal(signal.SIGTERM)

    def slow():
        if signum:
            os.kill(os.getpid(), signum)
        time.sleep(60)

    compiler(monkeypatch, before=slow)
    began, limit = time.monotonic(), () if signum else ("--max-minutes", "0.01")
    code, *_ = train(path, stage_1, "on", *limit)
    assert code == (128 + signum if signum else 75) and time.monotonic() - began < 30
    state = checkpoints.load(path)
    assert "stopped at epoch 1, batch 0" in state["log"][-1] and state["batch"] == state["epoch"] == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    assert train(path, stage_1, "off", "--resume")[0] == 0
    assert soak.compare(path, plain) == []


def test_versions_name_the_gpu_and_its_libraries():
    assert not {"gpu", "cuda", "cudnn"} & utils.versions().keys()
    gpu = {"is_initialized": lambda: True, "get_device_name": lambda: "H100"}
    with mock.patch.multiple(torch.cuda, **gpu), mock.patch.object(torch.backends.cudnn, "version", int):
        assert utils.versions()["gpu"] == "H100" and utils.versions()["cudnn"] == "0"
        assert all(type(value) is str for value in utils.versions().values())


# ---------------------------------------------------------------- one device


class Devices(TorchDispatchMode):
    """Notes the devices of all that is computed with."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = (value for value in tree_iter((args, kwargs, out)) if isinstance(value, torch.Tensor))
        self.seen |= {tensor.device.type for tensor in tensors}
        return out


def test_the_step_computes_with_tensors_of_the_gpu_alone():
    """Tensors without contents say where they are. One of the CPU would keep a graph from being captured."""
    with torch._subclasses.fake_tensor.FakeTensorMode(), torch.device("cuda"):
        model = resnet(10, 8)
        criterion = PrototypeConformityLoss(10, {"layer3": 64, "fc": 1024}, 1.0, 1e-4)
        images, labels = torch.empty(4, 3, 32, 32), torch.empty(4, dtype=torch.int64)
        run = mock.Mock(model=model, criterion=criterion, autocast=contextlib.nullcontext)
        with Devices() as devices:
            training.make_forward(run)(images, labels)
    assert devices.seen == {"cuda"}
