"""Cores for CPU engines, memory, libraries. GPUs: test_nvidia.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.hardware import (
    EngineBuild,
    available_memory_bytes,
    cores_of_worker,
    cpu_dtype,
    cpu_flags,
    missing_library,
    whole_cores,
)


@given(st.integers(1, 40), st.integers(1, 64))
def test_cores_are_disjoint_and_equal_when_there_are_enough(num_workers: int, num_cores: int) -> None:
    """Otherwise each engine has one, shared evenly."""
    cores = list(range(100, 100 + num_cores))

    shares = [cores_of_worker(i, num_workers=num_workers, cores=cores) for i in range(num_workers)]

    used = [core for share in shares for core in share]
    assert set(used) <= set(cores)
    assert {len(share) for share in shares} == {max(1, num_cores // num_workers)}
    most = max(used.count(core) for core in set(used))
    assert most == (1 if num_workers <= num_cores else -(-num_workers // num_cores))


def test_memory_is_that_of_a_real_machine() -> None:
    """More than nothing, in bytes."""
    assert available_memory_bytes() > 2**26


def test_two_threads_of_a_core_are_one_core(tmp_path: Path) -> None:
    """Named alike by whoever sees one of them; where the kernel says nothing, each CPU is a core."""
    for cpu, siblings in {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5", 2: "2-3", 3: "2-3"}.items():
        file = tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(siblings + "\n")

    assert whole_cores({0, 1, 4, 5, 2, 3, 9}, topology=tmp_path) == {0: 0, 1: 1, 2: 2, 9: 9}
    assert whole_cores([5, 4, 3], topology=tmp_path) == {2: 3, 0: 4, 1: 5}
    assert set(whole_cores(os.sched_getaffinity(0)).values()) <= os.sched_getaffinity(0)


HASWELL = frozenset(["fpu", "sse4_2", "fma", "avx", "avx2", "f16c", "bmi2"])
SKYLAKE = HASWELL | {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}


@pytest.mark.parametrize(
    ("dtype", "flags", "chosen"),
    [
        ("auto", HASWELL, "float32"),
        ("auto", SKYLAKE, "float32"),
        ("auto", SKYLAKE | {"avx512_bf16"}, "auto"),
        ("auto", SKYLAKE | {"amx_bf16"}, "auto"),
        ("auto", frozenset({"asimd", "asimdhp"}), "float32"),
        ("auto", frozenset({"asimd", "bf16"}), "auto"),
        ("auto", frozenset(), "auto"),
        ("bfloat16", HASWELL, "bfloat16"),
    ],
)
def test_bfloat16_is_for_cpus_that_have_instructions_for_it(
    dtype: str, flags: frozenset[str], chosen: str
) -> None:
    """Unless it is asked for, or the kernel does not tell."""
    assert cpu_dtype(dtype, flags=flags) == chosen


def test_the_kernel_s_names_of_extensions_are_read(tmp_path: Path) -> None:
    """Of x86 and ARM, and of this machine; the flags of virtual machines are others."""
    x86 = "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\nvmx flags\t: vnmi\n\nprocessor\t: 1\nflags\t\t: fpu\n"
    for text, flags in (
        (x86, {"fpu", "avx2", "avx512_bf16"}),
        ("Features\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
    ):
        (tmp_path / "cpuinfo").write_text(text)
        assert cpu_flags(tmp_path / "cpuinfo") == flags
    assert cpu_flags(tmp_path / "none") == frozenset()
    assert cpu_flags()


def test_a_missing_library_of_the_cpu_build_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it every worker fails in a traceback of vLLM's; the GPU build does not need it."""
    cpu, gpu = EngineBuild(kind="cpu", version="0"), EngineBuild(kind="gpu", version="0")

    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", load)

    assert "apt-get install libnuma1" in str(missing_library(cpu))
    assert missing_library(gpu) is None
