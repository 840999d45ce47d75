"""API keys: from a setting and a file, plain or as digests, each a caller."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway.keys import ApiKeys, read_keys
from gateway.server import check_door
from l4queue.config import Settings
from l4queue.errors import ConfigError
from l4queue.protocol.limits import Allowance

ANN, BOB = "ann-has-a-long-key", "bob-has-another-key"


def test_a_key_is_a_caller(tmp_path: Path) -> None:
    """Plain and by its digest; a wrong one, another scheme or none is nobody."""
    file = tmp_path / "keys"
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    file.write_text(f"# who may come in\nann {ANN}  # until May\n\nbob sha256:{digest}\n")
    keys = ApiKeys(key="a-key-of-the-setting", file=str(file))
    assert keys.caller(f"Bearer {ANN}") == "ann"
    assert keys.caller(f"bearer {BOB}") == "bob"
    assert keys.caller("Bearer a-key-of-the-setting") == "default"
    for wrong in ("", ANN, f"Basic {ANN}", f"Bearer {ANN}x", f"Bearer sha256:{digest}", "Bearer "):
        assert keys.caller(wrong) is None
    assert BOB not in repr(keys)


def test_without_keys_everybody_is_let_in() -> None:
    """Under no name."""
    assert ApiKeys(key="", file="").caller("") == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ann", "line 1: give a name"),
        ("ann short", "line 1: a key has at least 16"),
        (f"ann {ANN}\nann {BOB}", "line 2: the name ann is there already"),
        (f"ann {ANN}\nbob {ANN}", "line 2: the key is that of ann"),
        (f"an/n {ANN}", "line 1: give a name"),
        ("# nobody", "has no key"),
        (f"ann {ANN} tokens_per_minute=0", "line 1: behind the key give requests_per_minute=N"),
        (f"ann {ANN} requests=5", "line 1: behind the key give"),
        (f"ann {ANN} expires=tomorrow", "line 1: expires is a date"),
        ("\n".join(f"n{i} key-number-{i:06}" for i in range(1001)), "line 1001: there are more than 1000 keys"),
    ],
)
def test_a_bad_file_is_told(tmp_path: Path, text: str, why: str) -> None:
    """With its line, and without the key."""
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=why) as told:
        ApiKeys(key="", file=str(file))
    assert ANN not in str(told.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys(key="", file=str(tmp_path / "none"))


def test_a_key_has_limits_and_an_end(tmp_path: Path) -> None:
    """A day is that of UTC; a key without any is bounded by nothing."""
    file = tmp_path / "keys"
    limits = "requests_per_minute=60 tokens_per_minute=90000 backlog_tokens=20000"
    file.write_text(f"ann {ANN} {limits} expires=2999-01-31\nbob {BOB} expires=2020-01-31T12:00:00+02:00\n")
    keys = ApiKeys(key="a-key-of-the-setting", file=str(file))
    assert keys.caller(f"Bearer {ANN}") == "ann"
    assert keys.caller(f"Bearer {BOB}") is None
    wanted = Allowance(requests_per_minute=60, tokens_per_minute=90_000, backlog_tokens=20_000)
    assert keys.allowance("ann") == wanted
    assert not keys.allowance("default")
    assert not keys.allowance("")
    found = read_keys(key="", file=str(file))["bob"]
    assert datetime.fromtimestamp(found.expires_s, UTC) == datetime(2020, 1, 31, 10, tzinfo=UTC)


def test_a_file_that_changes_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A wrong or missing one lets in whom the last good one did."""
    file = tmp_path / "keys"
    file.write_text(f"ann {ANN}\n")
    keys = ApiKeys(key="", file=str(file))
    file.write_text(f"bob {BOB} requests_per_minute=7\n# and a line more\n")
    assert [keys.caller(f"Bearer {key}") for key in (ANN, BOB)] == [None, "bob"]
    assert keys.allowance("bob").requests_per_minute == 7
    file.write_text(f"bob {BOB} requests_per_minute=70 # seen by a batch, without a request\n")
    assert keys.allowance("bob").requests_per_minute == 70
    for breaking in (lambda: file.write_text("ann\n"), lambda: file.write_text("\n"), file.unlink):
        breaking()
        assert [keys.caller(f"Bearer {key}") for key in (ANN, BOB)] == [None, "bob"]
    assert caplog.text.count("the API keys of before are in force") == 3
    assert BOB not in caplog.text


def test_without_a_key_only_this_machine_is_let_in() -> None:
    """Another address is refused, with what to do."""
    assert check_door(Settings()).caller("") == ""
    assert check_door(Settings(http_host="::1")).caller("") == ""
    assert check_door(Settings(http_host="0.0.0.0", http_key=SecretStr(ANN))).caller(f"Bearer {ANN}") == "default"
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.org"):
        with pytest.raises(ConfigError, match="lets other machines in, and no key is set"):
            check_door(Settings(http_host=host))
