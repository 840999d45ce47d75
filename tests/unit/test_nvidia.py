"""GPUs as the driver and CUDA_VISIBLE_DEVICES show them: of all kinds, unknown memory, divided ones, lost ones."""

from __future__ import annotations

import os
import re

import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.cli.doctor import CheckResult
from l4queue.cli.engine_checks import _check_gpus
from l4queue.config import Settings
from l4queue.hardware import EngineBuild
from l4queue.nvidia import GpuView, list_gpus, read_gpus, view_gpus, visible_gpus
from tests.unit.nvml import GIB, Device, FakeNvml, plug

SMALL = Device(uuid="GPU-cccc-3", name="NVIDIA L4", memory=(24, 23), cores=7_424)
THREE = FakeNvml(Device(uuid="GPU-aaaa-1"), Device(uuid="GPU-aabb-2", memory=(80, 1)), SMALL)
MIXED = FakeNvml(SMALL, Device(uuid="GPU-aaaa-1"), Device(uuid="GPU-aabb-2"))
DIVIDED = FakeNvml(
    Device(
        uuid="GPU-aaaa-1",
        parts=[
            Device(uuid="MIG-1111", name="NVIDIA H100 MIG 3g.40gb", memory=(40, 39), ids=(1, 0)),
            Device(uuid="MIG-2222", name="NVIDIA H100 MIG 3g.40gb", memory=(40, 39), ids=(2, 0)),
        ],
    ),
    Device(uuid="GPU-bbbb-2"),
)
GB10 = FakeNvml(Device(uuid="GPU-dddd-4", name="NVIDIA GB10", memory=None, cores=None))


def shown(nvml: FakeNvml, visible: str | None, order: str = "PCI_BUS_ID") -> list[str]:
    """Names for CUDA, in order."""
    return [gpu.cuda_name for gpu in visible_gpus(read_gpus(nvml).gpus, visible=visible, order=order).gpus]


def test_gpus_come_in_pci_order_with_bytes() -> None:
    """All of them, without the variable."""
    gpus = read_gpus(THREE).gpus

    assert [gpu.index for gpu in gpus] == ["0", "1", "2"]
    assert (gpus[1].free_bytes, gpus[1].memory_bytes) == (GIB, 80 * GIB)
    assert gpus[2].name == "NVIDIA L4"
    assert shown(THREE, None) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1", ["1"]),
        ("2,0", ["2", "0"]),
        (" 2 , 0 ", ["2", "0"]),
        ("GPU-cccc-3", ["2"]),
        ("GPU-cc", ["2"]),
        ("GPU-aabb,GPU-cccc", ["1", "2"]),
        ("GPU-cccc,0", ["2", "0"]),
        ("GPU-aa", []),  # fits two
        ("GPU-aaaa-1,GPU-aa,2", ["0"]),
        ("", []),
        ("-1", []),
        ("0,-1,1", ["0"]),
        ("0,7,1", ["0"]),
        ("NoDevFiles", []),
        ("all", []),
        ("1x,+2", ["1", "2"]),
        ("0,0", []),
        ("1,GPU-aabb", []),  # the same twice
        (",0", []),
        ("0,", ["0"]),
        ("GPU-ffff", []),
        ("MIG-1111", []),
    ],
)
def test_what_cuda_accepts_is_accepted(visible: str, expected: list[str]) -> None:
    """Indices, beginnings of UUIDs, what hides the rest, what hides all."""
    assert shown(THREE, visible) == expected


@settings(deadline=None)
@given(st.lists(st.sampled_from(["0", "1", "2", "-1", "9", "GPU-aaaa", "GPU-cc", "GPU-", "x", ""]), max_size=6))
def test_no_list_shows_a_gpu_twice_or_breaks(names: list[str]) -> None:
    """And an empty view always says why."""
    view = visible_gpus(read_gpus(THREE).gpus, visible=",".join(names))
    assert len(set(view.gpus)) == len(view.gpus)
    assert view.gpus or view.notes


def test_cuda_counts_the_fastest_first_unless_it_is_told_otherwise() -> None:
    """The names that workers get are those of PCI order, which they are told."""
    assert shown(MIXED, "0", order="") == ["1"]
    assert shown(MIXED, "0,1,2", order="FASTEST_FIRST") == ["1", "2", "0"]
    assert shown(MIXED, "0") == ["0"]
    assert shown(MIXED, None, order="") == ["0", "1", "2"]
    assert shown(FakeNvml(*MIXED.devices[1:]), "0", order="") == ["0"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["MIG-1111", "MIG-2222", "1"]),
        ("MIG-2222", ["MIG-2222"]),
        ("MIG-22", ["MIG-2222"]),
        ("MIG-GPU-aaaa-1/2/0", ["MIG-2222"]),
        ("MIG-GPU-aaaa-1/2/0,MIG-1111", ["MIG-2222", "MIG-1111"]),
        ("MIG-2222,MIG-GPU-aaaa-1/2/0", []),
        ("MIG-", []),
        ("0", ["MIG-1111", "MIG-2222"]),
        ("GPU-aaaa", ["MIG-1111", "MIG-2222"]),
        ("1", ["1"]),
        ("GPU-bbbb-2", ["1"]),
    ],
)
def test_a_divided_gpu_is_its_instances(visible: str | None, expected: list[str]) -> None:
    """By their UUIDs of today and of older drivers; the GPU itself computes nothing."""
    assert shown(DIVIDED, visible) == expected


def test_instances_do_not_work_together_on_one_model() -> None:
    """NCCL knows no two instances."""
    view = GpuView(gpus=read_gpus(DIVIDED).gpus)
    assert [gpu.cuda_name for gpu in view.for_groups_of(1)] == ["MIG-1111", "MIG-2222", "1"]
    assert [gpu.cuda_name for gpu in view.for_groups_of(2)] == ["1"]


@pytest.mark.parametrize("memory", [None, (0, 0)])
def test_unknown_memory_is_not_zero(memory: tuple[float, float] | None) -> None:
    """CPU and GPU share it, and the driver does not say how much there is."""
    (gpu,) = read_gpus(FakeNvml(Device(uuid="GPU-dddd", name="NVIDIA GB10", memory=memory, cores=None))).gpus

    assert gpu.memory_bytes is gpu.free_bytes is None
    assert gpu.has_free(0.9)
    check = _check_gpus(Settings(engine="vllm"), EngineBuild(kind="gpu", version="0"), GpuView(gpus=(gpu,)))
    assert (check.verdict, check.detail) == (CheckResult.OK, "0: NVIDIA GB10, memory unknown")


def test_a_lost_gpu_is_named_and_the_others_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their numbers stay."""
    plug(monkeypatch, FakeNvml(Device(uuid="GPU-a", is_lost=True), Device(uuid="GPU-b")))
    view = view_gpus()
    assert [gpu.cuda_name for gpu in view.gpus] == ["1"]
    assert "GPU 0 does not answer" in view.why
    check = _check_gpus(Settings(engine="vllm"), EngineBuild(kind="gpu", version="0"), view)
    assert check.verdict is CheckResult.WARN


def test_variables_are_read_when_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the library is left as it was found."""
    fake = FakeNvml(*THREE.devices)
    plug(monkeypatch, fake)
    assert [gpu.index for gpu in list_gpus()] == ["0", "1", "2"]
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.index for gpu in list_gpus()] == ["1"]
    assert not fake.is_open


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (pynvml.NVMLError_LibraryNotFound, "there is no NVIDIA driver"),
        (pynvml.NVMLError_DriverNotLoaded, "there is no NVIDIA driver"),
        (pynvml.NVMLError_LibRmVersionMismatch, "does not answer: .*[Mm]ismatch"),
    ],
)
def test_a_driver_that_is_missing_or_broken_is_told(
    error: type[pynvml.NVMLError], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken one is not the same as none: an update of the driver wants a reboot."""
    plug(monkeypatch, FakeNvml(init_error=error))
    view = view_gpus()
    assert view.gpus == ()
    check = _check_gpus(Settings(engine="vllm"), EngineBuild(kind="gpu", version="0"), view)
    assert check.verdict is CheckResult.FAIL
    assert re.search(why, check.detail)


def test_this_machine_is_looked_at_without_a_double() -> None:
    """Whatever it has."""
    view = view_gpus()
    assert view.gpus or view.why
