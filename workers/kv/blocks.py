"""KV blocks of all layers as rows of bytes: gathered from the engine's cache, scattered back into it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

__all__ = ("BlockRows", "HostRows", "TensorRows", "block_rows")

_MAX_THREADS = 8  # that copy; more do not raise the bandwidth of one GPU's bus
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Rows = npt.NDArray[np.uint8]


class BlockRows(Protocol):
    """The KV cache of an engine, block by block. Blocks are copied as they lie: same engine, same layout."""

    num_layers: int
    num_blocks: int
    block_bytes: int
    num_threads: int  # that may copy at once

    def gather(self, layer: int, block_ids: Sequence[int]) -> Rows:
        """Copies of these blocks, one row each."""

    def scatter(self, layer: int, block_ids: Sequence[int], rows: Rows) -> None:
        """Overwrite these blocks."""

    def begin(self) -> Any:
        """Remember what the engine has been told to compute so far; for `after`."""

    def after(self, begun: Any) -> None:
        """Let the copies that follow in this thread come after that."""

    def finish(self) -> None:
        """Wait until the copies are made."""


def block_rows(kv_caches: Mapping[str, torch.Tensor]) -> BlockRows:
    """The right kind for where the cache lies. ValueError when layers differ, so that they cannot be moved."""
    layers = list(kv_caches.values())
    shapes = {(tuple(layer.shape), layer.dtype, layer.device) for layer in layers}
    if len(shapes) != 1:
        raise ValueError(f"{len(layers)} layers of {len(shapes)} different shapes")
    if layers[0].device.type == "cpu" and all(layer[0].is_contiguous() for layer in layers):
        return HostRows(layers)
    return TensorRows(layers)


class HostRows:
    """A cache in main memory whose blocks are contiguous: plain copies on one core, without the GIL."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        word = _WORDS[layers[0].element_size()]
        # dimension 0 counts blocks; a block's bytes lie together, blocks need not
        self._layers = [layer.view(word).flatten(1).numpy() for layer in layers]
        self._word = self._layers[0].dtype
        self.num_layers, self.num_blocks = len(layers), len(layers[0])
        self.block_bytes = self._layers[0].shape[1] * self._word.itemsize
        self.num_threads = 1  # the model computes on these cores

    def gather(self, layer: int, block_ids: Sequence[int]) -> Rows:
        return np.take(self._layers[layer], block_ids, axis=0).view(np.uint8)

    def scatter(self, layer: int, block_ids: Sequence[int], rows: Rows) -> None:
        self._layers[layer][np.asarray(block_ids)] = rows.view(self._word)

    def begin(self) -> None:
        """Nothing is computed behind the caller's back."""

    def after(self, begun: None) -> None:
        """See `begin`."""

    def finish(self) -> None:
        """Copies are made at once."""


class TensorRows:
    """A cache anywhere, in any layout with blocks along dimension 0; on a GPU, copies on a stream of their own."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        word = _WORDS[layers[0].element_size()]
        self._layers = [layer.view(word) for layer in layers]  # not every operation knows every float
        self.num_layers, self.num_blocks = len(layers), len(layers[0])
        self.block_bytes = layers[0][0].numel() * layers[0].element_size()
        self._stream = torch.cuda.Stream(layers[0].device) if layers[0].is_cuda else None
        self.num_threads = 1 if self._stream is None else min(_MAX_THREADS, len(os.sched_getaffinity(0)))

    def gather(self, layer: int, block_ids: Sequence[int]) -> Rows:
        with torch.cuda.stream(self._stream):
            blocks = self._layers[layer].index_select(0, self._index(block_ids))
            rows: Rows = blocks.flatten(1).cpu().numpy().view(np.uint8)
        return rows

    def scatter(self, layer: int, block_ids: Sequence[int], rows: Rows) -> None:
        cache = self._layers[layer]
        with torch.cuda.stream(self._stream):
            blocks = torch.from_numpy(rows).to(cache.device).view(cache.dtype)
            cache.index_copy_(0, self._index(block_ids), blocks.view(len(block_ids), *cache.shape[1:]))

    def begin(self) -> Any:
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def after(self, begun: Any) -> None:
        if self._stream is not None and begun is not None:
            self._stream.wait_event(begun)

    def finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64, device=self._layers[0].device)
