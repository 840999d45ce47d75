"""Random histories of clients, dispatchers, workers and reapers on a real server against a dictionary."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from l4queue.protocol.executor import Executor
from tests.conftest import SEED
from tests.protocol.machine import ProtocolMachine
from tests.protocol.server import RedisServer

EXAMPLES = int(os.environ.get("L4_TEST_EXAMPLES", "120"))
STEPS = int(os.environ.get("L4_TEST_STEPS", "50"))


@pytest.mark.slow
@pytest.mark.timeout(max(60, EXAMPLES * STEPS // 50))
def test_no_history_breaks_an_invariant(redis_server: RedisServer) -> None:
    """`L4_TEST_EXAMPLES` and `L4_TEST_STEPS` make it longer; the default takes half a minute."""
    executor = Executor(f"redis://127.0.0.1:{redis_server.port}/9")

    class Machine(ProtocolMachine):
        pass

    Machine.executor = executor
    budget = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(SEED)(Machine), settings=budget)
    executor.close()
