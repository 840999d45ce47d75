"""One request on its way through the simulated system, with its time stamps."""

from __future__ import annotations

__all__ = ("Chain", "SimRequest")

Chain = tuple[range, ...]
"""Full KV blocks of prompt and output in order, as spans of numbers. Equal numbers mean equal content up to there.
Empty where the trace says nothing of content."""


class SimRequest:
    """A request of the trace and what has become of it so far.

    Mutable on purpose: the simulator moves some hundred thousand of these. `output_tokens` is the future;
    only the instance and the clairvoyant reference may look at it. Times are in seconds; None: not yet.
    """

    __slots__ = (
        "arrival_s",
        "cached_tokens",
        "chain",
        "finish_s",
        "finish_step",
        "first_token_s",
        "generated",
        "has_kv",
        "held",
        "index",
        "join_base",
        "left_tokens",
        "num_handovers",
        "num_held_blocks",
        "num_preemptions",
        "num_steals",
        "output_tokens",
        "prompt_tokens",
        "session",
        "stage",
        "watch_tokens",
    )

    def __init__(
        self,
        index: int,
        arrival_s: float,
        *,
        prompt_tokens: int,
        output_tokens: int,
        chain: Chain = (),
        session: int | None = None,
    ) -> None:
        self.index = index
        self.arrival_s = arrival_s
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.chain = chain
        # conversation or client, where the trace names it
        self.session = session
        self.generated = 0
        # length minus the instance's step counter while decoding: constant, since both grow by one a step
        self.join_base = 0
        self.finish_step = 0
        # tokens still to prefill in the present stay; 0 while decoding
        self.left_tokens = 0
        self.has_kv = False
        self.stage = 0
        # blocks of the engine's prefix cache that it holds in the present stay, in order, and how far they reach
        self.held: list[range] = []
        self.num_held_blocks = 0
        # prompt tokens found in the prefix cache when it was first admitted
        self.cached_tokens: int | None = None
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
