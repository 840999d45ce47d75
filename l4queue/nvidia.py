"""NVIDIA GPUs that this process may use, by the driver's library (NVML) and CUDA_VISIBLE_DEVICES; without CUDA."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ("Gpu", "GpuView", "list_gpus", "read_gpus", "view_gpus", "visible_gpus")

_NO_DRIVER = ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded", "NVMLError_NotFound")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU, or an instance of one that is divided by MIG. None: unknown, as where it shares the CPU's memory.

    `index` counts in PCI order, as nvidia-smi does; an instance has its GPU's. `speed` compares GPUs of a machine.
    """

    index: str
    uuid: str
    name: str
    memory_bytes: int | None
    free_bytes: int | None
    is_instance: bool = False
    old_uuid: str = ""
    speed: float = 0.0

    @property
    def cuda_name(self) -> str:
        """What CUDA_VISIBLE_DEVICES takes for it, with CUDA_DEVICE_ORDER=PCI_BUS_ID."""
        return self.uuid if self.is_instance else self.index

    @property
    def memory_text(self) -> str:
        """Free memory in words."""
        return "memory unknown" if self.free_bytes is None else f"{self.free_bytes / 2**30:.0f} GiB free"

    def has_free(self, share: float) -> bool:
        """Whether this share of its memory is free, or may be: what is unknown is not taken for zero."""
        return self.free_bytes is None or self.memory_bytes is None or self.free_bytes >= share * self.memory_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuView:
    """GPUs that this process may use, with notes about the others; no notes: nothing is amiss."""

    gpus: tuple[Gpu, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """The notes, or that there is no GPU."""
        return "; ".join(self.notes) or "the driver shows none"

    def for_groups_of(self, count: int) -> list[Gpu]:
        """Those that `count` can work together on one model: instances of divided GPUs cannot."""
        return [gpu for gpu in self.gpus if count == 1 or not gpu.is_instance]


def list_gpus() -> list[Gpu]:
    """GPUs that CUDA would show here, instances in place of GPUs that are divided; none without a driver."""
    return list(view_gpus().gpus)


def view_gpus(environment: Mapping[str, str] = os.environ) -> GpuView:
    """The same with what is to be said about it."""
    try:
        import pynvml
    except ImportError:
        return GpuView(notes=("nvidia-ml-py is not installed: pip install 'l4queue[worker]'",))
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if type(error).__name__ in _NO_DRIVER:
            return GpuView(notes=("there is no NVIDIA driver",))
        return GpuView(notes=(f"the NVIDIA driver does not answer: {error}",))
    try:
        found = read_gpus(pynvml)
    finally:
        pynvml.nvmlShutdown()
    seen = visible_gpus(
        found.gpus, visible=environment.get("CUDA_VISIBLE_DEVICES"), order=environment.get("CUDA_DEVICE_ORDER", "")
    )
    return GpuView(gpus=seen.gpus, notes=found.notes + seen.notes)


def read_gpus(nvml: Any) -> GpuView:
    """All GPUs of the machine in PCI order, by NVML; one that does not answer is left out, and named."""
    gpus: list[Gpu] = []
    notes: list[str] = []
    for number in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus += _read_one(nvml, number)
        except nvml.NVMLError as error:
            notes.append(f"GPU {number} does not answer: {error}")
    return GpuView(gpus=tuple(gpus), notes=tuple(notes))


def _read_one(nvml: Any, number: int) -> list[Gpu]:
    handle = nvml.nvmlDeviceGetHandleByIndex(number)
    cores = _ask(nvml, nvml.nvmlDeviceGetNumGpuCores, handle) or 0
    clock = _ask(nvml, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM) or 0
    whole = _describe(nvml, handle, index=str(number), speed=float(cores * clock))
    mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if not mode or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return [whole]
    instances = []
    for slot in range(_ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        part = _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot)
        if part is not None:
            group = _ask(nvml, nvml.nvmlDeviceGetGpuInstanceId, part)
            unit = _ask(nvml, nvml.nvmlDeviceGetComputeInstanceId, part)
            old = f"MIG-{whole.uuid}/{group}/{unit}"
            instances.append(
                _describe(nvml, part, index=str(number), speed=whole.speed, is_instance=True, old_uuid=old)
            )
    return instances


def _describe(nvml: Any, handle: Any, **more: Any) -> Gpu:
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    is_known = memory is not None and memory.total > 0
    return Gpu(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(_ask(nvml, nvml.nvmlDeviceGetName, handle) or "NVIDIA GPU"),
        memory_bytes=int(memory.total) if is_known else None,
        free_bytes=int(memory.free) if is_known else None,
        **more,
    )


def _ask(nvml: Any, question: Any, *arguments: Any) -> Any:
    """The answer, or None where this GPU has none."""
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def visible_gpus(gpus: Sequence[Gpu], *, visible: str | None, order: str = "") -> GpuView:
    """Those that CUDA shows with CUDA_VISIBLE_DEVICES=`visible` and CUDA_DEVICE_ORDER=`order`, in its order.

    As CUDA reads it: indices (`1x` is 1), or beginnings of UUIDs that fit one device only; what comes behind the
    first that fits none, such as -1, is hidden; one named twice hides all. A divided GPU means its instances.
    """
    if visible is None:
        return GpuView(gpus=tuple(gpus))
    numbered = _in_cuda_order(gpus, order)
    chosen: list[Gpu] = []
    names = [name.strip() for name in visible.split(",")] if visible.strip() else []
    for name in names:
        found = _by_uuid(gpus, name) if name.startswith(("GPU-", "MIG-")) else _by_index(numbered, name)
        if not found:
            hidden = "" if name == names[-1] else ", and hides what is named behind it"
            return GpuView(
                gpus=tuple(chosen), notes=(f"CUDA_VISIBLE_DEVICES: {name!r} is no device here{hidden}",)
            )
        if any(gpu in chosen for gpu in found):
            return GpuView(notes=(f"CUDA_VISIBLE_DEVICES names {name} twice, which hides all devices",))
        chosen += found
    notes = () if names else ("CUDA_VISIBLE_DEVICES is empty, which hides all devices",)
    return GpuView(gpus=tuple(chosen), notes=notes)


def _in_cuda_order(gpus: Sequence[Gpu], order: str) -> dict[int, list[Gpu]]:
    """Devices by CUDA's numbers, the instances of one together: fastest first unless PCI order is asked for."""
    groups: dict[int, list[Gpu]] = {}
    for gpu in gpus:
        groups.setdefault(int(gpu.index), []).append(gpu)
    if order == "PCI_BUS_ID" or len({gpu.name for gpu in gpus}) < 2:
        return groups
    return dict(enumerate(sorted(groups.values(), key=lambda group: -group[0].speed)))  # equals: in PCI order


def _by_index(numbered: Mapping[int, list[Gpu]], name: str) -> list[Gpu]:
    digits = re.match(r"\+?([0-9]+)", name)
    return numbered.get(int(digits[1]), []) if digits else []


def _by_uuid(gpus: Sequence[Gpu], name: str) -> list[Gpu]:
    """The devices of this UUID or beginning of one; [] when several GPUs or instances fit."""
    if name.startswith("GPU-"):
        whole = [gpu for gpu in gpus if _gpu_uuid(gpu).startswith(name)]
        return whole if len({gpu.index for gpu in whole}) == 1 else []
    exact = [gpu for gpu in gpus if gpu.is_instance and name in (gpu.uuid, gpu.old_uuid)]
    fit = exact or [gpu for gpu in gpus if gpu.is_instance and gpu.uuid.startswith(name)]
    return fit if len(fit) == 1 else []


def _gpu_uuid(gpu: Gpu) -> str:
    """That of the GPU, also for an instance of it."""
    return gpu.old_uuid.removeprefix("MIG-").partition("/")[0] if gpu.is_instance else gpu.uuid
