"""One line of the report of `l4queue doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ("Check", "CheckResult")


class CheckResult(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report; `advice` says what to do when it is not ok."""

    name: str
    verdict: CheckResult
    detail: str
    advice: str | None = None
