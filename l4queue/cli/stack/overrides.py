"""Settings with the options of a command in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l4queue.config import Settings, load_settings
from l4queue.errors import ConfigError

__all__ = ("settings_with",)


def settings_with(options: Mapping[str, Any]) -> Settings:
    """Settings where these options win; ConfigError names a wrong option, and not the variable behind it."""
    try:
        return load_settings(**options)
    except ConfigError as error:
        variable, colon, text = str(error).partition(": ")
        name = variable.removeprefix("L4_").lower()
        if name not in options:
            raise
        raise ConfigError(f"--{name.replace('_', '-')}{colon}{text}") from None
