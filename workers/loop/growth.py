"""Growth of the requests of a worker: increments of the length histogram that go out with its lease."""

from __future__ import annotations

from collections import Counter

from l4queue.planning.histogram import Buckets, growth_fields

__all__ = ("GrowthCounts",)


class GrowthCounts:
    """Counts generated tokens by length. A batch is sent under a number, so that a repeat is not counted twice."""

    def __init__(self, *, max_model_len: int) -> None:
        self._buckets = Buckets.log_spaced(max_model_len)
        self._unsent: Counter[str] = Counter()
        self._sequence = 0
        self._sent: dict[str, int] | None = None

    def add(self, *, from_tokens: int, to_tokens: int) -> None:
        """Count a request that grew from one length to another."""
        self._unsent.update(growth_fields(self._buckets, from_tokens=from_tokens, to_tokens=to_tokens))

    @property
    def has_unsent(self) -> bool:
        """Whether anything was counted that Redis has not been told."""
        return bool(self._unsent)

    def batch(self) -> tuple[int, dict[str, int]]:
        """Number and fields to send now; the same again until `answered`, since the first may have arrived."""
        if self._sent is None:
            self._sequence += 1
            self._sent = dict(self._unsent)
        return self._sequence, self._sent

    def answered(self, *, is_counted: bool) -> None:
        """Redis has answered the last batch; where it counted nothing, the fields go out with the next one."""
        sent, self._sent = self._sent or {}, None
        if is_counted:
            self._unsent.subtract(sent)
            self._unsent += Counter()  # drops what is zero
