"""House style that a machine can hold: CONTRIBUTING.md, section "House style"."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("l4queue", "dispatcher", "workers", "gateway")
FILES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
LITERALS = (ast.expr_context, ast.operator, ast.unaryop, ast.Constant, ast.Name, ast.UnaryOp, ast.BinOp, ast.Tuple)


def is_package(path: Path) -> bool:
    """Whether a folder is imported as a package."""
    return (path / "__init__.py").is_file()


def is_number(node: ast.AST) -> bool:
    """Whether this is a number in source text; a truth value is none."""
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def names_of(statement: ast.stmt) -> list[str]:
    """Names of constants that a statement binds to numbers, or to expressions and tuples of numbers."""
    if isinstance(statement, ast.Assign):
        targets, value = statement.targets, statement.value
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets, value = [statement.target], statement.value
    else:
        return []
    parts = list(ast.walk(value))
    if not all(isinstance(part, LITERALS) for part in parts) or not any(is_number(part) for part in parts):
        return []
    found = [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return [name for name in found if name.isupper()]


def bare_constants(source: str) -> Iterator[str]:
    """Constants with neither a comment on their lines or above nor a docstring below; a run of them shares one."""
    lines, body = ["", *source.splitlines()], ast.parse(source).body  # lines from 1, as Python counts them
    explained_line = -1  # the last line of a run of constants that began with a comment
    for statement, following in zip(body, [*body[1:], ast.Pass()], strict=True):
        if not (names := names_of(statement)):
            continue
        first, last = statement.lineno, statement.end_lineno or statement.lineno
        has_text_below = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        has_comment_above = lines[first - 1].startswith("#") or explained_line == first - 1
        if has_comment_above:
            explained_line = last
        if not (has_text_below or has_comment_above or any("#" in line for line in lines[first : last + 1])):
            yield from names


@pytest.mark.parametrize(
    ("source", "bare"),
    [
        ("_WAIT_S = 5.0\n", ["_WAIT_S"]),
        ("_A, _B = 1, -2 * 2**20\n", ["_A", "_B"]),
        ("_WAIT_S: float = 5.0\nx = 1\n", ["_WAIT_S"]),
        ("_WAIT_S = 5.0  # for a reply\n", []),
        ("# for a reply\n_WAIT_S = 5.0\n", []),
        ('_WAIT_S = 5.0\n"""For a reply."""\n', []),
        ("# measured\n_A = 1\n_B = 2\n\n_C = 3\n", ["_C"]),
        ("NAME = 'text'\nIS_SET = True\nlower = 5\n", []),
    ],
)
def test_a_bare_constant_is_found(source: str, bare: list[str]) -> None:
    assert list(bare_constants(source)) == bare


def test_every_constant_says_its_unit_or_reason() -> None:
    """Otherwise: say beside it what the number counts, and its source or reason."""
    found = {str(path.relative_to(ROOT)): list(bare_constants(path.read_text("utf-8"))) for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


def test_no_class_name_stands_for_two() -> None:
    """Otherwise: rename one of them by docs/glossary.md. Names of one module alone are free."""
    homes = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_the_map_names_every_package() -> None:
    """Otherwise: add a row to docs/architecture.md, section "Packages"."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    packages = {
        str(path.relative_to(ROOT)) for root in PACKAGES for path in (ROOT / root).iterdir() if is_package(path)
    }
    assert {name for name in packages if f"| `{name}` |" not in page} == set()


def test_every_module_that_a_docstring_names_exists() -> None:
    """In the package of its module, or in any other by its path."""
    known = {"/" + str(path.relative_to(ROOT)) for path in (*FILES, *(ROOT / "tests").rglob("*.py"))}
    missing = {}
    for path in FILES:
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", text))
        lost = {name for name in named if not any(file.endswith("/" + name) for file in known)}
        if lost:
            missing[str(path.relative_to(ROOT))] = lost
    assert missing == {}
