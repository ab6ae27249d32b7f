"""The attack unit test: it tells attacks that work from those that do not, on read-outs made for it."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import small_net
from torch import nn

import data
import evaluation
import robustness
from evaluation import checks, readouts

EPSILON = 8 / 255
CONFIG = robustness.Config(attacks=("fgsm", "pgd", "pgd-margin"), batch_size=50)


class Changed(nn.Module):
    """A network whose logits are changed by a function."""

    def __init__(self, network, change):
        super().__init__()
        self.network, self.change = network, change

    def forward(self, images):
        return self.change(self.network(images))


class Rounded(nn.Module):
    """A network whose input is rounded to 64 levels, through which no gradient comes."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network((63 * images).round() / 63)


def split(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return data.Split(images, torch.zeros(count, dtype=torch.long))


def found_on(network, count=8, **changes):
    target = evaluation.Target("net", "0", network, network)
    return readouts.search(target, split(count), dataclasses.replace(CONFIG, **changes))


@pytest.fixture(scope="module")
def net():
    return small_net().requires_grad_(False)


# ---------------------------------------------------------------- the read-out


@pytest.mark.parametrize(("points", "width"), [(300, 20), (100, 250)])
def test_a_read_out_tells_the_corner_from_all_other_points(points, width):
    generator = torch.Generator().manual_seed(0)
    features = 5 + 0.01 * torch.randn(points, width, generator=generator, dtype=torch.float64)
    features[-1] = 5 + 3 * (features[-1] - 5)
    weights, bias = readouts.separate(features, 7.0)
    scores = features @ weights + bias
    assert (scores[:-1] < 0).all() and scores[-1] > 0
    assert (scores.max() - scores.min()).item() == pytest.approx(7)
    inner = scores[:-1].max()
    assert (-inner / (scores[-1] - inner)).item() == pytest.approx(0.999)
    scaled = (features - features.mean(0)) / features.std(0)
    wanted = np.eye(points)[-1] - 1 / points
    direction = np.linalg.lstsq(scaled.numpy(), wanted, rcond=None)[0] / features.std(0).numpy()
    assert np.corrcoef(features.numpy() @ direction, scores.numpy())[0, 1] > 0.9999


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_a_feature_does_not_matter(factor):
    features = torch.randn(60, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features[-1] *= 4
    changed = features.clone()
    changed[:, 3] *= factor
    changed = torch.cat([changed, torch.ones(60, 1, dtype=torch.float64)], dim=1)  # and one that is constant
    (weights, bias), (others, offset) = readouts.separate(features, 1.0), readouts.separate(changed, 1.0)
    assert torch.allclose(features @ weights + bias, changed @ others + offset, atol=1e-6)


def test_a_corner_among_the_others_has_none():
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    features[-1] = features[:-1].mean(0) + 0.01
    assert readouts.separate(features, 1.0) is None
    assert readouts.separate(torch.ones(50, 3, dtype=torch.float64), 1.0) is None


def test_the_features_are_what_the_last_linear_layer_gets(net):
    images = data.to_float(split(3).images)
    features, logits = readouts.last_features(net, images)
    assert torch.equal(net[-1](features), logits) and torch.equal(logits, net(images))
    assert not any(layer._forward_pre_hooks for layer in net.modules())
    no_linear = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())
    features, logits = readouts.last_features(no_linear, images)
    assert torch.equal(features, logits)


def test_the_image_is_right_and_the_corner_adversarial(net):
    image = data.to_float(split(1).images)
    fit, points = readouts.read_out(net, image, EPSILON, torch.Generator().manual_seed(0), 100)
    assert points == readouts.INNER[0]
    network = readouts.ReadOuts(net, *fit)
    generator = torch.Generator().manual_seed(5)
    inside = image + 0.5 * EPSILON * (2 * torch.rand(500, 3, 8, 8, generator=generator) - 1)
    assert (network(torch.cat([image, inside.clamp(0, 1)])).argmax(1) == 0).all()
    own = readouts.last_features(net, inside)[1]
    assert network(image).diff().abs().item() < 3 * (own.max() - own.min()).item()


# ---------------------------------------------------------------- attacks that work, and that do not


def test_attacks_find_them_on_a_plain_network(net):
    found = found_on(net)
    assert found.images == 8 and found.inner == {999: 8}
    assert found.attacks["pgd"] == found.attacks["pgd-margin"] == 100
    assert max(found.surface, found.corners) < 100
    assert checks.guaranteed(found).status == "PASS"


def test_saturated_logits_hide_them_from_cross_entropy_alone(net):
    found = found_on(Changed(net, lambda logits: 5e4 * logits))
    assert found.attacks["pgd"] == 0 and found.attacks["pgd-margin"] == 100
    finding = checks.guaranteed(found)
    assert finding.status == "FAIL" and ": FGSM 0 %, PGD 0 %, PGD margin 100 %," in finding.seen


@pytest.mark.parametrize("changes", [{"step_size": 1e-5}, {"num_steps": 1, "step_size": 1e-4}])
def test_an_attack_that_goes_nowhere_fails(net, changes):
    found = found_on(net, attacks=("pgd",), **changes)
    assert found.attacks["pgd"] == 0 and checks.guaranteed(found).status == "FAIL"


def test_without_a_gradient_they_are_missed(net):
    found = found_on(Rounded(net), attacks=("pgd-margin",))
    assert found.images and max(found.attacks.values()) < 50


def test_the_size_of_a_batch_changes_nothing(net):
    one, other = found_on(net, count=5), found_on(net, count=5, batch_size=2)
    assert one == other
    assert one != found_on(net, count=5, seed=1) or one.attacks["pgd"] == 100


def test_which_attacks_are_tried():
    two = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).requires_grad_(False)
    found = found_on(two, 1, attacks=("square", "bim", "cw", "pgd-dlr", "joint", "noise"))
    assert list(found.attacks) == ["bim", "pgd"]


def test_without_a_read_out_there_is_no_verdict():
    found = found_on(Changed(nn.Flatten(), lambda values: 0 * values[:, :4]), count=2)
    assert found.images == 0
    finding = checks.guaranteed(found)
    assert finding.status == "WARN" and "no verdict" in finding.seen


def test_fewer_points_where_that_many_cannot_be_told_apart():
    """Of a few colours at most: a corner that stands out among a thousand points is rare."""
    generator = torch.Generator().manual_seed(0)
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.Linear(2, 2))
    narrow[1].weight.data = torch.rand(2, 192, generator=generator)
    found = found_on(narrow.requires_grad_(False), count=20)
    assert 0 < found.images < 20 and sum(found.inner.values()) == found.images
    assert set(found.inner) & set(readouts.INNER[1:])
    assert " points)" in checks.guaranteed(found).seen


def of_50(surface=0.0, corners=0.0, **attacks):
    return readouts.Found(
        50, {999: 50}, {k.replace("_", "-"): v for k, v in attacks.items()}, surface, corners
    )


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (of_50(pgd=96.0), "PASS"),
        (of_50(pgd=94.0), "FAIL"),
        (of_50(pgd=100.0, fgsm=20.0), "PASS"),  # one step need not find them
        (of_50(pgd=100.0, bim=60.0), "FAIL"),
        (of_50(pgd=2.0, corners=90.0), "FAIL"),
        (of_50(pgd=98.0, corners=98.0), "WARN"),
        (of_50(pgd=98.0, surface=100.0), "WARN"),
        (of_50(pgd=100.0, corners=92.0), "PASS"),
    ],
)
def test_the_verdict(found, status):
    finding = checks.guaranteed(found)
    assert finding.status == status
    assert finding.seen.startswith("no verdict") == (status == "WARN")
    for share in (*found.attacks.values(), found.surface, found.corners):
        assert f" {share:.0f} %" in finding.seen


def test_the_page_says_what_was_found_on_the_committed_networks():
    """results/readouts.json: what --sanity says of each, as a row of results/README.md."""
    folder = Path(__file__).resolve().parent.parent / "results"
    networks = json.loads((folder / "readouts.json").read_text())["networks"]
    lines = (folder / "README.md").read_text().splitlines()
    rows = [re.sub(r"[*\s]", "", line).split("|")[2:-1] for line in lines if line.startswith("|")]
    for network in networks:
        shares = [*network["attacks"].values(), network["surface"], network["corners"]]
        assert [str(network["images"]), *(f"{share:.0f}" for share in shares), network["status"]] in rows
        inner = {int(number): images for number, images in network["inner"].items()}
        found = readouts.Found(inner=inner, **{n: network[n] for n in readouts.Found._fields if n != "inner"})
        finding = checks.guaranteed(found)
        assert (finding.status, finding.seen) == (network["status"], network["seen"])
    committed = {
        str(path.relative_to(folder.parent)) for path in folder.parent.glob("Models_*/*depth*.pth.tar")
    }
    assert {network["path"] for network in networks} == committed
