"""Bodies of a batch as OpenAI's clients write them, and the model that they ask for, through a real pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from l4queue.models import RequestBody
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.parsing import load_from_json
from l4queue.protocol.reads import Reads
from tests.services.batches import Files, run, stopped_when, submitted
from tests.services.pipeline import Pipeline, until

pytestmark = [pytest.mark.services]
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
IGNORED = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k"}


def write(path: Path, bodies: dict[str, dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps({"custom_id": c, "body": b}) + "\n" for c, b in bodies.items()))


async def publishes(pipeline: Pipeline) -> bool:
    """Whether a worker says what it serves."""
    return any(load.models == ("tiny",) for load in (await pipeline.client.overview()).workers)


async def test_a_model_that_is_not_served_is_the_error_of_its_line(pipeline: Pipeline, files: Files) -> None:
    """Nothing is computed for it; with `any_model` it is, and the answer says which model it was."""
    pipeline.start("w0")
    await until(lambda: publishes(pipeline))
    write(files.lines, {"right": {**CHAT, "model": "tiny"}, "wrong": {**CHAT, "model": "gpt-4o"}, "none": CHAT})
    summary = await run(pipeline, files)

    assert (summary.num_succeeded, summary.num_failed, await submitted(pipeline)) == (2, 1, 2)
    (failure,) = files.failures()
    error = failure["response"]["body"]["error"]
    assert (failure["custom_id"], failure["response"]["status_code"], error["code"], error["param"]) == (
        "wrong", 404, "model_not_found", "model",
    )  # fmt: skip
    assert error["message"].startswith("gpt-4o is not served; tiny is.")

    files.errors.unlink()
    relaxed = await run(pipeline, files, any_model=True)
    assert (relaxed.num_succeeded, relaxed.num_failed, relaxed.num_earlier) == (3, 0, 2)
    assert {answer["response"]["body"]["model"] for answer in files.answers()} == {"tiny"}


async def test_workers_that_publish_no_model_serve_any(
    pipeline: Pipeline, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of an earlier release: the answer repeats what was asked for."""
    worker = pipeline.start("w0")
    monkeypatch.setattr(worker._report, "_models", ())
    await until(lambda: _is_seen(pipeline))
    write(files.lines, {"a": {**CHAT, "model": "gpt-4o"}})
    assert (await run(pipeline, files)).num_succeeded == 1
    assert files.answers()[0]["response"]["body"]["model"] == "gpt-4o"


async def _is_seen(pipeline: Pipeline) -> bool:
    return bool((await pipeline.client.overview()).workers)


async def test_usual_bodies_get_answers_that_the_openai_package_reads(pipeline: Pipeline, files: Files) -> None:
    """With every field that asks for nothing; tokens and latencies are in the summary, a pace in the progress."""
    pipeline.start("w0")
    usual = {
        "ignored": IGNORED,
        "stop text": {"stop": "\n"},
        "stop list": {"stop": ["\n", "END"]},
        "n": {"n": 1, "parallel_tool_calls": True, "tools": [], "stream": False},
        "completion tokens": {"max_tokens": None, "max_completion_tokens": 2},
        "bias": {"logit_bias": {"50": -100}},
        "text": {"response_format": {"type": "text"}},
        "logprobs": {"logprobs": False, "top_logprobs": None},
    }
    bodies = {name: {**CHAT, "model": "tiny", **more} for name, more in usual.items()}
    bodies["completion"] = {
        "prompt": "x",
        "model": "tiny",
        "max_tokens": 2,
        "echo": False,
        "best_of": 1,
        **IGNORED,
    }
    write(files.lines, bodies)
    paces = []
    summary = await run(pipeline, files, progress=lambda p: paces.append((p.lines_per_s, p.left_s)))

    assert (summary.num_succeeded, summary.num_failed) == (9, 0), files.failures()
    assert (summary.output_tokens, summary.prompt_tokens > 9) == (18, True)
    assert summary.ttft_p50_s is not None
    assert summary.e2e_p50_s is not None
    assert summary.e2e_p99_s is not None
    assert 0 <= summary.ttft_p50_s <= summary.e2e_p50_s <= summary.e2e_p99_s <= summary.wall_s
    assert paces[-1][0] > 0
    assert paces[-1][1] == 0
    for answer in files.answers():
        body = answer["response"]["body"]
        if answer["custom_id"] == "completion":
            assert Completion.model_validate(body, strict=True).choices[0].logprobs is None
            continue
        message = ChatCompletion.model_validate(body, strict=True).choices[0].message
        assert message.refusal is None
        assert "refusal" in body["choices"][0]["message"]
    again = await run(pipeline, files)
    assert (again.num_earlier, again.e2e_p50_s, again.ttft_p99_s) == (9, None, None)


async def test_formats_and_logprobs_reach_the_worker(pipeline: Pipeline, files: Files) -> None:
    """As constraint and number in the stored request; an emulated engine has neither. Errors name the fields."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    bodies = {
        "schema": {**CHAT, "response_format": wanted},
        "object": {**CHAT, "response_format": {"type": "json_object"}},
        "chat": {**CHAT, "logprobs": True, "top_logprobs": 2},
        "text": {"prompt": "x", "max_tokens": 2, "logprobs": 3},
    }
    write(files.lines, bodies)
    keys = Keys(pipeline.settings.namespace)
    async with stopped_when(pipeline, files, 4):
        stored = await _bodies(pipeline.executor, keys)
    constraints = [p.structured_outputs.json_schema for p in stored if p.structured_outputs is not None]
    assert sorted(map(json.dumps, constraints)) == sorted([json.dumps(schema), '{"type": "object"}'])
    assert sorted(p.logprobs for p in stored if p.logprobs is not None) == [2, 3]

    pipeline.start("w0")
    bodies["long"] = {**CHAT, "max_tokens": None, "max_completion_tokens": 4000}
    bodies["bad"] = {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "\0"}}}}
    write(files.lines, bodies)
    assert (await run(pipeline, files)).num_failed == 6
    params = {f["custom_id"]: f["response"]["body"]["error"]["param"] for f in files.failures()}
    written = dict.fromkeys(("schema", "object", "bad"), "response_format")
    assert params == {**written, "chat": "logprobs", "text": "logprobs", "long": "max_completion_tokens"}


async def _bodies(executor: AsyncExecutor, keys: Keys) -> list[Any]:
    from l4queue.protocol.calls import Call

    names = await executor.run(Call(None, (), ("KEYS", f"{keys.prefix}req:*"), list))
    records = await executor.run_many([Reads(keys).record(name.decode().rpartition(":")[2]) for name in names])
    return [RequestBody.stored(json.dumps(record.body_fields)).params for record in records if record is not None]


def test_a_worker_of_a_later_release_may_say_more() -> None:
    """Names that are no texts leave the worker out, as any fact that cannot be read."""
    told = {"load": {"worker_id": "w"}, "more": {"models": ["a", "b"], "model_cards": {}}}
    assert load_from_json(told).models == ("a", "b")
