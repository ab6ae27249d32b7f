"""The joint loss, the prototypes' optimiser, one epoch and accuracy, against references written out."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import checkpoints
import data
import prototype_conformity
import softmax_training
import training
import utils
from resnet_model import Outputs, resnet


@pytest.fixture(scope="module")
def dataset():
    return data.load("synthetic", "data", limit=21)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return resnet(10, 8)


def run_of(dataset, model, tmp_path, adversary=None, criterion=None, lr=0.1, **more):
    options = {"save_to": str(tmp_path / "run.pth.tar"), "precision": "float32", "batch_size": 5, **more}
    criterion = criterion or training.CrossEntropyLoss()
    groups = [{"params": model.parameters(), "momentum": 0.9, "weight_decay": 1e-4}]
    groups += criterion.param_groups(0.5, 1e-4) if hasattr(criterion, "param_groups") else []
    optimizer = torch.optim.SGD(groups, lr=lr)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], 0.1)
    config = softmax_training.Config(**options)
    return training.Run(config, dataset, model, criterion, optimizer, scheduler, adversary)


@pytest.mark.parametrize("layers", [("fc",), ("layer2", "layer3", "fc")])
@pytest.mark.parametrize(("pull", "push"), [(1.0, 1e-4), (0.0, 1e-4), (0.3, 0.0), (0.0, 0.0)])
def test_the_joint_loss_is_the_sum_of_its_terms(model, layers, pull, push):
    widths = {layer: model.feat_dims[layer] for layer in layers}
    criterion = prototype_conformity.PrototypeConformityLoss(10, widths, pull, push)
    outputs, labels = model(torch.rand(4, 3, 16, 16)), torch.tensor([1, 3, 3, 9])
    loss, parts = criterion(outputs, labels)
    expected = F.cross_entropy(outputs.logits, labels)
    for layer in layers:
        features = getattr(outputs, layer)
        if pull:
            expected = expected + pull * criterion.proximity[layer](features, labels)
        if push:
            expected = expected - push * criterion.contrastive[layer](features, labels)
    torch.testing.assert_close(loss, expected)
    assert list(parts) == list(criterion.terms) and not any(part.requires_grad for part in parts.values())
    assert len(list(criterion.parameters())) == len(layers) * (bool(pull) + bool(push))


def test_one_step_of_the_prototypes_is_the_released_one(model):
    """Released: the gradient divided by the loss weight, then plain SGD at lr_prox and lr_conprox."""
    criterion = prototype_conformity.PrototypeConformityLoss(10, {"fc": 1024}, 0.7, 1e-3)
    before = copy.deepcopy(criterion)
    features, labels = torch.randn(6, 1024), torch.tensor([0, 1, 1, 2, 5, 9])
    outputs = model(torch.rand(6, 3, 8, 8))._replace(fc=features)
    criterion(outputs, labels)[0].backward()
    torch.optim.SGD(criterion.param_groups(0.5, 1e-2), lr=123.0).step()
    for terms, old, sign, lr in (
        (criterion.proximity, before.proximity, 1, 0.5),
        (criterion.contrastive, before.contrastive, -1, 1e-2),
    ):
        centers = old["fc"].centers
        (gradient,) = torch.autograd.grad(sign * old["fc"](features, labels), centers)
        torch.testing.assert_close(terms["fc"].centers, centers - lr * gradient)


def test_shared_prototypes_are_one_parameter_in_one_group():
    criterion = prototype_conformity.PrototypeConformityLoss(
        10, {"fc": 8, "layer3": 4}, 1.0, 0.1, shared=True
    )
    assert criterion.contrastive["fc"].centers is criterion.proximity["fc"].centers
    (group,) = criterion.param_groups(0.5, 1e-4)
    assert len(group["params"]) == 2 and group["lr"] == 0.5


def test_item_35_modes_are_restored_module_by_module(model):
    model.train()
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), utils.evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("name", "device", "compiler", "expected"),
    [
        *[("auto", "cpu", True, False), ("off", "cuda", True, False), ("off", "cpu", True, False)],
        *[("auto", "cuda", False, False), ("on", "cpu", True, True), ("on", "cuda", True, True)],
        ("auto", "cuda", True, True),
    ],
)
def test_what_is_compiled(name, device, compiler, expected, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: "/bin/true" if compiler else None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(training.Path, "exists", lambda path: path.name == "Python.h")
    assert training.compiles(name, torch.device(device)) == expected


def test_the_step_and_the_attack_are_one_graph_each(dataset, model, tmp_path):
    """Nothing in them breaks the graph, or a GPU would have to wait for Python in the middle."""
    criterion = prototype_conformity.PrototypeConformityLoss(10, {"fc": 1024}, 1.0, 1e-4)
    run = run_of(dataset, model, tmp_path, lambda *_: None, criterion, precision="bfloat16")
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True, dynamic=False)
    images, labels = data.to_float(dataset.train.images), dataset.train.labels
    state = copy.deepcopy(model.state_dict())
    loss, _, correct = whole(run.losses)(images, labels)
    model.load_state_dict(state)
    expected, _, right = run.losses(images, labels)
    torch.testing.assert_close(loss, expected)
    assert correct == right
    with run.autocast():
        images.requires_grad_()
        gradients = [
            torch.autograd.grad(f(images).float().sum(), images)[0] for f in (whole(run.view), run.view)
        ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("device", "needs"), [("cpu", r"a C\+\+ compiler"), ("cuda", "Triton, a C compiler")]
)
def test_item_43_compiling_without_a_compiler_is_refused(device, needs, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(utils.UsageError, match=f"needs {needs}"):
        training.compiles("on", torch.device(device))


@pytest.mark.parametrize("adversary", [None, lambda view, images, labels, generator: images])
def test_a_batch_of_another_size_is_not_compiled_for(adversary, dataset, model, tmp_path, monkeypatch):
    """21 images in batches of 8: two are full, and of the last, 5, the compiled functions see nothing."""
    run = run_of(dataset, model, tmp_path, adversary, batch_size=8)
    sizes = []

    def losses(images, labels):
        sizes.append(len(labels))
        return run.losses(images, labels)

    run.compiled = (losses, run.view)
    run.open()
    with utils.StopSignals() as stop:
        run.train_epoch(stop)
    assert sizes == [8, 8] if adversary is None else sizes == [16, 16]


def test_another_weight_of_the_loss_is_no_other_graph():
    torch.compiler.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    outputs, labels = Outputs(*torch.randn(3, 4, 8), torch.randn(4, 10)), torch.arange(4)
    for weight in (1.0, 0.1, 0.01):
        criterion = prototype_conformity.PrototypeConformityLoss(
            10, {"layer3": 8, "fc": 8}, weight, weight / 10
        )
        loss, _ = torch.compile(criterion.forward, backend=counting, fullgraph=True)(outputs, labels)
        torch.testing.assert_close(loss, criterion(outputs, labels)[0])
    assert len(graphs) == 1


def test_accuracy_counts_every_image(model, dataset):
    with torch.no_grad():
        model.eval()
        images = dataset.test.images.float() / 255
        right = [
            model.logits(image[None]).argmax() == label
            for image, label in zip(images, dataset.test.labels, strict=True)
        ]
    assert training.accuracy(model.train(), dataset.test) == pytest.approx(100 * sum(right).item() / 21)
    assert model.training


def test_an_epoch_is_the_textbook_one(dataset, model, tmp_path):
    """Shuffled, augmented, forward, backward, step: written out beside it, the same weights and means."""
    textbook = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
    run = run_of(dataset, model, tmp_path, seed=3)
    run.open()
    run.train_epoch(utils.StopSignals())
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
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert run.means()["loss"] == pytest.approx(sum(losses) / 21, rel=1e-5)


def test_an_adversary_doubles_the_batch_and_sees_the_network_as_it_stands(dataset, model, tmp_path):
    """Frozen, in eval mode, with the weights and statistics of this very batch."""
    seen = []

    def adversary(model_fn, images, labels, generator):
        present = copy.deepcopy(model).eval().logits(images)
        torch.testing.assert_close(model_fn(images), present, rtol=1e-4, atol=1e-4)
        assert not model_fn(images).requires_grad
        seen.append((images.clone(), labels, torch.rand(1, generator=generator).item()))
        return 1 - images

    run = run_of(dataset, model, tmp_path, adversary, seed=1)
    step, batches = run.step, []
    run.step = lambda images, labels: (batches.append((images, labels)), step(images, labels))
    run.open()
    run.train_epoch(utils.StopSignals())
    assert len({drawn for _, _, drawn in seen}) == len(seen) == 4 and run.images == 42
    for (clean, labels, _), (both, twice) in zip(seen, batches, strict=True):
        assert torch.equal(both, torch.cat([clean, 1 - clean])) and torch.equal(
            twice, torch.cat([labels, labels])
        )
    assert model.training


def test_the_schedule_and_the_rows(dataset, model, tmp_path):
    run = run_of(dataset, model, tmp_path, epochs=3, eval_every=2)
    run.open()
    for _ in range(3):
        run.train_epoch(utils.StopSignals())
        run.close_epoch()
    assert [row["lr"] for row in run.history] == pytest.approx([0.1, 0.01, 0.01])
    assert [row["test_accuracy"] is None for row in run.history] == [True, False, False]
    assert [row["epoch"] for row in run.history] == [1, 2, 3]
    state = checkpoints.load(tmp_path / "run.pth.tar")
    assert state["finished"] and state["history"] == run.history
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert lines == state["log"] and len(lines) == 5


@pytest.mark.parametrize("seconds", [0, 59, 60, 3599, 3600, 100 * 3600 + 61])
def test_the_clock_by_hand(seconds):
    hours, minutes, rest = training.clock(seconds).split(":")
    assert 3600 * int(hours) + 60 * int(minutes) + int(rest) == seconds and len(minutes) == len(rest) == 2
