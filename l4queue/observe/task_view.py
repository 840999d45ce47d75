"""Requests as Celery tasks: the name and the arguments that Flower shows."""

from __future__ import annotations

from pathlib import PurePath

from l4queue.config import Settings

__all__ = ("task_arguments", "task_name")


def task_name(settings: Settings) -> str:
    """The name under which Flower shows requests: `l4queue.generate/<model>`."""
    model = settings.emulated_model if settings.engine == "emulated" else settings.model
    return f"l4queue.generate/{PurePath(model).name or model}"


def task_arguments(
    *, prompt_tokens: int, max_tokens: int, stage: str, waited_s: float | None, more: str = ""
) -> str:
    """Lengths, how long it waited once it has been taken (from acceptance on), stage.

    The list of tasks cuts a long text off: the stage comes last.
    """
    waited = "" if waited_s is None else f", waited {waited_s:.1f} s"
    return f"{prompt_tokens} → ≤{max_tokens} tokens{waited}, stage {stage}{more}"
