"""Files and batches of the gateway through OpenAI's client: objects, errors, ends, owners, stores."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Batch, FileDeleted, FileObject

from gateway.batches.parts import OUTPUT, BatchLease, LeaseLost, PartedAnswers
from gateway.batches.store import FileStore
from l4queue.protocol.batch_records import BatchCalls, BatchRecord
from l4queue.protocol.calls import Verdict
from l4queue.protocol.executor import Executor
from l4queue.protocol.keys import Keys
from tests.services.batch_gateway import BatchGateway, chat_lines, open_gateway
from tests.services.batches import Files, run, submitted
from tests.services.pipeline import Pipeline, true, until
from tests.services.processes import until as until_seen

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
CHAT = "/v1/chat/completions"


@pytest.fixture
async def gateway(pipeline: Pipeline, tmp_path: Path) -> AsyncIterator[BatchGateway]:
    """One with a directory and no keys."""
    async with open_gateway(pipeline, str(tmp_path / "store")) as opened:
        yield opened


@pytest.mark.parametrize("kind", ["directory", "file", "memory"])
async def test_a_batch_answers_every_line_once(
    pipeline: Pipeline, files: Files, tmp_path: Path, kind: str
) -> None:
    """As `enqueue --jsonl` does; a line with a bad body is in the error file. Objects are OpenAI's."""
    store = {"directory": str(tmp_path / "s"), "file": f"file://{tmp_path}/s", "memory": f"memory://{tmp_path}"}
    bad = chat_lines(1, n=2).replace(b'"c0"', b'"bad"')
    pipeline.start("w0")
    async with open_gateway(pipeline, store[kind]) as gateway:
        batch = await gateway.begin(chat_lines(60) + b"\n" + bad, metadata={"of": "us"})
        assert (batch.status, batch.metadata) == ("validating", {"of": "us"})
        ended = await gateway.ended(batch)
        raw = (await gateway.http.get(f"/v1/batches/{batch.id}")).json()
        Batch.model_validate(raw, strict=True)
        assert ended.request_counts is not None
        assert ended.request_counts.to_dict() == {"total": 61, "completed": 60, "failed": 1}
        times = (ended.created_at, ended.in_progress_at, ended.finalizing_at, ended.completed_at)
        assert ended.status == "completed"
        assert list(times) == sorted(time for time in times if time is not None)
        assert (ended.expires_at or 0) - ended.created_at == 86_400
        output, (error,) = await gateway.answers(ended.output_file_id), await gateway.answers(ended.error_file_id)
        assert (error["custom_id"], error["response"]["status_code"]) == ("bad", 400)
        assert ended.output_file_id is not None
        told = await gateway.client.files.retrieve(ended.output_file_id)
        assert (told.purpose, told.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    files.lines.write_bytes(chat_lines(60))
    await run(pipeline, files)
    assert {a["custom_id"]: facts(a) for a in output} == {a["custom_id"]: facts(a) for a in files.answers()}
    assert len(output) == 60


def facts(answer: dict[str, Any]) -> Any:
    """Of an answer what does not change from run to run."""
    body = answer["response"]["body"]
    return answer["response"]["status_code"], body["object"], body["choices"], body["usage"]


async def test_files_are_kept_listed_and_deleted(gateway: BatchGateway) -> None:
    """In OpenAI's shapes, newest first, page by page."""
    client = gateway.client
    made = [await client.files.create(file=(f"{i}.jsonl", b"x" * i), purpose="batch") for i in range(1, 6)]
    raw = (await gateway.http.get("/v1/files", params={"limit": 2})).json()
    assert [FileObject.model_validate(f, strict=True).id for f in raw["data"]] == [made[4].id, made[3].id]
    assert (raw["object"], raw["has_more"], raw["last_id"]) == ("list", True, made[3].id)
    assert [f.id async for f in client.files.list(limit=2)] == [f.id for f in reversed(made)]
    assert [f.id async for f in client.files.list(limit=2, order="asc", purpose="batch")] == [f.id for f in made]
    assert [f.id async for f in client.files.list(purpose="vision")] == []
    found = await client.files.retrieve(made[2].id)
    assert (found.bytes, found.filename, found.purpose) == (3, "3.jsonl", "batch")
    assert (await client.files.content(made[2].id)).content == b"xxx"
    gone = (await gateway.http.delete(f"/v1/files/{made[2].id}")).json()
    assert FileDeleted.model_validate(gone, strict=True).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            await call(made[2].id)
    assert len([f async for f in client.files.list()]) == 4


MISTAKES: list[tuple[bytes, str, int | None]] = [
    (b"", "empty_file", None),
    (b"\n\n", "empty_file", None),
    (chat_lines(1) + b"nonsense\n", "invalid_json_line", 2),
    (chat_lines(1) * 2, "duplicate_custom_id", 2),
    (chat_lines(1).replace(b"custom_id", b"id"), "missing_required_parameter", 1),
    (chat_lines(1).replace(b'"method": "POST", ', b""), "missing_required_parameter", 1),
    (chat_lines(1).replace(b"POST", b"GET"), "invalid_method", 1),
    (chat_lines(1).replace(b"chat/completions", b"embeddings"), "invalid_url", 1),
]


async def test_a_mistake_in_the_input_fails_the_batch(gateway: BatchGateway, pipeline: Pipeline) -> None:
    """Before anything is computed; the errors say where."""
    begun = [await gateway.begin(lines) for lines, _, _ in MISTAKES]
    for batch, (_, code, line) in zip(begun, MISTAKES, strict=True):
        ended = await gateway.ended(batch)
        assert (ended.status, ended.output_file_id, ended.error_file_id) == ("failed", None, None)
        assert ended.failed_at is not None
        assert ended.errors is not None
        assert [(error.code, error.line) for error in ended.errors.data or ()] == [(code, line)]
    assert await submitted(pipeline) == 0


async def test_a_bad_batch_is_refused(gateway: BatchGateway) -> None:
    """With the field at fault."""
    file = await gateway.client.files.create(file=b"x", purpose="batch")
    changes: dict[str, dict[str, Any]] = {
        "endpoint": {"endpoint": "/v1/embeddings"},
        "completion_window": {"completion_window": "8d"},
        "input_file_id": {"input_file_id": "file-nope"},
        "metadata.k": {"metadata": {"k": 1}},
        "extra": {"extra": 1},
    }
    for field, change in changes.items():
        body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **change}
        answer = await gateway.http.post("/v1/batches", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


async def test_an_upload_is_checked(pipeline: Pipeline, tmp_path: Path) -> None:
    """Too large is 413, with and without a length told before; another purpose is 400."""
    async with open_gateway(pipeline, str(tmp_path), http_file_max_bytes=1000) as gateway:
        files = gateway.client.files
        assert (await files.create(file=b"x" * 1000, purpose="batch")).bytes == 1000
        for size in (1001, 2_000_000):
            with pytest.raises(openai.APIStatusError) as large:
                await files.create(file=b"x" * size, purpose="batch")
            assert large.value.status_code == 413

        async def endless() -> Any:
            yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
            for _ in range(100):
                yield b"x" * 1000
            yield b"\r\n--b--\r\n"

        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = await gateway.http.post("/v1/files", content=endless(), headers=headers)
        assert answer.status_code == 413
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await files.create(file=b"x", purpose="vision")
        answer = await gateway.http.post("/v1/files", data={"purpose": "batch"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")


async def test_a_cancelled_batch_keeps_what_is_done(gateway: BatchGateway, pipeline: Pipeline) -> None:
    """The rest is in the error file, and nothing of it runs on."""
    pipeline.start("w0", speed=1.0)
    batch = await gateway.begin(chat_lines(400, max_tokens=20))

    async def has_some() -> bool:
        counts = (await gateway.client.batches.retrieve(batch.id)).request_counts
        return counts is not None and counts.completed > 0

    await until(has_some)
    cancelling = await gateway.client.batches.cancel(batch.id)
    assert (cancelling.status, cancelling.cancelling_at is None) == ("cancelling", False)
    ended = await gateway.ended(batch)
    assert ended.status == "cancelled"
    assert ended.request_counts is not None
    done, failed = ended.request_counts.completed, ended.request_counts.failed
    assert done > 0
    assert failed > 0
    output, errors = await gateway.answers(ended.output_file_id), await gateway.answers(ended.error_file_id)
    assert {e["error"]["code"] for e in errors} == {"batch_cancelled"}
    assert sorted(a["custom_id"] for a in output + errors) == sorted(f"c{i}" for i in range(400))
    assert (len(output), len(errors)) == (done, failed)
    assert (await pipeline.client.overview()).counts["live"] == 0
    with pytest.raises(openai.ConflictError):
        await gateway.client.batches.cancel(batch.id)


async def test_a_window_that_has_passed_keeps_what_is_done(gateway: BatchGateway, pipeline: Pipeline) -> None:
    """No worker serves some of the lines in time."""
    pipeline.start("w0")
    first = await gateway.begin(chat_lines(3), completion_window="1h")
    await gateway.ended(first)
    await pipeline.stop("w0")
    ended = await gateway.ended(await gateway.begin(chat_lines(30), completion_window="1s"))
    assert (ended.status, ended.output_file_id) == ("expired", None)
    errors = await gateway.answers(ended.error_file_id)
    assert {e["error"]["code"] for e in errors} == {"batch_expired"}
    assert len({e["custom_id"] for e in errors}) == len(errors) == 30
    assert (await pipeline.client.overview()).counts["live"] == 0


async def test_batches_are_listed_page_by_page(gateway: BatchGateway) -> None:
    """Newest first."""
    made = [await gateway.begin(b"") for _ in range(5)]
    for batch in made:
        await gateway.ended(batch)
    page = await gateway.client.batches.list(limit=2)
    assert [b.id for b in page.data] == [made[4].id, made[3].id]
    assert [b.id async for b in gateway.client.batches.list(limit=2)] == [b.id for b in reversed(made)]
    assert [b.id async for b in gateway.client.batches.list(after=made[1].id)] == [made[0].id]
    with pytest.raises(openai.BadRequestError, match="after"):
        await gateway.client.batches.list(after="batch_nope")
    with pytest.raises(openai.NotFoundError):
        await gateway.client.batches.retrieve("batch_nope")
    samples = {
        (s.name, s.labels.get("state")): s.value for family in gateway.registry.collect() for s in family.samples
    }
    assert samples["l4queue_http_batches_ended_total", "failed"] == 5
    assert samples["l4queue_http_batches", "in_progress"] == 0


async def test_a_key_sees_what_is_its_own(pipeline: Pipeline, tmp_path: Path) -> None:
    """Files and batches of another one do not exist for it."""
    ann, bobs = "the-key-of-ann-16", "the-key-of-bob-16"
    (tmp_path / "keys").write_text(f"ann {ann}\nbob {bobs}\n")
    pipeline.start("w0")
    async with open_gateway(
        pipeline, str(tmp_path / "store"), key=ann, keys_file=str(tmp_path / "keys")
    ) as gateway:
        bob = gateway.client_of(bobs)
        batch = await gateway.ended(await gateway.begin(chat_lines(2)))
        assert batch.output_file_id is not None
        assert [f async for f in bob.files.list()] == [b async for b in bob.batches.list()] == []
        for file_id in (batch.input_file_id, batch.output_file_id):
            for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
                with pytest.raises(openai.NotFoundError):
                    await call(file_id)
        for look in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await look(batch.id)
        with pytest.raises(openai.BadRequestError, match="input_file_id"):
            await bob.batches.create(
                input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"
            )
        with pytest.raises(openai.AuthenticationError):
            await gateway.client_of("another").files.list()
        assert len([f async for f in gateway.client.files.list()]) == 2


async def test_another_store_is_left_to_its_own_gateways(
    gateway: BatchGateway, pipeline: Pipeline, tmp_path: Path
) -> None:
    """A gateway that lacks the files runs no batch of them, and says so."""
    pipeline.start("w0")
    file = await gateway.client.files.create(file=chat_lines(1), purpose="batch")
    async with open_gateway(pipeline, str(tmp_path / "other")) as other:
        assert (await other.client.files.retrieve(file.id)).id == file.id
        with pytest.raises(openai.InternalServerError, match="L4_HTTP_FILES"):
            await other.client.files.content(file.id)
        with pytest.raises(openai.InternalServerError, match="L4_HTTP_FILES"):
            await other.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


async def test_an_input_in_use_is_not_deleted_and_old_files_go(pipeline: Pipeline, tmp_path: Path) -> None:
    """Once they have expired, from the store and from Redis."""
    async with open_gateway(pipeline, str(tmp_path), http_files_ttl_s=1.0) as gateway:
        batch = await gateway.begin(chat_lines(1), completion_window="3s")
        with pytest.raises(openai.ConflictError):
            await gateway.client.files.delete(batch.input_file_id)
        await until(lambda: true(not any((tmp_path / "files").iterdir())))
        assert [f async for f in gateway.client.files.list()] == []
        with pytest.raises(openai.NotFoundError):
            await gateway.client.batches.retrieve(batch.id)


async def test_a_gateway_that_is_stopped_gives_its_batches_back(pipeline: Pipeline, tmp_path: Path) -> None:
    """The next one goes on at once, and computes nothing twice."""
    pipeline.start("w0", speed=1.0)
    async with open_gateway(pipeline, str(tmp_path)) as first:
        batch = await first.begin(chat_lines(200, max_tokens=20))

        async def has_some() -> bool:
            counts = (await first.client.batches.retrieve(batch.id)).request_counts
            return counts is not None and counts.completed > 0

        await until(has_some)
    async with open_gateway(pipeline, str(tmp_path)) as second:
        ended = await second.ended(batch)
        answers = await second.answers(ended.output_file_id)
    assert ended.status == "completed"
    assert sorted(a["custom_id"] for a in answers) == sorted(f"c{i}" for i in range(200))
    assert await submitted(pipeline) == 200
    assert not any((tmp_path / "batches").iterdir())


def test_a_gateway_that_lost_its_lease_adds_nothing(redis_url: str, namespace: str, tmp_path: Path) -> None:
    """It comes back from a pause and writes: what it wrote is not read, and it hears of it."""
    store, executor, calls = FileStore(str(tmp_path)), Executor(redis_url), BatchCalls(Keys(namespace))
    record = BatchRecord(
        batch_id="batch_1",
        owner="",
        store=store.store_id,
        input_file_id="file-1",
        endpoint=CHAT,
        completion_window="24h",
        created_ms=1,
        expires_ms=2,
        output_ttl_s=3,
    )
    executor.run_many(calls.begin(record))

    def held(token: str) -> PartedAnswers:
        executor.run(calls.hold("batch_1", token=token, lease_ms=1))
        parts = executor.run(calls.parts("batch_1"))
        lease = BatchLease(record=record, token=token, executor=executor, calls=calls)
        return PartedAnswers(OUTPUT, parts, lease=lease, store=store)

    first = held("a")
    first.append(b"1\n")
    first.sync()
    first.append(b"2\n")
    until_seen(
        lambda: executor.run(calls.hold("batch_1", token="b", lease_ms=60_000))[0] is Verdict.OK, "b has it"
    )
    with pytest.raises(LeaseLost):
        first.sync()
    second = held("b")
    second.append(b"3\n")
    second.sync()
    assert list(held("b").lines()) == [b"1\n", b"3\n"]
    executor.close()
