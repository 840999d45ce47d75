"""API keys of the door: names with digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l4queue.errors import ConfigError

__all__ = ("ApiKeys", "read_keys")

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_LEAST_CHARS = 16  # of a key; chosen: 64 bits in hexadecimal
_SETTING_NAME = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKeys:
    """SHA-256 digests of the accepted keys, each under the name of its caller. None: everybody is let in."""

    digests: Mapping[str, bytes]

    def caller(self, authorization: str) -> str | None:
        """The name that an `Authorization` header stands for: "" where there are no keys, None for a wrong one."""
        if not self.digests:
            return ""
        scheme, _, key = authorization.partition(" ")
        shown = hashlib.sha256(key.strip().encode()).digest()
        found = None
        for name, digest in self.digests.items():  # all of them, whichever fits
            if hmac.compare_digest(shown, digest):
                found = name
        return found if scheme.lower() == "bearer" else None


def read_keys(*, key: str, file: str) -> ApiKeys:
    """The keys of a setting and of a file; ConfigError says what is wrong with a line.

    A line of the file is a name and a key, or `sha256:` and its digest in hexadecimal; # begins a comment.
    """
    digests: dict[str, bytes] = {}
    if key:
        digests[_SETTING_NAME] = _digest(key, where="L4_HTTP_KEY")
    if not file:
        return ApiKeys(digests=digests)
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"L4_HTTP_KEYS_FILE: {file} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{file}, line {number}"
        if len(words) != 2 or not _NAME.fullmatch(words[0]):
            raise ConfigError(f"{where}: give a name of letters, digits, '_', '.', '-' and a key")
        if words[0] in digests:
            raise ConfigError(f"{where}: the name {words[0]} is there already")
        digests[words[0]] = _digest(words[1], where=where)
    if not digests:
        raise ConfigError(f"L4_HTTP_KEYS_FILE: {file} has no key")
    return ApiKeys(digests=digests)


def _digest(key: str, *, where: str) -> bytes:
    if found := _DIGEST.fullmatch(key):
        return bytes.fromhex(found[1])
    if len(key) < _LEAST_CHARS:
        raise ConfigError(f"{where}: a key has at least {_LEAST_CHARS} characters")
    return hashlib.sha256(key.encode()).digest()
