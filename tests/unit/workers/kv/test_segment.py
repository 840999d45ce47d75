"""Segments: what was written is read, whatever is wrong is seen."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.kv.segment import Layout, MissCause, Segment, SegmentError, SegmentWriter


def layout(num_tokens: int, *, num_layers: int = 3, block_tokens: int = 16, block_bytes: int = 200_000) -> Layout:
    """Five blocks make a piece."""
    return Layout(
        fingerprint="model",
        num_layers=num_layers,
        block_tokens=block_tokens,
        block_bytes=block_bytes,
        num_tokens=num_tokens,
    )


def write(path: Path, made: Layout, seed: int = 0) -> np.ndarray:
    """A segment of noise; its blocks by layer."""
    rng = np.random.default_rng(seed)
    shape = (made.num_layers, made.num_blocks, made.block_bytes)
    blocks = rng.integers(0, 256, shape, dtype=np.uint8)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(fd, made.total_bytes)
        writer = SegmentWriter(fd, made, [7 * i for i in range(made.num_tokens)])
        for piece in made.pieces():
            writer.write(piece, blocks[piece.layer, piece.first_block : piece.first_block + piece.num_blocks])
        writer.seal()
    finally:
        os.close(fd)
    return blocks


def read(path: Path, *, from_block: int = 0, until_block: int | None = None) -> dict[tuple[int, int], bytes]:
    """Blocks of a segment by layer and number."""
    found = {}
    with Segment(path) as segment:
        scratch = np.empty((segment.layout.blocks_per_piece, segment.layout.block_bytes), dtype=np.uint8)
        for piece in segment.layout.pieces(from_block=from_block, until_block=until_block):
            for row, data in enumerate(segment.read(piece, scratch)):
                found[piece.layer, piece.first_block + row] = data.tobytes()
    return found


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 80, 81, 250])
def test_what_was_written_is_read(tmp_path: Path, num_tokens: int) -> None:
    """One block or many, pieces full or not."""
    made = layout(num_tokens)
    blocks = write(tmp_path / "s", made)

    found = read(tmp_path / "s")
    assert found == {(i, j): blocks[i, j].tobytes() for i in range(3) for j in range(made.num_blocks)}
    assert (tmp_path / "s").stat().st_size == made.total_bytes


@given(first=st.integers(0, 15), number=st.integers(1, 16))
def test_pieces_cover_the_blocks_asked_for_and_little_more(first: int, number: int) -> None:
    """Only whole pieces can be checked."""
    made = layout(16 * 16)
    pieces = made.pieces(from_block=first, until_block=first + number)
    for layer in range(made.num_layers):
        covered = {
            b for p in pieces if p.layer == layer for b in range(p.first_block, p.first_block + p.num_blocks)
        }
        wanted = set(range(first, min(16, first + number)))
        assert wanted <= covered
        assert len(covered - wanted) < 2 * made.blocks_per_piece


def test_common_tokens_is_the_longest_common_prefix(tmp_path: Path) -> None:
    """Shorter, longer, different: as far as both agree."""
    write(tmp_path / "s", layout(40))
    ids = [7 * i for i in range(40)]
    with Segment(tmp_path / "s") as segment:
        assert segment.common_tokens(ids) == 40
        assert segment.common_tokens([*ids, 1, 2]) == 40
        assert segment.common_tokens(ids[:25]) == 25
        assert segment.common_tokens([*ids[:25], 1, *ids[26:]]) == 25
        assert segment.common_tokens([1]) == 0
        assert segment.common_tokens([]) == 0


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_seen_or_lies_in_the_padding(
    tmp_path_factory: pytest.TempPathFactory, at: float, bit: int
) -> None:
    """Header, ids, sums, payload."""
    path = tmp_path_factory.mktemp("flip") / "s"
    made = layout(50, num_layers=2, block_bytes=1000)
    blocks = write(path, made)
    position = int(at * made.total_bytes)
    data = bytearray(path.read_bytes())
    padding = {*range(16 + int.from_bytes(data[8:12], "little"), made.ids_at)}
    padding |= {*range(made.sums_at + 4 * made.num_layers * made.pieces_per_layer, made.payload_at)}
    data[position] ^= 1 << bit
    path.write_bytes(data)

    if position in padding:
        assert read(path) == {(i, j): blocks[i, j].tobytes() for i in range(2) for j in range(made.num_blocks)}
        return
    with pytest.raises(SegmentError) as error:
        read(path)
    assert error.value.cause is MissCause.DAMAGED


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_segment_cut_short_or_lengthened_is_damaged(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    """Also when it gets shorter while it is read."""
    path = tmp_path_factory.mktemp("short") / "s"
    made = layout(50, num_layers=2, block_bytes=1000)
    write(path, made)
    with Segment(path) as segment:
        os.truncate(path, int(share * made.payload_at))
        with pytest.raises(SegmentError) as during:
            segment.read(made.pieces()[-1], np.empty((made.blocks_per_piece, 1000), dtype=np.uint8))
    assert during.value.cause is MissCause.DAMAGED
    with pytest.raises(SegmentError) as after:
        Segment(path)
    assert after.value.cause is MissCause.DAMAGED

    write(path, made)
    os.truncate(path, made.total_bytes + 1)
    with pytest.raises(SegmentError, match="bytes instead of"):
        Segment(path)


def test_a_segment_that_was_never_sealed_is_damaged(tmp_path: Path) -> None:
    """Its writer died before the last write."""
    made = layout(50)
    fd = os.open(tmp_path / "s", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, made.total_bytes)
    writer = SegmentWriter(fd, made, range(50))
    for piece in made.pieces():
        writer.write(piece, np.ones((piece.num_blocks, made.block_bytes), dtype=np.uint8))
    os.close(fd)
    with pytest.raises(SegmentError, match="no valid header"):
        Segment(tmp_path / "s")


def test_no_file_is_missing(tmp_path: Path) -> None:
    """The commonest miss; a link is none of ours."""
    (tmp_path / "link").symlink_to(tmp_path / "s")
    for name in ("s", "link"):
        with pytest.raises(SegmentError) as error:
            Segment(tmp_path / name)
        assert error.value.cause is MissCause.MISSING


def _forge(path: Path, change: dict[str, object] | bytes) -> None:
    """Another header, with a checksum that is right."""
    data = bytearray(path.read_bytes())
    magic, length, _ = struct.unpack_from("<8sII", data)
    header = change
    if isinstance(change, dict):
        header = json.dumps(json.loads(data[16 : 16 + length]) | change).encode()
    data[: 16 + len(header)] = struct.pack("<8sII", magic, len(header), crc32(header)) + header
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        b"no json",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 4000,
        {"block_bytes": 0},
        {"block_tokens": 0},
        {"num_layers": -1},
        {"num_tokens": "many"},
        {"num_tokens": 10**400},
        {"fingerprint": 3},
        {"v": 2},
    ],
)
def test_a_header_of_somebody_else_is_foreign(tmp_path: Path, change: dict[str, object] | bytes) -> None:
    """Whatever it says, with a valid checksum too."""
    write(tmp_path / "s", layout(40))
    _forge(tmp_path / "s", change)

    with pytest.raises(SegmentError) as found:
        Segment(tmp_path / "s")
    assert found.value.cause is MissCause.FOREIGN


def test_a_header_with_more_fields_is_read(tmp_path: Path) -> None:
    """A newer release may add some; one that changes the meaning of the others raises `v`."""
    blocks = write(tmp_path / "s", layout(40))
    _forge(tmp_path / "s", {"later": 1, "v": 1})

    assert read(tmp_path / "s")[0, 0] == blocks[0, 0].tobytes()


def test_what_is_no_file_is_damaged(tmp_path: Path) -> None:
    """A directory, and a pipe that nobody writes to."""
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "p")
    for name in ("d", "p"):
        with pytest.raises(SegmentError) as found:
            Segment(tmp_path / name)
        assert found.value.cause is MissCause.DAMAGED


@pytest.mark.parametrize("header", [b"{", b"[]", b"5", b"{}", b"[" * 4000, b"\xff", b"9" * 4000 + b"9" * 50])
def test_a_header_of_another_kind_is_of_another_version(tmp_path: Path, header: bytes) -> None:
    """Its checksum is right; what it says cannot be read."""
    prefix = struct.pack("<8sII", b"L4KV\x00\x00\x00\x02", len(header), crc32(header))
    (tmp_path / "s").write_bytes((prefix + header).ljust(8192, b"\0"))
    with pytest.raises(SegmentError) as error:
        Segment(tmp_path / "s")
    assert error.value.cause is MissCause.FOREIGN
