"""`plot_features.py`: its numbers against slow references, its axes, its picture and its command line."""

import json
import math
import sys
from itertools import combinations

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
import robustness
import utils
from evaluation import trials
from plot_features import Config
from prototype_conformity import PrototypeConformityLoss
from resnet_model import resnet

CPU = torch.device("cpu")
PIXELS = {"dataset": "synthetic", "limit": 40, "num_steps": 2, "batch_size": 16, "device": "cpu"}


def checkpoint(path, script, layers=(), weights=(1.0, 1e-4), **network):
    """A small network with random weights and, at `layers`, prototypes; returns the path as text."""
    torch.manual_seed(len(layers))
    model = resnet(num_classes=10, depth=8, **network)
    criterion = PrototypeConformityLoss(10, {layer: model.feat_dims[layer] for layer in layers}, *weights)
    state = {
        "script": script,
        "config": {"weight_prox": weights[0], "weight_conprox": weights[1]},
        "state_dict": model.state_dict(),
        "criterion": criterion.state_dict(),
    }
    checkpoints.save(state, path)
    return str(path)


def target_of(path, dataset):
    return evaluation.load_target(path, CPU, dataset.classes)


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
    assert plot_features.overlap(features, labels, features) == pytest.approx(100 * wrong / count)


def test_numbers_of_classes_far_apart_and_of_an_attack_that_swaps_them():
    labels = torch.arange(20) % 2
    features = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 100
    features[:, 0] += 10.0 * labels
    swapped = features.clone()
    swapped[:, 0] += 10.0 - 20.0 * labels
    right = torch.ones(20, dtype=torch.bool)
    rows = {"clean": plot_features.Cloud(features, right), "attacked": plot_features.Cloud(swapped, ~right)}
    points = {name: cloud.features[:, :2] for name, cloud in rows.items()}
    numbers = plot_features.measure(rows, points, labels)
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


@pytest.mark.parametrize(
    ("layer", "width", "weights", "kind"),
    [
        ("layer2", {"aux_dim": 2}, (1.0, 1e-4), "proximity"),
        ("fc", {"fc_dim": 2}, (1.0, 0.0), "proximity"),
        ("fc", {"fc_dim": 2}, (0.0, 1.0), "contrastive"),
    ],
)
def test_two_units_are_drawn_as_they_are(layer, width, weights, kind, tmp_path, dataset):
    """With the prototypes that they were pulled to, or else pushed from."""
    path = checkpoint(tmp_path / "two.pth.tar", "pcl_training", (layer,), weights, **width)
    target = target_of(path, dataset)
    column = plot_features.make_column(Config(**PIXELS, layer=layer), target, dataset)
    with torch.no_grad():
        features = getattr(target.model(data.to_float(dataset.test.images)), layer)
    torch.testing.assert_close(column.points["clean"].float(), features, rtol=1e-4, atol=1e-5)
    assert column.numbers["clean"]["shown"] == pytest.approx(100)
    centers = checkpoints.load(path)["criterion"][f"{kind}.{layer}.centers"]
    assert torch.equal(column.prototypes.float(), centers)


# ---------------------------------------------------------------- features and picture


@pytest.mark.parametrize("layer", plot_features.LAYERS)
def test_features_are_the_networks_in_the_order_of_the_split(layer, trained, dataset):
    target = target_of(trained[0], dataset)
    rows = plot_features.collect(Config(**PIXELS, layer=layer, epsilon=0.0), target, dataset.test)
    with torch.no_grad():
        outputs = target.model(data.to_float(dataset.test.images))
    features = rows["clean"].features.float()
    torch.testing.assert_close(features, getattr(outputs, layer), rtol=1e-4, atol=1e-5)
    assert torch.equal(rows["clean"].correct, outputs.logits.argmax(1) == dataset.test.labels)
    assert torch.equal(rows["attacked"].features, rows["clean"].features)  # epsilon 0 changes nothing


@pytest.mark.parametrize("attack", plot_features.ATTACKS)
def test_the_attacked_images_are_those_of_robustness_whatever_the_blocks(attack, trained, dataset, tmp_path):
    """Their features are those of the images that an evaluation with the same settings and seed keeps."""
    target, split = (
        target_of(trained[0], dataset),
        data.Split(dataset.test.images[:7], dataset.test.labels[:7]),
    )
    options = {"epsilon": 4 / 255, "num_steps": 2, "random_start": True, "seed": 3}
    trial = trials.make(attack, robustness.Config(**options, apgd_steps=2))
    evaluated = evaluation.measure(
        target, split, trial, evaluation.Outcome(), batch_size=7, seed=3, keep_in=tmp_path / "kept"
    )
    list(evaluated)
    kept = torch.load(tmp_path / "kept" / "00000.pt", weights_only=True)
    assert 1 / 255 < (kept["adversarial"] - kept["images"]).abs().max() <= 4 / 255
    with torch.no_grad():
        features = target.model(kept["adversarial"]).fc.double()
    config = Config(**{**PIXELS, **options, "batch_size": 3}, attack=attack)
    found = plot_features.collect(config, target, split)["attacked"].features
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)


def test_each_dot_has_the_place_and_the_colour_of_its_image(trained, dataset):
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    from matplotlib.colors import to_hex

    config = Config(**PIXELS, checkpoints=trained)
    targets = [target_of(path, dataset) for path in trained]
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
    target = target_of(trained[1], dataset)
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


# ---------------------------------------------------------------- the command line


def options(config):
    """The command line of a dict of options."""
    words = []
    for name, value in config.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def test_the_command_writes_picture_and_numbers(trained, dataset, tmp_path, capsys):
    Image = pytest.importorskip("matplotlib.image")
    picture = tmp_path / "made for it" / "figure.png"
    words = options({**PIXELS, "checkpoints": trained, "picture": picture})
    plot_features.main(cli.parse_config(Config, words))
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
        logits = target_of(path, dataset).logits(data.to_float(dataset.test.images))
        right = (logits.argmax(1) == dataset.test.labels).double().mean().item()
        assert entry["clean"]["accuracy"] == pytest.approx(100 * right)
        for name in ("within", "between", "overlap"):
            assert f"{entry['attacked'][name]:.4g}" in printed


def test_two_checkpoints_of_one_kind_are_told_apart_by_their_files(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib.image")
    other = checkpoint(tmp_path / "other.pth.tar", "softmax_training", fc_dim=512)
    words = options({**PIXELS, "checkpoints": (trained[0], other), "picture": tmp_path / "two.png"})
    plot_features.main(cli.parse_config(Config, words))
    report, said = json.loads((tmp_path / "two.json").read_text()), capsys.readouterr().out
    for entry, file in zip(report["checkpoints"], ("softmax", "other"), strict=True):
        assert entry["label"] == f"Softmax ({file})" and f"| {entry['label']} " in said


def test_without_matplotlib_the_numbers_are_written_and_the_message_says_what_to_install(
    trained, tmp_path, monkeypatch
):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    config = Config(**PIXELS, checkpoints=trained[:1], picture=str(tmp_path / "features.png"))
    with pytest.raises(utils.UsageError, match="pip install matplotlib; the numbers are written"):
        plot_features.main(config)
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
    target = target_of(path, dataset)
    with pytest.raises(utils.CheckpointError, match=r"huge\.pth\.tar.*scores"):
        plot_features.collect(Config(**PIXELS, epsilon=0.0), target, dataset.test)
