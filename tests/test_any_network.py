"""Networks that are not of this project: through `--network MODULE:FUNCTION`, and through `evaluate`."""

import importlib
import json
from collections import namedtuple

import pytest
import torch
import torchvision
from commands import run
from torch import nn

import attacks
import data
import evaluation
import robustness
import utils
from resnet_model import resnet

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(256, classes)

    def forward(self, images):
        return self.head(self.conv(images).relu().view(len(images), -1))  # needs images in plain order

def build(path=None):
    net = Net()
    if path is not None:
        net.load_state_dict(torch.load(path, weights_only=True))
    return net

def three(): return Net(3)
def nothing(): pass
def raising(path=None): raise KeyError("no key")
def leaving(): raise SystemExit(3)

class Odd(Net):
    def forward(self, images):
        return self.answer(super().forward(images))

def odd(answer):
    def make():
        net = Odd()
        net.answer = answer
        return net
    return make

nan = odd(lambda logits: logits * float("nan"))
listed = odd(lambda logits: [logits])
flat = odd(lambda logits: logits[:, 0])
probabilities = odd(lambda logits: logits.softmax(1))

def turned(path):  # what the path says and no weight shows
    net = Odd()
    net.answer = lambda logits: logits.roll(int(path), 1)
    return net
"""
TINY = ("--dataset", "synthetic", "--limit", 6, "--device", "cpu", "--attacks", "pgd", "--num-steps", 2)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module, whose name is used once in this process."""
    monkeypatch.chdir(tmp_path)
    name = f"module_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    return name


def accuracies(path):
    return [
        {name: attack["robust"] for name, attack in entry["attacks"].items()}
        for entry in json.loads(path.read_text())["checkpoints"]
    ]


def test_a_function_of_the_working_directory_makes_the_networks(here, tmp_path, monkeypatch):
    """Without a checkpoint, and a row a checkpoint; `--resume` knows the networks by path and weights."""
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(here)
    for seed, name in enumerate("ab"):
        net = module.build()
        nn.init.normal_(net.head.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
        torch.save(net.state_dict(), tmp_path / f"{name}.pth")
    words = (*TINY, "--network", f"{here}:build")
    code, said, error = run(robustness, *words, "--results", "bare.json")
    assert code == 0 and f"| {here}:build" in said, error
    code, said, error = run(robustness, *words, "--checkpoints", "a.pth", "b.pth", "--results", "both.json")
    assert code == 0 and "| a " in said and "| b " in said, error
    images = evaluation.library.data.load("synthetic", "data", limit=6, splits=("test",)).test
    for name, found in zip("ab", accuracies(tmp_path / "both.json"), strict=True):
        net = module.build(f"{name}.pth").eval()
        result = evaluation.evaluate(
            net, images.images.float() / 255, images.labels, attacks=["pgd"], num_steps=2
        )
        for key, bits in found.items():
            assert bits == "".join("01"[right] for right in result.outcomes[key].correct.tolist())
    again = (*words, "--resume", "--results", "both.json", "--checkpoints")
    code, said, _ = run(robustness, *again, "a.pth", "b.pth")
    assert code == 0 and "finished already" in said
    torch.save(torch.load("a.pth"), "a.pth")  # other bytes or not, the same weights
    assert run(robustness, *again, "a.pth", "b.pth")[0] == 0
    for paths in (("b.pth", "a.pth"), ("./a.pth", "b.pth")):
        code, _, error = run(robustness, *again, *paths)
        assert code == 4 and "begun with another checkpoints" in error


def test_networks_of_equal_weights_that_answer_differently_have_a_row_each(here, tmp_path):
    words = (*TINY, "--limit", 40, "--network", f"{here}:turned", "--attacks", "fgsm", "--checkpoints")
    for turn in "03":
        (tmp_path / turn).write_text(turn)
        assert run(robustness, *words, turn, "--results", f"{turn}.json")[0] == 0
    code, _, error = run(robustness, *words, "0", "3", "--results", "both.json")
    alone = [*accuracies(tmp_path / "0.json"), *accuracies(tmp_path / "3.json")]
    assert code == 0 and accuracies(tmp_path / "both.json") == alone and alone[0] != alone[1], error
    code, _, error = run(robustness, *words, "3", "--results", "0.json", "--resume")
    assert code == 4 and "begun with another checkpoints" in error


def test_a_checkpoint_of_weights_alone_and_its_copy_have_a_row_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        torch.save(resnet(10, 8).state_dict() if name == "a" else torch.load("a.pth"), f"{name}.pth")
    code, said, error = run(robustness, *TINY, "--checkpoints", "a.pth", "b.pth")
    assert code == 0 and "| a " in said and "| b " in said, error


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("build", "is MODULE:FUNCTION"),
        ("nowhere_at_all:build", "no module nowhere_at_all in"),
        ("{}:other", ".py has no function other"),
        ("{}:nothing", "nothing returned a NoneType; it must return an nn.Module"),
        ("{}:raising", "raising() raised KeyError: 'no key'"),
        ("{}:leaving", "leaving() raised SystemExit: 3"),
        ("{}:three", "returned (2, 3) for 2 images of 10 classes; it must return (2, 10)"),
        ("{}:flat", "returned (2,) for 2 images of 10 classes"),
        ("{}:listed", "returned a list; it must return logits, or a tuple with a field logits"),
        ("{}:nan", "returned NaN or Inf"),
        ("broken:build", "import raised ZeroDivisionError: division by zero"),
        ("lacking:build", "import raised ModuleNotFoundError: No module named 'surely_not'"),
    ],
)
def test_faults_of_such_a_function_are_one_line(function, words, here, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "lacking.py").write_text("import surely_not")
    spec = function.format(here) if ":" in function else "module"
    code, _, error = run(robustness, *TINY, "--network", spec)
    assert code == 2 and words in error and spec in error, error
    assert not list(tmp_path.rglob("*.json"))


def test_files_that_a_function_gets_are_looked_for_before_and_prototypes_it_has_none(here):
    words = (*TINY, "--network", f"{here}:build")
    assert run(robustness, *words, "--checkpoints", "none.pth")[0] == 4
    code, _, error = run(robustness, *words, "--predict", "prototype")
    assert code == 2 and "has no prototypes" in error


# ---------------------------------------------------------------- evaluate


def resnet18():
    """torchvision's ResNet-18 for 32 x 32, as most have it: 3 x 3 first, no pooling."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return net


def test_a_network_of_torchvision_is_left_as_it_was():
    net = resnet18()
    net.layer2.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    result = evaluation.evaluate(net, torch.rand(4, 3, 32, 32), torch.arange(4), attacks=["pgd"], num_steps=1)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert str(result).startswith("| Training | No attack |") and "| ResNet" in result.table
    assert list(result.outcomes) == ["clean", "pgd"] and len(result.robust) == 4
    assert (result.outcomes["pgd"].linf <= 8 / 255).all() and (result.outcomes["pgd"].linf > 0).all()
    assert json.loads(result.json)["checkpoints"][0]["attacks"]["pgd"]["images"] == 4


def two_classes(scale=1.0):
    """Two logits of the mean pixel: right about dark and bright images alike."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        net[2].weight.copy_(scale * torch.tensor([[-1.0], [1.0]]).expand(2, 3))
        net[2].bias.copy_(scale * torch.tensor([1.5, -1.5]))
    return net


GREYS = torch.tensor([0.2] * 5 + [0.8] * 5 + [0.51] * 3)
PICTURES = GREYS.view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
LABELS = torch.tensor([0] * 5 + [1] * 8)


def test_two_classes_by_hand():
    """Only the three images near the border fall, and the table, the bits and the JSON say so."""
    result = evaluation.evaluate(
        two_classes(), PICTURES, LABELS, attacks=("fgsm", "pgd-margin"), classes=("dark", "bright")
    )
    assert result.robust.tolist() == [True] * 10 + [False] * 3
    entry = json.loads(result.json)["checkpoints"][0]
    assert entry["worst"]["per_class"] == {"dark": 100.0, "bright": pytest.approx(62.5)}
    assert result.warnings == []
    with pytest.raises(utils.UsageError, match="pgd-dlr: needs 3 classes"):
        evaluation.evaluate(two_classes(), PICTURES, LABELS, attacks=["pgd-dlr"])


def test_what_warns_on_the_command_line_warns_here():
    saturated = evaluation.evaluate(
        two_classes(1e4), PICTURES, LABELS, attacks=["pgd", "pgd-margin"], sanity=True
    )
    assert any("losses agree" in line for line in saturated.warnings)
    assert any(line.startswith("FAIL  gradients") for line in saturated.warnings)


Outputs = namedtuple("Outputs", "deep logits")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = two_classes()

    def forward(self, images):
        deep = self.net[:2](images)
        return Outputs(deep, self.net[2](deep))


def test_the_attacks_on_prototypes_take_any_criterion_with_named_features():
    from prototype_conformity import PrototypeConformityLoss

    criterion = PrototypeConformityLoss(2, {"deep": 3}, 1.0, 1e-4)
    with torch.no_grad():
        criterion.proximity["deep"].centers.copy_(torch.tensor([[0.2], [0.8]]).expand(2, 3))
    names = ("joint-fgsm", "joint-bim", "joint-mim", "joint", "nearest-prototype")
    found = evaluation.evaluate(Named(), PICTURES, LABELS, attacks=names, criterion=criterion)
    assert found.robust.tolist() == [True] * 10 + [False] * 3
    assert list(found.outcomes) == ["clean", *names]
    assert list(evaluation.evaluate(Named(), PICTURES, LABELS, attacks=names).outcomes) == ["clean"]

    class Dict(Named):
        def forward(self, images):
            return super().forward(images)._asdict()

    with torch.no_grad():
        criterion.proximity["deep"].centers.copy_(torch.tensor([[0.8], [0.2]]).expand(2, 3))
    for network in (Named(), Dict()):  # with the prototypes exchanged all that was right is wrong
        found = evaluation.evaluate(network, PICTURES, LABELS, criterion=criterion, predict="prototype")
        nearest = criterion.nearest(Named()(PICTURES)).argmax(1)
        assert found.outcomes["clean"].correct.tolist() == (nearest == LABELS).tolist()
        assert not found.outcomes["clean"].correct.all()


def test_in_inference_mode_where_no_gradient_is_nothing_is_attacked():
    given = {"images": PICTURES, "labels": LABELS}
    with torch.inference_mode():
        for attack in (attacks.fgsm, attacks.pgd):
            with pytest.raises(ValueError, match=r"use torch\.no_grad"):
                attack(two_classes(), **given, epsilon=0.1)
        with pytest.raises(utils.DataError, match=r"use torch\.no_grad"):
            evaluation.evaluate(two_classes(), **given)


@pytest.mark.parametrize(
    ("change", "fault", "words"),
    [
        ({"images": PICTURES * 255}, utils.DataError, "pixels lie in"),
        ({"images": PICTURES[:0], "labels": LABELS[:0]}, utils.DataError, "there are 0 images"),
        ({"labels": LABELS + 1}, utils.DataError, r"labels lie in \[1, 2\], of 2 classes"),
        ({"model": lambda images: images}, utils.UsageError, "must be an nn.Module"),
        ({"images": PICTURES.numpy()}, utils.DataError, r"images are a ndarray; give torch.as_tensor"),
        ({"labels": LABELS.tolist()}, utils.DataError, r"labels are a list; give torch.as_tensor"),
        ({"attacks": "pdg"}, utils.UsageError, "--attacks pdg: .*did you mean pgd"),
        ({"labels": LABELS.float()}, utils.DataError, "float32 labels"),
        ({"model": nn.Sequential(two_classes(), nn.Linear(2, 1))}, utils.UsageError, r"\(2, 1\).*\(2, 2\)"),
        ({"classes": "abc"}, utils.UsageError, "of 3 classes"),
        ({"model": nn.Linear(3, 2)}, utils.UsageError, "raised RuntimeError"),
        ({"attacks": ["pdg"]}, utils.UsageError, "did you mean pgd"),
        ({"epsilon": 8}, utils.UsageError, r"lies in \[0, 1\]"),
        ({"num_steps": 0}, utils.UsageError, "num_steps is a whole number"),
        ({"predict": "prototype"}, utils.UsageError, "no prototypes"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_words(change, fault, words):
    given = {"model": two_classes(), "images": PICTURES, "labels": LABELS, **change}
    with pytest.raises(fault, match=words):
        evaluation.evaluate(**given)


def test_saved_images_lie_in_a_folder_named_after_the_network(tmp_path):
    given = {"images": PICTURES, "labels": LABELS, "attacks": "fgsm", "save_images": str(tmp_path)}
    evaluation.evaluate(two_classes(), **given)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert folder.name.startswith(f"{type(two_classes()).__name__}-")


def test_the_authors_numbers_stand_under_resnets_alone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(PICTURES[0].numel(), 10))
    found = evaluation.evaluate(model, PICTURES, LABELS, attacks="fgsm", classes=data.CIFAR10_CLASSES)
    assert not any("Published by the authors" in note for note in found.notes)
