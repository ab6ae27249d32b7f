"""How fast the project is, beside the textbook way of doing the same (`plain.py`).

    python -m benchmarks.throughput

Plain and ours take turns in one process, on the same weights and images: whole epochs of the two training
stages, of stage 2 on adversarial images, the attack inside it alone, and the evaluation under each attack.
Prints a Markdown table; writes it and all numbers, with hardware and versions, to a JSON file and beside it.
`--scaling` measures how time and memory of ours grow. Speed does not depend on what the images show, so by
default they are noise and the weights fresh; `--dataset` and `--init-from` take real ones.
"""

import ctypes
import dataclasses
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import attacks
import checkpoints
import cli
import data
import evaluation
import pcl_training
import pcl_training_adversarial_fgsm
import pcl_training_adversarial_pgd
import prototype_conformity
import robustness
import softmax_training
import suite
import training
import utils
from benchmarks import plain
from cli import Count, Depth, JsonFile, Seed, Whole
from resnet_model import resnet

SCRIPTS = {
    "stage1": softmax_training,
    "stage2": pcl_training,
    "stage2_fgsm": pcl_training_adversarial_fgsm,
    "stage2_pgd": pcl_training_adversarial_pgd,
}
INNER = {"inner_fgsm": "stage2_fgsm", "inner_pgd": "stage2_pgd"}
EVALUATIONS = ("fgsm", "bim", "mim", "pgd")
ROWS = ("data", *SCRIPTS, *INNER, *EVALUATIONS)
LR = 1e-4  # of the network, on both sides: every repetition finds much the same weights


@dataclass(frozen=True)
class Config:
    # what is measured
    rows: tuple[Literal[ROWS], ...] = ROWS
    scaling: bool = False  # measure how ours grows with each of the lists below, and no rows
    images: Count | None = None  # of an epoch of training and of its data; none: 512, or 12,800 on a GPU
    attack_images: Count | None = None  # of one in which every image is attacked; none: half as many
    repetitions: Count = 3  # of each side, taking turns; the median counts
    batch_size: Count = 128  # in adversarial training half of them clean
    depth: Depth = 110
    num_steps: Count = 10  # of BIM, MIM and PGD
    workers: Whole = 2  # processes of the plain DataLoader
    # what grows
    batch_sizes: tuple[Count, ...] = (32, 64, 128, 256)  # stage 2
    depths: tuple[Depth, ...] = (44, 74, 110)  # stage 2; below 44 the blocks are others
    steps: tuple[Count, ...] = (1, 5, 10, 20)  # evaluation under PGD
    epoch_sizes: tuple[Count, ...] = (256, 512, 1024)  # images, stage 2
    # data and files
    dataset: Literal["noise", *data.DATASETS] = "noise"  # noise: random pixels
    data_dir: str = "data"
    init_from: str | None = None  # a checkpoint, whose depth then counts; none: fresh weights
    results: JsonFile = "results/throughput.json"  # and .md beside it
    # run
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # of our training
    compile: Literal["auto", "on", "off"] = "auto"  # of our training
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    seed: Seed = 0


# ---------------------------------------------------------------- what is measured on


@dataclass(frozen=True)
class Subject:
    """The weights and images that both sides get."""

    config: Config
    device: torch.device
    network: dict  # arguments of `resnet`
    weights: dict
    classes: tuple[str, ...]
    train: data.Split
    test: data.Split

    def model(self):
        """The network with the weights to start from, on the device."""
        model = resnet(**self.network)
        model.load_state_dict(self.weights)
        return model.to(self.device)


def make_subject(config: Config, device: torch.device) -> Subject:
    """Read or draw images and weights; labels of noise are what the network says of it."""
    torch.manual_seed(config.seed)
    if config.dataset == "noise":
        sets = (
            noise(config.images, config.seed, device),
            noise(config.attack_images, config.seed + 1, device),
        )
        classes = data.CIFAR10_CLASSES
    else:
        sets, classes = [], ()
        for split, limit in (("train", config.images), ("test", config.attack_images)):
            where = {"device": device, "splits": (split,), "seed": config.seed, "limit": limit}
            loaded = data.load(config.dataset, config.data_dir, **where)
            sets.append(shuffled(getattr(loaded, split), config.seed))
            classes = loaded.classes
    if config.init_from:
        _, weights, network = checkpoints.read_network(config.init_from)
        if network["num_classes"] != len(classes):
            raise utils.CheckpointError(
                f"{config.init_from}: has {network['num_classes']} classes, the data {len(classes)}"
            )
        model = resnet(**network)
        model.load_state_dict(weights)
    else:
        network = {"num_classes": len(classes), "depth": config.depth}
        model = calibrated(resnet(**network).to(device), sets[0])
    model.to(device)
    if config.dataset == "noise":
        sets = [data.Split(split.images, predictions(model, split)) for split in sets]
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    return Subject(config, device, network, weights, classes, *sets)


def noise(size: int, seed: int, device: torch.device) -> data.Split:
    images = torch.randint(
        256, (size, 3, 32, 32), dtype=torch.uint8, generator=utils.generator(seed, "noise")
    )
    return data.Split(images.to(device), torch.zeros(size, dtype=torch.int64, device=device))


def shuffled(split: data.Split, seed: int) -> data.Split:
    order = torch.randperm(len(split), generator=utils.generator(seed, "shuffle")).to(split.labels.device)
    return data.Split(split.images[order], split.labels[order])


@torch.no_grad()
def calibrated(model, split: data.Split):
    """Give fresh batch norms the statistics of some images: without them deep activations overflow."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(data.to_float(split.images[:128]))
    for norm in norms:
        norm.momentum = 0.1
    return model


@torch.no_grad()
def predictions(model, split: data.Split) -> Tensor:
    model.eval()
    batches = data.epoch_batches(split, 128)
    return torch.cat([model.logits(data.to_float(images)).argmax(1) for _, images, _ in batches])


def first(split: data.Split, size: int) -> data.Split:
    return data.Split(split.images[:size], split.labels[:size])


def images_of(config: Config, row: str) -> int:
    return config.images if row in ("data", "stage1", "stage2") else config.attack_images


def batch_of(config: Config, row: str) -> int:
    """Images taken from the data at a time: adversarial training makes twice as many of them."""
    return max(config.batch_size // 2, 1) if row in INNER or row in INNER.values() else config.batch_size


# ---------------------------------------------------------------- ours: an epoch of each row


def our_run(subject: Subject, row: str, split: data.Split) -> training.Run:
    """A training run with the recipe of the row's script."""
    config, script = subject.config, SCRIPTS[row]
    steps = {"num_steps": config.num_steps} if row == "stage2_pgd" else {}
    recipe = script.Config(
        depth=subject.network["depth"], batch_size=batch_of(config, row), lr=LR, precision=config.precision,
        compile=config.compile, seed=config.seed, save_every_minutes=None, **steps,
    )  # fmt: skip
    model = subject.model()
    network = {"params": model.parameters(), "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    groups, criterion = [network], training.CrossEntropyLoss()
    if row != "stage1":
        widths = {layer: model.feat_dims[layer] for layer in recipe.layers}
        criterion = prototype_conformity.PrototypeConformityLoss(
            len(subject.classes), widths, recipe.weight_prox, recipe.weight_conprox
        ).to(subject.device)
        groups += criterion.param_groups(recipe.lr_prox, recipe.lr_conprox)
    optimizer = torch.optim.SGD(groups, lr=recipe.lr, fused=True)
    dataset = data.Dataset(config.dataset, subject.classes, split, split)
    torch.compiler.reset()  # each row compiles for itself, as the script would
    return training.Run(recipe, dataset, model, criterion, optimizer, None, adversary_of(recipe, row))


def adversary_of(recipe, row: str):
    """The adversary of the row's script."""

    def fgsm(model_fn, images, labels, generator):
        epsilon = utils.uniform(recipe.epsilon_min, recipe.epsilon_max, generator)
        return attacks.fgsm(model_fn, images, labels, epsilon)

    def pgd(model_fn, images, labels, generator):
        epsilon = utils.uniform(recipe.epsilon_min, recipe.epsilon_max, generator)
        return attacks.pgd(
            model_fn, images, labels, epsilon, step_size=recipe.step_size, num_steps=recipe.num_steps,
            random_start=True, generator=generator,
        )  # fmt: skip

    return {"stage2_fgsm": fgsm, "stage2_pgd": pgd}.get(row)


def ours(subject: Subject, row: str) -> Callable[[], Tensor | None]:
    """An epoch of a row, done by the project; evaluations return which images stay right."""
    config, batch_size = subject.config, batch_of(subject.config, row)
    if row in EVALUATIONS:
        return our_evaluation(subject, row, batch_size)
    run = our_run(subject, INNER.get(row, "stage1" if row == "data" else row), subject.train)
    run.dataset = dataclasses.replace(run.dataset, train=first(subject.train, images_of(config, row)))
    split, stop = run.dataset.train, utils.StopSignals()

    def only_data():
        for index, images, _ in data.epoch_batches(split, batch_size, utils.generator(0, "order")):
            images = data.augment(images, utils.generator(0, "augment", index))
            data.to_float(images).contiguous(memory_format=torch.channels_last)

    def only_attack():
        for index, images, labels in data.epoch_batches(split, batch_size):
            images = data.to_float(images).contiguous(memory_format=torch.channels_last)
            run.attack(images, labels, index)

    def epoch():
        run.train_epoch(stop)
        run.epoch, run.batch, run.sums, run.images = run.epoch + 1, 0, {}, 0

    return only_data if row == "data" else only_attack if row in INNER else epoch


def our_evaluation(subject: Subject, row: str, batch_size: int) -> Callable[[], Tensor]:
    settings = robustness.Config(num_steps=subject.config.num_steps)
    trial, split = suite.make(row, settings), first(subject.test, images_of(subject.config, row))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth.tar"
        torch.save({"state_dict": subject.weights}, path)
        target = evaluation.load_target(path, subject.device, subject.classes)

    def epoch():
        outcome = evaluation.Outcome()
        for _ in evaluation.measure(target, split, trial, outcome, batch_size=batch_size, seed=settings.seed):
            pass
        return outcome.correct

    return epoch


# ---------------------------------------------------------------- plain: an epoch of each row


def plainly(subject: Subject, row: str) -> Callable[[], Tensor | None]:
    """An epoch of a row, done the textbook way; evaluations return which images stay right."""
    config, device, model = subject.config, subject.device, subject.model()
    split = first(subject.test if row in EVALUATIONS else subject.train, images_of(config, row))
    batches = plain.loader(split, batch_of(config, row), row not in (*EVALUATIONS, *INNER), config.workers)
    if row in EVALUATIONS:
        return partial(plain.evaluate, model, batches, device, plain_attack(model, row, config))

    recipe = SCRIPTS[INNER.get(row, "stage1" if row == "data" else row)].Config()
    attack = plain_adversary(model, recipe, config)

    def only_data():
        for images, labels in batches:
            images.to(device), labels.to(device)

    def only_attack():
        model.eval()
        for images, labels in ready:
            attack(images, labels)

    if row == "data":
        return only_data
    if row in INNER:
        ready = [(images.to(device), labels.to(device)) for images, labels in batches]
        return only_attack
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LR, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    terms = []
    if row != "stage1":
        shapes = {layer: (len(subject.classes), model.feat_dims[layer]) for layer in recipe.layers}
        drawn = {
            layer: [torch.randn(shape, device=device) for _ in range(2)] for layer, shape in shapes.items()
        }
        terms = plain.make_terms(drawn, recipe)
    return partial(plain.train_epoch, model, batches, optimizer, terms, device, attack)


def plain_attack(model, row: str, config: Config):
    epsilon, steps = robustness.Config().epsilon, config.num_steps
    return {
        "fgsm": partial(plain.fgsm, model, epsilon=epsilon),
        "bim": partial(plain.bim, model, epsilon=epsilon, num_steps=steps),
        "mim": partial(plain.mim, model, epsilon=epsilon, num_steps=steps),
        "pgd": partial(
            plain.pgd, model, epsilon=epsilon, step_size=suite.PGD_STEP, num_steps=steps
        ),
    }[row]  # fmt: skip


def plain_adversary(model, recipe, config: Config):
    """The attack of adversarial training as plain code, None for recipes without one."""
    if not hasattr(recipe, "epsilon_min"):
        return None

    def attack(images, labels):
        epsilon = torch.empty(()).uniform_(recipe.epsilon_min, recipe.epsilon_max).item()
        if not hasattr(recipe, "num_steps"):
            return plain.fgsm(model, images, labels, epsilon)
        return plain.pgd(
            model, images, labels, epsilon, recipe.step_size, config.num_steps, random_start=True
        )

    return attack


# ---------------------------------------------------------------- the measuring


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(epoch: Callable, device: torch.device) -> float:
    """Seconds that an epoch takes, with all that it has asked of the device."""
    wait(device)
    started = time.perf_counter()
    epoch()
    wait(device)
    return time.perf_counter() - started


def with_peak(epoch: Callable, device: torch.device) -> tuple[object, float | None]:
    """What an epoch returns, and how far it raised the memory in use, in MiB; None where no system tells.

    On a GPU the memory of its tensors; on a CPU the resident set of this process, without its workers.
    """
    gc.collect()
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = epoch()
        wait(device)
        return result, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    before = reset_resident_peak()
    result = epoch()
    return result, None if before is None else resident("VmHWM") - before


def reset_resident_peak() -> float | None:
    """Give freed memory back to Linux, begin a new peak, and return what is in use, in MiB."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    except (OSError, AttributeError):
        return None


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def tf32(*values: bool) -> tuple[bool, bool]:
    """Set, if given, whether matrix products and convolutions may use TF32 on CUDA; return whether."""
    if values:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = values
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def compare(subject: Subject, row: str) -> dict:
    """Measure both sides of a row: a first epoch of each for memory and warmth, then they take turns."""
    before = tf32()
    epochs = {"plain": plainly(subject, row), "ours": ours(subject, row)}
    flags = {"plain": before, "ours": tf32()}  # our training allows TF32; plain code has the defaults
    if row in EVALUATIONS:
        flags["plain"] = (False, False)  # as ours, which measures in exact float32
    seconds, peaks, results = {"plain": [], "ours": []}, {}, {}
    for side, epoch in epochs.items():
        tf32(*flags[side])
        results[side], peaks[side] = with_peak(epoch, subject.device)
    for repetition in range(subject.config.repetitions):
        for side in ("plain", "ours") if repetition % 2 == 0 else ("ours", "plain"):
            tf32(*flags[side])
            seconds[side].append(timed(epochs[side], subject.device))
    tf32(*before)
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    images = images_of(subject.config, row)
    measured = {"row": row, "images": images, "batch_size": batch_of(subject.config, row)}
    for side in epochs:
        measured[side] = summary(seconds[side], images, peaks[side])
    measured |= {"ratio": statistics.median(ratios), "ratios": ratios}
    if row in EVALUATIONS and subject.config.init_from:  # fresh weights tell rounding from rounding
        measured["same_outcome"] = int((results["plain"] == results["ours"]).sum())
        measured["accuracy"] = {side: 100 * results[side].float().mean().item() for side in epochs}
    return measured


def summary(seconds: list[float], images: int, peak: float | None) -> dict:
    median = statistics.median(seconds)
    return {"seconds": seconds, "median": median, "images_per_second": images / median, "peak_mib": peak}


def grow(config: Config, device: torch.device) -> list[dict]:
    """Measure ours for each value of each knob, the others staying as they are."""
    knobs = {
        "batch_size": ("stage2", config.batch_sizes),
        "depth": ("stage2", config.depths),
        "num_steps": ("pgd", config.steps),
        "images": ("stage2", config.epoch_sizes),
    }
    measured = []
    for knob, (row, values) in knobs.items():
        for value in values:
            subject = make_subject(dataclasses.replace(config, **{knob: value}), device)
            epoch = ours(subject, row)
            _, peak = with_peak(epoch, device)
            seconds = [timed(epoch, device) for _ in range(config.repetitions)]
            entry = {"knob": knob, "value": value, "row": row}
            measured.append(entry | summary(seconds, images_of(subject.config, row), peak))
            utils.say(f"{knob} {value}: {measured[-1]['median']:.2f} s")
    return measured


# ---------------------------------------------------------------- reports


def title(row: str, config: Config) -> str:
    """What a row is called in the table."""
    names = {
        "data": "data alone",
        "stage1": "stage 1",
        "stage2": "stage 2",
        "stage2_fgsm": "stage 2 + FGSM",
        "stage2_pgd": f"stage 2 + PGD-{config.num_steps}",
        "inner_fgsm": "the FGSM inside it alone",
        "inner_pgd": f"the PGD-{config.num_steps} inside it alone",
        "fgsm": "evaluation, FGSM",
        **{name: f"evaluation, {name.upper()}-{config.num_steps}" for name in ("bim", "mim", "pgd")},
    }
    return names[row]


def table(rows: list[list[str]]) -> str:
    """Markdown, the columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]])


def mib(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def comparison_table(config: Config, measured: list[dict]) -> str:
    heads = ["an epoch of", "plain, images/s", "ours, images/s", "ours / plain", "lowest to highest"]
    rows = [[*heads, "plain, MiB", "ours, MiB", "same outcome"]]
    for entry in measured:
        speeds = [f"{entry[side]['images_per_second']:.1f}" for side in ("plain", "ours")]
        peaks = [mib(entry[side]["peak_mib"]) for side in ("plain", "ours")]
        span = f"{min(entry['ratios']):.2f} to {max(entry['ratios']):.2f}"
        same = f"{entry['same_outcome']} of {entry['images']}" if "same_outcome" in entry else ""
        rows.append([title(entry["row"], config), *speeds, f"{entry['ratio']:.2f}", span, *peaks, same])
    return table(rows)


def growth_table(measured: list[dict]) -> str:
    rows = [["what grows", "value", "s an epoch", "x its first", "images/s", "MiB", "x its first "]]
    start = {}
    for entry in measured:
        base = start.setdefault(entry["knob"], entry)
        time_growth = f"{entry['median'] / base['median']:.2f}"
        peaks = (entry["peak_mib"], base["peak_mib"])
        memory_growth = f"{peaks[0] / peaks[1]:.2f}" if all(peaks) else "?"
        speed = f"{entry['images_per_second']:.1f}"
        cells = [str(entry["value"]), f"{entry['median']:.3f}", time_growth, speed, mib(peaks[0])]
        rows.append([f"{entry['knob']} ({entry['row']})", *cells, memory_growth])
    return table(rows)


def data_share(measured: list[dict]) -> float | None:
    """The data's share of our stage 1, in percent; None where the two were not both measured."""
    median = {entry["row"]: entry["ours"]["median"] for entry in measured}
    return 100 * median["data"] / median["stage1"] if {"data", "stage1"} <= set(median) else None


def hardware(device: torch.device) -> dict:
    """What the numbers were measured on."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"cpu": cpu_name(), "cores": cpus, "threads": torch.get_num_threads()}
    facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: None)()
    facts |= {"avx512_bf16": bfloat16, "device": str(device)}
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def footnotes(config: Config, depth: int, device: torch.device, measured: list[dict]) -> list[str]:
    facts, versions = hardware(device), utils.versions()
    precision = str(training.select_precision(config.precision, device)).removeprefix("torch.")
    lines = [
        f"Depth {depth}, batch {config.batch_size}; our training in {precision}, all else in float32"
        f"{' (plain, but in evaluation: TF32 convolutions, the default)' if device.type == 'cuda' else ''}; "
        f"medians of {config.repetitions}; memory beyond what the process held before.",
        f"{facts.get('gpu', facts['cpu'])}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['instructions']}; torch {versions['torch']}, Python {versions['python']}.",
    ]
    share = data_share(measured) if not config.scaling else None
    if share is not None:
        lines.append(f"Data work is {share:.2f} % of our stage 1.")
    return lines


def main(config: Config) -> None:
    check(config)
    results = Path(config.results)
    utils.prepare_output(results)
    device = utils.select_device(config.device)
    # On a GPU a short epoch would be all beginning and end.
    images = config.images or (12_800 if device.type == "cuda" else 512)
    attack_images = config.attack_images or max(images // 2, 1)
    config = dataclasses.replace(config, images=images, attack_images=attack_images)
    subject = make_subject(config, device)
    depth = subject.network["depth"]
    if config.scaling:
        measured = grow(config, device)
        text = growth_table(measured)
    else:
        measured = []
        for row in config.rows:
            measured.append(compare(subject, row))
            utils.say(f"{title(row, config)}: {measured[-1]['ratio']:.2f}")
        text = comparison_table(config, measured)
    text = "\n".join([text, "", *footnotes(config, depth, device, measured)])
    report = {
        "settings": cli.config_dict(config),
        "depth": depth,
        "hardware": hardware(device),
        "versions": utils.versions(),
        "data_share_percent": None if config.scaling else data_share(measured),
        "scaling" if config.scaling else "rows": measured,
    }
    utils.write_text(results, json.dumps(report, indent=2) + "\n")
    utils.write_text(results.with_suffix(".md"), text + "\n")
    utils.say("\n" + text)


def check(config: Config) -> None:
    """Raise UsageError for options that make no sense together."""
    if config.scaling and config.init_from:
        raise utils.UsageError("--init-from: a checkpoint has one depth, and --scaling varies it")


if __name__ == "__main__":
    cli.run(main, Config)
