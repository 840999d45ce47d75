"""Writes docs/states.md from the transition table in `l4queue.models`; `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from l4queue.models import TERMINAL, TRANSITIONS, RequestState

PAGE = Path(__file__).parents[1] / "docs" / "states.md"


def page() -> str:
    """The page as it should be."""
    lines = [
        "# States of a request",
        "",
        "Made by `tools/generate_states.py` from `l4queue.models.TRANSITIONS`; each edge is one Lua script in",
        "`l4queue/protocol/lua`. Terminal states never change again.",
        "",
        "```mermaid",
        "stateDiagram-v2",
    ]
    for edge in TRANSITIONS:
        source = "[*]" if edge.source is None else edge.source.value
        lines.append(f"    {source} --> {edge.target.value}: {edge.script}")
    lines += [f"    {state.value} --> [*]" for state in RequestState if state in TERMINAL]
    lines += ["```", "", "| from | to | script | why |", "|---|---|---|---|"]
    for edge in TRANSITIONS:
        source = "—" if edge.source is None else edge.source.value
        lines.append(f"| {source} | {edge.target.value} | `{edge.script}` | {edge.why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        if not PAGE.exists() or PAGE.read_text("utf-8") != page():
            sys.exit("docs/states.md is out of date: run python tools/generate_states.py")
        print("docs/states.md is up to date")
    else:
        PAGE.write_text(page(), "utf-8")
