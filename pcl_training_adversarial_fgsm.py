"""Stage 2 on clean and FGSM images: fine-tune with the Prototype Conformity Loss (PCL).

    python pcl_training_adversarial_fgsm.py

With features f of 256 and of 1024 dimensions, and prototypes w and v that are trained too, the loss is

    cross-entropy + sum over both features of
        weight_prox * mean |f_i - w_{y_i}|^2 - weight_conprox * mean over the other classes j |f_i - v_j|^2

as in the released code; README.md lists where Eq. 5 and 9 of the paper differ.
"""

from dataclasses import dataclass

import torch

import attacks
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
    init_from: str = "Models_Softmax/CIFAR10_Softmax.pth.tar"  # stage 1's checkpoint
    save_to: str = "Models_PCL/CIFAR10_PCL_AdvTrain_FGSM.pth.tar"  # the checkpoint
    log_to: str | None = None  # the log; none: beside save_to. The metrics lie beside it as .csv
    resume: bool = False  # go on with the run at save_to, if there is one
    overwrite: bool = False  # start anew over the run at save_to
    # model
    depth: int = 110  # 6n + 2; 110 as released, 74 as in the paper; basic blocks, no bottlenecks, below 44
    aux_dim: int = 0  # width of the paper's branch on the second third of the blocks (paper: 512); 0: none
    fc_dim: int = 1024  # width of the penultimate layer; 2 draws it as in the paper's Figure 1
    # optimisation
    epochs: int = 500  # paper: 300
    batch_size: int = 64  # clean images a batch, and as many adversarial ones
    lr: float = 0.01  # paper: 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = ()  # the released schedule never reaches SGD, so rates stay; paper: 200 250
    gamma: float = 0.1
    # prototype conformity loss
    layers: tuple[str, ...] = (
        "layer3",
        "fc",
    )  # features under the PCL; paper: layer2 layer3 fc, with aux_dim 512
    weight_prox: float = 1.0  # of the pull to the own class's prototype; 0 switches it off
    weight_conprox: float = 1e-5  # of the push from the others' prototypes; 0 switches it off
    lr_prox: float = 0.5  # of the pull's prototypes; not scaled by weight_prox
    lr_conprox: float = 1e-4  # of the push's prototypes, likewise; shared ones follow lr_prox
    distance: str = "squared"  # to a prototype: squared, as released, or plain, as Eq. 5 prints it
    shared_prototypes: bool = False  # one set a layer for pull and push, as in Eq. 5
    separation: bool = False  # push the prototypes apart too, as in Eq. 5
    prototype_init: str = "normal"  # normal: N(0, 1), as released; or class-means
    # adversarial images
    epsilon_min: float = 0.02  # each batch draws its epsilon from [epsilon_min, epsilon_max]; paper: 0.01
    epsilon_max: float = 0.05  # paper: 0.05
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
    model = resnet(len(dataset.classes), config.depth, config.aux_dim, config.fc_dim).to(device)
    training.start_from(model, config, dataset)
    criterion = training.PrototypeConformityLoss(
        len(dataset.classes),
        {layer: model.feat_dims[layer] for layer in config.layers},
        config.weight_prox,
        config.weight_conprox,
        squared=config.distance == "squared",
        shared=config.shared_prototypes,
        separation=config.separation,
    ).to(device)
    if config.prototype_init == "class-means" and not training.resumes(config):
        criterion.init_class_means(model, dataset.train)
    network = {"params": model.parameters(), "momentum": config.momentum, "weight_decay": config.weight_decay}
    prototypes = criterion.param_groups(config.lr_prox, config.lr_conprox)
    optimizer = torch.optim.SGD([network, *prototypes], lr=config.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, config.milestones, config.gamma)

    def adversary(model_fn, images, labels, generator):
        epsilon = utils.uniform(config.epsilon_min, config.epsilon_max, generator)
        return attacks.fgsm(model_fn, images, labels, epsilon)

    training.fit(config, dataset, model, criterion, optimizer, scheduler, adversary)


if __name__ == "__main__":
    utils.run(main, Config)
