"""The demo's prompts and the answers that it shows."""

from __future__ import annotations

import numpy as np
import pytest

from l4queue.cli.demo import examples
from l4queue.cli.demo_prompts import Prompt, mixed_prompts
from l4queue.client import Result


def result(prompt_tokens: int, text: str, finish_reason: str = "stop") -> Result:
    return Result(
        request_id="r", text=text, token_ids=(1,), finish_reason=finish_reason, prompt_tokens=prompt_tokens,
        output_tokens=1, resumed=False, stage="0", worker="w", ttft_s=0.1, tpot_s=None, e2e_s=0.1, metadata=None,
    )  # fmt: skip


def prompt(text: str) -> Prompt:
    return Prompt(text=text, target_tokens=100, max_tokens=8)


def test_three_answers_of_each_class_are_shown_and_no_prompt_twice() -> None:
    """Shortest class first; empty answers are no example, cut ones say so."""
    short = [(prompt(f"q{n}"), result(10, f"a{n}")) for n in range(5)]
    answered = [
        (prompt("page"), result(300, "a page", "length")),
        (prompt("q0"), result(10, "a0")),
        (prompt("empty"), result(10, " \n")),
        *short,
    ]
    shown = examples(answered)
    assert [(a.length_class, a.prompt, a.text, a.is_cut) for a in shown] == [
        ("short", "q0", "a0", False),
        ("short", "q1", "a1", False),
        ("short", "q2", "a2", False),
        ("medium", "page", "a page", True),
    ]


@pytest.mark.parametrize("chars_per_token", [1.0, 4.1])
def test_prompts_fit_their_target_and_begin_with_what_is_asked(chars_per_token: float) -> None:
    """The same for the same seed; texts are as long as their targets allow."""
    draw = {"max_prompt_tokens": 4000, "min_output": 32, "max_output": 160, "chars_per_token": chars_per_token}
    prompts = mixed_prompts(300, rng=np.random.default_rng(3), **draw)
    assert prompts == mixed_prompts(300, rng=np.random.default_rng(3), **draw)
    assert all(32 <= p.max_tokens <= 160 for p in prompts)
    questions = [p for p in prompts if p.target_tokens < 80]
    assert questions
    assert all(p.text.endswith(("?", ".")) and "\n" not in p.text for p in questions)
    for one in prompts:
        if one not in questions:
            task, _, text = one.text.partition("\n\n")
            assert task.endswith(".")
            assert len(text) <= (one.target_tokens - 16) * chars_per_token
    assert max(p.target_tokens for p in prompts) > 3000
