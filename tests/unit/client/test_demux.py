"""The demultiplexer: any loss, repeat and order of news gives the exact token sequence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l4queue.client.core import Chunk
from l4queue.client.demux import RECHECK_S, Demultiplexer, RequestWatch
from l4queue.errors import InvalidRequest, OutputLost, ResultExpired, ServiceUnavailable, UnknownRequest
from l4queue.models import TERMINAL, RequestState
from l4queue.protocol.reads import StreamEntry
from l4queue.protocol.records import Followed, NewsEntry, OutputEntry, RequestRecord, pack_ids

MAIL, NEWS = "mail", "news"
DONE, RUNNING = RequestState.DONE, RequestState.RUNNING


@dataclass
class Server:
    """One request as Redis has it: record, output stream, and all news that were ever sent of it."""

    sizes: tuple[int, ...]
    state: RequestState = RUNNING
    offset: int = 0
    output: list[OutputEntry] = field(default_factory=list)
    news: list[dict[bytes, bytes]] = field(default_factory=list)

    def write(self, *, is_told: bool = True, is_large: bool = False) -> None:
        """The next tokens, or the end once there are none. A worker of the earlier release tells nobody."""
        if self.state in TERMINAL:
            return
        if len(self.output) == len(self.sizes):
            self.state = DONE
            entry, values = OutputEntry(upto=self.offset, text="end", state=DONE), {b"e": b"done", b"x": b"end"}
        else:
            ids = tuple(range(self.offset, self.offset + self.sizes[len(self.output)]))
            self.offset += len(ids)
            text = "".join(f"{i}," for i in ids)
            entry = OutputEntry(upto=self.offset, token_ids=ids, text=text)
            values = {b"t": pack_ids(ids), b"x": text.encode()}
        self.output.append(entry)
        if is_large:
            values = {name: value for name, value in values.items() if name == b"e"}
        if is_told:
            self.news.append({b"i": b"r", b"u": str(self.offset).encode(), **values})

    @property
    def record(self) -> RequestRecord:
        return RequestRecord(request_id="r", state=self.state, offset=self.offset)

    def after(self, offset: int) -> list[OutputEntry]:
        """What XRANGE finds, the end marker included."""
        return [e for e in self.output if e.upto > offset or (e.state is not None and e.upto >= offset)]


class Reader:
    """One wait, driven as the clients do it."""

    def __init__(self, demux: Demultiplexer, after: int | None) -> None:
        self.watch = RequestWatch("r", wake=lambda: None, after=after)
        self.demux = demux
        self.chunks: list[Chunk] = []
        self.is_all = False
        demux.add(self.watch, now_s=0.0)

    def step(self, server: Server, *, writes_between: int = 0) -> None:
        """Take what there is; read if need be, while the worker goes on writing and news come in."""
        if self.is_all:
            return
        chunks, must_read, self.is_all = self.watch.take()
        self.chunks += chunks
        if must_read and not self.is_all:
            offset, record = self.watch.offset, server.record
            for _ in range(writes_between):
                server.write()
                feed(self.demux, server.news[-1:], now_s=0.0)
            self.watch.read(record, server.after(offset))


def entries(values: list[dict[bytes, bytes]]) -> list[StreamEntry]:
    return [(b"1-1", value) for value in values]


def feed(demux: Demultiplexer, news: list[dict[bytes, bytes]], *, now_s: float, is_drained: bool = False) -> None:
    demux.feed({NEWS: entries(news)}, now_s=now_s, is_drained=is_drained)


def demultiplexer() -> Demultiplexer:
    return Demultiplexer(mail_key=MAIL, news_key=NEWS)


def place(server: Server, *, num: int = 1) -> Followed:
    return Followed(is_new=False, places=((server.state, server.offset),) * num)


OPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.booleans(), st.booleans()),
        st.tuples(st.just("news"), st.integers(0, 30), st.booleans()),
        st.tuples(st.just("mail"), st.booleans(), st.booleans()),
        st.tuples(st.just("step"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("look"), st.booleans(), st.booleans()),
    ),
    max_size=40,
)


@given(sizes=st.lists(st.integers(1, 4), max_size=10), data=st.data(), ops=OPS)
@settings(deadline=None, max_examples=500)
def test_any_news_give_the_exact_output(sizes: list[int], data: st.DataObject, ops: list[tuple]) -> None:  # type: ignore[type-arg]
    """Lost, doubled, late, in any order, without content, never sent: each token comes once, in order."""
    server, demux = Server(tuple(sizes)), demultiplexer()
    offsets = data.draw(st.lists(st.none() | st.integers(0, sum(sizes)), min_size=1, max_size=3))
    readers = [Reader(demux, after) for after in offsets]
    for kind, one, other in ops:
        if kind == "write":
            server.write(is_told=one, is_large=other)
        elif kind == "news" and server.news:
            feed(demux, [server.news[one % len(server.news)]], now_s=0.0, is_drained=other)
        elif kind == "mail" and server.state in TERMINAL:
            demux.feed({MAIL: [(b"1-1", {b"i": b"r", b"s": b"done"})]}, now_s=0.0, is_drained=other)
        elif kind == "look":
            demux.opened([reader.watch for reader in readers], place(server, num=len(readers)))
        elif kind == "step":
            for reader in readers:
                reader.step(server, writes_between=one)

    while server.state not in TERMINAL:
        server.write(is_told=False)
    now_s = 0.0
    for _ in range(3):  # every silent wait is looked at within the recheck
        now_s += RECHECK_S
        for query in demux.due(now_s):
            demux.answered(query, place(server), now_s=now_s)
        feed(demux, [], now_s=now_s, is_drained=True)
        for reader in readers:
            reader.step(server)
            reader.step(server)
            reader.step(server)

    for reader, after in zip(readers, offsets, strict=True):
        assert reader.is_all
        assert reader.watch.state is DONE
        if after is not None:
            check(reader.chunks, after, sizes)


def check(chunks: list[Chunk], after: int, sizes: list[int]) -> None:
    """Tokens from `after` on, each once; the text of all that was written from the chunk that has them."""
    total = sum(sizes)
    assert [t for chunk in chunks for t in chunk.token_ids] == list(range(after, total))
    assert [c.offset for c in chunks if c.token_ids] == sorted({c.offset for c in chunks if c.token_ids})
    begin = chunks[0].text_after
    assert "".join(chunk.text for chunk in chunks) == "".join(f"{i}," for i in range(begin, total)) + "end"
    boundaries = {sum(sizes[:i]) for i in range(len(sizes) + 1)}
    assert begin == max(b for b in boundaries if b <= after)


def test_an_end_that_news_and_output_both_tell_comes_once() -> None:
    """The news arrive while the output stream is being read."""
    server, demux = Server(()), demultiplexer()
    reader = Reader(demux, 0)
    server.write(is_told=True)
    demux.opened([reader.watch], place(server))
    assert reader.watch.take() == ([], True, False)
    feed(demux, server.news, now_s=0.0)
    reader.watch.read(server.record, server.after(0))
    assert [chunk.text for chunk in reader.watch.take()[0]] == ["end"]


def test_what_nobody_takes_is_not_kept() -> None:
    """A slow reader has 64 chunks in memory, and gets the rest from the output stream."""
    server, demux = Server((1,) * 1000), demultiplexer()
    reader = Reader(demux, 0)
    for _ in range(1000):
        server.write()
    feed(demux, server.news, now_s=0.0)
    assert reader.watch.offset == 64

    reader.step(server)
    reader.step(server)

    assert [t for chunk in reader.chunks for t in chunk.token_ids] == list(range(1000))


def test_a_terminal_record_ends_a_wait_without_the_end_marker() -> None:
    """All tokens are known, and the output stream is gone: that is the end."""
    demux = demultiplexer()
    reader = Reader(demux, 5)
    reader.watch.read(RequestRecord(request_id="r", state=DONE, offset=5), [])
    assert reader.watch.take() == ([], False, True)


@pytest.mark.parametrize("state", [RUNNING, DONE])
def test_tokens_that_are_not_there_are_an_error(state: RequestState) -> None:
    """The record has five, and the output stream fewer, or a hole."""
    record = RequestRecord(request_id="r", state=state, offset=5)
    tail = [OutputEntry(upto=5, token_ids=(3, 4), text="de")]
    with pytest.raises(OutputLost, match="5 tokens"):
        Reader(demultiplexer(), 0).watch.read(record, tail)
    with pytest.raises(OutputLost if state is RUNNING else ResultExpired):
        Reader(demultiplexer(), 0).watch.read(record, [])


def test_after_beyond_the_end_is_the_caller_s_error_and_a_loss_is_not() -> None:
    """Seven tokens of five: asked for by the caller, or read here before the server lost them."""
    record = RequestRecord(request_id="r", state=DONE, offset=5)
    with pytest.raises(InvalidRequest, match="beyond the end"):
        Reader(demultiplexer(), 7).watch.read(record, [])
    reader = Reader(demultiplexer(), 0)
    reader.watch.read(replace(record, state=RUNNING, offset=7), [OutputEntry(upto=7, token_ids=(0,) * 7)])
    with pytest.raises(OutputLost):
        reader.watch.read(record, [OutputEntry(upto=5, text="", state=DONE)])
    with pytest.raises(InvalidRequest, match="negative"):
        RequestWatch("r", wake=lambda: None, after=-1)


@pytest.mark.parametrize("is_told", [True, False])
def test_chunks_that_no_longer_meet_are_an_error(is_told: bool) -> None:
    """A failover lost tokens that were read here, and they were computed again in other pieces."""
    demux = demultiplexer()
    reader = Reader(demux, 1)
    first, other = Server((3, 3)), Server((2, 2, 2))
    first.write()
    feed(demux, first.news, now_s=0.0)
    for _ in range(2):
        other.write()
    reader.step(other)
    if is_told:
        feed(demux, other.news, now_s=0.0)
    else:
        reader.watch.read(other.record, other.after(reader.watch.offset))
    assert [chunk.token_ids for chunk in reader.chunks] == [(1, 2)]
    with pytest.raises(OutputLost, match="read it again"):
        reader.watch.take()


def test_an_unknown_request_ends_its_wait_alone() -> None:
    """And every wait has an exception of its own."""
    demux = demultiplexer()
    gone, other = Reader(demux, 0), RequestWatch("s", wake=lambda: None)
    demux.add(other, now_s=0.0)
    demux.opened([gone.watch, other], Followed(is_new=True, places=((None, 0), (RUNNING, 0))))
    with pytest.raises(UnknownRequest):
        gone.watch.take()
    assert other.take() == ([], False, False)
    demux.fail(ServiceUnavailable("away"))
    raised = []
    for watch in (gone.watch, other):
        with pytest.raises(ServiceUnavailable, match="away") as caught:
            watch.take()
        raised.append(caught.value)
    assert raised[0] is not raised[1]


def test_a_failed_wait_wakes_again_after_its_last_chunks() -> None:
    """The reader takes chunks before the error, and waits in between: it must hear that there is more."""
    woken: list[bool] = []
    watch = RequestWatch("r", wake=lambda: woken.append(True), after=0)
    watch.hear(NewsEntry(request_id="r", upto=1, state=None, entry=OutputEntry(upto=1, token_ids=(7,), text="7,")))
    watch.fail(ServiceUnavailable("away"))
    woken.clear()
    chunks, _, is_over = watch.take()
    assert ([chunk.token_ids for chunk in chunks], is_over, woken) == ([(7,)], False, [True])
    with pytest.raises(ServiceUnavailable, match="away"):
        watch.take()


def test_what_only_a_recheck_found_is_looked_at_again_soon() -> None:
    """A worker of the earlier release: after the first recheck the delay is a quarter of a second."""
    server, demux = Server((1,) * 20), demultiplexer()
    reader = Reader(demux, 0)
    now_s, delays = 0.0, []
    for _ in range(20):
        server.write(is_told=False)
        written_s = now_s
        while not reader.watch.must_read:
            now_s += 0.125
            for query in demux.due(now_s):
                demux.answered(query, place(server), now_s=now_s)
            feed(demux, [], now_s=now_s, is_drained=True)
        reader.step(server)
        delays.append(now_s - written_s)
    assert delays[0] <= 1.0
    assert max(delays[1:]) <= 0.25


def test_news_on_their_way_are_awaited_before_the_output_stream_is_read() -> None:
    """A look that overtakes news causes no read."""
    server, demux = Server((2, 2)), demultiplexer()
    reader = Reader(demux, 0)
    server.write()
    (query,) = demux.due(2.0)
    demux.answered(query, place(server), now_s=2.0)
    assert demux.block_s(2.0) == 0.0
    feed(demux, server.news, now_s=2.0, is_drained=True)
    assert 0.0 < demux.block_s(2.0) <= 1.0
    assert not reader.watch.must_read
    assert reader.watch.offset == 2


def test_chatty_requests_are_not_looked_at_but_their_news_are_kept_alive() -> None:
    """One of them is followed again every quarter of a minute."""
    server, demux = Server((1,) * 400), demultiplexer()
    Reader(demux, 0)
    looks = []
    for tick in range(200):
        now_s = tick * 0.5
        server.write()
        feed(demux, server.news[-1:], now_s=now_s)
        looks += [now_s for _ in demux.due(now_s)]
    gaps = [b - a for a, b in pairwise(looks)]
    assert gaps
    assert set(gaps) == {15.0}


def test_a_new_news_stream_is_read_from_its_beginning() -> None:
    """The server's clock may have gone back since the last one."""
    demux = demultiplexer()
    reader = Reader(demux, 0)
    demux.feed({NEWS: [(b"99-1", {b"v": b"1"})]}, now_s=0.0, is_drained=True)
    assert demux.streams[NEWS] == "99-1"
    demux.opened([reader.watch], Followed(is_new=True, places=((RUNNING, 0),)))
    assert demux.streams[NEWS] == "0-0"


def test_what_nobody_waits_for_any_more_is_unfollowed() -> None:
    """Its news say that it is still followed; an end needs nothing."""
    server, demux = Server((1, 1)), demultiplexer()
    reader, other = Reader(demux, 0), RequestWatch("s", wake=lambda: None)
    demux.add(other, now_s=0.0)
    server.write()
    feed(demux, server.news, now_s=0.0)
    assert demux.unwanted() == []
    demux.remove(reader.watch)
    feed(demux, server.news, now_s=0.0)
    assert (demux.unwanted(), demux.unwanted()) == (["r"], [])
    for _ in range(2):
        server.write()
    feed(demux, server.news[-1:], now_s=0.0)
    assert demux.unwanted() == []


def test_a_wait_that_was_ended_is_forgotten() -> None:
    """Nobody waits any more: nothing to read."""
    demux = demultiplexer()
    readers = [Reader(demux, 0), Reader(demux, None)]
    assert not demux.is_idle
    for reader in readers:
        demux.remove(reader.watch)
    assert demux.is_idle
    assert demux.due(100.0) == []
