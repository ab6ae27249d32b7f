"""The scripts on a device that is not the CPU: no tensor is left on the other side, no step waits for it."""

import contextlib
import dataclasses
import json

import pytest
import torch
from elsewhere import DEVICE, WAITS, only_device

import checkpoints
import data
import evaluation
import pcl_training
import pcl_training_adversarial_fgsm
import pcl_training_adversarial_pgd
import plot_features
import robustness
import softmax_training

SCRIPTS = (softmax_training, pcl_training, pcl_training_adversarial_fgsm, pcl_training_adversarial_pgd)
TINY = {
    "dataset": "synthetic",
    "depth": 8,
    "batch_size": 6,
    "epochs": 1,
    "precision": "float32",
    "compile": "off",
    "device": "cpu",  # what the other one is compared with; there it says nothing
}
EVALUATED = {"dataset": "synthetic", "device": "cpu", "limit": 3, "num_steps": 1, "random_start": True}
EVERY_ATTACK = tuple(name for name in evaluation.ATTACKS if name != "autoattack")


def train(script, path, stage1, **options):
    if script is not softmax_training:
        options["init_from"] = str(stage1)
    if script is pcl_training_adversarial_pgd:
        options["num_steps"] = 2
    script.main(script.Config(**{**TINY, "limit": 20, "save_to": str(path), **options}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of every script, trained on the CPU."""
    folder, paths = tmp_path_factory.mktemp("trained"), []
    for script in SCRIPTS:
        paths.append(folder / f"{script.__name__}.pth.tar")
        train(script, paths[-1], paths[0])
    return paths


def test_the_device_refuses_what_a_gpu_refuses(monkeypatch):
    with only_device(monkeypatch):
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert (there + 1).device == DEVICE and (there + torch.tensor(1.0)).tolist() == [2.0] * 3
        for slip in (
            lambda: there + here,
            lambda: torch.where(there > 0, there, here),
            lambda: here[there.long()],
            lambda: torch.rand(2, device=DEVICE, generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match=r"two devices|generator"):
                slip()
        WAITS.clear()
        there.requires_grad_().square().sum().backward()
        assert not WAITS and there.grad.tolist() == [2.0] * 3
        pinned = torch.ones(3, pin_memory=True)
        for wait, waits in (
            *((there.sum().item, True), (there.cpu, True), (lambda: bool(there.any()), True)),
            *((lambda: there[there > 0], True), (lambda: there[here.long()], True)),
            (lambda: there[torch.zeros(2, dtype=torch.int64, device=DEVICE)], False),
            *((lambda: here.to(DEVICE), True), (lambda: here.to(DEVICE, non_blocking=True), True)),
            *((lambda: pinned.to(DEVICE), True), (lambda: pinned.to(DEVICE, non_blocking=True), False)),
        ):
            WAITS.clear()
            wait()
            assert bool(WAITS) == waits


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_begins_there_as_on_the_cpu_and_is_resumed(script, trained, tmp_path, monkeypatch):
    """One batch, whose loss is before the step: later ones differ by signs of small gradients."""
    one = {"limit": 6, "prototype_init": "class-means"} if script is pcl_training else {"limit": 6}
    path = tmp_path / "there.pth.tar"
    train(script, tmp_path / "here.pth.tar", trained[0], **one)
    with only_device(monkeypatch):
        train(script, path, trained[0], **one)
    here, there = (checkpoints.load(tmp_path / f"{name}.pth.tar")["history"][0] for name in ("here", "there"))
    for column in ("loss", "cross_entropy", "train_accuracy"):
        assert there[column] == pytest.approx(here[column], rel=1e-3)
    with only_device(monkeypatch):
        train(script, path, trained[0], **one, epochs=2, resume=True)
    assert len(checkpoints.load(path)["history"]) == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_batch_waits_for_the_device(script, trained, tmp_path, monkeypatch):
    waits, load = {}, data.load
    for limit in (18, 54):
        with only_device(monkeypatch), monkeypatch.context() as patch:
            there = load("synthetic", "", limit=limit, device=DEVICE)
            patch.setattr(data, "load", lambda *args, there=there, **options: there)
            WAITS.clear()
            train(script, tmp_path / f"{limit}.pth.tar", trained[0], limit=limit)
            waits[limit] = len(WAITS)
    assert waits[54] == waits[18]


def test_every_attack_and_report_works_there_as_on_the_cpu(trained, tmp_path, monkeypatch):
    options = {**EVALUATED, "attacks": EVERY_ATTACK, "apgd_steps": 3, "num_queries": 3, "cw_steps": 1}
    options |= {"checkpoints": (str(trained[1]),), "source_checkpoint": str(trained[0]), "restarts": 2}
    options |= {"sanity": True, "sanity_images": 3, "epsilons": (8 / 255,), "step_counts": (1,)}
    config = robustness.Config(**options, model_card=True, curve_attacks=("pgd",))
    found = []
    for name, place in (("here", contextlib.nullcontext()), ("there", only_device(monkeypatch))):
        files = {"results": str(tmp_path / f"{name}.json"), "save_images": str(tmp_path / name)}
        with place:
            robustness.main(dataclasses.replace(config, **files))
        (entry,) = json.loads((tmp_path / f"{name}.json").read_text())["checkpoints"]
        found.append({key: attack["robust"] for key, attack in entry["attacks"].items()})
    assert found[0] == found[1] and set(found[0]) == {"clean", *EVERY_ATTACK}


def test_prototypes_and_features_are_read_there(trained, tmp_path, monkeypatch):
    checkpoints, picture = (str(trained[1]),), tmp_path / "features.png"
    results = {"checkpoints": checkpoints, "results": str(tmp_path / "r.json")}
    options = {"limit": 12, "num_steps": 2, "batch_size": 7, "picture": str(picture)}
    with only_device(monkeypatch):
        robustness.main(
            robustness.Config(**EVALUATED, batch_size=2, attacks=("pgd",), predict="prototype", **results)
        )
        plot_features.main(plot_features.Config(**{**EVALUATED, **options}, checkpoints=checkpoints))
    assert picture.stat().st_size > 1000
