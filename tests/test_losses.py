"""The two prototype losses against their definitions, written out as loops over numbers in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_proximity import ContrastiveProximity
from proximity import Proximity

LOSSES = {
    "pull squared": lambda k, d: Proximity(k, d),
    "pull plain": lambda k, d: Proximity(k, d, squared=False),
    "push squared": lambda k, d: ContrastiveProximity(k, d),
    "push plain": lambda k, d: ContrastiveProximity(k, d, squared=False),
    "push squared apart": lambda k, d: ContrastiveProximity(k, d, separation=True),
    "push plain apart": lambda k, d: ContrastiveProximity(k, d, squared=False, separation=True),
}
every_loss = pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
any_loss = st.sampled_from(sorted(LOSSES)).map(LOSSES.get)


def pairs_of(loss, labels, num_classes):
    """Eq. 5's pairs: (i, j, weight), feature to prototype, and (y, j, weight), prototype to prototype."""
    if isinstance(loss, Proximity):
        return [(i, y, 1 / len(labels)) for i, y in enumerate(labels)], []
    weight = 1 / (len(labels) * (num_classes - 1))
    others = [(i, y, j) for i, y in enumerate(labels) for j in range(num_classes) if j != y]
    apart = [(y, j, weight) for _, y, j in others] if loss.separation else []
    return [(i, j, weight) for i, _, j in others], apart


def by_definition(loss, features, labels):
    """Value and gradients with respect to features and prototypes, one pair at a time: Eq. 5, no autograd."""
    features, centers = features.detach().double().numpy(), loss.centers.detach().double().numpy()
    to_prototypes, between_prototypes = pairs_of(loss, labels.tolist(), len(centers))
    value, grad_features, grad_centers = 0.0, np.zeros_like(features), np.zeros_like(centers)

    def term(start, end, grad_start, grad_end, weight):
        difference = start - end
        distance = math.sqrt(math.fsum(difference**2))
        slope = 2 * difference if loss.squared else difference / (distance or math.inf)
        grad_start += weight * slope
        grad_end -= weight * slope
        return weight * (distance**2 if loss.squared else distance)

    for i, j, weight in to_prototypes:
        value += term(features[i], centers[j], grad_features[i], grad_centers[j], weight)
    for y, j, weight in between_prototypes:
        value += term(centers[y], centers[j], grad_centers[y], grad_centers[j], weight)
    return value, grad_features, grad_centers


def problem(make, batch, num_classes, feat_dim, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    loss = make(num_classes, feat_dim).to(dtype)
    with torch.no_grad():
        loss.centers.copy_(torch.randn(num_classes, feat_dim, generator=generator))
    features = torch.randn(batch, feat_dim, generator=generator).mul(3).to(dtype).requires_grad_()
    labels = torch.randint(num_classes, (batch,), generator=generator)
    return loss, features, labels


def assert_by_definition(loss, features, labels, rtol, atol):
    value = loss(features, labels)
    # As in the joint loss, where a weight stands before it: the gradient must carry what comes from above.
    grads = torch.autograd.grad(0.25 * value, (features, loss.centers))
    expected, *expected_grads = by_definition(loss, features, labels)
    np.testing.assert_allclose(value.item(), expected, rtol=rtol)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        scale = abs(expected_grad).max()
        np.testing.assert_allclose(grad.numpy(), 0.25 * expected_grad, rtol=rtol, atol=atol * scale)


@given(
    make=any_loss,
    batch=st.integers(1, 9),
    num_classes=st.integers(2, 6),
    feat_dim=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=120, deadline=None)
def test_value_and_gradient_are_the_definitions(make, batch, num_classes, feat_dim, seed):
    loss, features, labels = problem(make, batch, num_classes, feat_dim, seed, torch.float64)
    assert_by_definition(loss, features, labels, rtol=1e-11, atol=1e-12)


@every_loss
@pytest.mark.parametrize(
    "batch, num_classes, feat_dim, origin",
    [(1, 2, 1, 0), (7, 10, 256, 0), (64, 10, 33, 0), (3, 100, 64, 0), (40, 30, 64, 1e4)],
)
def test_float32_is_the_definition_up_to_rounding(make, batch, num_classes, feat_dim, origin):
    """Far from the origin too: there, with 30 points a side, cdist expands the square and is off by units.

    One feature lies on its own prototype, and one on another: the rest keep their gradient.
    """
    loss, features, labels = problem(make, batch, num_classes, feat_dim)
    with torch.no_grad():
        loss.centers += origin
        features += origin
        if batch > 2:
            features[0] = loss.centers[labels[0]]
            features[2] = loss.centers[(labels[2] + 1) % num_classes]
    assert_by_definition(loss, features, labels, rtol=1e-5, atol=1e-5 if origin else 1e-6)


@every_loss
def test_float32_under_autocast(make):
    loss, features, labels = problem(make, 8, 5, 48)
    plain = loss(features, labels)
    with torch.autocast("cpu", torch.bfloat16):
        within = loss(features, labels)
        product = features @ torch.eye(48)
        assert product.dtype == torch.bfloat16
        low = loss(product, labels)
    assert within.dtype == low.dtype == torch.float32
    assert torch.equal(within, plain)
    assert low.item() == pytest.approx(by_definition(loss, product, labels)[0], rel=1e-5)
    (gradient,) = torch.autograd.grad(low, loss.centers)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()


@every_loss
def test_distance_zero_has_gradient_zero(make):
    loss, features, labels = problem(make, 6, 3, 8)
    with torch.no_grad():
        loss.centers.copy_(loss.centers[:1].expand(3, 8))
        features.copy_(loss.centers[:1].expand(6, 8))
    value = loss(features, labels)
    grads = torch.autograd.grad(value, (features, loss.centers))
    assert value.item() == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@given(make=any_loss, batch=st.integers(2, 8), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_neither_order_of_the_batch_nor_place_of_the_origin_matters(make, batch, seed):
    loss, features, labels = problem(make, batch, 4, 9, seed, torch.float64)
    value = loss(features, labels).item()
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    assert loss(features[order], labels[order]).item() == pytest.approx(value, rel=1e-12)
    with torch.no_grad():
        loss.centers += 7.5
    assert loss(features + 7.5, labels).item() == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize("squared", [True, False])
def test_each_prototype_is_moved_by_its_own_part_alone(squared):
    features, labels = torch.randn(6, 8), torch.tensor([1, 1, 3, 1, 3, 3])
    pull, push = Proximity(5, 8, squared), ContrastiveProximity(5, 8, squared)
    (pulled,) = torch.autograd.grad(pull(features, labels), pull.centers)
    assert pulled.any(dim=1).tolist() == [False, True, False, True, False]
    (pushed,) = torch.autograd.grad(push(features[:2], labels[:2]), push.centers)
    assert pushed.any(dim=1).tolist() == [True, False, True, True, True]


def test_gradients_are_the_same_bits_every_time(two_threads):
    # Large enough for PyTorch to divide the work: gathering by centers[labels] gave other bits each time.
    assert torch.get_num_threads() > 1
    for make in LOSSES.values():
        loss, features, labels = problem(make, 512, 10, 256)
        runs = [torch.autograd.grad(loss(features, labels), (features, loss.centers)) for _ in range(12)]
        for run in runs[1:]:
            assert all(torch.equal(first, again) for first, again in zip(runs[0], run, strict=True))


@every_loss
def test_work_is_not_a_loop_over_the_batch(make):
    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for batch in (2, 50):
        loss, features, labels = problem(make, batch, 10, 16)
        with Count() as count:
            loss(features, labels).backward()
        counts.append(count.operations)
    assert counts[0] == counts[1]


@every_loss
def test_compiles_as_one_graph(make):
    loss, features, labels = problem(make, 6, 4, 12)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(features, labels), (features, loss.centers))
    expected = torch.autograd.grad(loss(features, labels), (features, loss.centers))
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@every_loss
def test_prototypes_are_drawn_from_a_standard_normal(make):
    torch.manual_seed(0)
    loss = make(10, 1024)
    assert {name: tuple(p.shape) for name, p in loss.named_parameters()} == {"centers": (10, 1024)}
    assert list(loss.state_dict()) == ["centers"]
    assert abs(loss.centers.mean().item()) < 0.05 and abs(loss.centers.std().item() - 1) < 0.03
    torch.manual_seed(0)
    assert torch.equal(make(10, 1024).centers, loss.centers)


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_whole_type_and_no_argument_changes(make, dtype):
    loss, features, labels = problem(make, 6, 4, 12)
    before = features.detach().clone(), labels.clone(), loss.centers.detach().clone()
    assert torch.equal(loss(features, labels.to(dtype)), loss(features, labels))
    assert all(torch.equal(a, b) for a, b in zip((features, labels, loss.centers), before, strict=True))
    assert features.grad is None and loss.centers.grad is None


@every_loss
@pytest.mark.parametrize(
    "features, labels, named",
    [
        (torch.zeros(3, 7), torch.zeros(3).long(), "(N, 8)"),
        (torch.zeros(3, 8, 1), torch.zeros(3).long(), "(N, 8)"),
        (torch.zeros(8), torch.zeros(()).long(), "(N, 8)"),
        (torch.zeros(0, 8), torch.zeros(0).long(), "N from 1 up"),
        (torch.zeros(3, 8), torch.zeros(2).long(), "(3,)"),
        (torch.zeros(3, 8), torch.zeros(3, 1).long(), "(3,)"),
        (torch.zeros(3, 8), torch.zeros(3), "whole"),
        (torch.zeros(3, 8), torch.tensor([0, 4, 1]), "[0, 3]"),
        (torch.zeros(3, 8), torch.tensor([0, -1, 1]), "[0, 3]"),
    ],
)
def test_bad_input_is_refused_by_name(make, features, labels, named):
    with pytest.raises(ValueError) as error:
        make(4, 8)(features, labels)
    assert named in str(error.value)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError):
        ContrastiveProximity(1, 8)  # no other class to keep away from
    Proximity(1, 8)
    for make in LOSSES.values():
        for num_classes, feat_dim in ((0, 8), (-1, 8), (4, 0)):
            with pytest.raises(ValueError):
                make(num_classes, feat_dim)
