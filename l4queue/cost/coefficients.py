"""The shipped coefficient files: measured or composed cost models by hardware and model."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

from l4queue.cost.step import StepCost
from l4queue.errors import ConfigError
from l4queue.strict_json import JsonError, read_json

__all__ = ("CoefficientFile", "known_coefficients", "load_coefficients", "parse_coefficients", "read_coefficients")


_KINDS = {
    "gpu": str, "model": str, "engine": str, "source": str, "date": str,
    "kv_bytes_per_token": int, "assumptions": dict, "errors": dict,
}  # fmt: skip
_WORDS = {str: "a text", int: "a whole number ≥ 0", dict: "an object"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CoefficientFile:
    """One file: coefficients with where they come from."""

    gpu: str
    model: str
    engine: str
    source: str
    date: str
    cost: StepCost
    kv_bytes_per_token: int
    assumptions: dict[str, Any]
    errors: dict[str, Any]


def load_coefficients(gpu: str, model: str) -> StepCost:
    """Coefficients of a GPU and a model, such as "h100" and "llama-3.1-8b". ConfigError lists what is known."""
    return read_coefficients(gpu, model).cost


def read_coefficients(gpu: str, model: str) -> CoefficientFile:
    """The whole file of a GPU and a model. ConfigError lists what is known."""
    known = known_coefficients()
    key = (gpu.strip().lower(), model.strip().lower())
    if key not in known:
        listed = ", ".join(f"{m} on {g}" for g, m in known)
        raise ConfigError(f"no coefficients for model {model!r} on GPU {gpu!r}; known: {listed}")
    return _read(f"{key[1]}.{key[0]}.json")


@cache
def known_coefficients() -> tuple[tuple[str, str], ...]:
    """Pairs of GPU and model for which a file is shipped, sorted. Files are named `<model>.<gpu>.json`."""
    names = (item.name for item in files("l4queue").joinpath("coefficients").iterdir())
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return tuple(sorted((stem.rpartition(".")[2], stem.rpartition(".")[0]) for stem in stems))


@cache
def _read(name: str) -> CoefficientFile:
    return parse_coefficients(files("l4queue").joinpath("coefficients", name).read_text("utf-8"), name=name)


def parse_coefficients(text: str, *, name: str) -> CoefficientFile:
    """Read a coefficient file of one's own. ConfigError names the file and what is wrong in it."""
    try:
        data = read_json(text)
        values = data["coefficients"]
        unknown = set(values) - {f.name for f in fields(StepCost)}
        if unknown:
            raise ConfigError(f"{name}: unknown coefficient {sorted(unknown)[0]!r}")
        cost = StepCost(**values)
        parsed = CoefficientFile(
            gpu=data["gpu"],
            model=data["model"],
            engine=data["engine"],
            source=data["source"],
            date=data["date"],
            cost=cost,
            kv_bytes_per_token=data["kv_bytes_per_token"],
            assumptions=data["assumptions"],
            errors=data["errors"],
        )
    except JsonError as error:
        raise ConfigError(f"{name}: not a coefficient file: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{name}: not a coefficient file: {repr(error)[:200]}") from None
    for field in fields(StepCost):
        value = getattr(cost, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ConfigError(f"{name}: {field.name} must be a finite number ≥ 0, got {repr(value)[:80]}")
    for part, kind in _KINDS.items():
        found: Any = getattr(parsed, part)
        if type(found) is not kind or (part == "kv_bytes_per_token" and parsed.kv_bytes_per_token < 0):
            raise ConfigError(f"{name}: {part} must be {_WORDS[kind]}, got {repr(found)[:80]}")
    return parsed
