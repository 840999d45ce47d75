"""Sampling parameters against vLLM's own checks: what it accepts is accepted, but for the bounds named here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.translate import options_of
from l4queue.client.arguments import build_spec
from l4queue.errors import ConfigError
from l4queue.models import SamplingParams
from tests.unit.test_model_config import CONFIGS, write
from workers.engine.base import EngineRequest
from workers.engine.vllm.serve_options import engine_options
from workers.engine.vllm.translate import sampling_params

pytestmark = [pytest.mark.vllm]

INF, NAN = math.inf, math.nan
GRID: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1e-9, 0.005, 1, 2, 2.0, 2.0000001, 2.5, 100.0, -0.1, INF, NAN],
    "top_p": [0, 0.0, 1e-9, 0.5, 1, 1.0, 1.1, -0.1, INF, NAN],
    "top_k": [-2, -1, 0, 1, 5, 8192, 10**6, 2**31 - 1, 2**31, 2**70, 5.0],
    "min_p": [0, 0.0, 0.5, 1, 1.0, 1.1, -0.1, NAN],
    "presence_penalty": [-2, -2.0, 0, 2, 2.0, 2.1, -2.1, INF, NAN],
    "frequency_penalty": [-2, -2.0, 0, 2, 2.0, 2.1, -2.1, INF, NAN],
    "repetition_penalty": [0, 0.0, 1e-6, 1, 10.0, 11, 1e9, -1.0, INF, NAN],
    "seed": [None, -1, 0, 7, -2, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1],
    "stop": [
        None,
        "\n",
        "",
        [],
        ["\n"],
        ["a", "b"],
        [""],
        ["a", ""],
        "x" * 256,
        "x" * 257,
        ["x"] * 16,
        ["x"] * 17,
    ],
    "stop_token_ids": [None, [], [0], [5, 5], [-1], [2**31 - 1], [2**31], list(range(64)), list(range(65)), [1.0]],
    "min_tokens": [0, 1, 16, 1000, 2**40, -1],
    "max_tokens": [None, 1, 16, 10**6, 10**6 + 1, 0, -1],
    "logprobs": [None, 0, 1, 20, 21, -1, -2],
    "ignore_eos": [False, True],
    "logit_bias": [None, {}, {5: 1.5}, {0: 100, 8191: -100}, {5: 101.0}, {-1: 1.0}, {5: NAN}],
    "allowed_token_ids": [None, [5], [0, 8191], [-1]],
    "bad_words": [None, [], ["a"], ["a b", "c"], [""], ["x" * 257]],
    "skip_special_tokens": [False, True],
}
"""Values at and around every bound."""


def _any(values: Any, is_out: Callable[[Any], bool]) -> bool:
    return any(map(is_out, values)) if isinstance(values, list) else False


OWN_BOUNDS: dict[str, Callable[[Any], bool]] = {
    "top_k": lambda value: value >= 2**31,
    "seed": lambda value: not -(2**63) <= value < 2**63,
    "stop": lambda value: len(value) > 16 if isinstance(value, list) else len(value) > 256,
    "stop_token_ids": lambda value: len(value) > 64 or _any(value, lambda token: not 0 <= token < 2**31),
    "max_tokens": lambda value: value is not None and value > 10**6,
    "logprobs": lambda value: value == -1 or value > 20,
    "min_tokens": lambda value: value > 10**6,
    "logit_bias": lambda value: any(token < 0 or not -100 <= bias <= 100 for token, bias in value.items()),
    "allowed_token_ids": lambda value: _any(value, lambda token: token < 0),
    "bad_words": lambda value: _any(value, lambda text: len(text) > 256),
}
"""What vLLM's parameters accept and we do not: docs/requests.md names each of them."""


def ours(values: dict[str, Any]) -> SamplingParams | None:
    """Our parameters, or None when they are refused."""
    try:
        return SamplingParams.model_validate(values)
    except ValidationError:
        return None


def vllm_accepts(values: dict[str, Any]) -> bool:
    """Whether vLLM's own class does."""
    from vllm import SamplingParams as VllmParams
    from vllm.exceptions import VLLMValidationError

    try:
        VllmParams(**{"max_tokens": None, **values})
    except (VLLMValidationError, TypeError):
        return False
    return True


def translated(params: SamplingParams) -> Any:
    """As a worker asks vLLM."""
    most = params.max_tokens or params.tokens_that_fit(10**6)
    request = EngineRequest(
        request_id="a",
        token_ids=[1],
        max_tokens=most,
        min_tokens=min(params.min_tokens, most),
        params=params,
        priority=0,
        num_resumed=0,
        kv="",
    )
    return sampling_params(request)


@pytest.mark.parametrize("name", GRID)
def test_one_parameter_is_accepted_where_vllm_accepts_it(name: str) -> None:
    """At, below and above every bound; the exceptions are named, and are exceptions."""
    for value in GRID[name]:
        accepted = ours({name: value})
        if accepted is not None:
            assert vllm_accepts({name: value}), value
            translated(accepted)
        elif vllm_accepts({name: value}):
            assert OWN_BOUNDS[name](value), value


def test_every_parameter_has_a_grid() -> None:
    """A new one is compared too."""
    assert GRID.keys() == SamplingParams.model_fields.keys() - {"structured_outputs"}


MIXED = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(-0.5, 3.0) | st.integers(-1, 3),
        "top_p": st.floats(-0.5, 1.5),
        "top_k": st.integers(-3, 2**31),
        "min_p": st.floats(-0.5, 1.5),
        "presence_penalty": st.floats(-3.0, 3.0),
        "frequency_penalty": st.floats(-3.0, 3.0),
        "repetition_penalty": st.floats(allow_nan=True, allow_infinity=True),
        "seed": st.none() | st.integers(-(2**64), 2**64),
        "stop": st.none() | st.text(max_size=300) | st.lists(st.text(max_size=3), max_size=20),
        "stop_token_ids": st.none() | st.lists(st.integers(-2, 2**32), max_size=70),
        "min_tokens": st.integers(-1, 20),
        "max_tokens": st.none() | st.integers(-1, 20) | st.integers(10**6 - 1, 10**6 + 1),
        "logprobs": st.none() | st.integers(-2, 22),
        "ignore_eos": st.booleans(),
    },
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=MIXED)
def test_any_parameters_are_accepted_where_vllm_accepts_them(values: dict[str, Any]) -> None:
    """Together, as requests have them; what all logprobs of a request may take is a bound of ours."""
    accepted = ours(values)
    if accepted is not None:
        assert vllm_accepts(values)
        translated(accepted)
    elif vllm_accepts(values):
        logprobs = (values.get("logprobs") or 0) + 1 if values.get("logprobs") is not None else 0
        is_bounded = any(is_out(values[n]) for n, is_out in OWN_BOUNDS.items() if values.get(n) is not None)
        stop = values.get("stop")
        has_long_stop = isinstance(stop, list) and any(len(text) > 256 for text in stop)
        assert is_bounded or has_long_stop or logprobs * (values.get("max_tokens") or 0) > 2**20


@pytest.mark.parametrize(
    ("given_", "name", "expected"),
    [
        ({"top_k": -1}, "top_k", 0),
        ({"seed": -1}, "seed", None),
        ({"stop": "\n"}, "stop", ["\n"]),
        ({"temperature": 0.001}, "temperature", 0.01),
    ],
)
def test_values_mean_what_they_mean_in_vllm(given_: dict[str, Any], name: str, expected: Any) -> None:
    """The same end up in both; our stop strings are found by the worker."""
    from vllm import SamplingParams as VllmParams

    params = SamplingParams.model_validate(given_)
    wanted = getattr(VllmParams(**given_), name)
    found = list(params.stop) if name == "stop" else getattr(translated(params), name)
    assert found == expected
    assert wanted in (expected, -1)  # vLLM has two spellings for every token


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_as_long_as_vllm_says(name: str, tmp_path: Path) -> None:
    """Dispatchers read the length without vLLM."""
    from vllm.config.model import _get_and_verify_max_len
    from vllm.transformers_utils.config import get_config, get_hf_text_config
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    config, held = CONFIGS[name]
    full = get_config(str(write(tmp_path / "m", config)), trust_remote_code=False)
    text = get_hf_text_config(full)
    stated = ModelArchConfigConvertorBase(full, text).derive_max_model_len_and_key()
    length = _get_and_verify_max_len(
        hf_config=text,
        model_arch_config=SimpleNamespace(derived_max_model_len_and_key=stated),
        tokenizer_config=None,
        max_model_len=None,
        disable_sliding_window=False,
        sliding_window=None,
    )
    assert length == held


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("", {}),
        ("--revision v2 --trust-remote-code", {"revision": "v2", "trust_remote_code": True}),
        ("--kv_cache_dtype=fp8 --quantization fp8", {"kv_cache_dtype": "fp8", "quantization": "fp8"}),
        ("--no-enable-prefix-caching -pp 2", {"enable_prefix_caching": False, "pipeline_parallel_size": 2}),
        (
            "--speculative-config.method ngram --speculative-config.num_speculative_tokens 3",
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        ),
        ("--tool-call-parser hermes --port 1 --enable-lora", {"enable_lora": True}),
    ],
)
def test_options_of_vllm_serve_reach_the_engine(line: str, arguments: dict[str, Any]) -> None:
    """Those of the HTTP server are not the engine's; what is not named keeps its default."""
    assert engine_options(line) == arguments


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--no-such-thing 3", "unrecognized arguments: --no-such-thing"),
        ("--seed x", "argument --seed: invalid int value"),
        ("--dtype float16", "--dtype is L4_DTYPE here"),
        ("--max-model-len auto", "--max-model-len is L4_MAX_MODEL_LEN here"),
        ("other/model", "the model is L4_MODEL here"),
        ("--scheduling_policy fcfs", "--scheduling-policy is l4queue's own"),
        ("--revision 'v2", "No closing quotation"),
    ],
)
def test_wrong_options_and_those_that_l4queue_owns_are_named(line: str, says: str) -> None:
    """In one error, without the page of vLLM's usage."""
    with pytest.raises(ConfigError, match=f"^L4_VLLM_ARGS: {re.escape(says)}"):
        engine_options(line)


def _short(**bounds: int) -> Any:
    return st.text(alphabet="abc <é", min_size=1, max_size=4) if not bounds else st.integers(**bounds)


OFFERED = st.fixed_dictionaries(
    {"max_tokens": _short(min_value=1, max_value=64)},
    optional={
        "min_tokens": st.integers(0, 70),
        "temperature": st.floats(0.0, 2.0),
        "top_p": st.floats(0.0, 1.0),
        "top_k": st.integers(-1, 100),
        "min_p": st.floats(0.0, 1.0),
        "seed": st.none() | st.integers(-1, 2**63 - 1),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "repetition_penalty": st.floats(0.0, 2.0),
        "stop": st.none() | _short() | st.lists(_short(), max_size=16),
        "stop_token_ids": st.none() | st.lists(_short(min_value=0, max_value=8191), max_size=64),
        "logprobs": st.none() | st.integers(0, 20),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "logit_bias": st.none() | st.dictionaries(st.integers(0, 8191), st.floats(-100.0, 100.0), max_size=5),
        "allowed_token_ids": st.none() | st.lists(st.integers(0, 8191), min_size=1, max_size=5),
        "bad_words": st.none() | st.lists(_short(), max_size=5),
    },
)
PASSED_ON = (*GRID.keys() - {"stop", "skip_special_tokens", "top_k", "seed", "logprobs"},)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=OFFERED)
def test_what_the_gateway_takes_from_vllm_comes_to_vllm_again(values: dict[str, Any]) -> None:
    """Through the gateway, the wire and a worker: accepted where vLLM accepts it, and the same."""
    from vllm import SamplingParams as VllmParams

    if not vllm_accepts(values):
        assert ours(values) is None
        return
    asked = VllmParams(**values)
    stored = build_spec(token_ids=[1], **options_of(asked)).params
    computed = translated(SamplingParams.model_validate_json(stored.model_dump_json()))
    for name in PASSED_ON:
        assert (getattr(computed, name) or None) == (getattr(asked, name) or None), name
    assert max(0, computed.top_k) == max(0, asked.top_k)
    assert (computed.seed, computed.logprobs) == (asked.seed, asked.logprobs)
    assert (list(stored.stop), stored.skip_special_tokens) == (asked.stop, asked.skip_special_tokens)


OBJECTS = ("{}", '{"type": "object"}')
TEXTS = ("[ab]", "root ::= [ab]", *OBJECTS)
LISTS: tuple[list[str], ...] = (["a"], ["a", "b"])
FITTING: dict[str, tuple[Any, ...]] = {
    "json": OBJECTS,
    "regex": TEXTS,
    "choice": LISTS,
    "grammar": TEXTS,
    "structural_tag": OBJECTS,
}
"""Values of each kind; vLLM's class takes all of them, its compilers refuse some."""
VALUES = st.sampled_from((*TEXTS, "", "a\0", *LISTS, [], None))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(given_=st.dictionaries(st.sampled_from(tuple(FITTING)), VALUES, max_size=2))
def test_a_constraint_is_taken_where_vllm_takes_it(given_: dict[str, Any]) -> None:
    """One kind, with a value of that kind; the worker gives it on as it is."""
    from vllm.sampling_params import StructuredOutputsParams

    told = {name: value for name, value in given_.items() if value is not None}
    is_one = len(told) == 1 and all(value in FITTING[name] for name, value in told.items())
    accepted = ours({"structured_outputs": given_})
    assert (accepted is not None) == is_one
    if accepted is not None:
        assert translated(accepted).structured_outputs == StructuredOutputsParams(**told)
