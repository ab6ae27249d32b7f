"""The joint loss: the sum of its terms, the released step of its prototypes, one graph for every weight."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

import data
import training
import utils
from prototype_conformity import PrototypeConformityLoss, output
from resnet_model import Outputs, resnet


@pytest.fixture
def model():
    torch.manual_seed(0)
    return resnet(10, 8)


@pytest.mark.parametrize("layers", [(), ("fc",), ("layer2", "layer3", "fc")])
@pytest.mark.parametrize(("pull", "push"), [(1.0, 1e-4), (0.0, 1e-4), (0.3, 0.0), (0.0, 0.0)])
def test_the_joint_loss_is_the_sum_of_its_terms(model, layers, pull, push):
    widths = {layer: model.feat_dims[layer] for layer in layers}
    criterion = PrototypeConformityLoss(10, widths, pull, push)
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
    criterion = PrototypeConformityLoss(10, {"fc": 1024}, 0.7, 1e-3)
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
    criterion = PrototypeConformityLoss(10, {"fc": 8, "layer3": 4}, 1.0, 0.1, shared=True)
    assert criterion.contrastive["fc"].centers is criterion.proximity["fc"].centers
    (group,) = criterion.param_groups(0.5, 1e-4)
    assert len(group["params"]) == 2 and group["lr"] == 0.5


def test_the_approach_is_measured_between_one_prototype_and_another(model):
    criterion = PrototypeConformityLoss(10, {"layer3": 6, "fc": 8}, 1.0, squared=False)
    points = {layer: term.centers.detach() for layer, term in criterion.proximity.items()}
    labels, other = torch.tensor([0, 3]), torch.tensor([1, 7])
    for share in (0.0, 0.5, 0.7, 1.0):
        features, wanted = {}, 0.0
        for name, p in points.items():
            gap = (p[labels] - p[other]).norm(dim=1)
            mean = torch.pdist(p).mean()
            features[name] = torch.lerp(p[labels], p[other], share)
            wanted = wanted + (share - 0.5) * gap / (mean / 2)
        found = criterion.approach(Outputs(None, logits=None, **features), labels)
        torch.testing.assert_close(found.gather(1, other[:, None])[:, 0], wanted, rtol=1e-4, atol=1e-5)
        assert (found.gather(1, labels[:, None]) == -torch.inf).all()


def test_another_weight_of_the_loss_is_no_other_graph():
    torch.compiler.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    outputs, labels = Outputs(*torch.randn(3, 4, 8), torch.randn(4, 10)), torch.arange(4)
    for weight in (1.0, 0.1, 0.01):
        criterion = PrototypeConformityLoss(10, {"layer3": 8, "fc": 8}, weight, weight / 10)
        loss, _ = torch.compile(criterion.forward, backend=counting, fullgraph=True)(outputs, labels)
        torch.testing.assert_close(loss, criterion(outputs, labels)[0])
    assert len(graphs) == 1


def test_class_means_of_a_class_without_images_keep_the_drawn_prototype(model):
    dataset = data.load("synthetic", "data", limit=7)  # 10 classes: three have no image
    criterion = PrototypeConformityLoss(10, {"fc": 1024}, 1.0, 1e-4)
    drawn = criterion.proximity["fc"].centers.detach().clone()
    criterion.init_class_means(model, dataset.train)
    centers = criterion.proximity["fc"].centers
    assert centers.isfinite().all()
    seen = torch.zeros(10, dtype=torch.bool).index_fill_(0, dataset.train.labels, True)
    assert torch.equal(centers[~seen], drawn[~seen]) and (~seen).sum() == 3
    with torch.no_grad(), utils.evaluating(model):
        features = model(data.to_float(dataset.train.images)).fc
    for label in dataset.train.labels.unique():
        expected = features[dataset.train.labels == label].double().mean(0)
        torch.testing.assert_close(centers[label].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [True, False])
def test_the_criterion_takes_any_network_with_named_features(fields):
    """Class means, a step and the accuracy of torchvision's ResNet-18, whose outputs are a dict or fields."""
    torch.manual_seed(0)
    network, generator = torchvision.models.resnet18(num_classes=3), torch.Generator().manual_seed(0)
    network = create_feature_extractor(
        network, {"layer4.1.relu": "stage", "flatten": "pooled", "fc": "logits"}
    )
    pooled = lambda outputs: {**outputs, "stage": outputs["stage"].amax((2, 3))}  # noqa: E731
    network.register_forward_hook(lambda module, given, outputs: pooled(outputs))
    if fields:
        network.register_forward_hook(lambda module, given, outputs: SimpleNamespace(**outputs))
    images = torch.randint(256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = data.Split(images, torch.tensor([0, 0, 0, 1, 1, 1]))
    criterion = PrototypeConformityLoss(3, {"stage": 512, "pooled": 512}, 1.0, 1e-4)
    network.train()
    criterion.init_class_means(network, split)
    assert network.training
    with torch.no_grad(), utils.evaluating(network):
        outputs = network(images / 255)
    for layer in ("stage", "pooled"):
        for terms in (criterion.proximity, criterion.contrastive):
            means = torch.stack([output(outputs, layer)[split.labels == k].mean(0) for k in (0, 1)])
            torch.testing.assert_close(terms[layer].centers[:2], means)
    loss, parts = criterion(network(images / 255), split.labels)
    loss.backward()
    assert set(parts) == {"cross_entropy", "proximity", "contrastive"}
    assert all(p.grad.isfinite().all() for p in (*network.parameters(), *criterion.parameters()))
    with torch.no_grad(), utils.evaluating(network):
        right = (output(network(images / 255), "logits").argmax(1) == split.labels).double().mean().item()
    assert training.accuracy(network, split) == pytest.approx(100 * right)
