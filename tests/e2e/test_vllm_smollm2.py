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
from threading import Event, Thread
from typing import Any

import pytest

from l4queue import Client, Handle
from l4queue.models import StagePlan
from l4queue.smollm2 import INSTALL, is_smollm2_installed
from tests.e2e.conftest import Deployment, deploy
from tests.services.processes import until
from workers.kv.store import default_directory

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.services,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not is_smollm2_installed(), reason=f"the model smollm2 is not installed: {INSTALL}"),
]
SHORT = "What is the capital of France?"
LONG = "What is the capital of France? Tell me about the city in detail."
MAX_TOKENS = 64
BOUNDARY_TOKENS = 64
"""Between the prompt of LONG (45 tokens) and its answer's end."""
CROWD = 12


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A deployment of smollm2 whose short requests are worker 0's, and the answers of transformers."""

    deployment: Deployment
    answers: dict[str, tuple[tuple[int, ...], str]]

    def ask(self, client: Client, question: str) -> Handle:
        return client.enqueue(messages=chat(question), max_tokens=MAX_TOKENS, temperature=0.0)

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
    more: dict[str, Any] = {"steal_from": "none", "lease_s": 10.0, "max_model_len": 1024, "namespace": namespace}
    with deploy(redis_executable, Path(reference["path"]), folder, **more) as started:
        started.await_workers(2)
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


def test_the_answer_says_paris_after_a_hand_over(served: Served) -> None:
    """It outgrows its crowded stage and goes on, with its KV, where Paris is named again."""
    served.deployment.publish(
        StagePlan(low_tokens=0, high_tokens=BOUNDARY_TOKENS, num_workers=1, worker_ids=("worker-0",)),
        StagePlan(low_tokens=BOUNDARY_TOKENS, high_tokens=None, num_workers=1, worker_ids=("worker-1",)),
    )
    with served.deployment.client() as client:
        ended = Event()

        def crowd() -> None:
            while not ended.is_set():
                client.enqueue("x", max_tokens=40, temperature=0.0, ignore_eos=True).result(timeout=240)

        threads = [Thread(target=crowd, daemon=True) for _ in range(CROWD)]
        for thread in threads:
            thread.start()
        until(
            lambda: any(
                w.worker_id == "worker-0" and w.num_running >= CROWD // 2 for w in client.overview().workers
            ),
            "a crowd in the first stage",
        )
        handle = served.ask(client, LONG)
        shown = "".join(chunk.text for chunk in handle.stream(timeout=240))
        ended.set()
        for thread in threads:
            thread.join(240)

        served.check(LONG, handle)
        assert shown == handle.result(timeout=240).text
        moves = [event for event in handle.explain() if event.what == "hand-over"]
        assert moves
        assert "with its KV cache" in moves[0].text
        assert handle.status().worker == "worker-1"


def test_the_answer_says_paris_after_a_crash(served: Served) -> None:
    """The last test. Worker 0 is killed while the answer is read; worker 1 ends the sentence."""
    with served.deployment.client() as client:
        served.deployment.publish(
            StagePlan(low_tokens=0, high_tokens=1024, num_workers=1, worker_ids=("worker-0",)),
            StagePlan(low_tokens=1024, high_tokens=None, num_workers=1, worker_ids=("worker-1",)),
        )
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
