"""Mail to a client: it tells of ends, so that nobody asks for them."""

from __future__ import annotations

from l4queue.client.demux import RECHECK_S, Demultiplexer, RequestWatch
from l4queue.models import RequestState
from l4queue.protocol.reads import StreamEntry
from l4queue.protocol.records import Followed

MAIL, NEWS = "mail", "news"
DONE, RUNNING = RequestState.DONE, RequestState.RUNNING


def demultiplexer() -> Demultiplexer:
    return Demultiplexer(mail_key=MAIL, news_key=NEWS)


def _mail(request_id: str, state: bytes = b"done") -> StreamEntry:
    return b"1-1", {b"i": request_id.encode(), b"s": state}


def test_where_mail_tells_of_the_end_nobody_asks() -> None:
    """Neither at the beginning, nor for an end that was told before. After a silent second somebody does."""
    demux = demultiplexer()
    demux.feed({MAIL: [_mail("a"), _mail("x", b"nothing we know")]}, now_s=0.0, is_drained=True)
    watches = [RequestWatch(name, wake=lambda: None, has_mail=True, asks=False) for name in ("a", "b", "x")]
    for watch in watches:
        demux.add(watch, now_s=0.0)

    assert list(demux.first_queries(watches)) == []
    assert [watch.state for watch in watches] == [DONE, None, None]
    (query,) = demux.due(RECHECK_S)
    assert (query.followed, query.looked_at) == ((), ("b", "x"))
    demux.feed({MAIL: [_mail("b")]}, now_s=0.0, is_drained=True)
    assert watches[1].state is DONE


def test_who_asks_does_not_believe_old_mail() -> None:
    """The server may have lost the end that it told of."""
    demux = demultiplexer()
    demux.feed({MAIL: [_mail("a")]}, now_s=0.0, is_drained=True)
    watch = RequestWatch("a", wake=lambda: None, has_mail=True)
    demux.add(watch, now_s=0.0)

    ((asked, query),) = demux.first_queries([watch])
    assert (asked, query.looked_at, watch.is_over) == ([watch], ("a",), False)
    demux.opened(asked, Followed(is_new=False, places=((RUNNING, 3),)))
    assert not watch.is_over


def test_the_latest_ends_are_remembered() -> None:
    """As many as a mailbox has; those before them are asked about."""
    demux = demultiplexer()
    demux.feed({MAIL: [_mail(f"r{number}") for number in range(20_010)]}, now_s=0.0, is_drained=True)
    watches = [RequestWatch(f"r{n}", wake=lambda: None, has_mail=True, asks=False) for n in (9, 10, 20_009)]
    for watch in watches:
        demux.add(watch, now_s=0.0)

    assert [watch.state for watch in watches] == [None, DONE, DONE]
