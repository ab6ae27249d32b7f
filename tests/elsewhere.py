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
MAY_MIX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten.copy_.default}
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
    if away and func not in MAY_MIX and any(t.dim() and not isinstance(t, Elsewhere) for t in tensors):
        raise RuntimeError(f"{func}: tensors on two devices")
    to = kwargs.get("device") or (DEVICE if away else torch.device("cpu"))
    if to == DEVICE and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: a generator of the CPU draws on {DEVICE}")
    by_mask = func in MAY_MIX and any(tensor.dtype == torch.bool for tensor in tensors[1:])
    to_host = (
        func is aten.copy_.default and isinstance(args[1], Elsewhere) and not isinstance(args[0], Elsewhere)
    )
    from_host = func is aten._to_copy.default and to == DEVICE and not (away or kwargs.get("non_blocking"))
    if from_host or (away and (func in WAITING or to != DEVICE or by_mask or to_host)):
        WAITS.append(str(func))
    here = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") == DEVICE else dict(kwargs)
    here.pop("pin_memory", None)
    out = func(*on_cpu(args), **on_cpu(here))
    if func._schema.is_mutable and out is not None and isinstance(args[0], Elsewhere):
        return args[0]
    return on_device(out) if to == DEVICE else out


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
