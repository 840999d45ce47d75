"""Tokenizers load as `AutoTokenizer` loads them, and without PyTorch where they are generic."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dispatcher.routing.tokenizer import Counted, PromptTokenizer
from l4queue.config import Settings
from l4queue.errors import ConfigError
from l4queue.model_cache import cache_directory
from l4queue.model_config import trusts_remote_code
from l4queue.pretrained import load_tokenizer
from l4queue.tiny import build_tiny_tokenizer
from workers.loop.text import text_factory

_TEXTS = ["", "Grüße, 你好 🙂", " two  spaces", "<s>tag</s>", "x" * 1000]
_LOAD = """
import sys
from l4queue.pretrained import load_tokenizer
load_tokenizer(sys.argv[1])
print("torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def generic() -> Path:
    return build_tiny_tokenizer(cache_directory())


def test_a_generic_tokenizer_is_what_auto_tokenizer_makes_of_it(generic: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(generic), AutoTokenizer.from_pretrained(generic)
    assert type(ours) is type(theirs)
    assert ours(_TEXTS)["input_ids"] == theirs(_TEXTS)["input_ids"]
    chat = [{"role": "user", "content": "hello"}]
    rendered = [t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in (ours, theirs)]
    assert rendered[0] == rendered[1]


@pytest.mark.parametrize("is_model", [False, True])
def test_torch_is_imported_only_where_a_model_stands_beside(is_model: bool, generic: Path, tmp_path: Path) -> None:
    """Its configuration may name another class of tokenizer."""
    folder = shutil.copytree(generic, tmp_path / "tokenizer")
    if is_model:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    done = subprocess.run([sys.executable, "-c", _LOAD, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(is_model)


def test_a_folder_without_a_tokenizer_is_an_error_that_its_callers_know(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"{", b"[1]", b'{"tokenizer_class": "\xff"}'])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_a_broken_file_is_an_error_that_its_callers_know(
    name: str, content: bytes, generic: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(generic, tmp_path / "tokenizer")
    (folder / name).write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        load_tokenizer(folder)


_OWN_CODE = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(generic: Path, tmp_path: Path) -> Path:
    """A directory whose tokenizer is a class that comes with it."""
    folder = shutil.copytree(generic, tmp_path / "with-code")
    (folder / "tokenization_own.py").write_text(_OWN_CODE)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def test_code_of_a_tokenizer_runs_where_it_is_trusted_only(
    with_code: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the dispatcher, and in a worker's text; else the error names the option."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ConfigError, match="L4_VLLM_ARGS=--trust-remote-code"):
        PromptTokenizer(str(with_code), max_model_len=100)
    with pytest.raises(ConfigError, match="L4_VLLM_ARGS=--trust-remote-code"):
        text_factory(str(with_code))

    assert type(load_tokenizer(with_code, trust_remote_code=True)).__name__ == "OwnTokenizer"
    [counted] = PromptTokenizer(str(with_code), max_model_len=100, trust_remote_code=True).count([("p", b"hello")])
    assert isinstance(counted, Counted)
    text_factory(str(with_code), trust_remote_code=True)


@pytest.mark.parametrize(
    ("given", "trusts"),
    [
        ("", False),
        ("--seed 1 --trust-remote-code", True),
        ("--trust_remote_code", True),
        ("--trust-remote-code --no-trust-remote-code", False),
    ],
)
def test_the_engine_s_option_is_the_one_for_all(given: str, trusts: bool) -> None:
    assert trusts_remote_code(Settings(vllm_args=given)) is trusts
