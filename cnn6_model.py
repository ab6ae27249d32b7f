"""The paper's second network: six convolutions, for the grey images of MNIST and Fashion-MNIST (Table 1).

It returns its hidden features along with the class scores, under the ResNet's names for the same three
places. Like the ResNet it normalises images itself.
"""

import copy

import torch
from torch import nn

from resnet_model import Outputs, checked_normalisation, clean_state_dict

MEAN, STD = (0.1307,), (0.3081,)  # of MNIST's training images
UNTOLD = {"mean": MEAN, "std": STD, "side": 28}  # arguments that weights do not show
LARGEST = 1024  # pixels of an image's sides
WIDTHS = (32, 64, 128)  # of the three pairs of convolutions
# The scripts' defaults with this network; an option or the preset wins. It has no batch norm: at a learning
# rate of 0.1 stage 1 diverges within 50 batches, at 0.01 sometimes. Its features have large norms: with the
# released weight_prox stage 2 diverges in the second batch, with 0.01 it loses all accuracy at first. Nothing
# bounds what the push moves: at 1e-5 the distances to the prototypes run away on MNIST after 30 epochs, and
# the run diverges in its 35th. The speed is proportional to the weight.
SETTINGS = {"fc_dim": 64, "lr": 0.003, "weight_prox": 0.001, "weight_conprox": 1e-7}


class CNN6(nn.Module):
    """Three pairs of 5x5 convolutions with PReLU, each followed by a 2x2 max pool, then FC, FC and FC.

    `feat_dims` maps the name of each feature in `Outputs`, shallow to deep, to its width: `layer2` is the
    global average of the last pool (128), `layer3` the first linear layer (512), `fc` the second (64).
    There is no activation between linear layers, as in the released ResNet.
    """

    name, label, depth = "cnn6", "CNN-6", None

    def __init__(self, num_classes, fc_dim, side, mean, std):
        super().__init__()
        self.num_classes = num_classes
        self.arguments = {"num_classes": num_classes, "fc_dim": fc_dim, "side": side}
        self.arguments |= {"mean": list(mean), "std": list(std)}
        width, layers = len(mean), []
        for channels in WIDTHS:
            for _ in range(2):
                layers += [nn.Conv2d(width, channels, 5, padding=2), nn.PReLU(channels)]
                width = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(width * (side // 8) ** 2, 512)
        self.fc2 = nn.Linear(512, fc_dim)
        self.fc3 = nn.Linear(fc_dim, num_classes)
        self.feat_dims = {"layer2": width, "layer3": 512, "fc": fc_dim}
        # Not persistent, as in the ResNet: a checkpoint holds them among the arguments.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):  # with PyTorch's default, or fan-out, it hardly learns
                nn.init.kaiming_normal_(layer.weight, a=0.25, mode="fan_in")
                nn.init.zeros_(layer.bias)

    def forward(self, images):
        """Return features and class scores of `images`, N x C x side x side in [0, 1], as `Outputs`."""
        maps = self.features((images - self.mean) / self.std)
        layer3 = self.fc1(maps.flatten(1))
        fc = self.fc2(layer3)
        return Outputs(maps.mean((2, 3)), layer3, fc, self.fc3(fc))

    def logits(self, images):
        """Return class scores alone, N x num_classes: the function that attacks and evaluation take."""
        return self(images).logits


def cnn6(num_classes=10, fc_dim=64, side=28, mean=MEAN, std=STD):
    """Make a CNN-6 with fresh weights: He's fan-in normal convolutions, the rest as PyTorch draws it.

    num_classes: from 2 up. fc_dim: width of the penultimate layer: 64 in the paper, 2 in its Figure 1.
    side: height and width of an image in pixels, from 8 to LARGEST. mean, std: one number a channel, with
    which images are normalised.
    Raises ValueError for any other argument.
    """
    for name, value, least in (("num_classes", num_classes, 2), ("fc_dim", fc_dim, 1), ("side", side, 8)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} {value!r}: must be a whole number from {least} up")
    if side > LARGEST:
        raise ValueError(f"side {side}: must be at most {LARGEST} pixels")
    return CNN6(num_classes, fc_dim, side, *checked_normalisation(mean, std))


make = cnn6


def network_of(state_dict, **untold):
    """Return the arguments of the `cnn6` that `state_dict` fits: num_classes and fc_dim.

    untold: the arguments of UNTOLD. All keys and shapes must fit; wrappers' prefixes are ignored. Raises
    ValueError when no network fits.
    """
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in clean_state_dict(state_dict).items()}
    num_classes, fc_dim = (*shapes.get("fc3.weight", ()), 0, 0)[:2]
    with torch.device("meta"):
        model = cnn6(num_classes, fc_dim, **untold)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key in sorted(expected.keys() | shapes.keys()):
        if shapes.get(key) != expected.get(key):
            raise ValueError(f"not a CNN-6: {key} has shape {shapes.get(key)}, not {expected.get(key)}")
    return {"num_classes": num_classes, "fc_dim": fc_dim}


class Frozen(nn.Module):
    """A frozen copy of a CNN-6: images in [0, 1] to logits. There is no batch norm to fold."""

    def __init__(self, model, dtype=None):
        super().__init__()
        self.network = copy.deepcopy(model).to(memory_format=torch.channels_last)
        for layer in self.network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(dtype)
        self.originals = list(model.parameters())  # in a list, so that nn.Module does not register them
        self.requires_grad_(False).eval()
        self.refresh()

    def forward(self, images):
        return self.network(images).logits

    @torch.no_grad()
    def refresh(self):
        """Copy the present weights of the original, in place."""
        torch._foreach_copy_(list(self.network.parameters()), self.originals)


folded = Frozen
