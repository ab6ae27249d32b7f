"""APGD, Square, C&W and noise on a small trained network, against definitions and other implementations."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

import attacks

EPSILON = 0.05


def problem(count, seed):
    """Five smooth colour patterns under noise, 11 x 11: labels (count,), images in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    patterns = nn.functional.interpolate(patterns, size=11, mode="bilinear")
    labels = torch.arange(count) % 5
    noise = 0.12 * torch.randn(count, 3, 11, 11, generator=generator)
    return (0.5 + 0.35 * (patterns[labels] - 0.5) + noise).clamp(0, 1), labels


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*body, nn.Linear(144, 5))
    images, labels = problem(500, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(60):
        chosen = torch.arange(step * 50, step * 50 + 50) % 500
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images_labels(net):
    images, labels = problem(128, seed=2)
    assert wrong(net, images, labels).sum() < 6
    return images, labels


def wrong(net, images, labels):
    return net(images).argmax(1) != labels


def share(mask):
    return mask.float().mean().item()


# ---- APGD


def one_image_apgd(value_and_slope, start, ball, step_size, num_steps, rho):
    """Algorithm 1 of the paper for a single image, in its own terms; the highest loss and where it was."""
    shares = [0, 0.22]
    while shares[-1] < 1:
        shares.append(round(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06), 6))
    checks = sorted({math.ceil(round(part * num_steps, 6)) for part in shares[1:] if part < 1})
    points, values, sizes, records = [start], [value_and_slope(start)[0]], [step_size], []
    best, best_value, eta = start, values[0], step_size
    bests, check = [best_value], 0
    for k in range(num_steps):
        _, slope = value_and_slope(points[-1])
        z = (points[-1] + eta * slope.sign()).clamp(*ball)
        alpha = 0.75 if k else 1
        old = points[-2] if k else points[-1]
        after = points[-1] + alpha * (z - points[-1]) + (1 - alpha) * (points[-1] - old)
        after = after.clamp(*ball)
        value = value_and_slope(after)[0]
        records.append(value > values[-1])
        points, values = [points[-1], after], [value]
        if value > best_value:
            best, best_value = after, value
        if k + 1 in checks:
            few = sum(records[check:]) < rho * (k + 1 - check)
            stalled = sizes[-1] == eta and bests[-1] == best_value
            if few or (stalled and len(sizes) > 1 and sizes[-2] == eta) or (stalled and len(sizes) == 1):
                eta, points, values = eta / 2, [points[0], best], [best_value]
            sizes.append(eta)
            bests.append(best_value)
            check = k + 1
    return best, best_value


@pytest.mark.parametrize("loss", [attacks.cross_entropy, attacks.margin])
def test_apgd_is_the_papers_algorithm_for_each_image(net, images_labels, loss):
    """All images at once come to the same highest loss as each on its own, written as the paper has it."""
    net, images = deepcopy(net).double(), images_labels[0][:12].double()
    labels, epsilon, num_steps = images_labels[1][:12], 0.1, 40
    ball = attacks._ball(images, epsilon)
    start = next(attacks._random_starts(images, epsilon, ball, 1, None))

    def probe(step, points):
        _, value, slope = attacks._differentiate(net, points, labels, loss)
        return attacks.Verdict(points, torch.zeros_like(value, dtype=torch.bool), value), slope

    found = attacks._apgd_run(probe, start, ball, 2 * epsilon, num_steps, 0.75)
    for index in range(12):
        one = slice(index, index + 1)

        def value_and_slope(points, one=one):
            points = points.clone().requires_grad_()
            value = loss(net(points), labels[one]).sum()
            return value.item(), torch.autograd.grad(value, points)[0]

        bounds = ball[0][one], ball[1][one]
        best, value = one_image_apgd(value_and_slope, start[one], bounds, 2 * epsilon, num_steps, 0.75)
        assert found.value[index].item() == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(found.images[one], best, rtol=0, atol=1e-9)


def test_apgd_narrows_its_steps_down_to_an_inner_maximum():
    """Where fixed steps would jump about a peak inside the ball, halved ones close in on it."""
    images, labels = torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.long)
    peak = torch.tensor([0.37, 0.44, 0.5001, 0.613]).view(4, 1, 1, 1)
    model_fn = lambda x: torch.cat([x.mean((2, 3)), torch.zeros(len(x), 1)], 1)  # noqa: E731
    trace_sizes = []
    for num_steps in (10, 100, 200):
        loss = lambda outputs, labels: -(outputs[:, 0] - peak.flatten()).square()  # noqa: E731
        result = attacks.apgd(model_fn, images, labels, 0.3, num_steps=num_steps, loss=loss)
        trace_sizes.append((result.mean((1, 2, 3)) - peak.flatten()).abs().max().item())
    assert trace_sizes[2] <= trace_sizes[1] < 0.003


@pytest.mark.parametrize("loss", [attacks.cross_entropy, attacks.dlr])
def test_apgd_beats_pgd_and_never_heals_an_image(net, images_labels, loss):
    images, labels = images_labels
    before = wrong(net, images, labels)
    labels = labels.clone()
    labels[:10] = (labels[:10] + 1) % 5  # misclassified as they come
    fooled = wrong(net, attacks.apgd(net, images, labels, EPSILON, num_steps=40, loss=loss), labels)
    assert fooled[:10].all() and (fooled | ~before).all()
    weaker = wrong(net, attacks.pgd(net, images, labels, EPSILON, loss=loss), labels)
    assert 0.2 < share(weaker) < 0.9
    assert share(fooled) >= share(weaker)


def test_apgd_halves_its_steps_when_the_best_stays_the_best():
    """Condition 2: no new best since the last look, nor a halving then, though most steps raised the loss."""
    start, ball = torch.full((1, 1, 1, 1), 0.5), (torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    climb = [float(step) for step in range(23)]  # steps 0 to 22: a new best at each
    slump = [-100.0 + step for step in range(78)]  # from then on: nearly all steps rise, none to a best
    seen = []

    def probe(step, points):
        seen.append(points.item())
        value = torch.tensor([(climb + slump)[step]], dtype=torch.float64)
        return attacks.Verdict(points, torch.tensor([False]), value), torch.ones_like(points)

    step_size = 2.0**-12
    attacks._apgd_run(probe, start.double(), tuple(bound.double() for bound in ball), step_size, 100, 0.75)
    best, sizes, now, previous = seen[22], {}, seen[0], seen[0]
    for step in range(1, 101):
        alpha = 0.75 if step > 1 else 1.0
        sizes[step] = (seen[step] - now - (1 - alpha) * (now - previous)) / alpha / step_size
        previous, now = now, seen[step]
        if step in (41, 70, 87, 99):  # every second look: the one after a halving has to wait
            now = best
    expected = [(1, 1), (42, 0.5), (71, 0.25), (88, 0.125), (100, 0.0625)]
    for step, size in sizes.items():
        assert size == pytest.approx(max((since, size) for since, size in expected if since <= step)[1])


def test_apgd_keeps_an_image_that_only_its_start_would_lose():
    """Misclassified at exactly the image itself: every random start has left that point."""
    images, labels = torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.long)
    right = torch.tensor([1.0, 0.0])

    def model_fn(x):
        return torch.where((x == 0.5).all(3).all(2), -right, right) + 0 * x.sum((2, 3))

    assert wrong(model_fn, images, labels).all()
    assert torch.equal(attacks.apgd(model_fn, images, labels, 0.1, num_steps=3), images)


def test_apgd_prefers_misclassified_to_high_loss():
    """The loss is the pixel, and it is misclassified below a half: a low loss must win."""
    images, labels = torch.full((20, 1, 1, 1), 0.5), torch.zeros(20, dtype=torch.long)
    model_fn = lambda x: torch.cat([x, 1 - x], 1).flatten(1)  # noqa: E731
    loss = lambda outputs, labels: outputs[:, 0]  # noqa: E731
    starts = next(attacks._random_starts(images, 0.4, attacks._ball(images, 0.4), 1, None)).flatten()
    result = attacks.apgd(model_fn, images, labels, 0.4, num_steps=5, loss=loss).flatten()
    assert 3 < (starts < 0.5).sum() < 17
    torch.testing.assert_close(result, torch.where(starts < 0.5, starts, 0.9))


@pytest.mark.parametrize(
    "name, epsilon, options", [("apgd", 0.05, {"num_steps": 2}), ("square", 0.08, {"num_queries": 60})]
)
def test_restarts_never_lose_an_image(net, images_labels, name, epsilon, options):
    images, labels = images_labels
    once, thrice = (
        wrong(net, attacks.ATTACKS[name](net, images, labels, epsilon, restarts=count, **options), labels)
        for count in (1, 3)
    )
    assert (thrice | ~once).all() and thrice.sum() > once.sum()


@pytest.mark.parametrize("loss, name", [(attacks.cross_entropy, "ce"), (attacks.dlr, "dlr")])
def test_apgd_agrees_with_autoattack(net, images_labels, loss, name):
    autopgd = pytest.importorskip("pyautoattack.autopgd_base")
    images, labels = images_labels
    reference = autopgd.APGDAttack(net, n_iter=50, eps=EPSILON, seed=0, loss=name, device="cpu")
    expected = wrong(net, reference.perturb(images.clone(), labels.clone()), labels)
    result = wrong(net, attacks.apgd(net, images, labels, EPSILON, num_steps=50, loss=loss), labels)
    assert 0.2 < share(expected) < 0.95
    assert abs(share(result) - share(expected)) <= 0.03


# ---- Square


@pytest.mark.parametrize("length", [1, 2, 7, 11])
def test_windows_are_whole_and_reach_every_place(length):
    for side in range(1, length + 1):
        inside = attacks._window(torch.linspace(0, 1, 101)[:, None], side, length)
        assert inside.shape == (101, length) and (inside.sum(1) == side).all()
        starts = inside.int().argmax(1)
        places = torch.arange(length)
        assert torch.equal(inside, (places >= starts[:, None]) & (places < starts[:, None] + side))
        assert starts.unique().tolist() == list(range(length - side + 1))


def test_square_asks_what_it_may_and_no_more(net, images_labels):
    """Queries in number, without gradient, only for images still correct; results in the corners."""
    images, labels = images_labels[0].clone(), images_labels[1].clone()
    labels[:3] = (labels[:3] + 1) % 5  # misclassified as they come
    sizes = []

    def counting(points):
        assert not torch.is_grad_enabled() and not points.requires_grad
        sizes.append(len(points))
        return net(points)

    result = attacks.square(counting, images, labels, 0.08, num_queries=60)
    lower, upper = attacks._ball(images, 0.08)
    before = wrong(net, images, labels)
    assert sizes[0] == len(images) and sizes[1] == (~before).sum()  # the clean images, then the stripes
    assert len(sizes) == 1 + 60 and sizes[1:] == sorted(sizes[1:], reverse=True) and sizes[-1] < sizes[1]
    assert torch.equal(result[before], images[before])
    assert ((result == lower) | (result == upper))[~before].all()
    # An image that is fooled leaves the queue; only the last query can have fooled more.
    assert sizes[-1] >= (~wrong(net, result, labels)).sum() > 0


def test_squares_shrink_by_the_authors_schedule(net, images_labels):
    """The side of each square, seen from which pixels one query moved from the last point asked about."""
    image, label = images_labels[0][:1], images_labels[1][:1]
    asked = []

    def stubborn(points):
        asked.append(points.clone())
        return torch.tensor([[1.0, 0.0]]) + torch.zeros(len(points), 2)

    attacks.square(stubborn, image, torch.zeros_like(label), 0.1, num_queries=1000, p_init=0.8)
    stripes = asked[1]  # nothing is ever accepted: every query starts from here
    halvings = [(1, 0), (5, 1), (20, 2), (50, 3), (100, 4), (200, 5), (400, 6), (600, 7), (800, 8)]
    for query in range(1, 1000):
        expected = 0.8 / 2 ** max(count for after, count in halvings if query > after or count == 0)
        side = max(1, round(math.sqrt(expected * 121)))
        moved = (asked[1 + query] != stripes).any(1)[0].nonzero()
        if len(moved):
            assert (moved.amax(0) - moved.amin(0)).max().item() + 1 <= side
    early = [(asked[1 + query] != stripes).any(1)[0].sum().item() for query in range(1, 6)]
    assert max(early) > 40


def test_square_raises_the_margin_and_fools(net, images_labels):
    images, labels = images_labels
    lead = lambda x: attacks.margin(net(x), labels)  # noqa: E731
    results = attacks.square(net, images, labels, EPSILON, num_queries=200)
    assert (lead(results) >= lead(images)).all()
    one = attacks.square(net, images, labels, EPSILON, num_queries=1)
    assert wrong(net, results, labels).sum() > wrong(net, one, labels).sum() + 20


def test_square_agrees_with_autoattack(net, images_labels):
    module = pytest.importorskip("pyautoattack.square")
    images, labels = images_labels
    share_of = lambda points: share(wrong(net, points, labels))  # noqa: E731
    references = [
        module.SquareAttack(net, eps=0.07, n_queries=200, seed=seed, device="cpu", verbose=False)
        for seed in range(4)  # one sequence of squares for all images, so that results vary widely
    ]
    expected = sum(share_of(attack.perturb(images.clone(), labels.clone())) for attack in references) / 4
    assert 0.2 < expected < 0.8
    assert abs(share_of(attacks.square(net, images, labels, 0.07, num_queries=200)) - expected) <= 0.12


# ---- C&W


def test_cw_finds_the_nearest_point_of_a_linear_boundary():
    torch.manual_seed(0)
    weight = torch.randn(48, 2)
    images = 0.5 + 0.1 * torch.randn(16, 3, 4, 4).clamp(-2, 2)
    model_fn = lambda x: x.flatten(1) @ weight  # noqa: E731
    labels = model_fn(images).argmax(1)
    exact = attacks.margin(model_fn(images), labels).abs() / (weight[:, 0] - weight[:, 1]).norm()
    result = attacks.cw(model_fn, images, labels, num_steps=500, c=1.0)
    distance = (result - images).flatten(1).norm(dim=1)
    assert wrong(model_fn, result, labels).all()
    assert (distance >= exact * 0.999).all() and (distance <= exact * 1.02 + 0.002).all()


def test_cw_agrees_with_foolbox(net, images_labels):
    foolbox = pytest.importorskip("foolbox")
    images, labels = images_labels[0][:32].clamp(0.01, 0.99), images_labels[1][:32]
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    options = {"binary_search_steps": 1, "initial_const": 1.0, "abort_early": False}
    reference = foolbox.attacks.L2CarliniWagnerAttack(steps=60, stepsize=0.01, confidence=0, **options)
    expected = reference.run(model, images, labels)
    result = attacks.cw(net, images, labels, num_steps=60, lr=0.01)
    assert wrong(net, result, labels).all() and wrong(net, expected, labels).all()
    ours, theirs = ((points - images).flatten(1).norm(dim=1) for points in (result, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


def test_cw_returns_successes_or_the_image_itself(net, images_labels):
    images, labels = images_labels[0][:24], images_labels[1][:24].clone()
    labels[:4] = (labels[:4] + 1) % 5  # misclassified as they come
    result = attacks.cw(net, images, labels, num_steps=12)
    fooled, same = wrong(net, result, labels), (result == images).flatten(1).all(1)
    assert (fooled | same).all() and same[:4].all() and fooled[:4].all()
    assert (~same).any() and (~fooled).any()
    assert result.min() >= 0 and result.max() <= 1


def test_cw_search_shortens_and_confidence_lengthens(net, images_labels):
    images, labels = images_labels[0][:16], images_labels[1][:16]
    length = lambda x: (x - images).flatten(1).norm(dim=1)  # noqa: E731
    plain = attacks.cw(net, images, labels, num_steps=60, c=10.0)
    searched = attacks.cw(net, images, labels, num_steps=60, c=10.0, search_steps=4)
    sure = attacks.cw(net, images, labels, num_steps=60, c=10.0, confidence=8.0)
    assert wrong(net, plain, labels).all() and wrong(net, searched, labels).all()
    assert (length(searched) <= length(plain)).all() and (length(searched) < length(plain)).any()
    assert (attacks.margin(net(sure), labels) >= 8.0).all()
    assert (length(sure) > length(plain)).all()


def test_cw_search_raises_a_weight_too_small_to_succeed(net, images_labels):
    images, labels = images_labels[0][:8], images_labels[1][:8]
    few = attacks.cw(net, images, labels, num_steps=60, c=1e-4)
    more = attacks.cw(net, images, labels, num_steps=60, c=1e-4, search_steps=6)
    assert not wrong(net, few, labels).any() and wrong(net, more, labels).all()


# ---- noise, and all of them together


def test_noise_goes_to_random_corners():
    images = torch.full((6, 3, 20, 20), 0.5)
    result = attacks.noise(None, images, torch.zeros(6, dtype=torch.long), 0.1)
    lower, upper = attacks._ball(images, 0.1)
    assert ((result == lower) | (result == upper)).all()
    assert 0.45 < share(result == upper) < 0.55
    assert len({row.numpy().tobytes() for row in result}) == 6


def test_strong_attacks_see_through_masked_gradients(net, images_labels):
    """Logits x 1000: the same network, robust by its cross-entropy and by nothing else."""
    images, labels = images_labels
    loud = lambda x: 1000 * net(x)  # noqa: E731
    keep = attacks.margin(loud(images), labels) < -150
    images, labels = images[keep], labels[keep]
    assert len(images) > 100
    epsilon = 0.12

    def fooled(attack, **options):
        return share(wrong(net, attack(loud, images, labels, epsilon, **options), labels))

    for attack in (attacks.fgsm, attacks.bim, attacks.mim, attacks.pgd):
        assert fooled(attack) == 0
    assert fooled(attacks.pgd, loss=attacks.margin) > 0.9
    assert fooled(attacks.apgd, loss=attacks.dlr, num_steps=20) > 0.9
    assert fooled(attacks.square, num_queries=200) > 0.9
    assert share(wrong(net, attacks.cw(loud, images[:16], labels[:16], num_steps=60), labels[:16])) > 0.9


def test_dlr_is_flat_exactly_where_the_true_class_comes_third():
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0]]).repeat(4, 1).requires_grad_()
    values = attacks.dlr(logits, torch.arange(4))
    (slope,) = torch.autograd.grad(values.sum(), logits)
    assert values[2].item() == pytest.approx(1)
    assert [bool((row == 0).all()) for row in slope] == [False, False, True, False]
