"""The network against its description: layout, arithmetic, saved weights, and the frozen copy for attacks."""

import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resnet_model import BasicBlock, Bottleneck, Outputs, clean_state_dict, network_of, resnet

# Both kinds of block, with and without the branch.
small = pytest.mark.parametrize("depth, aux_dim", [(14, 0), (8, 5), (44, 0)])


def layout(depth, num_classes, aux_dim=0):
    """Every key and shape of the released network, spelled out from its description."""
    shapes = {}

    def conv(name, out_channels, in_channels, size):
        shapes[f"{name}.weight"] = (out_channels, in_channels, size, size)

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("conv1", 16, 3, 3)
    norm("bn1", 16)
    width = 16
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        for block in range((depth - 2) // 6):
            name = f"layer{stage}.{block}"
            kernels = (1, 3, 1) if depth >= 44 else (3, 3)
            outs = (channels, channels, 4 * channels) if depth >= 44 else (channels, channels)
            ins = (width, *outs[:-1])
            for i, (out, in_, kernel) in enumerate(zip(outs, ins, kernels, strict=True), 1):
                conv(f"{name}.conv{i}", out, in_, kernel)
                norm(f"{name}.bn{i}", out)
            if block == 0 and (stage > 1 or width != outs[-1]):
                conv(f"{name}.downsample.0", outs[-1], width, 1)
                norm(f"{name}.downsample.1", outs[-1])
            width = outs[-1]
    shapes |= {"fc.weight": (1024, width), "fc.bias": (1024,)}
    shapes |= {"fcf.weight": (num_classes, 1024), "fcf.bias": (num_classes,)}
    branch = {"aux.weight": (aux_dim, 128 if depth >= 44 else 32), "aux.bias": (aux_dim,)}
    return shapes | (branch if aux_dim else {})


def by_hand(weights, images, depth):
    """What the network answers in eval mode, from its weights alone, in their precision."""

    def norm(x, name):
        mean, var, scale, shift = (
            weights[f"{name}.{part}"].view(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def conv(x, name, stride=1):
        kernel = weights[f"{name}.weight"]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    mean, std = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    x = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    x = norm(conv(x, "conv1"), "bn1").clamp(min=0)
    count, strider = (3, 2) if depth >= 44 else (2, 1)  # convolutions a block, and the one that strides
    stages = {}
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            shortcut = x
            if f"{name}.downsample.0.weight" in weights:
                shortcut = norm(conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            for i in range(1, count + 1):
                x = norm(conv(x, f"{name}.conv{i}", stride if i == strider else 1), f"{name}.bn{i}")
                x = (x + shortcut if i == count else x).clamp(min=0)
        stages[stage] = x
    layer2 = stages[2].flatten(2).max(2).values
    if "aux.weight" in weights:
        layer2 = stages[2].flatten(2).mean(2) @ weights["aux.weight"].T + weights["aux.bias"]
    layer3 = stages[3].flatten(2).mean(2)
    fc = layer3 @ weights["fc.weight"].T + weights["fc.bias"]
    return layer2, layer3, fc, fc @ weights["fcf.weight"].T + weights["fcf.bias"]


def lived_in(depth=8, aux_dim=0, num_classes=10, dtype=torch.float32):
    """A network in eval mode whose batch norms have been through something: no value is its default."""
    torch.manual_seed(0)
    model = resnet(num_classes, depth, aux_dim).to(dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.2)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def pictures(count=3, size=16, dtype=torch.float32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def copied(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(weights, others):
    return list(weights) == list(others) and all(torch.equal(weights[key], others[key]) for key in weights)


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("depth, parameters", [(110, 1_975_002), (74, 1_418_586)])
def test_parameters_are_as_many_as_published(depth, parameters):
    assert sum(p.numel() for p in resnet(10, depth).parameters()) == parameters


@pytest.mark.parametrize(
    "depth, num_classes, aux_dim", [(8, 10, 3), (38, 2, 0), (44, 100, 512), (74, 10, 0), (110, 10, 0)]
)
def test_keys_and_shapes_are_the_released_networks_and_those_of_the_branch(depth, num_classes, aux_dim):
    with torch.device("meta"):
        model = resnet(num_classes, depth, aux_dim)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == layout(depth, num_classes, aux_dim)
    assert (model.depth, model.num_classes, model.aux_dim) == (depth, num_classes, aux_dim)


@pytest.mark.parametrize(
    "depth, aux_dim, widths", [(8, 0, (32, 64)), (38, 0, (32, 64)), (44, 0, (128, 256)), (44, 7, (7, 256))]
)
@pytest.mark.parametrize("size", [32, 28])
def test_features_have_the_widths_the_network_names(depth, aux_dim, widths, size):
    model = resnet(7, depth, aux_dim)
    outputs = model(pictures(2, size))
    assert isinstance(outputs, Outputs) and outputs._fields == ("layer2", "layer3", "fc", "logits")
    assert list(model.feat_dims.items()) == [("layer2", widths[0]), ("layer3", widths[1]), ("fc", 1024)]
    assert [tuple(output.shape) for output in outputs] == [(2, width) for width in (*widths, 1024, 7)]


@pytest.mark.parametrize(
    "name, named, values",
    [
        ("depth", "6n + 2", (0, 2, -4, 7, 109, 111, 110.0, "110", None, True)),
        ("num_classes", "from 2 up", (0, 1, -3, 10.0, "10", True)),
        ("aux_dim", "0 (no auxiliary branch)", (-1, 2.5, None)),
        ("fc_dim", "from 1 up", (-1, 0, 2.5, None, True)),
    ],
)
def test_bad_arguments_are_refused_with_what_is_allowed(name, named, values):
    for value in values:
        with pytest.raises(ValueError) as error:
            resnet(**{name: value})
        assert all(part in str(error.value) for part in (name, repr(value), named))


def test_fresh_weights_are_hes():
    torch.manual_seed(0)
    model, pooled = resnet(10, 110), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            out_channels, _, height, width = module.weight.shape
            unit = (module.weight * (height * width * out_channels / 2) ** 0.5).flatten()
            assert abs(unit.std().item() - 1) < 5 / (2 * len(unit)) ** 0.5, name  # five standard errors
            pooled.append(unit)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    pooled = torch.cat(pooled)
    assert abs(pooled.mean().item()) < 0.005
    assert abs(pooled.pow(4).mean().item() - 3) < 0.05  # normal, not uniform
    torch.manual_seed(0)
    assert same(model.state_dict(), resnet().state_dict())  # by default as published, and by the seed


# ---------------------------------------------------------------- arithmetic


@small
def test_answers_are_those_of_the_arithmetic_by_hand(depth, aux_dim):
    model, images = lived_in(depth, aux_dim, dtype=torch.float64), pictures(dtype=torch.float64)
    before, weights = images.clone(), copied(model)
    outputs, expected = model(images), by_hand(model.state_dict(), images, depth)
    for name, output, by_hand_value in zip(Outputs._fields, outputs, expected, strict=True):
        # 1e-6: the network's own mean and std are float32 numbers.
        torch.testing.assert_close(output, by_hand_value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: n + m)
    assert (expected[2] < 0).any()  # or an activation after fc would not have shown
    assert torch.equal(model.logits(images), outputs.logits)
    assert torch.equal(images, before) and same(copied(model), weights) and not model.training


def test_training_uses_the_batchs_statistics_and_keeps_them():
    model, images = lived_in().train(), pictures(8)
    before = model.bn1.running_mean.clone()
    entered = F.conv2d((images - model.mean) / model.std, model.conv1.weight, padding=1)
    model(images)
    torch.testing.assert_close(model.bn1.running_mean, 0.9 * before + 0.1 * entered.mean((0, 2, 3)))


@small
def test_every_parameter_is_reached_from_the_outputs(depth, aux_dim):
    model = resnet(10, depth, aux_dim)
    sum(output.float().square().mean() for output in model(pictures(4))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@small
def test_channels_last_is_kept_and_changes_nothing(depth, aux_dim):
    model, images = lived_in(depth, aux_dim, dtype=torch.float64), pictures(dtype=torch.float64)
    expected, kept, layout = model(images), [], {"memory_format": torch.channels_last}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, args, output: kept.append(output.is_contiguous(**layout)))
    outputs = model.to(**layout)(images.to(**layout))
    assert kept and all(kept)
    torch.testing.assert_close(outputs, expected, rtol=1e-9, atol=1e-9)


@small
def test_autocast_reaches_every_layer(depth, aux_dim):
    model, images, dtypes = lived_in(depth, aux_dim), pictures(), set()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, args, output: dtypes.update({args[0].dtype, output.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images)
    assert dtypes == {torch.bfloat16} and {output.dtype for output in outputs} == {torch.bfloat16}
    for low, full in zip(outputs, model(images), strict=True):
        assert (low - full).abs().max() < 0.05 * full.abs().max()


def test_compiles_as_one_graph():
    model, images = lived_in().train(), pictures()
    outputs = torch.compile(lived_in().train(), fullgraph=True, backend="eager")(images)
    assert isinstance(outputs, Outputs)
    torch.testing.assert_close(outputs.logits, model(images).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_blocks_compile_with_their_gradients(block):
    """Their operations in place are what a compiler could get wrong."""
    block, images = block(8, 4, stride=2).eval().double(), torch.randn(2, 8, 6, 6).double().requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    outputs = compiled(images), block(images)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), images) for y in outputs))


# ---------------------------------------------------------------- saved weights


@given(
    prefixes=st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=5).map("".join),
    name=st.sampled_from(
        ["fc.weight", "layer1.0.module.weight", "a._orig_mod.module.b", "modules.x", "my_module.x"]
    ),
)
def test_only_leading_prefixes_are_cut_and_two_weights_are_never_made_one(prefixes, name):
    weights = {prefixes + name: 1, prefixes + "other": 2}
    before = dict(weights)
    assert clean_state_dict(weights) == {name: 1, "other": 2}
    assert weights == before
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        clean_state_dict({**weights, "module.module." + prefixes + name: 3})


@pytest.mark.parametrize("wrap", ["data parallel", "compiled", "both", "neither"])
def test_weights_saved_from_a_wrapper_come_back(wrap):
    model, images = lived_in(44, num_classes=6), pictures()
    wrapped = nn.DataParallel(model) if wrap in ("data parallel", "both") else model
    wrapped = torch.compile(wrapped) if wrap in ("compiled", "both") else wrapped  # nothing is compiled yet
    file = io.BytesIO()
    torch.save({"epoch": 3, "state_dict": wrapped.state_dict(), "optimizer_model": {}}, file)
    file.seek(0)
    weights = torch.load(file, weights_only=True)["state_dict"]
    assert wrap == "neither" or not set(weights) & set(model.state_dict())

    keys, state = list(weights), torch.get_rng_state()
    assert network_of(weights) == {"depth": 44, "num_classes": 6, "aux_dim": 0, "fc_dim": 1024}
    assert torch.equal(torch.get_rng_state(), state) and list(weights) == keys
    restored = resnet(**network_of(weights)).eval()
    restored.load_state_dict(clean_state_dict(weights))
    assert all(map(torch.equal, restored(images), model(images)))


@settings(max_examples=12, deadline=None)
@given(
    depth=st.sampled_from([8, 14, 20, 38, 44, 50]),
    num_classes=st.integers(2, 200),
    aux_dim=st.sampled_from([0, 1, 128, 512]),
    fc_dim=st.sampled_from([1, 2, 1024]),
)
def test_weights_tell_their_network_and_load_without_batch_counters(depth, num_classes, aux_dim, fc_dim):
    with torch.device("meta"):
        model = resnet(num_classes, depth, aux_dim, fc_dim)
    weights = model.state_dict()
    arguments = {"depth": depth, "num_classes": num_classes, "aux_dim": aux_dim, "fc_dim": fc_dim}
    assert network_of(weights) == arguments
    early = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    assert network_of(early) == arguments
    early = {key: torch.zeros(value.shape) for key, value in early.items()}
    resnet(**arguments).load_state_dict(clean_state_dict(early))


DROPPED = object()


@pytest.mark.parametrize(
    "key, value, named",
    [
        (None, {}, "layer1, fc.weight or fcf.weight"),  # an empty file
        ("fcf.weight", DROPPED, "layer1, fc.weight or fcf.weight"),
        ("fc.bias", DROPPED, "fc.bias is missing"),
        ("layer3.1.bn2.running_var", DROPPED, "layer3.1.bn2.running_var is missing"),
        ("layer2.0.conv3.weight", torch.zeros(1), "layer2.0.conv3.weight"),
        ("layer1.2.conv1.weight", torch.zeros(1), "not a ResNet-20"),
        ("extra", torch.zeros(1), "extra"),
        ("fc.weight", "text", "fc.weight"),
        ("aux.weight", 3, "aux.weight"),
        (3, 4, "3"),
        ("conv1.weight", torch.zeros(16, 1, 3, 3), "conv1.weight"),
        ("fcf.weight", torch.zeros(10, 512), "fcf.weight"),
        ("fcf.weight", torch.zeros(1, 1024), "fcf"),
        ("fcf.weight", torch.zeros(()), "fcf"),
        ("aux.weight", torch.zeros(0, 32), "aux.weight"),
        ("aux.weight", torch.zeros(()), "aux.weight"),
    ],
)
def test_other_weights_are_refused_by_name(key, value, named):
    weights = {**resnet(10, 14).state_dict(), key: value} if key else value
    with pytest.raises(ValueError) as error:
        network_of({name: part for name, part in weights.items() if part is not DROPPED})
    assert named in str(error.value)
