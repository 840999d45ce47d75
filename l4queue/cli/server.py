"""Facts about a reachable Redis server: version, persistence, memory policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from l4queue.cli.stack.embedded import MIN_VERSION
from l4queue.errors import ServiceUnavailable
from l4queue.protocol.calls import Call
from l4queue.protocol.executor import Executor

__all__ = ("ServerFacts", "read_server")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """Product, version and, where CONFIG may be read, its durability and eviction settings."""

    product: str
    version: tuple[int, ...]
    config: dict[str, str] | None

    @property
    def version_text(self) -> str:
        """Dotted."""
        return ".".join(map(str, self.version))

    @property
    def is_new_enough(self) -> bool:
        """Redis ≥ 6.2; every Valkey is."""
        return self.product == "Valkey" or self.version >= MIN_VERSION

    @property
    def durability_text(self) -> str:
        """The settings that matter, in words."""
        if self.config is None:
            return "unknown: CONFIG is not allowed on this server"
        return ", ".join(f"{name} {value}" for name, value in self.config.items())

    def keeps_promise(self, durability: str) -> bool:
        """Whether the server is set up for `strict` or `fast`."""
        if self.config is None:
            return False
        wanted = ("always",) if durability == "strict" else ("always", "everysec")
        return (
            self.config.get("appendonly") == "yes"
            and self.config.get("appendfsync") in wanted
            and self.config.get("maxmemory-policy") == "noeviction"
        )

    def advice(self, durability: str) -> str:
        """The configuration that `durability` asks for."""
        fsync = "always" if durability == "strict" else "everysec"
        return f"appendonly yes, appendfsync {fsync}, maxmemory-policy noeviction"


def read_server(executor: Executor) -> ServerFacts:
    """Ask the server; ServiceUnavailable when it does not answer."""
    info = executor.run(Call(None, (), ("INFO", "server"), _parse_info))
    try:
        pairs = [
            executor.run(Call(None, (), ("CONFIG", "GET", name), _parse_config))
            for name in ("appendonly", "appendfsync", "maxmemory-policy")
        ]
    except ServiceUnavailable:  # managed services forbid CONFIG
        config = None
    else:
        config = {name: value for pair in pairs for name, value in pair.items()}
    is_valkey = "valkey_version" in info
    text = info["valkey_version" if is_valkey else "redis_version"]
    return ServerFacts(
        product="Valkey" if is_valkey else "Redis",
        version=tuple(int(part) for part in text.split(".") if part.isdigit()),
        config=config,
    )


def _parse_info(reply: Any) -> dict[str, str]:
    if isinstance(reply, dict):  # the client library reads INFO by itself
        return {str(name): str(value) for name, value in reply.items()}
    lines = (line.partition(":") for line in reply.decode().splitlines())
    return {name: value.strip() for name, _, value in lines if value}


def _parse_config(reply: Any) -> dict[str, str]:
    flat = [part for pair in reply.items() for part in pair] if isinstance(reply, dict) else list(reply)
    texts = [part.decode() if isinstance(part, bytes) else str(part) for part in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))
