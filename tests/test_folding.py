"""The frozen copy of the network for attacks: the same function, without batch norms."""

import pytest
import torch
from test_resnet_model import copied, lived_in, pictures, same, small
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_model import folded, resnet


@small
def test_folded_network_gives_the_same_logits_and_gradients(depth, aux_dim):
    model = lived_in(depth, aux_dim, dtype=torch.float64)
    images = pictures(dtype=torch.float64).requires_grad_()
    logits, expected = folded(model.train())(images), model.eval()(images).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    gradient, expected = (torch.autograd.grad(y.square().sum(), images)[0] for y in (logits, expected))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_folding_costs_float32_no_more_than_rounding():
    model, images = lived_in(44), pictures()
    exact = lived_in(44).double()(images.double()).logits
    error, own_error = ((answer(images) - exact).abs().max() for answer in (folded(model), model.logits))
    assert error < 4 * own_error < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_folded_network_is_frozen_channels_last_and_has_no_batch_norm(memory_format):
    fold, images = folded(lived_in(44).train().to(memory_format=memory_format)), pictures()
    modules = list(fold.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) or module.training for module in modules)
    assert not any(parameter.requires_grad for parameter in fold.parameters())
    weights = [module.weight for module in modules if isinstance(module, nn.Conv2d)]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    expected = fold(images)
    assert torch.equal(fold.train()(images), expected)


def test_folding_leaves_the_original_untouched():
    model = lived_in(44).train()
    model(pictures()).logits.sum().backward()
    weights, state = copied(model), torch.get_rng_state()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    fold = folded(model)
    fold.requires_grad_(True)(pictures()).sum().backward()
    assert same(copied(model), weights) and torch.equal(torch.get_rng_state(), state)
    assert same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, gradients)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not {id(p) for p in fold.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("aux_dim", [0, 6])
def test_refreshed_it_is_the_copy_that_would_be_made_anew(aux_dim):
    model = lived_in(44, aux_dim)
    fold = folded(model)
    storage = {name: value.data_ptr() for name, value in fold.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.train()(pictures())
    before = fold(pictures())
    fold.refresh()
    assert same(fold.state_dict(), folded(model).state_dict())
    assert storage == {name: value.data_ptr() for name, value in fold.state_dict().items()}
    assert not torch.equal(fold(pictures()), before)


class Launches(TorchDispatchMode):
    """Counts the operations within it that are more than another view of the same memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func not in (torch.ops.aten.permute.default, torch.ops.aten.view.default)
        return func(*args, **(kwargs or {}))


def test_a_refresh_takes_as_few_operations_however_deep_the_network():
    """On a GPU each is a launch, between two steps that wait for it."""
    counts = []
    for depth in (8, 44, 110):
        model = resnet(10, depth).to(memory_format=torch.channels_last)
        fold = folded(model, torch.bfloat16)
        with Launches() as launches:
            fold.refresh()
        counts.append(launches.count)
    assert counts[0] == counts[1] == counts[2] < 25


def test_in_bfloat16_it_decides_as_the_network_does_under_autocast():
    model, images = lived_in(44), pictures()
    fold = folded(model, torch.bfloat16)
    assert all(m.weight.dtype == torch.bfloat16 for m in fold.modules() if hasattr(m, "weight"))
    with torch.autocast("cpu", torch.bfloat16):
        logits, peer = fold(images).float(), model.eval().logits(images).float()
    exact = model.logits(images)
    assert (logits - exact).abs().max() < 2 * (peer - exact).abs().max() + 1e-3 * exact.abs().max()
