"""An inference server that is already running: its address, its version, the models that it serves."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

from l4queue.config import Settings
from l4queue.errors import ConfigError, ServiceUnavailable
from l4queue.model_config import served_names

__all__ = ("EngineServer", "ModelCard", "engine_headers", "engine_urls", "model_names", "read_engine_server")

_ANSWER_S = 10.0
"""For one answer, s. Chosen: a busy server answers /v1/models between two steps of its own event loop."""
_MAX_ANSWER_BYTES = 1 << 20  # of facts about a server: a thousand models would fit


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """One model of a server; `root` is where the server has it from, `max_model_len` 0 where it does not say."""

    name: str
    root: str
    max_model_len: int
    is_adapter: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineServer:
    """Facts of a server that has answered."""

    url: str
    version: str
    cards: tuple[ModelCard, ...]

    def card(self, names: Iterable[str]) -> ModelCard:
        """The model that has one of these names, or was loaded from there; ConfigError where none is."""
        wanted = list(dict.fromkeys(names))
        card = next((c for name in wanted for c in self.cards if name in (c.name, c.root)), None)
        if card is None:
            served = "; ".join(f"{c.name} (of {c.root})" if c.root != c.name else c.name for c in self.cards)
            raise ConfigError(
                f"the server at {self.url} serves {served or 'no model'}, not {wanted[0]}; correct L4_MODEL, or "
                "L4_ENGINE_URL, or say by L4_ENGINE_MODEL what this model is called there"
            )
        if card.is_adapter:
            raise ConfigError(
                f"{card.name} at {self.url} is an adapter of another model, which is not served by a queue: "
                "name the model itself"
            )
        return card


def engine_urls(settings: Settings) -> tuple[str, ...]:
    """The servers that the settings name, without a final `/v1`; ConfigError for what is no URL, or for none."""
    urls = [_checked(text) for text in settings.engine_url.replace(",", " ").split()]
    if not urls:
        raise ConfigError("L4_ENGINE_URL: name the server of L4_ENGINE=http, such as http://127.0.0.1:8000")
    if len(set(urls)) < len(urls):
        raise ConfigError("L4_ENGINE_URL: names a server twice; one worker drives it with all its room")
    return tuple(urls)


def model_names(settings: Settings, path: str = "") -> tuple[str, ...]:
    """Names under which a server may serve the model: what is said, else the model and where it lies."""
    if settings.engine_model:
        return (settings.engine_model,)
    return tuple(dict.fromkeys((settings.model, *([path] if path else []), *served_names(settings))))


def engine_headers(settings: Settings) -> dict[str, str]:
    """Headers of every request to the server."""
    key = settings.engine_key.get_secret_value()
    return {"Authorization": f"Bearer {key}"} if key else {}


def read_engine_server(url: str, settings: Settings) -> EngineServer:
    """Ask a server what it is; blocks.

    ServiceUnavailable where none answers there now, ConfigError where what answers can never do.
    """
    models = _get(f"{url}/v1/models", settings)
    try:
        cards = tuple(_card(entry) for entry in models["data"])
        version = str(_get(f"{url}/version", settings)["version"])
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(
            f"the server at {url} is no vLLM: its /v1/models or /version cannot be read; correct L4_ENGINE_URL"
        ) from None
    return EngineServer(url=url, version=version, cards=cards)


def _card(entry: Any) -> ModelCard:
    length = entry.get("max_model_len")
    return ModelCard(
        name=str(entry["id"]),
        root=str(entry.get("root") or entry["id"]),
        max_model_len=length if isinstance(length, int) and length > 0 else 0,
        is_adapter=entry.get("parent") is not None,
    )


def _checked(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_right = False
    if not is_right or parts.query or parts.fragment:
        raise ConfigError(f"L4_ENGINE_URL: {text!r} is no URL of a server, such as http://127.0.0.1:8000")
    if parts.username is not None:
        raise ConfigError("L4_ENGINE_URL: put the API key into L4_ENGINE_KEY, where logs do not show it")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


class _NoRedirect(HTTPRedirectHandler):
    """A key is sent to the server that was named, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _get(url: str, settings: Settings) -> Any:
    asked = Request(url, headers={"Accept": "application/json", **engine_headers(settings)})
    opener = build_opener(_NoRedirect, ProxyHandler({}), HTTPSHandler(context=ssl.create_default_context()))
    try:
        with opener.open(asked, timeout=_ANSWER_S) as answer:
            text = answer.read(_MAX_ANSWER_BYTES)
    except HTTPError as error:
        raise _refusal(url, error.code) from None
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise ConfigError(f"{url}: {error.reason}; name its authority in SSL_CERT_FILE") from None
        raise ServiceUnavailable(f"no engine answers at {url}: {_why(error.reason)}") from None
    except (OSError, HTTPException) as error:
        raise ServiceUnavailable(f"no engine answers at {url}: {_why(error)}") from None
    try:
        return json.loads(text)
    except ValueError:
        raise ConfigError(f"{url} gives no JSON: L4_ENGINE_URL is to name the server of the engine") from None


def _refusal(url: str, status: int) -> ConfigError | ServiceUnavailable:
    if status in (401, 403):
        return ConfigError(f"{url} refuses the key (HTTP {status}): L4_ENGINE_KEY is what it has as --api-key")
    if status >= 500 or status == 429:
        return ServiceUnavailable(f"{url} answers HTTP {status}")
    return ConfigError(f"{url} answers HTTP {status}: L4_ENGINE_URL is to name a server with OpenAI's API")


def _why(reason: object) -> str:
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
