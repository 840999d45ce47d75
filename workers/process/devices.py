"""Exclusive GPUs, or cores for the CPU engine, among the workers of one machine.

Compose and plain shells give every replica all GPUs. Here a replica chooses for itself, under locks on files
named after the GPU's UUID or the core. The kernel frees such a lock with the last process that holds it. A worker
that is killed gives its GPU back at once. One that is paused or cut off from Redis keeps it, as it keeps the GPU's
memory. An expiry by heartbeats could not tell these apart.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from l4queue.config import Settings
from l4queue.errors import ConfigError
from l4queue.hardware import EngineBuild, GpuView, engine_build, list_gpus, view_gpus, whole_cores

__all__ = ("DeviceLocks", "choose", "take_devices")

log = logging.getLogger("l4queue.worker")
_ASK_EVERY_S = 1.0  # between two tries for the lock of a device
_SAY_EVERY_S = 60.0  # a log line while no device is free


def choose(devices: Sequence[str], *, free: Collection[str], count: int) -> tuple[str, ...] | None:
    """`count` free devices, or None while there are fewer.

    Devices are in the order of their bus. A group that starts at a multiple of `count` comes first: such
    groups share a switch or a socket on usual machines, and equal workers then leave no gaps.
    """
    for start in range(0, len(devices) - count + 1, count):
        group = tuple(devices[start : start + count])
        if all(device in free for device in group):
            return group
    rest = tuple(device for device in devices if device in free)[:count]
    return rest if len(rest) == count else None


class DeviceLocks:
    """Devices of this machine by name, each for one holder. Taken ones stay taken until this process ends.

    All who share devices use one `directory`, on a file system of this machine: in containers, one volume.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: dict[str, int] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._open("choice")
        except OSError as error:
            raise ConfigError(f"L4_DEVICES_DIR {directory} cannot be used: {error.strerror}") from error

    def take(self, devices: Sequence[str], *, usable: Collection[str], count: int) -> tuple[str, ...] | None:
        """Take `count` of the usable devices that nobody has; None, and nothing taken, while there are too few."""
        with self._choosing():
            locked = {device: fd for device in devices if (fd := self._try_lock(device)) is not None}
            chosen = choose(devices, free=locked.keys() & set(usable), count=count)
            for device, descriptor in locked.items():
                if chosen is not None and device in chosen:
                    self._held[device] = descriptor
                else:
                    os.close(descriptor)
        return chosen

    @contextmanager
    def _choosing(self) -> Iterator[None]:
        """One chooser at a time, or two would see each other's trial locks and both go without."""
        descriptor = self._open("choice")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _try_lock(self, device: str) -> int | None:
        descriptor = self._open(device)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor

    def _open(self, name: str) -> int:
        return os.open(self._directory / f"{name.replace('/', '_')}.lock", os.O_RDWR | os.O_CREAT, 0o666)


def take_devices(settings: Settings, *, pause: Callable[[float], None] = time.sleep) -> Settings:
    """Settings of a worker that has its devices; the environment names its GPUs. Waits while all are taken.

    For the start of a worker's process, before torch or CUDA are imported. Without `devices_dir` the engine
    takes what it sees. On a machine without a GPU the GPU build of vLLM gives way to the emulated engine if
    `without_gpu` says so. ConfigError when the machine has too few devices even with nobody else there.
    """
    build = engine_build() if settings.engine == "vllm" else None
    if build is None:  # emulated, or the engine itself says that vLLM is missing
        return settings
    if build.kind == "cpu":
        return _take_cores(settings, pause=pause)
    view = view_gpus()
    if not view.gpus and settings.without_gpu == "emulated":
        log.warning("no GPU (%s): the engine is emulated, its text is noise (L4_WITHOUT_GPU)", view.why)
        return settings.model_copy(update={"engine": "emulated"})
    return _take_gpus(settings, view, build, pause=pause)


def _take_gpus(
    settings: Settings, view: GpuView, build: EngineBuild, *, pause: Callable[[float], None]
) -> Settings:
    count = settings.tensor_parallel
    if not settings.devices_dir:
        return settings
    gpus = view.for_groups_of(count)
    if len(gpus) < count:
        why = f" ({view.why})" if view.notes else ""
        raise ConfigError(
            f"vLLM {build.version} needs {count} GPU(s) and {len(gpus)} can be used here{why}: "
            "see `l4queue doctor`, lower L4_TENSOR_PARALLEL, or set L4_WITHOUT_GPU=emulated"
        )

    def usable() -> list[str]:
        return [gpu.uuid for gpu in list_gpus() if gpu.has_free(settings.gpu_memory_share)]

    uuids = [gpu.uuid for gpu in gpus]
    what = f"{count} GPU(s) with {settings.gpu_memory_share:.0%} of the memory free"
    taken = _wait_for(DeviceLocks(Path(settings.devices_dir)), uuids, usable, count, what=what, pause=pause)
    ours = [gpu for gpu in gpus if gpu.uuid in taken]
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi's order, by which the indices count
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.cuda_name for gpu in ours)
    log.info("took %s", ", ".join(f"GPU {gpu.index} ({gpu.name}, {gpu.uuid})" for gpu in ours))
    return settings


def _take_cores(settings: Settings, *, pause: Callable[[float], None]) -> Settings:
    if settings.tensor_parallel > 1:
        raise ConfigError("L4_TENSOR_PARALLEL is for GPUs: give a CPU engine more cores instead")
    if not settings.devices_dir or settings.cpu_cores or "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return settings
    count = settings.cpu_cores_per_worker
    cores = {f"core-{core}": cpu for core, cpu in whole_cores(os.sched_getaffinity(0)).items()}
    if len(cores) < count:
        raise ConfigError(f"L4_CPU_CORES_PER_WORKER is {count}, and {len(cores)} core(s) may be used here")
    locks = DeviceLocks(Path(settings.devices_dir))
    taken = _wait_for(locks, list(cores), lambda: list(cores), count, what=f"{count} core(s)", pause=pause)
    ours = ",".join(str(cores[name]) for name in taken)
    log.info("took CPU %s", ours)
    return settings.model_copy(update={"cpu_cores": ours})


def _wait_for(
    locks: DeviceLocks,
    devices: Sequence[str],
    usable: Callable[[], Collection[str]],
    count: int,
    *,
    what: str,
    pause: Callable[[float], None],
) -> tuple[str, ...]:
    """As a stand-by until devices are free: one that dies is replaced at once."""
    waited_s = 0.0
    while (taken := locks.take(devices, usable=usable(), count=count)) is None:
        if waited_s % _SAY_EVERY_S == 0:
            log.warning("waiting for %s: other workers or programs have them", what)
        pause(_ASK_EVERY_S)
        waited_s += _ASK_EVERY_S
    return taken
