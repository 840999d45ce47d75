"""The HTTP gateway before a queue: statuses, headers, streams that survive workers, gateways and clients."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from l4queue import AsyncClient, RequestState
from l4queue.protocol.keys import Keys
from tests.e2e.openai_bodies import CHAT, COMPLETIONS
from tests.services.cut_streams import answer_of_events, follow, stream_bodies
from tests.services.gateways import (
    ANN,
    BOB,
    KEY,
    MODEL,
    Gateways,
    await_workers,
    events,
    post,
    refusals,
    two_gateways,
    write_keys,
)
from tests.services.killed_batches import answers_of, batch_lines, begin, ended, kill_its_gateway
from tests.services.pipeline import until as until_async
from tests.services.processes import until

pytestmark = [pytest.mark.services, pytest.mark.vllm, pytest.mark.timeout(1200)]
LONG = {"model": MODEL, "prompt": "The return statement", "max_tokens": 400, "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def gateways(redis_executable: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    """Two workers with the emulated engine, two gateways, one of them with keys."""
    with two_gateways(redis_executable, tmp_path_factory.mktemp("gateways")) as started:
        yield started


def test_the_queues_id_is_in_the_answer(gateways: Gateways) -> None:
    """As a header, and in the id of the body; the queue explains it, with its priority and trace."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": 3}
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = post(gateways, "/v1/completions", body, x_l4_priority="7", traceparent=trace, x_request_id="mine")
    request_id = answer.headers["x-l4-request-id"]
    assert answer.json()["id"] == "cmpl-mine"
    own = post(gateways, "/v1/completions", body)
    assert own.json()["id"] == f"cmpl-{own.headers['x-l4-request-id']}"
    asked = {"model": MODEL, "input": "a", "max_output_tokens": 3}
    response = post(gateways, "/v1/responses", asked)
    assert response.json()["id"] == f"resp_{response.headers['x-l4-request-id']}"
    assert post(gateways, "/v1/responses", asked, x_request_id="mine").json()["id"] == "resp_mine"
    with gateways.queue() as client:
        handle = client.get(request_id)
        record = handle.status()
        assert record.state is RequestState.DONE
        assert (record.request["priority"], record.request["traceparent"]) == (7, trace)
        assert handle.explain()
        for found in (own, response):
            assert client.get(found.json()["id"]).id == found.headers["x-l4-request-id"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("body", "headers", "status", "field"),
    [
        ({"temprature": 0}, {}, 400, "temprature"),
        ({"max_tokens": 5000}, {}, 400, None),
        ({"prompt": "word " * 9000}, {}, 400, "input_tokens"),
        ({"logit_bias": {"9000000": 1}}, {}, 400, "logit_bias"),
        ({"stop": ["x" * 300]}, {}, 400, "stop"),
        ({"prompt_logprobs": 1}, {}, 400, "prompt_logprobs"),
        ({"priority": 500}, {}, 400, "priority"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, {}, 400, None),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, {}, 400, "structured_outputs"),
        ({"best_of": 2}, {}, 400, "best_of"),
        ({"cache_salt": "a"}, {}, 400, "cache_salt"),
        ({}, {"x-l4-deadline-s": "0.001"}, 504, None),
        ({}, {"x-l4-priority": "high"}, 400, "X-L4-Priority"),
        ({}, {"last-event-id": "0" * 32 + "/0/1/1"}, 404, None),
        ({"model": "another"}, {}, 404, "model"),
    ],
)
def test_a_refusal_has_its_status(
    gateways: Gateways,
    is_stream: bool,
    body: dict[str, Any],
    headers: dict[str, str],
    status: int,
    field: str | None,
) -> None:
    """Also where a stream was asked for: nothing of it has begun."""
    asked = {"model": MODEL, "prompt": "a", "max_tokens": 400, "stream": is_stream, **body}
    answer = httpx.post(f"{gateways.url()}/v1/completions", json=asked, headers=headers, timeout=300)
    told = answer.json()["error"]
    assert (answer.status_code, told["code"]) == (status, status), told
    if field is not None:
        assert told["param"] == field
        assert field in told["message"] or field == "input_tokens"


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("POST", "/v1/embeddings", 404, "this server generates text"),
        ("POST", "/v1/audio/speech", 404, "this server generates text"),
        ("GET", "/v1/batches/none", 404, "there is no batch none"),
        ("POST", "/chat/completions", 404, "base_url that ends with /v1"),
        ("GET", "/", 404, "base_url that ends with /v1"),
        ("GET", "/docs", 404, "/docs is not served"),
        ("GET", "/v1/chat/completions", 405, "takes POST, not GET"),
        ("POST", "/v1/models", 405, "takes GET, not POST"),
    ],
)
def test_a_wrong_path_or_method_is_told_what_is_there(
    gateways: Gateways, method: str, path: str, status: int, told: str
) -> None:
    """In OpenAI's form."""
    answer = httpx.request(method, f"{gateways.url()}{path}", timeout=300)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status)
    assert told in error["message"]
    assert (status == 405) == ("allow" in answer.headers)


def test_a_full_backlog_says_when_to_come_back(gateways: Gateways) -> None:
    """429 with Retry-After; OpenAI's client knows it as its own error."""
    with gateways.queue() as queue, gateways.openai() as client:
        waiting = queue.enqueue_many(["a"] * 30, max_tokens=1000, ignore_eos=True)
        for is_stream in (False, True):
            with pytest.raises(openai.RateLimitError) as full:
                client.completions.create(model=MODEL, prompt="a", max_tokens=100, stream=is_stream)
            assert int(full.value.response.headers["retry-after"]) >= 1
        for handle in waiting:
            handle.cancel()


def test_an_idle_connection_is_kept(gateways: Gateways) -> None:
    """Longer than vLLM's 5 s: a pool of connections would meet the end of some with a request in hand."""
    with socket.create_connection(("127.0.0.1", gateways.ports["gateway-0"])) as connection:
        connection.settimeout(60)
        for pause_s in (0.0, 6.0):
            time.sleep(pause_s)  # the time that is under test
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: gateway\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_client_that_goes_away_cancels(gateways: Gateways) -> None:
    """In the middle of a stream, and while it waits for all; in the background, or with a key, it goes on."""
    url = f"{gateways.url()}/v1/completions"

    def left(**headers: str) -> str:
        with httpx.stream("POST", url, json=LONG, headers=headers, timeout=300) as answer:
            next(answer.iter_raw())
            return answer.headers["x-l4-request-id"]

    with gateways.queue() as client:
        handle = client.get(left())
        until(lambda: handle.status().state is RequestState.CANCELLED, "the request is cancelled")
        assert "went away" in (handle.status().error or "")
        for headers in ({"x-l4-background": "true"}, {"idempotency-key": "left"}):
            result = client.get(left(**headers)).result(timeout=300)
            assert result.output_tokens == 400


async def test_a_client_that_waits_for_the_whole_cancels_too(gateways: Gateways) -> None:
    """When it goes away before the answer begins."""
    async with AsyncClient(settings=gateways.settings) as client:

        async def count(name: str) -> int:
            return (await client.overview()).counts.get(name, 0)

        async def above(name: str, number: int) -> bool:
            return await count(name) > number

        submitted, cancelled = await count("submitted"), await count("cancelled")
        async with httpx.AsyncClient(timeout=300) as http:
            url = f"{gateways.url()}/v1/completions"
            asking = asyncio.create_task(http.post(url, json={**LONG, "stream": False, "max_tokens": 1500}))
            await until_async(lambda: above("submitted", submitted))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await until_async(lambda: above("cancelled", cancelled))


def test_a_key_is_one_request(gateways: Gateways) -> None:
    """The same body gets the same answer; another one is a conflict."""
    body = {"model": MODEL, "prompt": "a", "max_tokens": 5, "n": 2, "seed": 3}
    first, again = (post(gateways, "/v1/completions", body, idempotency_key="one") for _ in range(2))
    assert first.json()["choices"] == again.json()["choices"]
    assert first.headers["x-l4-request-id"] == again.headers["x-l4-request-id"]
    assert len(set(first.headers["x-l4-request-id"].split(","))) == 2
    other = post(gateways, "/v1/completions", {**body, "max_tokens": 6}, idempotency_key="one")
    assert other.status_code == 409


def test_a_left_out_length_is_what_fits(gateways: Gateways) -> None:
    """The dispatcher decides it, so that admission does not count all of it."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{gateways.url()}/v1/chat/completions", json=body, timeout=300) as answer:
        next(answer.iter_raw())
        with gateways.queue() as client:
            record = client.get(answer.headers["x-l4-request-id"]).status()
    assert record.max_tokens == 2048 - (record.prompt_tokens or 0)


def test_keys_and_metrics(gateways: Gateways) -> None:
    """Where a key is set nobody comes in without; answers and tokens are counted by caller."""
    url = gateways.url("gateway-1")
    assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 401
    with gateways.openai("gateway-1", api_key=KEY) as client:
        client.completions.create(model=MODEL, prompt="a", max_tokens=3)
    text = httpx.get(f"{url}/metrics", timeout=60).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    found = {(s.name, s.labels.get("status"), s.labels.get("caller")): s.value for s in samples}
    assert found["l4queue_http_requests_total", "200", "default"] == 1
    assert found["l4queue_http_output_tokens_total", None, "default"] == 3
    names = {f.name + "_total" if f.type == "counter" else f.name for f in text_string_to_metric_families(text)}
    manual = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text("utf-8")
    served = {name for name in names if name.startswith("l4queue_") and not name.endswith("_created")}
    assert served == set(re.findall(r"^\| `(l4queue_http_\w+)`", manual, re.M))
    assert httpx.post(f"{gateways.url()}/v1/load_lora_adapter", json={}, timeout=60).status_code == 404


def test_a_key_has_limits(gateways: Gateways) -> None:
    """Of requests, tokens and backlog, in OpenAI's headers and errors; what is not used is given back."""
    asked: dict[str, Any] = {"model": MODEL, "prompt": [5, 6], "ignore_eos": True}
    url, known = f"{gateways.url('gateway-1')}/v1/completions", {"authorization": f"Bearer {ANN}"}

    def post_as_ann(**more: Any) -> httpx.Response:
        return httpx.post(url, json={**asked, **more}, headers=known, timeout=300)

    def charged() -> int:
        return int(redis.hget(keys.charged("ann"), "*") or 0)

    keys, redis = Keys(gateways.settings.namespace), Redis.from_url(gateways.settings.redis_url)
    first = post_as_ann(prompt=[[5, 6], [7, 8]], max_tokens=98, n=2, temperature=1.0)
    told = {name: value for name, value in first.headers.items() if name.startswith("x-ratelimit")}
    assert first.status_code == 200
    assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-limit-tokens"]) == ("4", "1000")
    assert told["x-ratelimit-remaining-requests"] == "3"
    assert 600 <= int(told["x-ratelimit-remaining-tokens"]) < 900
    assert told["x-ratelimit-reset-requests"].endswith(("s", "ms"))
    until(lambda: charged() == 0, "all is settled")

    redis.hset(keys.limit("ann"), "tokens", 10**7)  # another gateway took many
    with gateways.openai("gateway-1", api_key=ANN) as client:
        for is_stream in (False, True):
            with pytest.raises(openai.RateLimitError) as full:
                client.completions.create(model=MODEL, prompt="a", max_tokens=9, stream=is_stream)
            assert (full.value.code, full.value.type) == ("rate_limit_exceeded", "tokens")
            assert int(full.value.response.headers["retry-after"]) > 60
    redis.delete(keys.limit("ann"))
    with gateways.queue() as queue:
        waiting = queue.enqueue_many(["a"] * 30, max_tokens=1000, ignore_eos=True)
        redis.hset(keys.charged("ann"), mapping={waiting[-1].id: "502 1", "*": 502})  # by a gateway that has died
        backlogged = post_as_ann(max_tokens=99)
        assert (backlogged.status_code, backlogged.json()["error"]["type"]) == (429, "backlog")
        for handle in waiting:
            handle.cancel()
    assert post_as_ann(max_tokens=99).status_code == 200
    until(lambda: charged() == 0, "it is settled")
    redis.hset(keys.limit("ann"), mapping={"tokens": 0, "requests": 10**5})
    assert post_as_ann(max_tokens=1).json()["error"]["type"] == "requests"
    assert {("ann", limit) for limit in ("requests", "tokens", "backlog")} <= refusals(gateways)


def test_keys_expire_and_come_without_a_restart(gateways: Gateways) -> None:
    """A wrong file changes nothing."""
    assert httpx.get(f"{gateways.url('gateway-1')}/v1/models", timeout=60).status_code == 401
    models = f"{gateways.url('gateway-1')}/v1/models"
    known = {"authorization": f"Bearer {BOB}"}
    assert httpx.get(models, headers=known, timeout=60).status_code == 401
    write_keys(gateways.processes.folder, f"carol {BOB}")
    assert httpx.get(models, headers=known, timeout=60).status_code == 401  # that is no right file
    write_keys(gateways.processes.folder, "carol carol-has-one-as-well")
    known = {"authorization": "Bearer carol-has-one-as-well"}
    assert httpx.get(models, headers=known, timeout=60).status_code == 200
    assert ("", "key") in refusals(gateways)


async def test_64_streams_survive_a_worker_and_a_gateway(gateways: Gateways) -> None:
    """SIGKILL of both in their middle: who comes back, with the last event's id, has the uncut answer."""
    asked, names = stream_bodies(64, max_tokens=150), ("gateway-0", "gateway-1")

    def kill() -> None:
        for name in ("gateway-1", "worker-0"):
            gateways.processes.stop(name, signal.SIGKILL)

    uncut = await follow(gateways, asked, names=names)
    streams = await follow(gateways, asked, names=names, midway=kill)
    for found, wanted in zip(streams, uncut, strict=True):
        answer = answer_of_events(found.events)
        assert answer == answer_of_events(wanted.events), found
        assert set(answer[1].values()) == {1}, found
        assert len({event.event_id for event in found.events}) == len(found.events)
    assert any(one.num_returns for one in streams)
    with gateways.queue() as client:
        assert any(client.get(one.request_id).result().resumed for one in streams)
    gateways.processes.worker("worker-0")
    await_workers(gateways, 2)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (COMPLETIONS, {"prompt": "a"}),
        (COMPLETIONS, {"prompt": "a", "n": 2}),
        (COMPLETIONS, {"prompt": ["a", "b", "c"], "n": 2}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 2}),
    ],
)
def test_a_client_comes_back_at_any_event(gateways: Gateways, path: str, asked: dict[str, Any]) -> None:
    """From each event of a finished stream on, the rest is what the first client got."""
    common = {"model": MODEL, "max_tokens": 12, "seed": 5, "stream": True, "ignore_eos": True}
    body = {**common, "stream_options": {"include_usage": True}, **asked}
    url = f"{gateways.url()}{path}"
    with httpx.stream("POST", url, json=body, timeout=300) as answer:
        assert {line.partition(":")[0] for line in answer.iter_lines()} == {"", "data"}  # who reads no more
    with httpx.stream("POST", url, json=body, headers={"x-l4-event-ids": "true"}, timeout=300) as answer:
        uncut = list(events(answer.iter_lines()))
    assert len({event.event_id for event in uncut}) == len(uncut)
    for number, event in enumerate(uncut[:-1], start=1):
        headers = {"last-event-id": event.event_id}
        with httpx.stream("POST", url, json=body, headers=headers, timeout=300) as answer:
            rest = list(events(answer.iter_lines()))
        assert answer_of_events(uncut[:number] + rest) == answer_of_events(uncut), event
        assert rest[-1] == uncut[-1]
        for again in rest[:-1]:
            assert again.event_id not in {known.event_id for known in uncut[:number]}


def test_without_workers_or_redis_it_says_so(gateways: Gateways) -> None:
    """503, to be tried again, at once; its health says the same; then it serves as before."""
    for number in range(2):
        gateways.processes.stop(f"worker-{number}")
    until(lambda: httpx.get(f"{gateways.url()}/health", timeout=60).status_code == 503, "it is not well")
    answer = post(gateways, "/v1/completions", LONG)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert "no worker serves" in json.loads(answer.text)["error"]["message"]
    gateways.processes.worker("worker-0")
    await_workers(gateways, 1)
    until(lambda: httpx.get(f"{gateways.url()}/health", timeout=60).status_code == 200, "it is well")
    assert post(gateways, "/v1/completions", {**LONG, "max_tokens": 2}).status_code == 200


def test_a_batch_survives_its_gateway(gateways: Gateways) -> None:
    """SIGKILL of the gateway that runs it: the other one goes on, and each line is answered once, as ever."""
    gateways.start("gateway-2")
    gateways.answers("gateway-2")
    names = ("gateway-0", "gateway-2")
    lines = batch_lines(300, max_tokens=100)
    whole = ended(gateways, names[0], begin(gateways, names[0], lines))
    wanted = answers_of(gateways, names[0], whole)
    batch = begin(gateways, names[0], lines)
    killed = kill_its_gateway(gateways, names, batch, num_completed=20)
    left = next(name for name in names if name != killed)
    last = ended(gateways, left, batch)
    assert last.status == whole.status == "completed"
    assert last.request_counts is not None
    assert last.request_counts.to_dict() == {"total": 300, "completed": 299, "failed": 1}
    assert answers_of(gateways, left, last) == wanted
