"""Show that a change of the code changed no number: record before it, compare after it.

    python tests/same_numbers.py record BEFORE.json [CIFAR10]
    python tests/same_numbers.py compare BEFORE.json [CIFAR10]

Everything goes through the command line, on one thread: the training scripts on synthetic images (weights,
prototypes and metrics, bit for bit), every attack on what they made, and, where CIFAR10 names a folder with
test/<class>/*.png, three committed networks on 200 images. Numbers differ between kinds of processor, so both
calls belong on one machine.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TRAINING = "--dataset synthetic --limit 600 --depth 8 --epochs 2 --batch-size 64 --precision float32"
RUNS = {
    "softmax": ("softmax_training.py", "--warmup 0"),
    "pcl": ("pcl_training.py", ""),
    "eq5": (
        "pcl_training.py",
        "--distance plain --shared-prototypes --separation --prototype-init class-means "
        "--layers layer2 layer3 fc --aux-dim 32 --milestones 1",
    ),
    "fgsm": ("pcl_training_adversarial_fgsm.py", ""),
    "pgd": ("pcl_training_adversarial_pgd.py", "--num-steps 2"),
}
EVERY_ATTACK = (
    "--attacks fgsm bim mim pgd pgd-margin pgd-dlr apgd-ce apgd-dlr square cw noise joint "
    "nearest-prototype transfer --apgd-steps 5 --num-queries 50 --cw-steps 10 --random-start --restarts 2 "
    "--sanity --sanity-images 50 --epsilons 0 4/255 --step-counts 1 5"
)
NETWORKS = ("CIFAR10_PCL_depth20", "CIFAR10_PCL_AdvTrain_PGD_lr0.1_depth20", "CIFAR10_PCL_Eq5_depth20")


def script(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{arguments}: status {done.returncode}\n{done.stdout}\n{done.stderr}")


def sha256(tensors):
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def trained(folder):
    """Per run: hashes of weights and prototypes, and the metrics."""
    numbers = {}
    for name, (file, options) in RUNS.items():
        path = folder / f"{name}.pth.tar"
        start = [] if name == "softmax" else ["--init-from", str(folder / "softmax.pth.tar")]
        script(file, *TRAINING.split(), *options.split(), *start, "--save-to", str(path))
        state = torch.load(path, weights_only=True)
        hashes = {part: sha256(state[part]) for part in ("state_dict", "criterion")}
        numbers[name] = {**hashes, "history": state["history"]}
    return numbers


def evaluated(path, *options):
    """Per checkpoint and attack: which images stay right."""
    script("robustness.py", *options, "--results", str(path))
    report = json.loads(path.read_text())
    numbers = {
        entry["path"].rsplit("/")[-1]: {
            **{key: attack["robust"] for key, attack in entry["attacks"].items()},
            "worst": entry["worst"]["robust"],
            "margins": entry["margins"],
        }
        for entry in report["checkpoints"]
    }
    sanity = [[finding["status"] for finding in found] for found in report.get("sanity", {}).values()]
    curves = [[row["attack"], row["value"], row["accuracy"]] for row in report.get("curves", ())]
    return {**numbers, "sanity": sanity, "curves": curves}


def main(command, path, cifar10=None):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        numbers = {"training": trained(folder)}
        made = [str(folder / f"{name}.pth.tar") for name in ("pcl", "eq5", "softmax")]
        data = ("--dataset", "synthetic", "--limit", "100", "--checkpoints", *made)
        source = ("--source-checkpoint", made[-1])
        numbers["attacks"] = evaluated(folder / "attacks.json", *data, *source, *EVERY_ATTACK.split())
        predict = ("--predict", "prototype", "--attacks", "pgd", "nearest-prototype")
        numbers["nearest"] = evaluated(folder / "nearest.json", *data[:5], *made[:2], *predict)
        if cifar10:
            there = ("--dataset", "folder", "--data-dir", cifar10, "--limit", "200")
            files = [f"Models_PCL/{name}.pth.tar" for name in NETWORKS]
            numbers["networks"] = evaluated(folder / "networks.json", *there, "--checkpoints", *files)
    numbers = json.loads(json.dumps(numbers))
    if command == "record":
        Path(path).write_text(json.dumps(numbers, indent=1) + "\n")
        return
    now, before = flat(numbers), flat(json.loads(Path(path).read_text()))
    if alone := sorted(now.keys() ^ before.keys()):
        print("in one of them alone: " + "; ".join(alone))
    different = [key for key in now if key in before and now[key] != before[key]]
    sys.exit("different: " + "; ".join(different) if different else 0)


def flat(numbers):
    """Each number by its part, its run or network, and its name there."""
    return {
        f"{part}, {name}, {key}": value
        for part in numbers
        for name, values in numbers[part].items()
        for key, value in (values if isinstance(values, dict) else {"all": values}).items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
