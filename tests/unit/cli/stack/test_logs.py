"""Lines of supervised processes: splitting, prefixes, readers that are slow or gone."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.cli.stack.logs import ConsoleLog, FileLog, LineSplitter


@given(st.lists(st.text("ab é", max_size=8), max_size=8), st.integers(1, 7))
def test_lines_do_not_depend_on_how_the_bytes_were_cut(lines: list[str], step: int) -> None:
    """Not even in the middle of a character."""
    data = "\n".join(lines).encode()
    splitter = LineSplitter()

    seen = [line for i in range(0, len(data), step) for line in splitter.feed(data[i : i + step])]
    seen += splitter.flush()

    assert seen == [line.rstrip() for line in lines if line.strip()]


def test_progress_bars_and_endless_lines_are_cut() -> None:
    """A carriage return ends a line; without any end, memory stays bounded."""
    splitter = LineSplitter()

    assert list(splitter.feed(b"10%\r20%\r\nx")) == ["10%", "20%"]
    pieces = list(splitter.feed(b"y" * 100_000))

    assert len(pieces) == 6
    assert "".join([*pieces, *splitter.flush()]) == "x" + "y" * 100_000


@pytest.mark.parametrize(
    ("colour", "expected"), [(False, "worker-0   | hello\n"), (True, "\x1b[36mworker-0   |\x1b[0m hello\n")]
)
def test_the_console_prefixes_each_line_with_its_process(colour: bool, expected: str) -> None:
    """Colours only where they are wanted."""
    stream = io.StringIO()
    log = ConsoleLog(stream, colour=colour)

    log.write("worker-0", "hello")
    log.close()

    assert stream.getvalue() == expected


def test_a_reader_that_does_not_read_holds_nobody_up_and_lost_lines_are_counted() -> None:
    """A held terminal must not stop the workers that log to it."""
    gate = threading.Event()

    class Held(io.StringIO):
        def write(self, text: str) -> int:
            gate.wait(120)
            return super().write(text)

    stream = Held()
    log = ConsoleLog(stream, colour=False, max_lines=4)

    for number in range(50):  # would block here for ever if writing did
        log.write("p", str(number))
    gate.set()
    log.close()

    lines = stream.getvalue().splitlines()
    dropped = [int(line.split("|")[1].split()[0]) for line in lines if "lines dropped" in line]
    assert sum(dropped) + len(lines) - len(dropped) == 50


def test_a_reader_that_has_gone_is_reported_once() -> None:
    """`l4queue up | head` has to end."""
    reading, writing = os.pipe()
    os.close(reading)
    gone = threading.Event()
    stream = os.fdopen(writing, "w", buffering=1)
    log = ConsoleLog(stream, on_broken=gone.set)

    log.write("p", "x")

    assert gone.wait(120)
    log.close()
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_files_are_one_for_each_process_and_our_notes_are_shown_too(tmp_path: Path) -> None:
    """The demo keeps the terminal for itself."""
    notes = io.StringIO()
    log = FileLog(tmp_path / "logs", notes=notes)

    log.write("worker-0", "loading")
    log.write("l4queue", "waiting")
    log.close()

    assert (tmp_path / "logs" / "worker-0.log").read_text() == "loading\n"
    assert notes.getvalue() == "waiting\n"


def test_a_file_is_turned_over_and_one_of_the_past_is_kept(tmp_path: Path) -> None:
    """A deployment that runs for months must not fill the disk with its log."""
    log = FileLog(tmp_path, max_bytes=10)

    for number in range(7):
        log.write("worker-0", f"line {number}")
    log.close()

    assert (tmp_path / "worker-0.log").read_text() == "line 6\n"
    assert (tmp_path / "worker-0.log.1").read_text() == "line 4\nline 5\n"


def test_a_full_disk_loses_log_lines_and_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Children go on: what fails is the log, not they."""
    (tmp_path / "worker-0.log").symlink_to("/dev/full")
    log = FileLog(tmp_path)

    log.write("worker-0", "one")
    log.write("worker-0", "two")
    log.close()

    assert capsys.readouterr().err == f"the disk of {tmp_path} is full: log lines are lost\n"
