"""How evaluation computes: what `exact_float32` switches, and that it leaves no trace; the memory order."""

import importlib
import itertools

import pytest
import torch

import data
import evaluation
import robustness
from evaluation import exact, trials
from resnet_model import resnet

CUDNN, MATMUL, CONV = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.cudnn.conv


def old(on):
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = on


def new(precision):
    MATMUL.fp32_precision = CONV.fp32_precision = precision


SWITCHES = {  # of the user: the old interface, the new one, and what PyTorch's warnings advise
    "old on": lambda: old(True),
    "old off": lambda: old(False),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "highest": lambda: torch.set_float32_matmul_precision("highest"),
    "new on": lambda: new("tf32"),
    "new off": lambda: new("ieee"),
}
READ = (
    *(lambda place=place: place.fp32_precision for place in exact.PLACES),
    lambda: MATMUL.allow_tf32,
    lambda: CUDNN.allow_tf32,
    torch.get_float32_matmul_precision,
)


def state():
    """What all interfaces say; a mixture that a user made himself makes PyTorch raise."""
    found = []
    for read in READ:
        try:
            found.append(read())
        except RuntimeError:
            found.append("raises")
    return found


@pytest.fixture
def switches():
    """After the test all are as PyTorch has them at its start."""
    defaults = [place.fp32_precision for place in exact.PLACES]

    def reset():
        SWITCHES["highest"]()
        MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True
        for place, value in zip(exact.PLACES, defaults, strict=True):
            place.fp32_precision = value

    yield reset
    reset()


def test_no_sequence_of_switches_breaks_it_or_is_changed_by_it(switches):
    for sequence in itertools.product(SWITCHES, repeat=3):
        ends = []
        for measures in (False, True):
            switches()
            for name in sequence:
                SWITCHES[name]()
                if measures:
                    with evaluation.exact_float32():
                        assert [place.fp32_precision for place in exact.PLACES] == ["ieee"] * 4
            ends.append(state())
        assert ends[0] == ends[1], sequence


def test_nothing_below_float32(switches):
    """Inside, no mode that trades digits for speed is on; outside, all are as they were."""
    torch.set_float32_matmul_precision("medium")
    CUDNN.benchmark = True
    try:
        with torch.autocast("cpu", torch.bfloat16), evaluation.exact_float32():
            assert CUDNN.deterministic and not CUDNN.benchmark
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            a, b = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(0))
            assert ((a @ b).double() - a.double() @ b.double()).abs().max() < 1e-4  # bfloat16: 1e-2
        assert torch.get_float32_matmul_precision() == "medium"
        assert CUDNN.benchmark and not CUDNN.deterministic
    finally:
        CUDNN.benchmark = False


def test_the_memory_order_of_evaluation(monkeypatch, tmp_path):
    """cuDNN's fast float32 kernels take the plain order; weights and images are in the same one."""
    plain, last = torch.contiguous_format, torch.channels_last
    rule = exact.memory_format
    assert [rule(torch.device(name)) for name in ("cpu", "cuda", "cuda:1")] == [last, plain, plain]
    assert [rule("cpu"), rule("cuda:1")] == [last, plain]  # as `classifier` may be called
    torch.manual_seed(0)
    torch.save({"state_dict": resnet(10, 8).state_dict()}, tmp_path / "weights.pth")
    trial, split, found = (
        trials.make("pgd", robustness.Config(num_steps=2)),
        data.load("synthetic", "", limit=8),
        [],
    )
    for order in (last, plain):
        for name in ("measure", "target"):
            module = importlib.import_module(f"evaluation.{name}")
            monkeypatch.setattr(module, "memory_format", lambda device, order=order: order)
        target = evaluation.load_target(tmp_path / "weights.pth", torch.device("cpu"), split.classes)
        images, attacked, *_ = evaluation.attack_block(target, trial, split.test, 0, 8, 0)
        weights = [*target.model.parameters(), *target.folded.parameters()]
        tensors = [images, attacked, *(weight for weight in weights if weight.dim() == 4)]
        assert all(tensor.is_contiguous(memory_format=order) for tensor in tensors)
        found.append(attacked)
    assert torch.isclose(*found, atol=1e-6).float().mean() > 0.99
