"""The contract of all attacks: bounds, nothing else changed, batches, seeds, zero gradients, refusals."""

from collections import namedtuple
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from networks import batch, is_wrong, right_batch, small_net
from torch import nn

import attacks

EPSILONS = [0, 1e-8, 1 / 255, 8 / 255, 0.5, 1]


def leads(outputs, labels):
    """How far each logit leads the true one, which itself never does."""
    logits, true = attacks.scores(outputs), labels[:, None]
    return (logits - logits.gather(1, true)).scatter(1, true, -torch.inf)


ATTACKS = {
    "noise": attacks.noise,
    "fgsm": attacks.fgsm,
    "bim": attacks.bim,
    "mim": attacks.mim,
    "pgd": attacks.pgd,
    "pgd-random": partial(attacks.pgd, random_start=True, restarts=2),
    "nearest": partial(attacks.nearest_prototype, loss=leads, num_targets=2, random_start=True),
    "apgd": partial(attacks.apgd, num_steps=5),
    "apgd-dlr": partial(attacks.apgd, num_steps=5, restarts=2, loss=attacks.dlr),
    "square": partial(attacks.square, num_queries=8, restarts=2),
    "cw": partial(attacks.cw, num_steps=30, lr=0.05),
}
BOUNDED = [name for name in ATTACKS if name != "cw"]
GRADIENT = [name for name in ATTACKS if name not in ("noise", "square", "cw", "nearest")]
RANDOM = ["noise", "pgd-random", "nearest", "apgd", "apgd-dlr", "square"]
PLAIN = ["fgsm", "bim", "mim", "pgd"]

all_attacks = pytest.mark.parametrize("name", ATTACKS)


def check_bounds(result, images, epsilon):
    """In [0, 1] and within epsilon, measured both in the images' own arithmetic and exactly."""
    assert result.shape == images.shape and result.dtype == images.dtype
    assert not result.requires_grad and result.isfinite().all() and result.min() >= 0 and result.max() <= 1
    assert (result - images).abs().max().item() <= epsilon
    assert (result.double() - images.double()).abs().max().item() <= epsilon


SPECIAL_PIXELS = [0.0, -0.0, 1.0, 0.5, 1 / 255, 8 / 255, 1e-8, 2.0**-24, 1 - 2.0**-24]
pixels = st.one_of(st.floats(0, 1, width=32), st.sampled_from(SPECIAL_PIXELS).map(np.float32))
radii = st.one_of(st.floats(0, 1), st.sampled_from([*EPSILONS, *(level / 255 for level in range(1, 256))]))


@settings(max_examples=200)
@given(hnp.arrays(np.float32, (1, 1, 2, 3), elements=pixels), radii)
def test_the_ball_is_exact_and_tight(array, epsilon):
    """Noise moves each pixel to an end of the ball, as exact fractions say it lies."""
    result = attacks.noise(None, torch.from_numpy(array), torch.zeros(1), epsilon)
    # The float32 radius may be a rounding below epsilon, and an end one before the true one: no more.
    slack = Fraction(epsilon) * Fraction(1, 2**22) + Fraction(2, 2**24)
    for pixel, moved in zip(array.flat, result.flatten().tolist(), strict=True):
        exact, radius = Fraction(float(pixel)), Fraction(epsilon)
        low, high = max(exact - radius, 0), min(exact + radius, 1)
        assert low <= Fraction(moved) <= high
        assert abs(np.float32(moved) - pixel) <= epsilon
        assert Fraction(moved) <= low + slack or Fraction(moved) >= high - slack


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_result_lies_within_epsilon(name, epsilon):
    for dtype in (torch.float32, torch.float64):
        images, labels = batch(dtype=dtype)
        images[:3] = torch.tensor(SPECIAL_PIXELS).repeat(64).view(3, 3, 8, 8)
        images = images.contiguous(memory_format=torch.channels_last)
        result = ATTACKS[name](small_net(dtype), images, labels, epsilon)
        check_bounds(result, images, epsilon)
        assert name not in PLAIN or result.is_contiguous(memory_format=torch.channels_last)


@all_attacks
def test_no_radius_and_no_steps_return_the_images_bit_for_bit(name):
    images, labels = batch()
    images[0, 0, 0] = -0.0
    no_steps = {"epsilon": 0.1, "num_queries" if name == "square" else "num_steps": 0}
    for options in [{"epsilon": 0}] * (name != "cw") + [no_steps] * (name not in ("noise", "fgsm")):
        result = ATTACKS[name](small_net(), images, labels, **options)
        assert torch.equal(result.view(torch.int32), images.view(torch.int32))
        assert result.data_ptr() != images.data_ptr()


@all_attacks
@pytest.mark.parametrize("grad_mode", [True, False])
def test_attacks_leave_everything_as_it_was(name, grad_mode):
    net = small_net()
    net[0].train()  # a mix of modes
    for index, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.full_like(parameter, float(index)) if index % 4 == 0 else None
    images, labels = right_batch(net)
    images.requires_grad_()
    state = lambda: [  # noqa: E731
        *(tensor.detach().clone() for tensor in (*net.state_dict().values(), images, labels)),
        *(parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None),
        torch.get_rng_state(),
        torch.tensor([parameter.requires_grad for parameter in (*net.parameters(), images)]),
        torch.tensor([module.training for module in net.modules()]),
    ]
    before, grads = state(), [parameter.grad for parameter in net.parameters()]
    with torch.set_grad_enabled(grad_mode):
        result = ATTACKS[name](net, images, labels, 0.1)
        assert torch.is_grad_enabled() == grad_mode

    assert all(torch.equal(*pair) for pair in zip(state(), before, strict=True))
    assert all(parameter.grad is grad for parameter, grad in zip(net.parameters(), grads, strict=True))
    assert images.grad is None and not result.requires_grad and not torch.equal(result, images)
    assert result.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()
    assert torch.equal(result, ATTACKS[name](net, images, labels, 0.1))


@all_attacks
def test_batching_does_not_matter(name):
    net = small_net(torch.float64)
    # DLR is flat where the true class comes third: rounding would choose the way. So few images are fooled.
    (images, labels), epsilon = right_batch(net, 5), 0.01

    def attack(sizes):
        generator = {"generator": torch.Generator().manual_seed(3)} if name in RANDOM else {}
        parts = zip(images.split(sizes), labels.split(sizes), strict=True)
        return torch.cat([ATTACKS[name](net, *part, epsilon, **generator) for part in parts])

    whole = attack([5])
    for sizes in ([1] * 5, [2, 0, 3]):
        torch.testing.assert_close(attack(sizes), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", RANDOM)
def test_random_attacks_repeat_with_their_generator_alone(name):
    attack = partial(ATTACKS[name], small_net(), *batch(), 0.1)
    of_5, of_0 = (attack(generator=torch.Generator().manual_seed(seed)) for seed in (5, 0))
    torch.manual_seed(99)
    assert torch.equal(attack(generator=torch.Generator().manual_seed(5)), of_5)
    assert torch.equal(attack(), of_0) and not torch.equal(of_0, of_5)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "noise"])
def test_a_tuple_with_logits_will_do_and_losses_may_read_the_rest(name):
    outputs_of = namedtuple("Outputs", ["feature", "logits"])
    net, attack = small_net(), ATTACKS[name]
    images, labels = batch()
    both = lambda x: outputs_of(net[:-1](x), net(x))  # noqa: E731
    plain = attack(net, images, labels, 0.1)
    assert torch.equal(attack(both, images, labels, 0.1), plain)
    if name in GRADIENT:
        drift = lambda outputs, labels: outputs.feature.square().sum(1)  # noqa: E731
        moved = attack(both, images, labels, 0.1, loss=drift)
        assert not torch.equal(moved, plain)
        assert (drift(both(moved), labels) >= drift(both(images), labels) - 1e-6).all()


@all_attacks
def test_a_bfloat16_autocast_model_can_be_attacked(name):
    net = small_net()
    low = torch.autocast("cpu", torch.bfloat16)(net.forward)
    images, labels = batch(count=32)
    assert low(images).dtype == torch.bfloat16
    result = ATTACKS[name](low, images, labels, 0.1)
    check_bounds(result, images, 0.1 if name != "cw" else 1.0)
    if name in GRADIENT:
        before, after = (attacks.cross_entropy(net(x), labels).mean() for x in (images, result))
        assert after > before + 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@all_attacks
def test_the_gpu_gives_what_the_cpu_gives(name):
    net, (images, labels) = small_net(torch.float64), batch(dtype=torch.float64)
    expected = ATTACKS[name](net, images, labels, 0.1)
    result = ATTACKS[name](net.cuda(), images.cuda(), labels.cuda(), 0.1)
    torch.testing.assert_close(result, expected.cuda(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", GRADIENT)
def test_a_trace_sees_every_step_and_changes_nothing(name):
    attack, batch_of_8, seen = partial(ATTACKS[name], small_net(), epsilon=0.1), batch(), []
    keep = lambda step, gradient: seen.append((step, gradient))  # noqa: E731
    assert torch.equal(attack(*batch_of_8, trace=keep), attack(*batch_of_8))
    one = {"fgsm": 1, "apgd": 6, "apgd-dlr": 6}.get(name, 10)  # APGD's five, and its start
    assert [step for step, _ in seen] == [*range(one)] * (2 if name in ("pgd-random", "apgd-dlr") else 1)
    attack(*(tensor[:1] for tensor in batch_of_8), trace=keep)  # the loss is summed, not averaged
    torch.testing.assert_close(seen[0][1][:1], seen[len(seen) // 2][1])


@all_attacks
def test_broken_models_give_finite_images_and_zero_gradients(name):
    net, weight = small_net(size=4), nn.Parameter(torch.tensor([0.0, 1.0, 2.0, 0.5, 0.1]))
    images, labels = batch(count=4, size=4)
    for model_fn, zero in (
        (lambda x: weight.expand(len(x), 5), True),
        (lambda x: weight.detach().expand(len(x), 5), True),
        (lambda x: net(x) * torch.nan, True),
        (lambda x: net(x) * torch.inf, False),
        (lambda x: net(x) * 1e38, False),
    ):
        zeros = attacks.ZeroGradients()
        result = ATTACKS[name](model_fn, images, labels, 0.1, **{"trace": zeros} if name in GRADIENT else {})
        check_bounds(result, images, 0.1 if name != "cw" else 1.0)
        if zero and name in GRADIENT:
            assert zeros.first.all() and zeros.ever.all() and zeros.always.all()
        assert not zero or name not in PLAIN or torch.equal(result, images)
    assert weight.grad is None


@pytest.mark.parametrize("name", PLAIN)
def test_a_black_image_that_has_no_gradient_is_counted(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))
    images, labels = batch()
    images[2] = 0
    zeros = attacks.ZeroGradients()
    assert zeros.first is zeros.ever is zeros.always is None
    result = ATTACKS[name](net, images, labels, 0.1, trace=zeros)
    for mask in (zeros.first, zeros.ever, zeros.always, (result == images).flatten(1).all(1)):
        assert mask.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("name", [*GRADIENT, "square", "cw"])
def test_saturated_logits_freeze_cross_entropy_but_not_a_margin(name):
    """The same decisions with logits x 1000: cross-entropy has nothing to climb, a margin still has."""
    net, attack = small_net(), ATTACKS[name]
    loud = lambda x: 1000 * net(x)  # noqa: E731
    images, labels = right_batch(net, 64)
    keep = attacks.margin(loud(images), labels) < -120
    images, labels = images[keep], labels[keep]
    for loss in (attacks.cross_entropy, attacks.margin, attacks.dlr) if name in GRADIENT else ():
        zeros = attacks.ZeroGradients()
        assert attack(loud, images, labels, 0.002, loss=loss, trace=zeros).isfinite().all()
        assert zeros.always.all() if loss is attacks.cross_entropy else not zeros.ever.any()
    options = {"pgd": {"step_size": 0.06}, "pgd-random": {"step_size": 0.06}, "square": {"num_queries": 100}}
    options = options.get(name, {}) | ({"loss": attacks.margin} if name in GRADIENT else {})
    assert is_wrong(net, attack(loud, images, labels, 0.3, **options), labels).float().mean() > 0.9


@pytest.mark.parametrize("name", ["pgd", "apgd", "square"])
def test_scores_that_are_no_numbers_are_misclassified(name):
    """Scores are NaN where a pixel is low: an attack must count that a success, as evaluation does."""
    images, labels = torch.full((6, 1, 2, 2), 0.5), torch.zeros(6, dtype=torch.long)

    def model_fn(x):
        low = x.amin((1, 2, 3)) < 0.45
        scores = torch.stack([x.mean((1, 2, 3)) + 1, x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)
        return torch.where(low[:, None], torch.nan, scores)

    random = {"random_start": True, "restarts": 6, "num_steps": 1, "step_size": 1e-6}
    result = ATTACKS[name](model_fn, images, labels, 0.1, **(random if name == "pgd" else {}))
    assert model_fn(result).isnan().all() and result.isfinite().all()


@all_attacks
def test_images_that_are_none_are_refused(name):
    images, labels = batch()
    for spoiled, observed in (
        (images * 255, r"pixels lie in \[0, 1\] .* \[0\.\d+, 25\d"),
        ((images - 0.5) / 0.2, r"\[-2\.\d+, 2\.\d+\]"),
        (images.where(images != images.max(), torch.nan), "nan"),
        (images - images.min() - 1e-6, "-1e-06"),
        ((images * 255).byte(), "uint8"),
        (images[0], r"\(3, 8, 8\)"),
        (images[:3], r"\(3, 3, 8, 8\) and \(8,\)"),
    ):
        with pytest.raises(ValueError, match=observed):
            ATTACKS[name](small_net(), spoiled, labels, 0.1)


@pytest.mark.parametrize("name", [*PLAIN, "apgd", "cw"])
def test_nothing_waits_for_another_device_to_tell_its_pixels(name):
    """The device "meta" has no pixels: to look at one raises."""
    images, labels = (tensor.to("meta") for tensor in batch())
    result = ATTACKS[name](small_net().to("meta"), images, labels, 0.1)
    assert result.shape == images.shape and result.is_meta


def test_what_would_mislead_is_refused():
    with pytest.raises(ValueError, match="random_start"):
        attacks.pgd(small_net(), *batch(), 0.1, restarts=2)
    with pytest.raises(ValueError, match="one value per image"):
        attacks.fgsm(small_net(), *batch(), 0.1, loss=nn.functional.cross_entropy)
