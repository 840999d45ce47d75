"""Settings from the environment and from .env: what cannot be used is a ConfigError that names it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from l4queue.config import Settings, _warn_of_misspelt, client_settings, load_settings, misspelt
from l4queue.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RESULT_TTL_S", "inf"),
        ("RESULT_TTL_S", "nan"),
        ("RESULT_TTL_S", "1e400"),
        ("RESULT_TTL_S", "1e300"),
        ("LEASE_S", "inf"),
        ("MAX_MODEL_LEN", "9" * 5000),
        ("MAX_MODEL_LEN", "9" * 400),
        ("BACKGROUND_PRIORITY", str(-(2**53) - 1)),
        ("NAMESPACE", "a\n"),
        ("NAMESPACE", "{a}"),
        ("MODEL", "\udcff"),  # a byte that is no UTF-8, as the environment gives it
        ("MODEL", "m" * 4097),
        ("MAX_RUNNING", "1.5"),
    ],
)
def test_a_value_that_cannot_be_used_names_its_variable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is computed with it."""
    monkeypatch.setenv(f"L4_{name}", value)
    with pytest.raises(ConfigError, match=f"^L4_{name}: ") as caught:
        load_settings()
    assert str(caught.value).encode()


@pytest.mark.parametrize("content", [b"L4_MODEL=\xff\n", b"\xff\xfe\x00"])
def test_a_file_of_settings_that_is_no_text_is_told(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the one of the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes(content)
    with pytest.raises(ConfigError, match="env cannot be read"):
        load_settings()


def test_a_misspelt_variable_is_named_with_the_one_that_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, in the environment and in `.env`. Variables of tests and of Kubernetes are none of our business."""
    names = ["L4_MODLE", "l4_redisurl", "L4_TEST_SEED", "L4_SERVICE_HOST", "L4_MODEL", "l4_model", "MODLE"]
    assert misspelt(names) == {"L4_MODLE": "L4_MODEL", "l4_redisurl": "L4_REDIS_URL"}

    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("L4_NAMESPCE=x\n")
    monkeypatch.setenv("L4_MODLE", "tiny")
    _warn_of_misspelt.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_settings()
        load_settings()
    assert [str(warning.message) for warning in caught] == [
        "L4_MODLE is no setting of l4queue; did you mean L4_MODEL?",
        "L4_NAMESPCE is no setting of l4queue; did you mean L4_NAMESPACE?",
    ]


@pytest.mark.parametrize(
    ("name", "told"),
    [("max_backlog_token", "; did you mean max_backlog_tokens?"), ("L4_MODEL", ""), ("zzz", "")],
)
def test_an_argument_that_is_no_setting_is_refused(name: str, told: str) -> None:
    """It would have no effect."""
    with pytest.raises(ConfigError) as caught:
        Settings(**{name: 1})  # type: ignore[arg-type]
    assert str(caught.value) == f"{name} is no setting of l4queue{told}"


def test_other_variables_of_a_file_are_no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.env` belongs to other programs, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("L4_ELSE=1\nDASHBOARD_PASSWORD=x\nL4_NAMESPACE=mine\n", "utf-8")
    assert Settings().namespace == "mine"


def test_settings_given_to_a_client_find_the_redis_of_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the environment do, unless they name one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("L4_REDIS_URL", raising=False)
    (tmp_path / ".l4queue").mkdir()
    (tmp_path / ".l4queue/url").write_text("redis://:secret@127.0.0.1:7777/0", "utf-8")
    found = client_settings(Settings(namespace="mine"))
    assert (found.redis_url.reveal(), found.namespace) == ("redis://:secret@127.0.0.1:7777/0", "mine")
    named = client_settings(Settings(redis_url="redis://elsewhere"))  # type: ignore[arg-type]
    assert named.redis_url.reveal() == "redis://elsewhere"
    assert client_settings(None).redis_url == found.redis_url
