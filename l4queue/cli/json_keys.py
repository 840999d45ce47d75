"""Keys that commands print with `--json`, in words: docs/cli.md has them, and tests hold them to the code."""

from __future__ import annotations

__all__ = ("KEYS",)

_REQUEST = {
    "request_id": "the id of the request, in every command",
    "state": "submitted, queued, running, done, failed, cancelled, expired or dead",
}
_TIMES = {
    "ttft": "from acceptance to the first token that a client could read",
    "tpot": "for each output token after the first; null with fewer than two",
    "e2e": "from acceptance to the stored outcome",
}

KEYS: dict[str, dict[str, str]] = {
    "enqueue": {"request_id": _REQUEST["request_id"]},
    "result": {
        "request_id": _REQUEST["request_id"],
        "text": "the output",
        "token_ids": "the output as token ids",
        "finish_reason": "stop, or length",
        "prompt_tokens": "length of the prompt, tokens",
        "output_tokens": "length of the output, tokens",
        "resumed": "whether more than one lease computed it: after a crash, a hand-over, a give-back",
        "stage": "the stage that served it last",
        "worker": "the worker that ended it",
        "ttft_s": f"seconds {_TIMES['ttft']}",
        "tpot_s": f"seconds {_TIMES['tpot']}",
        "e2e_s": f"seconds {_TIMES['e2e']}",
        "metadata": "as it was given, or null",
        "logprobs": "of each output token, where they were asked for",
    },
    "cancel": {
        **_REQUEST,
        "cancelled": "whether this command has ended it; false where it had ended already",
    },
    "dead": {
        "request_id": _REQUEST["request_id"],
        "why": "the reason",
        "raw": "the bytes of an entry that cannot be read, shortened",
        "at_ms": "when, server ms since 1970",
    },
    "explain": {
        "at_ms": "when, server ms since 1970",
        "what": "a word for programs: accepted, queued, taken, first token, ...",
        "text": "a line for people",
        "facts": "lengths, workers, prices of this event",
    },
    "health": {"role": "the process that was asked after", "sign_of_life": "a line for people"},
    "doctor": {"ok": "false when a check fails", "checks": "name, verdict (ok, warn, fail), detail, advice"},
    "error": {
        "type": "the class of the error, as in `l4queue.errors`; UsageError, DiskFull",
        "message": "a line for people",
        "request_id": "the request in question, or null",
        "field": "the field at fault, or null",
        "retry_after_s": "with QueueFull only: when to try again, s",
    },
}
"""For `dead` and `explain` of each object of the list."""
