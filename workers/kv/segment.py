"""One request's KV cache in a file: written and read in pieces, each with its own checksum.

    16 bytes   magic, length and CRC-32 of the header
    header     JSON, up to 4,096 bytes from the start
    ids        the token ids that the KV was computed from, 4 bytes each
    sums       low half of the 64-bit XXH3 of every piece, layer by layer: ten times as fast as CRC-32
    payload    layer by layer, the blocks of the request in order, as the engine lays them out

Access is by plain reads and writes, not by a mapping: a file cut short under a mapping, or a full file system,
kills the process that touches it (SIGBUS). One piece at a time also stays in the processor's cache.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from l4queue.compat import object_of, value_of
from l4queue.errors import PortableError, UnreadableValue

__all__ = ("Layout", "MissCause", "Segment", "SegmentError", "SegmentPiece", "SegmentWriter")

_MAGIC = b"L4KV\x00\x00\x00\x02"
_PREFIX = struct.Struct("<8sII")
_HEADER_BYTES = 4096  # one page of memory, to which the blocks are aligned
_PIECE_BYTES = 1 << 20  # copied and checksummed at once: fits a core's cache
_WORD = np.dtype("<u4")


class MissCause(StrEnum):
    """Why a ticket did not spare the prefill."""

    MISSING = "missing"  # no such segment: another host's, evicted, too old, used up, or never finished
    FOREIGN = "foreign"  # of another model, another data type or another layout
    DAMAGED = "damaged"  # cut short, or with a wrong checksum
    MISMATCH = "mismatch"  # computed from other tokens


class SegmentError(PortableError):
    """A segment that cannot be used; `cause` is counted."""

    def __init__(self, cause: MissCause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Content and layout of a segment. Two engines can exchange segments of equal `fingerprint` and shape."""

    fingerprint: str
    num_layers: int
    block_tokens: int
    block_bytes: int  # of one layer
    num_tokens: int

    @property
    def num_blocks(self) -> int:
        """Blocks of each layer; the last one may be filled in part."""
        return -(-self.num_tokens // self.block_tokens)

    @property
    def blocks_per_piece(self) -> int:
        return max(1, _PIECE_BYTES // self.block_bytes)

    @property
    def pieces_per_layer(self) -> int:
        return -(-self.num_blocks // self.blocks_per_piece)

    @property
    def ids_at(self) -> int:
        return _HEADER_BYTES

    @property
    def sums_at(self) -> int:
        return self.ids_at + self.num_tokens * _WORD.itemsize

    @property
    def payload_at(self) -> int:
        end = self.sums_at + self.num_layers * self.pieces_per_layer * _WORD.itemsize
        return -(-end // _HEADER_BYTES) * _HEADER_BYTES

    @property
    def payload_bytes(self) -> int:
        return self.num_layers * self.num_blocks * self.block_bytes

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return self.payload_at + self.payload_bytes

    def fits(self, other: Layout) -> bool:
        """Whether blocks of the other can be used where these can, whatever the number of tokens."""
        return (self.fingerprint, self.num_layers, self.block_tokens, self.block_bytes) == (
            other.fingerprint,
            other.num_layers,
            other.block_tokens,
            other.block_bytes,
        )

    def pieces(self, *, from_block: int = 0, until_block: int | None = None) -> list[SegmentPiece]:
        """The pieces that cover these blocks, in the order of the file."""
        until_block = self.num_blocks if until_block is None else min(until_block, self.num_blocks)
        size, found = self.blocks_per_piece, []
        for layer in range(self.num_layers):
            for number in range(from_block // size, -(-until_block // size)):
                first = number * size
                found.append(
                    SegmentPiece(
                        layer=layer,
                        number=layer * self.pieces_per_layer + number,
                        first_block=first,
                        num_blocks=min(size, self.num_blocks - first),
                    )
                )
        return found

    def piece_at(self, piece: SegmentPiece) -> int:
        """Offset of a piece in the file."""
        return self.payload_at + (piece.layer * self.num_blocks + piece.first_block) * self.block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentPiece:
    """Consecutive blocks of one layer, checked together."""

    layer: int
    number: int
    first_block: int
    num_blocks: int


class SegmentWriter:
    """Fills an open file. Nothing is valid before `seal`. OSError when the file system is full."""

    def __init__(self, fd: int, layout: Layout, token_ids: Sequence[int]) -> None:
        if len(token_ids) != layout.num_tokens:
            raise ValueError(f"{len(token_ids)} token ids for {layout.num_tokens} tokens")
        self._fd = fd
        self._layout = layout
        self._ids = np.asarray(token_ids, dtype=_WORD).tobytes()
        self._sums = np.zeros(layout.num_layers * layout.pieces_per_layer, dtype=_WORD)

    def write(self, piece: SegmentPiece, rows: npt.NDArray[np.uint8]) -> None:
        """Write the blocks of a piece, one row each."""
        data = np.ascontiguousarray(rows).data.cast("B")
        self._sums[piece.number] = _sum_of(data)
        _write_at(self._fd, data, self._layout.piece_at(piece))

    def seal(self) -> None:
        """Write the sums and, last, the header."""
        sums = self._sums.tobytes()
        _write_at(self._fd, memoryview(self._ids), self._layout.ids_at)
        _write_at(self._fd, memoryview(sums), self._layout.sums_at)
        fields = asdict(self._layout) | {"ids_crc": crc32(self._ids), "sums_crc": crc32(sums)}
        header = json.dumps(fields).encode()
        if _PREFIX.size + len(header) > _HEADER_BYTES:
            raise ValueError(f"header of {len(header)} bytes")
        _write_at(self._fd, memoryview(_PREFIX.pack(_MAGIC, len(header), crc32(header)) + header), 0)


class Segment:
    """A segment opened for reading. It stays readable when its file is removed meanwhile."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise SegmentError(MissCause.MISSING, f"{path.name}: {error.strerror}") from error
        try:
            self.layout, ids_crc, sums_crc = self._read_header(path.name)
            self.token_ids = self._read_words(self.layout.ids_at, self.layout.num_tokens, ids_crc)
            num_sums = self.layout.num_layers * self.layout.pieces_per_layer
            self._sums = self._read_words(self.layout.sums_at, num_sums, sums_crc)
        except OSError as error:  # a directory, or a disk that fails
            self.close()
            raise SegmentError(MissCause.DAMAGED, f"{path.name}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def common_tokens(self, token_ids: Sequence[int]) -> int:
        """Length of the longest common prefix."""
        n = min(len(token_ids), len(self.token_ids))
        differs = np.asarray(token_ids[:n], dtype=_WORD) != self.token_ids[:n]
        return int(differs.argmax()) if differs.any() else n

    def read(self, piece: SegmentPiece, into: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The blocks of a piece, one row each, checked: a view of `into`, which has room for one piece."""
        rows = into[: piece.num_blocks]
        data = rows.data.cast("B")
        self._read_at(data, self.layout.piece_at(piece))
        if _sum_of(data) != self._sums[piece.number]:
            raise SegmentError(MissCause.DAMAGED, f"layer {piece.layer}, block {piece.first_block}: checksum")
        return rows

    def _read_header(self, name: str) -> tuple[Layout, int, int]:
        raw = bytearray(_HEADER_BYTES)
        size = os.fstat(self._fd).st_size
        self._read_at(memoryview(raw), 0)
        magic, length, crc = _PREFIX.unpack_from(raw)
        header = bytes(raw[_PREFIX.size : _PREFIX.size + length])
        if magic != _MAGIC or len(header) != length or crc32(header) != crc:
            raise SegmentError(MissCause.DAMAGED, f"{name}: no valid header")
        try:
            fields = object_of(header, what="header")
            layout = value_of(Layout, fields, what="layout")
            ids_crc, sums_crc = fields["ids_crc"], fields["sums_crc"]
        except (KeyError, UnreadableValue) as error:
            raise SegmentError(MissCause.FOREIGN, f"{name}: written by another version: {error}") from error
        if min(layout.num_layers, layout.block_tokens, layout.block_bytes, layout.num_tokens) < 1:
            raise SegmentError(MissCause.FOREIGN, f"{name}: {layout} holds nothing")
        if size != layout.total_bytes:
            raise SegmentError(MissCause.DAMAGED, f"{name}: {size} bytes instead of {layout.total_bytes}")
        return layout, ids_crc, sums_crc

    def _read_words(self, offset: int, number: int, crc: int) -> npt.NDArray[np.uint32]:
        words = np.empty(number, dtype=_WORD)
        data = words.data.cast("B")
        self._read_at(data, offset)
        if crc32(data) != crc:
            raise SegmentError(MissCause.DAMAGED, f"{number} words at {offset}: checksum")
        return words

    def _read_at(self, into: memoryview, offset: int) -> None:
        while into:
            got = os.preadv(self._fd, [into], offset)
            if not got:
                raise SegmentError(MissCause.DAMAGED, f"ends at {offset}")
            into, offset = into[got:], offset + got


def _sum_of(data: memoryview) -> int:
    return xxh3_64_intdigest(data) & 0xFFFFFFFF


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done
