"""Flower's guard against foreign web pages: accepted origins and hosts, and the login of its API.

A browser on this machine reaches Flower on loopback for every page that it shows. Unguarded, Flower trusts any
name that leads to it. Where its API needs no login, it lets every page read, revoke and shut down.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import flower.app
import flower.command
import flower.views
import tornado.web

from l4queue.config import Settings
from l4queue.errors import ConfigError

__all__ = ("GuardedFlower", "Rules", "install", "is_loopback", "refusal")

_OWN = ("same-origin", "none")  # a page of Flower's own, an address that somebody typed


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Admission to Flower: without a login only by an address of this machine or one of `names`."""

    has_login: bool = False
    is_loopback: bool = True
    names: frozenset[str] = frozenset()


def refusal(method: str, headers: Mapping[str, str], rules: Rules) -> str | None:
    """Why a request is refused; None when it is not. Header names as HTTP writes them."""
    host = headers.get("Host", "")  # none: HTTP/1.0, which no browser speaks
    if host and not rules.has_login and not _is_ours(_hostname(host), rules):
        return f"{host} is no name of this Flower; L4_FLOWER_HOSTS adds names"
    origin = headers.get("Origin")
    if origin is not None and not _is_same(origin, host, rules):
        return "pages of other origins have no access to Flower"
    if headers.get("Sec-Fetch-Site", "none") not in _OWN and origin is None and not _is_link(method, headers):
        return "pages of other sites have no access to Flower"
    return None


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if address.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_ours(name: str, rules: Rules) -> bool:
    """A name that no foreign page can have made to lead here: an address, or one that somebody has chosen."""
    if is_loopback(name) or name in rules.names:
        return True
    if rules.is_loopback:
        return False
    if name == socket.gethostname().lower():
        return True
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _is_same(origin: str, host: str, rules: Rules) -> bool:
    scheme, _, place = origin.lower().partition("://")
    if scheme not in ("http", "https"):
        return False
    return place == host.lower() or _hostname(place) in rules.names


def _is_link(method: str, headers: Mapping[str, str]) -> bool:
    """Somebody follows a link to a page of Flower's, in a tab of its own."""
    is_tab = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
    return method in ("GET", "HEAD") and is_tab


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


class GuardedFlower(flower.app.Flower):  # type: ignore[misc]  # flower has no types
    """Flower behind these rules; with the login of our settings beside its own."""

    def __init__(self, *given: Any, settings: Settings, options: Any, **named: Any) -> None:
        login = settings.flower_login.get_secret_value()
        if login:
            if ":" not in login or not login.isascii():
                raise ConfigError("L4_FLOWER_LOGIN: it is user:password, in ASCII")
            options.basic_auth = [*(options.basic_auth or ()), login]
        super().__init__(*given, options=options, **named)
        self.rules = Rules(
            has_login=bool(options.basic_auth or options.auth),
            is_loopback=bool(options.unix_socket) or is_loopback(options.address),
            names=frozenset(name for name in settings.flower_hosts.lower().replace(",", " ").split()),
        )
        if self.rules.is_loopback and not self.rules.has_login and not settings.flower_show_prompts:
            os.environ.setdefault("FLOWER_UNAUTHENTICATED_API", "true")  # read by each of its handlers

    def find_handler(self, request: Any, **named: Any) -> Any:
        """The handler of a request, whatever its path is."""
        reason = refusal(request.method, request.headers, self.rules)
        if reason is not None:
            return self.get_handler_delegate(request, _Refused, {"reason": reason})
        return super().find_handler(request, **named)


class _Refused(tornado.web.RequestHandler):
    """403 for every method."""

    def initialize(self, reason: str) -> None:
        self._reason_text = reason

    def prepare(self) -> None:
        self.set_status(403)
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.finish(f"{self._reason_text}\n")


def _set_default_headers(handler: Any) -> None:
    """In place of Flower's own, which open an API without a login to pages of all origins."""
    handler.set_header("X-Content-Type-Options", "nosniff")
    handler.set_header("X-Frame-Options", "DENY")
    handler.set_header("Cross-Origin-Resource-Policy", "same-origin")


def install(settings: Settings) -> None:
    """Make Flower's command start a guarded one, in this process."""
    flower.command.Flower = partial(GuardedFlower, settings=settings)
    flower.views.BaseHandler.set_default_headers = _set_default_headers
