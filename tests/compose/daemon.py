"""A Docker daemon to test with: the one that runs, or one of our own for as long as the test takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.compose.console import Failed, execute, say

__all__ = ("compose_command", "install_tools", "open_daemon")

_START_S = 60.0
_STOP_S = 60.0


def install_tools() -> None:
    """What the test needs, from Debian, where it is missing and we are root."""
    packages = {
        "dockerd": "docker.io",
        "docker": "docker.io",
        "debootstrap": "debootstrap",
        "iptables": "iptables",
    }
    missing = {package for tool, package in packages.items() if shutil.which(tool) is None}
    if shutil.which("docker-compose") is None and not _has_compose_plugin():
        missing.add("docker-compose")
    if not missing:
        return
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        raise Failed(f"missing: {', '.join(sorted(missing))}; install them as root, on Debian with apt-get")
    say(f"installing {', '.join(sorted(missing))}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    execute("apt-get", "update", "-qq", environment=environment)
    execute(
        "apt-get", "install", "-qq", "-y", "--no-install-recommends", *sorted(missing), environment=environment
    )


def compose_command() -> tuple[str, ...]:
    """`docker compose` if there is one, else the older `docker-compose`."""
    return ("docker", "compose") if _has_compose_plugin() else ("docker-compose",)


def _has_compose_plugin() -> bool:
    try:
        return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@contextmanager
def open_daemon(folder: Path) -> Iterator[Mapping[str, str]]:
    """Environment for docker's commands. A daemon of our own keeps all it has in `folder`."""
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:
        say("a Docker daemon runs here; it is used")
        yield dict(os.environ)
        return
    if os.getuid() != 0:
        raise Failed("no Docker daemon answers, and only root can start one")
    folder.mkdir(parents=True, exist_ok=True)
    socket = folder / "docker.sock"
    rules = _firewall()
    has_bridge = Path("/sys/class/net/docker0").exists()
    with (folder / "dockerd.log").open("ab") as log:
        process = subprocess.Popen(
            ["dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec",
             "--pidfile", folder / "pid",
             "--host", f"unix://{socket}", "--mtu", str(_mtu())],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    environment = {**os.environ, "DOCKER_HOST": f"unix://{socket}"}
    try:
        _wait_for(process, environment, folder)
        version = execute("docker", "version", "--format", "{{.Server.Version}}", environment=environment).strip()
        say(f"no Docker daemon ran; started dockerd {version}, data in {folder / 'data'}")
        yield environment
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _restore(rules, has_bridge=has_bridge)
        say("stopped the daemon that this test had started")


def _wait_for(process: subprocess.Popen[bytes], environment: Mapping[str, str], folder: Path) -> None:
    deadline_s = time.monotonic() + _START_S
    while subprocess.run(["docker", "info"], env=environment, capture_output=True, check=False).returncode != 0:
        if process.poll() is not None or time.monotonic() > deadline_s:
            tail = "\n".join((folder / "dockerd.log").read_text("utf-8").splitlines()[-10:])
            raise Failed(f"dockerd does not start:\n{tail}")
        time.sleep(0.5)


def _mtu() -> int:
    """Of the way out: containers behind a narrower link than they think could download nothing large."""
    route = execute("ip", "-o", "route", "show", "default").split()
    if "dev" not in route:
        return 1500
    return int(Path(f"/sys/class/net/{route[route.index('dev') + 1]}/mtu").read_text("ascii"))


def _firewall() -> str | None:
    """The rules before our daemon adds its own; None when those of another are there already."""
    rules = execute("iptables-save", allowed=(0, 1))
    return None if "DOCKER" in rules else rules


def _restore(rules: str | None, *, has_bridge: bool) -> None:
    if not has_bridge:
        subprocess.run(["ip", "link", "delete", "docker0"], capture_output=True, check=False)
    if rules is not None:
        subprocess.run(["iptables-restore"], input=rules, text=True, capture_output=True, check=False)
