"""Batches through a real pipeline: answers, stops, crashes, lost results, back-pressure."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from l4queue import Client, Settings
from l4queue.client import BatchProgress
from l4queue.client.batch import flight
from l4queue.errors import InvalidRequest, ServiceUnavailable
from l4queue.protocol.calls import Call
from l4queue.protocol.keys import Keys
from l4queue.protocol.retention import Retention
from tests.protocol.server import RedisServer
from tests.services.batches import Files, has_submitted, run, stopped_when, submitted, write_lines
from tests.services.pipeline import Pipeline, open_pipeline, until
from tests.services.processes import Processes
from tests.services.processes import until as until_seen

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
L4QUEUE = Path(sys.executable).with_name("l4queue")


async def records(pipeline: Pipeline) -> int:
    """Records and outputs that Redis holds."""
    prefix = Keys(pipeline.settings.namespace).prefix
    keys = await pipeline.executor.run(Call(None, (), ("KEYS", f"{prefix}[or][eu][qt]:*"), list))
    return len(keys)


async def test_every_line_gets_its_answer_or_its_error_once(pipeline: Pipeline, files: Files) -> None:
    """In OpenAI's shapes, and a second call finds nothing to do. Collected answers leave Redis."""
    pipeline.start("w0")
    write_lines(files.lines, 600)
    with files.lines.open("a") as file:
        file.write(
            'nonsense\n\n{"custom_id": "c5", "body": {}}\n{"custom_id": "n", "body": {"prompt": "x", "n": 2}}\n'
        )
        file.write('{"custom_id": "long", "body": {"prompt": "x", "max_tokens": 4000}}')
    seen: list[BatchProgress] = []
    summary = await run(pipeline, files, progress=seen.append)

    assert (summary.num_lines, summary.num_succeeded, summary.num_failed) == (604, 600, 4)
    assert (summary.is_complete, summary.output_tokens, summary.num_in_flight) == (True, 1200, 0)
    assert seen[-1].num_finished == seen[-1].num_lines == 604
    assert Counter(a["custom_id"] for a in files.answers()) == Counter(f"c{i}" for i in range(600))
    assert all(a["response"]["body"]["usage"]["completion_tokens"] == 2 for a in files.answers())
    failures = {f["custom_id"]: f for f in files.failures()}
    assert (failures[None]["error"]["code"], failures[None]["error"]["line"]) == ("invalid_line", 601)
    assert (failures["c5"]["error"]["code"], failures["c5"]["error"]["line"]) == ("duplicate_custom_id", 603)
    assert failures["n"]["response"]["body"]["error"]["param"] == "n"
    assert failures["long"]["response"]["status_code"] == 400
    assert await records(pipeline) == 0

    before, again = (files.out.read_bytes(), files.errors.read_bytes()), await run(pipeline, files)
    assert (again.num_earlier, again.num_succeeded, again.is_complete) == (604, 600, True)
    assert (files.out.read_bytes(), files.errors.read_bytes()) == before
    assert await submitted(pipeline) == 601


async def test_a_stopped_batch_goes_on_where_it_was_and_pays_nothing_twice(
    pipeline: Pipeline, files: Files
) -> None:
    """What was in flight is collected by the next run, with what was torn repaired."""
    write_lines(files.lines, 500)
    async with stopped_when(pipeline, files, 200) as first:
        pass
    in_flight = (await first).num_in_flight
    assert not (await first).is_complete
    assert in_flight == await submitted(pipeline)
    with files.out.open("ab") as out:
        out.write(b'{"id": "batch_req_')
    pipeline.start("w0")
    summary = await run(pipeline, files)

    assert (summary.is_complete, summary.num_succeeded) == (True, 500)
    assert (summary.num_found, summary.num_recomputed) == (in_flight, 0)
    assert files.custom_ids() == Counter(f"c{i}" for i in range(500))
    assert await submitted(pipeline) == 500
    assert not files.out.with_name("out.jsonl.batch.json").exists()


async def test_a_batch_may_cancel_what_is_in_flight(pipeline: Pipeline, files: Files) -> None:
    """No error lines: the next run computes them."""
    write_lines(files.lines, 300)
    async with stopped_when(pipeline, files, 200, cancel_on_exit=True) as first:
        pass
    assert (await first).num_in_flight == 0
    assert (await pipeline.client.overview()).counts["live"] == 0
    pipeline.start("w0")
    summary = await run(pipeline, files)

    assert (summary.is_complete, summary.num_succeeded, summary.num_failed) == (True, 300, 0)


async def test_a_cancelled_task_stops_its_batch(pipeline: Pipeline, files: Files) -> None:
    """And the file is free at once."""
    write_lines(files.lines, 300)
    task = asyncio.create_task(run(pipeline, files))
    await until(lambda: has_submitted(pipeline))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    pipeline.start("w0")
    assert (await run(pipeline, files)).num_succeeded == 300


async def test_results_that_are_gone_are_computed_again_and_counted(
    pipeline: Pipeline, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two runs (their TTL has passed), and in the middle of one (Redis has lost them)."""
    monkeypatch.setattr(flight, "_LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(flight, "_LOOK_AFTER_S", 0.2)
    write_lines(files.lines, 100)
    async with stopped_when(pipeline, files, 100) as first:
        pass
    assert (await first).num_in_flight == 100
    await _lose_all(pipeline)
    async with stopped_when(pipeline, files, 100) as second:
        await _lose_all(pipeline)
        pipeline.start("w0")
        await until(lambda: _is_done(second), timeout_s=120)
    summary = await second

    assert (summary.is_complete, summary.num_succeeded, summary.num_recomputed) == (True, 100, 200)
    assert files.custom_ids() == Counter(f"c{i}" for i in range(100))


async def test_an_answer_without_its_output_is_computed_again(pipeline: Pipeline, files: Files) -> None:
    """Between two runs some lost their output, and kept their records: no line is answered with nothing."""
    write_lines(files.lines, 20)
    async with stopped_when(pipeline, files, 20) as first:
        pass
    assert (await first).num_in_flight == 20
    pipeline.start("w0")
    await until(lambda: _are_done(pipeline, 20))
    prefix = Keys(pipeline.settings.namespace).prefix
    outputs = sorted(await pipeline.executor.run(Call(None, (), ("KEYS", f"{prefix}out:*"), list)))
    await pipeline.executor.run(Call(None, (), ("DEL", *outputs[:5]), int))
    summary = await run(pipeline, files)

    assert (summary.is_complete, summary.num_succeeded, summary.num_recomputed) == (True, 20, 5)
    assert files.custom_ids() == Counter(f"c{i}" for i in range(20))
    assert await submitted(pipeline) == 25


async def _have_ended(pipeline: Pipeline, number: int) -> bool:
    return (await pipeline.client.overview()).counts.get("done", 0) >= number


async def test_results_that_went_early_are_computed_again(pipeline: Pipeline, files: Files) -> None:
    """Their keys are still known then: the batch frees them, since they stand for nothing that it could read."""
    write_lines(files.lines, 20)
    async with stopped_when(pipeline, files, 20) as first:
        pass
    assert (await first).num_in_flight == 20
    keeping = Retention(Keys(pipeline.settings.namespace))
    pipeline.start("w0")
    await until(lambda: _have_ended(pipeline, 20), timeout_s=300)
    await pipeline.executor.run(keeping.pack(min_age_ms=0, max_requests=100, max_entries=10**6))
    assert (await pipeline.executor.run(keeping.evict(max_bytes=1, limit=20))).num_dropped == 20

    summary = await run(pipeline, files)

    assert (summary.is_complete, summary.num_succeeded) == (True, 20)
    assert files.custom_ids() == Counter(f"c{i}" for i in range(20))


async def _are_done(pipeline: Pipeline, number: int) -> bool:
    return int((await pipeline.client.overview()).counts.get("done", 0)) == number


async def test_a_full_backlog_is_waited_for_and_half_of_it_is_left_to_others(
    redis_url: str, namespace: str, files: Files
) -> None:
    """Interactive requests are accepted while the batch has to wait."""
    write_lines(files.lines, 60, max_tokens=20, chats=False)
    notices: set[str] = set()
    async with open_pipeline(redis_url, namespace, max_backlog_tokens=800) as pipeline:
        async with stopped_when(pipeline, files, 10):
            assert (
                await submitted(pipeline) == 400 // 22
            )  # by the client's estimate: 7 bytes and 20 tokens to come
            await (await pipeline.client.enqueue("me", max_tokens=250)).cancel()
        pipeline.start("w0")
        summary = await run(pipeline, files, progress=lambda p: notices.add(p.notice.partition("; ")[2][:11]))
    assert (summary.is_complete, summary.num_succeeded) == (True, 60)
    assert "retry after" in notices


async def test_failed_lines_are_tried_again_without_their_errors(pipeline: Pipeline, files: Files) -> None:
    """Somebody cancelled two; deleting the error file is enough to have them computed."""
    write_lines(files.lines, 50)
    async with stopped_when(pipeline, files, 50):
        for name in await _some_ids(pipeline, 2):
            await (await pipeline.client.get(name)).cancel()
    pipeline.start("w0")
    assert (await run(pipeline, files)).num_failed == 2
    assert {f["error"]["code"] for f in files.failures()} == {"request_cancelled"}
    files.errors.unlink()
    summary = await run(pipeline, files)
    assert (summary.num_succeeded, summary.num_failed, summary.num_earlier) == (50, 0, 48)


def test_a_redis_that_never_answers_ends_it_soon(redis_server: RedisServer, files: Files) -> None:
    """A wrong password is no outage to be waited for; nothing is left but the same command."""
    write_lines(files.lines, 3)
    url = redis_server.url.replace("redis://", "redis://:wrong@")
    with Client(url) as client, pytest.raises(ServiceUnavailable):
        client.run_batch(files.lines, files.out)


async def test_two_clients_do_not_write_one_file(pipeline: Pipeline, files: Files) -> None:
    """The second is refused and harms nothing."""
    write_lines(files.lines, 300)
    async with stopped_when(pipeline, files, 200):
        with pytest.raises(InvalidRequest, match="another process"):
            await run(pipeline, files)
    pipeline.start("w0")
    assert (await run(pipeline, files)).num_succeeded == 300


async def test_an_input_that_grows_meanwhile_is_noticed(pipeline: Pipeline, files: Files) -> None:
    """The next run takes it as it is then."""
    write_lines(files.lines, 3000)
    growing = asyncio.create_task(run(pipeline, files, max_in_flight=200))
    await until(lambda: has_submitted(pipeline))
    with files.lines.open("a") as lines:
        lines.write('{"custom_id": "late", "body": {"prompt": "x"}}\n')
    pipeline.start("w0")
    with pytest.raises(InvalidRequest, match="has changed"):
        await growing
    assert (await run(pipeline, files)).num_succeeded == 3001


async def _is_done(task: asyncio.Task[Any]) -> bool:
    return task.done()


async def _some_ids(pipeline: Pipeline, number: int) -> list[str]:
    prefix = Keys(pipeline.settings.namespace).prefix
    keys = await pipeline.executor.run(Call(None, (), ("KEYS", f"{prefix}req:*"), list))
    return [key.decode().rpartition(":")[2] for key in keys[:number]]


async def _lose_all(pipeline: Pipeline) -> None:
    """What the server forgets when it loses its data."""
    prefix = Keys(pipeline.settings.namespace).prefix
    for kind in ("req:*", "out:*", "q:*", "in", "mail:*", "counts"):
        keys = await pipeline.executor.run(Call(None, (), ("KEYS", prefix + kind), list))
        if keys and kind != "in":
            await pipeline.executor.run(Call(None, (), ("DEL", *keys), int))


class Deployment:
    """Redis, dispatcher and a worker as processes, and the command as a user starts it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.files = Files(folder)
        self.folder = folder
        settings: dict[str, Any] = {"redis_url": url, "engine": "emulated", "emulated_speed": 0, "model": "tiny"}
        self.settings = Settings(**settings)
        self.processes = Processes(folder, lease_s=1.0, **settings)
        self.processes.start("dispatcher", "-m", "dispatcher")
        self.processes.worker("w0")
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("L4_")}
        self._environment |= {"L4_REDIS_URL": url}

    def command(self, *options: str) -> subprocess.Popen[str]:
        """`l4queue enqueue --jsonl in.jsonl --out out.jsonl`."""
        return subprocess.Popen(
            [str(L4QUEUE), "enqueue", "--jsonl", "in.jsonl", "--out", "out.jsonl", *options],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def num_answers(self) -> int:
        """Lines in the output file now."""
        return self.files.out.read_bytes().count(b"\n") if self.files.out.exists() else 0

    def reached(self, number: int) -> None:
        """Wait for so many answers."""
        until_seen(lambda: self.num_answers() >= number, f"{number} answers", timeout_s=120)


@pytest.fixture
def deployment(durable_server: RedisServer, tmp_path: Path) -> Iterator[Deployment]:
    """One for a test alone."""
    opened = Deployment(tmp_path, durable_server.url)
    yield opened
    opened.processes.close()


def test_a_batch_survives_two_kills_of_its_client_and_one_of_its_worker(deployment: Deployment) -> None:
    """Exactly one line for each custom_id, and no line was enqueued twice."""
    write_lines(deployment.files.lines, 3000)
    for number, victim in ((300, "client"), (1000, "worker"), (1500, "client")):
        client = deployment.command()
        deployment.reached(number)
        if victim == "worker":
            deployment.processes.stop("w0", signal.SIGKILL)
            deployment.processes.worker("w0")
            deployment.reached(number + 200)
        client.kill()
        client.communicate()
    last = deployment.command("--json")
    output, errors = last.communicate(timeout=120)

    assert last.returncode == 0, errors
    assert json.loads(output)["num_succeeded"] == 3000
    assert deployment.files.custom_ids() == Counter(f"c{i}" for i in range(3000))
    with Client(settings=deployment.settings) as client_api:
        assert client_api.overview().counts["submitted"] == 3000


def test_the_command_says_what_it_did_and_how_it_ended(deployment: Deployment) -> None:
    """130 when stopped by SIGTERM, 3 with error lines, 0 without, 2 for a mixture with options of one request."""
    write_lines(deployment.files.lines, 4000)
    first = deployment.command("--max-in-flight", "50")
    deployment.reached(100)
    first.send_signal(signal.SIGTERM)
    said, progress = first.communicate(timeout=120)
    assert (first.returncode, "The same command continues." in said) == (130, True), said
    assert "of 4,000 lines" in progress

    second = deployment.command()
    said, _ = second.communicate(timeout=120)
    assert (second.returncode, said.startswith("4,000 succeeded, 0 failed, of 4,000 lines")) == (0, True), said
    with deployment.files.lines.open("a") as lines:
        lines.write("nonsense\n")
    third = deployment.command()
    said, _ = third.communicate(timeout=120)
    assert "4,000 answered before" in said
    assert (third.returncode, "errors: out.jsonl.errors.jsonl" in said) == (3, True), said
    for wrong in (("--stream",), ("--temperature", "0"), ("text",)):
        assert _code(deployment.command(*wrong)) == 2


def _code(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=120)
    return process.returncode
