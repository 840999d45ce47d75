"""Scripts of release 913e1db, as that release sends them."""

from __future__ import annotations

from pathlib import Path

__all__ = ("earlier_script",)

_FOLDER = Path(__file__).parent / "earlier"


def earlier_script(name: str) -> str:
    """The text of one script behind that release's prelude."""
    return "".join((_FOLDER / f"{part}.lua").read_text("utf-8") for part in ("prelude", name))
