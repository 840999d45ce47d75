"""Limits of a key at real gateways: a batch that one of them leaves, requests beside it, tokenized texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from l4queue.protocol.keys import Keys
from tests.services.charges import watched_charges
from tests.services.gateways import ANN, MODEL, Gateways, two_gateways
from tests.services.killed_batches import answers_of, batch_lines, begin, ended, kill_its_gateway
from tests.services.processes import until

pytestmark = [pytest.mark.services, pytest.mark.vllm, pytest.mark.timeout(1200)]
NAMES = ("gateway-0", "gateway-1")
DORA = "dora-has-a-long-key"
LIMITED = "l4queue_http_batches_limited"


@pytest.fixture(scope="module")
def gateways(redis_executable: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateways]:
    """Two workers with the emulated engine, two gateways with keys. Ann's bucket holds 6,000 tokens."""
    folder = tmp_path_factory.mktemp("gateways")
    with two_gateways(redis_executable, folder, have_both_keys=True) as started:
        (folder / "new").write_text(f"ann {ANN} tokens_per_minute=6000\ndora {DORA} requests_per_minute=2\n")
        (folder / "new").replace(folder / "keys")
        started.api_key = ANN
        yield started


def posted(gateways: Gateways, path: str, key: str, **body: object) -> httpx.Response:
    """The answer of the second gateway."""
    url, headers = f"{gateways.url(NAMES[1])}{path}", {"authorization": f"Bearer {key}"}
    return httpx.post(url, json={"model": MODEL, **body}, headers=headers, timeout=300)


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})])
def test_what_the_gateway_computes_is_a_request(gateways: Gateways, path: str, body: dict[str, object]) -> None:
    """Of `requests_per_minute`, and of no other limit."""
    redis, keys = Redis.from_url(gateways.settings.redis_url), Keys(gateways.settings.namespace)
    redis.delete(keys.limit("dora"))
    answers = [posted(gateways, path, DORA, **body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert answers[2].json()["error"]["type"] == "requests"
    assert int(answers[2].headers["retry-after"]) > 0
    unlimited = posted(gateways, path, ANN, **body)
    assert unlimited.status_code == 200
    assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]
    assert redis.hgetall(keys.charged("dora")) == {}
    redis.close()


def test_a_limited_batch_survives_its_gateway(gateways: Gateways) -> None:
    """SIGKILL: each line is charged and settled once. Requests of the key get in beside the batch that waits."""
    redis, keys = Redis.from_url(gateways.settings.redis_url), Keys(gateways.settings.namespace)
    lines = batch_lines(120, max_tokens=50)
    with watched_charges(redis, keys.charged("ann")) as seen:
        batch = begin(gateways, NAMES[0], lines)
        killed = kill_its_gateway(gateways, NAMES, batch, num_completed=20)
        left = next(name for name in NAMES if name != killed)

        def is_limited() -> bool:
            text = httpx.get(f"{gateways.url(left)}/metrics", timeout=60).text
            samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
            return any(s.name == LIMITED and s.value == 1 and s.labels == {"limit": "tokens"} for s in samples)

        until(is_limited, "the batch waits at the gateway that is left")
        with gateways.openai(left) as client:
            for _ in range(3):
                client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=98)
            while client.batches.retrieve(batch.id).status == "in_progress":
                redis.hincrby(keys.limit("ann"), "at", -10_000)  # as if ten seconds more had passed
        last = ended(gateways, left, batch)

        def charged() -> int:
            return int(redis.hget(keys.charged("ann"), "*") or 0)

        until(lambda: charged() == 0, "all is settled")
    assert last.status == "completed"
    assert last.request_counts is not None
    assert last.request_counts.to_dict() == {"total": 120, "completed": 119, "failed": 1}
    assert len(answers_of(gateways, left, last)) == 120
    assert Counter(seen.charged.values()) == {1: 119}
    assert seen.charged == seen.settled
    redis.close()
