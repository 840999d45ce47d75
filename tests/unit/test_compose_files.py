"""docker-compose.yml and .env.example agree with the settings and with each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
OURS = ("dispatcher", "planner", "beat", "flower", "worker", "exporter")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """Services as a YAML parser reads them."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    return found


def test_every_variable_and_setting_is_written_down() -> None:
    """Otherwise: python docker/env_example.py."""
    command = [sys.executable, str(ROOT / "docker" / "env_example.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_service_is_watched_restarted_bounded_and_stopped_gently(services: dict[str, Any]) -> None:
    """Redis as well as ours."""
    for name in ("redis", *OURS):
        service = services[name]
        assert service["healthcheck"]["test"], name
        assert service["restart"] == "unless-stopped", name
        assert service["mem_limit"], name
        assert service["stop_grace_period"], name


def test_our_containers_have_no_capabilities_and_wait_for_redis(services: dict[str, Any]) -> None:
    """And none opens a port to the network by itself."""
    for name in OURS:
        assert services[name]["cap_drop"] == ["ALL"], name
        assert services[name]["depends_on"]["redis"]["condition"] == "service_healthy", name
    for name, service in services.items():
        for port in service.get("ports", ()):
            assert port.startswith(("127.0.0.1:", "${FLOWER_BIND:-127.0.0.1}:")), (name, port)


def test_workers_share_their_locks_and_nothing_names_a_replica(services: dict[str, Any]) -> None:
    """A fixed worker id or container name would stop at the second replica."""
    worker = services["worker"]
    assert "devices:/var/lib/l4queue/devices" in worker["volumes"]
    assert "container_name" not in worker
    assert "L4_WORKER_ID" not in worker["environment"]
    assert worker["environment"]["L4_DEVICES_DIR"] == "/var/lib/l4queue/devices"
