"""Demultiplexer of a client: one reader for all requests that the client waits for. Does no I/O.

Mail tells that a request of this client has ended. News tell what was written to a followed request. Both are
hints: they may be lost, late, doubled or out of order. What counts is the output stream, whose entry ids are token
offsets. Where news leave a gap, the waiting side reads that stream from its own offset. Workers of an earlier
release send no news, so requests that were silent for a while are looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

from l4queue.client.core import Chunk, check_kept, known, unknown
from l4queue.compat import MAX_NUMBER
from l4queue.errors import InvalidRequest, L4QueueError, OutputLost
from l4queue.models import TERMINAL, RequestState
from l4queue.protocol.reads import StreamEntry
from l4queue.protocol.records import Followed, NewsEntry, OutputEntry, RequestRecord

__all__ = ("RECHECK_S", "Demultiplexer", "RequestWatch", "StatusQuery")

RECHECK_S = 5.0
"""Time after which a silent request is asked about, since its news may have been lost."""
_FIRST_RECHECK_S = 1.0  # the first time; it grows up to RECHECK_S
_UNTOLD_S = 0.25  # the same where output came without news: its worker is of an earlier release
_BLOCK_S = 1.0  # a wait that begins meanwhile is looked at by then
_SCAN_S = 0.25  # least time between two searches for silent requests
_FOLLOW_AGAIN_S = 15.0  # keeps the news stream alive where no request is silent
_MOST_IDS = 256  # of one query
_MOST_ENDED = 20_000  # ends remembered, for waits that begin later; as many as a mailbox has
_MOST_BUFFERED = 64  # chunks that nobody takes; a slow reader reads the output stream instead


@dataclass(frozen=True, slots=True)
class StatusQuery:
    """Requests to ask the server about in one call: to be followed, or only looked at since mail tells of them."""

    followed: tuple[str, ...]
    looked_at: tuple[str, ...]


class RequestWatch:
    """One wait for a request: for its end alone, or for its output after `after` tokens.

    `wake` is called when there is something to do: take chunks, read the output stream (`must_read`), stop
    (`is_over`) or raise `error`. Where mail tells of the end, the server is asked at once only if `asks`.
    """

    def __init__(
        self,
        request_id: str,
        *,
        wake: Callable[[], None],
        after: int | None = None,
        has_mail: bool = False,
        asks: bool = True,
    ) -> None:
        if after is not None and (type(after) is not int or not 0 <= after < MAX_NUMBER):
            raise InvalidRequest("must be a number of tokens, not negative", field="after")
        self.request_id = request_id
        self.after = after
        self.is_followed = after is not None or not has_mail
        self.must_ask = asks or self.is_followed
        self.offset = after or 0
        self.must_read = False
        self.state: RequestState | None = None
        self.is_over = False
        self.error: L4QueueError | None = None
        self.wake = wake
        self.pause_s = _FIRST_RECHECK_S
        self.due_s = 0.0
        self._chunks: deque[Chunk] = deque()

    @property
    def is_waiting(self) -> bool:
        """Whether there is neither an end nor an error yet."""
        return not self.is_over and self.error is None

    def take(self) -> tuple[list[Chunk], bool, bool]:
        """Chunks that nobody has taken yet, in order; whether to read the output stream; whether that was all.

        The error is raised once there are no chunks.
        """
        if self.error is not None and not self._chunks:
            raise copy(self.error)  # one may end many waits: each has a traceback of its own
        taken, must_read = list(self._chunks), self.must_read
        self._chunks.clear()
        self.must_read = False
        if self.error is not None:
            self.wake()  # it is raised by the next call, which nothing else would bring about
        return taken, must_read, self.is_over

    def hear(self, news: NewsEntry) -> None:
        """News of this request."""
        if self.is_over:
            return
        if self.after is None:
            if news.state is not None:
                self._end(news.state)
            return
        is_full = len(self._chunks) >= _MOST_BUFFERED and news.state is None
        if news.entry is not None and not is_full and self._accept(news.entry):
            self.wake()
        elif news.state is not None or news.upto > self.offset:
            self.read_on()

    def see(self, state: RequestState | None, upto: int) -> None:
        """The server was asked where the request is; state None: it knows nothing of it."""
        if not self.lacks(state, upto):
            return
        if state is None:
            self.fail(unknown(self.request_id))
        elif self.after is None:
            self._end(state)
        else:
            self.read_on()

    def lacks(self, state: RequestState | None, upto: int) -> bool:
        """Whether a request in this state with `upto` tokens has more than was heard here."""
        if self.is_over:
            return False
        return state is None or state in TERMINAL or (self.after is not None and upto > self.offset)

    def read_on(self) -> None:
        """Have the output stream read."""
        self.must_read = True
        self.wake()

    def read(self, record: RequestRecord | None, entries: Sequence[OutputEntry]) -> None:
        """The record, and the output stream after `offset`, which was read after the record.

        A terminal record ends the wait. ResultExpired where its output has gone, OutputLost where a part has.
        """
        record = known(self.request_id, record)
        is_whole = True
        for entry in entries:
            is_whole &= self._accept(entry)
        if self.is_over or self.error is not None:
            return
        is_terminal = record.state in TERMINAL
        if is_terminal and record.offset < (self.after or 0):
            raise InvalidRequest(
                f"{self.after} is beyond the end, the output has {record.offset} tokens", field="after"
            )
        is_dropped = record.dropped_ms is not None
        if is_terminal and not entries and (is_dropped or record.offset > self.offset):
            check_kept(record)
        if not is_whole or record.offset > self.offset or (is_terminal and record.offset < self.offset):
            told = f"request {self.request_id} has {record.offset} tokens by its record"
            raise OutputLost(f"{told}, but its output leads from {self.after or 0} to {self.offset} only")
        if is_terminal:
            self._end(record.state)

    def fail(self, error: L4QueueError) -> None:
        """The wait ends with an error."""
        self.error = error
        self.wake()

    def _end(self, state: RequestState) -> None:
        self.state, self.is_over = state, True
        self.wake()

    def _accept(self, entry: OutputEntry) -> bool:
        """Whether this entry is one more or known already; False: tokens before it are missing."""
        if self.is_over:
            return True
        start = entry.upto - len(entry.token_ids)
        if entry.state is not None:
            if entry.upto != self.offset:
                return False
            self.state, self.is_over = entry.state, True
        elif entry.upto <= self.offset:
            return True
        elif start > self.offset:
            return False
        elif start < self.offset != self.after:  # no chunk ends inside another, unless a server forgot one
            self.error = OutputLost(f"request {self.request_id} has other chunks than were read; read it again")
            return True
        if entry.text or entry.token_ids:
            skip = self.offset - start
            self._chunks.append(
                Chunk(
                    text=entry.text,
                    token_ids=entry.token_ids[skip:],
                    offset=entry.upto,
                    text_after=start,
                    logprobs=None if entry.logprobs is None else entry.logprobs[skip:],
                    cached=entry.cached,
                )
            )
        self.offset = entry.upto
        return True


class Demultiplexer:
    """All waits of one client. The caller reads `streams`, feeds what it finds and asks what is `due`.

    Times are monotonic seconds. `remove` is safe at any moment, also from a finaliser; the rest is for one thread
    at a time.
    """

    def __init__(self, *, mail_key: str, news_key: str) -> None:
        self._mail_key = mail_key
        self._news_key = news_key
        self._last = {mail_key: "0-0", news_key: "0-0"}
        self._watches: dict[str, list[RequestWatch]] = {}
        self._removed: deque[RequestWatch] = deque()
        self._suspects: dict[RequestWatch, tuple[RequestState | None, int, float]] = {}
        self._unwanted: set[str] = set()
        self._ended: dict[str, RequestState] = {}
        self._next_scan_s = 0.0
        self._followed_s = 0.0

    @property
    def streams(self) -> dict[str, str]:
        """The streams to read, with the last entry of each that was fed."""
        return dict(self._last)

    @property
    def last_news(self) -> str:
        """The last entry of the news that was fed: those up to it are not needed any more."""
        return self._last[self._news_key]

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits."""
        self._purge()
        return not self._watches

    @property
    def num_waits(self) -> int:
        """Requests that are waited for."""
        return len(self._watches)

    def block_s(self, now_s: float) -> float:
        """How long to wait for entries at most: not at all to see whether some are there already."""
        return 0.0 if self._suspects else min(_BLOCK_S, max(0.01, self._next_scan_s - now_s))

    def add(self, watch: RequestWatch, *, now_s: float) -> None:
        """Begin a wait. After that `first_queries` has what the server is to be asked once, for `opened`."""
        self._purge()
        self._watches.setdefault(watch.request_id, []).append(watch)
        if not watch.must_ask and watch.request_id in self._ended:
            watch.see(self._ended[watch.request_id], 0)
        watch.due_s = now_s + watch.pause_s
        self._next_scan_s = min(self._next_scan_s, watch.due_s)

    def remove(self, watch: RequestWatch) -> None:
        """End a wait."""
        self._removed.append(watch)

    def first_queries(
        self, watches: Sequence[RequestWatch]
    ) -> Iterator[tuple[Sequence[RequestWatch], StatusQuery]]:
        """Questions for new waits, of bounded size. The others are asked about once they are silent."""
        asked = [watch for watch in watches if watch.must_ask]
        return self._queries(asked) if asked else iter(())

    @staticmethod
    def _queries(watches: Sequence[RequestWatch]) -> Iterator[tuple[Sequence[RequestWatch], StatusQuery]]:
        for start in range(0, len(watches), _MOST_IDS):
            some = watches[start : start + _MOST_IDS]
            ordered = [w for w in some if w.is_followed] + [w for w in some if not w.is_followed]
            yield ordered, _query(ordered)

    def opened(self, watches: Sequence[RequestWatch], reply: Followed) -> None:
        """The answer for new waits, in this order."""
        self._news_began(reply)
        for watch, (state, upto) in zip(watches, reply.places, strict=True):
            watch.see(state, upto)

    def feed(self, found: Mapping[str, Sequence[StreamEntry]], *, now_s: float, is_drained: bool) -> int:
        """Entries of the streams; how many news there were. `is_drained`: there were no more at that moment."""
        self._purge()
        for entry_id, values in found.get(self._mail_key, ()):
            self._last[self._mail_key] = entry_id.decode()
            ended = NewsEntry.parse_mail(values)
            if ended is None or ended.state is None:
                continue
            self._ended[ended.request_id] = ended.state
            for watch in self._watches.get(ended.request_id, ()):
                if watch.after is None:
                    watch.hear(ended)
                else:  # news of the same end may be on their way
                    self._suspects[watch] = (ended.state, 0, now_s)
        while len(self._ended) > _MOST_ENDED:
            del self._ended[next(iter(self._ended))]
        news = found.get(self._news_key, ())
        for entry_id, values in news:
            self._last[self._news_key] = entry_id.decode()
            told = NewsEntry.parse(values)
            if told is None:
                continue
            if told.request_id not in self._watches and told.state is None:
                self._unwanted.add(told.request_id)
            for watch in self._watches.get(told.request_id, ()):
                watch.hear(told)
                watch.due_s = now_s + RECHECK_S
        self._confront(now_s, is_drained=is_drained)
        return len(news)

    def due(self, now_s: float) -> list[StatusQuery]:
        """Questions that are due: about silent requests, and to keep the news stream alive."""
        if now_s < self._next_scan_s:
            return []
        self._purge()
        silent: dict[str, RequestWatch] = {}
        follows: RequestWatch | None = None
        self._next_scan_s = now_s + _FOLLOW_AGAIN_S
        for watches in self._watches.values():
            for watch in watches:
                if watch.is_over:
                    continue
                if watch.is_followed:
                    follows = watch
                if now_s >= watch.due_s:
                    watch.due_s = now_s + watch.pause_s
                    watch.pause_s = min(RECHECK_S, 2 * watch.pause_s)
                    if watch.is_followed or watch.request_id not in silent:
                        silent[watch.request_id] = watch
                self._next_scan_s = min(self._next_scan_s, watch.due_s)
        self._next_scan_s = max(self._next_scan_s, now_s + _SCAN_S)
        if follows is not None and now_s - self._followed_s >= _FOLLOW_AGAIN_S:
            silent[follows.request_id] = follows
        if any(watch.is_followed for watch in silent.values()):
            self._followed_s = now_s
        return [query for _, query in self._queries(list(silent.values()))]

    def answered(self, query: StatusQuery, reply: Followed, *, now_s: float) -> None:
        """The answer to a query. News of the same may be on their way: they are fed first."""
        self._news_began(reply)
        ids = (*query.followed, *query.looked_at)
        for request_id, (state, upto) in zip(ids, reply.places, strict=True):
            for watch in self._watches.get(request_id, ()):
                if watch.lacks(state, upto):
                    self._suspects.setdefault(watch, (state, upto, now_s))

    def unwanted(self) -> list[str]:
        """Requests that are still followed although nobody waits for them any more."""
        found = [request_id for request_id in self._unwanted if request_id not in self._watches]
        self._unwanted.clear()
        return found

    def fail(self, error: L4QueueError) -> None:
        """All waits end with this error."""
        self._purge()
        for watches in list(self._watches.values()):
            for watch in watches:
                watch.fail(error)

    def _confront(self, now_s: float, *, is_drained: bool) -> None:
        """Look into the output streams for what the server has and no news told."""
        for watch, (state, upto, asked_s) in list(self._suspects.items()):
            if not is_drained and now_s - asked_s < RECHECK_S:
                continue
            del self._suspects[watch]
            if watch.lacks(state, upto):
                watch.see(state, upto)
                watch.pause_s = _UNTOLD_S
                watch.due_s = now_s + _UNTOLD_S
                self._next_scan_s = min(self._next_scan_s, watch.due_s)

    def _news_began(self, reply: Followed) -> None:
        """A new stream may begin before the last id that was read, where the server's clock went back."""
        if reply.is_new:
            self._last[self._news_key] = "0-0"

    def _purge(self) -> None:
        while self._removed:
            watch = self._removed.popleft()
            self._suspects.pop(watch, None)
            watches = self._watches.get(watch.request_id, [])
            if watch in watches:
                watches.remove(watch)
            if not watches:
                self._watches.pop(watch.request_id, None)


def _query(watches: Sequence[RequestWatch]) -> StatusQuery:
    return StatusQuery(
        tuple(watch.request_id for watch in watches if watch.is_followed),
        tuple(watch.request_id for watch in watches if not watch.is_followed),
    )
