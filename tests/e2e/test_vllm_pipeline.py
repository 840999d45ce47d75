"""The main job on real input: real text through Redis, dispatchers, two vLLM workers, seen in Flower."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from l4queue import RequestState, Result
from l4queue.cli.demo_prompts import measured_chars_per_token, mixed_prompts
from l4queue.client import Chunk
from l4queue.errors import InvalidRequest, RequestFailed, RequestTooLong
from l4queue.models import StagePlan
from l4queue.pretrained import load_tokenizer
from tests.e2e.conftest import MAX_MODEL_LEN, Deployment
from tests.services.processes import until

pytestmark = [pytest.mark.vllm, pytest.mark.services, pytest.mark.timeout(900)]
NUM_REQUESTS = 200


@pytest.fixture(scope="module")
def served(deployment: Deployment) -> list[tuple[str, int, Result]]:
    """200 requests of real text, 20 to 8,000 prompt tokens: (prompt, max_tokens, result)."""
    ratio = measured_chars_per_token(load_tokenizer(deployment.model))
    prompts = mixed_prompts(
        NUM_REQUESTS, rng=np.random.default_rng(7), min_tokens=28, max_prompt_tokens=7600, chars_per_token=ratio
    )
    with deployment.client() as client:
        handles = client.enqueue_many(
            {"prompt": p.text, "max_tokens": p.max_tokens, "temperature": 0.0} for p in prompts
        )
        results = [handle.result(timeout=600) for handle in handles]
    return [(p.text, p.max_tokens, r) for p, r in zip(prompts, results, strict=True)]


def test_every_output_equals_that_of_one_plain_vllm(
    deployment: Deployment, served: list[tuple[str, int, Result]], tmp_path: Path
) -> None:
    """200 done; token ids and text are those of `vllm.LLM` for the same prompt, greedy, float32."""
    lengths = sorted(result.prompt_tokens for _, _, result in served)
    assert lengths[0] <= 32
    assert 5000 <= lengths[-1] <= 8000

    requests = [{"prompt": prompt, "max_tokens": max_tokens} for prompt, max_tokens, _ in served]
    script, out = Path(__file__).with_name("reference.py"), tmp_path / "reference.json"
    arguments = [sys.executable, str(script), str(deployment.model), str(MAX_MODEL_LEN), str(out)]
    subprocess.run(arguments, input=json.dumps(requests), text=True, check=True, timeout=800)
    reference = json.loads(out.read_text())

    assert len(served) == NUM_REQUESTS
    for (_, _, result), (prompt_ids, token_ids, text) in zip(served, reference, strict=True):
        assert result.prompt_tokens == len(prompt_ids)
        assert list(result.token_ids) == token_ids
        assert result.text == text.removesuffix("\ufffd")  # vLLM shows the bytes of a character cut at the end


def test_a_worker_tells_of_its_engine_and_vllm_of_itself(
    deployment: Deployment, served: list[tuple[str, int, Result]]
) -> None:
    """Steps, tokens and the error of the cost model as measured; vLLM's own metrics at the same port."""
    settled = 0.0
    for number, port in deployment.metrics_ports.items():
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=120).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        found = {(s.name, s.labels.get("kind")): s.value for s in samples if s.name.startswith("l4queue_")}
        settled += found["l4queue_worker_requests_settled_total", None]
        for kind in ("prefill", "decode"):
            num_steps = found["l4queue_engine_step_seconds_count", kind]
            assert num_steps > 0, number
            assert 1e-5 < found["l4queue_engine_step_seconds_sum", kind] / num_steps < 30.0, number
            assert found["l4queue_engine_tokens_total", kind] > 0, number
        assert found["l4queue_cost_model_calibrated", None] == 1, number
        assert found["l4queue_cost_model_error_ratio_count", None] > 0, number
        assert found["l4queue_engine_kv_capacity_tokens", None] > MAX_MODEL_LEN, number
        assert "vllm:generation_tokens_total" in {sample.name for sample in samples}, number
    assert settled >= len(served)


def test_flower_reports_both_workers_and_every_request(
    deployment: Deployment, served: list[tuple[str, int, Result]]
) -> None:
    """Both workers online with stats; 200 tasks in SUCCESS, with lengths and a short result, without text."""
    with httpx.Client(base_url=deployment.flower_url, timeout=120) as flower:

        def finished() -> dict[str, dict[str, object]]:
            tasks = flower.get("/api/tasks", params={"limit": 5000, "state": "SUCCESS"}).json()
            wanted = {result.request_id for _, _, result in served}
            found = {i: task for i, task in tasks.items() if i in wanted}
            return found if len(found) == NUM_REQUESTS else {}

        tasks = until(finished, "200 tasks in SUCCESS", timeout_s=120)
        workers = flower.get("/api/workers", params={"refresh": 1}).json()
    names = {name.partition("@")[0]: stats for name, stats in workers.items()}
    assert {"worker-0", "worker-1"} <= set(names)
    assert {task["worker"].partition("@")[0] for task in tasks.values()} == {"worker-0", "worker-1"}  # type: ignore[attr-defined]
    for prompt, _, result in served[:20]:
        task = tasks[result.request_id]
        assert str(result.prompt_tokens) in str(task["kwargs"])
        assert str(result.output_tokens) in str(task["result"])
        assert prompt[:20] not in json.dumps(task)


@pytest.mark.parametrize(
    ("request_fields", "error", "field"),
    [
        ({"prompt": ""}, InvalidRequest, "prompt"),
        ({"prompt": "a", "max_tokens": -1}, InvalidRequest, "max_tokens"),
        ({"prompt": "a", "best_of": 3}, InvalidRequest, "best_of"),
        ({"prompt": "\ud800"}, InvalidRequest, "prompt"),
        ({"prompt": "x" * 50_000_000}, InvalidRequest, "prompt"),
        ({"token_ids": [5] * MAX_MODEL_LEN, "max_tokens": 1}, RequestTooLong, "prompt"),
        ({"token_ids": [5] * (MAX_MODEL_LEN - 7), "max_tokens": 8}, RequestTooLong, "max_tokens"),
        ({"token_ids": [10**9]}, RequestFailed, "token_ids"),
    ],
)
def test_bad_input_is_a_typed_error_and_the_service_goes_on(
    deployment: Deployment, request_fields: dict[str, object], error: type[Exception], field: str
) -> None:
    """The client refuses it, or the request ends as failed naming the field; the next request is served."""
    with deployment.client() as client:
        with pytest.raises(error) as caught:
            client.enqueue(**request_fields).result(timeout=120)  # type: ignore[arg-type]
        assert caught.value.field == field  # type: ignore[attr-defined]

        assert client.enqueue("still here?", max_tokens=3).result(timeout=120).output_tokens <= 3


def test_a_prompt_that_just_fits_is_served(deployment: Deployment) -> None:
    """prompt + max_tokens equal to the model's limit is not too long."""
    with deployment.client() as client:
        handle = client.enqueue(token_ids=[5] * (MAX_MODEL_LEN - 4), max_tokens=4, ignore_eos=True)

        assert handle.result(timeout=120).output_tokens == 4


def test_killing_one_of_two_workers_loses_and_changes_nothing(deployment: Deployment) -> None:
    """SIGKILL one worker while 64 requests run: all finish as if nothing had happened, streams included.

    Without planners, on one stage: with classes short requests alone would all be one worker's.
    """
    for number in range(2):
        deployment.processes.stop(f"beat-{number}")
        deployment.processes.stop(f"planner-{number}")
    workers = ("worker-0", "worker-1")
    deployment.publish(StagePlan(low_tokens=0, high_tokens=None, num_workers=2, worker_ids=workers))
    prompts = [f"Line {number} of a list that" for number in range(64)]
    options = {"max_tokens": 160, "temperature": 0.0, "ignore_eos": True}
    with deployment.client() as client:
        undisturbed = [h.result(timeout=300).token_ids for h in client.enqueue_many(prompts, **options)]

        handles = client.enqueue_many(prompts, **options)
        read: dict[str, list[Chunk]] = {handle.id: [] for handle in handles}
        readers = [
            threading.Thread(target=lambda h=handle: read[h.id].extend(h.stream(timeout=300)), daemon=True)
            for handle in handles
        ]
        for reader in readers:
            reader.start()

        def all_running() -> bool:
            states = Counter(handle.status().state for handle in handles)
            return states[RequestState.RUNNING] == 64 and all(handle.status().output_tokens for handle in handles)

        until(all_running, "64 running requests with some output each", timeout_s=120)
        victims = {handle.id for handle in handles if handle.status().worker == "worker-0"}
        assert 0 < len(victims) < 64
        deployment.processes.stop("worker-0", 9)
        results = [handle.result(timeout=120) for handle in handles]
        for reader in readers:
            reader.join(120)

        assert [result.token_ids for result in results] == undisturbed
        assert {r.request_id for r in results if r.resumed} >= victims
        for result in results:
            chunks = read[result.request_id]
            assert tuple(t for chunk in chunks for t in chunk.token_ids) == result.token_ids
            assert "".join(chunk.text for chunk in chunks) == result.text
            assert [c.offset for c in chunks] == sorted({c.offset for c in chunks})

    deployment.start_worker(0)
    deployment.await_workers(2)
