"""Prompts that every client of `bench queue` sends."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from l4queue.cli.bench.queue import entrant

ORDER = {"count": 50, "salt": 3}


@pytest.fixture(scope="module")
def pacing() -> ModuleType:
    """A script, which environments without l4queue load from its folder."""
    spec = importlib.util.spec_from_file_location("pacing", Path(entrant.SCRIPTS) / "pacing.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [16, 200, 4000])
def test_each_prompt_has_its_size_and_no_other_is_the_same(pacing: ModuleType, size: int) -> None:
    """No cache anywhere can help."""
    texts = pacing.prompts_of({**ORDER, "bytes": size, "input": "text"})
    assert {len(text.encode()) for text in texts} == {size}
    assert len(set(texts)) == 50
    ids = pacing.prompts_of({**ORDER, "bytes": size, "input": "ids"})
    assert {len(prompt) for prompt in ids} == {size // 4}
    assert len(set(map(tuple, ids))) == 50


def test_the_jobs_at_once_are_those_of_a_worker_of_l4queue(pacing: ModuleType) -> None:
    """All have the same."""
    from l4queue.config import Settings

    assert Settings().max_running == pacing.CONCURRENCY
