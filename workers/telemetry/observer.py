"""The interface of a worker's observers: Celery events for Flower, traces, nothing in tests."""

from __future__ import annotations

from typing import Protocol

from l4queue.value_class import value_class

__all__ = ("LEASE_ENDED", "PREVIEW_CHARS", "NullObserver", "Observer", "RequestView")

PREVIEW_CHARS = 200
"""Characters of a prompt or an output that are shown with `L4_FLOWER_SHOW_PROMPTS`: docs/flower.md."""
LEASE_ENDED = "its lease ended"
"""Why a request moved when this worker was the last to know; it may be finished elsewhere by now."""


@value_class(kw_only=True)
class RequestView:
    """One request as a dashboard may show it."""

    request_id: str
    stage: int
    range_text: str  # such as "512–4096"
    prompt_tokens: int
    max_tokens: int
    num_resumed: int
    epoch: int
    submitted_ms: int  # by the server's clock
    is_traced: bool = False  # it carries a traceparent


class Observer(Protocol):
    """Callbacks from the worker's event loop; each must return at once and never raise."""

    def request_started(self, view: RequestView) -> None:
        """Taken from the queue and given to the engine."""

    def request_succeeded(self, view: RequestView, *, output_tokens: int, runtime_s: float, text: str) -> None:
        """Settled as done."""

    def request_failed(self, view: RequestView, *, error: str, runtime_s: float) -> None:
        """Settled as failed."""

    def request_cancelled(self, view: RequestView) -> None:
        """Cancelled or expired while running here."""

    def request_moved(self, view: RequestView, *, why: str) -> None:
        """Given back, handed over or lost to another worker: no outcome yet."""


class NullObserver:
    """Watches nothing."""

    def request_started(self, view: RequestView) -> None: ...

    def request_succeeded(self, view: RequestView, *, output_tokens: int, runtime_s: float, text: str) -> None: ...

    def request_failed(self, view: RequestView, *, error: str, runtime_s: float) -> None: ...

    def request_cancelled(self, view: RequestView) -> None: ...

    def request_moved(self, view: RequestView, *, why: str) -> None: ...
