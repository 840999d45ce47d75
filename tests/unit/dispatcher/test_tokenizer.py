"""Prompts as the model reads them: where a sequence begins, and that it begins once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from dispatcher.routing.tokenizer import Counted, PromptTokenizer
from l4queue.tiny import make_tiny_tokenizer

BOS = 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny tokenizer as Llama's is: it puts a beginning of sequence before every text."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    path: Path = tmp_path_factory.mktemp("llama")
    tokenizer.save_pretrained(path)
    return PromptTokenizer(str(path), max_model_len=100)


def ids(tokenizer: PromptTokenizer, kind: str, text: str) -> list[int]:
    (answer,) = tokenizer.count([(kind, text.encode())])
    assert isinstance(answer, Counted)
    return list(answer.token_ids)


def test_a_sequence_begins_once(llama: PromptTokenizer) -> None:
    """Plain, rendered by the client, or rendered here: the model reads the same."""
    plain = ids(llama, "p", "hello")
    assert plain[0] == BOS
    assert plain.count(BOS) == 1
    assert ids(llama, "p", "<s>hello") == plain
    assert ids(llama, "m", json.dumps([{"role": "user", "content": "hello"}])) == plain


def test_what_the_client_repeats_itself_is_kept(llama: PromptTokenizer) -> None:
    """Only the one that the tokenizer adds is left out; in the middle it is a token like any other."""
    assert ids(llama, "p", "<s><s>hello").count(BOS) == 2
    assert ids(llama, "p", "hello<s>").count(BOS) == 2
    assert ids(llama, "p", "<s>") == [BOS]


def test_a_tokenizer_that_adds_none_is_left_alone(tmp_path: Path) -> None:
    """The text has what it has."""
    make_tiny_tokenizer().save_pretrained(tmp_path)
    plain = PromptTokenizer(str(tmp_path), max_model_len=100)

    assert BOS not in ids(plain, "p", "hello")
    assert ids(plain, "p", "<s>hello").count(BOS) == 1
    assert ids(plain, "p", "<s><s>hello").count(BOS) == 2
