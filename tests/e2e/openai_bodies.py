"""Bodies of OpenAI's API, and what of an answer must be the same on every server: all but ids and times."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import httpx

__all__ = (
    "BODIES",
    "CHAT",
    "COMPLETIONS",
    "MODEL",
    "RESPONSES",
    "TOOLS",
    "answer_of",
    "comparable",
    "put_together",
    "whole_and_streamed",
)

MODEL = "tiny"
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
"""Options of a server that parses tool calls."""
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
    },
}
_STRICT = {"type": "function", "function": {**_WEATHER["function"], "strict": True}}
_TAG = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<a>", "content": {"type": "regex", "pattern": "[ab]{3}"}, "end": "</a>"},
}
_HISTORY = [
    {"role": "user", "content": "How is the weather in Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]


def _prompted(**more: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": "The return statement", "max_tokens": 12, **more}


def _chatted(**more: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 12, **more}


BODIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "prompt": _prompted(),
    "prompt of ids": _prompted(prompt=[17, 300, 4000, 23]),
    "two prompts": _prompted(prompt=["The return", "A class"]),
    "long prompt": _prompted(prompt="Of all that is known, the least is told. " * 30),
    "stop text": _prompted(stop="fruit", max_tokens=40),
    "stop list": _prompted(stop=["nowhere", "quitting"], max_tokens=40, include_stop_str_in_output=True),
    "stop ids and special tokens": _prompted(stop_token_ids=[5], min_tokens=2, skip_special_tokens=False),
    "no end": _prompted(ignore_eos=True, top_k=-1),
    "logprobs and ids": _prompted(logprobs=3, return_token_ids=True),
    "echo": _prompted(echo=True),
    "outputs": _prompted(n=2, seed=7, temperature=0.8),
    "logit bias": _prompted(logit_bias={"300": 100, "17": -100}),
    "allowed ids": _prompted(allowed_token_ids=[17, 300, 4000]),
    "bad words": _prompted(bad_words=["eval"]),
    "penalty": _prompted(repetition_penalty=1.3),
    "regex": _prompted(structured_outputs={"regex": "[ab]{3}"}),
    "grammar": _prompted(structured_outputs={"grammar": 'root ::= "yes" | "no" [0-9]{2}'}),
    "structural tag": _prompted(structured_outputs={"structural_tag": json.dumps(_TAG)}, max_tokens=30),
    "chat": _chatted(),
    "chat with logprobs": _chatted(logprobs=True, top_logprobs=2, n=2, seed=3, temperature=1.0),
    "chat without a length": _chatted(
        max_tokens=None, stop=["e"], chat_template_kwargs={"enable_thinking": False}
    ),
    "chat in parts": _chatted(
        messages=[{"role": "user", "content": [{"type": "text", "text": "Say"}]}], user="me"
    ),
    "json object": _chatted(response_format={"type": "json_object"}, max_tokens=8),
    "json schema": _chatted(
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": _SCHEMA}},
        max_tokens=40,
    ),
    "tool history": _chatted(messages=_HISTORY),
    "tools": _chatted(tools=[_WEATHER]),
    "tool required": _chatted(tools=[_STRICT], tool_choice="required", max_tokens=250),
    "tool by name": _chatted(
        tools=[_STRICT], tool_choice={"type": "function", "function": {"name": "weather"}}, max_tokens=250
    ),
    "tool that is strict": _chatted(tools=[_STRICT]),
    "tag as a format": _chatted(response_format=_TAG, max_tokens=30),
    "tool of a response": (
        RESPONSES,
        {
            "input": "Weather?",
            "max_output_tokens": 80,
            "tools": [{"type": "function", **_STRICT["function"]}],
            "tool_choice": "required",
        },
    ),
    "response": (RESPONSES, {"input": "The return statement", "max_output_tokens": 8}),
}
"""Requests by what they are about: (path, body). Greedy but for those with a seed."""
_IDS = frozenset({"id", "call_id", "item_id", "created", "created_at", "system_fingerprint", "sequence_number"})


def answer_of(client: httpx.Client, path: str, body: dict[str, Any], *, is_stream: bool) -> Any:
    """The answer of a server, comparable: a stream is put together."""
    asked = {"model": MODEL, "temperature": 0, **body}
    if not is_stream:
        answer = client.post(path, json=asked)
        return answer.status_code, comparable(answer.json())
    if path != RESPONSES:
        asked["stream_options"] = {"include_usage": True}
    with client.stream("POST", path, json={**asked, "stream": True}) as answer:
        chunks = list(_chunks(answer.iter_lines()))
    if path == RESPONSES:
        return [comparable(chunk["response"]) for chunk in chunks if chunk["type"] == "response.completed"]
    return put_together(chunks)


def whole_and_streamed(client: httpx.Client, bodies: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """All answers by the name of their body."""
    return {
        f"{name}, {'streamed' if is_stream else 'whole'}": answer_of(client, path, body, is_stream=is_stream)
        for name, (path, body) in bodies.items()
        for is_stream in (False, True)
    }


def _chunks(lines: Iterable[str]) -> Iterator[Any]:
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def comparable(value: Any) -> Any:
    """Without ids and times, and logprobs to four digits: the rest of their bits is that of a batch."""
    if isinstance(value, dict):
        return {name: comparable(part) for name, part in value.items() if name not in _IDS}
    if isinstance(value, list):
        return [comparable(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def put_together(chunks: list[Any]) -> Any:
    """What the chunks of a stream say together of each choice, and the rest of the last one."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            found = choices.setdefault(choice["index"], {})
            for name, value in {**choice, **choice.get("delta", {})}.items():
                if name not in ("delta", "index"):
                    _add(found, name, comparable(value))
    usage = [comparable(chunk["usage"]) for chunk in chunks if chunk.get("usage")]
    return {index: choices[index] for index in sorted(choices)}, usage


def _add(found: dict[str, Any], name: str, value: Any) -> None:
    """Append a part of a text or list, and those in an object; a tool call goes on by its index."""
    if value is None:
        return
    if name == "tool_calls":
        for call in value:
            mine = found.setdefault(name, {}).setdefault(call["index"], {})
            _add(mine, "name", (call.get("function") or {}).get("name"))
            _add(mine, "arguments", (call.get("function") or {}).get("arguments"))
    elif isinstance(value, dict):
        for part, inner in value.items():
            _add(found.setdefault(name, {}), part, inner)
    elif name not in found or name in ("role", "finish_reason", "stop_reason"):
        found[name] = value
    elif isinstance(value, str | list):
        found[name] += value
