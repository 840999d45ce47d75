"""What importing the client brings, and what it does without."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "celery",
    "flower",
    "matplotlib",
    "numpy",
    "prometheus_client",
    "psutil",
    "rich",
    "scipy",
    "torch",
    "typer",
)
LATER = ("opentelemetry", "pydantic_settings", "redis")


def run(code: str, *, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where these packages cannot be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
    return subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, check=False)


def test_the_client_imports_neither_numpy_nor_the_command_line() -> None:
    """Nor redis-py and the settings, which a client that is made brings."""
    code = "import l4queue.client; import sys; print({name.partition('.')[0] for name in sys.modules})"
    done = run(code)
    assert done.returncode == 0, done.stderr
    loaded = {name.strip("{}' ") for name in done.stdout.strip().split(",")}
    assert not loaded & {*HEAVY, *LATER}
    assert "l4queue" in loaded


def test_a_client_needs_none_of_the_extras() -> None:
    """It is made, validates and waits for Redis."""
    code = """
from l4queue import Client, ServiceUnavailable
client = Client("redis://127.0.0.1:1", timeout_s=0)
try:
    client.enqueue("x", max_tokens=1, stop="a")
except ServiceUnavailable:
    print("away")
"""
    done = run(code, without=HEAVY)
    assert (done.returncode, done.stdout) == (0, "away\n"), done.stderr


def test_a_batch_names_the_extra_that_it_needs() -> None:
    """numpy keeps its index."""
    code = """
from l4queue import Client, ConfigError
try:
    Client("redis://127.0.0.1:1").run_batch("in", "out")
except ConfigError as error:
    print(error)
"""
    done = run(code, without=HEAVY)
    assert done.stdout == "a batch needs numpy: pip install 'l4queue[batch]'\n", done.stderr


@pytest.mark.parametrize(
    ("without", "told"),
    [(("typer",), "this command needs typer, which is not installed: pip install 'l4queue[cli]'")],
)
def test_a_command_names_the_extra_that_it_needs(without: tuple[str, ...], told: str) -> None:
    """In one line."""
    done = run("from l4queue.__main__ import main; sys.exit(main())", without=without)
    assert (done.returncode, done.stderr) == (1, f"error: {told}\n")


def test_the_package_is_the_command() -> None:
    """`python -m l4queue` is `l4queue`; it can complete its words."""
    done = subprocess.run([sys.executable, "-m", "l4queue", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: l4queue" in done.stdout
    assert "--install-completion" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "l4queue"],
        env={"_L4QUEUE_COMPLETE": "complete_bash", "COMP_WORDS": "l4queue enq", "COMP_CWORD": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["enqueue"], done.stderr
