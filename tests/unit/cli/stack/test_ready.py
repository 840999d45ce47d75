"""Facts of a running `up`: the block that is printed when it is ready, and who may write where."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from l4queue.cli.stack.ready import client_export, ready_lines, running, starts, state_place, write_facts
from l4queue.redis_url import SecretUrl


def facts(data_dir: Path, **more: Any) -> dict[str, Any]:
    return {
        "redis_url": "redis://:secret@127.0.0.1:7000/0", "flower_url": "http://127.0.0.1:5555", "metrics_urls": {},
        "model": "/m/tiny", "pid": os.getpid(), "data_dir": str(data_dir), "logs": f"{data_dir}/logs",
        "export": "export L4_REDIS_URL=$(cat /d/url)", **more,
    }  # fmt: skip


def test_the_block_has_the_urls_and_the_lines_for_clients_and_no_password(tmp_path: Path) -> None:
    """The line for HTTP only where there is an endpoint."""
    text = "\n".join(ready_lines(facts(tmp_path, openai_url="http://127.0.0.1:8000/v1", curl="curl it")))

    assert text.startswith("ready: Redis at redis://***@127.0.0.1:7000/0, Flower at http://127.0.0.1:5555\n")
    assert "secret" not in text
    assert "export L4_REDIS_URL=$(cat /d/url)" in text
    assert "  OpenAI API  http://127.0.0.1:8000/v1\n" in text
    assert "  try         curl it\n" in text
    assert f"l4queue status --data-dir {tmp_path}" in text
    assert "curl" not in "\n".join(ready_lines(facts(tmp_path)))


def test_facts_are_there_while_it_runs(tmp_path: Path) -> None:
    """Those of an earlier run that was killed are gone at the next start, and its own at its end."""
    assert not starts(tmp_path)
    with state_place(tmp_path) as place:
        assert starts(tmp_path)
        write_facts(place, facts(tmp_path))
        assert (place / "up.json").stat().st_mode & 0o777 == 0o600
        assert [found["model"] for found in running(tmp_path)] == ["/m/tiny"]
    assert running(tmp_path) == []
    assert not starts(tmp_path)
    write_facts(tmp_path, facts(tmp_path))
    with state_place(tmp_path):
        assert running(tmp_path) == []


def test_a_second_one_in_the_same_directory_has_files_of_its_own(tmp_path: Path) -> None:
    """And `status` tells of both."""
    with state_place(tmp_path) as first, state_place(tmp_path) as second:
        assert (first, second) == (tmp_path, tmp_path / "up-2")
        for place, model in ((first, "a"), (second, "b")):
            write_facts(place, facts(tmp_path, model=model))
        assert [found["model"] for found in running(tmp_path)] == ["a", "b"]


def test_how_a_shell_finds_the_redis(tmp_path: Path) -> None:
    """Nothing where it finds it anyway."""
    assert (
        client_export(SecretUrl("redis://:s@h:1/0"), Path("/a b/url")) == "export L4_REDIS_URL=$(cat '/a b/url')"
    )
    assert client_export(SecretUrl("redis://:s@h:1/0"), None) == "L4_REDIS_URL as it is set here"
    assert client_export(SecretUrl("redis://h:1/0"), None) == "export L4_REDIS_URL=redis://h:1/0"
    assert client_export(SecretUrl("redis://127.0.0.1:6379/0"), None) is None
