"""A model that answers in sentences: `smollm2` says what transformers says, moved, crashed or undisturbed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

from l4queue import Client, Handle
from l4queue.models import StagePlan
from l4queue.smollm2 import INSTALL, is_smollm2_installed
from tests.e2e.conftest import Deployment, deploy
from workers.kv.store import default_directory

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.services,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not is_smollm2_installed(), reason=f"the model smollm2 is not installed: {INSTALL}"),
]
SHORT = "What is the capital of France?"
LONG = "What is the capital of France? Tell me about the city in detail."
MAX_TOKENS = 128
MAX_MODEL_LEN = 1024
ALL_TO_WORKER_0 = (
    StagePlan(low_tokens=0, high_tokens=MAX_MODEL_LEN, num_workers=1, worker_ids=("worker-0",)),
    StagePlan(low_tokens=MAX_MODEL_LEN, high_tokens=None, num_workers=1, worker_ids=("worker-1",)),
)


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A deployment of smollm2 whose short requests are worker 0's, and the answers of transformers."""

    deployment: Deployment
    answers: dict[str, tuple[tuple[int, ...], str]]

    def ask(self, client: Client, question: str) -> Handle:
        """How much is left of LONG is known, because its own end is ignored: moves are weighed by that."""
        return client.enqueue(
            messages=chat(question), max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=question == LONG
        )

    def check(self, question: str, handle: Handle) -> None:
        """Token for token what transformers gives, and it says Paris."""
        result = handle.result(timeout=240)
        ids, text = self.answers[question]
        assert result.token_ids == ids
        assert result.text == text
        assert "Paris" in text


@pytest.fixture(scope="module")
def served(redis_executable: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two workers without a planner, as in test_vllm_moves; the model is unpacked anew."""
    folder, namespace = tmp_path_factory.mktemp("smollm2"), f"smollm2-{uuid.uuid4().hex[:8]}"
    script = Path(__file__).with_name("smollm2_reference.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "cache"), str(MAX_TOKENS)],
        input=json.dumps([chat(SHORT), chat(LONG)]), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    reference = json.loads(done.stdout)
    answers = {
        question: (tuple(ids), text)
        for question, (_, ids, text) in zip((SHORT, LONG), reference["answers"], strict=True)
    }
    more: dict[str, Any] = {
        "steal_from": "none",
        "lease_s": 10.0,
        "max_model_len": MAX_MODEL_LEN,
        "namespace": namespace,
    }
    with deploy(redis_executable, Path(reference["path"]), folder, **more) as started:
        started.await_workers(2, timeout_s=600.0)
        yield Served(deployment=started, answers=answers)
    rmtree(default_directory(namespace), ignore_errors=True)
    rmtree(folder / "cache")


def test_a_chat_is_answered_as_by_transformers(served: Served) -> None:
    """The chat template is used, and the end of the answer is the model's own."""
    with served.deployment.client() as client:
        handle = served.ask(client, SHORT)
        served.check(SHORT, handle)
        result = handle.result(timeout=240)
    assert result.text == "The capital of France is Paris."
    assert result.finish_reason == "stop"
    assert result.prompt_tokens == 37


def test_the_answer_says_paris_after_a_move(served: Served) -> None:
    """A long prefill comes to its engine: it goes on in the other one, with its KV, before it has said Paris."""
    served.deployment.publish(*ALL_TO_WORKER_0)
    moves: list[str] = []
    with served.deployment.client() as client:
        while not moves:  # until the cost model has seen enough steps of these engines, a prefill seems short
            handle = served.ask(client, LONG)
            stream = handle.stream(timeout=240)
            shown = next(stream).text
            page = client.enqueue("A long page. " * 200, max_tokens=1)
            shown += "".join(chunk.text for chunk in stream)

            served.check(LONG, handle)
            assert shown == handle.result(timeout=240).text
            assert page.result(timeout=240).output_tokens == 1
            moves = [event.text for event in handle.explain() if event.what in ("escape", "hand-over")]
        assert "with its KV cache" in moves[0]
        assert handle.status().worker == "worker-1"


def test_the_answer_says_paris_after_a_crash(served: Served) -> None:
    """The last test. Worker 0 is killed while the answer is read; worker 1 ends the sentence."""
    with served.deployment.client() as client:
        served.deployment.publish(*ALL_TO_WORKER_0)
        handle = served.ask(client, LONG)
        stream = handle.stream(timeout=240)
        shown = next(stream).text
        served.deployment.processes.stop("worker-0", signal.SIGKILL)
        served.deployment.await_workers(1)
        served.deployment.publish(
            StagePlan(low_tokens=0, high_tokens=None, num_workers=1, worker_ids=("worker-1",))
        )
        shown += "".join(chunk.text for chunk in stream)

        served.check(LONG, handle)
        result = handle.result(timeout=240)
        assert shown == result.text
        assert result.resumed
        assert handle.status().worker == "worker-1"
