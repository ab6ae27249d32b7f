"""The benchmark compares equals: plain and ours compute the same, on the same weights and images."""

import dataclasses
import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import data
import evaluation
import utils
from benchmarks import ours, plain, throughput, timing
from contrastive_proximity import ContrastiveProximity
from evaluation import trials
from proximity import Proximity

TINY = throughput.Config(
    images=8, attack_images=4, batch_size=4, depth=8, num_steps=2, repetitions=1, workers=0,
    precision="float32", device="cpu",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject():
    return ours.make_subject(TINY, CPU)


@pytest.fixture
def test_images(subject):
    return data.to_float(subject.dataset.test.images), subject.dataset.test.labels


# ---------------------------------------------------------------- losses and steps


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
        values = module(features, labels), function(features, labels, module.centers)
        torch.testing.assert_close(*values)
        gradients = (torch.autograd.grad(value, inputs) for value in values)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ["stage1", "stage2"])
def test_two_steps_leave_the_same_weights_and_prototypes(subject, row, monkeypatch):
    monkeypatch.setattr(data, "augment", lambda images, *others: images)
    subject = dataclasses.replace(subject, config=dataclasses.replace(TINY, batch_size=8))
    run, train, _ = ours.begin(subject, row)
    assert run.dtype == torch.float32
    model, _, optimizer, terms, device, attack = plain.epoch(subject, row).args
    assert attack is None
    for term in terms:
        theirs = run.criterion.proximity if term.weight > 0 else run.criterion.contrastive
        assert term.centers.shape == theirs[term.layer].centers.shape
        term.centers.data.copy_(theirs[term.layer].centers)
    drawn, losses = [term.centers.detach().clone() for term in terms], []
    run.criterion.register_forward_hook(lambda _, __, output: losses.append(output[0].item()))
    batches = [(data.to_float(subject.dataset.train.images), subject.dataset.train.labels)]
    for index in range(2):
        loss = plain.train_epoch(model, batches, optimizer, terms, device)
        train()
        assert loss == pytest.approx(losses[index], rel=1e-4)

    moved = 0.0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, run.model.state_dict()[name], rtol=1e-3, atol=1e-5)
        moved = max(moved, (value.double() - subject.weights[name].double()).abs().max().item())
    assert moved > 1e-4 and len(terms) == (4 if row == "stage2" else 0)
    for term, start in zip(terms, drawn, strict=True):
        theirs = run.criterion.proximity if term.weight > 0 else run.criterion.contrastive
        torch.testing.assert_close(term.centers, theirs[term.layer].centers, rtol=1e-4, atol=1e-5)
        assert not torch.equal(term.centers, start)


@pytest.mark.parametrize("row", ["stage1", "stage2", "stage2_fgsm", "stage2_pgd"])
def test_both_sides_take_the_recipes_of_the_scripts(subject, row):
    run, _, adversary = ours.begin(subject, row)
    recipe, (_, _, optimizer, terms, _, attack) = ours.SCRIPTS[row].Config(), plain.epoch(subject, row).args
    mine, theirs = run.optimizer.param_groups[0], optimizer.param_groups[0]
    for name in ("momentum", "weight_decay"):
        assert mine[name] == theirs[name] == getattr(recipe, name)
    assert mine["lr"] == theirs["lr"] == ours.LR
    assert (adversary is None) == (attack is None) == (row in ("stage1", "stage2"))
    assert {term.layer for term in terms} == set(getattr(recipe, "layers", ()))


# ---------------------------------------------------------------- attacks


@pytest.mark.parametrize("row", ours.EVALUATIONS)
def test_the_attacks_make_the_same_images_save_for_rounding(subject, test_images, row):
    images, labels = test_images
    recipe = dataclasses.replace(subject.recipe(row), num_steps=3)
    trial = trials.make(row, recipe)
    for dtype, share in ((torch.float64, 1.0), (torch.float32, 0.999)):  # of pixels that must agree
        model, pixels = subject.model().eval().to(dtype), images.to(dtype)
        target = evaluation.Target("", "", model, model)
        mine = trial.attack(target, pixels, labels, utils.generator(0), None)
        assert all(parameter.grad is None for parameter in model.parameters())
        theirs = plain.attack_of(row, model, recipe)(pixels, labels)
        assert all(parameter.grad is not None for parameter in model.parameters())  # as the docstring says
        agree = ((theirs - mine).abs() < 1e-6).double().mean().item()
        assert agree >= share, f"{dtype}: {agree}"
        assert (mine - images).abs().max() > 0.5 / 255


def test_a_random_start_stays_in_the_ball_and_is_not_its_middle(subject, test_images):
    images, labels = test_images
    model, ball = subject.model().eval(), {"epsilon": 8 / 255, "step_size": 1e-9, "num_steps": 1}
    points = plain.pgd(model, images, labels, **ball, random_start=True)
    assert (points - images).abs().max() <= 8 / 255 + 1e-6 and (points - images).abs().mean() > 1 / 255
    assert points.min() >= 0 and points.max() <= 1


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_gives_the_images_that_ours_gives(subject, test_images, workers):
    loader = plain.loader(subject.dataset.test, 3, augment=False, workers=workers)
    for _ in range(2):
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [3, 1]
        for column, expected in zip(zip(*batches, strict=True), test_images, strict=True):
            assert torch.equal(torch.cat(column), expected)


def test_the_loader_augments_as_ours_does(subject):
    split = data.Split(subject.dataset.train.images, torch.arange(8))
    frame = torch.nn.functional.pad(data.to_float(split.images), (4, 4, 4, 4))
    (batch,) = plain.loader(split, len(split), augment=True, workers=0)
    assert sorted(batch[1].tolist()) == list(range(len(split)))
    for image, index in zip(*batch, strict=True):
        crops = frame[index].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert any(torch.equal(image, crop) for crop in (*crops, *crops.flip(-1)))


def test_noise_is_labelled_by_the_network_and_keyed_by_the_seed(subject, test_images):
    with torch.no_grad():
        scores = subject.model().eval().logits(test_images[0])
    assert torch.equal(scores.argmax(1), test_images[1]) and scores.isfinite().all()
    again, other = (ours.make_subject(dataclasses.replace(TINY, seed=seed), CPU) for seed in (0, 1))
    assert torch.equal(again.dataset.test.images, subject.dataset.test.images)
    assert all(torch.equal(again.weights[name], value) for name, value in subject.weights.items())
    assert not torch.equal(other.dataset.test.images, subject.dataset.test.images)
    assert not torch.equal(subject.dataset.train.images[:4], subject.dataset.test.images)


# ---------------------------------------------------------------- measuring and reporting


def test_the_peak_of_memory_counts_what_was_given_back():
    def work():
        return float(torch.ones(2**23).sum())  # 32 MiB, gone when it returns

    for _ in range(2):
        result, peak = timing.with_peak(work, CPU)
        assert result == 2**23
        assert peak is None or 28 < peak < 100


def test_works_take_turns_and_the_median_counts(monkeypatch):
    order, clock = [], iter([6, 2, 1, 10, 9, 3])
    works = {"plain": lambda: order.append("plain"), "ours": lambda: order.append("ours") or "result"}
    monkeypatch.setattr(timing, "timed", lambda work, _: (work(), next(clock))[1])
    sides = timing.in_turns(works, images=8, repetitions=3, device=CPU)
    assert order == ["plain", "ours"] + ["plain", "ours", "ours", "plain", "plain", "ours"]
    (plain_side, _), (our_side, result) = sides["plain"], sides["ours"]
    assert plain_side["seconds"] == [6, 10, 9] and our_side["seconds"] == [2, 1, 3] and result == "result"
    assert plain_side["median"] == 9 and our_side["median"] == 2 and our_side["images_per_second"] == 4


def test_the_time_of_a_work_is_that_of_the_work():
    assert 0.05 <= timing.timed(lambda: time.sleep(0.05), CPU) < 5


def test_every_row_is_measured_on_both_sides_and_written(tmp_path, capsys):
    path = tmp_path / "a b" / "speed.json"
    sizes = {"images": 4, "attack_images": 2, "batch_size": 2, "num_steps": 1}
    throughput.main(dataclasses.replace(TINY, results=str(path), **sizes))
    report, text = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert [entry["row"] for entry in report["rows"]] == list(ours.ROWS)
    for entry in report["rows"]:
        assert entry["ratios"] == [entry["plain"]["median"] / entry["ours"]["median"]] == [entry["ratio"]]
        assert f"{entry['ratio']:.2f}" in text
        assert entry["images"] == (4 if entry["row"] in ("data", "stage1", "stage2") else 2)
        assert entry["batch_size"] == (1 if entry["row"].endswith(("_fgsm", "_pgd")) else 2)
        assert "same_outcome" not in entry  # of fresh weights it would tell nothing
    seconds = {entry["row"]: entry["ours"]["median"] for entry in report["rows"]}
    assert report["data_share_percent"] == pytest.approx(100 * seconds["data"] / seconds["stage1"])
    assert report["versions"]["torch"] == torch.__version__ and report["hardware"]["cores"] >= 1


@pytest.mark.parametrize("dataset", ["noise", "synthetic"])
def test_of_trained_weights_it_tells_how_many_outcomes_are_the_same(subject, tmp_path, dataset):
    weights = tmp_path / "weights.pth.tar"
    torch.save({"state_dict": subject.weights}, weights)
    sizes = {"attack_images": 3, "rows": ("mim",), "init_from": str(weights), "dataset": dataset}
    throughput.main(dataclasses.replace(TINY, results=str(tmp_path / "speed.json"), **sizes))
    (entry,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert entry["same_outcome"] == 3 and "3 of 3" in (tmp_path / "speed.md").read_text()
    assert entry["accuracy"]["plain"] == entry["accuracy"]["ours"]


def test_scaling_measures_every_value_of_every_knob(tmp_path):
    path = tmp_path / "growth.json"
    lists = {"batch_sizes": (2,), "depths": (8,), "steps": (1, 2), "epoch_sizes": (4,)}
    throughput.main(dataclasses.replace(TINY, scaling=True, results=str(path), **lists))
    entries = json.loads(path.read_text())["scaling"]
    knobs = {"batch_size": (2,), "depth": (8,), "num_steps": (1, 2), "images": (4,)}
    assert [(e["knob"], e["value"]) for e in entries] == [(k, v) for k, vs in knobs.items() for v in vs]
    assert all(entry["median"] > 0 for entry in entries)
    assert "num_steps (pgd)" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rows", "stage3"], "stage1"),
        (["--repetitions", "0"], "--repetitions 0"),
        (["--steps", "1", "0"], "--steps"),
        (["--scaling", "--init-from", "a.pth.tar"], "--init-from"),
    ],
)
def test_a_bad_option_is_named(options, named):
    with pytest.raises(utils.UsageError, match=named):
        cli.parse_config(throughput.Config, options)
