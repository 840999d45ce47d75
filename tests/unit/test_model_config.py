"""The longest request of a model by its configuration, against vLLM's own reading of the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l4queue.config import Settings
from l4queue.errors import ConfigError
from l4queue.model_config import ContextLength, context_length, model_context, with_model_facts

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_SIZES}
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({**LLAMA, "max_position_embeddings": 8192}, 8192),
    "linear": (
        {**LLAMA, "max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}},
        16_384,
    ),
    "dynamic": (
        {**LLAMA, "max_position_embeddings": 4096, "rope_scaling": {"rope_type": "dynamic", "factor": 2.5}},
        10_240,
    ),
    "yarn": (
        {
            **LLAMA,
            "max_position_embeddings": 32_768,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
        },
        32_768,
    ),
    "rope_parameters": (
        {
            **LLAMA,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
        },
        8192,
    ),
    "gpt2": (
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": 1024,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 2,
            "vocab_size": 128,
        },
        1024,
    ),
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    """A model's directory with this configuration."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_says_how_long_a_request_may_be(name: str) -> None:
    """Scaled by rotary embeddings, except where the stated length is scaled already."""
    config, held = CONFIGS[name]
    assert context_length(config) == ContextLength(usual_tokens=held, most_tokens=held)


def test_the_rest_is_left_to_vllm() -> None:
    """Also what is no number."""
    for config in ({}, {"model_type": "mamba"}, {"max_position_embeddings": None}, {"seq_length": True}):
        assert context_length(config) is None


def test_models_of_two_lengths_begin_with_the_short_one() -> None:
    """LongRoPE serves short requests better as it was trained; the text model counts, not what is around it."""
    rope = {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}
    text = {
        "max_position_embeddings": 131_072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": rope,
    }
    assert context_length({"max_position_embeddings": 77, "text_config": text}) == ContextLength(
        usual_tokens=4096, most_tokens=131_072
    )


def test_names_and_places_of_models(tmp_path: Path) -> None:
    """A directory is read; a file or a store is vLLM's business; what is not there is named."""
    folder = write(tmp_path / "m", {"max_position_embeddings": 512})
    assert model_context(str(folder)) == ContextLength(usual_tokens=512, most_tokens=512)
    tiny = model_context("tiny")
    assert tiny is not None
    assert tiny.usual_tokens == 16_384
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    for elsewhere in (str(tmp_path / "weights.gguf"), "s3://bucket/model"):
        assert model_context(elsewhere) is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model .*empty: there is no .*config\.json"):
        model_context(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"model \./nowhere: there is no nowhere/config\.json"):
        model_context("./nowhere")
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        model_context(str(folder))


def test_a_name_that_cannot_be_fetched_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a network, and not in the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("someone/unknown", "no name at all"):
        with pytest.raises(ConfigError, match=f"model {name}: there is no such directory, and Hugging Face"):
            model_context(name)


def test_a_revision_has_its_own_length_and_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the options of `vllm serve` name it; from the cache of Hugging Face, whose layout this is."""
    place = tmp_path / "models--someone--model"
    for revision, digit, length in (("main", "a", 512), ("v2", "b", 1024)):
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(digit * 40)
        (place / "snapshots" / (digit * 40)).mkdir(parents=True)
        write(place / "snapshots" / (digit * 40), {"max_position_embeddings": length})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    plain = with_model_facts(Settings(model="someone/model"))
    assert (plain.max_model_len, plain.tokenizer) == (512, "")
    for line in ("--revision v2 --seed 3", "--seed=3 --revision=v2"):
        second = with_model_facts(Settings(model="someone/model", vllm_args=line))
        assert (second.max_model_len, second.tokenizer) == (1024, str(place / "snapshots" / ("b" * 40)))
    with pytest.raises(ConfigError, match="model someone/model at revision v3: there is no such"):
        with_model_facts(Settings(model="someone/model", vllm_args="--revision v3"))
    with pytest.raises(ConfigError, match="L4_VLLM_ARGS: No closing quotation"):
        with_model_facts(Settings(model="someone/model", vllm_args="--revision 'v3"))


def test_the_limit_is_the_model_s_unless_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the model holds is an error, as in vLLM; an emulated engine has no model."""
    model = str(write(tmp_path / "m", {"max_position_embeddings": 512}))
    assert with_model_facts(Settings(model=model)).max_model_len == 512
    assert "max_model_len" not in with_model_facts(Settings(model=model)).model_fields_set
    assert with_model_facts(Settings(model=model, max_model_len=100)).max_model_len == 100
    assert with_model_facts(Settings(model="/none", engine="emulated")).max_model_len == 16_384
    with pytest.raises(ConfigError, match="holds 512 tokens, and L4_MAX_MODEL_LEN is 513"):
        with_model_facts(Settings(model=model, max_model_len=513))
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert with_model_facts(Settings(model=model, max_model_len=513)).max_model_len == 513
