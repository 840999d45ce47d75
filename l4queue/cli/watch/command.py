"""`l4queue stats --watch`: repeated looks at a deployment, in a terminal or as lines of JSON."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from threading import Event
from typing import TYPE_CHECKING, Any

from l4queue.cli.watch.window import Picture, WatchWindow
from l4queue.config import load_settings
from l4queue.errors import ConfigError, ServiceUnavailable
from l4queue.observe.watch import Watch
from l4queue.protocol.executor import Executor
from l4queue.redis_url import redacted

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ("Watcher", "picture_json", "watch")

_RESIZE_S = 0.2  # a resized terminal is redrawn within this time


class Watcher:
    """The picture now, or the last one there was and since when Redis has been away."""

    def __init__(self, executor: Executor, namespace: str) -> None:
        self._watch = Watch(executor, namespace)
        self._window = WatchWindow()
        self.picture: Picture | None = None
        self.trouble = ""
        self._away_s: float | None = None

    @property
    def away_s(self) -> float:
        """For how long looks have failed, s."""
        return 0.0 if self._away_s is None else time.monotonic() - self._away_s

    def look(self) -> None:
        """Look once. What cannot be read now is told by `trouble`, and looked at again next time."""
        try:
            self.picture = self._window.add(self._watch.look())
            self.trouble, self._away_s = "", None
        except ServiceUnavailable as error:
            self.trouble = str(error)
            self._away_s = time.monotonic() if self._away_s is None else self._away_s


def watch(*, interval_s: float, as_json: bool) -> None:
    """Until Ctrl-C or SIGTERM, which end it well. ConfigError where there is no terminal to draw on."""
    if not as_json and not sys.stdout.isatty():
        raise ConfigError("--watch draws on a terminal; for programs use --json --watch")
    settings = load_settings()
    executor = Executor(settings.redis_url, retry_s=0.0)
    watcher = Watcher(executor, settings.namespace)
    try:
        with _ending_well() as ending:
            if as_json:
                _print_lines(watcher, interval_s, ending)
            else:
                title = f"l4queue {settings.namespace} · {redacted(settings.redis_url)}"
                _draw(watcher, interval_s, ending, title=title)
    except KeyboardInterrupt:
        pass
    finally:
        executor.close()


def picture_json(picture: Picture) -> dict[str, Any]:
    """The picture as plain values, with the sums that people see."""
    sums = [
        {"num_running": view.num_running, "num_slots": view.num_slots, "kv_share": round(view.kv_share, 4)}
        for view in picture.stages
    ]
    told = asdict(picture)
    told["stages"] = [stage | more for stage, more in zip(told["stages"], sums, strict=True)]
    return told


def _print_lines(watcher: Watcher, interval_s: float, ending: Event) -> None:
    """One line for each look; one with `error` where Redis is away."""
    due_s = time.monotonic()
    while not ending.is_set():
        watcher.look()
        if watcher.trouble or watcher.picture is None:
            told = {"type": "ServiceUnavailable", "message": watcher.trouble, "request_id": None, "field": None}
            line: dict[str, Any] = {"error": told, "away_s": round(watcher.away_s, 3)}
        else:
            line = picture_json(watcher.picture)
        print(json.dumps(line), flush=True)
        due_s = max(due_s + interval_s, time.monotonic())
        time.sleep(due_s - time.monotonic() if due_s > time.monotonic() else 0.0)


def _draw(watcher: Watcher, interval_s: float, ending: Event, *, title: str) -> None:
    """On the terminal's other screen, so that nothing is left behind; drawn anew at once when its size changes."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while not ending.is_set():
            watcher.look()
            live.update(_view(watcher, console, title), refresh=True)
            due_s, size = time.monotonic() + interval_s, console.size
            while (left_s := due_s - time.monotonic()) > 0 and not ending.is_set():
                time.sleep(min(_RESIZE_S, left_s))
                if console.size != size:
                    size = console.size
                    live.update(_view(watcher, console, title), refresh=True)


def _view(watcher: Watcher, console: Console, title: str) -> RenderableType:
    from rich.text import Text

    from l4queue.cli.watch.view import fit

    trouble = f"for {watcher.away_s:.0f} s: {watcher.trouble.partition('; try')[0]}" if watcher.trouble else ""
    if watcher.picture is None:
        return Text(f"{title}\n\n{trouble}\nTried again until it works, or until Ctrl-C.")
    return fit(watcher.picture, console, title=title, trouble=trouble)


@contextmanager
def _ending_well() -> Iterator[Event]:
    """SIGTERM ends like Ctrl-C, so that the terminal is put right.

    The event is for an interrupt that Python swallows: one that comes in a destructor.
    """
    ending = Event()

    def end(*_: Any) -> None:
        ending.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
