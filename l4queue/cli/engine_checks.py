"""Checks of `l4queue doctor` for the engine: vLLM, GPUs, compilers and the model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from l4queue.cli.check import Check, CheckResult

if TYPE_CHECKING:
    from l4queue.config import Settings
    from l4queue.hardware import EngineBuild, GpuView

__all__ = ("engine_checks",)

_IMPORT_S = 120.0  # vLLM from a cold disk takes up to a minute
_TOKENIZER = """
import sys
from l4queue.pretrained import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1], trust_remote_code=sys.argv[2] == "True")
print(len(tokenizer), tokenizer.is_fast)
"""


def engine_checks(settings: Settings, build: EngineBuild | None, view: GpuView) -> Iterator[Check]:
    """In the order of dependence."""
    yield _check_engine(settings, build)
    yield _check_gpus(settings, build, view)
    yield from _check_compiler(settings, build)
    yield _check_model(settings)
    yield from _check_length(settings)


def _check_engine(settings: Settings, build: EngineBuild | None) -> Check:
    from l4queue.hardware import cpu_dtype, cpu_flags, missing_library

    if settings.engine == "http":
        return _check_servers(settings)
    if settings.engine != "vllm":
        return Check(name="engine", verdict=CheckResult.OK, detail=f"emulated ({settings.emulated_gpu})")
    if build is None:
        return Check(
            name="engine",
            verdict=CheckResult.FAIL,
            detail="vLLM is not installed",
            advice="make install, or pip install 'l4queue[gpu]', or set L4_ENGINE=emulated",
        )
    missing = missing_library(build)
    if missing is not None:
        what, _, advice = missing.partition("; ")
        return Check(name="engine", verdict=CheckResult.FAIL, detail=what, advice=advice)
    failure = _run_python("import vllm; vllm.AsyncEngineArgs")
    if failure is not None:
        return Check(
            name="engine",
            verdict=CheckResult.FAIL,
            detail=f"vLLM {build.version} ({build.kind}) cannot be imported: {failure}",
            advice="install the pinned lists again: make clean, remove .venv, make install",
        )
    dtype = cpu_dtype(settings.dtype, flags=cpu_flags()) if build.kind == "cpu" else settings.dtype
    why = ", since this CPU has no instructions for bfloat16" if dtype != settings.dtype else ""
    detail = f"vLLM {build.version} ({build.kind} build), dtype {dtype}{why}"
    return Check(name="engine", verdict=CheckResult.OK, detail=detail)


def _check_servers(settings: Settings) -> Check:
    """The servers of the http engine: whether each answers and serves the model."""
    from l4queue.engine_server import engine_urls, model_names, read_engine_server
    from l4queue.errors import ConfigError, ServiceUnavailable
    from l4queue.smollm2 import SMOLLM2
    from l4queue.tiny import TINY

    if importlib.util.find_spec("aiohttp") is None:
        advice = "pip install 'l4queue[http]'"
        return Check(name="engine", verdict=CheckResult.FAIL, detail="aiohttp is missing", advice=advice)
    told = []
    try:
        is_any = "model" not in settings.model_fields_set or settings.model in (TINY, SMOLLM2)
        for url in engine_urls(settings):
            server = read_engine_server(url, settings)
            card = server.cards[0] if is_any and server.cards else server.card(model_names(settings))
            told.append(f"vLLM {server.version} at {url} with {card.name}, {card.max_model_len} tokens")
    except ServiceUnavailable as error:
        advice = "start the server, or correct L4_ENGINE_URL"
        return Check(name="engine", verdict=CheckResult.FAIL, detail=str(error), advice=advice)
    except ConfigError as error:
        return Check(name="engine", verdict=CheckResult.FAIL, detail=str(error), advice="correct it")
    return Check(name="engine", verdict=CheckResult.OK, detail="; ".join(told))


def _check_gpus(settings: Settings, build: EngineBuild | None, view: GpuView) -> Check:
    gpus = view.gpus
    names = ", ".join(f"{g.cuda_name}: {g.name}, {g.memory_text}" for g in gpus)
    if settings.engine == "vllm" and build is not None and build.kind == "gpu" and not gpus:
        return Check(
            name="GPUs",
            verdict=CheckResult.FAIL,
            detail=view.why,
            advice="install the driver, check CUDA_VISIBLE_DEVICES, or install the CPU build: make ENGINE=cpu",
        )
    if settings.engine == "vllm" and build is not None and build.kind == "cpu" and gpus:
        return Check(
            name="GPUs",
            verdict=CheckResult.WARN,
            detail=f"{names}; not used by the CPU build of vLLM",
            advice="remove .venv, then make install ENGINE=gpu",
        )
    if gpus and view.notes:
        return Check(
            name="GPUs",
            verdict=CheckResult.WARN,
            detail=f"{names}; {view.why}",
            advice="check CUDA_VISIBLE_DEVICES and the driver",
        )
    return Check(name="GPUs", verdict=CheckResult.OK, detail=names or "none, and none is needed")


def _check_model(settings: Settings) -> Check:
    from l4queue.errors import ConfigError
    from l4queue.model_config import trusts_remote_code
    from l4queue.smollm2 import INSTALL, SMOLLM2, is_smollm2_installed

    if settings.model == "tiny":
        return Check(name="model", verdict=CheckResult.OK, detail="tiny, built on first use; its text is noise")
    if settings.model == SMOLLM2:
        if is_smollm2_installed():
            return Check(name="model", verdict=CheckResult.OK, detail="smollm2, unpacked on first use")
        detail = "the package of smollm2 is not installed"
        return Check(name="model", verdict=CheckResult.FAIL, detail=detail, advice=INSTALL)
    path = Path(settings.model)
    if path.exists() and not (path / "config.json").is_file():
        return Check(
            name="model",
            verdict=CheckResult.FAIL,
            detail=f"{path} has no config.json",
            advice="set L4_MODEL to the directory of a Hugging Face model",
        )
    if not path.exists() and (path.is_absolute() or os.environ.get("HF_HUB_OFFLINE") == "1"):
        return Check(
            name="model", verdict=CheckResult.FAIL, detail=f"{path} does not exist", advice="correct L4_MODEL"
        )
    tokenizer = settings.tokenizer or settings.model
    try:
        trusts = trusts_remote_code(settings)
    except ConfigError as error:
        return Check(name="model", verdict=CheckResult.FAIL, detail=str(error), advice="correct L4_VLLM_ARGS")
    failure = _run_python(_TOKENIZER, tokenizer, str(trusts))
    if failure is not None:
        return Check(
            name="model",
            verdict=CheckResult.FAIL,
            detail=f"the tokenizer of {tokenizer} cannot be loaded: {failure}",
            advice="complete the model directory, or set L4_TOKENIZER",
        )
    return Check(name="model", verdict=CheckResult.OK, detail=f"{settings.model}; its tokenizer loads")


def _check_length(settings: Settings) -> list[Check]:
    """The longest request, where there is an engine and the model has been found."""
    from l4queue.errors import ConfigError
    from l4queue.model_config import model_context, with_model_facts

    if settings.engine != "vllm":
        return []
    try:
        context = model_context(settings.model)
        limit_tokens = with_model_facts(settings).max_model_len
    except ConfigError as error:
        return [Check(name="length", verdict=CheckResult.FAIL, detail=str(error), advice="correct it")]
    if context is None:
        return []
    held = f"the model holds {context.most_tokens} tokens of one request"
    return [
        Check(name="length", verdict=CheckResult.OK, detail=f"{held}; the limit is {limit_tokens}, or less by KV")
    ]


def _check_compiler(settings: Settings, build: EngineBuild | None) -> list[Check]:
    """What torch and Triton need to compile kernels, and whether an engine compiles at all."""
    if settings.engine != "vllm" or build is None:
        return []
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("cc") or shutil.which("gcc")
    if build.kind == "gpu" and compiler is None:
        return [
            Check(
                name="compiler",
                verdict=CheckResult.FAIL,
                detail="there is no C compiler, and Triton compiles its kernels with one",
                advice="on Debian: apt-get install gcc g++ libc6-dev",
            )
        ]
    if build.kind == "cpu" and os.environ.get("TORCH_COMPILE_DISABLE", "1") != "1":
        return [
            Check(
                name="compiler",
                verdict=CheckResult.WARN if compiler else CheckResult.FAIL,
                detail="TORCH_COMPILE_DISABLE is off: torch compiles while it starts, "
                + (f"with {compiler}" if compiler else "and there is no C++ compiler"),
                advice="unset TORCH_COMPILE_DISABLE",
            )
        ]
    detail = "none is needed: nothing is compiled" if build.kind == "cpu" else f"{compiler}"
    return [Check(name="compiler", verdict=CheckResult.OK, detail=detail)]


def _run_python(program: str, *arguments: str) -> str | None:
    """The error of a program in another interpreter, in a line; None: it ran. Keeps torch out of this process."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True,
            text=True,
            timeout=_IMPORT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_IMPORT_S:.0f} s"
    if done.returncode == 0:
        return None
    return done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
