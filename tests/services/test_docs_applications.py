"""The service and the task of docs/applications.md, as they stand there, with an emulated engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from l4queue import AsyncClient, InvalidRequest, RequestState
from l4queue.cli.stack.embedded import free_port
from tests.services.pipeline import open_pipeline, until
from tests.services.processes import Processes

pytestmark = pytest.mark.services
PAGE = Path(__file__).resolve().parents[2] / "docs/applications.md"
SERVICE, TASK, _ = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def processes(redis_url: str, namespace: str, tmp_path: Path) -> Iterator[Processes]:
    """Of the application, which stands in the folder that they run in."""
    (tmp_path / "web.py").write_text(SERVICE, "utf-8")
    (tmp_path / "tasks.py").write_text(TASK, "utf-8")
    started = Processes(tmp_path, redis_url=redis_url, namespace=namespace)
    yield started
    started.close()


async def test_a_service_streams_refuses_and_cancels(redis_url: str, namespace: str, processes: Processes) -> None:
    """Events with the offset as their id; a browser that goes away ends its request."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/chat"
    processes.start("web", "-m", "uvicorn", "web:app", "--port", str(port))
    async with open_pipeline(redis_url, namespace) as pipeline, httpx.AsyncClient(timeout=120) as http:
        pipeline.start("w0", speed=0.01)
        await until(lambda: _answers(http, url))
        answer = await http.post(url, params={"message": "hi", "max_tokens": 5})
        assert re.findall(r"^id: (\d+)$", answer.text, re.MULTILINE)[-1] == "5"
        refused = await http.post(url, params={"message": "hi", "max_tokens": 0})
        assert (refused.status_code, refused.json()["detail"][:10]) == (422, "max_tokens")
        async with http.stream("POST", url, params={"message": "hi"}) as left:
            await anext(left.aiter_lines())
        await until(lambda: _is_cancelled(pipeline.client, left.headers["x-request-id"]))


async def test_a_task_is_one_request_and_its_error_is_ours(
    redis_url: str, namespace: str, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked pool with a client of its parent; the same id again is the same request."""
    for name, value in {"BROKER_URL": redis_url, "L4_REDIS_URL": redis_url, "L4_NAMESPACE": namespace}.items():
        monkeypatch.setenv(name, value)
    processes.environment["BROKER_URL"] = redis_url
    processes.start("celery", "-m", "celery", "-A", "tasks", "worker", "-P", "prefork", "-c", "2", "-l", "WARNING")
    tasks: Any = ModuleType("tasks")
    exec(TASK, tasks.__dict__)  # the page is ours
    async with open_pipeline(redis_url, namespace) as pipeline:
        pipeline.start("w0")

        async def outcome(**options: Any) -> Any:
            sent = tasks.summarise.apply_async(("a text",), options.pop("arguments", {}), **options)
            return await asyncio.to_thread(sent.get, timeout=300)

        first = await outcome(task_id=f"{namespace}-one")
        assert await outcome(task_id=f"{namespace}-one") == first
        assert (await pipeline.client.overview()).counts["submitted"] == 1
        with pytest.raises(InvalidRequest, match=r"^max_tokens: must be ") as caught:
            await outcome(arguments={"max_tokens": 0})
        assert caught.value.field == "max_tokens"


async def _answers(http: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await http.get(url)).status_code == 405
    except httpx.TransportError:
        return False


async def _is_cancelled(client: AsyncClient, request_id: str) -> bool:
    status = await (await client.get(request_id)).status()
    return status.state is RequestState.CANCELLED and status.error == "the browser went away"
