"""The client without POSIX, its modules and calls, as on Windows: enqueue, stream, result, a batch."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services.pipeline import Pipeline

pytestmark = pytest.mark.services
PROGRAM = """
import asyncio, json, os, subprocess, sys, tempfile  # of the standard library, for this platform
for name in ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios"):
    sys.modules[name] = None
for name in ("fork", "geteuid", "getpgid", "getuid", "killpg", "pread", "pwrite", "register_at_fork"):
    delattr(os, name)

from l4queue import AsyncClient, Client

with Client() as client:
    handle = client.enqueue("hello", max_tokens=5)
    tokens = sum(len(chunk.token_ids) for chunk in handle.stream())
    done = [one.id for one in client.as_completed([handle])]
    summary = client.run_batch(sys.argv[1], sys.argv[2])

async def main():
    async with AsyncClient() as client:
        return (await (await client.enqueue("hello", max_tokens=5)).result()).output_tokens

again = handle.result().output_tokens
print(json.dumps([tokens, again, done == [handle.id], asyncio.run(main()), summary.num_succeeded]))
"""


async def test_a_client_needs_nothing_of_posix(pipeline: Pipeline, tmp_path: Path) -> None:
    """Also the file beside `l4queue up`, which is read for its URL."""
    pipeline.start("w0")
    lines = [{"custom_id": str(n), "body": {"prompt": "hi", "max_tokens": 2}} for n in range(3)]
    (tmp_path / "in").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / ".l4queue").mkdir()
    (tmp_path / ".l4queue" / "url").write_text(pipeline.settings.redis_url.reveal())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("L4_")}
    environment |= {"L4_NAMESPACE": pipeline.settings.namespace, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, "in", "out"]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [5, 5, True, 5, 3]
    assert len((tmp_path / "out").read_text().splitlines()) == 3
