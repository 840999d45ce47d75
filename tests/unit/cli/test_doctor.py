"""The doctor: every finding with what to do, the exit code, and a report that programs can read."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from l4queue import cli
from l4queue.cli import engine_checks
from l4queue.cli.doctor import Check, CheckResult, run_checks
from l4queue.cli.server import ServerFacts
from l4queue.cli.stack import own_models
from l4queue.cli.stack.embedded import EmbeddedRedis, free_port
from l4queue.config import Settings
from l4queue.hardware import EngineBuild


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An emulated engine, no Redis, no settings of the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L4_ENGINE", "emulated")
    monkeypatch.setenv("L4_MODEL", "tiny")
    monkeypatch.setenv("L4_FLOWER_PORT", str(free_port()))
    monkeypatch.setenv("L4_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")


def found(name: str, tmp_path: Path) -> Check:
    return next(check for check in run_checks(tmp_path / "data") if check.name == name)


def test_a_redis_that_was_named_and_is_away_fails_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    """And the report says what to do."""
    assert cli.main(["doctor"]) == 1

    lines = capsys.readouterr().out.splitlines()
    broken = next(i for i, line in enumerate(lines) if line.startswith("fail"))
    assert "Redis" in lines[broken]
    assert "cannot be reached" in lines[broken]
    assert "L4_REDIS_URL" in lines[broken + 1]


@pytest.mark.parametrize("name", ["redis_url", "celery_broker_url"])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://:hunter#2@host/0", "it cannot be read"),
        ("redis://host/zero", "/zero is no database"),
        ("redis://:hunter2@127.0.0.1:1/0", "cannot be reached"),
        ("unix://:hunter2@/nonexistent.sock", "cannot be reached"),
    ],
)
def test_a_wrong_url_is_a_line_of_the_report_without_its_password(
    name: str, url: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of queue and broker; all other checks are done as well."""
    monkeypatch.setenv(f"L4_{name.upper()}", url)

    assert cli.main(["doctor"]) == 1

    output = capsys.readouterr()
    row = "Redis" if name == "redis_url" else "broker"
    assert any(line.startswith("fail") and row in line and says in line for line in output.out.splitlines())
    assert "memory" in output.out
    assert "hunter" not in output.out + output.err


@pytest.mark.services
def test_a_sound_machine_passes_and_the_report_is_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a real Redis in the default durability."""
    with EmbeddedRedis(tmp_path / "redis", port=0) as redis:
        monkeypatch.setenv("L4_REDIS_URL", redis.url)

        assert cli.main(["doctor", "--json"]) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert verdicts["Redis"] == verdicts["durability"] == verdicts["redis-server"] == "ok"


@pytest.mark.services
def test_weak_durability_is_a_warning_with_the_settings_that_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`everysec` does not keep what `strict` promises, but is what `fast` is."""
    with EmbeddedRedis(tmp_path / "redis", port=0, durability="fast") as redis:
        monkeypatch.setenv("L4_REDIS_URL", redis.url)
        strict = found("durability", tmp_path)
        monkeypatch.setenv("L4_DURABILITY", "fast")
        fast = found("durability", tmp_path)

    assert strict.verdict is CheckResult.WARN
    assert strict.advice is not None
    assert "appendfsync always" in strict.advice
    assert fast.verdict is CheckResult.OK


def test_a_redis_without_config_is_not_vouched_for() -> None:
    """Managed services forbid CONFIG."""
    facts = ServerFacts(product="Redis", version=(7, 2, 4), config=None)

    assert not facts.keeps_promise("fast")
    assert "unknown" in facts.durability_text


@pytest.mark.parametrize(
    ("product", "version", "is_new_enough"),
    [
        ("Redis", (6, 0, 16), False),
        ("Redis", (6, 2, 0), True),
        ("Redis", (8, 0, 1), True),
        ("Valkey", (8, 1, 0), True),
    ],
)
def test_versions(product: str, version: tuple[int, ...], is_new_enough: bool) -> None:
    """Redis from 6.2 on, every Valkey."""
    assert ServerFacts(product=product, version=version, config=None).is_new_enough is is_new_enough


def test_a_port_in_use_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setenv("L4_FLOWER_PORT", str(listener.getsockname()[1]))

        check = found("Flower's port", tmp_path)

    assert check.verdict is CheckResult.WARN
    assert "in use" in check.detail


def test_a_model_that_is_not_there_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing directory and one without a model in it."""
    monkeypatch.setenv("L4_MODEL", str(tmp_path / "missing"))
    assert found("model", tmp_path).verdict is CheckResult.FAIL
    monkeypatch.setenv("L4_MODEL", str(tmp_path))
    check = found("model", tmp_path)

    assert check.verdict is CheckResult.FAIL
    assert "no config.json" in check.detail


@pytest.mark.parametrize(("version", "verdict"), [((3, 12, 1), CheckResult.OK), ((3, 14, 0), CheckResult.WARN)])
def test_pythons_beyond_the_pinned_lists_are_a_warning(
    version: tuple[int, int, int], verdict: CheckResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lists are resolved for 3.11 to 3.13."""
    monkeypatch.setattr(sys, "version_info", version)

    assert found("Python", tmp_path).verdict is verdict


@pytest.mark.parametrize(
    ("max_model_len", "verdict", "says"),
    [
        (None, CheckResult.OK, "the model holds 512 tokens of one request; the limit is 512"),
        (100, CheckResult.OK, "the limit is 100"),
        (513, CheckResult.FAIL, "holds 512 tokens, and L4_MAX_MODEL_LEN is 513"),
    ],
)
def test_a_limit_beyond_the_model_fails(
    max_model_len: int | None, verdict: CheckResult, says: str, tmp_path: Path
) -> None:
    """As the workers would."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    given = {} if max_model_len is None else {"max_model_len": max_model_len}
    (check,) = engine_checks._check_length(Settings(engine="vllm", model=str(tmp_path), **given))

    assert (check.verdict, says in check.detail) == (verdict, True)


@pytest.mark.parametrize(
    ("kind", "has_compiler", "disabled", "verdict"),
    [
        ("cpu", False, None, CheckResult.OK),
        ("cpu", False, "0", CheckResult.FAIL),
        ("cpu", True, "0", CheckResult.WARN),
        ("gpu", False, None, CheckResult.FAIL),
        ("gpu", True, None, CheckResult.OK),
    ],
)
def test_a_compiler_is_missed_where_something_is_compiled(
    kind: Literal["cpu", "gpu"],
    has_compiler: bool,
    disabled: str | None,
    verdict: CheckResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton compiles on GPUs; on CPUs nothing is compiled unless the user wants it."""
    if has_compiler:
        (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    if disabled is not None:
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", disabled)
    (check,) = engine_checks._check_compiler(Settings(engine="vllm"), EngineBuild(kind=kind, version="0"))

    assert check.verdict is verdict


def test_the_model_is_the_one_that_up_would_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is set: smollm2 if it is installed, and its length."""
    monkeypatch.setenv("L4_ENGINE", "vllm")
    monkeypatch.delenv("L4_MODEL")
    monkeypatch.setattr(engine_checks, "_run_python", lambda *_: None)  # vLLM need not be imported for this
    for is_installed, name in ((True, "smollm2"), (False, "tiny")):
        monkeypatch.setattr(own_models, "is_smollm2_installed", lambda is_installed=is_installed: is_installed)
        assert found("model", tmp_path).detail.startswith(f"{name}")
    monkeypatch.setattr(own_models, "is_smollm2_installed", lambda: True)
    assert "the model holds 8192 tokens" in found("length", tmp_path).detail


def test_each_finding_is_shown_as_it_comes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The import of an engine takes up to a minute on a busy machine; what is before it stands there by then."""
    shown_before = []

    def checked(*_: object) -> Iterator[Check]:
        shown_before.append(capsys.readouterr().out)
        yield Check(name="engine", verdict=CheckResult.OK, detail="here")

    monkeypatch.setattr(engine_checks, "engine_checks", checked)
    cli.main(["doctor"])

    assert [line.split()[1] for line in shown_before[0].splitlines() if not line.startswith(" ")] == [
        "Python", "redis-server", "Redis",
    ]  # fmt: skip
