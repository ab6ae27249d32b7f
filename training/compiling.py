"""Compiled steps, where `--compile` asks for them and a rehearsal shows that they work on this machine."""

import contextlib
import functools
import math
import signal
import time

import torch

import data
import utils
from cli import OUT_OF_MEMORY

ROUNDS = 3  # of a rehearsal: a CUDA graph is warmed up, recorded and replayed
MINUTES = 3  # to compile depth 110, estimated
# From this relative distance on, a compiled and a plain result differ by more than rounding. In bfloat16 one
# fused kernel rounds less often than several: near the output of depth 110 a distance of 0.13 was measured.
DIFFERENT = 0.5
# Gradients of so many last parameters are compared: those of the first ones, at depth 110, are all rounding.
NEAR = 4
BROKEN = ("illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure")
MODES = {  # of torch.compile, best first, and what the log says of each
    "reduce-overhead": "compiled",  # on a GPU this mode also replays whole passes as CUDA graphs
    "default": "compiled without CUDA graphs, which costs some speed",
    "off": "not compiled, which makes a GPU several times slower",
}


def wanted(config, device):
    """Return whether to compile. On a CPU it gains nothing."""
    return config.compile == "on" or (config.compile == "auto" and device.type == "cuda")


def choose(run, steps, stop):
    """Return (forward, attack) of `steps`, compiled if `run` asks for it and a rehearsal succeeds.

    `steps(compiled)` makes the pair; it calls `compiled` on each function that may be compiled. If compiling
    fails, `--compile auto` does without and logs it, and `--compile on` raises UsageError. Raises Interrupted
    if `stop` or --max-minutes asks for it meanwhile.
    """
    config, plain, modes, trouble = run.config, steps(lambda function: function), list(MODES), ""
    run.identity["compiled"] = "off"
    _, images, labels = next(data.epoch_batches(run.dataset.train, config.batch_size))
    if not wanted(config, run.device) or len(labels) != config.batch_size:
        return plain
    run.save_or_leave(stop)
    minutes = MINUTES * (run.model.depth or 8) / 110  # CNN-6 has none
    utils.say(
        f"compiling, which takes about {minutes:.1g} minutes the first time; --compile off does without"
    )
    while (mode := modes.pop(0)) != "off":
        torch.compiler.reset()  # what an attempt before this one left
        chosen = steps(functools.partial(on_full_batches, config.batch_size, mode))
        error = error_of(run, plain, chosen, images, labels)
        if error is None:
            break
        run.save_or_leave(stop)
        raise_where_nothing_helps(error, config)
        trouble = f": {cause(error)}; --compile off tries nothing"
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
            modes = ["off"]  # it was the compiler, not the capture
        del error  # and with it what the attempt still has in memory
    run.identity["compiled"] = mode
    run.say(MODES[mode] + trouble)
    return plain if mode == "off" else chosen


def raise_where_nothing_helps(error, config):
    text = str(error)
    if isinstance(error, KeyboardInterrupt | MemoryError) or OUT_OF_MEMORY.search(text):
        raise error
    if any(words in text for words in BROKEN):
        raise utils.UsageError(f"the GPU cannot go on ({cause(error)}); try --compile off") from error
    if config.compile == "on":
        raise utils.UsageError(f"--compile on: {cause(error)}; --compile off does without") from error


def cause(error):
    return utils.printable(" ".join(f"{type(error).__name__}: {error}".split()), 200)


def on_full_batches(batch_size, mode, function):
    """Return `function(images, ...)`, compiled for batches of `batch_size` and of twice that.

    An epoch's last batch may be smaller. It is not compiled: that would take as long again.
    """
    compiled = torch.compile(function, mode=mode, dynamic=False)

    def call(images, *others):
        return (compiled if len(images) in (batch_size, 2 * batch_size) else function)(images, *others)

    return call


# ---------------------------------------------------------------- the rehearsal


def error_of(run, *steps_and_batch):
    """Return the error that a rehearsal ends with, or None. The run is left as it was."""
    try:
        with leaving_at_once(run), as_it_was(run):
            rehearse(run, *steps_and_batch)
    except (Exception, KeyboardInterrupt) as error:
        return error


def rehearse(run, plain, compiled, images, labels):
    """Train on a batch without the optimiser's step; raise ArithmeticError unless both results agree.

    `plain` and `compiled` are each (forward, attack).
    """
    images = data.to_float(images).contiguous(memory_format=torch.channels_last)
    (forward, attack), batch, classes = compiled, images, labels
    for _ in range(ROUNDS):
        run.optimizer.zero_grad(set_to_none=True)
        if attack is not None:
            attacked = attack(images, labels, utils.generator(run.config.seed, "rehearsal"))
            batch, classes = torch.cat([images, attacked]), torch.cat([labels, labels])
        found = results(run, forward(batch, classes)[0])
    run.optimizer.zero_grad(set_to_none=True)
    expected = results(run, plain[0](batch, classes)[0])
    if attack is not None:
        # Only its mean distance is compared: in a deep network in bfloat16 rounding decides its direction.
        found["attack"] = (attacked - images).abs().mean()
        attacked = plain[1](images, labels, utils.generator(run.config.seed, "rehearsal"))
        expected["attack"] = (attacked - images).abs().mean()
    for name, value in expected.items():
        distance, comparable = (found[name] - value).norm() / value.norm(), value.isfinite().all()
        if comparable and value.any() and not distance < DIFFERENT:  # written so that NaN counts as different
            raise ArithmeticError(f"its {name} differs by {100 * distance.item():.0f} %")


def results(run, loss):
    """Return copies of the results of a pass: its loss, its gradients' norms, and a part of the gradients."""
    loss.backward()
    found = {"loss": loss.detach().clone()}
    for number, group in enumerate(run.optimizer.param_groups):
        grads = [weight.grad.float().flatten() for weight in group["params"] if weight.grad is not None]
        found[f"gradient {number}"] = torch.cat(grads[-NEAR:])
        found[f"gradient {number}'s size"] = torch.cat(grads).norm()
    return found


@contextlib.contextmanager
def as_it_was(run):
    """Restore the batch norms' statistics afterwards, and remove all gradients."""
    run.model.train()
    buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()]
    try:
        yield
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        for buffer, kept in buffers:
            buffer.copy_(kept)  # in place: a CUDA graph knows it by its address


@contextlib.contextmanager
def leaving_at_once(run):
    """Within it a signal to stop, or the end of --max-minutes, raises KeyboardInterrupt at once.

    A compiler cannot be asked to stop, and no training is lost.
    """
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    left = run.began + 60 * (run.config.max_minutes or math.inf) - time.monotonic()
    alarms = (signal.SIGALRM,) if left < math.inf and hasattr(signal, "SIGALRM") else ()  # not on Windows

    def leave(signum, frame):
        if signum in handlers:
            handlers[signum](signum, frame)  # it notes the signal, and ends the process at a second one
        raise KeyboardInterrupt(signum)

    with utils.answering_signals(leave, (*handlers, *alarms)):
        if alarms and signal.getsignal(*alarms) is leave:  # outside the main thread it is not
            # A little late, so that save_or_leave finds the time up.
            signal.setitimer(signal.ITIMER_REAL, max(left, 0) + 0.1)
        try:
            yield
        finally:
            if alarms:
                signal.setitimer(signal.ITIMER_REAL, 0)
