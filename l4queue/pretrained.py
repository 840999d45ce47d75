"""A model's own tokenizer, without PyTorch where none of its code needs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ("load_tokenizer",)

_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer at `path`, a directory or a name that transformers knows, as its `AutoTokenizer` finds it.

    That one imports PyTorch where it is installed: seconds and 270 MB in every process. A directory with nothing
    but a generic tokenizer leaves it no choice of a class, and is loaded by that class at once. Raises OSError or
    ValueError where there is no tokenizer, ImportError without transformers.
    """
    if _is_generic(Path(path)):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _is_generic(folder: Path) -> bool:
    """Whether it names no class, and no code, of its own; a model's configuration may mean another class."""
    told = folder / "tokenizer_config.json"
    if not told.is_file() or (folder / "config.json").exists() or not (folder / "tokenizer.json").is_file():
        return False
    config = json.loads(told.read_text())
    return config.get("tokenizer_class") in _GENERIC and "auto_map" not in config
