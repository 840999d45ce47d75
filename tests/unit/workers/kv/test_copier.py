"""Copies between caches and segments: two caches, any layout, and what goes wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from workers.kv.copier import KVCopier, LoadJob, Results, SaveJob
from workers.kv.store import SegmentStore, new_ticket

torch = pytest.importorskip("torch")

BLOCK_TOKENS = 16
NUM_BLOCKS = 64


def cache(kind: str, dtype: str, seed: int) -> dict[str, torch.Tensor]:
    """Noise in three layers of [blocks, heads, tokens, 2 · head size], laid out in one of several ways."""
    torch.manual_seed(seed)
    made = {}
    for layer in range(3):
        if kind == "strided":  # blocks contiguous, with gaps between them
            tensor = torch.randn(NUM_BLOCKS, 2, 2, BLOCK_TOKENS, 64)[:, 0]
        elif kind == "permuted":  # tokens before heads in memory, as other attention backends have it
            tensor = torch.randn(NUM_BLOCKS, BLOCK_TOKENS, 2, 64).permute(0, 2, 1, 3)
        else:
            tensor = torch.randn(NUM_BLOCKS, 2, BLOCK_TOKENS, 64)
        if dtype != "float32":
            tensor = tensor.to(getattr(torch, dtype))
        made[f"layer{layer}"] = tensor
    return made


class Bench:
    """Carriers on one directory."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        self.num_threads = num_threads
        self.store = SegmentStore(folder / "kv", limit_bytes=1 << 24)
        self.carriers: list[KVCopier] = []

    def carrier(self, kv_caches: dict[str, torch.Tensor], fingerprint: str = "model") -> KVCopier:
        """A carrier for a cache."""
        from workers.kv.blocks import block_rows

        rows = block_rows(kv_caches)
        rows.num_threads = self.num_threads
        made = KVCopier(self.store, rows, fingerprint=fingerprint, block_tokens=BLOCK_TOKENS)
        self.carriers.append(made)
        return made

    def save(self, carrier: KVCopier, block_ids: list[int], num_tokens: int) -> str:
        """Save a request; its ticket."""
        ticket = new_ticket()
        carrier.submit(
            SaveJob(request_id="s", ticket=ticket, token_ids=list(range(num_tokens)), block_ids=block_ids)
        )
        assert wait(carrier).saved == {"s"}
        return ticket

    def load(self, carrier: KVCopier, ticket: str, first_block: int, block_ids: list[int]) -> bool:
        """Load into blocks; whether that worked."""
        carrier.submit(LoadJob(request_id="l", ticket=ticket, first_block=first_block, block_ids=block_ids))
        results = wait(carrier)
        assert results.loaded == {"l"}
        return not results.failed


def wait(carrier: KVCopier) -> Results:
    """The results of one job."""
    while True:
        results = carrier.results(wait_s=10.0)
        if results.saved or results.loaded:
            return results


@pytest.fixture(params=[1, 4], ids=["one thread", "several threads, as on a GPU"])
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Ends its threads."""
    made = Bench(tmp_path, request.param)
    yield made
    for carrier in made.carriers:
        carrier.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("kind", ["contiguous", "strided", "permuted"])
def test_blocks_arrive_and_no_other_changes(bench: Bench, kind: str, dtype: str) -> None:
    """From scattered blocks to other scattered blocks, the last one filled in part, the first ones cached."""
    there, here = cache(kind, dtype, 1), cache(kind, dtype, 2)
    before = {name: tensor.clone() for name, tensor in here.items()}
    rng = np.random.default_rng(3)
    sources = [int(i) for i in rng.permutation(NUM_BLOCKS)[:40]]
    targets = [int(i) for i in rng.permutation(NUM_BLOCKS)[:35]]

    ticket = bench.save(bench.carrier(there), sources, 40 * BLOCK_TOKENS - 5)
    assert bench.load(bench.carrier(here), ticket, 4, targets)

    for name in there:
        for number, target in enumerate(targets):
            assert torch.equal(here[name][target].float(), there[name][sources[4 + number]].float()), (
                f"{name} {number}"
            )
        others = [i for i in range(NUM_BLOCKS) if i not in targets]
        assert torch.equal(here[name][others].float(), before[name][others].float())
    assert not bench.store.path(ticket).exists()


def test_the_speed_is_known_before_the_first_move_and_the_cache_is_as_before(bench: Bench) -> None:
    """4 MiB out and in, nothing is left in the directory; it is told once, and again after a move."""
    torch.manual_seed(1)
    kv_caches = {f"layer{i}": torch.randn(NUM_BLOCKS, 2, BLOCK_TOKENS, 256) for i in range(2)}
    before = {name: tensor.clone() for name, tensor in kv_caches.items()}
    carrier = bench.carrier(kv_caches)

    carrier.measure()

    first = carrier.new_bytes_per_s()
    assert 1e6 < first < 1e12
    assert carrier.new_bytes_per_s() == 0.0
    assert {path.name for path in bench.store.directory.iterdir()} == {"lock"}
    assert all(torch.equal(kv_caches[name], tensor) for name, tensor in before.items())
    blocks = list(range(NUM_BLOCKS))
    assert bench.load(carrier, bench.save(carrier, blocks, NUM_BLOCKS * BLOCK_TOKENS), 0, blocks)
    assert carrier.new_bytes_per_s() not in (0.0, first)


def flip(path: Path) -> None:
    """A bit in the last block."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("fault", ["flip", "truncate", "delete"])
def test_a_broken_segment_fails_is_removed_and_the_thread_goes_on(bench: Bench, fault: str) -> None:
    """The engine prefills what was not loaded; the next request loads."""
    kv_caches = cache("contiguous", "float32", 1)
    carrier = bench.carrier(kv_caches)
    ticket = bench.save(carrier, [1, 2, 3], 40)
    path = bench.store.path(ticket)
    {"flip": flip, "truncate": lambda p: os.truncate(p, 5000), "delete": Path.unlink}[fault](path)

    assert not bench.load(carrier, ticket, 0, [5, 6, 7])
    assert not path.exists()

    ticket = bench.save(carrier, [1, 2, 3], 40)
    assert bench.load(carrier, ticket, 0, [5, 6, 7])
    assert torch.equal(kv_caches["layer1"][5], kv_caches["layer1"][1])


def test_a_segment_of_another_model_or_layout_is_not_loaded(bench: Bench) -> None:
    """Neither other weights nor another data type, nor more blocks than there are."""
    ticket = bench.save(bench.carrier(cache("contiguous", "float32", 1)), [1, 2, 3], 40)
    keep = bench.store.path(ticket).read_bytes()
    target = cache("contiguous", "float32", 2)
    before = {name: tensor.clone() for name, tensor in target.items()}
    for carrier, blocks in (
        (bench.carrier(target, fingerprint="other"), [5, 6, 7]),
        (bench.carrier(cache("contiguous", "bfloat16", 2)), [5, 6, 7]),
        (bench.carrier(target), [5, 6, 7, 8]),
    ):
        bench.store.path(ticket).write_bytes(keep)
        assert not bench.load(carrier, ticket, 0, blocks)
    assert all(torch.equal(target[name], before[name]) for name in target)


def test_what_finds_no_room_is_not_saved(bench: Bench) -> None:
    """The job is over all the same, the directory stays empty."""
    carrier = bench.carrier(cache("contiguous", "float32", 1))
    ticket = bench.save(carrier, list(range(NUM_BLOCKS)) * 30, NUM_BLOCKS * 30 * BLOCK_TOKENS)
    assert not bench.store.path(ticket).exists()
    assert {path.name for path in bench.store.directory.iterdir()} <= {"lock"}


def test_layers_of_different_shapes_cannot_be_moved() -> None:
    """Such models keep their KV."""
    from workers.kv.blocks import block_rows

    layers = cache("contiguous", "float32", 1)
    layers["odd"] = torch.zeros(NUM_BLOCKS, 1, BLOCK_TOKENS, 64)
    with pytest.raises(ValueError, match="2 different shapes"):
        block_rows(layers)
