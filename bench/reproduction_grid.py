"""Which runs the reproduction report is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from reproduction_cases import (
    DRAWN,
    LATER,
    LENGTH_SETS,
    MIXED_SYNTHETIC,
    MIXES,
    PAPER,
    SLO,
    SYNTHETIC,
    Results,
    Spec,
    is_there,
)

from l4queue.sim.registry import LENGTH_BLIND, POLICIES
from l4queue.sim.results import SimResult

OFFSETS = (0.0, 0.3, 0.6)
LOADS = (0.5, 0.7, 0.95)
SWEEP = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0, 1.1)
SHOWN = ("round-robin", "least-requests", "llumnix", "central", "central-sjf", "l4")
ABLATED = (
    "classes",
    "hand-over",
    "stealing",
    "running-steals",
    "refinement",
    "late-binding",
    "shadow",
    "finish-first",
    "escape",
)
SIGMAS = (0.0, 1.0, 10.0)
BANDWIDTHS = (None, 5.0, 50.0)
WARMUP_SHARE = 0.2
HINDSIGHT_TOKENS = (1024, 2048, 4096, 5793, 8192, 11585, 13777, 16384, 23170, 32768)
HINDSIGHT_WORKERS = tuple(range(1, 12))
#: the project's own floors: against round robin, against the best length-blind policy
FLOORS = {
    "mixed": (0.50, 0.82),
    "mooncake_conversation": (0.65, 0.93),
    "mooncake_synthetic": (0.50, 0.80),
    "servegen_r1": (None, 0.92),
    "azure_conversation": (None, 1.02),
    "azure_code": (None, 1.02),
    **dict.fromkeys(LENGTH_SETS, (None, 1.02)),
}


class Grid:
    """Windows by what is asked of them. `is_real` says whether the traces are there."""

    def __init__(self, *, is_real: bool) -> None:
        names = [name for name in FLOORS if name not in LENGTH_SETS] if is_real else [MIXED_SYNTHETIC]
        self.first = [Spec(case=PAPER), *(Spec(case=name) for name in names)]
        self.windows = [
            Spec(case=PAPER),
            *(Spec(case=n, offset=o) for o in OFFSETS if o == 0 or is_real for n in names),
        ]
        self.fresh = [Spec(case=name) for name, (_, seed) in SYNTHETIC.items() if seed > 100]
        if is_real:
            self.windows += [Spec(case=name) for name in LENGTH_SETS]
            real = [name for name in (*LATER, *MIXES, *DRAWN) if name != "mixed" and is_there(name)]
            self.fresh = [Spec(case="servegen_r1", offset=0.85), *(Spec(case=name) for name in real), *self.fresh]
        self.tailed = [w for w in self.first if w.case.startswith("m")]
        ablated = ("mixed", "mooncake_synthetic", "servegen_r1")
        self.ablated = [w for w in self.first if w.case in ablated] or self.tailed
        self.skewed = self.tailed[:1]
        self.served = [w for w in self.first if w.case in (PAPER, "mixed", MIXED_SYNTHETIC)]
        self.warmed = [w for w in self.windows if w.case in ("mixed", MIXED_SYNTHETIC)]

    def variants(self, window: Spec) -> dict[str, Spec]:
        """Further runs of l4 that a table of this window shows."""
        found = {"l4, re-prefill": replace(window, gb_per_s=None), "l4, mean": replace(window, objective="mean")}
        if window not in self.windows or window.case == PAPER or window.case in LENGTH_SETS:
            return {}
        if window.offset:
            return {"l4, mean": found["l4, mean"]} if window.case == "mixed" else {}
        return found

    def specs(self) -> Iterator[Spec]:
        """All runs that are known beforehand, the most telling first."""
        for window in (*self.first, *self.fresh, *self.windows):
            yield from self.compared(window)
        for window in self.ablated:
            yield from self.without(window)
        for load in SWEEP:
            yield from self.compared(Spec(case=PAPER, load=load))
        for window in self.served:
            yield from self.limits(window)
        for window in self.skewed:
            yield from self.skews(window)
        for window in self.first:
            for load in LOADS:
                yield from self.compared(replace(window, load=load))
        for window in self.windows:
            yield from self.variants(window).values()
            yield from self.speeds(window) if window in self.ablated else ()
        for window in self.first:
            yield replace(window, policy="two-pool")
        for window in self.warmed:
            yield from self.warm(window)

    def compared(self, window: Spec) -> list[Spec]:
        """Every online policy."""
        return [replace(window, policy=policy) for policy in POLICIES if policy != "two-pool"]

    def without(self, window: Spec) -> list[Spec]:
        """l4 without each ingredient."""
        return [replace(window, without=(name,)) for name in ABLATED]

    def speeds(self, window: Spec) -> list[Spec]:
        """l4 with each way of hand-over."""
        return [replace(window, gb_per_s=speed) for speed in BANDWIDTHS]

    def warm(self, window: Spec) -> list[Spec]:
        """The same, not counted until l4 has had time for a plan; l4 with `--objective mean` last."""
        late = replace(window, warmup_share=WARMUP_SHARE)
        return [*(replace(late, policy=name) for name in (*LENGTH_BLIND, "l4")), replace(late, objective="mean")]

    def limits(self, window: Spec) -> list[Spec]:
        """The search for the largest load within the service level."""
        return [replace(window, policy=policy, slo=SLO) for policy in SHOWN]

    def skews(self, window: Spec) -> list[Spec]:
        """Policies on engines with other skew terms, and l4 that does not know of it."""
        found = [replace(window, sigma=sigma, policy=policy) for sigma in SIGMAS for policy in SHOWN]
        return found + [replace(window, sigma=sigma, without=("skew-in-planner",)) for sigma in SIGMAS]

    def restricted(self, results: Results) -> None:
        """Leave out what has not been run, for a report before the end."""
        have = results.has
        self.windows = [w for w in self.windows if have(self.compared(w))]
        self.fresh = [w for w in self.fresh if have(self.compared(w))]
        self.first = [w for w in self.first if w in self.windows]
        self.tailed = [w for w in self.tailed if w in self.windows]
        self.ablated = [w for w in self.ablated if w in self.windows and have(self.without(w))]
        self.served = [w for w in self.served if w in self.windows and have(self.limits(w))]
        self.warmed = [w for w in self.warmed if w in self.windows and have(self.warm(w))]
        self.skewed = [w for w in self.skewed if w in self.windows and have(self.skews(w))]

    def hindsight(self, results: Results) -> Iterator[Spec]:
        """Fixed plans for every window on which the floor against the best length-blind policy is missed."""
        for window in self.missed(results):
            yield from plans(window)

    def missed(self, results: Results) -> list[Spec]:
        """These windows."""
        missed = []
        for window in self.windows:
            floor = FLOORS.get(window.case, (None, None))[1]
            best = blind(results.of(window, LENGTH_BLIND)).mean_e2e_s
            if floor is not None and results[window].mean_e2e_s > floor * best:
                missed.append(window)
        return missed


def plans(window: Spec) -> list[Spec]:
    """The fixed plans of two stages that are tried in hindsight."""
    return [replace(window, fixed=(edge, count)) for edge in HINDSIGHT_TOKENS for count in HINDSIGHT_WORKERS]


def blind(found: dict[str, SimResult]) -> SimResult:
    """The length-blind policy with the least mean latency."""
    return min((found[name] for name in LENGTH_BLIND if name in found), key=lambda r: r.mean_e2e_s)


def long_s(result: SimResult) -> float:
    """Mean latency of the longest 5 %, s."""
    return result.long.mean_e2e_s or 0.0
