"""Constraints on their way through a dispatcher: checked apart, while all other requests are routed."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dispatcher.constraints.checker import ConstraintChecker
from dispatcher.routing.service import Dispatcher
from l4queue import AsyncClient, RequestState, Settings
from l4queue.errors import RequestFailed, RequestTooLong
from l4queue.models import WorkerLoad
from l4queue.protocol.calls import Calls, Verdict
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.inbox import Inbox
from l4queue.protocol.keys import Keys
from l4queue.protocol.parsing import load_to_json
from tests.services.pipeline import ByteTokenizer, until

pytestmark = [pytest.mark.services]
COMMAND = (sys.executable, str(Path(__file__).parents[1] / "unit" / "dispatcher" / "checking_process.py"))
EXPLOSIVE = {
    "type": "object",
    "properties": {f"p{i}": {"type": "string", "pattern": "^(([a-z]{0,200}){0,200}-){0,200}$"} for i in range(60)},
}


@pytest_asyncio.fixture
async def executor(redis_url: str) -> AsyncIterator[AsyncExecutor]:
    executor = AsyncExecutor(redis_url)
    yield executor
    await executor.close()


@pytest.fixture
def settings(redis_url: str, namespace: str) -> Settings:
    """Entries are adopted at once."""
    return Settings(redis_url=redis_url, namespace=namespace, dispatcher_claim_idle_s=1e-9)


def make_dispatcher(
    settings: Settings, executor: AsyncExecutor, name: str, *, limit_s: float = 600.0, command: Any = COMMAND
) -> Dispatcher:
    """With a checker whose process does what the constraint says."""
    checker = ConstraintChecker(tokenizer="tiny", limit_s=limit_s, command=command)
    tokenizer: Any = ByteTokenizer()
    return Dispatcher(settings=settings, executor=executor, tokenizer=tokenizer, name=name, checker=checker)


@asynccontextmanager
async def routing(dispatcher: Dispatcher) -> AsyncIterator[None]:
    """It runs meanwhile."""
    task = asyncio.create_task(dispatcher.run())
    try:
        yield
    finally:
        dispatcher.request_stop()
        await task


async def state(client: AsyncClient, request_id: str) -> RequestState:
    return (await (await client.get(request_id)).status()).state


async def reaches(client: AsyncClient, request_id: str, wanted: RequestState) -> None:
    async def is_there() -> bool:
        return await state(client, request_id) is wanted

    await until(is_there, timeout_s=200)


def choice(text: str) -> dict[str, list[str]]:
    return {"choice": [text]}


async def test_others_are_routed_while_a_constraint_is_checked(
    settings: Settings, executor: AsyncExecutor, tmp_path: Path
) -> None:
    """Among them one with a constraint of its own. Then the slow one is, too."""
    async with AsyncClient(settings=settings) as client:
        slow = await client.enqueue("hello", structured_outputs=choice(f"until:{tmp_path / 'go'}"))
        async with routing(make_dispatcher(settings, executor, "d")):
            plain = await client.enqueue("hello")
            quick = await client.enqueue("hello", structured_outputs=choice("good"))
            for handle in (plain, quick):
                await reaches(client, handle.id, RequestState.QUEUED)
            assert await state(client, slow.id) is RequestState.SUBMITTED
            (tmp_path / "go").touch()
            await reaches(client, slow.id, RequestState.QUEUED)


async def tell(executor: AsyncExecutor, keys: Keys, load: WorkerLoad) -> None:
    """Publish a worker's load as its lease does."""
    call = Calls(keys).renew(
        f"{load.worker_id}:1",
        worker_id=load.worker_id,
        lease_ms=600_000,
        load=json.dumps({"v": 1, **load_to_json(load), "cost": None, "price": {}}),
        sequence=1,
        register=True,
        histogram={},
    )
    assert await executor.run(call) is Verdict.OK


async def test_a_dispatcher_looks_at_the_engines(settings: Settings, executor: AsyncExecutor) -> None:
    """The least of them bounds a request, unless the limit is set. Of vLLM, its checks are loaded beforehand."""
    for limits, is_set, longest in (((), False, 1024), ((5000, 300), False, 300), ((), True, 1024)):
        chosen = settings.model_copy(update={"max_model_len": 1024})
        if not is_set:  # as it is read from a model's configuration
            chosen.model_fields_set.discard("max_model_len")
        dispatcher = make_dispatcher(chosen, executor, "d")
        dispatcher._tokenizer.max_model_len = 1024
        for number, tokens in enumerate(limits):
            engine = "vllm" if number else "other"
            load = WorkerLoad(worker_id=f"w{number}", engine=engine, max_model_len=tokens)
            await tell(executor, dispatcher.keys, load)
            await dispatcher.look_at_engines()
            assert (dispatcher._checker._process is not None) is (engine == "vllm")
        await dispatcher.look_at_engines()
        async with AsyncClient(settings=settings) as client, routing(dispatcher):
            good = await client.enqueue("x" * (longest - 8), max_tokens=8)
            await reaches(client, good.id, RequestState.QUEUED)
            bad = await client.enqueue("x" * (longest - 8), max_tokens=9)
            with pytest.raises(RequestTooLong, match=f"exceed the model's {longest} tokens"):
                await bad.result(timeout=120)


@pytest.mark.parametrize(("text", "words"), [("bad", "is bad"), ("endless", "takes longer than 0.5 s")])
async def test_a_constraint_that_cannot_be_used_fails_its_request(
    settings: Settings, executor: AsyncExecutor, text: str, words: str
) -> None:
    """With the field, and what to do. The same one again is refused at once."""
    async with (
        AsyncClient(settings=settings) as client,
        routing(make_dispatcher(settings, executor, "d", limit_s=0.5)),
    ):
        for _ in range(2):
            handle = await client.enqueue("hello", structured_outputs=choice(text))
            with pytest.raises(RequestFailed, match=words) as caught:
                await handle.result(timeout=200)
            assert caught.value.field == "structured_outputs.choice"


async def test_dispatchers_that_end_during_a_check_are_not_blamed_on_it(
    settings: Settings, executor: AsyncExecutor, tmp_path: Path
) -> None:
    """Five of them, one after the other. The sixth routes it."""
    async with AsyncClient(settings=settings) as client:
        first = make_dispatcher(settings, executor, "d0")
        await first.run_once(block_s=0.01)  # the group of consumers is there from now on
        slow = await client.enqueue("hello", structured_outputs=choice(f"until:{tmp_path / 'go'}"))
        for number in range(5):
            dispatcher = first if number == 0 else make_dispatcher(settings, executor, f"d{number}")
            await (dispatcher.run_once(block_s=1.0) if number == 0 else dispatcher.adopt_once())
            await until(lambda checker=dispatcher._checker: _is_asked(checker))
            await dispatcher._checks.stop()  # Redis is told nothing, as when the process is gone
        assert await state(client, slow.id) is RequestState.SUBMITTED

        (tmp_path / "go").touch()
        last = make_dispatcher(settings, executor, "last")
        await last.adopt_once()
        await reaches(client, slow.id, RequestState.QUEUED)
        await last._checks.stop()


async def _is_asked(checker: ConstraintChecker) -> bool:
    return bool(checker._answers)


async def test_a_request_that_is_cancelled_during_its_check_leaves_nothing(
    settings: Settings, executor: AsyncExecutor, tmp_path: Path
) -> None:
    """It is not routed afterwards, and its entry is cleared."""
    dispatcher = make_dispatcher(settings, executor, "d")
    async with AsyncClient(settings=settings) as client, routing(dispatcher):
        slow = await client.enqueue("hello", structured_outputs=choice(f"until:{tmp_path / 'go'}"))
        await until(lambda: _is_asked(dispatcher._checker))
        await slow.cancel()
        (tmp_path / "go").touch()

        async def is_cleared() -> bool:
            return await executor.client.xlen(Keys(settings.namespace).inbox) == 0

        await until(is_cleared)
        assert await state(client, slow.id) is RequestState.CANCELLED


async def test_an_entry_that_waits_is_not_adopted_by_others(settings: Settings, executor: AsyncExecutor) -> None:
    """It is as young as if just read, its delivery does not count, and the next claim does."""
    keys = Keys(settings.namespace)
    own = Inbox(executor, keys, consumer="own")
    async with AsyncClient(settings=settings) as client:
        await own.read(count=1, block_s=0.01)
        await client.enqueue("hello")
        ((entry_id, _),) = await own.read(count=1, block_s=1.0)

        async def pending() -> dict[str, Any]:
            (row,) = await executor.client.xpending_range(keys.inbox, "d", "-", "+", 1)
            return dict(row)

        async def is_old() -> bool:
            return bool((await pending())["time_since_delivered"] >= 1000)

        assert (await pending())["times_delivered"] == 1
        await own.set_aside(entry_id)
        assert (await pending())["times_delivered"] == 0
        await until(is_old)
        await own.keep([entry_id])
        assert (await pending())["time_since_delivered"] < 1000
        assert await own.claim(entry_id) is not None
        assert (await pending())["times_delivered"] == 1


@pytest.mark.vllm
async def test_vllm_checks_with_the_models_tokenizer(settings: Settings, executor: AsyncExecutor) -> None:
    """A schema that takes it many seconds fails by its field; a usual one and an impossible one are told apart."""
    dispatcher = make_dispatcher(settings, executor, "d", limit_s=10.0, command=None)
    async with AsyncClient(settings=settings) as client, routing(dispatcher):
        schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
        explosive = await client.enqueue("hello", structured_outputs={"json": EXPLOSIVE})
        usual = await client.enqueue("hello", structured_outputs={"json": schema})
        impossible = await client.enqueue("hello", structured_outputs={"regex": "("})
        plain = await client.enqueue("hello")

        await reaches(client, plain.id, RequestState.QUEUED)
        await reaches(client, usual.id, RequestState.QUEUED)
        for handle, field, words in (
            (explosive, "json", "takes longer than 10 s to compile: use a smaller one"),
            (impossible, "regex", "vLLM does not accept it: .*unclosed group"),
        ):
            with pytest.raises(RequestFailed, match=f"(?s){words}") as caught:
                await handle.result(timeout=200)
            assert caught.value.field == f"structured_outputs.{field}"
