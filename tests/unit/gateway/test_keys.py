"""API keys: from a setting and a file, plain or as digests, each a caller."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway.keys import read_keys
from gateway.server import check_door
from l4queue.config import Settings
from l4queue.errors import ConfigError

ANN, BOB = "ann-has-a-long-key", "bob-has-another-key"


def test_a_key_is_a_caller(tmp_path: Path) -> None:
    """Plain and by its digest; a wrong one, another scheme or none is nobody."""
    file = tmp_path / "keys"
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    file.write_text(f"# who may come in\nann {ANN}  # until May\n\nbob sha256:{digest}\n")
    keys = read_keys(key="a-key-of-the-setting", file=str(file))
    assert keys.caller(f"Bearer {ANN}") == "ann"
    assert keys.caller(f"bearer {BOB}") == "bob"
    assert keys.caller("Bearer a-key-of-the-setting") == "default"
    for wrong in ("", ANN, f"Basic {ANN}", f"Bearer {ANN}x", f"Bearer sha256:{digest}", "Bearer "):
        assert keys.caller(wrong) is None
    assert BOB not in repr(keys)


def test_without_keys_everybody_is_let_in() -> None:
    """Under no name."""
    assert read_keys(key="", file="").caller("") == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ann", "line 1: give a name"),
        ("ann short", "line 1: a key has at least 16"),
        (f"ann {ANN}\nann {BOB}", "line 2: the name ann is there already"),
        (f"an/n {ANN}", "line 1: give a name"),
        ("# nobody", "has no key"),
    ],
)
def test_a_bad_file_is_told(tmp_path: Path, text: str, why: str) -> None:
    """With its line, and without the key."""
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=why) as told:
        read_keys(key="", file=str(file))
    assert ANN not in str(told.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(key="", file=str(tmp_path / "none"))


def test_without_a_key_only_this_machine_is_let_in() -> None:
    """Another address is refused, with what to do."""
    assert check_door(Settings()).digests == {}
    assert check_door(Settings(http_host="::1")).digests == {}
    assert check_door(Settings(http_host="0.0.0.0", http_key=SecretStr(ANN))).caller(f"Bearer {ANN}") == "default"
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.org"):
        with pytest.raises(ConfigError, match="lets other machines in, and no key is set"):
            check_door(Settings(http_host=host))
