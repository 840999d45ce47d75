"""House limits on size: `python tools/check_sizes.py PACKAGE...` fails on a file or function that is too long.

The length of a function is that of its code. A table of documented command-line options does not make it hard to
read, nor does a docstring that derives a formula.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def too_long(path: Path) -> Iterator[str]:
    """One message for each excess of a Python file."""
    source = path.read_text(encoding="utf-8")
    num_lines = source.count("\n")
    if num_lines > MAX_FILE_LINES:
        yield f"{path}:1: {num_lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            code = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            length = (node.end_lineno or node.lineno) - code[0].lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


def main(roots: list[str]) -> int:
    """Check all Python files under the roots; 1 when one is too long."""
    messages = [m for root in roots for path in sorted(Path(root).rglob("*.py")) for m in too_long(path)]
    print("\n".join(messages) if messages else "sizes: all files and functions are within the limits")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
