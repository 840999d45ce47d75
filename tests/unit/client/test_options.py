"""The typed surface of the client: what an editor completes, `help` shows and mypy refuses."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import l4queue
from l4queue import AsyncClient, Client, EnqueueOptions, RequestFields, SamplingOptions, errors
from l4queue.models import RequestSpec, SamplingParams

ROOT = Path(__file__).parents[3]
GOOD = Path(__file__).with_name("typed_program.py")
BAD = """
from l4queue import AsyncClient, Client

def wrong(client: Client) -> None:
    client.enqueue("hi", max_token=3)
    client.enqueue("hi", max_tokens="many")
    client.enqueue_many([{"promt": "hi"}])
    client.enqueue_many(["hi"], max_token=3)
    client.run_batch("in", "out", max_inflight=3)
    client.enqueue(["a", "b"])
    print(client.enqueue("hi").status().offset)

async def wrong_too(client: AsyncClient) -> None:
    await client.enqueue("hi", max_token=3)
"""


def test_options_are_those_of_a_request() -> None:
    """A parameter that is added is typed, shown and explained, too."""
    assert set(SamplingOptions.__annotations__) == set(SamplingParams.model_fields)
    assert set(RequestFields.__annotations__) == set(SamplingParams.model_fields) | set(RequestSpec.model_fields)
    shown = inspect.signature(Client.enqueue).parameters
    assert set(shown) == {"self", *RequestFields.__annotations__}
    assert all(f"`{name}`" in str(Client.enqueue.__doc__) for name in EnqueueOptions.__annotations__)


def test_both_clients_have_the_same_calls() -> None:
    """The same names, arguments and words."""
    for name, call in inspect.getmembers(Client, inspect.isfunction):
        if not name.startswith("_") and name != "run_batch":
            other = getattr(AsyncClient, name)
            assert inspect.signature(call).parameters.keys() == inspect.signature(other).parameters.keys()
    plain = re.sub(r"[()]|await ", "", str(AsyncClient.enqueue.__doc__))
    assert plain == re.sub(r"[()]", "", str(Client.enqueue.__doc__))


def test_every_public_name_is_at_the_top() -> None:
    """Errors as well, also in what a shell completes before anything is loaded."""
    assert set(l4queue.__all__) <= set(dir(l4queue))
    assert not {"Any", "TYPE_CHECKING", "annotations"} & set(dir(l4queue))
    assert {name for name in errors.__all__ if name != "PortableError"} <= set(l4queue.__all__)
    for name in l4queue.__all__:
        assert getattr(l4queue, name).__name__ == name


def test_a_strict_program_is_checked(tmp_path: Path) -> None:
    """By mypy, against the installed package: a right program passes, each mistake of a wrong one is found."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "as_installed.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    bad = tmp_path / "bad.py"
    bad.write_text(BAD)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--config-file=",
        "--hide-error-context",
    ]
    command += ["--python-executable", str(python), "--cache-dir", str(tmp_path / "cache"), str(GOOD), str(bad)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    found = [line for line in done.stdout.splitlines() if ": error:" in line]
    wrong_lines = [i for i, line in enumerate(BAD.splitlines(), 1) if line.startswith("    ")]
    assert {int(line.split(":")[1]) for line in found} == set(wrong_lines), done.stdout + done.stderr
    assert all(line.startswith(str(bad.name)) or str(bad) in line for line in found)
    assert sum('did you mean "max_tokens"?' in line for line in found) == 3
    assert any('did you mean "max_in_flight"?' in line for line in found)
