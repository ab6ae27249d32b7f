"""What CUDA graphs and fused kernels demand of the step, asked on a CPU: see `replay.py`."""

import itertools

import pytest
import soak
import torch
from replay import Replay
from runs import SCRIPTS, options, stop, train

import training
from utils import UsageError

every_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture
def replays(monkeypatch):
    """replays(poison) has all that is compiled from then on replayed."""
    steps = training.loop.make_steps

    def begin(poison):
        replay = Replay(poison)

        def make_steps(run, *others):
            replay.run = run
            return steps(run, *others)

        monkeypatch.setattr(training.loop, "make_steps", make_steps)
        monkeypatch.setattr(torch, "compile", replay.compile)
        return replay

    with torch._dynamo.config.patch(error_on_recompile=True):
        yield begin


def check_layouts(optimizer):
    """What the fused kernel asks: gradients and momentum lie in memory as their parameter does."""
    for weight in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
        momentum = optimizer.state.get(weight, {}).get("momentum_buffer")
        for other in (weight.grad, momentum):
            if other is not None:
                strides = zip(weight.shape, weight.stride(), other.stride(), strict=True)
                assert all(size == 1 or mine == its for size, mine, its in strides)


@pytest.fixture
def steps(monkeypatch):
    """Checks the layouts at each step; what it holds counts the steps."""
    step, counted = torch.optim.SGD.step, []

    def checking(optimizer):
        check_layouts(optimizer)
        step(optimizer)
        check_layouts(optimizer)
        counted.append(optimizer)

    monkeypatch.setattr(torch.optim.SGD, "step", checking)
    return counted


@every_script
def test_replayed_stopped_and_resumed_it_learns_what_it_learns_without(
    script, whole, replays, steps, tmp_path
):
    """What a pass overwrites it poisons: nothing of the one before is read, and nothing has moved."""
    path, replay = tmp_path / "run.pth.tar", replays(poison=True)
    given = options(script, path, whole["softmax_training"])
    attacks = {"pcl_training_adversarial_fgsm": 1, "pcl_training_adversarial_pgd": 2}.get(script, 0)
    stop(script, *given, "--compile", "off" if attacks else "on", looks=2)  # tracing an attack takes seconds
    assert len(steps) == (3 if attacks else 2)
    replay.graphs = replay.passes = 0
    train(script, *given, "--compile", "on", "--resume")
    assert replay.graphs == 1 + bool(attacks) and len(steps) == 6
    assert replay.passes == (3 + 6 - (3 if attacks else 2)) * (1 + attacks)  # the rehearsal, and the rest
    for name in ("loss", "cross_entropy", "train_accuracy"):
        mine, expected = (
            [row[name] for row in soak.outcome(file)["history"]] for file in (path, whole[script])
        )
        assert mine == pytest.approx(expected, rel=1e-3)


@every_script
def test_without_poison_it_is_the_same_bit_for_bit(script, whole, replays, tmp_path):
    paths = [tmp_path / name / "run.pth.tar" for name in ("plain", "poisoned")]
    for path in paths:
        replays(poison=path is paths[1])
        train(script, *options(script, path, whole["softmax_training"]), "--compile", "on", "--epochs", "1")
    assert soak.compare(*paths) == []


def test_the_fused_kernel_takes_the_layouts_of_bottlenecks_fresh_and_resumed(steps, tmp_path):
    """Where a convolution is 1 x 1, one tensor has several strides."""
    given = options("softmax_training", tmp_path / "run.pth.tar", limit=4, depth=44, eval_every=9)
    train("softmax_training", *given, "--epochs", "1")
    train("softmax_training", *given, "--epochs", "2", "--resume")
    assert len(steps) == 2


def test_the_simulation_finds_what_a_gpu_would_not_stand(replays, monkeypatch, tmp_path):
    """A weight that moves, a gradient kept too long, a result that is read after the next pass."""
    given = [*options("softmax_training", tmp_path / "run.pth.tar"), "--compile", "on", "--overwrite"]
    step, see, kept = torch.optim.SGD.step, training.watch.Watch.see, []

    def moving(optimizer):
        step(optimizer)
        weight = optimizer.param_groups[0]["params"][0]
        weight.data = weight.data.clone()

    def keeping(watch, terms, *place):
        kept.append(terms["loss"])
        see(watch, terms, *place)

    for place, slip in (
        ((torch.optim.SGD, "step", moving), "moved"),
        ((torch.optim.SGD, "zero_grad", lambda *_, **__: None), "a gradient lies in memory"),
    ):
        replays(poison=True)
        with monkeypatch.context() as patch, pytest.raises((AssertionError, UsageError), match=slip):
            patch.setattr(*place)
            train("softmax_training", *given)
    replays(poison=True)
    monkeypatch.setattr(training.watch.Watch, "see", keeping)
    train("softmax_training", *given)
    assert all(loss.isnan() for loss in kept[:-1])
