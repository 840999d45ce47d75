"""The process of a gateway: its socket, and the dispatcher that it may have (`L4_HTTP_DISPATCHER`)."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.server import open_socket
from l4queue import Settings
from l4queue.errors import ConfigError
from tests.protocol.server import DURABLE, RedisServer
from tests.services.gateways import MODEL, Gateways, await_workers
from tests.services.processes import Processes, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]
pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def gateways(redis_executable: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    """Redis, a worker with the emulated engine, and two gateways that dispatch."""
    from l4queue.model_cache import cache_directory
    from workers.tiny import build_tiny_model

    folder = tmp_path_factory.mktemp("gateways")
    model = build_tiny_model(cache_directory())
    server = RedisServer(redis_executable, folder, DURABLE).start()
    values: dict[str, object] = {
        "redis_url": server.url,
        "model": str(model),
        "max_model_len": 2048,
        "engine": "emulated",
        "http_dispatcher": True,
        "dispatcher_claim_idle_s": 1.0,
    }
    processes = Processes(folder, **values)
    started = Gateways(processes=processes, settings=Settings(**values), model=model)  # type: ignore[arg-type]
    try:
        for name in ("gateway-0", "gateway-1"):
            started.start(name)
        processes.worker("worker-0")
        for name in started.ports:
            started.answers(name)
        await_workers(started, 1)
        yield started
    finally:
        processes.close()
        server.kill()


def _routed(gateways: Gateways, name: str) -> float:
    """Requests that a gateway's dispatcher has routed, by its metrics."""
    text = httpx.get(f"{gateways.url(name)}/metrics", timeout=60).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return sum(s.value for s in samples if s.name == "l4queue_dispatcher_requests_routed_total")


def test_chats_and_texts_are_served_without_another_dispatcher(gateways: Gateways) -> None:
    """Of HTTP and of the queue's own clients. What a dispatcher routed is among the metrics of its gateway."""
    chat = gateways.openai().chat.completions
    answer = chat.create(model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 4
    with gateways.queue() as client:
        assert len(client.enqueue("hello world", max_tokens=4, ignore_eos=True).result(timeout=300).token_ids) == 4
        with pytest.raises(Exception, match="token"):
            client.enqueue("hello " * 4000, max_tokens=4).result(timeout=300)
    assert sum(_routed(gateways, name) for name in gateways.ports) == 2


def test_one_that_ends_leaves_the_rest_to_the_others(gateways: Gateways) -> None:
    """SIGTERM ends a gateway and its dispatcher well, SIGKILL at any moment: the other one's goes on."""
    assert gateways.processes.stop("gateway-1") == 0
    with gateways.queue() as client:
        handles = client.enqueue_many(["hello"] * 20, max_tokens=4, ignore_eos=True)
        assert [len(handle.result(timeout=300).token_ids) for handle in handles] == [4] * 20
        gateways.start("gateway-2")
        gateways.answers("gateway-2")
        handles = client.enqueue_many(["hello"] * 200, max_tokens=4, ignore_eos=True)
        until(lambda: _routed(gateways, "gateway-0") > 0, "one has begun")
        gateways.processes.stop("gateway-0", signal.SIGKILL)
        assert [len(handle.result(timeout=300).token_ids) for handle in handles] == [4] * 200


def test_accepted_connections_send_at_once() -> None:
    """Nagle's algorithm is off, on a connection of asyncio as on any; a port that is taken is named."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--host", "127.0.0.1", "--port", "0"])
    address, listening = open_socket(args)
    with listening:
        listening.listen()
        args.port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", args.port)), listening.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert address.startswith("http://127.0.0.1:")
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{args.port}"):
            open_socket(args)
