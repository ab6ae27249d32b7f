"""What evaluation measures, held to plain arithmetic, and what a stop in the middle leaves."""

import dataclasses
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import checkpoints
import data
import evaluation
import robustness
import utils
from evaluation import report, trials
from evaluation.autoattack import into_ball
from evaluation.outcome import wilson
from prototype_conformity import PrototypeConformityLoss, from_checkpoint
from resnet_model import resnet

CLASSES = ("a", "b", "c", "d")
EPSILON = 8 / 255
CPU = torch.device("cpu")
CONFIG = robustness.Config(
    attacks=("fgsm", "pgd"), num_steps=3, random_start=True, restarts=2, apgd_steps=5, num_queries=20,
    cw_steps=5, batch_size=6, results="nowhere.json",
)  # fmt: skip


def split_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return data.Split(images, torch.arange(count) % 4)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).requires_grad_(False).eval()


def target_of(net):
    return evaluation.Target("net", "0", net, net, path="net.pth.tar")


def results_of(target, split, parts, config=CONFIG):
    return evaluation.Results(config, data.Dataset("shapes", CLASSES, None, split), [target], parts)


def measured(target, split, parts, config=CONFIG):
    results = results_of(target, split, parts, config)
    for each in parts:
        finish(target, split, each, results.of(target, each))
    return results


def finish(target, split, trial, outcome=None, batch_size=6):
    outcome = evaluation.Outcome() if outcome is None else outcome
    for _ in evaluation.measure(target, split, trial, outcome, batch_size=batch_size, seed=0):
        pass
    return outcome


def same(one, other):
    return all(torch.equal(one.columns[name], other.columns[name]) for name in evaluation.COLUMNS)


def returning(result, epsilon=EPSILON, bounded=True):
    """A trial that makes `result(images)` of the images, whatever they are."""
    attack = lambda target, images, labels, generator, trace: result(images)  # noqa: E731
    return evaluation.Trial("made", "Made", epsilon, attack, bounded=bounded)


# ---------------------------------------------------------------- measuring


@pytest.mark.parametrize("name", ["noise", "pgd", "apgd-ce", "square"])
def test_what_happens_to_an_image_does_not_depend_on_the_blocks(name):
    target, split, trial = target_of(network()), split_of(16), trials.make(name, CONFIG)
    whole, parts = (finish(target, split, trial, batch_size=size) for size in (16, 5))
    assert torch.equal(whole.predicted, parts.predicted)
    torch.testing.assert_close(whole.linf, parts.linf)
    torch.testing.assert_close(whole.margin, parts.margin)


def test_outcome_is_plain_arithmetic():
    """FGSM on a linear network by hand: accuracy, margins, distances and gradients of each image."""
    net, split = network(), split_of(16)
    images, labels = split.images.float() / 255, split.labels
    slope = (net(images).softmax(1) - F.one_hot(labels, 4)) @ net[1].weight
    attacked = (images + EPSILON * slope.sign().view_as(images)).clamp(0, 1)
    scores, change = net(attacked), attacked - images
    others = scores.masked_fill(F.one_hot(labels, 4).bool(), -torch.inf).amax(1)

    outcome = finish(target_of(net), split, trials.make("fgsm", CONFIG))

    assert outcome.predicted.tolist() == scores.argmax(1).tolist()
    assert outcome.correct.tolist() == (scores.argmax(1) == labels).tolist()
    margin = scores.gather(1, labels[:, None])[:, 0] - others
    torch.testing.assert_close(outcome.margin, margin, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outcome.linf, change.abs().amax((1, 2, 3)).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(outcome.l2, change.square().sum((1, 2, 3)).sqrt(), rtol=1e-5, atol=0)
    assert outcome.gradients and not outcome.zero_first.any()
    assert outcome.accuracy == pytest.approx(100 * (scores.argmax(1) == labels).double().mean().item())


@pytest.mark.parametrize(("c", "attacked"), [(1e-6, False), (1e3, True)])
def test_c_of_cw_weighs_what_an_image_is_moved_for(c, attacked):
    """C&W gives up an image that can only be moved at a cost of more than c times its margin."""
    target, split = target_of(network()), split_of(16)
    trial = trials.make("cw", dataclasses.replace(CONFIG, cw_steps=50, cw_c=c))
    right = target.folded(split.images.float() / 255).argmax(1) == split.labels
    assert right.any() and f"c {c:g} without a search" in trial.settings
    assert torch.equal(finish(target, split, trial).correct, right & (not attacked))


@pytest.mark.parametrize("count", [12, 13, 17])
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_measure_goes_on_where_it_stopped(count, stop):
    """Whatever block it was stopped after, the last ragged one included, the outcome is that of one go."""
    target, split, trial = target_of(network()), split_of(count), trials.make("pgd", CONFIG)
    part = evaluation.Outcome()
    blocks = evaluation.measure(target, split, trial, part, batch_size=6, seed=0)
    for _ in range(min(stop, -(-count // 6))):
        next(blocks)
    finish(target, split, trial, part)
    assert len(part) == count and same(part, finish(target, split, trial))


def test_nan_scores_are_not_right_and_without_attack_no_result_at_all():
    class Broken(nn.Module):
        def forward(self, images):
            return torch.full((len(images), 4), torch.nan)

    assert not finish(target_of(Broken()), split_of(8), returning(lambda images: images)).correct.any()
    with pytest.raises(utils.CheckpointError, match=r"net\.pth\.tar: its class scores .* are not finite"):
        finish(target_of(Broken()), split_of(8), trials.clean())


@pytest.mark.parametrize(
    ("result", "epsilon", "words"),
    [
        (lambda images: images * torch.nan, EPSILON, "NaN"),
        (lambda images: images - 1, EPSILON, r"left \[0, 1\]"),
        (lambda images: images.clamp(min=0.1), EPSILON, "beyond epsilon"),
        (lambda images: (images + 1e-3).clamp(0, 1), 0.0, "beyond epsilon 0"),
    ],
)
def test_bad_results_are_refused(result, epsilon, words):
    with pytest.raises(ValueError, match=words):
        finish(target_of(network()), split_of(8), returning(result, epsilon))


def test_one_rounding_error_too_far_is_refused():
    images = torch.full((1, 3, 2, 2), 0.5)
    edge = into_ball(images + 1, images, EPSILON)
    evaluation.check_result(edge, images, EPSILON)
    with pytest.raises(ValueError, match="beyond epsilon"):
        evaluation.check_result(torch.nextafter(edge, images + 1), images, EPSILON)


def test_unbounded_attacks_count_for_worst_only_within_epsilon():
    """Black images fool at a distance of their own: the column counts them, Worst only within epsilon."""
    trial = returning(torch.zeros_like, bounded=False)
    results = measured(target_of(network()), split_of(40), [trials.clean(), trial])
    (target,) = results.targets
    (_, clean), (_, black) = results.row(target)
    assert black.accuracy == 25  # a constant prediction
    assert torch.equal(results.robust(target), clean.correct)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**31))
def test_into_ball_is_within_it_exactly(epsilon, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, 4, 4, generator=generator)
    found = images + 3 * torch.randn(images.shape, generator=generator)
    near = into_ball(found, images, epsilon)
    evaluation.check_result(near, images, epsilon)  # so what has fooled the network has fooled it within it
    wanted = found.double().clamp(images.double() - epsilon, images.double() + epsilon).clamp(0, 1)
    assert (near.double() - wanted).abs().max() < 1e-6


# ---------------------------------------------------------------- checkpoints and prototypes


def save(path, weights=(1.0, 1e-4), **changes):
    """A small checkpoint of stage 2, as the scripts write it, untrained."""
    torch.manual_seed(0)
    model, criterion = resnet(4, 8), PrototypeConformityLoss(4, {"layer3": 64, "fc": 1024}, *weights)
    state = {"script": "pcl_training", "classes": list(CLASSES), "epoch": 1, "state_dict": model.state_dict()}
    state["config"] = {"weight_prox": weights[0], "weight_conprox": weights[1], "distance": "squared"}
    checkpoints.save({**state, "criterion": criterion.state_dict(), **changes}, path, keep_previous=False)
    return model.eval(), criterion


def load(path, predict="softmax"):
    return evaluation.load_target(path, CPU, CLASSES, predict)


@pytest.mark.parametrize(
    ("weights", "settings", "label"),
    [
        ((1.0, 0.0), {}, "PCL"),
        ((0.0, 1.0), {}, "PCL"),
        ((0.0, 0.0), {}, "No PCL"),
        ((1.0, 1.0), {"shared_prototypes": False, "separation": True}, "PCL"),
        ((1.0, 1.0), {"shared_prototypes": True, "separation": True}, "PCL by Eq. 5"),
    ],
)
def test_a_row_is_called_by_what_was_trained(weights, settings, label, tmp_path):
    config = {"weight_prox": weights[0], "weight_conprox": weights[1], "distance": "squared", **settings}
    save(tmp_path / "run.pth.tar", weights, config=config)
    assert load(tmp_path / "run.pth.tar").label == label


def test_prototype_prediction_of_a_checkpoint(tmp_path):
    """The network and its folded copy predict the nearest prototype, and agree with each other."""
    model, criterion = save(tmp_path / "pcl.pth.tar")
    target = load(tmp_path / "pcl.pth.tar", "prototype")
    images = torch.rand(6, 3, 16, 16)
    centers = criterion.proximity["fc"].centers
    distances = torch.stack([(model(images).fc - center).square().sum(1) for center in centers], dim=1)
    torch.testing.assert_close(target.logits(images), -distances, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(target.folded(images).logits, -distances, rtol=1e-4, atol=1e-3)
    assert target.model(images).fc.shape == (6, 1024)


@pytest.mark.parametrize("options", [{}, {"squared": False}, {"shared": True}])
def test_joint_loss_of_images_averages_to_the_trained_one(options):
    criterion = PrototypeConformityLoss(4, {"layer3": 64, "fc": 1024}, 0.5, 0.01, **options)
    config = {"weight_prox": 0.5, "weight_conprox": 0.01, "shared_prototypes": "shared" in options}
    config["distance"] = "plain" if "squared" in options else "squared"
    prototypes = from_checkpoint(criterion.state_dict(), config)
    outputs, labels = resnet(4, 8).eval()(torch.rand(5, 3, 8, 8)), torch.tensor([0, 3, 1, 1, 2])
    torch.testing.assert_close(prototypes.per_image(outputs, labels).mean(), criterion(outputs, labels)[0])
    centers = criterion.proximity["fc"].centers
    nearest = [min(range(4), key=lambda k: (f - centers[k]).norm().item()) for f in outputs.fc]
    assert prototypes.nearest(outputs).argmax(1).tolist() == nearest


def test_prototypes_that_are_not_there(tmp_path):
    save(tmp_path / "plain.pth.tar", criterion={})
    with pytest.raises(utils.CheckpointError, match="no prototypes to predict with"):
        load(tmp_path / "plain.pth.tar", "prototype")
    target = load(tmp_path / "plain.pth.tar")
    assert not trials.make("joint", CONFIG).applies_to(target)
    assert trials.make("pgd", CONFIG).applies_to(target)


PULL = {"proximity.fc.centers": torch.zeros(4, 1024)}
BOTH = {**PULL, "contrastive.fc.centers": torch.zeros(4, 1024)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"criterion": PULL}, "do not fit its settings"),  # the settings say that there is a push
        ({"criterion": {**BOTH, "proximity.fc.other": torch.zeros(1)}}, "do not fit its settings"),
        ({"criterion": {"centers.centers": 3}}, "no ordinary tensor"),
        ({"criterion": BOTH, "config": {"weight_prox": 1.0}}, "do not fit its settings"),
        ({"criterion": BOTH, "config": {"weight_prox": "a", "weight_conprox": 1}}, "do not fit its settings"),
        ({"criterion": [1]}, "its criterion is no dict"),
        ({"script": ["pcl_training"]}, "its script is no str"),
        ({"criterion": {**BOTH, "proximity.fc.centers": torch.full((4, 1024), torch.nan)}}, "holds NaN"),
        ({"criterion": {name: value[:, :9] for name, value in BOTH.items()}}, r"\(4, 9\).*\(4, 1024\)"),
        ({"criterion": {name: value[:3] for name, value in BOTH.items()}}, r"\(3, 1024\).*\(4, 1024\)"),
        (
            {"criterion": {name.replace("fc", "fd"): value for name, value in BOTH.items()}},
            "prototypes of fd",
        ),
    ],
)
@pytest.mark.parametrize("predict", ["softmax", "prototype"])
def test_items_51_and_65_prototypes_that_fit_nothing_are_refused(changes, words, predict, tmp_path):
    save(tmp_path / "odd.pth.tar", **changes)
    with pytest.raises(utils.CheckpointError, match=words):
        load(tmp_path / "odd.pth.tar", predict)


def test_other_class_count_is_refused(tmp_path):
    torch.save(resnet(7, 8).state_dict(), tmp_path / "seven.pth.tar")
    with pytest.raises(utils.CheckpointError, match="7 classes, but the data set has 4"):
        load(tmp_path / "seven.pth.tar")


def test_adaptive_attacks_raise_what_they_name(tmp_path):
    """Attacks on the joint loss and on the distances each raise their own, by more than noise does."""
    save(tmp_path / "pcl.pth.tar")
    target = load(tmp_path / "pcl.pth.tar")
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(6, 3, 16, 16, generator=generator), torch.arange(6) % 4
    random = (images + EPSILON * torch.randn(images.shape, generator=generator).sign()).clamp(0, 1)
    approach = target.prototypes.approach
    losses = {
        **dict.fromkeys(("joint-fgsm", "joint-bim", "joint-mim", "joint"), target.prototypes.per_image),
        "nearest-prototype": lambda *given: approach(*given).amax(1),
    }
    for name, loss in losses.items():
        trial = trials.make(name, dataclasses.replace(CONFIG, num_steps=2))
        found = trial.attack(target, images, labels, torch.Generator(), None)
        before, by_noise, after = (loss(target.folded(x), labels) for x in (images, random, found))
        assert (after > before).all() and after.mean() > by_noise.mean(), name


# ---------------------------------------------------------------- stopping and going on


def test_stop_and_go_on_gives_the_identical_table(tmp_path):
    """A real SIGTERM in the middle of an attack: the block is finished, saved, and all ends as without it."""
    config = dataclasses.replace(CONFIG, results=str(tmp_path / "r.json"), resume=True)
    split, target, calls = split_of(20), target_of(network()), []
    parts = trials.table(config, 4)
    whole, stopped, resumed = (results_of(target, split, parts, config) for _ in range(3))
    evaluation.measure_all(whole)
    whole.path.unlink()

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return parts[2].attack(*arguments)

    stopped.trials = [*parts[:2], dataclasses.replace(parts[2], attack=stopping)]
    with pytest.raises(utils.Interrupted, match="12 of 20 images") as caught:
        evaluation.measure_all(stopped)
    assert caught.value.exit_status == 143

    resumed.resume()
    assert len(resumed.of(target, parts[2])) == 12
    evaluation.measure_all(resumed)
    assert report.table(resumed) == report.table(whole)
    assert all(same(whole.of(target, trial), resumed.of(target, trial)) for trial in parts)


# ---------------------------------------------------------------- numbers of a report


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10_000), st.floats(0, 1))
def test_wilson_solves_its_equation(images, share):
    """The ends are the p with (share - p)^2 = z^2 p (1 - p) / n."""
    correct = round(share * images)
    low, high = (end / 100 for end in wilson(correct, images))
    assert 0 <= low <= correct / images <= high <= 1
    for p in (low, high):
        wanted = 1.959964**2 * p * (1 - p) / images
        assert (correct / images - p) ** 2 == pytest.approx(wanted, abs=1e-9)


def test_worst_is_the_intersection():
    config = dataclasses.replace(CONFIG, attacks=("fgsm", "noise", "pgd"))
    results = measured(target_of(network(1)), split_of(24), trials.table(config, 4))
    (target,) = results.targets
    masks = [outcome.correct.tolist() for _, outcome in results.row(target)]
    wanted = [all(values) for values in zip(*masks, strict=True)]
    assert results.robust(target).tolist() == wanted
    assert 0 < sum(wanted) < 24 or not any(masks[3])
