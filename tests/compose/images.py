"""Base images made on this machine, for where no registry can be reached."""

from __future__ import annotations

import configparser
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.compose.console import Failed, execute, say

__all__ = ("PREFIX", "BaseImages", "make_base_images", "size_of")

PREFIX = "l4queue-test"
_REDIS = """ARG BASE
FROM ${BASE}
RUN apt-get update -qq \\
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends redis-server redis-tools \\
    && rm -rf /var/lib/apt/lists/* && install -d -o redis -g redis /data
USER redis
WORKDIR /data
CMD ["redis-server"]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseImages:
    """Names of the images that everything else is made from."""

    base: str
    build: str
    redis: str


def make_base_images(environment: Mapping[str, str], folder: Path, *, base: str | None) -> BaseImages:
    """Base (a Debian with Python, unless one is given), build (the same with pip's configuration), Redis."""
    folder.mkdir(parents=True, exist_ok=True)
    if base is None:
        base = f"{PREFIX}-base:latest"
        if not _exists(base, environment):
            _import_debian(base, environment, folder)
    build = f"{PREFIX}-build:latest"
    if not _exists(build, environment):
        _make_build_image(build, base, environment, folder / "build-context")
        say(f"made {build}: the base with this machine's configuration of pip, {size_of(build, environment)}")
    redis = f"{PREFIX}-redis:latest"
    if not _exists(redis, environment):
        context = folder / "redis-context"
        context.mkdir(exist_ok=True)
        (context / "Dockerfile").write_text(_REDIS, "utf-8")
        execute("docker", "build", "--build-arg", f"BASE={base}", "-t", redis, context, environment=environment)
        say(f"made {redis}, {size_of(redis, environment)}")
    return BaseImages(base=base, build=build, redis=redis)


def size_of(image: str, environment: Mapping[str, str]) -> str:
    """Size on disk, MB."""
    size = execute("docker", "image", "inspect", "--format", "{{.Size}}", image, environment=environment)
    return f"{int(size) / 1e6:.0f} MB"


def _exists(image: str, environment: Mapping[str, str]) -> bool:
    command = ["docker", "image", "inspect", image]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def _import_debian(image: str, environment: Mapping[str, str], folder: Path) -> None:
    """A minimal Debian with Python: debootstrap, then docker import."""
    if os.getuid() != 0:
        raise Failed("only root can make a base image with debootstrap; name one with --base-image")
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "bookworm")
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    include = "--include=python3,python3-venv,ca-certificates"
    mirror = _mirror(suite)
    execute("debootstrap", "--variant=minbase", include, suite, root, *([mirror] if mirror else []))
    for package in (root / "var/cache/apt/archives").glob("*.deb"):
        package.unlink()
    with subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE) as tar:
        done = subprocess.run(
            ["docker", "import", "-", image], stdin=tar.stdout, env=environment, capture_output=True, check=False
        )
    if done.returncode or tar.returncode:
        raise Failed(f"docker import: {done.stderr.decode()}")
    shutil.rmtree(root)
    say(f"made {image} with debootstrap: Debian {suite} with Python, {size_of(image, environment)}")


def _mirror(suite: str) -> str | None:
    """The mirror that this machine's own apt uses."""
    listed = execute("apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {suite}", allowed=(0, 100))
    return next((line.strip() for line in listed.splitlines() if line.startswith("http")), None)


def _make_build_image(image: str, base: str, environment: Mapping[str, str], context: Path) -> None:
    """The base with what pip and uv need here: their variables, certificates, local directories of wheels."""
    shutil.rmtree(context, ignore_errors=True)
    (context / "wheels").mkdir(parents=True)
    values = _pip_values()
    lines = [f"FROM {base}", "COPY wheels /wheels"]
    for directory in values.pop("PIP_FIND_LINKS", "").split():
        if Path(directory).is_dir():
            for wheel in Path(directory).glob("*.whl"):
                shutil.copy(wheel, context / "wheels")
            values["PIP_FIND_LINKS"] = "/wheels"
    certificates = values.pop("PIP_CERT", None) or os.environ.get("SSL_CERT_FILE")
    if certificates and Path(certificates).is_file():
        shutil.copy(certificates, context / "certificates.crt")
        lines.append("COPY certificates.crt /etc/ssl/certs/ca-certificates.crt")
        values |= dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE"), "/etc/ssl/certs/ca-certificates.crt")
    lines += [f'ENV {name}="{value}"' for name, value in sorted(values.items())]
    (context / "Dockerfile").write_text("\n".join(lines) + "\n", "utf-8")
    execute("docker", "build", "-t", image, context, environment=environment)


def _pip_values() -> dict[str, str]:
    """pip's configuration of this machine as variables; those of uv and of proxies as they are."""
    listed = execute(sys.executable, "-m", "pip", "config", "list", allowed=(0, 1))
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=())
    parser.read_string("[pip]\n" + listed)
    values: dict[str, str] = {}
    for key, quoted in parser["pip"].items():
        name = re.sub(r"^(global|install|:env:)\.", "", key).replace("-", "_").upper()
        value = " ".join(quoted.strip("'\"").replace("\\n", " ").split())
        if name in ("FIND_LINKS", "CERT", "TRUSTED_HOST", "PROXY", "TIMEOUT", "DEFAULT_TIMEOUT"):
            values[f"PIP_{name}"] = value
        elif name in ("INDEX_URL", "EXTRA_INDEX_URL"):
            remote = " ".join(url for url in value.split() if urlsplit(url).scheme in ("http", "https"))
            if remote:
                values[f"PIP_{name}"] = remote
    proxies = ("http_proxy", "https_proxy", "no_proxy")
    for name, value in os.environ.items():
        if name.startswith("UV_") or name.lower() in proxies:
            values[name] = value
    return values
