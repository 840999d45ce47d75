"""Step costs that a command plans or simulates with: shipped, of one's own file, or measured by live workers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from l4queue.cost.step import StepCost

__all__ = ("LIVE", "CoefficientsOption", "CostSource", "GpuOption", "ModelOption", "costs_from")

LIVE = "live"
_GPU, _MODEL = "h100", "llama-3.1-8b"

GpuOption = Annotated[
    str | None, typer.Option(help=f"GPU of the shipped coefficient file; {_GPU} if left out.", show_default=False)
]
ModelOption = Annotated[
    str | None, typer.Option(help=f"Model of that file; {_MODEL} if left out.", show_default=False)
]
CoefficientsOption = Annotated[
    str | None,
    typer.Option(
        metavar="live|FILE",
        help="Instead of --gpu and --model: what the workers have measured, or a coefficient file of one's own.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSource:
    """Step costs, the bytes of KV cache of a token, and where they come from."""

    cost: StepCost
    kv_bytes_per_token: int
    told: str


def costs_from(source: str | None, *, gpu: str | None, model: str | None) -> CostSource:
    """The costs of `--coefficients`, or of `--gpu` and `--model`. ConfigError where both or none can be read."""
    from l4queue.cost.coefficients import parse_coefficients, read_coefficients
    from l4queue.errors import ConfigError

    if source is None:
        file = read_coefficients(gpu or _GPU, model or _MODEL)
        return CostSource(
            cost=file.cost, kv_bytes_per_token=file.kv_bytes_per_token, told=f"{file.model} on {file.gpu}"
        )
    if gpu is not None or model is not None:
        raise ConfigError("--coefficients excludes --gpu and --model: they name a shipped file")
    if source == LIVE:
        return _live()
    try:
        text = Path(source).read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"--coefficients: {source} cannot be read: {reason}") from None
    file = parse_coefficients(text, name=source)
    return CostSource(cost=file.cost, kv_bytes_per_token=file.kv_bytes_per_token, told=source)


def _live() -> CostSource:
    from l4queue.client import Client
    from l4queue.config import load_settings
    from l4queue.errors import ConfigError
    from l4queue.observe.overview import cost_in_force, price_in_force

    with Client() as client:
        overview = client.overview()
    num_told = sum(cost is not None for cost in overview.costs)
    if not num_told:
        raise ConfigError(
            "--coefficients live: no worker tells step costs yet; they do after some 50 engine steps"
            if overview.workers
            else "--coefficients live: no worker runs here; `l4queue up` starts some"
        )
    return CostSource(
        cost=cost_in_force(overview, load_settings()),
        kv_bytes_per_token=price_in_force(overview).kv_bytes_per_token,
        told=f"measured by {num_told} live workers",
    )
