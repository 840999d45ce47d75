"""Seeded mistakes in the Lua scripts, to prove that the tests would notice: `python -m tests.protocol.mutants`."""

from __future__ import annotations

import argparse
import inspect
import itertools
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from l4queue.protocol import batching as batching_module
from l4queue.protocol import executor as door_module
from l4queue.protocol.executor import Executor
from l4queue.protocol.scripts import Script, all_scripts, assembled, lua_text
from tests.protocol.machine import ProtocolMachine
from tests.protocol.scene import Scene
from tests.protocol.server import RedisServer, redis_binary

__all__ = ("MUTANTS", "Mutant", "killed_by_machine", "killed_by_tests", "mutated")

_MODULES = (
    "transitions",
    "output",
    "take",
    "blame",
    "pardon",
    "upkeep",
    "moves",
    "admission",
    "illegal",
    "totals",
    "following",
    "keeping",
    "identity",
    "bounds",
    "batches",
    "batching",
    "cached",
    "holders",
    "inbox_facts",
    "readiness",
    "leased_arrivals",
    "ended",
    "survey",
    "limits",
    "line_limits",
)
_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake: in this script (or a part that all share) `old` reads `new`."""

    name: str
    script: str
    old: str
    new: str
    by_machine: bool = True  # whether random histories must find it too; else only a written test can


def _load() -> tuple[Mutant, ...]:
    rows = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))["mutant"]
    return tuple(Mutant(**row) for row in rows)


MUTANTS = _load()


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """The scripts with this mistake, for every door of this process."""

    own = lua_text(mutant.script)
    assert own.count(mutant.old) == 1, f"{mutant.name}: its text occurs {own.count(mutant.old)} times"
    changed = own.replace(mutant.old, mutant.new)

    def wrong(name: str) -> Script:
        return assembled(name, lambda part: changed if part == mutant.script else lua_text(part))

    before: Any = batching_module.script, door_module.all_scripts
    batching: Any = batching_module
    doors: Any = door_module
    batching.script = cache(wrong)
    doors.all_scripts = lambda: tuple(wrong(one.name) for one in all_scripts())
    try:
        yield
    finally:
        batching.script, doors.all_scripts = before


def killed_by_tests(server: RedisServer, mutant: Mutant) -> str | None:
    """Name of the first written test that fails with this mistake; None when it lives."""
    executor = Executor(server.url)
    try:
        with mutated(mutant):
            return next((name for name, test in _tests() if not _passes(test, executor)), None)
    finally:
        executor.close()


def _passes(test: Callable[[Scene], None], executor: Executor) -> bool:
    scene = Scene(executor, f"mutant{next(_NUMBERS)}")
    try:
        test(scene)
    except Exception:  # any failure is a kill, a script error too
        return False
    finally:
        scene.close()
    return True


def killed_by_machine(server: RedisServer, mutant: Mutant, *, examples: int, first: int) -> str | None:
    """The failed check when random histories meet this mistake; None when it lives."""

    class Machine(ProtocolMachine):
        pass

    Machine.executor = Executor(f"redis://127.0.0.1:{server.port}/9")
    budget = settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    with mutated(mutant):
        try:
            run_state_machine_as_test(seed(first)(Machine), settings=budget)
        except Exception as failure:  # any failure is a kill
            return str(failure).split("\n")[0][:60] or type(failure).__name__
        finally:
            Machine.executor.close()
    return None


def _tests() -> Iterator[tuple[str, Callable[[Scene], None]]]:
    """Every written test that needs nothing but a scene, with each of its parameters."""
    for module in (import_module(f"tests.protocol.test_{name}") for name in _MODULES):
        for name, function in vars(module).items():
            if name.startswith("test_") and not inspect.iscoroutinefunction(function):
                yield from _cases(module, name, function)


def _cases(module: ModuleType, name: str, function: Any) -> Iterator[tuple[str, Callable[[Scene], None]]]:
    axes: list[list[dict[str, Any]]] = []
    for mark in getattr(function, "pytestmark", ()):
        names, values = mark.args[:2]
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        axes.append([dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in values])
    wanted = set(inspect.signature(function).parameters)
    if "scene" not in wanted:
        return
    for combination in itertools.product(*axes):
        given = {key: value for part in combination for key, value in part.items()}
        if wanted - set(given) == {"scene"}:
            yield f"{module.__name__}.{name}", lambda scene, given=given: function(scene=scene, **given)


def main() -> int:
    """Try every mutant against the written tests and against random histories; 1 when one lives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200, help="histories of the machine for each mutant")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("names", nargs="*", help="only mutants whose name contains one of these")
    given = parser.parse_args()
    binary = redis_binary()
    if binary is None:
        print("redis-server is not on PATH", file=sys.stderr)
        return 2
    lives = 0
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(binary, Path(folder)).start()
        chosen = [m for m in MUTANTS if not given.names or any(part in m.name for part in given.names)]
        for mutant in chosen:
            began = time.monotonic()
            by_tests = killed_by_tests(server, mutant)
            by_machine: str | None = "not tried"
            if mutant.by_machine:
                by_machine = killed_by_machine(server, mutant, examples=given.examples, first=given.seed)
            lives += by_tests is None or by_machine is None
            took_s = time.monotonic() - began
            columns = (f"{mutant.script:8}", f"{mutant.name:40}", f"{took_s:5.1f} s", f"{by_machine or '-':60}")
            print(*columns, by_tests or "LIVES", flush=True)
        server.kill()
    print(f"{len(chosen)} mutants, {lives} not killed as they must be")
    return 1 if lives else 0


if __name__ == "__main__":
    sys.exit(main())
