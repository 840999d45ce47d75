"""Halves of exchanges: what a gateway's answers mean, and lines that wait for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from l4queue import Settings
from l4queue.client.batch.files import InputFile
from l4queue.client.batch.halves import HALF_HEADER, ID_HEADER, Half, Halves, checked_gateway
from l4queue.client.batch.index import LineIndex
from l4queue.client.batch.lines import RESPONSES_URL, BatchLine, parse_line
from l4queue.client.batch.options import BatchOptions, LineOptions
from l4queue.client.batch.served import ServedModels
from l4queue.client.batch.source import LineSource
from l4queue.client.core import ClientCore
from l4queue.errors import ConfigError, InvalidRequest, ServiceUnavailable

URL = "/v1/chat/completions"
TOOLS = {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}
CHAT = {"messages": [{"role": "user", "content": "x"}]}


class Told(Halves):
    """A gateway that answers with these, one after the other."""

    def __init__(self, *answers: tuple[int, Any] | ServiceUnavailable) -> None:
        self._answers = list(answers)
        self.calls: list[tuple[dict[str, str], Any]] = []

    def call(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        assert url in (URL, RESPONSES_URL)
        self.calls.append((dict(headers), json.loads(body)))
        answer = self._answers.pop(0)
        if isinstance(answer, ServiceUnavailable):
            raise answer
        status, value = answer
        return status, value if isinstance(value, bytes) else json.dumps(value).encode()


def refusal(message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "param": param}}


def parsed(body: Any, gateway: Halves) -> BatchLine:
    raw = json.dumps({"custom_id": "a", "body": body}).encode()
    return parse_line(raw, max_tokens=9, priority=4, idempotency_key="k", writer=gateway)


def test_a_line_that_a_batch_cannot_write_is_written_by_the_gateway() -> None:
    """With what the batch adds, and without the model; the key is the batch's."""
    gateway = Told((200, {"token_ids": [1, 2], "params": {"max_tokens": 3}}))
    line = parsed({**TOOLS, "model": "m"}, gateway)
    assert (line.by_gateway, line.model, line.names) == (True, "m", {})
    assert (line.spec.token_ids, line.spec.params.max_tokens, line.spec.idempotency_key) == ((1, 2), 3, "k")
    assert gateway.calls == [({HALF_HEADER: Half.REQUEST}, {**TOOLS, "max_tokens": 9, "priority": 4})]


def test_another_line_is_written_by_it_only_where_it_writes_all() -> None:
    """A gateway elsewhere does, one with a reasoning parser, too."""
    gateway = Told((200, {"token_ids": [5]}))
    assert not parsed(CHAT, gateway).by_gateway
    gateway.writes_all = True
    assert parsed(CHAT, gateway).by_gateway


def test_a_response_is_written_by_a_gateway_only() -> None:
    """With the batch's limit under the name that a response has for it; its own limit is kept."""
    gateway = Told((200, {"token_ids": [5]}), (200, {"token_ids": [5]}))
    for own in ({}, {"max_output_tokens": 2}):
        line = {"custom_id": "a", "url": RESPONSES_URL, "body": {"input": "x", **own}}
        found = parse_line(
            json.dumps(line).encode(), max_tokens=9, priority=4, idempotency_key="k", writer=gateway
        )
        assert found.by_gateway
    assert [body for _, body in gateway.calls] == [
        {"input": "x", "max_output_tokens": 9, "priority": 4},
        {"input": "x", "max_output_tokens": 2, "priority": 4},
    ]
    with pytest.raises(InvalidRequest, match="url: /v1/responses needs a gateway"):
        parse_line(json.dumps(line).encode(), max_tokens=9, priority=4, idempotency_key="k")


def test_the_gateway_has_the_last_word() -> None:
    """What it refuses is refused in its words."""
    with pytest.raises(InvalidRequest, match=r"^n: must be 1$"):
        parsed({**CHAT, "n": 2}, Told((400, refusal("must be 1", "n"))))


@pytest.mark.parametrize(
    ("status", "value", "error", "told"),
    [
        (400, refusal("tools: must be a list", "tools"), InvalidRequest, "^tools: must be a list$"),
        (400, refusal("no template", None), InvalidRequest, "^body: no template$"),
        (500, refusal("a parser failed"), InvalidRequest, "a parser failed"),
        (503, refusal("no worker serves"), ServiceUnavailable, "no worker serves"),
        (429, b"slow down", ServiceUnavailable, "429"),
        (401, refusal("send a known key"), ConfigError, "401: send a known key"),
        (404, b"<html>", ConfigError, "404: is it an"),
        (200, b"<html>", ConfigError, "200: is it an"),
        (200, {"choices": []}, ConfigError, "is no request"),
    ],
)
def test_an_answer_that_is_no_request_says_what_to_do(
    status: int, value: Any, error: type[Exception], told: str
) -> None:
    """The line is wrong, or it is too early, or this is no gateway."""
    with pytest.raises(error, match=told):
        Told((status, value)).write(URL, TOOLS)


def test_a_request_that_has_expired_before_its_answer_is_looked_at_again() -> None:
    """Its line is found to have no record, and is sent again."""
    gateway = Told((404, refusal("no such request")), (200, {"choices": []}))
    with pytest.raises(ServiceUnavailable):
        gateway.answer(URL, TOOLS, request_id="r")
    assert gateway.answer(URL, TOOLS, request_id="r") == {"choices": []}
    assert gateway.calls[0] == ({HALF_HEADER: Half.ANSWER, ID_HEADER: "r"}, TOOLS)


def test_a_line_whose_gateway_is_away_is_the_next_one_again(tmp_path: Path) -> None:
    """None is left out, and no other is read for it."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"custom_id": name, "body": TOOLS}) + "\n" for name in "ab"))
    request = {"token_ids": [1]}
    gateway = Told((200, request), ServiceUnavailable("away"), (503, b""), (200, request))
    index = LineIndex()
    for name in "ab":
        index.add(name)
    index.resolve()
    failed: list[int] = []
    source = LineSource(
        InputFile(path),
        index,
        options=LineOptions(max_tokens=7),
        batch_id="b",
        core=ClientCore(Settings(_env_file=None)),  # type: ignore[call-arg]
        served=ServedModels(any_model=False),
        halves=gateway,
        fail=lambda number, _: failed.append(number),
    )
    found = []
    for _ in range(4):
        try:
            submission = source.next()
        except ServiceUnavailable:
            assert not source.is_exhausted
            continue
        assert submission is not None
        assert submission.ticket.by_gateway
        found.append(submission.ticket.custom_id)
    assert (found, source.next(), source.is_exhausted, failed) == (["a", "b"], None, True, [])
    assert {body["max_tokens"] for _, body in gateway.calls} == {7}


@pytest.mark.parametrize("url", ["http://h:8000", "http://h:8000/", "http://h:8000/v1", "http://h:8000/v1/"])
def test_the_address_of_a_gateway_is_taken_as_clients_write_it(url: str) -> None:
    """With or without the path."""
    assert checked_gateway(url) == "http://h:8000"


@pytest.mark.parametrize("url", ["h:8000", "8000", "ftp://h", "http://", 7])
def test_another_text_is_no_address(url: Any) -> None:
    """It is refused before the batch begins."""
    with pytest.raises(InvalidRequest, match="gateway"):
        BatchOptions(path_in=Path("a"), path_out=Path("b"), gateway=url)
