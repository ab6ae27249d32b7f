"""Several ranks train as one process does: their trajectories agree, up to rounding, for every script."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn

import distributed
import pcl_training
import pcl_training_adversarial_fgsm
import pcl_training_adversarial_pgd
import softmax_training
from benchmarks import throughput
from resnet_model import resnet
from training.parallel import SyncedBatchNorm

ROOT = Path(__file__).resolve().parent.parent
SHORT = [
    *("--dataset", "synthetic", "--device", "cpu", "--depth", 8, "--epochs", 1),
    *("--precision", "float32", "--overwrite"),
]
SCRIPTS = {
    softmax_training: ["--warmup", 0],
    pcl_training: ["--layers", "layer2", "layer3", "fc", "--aux-dim", 8],
    pcl_training_adversarial_fgsm: [],
    pcl_training_adversarial_pgd: ["--num-steps", 2],
}


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    path = tmp_path_factory.mktemp("stage1") / "softmax.pth.tar"
    given = ("--limit", 20, "--batch-size", 10, "--save-to", path)
    ((status, _, said),) = run_ranks(1, softmax_training, *SHORT, *given)
    assert status == 0, said
    return path


def trained(ranks, module, path, *options, **how):
    """Train; return what the checkpoint at `path` holds, and what rank 0 printed."""
    ends = run_ranks(ranks, module, *SHORT, "--save-to", path, *options, **how)
    assert [end[0] for end in ends] == [0] * ranks, ends
    assert not any(out for _, out, _ in ends[1:]), "a rank besides the first spoke"
    return torch.load(path, weights_only=True), ends[0][1]


def apart(one, other):
    """The largest relative difference between the tensors of two checkpoints."""
    largest = 0.0
    for part in ("state_dict", "criterion"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            a, b = value.double(), other[part][name].double()
            largest = max(largest, ((a - b).norm() / a.norm().clamp(min=1e-30)).item())
    return largest


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_ranks_follow_one_trajectory(module, stage1, tmp_path):
    """Five steps in float64, and a last batch of two images, of which a third rank has none."""
    start = [] if module is softmax_training else ["--init-from", stage1]
    options = (*SCRIPTS[module], *start, "--limit", 32, "--batch-size", 6)
    one, _ = trained(1, module, tmp_path / "1.pth.tar", *options, float64=True)
    for ranks in (2, 3):
        other, _ = trained(ranks, module, tmp_path / f"{ranks}.pth.tar", *options, float64=True)
        assert apart(one, other) < 1e-10
        for name, value in one["history"][-1].items():
            assert other["history"][-1][name] == pytest.approx(value, rel=1e-9), name
        assert other["versions"] == one["versions"] and other["config"].keys() == one["config"].keys()


def test_a_network_without_batch_norm(tmp_path):
    given = [option for option in SHORT if option not in ("--depth", 8)]
    for ranks in (1, 3):
        options = (*given, "--model", "cnn6", "--limit", 14, "--batch-size", 6)
        path = tmp_path / f"{ranks}.pth.tar"
        ends = run_ranks(ranks, softmax_training, *options, "--save-to", path, float64=True)
        assert [end[0] for end in ends] == [0] * ranks, ends
    assert apart(*(torch.load(tmp_path / f"{n}.pth.tar", weights_only=True) for n in (1, 3))) < 1e-10


@pytest.mark.parametrize("limit", [13, 14, 15])
def test_small_last_batches(limit, stage1, tmp_path):
    """One image joins the batch before it; two and three are a batch of their own."""
    options = ("--init-from", stage1, "--limit", limit, "--batch-size", 6)
    one, _ = trained(1, pcl_training, tmp_path / "1.pth.tar", *options, float64=True)
    other, _ = trained(3, pcl_training, tmp_path / "3.pth.tar", *options, float64=True)
    assert apart(one, other) < 1e-10


def test_an_epoch_in_float32(stage1, tmp_path):
    options = ("--init-from", stage1, "--limit", 100, "--batch-size", 10)
    one, _ = trained(1, pcl_training, tmp_path / "1.pth.tar", *options)
    other, said = trained(2, pcl_training, tmp_path / "2.pth.tar", *options)
    assert apart(one, other) < 0.05  # roundings grow
    rows = [list(csv.DictReader((tmp_path / f"{ranks}.csv").open())) for ranks in (1, 2)]
    assert rows[0][0]["loss"][:4] == rows[1][0]["loss"][:4]
    assert said.count("images/s") == 1 and "2 ranks" in said


def test_without_it_each_rank_has_batch_norm_of_its_own(stage1, tmp_path):
    """So the ranks part from one process, though not far; a single process takes no notice."""
    options = ("--init-from", stage1, "--limit", 32, "--batch-size", 6)
    one, _ = trained(1, pcl_training, tmp_path / "1.pth.tar", *options, float64=True)
    given = ("--no-sync-batchnorm",)
    alike, _ = trained(1, pcl_training, tmp_path / "1n.pth.tar", *options, *given, float64=True)
    other, _ = trained(3, pcl_training, tmp_path / "3.pth.tar", *options, *given, float64=True)
    assert apart(one, alike) == 0
    assert apart(one, other) > 1e-6
    assert other["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=0.1)
    assert all(value.isfinite().all() for value in other["state_dict"].values())


def test_synced_batch_norm_of_one_rank_is_torchs_own():
    """Outputs, gradients of all inputs, and statistics, in both modes."""
    generator, results = torch.Generator().manual_seed(0), []
    x, up = (torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    for kind in (nn.BatchNorm2d, SyncedBatchNorm):
        norm = kind(3).double()
        nn.init.constant_(norm.weight, 1.5)
        points = (100 + x).requires_grad_()
        y = norm(points)
        grads = torch.autograd.grad((y * up).sum(), (points, norm.weight, norm.bias))
        results.append([y, *grads, *norm.state_dict().values(), norm.eval()(points)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_parts_are_the_batch():
    """Every image is one rank's, and a rank's random numbers are those of its images in the whole batch."""
    from attacks.common import random_streams

    def draws(generator, count):
        return [stream.initial_seed() for stream in random_streams(generator, count)]

    whole = draws(torch.Generator().manual_seed(1), 8)
    for world in (1, 3, 5):
        found, seeds = [], []
        for rank in range(world):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(distributed, "rank", rank)
                patch.setattr(distributed, "world", world)
                mine = distributed.part(torch.arange(8)).tolist()
                found += mine
                seeds += draws(distributed.part_of(torch.Generator().manual_seed(1), 8), len(mine))
        assert found == list(range(8)) and seeds == whole


def test_the_benchmark_shares_a_batch_between_ranks(tmp_path):
    path = tmp_path / "ranks.json"
    sizes = {"depth": 8, "images": 8, "batch_size": 4, "repetitions": 1}
    config = throughput.Config(ranks=(1, 2), device="cpu", results=str(path), **sizes)
    throughput.main(config)
    one, two = json.loads(path.read_text())["sharing"]
    assert one["bytes_a_step"] == 0 and one["efficiency"] == 1
    network = resnet(10, 8)
    weights = sum(p.numel() for p in network.parameters())
    weights += 2 * 10 * (network.feat_dims["layer3"] + 1024)  # the prototypes of pull and push
    norms = sum(module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    assert two["bytes_a_step"] > 4 * weights + 2 * 8 * 2 * norms
    assert two["bytes_a_step"] == pytest.approx(4 * weights + 2 * 8 * 2 * norms, rel=0.01)
    assert two["images_per_second"] > 0 and "efficiency" in path.with_suffix(".md").read_text()


def test_without_torchrun_nothing_imports_torch_distributed():
    """At its top only the step of several ranks does, which is imported where there are several."""
    pattern = re.compile(
        r"^(?:import|from) (?:torch\.distributed|torch\.nn\.parallel|\.parallel|training\.par)", re.M
    )
    files = [*ROOT.glob("*.py"), *ROOT.glob("[!t]*/*.py"), *ROOT.glob("training/*.py")]
    assert [file.name for file in files if pattern.search(file.read_text())] == ["parallel.py"]
