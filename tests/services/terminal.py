"""A program on a real pseudo-terminal, its output interpreted as a terminal would: what a person sees."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
from collections.abc import Mapping, Sequence

import pyte

__all__ = ("Terminal",)


class Terminal:
    """One program with the terminal as its standard input, output and error. Its screen has no history."""

    def __init__(self, command: Sequence[str], *, columns: int, rows: int, environment: Mapping[str, str]) -> None:
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self._raw = bytearray()
        self._master, slave = pty.openpty()
        self._set_size(columns, rows)
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**environment, "TERM": "xterm-256color"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def lines(self) -> list[str]:
        """The rows of the screen as they are now, without blanks at their ends."""
        with self._lock:
            return [line.rstrip() for line in self._screen.display]

    @property
    def raw(self) -> bytes:
        """All that was written to the terminal so far."""
        with self._lock:
            return bytes(self._raw)

    def shows(self, *texts: str) -> bool:
        """Whether all these are on the screen now."""
        screen = "\n".join(self.lines)
        return all(text in screen for text in texts)

    def resize(self, columns: int, rows: int) -> None:
        """As if the window were dragged: the kernel tells the program."""
        with self._lock:
            self._screen.resize(rows, columns)
        self._set_size(columns, rows)

    def type(self, keys: bytes) -> None:
        """Press keys; Ctrl-C is 0x03."""
        os.write(self._master, keys)

    def close(self) -> None:
        """End the program if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(120)
        os.close(self._master)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the program has ended, and with it the other side
                return
            if not data:
                return
            with self._lock:
                self._raw += data
                self._stream.feed(data)
