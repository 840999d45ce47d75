"""Entrants of the race: routers as their makers ship them before two `vllm serve`, and l4queue.

Routers run with their own defaults, one process for each policy. The engines have the tuning of l4queue's workers:
threads bound, the core in one process, its niceness (`serve.py`).
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from l4queue.cli.stack.embedded import free_port
from l4queue.cli.stack.supervisor import ChildSpec

__all__ = ("L4QUEUE", "ROUTERS", "Entrant", "engine_spec", "router_specs")

L4QUEUE = "l4queue"
VERSIONS = {"vllm-router": "0.1.17", "sglang-router": "0.3.2", "smg": "1.13.0"}
"""Packages on PyPI."""
ROUTERS = {
    "vllm-router": ("round_robin", "power_of_two", "cache_aware", "sticky_least_loaded"),
    "sglang-router": ("round_robin", "power_of_two", "cache_aware"),
    "smg": ("round_robin", "power_of_two", "cache_aware", "least_load"),
}
"""Policies of each that suit requests without sessions and pools of one kind."""
_COMMANDS = {"vllm-router": (), "sglang-router": ("launch",), "smg": ("launch", "--backend", "vllm")}
_READY_S = 5.0  # for one answer to a check of health


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """One way to two engines: its name and the base URL of its OpenAI server."""

    name: str
    url: str


def router_command(router: str, cache: Path) -> Path:
    """The router's command, in a virtual environment of its own that is made once: two of them ship one name."""
    place, wanted = cache / f"bench-{router}", f"{router}=={VERSIONS[router]}"
    marker = place / "installed"
    if not marker.exists() or marker.read_text("utf-8") != wanted:
        print(f"installing {wanted}", file=sys.stderr)
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([place / "bin" / "pip", "install", "--quiet", wanted], check=True)
        marker.write_text(wanted, "utf-8")
    return place / "bin" / router


def engine_spec(index: int, *, model: Path, port: int, options: list[str]) -> ChildSpec:
    """One `vllm serve` on the core of this index."""
    arguments = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--dtype", "float32", "--enforce-eager", "--disable-uvicorn-access-log"]
    return ChildSpec(
        name=f"vllm-{index}",
        argv=(sys.executable, str(Path(__file__).with_name("serve.py")), *arguments, *options),
        env={"VLLM_CPU_OMP_THREADS_BIND": str(index), "VLLM_CPU_KVCACHE_SPACE": "1"},
        is_ready=_answers(f"http://127.0.0.1:{port}/health"),
    )


def router_specs(engines: list[str], chosen: list[str], *, cache: Path) -> tuple[list[ChildSpec], list[Entrant]]:
    """A process for each chosen `ROUTER:POLICY`, before these engines."""
    specs, entrants = [], []
    for name in chosen:
        router, _, policy = name.partition(":")
        port = free_port()
        argv = [
            str(router_command(router, cache)),
            *_COMMANDS[router],
            "--worker-urls",
            *engines,
            "--policy",
            policy,
        ]
        argv += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
        url = f"http://127.0.0.1:{port}"
        specs.append(
            ChildSpec(name=name.replace(":", "-"), argv=tuple(argv), is_ready=_answers(f"{url}/v1/models"))
        )
        entrants.append(Entrant(name=name, url=url))
    return specs, entrants


def _answers(url: str) -> Callable[[], Awaitable[bool]]:
    async def answers() -> bool:
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_READY_S)) as session,
                session.get(url) as answer,
            ):
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    return answers
