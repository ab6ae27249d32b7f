"""One epoch, the schedule, what is compiled and accuracy, against references written out."""

import copy
import csv
import functools

import pytest
import soak
import torch
import torch.nn.functional as F
from torchvision.models.feature_extraction import create_feature_extractor

import checkpoints
import cli
import data
import pcl_training
import pcl_training_adversarial_fgsm
import softmax_training
import training
import utils
from prototype_conformity import PrototypeConformityLoss
from resnet_model import resnet


@pytest.fixture(scope="module")
def dataset():
    return data.load("synthetic", "data", limit=21)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return resnet(10, 8)


def train(module, path, *flags, **more):
    """Run a script in this process; return the checkpoint it leaves."""
    options = soak.tiny(path, **{"limit": 21, "batch_size": 5, "epochs": 1, **more})
    module.main(cli.parse_config(module.Config, [*options, *flags]))
    return checkpoints.load(path)


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    path = tmp_path_factory.mktemp("stage 1") / "run.pth.tar"
    train(softmax_training, path)
    return path


# ---------------------------------------------------------------- the epoch


def test_an_epoch_is_the_textbook_one(dataset, tmp_path):
    """Shuffled, augmented, forward, backward, step: written out beside it, the same weights and means."""
    state = train(softmax_training, tmp_path / "run.pth.tar", seed=3, warmup=0)
    torch.manual_seed(3)
    textbook = resnet(10, 8).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(textbook.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    order, losses = torch.randperm(21, generator=utils.generator(3, "order", 0)), []
    for index, chosen in enumerate((order[:5], order[5:10], order[10:15], order[15:])):  # 1 left over joins
        images = data.augment(dataset.train.images[chosen], utils.generator(3, "augment", 0, index))
        loss = F.cross_entropy(textbook.logits(data.to_float(images)), dataset.train.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += [loss.item()] * len(chosen)
    for name, value in textbook.state_dict().items():
        torch.testing.assert_close(state["state_dict"][name], value, rtol=1e-4, atol=1e-5)
    assert state["history"][0]["loss"] == pytest.approx(sum(losses) / 21, rel=1e-5)


def test_an_adversary_doubles_the_batch_and_sees_the_network_as_it_stands(dataset, model, tmp_path):
    """Frozen, in eval mode, with the weights and statistics of this very batch."""
    seen, batches = [], []
    assert model.training

    def adversary(model_fn, images, labels, generator):
        present = copy.deepcopy(model).eval()
        torch.testing.assert_close(model_fn(images), present.logits(images), rtol=1e-4, atol=1e-4)
        assert not model_fn(images).requires_grad
        seen.append((images.clone(), labels, torch.rand(1, generator=generator).item()))
        return 1 - images

    class Recording(PrototypeConformityLoss):
        def forward(self, outputs, labels):
            batches[-1] += (labels,)
            return super().forward(outputs, labels)

    # The hook goes along to copies of the network.
    model.register_forward_pre_hook(lambda module, given: batches.append(given) if module is model else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [])
    config = softmax_training.Config(
        save_to=str(tmp_path / "run.pth.tar"), precision="float32", batch_size=5, epochs=2, eval_every=9
    )
    split = dataset.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loop, "accuracy", lambda model, split: 0.0)
        training.fit(config, dataset, model, Recording(10, {}), optimizer, scheduler, adversary)
    assert len(seen) == len(batches) == 8 and sum(len(labels) for _, labels, _ in seen) == 2 * len(split)
    assert len({draw for *_, draw in seen}) == 8  # each batch draws for itself
    for (clean, labels, _), (both, twice) in zip(seen, batches, strict=True):
        assert torch.equal(both, torch.cat([clean, 1 - clean]))
        assert torch.equal(twice, torch.cat([labels, labels]))


def test_accuracy_counts_every_image(model, dataset):
    single = [model.eval().logits(image[None] / 255).argmax() for image in dataset.test.images]
    right = sum(a == b for a, b in zip(single, dataset.test.labels, strict=True)).item()
    assert training.accuracy(model.train(), dataset.test) == pytest.approx(100 * right / 21)
    assert model.training


def test_item_35_modes_are_restored_module_by_module(model):
    model.train()
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), utils.evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes


def test_item_35_the_graph_of_an_extractor_is_restored_with_its_mode():
    """torchvision's module exchanges its graph in train(), and functional dropout goes by the graph."""

    class Dropping(torch.nn.Module):
        def forward(self, images):
            return F.dropout(images, training=self.training)

    network = create_feature_extractor(Dropping(), {"dropout": "logits"})
    with utils.evaluating(network):
        assert network(torch.ones(1000))["logits"].count_nonzero() == 1000
    assert network(torch.ones(1000))["logits"].count_nonzero() < 1000


# ---------------------------------------------------------------- the schedule and the files


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        ((), [0.01, 0.1, 0.01]),
        (("--warmup", "0"), [0.1, 0.1, 0.01]),  # as released
        (("--warmup", "2", "--warmup-factor", "1/2", "--lr", "1"), [0.5, 0.5, 0.1]),
    ],
)
def test_the_schedule_the_metrics_and_the_log(flags, rates, tmp_path):
    path = tmp_path / "run.pth.tar"
    state = train(softmax_training, path, "--milestones", "2", *flags, epochs=3, batch_size=21, limit=21)
    rows = list(csv.DictReader(path.with_name("run.csv").open()))
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["test_accuracy"] == "" for row in rows] == [True, False, False]  # every second, and the last
    assert state["finished"] and len(state["history"]) == 3
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert lines == state["log"] and len(lines) == 5


@pytest.mark.parametrize("factor", ["0", "1.5", "nan"])
def test_a_warm_up_factor_outside_its_range_is_refused(factor):
    with pytest.raises(utils.UsageError, match=r"--warmup-factor .*lies in \(0, 1\]"):
        cli.parse_config(softmax_training.Config, ["--warmup-factor", factor])


# ---------------------------------------------------------------- compiling


def test_full_batches_go_through_one_graph_of_the_attack_and_one_of_the_step(stage_1, tmp_path, monkeypatch):
    """Nothing breaks a graph, or a GPU would wait for Python; the last 5 of 21 images go uncompiled."""
    plain = train(pcl_training_adversarial_fgsm, tmp_path / "plain.pth.tar", init_from=stage_1, batch_size=8)
    sizes, real = [], torch.compile

    def whole(function, mode, dynamic):
        compiled = real(function, backend="eager", fullgraph=True, dynamic=dynamic)

        def recording(images, *others):
            sizes.append(len(images))
            return compiled(images, *others)

        return recording

    monkeypatch.setattr(torch, "compile", functools.wraps(real)(whole))
    path = tmp_path / "run.pth.tar"
    state = train(pcl_training_adversarial_fgsm, path, "--compile", "on", init_from=stage_1, batch_size=8)
    assert sizes == [8, 16] * 3 + [8, 16, 8, 16]  # the rehearsal, and the epoch
    assert state["history"][0]["loss"] == pytest.approx(plain["history"][0]["loss"], rel=1e-4)


def test_a_checkpoint_says_from_which_file_it_started_also_when_resumed(stage_1, tmp_path):
    path = tmp_path / "run.pth.tar"
    start = {"path": str(stage_1), "sha256": utils.sha256(stage_1)}
    assert train(pcl_training, path, init_from=stage_1)["started_from"] == start
    assert train(pcl_training, path, "--resume", "--epochs", "2", init_from="gone")["started_from"] == start
    assert checkpoints.load(stage_1)["started_from"] == {}


def test_a_resumed_run_says_that_its_stage_1_has_changed(stage_1, tmp_path):
    path, start = tmp_path / "run.pth.tar", tmp_path / "start.pth.tar"
    start.write_bytes(stage_1.read_bytes())
    train(pcl_training, path, init_from=start)
    again = ("--resume", "--epochs")
    log = train(pcl_training, path, *again, "2", init_from=start)["log"]
    assert not any("has changed" in line for line in log)
    state = torch.load(start, weights_only=True)
    state["state_dict"]["fcf.bias"] += 1
    torch.save(state, start)
    log = train(pcl_training, path, *again, "3", init_from=start)["log"]
    assert f"{start} has changed since this run began from it" in log
