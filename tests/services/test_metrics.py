"""Metrics of a whole deployment: real processes, scraped over HTTP and by a real Prometheus."""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dispatcher.planner.rounds import replan_once
from l4queue import Client
from l4queue.cli.stack.embedded import free_port
from l4queue.config import load_settings
from l4queue.errors import QueueFull
from l4queue.models import Plan, StagePlan
from l4queue.plan_json import plan_to_json
from l4queue.protocol.calls import Calls
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from tests.protocol.server import RedisServer
from tests.services.processes import Processes, until
from tests.services.prometheus import MONITORING, Prometheus, draw_dashboard, expressions, has_data, promtool

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

WORKERS = ("w0", "w1", "w2")
FLEET = ("w0", "w2")  # in one process
BOUNDARY_TOKENS = 64
ROLES = ("exporter", "dispatcher", "dispatcher-2", "fleet", "w1")

NAME = re.compile(r"`(l4queue_[a-z0-9_]+)`")

Samples = dict[tuple[str, ...], float]


class Deployment:
    """Two dispatchers, an exporter and three emulated workers in two stages."""

    def __init__(self, folder: Path, redis: RedisServer, tokenizer: Path) -> None:
        self.redis = redis
        self.ports = {role: free_port() for role in ROLES}
        given: dict[str, Any] = {
            "redis_url": redis.url,
            "engine": "emulated",
            "model": str(tokenizer),
            "max_model_len": 4096,
            "max_running": 16,
            "max_backlog_tokens": 400_000,
            "lease_s": 3.0,
            "drain_s": 5.0,
            "plan_min_gain": 1.0,  # no plan can gain so much: the stages of the test stay
        }
        self.settings = load_settings(**given)
        self.processes = Processes(folder, **given)
        self.client = Client(settings=self.settings)
        self.executor = Executor(redis.url)

    def start(self) -> None:
        """Everything up, with a plan of two stages."""
        port = self.ports.__getitem__
        self.processes.start("exporter", "-m", "dispatcher.exporter", metrics_port=port("exporter"))
        for name in ("dispatcher", "dispatcher-2"):
            self.processes.start(name, "-m", "dispatcher", metrics_port=port(name))
        self.processes.start(
            "fleet", "-m", "workers.worker_group", *FLEET, worker_id="fleet", metrics_port=port("fleet")
        )
        self.start_worker()
        until(lambda: len(self.client.overview().workers) == len(WORKERS), "all workers serve", timeout_s=180)
        for name in ROLES[:3]:
            until(lambda name=name: " ready: " in self.processes.log(name), f"{name} is ready", timeout_s=180)
        self.publish()
        asyncio.run(replan_once(self.settings))

    def start_worker(self) -> None:
        """The one that has a process of its own."""
        self.processes.worker("w1", metrics_port=self.ports["w1"])

    def publish(self) -> None:
        """Publish two stages, which the planner keeps whatever a replay of the load finds better."""
        stages = (
            StagePlan(low_tokens=0, high_tokens=BOUNDARY_TOKENS, num_workers=2, worker_ids=WORKERS[:2]),
            StagePlan(low_tokens=BOUNDARY_TOKENS, high_tokens=None, num_workers=1, worker_ids=WORKERS[2:]),
        )
        plan = Plan(version=1, stages=stages, created_ms=int(time.time() * 1000), reason="test")
        call = Calls(Keys(self.settings.namespace)).publish(expected_version=0, version=1, body=plan_to_json(plan))
        self.executor.run(call)

    def text(self, role: str) -> str:
        """What a process answers to a scrape."""
        return httpx.get(f"http://127.0.0.1:{self.ports[role]}/metrics", timeout=120).raise_for_status().text

    def samples(self, role: str) -> Samples:
        """The same as values by name and label values, in the order of the label names."""
        return {
            (sample.name, *(sample.labels[k] for k in sorted(sample.labels))): sample.value
            for family in text_string_to_metric_families(self.text(role))
            for sample in family.samples
        }

    def serve(self, number: int, *, prompt_tokens: int = 20, max_tokens: int = 8) -> None:
        """Serve so many requests to the end."""
        prompts = ["x" * prompt_tokens] * number
        for handle in self.client.enqueue_many(prompts, max_tokens=max_tokens, ignore_eos=True):
            handle.result(timeout=120)

    def close(self) -> None:
        """Leave nothing behind."""
        self.client.close()
        self.executor.close()
        self.processes.close()


@pytest.fixture(scope="module")
def deployment(
    redis_executable: str, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Up for the whole module."""
    server = RedisServer(redis_executable, tmp_path_factory.mktemp("redis")).start()
    deployment = Deployment(tmp_path_factory.mktemp("deployment"), server, tokenizer)
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.close()
        server.kill()


def grown(before: Samples, after: Samples, *name: str) -> float:
    """By how much a value has grown; one that was not there began at 0."""
    return after[name] - before.get(name, 0.0)


def test_totals_and_latencies_are_those_of_what_was_served(deployment: Deployment) -> None:
    """Each request once, although there are two dispatchers; latencies by stage and length."""
    before = deployment.samples("exporter")
    began_s = time.monotonic()
    deployment.serve(20, prompt_tokens=20, max_tokens=8)
    deployment.serve(10, prompt_tokens=300, max_tokens=4)
    took_s = time.monotonic() - began_s
    after = deployment.samples("exporter")

    assert grown(before, after, "l4queue_requests_accepted_total") == 30
    assert grown(before, after, "l4queue_requests_finished_total", "done") == 30
    assert grown(before, after, "l4queue_prompt_length_tokens_count") == 30
    assert grown(before, after, "l4queue_prompt_length_tokens_sum") == 20 * 20 + 10 * 300
    assert grown(before, after, "l4queue_prompt_length_tokens_bucket", "31.0") == 20
    for metric in ("time_to_first_token", "time_per_output_token", "e2e_latency", "queue_time"):
        short = grown(before, after, f"l4queue_{metric}_seconds_count", "0-255", "0")
        assert (metric, short) == (metric, 20)
        assert (
            sum(v for k, v in after.items() if k[0] == f"l4queue_{metric}_seconds_count" and k[1] == "256-2047")
            == 10
        )
    total_s = grown(before, after, "l4queue_e2e_latency_seconds_sum", "0-255", "0")
    assert 20 * 0.02 < total_s < 20 * took_s
    until(  # with the workers' next heartbeats
        lambda: grown(before, deployment.samples("exporter"), "l4queue_generated_tokens_total") == 20 * 8 + 10 * 4,
        "every token is counted",
    )
    routed = [deployment.samples(name)["l4queue_dispatcher_round_seconds_count",] for name in ROLES[1:3]]
    assert sum(routed) >= 1
    workers = deployment.samples("fleet") | deployment.samples("w1")
    assert sum(workers["l4queue_worker_requests_settled_total", name] for name in WORKERS) >= 30


def test_plan_queues_and_workers_are_told_by_stage(deployment: Deployment) -> None:
    """Boundaries, workers, capacity; what waits, its tokens and its age, while nobody takes it."""
    found = deployment.samples("exporter")
    assert found["l4queue_plan_version",] == 1
    assert (found["l4queue_plan_high_tokens", "0"], found["l4queue_plan_high_tokens", "1"]) == (64, math.inf)
    assert (found["l4queue_workers", "0"], found["l4queue_workers", "1"]) == (2, 1)
    assert found["l4queue_capacity_requests",] == 3 * 16

    for name in ROLES[3:]:
        deployment.processes.send(name, signal.SIGSTOP)
    try:
        handles = deployment.client.enqueue_many(["x" * 20] * 5 + ["x" * 200] * 2, max_tokens=4)
        until(
            lambda: (
                deployment.samples("exporter")["l4queue_queue_requests", "1"] == 2
                and deployment.samples("exporter")["l4queue_queue_requests", "0"] == 5
            ),
            "all are queued",
        )
        until(
            lambda: deployment.samples("exporter")["l4queue_queue_oldest_age_seconds", "0"] > 1.0, "they grow old"
        )
        found = deployment.samples("exporter")
        assert (found["l4queue_queue_tokens", "0"], found["l4queue_queue_tokens", "1"]) == (100, 400)
        assert found["l4queue_demand_tokens",] >= 500
        assert found["l4queue_demand_requests",] >= 7
        assert found["l4queue_demand_workers",] > 0
        assert found["l4queue_unfinished_requests",] == 7
    finally:
        for name in ROLES[3:]:
            deployment.processes.send(name, signal.SIGCONT)
    for handle in handles:
        handle.result(timeout=120)
    found = deployment.samples("exporter")
    assert (found["l4queue_queue_requests", "0"], found["l4queue_queue_oldest_age_seconds", "0"]) == (0, 0)


def test_refusals_rejections_and_redeliveries_are_counted(deployment: Deployment) -> None:
    """Too long; beyond the backlog; a worker that is killed with requests."""
    before = {role: deployment.samples(role) for role in ROLES}

    def growth(*name: str) -> float:
        return sum(
            grown(before[role], deployment.samples(role), *name) for role in ROLES[:3] if name in before[role]
        )

    deployment.client.enqueue("x" * 5000, max_tokens=4)
    until(
        lambda: growth("l4queue_dispatcher_requests_refused_total", "too_long") == 1, "the dispatcher refused it"
    )

    # a penalty pins a request to its worker: none of these is handed over
    pinned = {"max_tokens": 1500, "ignore_eos": True, "presence_penalty": 0.5}
    handles = deployment.client.enqueue_many(["x" * 20] * 16, **pinned)
    with Client(settings=deployment.settings.model_copy(update={"max_backlog_tokens": 1})) as narrow:
        for _ in range(2):
            with pytest.raises(QueueFull):
                narrow.enqueue("x" * 20, max_tokens=4)
    until(lambda: deployment.samples("w1")["l4queue_worker_running_requests", "w1"] > 0, "w1 runs some")
    deployment.processes.stop("w1", signal.SIGKILL)
    until(lambda: growth("l4queue_requests_requeued_total", "lost") > 0, "its requests went back", timeout_s=120)
    assert growth("l4queue_requests_rejected_total") == 2
    deployment.start_worker()
    for handle in handles:
        handle.result(timeout=180)
    until(lambda: len(deployment.client.overview().workers) == 3, "w1 is back", timeout_s=120)


def test_the_manual_names_every_metric_and_no_other(deployment: Deployment) -> None:
    """As Prometheus stores it: counters end in _total. The gateway's are compared where one runs."""
    served = set()
    for role in ("exporter", "dispatcher", "fleet"):
        for family in text_string_to_metric_families(deployment.text(role)):
            served.add(family.name + "_total" if family.type == "counter" else family.name)
    manual = (MONITORING.parent / "docs" / "monitoring.md").read_text("utf-8")
    rows = [row for row in manual.splitlines() if row.startswith("| `l4queue_")]
    named = {name for row in rows for name in NAME.findall(row) if not name.startswith("l4queue_http_")}
    assert named == {name for name in served if name.startswith("l4queue_")}


@pytest.mark.parametrize("role", ["exporter", "dispatcher", "fleet"])
def test_promtool_accepts_what_is_served(deployment: Deployment, role: str) -> None:
    """Syntax, names, help texts."""
    promtool("check", "metrics", text=deployment.text(role))


def test_the_exporter_outlives_redis(deployment: Deployment) -> None:
    """It says that Redis is away, keeps what it counted, and goes on."""
    deployment.serve(1)
    counted = deployment.samples("exporter")["l4queue_e2e_latency_seconds_count", "0-255", "0"]
    deployment.processes.start(
        "lonely",
        "-m",
        "dispatcher.exporter",
        metrics_port=(port := free_port()),
        redis_url="redis://127.0.0.1:1/0",
    )
    deployment.ports["lonely"] = port
    until(lambda: "metrics at" in deployment.processes.log("lonely"), "it serves", timeout_s=120)
    found = deployment.samples("lonely")
    assert found["l4queue_redis_up",] == 0
    assert ("l4queue_plan_version",) not in found
    assert deployment.processes.stop("lonely") == 0

    deployment.serve(1)
    found = deployment.samples("exporter")
    assert found["l4queue_redis_up",] == 1
    assert found["l4queue_e2e_latency_seconds_count", "0-255", "0"] == counted + 1


def test_a_worker_whose_port_is_taken_does_not_start(deployment: Deployment) -> None:
    """One line that names the setting."""
    deployment.processes.worker("w9", metrics_port=deployment.ports["fleet"])
    until(lambda: "error: L4_METRICS_PORT" in deployment.processes.log("w9"), "it says why", timeout_s=120)


class Load:
    """Traffic in both stages that outgrows the first, is stolen, refused and finished, until stopped."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._stop = Event()
        self._thread = Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        settings = self._deployment.settings
        with Client(settings=settings) as client:
            for round_ in itertools.count():
                handles = client.enqueue_many(["x" * 40] * 24, max_tokens=200, ignore_eos=True)
                handles += client.enqueue_many(["x" * 500] * 2, max_tokens=100, ignore_eos=True)
                asyncio.run(replan_once(settings))
                for handle in handles:
                    handle.result(timeout=120)
                if self._stop.is_set():
                    return
                assert round_ < 200


def test_prometheus_finds_data_for_every_expression(deployment: Deployment, tmp_path: Path) -> None:
    """Under load no query of a panel, an alert or the manual is empty."""
    ports = deployment.ports
    prometheus = Prometheus(
        tmp_path,
        {
            "exporter": [ports["exporter"]],
            "dispatcher": [ports["dispatcher"], ports["dispatcher-2"]],
            "worker": [ports["fleet"], ports["w1"]],
        },
    )
    try:
        prometheus.start()
        with Load(deployment):
            until(lambda: set(prometheus.targets().values()) == {"up"}, "all are scraped", timeout_s=120)
            missing: dict[str, str] = {}

            def all_found() -> bool:
                missing.clear()
                missing.update({expr: where for where, expr in expressions() if not has_data(prometheus, expr)})
                return not missing

            try:
                until(all_found, "every expression has data", timeout_s=180)
            except AssertionError:
                plan = deployment.client.overview().plan
                raise AssertionError(f"without data: {missing}; plan {plan.version}: {plan.reason}") from None
            draw_dashboard(prometheus, tmp_path)
            rules = until(
                lambda: [rule for rule in prometheus.rules() if rule["health"] != "unknown"], "rules are evaluated"
            )
        assert {rule["health"] for rule in rules} == {"ok"}
        assert len(rules) == 15
        assert len(expressions()) > 60
        assert prometheus.value("sum(l4queue_workers)") == 3
    finally:
        prometheus.close()
