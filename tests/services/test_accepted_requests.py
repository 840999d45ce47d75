"""Whatever a client accepts is served over a real Redis: read by a dispatcher and a worker, answered, repeated."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l4queue.errors import InvalidRequest, RequestFailed, UnknownRequest
from tests.property.requests import BODIES, JSON, TEXTS, shuffled
from tests.services.pipeline import Pipeline, open_pipeline

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]
LIKELY = st.builds(
    lambda text, metadata, stop: {"prompt": text, "metadata": metadata, "stop": stop, "max_tokens": 2},
    TEXTS,
    st.none() | st.dictionaries(TEXTS, JSON, max_size=4),
    st.lists(TEXTS, max_size=2),
)


async def _serve(pipeline: Pipeline, bodies: list[dict[str, Any]], name: str) -> None:
    accepted, fields = [], {"?"}
    for number, body in enumerate(bodies):
        keyed = {**body, "idempotency_key": f"{name}-{number}", "deadline_s": None}
        try:
            handle = await pipeline.client.enqueue(**keyed)
        except InvalidRequest as refusal:
            fields.add(refusal.field)
            continue
        again = await pipeline.client.enqueue(**{name: shuffled(value) for name, value in keyed.items()})
        assert again.id == handle.id
        accepted.append((handle, body))
    assert all(fields)
    failed: set[str | None] = set()
    for handle, body in accepted:
        try:
            result = await handle.result(timeout=60)
        except RequestFailed as failure:
            failed.add(failure.field)
        else:
            assert result.metadata == body.get("metadata")
    # what the emulated engine does not compute, or is too long for it
    assert failed <= {"structured_outputs", "logprobs", "max_tokens", "prompt"}


@settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
@given(bodies=st.lists(BODIES | LIKELY, min_size=10, max_size=40))
def test_what_is_accepted_is_answered_and_known_again(
    bodies: list[dict[str, Any]], redis_url: str, namespace: str
) -> None:
    """With its keys in another order it is the same request; its metadata come back as they were."""

    async def serve() -> None:
        async with open_pipeline(redis_url, namespace) as pipeline:
            pipeline.start("w0")
            await _serve(pipeline, bodies, name=uuid4().hex)

    asyncio.run(serve())


@pytest.mark.parametrize("request_id", ["\ud800", "", "x" * 10_000, "\0", 5])
async def test_an_id_that_never_was_one_is_unknown(redis_url: str, namespace: str, request_id: Any) -> None:
    """And the error can be printed."""
    async with open_pipeline(redis_url, namespace) as pipeline:
        with pytest.raises(UnknownRequest) as caught:
            await pipeline.client.get(request_id)
        assert str(caught.value).encode()


@pytest.mark.parametrize("reason", ["\ud800", "x" * 1001, 5, None])
async def test_a_reason_that_cannot_be_kept_is_refused(redis_url: str, namespace: str, reason: Any) -> None:
    """The request goes on."""
    async with open_pipeline(redis_url, namespace) as pipeline:
        handle = await pipeline.client.enqueue("a")
        with pytest.raises(InvalidRequest) as caught:
            await handle.cancel(reason=reason)
        assert caught.value.field == "reason"
        assert await handle.cancel(reason="x" * 1000)


@pytest.mark.parametrize("timeout", [float("nan"), "soon", 1j])
async def test_a_timeout_that_is_no_time_is_refused(redis_url: str, namespace: str, timeout: Any) -> None:
    """A very long one is a long wait."""
    async with open_pipeline(redis_url, namespace) as pipeline:
        pipeline.start("w0")
        handle = await pipeline.client.enqueue("a", max_tokens=2)
        with pytest.raises(InvalidRequest) as caught:
            await handle.result(timeout=timeout)
        assert caught.value.field == "timeout"
        assert (await handle.result(timeout=10**400)).output_tokens == 2


@pytest.mark.parametrize("count", [-1, 2**63, 10**400, 1.5, True, "5"])
async def test_a_count_that_is_none_is_refused(redis_url: str, namespace: str, count: Any) -> None:
    """Of plans and of dead letters."""
    async with open_pipeline(redis_url, namespace) as pipeline:
        for read in (pipeline.client.plan_history, pipeline.client.dead_letters):
            with pytest.raises(InvalidRequest) as caught:
                await read(count=count)
            assert caught.value.field == "count"
            assert await read(count=1_000_000) == []


@pytest.mark.parametrize("after", [-1, 2**63, 10**5000, 1.5, True, "5"], ids=lambda after: str(type(after)))
async def test_an_offset_that_is_none_is_refused(redis_url: str, namespace: str, after: Any) -> None:
    """Where a stream is to be read on."""
    async with open_pipeline(redis_url, namespace) as pipeline:
        handle = await pipeline.client.enqueue("a", max_tokens=2)
        with pytest.raises(InvalidRequest) as caught:
            await anext(handle.stream(after=after))
        assert caught.value.field == "after"
