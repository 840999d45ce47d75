"""Limits of keys at the door: a charge before requests are enqueued, a refund after, and their headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from math import ceil

from gateway.exchange import Exchange
from gateway.keys import ApiKeys
from gateway.refusals import HttpRefusal, OverLimit
from l4queue.client.core import request_id_of
from l4queue.config import Settings
from l4queue.models import RequestSpec
from l4queue.protocol.executor import AsyncExecutor
from l4queue.protocol.keys import Keys
from l4queue.protocol.limits import Allowance, Bucket, Charge, Limits
from l4queue.sampling import DEFAULT_MAX_TOKENS

__all__ = ("WORDS", "Limiter")

_RETRY_S = 1.0  # how long a charge is tried again; chosen: a client waits for it
WORDS = {
    "requests": "requests per minute",
    "tokens": "tokens per minute",
    "backlog": "tokens in the backlog",
}
"""Limits as refusals name them."""


class Limiter:
    """Counts in Redis what callers ask for: a limit holds over all gateways. Belongs to one event loop."""

    def __init__(self, settings: Settings, keys: ApiKeys) -> None:
        self._keys = keys
        self._limits = Limits(Keys(settings.namespace))
        self._executor = AsyncExecutor(settings.redis_url, retry_s=_RETRY_S)

    async def charge(self, exchange: Exchange, wanted: Mapping[int, RequestSpec]) -> None:
        """Count the requests behind some outputs of an exchange. OverLimit where a limit is reached.

        A request of HTTP counts once, however many it becomes. A stream that is taken up again was counted before,
        and half an exchange computes nothing.
        """
        allowance = self._keys.allowance(exchange.caller)
        if not allowance or exchange.after is not None or exchange.half is not None:
            return
        spec = next(iter(wanted.values()))
        most_tokens = spec.params.max_tokens or DEFAULT_MAX_TOKENS  # as admission counts a left-out length
        async with exchange.charging:  # the prompts of one request in turn: the last one knows what is left
            num_requests, exchange.is_counted = 0 if exchange.is_counted else 1, True
            tokens_each = len(spec.token_ids or ()) + most_tokens
            call = self._limits.charge(
                exchange.caller,
                allowance,
                tokens={_record_id(exchange, number): tokens_each for number in wanted},
                num_requests=num_requests,
            )
            found = await self._executor.run(call)
            exchange.limit_headers = _headers(allowance, found)
        if found.full:
            raise OverLimit(_refusal(exchange.caller, found))
        exchange.charged |= {number: len(spec.token_ids or ()) for number in wanted}

    async def settle(self, exchange: Exchange, numbers: Sequence[int]) -> None:
        """Count what these outputs have used in place of what they might; best effort."""
        charged = {number: exchange.charged[number] for number in numbers if number in exchange.charged}
        if not charged:
            return
        used_tokens = {
            _record_id(exchange, number): prompt_tokens + exchange.places.get(number, (0, False))[0]
            if number in exchange.request_ids
            else 0  # it was not enqueued
            for number, prompt_tokens in charged.items()
        }
        allowance = self._keys.allowance(exchange.caller)
        await self._executor.offer(self._limits.refund(exchange.caller, allowance, used_tokens=used_tokens))

    async def count(self, caller: str) -> dict[str, str]:
        """Count a request that the gateway answers by itself; the headers that its answer has for it.

        OverLimit where the limit of requests is reached. While Redis is away nothing is counted.
        """
        allowance = self._keys.allowance(caller)
        if not allowance.requests_per_minute:
            return {}
        found = await self._executor.offer(self._limits.charge(caller, allowance, tokens={"": 0}))
        if found is None:
            return {}
        headers = _headers(allowance, found)
        if found.full:
            raise OverLimit(_refusal(caller, found), headers=headers)
        return headers

    async def close(self) -> None:
        """Close the connections."""
        await self._executor.close()


def _record_id(exchange: Exchange, number: int) -> str:
    key = exchange.key_of(number)
    return exchange.id_of(number) if key is None else request_id_of(key)


def _headers(allowance: Allowance, found: Charge) -> dict[str, str]:
    """As OpenAI names them."""
    told: dict[str, str] = {}
    counted: tuple[tuple[str, int, Bucket], ...] = (
        ("requests", allowance.requests_per_minute, found.requests),
        ("tokens", allowance.tokens_per_minute, found.tokens),
    )
    for name, most, bucket in counted:
        if most:
            told[f"x-ratelimit-limit-{name}"] = str(most)
            told[f"x-ratelimit-remaining-{name}"] = str(bucket.room)
            told[f"x-ratelimit-reset-{name}"] = _duration(bucket.empty_in_ms)
    return told


def _duration(ms: int) -> str:
    """As OpenAI writes one: 20ms, 1.5s, 6m0s."""
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    return f"{minutes}m{rest_ms // 1000}s" if minutes else f"{rest_ms / 1000:g}s"


def _refusal(caller: str, found: Charge) -> HttpRefusal:
    retry_after_s = max(1, ceil(found.retry_after_ms / 1000))
    return HttpRefusal(
        status=HTTPStatus.TOO_MANY_REQUESTS,
        message=f"key {caller} has reached its limit of {WORDS[found.full]}; try again in {retry_after_s} s",
        retry_after_s=retry_after_s,
        limit=found.full,
    )
