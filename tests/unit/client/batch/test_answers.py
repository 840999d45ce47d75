"""Answer lines in the shapes that OpenAI's batch API gives."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from l4queue.client.batch.answers import (
    duplicate_line,
    invalid_line,
    is_about_a_line,
    outcome_line,
    read_answer,
    refused_line,
    success_line,
)
from l4queue.client.batch.lines import CHAT_URL, COMPLETIONS_URL
from l4queue.client.batch.served import ModelNotServed
from l4queue.errors import InvalidRequest
from l4queue.models import RequestState
from l4queue.protocol.records import OutputEntry, RequestRecord, TokenLogprobs

OUTPUTS = (
    OutputEntry(upto=2, token_ids=(5, 6), text="Grü\n"),
    OutputEntry(upto=3, token_ids=(7,), text="ße\u2028"),
    OutputEntry(upto=3, text="!", state=RequestState.DONE),
)


def record(state: RequestState, **facts: Any) -> RequestRecord:
    return RequestRecord(request_id="k1", state=state, submitted_ms=7_500, prompt_tokens=4, offset=3, **facts)


def read(line: bytes) -> dict[str, Any]:
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert len(line.decode().splitlines()) == 1  # by any reader: U+2028 and its like are ends of lines for some
    found: dict[str, Any] = json.loads(line)
    assert set(found) == {"id", "custom_id", "response", "error"}
    return found


@pytest.mark.parametrize(
    ("url", "kind", "prefix", "where"),
    [(CHAT_URL, "chat.completion", "chatcmpl-", "message"), (COMPLETIONS_URL, "text_completion", "cmpl-", "text")],
)
def test_a_success_has_the_body_of_its_api(url: str, kind: str, prefix: str, where: str) -> None:
    """All of the text, the counts, the reason."""
    done = record(RequestState.DONE, finish_reason="stop")
    found = read(success_line(done, OUTPUTS, custom_id="a", url=url, model="m"))

    text = "Grü\nße\u2028!"
    choice = {"index": 0, "logprobs": None, "finish_reason": "stop"}
    choice[where] = {"role": "assistant", "content": text, "refusal": None} if where == "message" else text
    body = {
        "id": prefix + "k1",
        "object": kind,
        "created": 7,
        "model": "m",
        "choices": [choice],
        "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7},
    }
    response = {"status_code": 200, "request_id": "k1", "body": body}
    assert found == {"id": "batch_req_k1", "custom_id": "a", "response": response, "error": None}


ROWS = (
    TokenLogprobs(token_id=5, logprob=-0.5, top=((5, -0.5), (9, -1.5))),
    TokenLogprobs(token_id=6, logprob=-2.0, top=((8, -0.25), (9, -1.75))),
    TokenLogprobs(token_id=7, logprob=-0.125, top=((7, -0.125), (1, -3.0))),
)


@pytest.mark.parametrize("url", [CHAT_URL, COMPLETIONS_URL])
def test_logprobs_are_read_by_the_types_of_the_openai_package(url: str) -> None:
    """One entry a token, over all entries of the output; tokens are ids, as the client has no tokenizer."""
    done = record(RequestState.DONE, finish_reason="stop")
    outputs = (
        OutputEntry(upto=2, token_ids=(5, 6), text="a", logprobs=ROWS[:2]),
        OutputEntry(upto=3, token_ids=(7,), text="b", logprobs=ROWS[2:]),
        OutputEntry(upto=3, state=RequestState.DONE),
    )
    body = read(success_line(done, outputs, custom_id="a", url=url, model="m"))["response"]["body"]
    if url == CHAT_URL:
        chat = ChatCompletion.model_validate(body, strict=True).choices[0]
        assert chat.message.refusal is None
        assert chat.logprobs is not None
        content = chat.logprobs.content or []
        assert [(one.token, one.logprob) for one in content] == [
            ("token_id:5", -0.5), ("token_id:6", -2.0), ("token_id:7", -0.125),
        ]  # fmt: skip
        assert [one.token for one in content[1].top_logprobs] == ["token_id:8", "token_id:9"]
        return
    told = Completion.model_validate(body, strict=True).choices[0].logprobs
    assert told is not None
    assert (told.tokens, told.token_logprobs) == (["token_id:5", "token_id:6", "token_id:7"], [-0.5, -2.0, -0.125])
    assert told.top_logprobs is not None
    assert told.top_logprobs[1] == {"token_id:6": -2.0, "token_id:8": -0.25, "token_id:9": -1.75}


def test_a_model_that_is_not_served_is_not_found() -> None:
    """With OpenAI's status and code."""
    error = ModelNotServed("gpt is not served", field="model")
    body = read(refused_line(error, request_id="r", custom_id="a"))["response"]
    assert (body["status_code"], body["body"]["error"]) == (
        404,
        {"message": "gpt is not served", "type": "invalid_request_error", "param": "model",
         "code": "model_not_found"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "status", "kind"), [("prompt", 400, "invalid_request_error"), (None, 500, "server_error")]
)
def test_a_failure_is_a_response_with_an_error_body(field: str | None, status: int, kind: str) -> None:
    """400 where the input was at fault."""
    found = read(outcome_line(record(RequestState.FAILED, error="why", field=field), custom_id="a"))
    assert found["error"] is None
    assert found["response"]["status_code"] == status
    expected = {"message": "why", "type": kind, "param": field, "code": None}
    assert found["response"]["body"] == {"error": expected}
    assert is_about_a_line(found) is None


@pytest.mark.parametrize("state", ["cancelled", "expired", "dead"])
def test_other_ends_are_errors_without_a_response(state: str) -> None:
    """Nobody answered."""
    found = read(outcome_line(record(RequestState(state), error="why"), custom_id="a"))
    assert (found["response"], found["error"]) == (None, {"code": f"request_{state}", "message": "why"})


def test_lines_that_were_never_sent_say_why() -> None:
    """A refused body like a refused request; a broken or repeated line by its number."""
    refused = read(refused_line(InvalidRequest("too hot", field="temperature"), request_id="r", custom_id="a"))
    error = refused["response"]["body"]["error"]
    assert (error["message"], error["param"], refused["custom_id"]) == ("too hot", "temperature", "a")
    assert is_about_a_line(refused) is None

    broken = read(invalid_line(InvalidRequest("not JSON", field="line"), number=7))
    assert (broken["custom_id"], broken["error"]["code"], is_about_a_line(broken)) == (None, "invalid_line", 7)

    repeated = read(duplicate_line("a", number=9, first=2))
    assert (repeated["custom_id"], repeated["error"]["message"]) == ("a", "line 2 has this custom_id already")
    assert is_about_a_line(repeated) == 9


DIGEST = "0123456789" * 4


def test_each_line_says_which_line_it_answers() -> None:
    """By the digest in its id, whatever became of the request."""
    refusal = InvalidRequest("too hot", field="temperature")
    done = record(RequestState.DONE, finish_reason="stop")
    lines = {
        "success": success_line(done, OUTPUTS, custom_id="a", url=CHAT_URL, model="m", digest=DIGEST),
        "failed": outcome_line(record(RequestState.FAILED, error="why"), custom_id="a", digest=DIGEST),
        "dead": outcome_line(record(RequestState.DEAD, error="why"), custom_id="a", digest=DIGEST),
        "refused": refused_line(refusal, request_id="k1", custom_id="a", digest=DIGEST),
        "invalid": invalid_line(refusal, number=7, digest=DIGEST),
        "duplicate": duplicate_line("a", number=9, first=2, digest=DIGEST),
    }
    for kind, line in lines.items():
        answer = read_answer(read(line))
        assert answer is not None
        about = {"invalid": 7, "duplicate": 9}.get(kind)
        assert (answer.digest, answer.line, answer.is_success) == (DIGEST, about, kind == "success")
        assert answer.name == ("k1" if about is None else f"line_{about}")
        assert answer.custom_id == (None if kind == "invalid" else "a")


def test_an_answer_of_an_earlier_release_has_the_name_of_its_request() -> None:
    """And no digest."""
    answer = read_answer(read(outcome_line(record(RequestState.CANCELLED), custom_id="a")))
    assert answer is not None
    assert (answer.name, answer.digest) == ("k1", "")


RESPONSE = {"status_code": 200, "request_id": "r", "body": {}}


@pytest.mark.parametrize(
    "told",
    [
        {"custom_id": "a", "method": "POST", "url": CHAT_URL, "body": {}},
        {"custom_id": "a", "response": None, "error": None},
        {"custom_id": "a", "response": RESPONSE, "error": {"code": "x"}},
        {"custom_id": "a", "response": "text"},
        {"custom_id": "a", "response": {**RESPONSE, "status_code": "200"}},
        {"custom_id": "a", "response": {**RESPONSE, "status_code": True}},
        {"custom_id": "a", "response": {**RESPONSE, "body": None}},
        {"custom_id": "a", "error": "text"},
        {"custom_id": "a", "error": {}},
        {"custom_id": None, "response": RESPONSE},
        {"custom_id": "\ud800", "response": RESPONSE},
        {"custom_id": 5, "response": RESPONSE},
        {"response": RESPONSE},
    ],
)
def test_what_is_no_answer_is_not_taken_for_one(told: dict[str, Any]) -> None:
    """A request above all."""
    assert read_answer(told) is None
