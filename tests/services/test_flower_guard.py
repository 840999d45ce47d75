"""Flower against foreign web pages, in real HTTP and in a real browser; its login; its own variables."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from l4queue.cli.stack.embedded import free_port
from l4queue.cli.stack.flower_place import flower_answers, flower_place
from l4queue.config import Settings
from tests.protocol.server import RedisServer
from tests.services.processes import Processes, until
from tests.services.redis_sets import make_certificate
from tests.services.test_flower import open_browser

pytestmark = [pytest.mark.services]

L4QUEUE = Path(sys.executable).with_name("l4queue")
PATHS = ("/", "/workers", "/tasks", "/api/workers", "/api/tasks", "/metrics", "/healthcheck", "/no/such/page")
CHANGES = ("/api/task/revoke/abc", "/api/worker/shutdown/w1")
PAGE = """<script>
const base = "http://127.0.0.1:PORT";
const found = {};
async function attempt(name, path, options) {
  try { found[name] = (await fetch(base + path, options)).type; } catch (error) { found[name] = "refused"; }
}
(async () => {
  await attempt("read", "/api/workers", {});
  await attempt("change", "/api/task/revoke/abc", {method: "POST"});
  await attempt("blind change", "/api/task/revoke/abc", {method: "POST", mode: "no-cors"});
  await attempt("put", "/api/task/revoke/abc", {method: "PUT"});
  document.title = JSON.stringify(found);
})();
</script>"""


class Alone:
    """A Flower with nothing but its broker, whose control messages are heard."""

    def __init__(self, folder: Path, broker: RedisServer, *, environment: dict[str, str], **settings: Any) -> None:
        self.port = free_port()
        self.processes = Processes(folder, redis_url=broker.url, flower_port=self.port, **settings)
        self.processes.environment |= environment
        self.place = flower_place(Settings(flower_port=self.port), environment)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)
        self._broker = redis.Redis(port=broker.port)
        self._heard = self._broker.pubsub()
        self._heard.psubscribe("*pidbox*")
        self._heard.get_message(timeout=5)

    def is_well(self) -> bool:
        """As `up` and `health` ask."""
        try:
            flower_answers(self.place)
        except (OSError, HTTPException):
            return False
        return True

    def orders(self) -> list[str]:
        """What workers were told since the last look."""
        found = []
        while (message := self._heard.get_message(timeout=0.2)) is not None:
            if message["type"] == "pmessage":
                order = json.loads(b64decode(json.loads(message["data"])["body"]))
                found.append(order["method"])
        return [method for method in found if method in ("revoke", "shutdown")]

    def close(self) -> None:
        """Leave nothing behind."""
        self.http.close()
        self._heard.close()
        self._broker.close()
        self.processes.close()


@contextmanager
def alone(folder: Path, broker: RedisServer, environment: dict[str, str] | None = None, **settings: Any) -> Any:
    opened = Alone(folder, broker, environment=environment or {}, **settings)
    try:
        opened.processes.start("flower", "-m", "dispatcher.flower")
        until(opened.is_well, "Flower answers", timeout_s=60)
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def broker(redis_executable: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(redis_executable, tmp_path_factory.mktemp("broker")).start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def flower(broker: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    with alone(tmp_path_factory.mktemp("flower"), broker) as opened:
        yield opened


def test_programs_of_this_machine_use_its_api_without_a_login(flower: Alone) -> None:
    """And a browser its pages; no header invites pages of others."""
    assert flower.http.get("/api/workers").status_code == 200
    own = {"Origin": f"http://127.0.0.1:{flower.port}", "Sec-Fetch-Site": "same-origin"}
    reply = flower.http.post(CHANGES[0], headers=own)

    assert reply.status_code == 200
    assert flower.orders() == ["revoke"]
    for path in PATHS:
        headers = flower.http.get(path, headers={"Host": f"localhost:{flower.port}"}).headers
        assert not [name for name in headers if name.lower().startswith("access-control")]
        assert headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    "foreign",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Host": "evil.example"},
        {"Host": "evil.example:5555", "Origin": "http://evil.example:5555"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    ],
    ids=str,
)
def test_foreign_pages_get_403_from_everything(flower: Alone, foreign: dict[str, str]) -> None:
    """Reading, changing, asking beforehand; and no worker is told anything."""
    for path in PATHS:
        assert flower.http.get(path, headers=foreign).status_code == 403, path
    for path in CHANGES:
        assert flower.http.post(path, headers=foreign).status_code == 403, path
        asked = foreign | {"Access-Control-Request-Method": "POST"}
        refused = flower.http.options(path, headers=asked)
        assert refused.status_code == 403
        assert not [name for name in refused.headers if name.lower().startswith("access-control")]
    assert flower.orders() == []


@pytest.mark.browser
def test_a_foreign_page_in_a_real_browser_gets_nowhere(
    flower: Alone, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Neither by its own origin nor by a name that it has made to lead here."""
    (tmp_path / "evil.html").write_text(PAGE.replace("PORT", str(flower.port)))
    with serving(tmp_path) as port, open_browser(tmp_path_factory, "MAP evil.example 127.0.0.1") as browser:
        browser.get(f"http://127.0.0.1:{port}/evil.html")
        found = until(lambda: browser.title if browser.title.startswith("{") else "", "it has tried all")
        browser.get(f"http://evil.example:{flower.port}/")
        named = browser.execute_script("return document.body.innerText")
        browser.get(f"http://127.0.0.1:{flower.port}/")
        ours = browser.execute_script("return document.body.innerText")

    assert found == '{"read":"refused","change":"refused","blind change":"opaque","put":"refused"}'
    assert flower.orders() == []
    assert "is no name of this Flower" in named
    assert "Workers" in ours


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """A web server of somebody else's on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *given: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_login_is_asked_for_as_it_is_written(tmp_path: Path, broker: RedisServer) -> None:
    """With commas, which Flower's own variable takes as the end of a login; foreign pages stay out too."""
    password = "pa,ss:w#rd @/'\""
    with alone(tmp_path, broker, flower_login=f"admin:{password}") as opened:
        get: Callable[..., httpx.Response] = opened.http.get
        assert get("/workers").status_code == get("/api/workers").status_code == 401
        assert get("/api/workers", auth=("admin", "pa")).status_code == 401
        assert get("/api/workers", auth=("admin", password)).status_code == 200
        reply = opened.http.post(CHANGES[0], auth=("admin", password), headers={"Origin": "http://evil.example"})
        assert reply.status_code == 403
        assert get("/workers", auth=("admin", password), headers={"Host": "flower.example"}).status_code == 200
        assert opened.orders() == []
        assert password not in opened.processes.log("flower")


@pytest.mark.parametrize("way", ["port and prefix", "socket", "TLS"])
def test_its_own_variables_are_followed_by_health(way: str, tmp_path: Path, broker: RedisServer) -> None:
    """`up` and `l4queue health flower` ask where Flower really listens."""
    other = free_port()
    certificate, key = make_certificate(tmp_path)
    environment = {
        "port and prefix": {"FLOWER_PORT": str(other), "FLOWER_URL_PREFIX": "/some/flower/", "FLOWER_ADDRESS": ""},
        "socket": {"FLOWER_UNIX_SOCKET": str(tmp_path / "flower.sock")},
        "TLS": {"FLOWER_CERTFILE": certificate, "FLOWER_KEYFILE": key},
    }[way]
    with alone(tmp_path, broker, environment) as opened:
        health = opened.processes.run(str(L4QUEUE), "health", "flower")

    text = {
        "port and prefix": f"http://127.0.0.1:{other}/some/flower",
        "socket": str(tmp_path / "flower.sock"),
        "TLS": f"https://127.0.0.1:{opened.port}",
    }[way]
    assert f"Flower answers at {text}/healthcheck" in health


def test_a_variable_that_flower_cannot_read_is_one_error(tmp_path: Path, broker: RedisServer) -> None:
    """Kubernetes sets this one where a service is called flower."""
    processes = Processes(tmp_path, redis_url=broker.url)
    processes.environment["FLOWER_PORT"] = "tcp://10.0.0.1:5555"

    said = processes.run("-m", "dispatcher.flower")

    assert said == "error: FLOWER_PORT: tcp://10.0.0.1:5555 is no int as Flower wants it; unset it\n"
