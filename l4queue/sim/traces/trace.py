"""Request traces: arrivals, lengths and content, read from files with errors that name file, line and column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l4queue.cost.step import BLOCK_TOKENS
from l4queue.errors import ConfigError
from l4queue.sim.engine.request import Chain, SimRequest
from l4queue.sim.traces.content import Chains, num_hashes
from l4queue.sim.traces.rows import COLUMNS, HASH_IDS, Row, csv_rows, ids_beside, mooncake_rows, trace_error

__all__ = ("COLUMNS", "Trace", "read_trace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Arrivals (s, never decreasing) and lengths (tokens, ≥ 1), as arrays of one length ≥ 1.

    `chains` is the content of each request, None where nothing is known of it: then engines have no prefix caches.
    `sessions` numbers the conversation or client of each, where the trace names it.
    """

    name: str
    arrival_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    chains: tuple[Chain, ...] | None = None
    sessions: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate_rps(self) -> float:
        """Mean arrival rate, requests per second; 0 when all arrive at once."""
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / span_s if span_s > 0 else 0.0

    def scaled(self, rate_scale: float) -> Trace:
        """The same requests, arriving `rate_scale` times as fast from 0 on."""
        return replace(self, arrival_s=(self.arrival_s - self.arrival_s[0]) / rate_scale)

    def select(self, rows: slice | Sequence[int] | NDArray[np.int64]) -> Trace:
        """The chosen rows, arrivals unchanged."""
        chosen = np.arange(len(self))[rows]
        return Trace(
            name=self.name,
            arrival_s=self.arrival_s[chosen],
            input_tokens=self.input_tokens[chosen],
            output_tokens=self.output_tokens[chosen],
            chains=None if self.chains is None else tuple(self.chains[row] for row in chosen.tolist()),
            sessions=None if self.sessions is None else self.sessions[chosen],
        )

    def without_content(self) -> Trace:
        """The same with nothing known of the content: engines then have no prefix caches."""
        return replace(self, chains=None)

    def requests(self) -> list[SimRequest]:
        """Fresh simulator requests, one per row."""
        count = len(self)
        rows = zip(
            self.arrival_s.tolist(),
            self.input_tokens.tolist(),
            self.output_tokens.tolist(),
            self.chains or ((),) * count,
            [None] * count if self.sessions is None else self.sessions.tolist(),
            strict=True,
        )
        return [
            SimRequest(index, arrival_s, prompt_tokens=prompt, output_tokens=output, chain=chain, session=session)
            for index, (arrival_s, prompt, output, chain, session) in enumerate(rows)
        ]


def read_trace(path: str | Path, *, hash_block_tokens: int | None = None) -> Trace:
    """Read `arrival_s,input_tokens,output_tokens` from a CSV file; .gz is unpacked.

    Azure's own CSV (`TIMESTAMP,ContextTokens,GeneratedTokens`) and Mooncake's JSON lines are read, too.

    Arrivals must be finite, ≥ 0 and sorted; lengths whole numbers ≥ 0. An output of 0 tokens counts as 1: an
    engine makes at least one. A column `group` names sessions. With `hash_block_tokens` the content is read too:
    a column `hash_ids`, or line by line a file NAME.hash_ids.txt (or .txt.gz) beside NAME.csv. Other columns are
    ignored. Raises TraceError, one line naming file, line and column.
    """
    path = Path(path)
    if hash_block_tokens is not None and (hash_block_tokens < 1 or hash_block_tokens % BLOCK_TOKENS):
        raise ConfigError(f"hash ids must stand for a multiple of {BLOCK_TOKENS} tokens, not {hash_block_tokens}")
    stem = path.name.removesuffix(".gz")
    is_mooncake = stem.endswith(".jsonl")
    rows = list(mooncake_rows(path) if is_mooncake else csv_rows(path))
    if not rows:
        raise trace_error(path, 2, COLUMNS[0], "the file has a header but no requests")
    if hash_block_tokens is None:
        ids = None
    elif rows[0].ids is not None:
        ids = [row.ids or [] for row in rows]
    else:
        ids = ids_beside(path, num_rows=len(rows))
    groups: dict[str, int] = {}
    return Trace(
        name=stem.removesuffix(".jsonl" if is_mooncake else ".csv"),
        arrival_s=np.array([row.arrival_s for row in rows], dtype=np.float64),
        input_tokens=np.array([row.input_tokens for row in rows], dtype=np.int64),
        output_tokens=np.array([row.output_tokens for row in rows], dtype=np.int64),
        chains=None if ids is None or hash_block_tokens is None else _chains(path, rows, ids, hash_block_tokens),
        sessions=None
        if rows[0].group is None
        else np.array([groups.setdefault(row.group or "", len(groups)) for row in rows], dtype=np.int64),
    )


def _chains(
    path: Path, rows: Sequence[Row], ids: Sequence[Sequence[int]], hash_block_tokens: int
) -> tuple[Chain, ...]:
    chains = Chains(hash_block_tokens)
    for row, mine in zip(rows, ids, strict=True):
        expected = num_hashes(row.input_tokens, hash_block_tokens)
        if len(mine) != expected:
            what = (
                f"{len(mine)} ids for {row.input_tokens} input_tokens, expected {expected} of {hash_block_tokens} "
                "tokens each; set --hash-block-tokens if they are of another size"
            )
            raise trace_error(path, row.line, HASH_IDS, what)
    return tuple(
        chains.chain(mine, prompt_tokens=row.input_tokens, output_tokens=row.output_tokens)
        for row, mine in zip(rows, ids, strict=True)
    )
