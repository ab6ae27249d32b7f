"""`plot_features.py`: its numbers against slow references, its axes, its picture and its command line."""

import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
import cli
import data
import evaluation
import plot_features
import training
import utils
from plot_features import Config
from resnet_model import resnet

ROOT = Path(__file__).resolve().parent.parent
PIXELS = {"dataset": "synthetic", "limit": 40, "num_steps": 2, "batch_size": 16, "device": "cpu"}


def checkpoint(path, script, layers=(), **network):
    """A small network with random weights and, at `layers`, prototypes; returns the path as text."""
    torch.manual_seed(len(layers))
    model = resnet(num_classes=10, depth=8, **network)
    centers = {f"proximity.{layer}.centers": torch.randn(10, model.feat_dims[layer]) for layer in layers}
    state = {
        "script": script,
        "epoch": 1,
        "config": {"weight_prox": 1.0, "weight_conprox": 1e-4},
        "state_dict": model.state_dict(),
        "criterion": centers,
    }
    checkpoints.save(state, path)
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return (
        checkpoint(folder / "softmax.pth.tar", "softmax_training"),
        checkpoint(folder / "pcl.pth.tar", "pcl_training", ("layer3", "fc")),
    )


@pytest.fixture(scope="module")
def dataset():
    return data.load("synthetic", "", limit=40, splits=("test",))


# ---------------------------------------------------------------- numbers


def clouds(seed, count, width, classes, offset=0.0):
    """Features float64 count x width around `offset`, and labels of which some class may lack images."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=generator, dtype=torch.float64) + offset
    return features, torch.randint(classes, (count,), generator=generator)


def slow_pair_distances(features, labels):
    rows, sums, counts = features.tolist(), {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for i, j in combinations(range(len(rows)), 2):
        same = labels[i].item() == labels[j].item()
        sums[same] += math.dist(rows[i], rows[j])
        counts[same] += 1
    return tuple(sums[same] / counts[same] if counts[same] else None for same in (True, False))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 23),
    width=st.integers(1, 6),
    classes=st.integers(1, 5),
    offset=st.sampled_from([0.0, -3.0, 1e4]),
    block=st.sampled_from([1, 7, 1024]),
)
def test_pair_distances_are_those_of_a_double_loop(seed, count, width, classes, offset, block):
    features, labels = clouds(seed, count, width, classes, offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plot_features, "BLOCK", block)
        found = plot_features.pair_distances(features, labels)
    for ours, slow in zip(found, slow_pair_distances(features, labels), strict=True):
        assert ours == (None if slow is None else pytest.approx(slow, rel=1e-6))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 5), st.integers(1, 6))
def test_overlap_counts_images_nearer_to_another_class_mean(seed, count, width, classes):
    features, labels = clouds(seed, count, width, classes)
    members = {
        c: [f for f, k in zip(features.tolist(), labels, strict=True) if k == c] for c in range(classes)
    }
    means = {c: [math.fsum(x) / len(m) for x in zip(*m, strict=True)] for c, m in members.items() if m}
    nearest = [min(means, key=lambda c, f=f: math.dist(f, means[c])) for f in features.tolist()]
    wrong = sum(near != label for near, label in zip(nearest, labels.tolist(), strict=True))
    ours = plot_features.class_means(features, labels, classes)
    assert plot_features.overlap(features, labels, ours) == pytest.approx(100 * wrong / count)


def test_numbers_of_classes_far_apart_and_of_an_attack_that_swaps_them():
    labels = torch.arange(20) % 2
    features = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 100
    features[:, 0] += 10.0 * labels
    swapped = features.clone()
    swapped[:, 0] += 10.0 - 20.0 * labels
    right = torch.ones(20, dtype=torch.bool)
    rows = {"clean": plot_features.Cloud(features, right), "attacked": plot_features.Cloud(swapped, ~right)}
    numbers = plot_features.measure(rows, labels, 2)
    assert numbers["clean"]["overlap"] == 0 and numbers["attacked"]["overlap"] == 100
    assert numbers["clean"]["accuracy"] == 100 and numbers["attacked"]["accuracy"] == 0
    assert numbers["clean"]["moved"] == 0 and numbers["attacked"]["moved"] == pytest.approx(10)
    for name in rows:  # a swap of labels' places changes no distance between images
        assert numbers[name]["between"] == pytest.approx(10, rel=1e-3)
        assert numbers[name]["ratio"] == numbers[name]["within"] / numbers[name]["between"] < 0.01


# ---------------------------------------------------------------- axes


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(3, 9))
def test_axes_are_orthonormal_and_hold_the_two_largest_singular_values(seed, count, width):
    features, _ = clouds(seed, count, width, 1, offset=2.0)
    features = features * torch.linspace(1, 3, width, dtype=torch.float64)
    origin, axes = plot_features.principal_axes(features)
    torch.testing.assert_close(axes @ axes.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-10)
    centred = features.numpy() - features.numpy().mean(0)
    largest = numpy.pad(numpy.linalg.svd(centred, compute_uv=False), (0, 2))[:2]
    points = plot_features.project(features, origin, axes)
    numpy.testing.assert_allclose(points.norm(dim=0), largest, atol=1e-6)
    expected = 100 * (largest**2).sum() / (centred**2).sum() if count > 1 else None
    assert plot_features.shown(features, points) == (None if expected is None else pytest.approx(expected))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 12), st.integers(3, 9))
def test_the_sign_of_an_axis_hangs_on_nothing_but_the_axis(seed, count, width):
    features, _ = clouds(seed, count, width, 1)
    features = features * torch.linspace(1, 9, width, dtype=torch.float64)
    axes = plot_features.principal_axes(features)[1]
    assert (axes.gather(1, axes.abs().argmax(1, keepdim=True)) > 0).all()
    for same in (-features, features.flip(0), features + 5.0, features.float()):
        torch.testing.assert_close(plot_features.principal_axes(same)[1], axes, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("layer", "width"), [("layer2", {"aux_dim": 2}), ("fc", {"fc_dim": 2})])
def test_two_units_are_drawn_as_they_are(layer, width, tmp_path, dataset):
    path = checkpoint(tmp_path / "two.pth.tar", "pcl_training", (layer,), **width)
    config = Config(**PIXELS, layer=layer, checkpoints=(path,))
    target = evaluation.load_target(path, torch.device("cpu"), dataset.classes)
    column = plot_features.make_column(config, target, dataset)
    with torch.no_grad():
        features = getattr(target.judge(data.to_float(dataset.test.images)), layer)
    torch.testing.assert_close(column.points["clean"].float(), features, rtol=1e-4, atol=1e-5)
    assert column.numbers["clean"]["shown"] == pytest.approx(100)
    assert torch.equal(
        column.prototypes.float(), checkpoints.load(path)["criterion"][f"proximity.{layer}.centers"]
    )


# ---------------------------------------------------------------- features and picture


def test_features_are_the_networks_in_the_order_of_the_split(trained, dataset):
    target = evaluation.load_target(trained[0], torch.device("cpu"), dataset.classes)
    for layer in plot_features.LAYERS:
        rows = plot_features.collect(Config(**PIXELS, layer=layer, epsilon=0.0), target, dataset.test)
        with torch.no_grad():
            outputs = target.judge(data.to_float(dataset.test.images))
        torch.testing.assert_close(
            rows["clean"].features.float(), getattr(outputs, layer), rtol=1e-4, atol=1e-5
        )
        assert torch.equal(rows["clean"].correct, outputs.logits.argmax(1) == dataset.test.labels)
        assert torch.equal(rows["attacked"].features, rows["clean"].features)  # epsilon 0 changes nothing


@pytest.mark.parametrize("attack", plot_features.ATTACKS)
def test_every_attack_stays_in_its_ball_and_moves_the_features(attack, trained, dataset):
    target = evaluation.load_target(trained[0], torch.device("cpu"), dataset.classes)
    images, labels = data.to_float(dataset.test.images[:8]), dataset.test.labels[:8]
    config = Config(**PIXELS, attack=attack, epsilon=4 / 255)
    attacked = plot_features.choose_attack(config)(target.view, images, labels, utils.generator(0, "test"))
    assert 1 / 255 < (attacked - images).abs().max() <= 4 / 255 + 1e-7
    rows = plot_features.collect(config, target, data.Split(dataset.test.images[:8], labels))
    assert (rows["attacked"].features != rows["clean"].features).any(1).all()


def test_each_dot_has_the_place_and_the_colour_of_its_image(trained, dataset):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    from matplotlib.colors import to_hex

    config = Config(**PIXELS, checkpoints=trained)
    targets = [evaluation.load_target(path, torch.device("cpu"), dataset.classes) for path in trained]
    columns = [plot_features.make_column(config, target, dataset) for target in targets]
    again = plot_features.make_column(config, targets[1], dataset)
    assert again.numbers == columns[1].numbers and torch.equal(
        again.points["attacked"], columns[1].points["attacked"]
    )
    panels = plot_features.draw(config, dataset, columns, figure_class).axes
    assert len(panels) == 4
    where = {"clean": 0, "attacked": 2}  # panels go row by row
    for index, column in enumerate(columns):
        for name, row in where.items():
            dots, *stars = panels[row + index].collections
            drawn = {
                (*place.tolist(), to_hex(colour))
                for place, colour in zip(dots.get_offsets(), dots.get_facecolors(), strict=True)
            }
            colours = [plot_features.COLOURS[label] for label in dataset.test.labels]
            places = [tuple(point) for point in column.points[name].tolist()]
            assert drawn == {(*place, colour) for place, colour in zip(places, colours, strict=True)}
            assert len(stars) == (column.prototypes is not None) == index  # the softmax network has none
    numpy.testing.assert_array_equal(stars[0].get_offsets(), columns[1].prototypes)
    both_rows = [panels[index].get_xlim() + panels[index].get_ylim() for index in (0, 2)]
    assert both_rows[0] == both_rows[1]  # or the rows of a column could not be compared


def test_no_text_is_cut_off_or_covered_however_many_columns(trained, dataset):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    config = Config(**PIXELS, layer="layer3", epsilon=0.0)
    target = evaluation.load_target(trained[1], torch.device("cpu"), dataset.classes)
    column = plot_features.make_column(config, target, dataset)
    for count in (1, 2, 4):
        figure = plot_features.draw(config, dataset, [column] * count, figure_class)
        figure.draw_without_rendering()
        upper, lower = figure.axes[0], figure.axes[count]
        texts = [
            text for panel in figure.axes for text in (panel.title, panel.xaxis.label, panel.yaxis.label)
        ]
        for part in [*texts, *figure.legends]:
            box, page = part.get_window_extent(), figure.bbox
            assert page.x0 <= box.x0 <= box.x1 <= page.x1 and page.y0 <= box.y0 <= box.y1 <= page.y1
        assert lower.title.get_window_extent().y1 < upper.xaxis.label.get_window_extent().y0
        assert figure.legends[0].get_window_extent().y1 < lower.xaxis.label.get_window_extent().y0


def test_colours_are_told_apart():
    pytest.importorskip("matplotlib")
    for count in (2, 10, 11, 100):
        assert len(set(plot_features.palette(count))) == count


# ---------------------------------------------------------------- the command line


def options(config):
    """The command line of a dict of options."""
    words = []
    for name, value in config.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def run(*words, cwd, path=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, str(ROOT / "plot_features.py"), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def test_the_command_writes_picture_and_numbers(trained, dataset, tmp_path, capsys):
    Image = pytest.importorskip("matplotlib.image")
    picture = tmp_path / "made for it" / "figure.png"
    words = options({**PIXELS, "checkpoints": trained, "picture": picture})
    config = cli.parse_config(Config, words, {"attack": plot_features.ATTACKS, "layer": plot_features.LAYERS})
    plot_features.main(config)
    pixels = Image.imread(picture)
    height, width, _ = pixels.shape
    assert width > 1000 and height > 1000
    assert (pixels[0, :, :3] == 1).all() and (pixels[..., :3] < 0.9).any()  # something on a white page
    report = json.loads(picture.with_suffix(".json").read_text())
    printed = capsys.readouterr().out
    assert [entry["label"] for entry in report["checkpoints"]] == ["Softmax", "PCL"]
    assert [entry["prototypes"] for entry in report["checkpoints"]] == [False, True]
    assert report["settings"]["seed"] == 0 and report["settings"]["attack"] == "pgd"
    for path, entry in zip(trained, report["checkpoints"], strict=True):
        model = evaluation.load_target(path, torch.device("cpu"), dataset.classes).judge
        assert entry["clean"]["accuracy"] == pytest.approx(training.accuracy(model, dataset.test))
        for name in ("within", "between", "overlap"):
            assert f"{entry['attacked'][name]:.4g}" in printed


def test_without_matplotlib_the_numbers_are_written_and_the_message_says_what_to_install(trained, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "matplotlib.py").write_text("raise ImportError('not here')\n")
    done = run(*options({**PIXELS, "checkpoints": trained[:1]}), cwd=tmp_path, path=blocked)
    assert done.returncode == 2, done.stderr
    assert "pip install matplotlib" in done.stderr and done.stderr.count("\n") == 1
    report = json.loads((tmp_path / "features.json").read_text())
    assert report["checkpoints"][0]["clean"]["within"] > 0
    assert not (tmp_path / "features.png").exists()


def test_bad_options_are_refused_before_any_work(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda *_, **__: pytest.fail("data were read"))
    with pytest.raises(utils.UsageError, match=r"\.png, \.pdf, \.svg"):
        plot_features.main(Config(checkpoints=trained, picture="features.json"))
    with pytest.raises(utils.CheckpointError, match="softmax_training"):
        plot_features.main(Config())
    with pytest.raises(utils.CheckpointError, match="no such file"):
        plot_features.main(Config(checkpoints=("nowhere.pth.tar",), device="cpu"))
    for name, value in (("attack", "cw"), ("layer", "layer4")):
        with pytest.raises(utils.UsageError, match=f"--{name}"):
            cli.parse_config(Config, [f"--{name}", value])


def test_features_that_are_no_numbers_are_named(trained, dataset, tmp_path):
    state = checkpoints.load(trained[0])
    state["state_dict"]["fc.weight"] = torch.full_like(state["state_dict"]["fc.weight"], 3e38)
    path = tmp_path / "huge.pth.tar"
    checkpoints.save(state, path)
    target = evaluation.load_target(path, torch.device("cpu"), dataset.classes)
    with pytest.raises(utils.DivergenceError, match=r"huge\.pth\.tar.*fc"):
        plot_features.collect(Config(**PIXELS, epsilon=0.0), target, dataset.test)
