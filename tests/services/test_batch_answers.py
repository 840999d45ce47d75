"""Answers of a batch belong to its lines: files of others, stale or mixed up ones, through a real pipeline."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from l4queue.client.batch import source
from l4queue.errors import InvalidRequest
from tests.services.batches import Files, has_submitted, run, stopped_when, submitted, write_lines
from tests.services.pipeline import Pipeline, until

pytestmark = [pytest.mark.services]


def write_requests(path: Path, prompts: dict[str, Any]) -> None:
    """One line for each custom_id; two tokens are wanted unless the body says otherwise."""
    bodies = {c: p if isinstance(p, dict) else {"prompt": p} for c, p in prompts.items()}
    path.write_text("".join(json.dumps({"custom_id": c, "body": b}) + "\n" for c, b in bodies.items()))


async def test_requests_are_not_taken_for_their_answers(pipeline: Pipeline, files: Files) -> None:
    """A copy of the input as the output, with and without its last end of line: nothing is changed or sent."""
    write_requests(files.lines, {"a": "x", "b": "y", "c": "z"})
    for content in (files.lines.read_bytes(), files.lines.read_bytes().strip()):
        files.out.write_bytes(content)
        with pytest.raises(InvalidRequest, match=r"line \d of .*out.jsonl is not from a batch; choose another"):
            await run(pipeline, files)
        assert files.out.read_bytes() == content
    assert await submitted(pipeline) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"a": "other", "b": "y"},  # another prompt
        {"a": "x", "b": {"prompt": "y", "temperature": 0}},  # another parameter
        {"a": "x"},  # a line that is gone
        {"c": "x", "d": "y"},  # none of the lines
        {"b": "x", "a": "y"},  # the custom_ids change places
        {},
    ],
)
async def test_answers_of_other_lines_are_refused(
    pipeline: Pipeline, files: Files, change: dict[str, Any]
) -> None:
    """Whatever their custom_ids are: yesterday's output under today's input is refused, with what to do."""
    pipeline.start("w0")
    write_requests(files.lines, {"a": "x", "b": "y"})
    assert (await run(pipeline, files, max_tokens=2)).num_succeeded == 2
    before = files.out.read_bytes()
    write_requests(files.lines, change)
    with pytest.raises(InvalidRequest, match=r"answers no line of this input.*choose another file, or move"):
        await run(pipeline, files, max_tokens=2)
    assert (files.out.read_bytes(), await submitted(pipeline)) == (before, 2)


async def test_the_same_lines_are_answered_however_they_are_written(pipeline: Pipeline, files: Files) -> None:
    """New lines, another order of lines and keys, other spaces; but not another default of max_tokens."""
    pipeline.start("w0")
    write_requests(files.lines, {"a": "x", "b": {"prompt": "y", "max_tokens": 3}, "t": {"prompt": "z", "n": 2}})
    assert (await run(pipeline, files, max_tokens=2)).num_failed == 1
    files.lines.write_text(
        '{"body": {"n": 2, "prompt": "z"}, "custom_id": "t"}\n\n{"custom_id":"c","body":{"prompt":"new"}}\n'
        '{"body":{"max_tokens":3,"prompt":"\\u0079"},"custom_id":"b"}\n{"custom_id": "a", "body": {"prompt": "x"}}'
    )
    with pytest.raises(InvalidRequest, match="answers no line of this input"):
        await run(pipeline, files, max_tokens=4)
    summary = await run(pipeline, files, max_tokens=2)
    assert (summary.num_earlier, summary.num_succeeded, summary.num_failed) == (3, 3, 1)
    assert files.custom_ids() == Counter("abct")
    assert await submitted(pipeline) == 3


@pytest.mark.parametrize(
    "change",
    [
        b'{"custom_id": "t", "body": {"prompt": "z"}}\nbroken\n',  # what failed can be computed now
        b'{"custom_id": "t", "body": {"prompt": "z", "n": 2}}\notherwise broken\n',
        b'\n{"custom_id": "t", "body": {"prompt": "z", "n": 2}}\nbroken\n',  # a broken line has no other name
        b'{"custom_id": "t", "body": {"prompt": "z", "n": 2}}\n{"custom_id": "u", "body": {"prompt": "z"}}\n',
    ],
)
async def test_errors_of_other_lines_are_refused(pipeline: Pipeline, files: Files, change: bytes) -> None:
    """By custom_id, and by number where there is none."""
    pipeline.start("w0")
    files.lines.write_bytes(b'{"custom_id": "t", "body": {"prompt": "z", "n": 2}}\nbroken\n')
    assert (await run(pipeline, files)).num_failed == 2
    files.lines.write_bytes(change)
    with pytest.raises(InvalidRequest, match="answers no line of this input") as caught:
        await run(pipeline, files)
    assert caught.value.field == "errors"
    files.errors.unlink()
    assert (await run(pipeline, files)).is_complete


async def test_answers_and_errors_do_not_change_places(pipeline: Pipeline, files: Files) -> None:
    """An error in the output would count as a success."""
    pipeline.start("w0")
    write_requests(files.lines, {"a": "x", "t": {"prompt": "z", "n": 2}})
    assert (await run(pipeline, files)).is_complete
    with pytest.raises(InvalidRequest, match="is an error among answers"):
        await pipeline.client.run_batch(files.lines, files.errors, path_errors=files.out)
    files.errors.write_bytes(files.errors.read_bytes() + files.out.read_bytes())
    with pytest.raises(InvalidRequest, match="is an answer among errors"):
        await run(pipeline, files)


def forget_digests(path: Path) -> None:
    """The file as the release before wrote it."""
    path.write_bytes(re.sub(rb'(?m)^(\{"id": "batch_req_\w+?)_[0-9a-f]{40}"', rb'\1"', path.read_bytes()))


async def test_an_unfinished_batch_of_an_earlier_release_goes_on(pipeline: Pipeline, files: Files) -> None:
    """Its answers are known by the ids of their requests; those of another or a finished batch by nothing."""
    write_lines(files.lines, 100)
    with files.lines.open("a") as file:
        file.write(
            'nonsense\n{"custom_id": "c5", "body": {}}\n{"custom_id": "n", "body": {"prompt": "x", "n": 2}}\n'
        )
    async with stopped_when(pipeline, files, 100):
        pass
    identity = files.out.with_name("out.jsonl.batch.json")
    told = identity.read_bytes()
    pipeline.start("w0")
    assert (await run(pipeline, files)).num_succeeded == 100
    files.out.write_bytes(b"".join(files.out.read_bytes().splitlines(keepends=True)[:60]))
    identity.write_bytes(told)
    for file in (files.out, files.errors):
        forget_digests(file)
    assert not re.search(rb"[0-9a-f]{40}", files.out.read_bytes() + files.errors.read_bytes())
    summary = await run(pipeline, files)
    assert (summary.is_complete, summary.num_succeeded, summary.num_failed) == (True, 100, 3)
    assert (summary.num_earlier, await submitted(pipeline)) == (63, 140)
    assert files.custom_ids() == Counter([*(f"c{i}" for i in range(100)), "c5", "n", None])

    forget_digests(files.out)
    for known in (None, '{"batch_id": "another"}'):
        if known:
            identity.write_text(known)
        with pytest.raises(InvalidRequest, match="does not say which line it answers"):
            await run(pipeline, files)


async def test_a_line_that_raises_anything_is_an_error_of_its_own(
    pipeline: Pipeline, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest goes on, and the next run finds it answered."""
    pipeline.start("w0")
    odd = [
        b'{"custom_id": "long", "body": {"prompt": "x", "temperature": ' + b"9" * 400 + b"}}",
        b'{"custom_id": "longer", "body": {"prompt": "x", "seed": ' + b"9" * 5000 + b"}}",
        b'{"custom_id": "half", "body": {"prompt": "x", "stop": "\\ud800"}}',
        b'{"custom_id": "model", "body": {"prompt": "x", "model": ' + b"[" * 60 + b"]" * 60 + b"}}",
        b'{"custom_id": "deep", "body": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"custom_id": "fine", "body": {"prompt": "x", "max_tokens": 2}}',
    ]
    files.lines.write_bytes(b"\n".join(odd))
    real = source.parse_line

    def failing(raw: bytes, **options: Any) -> Any:
        if b"fine" not in raw and b"half" in raw:
            raise RecursionError("too deep")
        return real(raw, **options)

    monkeypatch.setattr(source, "parse_line", failing)
    summary = await run(pipeline, files)
    assert (summary.num_succeeded, summary.num_failed, summary.is_complete) == (1, 5, True)
    params = {f["custom_id"]: f["response"]["body"]["error"]["param"] for f in files.failures() if f["custom_id"]}
    assert params == {"long": "temperature", "longer": "seed", "half": "body", "model": "model"}
    assert (await run(pipeline, files)).num_earlier == 6


async def test_an_input_that_changes_before_its_end_is_noticed(pipeline: Pipeline, files: Files) -> None:
    """However few lines it has."""
    write_lines(files.lines, 300)
    stopping = asyncio.create_task(run(pipeline, files, max_in_flight=50))
    await until(lambda: has_submitted(pipeline))
    write_lines(files.lines, 299)
    pipeline.start("w0")
    with pytest.raises(InvalidRequest, match="has changed"):
        await stopping
