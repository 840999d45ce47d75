"""The tiny model: the same for everybody, whole or absent, and fit for a chat."""

from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path

import pytest

from l4queue.tiny import build_tiny_tokenizer
from workers.tiny import build_tiny_model


def build(directory: Path) -> str:
    """Build in a process of its own; a digest of all that came out."""
    model = build_tiny_model(directory)
    digest = hashlib.sha256()
    for file in sorted(model.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@pytest.mark.services
def test_two_builders_at_once_leave_one_whole_model(tmp_path: Path) -> None:
    """Both get the same path and bytes, another folder gets the same bytes, nothing else is left behind."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        both = pool.map(build, [tmp_path / "shared", tmp_path / "shared"], chunksize=1)
        other = pool.apply(build, [tmp_path / "other"])

    assert both == [other, other]
    model = build_tiny_model(tmp_path / "shared")
    assert [path.name for path in (tmp_path / "shared").iterdir()] == [model.name]
    before = (model / "model.safetensors").stat().st_mtime_ns
    assert build_tiny_model(tmp_path / "shared") == model
    assert (model / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.services
def test_the_tokenizer_is_a_real_one(tmp_path: Path) -> None:
    """Any text comes back; words are shorter than letters; special tokens and chat template are there."""
    from transformers import AutoTokenizer

    model = build_tiny_model(tmp_path)
    alone = build_tiny_tokenizer(tmp_path)  # as a dispatcher builds it, which has no torch
    assert (alone / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "The function returns a list. Größe 你好 👩‍👩‍👧 \x00\t"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("The function returns a list.")) < 10
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)

    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == (
        "<|user|>Hi<|end|><|assistant|>"
    )
