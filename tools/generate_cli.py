"""Writes docs/cli.md from the commands themselves, their exit codes and JSON keys; `--check` only compares."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from l4queue.cli import build_app
from l4queue.cli.json_keys import KEYS
from l4queue.cli.outcome import MEANINGS

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
_TITLES = {
    "up": "Keys of its ready file, and of each object of `status --json` without an id",
    "status": "Keys of its JSON with an id",
}


def page() -> str:
    """The page as it should be."""
    app: Any = typer.main.get_command(build_app())
    lines = [
        "# The command line",
        "",
        "Made by `tools/generate_cli.py` from the commands themselves. `l4queue COMMAND --help` says the same.",
        "",
        "## Exit codes",
        "",
        "| code | meaning |",
        "|---|---|",
        *(f"| {code.value} | {meaning} |" for code, meaning in MEANINGS.items()),
        "",
        "`health` knows 0 and 1 only, as containers want it. `cancel` of a request that had ended says so, and is",
        "no error.",
        "",
        "## JSON",
        "",
        "With `--json` standard output has JSON and nothing else, a failure too:",
        "",
        '`{"error": {"type": ..., "message": ..., "request_id": ..., "field": ...}}`.',
        "",
        *_keys("error", "Keys of `error`"),
    ]
    for path, command in _commands(app, ()):
        lines += _command(path, command)
    return "\n".join(lines).rstrip() + "\n"


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, one in command.commands.items():
            yield from _commands(one, (*path, name))
    else:
        yield " ".join(path), command


def _command(path: str, command: Any) -> list[str]:
    context = command.context_class(command, info_name=f"l4queue {path}")
    lines = [f"## {path}", "", f"`l4queue {path} {' '.join(command.collect_usage_pieces(context))}`", ""]
    lines += [inspect.cleandoc(command.help or ""), ""]
    rows = [row for row in (_row(parameter, context) for parameter in command.get_params(context)) if row]
    if rows:
        lines += ["| | |", "|---|---|", *rows, ""]
    lines += _keys(path, _TITLES.get(path, "Keys of its JSON"))
    return lines + _keys(f"{path} --jsonl", "Keys of the JSON of a batch")


def _row(parameter: Any, context: Any) -> str:
    """An argument or option as its help has it; the one for help is the same everywhere."""
    record = parameter.get_help_record(context)
    if record is None or "--help" in record[0]:
        return ""
    names, meaning = (re.sub(r"\s+", " ", text).replace("|", "\\|").strip() for text in record)
    return f"| `{names}` | {meaning} |"


def _keys(path: str, title: str) -> list[str]:
    if path not in KEYS:
        return []
    rows = [f"| `{key}` | {meaning} |" for key, meaning in KEYS[path].items()]
    return [f"{title}:", "", "| key | meaning |", "|---|---|", *rows, ""]


if __name__ == "__main__":
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text("utf-8") != page():
            sys.exit("docs/cli.md is out of date: run python tools/generate_cli.py")
        print("docs/cli.md is up to date")
    else:
        PAGE.write_text(page(), "utf-8")
