"""A replay whose results are given: for tests of what the planner makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from l4queue.models import Plan


@dataclass(frozen=True, slots=True)
class ToldReplay:
    """`chance` is the share of a gain that could be chance."""

    told: Callable[[Plan], float]
    chance: float = 0.0
    tells_content: bool = False

    @classmethod
    def by_stages(cls, *scores: float, chance: float = 0.0) -> ToldReplay:
        """A score for each number of stages, from one on."""
        return cls(lambda plan: scores[len(plan.stages) - 1], chance)

    def score(self, plan: Plan, /) -> float:
        """As told."""
        return self.told(plan)

    def sure_gain(self, plan: Plan, against: Plan, /) -> float:
        """The gain without what could be chance."""
        return 1.0 - self.told(plan) / self.told(against) - self.chance
