"""vLLM's side of KV hand-over: `KVConnectorBase_V1`, loaded by its module path, vLLM unpatched.

vLLM makes one connector in its scheduler and one in its worker process. The first plans
(`workers.kv.scheduler`), the second copies (`workers.kv.copier`). Jobs travel with the metadata of a step,
results with its output. The front end hears of the outcome with the statistics of the step.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.v1.request import RequestStatus

from workers.kv.blocks import block_rows
from workers.kv.copier import KVCopier, LoadJob, SaveJob
from workers.kv.movable import has_movable_groups
from workers.kv.scheduler import KVRequest, KVScheduler
from workers.kv.store import SegmentStore

__all__ = ("HandoverConnector",)

_IDLE_WAIT_S = 0.005  # a new request waits no longer than this for the thread that copies


@dataclass
class _Jobs(KVConnectorMetadata):  # type: ignore[misc] # vLLM is untyped here
    """Jobs of the worker beside this step."""

    jobs: list[SaveJob | LoadJob] = field(default_factory=list)
    is_idle: bool = False


@dataclass
class _Speed(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Speed of a move as measured by the worker's connector, on its way to the scheduler's."""

    bytes_per_s: float

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """There is one worker process."""
        return other


class _Stats(KVConnectorStats):  # type: ignore[misc]
    """A ledger on its way to the front end."""

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Only the scheduler's connector has any."""
        return self if other.is_empty() else other

    def reduce(self) -> dict[str, int | float]:
        return {"loads": self.data["num_loads"], "bytes": self.data["loaded_bytes"]}

    def is_empty(self) -> bool:
        return not self.data


class HandoverConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Keeps the KV of requests that are cut, loads it for requests that come with a ticket.

    Models with several groups of KV blocks (sliding windows, state spaces) run as without it: nothing is moved.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._fingerprint: str = extra["fingerprint"]
        self._block_tokens = int(vllm_config.cache_config.block_size)
        self._store = SegmentStore(
            Path(extra["directory"]), limit_bytes=extra["limit_bytes"], ttl_s=float(extra["ttl_s"])
        )
        self._can_move = has_movable_groups(kv_cache_config) and vllm_config.parallel_config.world_size == 1
        self._carrier: KVCopier | None = None
        self._planning = KVScheduler(self._store, fingerprint=self._fingerprint, block_tokens=self._block_tokens)

    @property
    def requires_kv_delivery(self) -> bool:
        """A miss costs a prefill and nothing else."""
        return False

    # ---------------------------------------------------------------- worker process

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """The engine's cache, one tensor per layer."""
        if self._can_move:
            self._carrier = KVCopier(
                self._store,
                block_rows(kv_caches),
                fingerprint=self._fingerprint,
                block_tokens=self._block_tokens,
            )
            self._carrier.measure()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Hand this step's jobs to the thread; nothing waits for them."""
        if self._carrier is not None and isinstance(self._connector_metadata, _Jobs):
            for job in self._connector_metadata.jobs:
                self._carrier.submit(job)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Requests run only once they are loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved while a request runs."""

    def wait_for_save(self) -> None:
        """Blocks that are being saved stay allocated."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Jobs that are over. A step without work waits a little, or the engine would spin beside the copy."""
        if self._carrier is None:
            return KVConnectorTransferResults()
        is_idle = isinstance(self._connector_metadata, _Jobs) and self._connector_metadata.is_idle
        results = self._carrier.results(wait_s=_IDLE_WAIT_S if is_idle else 0.0)
        return KVConnectorTransferResults(
            finished_sending=results.saved, finished_recving=results.loaded, failed_recving=results.failed
        )

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """The speed of copies, when it has changed."""
        bytes_per_s = self._carrier.new_bytes_per_s() if self._carrier is not None else 0.0
        return _Speed(bytes_per_s=bytes_per_s) if bytes_per_s else None

    def shutdown(self) -> None:
        """End the thread."""
        if self._carrier is not None:
            self._carrier.close()

    # ---------------------------------------------------------------- scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens of this request that its ticket has, loaded beside the steps of others."""
        if not self._can_move:
            return 0, False
        arrival = KVRequest(
            request_id=request.request_id,
            ticket=_ticket(request, "l4_from"),
            token_ids=request.all_token_ids,
            cached_tokens=num_computed_tokens,
        )
        num_tokens = self._planning.loadable_tokens(arrival)
        return num_tokens, num_tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """There is room for it."""
        if num_external_tokens > 0:
            (block_ids,) = blocks.get_block_ids()
            self._planning.load(
                request.request_id,
                _ticket(request, "l4_from"),
                num_tokens=num_external_tokens,
                block_ids=block_ids,
            )

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The jobs since the last step."""
        is_idle = scheduler_output.total_num_scheduled_tokens == 0
        return _Jobs(jobs=self._planning.take_jobs(), is_idle=is_idle)

    def update_connector_output(self, connector_output: Any) -> None:
        """Results of the worker's connector."""
        self._planning.over(
            saved=connector_output.finished_sending or (),
            loaded=connector_output.finished_recving or (),
            failed=connector_output.failed_recving or (),
        )
        if isinstance(connector_output.kv_connector_worker_meta, _Speed):
            self._planning.measured(connector_output.kv_connector_worker_meta.bytes_per_s)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """True while a request's blocks are being saved."""
        num_tokens = min(request.num_computed_tokens, len(request.all_token_ids)) if self._can_move else 0
        must_stay = self._planning.left(
            request.request_id,
            _ticket(request, "l4_own"),
            token_ids=request.all_token_ids[:num_tokens],
            block_ids=block_ids[0] if block_ids else (),
            is_cut=request.status == RequestStatus.FINISHED_ABORTED,
        )
        return must_stay, None

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What happened, once; from the scheduler's side alone."""
        ledger = self._planning.take_log()
        return _Stats(data=asdict(ledger)) if ledger else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """For vLLM's own log."""
        return _Stats(data=data or {})


def _ticket(request: Any, key: str) -> str:
    return str((request.kv_transfer_params or {}).get(key, ""))
