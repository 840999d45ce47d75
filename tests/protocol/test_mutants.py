"""The tests notice when a script is wrong: seeded mistakes in the Lua are found."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.conftest import SEED
from tests.protocol.mutants import MUTANTS, Mutant, killed_by_machine, killed_by_tests
from tests.protocol.server import RedisServer

pytestmark = pytest.mark.slow

_NUM_QUICK = 16
_NUM_HISTORIES = 1_000  # at most: a killed mutant ends the search; the rarest of the core took some 150
_CORE = (
    "emit is not fenced",
    "settle is not fenced",
    "the nonce is ignored",
    "a lease leaks at the end",
    "an ending counts twice",
)


def _chosen() -> list[Mutant]:
    """All with `L4_TEST_MUTANTS=all`; else another sample with each printed seed."""
    if os.environ.get("L4_TEST_MUTANTS") == "all":
        return list(MUTANTS)
    picks = np.random.default_rng(SEED).choice(len(MUTANTS), size=_NUM_QUICK, replace=False)
    return [MUTANTS[i] for i in sorted(int(p) for p in picks)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", _chosen(), ids=lambda m: m.name)
def test_a_mistake_in_a_script_is_found_by_the_tests(redis_server: RedisServer, mutant: Mutant) -> None:
    """At least one written test fails with it."""
    assert killed_by_tests(redis_server, mutant) is not None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.name in _CORE], ids=lambda m: m.name)
def test_a_mistake_in_a_script_is_found_by_random_histories(redis_server: RedisServer, mutant: Mutant) -> None:
    """Without knowing where to look."""
    assert killed_by_machine(redis_server, mutant, examples=_NUM_HISTORIES, first=1) is not None


def test_the_scripts_as_they_are_pass_the_same_tests(redis_server: RedisServer) -> None:
    """A mutant that changes nothing lives: what kills the others is their mistake."""
    harmless = Mutant(name="none", script="emit", old="'GAP:'", new="('GAP:')")
    assert killed_by_tests(redis_server, harmless) is None
