"""Stage 1: train the ResNet with cross-entropy alone.

    python softmax_training.py

The weights it leaves are the softmax row of the table, and where every PCL script starts from. Settings are
the released ones; edit them below or pass them as options (`--epochs 20 --depth 20`).
"""

from dataclasses import dataclass

import torch

import data
import training
import utils
from resnet_model import resnet


@dataclass(frozen=True)
class Config:
    # data and files
    dataset: str = "cifar10"  # cifar10, folder (DATA_DIR/{train,test}/<class>/*) or synthetic
    data_dir: str = "data"  # where the images are, or are downloaded to
    limit: int | None = None  # so many images of each split, the first of each class; none: all
    holdout: int = 0  # training images held out and measured in place of the test images, to choose settings
    save_to: str = "Models_Softmax/CIFAR10_Softmax.pth.tar"  # the checkpoint
    log_to: str | None = None  # the log; none: beside save_to. The metrics lie beside it as .csv
    resume: bool = False  # go on with the run at save_to, if there is one
    overwrite: bool = False  # start anew over the run at save_to
    # model
    depth: int = 110  # 6n + 2; 110 as released, 74 as in the paper; basic blocks, no bottlenecks, below 44
    fc_dim: int = 1024  # width of the penultimate layer; 2 draws it as in the paper's Figure 1
    # optimisation
    epochs: int = 164  # paper: 200
    batch_size: int = 128  # paper: 256
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = (81, 122, 140)  # epochs after which the rate is multiplied by gamma
    gamma: float = 0.1
    # run
    eval_every: int = 5  # epochs between measurements of the test accuracy, which chooses nothing
    save_every_minutes: float | None = 10.0  # saves within an epoch too; none: only after each
    max_minutes: float | None = None  # stop after so long, saved, to be resumed
    precision: str = "auto"  # auto (bfloat16 where the hardware has it), bfloat16 or float32
    compile: str = "auto"  # auto (on a GPU), on or off
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    seed: int = 0


def main(config: Config) -> None:
    device = utils.select_device(config.device)
    torch.manual_seed(config.seed)
    dataset = data.load(
        config.dataset, config.data_dir, limit=config.limit, holdout=config.holdout, device=device
    )
    model = resnet(len(dataset.classes), config.depth, fc_dim=config.fc_dim).to(device)
    criterion = training.CrossEntropyLoss()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, config.milestones, config.gamma)
    training.fit(config, dataset, model, criterion, optimizer, scheduler)


if __name__ == "__main__":
    utils.run(main, Config)
