"""CNN-6 against its description, and through every script that takes the ResNet."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from commands import run, same
from PIL import Image
from sets_on_disk import strokes, write_cifar100, write_mnist, write_svhn

import attacks
import checkpoints
import evaluation
import models
import pcl_training
import pcl_training_adversarial_fgsm
import pcl_training_adversarial_pgd
import plot_features
import robustness
import softmax_training
from cnn6_model import cnn6
from resnet_model import Outputs, resnet

CONVS = (0, 2, 5, 7, 10, 12)  # their places among the layers; a PReLU follows each, a pool each second one


def images(count=3, channels=1, side=28):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(1))


def network(**arguments):
    torch.manual_seed(0)
    model = cnn6(**arguments).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, -0.3, 0.3)
    return model


def by_hand(weights, x, mean, std):
    """What the network answers, from its weights alone."""
    x = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(len(mean))], dim=1)
    for i, place in enumerate(CONVS):
        x = F.conv2d(x, weights[f"features.{place}.weight"], weights[f"features.{place}.bias"], padding=2)
        x = torch.where(x > 0, x, x * weights[f"features.{place + 1}.weight"].view(1, -1, 1, 1))
        if i % 2:
            side = x.shape[-1] // 2 * 2
            x = x[..., :side, :side].unflatten(-1, (-1, 2)).amax(-1).unflatten(-2, (-1, 2)).amax(-2)
    outputs = [x.flatten(2).mean(2)]
    x = x.flatten(1)
    for name in ("fc1", "fc2", "fc3"):
        x = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        outputs.append(x)
    return outputs


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_classes": 3, "fc_dim": 2, "side": 33, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}],
)
def test_features_and_scores_are_those_computed_by_hand(arguments):
    model = network(**arguments)
    x = images(2, len(model.arguments["mean"]), model.arguments["side"])
    outputs = model(x)
    assert isinstance(outputs, Outputs) and torch.equal(model.logits(x), outputs.logits)
    wanted = by_hand(model.state_dict(), x, model.arguments["mean"], model.arguments["std"])
    for output, expected in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    fc_dim = arguments.get("fc_dim", 64)
    assert list(model.feat_dims.items()) == [("layer2", 128), ("layer3", 512), ("fc", fc_dim)]
    assert [output.shape[1] for output in outputs] == [128, 512, fc_dim, arguments.get("num_classes", 10)]


def test_its_layers_are_the_papers():
    shapes = [tuple(value.shape) for value in cnn6().state_dict().values() if value.ndim > 1]
    widths = [(1, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    assert shapes[:6] == [(out, into, 5, 5) for into, out in widths]
    assert shapes[6:] == [(512, 128 * 3 * 3), (64, 512), (10, 64)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_frozen_copy_follows_the_original(dtype):
    model = network().train()
    frozen, x = models.folded(model, dtype), images()
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None), torch.no_grad():
            expected, found = model.logits(x), frozen(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-2 if dtype else 1e-5)
        if step == 0:
            for parameter in model.parameters():
                parameter.data.mul_(1.1)
            frozen.refresh()
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("wrong", [
    {"num_classes": 1}, {"fc_dim": 0}, {"side": 7}, {"side": 10**9}, {"mean": ()}, {"std": (0.0,)},
    {"mean": ("a",)}, {"mean": (0.1, 0.2)}, {"mean": 0.1}, {"std": (float("nan"),)},
])  # fmt: skip
@pytest.mark.parametrize("make", [cnn6, resnet])
def test_arguments_that_make_no_network_are_refused(make, wrong):
    if make is resnet and "side" in wrong:
        return
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(**wrong)


@pytest.mark.parametrize(("key", "value"), [
    ("model", "vgg"), ("model", ["cnn6"]), ("mean", "0.1"), ("mean", [0.1, 0.1]), ("mean", [float("inf")]),
    ("side", 32), ("side", 1e9), ("side", 10**12), ("std", {}), ("std", [0]),
])  # fmt: skip
def test_a_checkpoint_that_lies_about_its_network_is_refused(tmp_path, key, value):
    model = network()
    said = {"model": "cnn6", **model.arguments, key: value}
    torch.save({"format": 2, "state_dict": model.state_dict(), "network": said}, tmp_path / "a.pth")
    with pytest.raises(checkpoints.CheckpointError) as error:
        checkpoints.read_network(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in str(error.value) and len(str(error.value)) < 500


# ---------------------------------------------------------------- through all scripts

SMALL = ("--epochs", 1, "--batch-size", 20, "--precision", "float32")


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    root = tmp_path_factory.mktemp("mnist")
    write_mnist(root)
    return root


@pytest.fixture(scope="module")
def trained(mnist, tmp_path_factory):
    """The four scripts, the table and the picture's numbers, at their default paths on MNIST."""
    cwd, data = tmp_path_factory.mktemp("work"), ("--dataset", "mnist", "--data-dir", mnist)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        done = [run(softmax_training, *data, *SMALL)]
        layers = ("--layers", "layer2", "layer3", "fc", "--prototype-init", "class-means")
        pcl = (pcl_training, pcl_training_adversarial_fgsm, pcl_training_adversarial_pgd)
        done += [run(script, *data, *SMALL, *layers, "--num-steps", 2)
                 if script is pcl_training_adversarial_pgd else run(script, *data, *SMALL, *layers)
                 for script in pcl]  # fmt: skip
        few = (*data, "--limit", 10)
        done.append(
            run(robustness, *few, "--attacks", "fgsm", "pgd", "nearest-prototype", "--save-images", "x")
        )
        done.append(run(plot_features, *few, "--num-steps", 2))
    assert [status for status, _, _ in done] == [0] * 6, [said for _, _, said in done]
    return cwd, done


PATHS = [
    "Models_Softmax/MNIST_Softmax.pth.tar",
    "Models_PCL/MNIST_PCL.pth.tar",
    "Models_PCL/MNIST_PCL_AdvTrain_FGSM.pth.tar",
    "Models_PCL/MNIST_PCL_AdvTrain_PGD.pth.tar",
]


def test_files_are_named_after_the_data_set_and_hold_network_and_normalisation(trained):
    cwd, done = trained
    for path in PATHS:
        state = torch.load(cwd / path, weights_only=True)
        assert state["network"] == {
            **{"model": "cnn6", "num_classes": 10, "fc_dim": 64, "side": 28},
            **{"mean": [0.1307], "std": [0.3081]},
        }
        assert state["config"]["model"] == "cnn6" and state["classes"] == list("0123456789")
        assert not {"mean", "std"} & state["state_dict"].keys()
        assert len(list(csv.DictReader((cwd / path.replace(".pth.tar", ".csv")).open()))) == 1
    assert "CNN-6, 1,419,114 parameters" in done[0][1]
    assert sorted(state["criterion"])[:3] == [f"contrastive.{n}.centers" for n in ("fc", "layer2", "layer3")]


def test_its_table_takes_the_papers_radius_and_a_step_that_reaches_it(trained):
    cwd, _ = trained
    report = json.loads((cwd / "results/robustness.json").read_text())
    assert [entry["path"] for entry in report["checkpoints"]] == PATHS
    assert report["settings"]["epsilon"] == 0.3 and report["settings"]["step_size"] == pytest.approx(0.03)
    assert report["checkpoints"][1]["attacks"]["pgd"]["max_delta"] == pytest.approx(0.3, abs=1e-6)
    assert "nearest-prototype" in report["checkpoints"][1]["attacks"]
    assert len(list((cwd / "x").glob("*/fgsm"))) == 4 and len(list((cwd / "x").glob("*/fgsm.png"))) == 4
    assert json.loads((cwd / "features.json").read_text())["settings"]["epsilon"] == 0.3


def test_a_stopped_run_goes_on_bit_for_bit(trained, mnist, tmp_path, monkeypatch):
    monkeypatch.chdir(trained[0])
    data = ("--dataset", "mnist", "--data-dir", mnist, *SMALL[2:], "--lr", 1e-3, "--weight-prox", 1e-3)
    ends = {}
    for name, stops in (("whole", [()]), ("parts", [("--max-minutes", 1e-9)] * 3 + [("--resume",)])):
        path = tmp_path / f"{name}.pth.tar"
        for words in stops:
            status, _, said = run(pcl_training, *data, "--epochs", 2, "--save-to", path, "--resume", *words)
            assert status in (0, 75), said
        ends[name] = torch.load(path, weights_only=True)
    for part in ("state_dict", "criterion", "optimizer"):
        assert same(ends["whole"][part], ends["parts"][part])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_exported_weights_are_the_same_network_for_other_libraries(trained, tmp_path, suffix):
    cwd, _ = trained
    target = tmp_path / f"pcl.{suffix}"
    checkpoints.export(cwd / PATHS[1], target)
    mine, theirs = (evaluation.classifier(path) for path in (cwd / PATHS[1], target))
    x, labels = images(4), torch.arange(4)
    assert torch.equal(mine(x), theirs(x)) and mine(x).shape == (4, 10)
    found = attacks.pgd(theirs, x, labels, 0.3, step_size=0.03, num_steps=3)
    assert 0.08 < (found - x).abs().max() <= 0.3 + 1e-6


# ---------------------------------------------------------------- what does not fit


def test_grey_and_colour_are_told_apart_in_one_line(trained, tmp_path, monkeypatch):
    cwd, _ = trained
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("scipy")

    root = tmp_path / "svhn"
    write_svhn(root, monkeypatch)  # it has the names of MNIST's classes
    svhn, small = ("--dataset", "svhn", "--data-dir", root), ("--depth", 8, *SMALL)
    assert run(softmax_training, *svhn, *small)[0] == 0
    grey, colour = cwd / PATHS[0], "Models_Softmax/SVHN_Softmax.pth.tar"
    mnist = ("--dataset", "mnist", "--data-dir", tmp_path / "mnist")
    write_mnist(tmp_path / "mnist")
    for script, words, said in (
        (
            robustness,
            (*svhn, "--checkpoints", grey),
            "grey images of 28 pixels, but those of svhn are colour",
        ),
        (robustness, (*mnist, "--checkpoints", colour), "colour images, but those of mnist are grey"),
        (plot_features, (*mnist, "--checkpoints", colour), "colour images, but those of mnist are grey"),
        (pcl_training, (*svhn, *small, "--init-from", grey), "grey images of 28 pixels, but those of svhn"),
        (pcl_training, (*mnist, *SMALL, "--init-from", colour), "colour images, but those of mnist are grey"),
    ):
        status, _, error = run(script, *words, *(("--limit", 20) if script is not pcl_training else ()))
        assert status == 4 and said in error and "--dataset" in error, error


def test_a_network_of_ten_classes_is_refused_on_the_hundred_of_cifar100(tmp_path, monkeypatch):
    write_cifar100(tmp_path, monkeypatch)
    torch.save(resnet(10, 8).state_dict(), tmp_path / "ten.pth")
    words = ("--dataset", "cifar100", "--data-dir", tmp_path, "--checkpoints", tmp_path / "ten.pth")
    status, _, said = run(robustness, *words, "--results", tmp_path / "r.json")
    assert status == 4 and "a network of 10 classes, but the data set has 100" in said


@pytest.mark.parametrize("option", ["depth", "aux-dim"])
def test_options_of_the_other_network_are_refused(option):
    status, _, said = run(pcl_training, "--dataset", "mnist", f"--{option}", 8)
    assert status == 2 and f"--{option}: cnn6 has none" in said


def test_either_network_takes_grey_and_colour_images(mnist, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, image, label in zip(["train", "test"] * 20, *strokes(40, 2), strict=True):
        path = tmp_path / "grey" / split / f"digit {label // 5}" / f"{len(list(tmp_path.rglob('*.png')))}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    for words in (
        ("--dataset", "mnist", "--data-dir", mnist, "--model", "resnet", "--depth", 8),
        ("--dataset", "synthetic", "--limit", 20, "--model", "cnn6"),
        ("--dataset", "folder", "--data-dir", "grey", "--model", "cnn6"),
    ):
        status, _, said = run(softmax_training, *words, *SMALL, "--save-to", f"{words[1]}.pth.tar")
        assert status == 0, said
    status, out, said = run(robustness, *words[:4], "--checkpoints", "folder.pth.tar", "--attacks", "fgsm")
    assert status == 0 and "on 20 test images of folder" in out, said
    grey, colour = (checkpoints.read_network(f"{name}.pth.tar") for name in ("mnist", "synthetic"))
    assert (grey.model, grey.arguments["mean"]) == ("resnet", [0.1307])
    assert (colour.model, colour.arguments["side"], len(colour.arguments["mean"])) == ("cnn6", 32, 3)
    assert models.build(grey.model, grey.arguments)(images(2)).logits.shape == (2, 10)
