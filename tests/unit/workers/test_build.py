"""The worker that the settings ask for, as far as moving KV goes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from l4queue.config import Settings
from l4queue.cost.coefficients import read_coefficients
from workers.build import kv_directory, make_worker
from workers.kv import store
from workers.telemetry.observer import NullObserver


@pytest.fixture
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Instead of this machine's."""
    monkeypatch.setattr(store, "_SHARED_MEMORY", tmp_path)
    return tmp_path


def test_each_namespace_has_a_directory_of_this_user_alone(shared_memory: Path) -> None:
    found = kv_directory(Settings(namespace="mine"))
    assert found is not None
    assert found.parent == shared_memory
    assert found.name.endswith("-mine")
    assert found.stat().st_mode & 0o777 == 0o700


def test_without_bytes_there_is_none(shared_memory: Path) -> None:
    assert kv_directory(Settings(kv_handover_bytes=0)) is None
    assert list(shared_memory.iterdir()) == []


def test_one_that_cannot_be_used_does_not_stop_the_worker(
    shared_memory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody made it readable for all."""
    found = kv_directory(Settings(namespace="mine"))
    assert found is not None
    found.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        assert kv_directory(Settings(namespace="mine")) is None
    (record,) = caplog.records
    assert "prefilled again" in record.message
    assert str(found) in record.message


@pytest.mark.parametrize("rate", [0.0, 1e9])
async def test_the_emulated_engine_moves_kv_at_the_rate_that_is_set(rate: float) -> None:
    """As large as the model's; priced as in the simulator."""
    settings = Settings(engine="emulated", emulated_kv_bytes_per_s=rate)
    worker = make_worker(settings, NullObserver())
    engine, profile = worker.context.engine, worker.profile
    info = await engine.start()
    profile.started(info)
    try:
        assert info.can_move_kv == bool(rate)
        price = profile.move_price
        assert price.bandwidth_bytes_per_s == (rate or None)
        if rate:
            shipped = read_coefficients(settings.emulated_gpu, settings.emulated_model)
            assert price.kv_bytes_per_token == info.kv_bytes_per_token == shipped.kv_bytes_per_token
    finally:
        await engine.stop()
        await worker.context.executor.close()
