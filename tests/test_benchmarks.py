"""The benchmark compares equals: plain and ours compute the same, on the same weights and images."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attacks
import cli
import data
import pcl_training
import softmax_training
import training
import utils
from benchmarks import plain, throughput
from contrastive_proximity import ContrastiveProximity
from proximity import Proximity

TINY = throughput.Config(
    images=8,
    attack_images=4,
    batch_size=4,
    depth=8,
    num_steps=2,
    repetitions=1,
    workers=0,
    precision="float32",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject():
    return throughput.make_subject(TINY, CPU)


# ---- losses and steps


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 6), classes=st.integers(2, 5), width=st.integers(1, 7), seed=st.integers(0, 999))
def test_the_distances_and_their_gradients_are_those_of_the_modules(size, classes, width, seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (size,), generator=draw)
    for function, module in (
        (plain.proximity, Proximity(classes, width)),
        (plain.contrastive_proximity, ContrastiveProximity(classes, width)),
    ):
        features = torch.randn(size, width, generator=draw).requires_grad_()
        inputs = (features, module.centers)
        expected = module(features, labels)
        value = function(features, labels, module.centers)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("row", ["stage1", "stage2"])
def test_two_steps_leave_the_same_weights_and_prototypes(subject, row):
    run = throughput.our_run(subject, row, subject.train)
    assert run.dtype == torch.float32
    recipe = throughput.SCRIPTS[row].Config()
    model = subject.model().train()
    optimizer = torch.optim.SGD(
        model.parameters(), throughput.LR, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    terms, pairs = [], {}
    if row == "stage2":
        pairs = {
            layer: (run.criterion.proximity[layer].centers, run.criterion.contrastive[layer].centers)
            for layer in recipe.layers
        }
        terms = plain.make_terms(pairs, recipe)
    drawn = [centers.detach().clone() for pair in pairs.values() for centers in pair]
    images, labels = data.to_float(subject.train.images), subject.train.labels
    run.model.train()
    for _ in range(2):
        loss = plain.step(model, optimizer, terms, images, labels)
        before = run.sums.get("loss", torch.zeros(()))
        run.step(images, labels)
        assert loss == pytest.approx((run.sums["loss"] - before).item() / len(labels), rel=1e-4)

    moved = 0.0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, run.model.state_dict()[name], rtol=1e-3, atol=1e-5)
        moved = max(moved, (value.double() - subject.weights[name].double()).abs().max().item())
    assert moved > 1e-4
    for term, mine, start in zip(terms, (c for pair in pairs.values() for c in pair), drawn, strict=True):
        torch.testing.assert_close(term.centers, mine, rtol=1e-4, atol=1e-5)
        assert not torch.equal(term.centers, start)


def test_both_sides_take_the_recipes_of_the_scripts(subject):
    for row, script in (("stage1", softmax_training), ("stage2", pcl_training)):
        run, recipe = throughput.our_run(subject, row, subject.train), script.Config()
        theirs = throughput.plainly(subject, row).args[2].param_groups[0]
        for name in ("momentum", "weight_decay"):
            assert run.optimizer.param_groups[0][name] == theirs[name] == getattr(recipe, name)
        assert run.optimizer.param_groups[0]["lr"] == theirs["lr"]
        assert (run.adversary is None) and isinstance(run, training.Run)


# ---- attacks


def attack_pairs(model, images, labels):
    """Name, plain result and ours of each attack, with the same settings."""
    epsilon, steps = 8 / 255, 3
    step_size = 2 / 255
    yield "fgsm", plain.fgsm(model, images, labels, epsilon), attacks.fgsm(model, images, labels, epsilon)
    yield (
        "bim",
        plain.bim(model, images, labels, epsilon, steps),
        attacks.bim(model, images, labels, epsilon, num_steps=steps),
    )
    yield (
        "mim",
        plain.mim(model, images, labels, epsilon, steps),
        attacks.mim(model, images, labels, epsilon, num_steps=steps),
    )
    yield (
        "pgd",
        plain.pgd(model, images, labels, epsilon, step_size, steps),
        attacks.pgd(model, images, labels, epsilon, step_size=step_size, num_steps=steps),
    )


def test_the_attacks_make_the_same_images_save_for_rounding(subject):
    images, labels = data.to_float(subject.test.images), subject.test.labels
    for dtype, share in ((torch.float64, 1.0), (torch.float32, 0.999)):  # of pixels that must agree
        model = subject.model().eval().to(dtype)
        for name, theirs, mine in attack_pairs(model, images.to(dtype), labels):
            agree = ((theirs - mine).abs() < 1e-6).double().mean().item()
            assert agree >= share, f"{name} in {dtype}: {agree}"
            assert (mine - images).abs().max() > 0.5 / 255


def test_plain_attacks_fill_the_gradients_of_the_parameters_and_ours_do_not(subject):
    images, labels = data.to_float(subject.test.images), subject.test.labels
    model = subject.model().eval()
    attacks.fgsm(model.logits, images, labels, 8 / 255)
    assert all(parameter.grad is None for parameter in model.parameters())
    plain.fgsm(model, images, labels, 8 / 255)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_random_start_stays_in_the_ball(subject):
    images, labels = data.to_float(subject.test.images), subject.test.labels
    points = plain.pgd(subject.model().eval(), images, labels, 8 / 255, 2 / 255, 2, random_start=True)
    assert (points - images).abs().max() <= 8 / 255 + 1e-6
    assert points.min() >= 0 and points.max() <= 1


# ---- data


def test_the_loader_gives_the_images_that_ours_gives_with_and_without_workers(subject):
    for workers in (0, 1):
        loader = plain.loader(subject.test, 3, augment=False, workers=workers)
        for _ in range(2):
            batches = list(loader)
            assert [len(labels) for _, labels in batches] == [3, 1]
            images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
            assert torch.equal(images, data.to_float(subject.test.images))
            assert torch.equal(labels, subject.test.labels)


def test_the_loader_augments_as_ours_does(subject):
    split = data.Split(subject.train.images, torch.arange(len(subject.train)))
    frame = torch.nn.functional.pad(data.to_float(split.images), (4, 4, 4, 4))
    (batch,) = plain.loader(split, len(split), augment=True, workers=0)
    assert sorted(batch[1].tolist()) == list(range(len(split)))
    for image, index in zip(*batch, strict=True):
        crops = frame[index].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert any(torch.equal(image, crop) for crop in (*crops, *crops.flip(-1)))


def test_noise_is_labelled_by_the_network_and_keyed_by_the_seed(subject):
    with torch.no_grad():
        scores = subject.model().eval().logits(data.to_float(subject.test.images))
    assert torch.equal(scores.argmax(1), subject.test.labels) and scores.isfinite().all()
    again = throughput.make_subject(TINY, CPU)
    assert torch.equal(again.test.images, subject.test.images)
    assert all(torch.equal(again.weights[name], value) for name, value in subject.weights.items())
    other = throughput.make_subject(dataclasses.replace(TINY, seed=1), CPU)
    assert not torch.equal(other.test.images, subject.test.images)


# ---- measuring and reporting


def test_the_peak_of_memory_counts_what_was_given_back():
    def epoch():
        return float(torch.ones(2**24).sum())  # 64 MiB, gone when it returns

    for _ in range(2):
        result, peak = throughput.with_peak(epoch, CPU)
        assert result == 2**24
        assert peak is None or 60 < peak < 200


def test_the_time_of_an_epoch_is_that_of_the_epoch():
    assert 0.05 <= throughput.timed(lambda: __import__("time").sleep(0.05), CPU) < 5


def test_every_row_is_measured_on_both_sides_and_written(tmp_path, capsys):
    path = tmp_path / "a b" / "speed.json"
    sizes = {"images": 4, "attack_images": 2, "batch_size": 2, "num_steps": 1}
    throughput.main(dataclasses.replace(TINY, device="cpu", results=str(path), **sizes))
    report, text = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert [entry["row"] for entry in report["rows"]] == list(throughput.ROWS)
    for entry in report["rows"]:
        ratio = entry["plain"]["median"] / entry["ours"]["median"]
        assert entry["ratio"] == pytest.approx(ratio) and f"{ratio:.2f}" in text
        assert entry["images"] == (4 if entry["row"] in ("data", "stage1", "stage2") else 2)
        assert "same_outcome" not in entry  # of fresh weights it would tell nothing
    seconds = {entry["row"]: entry["ours"]["median"] for entry in report["rows"]}
    assert report["data_share_percent"] == pytest.approx(100 * seconds["data"] / seconds["stage1"])
    assert report["versions"]["torch"] == torch.__version__ and report["hardware"]["cores"] >= 1


def test_of_trained_weights_it_tells_how_many_outcomes_are_the_same(subject, tmp_path):
    weights = tmp_path / "weights.pth.tar"
    torch.save({"state_dict": subject.weights}, weights)
    sizes = {"attack_images": 3, "rows": ("mim",), "init_from": str(weights)}
    throughput.main(dataclasses.replace(TINY, device="cpu", results=str(tmp_path / "speed.json"), **sizes))
    (entry,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert entry["same_outcome"] == 3 and "3 of 3" in (tmp_path / "speed.md").read_text()


def test_the_sides_take_turns_and_the_median_counts(monkeypatch):
    order, clock = [], iter(range(1000))
    monkeypatch.setattr(throughput, "plainly", lambda *_: lambda: order.append("plain"))
    monkeypatch.setattr(throughput, "ours", lambda *_: lambda: order.append("ours"))
    monkeypatch.setattr(throughput, "timed", lambda epoch, _: (epoch(), [6, 2, 1, 10, 9, 3][next(clock)])[1])
    config = dataclasses.replace(TINY, repetitions=3)
    entry = throughput.compare(throughput.Subject(config, CPU, {}, {}, (), None, None), "stage1")
    assert order == ["plain", "ours"] + ["plain", "ours", "ours", "plain", "plain", "ours"]
    assert entry["plain"]["seconds"] == [6, 10, 9] and entry["ours"]["seconds"] == [2, 1, 3]
    assert entry["plain"]["median"] == 9 and entry["ours"]["median"] == 2
    assert entry["ours"]["images_per_second"] == config.images / 2
    assert entry["ratios"] == [3, 10, 3] and entry["ratio"] == 3


def test_scaling_measures_every_value_of_every_knob(tmp_path, capsys):
    path = tmp_path / "growth.json"
    lists = {"batch_sizes": (2,), "depths": (8,), "steps": (1, 2), "epoch_sizes": (4,)}
    throughput.main(dataclasses.replace(TINY, scaling=True, device="cpu", results=str(path), **lists))
    entries = json.loads(path.read_text())["scaling"]
    knobs = {"batch_size": (2,), "depth": (8,), "num_steps": (1, 2), "images": (4,)}
    assert [(e["knob"], e["value"]) for e in entries] == [(k, v) for k, vs in knobs.items() for v in vs]
    assert all(entry["median"] > 0 for entry in entries)
    assert "num_steps (pgd)" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rows", "stage3"], "stage1"),
        (["--images", "0"], "--images 0"),
        (["--repetitions", "0"], "--repetitions 0"),
        (["--workers", "-1"], "--workers -1"),
        (["--steps", "1", "0"], "--steps"),
        (["--results", "speed.md"], "speed.md"),
        (["--scaling", "--init-from", "a.pth.tar"], "--init-from"),
    ],
)
def test_a_bad_option_is_named(options, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(utils.UsageError, match=named):
        throughput.main(cli.parse_config(throughput.Config, options))
