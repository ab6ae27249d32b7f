"""How fast the project is, beside the textbook way of doing the same (`plain.py`).

    python -m benchmarks.throughput

Plain and ours take turns in one process, on the same weights and images: whole epochs of the two training
stages, of stage 2 on adversarial images, the attack inside it alone, and the evaluation under each attack.
Prints a Markdown table; writes it and all numbers, with hardware and versions, to a JSON file and beside it.
`--scaling` measures how time and memory of ours grow, and `--ranks` how several processes share the work.
Speed does not depend on what the images show, so by default they are noise and the weights fresh; `--dataset`
and `--init-from` take real ones.
"""

import dataclasses
import gc
import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import torch

import cli
import distributed
import evaluation
import utils
from benchmarks import ours, plain, timing
from cli import Count, Depth, JsonFile, Seed, Whole


@dataclass(frozen=True)
class Config:
    # what is measured
    rows: tuple[Literal[ours.ROWS], ...] = ours.ROWS
    scaling: bool = False  # measure how ours grows with each of the lists below, and no rows
    ranks: tuple[Count, ...] = ()  # measure stage 2 on so many processes, of one thread each, and no rows
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
    dataset: Literal["noise", "cifar10", "folder", "synthetic"] = "noise"  # noise: random pixels
    data_dir: str = "data"
    init_from: str | None = None  # a checkpoint, whose depth then counts; none: fresh weights
    results: JsonFile = "results/throughput.json"  # and .md beside it
    # run
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # of our training
    compile: Literal["auto", "on", "off"] = "auto"  # of our training
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    seed: Seed = 0

    def check(self) -> None:
        """Raise UsageError for options that make no sense together."""
        if self.scaling and self.init_from:
            raise utils.UsageError("--init-from: a checkpoint has one depth, and --scaling varies it")


# ---------------------------------------------------------------- measuring


def compare(subject: ours.Subject, row: str) -> dict:
    """Measure both sides of a row."""
    sides = {"plain": plain.epoch(subject, row), "ours": ours.epoch(subject, row)}
    if row in ours.EVALUATIONS:
        sides["plain"] = evaluation.exact_float32()(sides["plain"])  # as ours; in training both may use TF32
    images = len(subject.split(row))
    sides = timing.in_turns(sides, images, subject.config.repetitions, subject.device)
    measured = {"row": row, "images": images, "batch_size": subject.recipe(row).batch_size}
    measured |= {name: numbers for name, (numbers, _) in sides.items()}
    ratios = [a / b for a, b in zip(*(measured[name]["seconds"] for name in sides), strict=True)]
    measured |= {"ratio": statistics.median(ratios), "ratios": ratios}
    if row in ours.EVALUATIONS and subject.config.init_from:  # with fresh weights roundings soon part
        right = {name: result for name, (_, result) in sides.items()}
        measured["same_outcome"] = int((right["plain"] == right["ours"]).sum())
        measured["accuracy"] = {name: 100 * mask.float().mean().item() for name, mask in right.items()}
    return measured


def compare_rows(config: Config, device: torch.device) -> tuple[dict, str, str]:
    """Measure each row; return (what the JSON file says of them, the table, a footnote)."""
    subject, measured = ours.make_subject(config, device), []
    for row in config.rows:
        measured.append(compare(subject, row))
        utils.say(f"{title(row, config)}: {measured[-1]['ratio']:.2f}")
    median = {entry["row"]: entry["ours"]["median"] for entry in measured}
    share = 100 * median["data"] / median["stage1"] if {"data", "stage1"} <= set(median) else None
    report = {"depth": subject.network["depth"], "data_share_percent": share, "rows": measured}
    note = "" if share is None else f"Data work is {share:.2f} % of our stage 1."
    return report, comparison_table(config, measured), note


def grow(config: Config, device: torch.device) -> tuple[dict, str, str]:
    """Measure ours for each value of each knob, the others staying as they are; return as `compare_rows`."""
    knobs = {
        "batch_size": ("stage2", config.batch_sizes),
        "depth": ("stage2", config.depths),
        "num_steps": ("pgd", config.steps),
        "images": ("stage2", config.epoch_sizes),
    }
    measured = []
    for knob, (row, values) in knobs.items():
        for value in values:
            subject = ours.make_subject(dataclasses.replace(config, **{knob: value}), device)
            epochs, images = {"ours": ours.epoch(subject, row)}, len(subject.split(row))
            numbers, _ = timing.in_turns(epochs, images, config.repetitions, device)["ours"]
            measured.append({"knob": knob, "value": value, "row": row, **numbers})
            utils.say(f"{knob} {value}: {measured[-1]['median']:.2f} s")
    report = {"depth": config.depth, "data_share_percent": None, "scaling": measured}
    return report, growth_table(measured), ""


def share(config: Config, device: torch.device) -> tuple[dict, str, str]:
    """Measure stage 2 of ours on each number of ranks; return as `compare_rows`."""
    measured = []
    for count in config.ranks:
        store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        with tempfile.TemporaryDirectory() as folder:
            answer, how = Path(folder) / "answer.json", "fork" if device.type == "cpu" else "spawn"
            arguments = (count, store.port, dataclasses.replace(config, device=device.type), answer)
            torch.multiprocessing.start_processes(be_a_rank, arguments, count, start_method=how)
            measured.append({"ranks": count, **json.loads(answer.read_text())})
        per_rank = [entry["images_per_second"] / entry["ranks"] for entry in measured]
        measured[-1]["efficiency"] = per_rank[-1] / per_rank[0]
        utils.say(f"ranks {count}: {measured[-1]['images_per_second']:.1f} images/s")
    report = {"depth": config.depth, "data_share_percent": None, "sharing": measured}
    return report, sharing_table(measured), "Each rank has one thread, and its part of the batch."


def be_a_rank(rank: int, count: int, port: int, config: Config, answer: Path) -> None:
    """Train epochs of stage 2 as a rank that torchrun starts; the first rank writes what it measured.

    Batch norms' share of the bytes reduced is counted on a CPU alone: on a GPU torch reduces it itself.
    """
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    given |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ |= {name: str(value) for name, value in given.items()}
    torch.set_num_threads(1)
    distributed.begin(utils.UsageError)
    device = utils.select_device(config.device)
    run, train, _ = ours.begin(ours.make_subject(config, device), "stage2")
    sums, total = [], distributed.total
    with mock.patch.object(distributed, "total", lambda tensor: sums.append(tensor.nbytes) or total(tensor)):
        train()
    weights = [*run.model.parameters(), *run.criterion.parameters()] if count > 1 else []
    reduced = sum(p.nbytes for p in weights if p.grad is not None) + sum(sums) / run.batches * (count > 1)
    numbers, _ = timing.in_turns({"ours": train}, config.images, config.repetitions, device)["ours"]
    if rank == 0:
        answer.write_text(json.dumps({**numbers, "bytes_a_step": reduced}))
    distributed.end()


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
    }
    return names.get(row, f"evaluation, {row.upper()}-{config.num_steps}")


def comparison_table(config: Config, measured: list[dict]) -> str:
    heads = ["an epoch of", "plain, images/s", "ours, images/s", "ours / plain", "lowest to highest"]
    rows = [[*heads, "plain, MiB", "ours, MiB", "same outcome"]]
    for entry in measured:
        speeds = [f"{entry[side]['images_per_second']:.1f}" for side in ("plain", "ours")]
        peaks = [mib(entry[side]["peak_mib"]) for side in ("plain", "ours")]
        span = f"{min(entry['ratios']):.2f} to {max(entry['ratios']):.2f}"
        same = f"{entry['same_outcome']} of {entry['images']}" if "same_outcome" in entry else ""
        rows.append([title(entry["row"], config), *speeds, f"{entry['ratio']:.2f}", span, *peaks, same])
    return utils.markdown_table(rows)


def growth_table(measured: list[dict]) -> str:
    rows = [["what grows", "value", "s an epoch", "x its first", "images/s", "MiB", "x its first "]]
    first = {}
    for entry in measured:
        start = first.setdefault(entry["knob"], entry)
        slower, peaks = entry["median"] / start["median"], (entry["peak_mib"], start["peak_mib"])
        cells = [f"{entry['knob']} ({entry['row']})", str(entry["value"]), f"{entry['median']:.3f}"]
        cells += [f"{slower:.2f}", f"{entry['images_per_second']:.1f}", mib(peaks[0])]
        rows.append([*cells, f"{peaks[0] / peaks[1]:.2f}" if all(peaks) else "?"])
    return utils.markdown_table(rows)


def sharing_table(measured: list[dict]) -> str:
    rows = [["ranks", "images/s", "efficiency", "MiB reduced a step"]]
    for entry in measured:
        cells = [f"{entry['images_per_second']:.1f}", f"{100 * entry['efficiency']:.0f} %"]
        rows.append([str(entry["ranks"]), *cells, f"{entry['bytes_a_step'] / 2**20:.2f}"])
    return utils.markdown_table(rows)


def mib(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}"


def footnotes(config: Config, depth: int, device: torch.device) -> list[str]:
    facts, versions = timing.hardware(device), utils.versions()
    precision = str(utils.select_precision(config.precision, device)).removeprefix("torch.")
    return [
        f"Depth {depth}, batch {config.batch_size}; our training in {precision}, all else in float32"
        f"{' (plain training: TF32)' if device.type == 'cuda' else ''}; "
        f"medians of {config.repetitions}; memory beyond what the process held before.",
        f"{facts.get('gpu', facts['cpu'])}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['instructions']}; torch {versions['torch']}, Python {versions['python']}.",
    ]


def main(config: Config) -> None:
    gc.freeze()  # so that the collection before each measurement of memory skips what was imported
    results = Path(config.results)
    utils.prepare_output(results)
    device = utils.select_device(config.device)
    # On a GPU a short epoch would be all beginning and end.
    images = config.images or (12_800 if device.type == "cuda" else 512)
    config = dataclasses.replace(
        config, images=images, attack_images=config.attack_images or max(images // 2, 1)
    )
    measure = share if config.ranks else grow if config.scaling else compare_rows
    report, table, note = measure(config, device)
    text = "\n".join([table, "", *footnotes(config, report["depth"], device), *filter(None, [note])])
    about = {"settings": cli.config_dict(config), "hardware": timing.hardware(device)}
    report = {**about, "versions": utils.versions(), **report}
    utils.write_text(results, json.dumps(report, indent=2) + "\n")
    utils.write_text(results.with_suffix(".md"), text + "\n")
    utils.say("\n" + text)


if __name__ == "__main__":
    cli.run(main, Config)
