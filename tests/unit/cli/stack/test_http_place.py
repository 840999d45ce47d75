"""The gateway's address, whether it answers, and the line for people who try it."""

from __future__ import annotations

import shlex
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from l4queue.cli.stack.embedded import free_port
from l4queue.cli.stack.http_place import HttpPlace


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000/v1"),
        ("0.0.0.0", "http://127.0.0.1:8000/v1"),
        ("::", "http://[::1]:8000/v1"),
        ("192.0.2.7", "http://192.0.2.7:8000/v1"),
    ],
)
def test_clients_of_this_machine_have_an_address(host: str, url: str) -> None:
    """Also where it listens on all."""
    assert HttpPlace(host=host, port=8000, model="tiny").url == url


def test_the_line_is_a_command() -> None:
    """A shell splits it as meant; a key is taken from the environment and not shown."""
    words = shlex.split(HttpPlace(host="127.0.0.1", port=8000, model="tiny").curl)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/completions"]
    assert (
        words[-1] == '{"model": "tiny", "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}'
    )
    assert "$L4_HTTP_KEY" in HttpPlace(host="127.0.0.1", port=8000, model="tiny", needs_key=True).curl


@pytest.mark.parametrize(("status", "is_alive"), [(200, True), (503, True), (404, False)])
async def test_it_answers_also_without_workers(status: int, is_alive: bool) -> None:
    """But another server at its port is not it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        place = HttpPlace(host="127.0.0.1", port=server.server_port, model="tiny")
        assert await place.answers() is is_alive
    assert not await HttpPlace(host="127.0.0.1", port=free_port(), model="tiny").answers()
