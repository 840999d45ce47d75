"""The requests of one `enqueue_many` and the fate of each. Does no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from l4queue.client.core import ClientCore, Prepared
from l4queue.errors import IdempotencyConflict, QueueFull
from l4queue.protocol.calls import Call, SubmitReply

__all__ = ("Bulk",)

H = TypeVar("H")
_BATCH = 256  # requests of one pipeline; a round trip each costs little from there on


class Bulk(Generic[H]):
    """Requests to be accepted, in batches of one round trip.

    `make_handle` gets an id, and whether mail tells of the end.
    No accepted request is lost: whatever ends the work is told of all of them.
    """

    def __init__(
        self, core: ClientCore, prepared: Iterable[Prepared], make_handle: Callable[[str, bool], H]
    ) -> None:
        self._core = core
        self._prepared: list[Prepared] = []
        self._make_handle = make_handle
        self._handles: dict[int, H] = {}
        self._refused: list[int] = []
        self._sent: list[int] = []
        with self:  # the iterable is the caller's and may raise anything
            self._prepared = list(prepared)
        self._left = list(range(len(self._prepared)))

    @property
    def is_open(self) -> bool:
        """Whether any are still to be sent."""
        return bool(self._left)

    @property
    def handles(self) -> list[H]:
        """Handles of the accepted ones, in order."""
        return [self._handles[position] for position in sorted(self._handles)]

    def next_batch(self) -> list[Call[SubmitReply]]:
        """Calls of the next ones to be sent."""
        self._sent = self._left[:_BATCH]
        return [self._prepared[position].call for position in self._sent]

    def answered(self, replies: Sequence[SubmitReply]) -> QueueFull | None:
        """The replies to the batch. QueueFull is returned, as those without room may be sent again.

        IdempotencyConflict is raised, after the rest of the batch was noted.
        """
        full: QueueFull | None = None
        conflict: IdempotencyConflict | None = None
        without_room: list[int] = []
        self._refused = []
        for position, reply in zip(self._sent, replies, strict=True):
            prepared = self._prepared[position]
            try:
                request_id = self._core.accepted(prepared, reply)
            except QueueFull as error:
                without_room.append(position)
                full = full or error
            except IdempotencyConflict as error:
                self._refused.append(position)
                conflict = conflict or error
            else:
                has_mail = self._core.has_mail(prepared, reply)
                self._handles[position] = self._make_handle(request_id, has_mail)
        self._left = without_room + self._left[len(self._sent) :]
        self._refused = sorted(self._refused + without_room)
        self._sent = []
        if conflict is not None:
            raise conflict
        return full

    def __enter__(self) -> Bulk[H]:
        """Whatever is raised inside says what became of the requests: see `L4QueueError`."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            with suppress(AttributeError):  # a class of the user's may take no attributes
                self._account(error)

    def _account(self, error: Any) -> None:
        ids = [self._prepared[position].request_id for position in self._sent]
        error.accepted = tuple(self.handles)
        error.in_doubt = tuple(self._make_handle(request_id, False) for request_id in ids)
        error.refused = tuple(self._refused) or getattr(error, "refused", ())
        if len(self._prepared) > 1:
            told = f"{len(error.accepted)} of {len(self._prepared)} requests were accepted: see `accepted`"
            error.add_note(told + (f"; {len(ids)} may have been: see `in_doubt`" if ids else ""))
