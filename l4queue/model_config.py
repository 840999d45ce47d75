"""The longest request that a model holds, by its own `config.json`, without loading the model or PyTorch.

The rules are vLLM's (`_get_and_verify_max_len`). A model that says nothing is left to vLLM.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4queue.config import Settings
from l4queue.errors import ConfigError
from l4queue.smollm2 import CONTEXT_TOKENS as SMOLLM2_TOKENS
from l4queue.smollm2 import SMOLLM2
from l4queue.tiny import CONTEXT_TOKENS as TINY_TOKENS
from l4queue.tiny import TINY

__all__ = (
    "ContextLength",
    "context_length",
    "is_path",
    "model_context",
    "served_names",
    "trusts_remote_code",
    "with_model_facts",
)

_CONFIG = "config.json"
_OWN_MODELS = {TINY: TINY_TOKENS, SMOLLM2: SMOLLM2_TOKENS}
_TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of rotary embeddings whose factor the stated length contains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextLength:
    """Prompt and output of one request: `usual_tokens` unless more is asked for, never beyond `most_tokens`."""

    usual_tokens: int
    most_tokens: int


def context_length(config: Mapping[str, Any]) -> ContextLength | None:
    """What a `config.json` says; None where it says nothing."""
    text = next((part for name in _TEXT_PARTS if isinstance(part := config.get(name), dict)), config)
    stated = [tokens for key in _LENGTH_KEYS if (tokens := _length(text.get(key)))]
    if not stated:
        return None
    most = float(_length(text.get("model_max_length")) or min(stated))
    ropes = list(_ropes(text))
    if "gemma3" not in str(text.get("model_type", "")):
        factors = [rope.get("factor") for rope in ropes if _kind(rope) not in _SCALED_ALREADY]
        most *= next((float(f) for f in reversed(factors) if isinstance(f, int | float)), 1.0)
    usual = int(most)
    if any(_kind(rope) in ("su", "longrope") for rope in ropes):
        original = [_length(place.get("original_max_position_embeddings")) for place in (text, *ropes)]
        usual = next((tokens for tokens in original if tokens), usual)
    return ContextLength(usual_tokens=usual, most_tokens=int(most))


def model_context(model: str, *, revision: str | None = None) -> ContextLength | None:
    """The same of a directory or a name at Hugging Face; None where vLLM has to find out.

    ConfigError where there is no such model.
    """
    if model in _OWN_MODELS:
        return ContextLength(usual_tokens=_OWN_MODELS[model], most_tokens=_OWN_MODELS[model])
    folder = Path(model).expanduser()
    if folder.is_dir():
        path: Path | None = folder / _CONFIG
    elif folder.exists() or "://" in model:  # a single file, or a store that vLLM knows
        return None
    elif is_path(model):
        raise ConfigError(f"model {model}: there is no {folder / _CONFIG}")
    else:
        path = _fetched(model, revision)
    if path is None:
        return None
    try:
        config = json.loads(path.read_bytes())  # with NaN and the like, as transformers reads it
    except FileNotFoundError:
        if (folder / "params.json").is_file():  # Mistral's own format
            return None
        raise ConfigError(f"model {model}: there is no {path}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {model}: {path} cannot be read: {error}") from error
    return context_length(config) if isinstance(config, dict) else None


def with_model_facts(settings: Settings) -> Settings:
    """Settings whose `max_model_len` is what the model holds, unless it was set.

    Where L4_VLLM_ARGS has a revision, `tokenizer` is the directory of the tokenizer of that revision.
    ConfigError where the length was set to more, or there is no such model. An emulated engine holds what is set.
    A server has the model where it is, so that a tokenizer of its own tells enough here.
    """
    if settings.engine == "emulated":
        return settings
    if settings.engine == "http" and settings.tokenizer:
        return settings
    revision, tokenizer_revision = _revisions(settings.vllm_args)
    context = model_context(settings.model, revision=revision)
    if tokenizer_revision and _is_name(settings.tokenizer or settings.model):
        place = _fetched_tokenizer(settings.tokenizer or settings.model, tokenizer_revision)
        settings = settings.model_copy(update={"tokenizer": str(place)})
    is_set = "max_model_len" in settings.model_fields_set
    if context is None:
        return settings
    if not is_set:
        found = settings.model_copy(update={"max_model_len": context.usual_tokens})
        found.model_fields_set.discard("max_model_len")  # nobody has set it
        return found
    if settings.max_model_len > context.most_tokens and os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") != "1":
        raise ConfigError(
            f"model {settings.model} holds {context.most_tokens} tokens, and L4_MAX_MODEL_LEN is "
            f"{settings.max_model_len}: lower it, or unset it for what the model holds"
        )
    return settings


def served_names(settings: Settings) -> tuple[str, ...]:
    """Names by which requests may ask for the model, the one in answers first. ConfigError for unreadable ones."""
    try:
        names = shlex.split(settings.served_model_name)
    except ValueError as error:
        raise ConfigError(f"L4_SERVED_MODEL_NAME: {error}") from error
    if not names and settings.engine == "vllm":
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--served-model-name", "--served_model_name", nargs="+", default=[])
        names = _named(parser, settings.vllm_args).served_model_name
    return tuple(dict.fromkeys(names)) or (settings.model,)


def trusts_remote_code(settings: Settings) -> bool:
    """Whether code that comes with the model may run, as `--trust-remote-code` of L4_VLLM_ARGS says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--trust-remote-code", "--trust_remote_code", action=argparse.BooleanOptionalAction, default=False
    )
    return bool(_named(parser, settings.vllm_args).trust_remote_code)


def is_path(model: str) -> bool:
    """Whether a model is written as a directory, so that it is no name at Hugging Face."""
    return model.startswith(("/", ".", "~"))


def _is_name(model: str) -> bool:
    """Whether it is to be found at Hugging Face."""
    is_place = is_path(model) or "://" in model or Path(model).exists()
    return not is_place and model not in _OWN_MODELS


def _revisions(vllm_args: str) -> tuple[str | None, str | None]:
    """Of the model and of its tokenizer; vLLM reads, and checks, the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--revision")
    parser.add_argument("--tokenizer-revision", "--tokenizer_revision")
    named = _named(parser, vllm_args)
    return named.revision, named.tokenizer_revision or named.revision


def _named(parser: argparse.ArgumentParser, vllm_args: str) -> argparse.Namespace:
    """The options of a line that this parser knows."""
    try:
        return parser.parse_known_args(shlex.split(vllm_args))[0]
    except (ValueError, SystemExit) as error:
        raise ConfigError(f"L4_VLLM_ARGS: {error}") from error


def _fetched(model: str, revision: str | None) -> Path | None:
    """Its `config.json`; None where the model has none, or there is no client of Hugging Face."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError
    except ImportError:
        return None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each retry; we tell the end
    try:
        return Path(hf_hub_download(model, _CONFIG, revision=revision))
    except RemoteEntryNotFoundError:  # the model is there, in another format
        return None
    except (OSError, ValueError) as error:
        raise _not_fetched(model, revision, error) from error


def _fetched_tokenizer(model: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_TOKENIZER_FILES))
    except (OSError, ValueError) as error:
        raise _not_fetched(model, revision, error) from error


def _not_fetched(model: str, revision: str | None, error: Exception) -> ConfigError:
    at = f" at revision {revision}" if revision else ""
    why = str(error).strip().partition("\n")[0]
    return ConfigError(f"model {model}{at}: there is no such directory, and Hugging Face did not give it: {why}")


def _ropes(text: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Parameters of the rotary embeddings, which may differ by kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        found = text.get(name)
        if isinstance(found, dict):
            parts = [part for part in found.values() if isinstance(part, dict)]
            yield from parts or [found]
            return


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _length(value: object) -> int:
    """It, or 0 where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
