"""What the commands about requests print for programs."""

from __future__ import annotations

import json

import pytest

from l4queue.cli.requests import _print_result
from l4queue.client.core import Result


def test_a_result_for_programs_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its text has; letters of any script stand for themselves."""
    text = "Größe\u2028次\u2029\x85\n"
    found = Result(
        request_id="a",
        text=text,
        token_ids=(1,),
        finish_reason="stop",
        prompt_tokens=1,
        output_tokens=1,
        resumed=False,
        stage="0",
        worker="w",
        ttft_s=0.1,
        tpot_s=None,
        e2e_s=0.2,
        metadata=None,
    )
    _print_result(found, as_json=True)
    printed = capsys.readouterr().out

    assert len(printed.splitlines()) == 1
    assert json.loads(printed)["text"] == text
    assert "Größe" in printed
