"""Progress bars on standard error for countable work."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ("progress_bars",)


def progress_bars(quiet: bool, *, width: int) -> Progress:
    """Bars with name (of `width` characters), number done and time passed; `quiet` shows nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    name = TextColumn(f"{{task.description:>{width}}}")
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=quiet)
