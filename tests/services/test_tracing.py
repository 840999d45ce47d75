"""Traces across the queue: real processes, a real OTLP receiver, a hand-over and a crash in one request's life."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from l4queue import Client, Settings
from l4queue.cli.stack.embedded import free_port
from l4queue.models import Plan, StagePlan
from l4queue.plan_json import plan_to_json
from l4queue.protocol.calls import Calls
from l4queue.protocol.keys import Keys
from tests.services.collector import Collector, ReceivedSpan, open_collector
from tests.services.processes import Processes, serve_by, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
ENQUEUE = """
import json, sys
from l4queue import Client
with Client() as client:
    print(client.enqueue(**json.loads(sys.argv[1])).id)
"""
UNDER_A_SPAN_OF_THE_APPLICATION = """
import json, sys
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
provider = TracerProvider(resource=Resource({"service.name": "shop"}))
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(provider)
from l4queue import Client
with Client() as client, trace.get_tracer("shop").start_as_current_span("checkout"):
    print(*(handle.id for handle in client.enqueue_many(["one", "two"], max_tokens=3)), sep="\\n")
"""
OFF = """
import json, sys
from l4queue import Client
client = Client()
print(json.dumps(client.enqueue("x", max_tokens=1).status().request))
traces = ("opentelemetry.sdk.trace", "opentelemetry.exporter")  # redis-py imports the metrics where they are
print(sorted(name for name in sys.modules if name.startswith(traces)))
"""


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Where all processes of a test send their spans."""
    with open_collector() as opened:
        yield opened


@pytest.fixture
def deploy(redis_url: str, namespace: str, tmp_path: Path) -> Iterator[Callable[..., Processes]]:
    """Starts a dispatcher; workers are for the test to start. Spans go to `endpoint`."""
    opened: list[Processes] = []

    def start(endpoint: str, **more: object) -> Processes:
        values = {
            "redis_url": redis_url,
            "namespace": namespace,
            "engine": "emulated",
            "lease_s": 2,
            "traces": True,
            "steal_from": "none",
            **more,
        }
        processes = Processes(tmp_path, **values)
        processes.environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        opened.append(processes)
        processes.start("dispatcher", "-m", "dispatcher")
        return processes

    yield start
    for processes in opened:
        processes.close()


@pytest.fixture
def client(redis_url: str, namespace: str) -> Iterator[Client]:
    """One that watches, and traces nothing."""
    settings = Settings(redis_url=redis_url, namespace=namespace, _env_file=None)  # type: ignore[call-arg]
    with Client(settings=settings) as opened:
        yield opened


def _enqueue(processes: Processes, **request: object) -> str:
    """From a process of its own, as an application does it; what that says to stderr comes after the id."""
    return _enqueue_and_say(processes, **request)[0]


def _enqueue_and_say(processes: Processes, **request: object) -> tuple[str, str]:
    request_id, _, said = processes.run("-c", ENQUEUE, json.dumps(request)).partition("\n")
    assert len(request_id) == 32, request_id + said
    return request_id, said


def _up(client: Client, *names: str) -> None:
    """Until these workers hold a lease."""
    wanted = set(names)
    until(lambda: {load.worker_id for load in client.overview().workers} == wanted, f"{names}", timeout_s=120)


def _publish(client: Client, *stages: StagePlan) -> None:
    """Publish a plan; returns when its workers serve by it, since a worker takes by the plan that it has."""
    version = client.overview().plan.version
    plan = Plan(version=version + 1, stages=stages)
    calls = Calls(Keys(client.settings.namespace))
    client._executor.run(calls.publish(expected_version=version, version=plan.version, body=plan_to_json(plan)))
    until(lambda: serve_by(plan, client.overview()), "the workers follow the plan")


def _check_tree(spans: list[ReceivedSpan], *, root: str) -> dict[str, list[ReceivedSpan]]:
    """One trace, one root, every other span below one that is there; spans by name."""
    assert len({span.trace_id for span in spans}) == 1
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans), "a span came twice"
    assert [span.name for span in spans if not span.parent_id] == [root]
    assert all(span.parent_id in by_id for span in spans if span.parent_id)
    named: dict[str, list[ReceivedSpan]] = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        assert span.start_ns <= span.end_ns
        named.setdefault(span.name, []).append(span)
    return named


def test_one_request_is_one_tree_across_a_hand_over_and_a_crash(
    collector: Collector, deploy: Callable[..., Processes], client: Client
) -> None:
    """It outgrows its stage, the worker that took it over is killed, a third ends it: all of it is told."""
    processes = deploy(collector.endpoint, emulated_speed=0.4, max_running=32)
    for name in ("w0", "w1", "w2"):
        processes.worker(name)
    _up(client, "w0", "w1", "w2")
    _publish(
        client,
        StagePlan(low_tokens=0, high_tokens=300, num_workers=1, worker_ids=("w0",)),
        StagePlan(low_tokens=300, high_tokens=None, num_workers=2, worker_ids=("w1", "w2")),
    )
    # a crowd that stays, since a penalty pins a request to its worker: it makes moving worth while
    stays = {"max_tokens": 12_000, "ignore_eos": True, "presence_penalty": 0.5}
    crowd = client.enqueue_many([{"token_ids": [1] * 200, **stays} for _ in range(24)])
    until(lambda: all(handle.status().worker == "w0" for handle in crowd), "the crowd runs on w0")

    request_id = _enqueue(processes, token_ids=[1] * 200, max_tokens=6000, ignore_eos=True, temperature=0.0)
    handle = client.get(request_id)
    until(lambda: handle.status().worker in ("w1", "w2") and handle.status().output_tokens > 150, "it has moved")
    victim = str(handle.status().worker)
    offset = until(lambda: handle.status().output_tokens, "its progress")
    processes.send(victim, signal.SIGKILL)
    result = handle.result(timeout=120)

    assert result.output_tokens == 6000
    spans = until(
        lambda: [s for s in collector.trace_of(request_id) if "request" in {x.name for x in collector.spans()}],
        "the spans of the request",
    )
    named = _check_tree(spans, root="enqueue")
    assert named["enqueue"][0].service == "l4queue-client"
    assert {span.service for span in spans if span.name != "enqueue"} == {"l4queue-worker"}
    (whole,) = named["request"]
    assert whole.parent_id == named["enqueue"][0].span_id
    assert whole.error is None
    assert whole.attributes["l4queue.state"] == "done"
    assert whole.attributes["gen_ai.usage.output_tokens"] == 6000
    assert whole.attributes["l4queue.crashes"] == 1
    assert whole.resource["service.instance.id"] == result.worker != victim
    (move,) = named["hand-over"]
    assert (move.attributes["l4queue.from"], move.attributes["l4queue.to"]) == ("w0", victim)
    inside = Counter(span.name for span in spans if span.parent_id == move.span_id)
    assert inside == {"wait": 1, "prefill": 1}
    decodes = [(s.attributes["l4queue.worker"], s.error) for s in named["decode"]]
    assert decodes == [("w0", None), (victim, "its worker was lost"), (result.worker, None)]
    assert sum(span.attributes["l4queue.tokens"] for span in named["decode"]) == 6000
    assert sum(span.attributes["l4queue.tokens"] for span in named["decode"][:2]) >= offset
    record = handle.status()
    assert whole.start_ns == round(record.submitted_at_s * 1000) * 1_000_000
    assert whole.end_ns == round((record.finished_at_s or 0) * 1000) * 1_000_000
    assert named["enqueue"][0].start_ns < whole.end_ns
    for other in crowd:
        other.cancel()


def test_requests_go_below_the_span_of_the_application_that_sends_them(
    collector: Collector, deploy: Callable[..., Processes], client: Client
) -> None:
    """Its provider is used and no second one; a `traceparent` from elsewhere is as good as a current span."""
    processes = deploy(collector.endpoint)
    processes.worker("w0")
    ids = processes.run("-c", UNDER_A_SPAN_OF_THE_APPLICATION).split()
    assert len(ids) == 2, ids
    foreign = _enqueue(processes, prompt="x", max_tokens=2, traceparent=f"00-{'ab' * 16}-{'cd' * 8}-01")
    for request_id in (*ids, foreign):
        client.get(request_id).result(timeout=120)

    until(lambda: sum(span.name == "request" for span in collector.spans()) == 3, "three requests")
    named = _check_tree(collector.trace_of(ids[0]), root="checkout")
    assert {name: len(found) for name, found in named.items()} == {
        "checkout": 1, "enqueue": 2, "request": 2, "route": 2, "wait": 2, "prefill": 2, "decode": 2,
    }  # fmt: skip
    assert {span.service for span in named["enqueue"]} == {"shop"}
    assert {span.parent_id for span in named["enqueue"]} == {named["checkout"][0].span_id}
    (enqueue,) = [span for span in collector.trace_of(foreign) if span.name == "enqueue"]
    assert (enqueue.trace_id, enqueue.parent_id) == ("ab" * 16, "cd" * 8)


def test_the_same_request_in_another_trace_is_the_same_request(
    collector: Collector, deploy: Callable[..., Processes], client: Client
) -> None:
    """An idempotency key is not in conflict with itself because a retry has a new trace."""
    processes = deploy(collector.endpoint)
    processes.worker("w0")
    first, again = (_enqueue(processes, prompt="x", max_tokens=2, idempotency_key="k") for _ in range(2))
    assert first == again
    client.get(first).result(timeout=120)

    until(lambda: "request" in {span.name for span in collector.spans()}, "its spans")
    enqueues = [span for span in collector.spans() if span.name == "enqueue"]
    assert [span.attributes.get("l4queue.known_already", False) for span in enqueues] == [False, True]
    (request,) = [span for span in collector.spans() if span.name == "request"]
    assert request.parent_id == enqueues[0].span_id


def test_what_is_cancelled_while_it_runs_has_failed_in_its_trace(
    collector: Collector, deploy: Callable[..., Processes], client: Client
) -> None:
    """With the reason; what it had generated is told as of any other."""
    processes = deploy(collector.endpoint)
    processes.worker("w0")
    request_id = _enqueue(processes, prompt="x", max_tokens=8000, ignore_eos=True)
    until(lambda: client.get(request_id).status().output_tokens > 0, "it runs", timeout_s=120)
    assert client.get(request_id).cancel(reason="changed my mind")

    until(lambda: "request" in {span.name for span in collector.spans()}, "its spans")
    named = _check_tree(collector.trace_of(request_id), root="enqueue")
    assert named["request"][0].error == named["decode"][0].error == "cancelled: changed my mind"


def test_nothing_is_sent_or_imported_where_traces_are_off(
    collector: Collector, deploy: Callable[..., Processes], client: Client
) -> None:
    """Off is the default: nothing imported for it, nothing in the record, nobody called."""
    processes = deploy(collector.endpoint, traces=False)
    processes.worker("w0")
    assert Settings(_env_file=None).traces is False  # type: ignore[call-arg]
    body, modules = processes.run("-c", OFF).splitlines()
    assert json.loads(body) == {"params": {"max_tokens": 1}}
    assert modules == "[]"
    until(lambda: client.overview().counts.get("done", 0) == 1, "it is done", timeout_s=120)
    assert processes.stop("w0") == 0
    assert collector.spans() == []


@contextmanager
def _nobody() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@contextmanager
def _silent() -> Iterator[str]:
    """Takes connections and never answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                held.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for one in held:
            one.close()


@pytest.mark.parametrize("collector_of", [_nobody, _silent])
def test_a_collector_that_is_away_or_hangs_costs_no_request_and_no_clean_end(
    collector_of: Callable[[], Iterator[str]], deploy: Callable[..., Processes], client: Client
) -> None:
    """Requests are accepted and served as ever, and the worker drains with code 0 in time.

    One that waited for the exporter would wait for 1,000 s.
    """
    with collector_of() as endpoint:  # type: ignore[attr-defined]  # a context manager
        processes = deploy(endpoint)
        processes.environment["OTEL_EXPORTER_OTLP_TIMEOUT"] = "1000"
        processes.worker("w0")
        for _ in range(2):  # the second comes after the first one's spans
            request_id = _enqueue(processes, prompt="x", max_tokens=2)
            assert client.get(request_id).result(timeout=120).output_tokens == 2
        assert processes.stop("w0") == 0, processes.log("w0")[-2000:]


def test_variables_that_opentelemetry_refuses_cost_the_traces_and_nothing_else(
    deploy: Callable[..., Processes], client: Client
) -> None:
    """A worker starts, a client enqueues; both say why there are no traces."""
    processes = deploy("http://127.0.0.1:1")
    processes.environment["OTEL_BSP_MAX_QUEUE_SIZE"] = "-1"
    processes.worker("w0")
    request_id, said = _enqueue_and_say(processes, prompt="x", max_tokens=2)
    assert client.get(request_id).result(timeout=120).output_tokens == 2
    assert said.count("no traces from this client: ValueError") == 1
    assert "no traces from this worker: ValueError" in processes.log("w0")
