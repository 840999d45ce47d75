"""Constraints that vLLM keeps or refuses, each alone; at the end its core is killed in the middle of generation.

The engine is one whose KV cache is shorter than its model.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from l4queue.models import SamplingParams
from tests.services.served import EOS_PROMPT, Served, expect_death, prompt, reference, signal_core
from workers.engine.base import FinishReason
from workers.engine.vllm.engine import VllmEngine
from workers.tiny import build_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory, without_compiler: None) -> AsyncIterator[Served]:
    """An engine of the tiny model with more positions than its KV cache has room for."""
    model = build_tiny_model(tmp_path_factory.mktemp("model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 300_000}))
    engine = VllmEngine(str(model), max_running=16, dtype="float32")
    info = await engine.start()
    yield Served(engine=engine, info=info, expected=reference(model, EOS_PROMPT, 8))
    await engine.stop()


WARM = {
    "type": "object",
    "properties": {"is_warm": {"type": "boolean"}},
    "required": ["is_warm"],
    "additionalProperties": False,
}


def is_warm_or_not(text: str) -> bool:
    """Whether a text is JSON of that schema."""
    return json.loads(text) in ({"is_warm": True}, {"is_warm": False})


async def test_structured_outputs_are_what_was_asked_for(served: Served) -> None:
    """Of a model that writes noise otherwise (much space in JSON too); a free neighbour is not touched."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.info.model)
    asked: dict[str, tuple[dict[str, Any], Any]] = {
        "choice": ({"choice": ["yes", "no", "perhaps"]}, lambda text: text in ("yes", "no", "perhaps")),
        "regex": ({"regex": "[0-9]{4}-[a-c]+z"}, re.compile("[0-9]{4}-[a-c]+z").fullmatch),
        "json": ({"json": WARM}, is_warm_or_not),
        "text": ({"json": json.dumps(WARM)}, is_warm_or_not),
    }
    await served.add("free", EOS_PROMPT, 8)
    for name, (constraint, _) in asked.items():
        for seed in range(4):
            params = SamplingParams.model_validate({"structured_outputs": constraint, "seed": seed})
            await served.add(f"{name}-{seed}", EOS_PROMPT, 2000, params=params)
    ended = await served.collect(["free", *(f"{name}-{seed}" for name in asked for seed in range(4))])

    assert ended.pop("free")[0] == served.expected[:8]
    for name, (tokens, last) in ended.items():
        *kept, end = tokens
        assert (last.finish_reason, end in served.info.eos_token_ids) == (FinishReason.STOP, True), name
        text = tokenizer.decode(kept)
        assert asked[name.partition("-")[0]][1](text), (name, text)
    assert len({tuple(tokens) for tokens, _ in ended.values()}) > 4


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ({"regex": "[a-z"}, "unclosed"),
        ({"json": {"type": "nonsense"}}, "nonsense"),
        ({"regex": "(?<=a)b"}, "look-around"),
    ],
)
async def test_a_constraint_that_cannot_be_kept_is_refused_alone(
    served: Served, constraint: dict[str, Any], words: str
) -> None:
    """It says why; the engine goes on, and the next constraint is kept."""
    await served.add("good", EOS_PROMPT, 8)
    params = SamplingParams.model_validate({"structured_outputs": constraint})
    await served.add("bad", EOS_PROMPT, 8, params=params)
    ended = await served.collect(["good", "bad"])

    assert ended["good"][0] == served.expected[:8]
    tokens, last = ended["bad"]
    assert (tokens, last.finish_reason) == ([], FinishReason.ERROR)
    assert words in (last.error or "")
    assert last.field == "structured_outputs"
    params = SamplingParams.model_validate({"structured_outputs": {"choice": ["a"]}})
    assert (await served.one(EOS_PROMPT, 8, params=params))[1].finish_reason is FinishReason.STOP


async def test_what_this_model_does_not_have_is_refused_for_the_field(served: Served) -> None:
    """Token ids beyond its vocabulary: only vLLM knows the model."""
    params = SamplingParams(stop_token_ids=(2**31 - 1,))
    _, last = await served.one(EOS_PROMPT, 8, params=params)
    assert last.finish_reason is FinishReason.ERROR
    assert last.field == "stop_token_ids"
    assert "out-of-vocab" in (last.error or "")


async def test_a_constraint_that_takes_too_long_fails_alone_and_others_do_not_wait(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dispatchers refuse it before; older ones do not. vLLM looks at it in a thread of its own."""
    monkeypatch.setattr(served.engine._examiner, "_limit_s", 0.01)
    pattern = "^(([a-z]{0,200}){0,200}-){0,200}$"
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": pattern} for i in range(6)}}
    params = SamplingParams.model_validate({"structured_outputs": {"json": schema}})
    await served.add("slow", EOS_PROMPT, 8, params=params)
    assert served.engine._running["slow"].examined is None  # accepted, and nothing was waited for
    _, last = (await served.collect(["slow"]))["slow"]
    assert last.error == "vLLM takes longer than 0.01 s to accept it: use a smaller one"
    assert last.field == "structured_outputs"
    assert (await served.one(EOS_PROMPT, 8))[0] == served.expected[:8]

    for name in ("slow", "again"):  # forgotten before they begin
        await served.add(name, EOS_PROMPT, 8, params=params)
    await served.engine.abort(["slow", "again"])
    assert (await served.one(EOS_PROMPT, 8))[0] == served.expected[:8]


async def test_a_core_that_is_killed_ends_no_request(served: Served) -> None:
    """SIGKILL in the middle of generation. Last to use the engine: it ends it."""
    assert 200_000 < served.info.max_model_len <= served.info.kv_capacity_tokens < 300_000
    await served.add("a", prompt(2, 30), 200)
    await served.engine.outputs()
    signal_core(signal.SIGKILL)

    await expect_death(served)
