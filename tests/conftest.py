"""Fixtures of all tests: a seed that is printed, a real redis-server, a namespace of its own for each test."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:
    from l4queue.protocol.calls import Calls
    from l4queue.protocol.executor import Executor
    from l4queue.protocol.keys import Keys
    from l4queue.protocol.reads import Reads
    from tests.protocol.scene import Scene
    from tests.protocol.server import RedisServer

hypothesis.settings.register_profile("shared machines", deadline=None)
hypothesis.settings.load_profile("shared machines")
SEED = int(os.environ.setdefault("L4_TEST_SEED", str(secrets.randbits(32))))  # one for all processes of a run
_NUMBERS = itertools.count()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: its children would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """Draws of hypothesis begin with the printed seed, too."""
    hypothesis.core.global_force_seed = SEED


def pytest_report_header() -> str:
    """The seed, so that a failure can be repeated."""
    return f"seed: L4_TEST_SEED={SEED}, redis: {os.environ.get('L4_TEST_REDIS') or 'redis-server on PATH'}"


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator seeded with the printed seed."""
    return np.random.default_rng(SEED)


@pytest.fixture(scope="session")
def redis_executable(request: pytest.FixtureRequest) -> str:
    """Path of the redis-server under test, or of one that a test names. A laptop may lack one; CI may not."""
    from tests.protocol.server import named_binary, redis_binary

    name = getattr(request, "param", None)
    binary = redis_binary() if name is None else named_binary(name)
    if binary is None:
        message = "redis-server is not on PATH (on Debian: apt-get install redis-server)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return binary


@pytest.fixture(scope="session")
def redis_server(redis_executable: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for the whole session, in memory only. Never flush it: tests differ by namespace."""
    from tests.protocol.server import RedisServer

    server = RedisServer(redis_executable, tmp_path_factory.mktemp("redis")).start()
    yield server
    server.kill()


@pytest.fixture
def durable_server(redis_executable: str, tmp_path: Path) -> Iterator[RedisServer]:
    """A server for one test alone, AOF with fsync on every write: to be killed and restarted."""
    from tests.protocol.server import DURABLE, RedisServer

    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(redis_executable, folder, DURABLE).start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def redis_url(redis_server: RedisServer) -> str:
    """URL of the session's server."""
    return redis_server.url


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"t{os.getpid()}-{next(_NUMBERS)}"


@pytest.fixture(scope="session")
def executor(redis_url: str) -> Iterator[Executor]:
    """A blocking executor on the session's server."""
    from l4queue.protocol.executor import Executor

    executor = Executor(redis_url)
    yield executor
    executor.close()


@pytest.fixture
def keys(namespace: str) -> Keys:
    """The key names of this test."""
    from l4queue.protocol.keys import Keys

    return Keys(namespace)


@pytest.fixture
def calls(keys: Keys) -> Calls:
    """Builders of the transitions of this test."""
    from l4queue.protocol.calls import Calls

    return Calls(keys)


@pytest.fixture
def reads(keys: Keys) -> Reads:
    """Builders of the reads of this test."""
    from l4queue.protocol.reads import Reads

    return Reads(keys)


@pytest.fixture
def scene(executor: Executor, namespace: str) -> Iterator[Scene]:
    """A deployment in miniature: verbs for every transition, dumps and a consistency check."""
    from tests.protocol.scene import Scene

    scene = Scene(executor, namespace)
    yield scene
    scene.close()
