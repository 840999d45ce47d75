"""Options of `vllm serve` in L4_VLLM_ARGS, read by vLLM's own parser. L4_ settings have their own names."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from typing import Any, NoReturn

from l4queue.errors import ConfigError

__all__ = ("engine_options",)

_SETTINGS = {
    "model_tag": "L4_MODEL",
    "model": "L4_MODEL",
    "tokenizer": "L4_TOKENIZER",
    "max_model_len": "L4_MAX_MODEL_LEN",
    "max_num_seqs": "L4_MAX_RUNNING",
    "max_num_batched_tokens": "L4_MAX_BATCHED_TOKENS",
    "dtype": "L4_DTYPE",
    "tensor_parallel_size": "L4_TENSOR_PARALLEL",
    "gpu_memory_utilization": "L4_GPU_MEMORY_SHARE",
}
_OURS = frozenset(
    {
        "scheduling_policy",  # requests have l4queue's priorities
        "long_prefill_token_threshold",
        "enable_logging_iteration_details",  # step times are measured by them
        "worker_cls",
        "kv_transfer_config",  # running requests move by our connector
        "skip_tokenizer_init",
        "logprobs_mode",
    }
)
"""Arguments of an engine that are l4queue's own, with no setting."""


def engine_options(text: str) -> dict[str, Any]:
    """Arguments for `AsyncEngineArgs` that a line of options names; those of the HTTP server are left out.

    ConfigError where vLLM does not know one, or l4queue has it.
    """
    if not text.strip():
        return {}
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM is imported late and untyped
        """Ends in an error of ours and not in the end of the process."""

        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"L4_VLLM_ARGS: {message}")

    parser = make_arg_parser(Parser(prog="vllm serve", add_help=False))
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # only what is named
    try:
        named = vars(parser.parse_args(shlex.split(text)))
    except ValueError as error:
        raise ConfigError(f"L4_VLLM_ARGS: {error}") from error
    for name in named:
        if name in _SETTINGS:
            raise ConfigError(f"L4_VLLM_ARGS: {_spelt(name)} is {_SETTINGS[name]} here")
        if name in _OURS:
            raise ConfigError(f"L4_VLLM_ARGS: {_spelt(name)} is l4queue's own")
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    return {name: value for name, value in named.items() if name in known}


def _spelt(name: str) -> str:
    return "the model" if name == "model_tag" else f"--{name.replace('_', '-')}"
