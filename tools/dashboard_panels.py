"""The panels of the Grafana dashboard: what each asks and how it is drawn; generate_dashboard.py lays them out."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ("ROWS", "Panel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel: queries with their legends, and how it is drawn."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    about: str = ""
    is_log: bool = False
    is_stacked: bool = False
    height: int = 8


def _rate(metric: str, by: str = "") -> str:
    """Per second, summed over processes."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}[$__rate_interval]))"


def _ratio(metric: str, of: str, by: str = "") -> str:
    """What `metric` gains for each that `of` gains."""
    return f"{_rate(metric, by)} / {_rate(of, by)}"


def _quantile(quantile: float, metric: str, by: str) -> str:
    return f"histogram_quantile({quantile}, {_rate(metric + '_bucket', f'le, {by}')})"


def _latency(title: str, metric: str, about: str, *, by: str = "length_class") -> Panel:
    """Median and 99th percentile by length class or stage."""
    label = f"{{{{{by}}}}}"
    queries = (
        (_quantile(0.5, metric, by), f"{label} p50"),
        (_quantile(0.99, metric, by), f"{label} p99"),
    )
    return Panel(title=title, queries=queries, unit="s", about=about, width=12)


def _stage(metric: str) -> str:
    """A value of the exporter by stage; `max`, should two exporters run for a while."""
    return f"max by (stage) ({metric})"


def _now(title: str, expression: str, unit: str = "short", about: str = "") -> Panel:
    return Panel(title=title, queries=((expression, ""),), unit=unit, kind="stat", width=4, height=4, about=about)


TTFT = "From acceptance to the first readable token, by prompt length in tokens."
ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Now",
        (
            _now("Workers", f"sum({_stage('l4queue_workers')})"),
            _now("Waiting", f"sum({_stage('l4queue_queue_requests')}) + max(l4queue_inbox_requests)"),
            _now("Running", f"sum({_stage('l4queue_running_requests')})"),
            _now("Finished per second", _rate("l4queue_requests_finished_total"), "reqps"),
            _now("Generated per second", _rate("l4queue_generated_tokens_total"), about="Tokens."),
            _now(
                "Demand over capacity",
                "max(l4queue_demand_ratio)",
                "percentunit",
                "Queued and running work over slots and KV cache; above 100 % something waits.",
            ),
        ),
    ),
    (
        "Latency",
        (
            _latency("Time to first token", "l4queue_time_to_first_token_seconds", TTFT),
            _latency(
                "Time per output token",
                "l4queue_time_per_output_token_seconds",
                "After the first, by prompt length in tokens.",
            ),
            _latency(
                "End to end",
                "l4queue_e2e_latency_seconds",
                "From acceptance to the stored result, by prompt length in tokens.",
            ),
            _latency(
                "End to end by stage",
                "l4queue_e2e_latency_seconds",
                "By the stage that a request ended in.",
                by="stage",
            ),
            _latency(
                "Queue time", "l4queue_queue_time_seconds", "From acceptance to the first worker that took it."
            ),
            Panel(
                title="Prompt lengths",
                queries=((_rate("l4queue_prompt_length_tokens_bucket", "le"), "{{le}}"),),
                kind="heatmap",
                width=12,
                about="Prompts per second by length in tokens.",
            ),
        ),
    ),
    (
        "Queues",
        (
            Panel(
                title="Waiting requests",
                queries=((_stage("l4queue_queue_requests"), "{{stage}}"),),
                is_stacked=True,
            ),
            Panel(
                title="Waiting tokens", queries=((_stage("l4queue_queue_tokens"), "{{stage}}"),), is_stacked=True
            ),
            Panel(
                title="Oldest waiting request",
                queries=(
                    (_stage("l4queue_queue_oldest_age_seconds"), "{{stage}}"),
                    ("max(l4queue_inbox_oldest_age_seconds)", "inbox"),
                ),
                unit="s",
            ),
            Panel(
                title="Demand and capacity, tokens",
                queries=(("max(l4queue_demand_tokens)", "demand"), ("max(l4queue_capacity_tokens)", "capacity")),
                about="Queued and running tokens, and the KV cache of the workers.",
            ),
            Panel(
                title="Workers, and those that demand would fill",
                queries=(
                    (f"sum({_stage('l4queue_workers')})", "workers"),
                    ("max(l4queue_demand_workers)", "demand"),
                ),
                about="The autoscaling signal.",
            ),
            Panel(
                title="Accepted and unfinished tokens over the limit",
                queries=(("max(l4queue_unfinished_tokens / l4queue_unfinished_limit_tokens)", "tokens"),),
                unit="percentunit",
                about="At 100 % requests are rejected.",
            ),
        ),
    ),
    (
        "Plan and moves",
        (
            Panel(
                title="Boundaries",
                queries=((f"{_stage('l4queue_plan_high_tokens')} < +Inf", "end of stage {{stage}}"),),
                about="Lengths at which a request moves on, tokens. Empty with one stage.",
                is_log=True,
            ),
            Panel(
                title="Workers by stage",
                queries=((_stage("l4queue_workers"), "stage {{stage}}"),),
                is_stacked=True,
            ),
            Panel(
                title="Plan version",
                queries=(
                    ("max(l4queue_plan_version)", "published"),
                    ("min(l4queue_worker_plan_version)", "followed by all workers"),
                ),
            ),
            Panel(
                title="Moves",
                queries=(
                    (_rate("l4queue_handovers_total"), "hand-overs"),
                    (_rate("l4queue_steals_total", "kind"), "stolen {{kind}}"),
                ),
                unit="ops",
            ),
            Panel(
                title="Gap of a moved request",
                queries=((_ratio("l4queue_resume_gap_seconds_sum", "l4queue_resume_gap_seconds_count"), ""),),
                unit="s",
                about="Mean time without a token, from the cut to the first token of the next worker.",
            ),
            Panel(
                title="Redelivered",
                queries=((_rate("l4queue_requests_requeued_total", "reason"), "{{reason}}"),),
                unit="ops",
                about="lost: lease ran out; crashed: its engine died; left, released: its worker stopped.",
            ),
        ),
    ),
    (
        "Requests",
        (
            Panel(
                title="Accepted, rejected",
                queries=(
                    (_rate("l4queue_requests_accepted_total"), "accepted"),
                    (_rate("l4queue_requests_rejected_total"), "rejected: backlog full"),
                ),
                unit="reqps",
            ),
            Panel(
                title="Finished by state",
                queries=((_rate("l4queue_requests_finished_total", "state"), "{{state}}"),),
                unit="reqps",
            ),
            Panel(
                title="Refused by the dispatcher",
                queries=((_rate("l4queue_dispatcher_requests_refused_total", "reason"), "{{reason}}"),),
                unit="reqps",
            ),
        ),
    ),
    (
        "Workers and engines",
        (
            Panel(title="Running requests", queries=(("l4queue_worker_running_requests", "{{worker}}"),)),
            Panel(title="Free slots", queries=(("l4queue_worker_free_requests", "{{worker}}"),)),
            Panel(
                title="KV cache in use",
                queries=(("l4queue_engine_kv_usage_ratio", "{{worker}}"),),
                unit="percentunit",
            ),
            Panel(
                title="Step time, p50 and p99",
                queries=(
                    (_quantile(0.5, "l4queue_engine_step_seconds", "worker"), "{{worker}} p50"),
                    (_quantile(0.99, "l4queue_engine_step_seconds", "worker"), "{{worker}} p99"),
                ),
                unit="s",
            ),
            Panel(
                title="Error of the cost model",
                queries=(
                    (
                        _ratio(
                            "l4queue_cost_model_error_ratio_sum", "l4queue_cost_model_error_ratio_count", "worker"
                        ),
                        "{{worker}}",
                    ),
                ),
                unit="percentunit",
                about="Mean of |predicted - measured| / measured over the steps.",
            ),
            Panel(
                title="Predicted over measured step time",
                queries=(
                    (
                        _ratio(
                            "l4queue_cost_model_predicted_seconds_total",
                            "l4queue_engine_step_seconds_sum",
                            "worker",
                        ),
                        "{{worker}}",
                    ),
                ),
                about="Below 1: the engine is slower than the planner believes.",
            ),
            Panel(
                title="Tokens computed",
                queries=((_rate("l4queue_engine_tokens_total", "kind"), "{{kind}}"),),
                about="Per second; decode includes what a preempted request computes again.",
            ),
            Panel(
                title="Preemptions",
                queries=((_rate("l4queue_engine_preemptions_total", "worker"), "{{worker}}"),),
                unit="ops",
            ),
            Panel(title="Waiting inside the engine", queries=(("l4queue_engine_waiting_requests", "{{worker}}"),)),
        ),
    ),
    (
        "Services",
        (
            Panel(
                title="Dispatcher round, p99",
                queries=(
                    (_quantile(0.99, "l4queue_dispatcher_round_seconds", "instance"), "{{instance}}"),
                    (
                        _quantile(0.99, "l4queue_dispatcher_tokenize_seconds", "instance"),
                        "{{instance}} tokenising",
                    ),
                ),
                unit="s",
            ),
            Panel(
                title="Since the last round of planning",
                queries=(("time() - max(l4queue_planner_last_round_timestamp_seconds)", ""),),
                unit="s",
            ),
            Panel(
                title="Memory",
                queries=(
                    ("max(l4queue_redis_memory_used_bytes)", "Redis"),
                    ("process_resident_memory_bytes", "{{job}} {{instance}}"),
                ),
                unit="bytes",
            ),
        ),
    ),
)
