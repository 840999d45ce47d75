"""Every worker of a machine takes other devices: the choice, its locks, what a worker is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.config import Settings, load_settings
from l4queue.errors import ConfigError
from l4queue.hardware import EngineBuild
from tests.unit.nvml import Device, FakeNvml, plug
from workers.process import devices as gpus
from workers.process.devices import DeviceLocks, choose, take_devices

FIVE = tuple(Device(uuid=f"GPU-{4 * name}", memory=(80, 10 if name == "c" else 79)) for name in "abcde")
HOLDER = """
import sys
from pathlib import Path
from workers.process.devices import DeviceLocks
directory, count, *devices = sys.argv[1:]
locks = DeviceLocks(Path(directory))
print(",".join(locks.take(devices, usable=devices, count=int(count)) or ()), flush=True)
sys.stdin.read()
"""


class Stop(Exception):
    """Ends a wait that would not end by itself."""


def stop(seconds: float) -> None:
    raise Stop


def holder(directory: Path, *devices: str, count: int = 1) -> subprocess.Popen[str]:
    """Another process that takes devices and keeps them until its input ends or it is killed."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), str(count), *devices],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def what_it_took(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@given(st.integers(0, 12), st.integers(1, 4), st.data())
def test_a_choice_is_free_whole_and_found_whenever_there_is_one(num: int, count: int, data: st.DataObject) -> None:
    """And it breaks no aligned group where a whole one is free."""
    devices = [f"d{i}" for i in range(num)]
    free = data.draw(st.sets(st.sampled_from(devices))) if devices else set()

    chosen = choose(devices, free=free, count=count)

    assert (chosen is None) == (len(free) < count)
    if chosen is not None:
        assert len(set(chosen)) == count
        assert set(chosen) <= free
        groups = [devices[i : i + count] for i in range(0, num - count + 1, count)]
        assert list(chosen) in groups or not any(set(group) <= free for group in groups)


@given(st.integers(1, 16), st.integers(1, 4))
def test_equal_workers_use_every_whole_group(num: int, count: int) -> None:
    """One after the other they leave less than one group over, and none twice."""
    devices = [f"d{i}" for i in range(num)]
    free = set(devices)
    num_workers = 0
    while (chosen := choose(devices, free=free, count=count)) is not None:
        free -= set(chosen)
        num_workers += 1

    assert num_workers == num // count


def test_two_holders_never_have_the_same_device(tmp_path: Path) -> None:
    """What is too little for a group stays free for others."""
    first, second, third = (DeviceLocks(tmp_path) for _ in range(3))

    assert first.take("abc", usable="abc", count=2) == ("a", "b")
    assert second.take("abc", usable="abc", count=2) is None
    assert third.take("abc", usable="abc", count=1) == ("c",)


def test_processes_started_at_once_take_different_devices_and_a_killed_one_frees_its_own(
    tmp_path: Path,
) -> None:
    """The kernel does it: nothing expires, nobody cleans up."""
    devices = ["a", "b", "c"]
    processes = [holder(tmp_path, *devices) for _ in devices]
    try:
        taken = [what_it_took(process) for process in processes]
        assert sorted(taken) == devices

        processes[1].kill()
        processes[1].wait()

        assert DeviceLocks(tmp_path).take(devices, usable=devices, count=1) == (taken[1],)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """Before any engine loads."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"L4_DEVICES_DIR .*file"):
        DeviceLocks(tmp_path / "file")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with five GPUs, of which number 2 is used by a stranger, and the GPU build of vLLM."""
    plug(monkeypatch, FakeNvml(*FIVE))
    monkeypatch.setattr(gpus, "engine_build", lambda: EngineBuild(kind="gpu", version="0"))
    return monkeypatch


def settings(tmp_path: Path, **more: object) -> Settings:
    return load_settings(engine="vllm", devices_dir=str(tmp_path / "devices"), **more)


def test_workers_on_one_machine_get_different_gpus_and_a_stand_by_waits(
    tmp_path: Path, machine: pytest.MonkeyPatch
) -> None:
    """A GPU whose memory a stranger holds is passed over."""
    seen = []
    for _ in range(4):
        machine.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # each worker is a process of its own
        take_devices(settings(tmp_path), pause=stop)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    machine.delenv("CUDA_VISIBLE_DEVICES")

    assert seen == ["0", "1", "3", "4"]
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    with pytest.raises(Stop):
        take_devices(settings(tmp_path), pause=stop)


def test_a_tensor_parallel_group_gets_whole_groups(tmp_path: Path, machine: pytest.MonkeyPatch) -> None:
    """Aligned ones first, then what is left over."""
    take_devices(settings(tmp_path, tensor_parallel=2), pause=stop)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    machine.delenv("CUDA_VISIBLE_DEVICES")
    take_devices(settings(tmp_path, tensor_parallel=2), pause=stop)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,4"
    machine.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(ConfigError, match="needs 8 GPU"):
        take_devices(settings(tmp_path, tensor_parallel=8), pause=stop)


def test_gpus_given_by_the_environment_bound_the_choice(tmp_path: Path, machine: pytest.MonkeyPatch) -> None:
    """By index or UUID, as `CUDA_VISIBLE_DEVICES` allows."""
    machine.setenv("CUDA_VISIBLE_DEVICES", "GPU-eeee,1")

    take_devices(settings(tmp_path), pause=stop)

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"


def test_memory_that_the_driver_does_not_tell_keeps_no_worker_waiting(
    tmp_path: Path, machine: pytest.MonkeyPatch
) -> None:
    """Where CPU and GPU share it."""
    plug(machine, FakeNvml(Device(uuid="GPU-aaaa", name="NVIDIA GB10", memory=None)))

    take_devices(settings(tmp_path), pause=stop)

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_instances_of_a_divided_gpu_go_to_one_worker_each(tmp_path: Path, machine: pytest.MonkeyPatch) -> None:
    """By UUID, for they have no index; of older drivers' names as well, which have slashes."""
    parts = [Device(uuid=uuid) for uuid in ("MIG-1111", "MIG-GPU-aaaa/2/0")]
    plug(machine, FakeNvml(Device(uuid="GPU-aaaa", parts=parts)))
    seen = []
    for _ in parts:
        machine.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        take_devices(settings(tmp_path), pause=stop)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    machine.delenv("CUDA_VISIBLE_DEVICES")

    assert seen == ["MIG-1111", "MIG-GPU-aaaa/2/0"]
    with pytest.raises(ConfigError, match="needs 2 GPU"):
        take_devices(settings(tmp_path, tensor_parallel=2), pause=stop)


def test_without_a_gpu_the_engine_is_emulated_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise instead of answers is nothing to fall into."""
    plug(monkeypatch, FakeNvml(init_error=pynvml.NVMLError_LibraryNotFound))
    monkeypatch.setattr(gpus, "engine_build", lambda: EngineBuild(kind="gpu", version="0"))

    assert take_devices(settings(tmp_path, without_gpu="emulated"), pause=stop).engine == "emulated"
    with pytest.raises(ConfigError, match=r"0 can be used here \(there is no NVIDIA driver\)"):
        take_devices(settings(tmp_path), pause=stop)


def test_cpu_engines_bind_to_different_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by their lowest CPU, so that two threads of one core are not taken for two cores."""
    monkeypatch.setattr(gpus, "engine_build", lambda: EngineBuild(kind="cpu", version="0"))
    monkeypatch.setattr(gpus, "whole_cores", lambda cpus: {0: 0, 1: 1, 4: 12})
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)

    assert take_devices(settings(tmp_path, cpu_cores_per_worker=2), pause=stop).cpu_cores == "0,1"
    assert take_devices(settings(tmp_path), pause=stop).cpu_cores == "12"
    with pytest.raises(Stop):
        take_devices(settings(tmp_path), pause=stop)
    with pytest.raises(ConfigError, match=r"CPU_CORES_PER_WORKER is 4, and 3"):
        take_devices(settings(tmp_path, cpu_cores_per_worker=4), pause=stop)


def test_cores_chosen_by_hand_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As do devices where no directory for locks is set, and an emulated engine takes none."""
    monkeypatch.setattr(gpus, "engine_build", lambda: EngineBuild(kind="cpu", version="0"))

    for chosen in (
        settings(tmp_path, cpu_cores="7"),
        load_settings(engine="vllm", devices_dir=""),
        load_settings(engine="emulated", devices_dir=str(tmp_path / "devices")),
    ):
        assert take_devices(chosen, pause=stop) == chosen
    assert not (tmp_path / "devices").exists()


def test_nothing_that_a_worker_imports_at_its_start_has_loaded_torch() -> None:
    """CUDA reads its variables once."""
    code = "import sys, workers.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
