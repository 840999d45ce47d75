"""Prompts as the model reads them: where a sequence begins, and that it begins once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from dispatcher.routing.tokenizer import Counted, PromptTokenizer, Refusal, _fast_backend
from l4queue.protocol.records import pack_ids
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


@given(texts=st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_texts_are_encoded_as_transformers_does(llama: PromptTokenizer, texts: list[str]) -> None:
    """By the library behind it, all in one call."""
    assert llama._backend is not None
    usual = llama._tokenizer(texts, verbose=False)["input_ids"]

    found = llama.count([("p", text.encode()) for text in texts])

    assert [list(one.token_ids) for one in found if isinstance(one, Counted)] == usual


def test_a_tokenizer_that_cuts_and_fills_up_does_not_here(tmp_path: Path) -> None:
    """What its file says of lengths is for training: no prompt is cut, none filled up beside a longer one."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding()
    tokenizer.save_pretrained(tmp_path)
    found = PromptTokenizer(str(tmp_path), max_model_len=100).count([("p", b"a"), ("p", b"a b c d e f g h i j")])

    short, long = (one.num_tokens for one in found if isinstance(one, Counted))
    assert short == 1
    assert long > 4


def test_a_class_that_does_more_than_its_backend_is_asked_itself(llama: PromptTokenizer) -> None:
    """Then there is no short cut."""

    class Shouting(type(llama._tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any, **options: Any) -> Any:
            return super().__call__([one.upper() for one in text], **options)

    own = Shouting(tokenizer_object=llama._tokenizer.backend_tokenizer)
    assert _fast_backend(llama._tokenizer) is not None
    assert _fast_backend(own) is None


@pytest.mark.parametrize(
    ("token_ids", "told"), [([5, 6], None), ([], "is empty"), ([8191, 8192], "token id 8192")]
)
def test_ids_are_counted_and_stay(llama: PromptTokenizer, token_ids: list[int], told: str | None) -> None:
    """Nothing is to be sent back of what the record has."""
    (answer,) = llama.count([("t", pack_ids(token_ids))])

    if told is None:
        assert isinstance(answer, Counted)
        assert (list(answer.token_ids), answer.num_stored) == (token_ids, 2)
    else:
        assert isinstance(answer, Refusal)
        assert told in answer.error
