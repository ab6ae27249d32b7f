"""An epoch of each row as this project does it: all that the benchmarks need to know of its modules."""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import data
import evaluation
import pcl_training
import pcl_training_adversarial_fgsm
import pcl_training_adversarial_pgd
import robustness
import softmax_training
import training
import utils
from evaluation import trials
from resnet_model import ResNet, resnet

EVALUATIONS = ("fgsm", "bim", "mim", "pgd")
INNER = ("inner_fgsm", "inner_pgd")  # the attack inside adversarial training, alone
SCRIPTS = {
    "data": softmax_training,
    "stage1": softmax_training,
    "stage2": pcl_training,
    "stage2_fgsm": pcl_training_adversarial_fgsm,
    "stage2_pgd": pcl_training_adversarial_pgd,
    "inner_fgsm": pcl_training_adversarial_fgsm,
    "inner_pgd": pcl_training_adversarial_pgd,
    **dict.fromkeys(EVALUATIONS, robustness),
}
ROWS = tuple(SCRIPTS)
LR = 1e-4  # of the network, on both sides: every repetition finds much the same weights


# ---------------------------------------------------------------- what both sides get


@dataclass(frozen=True)
class Subject:
    """The weights and images that both sides get; `config` is that of `throughput.py`."""

    config: object
    device: torch.device
    network: dict  # arguments of `resnet`
    weights: dict
    dataset: data.Dataset

    def model(self) -> ResNet:
        """The network with the weights to start from, on the device."""
        model = resnet(**self.network)
        model.load_state_dict(self.weights)
        return model.to(self.device)

    def split(self, row: str) -> data.Split:
        """The images of a row: the first of the test images in an evaluation, else of the training images."""
        split = self.dataset.test if row in EVALUATIONS else self.dataset.train
        attacks = row not in ("data", "stage1", "stage2")
        size = self.config.attack_images if attacks else self.config.images
        return data.Split(split.images[:size], split.labels[:size])

    def recipe(self, row: str):
        """The `Config` of the row's script, with the benchmark's values of the options that it knows."""
        script = SCRIPTS[row]
        known = {field.name for field in dataclasses.fields(script.Config)}
        settings = {**vars(self.config), **self.network, "lr": LR, "warmup": 0, "save_every_minutes": None}
        settings["device"] = str(self.device)
        if "epsilon_min" in known:  # adversarial training doubles what it takes from the data
            settings["batch_size"] = max(self.config.batch_size // 2, 1)
        return script.Config(**{name: value for name, value in settings.items() if name in known})


def make_subject(config, device: torch.device) -> Subject:
    """Read or draw the images and the weights; noise is labelled by the network itself."""
    torch.manual_seed(config.seed)
    splits = {"train": config.images, "test": config.attack_images}
    for name, size in splits.items():
        if config.dataset == "noise":
            dataset = noise(name, size, config.seed, device)
        else:
            where = {"limit": size, "seed": config.seed, "device": device, "splits": (name,)}
            dataset = data.load(config.dataset, config.data_dir, **where)
        splits[name] = getattr(dataset, name)
    if config.init_from is not None:
        model = evaluation.load_target(config.init_from, device, dataset.classes).model
        if model.depth is None:
            raise utils.UsageError(f"--init-from {config.init_from}: is no ResNet, which the benchmark needs")
    else:
        model = calibrated(resnet(len(dataset.classes), config.depth).to(device), splits["train"])
    if config.dataset == "noise":
        splits = {name: label(split, model) for name, split in splits.items()}
    dataset = dataclasses.replace(dataset, **splits)
    network = {name: getattr(model, name) for name in ("depth", "num_classes", "aux_dim", "fc_dim")}
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    return Subject(config, device, network, weights, dataset)


def noise(name: str, size: int, seed: int, device: torch.device) -> data.Dataset:
    generator = utils.generator(seed, "noise", name)
    images = torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
    split = data.Split(images, torch.zeros(size, dtype=torch.int64, device=device))
    return data.Dataset("noise", data.CIFAR10_CLASSES, split, split)


@torch.no_grad()
def calibrated(model: ResNet, split: data.Split) -> ResNet:
    """Give fresh batch norms the statistics of some images: without them deep activations overflow."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # so that one batch is enough
    model.train()(data.to_float(split.images[:128]))
    return model.eval()


@torch.no_grad()
def label(split: data.Split, model: ResNet) -> data.Split:
    """The images with the classes that the network sees in them."""
    batches = data.epoch_batches(split, 128)
    labels = [model.logits(data.to_float(images)).argmax(1) for _, images, _ in batches]
    return data.Split(split.images, torch.cat(labels))


# ---------------------------------------------------------------- epochs


def epoch(subject: Subject, row: str) -> Callable[[], Tensor | None]:
    """An epoch of a row, done by the project; evaluations return which images stay right."""
    recipe, split = subject.recipe(row), subject.split(row)
    if row in EVALUATIONS:
        return evaluation_epoch(subject, row)
    _, training_epoch, attack = begin(subject, row)

    def data_epoch():
        for index, images, _ in data.epoch_batches(split, recipe.batch_size, utils.generator(0, "order")):
            images = data.augment(images, utils.generator(0, "augment", index))
            data.to_float(images).contiguous(memory_format=torch.channels_last)

    def attack_epoch():
        for index, images, labels in data.epoch_batches(split, recipe.batch_size):
            images = data.to_float(images).contiguous(memory_format=torch.channels_last)
            attack(images, labels, utils.generator(0, "attack", index))

    return data_epoch if row == "data" else attack_epoch if row in INNER else training_epoch


def evaluation_epoch(subject: Subject, row: str) -> Callable[[], Tensor]:
    recipe, split = subject.recipe(row), subject.split(row)
    trial, options = trials.make(row, recipe), {"batch_size": recipe.batch_size, "seed": recipe.seed}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth.tar"
        torch.save({"state_dict": subject.weights}, path)
        target = evaluation.load_target(path, subject.device, subject.dataset.classes)

    def epoch():
        outcome = evaluation.Outcome()
        for _ in evaluation.measure(target, split, trial, outcome, **options):
            pass
        return outcome.correct

    return epoch


def begin(subject: Subject, row: str) -> tuple[training.Run, Callable, Callable]:
    """Begin the run of a row's script on the weights and images of `subject`.

    The script itself sets it up: it is given the images, and what it asks of `training.fit` is kept. Returns
    (the run, train() for one epoch, attack(images, labels, generator) of adversarial training or None).
    """
    runs, split = [], subject.split(row)
    dataset = dataclasses.replace(subject.dataset, train=split, test=split)

    def fit(config, dataset, model, criterion, optimizer, scheduler, adversary=None):
        model.load_state_dict({name: subject.weights[name] for name in model.state_dict()})
        run = training.Run(config, dataset, model, criterion, optimizer, scheduler)
        run.say = run.watch.say = utils.say  # the script's own files are the user's
        runs.append((run, *training.make_steps(run, adversary, utils.StopSignals())))

    def nothing(*_):
        pass

    given = mock.patch.object(data, "load", lambda *_, **__: dataset)
    with given, mock.patch.multiple(training, fit=fit, **dict.fromkeys(("claim", "start_from"), nothing)):
        SCRIPTS[row].main(subject.recipe(row))
    run, forward, attack = runs[0]

    def train():
        training.train_epoch(run, forward, attack, utils.StopSignals())
        run.progress = type(run.progress)(epoch=run.progress.epoch + 1)

    return run, train, attack
