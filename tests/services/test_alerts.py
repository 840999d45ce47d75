"""The alert rules on histories made up minute by minute: each fires on its own fault, none while all is well."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.services.prometheus import MONITORING, promtool

pytestmark = pytest.mark.services

RULES = MONITORING / "rules" / "l4queue.yml"
EVALUATE = "50m"

# values as promtool writes them: start+growth a minute x minutes
HEALTHY = {
    "l4queue_redis_up": "1x60",
    "l4queue_redis_memory_used_bytes": "1000x60",
    "l4queue_redis_memory_limit_bytes": "2000x60",
    'l4queue_workers{stage="0"}': "1x60",
    'l4queue_workers{stage="1"}': "0x60",
    "l4queue_unfinished_requests": "5x60",
    "l4queue_unfinished_tokens": "500x60",
    "l4queue_unfinished_limit_tokens": "1000x60",
    "l4queue_inbox_oldest_age_seconds": "0x60",
    'l4queue_queue_oldest_age_seconds{stage="0"}': "1x60",
    "l4queue_requests_rejected_total": "7x60",
    'l4queue_requests_requeued_total{reason="lost"}': "90x60",
    'l4queue_requests_requeued_total{reason="released"}': "0+60x60",
    'l4queue_requests_finished_total{state="dead"}': "3x60",
    'l4queue_requests_finished_total{state="done"}': "0+600x60",
    "l4queue_repairs_total": "1x60",
    "l4queue_planner_last_round_timestamp_seconds": "0+60x60",
    'l4queue_engine_step_seconds_count{worker="w0",kind="decode"}': "0+6000x60",
    'l4queue_worker_running_requests{worker="w0"}': "4x60",
    'l4queue_engine_step_seconds_count{worker="w1",kind="decode"}': "100x60",
    'l4queue_worker_running_requests{worker="w1"}': "0x60",
    'l4queue_engine_preemptions_total{worker="w0"}': "0+1x60",
    'l4queue_cost_model_error_ratio_sum{worker="w0"}': "0+600x60",
    'l4queue_cost_model_error_ratio_count{worker="w0"}': "0+6000x60",
}

FAULTS: dict[str, dict[str, str | None]] = {
    "L4QueueNotMonitored": {"l4queue_redis_up": None},
    "L4QueueRedisDown": {"l4queue_redis_up": "1x40 0x20"},
    "L4QueueRedisMemory": {"l4queue_redis_memory_used_bytes": "1900x60"},
    "L4QueueNoWorkers": {'l4queue_workers{stage="0"}': "1x40 0x20"},
    "L4QueueInboxStands": {"l4queue_inbox_oldest_age_seconds": "0x45 60+60x15"},
    "L4QueueWaitsLong": {'l4queue_queue_oldest_age_seconds{stage="0"}': "400x60"},
    "L4QueueBacklogNearlyFull": {"l4queue_unfinished_tokens": "900x60"},
    "L4QueueRejects": {"l4queue_requests_rejected_total": "7+10x60"},
    "L4QueueLosesWorkers": {'l4queue_requests_requeued_total{reason="lost"}': "90x45 99x15"},
    "L4QueueDeadRequests": {'l4queue_requests_finished_total{state="dead"}': "3x45 4x15"},
    "L4QueueRepairs": {"l4queue_repairs_total": "1x20 2x40"},
    "L4QueuePlannerStands": {"l4queue_planner_last_round_timestamp_seconds": "0+60x40 2400x20"},
    "L4QueueEngineStands": {
        'l4queue_engine_step_seconds_count{worker="w0",kind="decode"}': "0+6000x40 240000x20",
    },
    "L4QueueKvCacheFull": {'l4queue_engine_preemptions_total{worker="w0"}': "0+60x60"},
    "L4QueueCostModelOff": {'l4queue_cost_model_error_ratio_sum{worker="w0"}': "0+5000x60"},
}

# an engine of which nothing was predicted, and a Redis without a limit: no division cries wolf
ODD = {
    'l4queue_cost_model_error_ratio_sum{worker="w0"}': "0x60",
    'l4queue_cost_model_error_ratio_count{worker="w0"}': "0x60",
    "l4queue_redis_memory_limit_bytes": "0x60",
    'l4queue_workers{stage="0"}': "0x60",
    "l4queue_unfinished_requests": "0x60",
}


def case(series: dict[str, str], firing: list[str]) -> dict[str, object]:
    """One history, and exactly the alerts that it calls for."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": EVALUATE,
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in firing],
            }
        ],
    }


def test_each_alert_fires_on_its_fault_alone(tmp_path: Path) -> None:
    """And all are silent on the healthy history, and on one where nothing happens at all."""
    cases = [case(HEALTHY, []), case({**HEALTHY, **ODD}, [])]
    for alert, fault in FAULTS.items():
        series = {**HEALTHY, **fault}
        cases.append(case({name: values for name, values in series.items() if values is not None}, [alert]))
    path = tmp_path / "cases.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": cases}))

    promtool("test", "rules", str(path))


def test_what_an_alert_says_has_its_value(tmp_path: Path) -> None:
    """Labels and texts as they arrive."""
    rule = {
        "exp_labels": {"severity": "warning", "stage": "0"},
        "exp_annotations": {
            "summary": "Stage 0 keeps a request waiting for 6m 40s",
            "description": "Too few workers, or a batch that may wait. See l4queue_demand_workers.",
        },
    }
    one = {
        "interval": "1m",
        "input_series": [{"series": 'l4queue_queue_oldest_age_seconds{stage="0"}', "values": "400x60"}],
        "alert_rule_test": [{"eval_time": EVALUATE, "alertname": "L4QueueWaitsLong", "exp_alerts": [rule]}],
    }
    path = tmp_path / "one.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [one]}))

    promtool("test", "rules", str(path))


def test_every_alert_has_a_fault_here() -> None:
    """A new one comes with its test; rules and Prometheus's configuration are accepted."""
    (group,) = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    assert set(FAULTS) == {rule["alert"] for rule in group["rules"]}
    promtool("check", "rules", str(RULES))
    promtool("check", "config", "--syntax-only", str(MONITORING / "prometheus.yml"))
