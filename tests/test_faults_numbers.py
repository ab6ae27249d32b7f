"""Divergence: a loss or a weight that is lost stops the run before it is saved (items 31 and 32)."""

import contextlib
import re

import pytest
import torch

import cli
import pcl_training
import prototype_conformity
import softmax_training
import training
import utils
from benchmarks import soak

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
    forward = training.CrossEntropyLoss.forward

    def lost(self, outputs, labels):
        loss, parts = forward(self, outputs, labels)
        return loss * float("nan"), parts

    monkeypatch.setattr(training.CrossEntropyLoss, "forward", lost)
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
    runaway = {"weight_prox": 0.0, "weight_conprox": 1.0, "lr": 0.05, "epochs": 40}
    with pytest.raises(utils.DivergenceError) as caught:
        train(pcl_training, path, init_from=stage_1, **runaway)
    assert "contrastive" in str(caught.value) and caught.value.exit_status == 5
    said = capsys.readouterr().out
    assert said.count("warning: a loss term is running away: epoch") == 1


def test_a_run_that_is_well_is_not_warned_of(stage_1, tmp_path, capsys):
    train(pcl_training, tmp_path / "run.pth.tar", init_from=stage_1)
    assert "warning" not in capsys.readouterr().out


class LostAt31(training.CrossEntropyLoss):
    """Cross-entropy, but for one batch."""

    def __init__(self, value):
        super().__init__()
        self.value, self.batch = value, 0

    def forward(self, outputs, labels):
        loss, terms = super().forward(outputs, labels)
        self.batch += 1
        return loss + (self.value if self.batch == 31 else 0), terms


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2e9])
def test_a_lost_loss_moves_no_weight_where_few_batches_are_looked_at(value, tmp_path, monkeypatch):
    """As on a GPU: the run ends later, but as if it had at once, and names the batch where it began."""
    dataset = training.data.load("synthetic", "data", limit=2)
    config = softmax_training.Config(save_to=str(tmp_path / "run.pth.tar"), precision="float32", batch_size=2)
    model = softmax_training.resnet(10, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    run = training.Run(config, dataset, model, LostAt31(value), optimizer, None, None)
    images, labels = training.data.to_float(dataset.train.images), dataset.train.labels
    weights = []
    monkeypatch.setattr(run, "device", torch.device("meta"))
    monkeypatch.setattr(run, "autocast", contextlib.nullcontext)
    with pytest.raises(utils.DivergenceError, match=r"batch 31: .*last good batches: .*batch 28.*batch 30: "):
        for run.batch in range(training.WATCH_EVERY + 1):
            run.step(images, labels)
            weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert run.batch == training.WATCH_EVERY
    assert not torch.equal(weights[28], weights[29]) and weights[29].isfinite().all()
    assert all(torch.equal(after, weights[29]) for after in weights[30:])
    with pytest.raises(utils.DivergenceError, match="batch 31"):
        run.save()
    assert not list(tmp_path.iterdir())


def test_class_means_of_a_class_without_images_keep_the_drawn_prototype():
    dataset = training.data.load("synthetic", "data", limit=7)  # 10 classes: three have no image
    criterion = prototype_conformity.PrototypeConformityLoss(10, {"fc": 1024}, 1.0, 1e-4)
    drawn = criterion.proximity["fc"].centers.detach().clone()
    model = softmax_training.resnet(10, 8)
    criterion.init_class_means(model, dataset.train)
    centers = criterion.proximity["fc"].centers
    assert centers.isfinite().all()
    seen = torch.zeros(10, dtype=torch.bool).index_fill_(0, dataset.train.labels, True)
    assert torch.equal(centers[~seen], drawn[~seen]) and (~seen).sum() == 3
    with torch.no_grad(), utils.evaluating(model):
        features = model(training.data.to_float(dataset.train.images)).fc
    for label in dataset.train.labels.unique():
        expected = features[dataset.train.labels == label].double().mean(0)
        torch.testing.assert_close(centers[label].double(), expected, rtol=1e-5, atol=1e-5)
