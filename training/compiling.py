"""Compiled functions, where `--compile` asks for them."""

import torch


def compile_if_asked(function, config, device):
    """Return `function(images, ...)`, compiled where `config.compile` is on, or is auto and `device` a GPU.

    Only full batches, doubled ones too, go through compiled code: to compile for one other size, that of an
    epoch's last batch, would take as long again. On a CPU compiling gains nothing.
    """
    if config.compile == "off" or (config.compile == "auto" and device.type != "cuda"):
        return function
    # On a GPU this mode also replays whole passes as CUDA graphs.
    compiled = torch.compile(function, mode="reduce-overhead", dynamic=False)

    def on_full_batches(images, *others):
        full = len(images) in (config.batch_size, 2 * config.batch_size)
        return (compiled if full else function)(images, *others)

    return on_full_batches
