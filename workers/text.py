"""Text from token ids, piece by piece: a pure function of the ids, so that any worker can go on with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from l4queue.errors import ConfigError
from l4queue.models import SamplingParams

__all__ = ("Piece", "StreamDecoder", "TextStream", "TokenDecoder", "no_text", "text_factory")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain, from the first `num_tokens` of the ids given; the rest came after a stop."""

    text: str
    num_tokens: int
    stopped: bool


class TokenDecoder(Protocol):
    """Turns ids into text as far as it is certain; keeps back bytes of an unfinished character."""

    def step(self, token_id: int) -> str:
        """Text that this token completes; may be empty."""

    def rest(self) -> str:
        """Text that no further token can change any more."""


class StreamDecoder:
    """A `TokenDecoder` over a fast tokenizer of the `tokenizers` library; special tokens give no text."""

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._new_stream = DecodeStream
        self._stream = DecodeStream(skip_special_tokens=True)

    def step(self, token_id: int) -> str:
        """Text that this token completes."""
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception as error:  # the library has one error type for all; only this one is harmless
            if not str(error).startswith("Invalid prefix"):
                raise
            # bytes that never became a character: go on behind them, as vLLM does
            self._stream = self._new_stream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer, token_id) or ""

    def rest(self) -> str:
        """Nothing: the bytes of an unfinished character are no text."""
        return ""


def text_factory(path: str) -> Callable[[SamplingParams], TextStream]:
    """Makes the text of outputs with the tokenizer at `path`. ConfigError when there is none."""
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(path).backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"no fast tokenizer at {path!r}: set L4_MODEL or L4_TOKENIZER ({error})") from error
    return lambda params: TextStream(StreamDecoder(backend), stop=params.stop)


def no_text(params: SamplingParams) -> TextStream:
    """For engines without a tokenizer: tokens only, stop strings never match."""
    return TextStream(None)


class TextStream:
    """The text of one output, with its stop strings.

    What might be the beginning of a stop string is held back until the next tokens decide. At a stop
    string the text ends before it; the tokens up to the one that completed it are kept.
    """

    def __init__(self, decoder: TokenDecoder | None, *, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, token_ids: Sequence[int]) -> Piece:
        """Take in further ids."""
        if self._decoder is None:
            return Piece("", len(token_ids), False)
        step = self._decoder.step
        if not self._stop:
            return Piece("".join([step(token_id) for token_id in token_ids]), len(token_ids), False)
        out: list[str] = []
        for number, token_id in enumerate(token_ids, start=1):
            self._held += step(token_id)
            found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
            if found:
                out.append(self._held[: min(found)])
                self._held, self.stopped = "", True
                return Piece("".join(out), number, True)
            keep = self._undecided()
            cut = len(self._held) - keep
            out.append(self._held[:cut])
            self._held = self._held[cut:]
        return Piece("".join(out), len(token_ids), False)

    def replay(self, token_ids: Sequence[int]) -> bool:
        """Take in ids whose text was written before; true when they end with a stop string."""
        return self.feed(token_ids).stopped

    def flush(self) -> str:
        """The text held back, once no more tokens come."""
        rest, self._held = self._held + (self._decoder.rest() if self._decoder else ""), ""
        return rest

    def _undecided(self) -> int:
        """Length of the longest end of the held text that may begin a stop string."""
        for size in range(min(len(self._held), max(map(len, self._stop)) - 1), 0, -1):
            tail = self._held[-size:]
            if any(s.startswith(tail) for s in self._stop):
                return size
        return 0
