"""FGSM, BIM, MIM and PGD against closed forms; the losses against their definitions."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import attacks


def mim_by_hand(weight, images, labels, epsilon, step_size, num_steps, decay=0):
    """MIM on softmax regression, whose gradient is (softmax - one-hot) W^T."""
    points, momentum = images, 0
    for _ in range(num_steps):
        error = (points.flatten(1) @ weight).softmax(1) - torch.nn.functional.one_hot(labels, 6)
        gradient = (error @ weight.T).view_as(images)
        momentum = decay * momentum + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        points = (points + step_size * momentum.sign()).clamp(images - epsilon, images + epsilon).clamp(0, 1)
    return points


@pytest.mark.parametrize("epsilon, step_size", [(0.1, None), (0.1, 0.04), (0.3, 0.05)])
def test_attacks_equal_their_definition_on_softmax_regression(epsilon, step_size):
    torch.manual_seed(0)
    weight, images = torch.randn(48, 6, dtype=torch.float64), torch.rand(16, 3, 4, 4, dtype=torch.float64)
    labels, model_fn = torch.arange(16) % 6, lambda x: x.flatten(1) @ weight
    by_hand = partial(mim_by_hand, weight, images, labels, epsilon)
    steps, sized = {"num_steps": 7, "step_size": step_size}, step_size or epsilon / 7
    for attack, options, expected in (
        (attacks.fgsm, {}, by_hand(epsilon, 1)),
        (attacks.bim, steps, by_hand(sized, 7)),
        (attacks.mim, {**steps, "decay": 0.7}, by_hand(sized, 7, 0.7)),
        (attacks.pgd, {**steps, "step_size": sized}, by_hand(sized, 7)),
        (attacks.pgd, {}, by_hand(2 / 255, 10)),
    ):
        result = attack(model_fn, images, labels, epsilon, **options)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert (by_hand(0.05, 7) - by_hand(0.05, 7, 0.7)).abs().max() > 0.01


@pytest.mark.parametrize("num_targets", [1, 3, 9])
def test_nearest_prototype_is_the_worst_of_as_many_runs_of_pgd_by_hand(num_targets):
    """Features are the images themselves; each run goes straight to one prototype, the nearest ones first."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(5, 12, generator=generator, dtype=torch.float64)
    images = torch.rand(20, 3, 2, 2, generator=generator, dtype=torch.float64)
    nearer = lambda x: -torch.cdist(x.flatten(1), prototypes).square()  # noqa: E731
    labels = nearer(images).argmax(1)

    def come(outputs, labels):
        true = labels[:, None]
        return (outputs - outputs.gather(1, true)).scatter(1, true, -torch.inf)

    found = attacks.nearest_prototype(
        nearer, images, labels, 0.1, loss=come, num_targets=num_targets, step_size=0.05
    )
    order = come(nearer(images), labels).argsort(1, descending=True)[:, : min(num_targets, 4)]
    for image, label, targets, result in zip(images, labels, order, found, strict=True):
        # The loss of a run is linear in the image, so that PGD ends in a corner of the ball.
        slopes = (prototypes[targets] - prototypes[label]).view(-1, 3, 2, 2)
        ends = (image + 0.1 * slopes.sign()).clamp(0, 1)
        margins = attacks.margin(nearer(ends), label.repeat(len(ends)))
        torch.testing.assert_close(result, ends[margins.argmax()])


def brightness(images):
    """Two logits: the brighter an image, the less it is of class 0."""
    return images.sum((1, 2, 3))[:, None] * torch.tensor([-1.0, 1.0])


GREY, CLASS_0 = torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)


def test_mim_coasts_across_a_plateau():
    """The gradient vanishes on the way: the momentum goes on, and 0 / 0 does not stop it."""
    model_fn = lambda x: brightness(x.clamp(max=0.525))  # noqa: E731
    zeros = attacks.ZeroGradients()
    result = attacks.mim(model_fn, GREY, CLASS_0, 0.1, trace=zeros)
    torch.testing.assert_close(result, GREY + 0.1)
    assert not zeros.first.any() and zeros.ever.all() and not zeros.always.any()
    assert attacks.bim(model_fn, GREY, CLASS_0, 0.1).max() < 0.54


def test_mim_moves_where_the_norm_of_the_gradient_overflows():
    model_fn = lambda x: 1e38 * brightness(x)  # noqa: E731
    images = torch.full((2, 3, 2, 2), 0.01)
    moved = attacks.mim(model_fn, images, CLASS_0, 8 / 255)
    assert torch.equal(moved, attacks.bim(model_fn, images, CLASS_0, 8 / 255))
    assert not torch.equal(moved, images)


elements = st.floats(-1e4, 1e4, width=32)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(3, 6)), elements=elements), st.data())
def test_losses_equal_their_definitions(array, data):
    count, classes = array.shape
    labels = data.draw(hnp.arrays(np.int64, count, elements=st.integers(0, classes - 1)))
    logits, targets = torch.from_numpy(array), torch.from_numpy(labels)
    exact = array.astype(np.float64)
    true = exact[np.arange(count), labels]
    others = np.array([np.delete(row, label).max() for row, label in zip(exact, labels, strict=True)])
    top = np.sort(exact, 1)
    entropy = np.logaddexp.reduce(exact, axis=1) - true
    lead = (top[:, -1] - top[:, -3]).astype(np.float32) + np.float32(1e-12)
    np.testing.assert_allclose(attacks.cross_entropy(logits, targets), entropy, rtol=1e-4, atol=2e-3)
    np.testing.assert_allclose(attacks.margin(logits, targets), others - true, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(attacks.dlr(logits, targets), (others - true) / lead, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("loss", [attacks.cross_entropy, attacks.margin, attacks.dlr])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_losses_and_their_gradients_are_finite_in_float32_or_wider(loss, dtype):
    normal = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    for scale in (0.0, 1.0, 1e3, 1e6):
        logits = (normal * scale).to(dtype).requires_grad_()
        value = loss(logits, torch.arange(20) % 5)
        assert value.shape == (20,)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all() and gradient.isfinite().all()


def test_dlr_ignores_the_scale_and_is_flat_exactly_where_the_true_class_comes_third():
    logits, labels = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 7
    torch.testing.assert_close(attacks.dlr(1000 * logits, labels), attacks.dlr(logits, labels))
    assert ((attacks.dlr(logits, labels) > 0) == (logits.argmax(1) != labels)).all()
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0]]).repeat(4, 1).requires_grad_()
    values = attacks.dlr(logits, torch.arange(4))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert values[2].item() == pytest.approx(1)
    assert [bool((row == 0).all()) for row in gradient] == [False, False, True, False]
