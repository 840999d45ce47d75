"""A driver's library (NVML) with GPUs that this machine does not have: the one double of these tests.

It stands for what cannot be had here, a machine with GPUs. Constants and errors are those of nvidia-ml-py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest

__all__ = ("Device", "FakeNvml", "plug")

GIB = 1 << 30


@dataclass(kw_only=True)
class Device:
    """One GPU, or an instance. `memory` is (total, free) in GiB; None: not supported. `parts`: divided by MIG."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    memory: tuple[float, float] | None = (80, 79)
    cores: int | None = 16_896
    parts: list[Device] = field(default_factory=list)
    ids: tuple[int, int] = (0, 0)
    is_lost: bool = False


@dataclass(kw_only=True)
class _Memory:
    total: int
    free: int


class FakeNvml:
    """The functions of NVML that are asked."""

    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM
    NVML_DEVICE_MIG_ENABLE = pynvml.NVML_DEVICE_MIG_ENABLE
    NVMLError = pynvml.NVMLError

    def __init__(self, *devices: Device, init_error: type[pynvml.NVMLError] | None = None) -> None:
        self.devices = devices
        self.init_error = init_error
        self.is_open = False

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise self.init_error
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Device:
        if self.devices[index].is_lost:
            raise pynvml.NVMLError_GpuIsLost
        return self.devices[index]

    def nvmlDeviceGetUUID(self, device: Device) -> str:
        return device.uuid

    def nvmlDeviceGetName(self, device: Device) -> bytes:
        return device.name.encode()

    def nvmlDeviceGetMemoryInfo(self, device: Device) -> _Memory:
        if device.memory is None:
            raise pynvml.NVMLError_NotSupported
        total, free = device.memory
        return _Memory(total=int(total * GIB), free=int(free * GIB))

    def nvmlDeviceGetNumGpuCores(self, device: Device) -> int:
        if device.cores is None:
            raise pynvml.NVMLError_NotSupported
        return device.cores

    def nvmlDeviceGetMaxClockInfo(self, device: Device, clock: int) -> int:
        assert clock == self.NVML_CLOCK_SM
        return 1980

    def nvmlDeviceGetMigMode(self, device: Device) -> list[int]:
        if not device.name.startswith(("NVIDIA A100", "NVIDIA H100")):
            raise pynvml.NVMLError_NotSupported
        return [int(bool(device.parts))] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Device) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Device, slot: int) -> Device:
        if slot >= len(device.parts):
            raise pynvml.NVMLError_NotFound
        return device.parts[slot]

    def nvmlDeviceGetGpuInstanceId(self, part: Device) -> int:
        return part.ids[0]

    def nvmlDeviceGetComputeInstanceId(self, part: Device) -> int:
        return part.ids[1]


def plug(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml) -> None:
    """Let this process see these GPUs, and no variable of the machine's own."""
    names: list[str] = [name for name in dir(fake) if name.startswith("nvml")]
    for name in names:
        answer: Any = getattr(fake, name)
        monkeypatch.setattr(pynvml, name, answer)
    for variable in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(variable, "")  # so that it is put back afterwards, whatever the test sets
        monkeypatch.delenv(variable)
