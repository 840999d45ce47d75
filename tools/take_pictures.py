"""Pictures of a deployment under load: `python tools/take_pictures.py [--only stats-watch]`.

Starts the processes of `l4queue up` with four emulated GPUs and a plan of three stages, and serves mixed lengths.
Writes docs/img/stats-watch.svg (`l4queue stats --watch`, 80 columns), docs/img/flower-workers.png and
docs/img/flower-tasks.png (Chromium with chromedriver).
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.terminal_theme import MONOKAI

from l4queue.cli.stack.embedded import free_port
from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.cli.watch.command import Watcher
from l4queue.cli.watch.view import fit
from l4queue.client import AsyncClient
from l4queue.models import Plan, StagePlan
from l4queue.plan_json import plan_to_json
from l4queue.protocol.calls import Calls
from l4queue.protocol.executor import AsyncExecutor, Executor
from l4queue.protocol.keys import Keys

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

FOLDER = Path(__file__).parents[1] / "docs" / "img"
SETTINGS = {
    "L4_REPLAN_INTERVAL_S": "3",
    "L4_PLAN_MIN_LIFE_S": "3600",
    "L4_MAX_RUNNING": "32",
    "L4_EMULATED_SPEED": "3",  # times as slow, so that few requests are a load
}
RATE_PER_S = 20.0
WARM_S, MOVES_S = 40.0, 90.0
RANGES = ((0, 512, 1), (512, 4096, 2), (4096, None, 1))
"""The plan: what the planner would choose depends on how fast this machine is, and a picture should not."""
COLUMNS, ROWS = 80, 30
_FONT_FACE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


async def traffic(client: AsyncClient) -> None:
    """Poisson arrivals without end: many short prompts, some long ones, outputs that outgrow a stage."""
    rng = np.random.default_rng(3)
    while True:
        is_long = rng.random() < 0.12
        prompt_tokens = int(rng.integers(3000, 9000)) if is_long else int(np.exp(rng.uniform(4.0, 7.3)))
        output_tokens = int(np.exp(rng.uniform(3.5, 6.2)))
        await client.enqueue(token_ids=[7] * prompt_tokens, max_tokens=output_tokens, ignore_eos=True)
        await asyncio.sleep(float(rng.exponential(1 / RATE_PER_S)))


async def publish(stack: Stack, client: AsyncClient) -> None:
    """Put the plan in force."""
    overview = await client.overview()
    names = sorted(worker.worker_id for worker in overview.workers)
    stages = []
    for low_tokens, high_tokens, num_workers in RANGES:
        ids, names = tuple(names[:num_workers]), names[num_workers:]
        stages.append(
            StagePlan(low_tokens=low_tokens, high_tokens=high_tokens, num_workers=num_workers, worker_ids=ids)
        )
    plan = Plan(
        version=overview.plan.version + 1,
        stages=tuple(stages),
        reason="set by hand",
        created_ms=overview.now_ms,
    )
    executor = AsyncExecutor(stack.redis_url)
    calls = Calls(Keys(stack.settings.namespace))
    await executor.run(
        calls.publish(expected_version=plan.version - 1, version=plan.version, body=plan_to_json(plan))
    )
    await executor.close()


async def watch_picture(stack: Stack) -> None:
    """The terminal view once there are stages and moves to see, as `stats --watch` draws it."""
    executor = Executor(stack.redis_url, retry_s=0.0)
    watcher, started_s = Watcher(executor, stack.settings.namespace), time.monotonic()
    while True:
        await asyncio.to_thread(watcher.look)
        picture = watcher.picture
        assert picture is not None, watcher.trouble
        passed_s = time.monotonic() - started_s
        is_lively = len(picture.stages) > 1 and len(picture.moves) > 2
        if passed_s > (WARM_S if is_lively else MOVES_S):
            break
        await asyncio.sleep(1.0)
    executor.close()
    console = Console(
        record=True, width=COLUMNS, height=ROWS, force_terminal=True, color_system="truecolor", file=io.StringIO()
    )
    console.print(fit(picture, console, title=f"l4queue {stack.settings.namespace} · {stack.redis_url}"))
    svg = console.export_svg(title="l4queue stats --watch", theme=MONOKAI)
    (FOLDER / "stats-watch.svg").write_text(_FONT_FACE.sub("", svg))  # no font from elsewhere


async def flower_pictures(stack: Stack) -> None:
    """Workers and tasks."""
    with chromium() as browser:
        for name, path, text in (("workers", "/workers", "worker-3"), ("tasks", "/tasks", "SUCCESS")):
            await asyncio.to_thread(browser.get, f"{stack.flower_url}{path}")
            await _until(lambda text=text: _shows(browser, text), f"{path} shows {text}")
            await asyncio.to_thread(browser.save_screenshot, str(FOLDER / f"flower-{name}.png"))


@contextmanager
def chromium() -> Iterator[Chrome]:
    """Headless, of a width that a README shows well."""
    from selenium import webdriver

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        raise SystemExit("chromium and chromedriver are not on PATH (on Debian: apt-get install chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    with tempfile.TemporaryDirectory() as profile:
        flags = ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-dev-shm-usage")
        for flag in (*flags, "window-size=1700,1080", f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield browser
        finally:
            browser.quit()


async def _shows(browser: Chrome, text: str) -> bool:
    script = "return document.body.innerText"
    return text in str(await asyncio.to_thread(browser.execute_script, script))


async def _until(condition: Callable[[], Awaitable[bool]], what: str, *, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > deadline_s:
            raise SystemExit(f"not within {timeout_s} s: {what}")
        await asyncio.sleep(0.2)


async def take(only: str) -> None:
    """Start, load, take the pictures, stop."""
    os.environ |= SETTINGS
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        options = StackOptions(
            workers=4, engine="emulated", model="tiny", data_dir=Path(folder), flower_port=free_port()
        )
        async with Stack(options) as stack:
            await stack.ready()
            async with AsyncClient(stack.redis_url, settings=stack.settings) as client:
                await publish(stack, client)
                load = asyncio.create_task(traffic(client))
                try:
                    await watch_picture(stack)
                    if not only:
                        await flower_pictures(stack)
                    load.cancel()
                    await asyncio.wait({load})
                finally:
                    load.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("stats-watch",), default="")
    asyncio.run(take(parser.parse_args().only))
