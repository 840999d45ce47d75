"""API keys of the door: names with digests, limits and an expiry, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from l4queue.errors import ConfigError
from l4queue.protocol.limits import Allowance

__all__ = ("ApiKey", "ApiKeys", "read_keys")

log = logging.getLogger("l4queue.gateway")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_LEAST_CHARS = 16  # of a key; chosen: 64 bits in hexadecimal
_MOST_KEYS = 1000  # each is a label of metrics, and is compared with every request's key
_MOST_COUNT = 10**12  # of a limit; chosen: far below what a double counts exactly
_SETTING_NAME = "default"
_LIMITS = ("requests_per_minute", "tokens_per_minute", "backlog_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key: whose it is, how much may be asked for with it, and until when (s since 1970)."""

    name: str
    digest: bytes
    allowance: Allowance = field(default_factory=Allowance)
    expires_s: float = math.inf


class ApiKeys:
    """The accepted keys of a setting and of a file. None: everybody is let in, under no name.

    A file that changes is read again with the next request, and by batches that run. While it is wrong, the keys
    of before are in force. Threads may share it.
    """

    def __init__(self, *, key: str, file: str) -> None:
        self._key, self._file = key, file
        self._seen = _signature(file)
        self._keys = read_keys(key=key, file=file)
        self._is_open = not self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def caller(self, authorization: str) -> str | None:
        """The name that an `Authorization` header stands for: "" where there are no keys, None for a wrong one."""
        if self._is_open:
            return ""
        self._refresh()
        scheme, _, key = authorization.partition(" ")
        shown = hashlib.sha256(key.strip().encode()).digest()
        found = None
        for one in self._keys.values():  # all of them, whichever fits
            if hmac.compare_digest(shown, one.digest):
                found = one
        is_good = found is not None and scheme.lower() == "bearer" and time.time() < found.expires_s
        return found.name if found is not None and is_good else None

    def allowance(self, caller: str) -> Allowance:
        """How much this caller may ask for at this moment; without bounds where it has no key, or no longer."""
        if caller:
            self._refresh()
        return self._keys[caller].allowance if caller in self._keys else Allowance()

    def _refresh(self) -> None:
        seen = _signature(self._file)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = read_keys(key=self._key, file=self._file)
        except ConfigError as error:
            log.error("the API keys of before are in force: %s", error)
        else:
            log.info("%d API keys are in force", len(self._keys))


def _signature(file: str) -> tuple[int, ...]:
    """What changes with a file; nothing where there is none."""
    try:
        told = os.stat(file)
    except OSError:
        return ()
    return told.st_ino, told.st_size, told.st_mtime_ns


def read_keys(*, key: str, file: str) -> Mapping[str, ApiKey]:
    """The keys of a setting and of a file, by name; ConfigError says what is wrong with a line.

    A line of the file is a name, a key (or `sha256:` and its digest in hexadecimal), and what bounds it as
    `name=value`; # begins a comment.
    """
    keys: dict[str, ApiKey] = {}
    if key:
        keys[_SETTING_NAME] = ApiKey(name=_SETTING_NAME, digest=_digest(key, where="L4_HTTP_KEY"))
    if not file:
        return keys
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"L4_HTTP_KEYS_FILE: {file} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{file}, line {number}"
        one = _parsed(words, where=where)
        if one.name in keys:
            raise ConfigError(f"{where}: the name {one.name} is there already")
        if twin := next((other.name for other in keys.values() if other.digest == one.digest), ""):
            raise ConfigError(f"{where}: the key is that of {twin}")
        keys[one.name] = one
        if len(keys) > _MOST_KEYS:
            raise ConfigError(f"{where}: there are more than {_MOST_KEYS} keys")
    if not keys:
        raise ConfigError(f"L4_HTTP_KEYS_FILE: {file} has no key")
    return keys


def _parsed(words: Sequence[str], *, where: str) -> ApiKey:
    if len(words) < 2 or not _NAME.fullmatch(words[0]):
        raise ConfigError(f"{where}: give a name of letters, digits, '_', '.', '-' and a key")
    limits: dict[str, int] = {}
    expires_s = math.inf
    for word in words[2:]:
        name, _, value = word.partition("=")
        if name in _LIMITS and value.isascii() and value.isdigit() and 1 <= int(value) <= _MOST_COUNT:
            limits[name] = int(value)
        elif name == "expires":
            expires_s = _moment_s(value, where=where)
        else:
            told = f"{', '.join(f'{name}=N' for name in _LIMITS)} or expires=DATE, with N of at least 1"
            raise ConfigError(f"{where}: behind the key give {told}")
    digest = _digest(words[1], where=where)
    return ApiKey(name=words[0], digest=digest, allowance=Allowance(**limits), expires_s=expires_s)


def _moment_s(text: str, *, where: str) -> float:
    """A date, or a date and time, of UTC unless it says otherwise."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{where}: expires is a date such as 2027-01-31 or 2027-01-31T12:00:00Z") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _digest(key: str, *, where: str) -> bytes:
    if found := _DIGEST.fullmatch(key):
        return bytes.fromhex(found[1])
    if len(key) < _LEAST_CHARS:
        raise ConfigError(f"{where}: a key has at least {_LEAST_CHARS} characters")
    return hashlib.sha256(key.encode()).digest()
