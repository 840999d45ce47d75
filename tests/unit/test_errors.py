"""Every exception of the code base crosses a process border: kind, text, attributes."""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.backends.base import Backend

from l4queue import errors

ROOT = Path(__file__).parents[2]
PACKAGES = ("l4queue", "dispatcher", "workers")
WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def exception_kinds() -> list[type[BaseException]]:
    """All exception classes that these packages define; only their modules are imported."""
    names = {n for n, v in vars(builtins).items() if isinstance(v, type) and issubclass(v, BaseException)}
    defined: dict[str, str] = {}
    classes = [
        (node, ".".join(path.relative_to(ROOT).with_suffix("").parts))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    size = -1
    while size != len(defined):  # a base may be defined behind, or in another module
        size = len(defined)
        for node, module in classes:
            bases = {
                base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases
            }
            if bases & (names | set(defined)):
                defined[node.name] = module
    return [getattr(import_module(module), name) for name, module in sorted(defined.items())]


def example(kind: type[BaseException]) -> BaseException:
    """An error of this kind with what its constructor requires, and with attributes set later."""
    error: BaseException
    if not inspect.isfunction(kind.__init__):
        error = kind("what is wrong: \u00fc")
    else:
        positional, named = [], {}
        for name, parameter in list(inspect.signature(kind).parameters.items()):
            if parameter.default is not inspect.Parameter.empty:
                continue
            value: Any = 1.5 if name.endswith("_s") else f"a {name}"
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                named[name] = value
            else:
                positional.append(value)
        error = kind(*positional, **named)
    error.more = {"accepted": ["a", "b"]}  # type: ignore[attr-defined]
    error.add_note("a note")
    return error


def raise_it(name: str) -> None:
    """In a process of a pool."""
    raise example(getattr(errors, name))


KINDS = exception_kinds()
PUBLIC = [name for name in errors.__all__ if name != "PortableError"]
CELERY = Backend(Celery(set_as_current=False))


def test_the_search_finds_exceptions_of_all_packages() -> None:
    """Those of the public tree, and inner ones."""
    found = {kind.__name__ for kind in KINDS}
    assert found >= {*errors.__all__, "EngineDied", "SegmentError"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_on_the_other_side(kind: type[BaseException], way: str) -> None:
    """Its class, what it prints, and each of its attributes."""
    error = example(kind)
    again = WAYS[way](error)
    assert (type(again), str(again), repr(again)) == (kind, str(error), repr(error))
    assert (again.args, vars(again)) == (error.args, vars(error))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_caller_of_celery_gets_the_same_error(name: str) -> None:
    """A task's error is stored as its class and `args`, in JSON."""
    error = example(getattr(errors, name))
    del error.more, error.__notes__  # type: ignore[attr-defined] # Celery stores neither
    stored = json.loads(json.dumps(CELERY.prepare_exception(error, "json")))
    again = CELERY.exception_to_python(stored)
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_an_error_in_a_pool_reaches_its_caller_and_nobody_else() -> None:
    """Each kind of the public tree, between jobs that succeed."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        raised = {name: pool.submit(raise_it, name) for name in errors.__all__}
        fine = pool.submit(len, "abc")
        for name, future in raised.items():
            expected = example(getattr(errors, name))
            got = future.exception()
            assert got is not None
            assert (type(got), str(got), vars(got)) == (type(expected), str(expected), vars(expected))
        assert fine.result() == 3
