"""Facts about a running `l4queue up`: its URLs and processes, in a file of its data directory while it runs."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from l4queue.cli.stack.embedded import write_private
from l4queue.config import URL_FILE
from l4queue.errors import ConfigError
from l4queue.redis_url import SecretUrl, parse_url

__all__ = ("client_export", "ready_lines", "running", "starts", "state_place", "write_facts")

_FACTS, _LOCK = "up.json", "up.lock"
_MOST = 100  # deployments of one data directory; chosen: nobody runs more
_LEFT = 11  # characters of the first column


@contextmanager
def state_place(data_dir: Path) -> Iterator[Path]:
    """Directory for logs and facts of this `up`: `data_dir`, or `up-2`, ... in it beside others that run.

    It is locked until the end, and then the facts are removed.
    """
    for place in _places(data_dir):
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"data directory {place} cannot be used: {error.strerror}") from error
        if not _lock(descriptor):
            os.close(descriptor)
            continue
        facts = place / _FACTS
        facts.unlink(missing_ok=True)
        try:
            yield place
        finally:
            facts.unlink(missing_ok=True)
            os.close(descriptor)
        return
    raise ConfigError(f"{_MOST} deployments run in {data_dir}; choose another directory with --data-dir")


def write_facts(place: Path, facts: dict[str, Any]) -> None:
    """Keep them for `running`; only this user can read them, for the URL has a password."""
    write_private(place / _FACTS, json.dumps(facts) + "\n")


def running(data_dir: Path) -> list[dict[str, Any]]:
    """The facts of each `up` that is ready and runs with this data directory."""
    found = []
    for place in _places(data_dir):
        if not place.is_dir():
            break
        with suppress(OSError, ValueError):
            facts = json.loads((place / _FACTS).read_text("utf-8"))
            os.kill(int(facts["pid"]), 0)
            found.append(facts)
    return found


def starts(data_dir: Path) -> bool:
    """Whether an `up` holds this data directory; before it is ready, or while it ends, `running` is empty."""
    try:
        descriptor = os.open(data_dir / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


def ready_lines(facts: dict[str, Any]) -> list[str]:
    """What `up` says when it is ready, and `l4queue status` again. No password: others read terminals."""
    flower, url = facts["flower_url"], SecretUrl(facts["redis_url"])
    lines = [f"ready: Redis at {url}{f', Flower at {flower}' if flower else ''}"]
    told = [("model", facts["model"])]
    if facts.get("export"):
        told.append(("clients", facts["export"]))
    if facts.get("openai_url"):
        told += [("OpenAI API", facts["openai_url"]), ("try", facts["curl"])]
    if facts.get("metrics_urls"):
        told.append(("metrics", f"{facts['metrics_urls']['exporter']}, of all processes: {facts['targets_file']}"))
    told.append(("logs", f"{facts['logs']}/*.log"))
    told.append(("this again", f"l4queue status{_option(facts)}"))
    return [*lines, *(f"  {name:<{_LEFT}} {text}" for name, text in told)]


def client_export(url: SecretUrl, url_file: Path | None) -> str | None:
    """The line by which a shell of this user finds the Redis; None where it finds it anyway."""
    if url_file is not None:
        return f"export L4_REDIS_URL=$(cat {shlex.quote(str(url_file))})"
    if parse_url(url).password is not None:
        return "L4_REDIS_URL as it is set here"
    return None if url == "redis://127.0.0.1:6379/0" else f"export L4_REDIS_URL={shlex.quote(url.reveal())}"


def _places(data_dir: Path) -> Iterator[Path]:
    yield data_dir
    for number in range(2, _MOST + 1):
        yield data_dir / f"up-{number}"


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _option(facts: dict[str, Any]) -> str:
    """How `status` finds these facts from any directory; nothing where its default does."""
    data_dir = Path(facts["data_dir"])
    return "" if data_dir == URL_FILE.parent.absolute() else f" --data-dir {shlex.quote(str(data_dir))}"
