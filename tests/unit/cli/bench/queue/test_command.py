"""Options of `l4queue bench queue` are checked before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4queue import cli


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--peers", "bullmq,saq"), "--peers bullmq needs node and npm: install Node.js"),
        (("--peers", "nonsense"), "--peers: nonsense is unknown; choose from bullmq, saq"),
        (("--durability", "always"), "--durability: always is unknown"),
        (("--input", "words"), "--input: words is unknown"),
        (("--prompt-bytes", "200,4kB"), "--prompt-bytes: '4kB' is no number"),
    ],
)
def test_a_wrong_option_is_named(
    options: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A program that is missing, too."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["bench", "queue", *options]) == 1
    assert says in capsys.readouterr().err
