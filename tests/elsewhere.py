"""A device that is not the CPU, for machines that have no other: what a GPU would refuse is refused here.

Tensors on it are computed on the CPU, but say that they lie on DEVICE. As with CUDA, an operation on tensors
of two devices raises, and so does drawing on DEVICE from a generator of the CPU; `WAITS` lists what would
have made the host wait for a GPU.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

import utils

aten = torch.ops.aten
DEVICE = torch.device("lazy")  # no real one, and like "meta" no queue of its own in autograd
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # by indices of the CPU too
WAITS = []
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


class Elsewhere(torch.Tensor):
    """A tensor on DEVICE; `here` is the one on the CPU that it stands for."""

    is_cuda = True

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE
        )

    def __init__(self, here):
        self.here = here

    def __repr__(self):
        return f"Elsewhere({self.here})"

    def tolist(self):
        WAITS.append("tolist")
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """Within it tensors can be made on DEVICE."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
    away = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    # A tensor there may be indexed by one of the CPU, but not the other way round.
    may_mix = func is aten.copy_.default or (func in INDEXING and isinstance(args[0], Elsewhere))
    if away and not may_mix and any(t.dim() and not isinstance(t, Elsewhere) for t in tensors):
        raise RuntimeError(f"{func}: tensors on two devices")
    to = kwargs.get("device") or (DEVICE if away else torch.device("cpu"))
    if to == DEVICE and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: a generator of the CPU draws on {DEVICE}")
    by_index = func in INDEXING and any(waits_as_an_index(tensor) for tensor in tensors[1:])
    to_host = (
        func is aten.copy_.default and isinstance(args[1], Elsewhere) and not isinstance(args[0], Elsewhere)
    )
    at_once = kwargs.get("non_blocking") and getattr(args[0], "pinned", False)
    from_host = func is aten._to_copy.default and to == DEVICE and not (away or at_once)
    if from_host or (away and (func in WAITING or to != DEVICE or by_index or to_host)):
        WAITS.append(str(func))
    here = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") == DEVICE else dict(kwargs)
    pinned = here.pop("pin_memory", False)
    out = func(*on_cpu(args), **on_cpu(here))
    if pinned:
        out.pinned = True  # memory from which alone a copy need not wait
    if func._schema.is_mutable and out is not None and isinstance(args[0], Elsewhere):
        return args[0]
    return on_device(out) if to == DEVICE else out


def waits_as_an_index(tensor):
    """A mask has to be counted first, and an index on the CPU to be copied."""
    return tensor.dtype == torch.bool or (tensor.dim() and not isinstance(tensor, Elsewhere))


def on_cpu(values):
    return tree_map(lambda value: value.here if isinstance(value, Elsewhere) else value, values)


def on_device(values):
    return tree_map(lambda value: Elsewhere(value) if isinstance(value, torch.Tensor) else value, values)


class FusedSGD(torch.optim.SGD):
    """SGD with what the fused kernel does: no step where `found_inf` is 1, which the host does not learn."""

    found_inf = None

    def __init__(self, params, *, fused, **options):
        super().__init__(params, foreach=False, **options)
        self.defaults["fused"] = fused

    def step(self):
        lost, self.found_inf = self.found_inf, None
        if lost is None or not on_cpu(lost):
            super().step()


@contextlib.contextmanager
def only_device(monkeypatch):
    """Within it DEVICE is the one that scripts select, and checkpoints can be written from it."""
    autocast, save = torch.autocast, torch.save
    with monkeypatch.context() as patch, Everywhere():
        patch.setattr(utils, "select_device", lambda name: DEVICE)
        patch.setattr(
            torch, "autocast", lambda device_type, *args, **kwargs: autocast("cpu", *args, **kwargs)
        )
        patch.setattr(torch.optim, "SGD", FusedSGD)
        patch.setattr(torch, "save", lambda state, *args: save(on_cpu(state), *args))
        yield
