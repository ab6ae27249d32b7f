"""The network: a CIFAR ResNet that returns its hidden features along with the class scores.

The Prototype Conformity Loss supervises these features. The keys and shapes of the `state_dict` are those of
the released network (Mustafa et al., ICCV 2019), so weights of either load into the other. Only the network
normalises images: attacks and evaluation see pixels in [0, 1].
"""

import copy
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNEL_MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's training images
CHANNEL_STD = (0.2023, 0.1994, 0.2010)
UNTOLD = {
    "mean": CHANNEL_MEAN,
    "std": CHANNEL_STD,
}  # arguments that weights do not show, with CIFAR-10's values
SETTINGS = {}  # the scripts' defaults with this network
BOTTLENECK_FROM = 44  # the depth from which blocks are bottlenecks, as in the released code


class Outputs(NamedTuple):
    """The network's outputs for N images: three features, shallow to deep, and the class scores.

    layer2: N x feat_dims["layer2"], global max pool after the second stage, or the auxiliary branch.
    layer3: N x feat_dims["layer3"], global average pool after the third stage.
    fc:     N x feat_dims["fc"], the first fully connected layer, with no activation after it.
    logits: N x num_classes, before the softmax.
    """

    layer2: Tensor
    layer3: Tensor
    fc: Tensor
    logits: Tensor


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, activated after the sum (He et al., CVPR 2016)."""

    expansion = 1

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _downsample(in_channels, channels, stride)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x))
        return F.relu(x.add_(shortcut), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide, and a shortcut; the 3x3 has the stride."""

    expansion = 4

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride)

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.bn3(self.conv3(x))
        return F.relu(x.add_(shortcut), inplace=True)


def _downsample(in_channels, out_channels, stride):
    """The projection on the shortcut of a block that changes the shape, else None."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def _stage(block, in_channels, channels, blocks, stride):
    """`blocks` blocks in a row; the first has the stride."""
    widths = [in_channels] + [channels * block.expansion] * (blocks - 1)
    return nn.Sequential(*(block(width, channels, 1 if i else stride) for i, width in enumerate(widths)))


class ResNet(nn.Module):
    """A three-stage ResNet for 32 x 32 images (any size works); `resnet` makes it and checks the arguments.

    `feat_dims` maps the name of each feature in `Outputs`, shallow to deep, to its width. `arguments` are
    those of `resnet`, in plain Python.
    """

    name = "resnet"

    def __init__(self, num_classes, depth, aux_dim, fc_dim, mean, std):
        super().__init__()
        self.num_classes, self.depth, self.aux_dim, self.fc_dim = num_classes, depth, aux_dim, fc_dim
        self.arguments = {"num_classes": num_classes, "depth": depth, "aux_dim": aux_dim, "fc_dim": fc_dim}
        self.arguments |= {"mean": list(mean), "std": list(std)}
        self.label = f"depth {depth}"
        block = Bottleneck if depth >= BOTTLENECK_FROM else BasicBlock
        blocks = (depth - 2) // 6
        width1, width2, width3 = 16 * block.expansion, 32 * block.expansion, 64 * block.expansion

        self.conv1 = nn.Conv2d(len(mean), 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(block, 16, 16, blocks, stride=1)
        self.layer2 = _stage(block, width1, 32, blocks, stride=2)
        self.layer3 = _stage(block, width2, 64, blocks, stride=2)
        self.fc = nn.Linear(width3, fc_dim)
        self.fcf = nn.Linear(fc_dim, num_classes)
        self.aux = nn.Linear(width2, aux_dim) if aux_dim else None
        self.feat_dims = {"layer2": aux_dim or width2, "layer3": width3, "fc": fc_dim}

        # Not persistent: the released state_dict has no such keys.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # std sqrt(2 / (k * k * out_channels))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        """Features and class scores of `images`, N x C x H x W in [0, 1]."""
        x = (images - self.mean) / self.std
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        stage2 = self.layer2(self.layer1(x))
        # amax instead of a max pool: the backward of the CUDA pool is not deterministic.
        layer2 = stage2.amax((2, 3)) if self.aux is None else self.aux(stage2.mean((2, 3)))
        layer3 = self.layer3(stage2).mean((2, 3))
        fc = self.fc(layer3)
        # No activation between the two linear layers, as in the released network.
        return Outputs(layer2, layer3, fc, self.fcf(fc))

    def logits(self, images):
        """Class scores alone, N x num_classes: the function that attacks and evaluation take."""
        return self(images).logits


def resnet(num_classes=10, depth=110, aux_dim=0, fc_dim=1024, mean=CHANNEL_MEAN, std=CHANNEL_STD):
    """Make a ResNet with fresh weights: He's fan-out normal convolutions, the rest as PyTorch draws it.

    num_classes: from 2 up.
    depth: 6n + 2, n >= 1: n basic blocks a stage below 44, else n bottlenecks. The released network has 110
        (18 blocks a stage), the one that the paper describes, with 12 blocks a stage, 74.
    aux_dim: width of the paper's auxiliary branch on the second stage (Table 1: GAP, then FC(512)); 0: none.
        The branch adds the parameters `aux.weight` and `aux.bias`, and its output is the feature `layer2`.
    fc_dim: width of the penultimate layer, the feature `fc`: 1024 in the paper, 2 in its Figure 1.
    mean, std: one number a channel, with which images are normalised.
    Raises ValueError for any other argument.
    """
    if type(depth) is not int or depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth {depth!r}: must be 6n + 2, such as 8, 14, 20, 26, 32, 38, 44, 50, 74, 110")
    if type(num_classes) is not int or num_classes < 2:
        raise ValueError(f"num_classes {num_classes!r}: must be a whole number from 2 up")
    if type(aux_dim) is not int or aux_dim < 0:
        raise ValueError(f"aux_dim {aux_dim!r}: must be 0 (no auxiliary branch) or a width, such as 512")
    if type(fc_dim) is not int or fc_dim < 1:
        raise ValueError(f"fc_dim {fc_dim!r}: must be a whole number from 1 up")
    return ResNet(num_classes, depth, aux_dim, fc_dim, *checked_normalisation(mean, std))


make = resnet


def checked_normalisation(mean, std):
    """Return `mean` and `std` as tuples; ValueError unless each has one number in range for each channel."""
    for name, values, least in (("mean", mean, 0), ("std", std, 1e-3)):
        known = isinstance(values, tuple | list) and all(type(value) in (int, float) for value in values)
        if not known or not 1 <= len(values) <= 16 or not all(least <= value <= 1 for value in values):
            raise ValueError(f"{name} {values!r}: must be numbers from {least} to 1, one a channel")
    if len(mean) != len(std):
        raise ValueError(f"mean and std of {len(mean)} and {len(std)} channels: must be as many")
    return tuple(mean), tuple(std)


def clean_state_dict(state_dict):
    """A new dict without the `module.` and `_orig_mod.` that wrappers put before each key, in any order.

    Only the start of a key is cut. Raises ValueError when a key is no string or two keys become the same.
    """
    cleaned = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise ValueError(f"not a state_dict: its keys must be names of weights, and {key!r} is not one")
        name = re.sub(r"^(?:module\.|_orig_mod\.)+", "", key)
        if name in cleaned:
            raise ValueError(f"state_dict holds {name} twice: with and without a wrapper's prefix")
        cleaned[name] = value
    return cleaned


def network_of(state_dict, **untold):
    """Return the arguments of the `resnet` that `state_dict` fits: depth, num_classes, aux_dim, fc_dim.

    untold: the arguments of UNTOLD. All keys and shapes must fit, but wrappers' prefixes are ignored, and the
    batch counters, which early versions of PyTorch did not save, may be missing. Raises ValueError when no
    network fits.
    """
    shapes = {key: tuple(getattr(value, "shape", ())) for key, value in clean_state_dict(state_dict).items()}
    blocks = len({key.split(".")[1] for key in shapes if key.startswith("layer1.")})
    num_classes, aux_dim, fc_dim = (
        next(iter(shapes.get(f"{layer}.weight", ())), 0) for layer in ("fcf", "aux", "fc")
    )
    # Every block has 10 weights or more: a small file cannot make us build a deep network.
    if not 0 < 30 * blocks < len(shapes) or num_classes < 2 or not fc_dim:
        raise ValueError("not a ResNet of this project: its weights lack layer1, fc.weight or fcf.weight")
    arguments = {"depth": 6 * blocks + 2, "num_classes": num_classes, "aux_dim": aux_dim, "fc_dim": fc_dim}

    name = f"ResNet-{arguments['depth']}"
    with torch.device("meta"):  # shapes without memory, and without drawing from the random generator
        expected = {
            key: tuple(value.shape) for key, value in resnet(**arguments, **untold).state_dict().items()
        }
    for key in sorted(expected.keys() | shapes.keys()):
        if key not in expected:
            raise ValueError(f"not a {name}: {key} belongs to no such network")
        if key not in shapes and not key.endswith(".num_batches_tracked"):
            raise ValueError(f"not a {name}: {key} is missing")
        if shapes.get(key, expected[key]) != expected[key]:
            raise ValueError(f"not a {name}: {key} has shape {shapes[key]}, not {expected[key]}")
    return arguments


class Folded(nn.Module):
    """A frozen ResNet without batch norms: images, N x C x H x W in [0, 1], to logits; made by `folded`."""

    def __init__(self, model, dtype):
        super().__init__()
        self.network = copy.deepcopy(model)
        self.network.zero_grad(set_to_none=True)
        # Pairs kept in plain lists so that nn.Module does not register the original's layers.
        self.folds, self.linears, convs = [], [], []
        for name, module in list(model.named_modules()):
            copied = self.network.get_submodule(name)
            if isinstance(module, nn.Linear):
                self.linears.append((copied.to(dtype), module))
            for conv_name, norm_name in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
                norm = getattr(module, norm_name, None)
                if isinstance(norm, nn.modules.batchnorm._BatchNorm):  # torch's synchronised one too
                    self.folds.append((getattr(module, conv_name), norm))
                    convs.append(getattr(copied, conv_name))
                    setattr(copied, norm_name, nn.Identity())
        self._share_memory(convs, dtype)
        self.requires_grad_(False).eval()
        self.refresh()

    def _share_memory(self, convs, dtype):
        """Make the weights of `convs` views of one tensor, and their biases views of another.

        A refresh is then a handful of operations: a GPU would wait for the host to launch some for each of
        the 163 convolutions of depth 110.
        """
        sizes = [conv.weight.numel() for conv in convs]
        widths = [conv.out_channels for conv in convs]
        like = convs[0].weight.detach().to(dtype)
        self.weights, self.biases = like.new_empty(sum(sizes)), like.new_empty(sum(widths))
        repeats = torch.tensor([conv.weight[0].numel() for conv in convs for _ in range(conv.out_channels)])
        self.channel = torch.repeat_interleave(repeats).to(like.device)  # the channel of each weight
        views = zip(convs, self.weights.split(sizes), self.biases.split(widths), strict=True)
        for conv, weight, bias in views:
            out, into, height, width = conv.weight.shape
            weight = weight.view(out, height, width, into).permute(0, 3, 1, 2)  # channels-last
            conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, images):
        return self.network(images).logits

    @torch.no_grad()
    def refresh(self):
        """Take over the present weights and statistics of the original, in place."""
        norms = [norm for _, norm in self.folds]
        # In float64 where the device has it, so that only the result is rounded.
        wide = torch.float32 if self.weights.device.type == "mps" else torch.float64
        weight, bias, mean, var = (
            torch.cat([getattr(norm, name) for norm in norms]).to(wide)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / (var + norms[0].eps).sqrt()
        self.biases.copy_(bias - mean * scale)
        weights = torch.cat([conv.weight.permute(0, 2, 3, 1).flatten() for conv, _ in self.folds])
        self.weights.copy_(weights * scale.index_select(0, self.channel))
        for copied, original in self.linears:
            copied.weight.copy_(original.weight)
            copied.bias.copy_(original.bias)


def folded(model, dtype=None):
    """A frozen copy of `model` for attacks and evaluation: eval mode, batch norms folded into convolutions.

    Its logits are those of `model.eval()` up to rounding, whatever mode `model` is in. After a change of
    `model` call `refresh()`. `dtype` is that of the copy's convolutions and linear layers, None being the
    model's; a copy in bfloat16 works under autocast only. `model` stays as it is.
    """
    return Folded(model, dtype)
