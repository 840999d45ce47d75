"""Servers that are already running, as engines of a deployment: one worker for each, all of one model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from l4queue.config import Settings
from l4queue.engine_server import EngineServer, engine_urls, model_names, read_engine_server
from l4queue.errors import ConfigError, ServiceUnavailable
from l4queue.model_config import is_path

__all__ = ("adopted_model", "check_models", "known_servers")


async def known_servers(
    settings: Settings, *, num_workers: int | None, note: Callable[[str], None]
) -> dict[str, EngineServer | None]:
    """The servers by their URLs, in order; None for one that does not answer yet. Empty for other engines.

    ConfigError where the workers are not as many, or a URL leads to something else.
    """
    if settings.engine != "http":
        return {}
    urls = engine_urls(settings)
    if num_workers not in (None, len(urls)):
        raise ConfigError(f"{len(urls)} servers have {len(urls)} workers: leave --workers {num_workers} out")
    found = await asyncio.gather(*(asyncio.to_thread(_asked, url, settings, note) for url in urls))
    return dict(zip(urls, found, strict=True))


def _asked(url: str, settings: Settings, note: Callable[[str], None]) -> EngineServer | None:
    try:
        return read_engine_server(url, settings)
    except ServiceUnavailable as error:
        note(f"{error}; its worker waits for it")
        return None


def adopted_model(servers: Mapping[str, EngineServer | None], settings: Settings) -> str:
    """The model of the first server that answers, where none is set; ConfigError where it cannot be had here."""
    server = next((server for server in servers.values() if server is not None), None)
    if server is None:
        raise ConfigError("no engine answers, so say by --model which model is served")
    names = (settings.engine_model,) if settings.engine_model else [card.name for card in server.cards]
    card = server.card(names or [""])
    if is_path(card.root) and not settings.tokenizer and not (Path(card.root) / "config.json").is_file():
        raise ConfigError(
            f"the server at {server.url} has its model at {card.root}, which is not here: set --model to "
            f"a copy of its configuration and tokenizer, and L4_ENGINE_MODEL to {card.name}"
        )
    return card.root


def check_models(servers: Mapping[str, EngineServer | None], settings: Settings, path: str) -> tuple[str, ...]:
    """Names of the model at the servers that answer; ConfigError where one has another model."""
    names = model_names(settings, path)
    return tuple(dict.fromkeys(server.card(names).name for server in servers.values() if server is not None))
