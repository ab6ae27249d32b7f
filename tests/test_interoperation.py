"""Other libraries take the network of a checkpoint as it is, and agree with this project about it."""

import logging
import sys

import pytest
import torch

import attacks
import checkpoints
import evaluation
import resnet_model
import utils
from evaluation import autoattack

CLASSES, EPSILON = ("a", "b", "c", "d"), 8 / 255


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small network whose batch norms have seen something, as a checkpoint."""
    path = tmp_path_factory.mktemp("models") / "net.pth.tar"
    torch.manual_seed(0)
    model = resnet_model.resnet(len(CLASSES), 8).train()
    for _ in range(3):
        model(torch.rand(16, 3, 16, 16))
    checkpoints.save({"state_dict": model.state_dict(), "classes": list(CLASSES)}, path, False)
    return path


@pytest.fixture
def model(checkpoint):
    return evaluation.classifier(checkpoint)


@pytest.fixture(scope="module")
def batch(checkpoint):
    """Images, and as labels what the network says of all but one."""
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = evaluation.classifier(checkpoint)(images).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    return images, labels


def test_classifier_is_the_checkpoints_network(checkpoint, model, batch):
    read = checkpoints.read_network(checkpoint)
    network = resnet_model.resnet(**read.arguments)
    network.load_state_dict(read.weights)
    torch.testing.assert_close(model(batch[0]), network.eval()(batch[0]).logits, rtol=1e-4, atol=1e-4)
    assert isinstance(model, torch.nn.Module)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_classifier_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(utils.CheckpointError, match="no such file"):
        evaluation.classifier(tmp_path / "none.pth.tar")


def check_nearly_equal(theirs, ours):
    """Equal but for pixels whose gradient is so near 0 that rounding decides its sign."""
    assert ((theirs - ours).abs() < 1e-6).float().mean() > 0.999


def test_torchattacks(model, batch):
    """It averages the loss, and divides MIM's gradient by the mean of |g|: only positive factors differ."""
    torchattacks = pytest.importorskip("torchattacks")
    small = {"eps": EPSILON, "alpha": EPSILON / 10, "steps": 10}
    for attack, reference in (
        (attacks.fgsm, torchattacks.FGSM(model, eps=EPSILON)),
        (attacks.bim, torchattacks.BIM(model, **small)),
        (attacks.mim, torchattacks.MIFGSM(model, **small, decay=1.0)),
        (attacks.pgd, torchattacks.PGD(model, **small | {"alpha": 2 / 255}, random_start=False)),
    ):
        check_nearly_equal(reference(*batch), attack(model, *batch, EPSILON))


def test_foolbox(model, batch):
    foolbox = pytest.importorskip("foolbox")
    theirs, library = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), foolbox.attacks
    assert foolbox.utils.accuracy(theirs, *batch) == pytest.approx(5 / 6)
    plain = {"steps": 10, "random_start": False}
    for attack, reference in (
        (attacks.fgsm, library.LinfFastGradientAttack()),
        (attacks.bim, library.LinfBasicIterativeAttack(abs_stepsize=EPSILON / 10, **plain)),
        (attacks.pgd, library.LinfProjectedGradientDescentAttack(abs_stepsize=2 / 255, **plain)),
    ):
        found, _, success = reference(theirs, *batch, epsilons=EPSILON)
        ours = attack(model, *batch, EPSILON)
        check_nearly_equal(found, ours)
        assert success.tolist() == (model(ours).argmax(1) != batch[1]).tolist()


def test_robustbench(model, batch):
    robustbench = pytest.importorskip("robustbench.utils")
    assert robustbench.clean_accuracy(model, *batch, batch_size=4) == pytest.approx(5 / 6)


def test_the_standard_version_is_run(model, batch, tmp_path, monkeypatch):
    """All its images are judged, and its messages are kept."""
    reference = pytest.importorskip("pyautoattack")
    images, labels = batch
    quick = quickened(reference.AutoAttack)
    monkeypatch.setattr(autoattack, "find", lambda: quick)
    before = logging.getLogger("auto-attack").handlers[:]
    results = []
    for name in "ab":
        options = {"generator": torch.Generator().manual_seed(3), "log": tmp_path / name}
        results.append(autoattack.run(model, images, labels, EPSILON, **options))
    assert torch.equal(*results)
    evaluation.check_result(results[0], images, EPSILON)
    assert "apgd-ce" in (tmp_path / "a").read_text().lower()
    assert "apgd-t" in (tmp_path / "a").read_text().lower()
    assert logging.getLogger("auto-attack").handlers == before
    pgd = attacks.pgd(model, images, labels, EPSILON)
    still = (model(pgd).argmax(1) == labels) & (model(images).argmax(1) == labels)
    left = (model(results[0]).argmax(1) == labels) & (model(images).argmax(1) == labels)
    assert left.sum() <= still.sum()


def quickened(autoattack):
    """The same class with few steps of each of its attacks."""

    class Quick(autoattack):
        def run_standard_evaluation(self, *arguments, **options):
            assert self.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
            assert self.apgd_targeted.n_target_classes == self.fab.n_target_classes == 3
            self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 5
            self.square.n_queries = 10
            return super().run_standard_evaluation(*arguments, **options)

    return Quick


def test_autoattack_that_is_not_there_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(utils.UsageError, match="pip install pyautoattack"):
        autoattack.find()
