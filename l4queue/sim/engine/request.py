"""One request on its way through the simulated system, with its time stamps."""

from __future__ import annotations

__all__ = ("SimRequest",)


class SimRequest:
    """A request of the trace and what has become of it so far.

    Mutable on purpose: the simulator moves some hundred thousand of these. `output_tokens` is the future;
    only the instance and the clairvoyant reference may look at it. Times are in seconds; None: not yet.
    """

    __slots__ = (
        "arrival_s",
        "finish_s",
        "finish_step",
        "first_token_s",
        "generated",
        "has_kv",
        "index",
        "join_base",
        "left_tokens",
        "num_handovers",
        "num_preemptions",
        "num_steals",
        "output_tokens",
        "prompt_tokens",
        "stage",
        "watch_tokens",
    )

    def __init__(self, index: int, arrival_s: float, *, prompt_tokens: int, output_tokens: int) -> None:
        self.index = index
        self.arrival_s = arrival_s
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.generated = 0
        # length minus the instance's step counter while decoding: constant, since both grow by one a step
        self.join_base = 0
        self.finish_step = 0
        # tokens still to prefill in the present stay; 0 while decoding
        self.left_tokens = 0
        self.has_kv = False
        self.stage = 0
        # an alarm is raised when it has grown to this length, wherever it decodes
        self.watch_tokens: int | None = None
        self.first_token_s: float | None = None
        self.finish_s: float | None = None
        self.num_preemptions = 0
        self.num_handovers = 0
        self.num_steals = 0

    @property
    def length(self) -> int:
        """Prompt plus what had been generated when the request last entered or left an instance, tokens."""
        return self.prompt_tokens + self.generated
