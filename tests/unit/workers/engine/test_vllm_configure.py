"""Lengths that a KV cache does not hold, and complaints of vLLM in one line."""

from __future__ import annotations

import logging

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from l4queue.errors import ConfigError
from workers.engine.vllm.configure import VllmOptions, check_length, complaint


def options(max_model_len: int | None) -> VllmOptions:
    """Of a worker that wants this length."""
    return VllmOptions(
        model="m",
        max_model_len=max_model_len,
        max_running=1,
        dtype="auto",
        max_batched_tokens=None,
        tensor_parallel=1,
        gpu_memory_share=0.9,
        vllm_args="",
    )


def test_a_length_that_was_asked_for_is_held_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """One that follows from the model is shortened, and that is said."""
    with caplog.at_level(logging.WARNING):
        for max_model_len in (8192, None):
            check_length(options(max_model_len), wanted_tokens=8192, held_tokens=8192)
        assert not caplog.messages
        with pytest.raises(ConfigError, match="L4_MAX_MODEL_LEN is 8192, and the KV cache holds 5000 tokens"):
            check_length(options(8192), wanted_tokens=8192, held_tokens=5000)
        check_length(options(None), wanted_tokens=8192, held_tokens=5000)
    (said,) = caplog.messages
    assert said.startswith("the longest request has 5000 tokens, not the model's 8192")


class Strict(BaseModel):
    """Refuses all, as vLLM's configurations do."""

    name: str

    @field_validator("name")
    @classmethod
    def _refuse(cls, value: str) -> str:
        raise ValueError(f"{value} is not supported")


def test_complaints_are_told_without_their_wrapping() -> None:
    """Pydantic counts errors, repeats what it was given and links to a page of its own."""
    with pytest.raises(ValidationError) as caught:
        Strict(name="fp3")
    assert complaint(caught.value) == "fp3 is not supported"
    assert complaint(OSError("there is\n  no such model")) == "there is no such model"
