"""Time and memory of a piece of work, and the machine it was measured on: what the benchmarks share."""

import ctypes
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def in_turns(works: dict[str, Callable], images: int, repetitions: int, device: torch.device) -> dict:
    """Measure each of `works`, by name, which go through `images` images: {name: (numbers, first result)}.

    Each runs once for memory and to warm up. Then they take turns, every second time in reverse order.
    """
    first = {name: with_peak(work, device) for name, work in works.items()}
    seconds = {name: [] for name in works}
    for repetition in range(repetitions):
        for name in list(works)[:: -1 if repetition % 2 else 1]:
            seconds[name].append(timed(works[name], device))
    measured = {}
    for name, (result, peak) in first.items():
        median = statistics.median(seconds[name])
        speed = {"median": median, "images_per_second": images / median}
        measured[name] = {"seconds": seconds[name], **speed, "peak_mib": peak}, result
    return measured


def timed(work: Callable, device: torch.device) -> float:
    """Seconds that `work` takes, with all that it asks of the device."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_peak(work: Callable, device: torch.device) -> tuple[object, float | None]:
    """What `work` returns, and by how many MiB it raised the memory in use; None where no system tells.

    On a GPU the memory of its tensors; on a CPU the resident set of this process, without its workers.
    """
    gc.collect()
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        wait(device)
        return result, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, and begin a new peak
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # not Linux
        return work(), None
    before = _resident("VmRSS")
    return work(), _resident("VmHWM") - before


def _resident(field: str) -> float:
    return int(re.search(rf"{field}:\s*(\d+)", _read("/proc/self/status"))[1]) / 1024


def hardware(device: torch.device) -> dict:
    """What the numbers were measured on, as plain Python."""
    affinity = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count()))
    facts = {"cpu": _cpu_name(), "cores": len(affinity(0)), "threads": torch.get_num_threads()}
    facts["instructions"] = torch.backends.cpu.get_cpu_capability()
    bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: None)()
    facts |= {"avx512_bf16": bfloat16, "device": str(device)}
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def _cpu_name() -> str:
    names = re.findall(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: str) -> str:
    """The text of a file, empty where there is none: not every system has /proc."""
    return Path(path).read_text() if Path(path).exists() else ""
