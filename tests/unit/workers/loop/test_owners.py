"""Owners of a worker's state: no statement in the loop sets an attribute of another object."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import workers.loop

LOOP = Path(workers.loop.__file__).parent


def _foreign_targets(tree: ast.Module) -> Iterator[str]:
    """Attributes that are assigned or deleted on anything but `self`."""
    for node in ast.walk(tree):
        is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
        if is_set and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            yield f"{node.lineno}: {ast.unparse(node)}"


def test_an_attribute_is_set_by_its_own_object_only() -> None:
    files = sorted(LOOP.glob("*.py"))
    assert len(files) > 10
    assert {p.name: list(_foreign_targets(ast.parse(p.read_text(encoding="utf-8")))) for p in files} == {
        p.name: [] for p in files
    }


def test_the_check_finds_one() -> None:
    tree = ast.parse("self.a = 1\nself.b.c += 2\nother.d = 3")
    assert list(_foreign_targets(tree)) == ["2: self.b.c", "3: other.d"]
