"""APGD, Square, C&W and noise against definitions, toy models and other implementations."""

import math
from functools import partial

import pytest
import torch
from networks import is_wrong, right_batch, small_net

import attacks

EPSILON = 0.03


@pytest.fixture(scope="module")
def net():
    net = small_net().requires_grad_(False)
    for parameter in net[-1].parameters():
        parameter.mul_(10)  # as sure of its classes as a trained network
    return net


def share(mask):
    return mask.float().mean().item()


def recording(model_fn, asked):
    """`model_fn`, and the points it is asked about are added to the list `asked`."""
    return lambda points: asked.append(points.detach().clone()) or model_fn(points)


def points_of_apgd(differentiate, start, low, high, step_size, num_steps):
    """What Algorithm 1 of the paper asks about, for one image, and how often condition 2 alone halved."""
    shares = [0, 0.22]
    while shares[-1] < 1:
        shares.append(round(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06), 6))
    looks = {math.ceil(round(part * num_steps, 6)) for part in shares[1:] if part < 1}
    previous, now = start, differentiate(start)
    best = now
    points, rises, last_look, stalls = [start], [], (step_size, best[1]), 0
    for step in range(1, num_steps + 1):
        ahead = (now[0] + step_size * now[2].sign()).clamp(low, high)
        alpha = 0.75 if step > 1 else 1
        point = now[0] + alpha * (ahead - now[0]) + (1 - alpha) * (now[0] - previous)
        points.append(point.clamp(low, high))
        new = differentiate(points[-1])
        rises.append(new[1] > now[1])
        previous, now = now[0], new
        best = max(best, new, key=lambda candidate: candidate[1])
        if step in looks:
            few, stalled = sum(rises) < 0.75 * len(rises), last_look == (step_size, best[1])
            last_look, rises = (step_size, best[1]), []
            stalls += stalled and not few
            if few or stalled:
                step_size, now = step_size / 2, best
    return points, stalls


def scripted():
    """A loss with the margin's gradient, but ten values that rise, a fall, and a rise to no new maximum."""
    values = iter([*range(10), *range(-100, -60)])

    def loss(outputs, labels):
        margin = attacks.margin(outputs, labels)
        return margin - margin.detach() + next(values) if torch.is_grad_enabled() else margin

    return loss


@pytest.mark.parametrize("name", ["cross_entropy", "margin", "scripted"])
def test_apgd_is_the_papers_algorithm_for_each_image(name):
    """All images at once go the way that each goes on its own, written as the paper has it."""
    net = small_net(dtype=torch.float64).requires_grad_(False)
    images, labels = right_batch(net, 6)
    make_loss = scripted if name == "scripted" else lambda: getattr(attacks, name)
    asked, epsilon, num_steps = [], 0.1, 40
    attacks.apgd(recording(net, asked), images, labels, epsilon, num_steps=num_steps, loss=make_loss())
    assert len(asked) == 1 + 1 + num_steps and torch.equal(asked[0], images)
    for index in range(6):
        one, loss = slice(index, index + 1), make_loss()

        def differentiate(point, one=one, loss=loss):
            value = loss(net(point.requires_grad_()), labels[one]).sum()
            return point.detach(), value.item(), torch.autograd.grad(value, point)[0]

        low, high = (images[one] - epsilon).clamp(min=0), (images[one] + epsilon).clamp(max=1)
        points, stalls = points_of_apgd(differentiate, asked[1][one], low, high, 2 * epsilon, num_steps)
        ours = torch.cat([points[one] for points in asked[1:]])
        torch.testing.assert_close(ours, torch.cat(points), rtol=0, atol=1e-9)
        assert stalls or name != "scripted"


@pytest.mark.parametrize("loss, name", [(attacks.cross_entropy, "ce"), (attacks.dlr, "dlr")])
def test_apgd_beats_pgd_and_agrees_with_autoattack(net, loss, name):
    images, labels = right_batch(net, 128)
    weaker, ours = (
        is_wrong(net, attack(net, images, labels, EPSILON, loss=loss), labels)
        for attack in (partial(attacks.pgd, step_size=EPSILON / 4), partial(attacks.apgd, num_steps=20))
    )
    assert 0.2 < share(weaker) <= share(ours) < 0.8
    autopgd = pytest.importorskip("pyautoattack.autopgd_base")
    reference = autopgd.APGDAttack(net, n_iter=20, eps=EPSILON, seed=0, loss=name, device="cpu")
    theirs = is_wrong(net, reference.perturb(images.clone(), labels.clone()), labels)
    assert abs(share(ours) - share(theirs)) <= 0.03


RANDOM_PGD = partial(attacks.pgd, random_start=True)


@pytest.mark.parametrize("attack", [partial(RANDOM_PGD, step_size=1e-7), attacks.apgd], ids=["pgd", "apgd"])
def test_misclassified_is_preferred_to_high_loss(attack):
    """The loss is the true score, so correct images have the higher one; of label 1, grey itself is wrong."""
    grey, labels, asked, ends = torch.full((20, 1, 1, 1), 0.5), torch.arange(20) % 2, [], []

    def model_fn(x):
        (asked if torch.is_grad_enabled() else ends).append(x.detach().flatten())
        return torch.cat([x, 1 - x], 1).flatten(1)

    true_score = lambda outputs, labels: outputs.gather(1, labels[:, None])[:, 0]  # noqa: E731
    options = {"num_steps": 1, "restarts": 3, "loss": true_score}
    result = attack(model_fn, grey, labels, 0.4, **options).flatten()
    points = torch.stack(ends if len(ends) == 3 else asked + ends)  # PGD compares its last iterates only
    scores = torch.where(labels == 0, points, 1 - points)
    wrong = torch.where(labels == 0, points < 0.5, points >= 0.5)
    chosen = torch.where(wrong.any(0), torch.where(wrong, scores, -1).amax(0), scores.amax(0))
    assert torch.equal(torch.where(labels == 0, result, 1 - result), chosen)
    assert (chosen < scores.amax(0)).any() and wrong[:, labels == 0].any(0).sum() > 3


@pytest.mark.parametrize(
    "attack, options",
    [
        (RANDOM_PGD, {"num_steps": 5, "loss": attacks.margin}),
        (attacks.apgd, {"num_steps": 2, "loss": attacks.margin}),
        (attacks.square, {"num_queries": 20}),
    ],
    ids=["pgd", "apgd", "square"],
)
def test_more_restarts_are_never_weaker_on_any_image(net, attack, options):
    images, labels = right_batch(net, 64)
    results = [attack(net, images, labels, EPSILON, restarts=count, **options) for count in (1, 2, 5)]
    clean, one, two, five = (attacks.margin(net(points), labels) for points in (images, *results))
    assert (one >= clean - 1e-6).all() and (two >= one - 1e-6).all() and (five >= two - 1e-6).all()
    assert (one > 0).any() and (five > one + 1e-4).any()


def test_square_asks_what_it_may_and_no_more(net):
    """Queries in number, without gradient, only for images still correct; results in the corners."""
    images, right = right_batch(net, 64)
    labels, sizes = right.clone(), []
    labels[:3] = (labels[:3] + 1) % 5  # misclassified as they come

    def counting(points):
        assert not torch.is_grad_enabled() and not points.requires_grad
        sizes.append(len(points))
        return net(points)

    result = attacks.square(counting, images, labels, 0.1, num_queries=60)
    assert sizes[:2] == [64, 61]  # the clean images, then the stripes
    assert len(sizes) == 1 + 60 and sizes[1:] == sorted(sizes[1:], reverse=True)
    assert torch.equal(result[:3], images[:3])
    torch.testing.assert_close(result[3:], attacks.square(net, images, right, 0.1, num_queries=60)[3:])
    corner = ((result - images).abs() > 0.1 - 1e-6) | (result == 0) | (result == 1)
    assert corner[3:].all()
    # An image that is fooled leaves the queue; only the last query can have fooled more.
    assert 61 > sizes[-1] >= (~is_wrong(net, result, labels)).sum() > 0


def test_squares_shrink_by_the_authors_schedule_and_reach_every_place():
    """Seen from which pixels one query moved from the last point asked about, if any channel did."""
    asked, size = [], 11
    stubborn = lambda points: torch.tensor([[1.0, 0.0]]).repeat(len(points), 1)  # noqa: E731
    image, label = torch.full((1, 3, size, size), 0.5), torch.zeros(1, dtype=torch.long)
    attacks.square(recording(stubborn, asked), image, label, 0.1, num_queries=1000)
    stripes, queries = asked[1], torch.cat(asked[2:])  # nothing is ever accepted: all start from the stripes
    moved, reached = (queries != stripes).any(1), set()
    assert len(queries) == 999 and moved[:5].sum((1, 2)).max() > 40
    halvings = torch.tensor([1, 5, 20, 50, 100, 200, 400, 600, 800])
    for query, square in enumerate(moved, start=1):
        side = max(1, round(math.sqrt(0.8 / 2 ** (halvings < query).sum().item() * size**2)))
        rows, columns = (square.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
        if rows:  # stripes are vertical: a row moves as its neighbour does, a column need not
            assert rows == list(range(rows[0], rows[0] + side)) and columns[-1] - columns[0] < side
            reached.add((side, rows[0]))
    for side in (1, 2, 3):
        assert {row for length, row in reached if length == side} == set(range(size - side + 1))
    assert moved.any(0).all()


def test_square_agrees_with_autoattack(net):
    module = pytest.importorskip("pyautoattack.square")
    images, labels = right_batch(net, 128)
    share_of = lambda points: share(is_wrong(net, points, labels))  # noqa: E731
    references = [  # each has one sequence of squares for all images, so that results vary
        module.SquareAttack(net, eps=0.1, n_queries=50, seed=seed, device="cpu", verbose=False)
        for seed in range(3)
    ]
    theirs = sum(share_of(reference.perturb(images.clone(), labels.clone())) for reference in references) / 3
    ours = share_of(attacks.square(net, images, labels, 0.1, num_queries=50))
    assert 0.2 < ours < 0.8 and abs(ours - theirs) <= 0.06


def test_cw_finds_the_nearest_point_of_a_linear_boundary():
    torch.manual_seed(0)
    weight = torch.randn(48, 2)
    images = 0.5 + 0.1 * torch.randn(16, 3, 4, 4).clamp(-2, 2)
    model_fn = lambda x: x.flatten(1) @ weight  # noqa: E731
    labels = model_fn(images).argmax(1)
    exact = attacks.margin(model_fn(images), labels).abs() / (weight[:, 0] - weight[:, 1]).norm()
    result = attacks.cw(model_fn, images, labels, num_steps=300)
    distance = (result - images).flatten(1).norm(dim=1)
    assert is_wrong(model_fn, result, labels).all()
    assert (distance >= exact * 0.999).all() and (distance <= exact * 1.02 + 0.002).all()


def test_cw_agrees_with_foolbox(net):
    foolbox = pytest.importorskip("foolbox")
    images, labels = right_batch(net, 16)
    images = images.clamp(0.01, 0.99)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    options = {"binary_search_steps": 1, "initial_const": 1.0, "abort_early": False}
    reference = foolbox.attacks.L2CarliniWagnerAttack(steps=60, stepsize=0.01, confidence=0, **options)
    theirs = reference.run(model, images, labels)
    ours = attacks.cw(net, images, labels, num_steps=60)
    assert is_wrong(net, theirs, labels).all() and is_wrong(net, ours, labels).all()
    ours, theirs = ((points - images).flatten(1).norm(dim=1) for points in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


def test_cw_returns_successes_or_the_image_itself(net):
    images, labels = right_batch(net, 24)
    labels[:4] = (labels[:4] + 1) % 5  # misclassified as they come
    result = attacks.cw(net, images, labels, num_steps=6)
    fooled, same = is_wrong(net, result, labels), (result == images).flatten(1).all(1)
    assert torch.equal(same, ~fooled | (torch.arange(24) < 4)) and 4 < fooled.sum() < 24
    assert result.min() >= 0 and result.max() <= 1
    weak = is_wrong(net, attacks.cw(net, images, labels, num_steps=6, c=1e-3), labels)
    assert 4 <= weak.sum() < fooled.sum()
    tie = lambda x: torch.zeros(len(x), 2) + 0 * x.sum((1, 2, 3))[:, None]  # noqa: E731
    assert torch.equal(attacks.cw(tie, images, 0 * labels, num_steps=2), images)  # no success: 0 is said


def test_noise_goes_to_random_corners():
    images = torch.full((6, 3, 20, 20), 0.5)
    result = attacks.noise(None, images, torch.zeros(6, dtype=torch.long), 0.1)
    torch.testing.assert_close((result - images).abs(), torch.full_like(images, 0.1))
    assert 0.45 < share(result > images) < 0.55
    assert len({row.numpy().tobytes() for row in result}) == 6
