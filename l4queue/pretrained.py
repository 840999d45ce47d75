"""A model's own tokenizer, without PyTorch where none of its code needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from l4queue.model_cache import cache_directory
from l4queue.smollm2 import SMOLLM2, convert_smollm2
from l4queue.strict_json import read_json
from l4queue.tiny import TINY, build_tiny_tokenizer

__all__ = ("end_token_ids", "load_tokenizer", "tokenizer_place")

_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer at `path`, a directory or a name that transformers knows, as its `AutoTokenizer` finds it.

    That one imports PyTorch where it is installed: seconds and 270 MB in every process. A directory with nothing
    but a generic tokenizer leaves it no choice of a class, and is loaded by that class at once. Raises OSError or
    ValueError where there is no tokenizer, or one with code of its own that is not trusted; ImportError without
    transformers, and as `tokenizer_place`.
    """
    path = tokenizer_place(path)
    is_generic = _is_generic(Path(path))
    try:
        if is_generic:
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(path)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ImportError, OSError):
        raise
    except ValueError as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(
                "its tokenizer is code of its own: read it, then let it run with L4_VLLM_ARGS=--trust-remote-code"
            ) from error
        raise
    except Exception as error:  # a broken file is met by foreign code, which raises all kinds
        raise ValueError(f"its files cannot be read: {error}") from error


def end_token_ids(model: str | Path, *, tokenizer: str | Path, trust_remote_code: bool = False) -> frozenset[int]:
    """Token ids that end an output: the tokenizer's own, and those of the model's generation settings, if any.

    As vLLM has them. Raises as `load_tokenizer`.
    """
    found = {getattr(load_tokenizer(tokenizer, trust_remote_code=trust_remote_code), "eos_token_id", None)}
    for place in dict.fromkeys((model, tokenizer)):
        told = _generation_settings(place).get("eos_token_id")
        found.update(told if isinstance(told, list) else [told])
    return frozenset(token for token in found if isinstance(token, int))


def _generation_settings(place: str | Path) -> dict[str, Any]:
    """`generation_config.json` of a model; {} where it has none. transformers' own reader imports PyTorch."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(str(tokenizer_place(place)), "generation_config.json")
        settings = read_json(Path(found).read_bytes()) if found else None
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def tokenizer_place(name: str | Path) -> str | Path:
    """Where a tokenizer lies: `tiny` and `smollm2` are made in the user's cache if need be, others lie there.

    ConfigError where `smollm2` cannot be had.
    """
    if name == TINY:
        return build_tiny_tokenizer(cache_directory())
    if name == SMOLLM2:
        return convert_smollm2(cache_directory())
    return name


def _is_generic(folder: Path) -> bool:
    """Whether it names no class, and no code, of its own; a model's configuration may mean another class."""
    told = folder / "tokenizer_config.json"
    if not told.is_file() or (folder / "config.json").exists() or not (folder / "tokenizer.json").is_file():
        return False
    config = read_json(told.read_bytes())
    return isinstance(config, dict) and config.get("tokenizer_class") in _GENERIC and "auto_map" not in config
