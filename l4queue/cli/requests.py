"""Commands about requests: enqueue, result, status, cancel, dead."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l4queue.cli.batch import refuse_mixture, run_file
from l4queue.cli.outcome import about
from l4queue.json_lines import json_line

if TYPE_CHECKING:
    from l4queue.client import Handle, RequestStatus, Result

__all__ = ("Id", "register")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Timeout = Annotated[float | None, typer.Option(help="Longest wait, s; the request goes on.")]
Id = Annotated[
    str, typer.Argument(help="Request id, as printed by enqueue or in an answer over HTTP.", metavar="ID")
]


def enqueue(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="Prompt text; - or nothing reads standard input.")] = None,
    *,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate; else what still fits.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Share of the likeliest tokens to draw from; 1 is all.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes drawing repeatable.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="With --json: each token and N others.")] = None,
    priority: Annotated[
        int | None, typer.Option(help="Lower is served first; default 0, for a batch 100.")
    ] = None,
    deadline_s: Annotated[float | None, typer.Option(help="Seconds until the request expires.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="Same key, same request: never twice.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's chat message.")] = False,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result and print it.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is generated.")] = False,
    timeout: Timeout = None,
    jsonl: Annotated[Path | None, typer.Option(help="Run a file of requests in OpenAI's batch format.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Batch: answers; the same command again goes on where it stopped.")
    ] = None,
    errors: Annotated[Path | None, typer.Option(help="Batch: failed lines; default OUT.errors.jsonl.")] = None,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Batch: most requests in flight.")] = 4096,
    cancel_on_exit: Annotated[
        bool, typer.Option("--cancel-on-exit", help="Batch: Ctrl-C cancels what is in flight.")
    ] = False,
    keep_results: Annotated[
        bool, typer.Option("--keep-results", help="Batch: leave collected results in Redis.")
    ] = False,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Batch: lines may name a model that is not served.")
    ] = False,
    gateway: Annotated[
        str,
        typer.Option(
            help="Batch: URL of an `l4queue serve` that has tools and templates; its key is L4_HTTP_KEY."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Send one request, or a batch with --jsonl.

    Prints the id of the request, or with --wait or --stream its result.
    """
    from l4queue.client import Client

    if jsonl is not None or out is not None:
        refuse_mixture(context)
        more: dict[str, Any] = {} if priority is None else {"priority": priority}
        more |= {"max_tokens": max_tokens, "max_in_flight": max_in_flight}
        more |= {"cancel_on_exit": cancel_on_exit, "keep_results": keep_results, "any_model": any_model}
        more |= {"gateway": gateway}
        raise typer.Exit(run_file(jsonl, out, errors, as_json=as_json, **more))
    text = _prompt_text(prompt, file)
    kind: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    with Client() as client:
        handle = client.enqueue(
            **kind,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop or None,
            seed=seed,
            logprobs=logprobs,
            priority=priority or 0,
            deadline_s=deadline_s,
            idempotency_key=idempotency_key,
        )
        with about(handle.id):
            if stream and not as_json:
                _print_stream(handle, timeout)
            elif wait or stream:
                _print_result(handle.result(timeout=timeout), as_json)
            else:
                print(json.dumps({"request_id": handle.id}) if as_json else handle.id)


def result(
    request_id: Id,
    timeout: Timeout = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is generated.")] = False,
    as_json: Json = False,
) -> None:
    """Wait for a request and print its text.

    An outcome other than done is an error, with an exit code of its own.
    """
    from l4queue.client import Client

    with Client() as client, about(request_id):
        handle = client.get(request_id)
        if stream and not as_json:
            _print_stream(handle, timeout)
        else:
            _print_result(handle.result(timeout=timeout), as_json)


def status(
    request_id: Annotated[
        str | None, typer.Argument(help="Request id, as for `result`.", metavar="ID", show_default=False)
    ] = None,
    data_dir: Annotated[
        Path, typer.Option(help="Without ID: the directory that the `l4queue up` in question was given.")
    ] = Path(".l4queue"),
    as_json: Json = False,
) -> None:
    """Show where a request or the deployment is.

    With ID: state, stage, worker, tokens, times. Without: the URLs of the `l4queue up` of this directory; with
    --json a list of what `up` writes into its ready file.
    """
    from l4queue.client import Client

    if request_id is None:
        _print_deployments(data_dir, as_json=as_json)
        return
    with Client() as client, about(request_id):
        record = client.get(request_id).status()
    if as_json:
        print(json.dumps(_record(record)))
        return
    shown = {name: value for name, value in _record(record).items() if value is not None}
    width = max(map(len, shown))
    for name, value in shown.items():
        print(f"{name:<{width}}  {value:.3f}" if isinstance(value, float) else f"{name:<{width}}  {value}")


def cancel(request_id: Id, as_json: Json = False) -> None:
    """End a request, waiting or running.

    One that had ended already stays as it is, which is no error.
    """
    from l4queue.client import Client

    with Client() as client, about(request_id):
        handle = client.get(request_id)
        is_ended = handle.cancel(reason="cancelled from the command line")
        state = handle.status().state.value
    if as_json:
        print(json.dumps({"request_id": handle.id, "cancelled": is_ended, "state": state}))
    else:
        print(state if is_ended else f"had already ended: {state}")


def dead(
    count: Annotated[int, typer.Option(help="Most entries to show.")] = 20,
    as_json: Json = False,
) -> None:
    """List dead letters, newest first.

    They are requests that kill their worker, and entries that cannot be read.
    """
    from l4queue.client import Client

    with Client() as client:
        letters = client.dead_letters(count=count)
    if as_json:
        print(json.dumps([asdict(letter) for letter in letters]))
        return
    for letter in letters:
        print(f"{letter.request_id}  {letter.why}")
    if not letters:
        print("no dead letters")


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    for command in (enqueue, result, status, cancel, dead):
        app.command()(command)


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    from l4queue.errors import InvalidRequest

    if file is not None and prompt is not None:
        raise InvalidRequest("give either a prompt or --file", field="prompt")
    try:
        if file is not None:
            return file.read_text("utf-8")
        return sys.stdin.buffer.read().decode("utf-8") if prompt in (None, "-") else str(prompt)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"not valid UTF-8 at byte {error.start}", field="prompt") from None
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}", field="file") from None


def _print_deployments(data_dir: Path, *, as_json: bool) -> None:
    """What `up` said when it was ready."""
    from l4queue.cli.stack.ready import ready_lines, running, starts
    from l4queue.errors import ServiceUnavailable
    from l4queue.redis_url import redacted

    found = running(data_dir.absolute())
    if not found:
        if starts(data_dir.absolute()):
            raise ServiceUnavailable(f"the `l4queue up` of {data_dir} is not ready; its logs: {data_dir}/logs")
        raise ServiceUnavailable(
            f"no `l4queue up` runs with the data directory {data_dir}; name another with --data-dir"
        )
    if as_json:
        print(json.dumps([{**facts, "redis_url": redacted(facts["redis_url"])} for facts in found]))
        return
    for facts in found:
        print("\n".join(ready_lines(facts)))


def _print_stream(handle: Handle, timeout: float | None) -> None:
    for chunk in handle.stream(timeout=timeout):
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _print_result(found: Result, as_json: bool) -> None:
    print(json_line(asdict(found)) if as_json else found.text)


def _record(status: RequestStatus) -> dict[str, Any]:
    shown = {name: value for name, value in asdict(status).items() if name != "request"}
    return {**shown, "state": status.state.value}
