"""The checks of an evaluation: each raised by a network broken on purpose, none by a plainly trained one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import evaluation
import reports
import sanity
import suite

CLASSES = ("a", "b", "c", "d")


def pictures(count, seed):
    """Images, uint8 N x 3 x 8 x 8, of four faint patterns under noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(99)).sign()
    labels = torch.arange(count) % 4
    noise = torch.randn(count, 3, 8, 8, generator=generator)
    images = 0.5 + 0.03 * patterns[labels] + 0.1 * noise
    return data.Split((255 * images).round().clamp(0, 255).byte(), labels)


@pytest.fixture(scope="module")
def plain():
    """A small convolutional network trained on them with cross-entropy, in the ordinary way."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 4),
    )  # fmt: skip
    split = pictures(800, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(100):
        chosen = torch.arange(step * 64, step * 64 + 64) % 800
        loss = F.cross_entropy(net(data.to_float(split.images[chosen])), split.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def settings(**changes):
    base = {
        "attacks": (), "epsilon": 8 / 255, "num_steps": 10, "step_size": None, "random_start": False,
        "restarts": 1, "decay": 1.0, "num_queries": 200, "sanity_images": 80, "batch_size": 80, "seed": 0,
    }  # fmt: skip
    return SimpleNamespace(**{**base, **changes})


def findings(network, source=None, **changes):
    """The findings on a network, by name."""
    config, split = settings(**changes), pictures(120, 2)
    target = evaluation.Target("net", "0", network, network)
    origin = None if source is None else evaluation.Target("source", "1", source, source, path="source.pth")
    parts = sanity.trials(config, len(CLASSES), origin)
    progress = evaluation.Progress("nowhere.json", {})
    for trial in parts.values():
        for _ in evaluation.measure(
            target, split, trial, progress.of(target, trial), batch_size=config.batch_size, seed=0
        ):
            pass
    return {finding.name: finding for finding in sanity.check(config, target, split, parts, progress)}


def flags(found):
    return {name for name, finding in found.items() if finding.status != "PASS"}


class Scaled(nn.Module):
    """The same decisions, with logits `factor` times as large."""

    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, images):
        return self.factor * self.net(images)


class Quantised(Scaled):
    """Rounds its input to a few levels, through which no gradient comes."""

    def forward(self, images):
        return self.net((images * self.factor).round() / self.factor)


class Noisy(Scaled):
    """A random layer on its input."""

    def forward(self, images):
        return self.net(images + self.factor * torch.randn_like(images))


class Constant(Scaled):
    """The same scores for every image."""

    def forward(self, images):
        return torch.tensor([3.0, 1.0, 0.0, 0.0]).expand(len(images), 4)


class Probabilities(Scaled):
    def forward(self, images):
        return self.net(images).softmax(1)


class Backwards(Scaled):
    """The same scores with the gradient turned round: each step of an attack helps."""

    def forward(self, images):
        scores = self.net(images)
        return 2 * scores.detach() - scores


def test_plain_network_raises_no_flag(plain):
    found = findings(plain, source=plain)
    assert flags(found) == set(), "\n".join(map(str, found.values()))
    assert len(found) == 13


@pytest.mark.parametrize(
    ("network", "factor", "raised"),
    [
        (Scaled, 1000, {"gradients", "logit margins", "losses agree", "none without a bound"}),
        (Quantised, 6, {"gradients", "white box beats Square", "none without a bound"}),
        (Noisy, 0.2, {"deterministic"}),
        (Constant, 1, {"gradients", "none without a bound", "hardly any at 64/255"}),
        (Probabilities, 1, {"logits"}),
        (Backwards, 1, {"white box beats Square", "none without a bound", "hardly any at 64/255"}),
    ],
)
def test_broken_network_raises_its_flags(plain, network, factor, raised):
    found = findings(network(plain, factor))
    assert raised <= flags(found), "\n".join(map(str, found.values()))


def outcomes(**percents):
    """An outcome of a hundred images for each part, so many of them right."""
    found = {}
    for part, right in percents.items():
        found[part.replace("_", " ")] = outcome = evaluation.Outcome()
        outcome.columns["correct"] = torch.arange(100) < right
    return found


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (sanity.iterative, {"one_step": 30, "pgd": 30}, {"one_step": 30, "pgd": 40}),
        (sanity.converged, {"pgd": 31, "more": 30}, {"pgd": 50, "more": 30}),
        (sanity.noise_is_weak, {"noise": 90, "pgd": 91}, {"noise": 80, "pgd": 90}),
        (sanity.losses_agree, {"pgd": 30, "margin": 30, "dlr": 31}, {"pgd": 30, "margin": 30, "dlr": 20}),
        (sanity.losses_agree, {"pgd": 30, "margin": 30}, {"pgd": 30, "margin": 20}),
        (sanity.far, {"far": 5}, {"far": 11}),
        (sanity.everywhere, {"everywhere": 0}, {"everywhere": 1}),
        (
            lambda seen: sanity.falling(seen, 8 / 255),
            {"clean": 90, "pgd": 30, "double": 10, "far": 0},
            {"clean": 90, "pgd": 30, "double": 10, "far": 20},
        ),
        (lambda seen: sanity.white_box(seen, "square"), {"clean": 90, "pgd": 30, "square": 60},
         {"clean": 90, "pgd": 60, "square": 30}),
    ],
)  # fmt: skip
def test_each_check_tells_good_from_bad(check, good, bad):
    assert check(outcomes(**good)).status == "PASS"
    assert check(outcomes(**bad)).status == "FAIL"


def test_transfer_that_beats_the_white_box_is_flagged(plain):
    found = findings(Scaled(plain, 1000), source=plain)
    assert found["white box beats transfer"].status == "FAIL"


def test_scaled_logits_are_told_from_a_robust_network(plain):
    """What a table of cross-entropy attacks calls robust, the margin's does not."""
    found = findings(Scaled(plain, 1000))
    assert found["losses agree"].status == "FAIL"
    assert "gradient masking" in str(found["losses agree"])


def test_too_few_steps_are_flagged(plain):
    found = findings(plain, num_steps=1, step_size=0.5 / 255)
    assert found["more steps change little"].status != "PASS"
    assert "--num-steps" in str(found["more steps change little"])


def test_two_classes_need_no_dlr():
    assert "dlr" not in sanity.trials(settings(), 2)


def test_no_epsilon_leaves_what_needs_no_attack(plain):
    assert set(sanity.trials(settings(epsilon=0.0), 10)) == {"clean"}
    assert set(findings(plain, epsilon=0.0)) == {"deterministic", "logits"}


def test_checks_look_at_a_balanced_few():
    split = pictures(120, 3)
    order = split.labels.argsort(stable=True)  # sorted by class, as folders are read
    split = data.Split(split.images[order], split.labels[order])
    part = sanity.trials(settings(sanity_images=20), 4)["pgd"].of(split)
    assert torch.bincount(part.labels).tolist() == [5, 5, 5, 5]


def measured(network):
    target = evaluation.Target("net", "0", network, network)
    trials = [suite.clean(), *(suite.make(name, settings()) for name in ("pgd", "pgd-margin"))]
    progress = evaluation.Progress("nowhere.json", {})
    for each in trials:
        for _ in evaluation.measure(
            target, pictures(40, 4), each, progress.of(target, each), batch_size=40, seed=0
        ):
            pass
    return target, trials, progress


def test_every_table_says_what_masks_gradients(plain):
    """The small form of the checks is under each table: zero gradients and margin quantiles."""
    dataset = data.Dataset("shapes", CLASSES, None, pictures(40, 4))
    config = SimpleNamespace(**vars(settings()), predict="softmax")
    notes = {}
    for name, network in (("plain", plain), ("masked", Scaled(plain, 1000))):
        target, trials, progress = measured(network)
        notes[name] = "\n".join(reports.footnotes(config, dataset, [target], trials, progress))
    assert "PGD 0.00 / 0.00 / 0.00" in notes["plain"]
    assert "WARNING" not in notes["plain"]
    assert "WARNING, masked gradients" in notes["masked"]
    assert "WARNING, the losses differ: PGD on cross-entropy leaves" in notes["masked"]
    assert "above 104: " in notes["masked"]


@pytest.mark.parametrize(
    ("plain", "key", "warning"),
    [
        ("pgd", "pgd-margin", "the losses differ: pgd on cross-entropy leaves 50.00, pgd-margin 0.00"),
        ("apgd-ce", "apgd-dlr", "the losses differ"),
        ("pgd", "square", "square, which sees no gradient, leaves 0.00, those that follow it 50.00"),
        ("pgd", "autoattack", None),  # it tries every other class as a target
        ("pgd", "apgd-dlr", None),  # it takes ten times as many steps
        ("fgsm", "pgd-margin", None),
        ("fgsm", "square", None),
    ],
)
def test_only_attacks_that_differ_in_the_loss_alone_tell_of_the_loss(plain, key, warning):
    half, none = torch.arange(10) < 5, torch.zeros(10, dtype=torch.bool)
    attacked = [(evaluation.Trial(name, name, 8 / 255), evaluation.Outcome()) for name in (plain, key)]
    for (_, outcome), correct in zip(attacked, (half, none), strict=True):
        outcome.extend(**dict.fromkeys(evaluation.COLUMNS, correct))
        outcome.columns["zero_always"] = none
    found = {"above_17": 0.0, "above_104": 0.0}
    said = list(reports._warnings(found, attacked))
    assert said == [] if warning is None else len(said) == 1 and f"WARNING, {warning}" in said[0]


@pytest.mark.parametrize(("left", "warned"), [(35, False), (37, False), (38, True), (60, True)])
@pytest.mark.parametrize("other", ["pgd-margin", "square"])
def test_the_points_that_separate_losses_on_a_healthy_network_are_no_warning(other, left, warned):
    """Of 100 images 32 stay right under the other attack."""
    attacked = [(evaluation.Trial(name, name, 8 / 255), evaluation.Outcome()) for name in ("pgd", other)]
    for (_, outcome), right in zip(attacked, (left, 32), strict=True):
        outcome.extend(**dict.fromkeys(evaluation.COLUMNS, torch.arange(100) < right))
        outcome.columns["zero_always"] = torch.zeros(100, dtype=torch.bool)
    said = list(reports._warnings({"above_17": 0.0, "above_104": 0.0}, attacked))
    assert any("WARNING" in line for line in said) == warned


def test_finding_is_one_line(plain):
    finding = sanity.deterministic(torch.zeros(2, 3), torch.ones(2, 3))
    assert finding.status == "FAIL"
    assert "\n" not in str(finding)
