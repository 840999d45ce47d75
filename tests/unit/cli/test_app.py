"""The command line as a whole: exit codes, one-line errors, start-up without heavy imports."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
import typer

from l4queue import cli
from l4queue.errors import ConfigError


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    """`--help` must be quick, so neither arrays nor Redis nor pydantic may be loaded for it."""
    program = (
        "import sys, l4queue.cli\n"
        "code = l4queue.cli.main(['--help'])\n"
        "heavy = {'numpy', 'redis', 'pydantic', 'rich', 'scipy', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'heavy: {heavy}' if heavy else code)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )

    assert done.returncode == 0, done.stderr
    for name in ("up", "demo", "enqueue", "result", "status", "cancel", "stats", "simulate", "dead", "doctor"):
        assert f"\n  {name} " in done.stdout


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing else is printed."""
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == version("l4queue") + "\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["up", "--workers", "0"], ["up", "--nonsense"], []])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    """Whatever is wrong about the command line."""
    assert cli.main(arguments) == 2


@pytest.mark.parametrize(
    ("raised", "code", "stderr"),
    [
        (ConfigError("L4_X: no"), 1, "error: L4_X: no\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(3), 3, ""),
    ],
)
def test_what_a_command_raises_decides_the_exit_code(
    raised: BaseException,
    code: int,
    stderr: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Our errors are one line; Ctrl-C is quiet."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)

    @app.command()
    def boom() -> None:
        raise raised

    monkeypatch.setattr(cli, "build_app", lambda: app)

    assert cli.main(["boom"]) == code
    assert capsys.readouterr().err == stderr


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors of l4queue are made short."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)

    @app.command()
    def boom() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "build_app", lambda: app)

    with pytest.raises(ZeroDivisionError):
        cli.main(["boom"])


def test_a_wrong_setting_is_one_line_that_names_the_variable() -> None:
    """In a process of its own, as a user meets it."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, l4queue.cli; sys.exit(l4queue.cli.main())", "up"],
        env={"L4_LEASE_S": "never", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: L4_LEASE_S: ")
    assert done.stderr.count("\n") == 1
