"""Stage 1: train the ResNet with cross-entropy alone.

    python softmax_training.py

The loss is the mean over a batch of -log softmax(logits)[y]. The weights it leaves are the softmax row of the
table, and where every PCL script starts from. Settings are the released ones where nothing else is said; edit
them below or pass them as options (`--epochs 20 --depth 20`).
"""

import os
import sys

if __name__ == "__main__":  # before torch is imported, which takes seconds
    sys.path.insert(0, os.path.dirname(os.path.realpath(sys.argv[0])))
    import startup

    startup.begin()

from dataclasses import dataclass
from typing import ClassVar

import torch

import cli
import models
import training
import utils
from cli import Count, Depth, Factor, Milestones, Momentum, NotNegative, Positive, Whole
from prototype_conformity import PrototypeConformityLoss

PAPER = {  # --preset paper; grey: on MNIST and Fashion-MNIST, where a rate of 0.1 diverges
    "depth": 74,
    "epochs": 200,
    "batch_size": 256,
    "milestones": (),  # its first is after the 200th epoch, where stage 1 ends
    "grey": {"epochs": 50, "lr": 0.003},
}


@dataclass(frozen=True)
class Config(training.RunConfig):
    paper: ClassVar = PAPER
    # data and files
    save_to: str = "Models_Softmax/CIFAR10_Softmax.pth.tar"
    # model
    depth: Depth = 110  # 6n + 2; 110 as released, 74 as in the paper; basic blocks, no bottlenecks, below 44
    fc_dim: Count = 1024  # width of the penultimate layer; 2 draws it as in the paper's Figure 1
    # optimisation
    epochs: Count = 164  # paper: 200
    batch_size: Count = 128  # paper: 256
    lr: Positive = 0.1
    warmup: Whole = 1  # first epochs at warmup_factor * lr; released: 0, which diverges at depth 110
    warmup_factor: Factor = 0.1
    momentum: Momentum = 0.9
    weight_decay: NotNegative = 1e-4
    milestones: Milestones = (81, 122, 140)  # epochs after which the rate is multiplied by gamma
    gamma: Positive = 0.1


@training.each_seed
def main(config: Config) -> None:
    training.claim(config)
    device = utils.select_device(config.device)
    torch.manual_seed(config.seed)
    dataset = training.load(config, device)
    model = models.for_data(config, dataset).to(device)
    criterion = PrototypeConformityLoss(len(dataset.classes), {})  # no feature: cross-entropy alone
    network = {"params": model.parameters(), "momentum": config.momentum, "weight_decay": config.weight_decay}
    optimizer = torch.optim.SGD([network], lr=config.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, config.milestones, config.gamma)
    if config.warmup:
        warmup = torch.optim.lr_scheduler.ConstantLR(optimizer, config.warmup_factor, config.warmup)
        scheduler = torch.optim.lr_scheduler.ChainedScheduler([warmup, scheduler], optimizer)
    training.fit(config, dataset, model, criterion, optimizer, scheduler)


if __name__ == "__main__":
    cli.run(main, Config)
