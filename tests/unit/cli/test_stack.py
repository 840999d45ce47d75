"""What `up` gives its workers on machines that are not this one, and what it refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4queue.cli.stack import devices
from l4queue.cli.stack.devices import usable_gpus
from l4queue.cli.stack.overrides import settings_with
from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.errors import ConfigError
from l4queue.hardware import EngineBuild
from tests.unit.nvml import Device, FakeNvml, plug


def devices_of_workers(folder: Path, **options: object) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker that `up` would start."""
    stack = Stack(StackOptions(engine="vllm", data_dir=folder, quiet=True, **options))  # type: ignore[arg-type]
    gpus = usable_gpus(stack.settings, workers=stack.options.workers, workers_per_process=1)
    number = stack.options.workers or len(gpus) // stack.settings.tensor_parallel
    specs = stack._serving_specs([f"worker-{i}" for i in range(number)], gpus, [])
    assert all(spec.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID" for spec in specs)
    return [spec.env["CUDA_VISIBLE_DEVICES"] for spec in specs]


@pytest.fixture
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The GPU build of vLLM."""
    monkeypatch.setattr(devices, "engine_build", lambda: EngineBuild(kind="gpu", version="0"))
    return monkeypatch


def test_every_worker_has_a_device_of_its_own(gpu_build: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole GPUs, unknown memory or not, and instances; in the order of the variable."""
    plug(gpu_build, FakeNvml(Device(uuid="GPU-a"), Device(uuid="GPU-b", name="NVIDIA GB10", memory=None)))
    assert devices_of_workers(tmp_path) == ["0", "1"]
    gpu_build.setenv("CUDA_VISIBLE_DEVICES", "GPU-b,GPU-a")
    assert devices_of_workers(tmp_path) == ["1", "0"]
    plug(gpu_build, FakeNvml(Device(uuid="GPU-a", parts=[Device(uuid="MIG-1"), Device(uuid="MIG-2")])))
    assert devices_of_workers(tmp_path) == ["MIG-1", "MIG-2"]


def test_too_few_devices_are_told_with_the_reason(gpu_build: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hidden ones, and instances that cannot work together."""
    plug(gpu_build, FakeNvml(Device(uuid="GPU-a")))
    gpu_build.setenv("CUDA_VISIBLE_DEVICES", "0,0")
    with pytest.raises(ConfigError, match=r"0 can be used here \(CUDA_VISIBLE_DEVICES names 0 twice"):
        devices_of_workers(tmp_path)
    plug(gpu_build, FakeNvml(Device(uuid="GPU-a", parts=[Device(uuid="MIG-1"), Device(uuid="MIG-2")])))
    gpu_build.setenv("L4_TENSOR_PARALLEL", "2")
    with pytest.raises(ConfigError, match="1 workers need 2 GPUs, and 0 can be used here"):
        devices_of_workers(tmp_path)


def test_a_wrong_option_is_named_and_not_the_setting_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is wrong is named as one."""
    with pytest.raises(ConfigError, match=r"^--engine: must be 'vllm', 'http' or 'emulated'"):
        settings_with({"engine": "nope"})
    monkeypatch.setenv("L4_ENGINE", "nope")
    with pytest.raises(ConfigError, match=r"^L4_ENGINE: "):
        settings_with({"durability": "fast"})
    assert settings_with({"engine": "emulated"}).engine == "emulated"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"L4_REDIS_URL": "redis://:hunter#2@h/0"}, "^L4_REDIS_URL: it cannot be read"),
        ({"L4_REDIS_URL": "redis://h/zero"}, "^L4_REDIS_URL: /zero is no database"),
        ({"L4_REDIS_URL": "redis+sentinel://s/q"}, "^L4_CELERY_BROKER_URL: name a Redis of its own"),
        ({"L4_REDIS_URL": "redis://h", "L4_CELERY_BROKER_URL": "redsi://h"}, "^L4_CELERY_BROKER_URL: redsi"),
    ],
)
async def test_a_wrong_url_is_told_before_anything_starts(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One error in place of children that end again and again."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stack = Stack(StackOptions(engine="emulated", data_dir=tmp_path, quiet=True))
    with pytest.raises(ConfigError, match=says):
        async with stack:
            raise AssertionError("it started")
    assert stack.supervisor.children == {}
