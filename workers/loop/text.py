"""Incremental text from token ids: a pure function of the ids, so that any worker can continue it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Protocol

from l4queue.errors import ConfigError
from l4queue.models import SamplingParams
from l4queue.pretrained import load_tokenizer
from l4queue.value_class import value_class

__all__ = ("StreamDecoder", "TextPiece", "TextStream", "TokenDecoder", "no_text", "text_factory")

_CONTEXT_TOKENS = 8  # enough for the longest character and the word before it
_UNFINISHED = "\ufffd"


@value_class(kw_only=False)
class TextPiece:
    """Text that became certain, from the first `num_tokens` of the ids given; the rest came after a stop."""

    text: str
    num_tokens: int
    stopped: bool


class TokenDecoder(Protocol):
    """Turns ids into text as far as it is certain; keeps back bytes of an unfinished character."""

    def prime(self, prompt_ids: Sequence[int]) -> None:
        """Say what comes before the first id: some tokenizers write a word otherwise where a text begins."""

    def step(self, token_id: int) -> str:
        """Text that this token completes; may be empty."""


class StreamDecoder:
    """A `TokenDecoder` over a fast tokenizer of the `tokenizers` library; special tokens give no text if skipped.

    Bytes that end the output without ever becoming a character give no text either.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._stream: Any = None  # made with what comes before the first id

    def prime(self, prompt_ids: Sequence[int]) -> None:
        """Set the context of the first id. The end of the prompt is enough, and costs the same for any."""
        tail = list(prompt_ids[-_CONTEXT_TOKENS:])
        if not self._tokenizer.decode(tail, skip_special_tokens=self._skips).endswith(_UNFINISHED):
            # behind half a character the library would give the context out as new text
            self._stream = _stream_class()(tail, skip_special_tokens=self._skips)

    def step(self, token_id: int) -> str:
        """Text that this token completes."""
        if self._stream is None:
            self._stream = _stream_class()(skip_special_tokens=self._skips)
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception as error:  # the library has one error type for all; only this one is harmless
            if not str(error).startswith("Invalid prefix"):
                raise
            # bytes that never became a character: go on behind them, as vLLM does
            self._stream = _stream_class()(skip_special_tokens=self._skips)
            return self._stream.step(self._tokenizer, token_id) or ""


@cache
def _stream_class() -> Any:
    """The library's decoder, which workers without a text do without."""
    from tokenizers.decoders import DecodeStream

    return DecodeStream


def text_factory(path: str, *, trust_remote_code: bool = False) -> Callable[[SamplingParams], TextStream]:
    """Makes the text of outputs with the tokenizer at `path`. ConfigError when there is none."""
    try:
        backend = load_tokenizer(path, trust_remote_code=trust_remote_code).backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"no fast tokenizer at {path!r}: set L4_MODEL or L4_TOKENIZER ({error})") from error
    return lambda params: TextStream(
        StreamDecoder(backend, skip_special_tokens=params.skip_special_tokens),
        stop=params.stop,
        min_tokens=params.min_tokens,
        silent_ids=frozenset(params.stop_token_ids),
    )


def no_text(params: SamplingParams) -> TextStream:
    """For engines without a tokenizer: tokens only, stop strings never match."""
    return TextStream(None)


class TextStream:
    """The text of one output, with its stop strings.

    What might be the beginning of a stop string is held back until the next tokens decide. At a stop
    string the text ends before it; the tokens up to the one that completed it are kept. As in vLLM, a stop
    string counts only where it ends after `min_tokens` tokens, and `silent_ids` (stop tokens and ends of
    sequence) give no text, whether or not the tokenizer calls them special. Everything depends on the
    ids alone, not on how they were cut into pieces.
    """

    def __init__(
        self,
        decoder: TokenDecoder | None,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        silent_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._first_chars = frozenset(text[0] for text in self._stop)
        self._reach = max(map(len, self._stop), default=1) - 1
        self._min_tokens = min_tokens
        self._silent_ids = silent_ids
        self._num_fed = 0
        self._held = ""
        self.stopped = False

    def prime(self, prompt_ids: Sequence[int]) -> None:
        """Say which ids come before the output. Before the first `feed` or `replay`, if at all."""
        if self._decoder is not None and prompt_ids:
            self._decoder.prime(prompt_ids)

    def silence(self, token_ids: Iterable[int]) -> None:
        """Say which further ids give no text. Before the first `feed` or `replay`, if at all."""
        self._silent_ids |= frozenset(token_ids)

    def feed(self, token_ids: Sequence[int]) -> TextPiece:
        """Take in further ids. Nothing may follow once it has stopped."""
        if self._decoder is None:
            return TextPiece("", len(token_ids), False)
        step, silent = self._decoder.step, self._silent_ids
        out: list[str] = []
        for number, token_id in enumerate(token_ids, start=1):
            text = step(token_id) if token_id not in silent else ""
            if not self._stop:
                out.append(text)
                continue
            self._num_fed += 1
            self._held += text
            if not text:
                continue
            at = self._found_at(len(self._held) - len(text)) if self._num_fed > self._min_tokens else None
            if at is not None:
                out.append(self._held[:at])
                self._held, self.stopped = "", True
                return TextPiece("".join(out), number, True)
            cut = self._certain()
            out.append(self._held[:cut])
            self._held = self._held[cut:]
        return TextPiece("".join(out), len(token_ids), False)

    def replay(self, token_ids: Sequence[int]) -> bool:
        """Take in ids whose text was written before; true when they end with a stop string."""
        return self.feed(token_ids).stopped

    def flush(self) -> str:
        """The text held back, once no more tokens come."""
        rest, self._held = self._held, ""
        return rest

    def _found_at(self, num_old: int) -> int | None:
        """Where the first stop string begins that ends behind the first `num_old` characters held."""
        held = self._held
        found = [at for s in self._stop if (at := held.find(s, max(0, num_old - len(s) + 1))) >= 0]
        return min(found) if found else None

    def _certain(self) -> int:
        """How much of the held text comes before anything that may begin a stop string."""
        held, firsts = self._held, self._first_chars
        for at in range(max(0, len(held) - self._reach), len(held)):
            if held[at] in firsts and any(text.startswith(held[at:]) for text in self._stop):
                return at
        return len(held)
