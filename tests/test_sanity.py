"""The checks of an evaluation: each raised by a network broken on purpose, none by a plainly trained one."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import evaluation
import robustness
from evaluation import checks, report, trials

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


CONFIG = robustness.Config(attacks=(), num_queries=100, sanity_images=60, batch_size=60)


def measured(network, images=120, source=None, **changes):
    """Results of a network, with the outcomes of the table and of the checks."""
    config = dataclasses.replace(CONFIG, **changes)
    dataset = data.Dataset("shapes", CLASSES, None, pictures(images, 2))
    target = evaluation.Target("net", "0", network, network)
    source = source and evaluation.Target("source", "1", source, source, path="source.pth")
    needed = checks.trials(config, len(CLASSES), source) if config.sanity else {}
    parts = trials.table(config, len(CLASSES), source)
    results = evaluation.Results(config, dataset, [target], parts, checks=needed)
    for each in (*parts, *needed.values()):
        outcome = results.of(target, each)
        for _ in evaluation.measure(target, dataset.test, each, outcome, batch_size=80, seed=0):
            pass
    return results


def checked(network, **changes):
    """The findings of --sanity on a network, by name."""
    results = measured(network, sanity=True, **changes)
    return {finding.name: finding for finding in checks.sanity(results, results.targets[0])}


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
    found = checked(plain, source=plain)
    assert flags(found) == set(), "\n".join(map(str, found.values()))
    assert len(found) == 14


@pytest.mark.parametrize(
    ("network", "factor", "raised"),
    [
        (Quantised, 6, {"gradients", "white box beats Square", "none without a bound"}),
        (Noisy, 0.2, {"deterministic"}),
        (Constant, 1, {"gradients", "none without a bound", "hardly any at 64/255"}),
        (Probabilities, 1, {"logits"}),
        (Backwards, 1, {"white box beats Square", "none without a bound", "hardly any at 64/255"}),
    ],
)
def test_broken_network_raises_its_flags(plain, network, factor, raised):
    found = checked(network(plain, factor))
    assert raised <= flags(found), "\n".join(map(str, found.values()))


def outcomes(**percents):
    """An outcome of a hundred images for each part, so many of them right."""
    found = {}
    for part, right in percents.items():
        found[part.replace("_", "-")] = outcome = evaluation.Outcome()
        outcome.columns["correct"] = torch.arange(100) < right
    return found


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (checks.iterative, {"fgsm": 30, "pgd": 30}, {"fgsm": 30, "pgd": 40}),
        (checks.converged, {"pgd": 31, "more": 30}, {"pgd": 50, "more": 30}),
        (checks.noise_is_weak, {"noise": 90, "pgd": 91}, {"noise": 80, "pgd": 90}),
        (checks.losses_agree, {"pgd": 30, "pgd_margin": 30, "pgd_dlr": 31},
         {"pgd": 30, "pgd_margin": 30, "pgd_dlr": 20}),
        (checks.losses_agree, {"pgd": 30, "pgd_margin": 30}, {"pgd": 30, "pgd_margin": 20}),
        (checks.far, {"far": 5}, {"far": 11}),
        (checks.everywhere, {"everywhere": 0}, {"everywhere": 1}),
        (
            lambda seen: checks.falling(seen, 8 / 255),
            {"clean": 90, "pgd": 30, "double": 10, "far": 0},
            {"clean": 90, "pgd": 30, "double": 10, "far": 20},
        ),
        (lambda seen: checks.white_box(seen, "square"), {"clean": 90, "pgd": 30, "square": 60},
         {"clean": 90, "pgd": 60, "square": 30}),
    ],
)  # fmt: skip
def test_each_check_tells_good_from_bad(check, good, bad):
    assert check(outcomes(**good)).status == "PASS"
    assert check(outcomes(**bad)).status == "FAIL"


def test_scaled_logits_are_told_from_a_robust_network(plain):
    """What a table of cross-entropy attacks calls robust, the margin and a transfer do not."""
    found = checked(Scaled(plain, 1000), source=plain)
    raised = {
        "gradients",
        "logit margins",
        "losses agree",
        "none without a bound",
        "white box beats transfer",
    }
    assert raised <= flags(found), "\n".join(map(str, found.values()))
    assert found["losses agree"].status == found["white box beats transfer"].status == "FAIL"
    assert "gradient masking" in str(found["losses agree"])


def test_too_few_steps_are_flagged(plain):
    found = checked(plain, num_steps=1, step_size=0.5 / 255)
    assert found["more steps change little"].status != "PASS"
    assert "--num-steps" in str(found["more steps change little"])


def test_two_classes_need_no_dlr():
    assert "pgd-dlr" not in checks.trials(CONFIG, 2)


def test_no_epsilon_leaves_what_needs_no_attack(plain):
    assert set(checked(plain, epsilon=0.0)) == {"deterministic", "logits"}


def test_checks_look_at_a_balanced_few():
    split = pictures(120, 3)
    order = split.labels.argsort(stable=True)  # sorted by class, as folders are read
    split = data.Split(split.images[order], split.labels[order])
    part = checks.trials(dataclasses.replace(CONFIG, sanity_images=20), 4)["pgd"].of(split)
    assert torch.bincount(part.labels).tolist() == [5, 5, 5, 5]


# ---------------------------------------------------------------- the short form under a table


def test_every_table_says_what_masks_gradients(plain):
    """The short form of the checks is under each table: zero gradients and margin quantiles."""
    notes = {}
    for name, network in (("plain", plain), ("masked", Scaled(plain, 1000))):
        results = measured(network, images=40, attacks=("pgd", "pgd-margin"))
        notes[name] = "\n".join(report.footnotes(results))
        assert "gradients: exactly zero" in notes[name] and "above 104: " in notes[name]
    assert "PGD 0.00 / 0.00 / 0.00" in notes["plain"]
    assert "WARNING" not in notes["plain"]
    for name in ("gradients': masked gradients", "logit margins'", "losses agree' fails"):
        assert f"WARNING, check '{name}" in notes["masked"]


def warnings(**right):
    """What is said under the table of attacks after which so many of 100 images are right."""
    target, outcomes = evaluation.Target("net", "0", None, None), {"clean": evaluation.Outcome()}
    names = ["clean", *(name.replace("_", "-") for name in right)]
    for name, count in zip(names, (100, *right.values()), strict=True):
        columns = dict.fromkeys(evaluation.COLUMNS, torch.zeros(100, dtype=torch.bool))
        outcomes[name] = evaluation.Outcome({**columns, "correct": torch.arange(100) < count})
    parts = [evaluation.Trial(name, name, 8 / 255) for name in names]
    results = evaluation.Results(CONFIG, None, [target], parts, outcomes={"0": outcomes})
    return [line for line in checks.under_table(results, target) if "WARNING" in line]


@pytest.mark.parametrize(
    ("plain", "other", "warning"),
    [
        ("pgd", "pgd_margin", "losses agree' fails: PGD leaves 50.00 on cross-entropy, PGD margin 0.00"),
        ("apgd_ce", "apgd_dlr", "losses agree"),
        ("pgd", "square", "white box beats Square' fails: 50.00 % of all images fall to Square"),
        ("pgd", "transfer_pgd", "white box beats transfer PGD' fails: 50.00 % of all images fall"),
        ("bim", "noise", "noise weaker than gradient' fails: noise leaves 0.00, BIM 50.00"),
        ("pgd", "autoattack", None),  # it tries every other class as a target
        ("pgd", "apgd_dlr", None),  # it takes ten times as many steps
        ("fgsm", "pgd_margin", None),
        ("fgsm", "square", None),
    ],
)
def test_only_attacks_that_differ_in_one_thing_tell_of_it(plain, other, warning):
    said = warnings(**{plain: 50, other: 0})
    assert said == [] if warning is None else len(said) == 1 and warning in said[0]


@pytest.mark.parametrize(("left", "warned"), [(35, False), (37, False), (38, True), (60, True)])
@pytest.mark.parametrize("other", ["pgd_margin", "square", "transfer", "noise"])
def test_the_points_that_separate_attacks_on_a_healthy_network_are_no_warning(other, left, warned):
    assert bool(warnings(pgd=left, **{other: 32})) == warned
