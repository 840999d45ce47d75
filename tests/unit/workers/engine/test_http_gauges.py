"""Metrics of vLLM 0.32's server, shortened, with one engine and with two."""

from __future__ import annotations

from workers.engine.http.gauges import ServerGauges, read_gauges

ONE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="/models/a \\"b\\""} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:num_preemptions_total{engine="0",model_name="m"} 4.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 7.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 1.7e+03
vllm:cache_config_info{CONFIG} 1.0
process_start_time_seconds 1.79600773784e+09
""".replace(
    "CONFIG",
    'block_size="128",enable_prefix_caching="True",engine="0",kv_cache_size_tokens="262144",num_gpu_blocks="2048"',
)


def test_the_state_of_one_engine_is_read() -> None:
    assert read_gauges(ONE) == ServerGauges(
        kv_capacity_tokens=262_144,
        num_running=3,
        num_waiting=2,
        kv_share=0.25,
        num_steps=1700,
        num_preemptions=4,
        is_speculating=False,
        has_prefix_cache=True,
    )
    assert not read_gauges(ONE.replace('"True"', '"False"')).has_prefix_cache


def test_engines_of_one_server_are_summed() -> None:
    """Blocks count where the size in tokens is not told; the share of the cache is a mean."""
    other = ONE.replace('engine="0"', 'engine="1"').replace('kv_cache_size_tokens="262144",', "")
    gauges = read_gauges(ONE + other.replace(" 0.25", " 0.75") + "vllm:spec_decode_num_drafts_total 1.0\n")
    assert (gauges.kv_capacity_tokens, gauges.num_running, gauges.kv_share) == (2 * 262_144, 6, 0.5)
    assert gauges.is_speculating


def test_what_is_not_told_is_nothing() -> None:
    """As with --disable-log-stats, and before the cache has its blocks."""
    assert read_gauges("").kv_capacity_tokens == 0
    assert read_gauges('vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0').kv_capacity_tokens == 0
