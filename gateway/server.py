"""The gateway's process: vLLM's configuration without an engine, its application, the socket, an orderly end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import shlex
import socket
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from gateway.door import DoorParts, is_served
from gateway.fields import described, fields_of_vllm, vllm_bodies
from gateway.keys import ApiKeys
from gateway.limits import Limiter
from gateway.metrics import DoorMetrics
from gateway.serving_check import ServingCheck
from l4queue.client import AsyncClient
from l4queue.config import Settings
from l4queue.errors import ConfigError
from l4queue.logs import start_logging
from l4queue.model_config import served_names, with_model_facts
from workers.build import model_path
from workers.engine.vllm.environment import prepare_environment

__all__ = ("check_door", "open_socket", "serve")

log = logging.getLogger("l4queue.gateway")
_OURS = (
    "model",
    "tokenizer",
    "host",
    "port",
    "max-model-len",
    "dtype",
    "api-key",
    "uds",
    "middleware",
    "enable-request-id-headers",
)
"""Options of `vllm serve` that are settings of ours, or have no place in a gateway."""


def check_door(settings: Settings) -> ApiKeys:
    """The keys; ConfigError where others than this machine could come in without one."""
    keys = ApiKeys(key=settings.http_key.get_secret_value(), file=settings.http_keys_file)
    if not keys and not _is_loopback(settings.http_host):
        raise ConfigError(
            f"L4_HTTP_HOST: {settings.http_host} lets other machines in, and no key is set; "
            "set L4_HTTP_KEY or L4_HTTP_KEYS_FILE, or listen on 127.0.0.1"
        )
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def serve(settings: Settings, options: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT. `options` are those of `vllm serve` that are about the server.

    They follow those in L4_HTTP_ARGS. Those of the engines, in L4_VLLM_ARGS, may be about the model and its
    tokenizer: they are heeded, too.
    """
    keys = check_door(settings)
    for name in ("vllm", "uvicorn"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("vllm.config", "vllm.platforms", "vllm.utils.system_utils"):
        logging.getLogger(name).setLevel(logging.ERROR)  # their warnings are about an engine, and none runs here
    model = model_path(settings)
    settings = await asyncio.to_thread(with_model_facts, settings)
    prepare_environment(kv_cache_gib=1, cores="", model=model)
    log.info("the gateway loads vLLM's server, which takes a while")
    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.launcher import serve_http
    except ImportError as error:
        raise ConfigError("vLLM is missing: install l4queue[gateway,cpu] or l4queue[gateway,gpu]") from error
    from gateway.batches.own_halves import OwnHalves
    from gateway.batches.service import BatchService, open_store
    from gateway.engine import QueueEngine
    from gateway.own_dispatcher import own_dispatcher

    store = open_store(settings)
    args = _arguments(
        settings, model, [*shlex.split(settings.vllm_args), *shlex.split(settings.http_args), *options]
    )
    address, listening = open_socket(args)
    config = _vllm_config(args)
    serving, limiter = ServingCheck(settings), Limiter(settings, keys)
    async with own_dispatcher(settings), AsyncClient(settings=settings) as client:
        engine = QueueEngine(config, client, serving, limiter)
        app = build_app(args, await engine.get_supported_tasks(), engine.model_config)
        await init_app_state(engine, app.state, args, await engine.get_supported_tasks())
        app.state.door = _door(keys, limiter, serving, client, has_files=store is not None)
        halves = OwnHalves(app, writes_all=bool(args.structured_outputs_config.reasoning_parser))
        batches = None if store is None else BatchService(settings, store, app, keys=keys, halves=halves)
        app.openapi = _served_openapi(app.openapi, has_files=store is not None)
        _log_again(settings.log_format)
        who = f"{len(keys)} keys" if keys else "no key is set, so this machine only"
        log.info("gateway ready: %s/v1 serves %s (%s)", address, args.served_model_name[0], who)
        ending = await serve_http(
            app,
            sock=listening,
            host=args.host,
            port=args.port,
            log_level=args.uvicorn_log_level,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=_GRACE_S,
            timeout_keep_alive=int(os.environ.get("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", _KEEP_ALIVE_S)),
        )
        try:
            await ending
        finally:
            listening.close()
            await engine.settled()
            await serving.close()
            await limiter.close()
            if batches is not None:
                await batches.close()


_GRACE_S = 1
"""How long open streams are waited for at the end, s: their requests go on, and clients come back for them."""
_KEEP_ALIVE_S = 75
"""How long an idle connection stays open. Chosen: longer than clients and load balancers keep theirs (5 to 60 s).
After vLLM's 5 s one that is used again in that moment is reset, and its request lost."""


def open_socket(args: Namespace) -> tuple[str, socket.socket]:
    """The address and the socket that listens there. ConfigError where it is taken.

    The connections that it accepts send at once. Without that an event waits for the client to acknowledge the one
    before it: 40 ms on Linux. asyncio sees to it only for sockets that tell their protocol; vLLM's do not.
    """
    from vllm.entrypoints.launchers.launcher import setup_server

    try:
        address, listening = setup_server(args, reuse_port=False)
    except OSError as error:
        raise ConfigError(f"cannot listen on {args.host}:{args.port}: {error.strerror or error}") from error
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return address, listening


def _vllm_config(args: Namespace) -> Any:
    """What vLLM's server must know, without a device, an engine or weights: as its own render server has it."""
    from vllm import AsyncEngineArgs, envs
    from vllm.config import VllmConfig

    envs.VLLM_CPU_KVCACHE_SPACE = 0  # there is no cache to warn of
    try:
        arguments = AsyncEngineArgs.from_cli_args(args)
        model = arguments.create_model_config()
        model.quantization = None  # what a device can do is for the workers to check
        return VllmConfig(
            model_config=model,
            logging_config=arguments.create_logging_config(),
            structured_outputs_config=arguments.create_structured_outputs_config(),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"vLLM cannot serve model {args.model!r}: {error}") from error


def _log_again(log_format: str) -> None:
    """Our logging, which libraries have replaced while they made the application.

    A refusal that ends a stream is told to its client; vLLM's server would log it with a traceback.
    """
    from vllm.exceptions import GracefulHTTPError, VLLMClientError

    def is_no_refusal(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, GracefulHTTPError | VLLMClientError)

    start_logging(log_format)
    for handler in logging.getLogger().handlers:
        handler.addFilter(is_no_refusal)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("l4queue") and isinstance(logger, logging.Logger):
            logger.disabled = False


def _served_openapi(whole: Callable[[], dict[str, Any]], *, has_files: bool) -> Callable[[], dict[str, Any]]:
    """vLLM's description of its API without the paths and the fields that the door does not let through."""

    def told() -> dict[str, Any]:
        found = whole()
        paths = {path: said for path, said in found["paths"].items() if is_served(path, has_files=has_files)}
        schemas = dict(found.get("components", {}).get("schemas", {}))
        for path, kind in vllm_bodies().items():
            if kind.__name__ in schemas:
                schemas[kind.__name__] = described(path, schemas[kind.__name__])
        return {**found, "paths": paths, "components": {**found.get("components", {}), "schemas": schemas}}

    return told


def _door(
    keys: ApiKeys, limiter: Limiter, serving: ServingCheck, client: AsyncClient, *, has_files: bool
) -> DoorParts:
    fields = {path: fields_of_vllm(path, kind) for path, kind in vllm_bodies().items()}
    return DoorParts(
        keys=keys,
        limiter=limiter,
        serving=serving,
        client=client,
        fields=fields,
        metrics=DoorMetrics(),
        has_files=has_files,
    )


def _arguments(settings: Settings, model: str, options: Sequence[str]) -> Namespace:
    """The arguments of vLLM's server: the settings, then options of its own. ConfigError names one of ours."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for option in options:
        name = option.partition("=")[0].removeprefix("--").replace("_", "-")
        if option.startswith("--") and name in _OURS:
            raise ConfigError(f"--{name} is a setting of l4queue: see `l4queue serve --help`")
    given = ["--model", model, "--host", settings.http_host, "--port", str(settings.http_port)]
    given += ["--max-model-len", str(settings.max_model_len), "--dtype", settings.dtype]
    if not any(option.startswith("--served-model-name") for option in options):
        names = served_names(settings) if settings.served_model_name else (settings.model, model)
        given += ["--served-model-name", *dict.fromkeys(names)]
    given += ["--middleware", "gateway.door.Door"]
    given += ["--allowed-origins", "[]"]  # pages of other sites are not to use a door without keys
    given += ["--tokenizer", settings.tokenizer] if settings.tokenizer else []
    parser = make_arg_parser(FlexibleArgumentParser(prog="l4queue serve --"))
    args: Namespace = parser.parse_args([*given, *options])
    validate_parsed_serve_args(args)
    return args
