"""The identity of a handle, shared by the blocking and the asyncio one."""

from __future__ import annotations

from typing import Any, Generic, Self, TypeVar

from l4queue.client.core import unknown
from l4queue.protocol.calls import Verdict

__all__ = ("HandleBase",)

C = TypeVar("C")


class HandleBase(Generic[C]):
    """The id of one accepted request and the client that reads it."""

    def __init__(self, client: C, request_id: str, *, has_mail: bool = False) -> None:
        self._client = client
        self._has_mail = has_mail  # whether this very client is told of the end
        self.id = request_id

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r})"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Pickled, a handle becomes its id, of which `get` makes a handle in another process."""
        return str, (self.id,)

    def __copy__(self) -> Self:
        """In this process it is the same."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same."""
        return self

    def _was_cancelled(self, verdict: Verdict) -> bool:
        """Whether a cancel ended the request; UnknownRequest where there is no record of it."""
        if verdict is Verdict.UNKNOWN:
            raise unknown(self.id)
        return verdict is Verdict.OK
