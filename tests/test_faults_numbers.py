"""Divergence: a loss or a weight that is lost stops the run before it is saved (items 31 and 32)."""

import re

import pytest
import soak
import torch

import cli
import pcl_training
import softmax_training
import training
import utils
from prototype_conformity import PrototypeConformityLoss

TINY = {"limit": 24, "batch_size": 4, "epochs": 2}


def train(module, path, *flags, **more):
    options = soak.tiny(path, **{**TINY, **more})
    module.main(cli.parse_config(module.Config, [*options, *flags]))


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    path = tmp_path_factory.mktemp("stage 1") / "softmax.pth.tar"
    train(softmax_training, path)
    return path


def test_item_31_a_learning_rate_far_too_high_stops_with_the_terms(stage_1, tmp_path, monkeypatch):
    """The first batches are good, the weights explode, and no step follows the lost loss."""
    path, steps, step = tmp_path / "run.pth.tar", [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *a, **k: steps.append(1) or step(*a, **k))
    with pytest.raises(utils.DivergenceError) as caught:
        train(pcl_training, path, init_from=stage_1, lr=1e4)
    text = str(caught.value)
    where = re.search(r"diverged: epoch (\d+), batch (\d+): loss (\S+), cross_entropy", text)
    assert caught.value.exit_status == 5 and "\n" not in text
    assert len(steps) == int(where[2]) - 1  # stopped before the step of the batch it names
    before = re.search(r"the last good batches: (.*?); lower --lr", text)[1].split(" | ")
    assert [int(re.search(r"batch (\d+)", b)[1]) for b in before] == list(range(1, int(where[2])))[-3:]
    assert all(name in text for name in ("cross_entropy", "proximity", "contrastive"))
    assert not path.exists() and not list(tmp_path.glob("*.tmp"))


def test_item_31_the_last_good_checkpoint_stays(tmp_path, monkeypatch):
    path = tmp_path / "run.pth.tar"
    train(softmax_training, path, epochs=1)
    before = path.read_bytes()
    forward = PrototypeConformityLoss.forward

    def lost(self, outputs, labels):
        loss, parts = forward(self, outputs, labels)
        return loss * float("nan"), parts

    monkeypatch.setattr(PrototypeConformityLoss, "forward", lost)
    with pytest.raises(utils.DivergenceError, match=r"epoch 2, batch 1: loss nan.*none since the start"):
        train(softmax_training, path, "--resume", epochs=2)
    assert path.read_bytes() == before


def test_item_31_a_weight_lost_without_a_lost_loss_is_never_saved(tmp_path, monkeypatch):
    """The last step of an epoch can ruin a weight when no loss follows that would tell."""
    path = tmp_path / "run.pth.tar"
    step = torch.optim.SGD.step

    def ruin(self, *args, **kwargs):
        step(self, *args, **kwargs)
        ruin.steps += 1
        if ruin.steps == 6:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0, 0, 0] = float("nan")

    ruin.steps = 0
    monkeypatch.setattr(torch.optim.SGD, "step", ruin)
    with pytest.raises(utils.DivergenceError, match=r"a weight or a loss is NaN or Inf.*batch 6"):
        train(softmax_training, path)
    assert not path.exists()


def test_item_32_a_contrastive_term_that_runs_away_is_warned_of_and_stopped(stage_1, tmp_path, capsys):
    """Pushed with all its weight and never pulled, features flee from the prototypes without bound."""
    path = tmp_path / "run.pth.tar"
    runaway = {"weight_prox": 0.0, "weight_conprox": 1.0, "lr": 0.02, "epochs": 40}
    with pytest.raises(utils.DivergenceError) as caught:
        train(pcl_training, path, init_from=stage_1, **runaway)
    assert "contrastive" in str(caught.value) and caught.value.exit_status == 5
    said = capsys.readouterr().out
    assert said.count("warning: a loss term is running away: epoch") == 1


def test_a_run_that_is_well_is_not_warned_of(stage_1, tmp_path, capsys):
    train(pcl_training, tmp_path / "run.pth.tar", init_from=stage_1)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2e9])
def test_a_lost_loss_moves_no_weight_where_few_batches_are_looked_at(value, tmp_path, monkeypatch):
    """As on a GPU: the run ends later, but as if it had at once, and names the batch where it began."""
    forward, step, weights = PrototypeConformityLoss.forward, torch.optim.SGD.step, []

    def lost_at_6(self, outputs, labels):
        loss, parts = forward(self, outputs, labels)
        return loss + (value if len(weights) == 5 else 0), parts

    def recording(self, *args, **kwargs):
        step(self, *args, **kwargs)
        weights.append(torch.cat([weight.detach().flatten() for weight in self.param_groups[0]["params"]]))

    monkeypatch.setattr(PrototypeConformityLoss, "forward", lost_at_6)
    monkeypatch.setattr(torch.optim.SGD, "step", recording)
    monkeypatch.setattr(training.run, "Watch", RareWatch)
    monkeypatch.setattr(training.watch, "LOOK_EVERY", 8)
    path = tmp_path / "run.pth.tar"
    with pytest.raises(utils.DivergenceError, match=r"batch 6: .*last good batches: .*batch 3.*batch 5: "):
        train(softmax_training, path, limit=18, batch_size=2, lr=0.01)
    assert len(weights) == 8  # the look before the next step found it
    assert not torch.equal(weights[3], weights[4]) and weights[4].isfinite().all()
    assert all(torch.equal(after, weights[4]) for after in weights[5:])
    with pytest.raises(utils.DivergenceError, match="batch 6"):  # nor is it saved before that look
        weights.clear()
        train(softmax_training, path, "--overwrite", limit=14, batch_size=2, lr=0.01)
    assert len(weights) == 7 and not path.exists()


class RareWatch(training.watch.Watch):
    """Looks as rarely as where looking waits for the device."""

    def __init__(self, *args):
        super().__init__(*args)
        self.look_every = training.watch.LOOK_EVERY


def test_the_first_batch_that_is_seen_is_looked_at_wherever_it_comes():
    """A fused step that does nothing as the first one would leave the momentum undefined."""
    weight = torch.nn.Parameter(torch.zeros(1))
    watch = RareWatch(torch.optim.SGD([weight], fused=True), weight.device, print, "run.pth.tar")
    with pytest.raises(utils.DivergenceError, match="batch 8: loss nan"):
        watch.see({"loss": torch.tensor(torch.nan)}, 0, 7)
