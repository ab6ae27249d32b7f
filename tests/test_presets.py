"""`--preset paper`: what it sets, what wins over it, where it is said; what follows from the data set."""

import dataclasses
import re

import pytest
import torch
from commands import run
from sets_on_disk import write_mnist

import cli
import data
import pcl_training
import pcl_training_adversarial_fgsm
import pcl_training_adversarial_pgd
import plot_features
import robustness
import softmax_training

ADVERSARIAL = (pcl_training_adversarial_fgsm, pcl_training_adversarial_pgd)
SCRIPTS = (softmax_training, pcl_training, *ADVERSARIAL)
STAGE_1 = {"epochs": 200, "batch_size": 256, "lr": 0.1, "milestones": (), "depth": 74}
STAGE_2 = {
    **{"epochs": 300, "batch_size": 256, "lr": 0.1, "milestones": (200, 250), "gamma": 0.1, "depth": 74},
    **{"layers": ("layer2", "layer3", "fc"), "aux_dim": 512, "weight_prox": 1.0, "weight_conprox": 1.0},
    **{"distance": "plain", "shared_prototypes": True, "separation": True},
}


def parsed(script, *words):
    return cli.parse_config(script.Config, [str(word) for word in words])


def values(config, wanted):
    return {name: getattr(config, name) for name in wanted}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_papers_settings_are_set_and_nothing_else(script):
    config, released = parsed(script, "--preset", "paper"), parsed(script)
    wanted = dict(STAGE_1 if script is softmax_training else STAGE_2)
    wanted |= {"epsilon_min": 0.01, "epsilon_max": 0.05} if script in ADVERSARIAL else {}
    wanted |= {"step_size": None} if script is pcl_training_adversarial_pgd else {}
    assert values(config, wanted) == wanted
    others = {name: value for name, value in vars(released).items() if name not in (*wanted, "preset")}
    assert values(config, others) == others
    assert released == script.Config() and released.preset == "released"
    assert set(script.PAPER) - {"grey"} <= {field.name for field in dataclasses.fields(script.Config)}
    for name in set(script.PAPER) - {"grey", "epsilon_max", "weight_prox"}:
        assert getattr(released, name) != script.PAPER[name], f"{name} is no difference"


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist"])
def test_grey_sets_have_values_of_their_own(dataset):
    assert parsed(softmax_training, "--preset", "paper", "--dataset", dataset).epochs == 50
    for script in ADVERSARIAL:
        for preset in ("released", "paper"):
            config = parsed(script, "--dataset", dataset, "--preset", preset)
            assert (config.epsilon_min, config.epsilon_max) == (0.1, 0.5)
            assert getattr(config, "step_size", None) is None  # of PGD: epsilon / num_steps
        assert (config.model, config.fc_dim, config.depth, config.aux_dim) == ("cnn6", 64, 110, 0)
        assert (config.lr, config.weight_prox) == (0.003, 1.0)
        config = parsed(script, "--dataset", dataset)
        assert (config.lr, config.weight_prox, config.fc_dim) == (0.003, 0.001, 64)  # more diverges


@pytest.mark.parametrize("order", [1, -1])
def test_an_option_given_beside_the_preset_wins(order):
    words = [("--preset", "paper"), ("--epochs", "7"), ("--milestones",), ("--epsilon-max", "0.04")]
    words += [("--no-separation",), ("--distance", "squared"), ("--depth", "110")]
    config = parsed(pcl_training_adversarial_pgd, *(word for pair in words[::order] for word in pair))
    given = {"epochs": 7, "milestones": (), "epsilon_max": 0.04, "separation": False, "distance": "squared"}
    assert values(config, given) == given and config.depth == 110 and config.lr == 0.1
    config = parsed(ADVERSARIAL[0], "--dataset", "mnist", "--preset", "paper", "--epsilon-min", "0.3")
    assert (config.epsilon_min, config.epsilon_max) == (0.3, 0.5)  # above the released epsilon_max
    config = parsed(pcl_training, "--dataset", "mnist", "--model", "resnet", "--preset", "paper")
    assert (config.model, config.depth, config.aux_dim, config.fc_dim) == ("resnet", 74, 512, 1024)


def test_an_unknown_preset_is_refused_in_one_line():
    status, _, said = run(softmax_training, "--preset", "papers")
    assert status == 2 and "did you mean paper?" in said


@pytest.mark.parametrize(("dataset", "stem"), [
    ("cifar10", "CIFAR10"), ("folder", "CIFAR10"), ("synthetic", "CIFAR10"), ("cifar100", "CIFAR100"),
    ("svhn", "SVHN"), ("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"),
])  # fmt: skip
def test_names_of_files_and_the_radius_follow_the_data_set(dataset, stem, tmp_path, monkeypatch):
    config = parsed(pcl_training, "--dataset", dataset)
    assert config.save_to == f"Models_PCL/{stem}_PCL.pth.tar"
    assert config.init_from == f"Models_Softmax/{stem}_Softmax.pth.tar"
    assert parsed(pcl_training, "--dataset", dataset, "--save-to", "CIFAR10.pth").save_to == "CIFAR10.pth"
    grey = stem.endswith("MNIST")
    for script in (robustness, plot_features):
        config = parsed(script, "--dataset", dataset)
        expected = (0.3, pytest.approx(0.03)) if grey else (8 / 255, None)
        assert (config.epsilon, config.step_size) == expected
        config = parsed(script, "--dataset", dataset, "--epsilon", "0.1", "--step-size", "0.02")
        assert (config.epsilon, config.step_size) == (0.1, 0.02)
        assert parsed(script, "--dataset", dataset, "--epsilon", "0").epsilon == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Models_PCL").mkdir()
    stems = {kind.stem for kind in data.SETS.values()}
    for name in (*stems, "other"):
        (tmp_path / f"Models_PCL/{name}_PCL_long.pth.tar").touch()
    found = robustness.checkpoints_of(parsed(robustness, "--dataset", dataset))
    assert found == [f"Models_PCL/{stem}_PCL_long.pth.tar", "Models_PCL/other_PCL_long.pth.tar"]


def test_the_preset_is_in_the_log_and_in_the_checkpoint_and_may_be_spelt_out_on_resume(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "run.pth.tar"
    words = ("--dataset", "mnist", "--data-dir", tmp_path, "--save-to", path, "--batch-size", 20)
    status, out, said = run(softmax_training, *words, "--preset", "paper", "--epochs", 1)
    assert status == 0, said
    (line,) = [line for line in out.splitlines() if line.startswith("preset paper: ")]
    assert re.fullmatch(r"preset paper: milestones none, lr 0.003; otherwise: epochs 1, batch_size 20", line)
    assert line in path.with_name("run.log").read_text().splitlines()
    config = torch.load(path, weights_only=True)["config"]
    assert (config["preset"], config["batch_size"], config["milestones"]) == ("paper", 20, [])
    status, out, said = run(softmax_training, *words, "--milestones", "--resume", "--epochs", 2)
    assert status == 0, said
    assert "resumed with another preset paper -> released" in out
