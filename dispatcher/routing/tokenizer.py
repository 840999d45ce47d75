"""The model's own tokenizer: prompts and chats to token ids, in batches, with a reason for every refusal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from l4queue.errors import ConfigError
from l4queue.pretrained import load_tokenizer
from l4queue.protocol.records import id_array
from l4queue.value_class import value_class

__all__ = ("Counted", "PromptTokenizer", "Refusal", "stored_ids")

_PROBES = ("a", "", " two  words\n\n\tand. ", "naïve ﬁ 日本語 🙂 e\u0301", "0123456789 " * 40, "</s><s>[INST]")
"""Texts in which tokenizers differ: spaces, Unicode, digits, length, and what looks like a special token."""
_FALLBACK_TOKEN_BYTES = 512
"""Longest token of a tokenizer that tells no vocabulary, bytes. Chosen: above all known; a bound too low would
refuse prompts that fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request can never run. `reason` is `invalid` or `too_long`."""

    field: str
    error: str
    reason: str = "invalid"


@value_class(kw_only=True)
class Counted:
    """A prompt as the model reads it. `num_stored`: the record has as many ids, which may be unread here."""

    token_ids: Sequence[int] = ()
    num_stored: int = 0

    @property
    def num_tokens(self) -> int:
        """Its length."""
        return self.num_stored or len(self.token_ids)


class PromptTokenizer:
    """Counts prompts. Thread-safe for reading; loads in seconds, so make one per process.

    `path` and `trust_remote_code` are as for `load_tokenizer`.
    `max_model_len` bounds the work: a prompt that cannot fit by its bytes alone is refused uncounted.
    """

    def __init__(self, path: str, *, max_model_len: int, trust_remote_code: bool = False) -> None:
        try:
            self._tokenizer: Any = load_tokenizer(path, trust_remote_code=trust_remote_code)
        except ImportError as error:
            raise ConfigError("transformers is missing: install l4queue[dispatcher]") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"no tokenizer at {path!r}: set L4_MODEL or L4_TOKENIZER ({error})") from error
        self.max_model_len = max_model_len
        self._backend = _fast_backend(self._tokenizer)
        self._added_bos, self._added_bos_id = _added_bos(self._tokenizer)
        vocabulary = self._tokenizer.get_vocab()
        self.vocabulary_size = max(vocabulary.values(), default=-1) + 1
        self._longest_token_bytes = max((len(t.encode()) for t in vocabulary), default=_FALLBACK_TOKEN_BYTES)

    def count(self, prompts: Sequence[tuple[str, bytes]]) -> list[Counted | Refusal]:
        """Token ids of prompts given as (kind, bytes): p text, m messages (JSON), t packed ids; in order."""
        answers: list[Counted | Refusal | None] = [None] * len(prompts)
        texts: dict[int, str] = {}
        rendered: dict[int, str] = {}
        for index, (kind, data) in enumerate(prompts):
            answer = self._prepare(kind, data)
            if isinstance(answer, str):
                (rendered if kind == "m" else texts)[index] = answer
            else:
                answers[index] = answer
        self._encode(texts, answers, specials=True)
        self._encode(rendered, answers, specials=False)  # a chat template writes its own
        return [answer if answer is not None else _EMPTY for answer in answers]

    def _prepare(self, kind: str, data: bytes) -> str | Counted | Refusal:
        if kind == "t":
            return self._check_ids(data)
        field = "messages" if kind == "m" else "prompt"
        if len(data) > self._longest_token_bytes * self.max_model_len:
            error = f"{len(data)} bytes cannot fit the model's {self.max_model_len} tokens"
            return Refusal(field=field, error=error, reason="too_long")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            return Refusal(field=field, error=f"not valid UTF-8: {error.reason} at byte {error.start}")
        return self._render(text) if kind == "m" else text

    def _render(self, text: str) -> str | Refusal:
        if not getattr(self._tokenizer, "chat_template", None):
            return Refusal(field="messages", error="this model's tokenizer has no chat template; send a prompt")
        try:
            return str(
                self._tokenizer.apply_chat_template(json.loads(text), tokenize=False, add_generation_prompt=True)
            )
        except Exception as error:  # a model's template is foreign code and may raise anything
            return Refusal(field="messages", error=f"the model's chat template refuses these messages: {error}")

    def _check_ids(self, data: bytes) -> Counted | Refusal:
        try:
            token_ids = id_array(data)
        except ValueError:
            return Refusal(field="token_ids", error="not a list of 32-bit token ids")
        greatest_id = max(token_ids, default=0)
        return stored_ids(len(token_ids), greatest_id, vocabulary_size=self.vocabulary_size, token_ids=token_ids)

    def _encode(self, texts: dict[int, str], answers: list[Counted | Refusal | None], *, specials: bool) -> None:
        if not texts:
            return
        try:
            encoded = self._ids_of(list(texts.values()), specials=specials)
        except Exception as error:  # a tokenizer is foreign code; one bad text must not fail its neighbours
            if len(texts) == 1:
                (index,) = texts
                answers[index] = Refusal(field="prompt", error=f"the model's tokenizer refuses it: {error}")
                return
            for index, text in texts.items():
                self._encode({index: text}, answers, specials=specials)
            return
        for (index, text), token_ids in zip(texts.items(), encoded, strict=True):
            if specials and self._begins_twice(text, token_ids):
                del token_ids[0]
            answers[index] = Counted(token_ids=token_ids) if token_ids else _EMPTY

    def _ids_of(self, texts: list[str], *, specials: bool) -> list[list[int]]:
        if self._backend is None:
            return _usual_ids(self._tokenizer, texts, specials=specials)
        return _fast_ids(self._backend, texts, specials=specials)

    def _begins_twice(self, text: str, token_ids: Sequence[int]) -> bool:
        """Whether the beginning of sequence stands in the text already, as in one that a template has rendered."""
        has_own = bool(self._added_bos) and text.startswith(self._added_bos)
        return has_own and len(token_ids) > 1 and token_ids[0] == token_ids[1] == self._added_bos_id


def stored_ids(
    num_ids: int, greatest_id: int, *, vocabulary_size: int, token_ids: Sequence[int] = ()
) -> Counted | Refusal:
    """The answer to a prompt of ids, by their number and the greatest; `token_ids` where they have been read."""
    if greatest_id >= vocabulary_size:
        error = f"token id {greatest_id} is outside the vocabulary of {vocabulary_size}"
        return Refusal(field="token_ids", error=error)
    return Counted(num_stored=num_ids, token_ids=token_ids) if num_ids else _EMPTY


def _usual_ids(tokenizer: Any, texts: list[str], *, specials: bool) -> list[list[int]]:
    """As transformers has them."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=specials, verbose=False)["input_ids"]
    return ids


def _fast_ids(backend: Any, texts: list[str], *, specials: bool) -> list[list[int]]:
    """The same of the tokenizers library: without offsets and masks, which cost a short text ten times its ids."""
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=specials)]


def _fast_backend(tokenizer: Any) -> Any:
    """The tokenizer of the tokenizers library behind this one; None where there is none that gives the same ids.

    A class of a model's own may do more than its backend. So both are tried, on texts in which tokenizers differ.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "encode_batch_fast"):
        return None
    specials = map(str, getattr(tokenizer, "all_special_tokens", ())[:8])
    texts = [*_PROBES, *(f"{special} a{special}" for special in specials)]
    try:
        usual = [_usual_ids(tokenizer, texts, specials=with_them) for with_them in (True, False)]
        backend.no_truncation()
        backend.no_padding()
        fast = [_fast_ids(backend, texts, specials=with_them) for with_them in (True, False)]
    except Exception:  # foreign code, which then works as transformers has it or refuses each text with its reason
        return None
    return backend if fast == usual else None


def _added_bos(tokenizer: Any) -> tuple[str, int]:
    """The beginning of sequence that a tokenizer puts before every text; ("", -1) when it puts none."""
    text, token_id = getattr(tokenizer, "bos_token", None), getattr(tokenizer, "bos_token_id", None)
    if not text or token_id is None:
        return "", -1
    alone = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    return (str(text), int(token_id)) if alone[:1] == [token_id] else ("", -1)


_EMPTY = Refusal(field="prompt", error="the prompt is empty")
