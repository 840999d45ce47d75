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
    "status": {
        **_REQUEST,
        "stage": "the queue that it waits in or is served by, or null",
        "worker": "the worker that has it, or had it last",
        "prompt_tokens": "length of the prompt, tokens",
        "max_tokens": "most tokens of output",
        "output_tokens": "tokens of output so far",
        "finish_reason": "stop, or length",
        "error": "why it failed",
        "field": "the field at fault",
        "crashes": "engines that died with it",
        "num_leases": "how often a worker took it",
        "plan": "the version of the plan by which it was routed",
        "submitted_at_s": "when it was accepted: Unix time by the server's clock, s; so are the next ones",
        "queued_at_s": "when it was routed",
        "started_at_s": "when its first worker took it",
        "first_token_at_s": "when a client could read its first token",
        "finished_at_s": "when its outcome was stored",
        "deadline_at_s": "when it expires, or null",
        "dropped_at_s": "when its output went early, for want of room",
        "ttft_s": f"seconds {_TIMES['ttft']}",
        "tpot_s": f"seconds {_TIMES['tpot']}",
        "e2e_s": f"seconds {_TIMES['e2e']}",
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
        "what": "a word for programs: accepted, routed, taken, first token, ...",
        "text": "a line for people",
        "facts": "lengths, workers, prices of this event",
    },
    "stats": {
        "now_ms": "server ms since 1970",
        "plan": "the plan in force: version, reason, stages with their ranges and workers",
        "workers": "each worker with its stage, running requests, context, KV share, step time",
        "costs": "the step cost that each worker has measured, or null",
        "prices": "what moving a request costs each worker",
        "queues": "by stage: waiting requests and their tokens",
        "inbox": "requests that are not yet routed",
        "counts": "totals since the beginning: live, done, failed, cancelled, expired, dead, moves, ...",
        "plan_version": "of the plan in force, 0 where that is no number",
        "has_unreadable_plan": "whether `plan` is an older one because this release cannot read the one in force",
        "has_newer_plan": "whether only a newer release can read it",
    },
    "plan show": {
        "version": "of the plan",
        "reason": "why it was chosen",
        "stages": "each with low_tokens, high_tokens (null: no bound), num_workers",
        "history": "earlier plans, newest first, where they were asked for",
    },
    "plan solve": {
        "stages": "as in `plan show`",
        "objective": "predicted cost of this plan, or null where it cannot keep up",
        "objective_one_stage": "the same of one stage for all",
        "solve_ms": "time that the dynamic program took",
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
