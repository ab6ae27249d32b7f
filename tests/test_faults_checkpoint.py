"""Checkpoints: what is saved, and every fault of a file, which is one CheckpointError and runs no code."""

import argparse
import copy
import io
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import message, refused, same

import checkpoints
import cli
import evaluation
import prototype_conformity
import softmax_training
import utils
from resnet_model import resnet
from utils import CheckpointError

NETWORK = {"depth": 8, "num_classes": 3, "aux_dim": 0, "fc_dim": 1024}  # as checkpoints said it at first
NORMALISATION = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]}  # of CIFAR-10


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return resnet(num_classes=3, depth=8)


@pytest.fixture
def checkpoint(network, tmp_path):
    path = tmp_path / "CIFAR10_Softmax.pth.tar"
    checkpoints.save({"state_dict": network.state_dict(), "epoch": 4}, path)
    return path


# ---------------------------------------------------------------- saving


def test_the_same_state_gives_the_same_bytes_whatever_the_file_is_called(tmp_path):
    state = {"a": torch.arange(5), "b": [1, 2.5, None, "ü"], "c": {"d": True}}
    for name in ("one.pth.tar", "another name.pth.tar"):
        checkpoints.save(state, tmp_path / name)
    assert utils.sha256(tmp_path / "one.pth.tar") == utils.sha256(tmp_path / "another name.pth.tar")
    loaded = checkpoints.load(tmp_path / "one.pth.tar")
    assert torch.equal(loaded["a"], state["a"]) and loaded["b"] == state["b"] and loaded["c"] == state["c"]
    assert loaded["format"] == checkpoints.FORMAT and loaded["versions"] == utils.versions()


def test_the_checkpoint_before_is_kept_until_the_run_is_over(tmp_path):
    path = tmp_path / "run.pth.tar"
    for number in range(3):
        checkpoints.save({"number": number}, path)
    assert checkpoints.load(checkpoints.previous_of(path))["number"] == 1
    checkpoints.save({"number": 3}, path, keep_previous=False)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert checkpoints.load_newest(path)["number"] == 3


def test_item_18_a_save_that_was_killed_between_its_two_renames_leaves_nothing_behind(tmp_path):
    """The checkpoint and the one before are then two links of one file, which no rename tells apart."""
    path = tmp_path / "run.pth.tar"
    checkpoints.save({"number": 0}, path)
    os.link(path, checkpoints.previous_of(path))
    checkpoints.save({"number": 1}, path)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f"{path.name}.previous"}
    assert checkpoints.load(checkpoints.previous_of(path))["number"] == 0
    assert checkpoints.load(path)["number"] == 1


# ---------------------------------------------------------------- items 1 to 6: no whole file


def test_items_1_and_2_a_missing_file_names_its_script_and_what_is_there_and_a_directory_is_none(checkpoint):
    text = message(checkpoint.with_name("CIFAR10_PCL.pth.tar"))
    assert "no such file" in text and "python pcl_training.py makes it" in text and checkpoint.name in text
    assert "is a directory" in message(checkpoint.parent)


def test_item_2_a_pipe_or_a_file_of_terabytes_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth.tar")
    with open(tmp_path / "huge.pth.tar", "wb") as file:
        file.truncate(2**41)
    for name in ("pipe.pth.tar", "huge.pth.tar"):
        assert "no ordinary file" in refused(tmp_path / name, 4)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_item_2_an_unreadable_file(checkpoint):
    checkpoint.chmod(0)
    assert "Permission denied" in message(checkpoint)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc")
def test_item_2_a_file_that_cannot_be_read():
    assert "cannot be read" in message(Path("/proc/self/mem"))


@pytest.mark.parametrize("kept", [0.5, -100, -1])
def test_item_4_a_truncated_file(checkpoint, kept):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(len(content) * kept) if kept > 0 else kept])
    assert "cut off or damaged" in message(checkpoint)


def test_item_5_one_flipped_bit_in_the_weights_that_torch_alone_would_load(checkpoint, network):
    content = bytearray(checkpoint.read_bytes())
    place = content.index(network.fcf.weight.detach().numpy().tobytes()) + 1001
    content[place] ^= 4
    checkpoint.write_bytes(content)
    loaded = torch.load(checkpoint, weights_only=True)["state_dict"]["fcf.weight"]
    assert not torch.equal(loaded, network.fcf.weight)  # the fault is real
    assert "fails its checksum" in message(checkpoint)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; interrupted save?"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\n <html lang='en'>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-lfs pointer"),
    ],
)
def test_items_3_and_6_another_file_under_the_name(checkpoint, content, said):
    checkpoint.write_bytes(content)
    assert said in message(checkpoint)


# ---------------------------------------------------------------- items 7 and 8: what could run code


class Malicious:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_item_7_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, form):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth.tar"
    if form == "bare":
        path.write_bytes(pickle.dumps(Malicious(canary)))
        message(path)
        assert not canary.exists()
        return
    state = {"state_dict": {"w": torch.zeros(1)}, "epoch": Malicious(canary)}
    torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    assert "could run code" in message(path) and not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # the pickle was a live one


@pytest.mark.parametrize(
    ("thing", "named"),
    [(argparse.Namespace(lr=0.1), "argparse.Namespace"), (np.float64(91.5), "numpy")],
)
def test_item_8_foreign_objects_are_named(tmp_path, thing, named):
    path = tmp_path / "foreign.pth.tar"
    torch.save({"state_dict": {}, "args": thing}, path)
    assert re.search(rf"holds {re.escape(named)}[\w.]*, not only", message(path))


# ---------------------------------------------------------------- items 9 to 14: other contents


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_items_9_and_10_the_authors_format_and_wrappers_prefixes_load(tmp_path, network, prefix):
    path, before = tmp_path / "theirs.pth.tar", network.state_dict()
    weights = {prefix + name: value for name, value in before.items()}
    state = {"epoch": 3, "state_dict": weights, "optimizer_model": {"state": {}, "param_groups": []}}
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as torch did in 2019
    read = checkpoints.read_network(path)
    assert read.model == "resnet" and read.arguments == {**NETWORK, **NORMALISATION}
    assert same(read.weights, dict(before))


def test_item_9_tensors_saved_on_cuda_load_on_a_cpu(checkpoint, network):
    """The location is a text in the pickle: rewritten, the file is what a CUDA machine would have saved."""
    source, changed = zipfile.ZipFile(checkpoint), io.BytesIO()
    with zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as target:
        for record in source.infolist():
            content = source.read(record)
            if record.filename.endswith("data.pkl"):
                assert b"X\x03\x00\x00\x00cpu" in content
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(record.filename, content)
    checkpoint.write_bytes(changed.getvalue())
    state = checkpoints.load(checkpoint)
    assert state["state_dict"]["fcf.weight"].device.type == "cpu"


def test_item_11_evaluation_takes_depth_and_classes_from_the_checkpoint(checkpoint):
    target = evaluation.load_target(checkpoint, torch.device("cpu"), ("a", "b", "c"))
    assert target.depth == 8
    text = message(checkpoint, lambda path: evaluation.load_target(path, torch.device("cpu"), ("a", "b")))
    assert "3 classes" in text and "2" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"format": checkpoints.FORMAT + 1, "state_dict": {}}, f"format {checkpoints.FORMAT + 1} is newer"),
        *(({"format": version, "state_dict": {}}, f"format {version!r}") for version in (True, -1, "two")),
        *((thing, "not a checkpoint") for thing in ([1, 2], torch.zeros(3), "text")),
        *(({"state_dict": weights}, "no weights") for weights in (3, {"a": 1})),
        ({}, "no weights"),
        ({"state_dict": {"fcf.weight": torch.zeros(3, 4)}}, "not a ResNet"),
        ({"state_dict": {3: torch.zeros(3, 4)}}, "3"),
    ],
)
def test_item_14_a_newer_format_and_files_that_hold_no_network_are_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "other.pth.tar")
    assert said in message(tmp_path / "other.pth.tar", checkpoints.read_network)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "bomb.pth.tar"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    assert path.stat().st_size < 20_000
    assert "compressed" in message(path)


# ---------------------------------------------------------------- export


@pytest.fixture
def trained(tmp_path, network):
    """A checkpoint with all that training saves: shared prototypes, channels-last weights, an optimiser."""
    criterion = prototype_conformity.PrototypeConformityLoss(3, {"fc": 1024}, 1.0, 1e-4, shared=True)
    model = copy.deepcopy(network).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1, momentum=0.9)
    criterion(model(torch.rand(4, 3, 8, 8)), torch.tensor([0, 1, 2, 0]))[0].backward()
    optimizer.step()
    config = {
        "lr": 0.1, "data_dir": "/home/someone/data", "save_to": "/scratch/x", "layers": ["fc"],
        "resume": True, "init_from": "/home/someone/softmax.pth.tar", "log_to": None, "device": "cuda:3",
    }  # fmt: skip
    state = {
        "script": "pcl_training", "config": config, "classes": ["ä", "b", "c"], "epoch": 7, "finished": True,
        "network": NETWORK,
        "history": [{"epoch": 7, "lr": 0.1}],
        "state_dict": model.state_dict(), "criterion": criterion.state_dict(),
        "optimizer": optimizer.state_dict(), "log": ["a line of /home/someone"], "data": {"name": "folder"},
    }  # fmt: skip
    path = tmp_path / "trained.pth.tar"
    checkpoints.save(state, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth.tar"])
def test_exported_weights_load_wherever_a_checkpoint_does(trained, tmp_path, network, name):
    if name.endswith("safetensors"):
        reader = pytest.importorskip("safetensors.torch")
    target = tmp_path / "a new folder" / name
    assert checkpoints.export(trained, target) == utils.sha256(target)
    before, after = checkpoints.load(trained), checkpoints.load(target)
    for key in ("script", "classes", "network", "epoch", "history", "finished", "versions", "format"):
        assert after[key] == before[key], key
    assert same(dict(before["state_dict"]), after["state_dict"])
    assert same(dict(before["criterion"]), after["criterion"])
    assert after["config"] == {"lr": 0.1, "layers": ["fc"]}
    assert "optimizer" not in after and b"someone" not in target.read_bytes()
    assert target.stat().st_size < 0.7 * trained.stat().st_size
    read = checkpoints.read_network(target)
    assert same(read.weights, dict(before["state_dict"])) and read.arguments == {**NETWORK, **NORMALISATION}
    assert read.sha256 == utils.sha256(target)
    assert evaluation.load_target(target, torch.device("cpu"), ("ä", "b", "c")).depth == 8
    if name.endswith("safetensors"):  # an ordinary file of that format
        tensors = reader.load_file(target)
        network.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("criterion.")})
    content = target.read_bytes()
    with pytest.raises(utils.FileSystemError, match="exists"):
        checkpoints.export(trained, target)
    assert target.read_bytes() == content


def test_damaged_safetensors_are_refused(trained, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "w.safetensors"
    checkpoints.export(trained, path)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    assert "checksum" in message(path)
    path.write_bytes(content[:-100])
    message(path)


def test_item_43_without_safetensors_its_feature_alone_says_what_to_install(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(utils.UsageError, match="pip install safetensors"):
        checkpoints.export(trained, tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()
    checkpoints.export(trained, tmp_path / "w.pth.tar")


def test_item_12_exported_weights_are_no_run_to_resume(trained, tmp_path):
    target = tmp_path / "w.pth.tar"
    checkpoints.export(trained, target)
    options = f"--dataset synthetic --limit 12 --depth 8 --resume --save-to={target}".split()
    with pytest.raises(CheckpointError, match="no optimiser or prototypes to resume with"):
        softmax_training.main(cli.parse_config(softmax_training.Config, options))
