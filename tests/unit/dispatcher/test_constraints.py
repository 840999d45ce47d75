"""Checks of constraints in real processes: limits, crashes, verdicts that are kept, and nothing left behind."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from dispatcher.constraints import checker as constraints
from dispatcher.constraints.checker import ConstraintChecker
from l4queue.sampling import StructuredOutputs

COMMAND = (sys.executable, str(Path(__file__).with_name("checking_process.py")))


def choice(*texts: str) -> StructuredOutputs:
    """A constraint."""
    return StructuredOutputs(choice=texts)


def own_processes() -> list[psutil.Process]:
    """The checking process and its children."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "checking_process.py" in " ".join(process.cmdline())]


@pytest_asyncio.fixture
async def checker(tmp_path: Path) -> AsyncIterator[ConstraintChecker]:
    checker = ConstraintChecker(tokenizer=str(tmp_path / "ends"), limit_s=600.0, command=COMMAND)
    yield checker
    await checker.close()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("good", ""),
        ("bad", "is bad"),
        ("endless", "takes longer than 0.5 s to compile: use a smaller one"),
        ("crash", "ends the process that compiles it (SIGABRT): use a smaller one"),
        ("huge", "takes too much memory to compile: use a smaller one"),
        ("raise", "cannot be checked: RuntimeError("),
    ],
)
async def test_every_end_of_a_check_is_a_verdict(checker: ConstraintChecker, text: str, words: str) -> None:
    """Whatever a compiler does, the next constraint is checked."""
    checker._limit_s = 0.5 if text == "endless" else 600.0
    verdict = await checker.check(choice(text))
    checker._limit_s = 600.0

    assert words in verdict.error
    assert bool(verdict.error) == bool(words)
    assert checker.known(choice(text)) == verdict
    assert (await checker.check(choice("next"))).error == ""


async def test_a_slow_check_does_not_hold_up_another(checker: ConstraintChecker, tmp_path: Path) -> None:
    """The quick one is back while the slow one runs."""
    slow = asyncio.create_task(checker.check(choice(f"until:{tmp_path / 'go'}")))
    assert (await checker.check(choice("quick"))).error == ""
    assert not slow.done()
    (tmp_path / "go").touch()
    assert (await slow).error == ""


async def test_large_constraints_leave_room_for_usual_ones(checker: ConstraintChecker, tmp_path: Path) -> None:
    """However many of them take long."""
    text = f"until:{tmp_path / 'go'}"
    padding = ["x" * 1000] * 200
    large = [asyncio.create_task(checker.check(choice(text, str(i), *padding))) for i in range(5)]
    assert (await checker.check(choice("quick"))).error == ""
    assert not any(task.done() for task in large)
    (tmp_path / "go").touch()
    assert {verdict.error for verdict in await asyncio.gather(*large)} == {""}


async def test_one_that_came_too_late_is_tried_again_after_a_while(
    checker: ConstraintChecker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine may have been busy; other verdicts stay."""
    slow = choice(f"until:{tmp_path / 'go'}")
    checker._limit_s = 0.5
    await checker.check(slow)
    assert checker.known(slow) is not None
    checker._limit_s = 600.0
    monkeypatch.setattr(constraints, "_LATE_KEPT_S", 0.0)
    for text in ("bad", "good"):
        await checker.check(choice(text))
        assert checker.known(choice(text)) is not None
    checker._verdicts.clear()
    checker._limit_s = 0.5
    await checker.check(slow)
    assert checker.known(slow) is None
    checker._limit_s = 600.0
    (tmp_path / "go").touch()
    assert (await checker.check(slow)).error == ""


async def test_a_constraint_is_checked_once(checker: ConstraintChecker, tmp_path: Path) -> None:
    """For those that ask at the same time, and for those that ask later; another one is another one."""
    given = choice(f"count:{tmp_path / 'checks'}")
    verdicts = await asyncio.gather(*(checker.check(given) for _ in range(5)))
    await checker.check(given)

    assert len(set(verdicts)) == 1
    assert (tmp_path / "checks").read_text() == "x"
    assert checker.known(choice("other")) is None


async def test_verdicts_are_bounded_and_the_oldest_go(
    checker: ConstraintChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verdict that is used stays."""
    monkeypatch.setattr(constraints, "_MAX_VERDICTS", 2)
    for text in ("a", "bad"):
        await checker.check(choice(text))
    assert checker.known(choice("a")) is not None
    await checker.check(choice("c"))

    assert [checker.known(choice(text)) is not None for text in ("a", "bad", "c")] == [True, False, True]


async def test_a_process_that_is_killed_is_started_again(checker: ConstraintChecker, tmp_path: Path) -> None:
    """The question is asked again; nobody notices."""
    slow = asyncio.create_task(checker.check(choice(f"until:{tmp_path / 'go'}")))
    await checker.check(choice("quick"))  # behind it, so that it is being checked
    for process in own_processes():
        process.kill()
    (tmp_path / "go").touch()

    assert (await slow).error == ""
    assert (await checker.check(choice("next"))).error == ""


async def test_where_no_process_starts_the_size_is_bounded(checker: ConstraintChecker, tmp_path: Path) -> None:
    """A dispatcher whose vLLM is broken still serves."""
    (tmp_path / "ends").touch()

    assert (await checker.check(choice("bad"))).error == ""
    assert "is too large" in (await checker.check(choice(*["x" * 1000] * 1000))).error


async def test_nothing_is_left_behind(checker: ConstraintChecker) -> None:
    """The children of the process end with it, also in the middle of a check."""
    slow = asyncio.create_task(checker.check(choice("endless")))
    await checker.check(choice("quick"))
    own = own_processes()
    assert len(own) == 2
    await checker.close()
    await asyncio.gather(slow, return_exceptions=True)

    _, alive = await asyncio.to_thread(psutil.wait_procs, own, 30)
    assert not alive
