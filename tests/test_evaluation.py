"""What evaluation measures, held to plain arithmetic, and what a stop in the middle leaves."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import checkpoints
import data
import evaluation
import prototype_conformity
import reports
import robustness
import suite
import utils
from resnet_model import resnet

CLASSES = ("a", "b", "c", "d")
EPSILON = 8 / 255


def split_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return data.Split(images, torch.arange(count) % 4)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).requires_grad_(False).eval()


def target_of(net, name="0"):
    return evaluation.Target("net", name, net, net, path="net.pth.tar")


def config_of(**changes):
    base = {
        "attacks": ("fgsm", "pgd"), "epsilon": EPSILON, "num_steps": 3, "step_size": None, "restarts": 2,
        "random_start": True, "decay": 1.0, "apgd_steps": 5, "num_queries": 20, "cw_steps": 5, "cw_lr": 0.01,
        "batch_size": 6, "seed": 0, "predict": "softmax", "save_images": None, "results": "results.json",
    }  # fmt: skip
    return SimpleNamespace(**{**base, **changes})


def finish(target, split, trial, outcome=None, batch_size=6):
    outcome = evaluation.Outcome() if outcome is None else outcome
    for _ in evaluation.measure(target, split, trial, outcome, batch_size=batch_size, seed=0):
        pass
    return outcome


def returning(result, epsilon=EPSILON, bounded=True):
    """A trial that makes `result(images)` of the images, whatever they are."""
    attack = lambda target, images, labels, generator, trace: result(images)  # noqa: E731
    return evaluation.Trial("made", "Made", epsilon, attack, bounded=bounded)


# ---------------------------------------------------------------- measuring


@pytest.mark.parametrize("name", ["noise", "pgd", "apgd-ce", "square"])
def test_what_happens_to_an_image_does_not_depend_on_the_blocks(name):
    target, split = target_of(network()), split_of(16)
    trial = suite.make(name, config_of())
    whole, parts = (finish(target, split, trial, batch_size=size) for size in (16, 5))
    assert torch.equal(whole.predicted, parts.predicted)
    torch.testing.assert_close(whole.linf, parts.linf)
    torch.testing.assert_close(whole.margin, parts.margin)


def test_outcome_is_plain_arithmetic():
    """FGSM on a linear network by hand: accuracy, margins, distances and gradients of each image."""
    net, split = network(), split_of(16)
    weight = net[1].weight
    images = split.images.float() / 255
    logits = net(images)
    slope = (logits.softmax(1) - F.one_hot(split.labels, 4)) @ weight
    attacked = (images + EPSILON * slope.sign().view_as(images)).clamp(0, 1)
    scores = net(attacked)
    true = scores.gather(1, split.labels[:, None])[:, 0]
    others = scores.masked_fill(F.one_hot(split.labels, 4).bool(), -torch.inf).amax(1)

    outcome = finish(target_of(net), split, suite.make("fgsm", config_of()))

    assert outcome.predicted.tolist() == scores.argmax(1).tolist()
    assert outcome.correct.tolist() == (scores.argmax(1) == split.labels).tolist()
    torch.testing.assert_close(outcome.margin, true - others, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        outcome.linf, (attacked - images).abs().amax((1, 2, 3)).double(), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        outcome.l2, (attacked - images).square().sum((1, 2, 3)).sqrt(), rtol=1e-5, atol=0
    )
    assert not outcome.zero_first.any()
    assert outcome.gradients
    assert outcome.accuracy == pytest.approx(100 * (scores.argmax(1) == split.labels).double().mean().item())


@pytest.mark.parametrize("count", [12, 13, 17])
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_measure_goes_on_where_it_stopped(count, stop):
    """Whatever block it was stopped after, the last ragged one included, the outcome is that of one go."""
    target, split, trial = target_of(network()), split_of(count), suite.make("pgd", config_of())
    whole = finish(target, split, trial)
    part = evaluation.Outcome()
    blocks = evaluation.measure(target, split, trial, part, batch_size=6, seed=0)
    for _ in range(min(stop, -(-count // 6))):
        next(blocks)
    finish(target, split, trial, part)
    assert len(part) == count
    assert all(torch.equal(part.columns[name], whole.columns[name]) for name in evaluation.COLUMNS)


def test_nan_scores_are_not_right():
    class Broken(nn.Module):
        def forward(self, images):
            return torch.full((len(images), 4), torch.nan)

    outcome = finish(target_of(Broken()), split_of(8), suite.clean())
    assert not outcome.correct.any()


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda images: images * torch.nan, "NaN"),
        (lambda images: images - 1, r"left \[0, 1\]"),
        (lambda images: images.clamp(min=0.1), "beyond epsilon"),
    ],
)
def test_bad_results_are_refused(result, words):
    with pytest.raises(ValueError, match=words):
        finish(target_of(network()), split_of(8), returning(result))


def test_one_rounding_error_too_far_is_refused():
    images = torch.full((1, 3, 2, 2), 0.5)
    edge = suite.into_ball(images + 1, images, EPSILON)
    evaluation.check_result(edge, images, EPSILON)
    with pytest.raises(ValueError, match="beyond epsilon"):
        evaluation.check_result(torch.nextafter(edge, images + 1), images, EPSILON)


def test_what_no_attack_changes_must_stay():
    with pytest.raises(ValueError, match="beyond epsilon 0"):
        finish(target_of(network()), split_of(8), returning(lambda images: (images + 1e-3).clamp(0, 1), 0.0))


def test_item_29_pixels_out_of_range_are_refused_with_their_range():
    images, labels = torch.linspace(-0.5, 1.5, 192).view(1, 3, 8, 8), torch.zeros(1, dtype=torch.long)
    for spoiled, observed in ((images, r"\[-0.5, 1.5\]"), (images * torch.nan, "nan")):
        with pytest.raises(ValueError, match=observed):
            evaluation.try_block(
                target_of(network()), suite.clean(), spoiled, labels, None, evaluation.Outcome()
            )


def test_unbounded_attacks_count_for_worst_only_within_epsilon():
    """Black images fool at a distance of their own: the column counts them, Worst only within epsilon."""
    net, split = network(), split_of(40)
    trial = returning(lambda images: torch.zeros_like(images), bounded=False)
    target, progress = target_of(net), evaluation.Progress("none.json", {})
    for each in (suite.clean(), trial):
        finish(target, split, each, progress.of(target, each))
    clean = progress.of(target, suite.clean()).correct
    assert progress.of(target, trial).accuracy == 25  # a constant prediction
    assert torch.equal(reports.robust(target, [suite.clean(), trial], progress), clean)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 64).map(lambda levels: levels / 255), st.integers(0, 2**31))
def test_bounded_results_always_count_for_worst(epsilon, seed):
    """However close to the edge of the ball, what an attack within it has fooled is fooled within it."""
    generator = torch.Generator().manual_seed(seed)
    push = lambda images: suite.into_ball(  # noqa: E731
        images + torch.randn(images.shape, generator=generator).sign(), images, epsilon
    )
    outcome = finish(target_of(network()), split_of(8, seed), returning(push, epsilon))
    assert torch.equal(outcome.fooled(epsilon), ~outcome.correct)


def test_nothing_below_float32():
    """Inside, no mode that trades digits for speed is on; outside, all are as they were."""
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16), evaluation.exact_float32():
            assert not torch.backends.cudnn.allow_tf32
            assert torch.backends.cudnn.deterministic
            assert torch.get_float32_matmul_precision() == "highest"
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "medium"
        assert not torch.backends.cudnn.deterministic
    finally:
        torch.set_float32_matmul_precision("highest")


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**31))
def test_into_ball_is_within_it_exactly(epsilon, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, 4, 4, generator=generator)
    found = images + 3 * torch.randn(images.shape, generator=generator)
    near = suite.into_ball(found, images, epsilon)
    evaluation.check_result(near, images, epsilon)
    wanted = found.double().clamp(images.double() - epsilon, images.double() + epsilon).clamp(0, 1)
    assert (near.double() - wanted).abs().max() < 1e-6


# ---------------------------------------------------------------- prototypes


def joint(**options):
    torch.manual_seed(3)
    criterion = prototype_conformity.PrototypeConformityLoss(
        4, {"layer3": 64, "fc": 1024}, 0.5, 0.01, **options
    )
    distance = "squared" if options.get("squared", True) else "plain"
    config = {"weight_prox": 0.5, "weight_conprox": 0.01, "distance": distance}
    return criterion, evaluation.Prototypes(criterion.state_dict(), config)


@pytest.mark.parametrize("options", [{}, {"squared": False}, {"shared": True}])
def test_joint_loss_of_images_averages_to_the_trained_one(options):
    criterion, prototypes = joint(**options)
    outputs = resnet(4, 8).eval()(torch.rand(5, 3, 16, 16))
    labels = torch.tensor([0, 3, 1, 1, 2])
    trained, _ = criterion(outputs, labels)
    torch.testing.assert_close(prototypes.joint_loss(outputs, labels).mean(), trained)


@pytest.mark.parametrize("squared", [True, False])
def test_nearest_prototype_is_the_nearest(squared):
    criterion, prototypes = joint(squared=squared)
    outputs = resnet(4, 8).eval()(torch.rand(6, 3, 16, 16))
    centers = criterion.proximity["fc"].centers
    nearest = [min(range(4), key=lambda k: (f - centers[k]).norm().item()) for f in outputs.fc]
    assert prototypes.scores(outputs).argmax(1).tolist() == nearest


def save(path, classes=CLASSES, script="pcl_training", prototypes=True, seed=0, weights=(1.0, 1e-4)):
    """A small checkpoint of stage 2, as the scripts write it, untrained."""
    torch.manual_seed(seed)
    model = resnet(len(classes), 8)
    criterion = prototype_conformity.PrototypeConformityLoss(
        len(classes), {"layer3": 64, "fc": 1024}, *weights
    )
    state = {"script": script, "classes": list(classes), "epoch": 1, "state_dict": model.state_dict()}
    state["config"] = {"weight_prox": weights[0], "weight_conprox": weights[1], "distance": "squared"}
    state["criterion"] = criterion.state_dict() if prototypes else {}
    checkpoints.save(state, path, keep_previous=False)
    return model.eval(), criterion


@pytest.mark.parametrize(
    ("weights", "label"), [((1.0, 0.0), "PCL"), ((0.0, 1.0), "PCL"), ((0.0, 0.0), "No PCL")]
)
def test_a_control_is_not_called_pcl(weights, label, tmp_path):
    save(tmp_path / "run.pth.tar", weights=weights)
    target = evaluation.load_target(tmp_path / "run.pth.tar", torch.device("cpu"), CLASSES)
    assert target.label == label


def test_eq_5_as_printed_is_told_from_the_released_form(tmp_path):
    path = tmp_path / "run.pth.tar"
    save(path)
    state = checkpoints.load(path)
    for shared, label in ((False, "PCL"), (True, "PCL by Eq. 5")):
        config = {**state["config"], "shared_prototypes": shared, "separation": True}
        checkpoints.save({**state, "config": config}, path, keep_previous=False)
        assert evaluation.load_target(path, torch.device("cpu"), CLASSES).label == label


def test_settings_of_another_kind_are_none_of_ours(tmp_path):
    save(tmp_path / "run.pth.tar")
    state = checkpoints.load(tmp_path / "run.pth.tar")
    checkpoints.save({**state, "config": "lr 0.1"}, tmp_path / "run.pth.tar", keep_previous=False)
    target = evaluation.load_target(tmp_path / "run.pth.tar", torch.device("cpu"), CLASSES)
    assert target.label == "PCL" and "config" not in target.origin


def test_prototype_prediction_of_a_checkpoint(tmp_path):
    """Judge and view predict the nearest prototype, and agree with each other."""
    model, criterion = save(tmp_path / "pcl.pth.tar")
    target = evaluation.load_target(tmp_path / "pcl.pth.tar", torch.device("cpu"), CLASSES, "prototype")
    images = torch.rand(6, 3, 16, 16)
    distances = torch.stack(
        [(model(images).fc - center).square().sum(1) for center in criterion.proximity["fc"].centers], dim=1
    )
    torch.testing.assert_close(target.logits(images), -distances, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(target.view(images).logits, -distances, rtol=1e-4, atol=1e-3)
    assert target.judge(images).fc.shape == (6, 1024)


def test_prototypes_that_are_not_there(tmp_path):
    save(tmp_path / "plain.pth.tar", prototypes=False)
    with pytest.raises(utils.CheckpointError, match="no prototypes to predict with"):
        evaluation.load_target(tmp_path / "plain.pth.tar", torch.device("cpu"), CLASSES, "prototype")
    target = evaluation.load_target(tmp_path / "plain.pth.tar", torch.device("cpu"), CLASSES)
    assert not suite.make("joint", config_of()).applies_to(target)
    assert suite.make("pgd", config_of()).applies_to(target)


def test_other_class_count_is_refused(tmp_path):
    torch.manual_seed(0)
    torch.save(resnet(7, 8).state_dict(), tmp_path / "seven.pth.tar")
    with pytest.raises(utils.CheckpointError, match="7 classes, but the data set has 4"):
        evaluation.load_target(tmp_path / "seven.pth.tar", torch.device("cpu"), CLASSES)


def test_adaptive_attacks_raise_what_they_name(tmp_path):
    """One step on the joint loss and on the distances each raise their own more than noise does."""
    save(tmp_path / "pcl.pth.tar")
    target = evaluation.load_target(tmp_path / "pcl.pth.tar", torch.device("cpu"), CLASSES)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 16, 16, generator=generator)
    labels = torch.arange(6) % 4
    for name in ("joint", "prototype"):
        trial = suite.make(name, config_of(num_steps=2))
        loss = suite.loss_of(name, target)
        found = trial.attack(target, images, labels, torch.Generator(), None)
        random = (images + EPSILON * torch.randn(images.shape, generator=generator).sign()).clamp(0, 1)
        values = [loss(target.view(x), labels) for x in (images, random, found)]
        assert (values[2] > values[0]).all(), name
        assert (values[2] > values[1]).all(), name


# ---------------------------------------------------------------- progress


def dataset_of(split):
    return data.Dataset("shapes", CLASSES, None, split)


def test_stop_and_go_on_gives_the_identical_table(tmp_path):
    """A real SIGTERM in the middle of an attack: the block is finished, saved, and all ends as without it."""
    config, split, target = config_of(results=str(tmp_path / "r.json")), split_of(20), target_of(network())
    trials = suite.table(config, 4)
    whole = evaluation.Progress(config.results, {"a": 1})
    evaluation.measure_all(config, [target], split, trials, whole)

    stopped, calls = evaluation.Progress(config.results, {"a": 1}), []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return trials[2].attack(*arguments)

    broken = [*trials[:2], evaluation.dataclasses.replace(trials[2], attack=stopping)]
    with pytest.raises(utils.Interrupted, match="12 of 20 images") as caught:
        evaluation.measure_all(config, [target], split, broken, stopped)
    assert caught.value.exit_status == 143

    resumed = evaluation.Progress(config.results, {"a": 1})
    resumed.open(resume=True)
    assert len(resumed.of(target, trials[2])) == 12
    evaluation.measure_all(config, [target], split, trials, resumed)
    assert reports.to_markdown([target], trials, resumed) == reports.to_markdown([target], trials, whole)
    for trial in trials:
        one, other = whole.of(target, trial), resumed.of(target, trial)
        assert all(torch.equal(one.columns[name], other.columns[name]) for name in evaluation.COLUMNS)


def test_other_settings_are_refused(tmp_path):
    target, trial = target_of(network()), suite.clean()
    before = evaluation.Progress(tmp_path / "r.json", {"epsilon": 0.1, "seed": 0})
    finish(target, split_of(8), trial, before.of(target, trial))
    before.save()
    with pytest.raises(utils.CheckpointError, match="begun with another epsilon;"):
        evaluation.Progress(tmp_path / "r.json", {"epsilon": 0.2, "seed": 0}).open(resume=True)


def test_a_stopped_evaluation_is_not_lost_by_forgetting_to_resume(tmp_path):
    target, trial = target_of(network()), suite.clean()
    before = evaluation.Progress(tmp_path / "r.json", {"seed": 0})
    finish(target, split_of(8), trial, before.of(target, trial))
    before.save()
    again = evaluation.Progress(tmp_path / "r.json", {"seed": 0})
    with pytest.raises(utils.FileSystemError, match="--resume goes on with it, --overwrite starts anew"):
        again.open(resume=False)
    again.open(resume=False, overwrite=True)
    assert len(again.of(target, trial)) == 0
    again.open(resume=True)
    assert len(again.of(target, trial)) == 8


@pytest.mark.parametrize("attacks, free", [(("fgsm", "apgd-dlr", "square"), True), (("autoattack",), False)])
def test_blocks_may_change_in_a_stopped_evaluation_where_nothing_depends_on_them(attacks, free):
    dataset = data.Dataset("colours", tuple("abcd"), None, split_of(8))
    prints = [
        evaluation.fingerprint(robustness.Config(attacks=attacks, batch_size=size), dataset, [])
        for size in (5, 7)
    ]
    assert (prints[0] == prints[1]) == free


# ---------------------------------------------------------------- numbers of a report


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10_000), st.floats(0, 1))
def test_wilson_solves_its_equation(images, share):
    """The ends are the p with (share - p)^2 = z^2 p (1 - p) / n."""
    correct = round(share * images)
    low, high = (end / 100 for end in reports.wilson(correct, images))
    assert 0 <= low <= correct / images <= high <= 1
    for p in (low, high):
        wanted = 1.959964**2 * p * (1 - p) / images
        assert (correct / images - p) ** 2 == pytest.approx(wanted, abs=1e-9)


def test_wilson_of_a_known_case():
    low, high = reports.wilson(0, 100)
    assert low == pytest.approx(0, abs=1e-9)
    assert high == pytest.approx(3.6995, abs=1e-3)


def test_worst_is_the_intersection(tmp_path):
    config, split, target = config_of(attacks=("fgsm", "noise", "pgd")), split_of(24), target_of(network(1))
    trials, progress = suite.table(config, 4), evaluation.Progress(tmp_path / "r.json", {})
    evaluation.measure_all(config, [target], split, trials, progress)
    masks = [progress.of(target, trial).correct.tolist() for trial in trials]
    wanted = [all(values) for values in zip(*masks, strict=True)]
    assert reports.robust(target, trials, progress).tolist() == wanted
    assert 0 < sum(wanted) < 24 or not any(masks[3])


def test_accuracy_of_each_class():
    mask, labels = torch.tensor([1, 0, 1, 1, 0]).bool(), torch.tensor([0, 0, 1, 1, 3])
    assert reports.per_class(mask, labels, CLASSES) == {"a": 50.0, "b": 100.0, "c": None, "d": 0.0}


def test_json_has_no_word_for_infinity():
    """Scores beyond float32 end up as null in JSON, not as a crash after hours of measuring."""

    class Endless(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([torch.inf, 0.0, 0.0, 0.0]).expand(len(images), 4)

    trials, progress = [suite.clean()], evaluation.Progress("none.json", {})
    finish(target_of(Endless()), split_of(8), trials[0], progress.of(target_of(Endless()), trials[0]))
    dataset, config = data.Dataset("shapes", CLASSES, None, split_of(8)), robustness.Config()
    report = json.loads(reports.to_json(config, dataset, [target_of(Endless())], trials, progress))
    assert report["checkpoints"][0]["margins"]["quantiles"]["0.99"] is None
    assert report["checkpoints"][0]["attacks"]["clean"]["correct"] == 2
