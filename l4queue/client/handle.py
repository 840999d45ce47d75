"""Parts of a handle that need no I/O: identity, pickling, and how it looks. Handles of both clients share them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar
from weakref import WeakSet

from l4queue.client.core import unknown
from l4queue.client.status import RequestStatus
from l4queue.client.waiting import is_patient
from l4queue.models import TERMINAL, RequestState
from l4queue.protocol.calls import Verdict
from l4queue.protocol.records import RequestRecord
from l4queue.redis_url import SecretUrl, with_password, without_password

if TYPE_CHECKING:
    from l4queue.config import Settings

__all__ = ("HandleBase", "QueueAddress", "client_at", "forget", "remember")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueAddress:
    """Where a request is: the Redis, by its URL without passwords, and the namespace."""

    url: str
    namespace: str

    @classmethod
    def of(cls, url: str, namespace: str) -> QueueAddress:
        """The place behind a URL that may hold passwords."""
        return cls(url=without_password(url), namespace=namespace)

    def settings(self) -> tuple[SecretUrl, Settings]:
        """How to get there from this process: passwords are those of its own settings."""
        from l4queue.config import load_settings

        own = load_settings()
        if QueueAddress.of(own.redis_url, own.namespace) == self:
            return own.redis_url, own
        url = with_password(self.url, own.redis_password.get_secret_value())
        return url, own.model_copy(update={"namespace": self.namespace})


class _Client(Protocol):
    _place: QueueAddress

    def _is_usable(self) -> bool: ...


C = TypeVar("C", bound=_Client)
_living: WeakSet[Any] = WeakSet()
_lock = threading.Lock()


def remember(client: _Client) -> None:
    """Let handles that were pickled find this client, if they come back to this process."""
    with _lock:
        _living.add(client)


def forget(client: _Client) -> None:
    """The client was closed."""
    with _lock:
        _living.discard(client)


def client_at(place: QueueAddress, kind: type[C], make: Callable[[SecretUrl, Settings], C]) -> C:
    """A client of this process for the place, else a new one."""
    with _lock:
        found = [client for client in _living if type(client) is kind and client._place == place]
    for client in found:
        if client._is_usable():
            usable: C = client
            return usable
    return make(*place.settings())


class HandleBase:
    """One accepted request. Handles of one request are equal, in any process.

    Pickled, a handle is its id and the place of its queue, without passwords. Where it is read it connects when it
    is first used: through a client of that process for the same place, else by that process's own settings.
    """

    def __init__(self, request_id: str, place: QueueAddress, *, has_mail: bool = False) -> None:
        self.id = request_id
        self._place = place
        self._has_mail = has_mail  # whether this very client is told of the end
        self._seen: RequestRecord | None = None
        self._seen_tokens = 0
        self._seen_end: RequestState | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HandleBase):
            return NotImplemented
        return type(self) is type(other) and self.id == other.id and self._place == other._place

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}: {_told(self._seen_status, self._seen_tokens, self._seen_end)}>"

    def _repr_html_(self) -> str:
        """For notebooks: the last that is known."""
        return _table(self.id, self._seen_status, self._seen_tokens, self._seen_end)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.id, self._place.url, self._place.namespace)

    def __copy__(self) -> Self:
        """In this process it is the same."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same."""
        return self

    @classmethod
    def _at(cls, request_id: str, place: QueueAddress) -> HandleBase:
        """A handle that looks for its client when it is first used."""
        raise NotImplementedError

    def _was_cancelled(self, verdict: Verdict) -> bool:
        """Whether a cancel ended the request; UnknownRequest where there is no record of it."""
        if verdict is Verdict.UNKNOWN:
            raise unknown(self.id)
        if verdict is Verdict.OK:
            self._ended(RequestState.CANCELLED)
        return verdict is Verdict.OK

    def _must_ask(self, deadline: float | None) -> bool:
        """Whether a wait asks the server at once. Once its record was seen, mail is not believed without that.

        Mail may have told of an end that a server has lost since.
        """
        return self._seen is not None or not is_patient(deadline)

    def _ended(self, state: RequestState | None) -> None:
        """This handle was told of the end of its request."""
        self._seen_end = state

    def _noted(self, record: RequestRecord) -> None:
        """This record is from now on the last that is known."""
        self._seen, self._seen_tokens = record, record.offset
        self._seen_end = record.state if record.state in TERMINAL else None

    @property
    def _seen_status(self) -> RequestStatus | None:
        return None if self._seen is None else RequestStatus.of(self._seen)


def _again(kind: type[HandleBase], request_id: str, url: str, namespace: str) -> HandleBase:
    return kind._at(request_id, QueueAddress(url=url, namespace=namespace))


def _told(status: RequestStatus | None, output_tokens: int, end: RequestState | None) -> str:
    """State and lengths in a line, as far as they are known."""
    if status is None and end is None:
        return f"{_counted(output_tokens, 'output token')} so far" if output_tokens else "accepted"
    parts = [_state(status, end)]
    if status is not None and status.prompt_tokens is not None:
        parts.append(_counted(status.prompt_tokens, "prompt token"))
    shown = output_tokens if status is None else max(output_tokens, status.output_tokens)
    most_tokens = None if status is None or end is not None else status.max_tokens
    if shown and most_tokens is not None:
        parts.append(f"{shown} of at most {_counted(most_tokens, 'output token')}")
    elif shown or (end is not None and status is not None):
        parts.append(_counted(shown, "output token"))
    return ", ".join(parts)


def _state(status: RequestStatus | None, end: RequestState | None) -> str:
    if end is not None:
        return end.value
    return "accepted" if status is None else status.state.value


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _table(request_id: str, status: RequestStatus | None, output_tokens: int, end: RequestState | None) -> str:
    """The same as a table in HTML, with worker and times."""
    from html import escape  # a table of two thousand entities, for notebooks alone

    rows: list[tuple[str, object]] = [("request", request_id)]
    if status is None:
        rows.append(("state", _told(None, output_tokens, end)))
    else:
        rows += [
            ("state", _state(status, end)),
            ("prompt tokens", status.prompt_tokens),
            ("output tokens", max(output_tokens, status.output_tokens)),
            ("most output tokens", status.max_tokens),
            ("stage", status.stage),
            ("worker", status.worker),
            ("accepted", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(status.submitted_at_s))),
            ("time to first token", None if status.ttft_s is None else f"{status.ttft_s:.3f} s"),
            ("end to end", None if status.e2e_s is None else f"{status.e2e_s:.3f} s"),
            ("error", status.error),
        ]
    cells = "".join(
        f"<tr><th>{name}</th><td>{escape(str(value))}</td></tr>" for name, value in rows if value is not None
    )
    return f"<table>{cells}</table>"
