"""Profile of a worker's engine: its limits, the cost model measured on it, the price of a move from it."""

from __future__ import annotations

from dataclasses import replace

from l4queue.config import Settings
from l4queue.cost.calibrate import Calibrator
from l4queue.cost.move import MovePrice
from l4queue.cost.step import StepCost
from workers.engine.base import Engine, EngineInfo
from workers.telemetry.snapshot import StepMeter

__all__ = ("KV_BYTES_PER_S", "KV_FIXED_MS", "EngineProfile")

# measured on two CPU engines under load: docs/kv-handover.md
KV_BYTES_PER_S = 0.75e9  # writing and reading together, until this engine has measured its own
KV_FIXED_MS = 50.0  # of one transfer, whatever its size


class EngineProfile:
    """Starts with the cost model that is given, and takes in the engine's steps. Reading is safe on any thread."""

    def __init__(self, *, settings: Settings, engine: Engine, cost: StepCost) -> None:
        self._settings = settings
        self._engine = engine
        self._info: EngineInfo | None = None
        self._calibrator = Calibrator(prior=cost)
        self.steps = StepMeter()

    def started(self, info: EngineInfo) -> None:
        """Take over the engine's own limits."""
        self._info = info
        limits = replace(
            self._calibrator.prior,
            kv_capacity_tokens=info.kv_capacity_tokens,
            max_batched_tokens=info.max_batched_tokens,
            max_num_seqs=self.max_running,
        )
        self._calibrator = Calibrator(prior=limits)

    def measure(self) -> StepCost | None:
        """Take in new steps; the cost model of this very engine, None until it has seen enough of them."""
        records = self._engine.step_records()
        if records and self._settings.metrics_port:
            self.steps.add(records, self.cost)
        self._calibrator = self._calibrator.update(records)
        return self._calibrator.cost if self._calibrator.is_identified else None

    @property
    def is_started(self) -> bool:
        return self._info is not None

    @property
    def info(self) -> EngineInfo:
        """The engine's name and limits. Only once it has started."""
        assert self._info is not None
        return self._info

    @property
    def max_running(self) -> int:
        """Most requests at once: the setting's and the engine's limit."""
        return min(self._settings.max_running, self._info.max_running) if self._info else 0

    @property
    def cost(self) -> StepCost:
        """The cost model in force: measured here once that is possible, else as given."""
        return self._calibrator.cost

    @property
    def is_calibrated(self) -> bool:
        """Whether the cost model in force was measured here."""
        return self._calibrator.is_identified

    @property
    def copies_wait(self) -> bool:
        """Whether copies of KV caches in this engine wait for each other; those of emulated ones do not."""
        return self.info.can_move_kv and self._settings.engine != "emulated"

    @property
    def move_price(self) -> MovePrice:
        """Price of a move of a running request: its target prefills it again, or reads its KV cache.

        Its room is that of a host whose other requests stay where they are.
        """
        if not self.info.can_move_kv:
            return MovePrice()
        kv_bytes_per_token = self.info.kv_bytes_per_token
        if self._settings.engine == "emulated":  # as the simulator has it
            bandwidth = self._settings.emulated_kv_bytes_per_s
            return MovePrice(bandwidth_bytes_per_s=bandwidth, kv_bytes_per_token=kv_bytes_per_token)
        stats = self._engine.stats()
        return MovePrice(
            bandwidth_bytes_per_s=stats.kv_bytes_per_s or KV_BYTES_PER_S,
            kv_bytes_per_token=kv_bytes_per_token,
            fixed_ms=KV_FIXED_MS,
            room_bytes=stats.kv_budget_bytes,
        )

    def price_now(self) -> MovePrice:
        """The price of a move that begins now: with the room that is left."""
        price = self.move_price
        if price.bandwidth_bytes_per_s is None or price.room_bytes is None:
            return price
        return replace(price, room_bytes=self._engine.kv_room_bytes())
