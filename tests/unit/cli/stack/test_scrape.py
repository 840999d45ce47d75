"""Ports of the processes of one machine: the exporter first, nobody twice, nobody on a port that is taken."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from l4queue.cli.stack.embedded import is_port_free
from l4queue.cli.stack.scrape import with_metrics, write_targets
from l4queue.cli.stack.supervisor import ChildSpec
from l4queue.config import Settings
from l4queue.errors import ConfigError

NAMES = ("dispatcher-0", "exporter", "planner", "beat", "flower", "worker-0", "worker-1")


def specs() -> list[ChildSpec]:
    """Children of a deployment."""
    return [ChildSpec(name=name, argv=("x",), env={"L4_X": "1"}) for name in NAMES]


def free_ports(number: int) -> int:
    """The first of so many ports in a row that were all free a moment ago."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
        if first + number < 65536 and all(is_port_free(first + i) for i in range(number)):
            return first


def test_each_process_has_a_port_of_its_own_and_the_exporter_the_first() -> None:
    """Those without metrics are told so: they would inherit the user's setting otherwise."""
    first = free_ports(4)
    urls, given = with_metrics(specs(), Settings(metrics_port=first))

    env = {spec.name: spec.env["L4_METRICS_PORT"] for spec in given}
    assert list(urls) == ["exporter", "dispatcher-0", "worker-0", "worker-1"]
    assert urls["exporter"] == f"http://127.0.0.1:{first}/metrics"
    assert [env[name] for name in urls] == [str(first + i) for i in range(4)]
    assert {env[name] for name in ("planner", "beat", "flower")} == {"0"}
    assert all(spec.env["L4_X"] == "1" for spec in given)


def test_without_a_port_nobody_has_one() -> None:
    """The default."""
    urls, given = with_metrics(specs(), Settings(metrics_port=0))

    assert urls == {}
    assert {spec.env["L4_METRICS_PORT"] for spec in given} == {"0"}


def test_a_port_that_is_taken_is_said_before_anything_starts() -> None:
    """With the process that would have had it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="for metrics of exporter, is in use"):
            with_metrics(specs(), Settings(metrics_port=taken.getsockname()[1]))
    with pytest.raises(ConfigError, match="port 65536"):
        with_metrics(specs(), Settings(metrics_port=65535))


def test_targets_are_what_file_sd_configs_reads(tmp_path: Path) -> None:
    """A list of groups with targets and labels."""
    path = tmp_path / "new" / "targets.json"
    write_targets(path, {"exporter": "http://127.0.0.1:9400/metrics", "worker-0": "http://10.0.0.1:9401/metrics"})

    assert json.loads(path.read_text()) == [
        {"targets": ["127.0.0.1:9400"], "labels": {"process": "exporter"}},
        {"targets": ["10.0.0.1:9401"], "labels": {"process": "worker-0"}},
    ]
