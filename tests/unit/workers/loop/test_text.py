"""Text of outputs: against a plain decode of all ids, however the ids are cut into pieces."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from l4queue.errors import ConfigError
from l4queue.models import SamplingParams
from l4queue.tiny import make_tiny_tokenizer
from workers.loop.text import StreamDecoder, TextPiece, TextStream, no_text, text_factory

REAL = (
    "The `with` statement wraps a block with methods defined by a context manager.\n\n"
    "Größe, naïve façade; Привет, мир! 你好，世界。 नमस्ते दुनिया — 👩‍👩‍👧‍👦 🇪🇺 👍🏽 "
    "e\u0301 \u202eabc\n\tdef f(x): return x**2\n"
)
TEXTS = st.one_of(
    st.tuples(st.integers(0, len(REAL)), st.integers(0, len(REAL))).map(lambda ab: REAL[min(ab) : max(ab)]),
    st.text(alphabet=st.sampled_from("aab \nEND.é你👍🏽\u200d👩"), max_size=30),
    st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=20),
)
STOPS = st.lists(
    st.one_of(
        st.text(alphabet=st.sampled_from("aab \nEND.é你👍🏽\u200d👩"), min_size=1, max_size=4),
        st.sampled_from(["\n\n", "def f", "wraps a block", "мир", "👨‍👩", "世界"]),
    ),
    max_size=3,
).map(tuple)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The tiny model's tokenizer as transformers sees it."""
    return make_tiny_tokenizer()


@pytest.fixture(scope="module")
def byte_level(tiny: Any) -> Any:
    """Bytes and merges, as in Llama 3, Qwen and GPT."""
    return tiny.backend_tokenizer


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """Word beginnings marked, unknown characters in bytes, one leading space dropped: as in Llama 2."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters, *".,:\n"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def oracle(
    tokenizer: Any, prompt: list[int], ids: list[int], *, stop: tuple[str, ...] = (), min_tokens: int = 0
) -> tuple[str, int, bool]:
    """Text, number of tokens kept and whether it stopped, by decoding everything anew for each token."""
    before = len(tokenizer.decode(prompt)) if prompt else 0
    old = ""
    for number in range(1, len(ids) + 1):
        new = tokenizer.decode(prompt + ids[:number])[before:].rstrip("\ufffd")
        if number > min_tokens:
            starts = [new.find(s, max(0, len(old) - len(s) + 1)) for s in stop]
            if found := [at for at in starts if at >= 0]:
                return new[: min(found)], number, True
        old = max(old, new, key=len)  # a byte fallback calls back what was whole while the next character is not
    return old, len(ids), False


def read(stream: TextStream, ids: list[int], cuts: list[int]) -> tuple[str, int, bool]:
    """The same through a stream, in pieces."""
    out, kept, begin = "", 0, 0
    for end in [*sorted(cut for cut in cuts if cut < len(ids)), len(ids)]:
        piece = stream.feed(ids[begin:end])
        out, kept, begin = out + piece.text, kept + piece.num_tokens, end
        assert piece.stopped == stream.stopped
        if piece.stopped:
            return out, kept, True
    return out + stream.flush(), kept, False


@settings(max_examples=100, deadline=None)
@given(
    text=TEXTS, stop=STOPS, cuts=st.lists(st.integers(0, 60), max_size=4), min_tokens=st.sampled_from([0, 0, 1, 5])
)
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_text_is_that_of_a_plain_decode_up_to_the_stop_string(
    request: pytest.FixtureRequest, kind: str, text: str, stop: tuple[str, ...], cuts: list[int], min_tokens: int
) -> None:
    """In any pieces, with stop strings and `min_tokens`; a character is whole or absent."""
    tokenizer = request.getfixturevalue(kind)
    prompt = tokenizer.encode("Once upon a").ids
    ids = tokenizer.encode(text).ids
    stream = TextStream(StreamDecoder(tokenizer), stop=stop, min_tokens=min_tokens)
    stream.prime(prompt)

    assert read(stream, ids, cuts) == oracle(tokenizer, prompt, ids, stop=stop, min_tokens=min_tokens)


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, 8191), max_size=40),
    prompt=st.lists(st.integers(0, 8191), max_size=20),
    stop=STOPS,
    min_tokens=st.integers(0, 10),
    data=st.data(),
)
def test_a_new_worker_that_replays_goes_on_exactly_where_the_old_one_was(
    byte_level: Tokenizer,
    ids: list[int],
    prompt: list[int],
    stop: tuple[str, ...],
    min_tokens: int,
    data: st.DataObject,
) -> None:
    """Even on noise that is no text at all: the pieces before the cut and after it make the same whole."""

    def fresh() -> TextStream:
        stream = TextStream(
            StreamDecoder(byte_level), stop=stop, min_tokens=min_tokens, silent_ids=frozenset(ids[5:6])
        )
        stream.prime(prompt)
        return stream

    cut = data.draw(st.integers(0, len(ids)))
    old, new = fresh(), fresh()
    first = old.feed(ids[:cut])
    assert new.replay(ids[:cut]) == first.stopped
    if not first.stopped:
        pieces = [stream.feed(ids[cut:]) for stream in (old, new)]
        assert pieces[0] == pieces[1]
        whole = fresh()
        uncut = whole.feed(ids)
        assert first.text + pieces[1].text == uncut.text
        assert whole.flush() == old.flush() == new.flush()


def test_the_first_word_keeps_its_space(metaspace: Tokenizer) -> None:
    """Where a text begins this kind of tokenizer drops a space; an output does not begin a text."""
    ids = metaspace.encode("time ago").ids

    assert read(TextStream(StreamDecoder(metaspace)), ids, []) == ("time ago", len(ids), False)
    primed = TextStream(StreamDecoder(metaspace))
    primed.prime(metaspace.encode("Once upon a").ids)
    assert read(primed, ids, []) == (" time ago", len(ids), False)


def test_a_prompt_that_ends_inside_a_character_gives_nothing_of_itself(byte_level: Tokenizer) -> None:
    """The library alone would write out the end of the prompt again."""
    *prompt, last = byte_level.encode("hello 😀").ids
    stream = TextStream(StreamDecoder(byte_level))
    stream.prime(prompt)
    text, _, _ = read(stream, [last, *byte_level.encode(" world").ids], [])

    assert "hello" not in text
    assert text.endswith(" world")


def test_half_a_character_at_the_end_is_no_text(byte_level: Tokenizer) -> None:
    """An output cut by max_tokens inside an emoji ends before it."""
    ids = byte_level.encode("done 😀").ids

    assert read(TextStream(StreamDecoder(byte_level)), ids[:-1], []) == ("done ", len(ids) - 1, False)


def test_what_may_begin_a_stop_string_waits_and_is_released(byte_level: Tokenizer) -> None:
    """`flush` gives it out when nothing follows; more text decides it sooner."""
    stream = TextStream(StreamDecoder(byte_level), stop=("</answer>",))
    ids = byte_level.encode("42 </ans").ids
    shown = "".join(stream.feed([token]).text for token in ids)
    assert shown == "42 "
    assert stream.feed(byte_level.encode("!").ids).text == "</ans!"

    assert stream.flush() == ""
    stream.feed(byte_level.encode("</").ids)
    assert stream.flush() == "</"


def test_a_stop_string_over_before_min_tokens_does_not_count(byte_level: Tokenizer) -> None:
    """One that ends behind the bound does, as in vLLM, even where it began before it."""
    ids = [byte_level.encode(letter).ids[0] for letter in "xabcab"]

    def result(stop: tuple[str, ...], min_tokens: int) -> tuple[str, int, bool]:
        return read(TextStream(StreamDecoder(byte_level), stop=stop, min_tokens=min_tokens), ids, [])

    assert result(("ab",), 0) == ("x", 3, True)
    assert result(("ab",), 3) == ("xabc", 6, True)
    assert result(("ab",), 2) == ("x", 3, True)
    assert result(("ab", "xabcabd"), 3) == ("xabc", 6, True)
    assert result(("bc", "abc"), 0) == ("x", 4, True)


def test_the_factory_takes_over_the_parameters_of_a_request(tiny: Any, tmp_path: Path) -> None:
    """Stop strings, stop tokens without text, min_tokens."""
    tiny.save_pretrained(tmp_path)
    make = text_factory(str(tmp_path))
    ids = tiny.encode("one two three four")
    assert tiny.decode(ids[:-1]) == "one two three"

    assert make(SamplingParams(stop=("two",))).feed(ids) == TextPiece("one ", len(tiny.encode("one two")), True)
    assert make(SamplingParams(stop=("two",), min_tokens=3)).feed(ids).text == "one two three four"
    assert make(SamplingParams(stop_token_ids=(ids[-1],))).feed(ids).text == "one two three"


def test_silent_tokens_give_no_text_and_those_around_them_do(byte_level: Any) -> None:
    """Named one by one or with the parameters."""
    ids = [byte_level.encode(letter).ids[0] for letter in "xabc"]
    stream = TextStream(StreamDecoder(byte_level), silent_ids=frozenset(ids[:1]))
    stream.silence(ids[2:3])

    assert stream.feed(ids).text == "ac"


def test_without_a_tokenizer_there_is_no_text() -> None:
    """Tokens are counted; nothing ever stops them."""
    stream = no_text(SamplingParams(stop=("a",)))
    stream.prime([1])

    assert stream.feed([1, 2, 3]).num_tokens == 3
    assert stream.flush() == ""


def test_a_place_without_a_tokenizer_is_a_setting_to_mend(tmp_path: Path) -> None:
    """The error names the settings."""
    with pytest.raises(ConfigError, match="L4_TOKENIZER"):
        text_factory(str(tmp_path))
