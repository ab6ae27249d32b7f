"""Signs that an attack fails: images it had fooled on its way, random networks, probabilities, 8 bits."""

import io
import json

import numpy as np
import pytest
import torch
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import evaluation
import robustness
from evaluation.measure import eight_bit
from resnet_model import resnet

GREY, ZERO = torch.full((4, 3, 4, 4), 0.5), torch.zeros(4, dtype=torch.long)


class Grey(nn.Module):
    """Two classes: how far class 1 leads is a function of the mean pixel."""

    def __init__(self, lead):
        super().__init__()
        self.lead, self.weight = lead, nn.Parameter(torch.ones(()))

    def forward(self, images):
        lead = self.weight * self.lead(images.mean((1, 2, 3)))
        return torch.stack([torch.zeros_like(lead), lead], 1)


def saw(mean):
    """Rising everywhere, above 0 from 0.52 to 0.53 alone: four steps of 2/255 from 0.5 lead past that."""
    return 10 * torch.where(mean < 0.53, mean - 0.52, mean - 0.6)


def test_images_that_pgd_had_fooled_and_lost_are_counted_and_not_robust():
    images = torch.cat([GREY[:3], torch.full((1, 3, 4, 4), 0.3)])  # the last one stays below the band
    names = ("pgd", "pgd-margin", "bim", "apgd-ce")
    found = evaluation.evaluate(Grey(saw), images, ZERO, attacks=names, apgd_steps=10)
    for name in ("pgd", "pgd-margin", "bim"):
        assert found.outcomes[name].correct.all(), name
        assert found.outcomes[name].lost.tolist() == [True, True, True, False], name
    assert not found.outcomes["apgd-ce"].lost.any()  # it returns its worst point
    assert found.robust.tolist() == [False, False, False, True]
    counted = "which Worst counts as fooled: PGD 3, PGD margin 3, BIM 3"
    assert any(note.endswith(counted) and "fooled on the way" in note for note in found.notes)
    entry = json.loads(found.json)["checkpoints"][0]
    assert entry["attacks"]["pgd"]["lost"] == 3 and entry["worst"]["robust"] == "0001"


def test_what_was_fooled_on_the_way_is_for_the_network_itself_to_say():
    """The copy that is attacked may round otherwise than the network: its word alone counts nothing."""
    honest, folded = Grey(lambda mean: mean - 0.9), Grey(saw)
    trial = evaluation.trials.make("pgd", evaluation.Settings())
    split, outcome = evaluation.library.data.Split(GREY, ZERO), evaluation.Outcome()
    target = evaluation.Target("net", "0", honest, folded)
    for _ in evaluation.measure(target, split, trial, outcome, batch_size=3, seed=0):
        pass
    assert outcome.correct.all() and not outcome.lost.any()


def test_a_network_whose_predictions_change_is_called_random():
    torch.manual_seed(0)
    noisy = Grey(lambda mean: torch.randn(len(mean)))
    found = evaluation.evaluate(
        noisy, GREY.repeat(25, 1, 1, 1), ZERO.repeat(25), attacks=["pgd"], num_steps=1
    )
    (line,) = [line for line in found.warnings if "'deterministic'" in line]
    count = int(line.split(": ")[1].split()[0])
    assert 25 < count < 75 and "of 100 predictions change from pass to pass" in line
    steady = evaluation.evaluate(Grey(saw), GREY, ZERO, attacks=[])
    assert steady.outcomes["clean"].changed == 0 and not steady.warnings


@pytest.mark.parametrize("probabilities", [True, False])
def test_probabilities_are_told_from_logits(probabilities):
    net = nn.Sequential(Grey(saw), *([nn.Softmax(1)] if probabilities else []))
    found = evaluation.evaluate(net, GREY, ZERO, attacks=["fgsm"])
    assert any("these are probabilities" in line for line in found.warnings) == probabilities


# ---------------------------------------------------------------- 8 bits

levels = st.lists(st.integers(0, 255), min_size=3, max_size=3)


@given(levels, st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.floats(0, 64))
def test_a_rounded_image_is_what_a_png_holds_and_within_epsilon(start, moves, radius):
    images = torch.tensor(start, dtype=torch.uint8).view(1, 3, 1, 1) / torch.full((), 255.0)
    attacked = (images + radius / 255 * torch.tensor(moves, dtype=torch.float32).view(1, 3, 1, 1)).clamp(0, 1)
    rounded = eight_bit(attacked, images, radius / 255)
    assert ((rounded - images).abs() <= radius / 255 + 1e-6).all()
    assert ((rounded - attacked).abs() <= 1 / 255).all()
    file = io.BytesIO()
    pixels = (255 * rounded[0]).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, format="PNG")
    back = np.asarray(Image.open(file)).transpose(2, 0, 1)
    assert torch.equal(torch.from_numpy(back.copy()) / torch.full((), 255.0), rounded[0])
    assert torch.equal(eight_bit(rounded, images, radius / 255), rounded)


def test_images_adversarial_in_floating_point_alone_are_right_after_rounding():
    """Less than half a level is rounded away, a whole one is not."""
    net, images = Grey(lambda mean: 1e4 * (mean - 128.2 / 255)), torch.full((4, 3, 4, 4), 128 / 255)
    for epsilon, left in ((0.4 / 255, 100.0), (1 / 255, 0.0)):
        found = evaluation.evaluate(
            net, images, ZERO, attacks=["pgd-margin"], epsilon=epsilon, eight_bit=True
        )
        assert not found.robust.any() and f"{left:.2f} |" in found.table.splitlines()[-1]
        entry = json.loads(found.json)["checkpoints"][0]
        assert entry["attacks"]["pgd-margin"]["rounded_8bit"]["accuracy"] == left
        assert entry["worst_8bit"]["accuracy"] == left and entry["worst"]["accuracy"] == 0
        assert any("(4 no longer adversarial)" in note for note in found.notes) == (left == 100)


def test_eight_bit_on_the_command_line_adds_a_column_and_changes_no_other(tmp_path):
    torch.manual_seed(0)
    torch.save(resnet(10, 8).state_dict(), tmp_path / "net.pth")
    words = ["--dataset", "synthetic", "--limit", 6, "--device", "cpu", "--attacks", "fgsm", "pgd-margin"]
    words += ["--checkpoints", tmp_path / "net.pth", "--results"]
    entries, heads = [], []
    for name, option in (("plain", ()), ("rounded", ("--eight-bit",))):
        code, said, error = run(robustness, *words, tmp_path / f"{name}.json", *option)
        assert code == 0, error
        heads.append(said.split("\n")[1])
        entries.append(json.loads((tmp_path / f"{name}.json").read_text())["checkpoints"][0])
    assert heads[1].startswith(heads[0]) and heads[1].endswith(" Worst, 8 bits |")
    plain, rounded = entries
    assert {"worst_8bit"} == rounded.keys() - plain.keys()
    for key, attack in plain["attacks"].items():
        assert rounded["attacks"][key].keys() - attack.keys() == {"rounded_8bit"}
        assert rounded["attacks"][key]["robust"] == attack["robust"]
    assert "worst-8-bit" in (tmp_path / "rounded.csv").read_text()
    code, _, error = run(robustness, *words, tmp_path / "plain.json", "--resume", "--eight-bit")
    assert code == 4 and "begun with another eight_bit" in error
