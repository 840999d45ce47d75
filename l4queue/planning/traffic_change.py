"""Change detection: learned traffic, whether it has changed, and whether a new plan is due.

Arrivals of the latest round, n₁ in T₁ seconds, are compared with the remembered ones, n₀ in T₀. Two comparisons
are made: of the shorter requests that bring half of the work, and of the longer ones that bring the other half.
If both came at one rate λ = (n₁+n₀)/(T₁+T₀), twice the log of the likelihood ratio

    G = 2·Σ n₁·ln(n₁/λT₁) + n₀·ln(n₀/λT₀)

is a χ² of two degrees, for Poisson arrivals. Real ones come in bursts: G per degree over the rounds before tells
how many times more they vary (at least once). The ratio of the two is compared with Fisher's F.

A change must also matter. The share of the work that is not common to both has to exceed a bound: Σ w·|λ₁-λ₀| /
Σ w·(λ₁+λ₀) over octaves, with w the engine time of a request. And a handful of requests proves nothing.

Rate and mix of lengths change separately. G of all arrivals together tells of the rate, and the rest of G, of one
degree less, of the mix. Where the mix has not changed, its lengths stay known and only their rate is learned anew.
A pause says nothing of either: what is known fades, and stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from l4queue.cost.step import StepCost
from l4queue.planning.histogram import Buckets, Counts, merge

__all__ = ("Learned", "Noise", "difference_of", "is_due", "is_early_round", "learn", "with_decision", "work_ms")

Floats: TypeAlias = npt.NDArray[np.float64]

_CELL_BUCKETS = 4
"""Neighbouring buckets that are compared as one: an octave of `Buckets.log_spaced`. Chosen: fewer leave too few
requests in a cell to tell a change from chance, more hide a shift of lengths."""
_PRIOR_DEGREES = 10.0
"""Before anything is known arrivals are taken to be Poisson, as firmly as if that had been seen in five rounds."""
CHANGE_SIGMAS, CHANGE_SHARE = 4.0, 0.15
"""A change: as unlikely as four standard deviations of a normal law, and 15 % of the work not common to both."""
MIX_SIGMAS = 1.5
"""Enough to forget the lengths of traffic that has changed. Chosen: with two a turn of the mix is often seen late,
with one a change of rate costs what is known of the lengths."""
FEWEST = 10.0
"""Bursts that a round has or should have had: with fewer a single one would look like a change."""
DRIFT_SIGMAS, DRIFT_SHARE = 3.0, 0.05
"""Enough to think again, not to forget."""
ENOUGH_WORK = 10.0
"""Requests of equal work that tell as much as those seen; with fewer, shares of the work are mostly chance."""
MOST_UNFINISHED = 0.5
"""While more of what came is still there, hardly a step has been made of the outputs to come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """G and its degrees of freedom, summed over the rounds before with the weight that they still have."""

    statistic: float = 0.0
    degrees: float = 0.0

    @property
    def factor(self) -> float:
        """How many times more than Poisson arrivals these vary from round to round."""
        return max(1.0, (self.statistic + _PRIOR_DEGREES) / self.known_degrees)

    @property
    def known_degrees(self) -> float:
        """Degrees of freedom of the factor, those taken for granted included."""
        return self.degrees + _PRIOR_DEGREES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learned:
    """Remembered traffic: `counts` decayed, at the rate since the last change of rate or mix, at `begun_s`.

    Lengths since `mix_begun_s` are examples of the traffic. `since` is what came after the last decision,
    undecayed; `decided` what the counts were then, None before the first and after a change.
    """

    counts: Counts
    since: Counts
    decided: Counts | None = None
    noise: Noise = field(default_factory=Noise)
    begun_s: float = 0.0
    mix_begun_s: float = 0.0

    @classmethod
    def nothing(cls, buckets: Buckets, *, now_s: float) -> Learned:
        """Before the first round."""
        zero = Counts.zero(buckets)
        return cls(counts=zero, since=zero, begun_s=now_s, mix_begun_s=now_s)


def learn(before: Learned, gained: Counts, *, now_s: float, half_life_s: float, work: Floats) -> Learned:
    """Add what the latest round gained, after forgetting some of what was known, or on a change all of it.

    `work` is the engine time of a request in each bucket. Where only the rate has changed, the mix stays known.
    The first arrivals end a silence that is forgotten. The next round is never a change: how much the traffic
    varies is not known before.
    """
    if gained.observed_s <= 0.0:
        return replace(before, counts=merge(before.counts, gained), since=merge(before.since, gained))
    begun_s = now_s - gained.observed_s
    if _is_silence(before.counts) and float(gained.arrivals.sum()) > 0.0:
        return Learned(counts=gained, since=gained, begun_s=begun_s, mix_begun_s=begun_s)
    factor = 0.5 ** (gained.observed_s / half_life_s)
    noise = Noise(statistic=before.noise.statistic * factor, degrees=before.noise.degrees * factor)
    faded = before.counts.decay(gained.observed_s, half_life_s=half_life_s)
    if before.counts.observed_s > 0.0:
        statistic, degrees = _likelihood_ratio(gained, before.counts, work=work)
        if before.noise.degrees > 0.0 and _differs(
            gained, before.counts, before.noise, work=work, sigmas=CHANGE_SIGMAS, share=CHANGE_SHARE
        ):
            if float(gained.arrivals.sum()) == 0.0:
                return replace(before, counts=faded)
            if _has_another_mix(gained, before.counts, before.noise, work=work):
                return Learned(counts=gained, since=gained, noise=noise, begun_s=begun_s, mix_begun_s=begun_s)
            known = _at_rate_of(gained, merge(faded, gained))
            return replace(before, counts=known, since=gained, decided=None, noise=noise, begun_s=begun_s)
        noise = Noise(statistic=noise.statistic + statistic, degrees=noise.degrees + degrees)
    return replace(before, counts=merge(faded, gained), since=merge(before.since, gained), noise=noise)


def is_due(learned: Learned, *, work: Floats) -> bool:
    """Whether a decision could come out otherwise than the last: there was none since the last change, as much has
    been seen since as was known then, or what came since differs from it by more than chance.
    """
    decided, since = learned.decided, learned.since
    if decided is None or float(since.arrivals.sum()) >= float(decided.arrivals.sum()):
        return True
    if since.observed_s <= 0.0:
        return False
    return _differs(since, decided, learned.noise, work=work, sigmas=DRIFT_SIGMAS, share=DRIFT_SHARE)


def with_decision(learned: Learned) -> Learned:
    """Note that a decision was made on what is known now."""
    nothing = Counts._of_table(np.zeros_like(learned.counts._table()), 0.0)
    return replace(learned, decided=learned.counts, since=nothing)


def is_early_round(before: Learned, gained: Counts, *, num_unfinished: int, work: Floats) -> bool:
    """Whether planning should not wait for its period: nothing was known before, and what came tells enough.

    That is when shares of the work are more than chance, (Σ n·w)² / Σ n·w² ≥ `ENOUGH_WORK`, and at most
    `MOST_UNFINISHED` of the requests wait or run.
    """
    squares = float((gained.arrivals * work**2).sum())
    if squares <= 0.0 or not _is_silence(before.counts):
        return False
    if num_unfinished > MOST_UNFINISHED * float(gained.arrivals.sum()):
        return False
    return float((gained.arrivals * work).sum()) ** 2 >= ENOUGH_WORK * squares


def work_ms(counts: Counts, *, buckets: Buckets, cost: StepCost) -> Floats:
    """Engine time of a request by bucket, ms: its prefill, and the steps of an output of average length."""
    arrived, steps = float(counts.arrivals.sum()), float(counts.decode_steps.sum())
    output = steps / arrived if arrived > 0.0 else 0.0
    prompt = buckets.middle_tokens
    prefill = cost.alpha_ms + prompt * (cost.pi_ms + cost.psi_ms * prompt / 2)
    return np.asarray(prefill + output * (cost.beta_ms + cost.gamma_ms * (prompt + output / 2)))


def difference_of(a: Counts, b: Counts, *, work: Floats) -> float:
    """Share of the work per second that is not common to both, 0 to 1; 0 when there is none."""
    one, two = _cells(a.arrivals * work) / a.observed_s, _cells(b.arrivals * work) / b.observed_s
    total = float((one + two).sum())
    return float(np.abs(one - two).sum()) / total if total > 0.0 else 0.0


def _is_silence(counts: Counts) -> bool:
    """Whether nothing is remembered, or not even one request any more."""
    return float(counts.arrivals.sum()) < 1.0


def _differs(a: Counts, b: Counts, noise: Noise, *, work: Floats, sigmas: float, share: float) -> bool:
    if difference_of(a, b, work=work) <= share:
        return False
    expected = float(b.arrivals.sum()) * a.observed_s / b.observed_s
    if max(float(a.arrivals.sum()), expected) < FEWEST * noise.factor:
        return False
    statistic, degrees = _likelihood_ratio(a, b, work=work)
    return degrees > 0 and _sigmas(statistic / degrees / noise.factor, degrees, noise.known_degrees) > sigmas


def _has_another_mix(a: Counts, b: Counts, noise: Noise, *, work: Floats) -> bool:
    """Whether the lengths of changed traffic differ, whatever the rates."""
    if difference_of(a, _at_rate_of(a, b), work=work) <= CHANGE_SHARE:
        return False
    statistic, degrees = _likelihood_ratio(a, b, work=work)
    of_rate, _ = _likelihood_ratio(a, b, work=work, parts=1)
    value = max(0.0, statistic - of_rate) / noise.factor
    return degrees > 1 and _sigmas(value, degrees - 1, noise.known_degrees) > MIX_SIGMAS


def _at_rate_of(a: Counts, b: Counts) -> Counts:
    """The lengths of `b`, as many as `a` in its time."""
    share = float(a.arrivals.sum()) / float(b.arrivals.sum())
    return Counts._of_table(b._table() * share, a.observed_s)


def _likelihood_ratio(a: Counts, b: Counts, *, work: Floats, parts: int = 2) -> tuple[float, int]:
    """G and its degrees of freedom, for counts seen for some time each; of all arrivals together as one part."""
    below = np.cumsum((a.arrivals / a.observed_s + b.arrivals / b.observed_s) * work)
    halves = [0, int(np.searchsorted(below, below[-1] / 2)) + 1]
    if parts == 1 or halves[1] >= len(below):
        halves = [0]
    n, m = np.add.reduceat(a.arrivals, halves), np.add.reduceat(b.arrivals, halves)
    rate = (n + m) / (a.observed_s + b.observed_s)
    statistic = 2.0 * (_times_log(n, rate * a.observed_s) + _times_log(m, rate * b.observed_s))
    return max(0.0, statistic), int((n + m >= 0.5).sum())


def _cells(per_bucket: Floats) -> Floats:
    """Buckets by octave."""
    return np.asarray(np.add.reduceat(per_bucket, np.arange(0, len(per_bucket), _CELL_BUCKETS)))


def _times_log(number: Floats, expected: Floats) -> float:
    """Σ n·ln(n/expected), 0 where n is 0."""
    some = number > 0.0
    return float((number[some] * np.log(number[some] / expected[some])).sum())


def _sigmas(ratio: float, above: float, below: float) -> float:
    """A value of Fisher's F with these degrees as standard deviations of a normal law (Paulson, 1942)."""
    root = ratio ** (1 / 3)
    a, b = 2.0 / (9.0 * above), 2.0 / (9.0 * below)
    return float(((1.0 - b) * root - (1.0 - a)) / np.sqrt(b * root * root + a))
