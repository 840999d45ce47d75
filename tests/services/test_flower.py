"""Flower as people use it: real workers, dispatcher and Flower; its API, and its pages in Chromium."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import redis

from l4queue import Client
from l4queue.cli.stack.embedded import free_port
from l4queue.config import load_settings
from l4queue.models import RequestState
from l4queue.observe.task_view import task_name
from tests.protocol.server import RedisServer
from tests.services.processes import Processes, until
from workers.app import node_name

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]

WORKERS = ("w1", "w2")
CANARY = "zanzibar"
NUM_REQUESTS = 40


class Monitored:
    """A deployment with Flower in front: two workers of 4096 tokens, a dispatcher that lets 16384 pass."""

    def __init__(self, folder: Path, redis_url: str, tokenizer: Path) -> None:
        self.port = free_port()
        given: dict[str, Any] = {
            "redis_url": redis_url,
            "engine": "emulated",
            "model": str(tokenizer),
            "tokenizer": str(tokenizer),
            "drain_s": 5.0,
        }
        self.settings = load_settings(**given)
        self.processes = Processes(folder, flower_port=self.port, **given)
        self.client = Client(settings=self.settings)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=120)
        self.name = task_name(self.settings)
        self.done: list[str] = []

    def start(self) -> None:
        """Everything up, and the first requests served."""
        self.processes.start("flower", "-m", "dispatcher.flower")
        self.processes.start("dispatcher", "-m", "dispatcher")
        until(self.online, "Flower answers", timeout_s=120)
        for name in WORKERS:
            self.processes.worker(name)
        until(lambda: self.is_online(*WORKERS), "both workers are online", timeout_s=120)
        until(lambda: all("stage" in self.stats(name) for name in WORKERS), "both serve", timeout_s=120)
        handles = self.client.enqueue_many([f"{CANARY} {'word ' * n}" for n in range(NUM_REQUESTS)], max_tokens=8)
        self.done = [handle.id for handle in handles if handle.result(timeout=120)]

    def online(self) -> dict[str, bool] | None:
        """Worker status by Flower, or None while it does not answer."""
        try:
            return {"": True} | self.http.get("/api/workers", params={"status": "1"}).json()
        except httpx.TransportError:
            return None

    def is_online(self, *workers: str) -> bool:
        """Whether Flower sees all of these online."""
        found = self.online() or {}
        return all(found.get(node_name(worker)) for worker in workers)

    def stats(self, worker: str) -> dict[str, Any]:
        """Figures of a worker by Flower, fresh."""
        query = {"refresh": "1", "workername": node_name(worker)}
        reply = self.http.get("/api/workers", params=query)
        return dict(reply.json()[node_name(worker)].get("stats", {})) if reply.status_code == 200 else {}

    def num_active(self) -> int:
        """Requests running, as the workers page has it from heartbeats."""
        rows = self.http.get("/workers", params={"json": "1"}).json()["data"]
        return sum(int(row.get("active") or 0) for row in rows)

    def page(self, node: str) -> dict[str, Any]:
        """The row of a worker on the workers page."""
        rows = self.http.get("/workers", params={"json": "1"}).json()["data"]
        return next((dict(row) for row in rows if row["hostname"] == node), {})

    def tasks(self, **query: Any) -> dict[str, Any]:
        """Flower's tasks under our name."""
        found = self.http.get("/api/tasks", params={"taskname": self.name, "limit": 10_000} | query).json()
        assert isinstance(found, dict)
        return found

    def state(self, request_id: str) -> str:
        """State of one request as Flower sees it."""
        reply = self.http.get(f"/api/task/info/{request_id}")
        return str(reply.json()["state"]) if reply.status_code == 200 else ""

    def run_one(self, prompt: str = "word") -> str:
        """A request that runs, and that Flower knows to run."""
        request_id = self.client.enqueue(prompt, max_tokens=3_000, ignore_eos=True).id
        until(lambda: self.state(request_id) == "STARTED", "Flower shows it started")
        return request_id

    def status(self, request_id: str) -> RequestState:
        """State of one request in Redis."""
        return self.client.get(request_id).status().state

    def close(self) -> None:
        """Leave nothing behind."""
        self.http.close()
        self.client.close()
        self.processes.close()


@pytest.fixture(scope="module")
def monitored(
    redis_executable: str, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Monitored]:
    server = RedisServer(redis_executable, tmp_path_factory.mktemp("redis")).start()
    monitored = Monitored(tmp_path_factory.mktemp("flower"), server.url, tokenizer)
    try:
        monitored.start()
        yield monitored
    finally:
        monitored.close()
        server.kill()


@contextmanager
def open_browser(tmp_path_factory: pytest.TempPathFactory, resolver_rules: str = "") -> Iterator[Chrome]:
    """Headless Chromium. A laptop may lack it; CI may not. `resolver_rules` are its own names for addresses."""
    from selenium import webdriver

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        message = "chromium and chromedriver are not on PATH (on Debian: apt-get install chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync")
    more = ("disable-background-networking", "disable-component-update", "disable-dev-shm-usage")
    own = ("window-size=1500,1000", f"user-data-dir={tmp_path_factory.mktemp('chromium')}")
    names = (f"host-resolver-rules={resolver_rules}",) if resolver_rules else ()
    for flag in (*flags, *more, *own, *names):
        options.add_argument(f"--{flag}")
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        chrome.set_page_load_timeout(60)
        yield chrome
    finally:
        chrome.quit()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One for all tests here."""
    with open_browser(tmp_path_factory) as chrome:
        yield chrome


def show(browser: Chrome, monitored: Monitored, path: str, *texts: str) -> str:
    """Load a page, wait until all texts are on it, keep a picture of it, and return its text."""
    browser.get(f"http://127.0.0.1:{monitored.port}{path}")
    found = until(lambda: on_page(browser, *texts), f"{path} shows {texts}", timeout_s=300)
    pictures = os.environ.get("L4_TEST_PICTURES")
    if pictures:
        browser.save_screenshot(str(Path(pictures) / f"{path.strip('/').split('/')[0]}.png"))
    return found


def on_page(browser: Chrome, *texts: str) -> str:
    """The visible text of the page if it has all these, else nothing."""
    text = str(browser.execute_script("return document.body.innerText"))
    return text if all(wanted in text for wanted in texts) else ""


def test_every_request_is_one_task_in_success(monitored: Monitored) -> None:
    """Named by its model, with lengths, stage, worker, runtime and a short result."""
    until(lambda: set(monitored.done) <= set(monitored.tasks(state="SUCCESS")), "all are in SUCCESS")

    tasks = monitored.tasks()
    task = tasks[monitored.done[5]]

    assert len(monitored.done) == NUM_REQUESTS
    assert {task["worker"] for task in tasks.values()} <= {node_name(name) for name in WORKERS}
    assert task["name"] == "l4queue.generate/llama-3.1-8b"
    assert f"'prompt_tokens': {len(CANARY) + 1 + 5 * 5}" in task["kwargs"]
    assert "'range': '0–∞'" in task["kwargs"]
    assert task["args"].startswith(f"{len(CANARY) + 1 + 5 * 5} → ≤8 tokens, waited ")
    assert task["args"].endswith(" s, stage 0 (0–∞)")
    assert task["result"].startswith("8 tokens, ")
    assert task["runtime"] > 0
    assert task["received"] <= task["started"] <= task["succeeded"]


def test_waiting_and_refused_requests_are_shown_though_no_worker_has_them(monitored: Monitored) -> None:
    """Received when it was accepted; then revoked, done, or refused with the reason; on no worker's row."""
    for name in WORKERS:
        monitored.processes.send(name, signal.SIGSTOP)
    try:
        until(lambda: not monitored.client.overview().workers, "nothing is leased to them any more")
        waiting, cancelled = monitored.client.enqueue_many(["word"] * 2, max_tokens=1)
        refused = monitored.client.enqueue("word " * 20_000, max_tokens=1)
        for handle in (waiting, cancelled):
            until(lambda handle=handle: monitored.state(handle.id) == "RECEIVED", "it is shown waiting")
        task = monitored.http.get(f"/api/task/info/{waiting.id}").json()
        assert (task["worker"], task["name"]) == (None, monitored.name)
        assert task["received"] == waiting.status().submitted_at_s
        assert cancelled.cancel()
        until(lambda: monitored.state(cancelled.id) == "REVOKED", "its cancellation is shown")
        until(lambda: monitored.state(refused.id) == "FAILURE", "the refusal is shown")
    finally:
        for name in WORKERS:
            monitored.processes.send(name, signal.SIGCONT)
    until(lambda: monitored.state(waiting.id) == "SUCCESS", "it is served in the end", timeout_s=120)

    task = monitored.http.get(f"/api/task/info/{waiting.id}").json()
    assert task["started"] - task["received"] > 1.0
    assert ", waited " in task["args"]
    assert "'waited_s': " in task["kwargs"]
    assert str(refused.status().error) in monitored.http.get(f"/api/task/info/{refused.id}").json()["exception"]
    rows = monitored.http.get("/workers", params={"json": "1"}).json()["data"]
    assert {row["hostname"] for row in rows} <= {node_name(name) for name in WORKERS}


def test_no_prompt_text_reaches_flower(monitored: Monitored) -> None:
    """Neither in tasks nor in what workers tell about themselves."""
    worker = monitored.http.get("/api/workers", params={"refresh": "1", "workername": node_name("w1")}).text
    tasks = monitored.http.get("/api/tasks", params={"limit": 10_000}).text

    assert monitored.done[0] in tasks
    assert '"range_tokens"' in worker
    assert CANARY not in tasks
    assert CANARY not in worker


def test_workers_are_online_with_the_figures_of_their_engines(monitored: Monitored) -> None:
    """Stage, range, KV share and counters beside Celery's own."""
    finished = 0
    for worker in WORKERS:
        stats = monitored.stats(worker)
        assert stats["worker"] == worker
        assert stats["engine"] == "emulated 1"
        assert stats["kv_share"] >= 0
        assert stats["stage"] == 0
        assert stats["events_dropped"] == 0
        assert stats["total"] == {monitored.name: stats["finished"]}
        finished += stats["finished"]
    assert finished >= NUM_REQUESTS


def test_a_revoked_request_is_cancelled_while_it_runs(monitored: Monitored) -> None:
    """Through Flower's API; a client that waits for it is told."""
    request_id = monitored.run_one()
    until(lambda: monitored.num_active() == 1, "the workers page counts it")

    reply = monitored.http.post(f"/api/task/revoke/{request_id}", params={"terminate": "true"})

    assert reply.status_code == 200
    until(lambda: monitored.status(request_id) is RequestState.CANCELLED, "it is cancelled")
    until(lambda: monitored.state(request_id) == "REVOKED", "Flower shows it revoked")
    until(lambda: monitored.num_active() == 0, "the workers page counts it no more")


def test_a_failure_is_shown_as_a_failure(monitored: Monitored) -> None:
    """With the engine's reason."""
    monitored.processes.worker("small", max_model_len=64)
    until(lambda: monitored.is_online("small"), "it is online", timeout_s=120)
    for name in WORKERS:  # so that the small one takes the request
        monitored.processes.send(name, signal.SIGSTOP)
    try:
        request_id = monitored.client.enqueue("word " * 40, max_tokens=8).id
        until(lambda: monitored.status(request_id) is RequestState.FAILED, "the small worker fails it")
    finally:
        for name in WORKERS:
            monitored.processes.send(name, signal.SIGCONT)
    until(lambda: monitored.state(request_id) == "FAILURE", "Flower shows the failure")
    monitored.processes.stop("small")

    task = monitored.http.get(f"/api/task/info/{request_id}").json()
    assert "exceed the model's 64" in task["exception"]


def test_the_totals_are_right_where_most_requests_are_left_out(monitored: Monitored) -> None:
    """A worker that shows one request a second and serves hundreds: the workers page counts them all."""
    monitored.processes.worker("sampled", flower_sample_above_per_s=1, emulated_speed=0)
    until(lambda: monitored.is_online("sampled"), "it is online", timeout_s=120)
    for name in WORKERS:  # so that it takes all
        monitored.processes.send(name, signal.SIGSTOP)
    try:
        handles = monitored.client.enqueue_many([f"word {n}" for n in range(400)], max_tokens=1)
        assert all(handle.result(timeout=120) for handle in handles)
    finally:
        for name in WORKERS:
            monitored.processes.send(name, signal.SIGCONT)

    node = node_name("sampled")
    served = int(monitored.stats("sampled")["finished"])
    until(lambda: monitored.page(node).get("task-succeeded") == served, "the page has its total")
    assert served == 400
    assert monitored.page(node)["task-received"] == 400
    assert monitored.stats("sampled")["events_left_out"] > 400
    assert len(monitored.tasks(workername=node)) < 200
    monitored.processes.stop("sampled")
    until(lambda: not (monitored.online() or {}).get(node, True), "it is offline")
    assert monitored.page(node)["task-succeeded"] == 400


def test_cut_off_by_redis_it_comes_back_and_its_totals_are_right(monitored: Monitored) -> None:
    """As Redis does to a reader that lags too far; what was sent meanwhile is not sent again."""

    def shown() -> int:
        return sum(int(monitored.page(node_name(name)).get("task-succeeded", 0)) for name in WORKERS)

    def served() -> int:
        return sum(int(monitored.stats(name).get("finished", 0)) for name in WORKERS)

    until(lambda: shown() == served(), "the page agrees with the workers")
    before = shown()
    with redis.Redis.from_url(monitored.settings.broker_url) as broker:
        assert broker.client_kill_filter(_type="pubsub") > 0
    handles = monitored.client.enqueue_many([f"word {n}" for n in range(50)], max_tokens=1)
    assert all(handle.result(timeout=120) for handle in handles)

    until(lambda: shown() == before + 50, "the page has all", timeout_s=120)
    assert served() == before + 50
    late = monitored.client.enqueue("late", max_tokens=1)
    assert late.result(timeout=120)
    until(lambda: monitored.state(late.id) == "SUCCESS", "new requests are shown again")


@pytest.mark.browser
def test_the_pages_show_workers_and_requests(monitored: Monitored, browser: Chrome) -> None:
    """Workers page, worker page with the running request, tasks page, task page."""
    node = node_name("w1")
    workers = show(browser, monitored, "/workers", node, node_name("w2"), "Online")
    assert "Load Average".lower() in workers.lower()

    show(browser, monitored, f"/worker/{node}", node, "Pool")
    browser.find_element("id", "worker-tab-other").click()
    until(lambda: on_page(browser, "range_tokens", "0–∞", "kv_share"), "its figures are there")

    newest = monitored.client.enqueue("shown", max_tokens=8, ignore_eos=True)  # the page begins with it
    assert newest.result(timeout=300)
    until(lambda: monitored.state(newest.id) == "SUCCESS", "it is shown")
    tasks = show(browser, monitored, "/tasks", monitored.name, "SUCCESS", "8 tokens, ")
    assert CANARY not in tasks

    show(browser, monitored, f"/task/{monitored.done[0]}", monitored.done[0], "SUCCESS", "'stage': 0")


@pytest.mark.browser
def test_the_terminate_button_cancels_a_running_request(monitored: Monitored, browser: Chrome) -> None:
    """The button on the page of a running request."""
    request_id = monitored.run_one()

    show(browser, monitored, f"/task/{request_id}", "STARTED", "Terminate")
    browser.find_element("id", "task-terminate").click()

    until(lambda: monitored.status(request_id) is RequestState.CANCELLED, "it is cancelled")


def test_a_shutdown_from_flower_drains_and_the_request_goes_on_elsewhere(monitored: Monitored) -> None:
    """Its last state in Flower is that of the worker which finishes it."""
    request_id = monitored.run_one()
    victim = monitored.http.get(f"/api/task/info/{request_id}").json()["worker"]
    other = next(node_name(name) for name in WORKERS if node_name(name) != victim)

    assert monitored.http.post(f"/api/worker/shutdown/{victim}").status_code == 200

    until(lambda: monitored.state(request_id) == "SUCCESS", "it is finished", timeout_s=120)
    task = monitored.http.get(f"/api/task/info/{request_id}").json()
    assert task["worker"] == other
    assert task["retries"] == 1
    assert "'resumed_tokens': " in task["kwargs"]
    assert task["exception"] == "worker stops"
    assert monitored.client.get(request_id).status().crashes == 0
    until(lambda: not (monitored.online() or {}).get(victim, True), "the other one is offline")
