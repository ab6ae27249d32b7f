"""FGSM, BIM, MIM and PGD: closed forms, the contract of all attacks, and two libraries as references."""

from collections import namedtuple
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import attacks

EPSILONS = [0, 1e-8, 1 / 255, 8 / 255, 0.5, 1]
STEPS = {"square": {"num_queries": 8}, "cw": {"num_steps": 30, "lr": 0.05}, "apgd": {"num_steps": 5}}
ALL = sorted(attacks.ATTACKS)
BOUNDED = [name for name in ALL if name not in attacks.UNBOUNDED]
GRADIENT = ["fgsm", "bim", "mim", "pgd", "apgd", "apgd_dlr"]
RANDOM = {"pgd": {"random_start": True}, "apgd": {}, "apgd_dlr": {}, "square": {}, "noise": {}}


def run(name, model_fn, images, labels, epsilon, **options):
    """Any attack, briefly."""
    options = STEPS.get(name.removesuffix("_dlr"), {}) | options
    return attacks.ATTACKS[name](model_fn, images, labels, epsilon, **options)


def small_net(channels=3, classes=5, dtype=torch.float32, seed=0, size=8):
    torch.manual_seed(seed)
    head = nn.Linear(6 * (size // 2) ** 2, classes)
    body = [nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, head).to(dtype).eval()


def batch(count=8, channels=3, classes=5, dtype=torch.float32, seed=1, size=8):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, channels, size, size, generator=generator, dtype=dtype)
    return images, torch.randint(classes, (count,), generator=generator)


def within(result, images, epsilon):
    """In [0, 1] and within epsilon, measured both in the images' own arithmetic and exactly."""
    assert result.shape == images.shape and result.dtype == images.dtype
    assert not result.requires_grad
    assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1
    assert (result - images).abs().max().item() <= epsilon
    assert (result.double() - images.double()).abs().max().item() <= epsilon


# ---- closed forms


def softmax_regression(weight, bias):
    return lambda images: images.flatten(1) @ torch.from_numpy(weight) + torch.from_numpy(bias)


def numpy_mim(weight, bias, images, labels, epsilon, step_size, num_steps, decay):
    """MIM on softmax regression with its gradient by hand: (softmax - one-hot) W^T."""
    x, points = images.reshape(len(images), -1), images.reshape(len(images), -1)
    momentum = np.zeros_like(x)
    for _ in range(num_steps):
        logits = points @ weight + bias
        chances = np.exp(logits - logits.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        gradient = (chances - np.eye(weight.shape[1])[labels]) @ weight.T
        momentum = decay * momentum + gradient / np.abs(gradient).sum(1, keepdims=True)
        points = np.clip(points + step_size * np.sign(momentum), x - epsilon, x + epsilon).clip(0, 1)
    return points.reshape(images.shape)


@pytest.mark.parametrize(
    "name, options, decay", [("bim", {}, 0), ("mim", {"decay": 0.7}, 0.7), ("pgd", {}, 0)]
)
@pytest.mark.parametrize("epsilon, step_size", [(0.1, 0.04), (0.3, 0.05)])
def test_iterations_equal_their_definition_on_softmax_regression(name, options, decay, epsilon, step_size):
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(48, 6)), rng.normal(size=6)
    images, labels = rng.uniform(size=(16, 3, 4, 4)), rng.integers(6, size=16)
    expected = numpy_mim(weight, bias, images, labels, epsilon, step_size, 7, decay)
    result = attacks.ATTACKS[name](
        softmax_regression(weight, bias),
        torch.from_numpy(images),
        torch.from_numpy(labels),
        epsilon,
        step_size=step_size,
        num_steps=7,
        **options,
    )
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-12)


def test_momentum_matters_in_that_comparison():
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(48, 6)), rng.normal(size=6)
    images, labels = rng.uniform(size=(16, 3, 4, 4)), rng.integers(6, size=16)
    with_it, without = (numpy_mim(weight, bias, images, labels, 0.3, 0.05, 7, decay) for decay in (0.7, 0))
    assert np.abs(with_it - without).max() > 0.01


@pytest.mark.parametrize("name", ["fgsm", "bim", "mim", "pgd", "apgd"])
def test_two_class_linear_model_is_pushed_into_the_corner(name):
    """Of two classes the gradient's sign is that of the weights' difference, everywhere."""
    torch.manual_seed(0)
    weight = torch.randn(48, 2)
    images, labels = batch(count=16, classes=2, size=4)
    slope = (weight[:, 1] - weight[:, 0]).sign() * (1 - 2 * labels[:, None])
    corner = (images + 0.1 * slope.view_as(images)).clamp(0, 1)
    options = {"step_size": 0.05} if name == "pgd" else {}
    options |= {"num_steps": 30} if name == "apgd" else {}
    result = attacks.ATTACKS[name](lambda x: x.flatten(1) @ weight, images, labels, 0.1, **options)
    torch.testing.assert_close(result, corner, rtol=0, atol=1e-6)


def test_bim_divides_epsilon_among_its_steps():
    images = torch.full((2, 1, 4, 4), 0.5)
    climb = lambda x: torch.stack([-x.sum((1, 2, 3)), x.sum((1, 2, 3))], 1)  # noqa: E731
    labels = torch.zeros(2, dtype=torch.long)
    seen = []
    trace = lambda step, gradient: seen.append(step)  # noqa: E731
    for attack in (attacks.bim, attacks.mim):
        result = attack(climb, images, labels, 0.2, num_steps=4, trace=trace)
        torch.testing.assert_close(result, images + 0.2)
    assert seen == [0, 1, 2, 3] * 2
    short = attacks.pgd(climb, images, labels, 0.2, step_size=0.01, num_steps=3)
    torch.testing.assert_close(short, images + 0.03)


def test_mim_coasts_across_a_plateau():
    """The gradient vanishes on the way: what momentum has gathered goes on, and 0 / 0 does not stop it."""
    images, labels = torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)

    def model_fn(x):
        height = x.clamp(max=0.525).sum((1, 2, 3))
        return torch.stack([-height, height], 1)

    watch = attacks.ZeroGradients()
    result = attacks.mim(model_fn, images, labels, 0.1, trace=watch)
    torch.testing.assert_close(result, images + 0.1)
    assert watch.ever.all() and not watch.always.any()
    assert attacks.bim(model_fn, images, labels, 0.1).max() < 0.54


# ---- the losses


logit_arrays = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(3, 6)), elements=st.floats(-1e4, 1e4, width=32)
)


@given(logit_arrays, st.data())
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
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_losses_and_their_gradients_are_finite_and_never_narrow(loss, scale, dtype):
    logits = (
        (torch.randn(20, 5, generator=torch.Generator().manual_seed(0)) * scale).to(dtype).requires_grad_()
    )
    value = loss(logits, torch.arange(20) % 5)
    assert value.shape == (20,)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all() and gradient.isfinite().all()


def test_dlr_does_not_change_with_the_scale_of_the_logits():
    logits, labels = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 7
    torch.testing.assert_close(attacks.dlr(1000 * logits, labels), attacks.dlr(logits, labels))
    assert ((attacks.dlr(logits, labels) > 0) == (logits.argmax(1) != labels)).all()


def test_dlr_of_two_classes_is_refused():
    with pytest.raises(ValueError, match="at least 3 classes"):
        attacks.dlr(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))


# ---- the ball


pixels = st.one_of(
    st.floats(0, 1, width=32),
    st.sampled_from([0.0, -0.0, 1.0, 0.5, 1 / 255, 8 / 255, 1e-8, 2.0**-24, 1 - 2.0**-24]).map(np.float32),
)
radii = st.one_of(
    st.floats(0, 1), st.sampled_from(EPSILONS), st.integers(1, 255).map(lambda level: level / 255)
)


@settings(max_examples=300)
@given(hnp.arrays(np.float32, (1, 1, 2, 3), elements=pixels), radii)
def test_ball_is_exact_and_tight(array, epsilon):
    lower, upper = attacks._ball(torch.from_numpy(array), epsilon)
    # The float32 radius may be a rounding below epsilon, and a bound one below the true one: no more.
    slack = Fraction(epsilon) * Fraction(1, 2**22) + Fraction(2, 2**24)
    for pixel, low, high in zip(array.flat, lower.flatten().tolist(), upper.flatten().tolist(), strict=True):
        exact, radius = Fraction(float(pixel)), Fraction(epsilon)
        assert max(exact - radius, 0) <= Fraction(low) <= exact <= Fraction(high) <= min(exact + radius, 1)
        assert np.float32(high) - pixel <= epsilon and pixel - np.float32(low) <= epsilon
        assert Fraction(high) + slack >= min(exact + radius, 1)
        assert Fraction(low) - slack <= max(exact - radius, 0)


def test_rounding_would_leave_the_ball_without_that_care():
    images, epsilon = torch.rand(1, 1, 100, 100, generator=torch.Generator().manual_seed(0)), 8 / 255
    assert ((images + epsilon).double() - images.double()).max().item() > epsilon


# ---- the contract


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_lies_within_epsilon(name, epsilon, dtype):
    images, labels = batch(dtype=dtype)
    images[0], images[1] = 0, 1
    within(run(name, small_net(dtype=dtype), images, labels, epsilon), images, epsilon)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(BOUNDED),
    array=hnp.arrays(np.float32, (2, 1, 4, 4), elements=pixels),
    epsilon=radii,
    seed=st.integers(0, 100),
)
def test_result_lies_within_epsilon_of_any_image(name, array, epsilon, seed):
    net = small_net(channels=1, seed=seed, size=4)
    images, labels = torch.from_numpy(array), torch.tensor([seed % 5, 1])
    generator = torch.Generator().manual_seed(seed)
    options = RANDOM[name] | {"generator": generator} if name in RANDOM else {}
    within(run(name, net, images, labels, epsilon, **options), images, epsilon)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("nothing", ["epsilon", "num_steps"])
def test_no_radius_or_no_steps_return_the_images_bit_for_bit(name, nothing):
    images, labels = batch()
    images[0, 0, 0] = -0.0
    if nothing == "epsilon":
        if name in attacks.UNBOUNDED:
            pytest.skip("has no epsilon")
        result = attacks.ATTACKS[name](small_net(), images, labels, 0, **RANDOM.get(name, {}))
    else:
        if name in ("fgsm", "noise"):
            pytest.skip("has no steps")
        option = {"num_queries" if name == "square" else "num_steps": 0}
        result = attacks.ATTACKS[name](small_net(), images, labels, 0.1, **RANDOM.get(name, {}), **option)
    assert (result.view(torch.int32) == images.view(torch.int32)).all()
    assert result.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("name", ALL)
def test_attacks_leave_everything_as_it_was(name):
    net = small_net()
    net[0].train()  # a mix of modes
    for index, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.full_like(parameter, float(index)) if index % 4 == 0 else None
    images, labels = batch()
    images.requires_grad_()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    grads = [parameter.grad for parameter in net.parameters()]
    copies = images.detach().clone(), labels.clone()
    modes = [module.training for module in net.modules()]
    rng = torch.get_rng_state()
    result = run(name, net, images, labels, 0.1, **RANDOM.get(name, {}))

    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    for index, (parameter, grad) in enumerate(zip(net.parameters(), grads, strict=True)):
        assert parameter.grad is grad and parameter.requires_grad == (index % 2 == 0)
        assert grad is None or (grad == index).all()
    assert torch.equal(images, copies[0]) and torch.equal(labels, copies[1])
    assert images.requires_grad and images.grad is None and not result.requires_grad
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng) and torch.is_grad_enabled()
    assert result.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ALL)
def test_attacks_work_inside_no_grad_and_leave_it_on(name):
    net = small_net()
    images, _ = batch()
    labels = net(images).argmax(1)
    expected = run(name, net, images, labels, 0.1)
    with torch.no_grad():
        result = run(name, net, images, labels, 0.1)
        assert not torch.is_grad_enabled()
    assert torch.equal(result, expected)
    assert not torch.equal(result, images)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sizes", [[1] * 5, [2, 3]])
def test_batching_does_not_matter(name, sizes):
    net = small_net(dtype=torch.float64)
    images, _ = batch(count=5, dtype=torch.float64)
    # DLR is flat where the true class comes third: rounding would choose the way. So few images are fooled.
    labels, epsilon = net(images).argmax(1), 0.01
    options = RANDOM.get(name, {})
    options |= {"restarts": 2} if name in ("pgd", "apgd", "square") else {}

    def attack(splits):
        generator = {"generator": torch.Generator().manual_seed(3)} if name in RANDOM else {}
        parts = zip(images.split(splits), labels.split(splits), strict=True)
        return torch.cat([run(name, net, *part, epsilon, **options, **generator) for part in parts])

    torch.testing.assert_close(attack(sizes), attack([5]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_an_empty_batch_stays_empty(name):
    images, labels = batch()
    assert run(name, small_net(), images[:0], labels[:0], 0.1).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_random_attacks_repeat_with_their_generator_alone(name):
    images, labels = batch()

    def attack(seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return run(name, small_net(), images, labels, 0.1, generator=generator, **RANDOM[name])

    first = attack(seed=5)
    torch.manual_seed(99)
    assert torch.equal(attack(seed=5), first)
    assert not torch.equal(attack(seed=6), first)
    assert torch.equal(attack(), attack(seed=0))


@pytest.mark.parametrize("name", [name for name in ALL if name != "noise"])
def test_a_tuple_with_logits_will_do_and_losses_may_read_the_rest(name):
    outputs_of = namedtuple("Outputs", ["feature", "logits"])
    net = small_net()
    images, labels = batch()
    both = lambda x: outputs_of(net[:-1](x), net(x))  # noqa: E731
    assert torch.equal(run(name, both, images, labels, 0.1), run(name, net, images, labels, 0.1))
    if name in GRADIENT:
        drift = lambda outputs, labels: outputs.feature.square().sum(1)  # noqa: E731
        moved = run(name, both, images, labels, 0.1, loss=drift)
        assert not torch.equal(moved, run(name, net, images, labels, 0.1))
        assert (drift(both(moved), labels) >= drift(both(images), labels) - 1e-6).all()


@pytest.mark.parametrize("name", ALL)
def test_a_bfloat16_autocast_model_can_be_attacked(name):
    net = small_net()

    def model_fn(images):
        with torch.autocast("cpu", torch.bfloat16):
            return net(images)

    images, labels = batch(count=32)
    assert model_fn(images).dtype == torch.bfloat16
    result = run(name, model_fn, images, labels, 0.1)
    assert result.dtype == torch.float32 and result.isfinite().all()
    if name not in attacks.UNBOUNDED:
        within(result, images, 0.1)
    if name in GRADIENT:
        entropy = lambda x: attacks.cross_entropy(net(x), labels).mean()  # noqa: E731
        assert entropy(result) > entropy(images) + 0.01


@pytest.mark.parametrize("name", ["fgsm", "bim", "mim", "pgd"])
def test_memory_format_is_kept(name):
    images, labels = batch()
    images = images.contiguous(memory_format=torch.channels_last)
    result = run(name, small_net(), images, labels, 0.1, **({"random_start": True} if name == "pgd" else {}))
    assert result.is_contiguous(memory_format=torch.channels_last)


# ---- zero gradients


class Watch:
    def __init__(self):
        self.steps, self.zero = [], attacks.ZeroGradients()

    def __call__(self, step, gradient):
        self.steps.append(step)
        self.zero(step, gradient)


@pytest.mark.parametrize("name", GRADIENT)
def test_a_trace_sees_every_step_and_changes_nothing(name):
    net = small_net()
    images, _ = batch()
    labels = net(images).argmax(1)
    options = {"restarts": 2, **RANDOM[name]} if name in RANDOM else {}
    watch = Watch()
    result = run(name, net, images, labels, 0.001, trace=watch, **options)
    assert torch.equal(result, run(name, net, images, labels, 0.001, **options))
    one = {"fgsm": 1, "bim": 10, "mim": 10, "pgd": 10}.get(name, 6)  # APGD's five, and its start
    assert watch.steps == [*range(one)] * (2 if name in RANDOM else 1)
    assert not watch.zero.ever.any()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_constant_model_gives_no_nan_and_zero_gradients(name, frozen):
    constant = nn.Parameter(torch.tensor([0.0, 1.0, 2.0, 0.5]), requires_grad=not frozen)
    model_fn = lambda images: constant.expand(len(images), 4)  # noqa: E731
    images, _ = batch()
    labels = torch.full((8,), 2)
    if name in GRADIENT:
        watch = attacks.ZeroGradients()
        result = run(name, model_fn, images, labels, 0.1, trace=watch)
        assert watch.first.all() and watch.ever.all() and watch.always.all()
        assert name.startswith("apgd") or torch.equal(result, images)
    else:
        result = run(name, model_fn, images, labels, 0.1)
    assert result.isfinite().all()
    assert constant.grad is None


@pytest.mark.parametrize("name", ["fgsm", "bim", "mim", "pgd"])
def test_a_black_image_that_has_no_gradient_is_counted(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))
    images, labels = batch()
    images[2] = 0
    watch = attacks.ZeroGradients()
    result = run(name, net, images, labels, 0.1, trace=watch)
    assert result.isfinite().all()
    assert watch.always.nonzero().flatten().tolist() == [2]
    assert torch.equal(result[2], images[2]) and not torch.equal(result[1], images[1])


def test_zero_gradients_tell_first_ever_and_always_apart():
    watch = attacks.ZeroGradients()
    assert watch.first is None
    shape = (4, 1, 2, 2)
    for mask in ([1, 1, 0, 0], [1, 0, 1, 0]):
        watch(0, 1 - torch.tensor(mask, dtype=torch.float32).view(4, 1, 1, 1).expand(shape))
    assert watch.first.tolist() == [True, True, False, False]
    assert watch.ever.tolist() == [True, True, True, False]
    assert watch.always.tolist() == [True, False, False, False]


@pytest.mark.parametrize("name", GRADIENT)
def test_saturated_logits_freeze_cross_entropy_but_not_a_margin(name):
    """The same decisions with logits x 1000: cross-entropy has nothing to climb, a margin still has."""
    net = small_net()
    images, _ = batch(count=64)
    logits = net(images)
    top = logits.topk(2).values
    keep = (top[:, 0] - top[:, 1]) > 0.12
    images, labels = images[keep], logits.argmax(1)[keep]
    loud = lambda x: 1000 * net(x)  # noqa: E731
    attack = "apgd" if name == "apgd_dlr" else name
    for loss in (attacks.cross_entropy, attacks.margin, attacks.dlr):
        watch = attacks.ZeroGradients()
        result = run(attack, loud, images, labels, 0.002, loss=loss, trace=watch)
        assert result.isfinite().all()
        frozen = loss is attacks.cross_entropy
        assert watch.always.all() if frozen else not watch.ever.any()
    options = {"step_size": 0.06} if name == "pgd" else {}
    fooled = run(attack, loud, images, labels, 0.3, loss=attacks.margin, **options)
    assert (loud(fooled).argmax(1) != labels).float().mean() > 0.9


def test_a_model_that_overflows_gives_finite_images():
    net = small_net(size=4)
    images, labels = batch(count=4, size=4)
    for scale in (1e38, torch.inf, torch.nan):
        for name in ALL:
            result = run(name, lambda x, scale=scale: net(x) * scale, images, labels, 0.1)
            assert result.isfinite().all() and result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("name", GRADIENT)
def test_gradients_that_are_no_numbers_count_as_zero(name):
    net, watch = small_net(), attacks.ZeroGradients()
    run(name, lambda x: net(x) * torch.nan, *batch(), 0.1, trace=watch)
    assert watch.always.all()


@pytest.mark.parametrize("name", ["pgd", "apgd", "square"])
def test_scores_that_are_no_numbers_are_misclassified(name):
    """Scores are NaN where a pixel is low: an attack must count that a success, as evaluation does."""
    images, labels = torch.full((6, 1, 2, 2), 0.5), torch.zeros(6, dtype=torch.long)

    def model_fn(x):
        low = x.amin((1, 2, 3)) < 0.45
        scores = torch.stack([x.mean((1, 2, 3)) + 1, x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)
        return torch.where(low[:, None], torch.nan, scores)

    options = (
        {"random_start": True, "restarts": 6, "num_steps": 1, "step_size": 1e-6} if name == "pgd" else {}
    )
    result = run(name, model_fn, images, labels, 0.1, **options)
    assert model_fn(result).isnan().all() and result.isfinite().all()


# ---- restarts of PGD


def outcome(net, images, labels):
    logits = net(images)
    wrong, loss = logits.argmax(1) != labels, attacks.cross_entropy(logits, labels)
    return list(zip(wrong.tolist(), loss.tolist(), strict=True))


def test_more_restarts_are_never_weaker_on_any_image():
    net = small_net()
    images, _ = batch(count=16)
    labels = net(images).argmax(1)
    results = [
        outcome(net, attacks.pgd(net, images, labels, 0.02, random_start=True, restarts=count), labels)
        for count in (1, 2, 5)
    ]
    for fewer, more in pairwise(results):
        assert all(b >= a for a, b in zip(fewer, more, strict=True))
    assert results[-1] != results[0]


def test_restarts_choose_misclassified_before_high_loss():
    """One pixel, whose value is the loss, and which is misclassified below a half."""
    image, label = torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.long)
    model_fn = lambda x: torch.cat([x, 1 - x], 1).flatten(1)  # noqa: E731
    loss = lambda logits, labels: logits[:, 0]  # noqa: E731
    options = {"random_start": True, "num_steps": 1, "step_size": 1e-7, "loss": loss}
    ball = attacks._ball(image, 0.4)
    starts = [start.item() for start in attacks._random_starts(image, 0.4, ball, 12, None)]
    kinds = set()
    for count in range(1, 13):
        wrong = [start for start in starts[:count] if start < 0.5]
        result = attacks.pgd(model_fn, image, label, 0.4, restarts=count, **options)
        assert result.item() == pytest.approx(max(wrong or starts[:count]), abs=1e-6)
        kinds.add((bool(wrong), not wrong or max(wrong) < max(starts[:count])))
    assert (True, True) in kinds  # a misclassified one was preferred to a higher loss


# ---- refusals


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "spoil, observed",
    [
        (lambda images: images * 255, r"\[0\.\d+, 25\d"),
        (lambda images: (images - 0.5) / 0.2, r"\[-2\.\d+, 2\.\d+\]"),
        (lambda images: images.where(images != images.max(), torch.nan), "nan"),
        (lambda images: images - images.min() - 1e-6, "-1e-06"),
        (lambda images: (images * 255).byte(), "uint8"),
        (lambda images: images[0], r"\(3, 8, 8\)"),
        (lambda images: images[:3], r"\(3, 3, 8, 8\) and \(8,\)"),
    ],
    ids=["bytes", "normalised", "nan", "negative", "integers", "one image", "too few"],
)
def test_images_that_are_none_are_refused(name, spoil, observed):
    images, labels = batch()
    with pytest.raises(ValueError, match=observed):
        run(name, small_net(), spoil(images), labels, 0.1)


@pytest.mark.parametrize(
    "name, option, value",
    [(name, "epsilon", value) for name in BOUNDED for value in (-0.1, 1.1, 8, float("nan"), float("inf"))]
    + [("bim", "num_steps", value) for value in (-3, 1.5, float("nan"))]
    + [(name, "step_size", value) for name in ("bim", "mim", "pgd") for value in (0, -1, float("nan"))]
    + [(name, "restarts", value) for name in ("pgd", "apgd", "square") for value in (0, -1, 1.5)]
    + [("mim", "decay", value) for value in (-0.1, float("nan"), float("inf"))]
    + [("apgd", "rho", 1.5), ("square", "p_init", 0), ("square", "num_queries", -1)]
    + [("cw", "c", 0), ("cw", "lr", 0), ("cw", "confidence", -1), ("cw", "search_steps", 0)],
)
def test_options_out_of_range_are_refused_by_name(name, option, value):
    images, labels = batch()
    options = {"epsilon": 0.1, option: value}
    with pytest.raises(ValueError, match=f"^{option} "):
        attacks.ATTACKS[name](small_net(), images, labels, **options)


def test_restarts_that_would_repeat_are_refused():
    with pytest.raises(ValueError, match="random_start"):
        attacks.pgd(small_net(), *batch(), 0.1, restarts=2)


def test_a_loss_that_averages_is_refused():
    with pytest.raises(ValueError, match="one value per image"):
        attacks.fgsm(small_net(), *batch(), 0.1, loss=nn.functional.cross_entropy)


# ---- other libraries

LIBRARY_ATTACKS = {
    "fgsm": lambda ta, net: ta.FGSM(net, eps=8 / 255),
    "bim": lambda ta, net: ta.BIM(net, eps=8 / 255, alpha=8 / 2550, steps=10),
    "mim": lambda ta, net: ta.MIFGSM(net, eps=8 / 255, alpha=8 / 2550, steps=10, decay=1.0),
    "pgd": lambda ta, net: ta.PGD(net, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False),
}


def nearly_all_equal(result, expected):
    """Equal but for pixels whose gradient is so near 0 that rounding decides its sign."""
    share = ((result - expected).abs() < 1e-6).float().mean().item()
    assert share > 0.999, share


@pytest.mark.parametrize("name", sorted(LIBRARY_ATTACKS))
def test_equal_to_torchattacks(name):
    """torchattacks averages the loss and divides MIM's gradient by the mean of |g|: positive factors only."""
    torchattacks = pytest.importorskip("torchattacks")
    net = small_net()
    images, labels = batch(count=32)
    expected = LIBRARY_ATTACKS[name](torchattacks, net)(images, labels)
    result = attacks.ATTACKS[name](net, images, labels, 8 / 255)
    assert not torch.equal(result, images)
    nearly_all_equal(result, expected)


def test_equal_to_foolbox():
    foolbox = pytest.importorskip("foolbox")
    linf = foolbox.attacks
    references = {
        "fgsm": linf.LinfFastGradientAttack(),
        "bim": linf.LinfBasicIterativeAttack(abs_stepsize=8 / 2550, steps=10, random_start=False),
        "pgd": linf.LinfProjectedGradientDescentAttack(abs_stepsize=2 / 255, steps=10, random_start=False),
    }
    net = small_net()
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    images, labels = batch(count=32)
    for name, reference in references.items():
        expected = reference.run(model, images, labels, epsilon=8 / 255)
        nearly_all_equal(attacks.ATTACKS[name](net, images, labels, 8 / 255), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ALL)
def test_the_gpu_gives_what_the_cpu_gives(name):
    net, gpu = small_net(dtype=torch.float64), small_net(dtype=torch.float64).cuda()
    images, labels = batch(dtype=torch.float64)
    options = RANDOM.get(name, {}) | ({"restarts": 2} if name in ("pgd", "apgd", "square") else {})
    expected = run(name, net, images, labels, 0.1, **options)
    result = run(name, gpu, images.cuda(), labels.cuda(), 0.1, **options)
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-9)
    if name not in attacks.UNBOUNDED:
        single = images.float().cuda()
        within(run(name, gpu.float(), single, labels.cuda(), 8 / 255, **options), single, 8 / 255)


def test_mim_moves_where_the_norm_of_the_gradient_overflows():
    def model(images):
        total = 1e38 * images.sum((1, 2, 3))
        return torch.stack([total, -total], dim=1)

    images, labels = torch.full((2, 3, 2, 2), 0.01), torch.tensor([1, 1])
    moved = attacks.mim(model, images, labels, 8 / 255)
    assert torch.equal(moved, attacks.bim(model, images, labels, 8 / 255)) and not torch.equal(moved, images)


def test_images_are_taken_on_trust_where_that_is_asked_for_and_nowhere_else():
    model, labels = (lambda images: images.flatten(1)), torch.tensor([0])
    images = torch.full((1, 3, 2, 2), 1.5)
    with attacks.trusting():
        attacks.fgsm(model, images, labels, 0.1)
    with pytest.raises(ValueError, match=r"pixels lie in \[0, 1\]"):
        attacks.fgsm(model, images, labels, 0.1)
