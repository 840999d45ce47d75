"""A full disk is called a full disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from l4queue import cli
from l4queue.cli.stack.disk import full_disk


def test_it_is_seen_in_the_last_words_of_a_redis_or_by_the_room_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis 7 with appendfsync always says this and ends."""
    words = (
        "1:M 29 Nov 2026 16:01:22.105 # Can't recover from AOF write error ... No space left on device. Exiting..."
    )
    assert full_disk(tmp_path, ["ready", words]) is not None
    assert full_disk(tmp_path, ["ready"]) is None
    assert full_disk(tmp_path / "gone", [words]) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert full_disk(tmp_path, []) == f"the disk of {tmp_path} is full (0.0 MB left): make room"


def test_it_is_one_line_from_any_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place of a traceback."""

    def run(**_: object) -> None:
        (tmp_path / "out.jsonl").symlink_to("/dev/full")
        (tmp_path / "out.jsonl").write_text("x")

    monkeypatch.setattr(cli, "build_app", lambda: run)

    assert cli.main([]) == 1
    assert capsys.readouterr().err.startswith("error: the disk is full: ")
