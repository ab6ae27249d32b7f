"""Stage 2: fine-tune the softmax network with the Prototype Conformity Loss (PCL).

    python pcl_training.py

With features f of 256 and of 1024 dimensions, and prototypes w and v that are trained too, the loss is

    cross-entropy + sum over both features of
        weight_prox * mean |f_i - w_{y_i}|^2 - weight_conprox * mean over the other classes j |f_i - v_j|^2

as in the released code; README.md lists where Eq. 5 and 9 of the paper differ.
"""

import os
import sys

if __name__ == "__main__":  # before torch is imported, which takes seconds
    sys.path.insert(0, os.path.dirname(os.path.realpath(sys.argv[0])))
    import startup

    startup.begin()

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

import cli
import models
import training
import utils
from cli import Count, Depth, Layers, Milestones, Momentum, NotNegative, Positive, Whole
from prototype_conformity import PrototypeConformityLoss

PAPER = {  # --preset paper; grey: MNIST and Fashion-MNIST, where 0.003 diverges too, but later
    "depth": 74,
    "aux_dim": 512,
    "epochs": 300,
    "batch_size": 256,
    "lr": 0.1,
    "milestones": (200, 250),
    "layers": ("layer2", "layer3", "fc"),
    "weight_prox": 1.0,  # Eq. 5: no weights, plain distances, one set of prototypes, pushed apart
    "weight_conprox": 1.0,
    "distance": "plain",
    "shared_prototypes": True,
    "separation": True,
    "grey": {"lr": 0.003},
}


@dataclass(frozen=True)
class Config(training.RunConfig):
    paper: ClassVar = PAPER
    # data and files
    init_from: str = "Models_Softmax/CIFAR10_Softmax.pth.tar"  # stage 1's checkpoint
    save_to: str = "Models_PCL/CIFAR10_PCL.pth.tar"
    # model
    depth: Depth = 110  # 6n + 2; 110 as released, 74 as in the paper; basic blocks, no bottlenecks, below 44
    aux_dim: Whole = 0  # width of the paper's branch on the second third of the blocks (paper: 512); 0: none
    fc_dim: Count = 1024  # width of the penultimate layer; 2 draws it as in the paper's Figure 1
    # optimisation
    epochs: Count = 400  # paper: 300
    batch_size: Count = 128  # paper: 256
    lr: Positive = 0.01  # paper: 0.1
    momentum: Momentum = 0.9
    weight_decay: NotNegative = 1e-4
    milestones: Milestones = ()  # the released schedule never reaches SGD, so rates stay; paper: 200 250
    gamma: Positive = 0.1
    # prototype conformity loss
    layers: Layers = ("layer3", "fc")  # features under the PCL; paper: layer2 layer3 fc, with aux_dim 512
    weight_prox: NotNegative = 1.0  # of the pull to the own class's prototype; 0 switches it off
    weight_conprox: NotNegative = 1e-4  # of the push from the others' prototypes; 0 switches it off
    lr_prox: Positive = 0.5  # of the pull's prototypes; not scaled by weight_prox
    lr_conprox: Positive = 1e-4  # of the push's prototypes, likewise; shared ones follow lr_prox
    distance: Literal["squared", "plain"] = "squared"  # to a prototype; plain: as Eq. 5 prints it
    shared_prototypes: bool = False  # one set a layer for pull and push, as in Eq. 5
    separation: bool = False  # push the prototypes apart too, as in Eq. 5
    prototype_init: Literal["normal", "class-means"] = "normal"  # normal: N(0, 1), as released


@training.each_seed
def main(config: Config) -> None:
    training.claim(config)
    device = utils.select_device(config.device)
    torch.manual_seed(config.seed)
    dataset = training.load(config, device)
    model = models.for_data(config, dataset).to(device)
    training.start_from(model, config, dataset)
    criterion = PrototypeConformityLoss(
        len(dataset.classes),
        {layer: width for layer, width in model.feat_dims.items() if layer in config.layers},
        config.weight_prox,
        config.weight_conprox,
        squared=config.distance == "squared",
        shared=config.shared_prototypes,
        separation=config.separation,
    ).to(device)
    if config.prototype_init == "class-means" and not config.resumes:
        criterion.init_class_means(model, dataset.train)
    network = {"params": model.parameters(), "momentum": config.momentum, "weight_decay": config.weight_decay}
    prototypes = criterion.param_groups(config.lr_prox, config.lr_conprox)
    optimizer = torch.optim.SGD([network, *prototypes], lr=config.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, config.milestones, config.gamma)
    training.fit(config, dataset, model, criterion, optimizer, scheduler)


if __name__ == "__main__":
    cli.run(main, Config)
