"""Log lines carry the facts that their calls give, as text and as JSON."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.cli.stack.logs import ConsoleLog
from l4queue.logs import BrokerOutage, JsonFormatter, TextFormatter, formatter
from l4queue.protocol.upkeep import UpkeepReport

ROOT = Path(__file__).parents[2]
LEVELS = ("debug", "info", "warning", "error", "critical", "exception")


def _calls() -> Iterator[tuple[str, str, list[str]]]:
    """Every log call of the product that gives facts: where it is, its message, the names of the facts."""
    for package in ("l4queue", "dispatcher", "workers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                given = next((k.value for k in node.keywords if k.arg == "extra"), None)
                if node.func.attr in (*LEVELS, "log") and given is not None:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", _message(node), _names(given)


def _message(node: ast.Call) -> str:
    first = node.args[0]
    return str(first.value) if isinstance(first, ast.Constant) else ""


def _names(given: ast.expr) -> list[str]:
    if isinstance(given, ast.Dict):
        return [str(key.value) for key in given.keys if isinstance(key, ast.Constant)]
    assert ast.unparse(given) == "asdict(report)"  # the one call that gives a whole report
    return [field.name for field in fields(UpkeepReport)]


CALLS = list(_calls())


def _record(message: str, extra: dict[str, object], *, name: str = "l4queue.test") -> logging.LogRecord:
    return logging.getLogger(name).makeRecord(name, logging.ERROR, "file", 1, message, (), None, extra=extra)


def test_there_are_calls_with_facts() -> None:
    """The alarms that operators are told to look for are among them."""
    assert {"refused", "repaired", "plan", "upkeep"} <= {message for _, message, _ in CALLS}


@pytest.mark.parametrize(("where", "message", "names"), CALLS, ids=[where for where, _, _ in CALLS])
def test_every_call_comes_out_with_its_facts(where: str, message: str, names: list[str]) -> None:
    """In both formats, under their names."""
    assert names
    extra: dict[str, object] = {name: f"v-{index}" for index, name in enumerate(names)}
    record = _record(message.replace("%", ""), extra)

    text, told = TextFormatter().format(record), json.loads(JsonFormatter().format(record))

    assert all(f" {name}={value}" in text for name, value in extra.items()), text
    assert extra.items() <= told.items()
    assert (told["level"], told["logger"]) == ("ERROR", "l4queue.test")


@given(st.text(), st.text())
def test_a_line_stays_a_line(message: str, value: str) -> None:
    """Whatever a client puts into an id neither breaks a line nor looks like another fact."""
    record = _record("refused", {"request_id": value, "field": message})

    text, told = TextFormatter().format(record), JsonFormatter().format(record)

    assert "\n" not in text + told
    assert (json.loads(told)["request_id"], json.loads(told)["field"]) == (value, message)
    rest = text.partition(" refused request_id=")[2]
    read, end = json.JSONDecoder().raw_decode(rest) if rest.startswith('"') else (value, len(value))
    assert read == value
    assert rest[end:].startswith(" field=")


def test_names_that_a_library_puts_into_every_record_are_no_facts() -> None:
    """As vLLM does once it is imported."""
    before, plain = logging.getLogRecordFactory(), logging.LogRecord

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = plain(*args, **kwargs)
        record.vllm_process_name = "MainProcess"
        return record

    logging.setLogRecordFactory(factory)
    try:
        record = _record("refused", {"request_id": "a"})
        line, told = TextFormatter().format(record), json.loads(JsonFormatter().format(record))
    finally:
        logging.setLogRecordFactory(before)

    assert line.endswith("refused request_id=a")
    assert "vllm_process_name" not in told


def test_facts_stand_before_a_traceback() -> None:
    """Also where an exception is logged."""
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.getLogger("l4queue.x").makeRecord(
            "l4queue.x", logging.ERROR, "f", 1, "repaired", (), sys.exc_info(), extra={"request_id": "a"}
        )
    lines = formatter("text").format(record).splitlines()
    told = json.loads(formatter("json").format(record))

    assert lines[0].endswith("repaired request_id=a")
    assert lines[-1] == "ValueError: broken"
    assert told["exception"].endswith("ValueError: broken")


def test_up_writes_json_lines_with_the_name_of_the_process() -> None:
    """Those of Redis or of a crash too, which know nothing of the format."""
    out = io.StringIO()
    log = ConsoleLog(out, as_json=True)
    log.write("worker-0", '{"message": "refused", "request_id": "a"}')
    log.write("redis", "* Ready to accept connections")
    log.write("odd", "{not json")
    log.close()

    first, second, third = map(json.loads, out.getvalue().splitlines())

    assert first == {"process": "worker-0", "message": "refused", "request_id": "a"}
    assert (second["process"], second["message"]) == ("redis", "* Ready to accept connections")
    assert third["message"] == "{not json"


def test_celery_says_once_that_its_broker_is_away() -> None:
    """One line without a traceback; a defect keeps its traceback."""
    outage, logger = BrokerOutage(), logging.getLogger("celery.beat")

    def record(message: str, error: Exception) -> logging.LogRecord:
        told = (type(error), error, None)
        return logger.makeRecord("celery.beat", logging.ERROR, "f", 1, message, ("a", "b"), told)

    first = record("Message Error: %s\n%s", ConnectionError("refused"))
    defect = record("Other: %s %s", KeyError("x"))

    assert outage.filter(first)
    assert TextFormatter().format(first).endswith("celery.beat refused")
    assert not outage.filter(record("Message Error: %s\n%s", ConnectionError("refused")))
    assert outage.filter(defect)
    assert "KeyError" in TextFormatter().format(defect)


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "dispatcher", "--log-format", "json"),
        ("-m", "dispatcher.exporter", "--log-format=json"),
        ("-m", "celery", "--quiet", "-A", "dispatcher.app", "beat", "--pidfile=", "--max-interval", "1"),
    ],
    ids=["dispatcher", "exporter", "beat"],
)
def test_processes_log_as_they_are_told(command: tuple[str, ...], tmp_path: Path) -> None:
    """By option or by setting. Redis is away, which is the first thing that they say."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("L4_")}
    environment |= {"L4_REDIS_URL": "redis://127.0.0.1:1/0", "L4_METRICS_PORT": "0", "PYTHONPATH": str(ROOT)}
    if "exporter" in command[1]:
        environment["L4_METRICS_PORT"] = "-1"  # refused: the option was taken, and the setting read
    if "celery" in command:
        environment["L4_LOG_FORMAT"] = "json"
    process = subprocess.Popen(
        (sys.executable, *command), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    first = next(line for line in process.stderr if "Warning" not in line and line.startswith(("{", "error")))
    process.kill()
    process.wait()

    if "exporter" in command[1]:
        assert first.startswith("error: L4_METRICS_PORT")
    else:
        assert json.loads(first)["logger"].startswith(("l4queue", "celery"))
