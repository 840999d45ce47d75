"""Ends of commands for programs: exit codes by outcome, errors as JSON, documented keys."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from l4queue import cli, errors
from l4queue.cli.json_keys import KEYS
from l4queue.cli.outcome import MEANINGS, ExitCode, exit_code
from l4queue.cli.requests import _record
from l4queue.client import BatchSummary, Client, RequestStatus, Result
from l4queue.models import RequestState
from l4queue.observe.explain import Event
from l4queue.observe.overview import Overview
from l4queue.protocol.reads import DeadLetter
from l4queue.protocol.records import RequestRecord

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 1),
        (errors.RequestTooLong("x", request_id="a"), 4),
        (errors.RequestDead("x", request_id="a"), 4),
        (errors.InvalidRequest("x", field="prompt"), 4),
        (errors.InvalidRequest("disk full", field="out"), 1),
        (errors.RequestCancelled("x", request_id="a"), 5),
        (errors.RequestExpired("x", request_id="a"), 6),
        (errors.UnknownRequest("x"), 7),
        (errors.ResultExpired("x"), 7),
        (errors.ServiceUnavailable("x"), 8),
        (errors.ResultTimeout("x"), 9),
        (errors.QueueFull("x", retry_after_s=1.0), 10),
    ],
)
def test_the_exit_code_tells_the_outcome(error: errors.L4QueueError, code: int) -> None:
    """A number of its own for each that a program may want to tell apart."""
    assert exit_code(error) == code


def test_every_code_has_a_meaning() -> None:
    """The table of docs/cli.md."""
    assert set(MEANINGS) == set(ExitCode)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command in this process."""
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_requests_from_the_shell_say_how_they_ended(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No worker runs here, so that a request waits until it is cancelled."""
    monkeypatch.setenv("L4_REDIS_URL", redis_url)
    monkeypatch.setenv("L4_NAMESPACE", namespace)
    code, out, _ = run(capsys, "enqueue", "hi", "--json")
    request_id = json.loads(out)["request_id"]
    assert code == 0
    assert json.loads(out).keys() == KEYS["enqueue"].keys()

    code, out, err = run(capsys, "result", request_id, "--timeout", "0.01", "--json")
    told = json.loads(out)["error"]
    assert (code, err, told["type"], told["request_id"]) == (9, "", "ResultTimeout", request_id)
    code, out, err = run(capsys, "enqueue", "hi", "--wait", "--timeout", "0.01")
    assert (code, out) == (9, "")
    with Client() as client:  # the line names the request, which goes on
        assert client.get(re.findall("[0-9a-f]{32}", err)[0]).status().state == "submitted"

    assert (
        run(capsys, "explain", request_id)[1].splitlines()[-1].strip() == "no worker serves: see `l4queue stats`"
    )
    code, out, _ = run(capsys, "cancel", request_id, "--json")
    assert (code, json.loads(out)) == (0, {"request_id": request_id, "cancelled": True, "state": "cancelled"})
    assert json.loads(out).keys() == KEYS["cancel"].keys()
    assert run(capsys, "cancel", request_id) == (0, "had already ended: cancelled\n", "")
    code, out, _ = run(capsys, "result", request_id, "--json")
    assert (code, json.loads(out)["error"]["type"]) == (5, "RequestCancelled")

    code, out, _ = run(capsys, "status", "nobody", "--json")
    told = json.loads(out)["error"]
    assert (code, told.pop("message") != "") == (7, True)
    assert told == {"type": "UnknownRequest", "request_id": "nobody", "field": None}
    code, out, _ = run(capsys, "enqueue", "hi", "--top-p", "7", "--json")
    assert (code, json.loads(out)["error"]["field"]) == (4, "top_p")


def test_wrong_usage_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output has one object, standard error nothing."""
    code, out, err = run(capsys, "result", "--json")
    assert (code, err) == (2, "")
    assert json.loads(out)["error"]["type"] == "UsageError"
    assert run(capsys, "result")[:2] == (2, "")


def test_the_documented_keys_are_those_of_the_code() -> None:
    """These commands print their values as they are."""
    kinds = {
        "enqueue --jsonl": BatchSummary,
        "result": Result,
        "dead": DeadLetter,
        "explain": Event,
        "stats": Overview,
    }
    for command, kind in kinds.items():
        assert list(KEYS[command]) == [field.name for field in fields(kind)]
    status = RequestStatus.of(RequestRecord(request_id="a", state=RequestState.DONE))
    assert list(KEYS["status"]) == list(_record(status))


def test_the_page_of_commands_is_what_they_say() -> None:
    """Otherwise: make docs. Every option has a meaning."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "generate_cli.py", "--check"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    rows = [line for line in (ROOT / "docs" / "cli.md").read_text().splitlines() if line.startswith("| `")]
    assert [row for row in rows if row.endswith("` |  |")] == []
