"""Workers that drive a running `vllm serve`: the tokens of an engine in process, whatever happens on the way."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from l4queue import Client, Handle, Result, Settings
from l4queue.errors import RequestFailed
from tests.protocol.server import DURABLE, RedisServer
from tests.services.processes import Processes, until
from tests.services.vllm_server import VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.services, pytest.mark.timeout(1800)]
MAX_MODEL_LEN = 4096
WAIT_S = 600
STORY = "Once upon a time"
GREEDY = {"temperature": 0.0, "ignore_eos": True}
LONG = {**GREEDY, "max_tokens": 900}  # seconds: it still runs when its worker ends, on a busy machine too
ENDLESS = {**GREEDY, "max_tokens": 4000}  # ten seconds and more: an end in between is seen, on a busy machine too
CASES: tuple[dict[str, Any], ...] = (
    {**GREEDY, "max_tokens": 24, "logprobs": 2},
    {"max_tokens": 24, "seed": 7, "top_p": 0.9, "logprobs": 0},
    {
        **GREEDY,
        "max_tokens": 24,
        "logit_bias": {500: 3.0, 501: -100.0},
        "allowed_token_ids": list(range(400, 900)),
    },
    {"temperature": 0.0, "max_tokens": 24, "min_tokens": 3, "repetition_penalty": 1.2, "bad_words": ["the"]},
    {"temperature": 0.0, "max_tokens": 24, "structured_outputs": {"regex": "[ab]{5}"}},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """Redis, a dispatcher and a server; workers as the tests need them. What the engine in process gave."""

    processes: Processes
    settings: Settings
    server: VllmServer
    client: Client
    cases: list[Result] = field(default_factory=list)
    long: list[Result] = field(default_factory=list)

    def serve(self, name: str, **settings: object) -> None:
        """Start a worker and wait until it serves."""
        self.processes.worker(name, **settings)
        self._await(name, is_there=True)

    def serve_by_http(self, name: str) -> None:
        """The same, with the server as its engine."""
        self.serve(name, engine="http", engine_url=self.server.url)

    def retire(self, name: str) -> None:
        """Let a worker drain, which gives back what it runs."""
        assert self.processes.stop(name) == 0
        self._await(name, is_there=False)

    def begin_long(self, params: Mapping[str, Any] = LONG) -> Handle:
        """The long request, with its first tokens out."""
        handle = self.client.enqueue(STORY, **params)
        next(iter(handle.stream(timeout=WAIT_S)))
        return handle

    def is_as_uncut(self, handle: Handle) -> Result:
        """Its tokens and text are those of an uncut run, each once, also as they were streamed."""
        chunks = list(handle.stream(timeout=WAIT_S))
        result, uncut = handle.result(timeout=WAIT_S), self.long[0]
        assert result.token_ids == uncut.token_ids
        assert result.text == uncut.text == "".join(chunk.text for chunk in chunks)
        return result

    def _await(self, name: str, *, is_there: bool) -> None:
        def is_right() -> bool:
            return (name in {w.worker_id for w in self.client.overview().workers}) is is_there

        until(is_right, f"{name} {'serves' if is_there else 'is gone'}", timeout_s=WAIT_S)


@pytest.fixture(scope="module")
def adopted(
    redis_executable: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Adopted]:
    """The reference first: an engine in process, which still serves when the first test begins."""
    folder = tmp_path_factory.mktemp("adopted")
    redis = RedisServer(redis_executable, folder, DURABLE).start()
    values: dict[str, object] = {
        "redis_url": redis.url,
        "model": str(tiny_model),
        "max_model_len": MAX_MODEL_LEN,
        "dtype": "float32",
        "steal_from": "none",
        "lease_s": 20.0,
    }
    processes, settings = Processes(folder, **values), Settings(**values)  # type: ignore[arg-type]
    server = VllmServer(
        tiny_model, folder, "--max-model-len", str(MAX_MODEL_LEN), "--scheduling-policy", "priority"
    )
    server.start()
    try:
        with Client(settings=settings, timeout_s=WAIT_S) as client:
            processes.start("dispatcher", "-m", "dispatcher")
            fleet = Adopted(processes=processes, settings=settings, server=server, client=client)
            fleet.serve("in-process", engine="vllm")
            fleet.cases.extend(client.enqueue(STORY, **case).result(timeout=WAIT_S) for case in CASES)
            fleet.long.append(client.enqueue(STORY, **LONG).result(timeout=WAIT_S))
            server.answers()
            yield fleet
    finally:
        processes.close()
        server.end(signal.SIGKILL)
        redis.kill()


def test_a_request_goes_on_from_an_engine_in_process_to_a_server(adopted: Adopted) -> None:
    """Prefilled again there. The server's own limits are known to the fleet."""
    handle = adopted.begin_long()
    adopted.retire("in-process")
    adopted.serve_by_http("http-0")
    load = next(w for w in adopted.client.overview().workers if w.worker_id == "http-0")
    assert (load.engine, load.max_model_len) == ("http", MAX_MODEL_LEN)
    assert load.kv_capacity_tokens > 10 * MAX_MODEL_LEN
    assert adopted.is_as_uncut(handle).resumed


def test_every_kind_of_request_gives_what_an_engine_in_process_gives(adopted: Adopted) -> None:
    """Tokens, text, ends and logprobs; a bad one fails alone, and says which field."""
    for case, expected in zip(CASES, adopted.cases, strict=True):
        result = adopted.client.enqueue(STORY, **case).result(timeout=WAIT_S)
        assert (result.token_ids, result.text) == (expected.token_ids, expected.text), case
        assert result.finish_reason == expected.finish_reason
        assert (result.logprobs is None) is (expected.logprobs is None)
        for row, other in zip(result.logprobs or (), expected.logprobs or (), strict=True):
            assert row.token_id == other.token_id
            assert row.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert [token for token, _ in row.top] == [token for token, _ in other.top]
    ids = list(adopted.long[0].token_ids)
    stop = adopted.client.enqueue(STORY, **LONG, stop_token_ids=[ids[5]]).result(timeout=WAIT_S)
    assert list(stop.token_ids) == ids[: ids.index(ids[5]) + 1]
    with pytest.raises(RequestFailed, match="vocabulary"):
        adopted.client.enqueue(token_ids=[10**6], max_tokens=2).result(timeout=WAIT_S)


def test_what_is_cancelled_or_stopped_by_its_text_leaves_the_server(adopted: Adopted) -> None:
    """Its connection is closed: the server ends it long before its last token."""
    generated, running = "vllm:generation_tokens_total", "vllm:num_requests_running"
    before = adopted.server.metric(generated)
    adopted.begin_long(ENDLESS).cancel()
    until(lambda: adopted.server.metric(running) == 0, "the server ended it", timeout_s=WAIT_S)
    assert adopted.server.metric(generated) - before < ENDLESS["max_tokens"]

    before = adopted.server.metric(generated)
    word = adopted.long[0].text.split()[1]
    stopped = adopted.client.enqueue(STORY, **ENDLESS, stop=[word]).result(timeout=WAIT_S)
    assert stopped.text == adopted.long[0].text.partition(word)[0]
    until(lambda: adopted.server.metric(running) == 0, "the server ended it", timeout_s=WAIT_S)
    assert adopted.server.metric(generated) - before < ENDLESS["max_tokens"]


def test_a_request_goes_on_at_another_worker_with_a_server(adopted: Adopted) -> None:
    """The worker that drains closes the stream at a token and gives it back without blame."""
    handle = adopted.begin_long()
    adopted.retire("http-0")
    adopted.serve_by_http("http-1")
    assert adopted.is_as_uncut(handle).resumed


def test_a_server_that_is_killed_takes_no_token_along(adopted: Adopted) -> None:
    """Its worker ends and waits for it when started again, as supervisors do; the request goes on from there."""
    handle = adopted.begin_long()
    adopted.server.end(signal.SIGKILL)
    until(lambda: not adopted.client.overview().workers, "its worker has left", timeout_s=WAIT_S)
    assert "EngineDied" in adopted.processes.log("http-1")
    adopted.processes.worker("http-1", engine="http", engine_url=adopted.server.url)
    until(
        lambda: "waiting for the engine's server" in adopted.processes.log("http-1"), "it waits", timeout_s=WAIT_S
    )
    adopted.server.start()
    adopted.server.answers()
    assert adopted.is_as_uncut(handle).resumed
