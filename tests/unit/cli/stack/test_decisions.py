"""Lines that `up` shows: decisions and trouble; the files have all of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from l4queue.cli.stack.decisions import DecisionLog, is_shown
from l4queue.cli.stack.logs import ConsoleLog, FileLog

AT = "2026-11-29 23:06:15,592"
REDIS = "19524:M 29 Nov 2026 23:06:01.171"


@pytest.mark.parametrize(
    ("name", "line", "shown"),
    [
        ("l4queue", "ready: Redis at redis://127.0.0.1:6379/0", True),
        ("planner", f"{AT} INFO l4queue.planner plan 2: workers changed, ranges kept", True),
        ("planner", f"{AT} INFO celery.app.trace Task l4queue.refine[1] succeeded in 0.1s: 'nothing'", False),
        ("planner", f"{AT} WARNING celery.worker.consumer.consumer the broker is away", True),
        ("worker-0", f"{AT} INFO l4queue.placement plan 2: worker-0 serves stage 0", False),
        ("worker-0", f"{AT} INFO l4queue.worker gave back 2 requests: engine died", True),
        ("worker-0", f"{AT} WARNING vllm.model_loader Attempted to load weight of another dtype", False),
        ("worker-0", f"{AT} ERROR vllm.engine EngineCore encountered a fatal error", True),
        ("worker-0", "RuntimeError: a line of a traceback", False),
        ("dispatcher-0", f"{AT} INFO l4queue.dispatcher refused request_id=a field=prompt", True),
        ("flower", " 'l4queue.replan']", False),
        ("redis", f"{REDIS} # Server initialized", False),
        ("redis", f"{REDIS} # WARNING Memory overcommit must be enabled!", False),
        ("redis", f"{REDIS} # Error writing to the AOF file: No space left on device", True),
        ("planner", json.dumps({"level": "INFO", "logger": "l4queue.planner", "message": "plan 2: x"}), True),
        ("planner", json.dumps({"level": "INFO", "logger": "celery.app.trace", "message": "x"}), False),
        ("planner", "{not JSON", False),
    ],
)
def test_decisions_and_trouble_are_shown(name: str, line: str, shown: bool) -> None:
    """In text and in JSON."""
    assert is_shown(name, line) is shown


@pytest.mark.parametrize("verbose", [False, True])
def test_every_line_is_in_the_file_of_its_process(verbose: bool, tmp_path: Path) -> None:
    """With --verbose the terminal has it too."""
    stream = io.StringIO()
    log = DecisionLog(ConsoleLog(stream, colour=False), FileLog(tmp_path), verbose=verbose)

    log.write("planner", "a round")
    log.close()

    assert log.path("planner") == tmp_path / "planner.log"
    assert (tmp_path / "planner.log").read_text() == "a round\n"
    assert stream.getvalue() == ("planner    | a round\n" if verbose else "")
