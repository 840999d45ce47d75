"""Every setting, once: name, default, unit, meaning. Environment variables carry the prefix `L4_`."""

from __future__ import annotations

import socket
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from l4queue.errors import ConfigError

__all__ = ("Settings", "celery_settings", "load_settings")


class Settings(BaseSettings):
    """Settings shared by client, dispatcher, planner and workers."""

    model_config = SettingsConfigDict(env_prefix="L4_", env_file=".env", extra="ignore", frozen=True)

    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="Redis or Valkey that holds the queue; Sentinel and Cluster: docs/failover.md",
    )
    celery_broker_url: str = Field(
        "", description="broker for control tasks and Flower events; empty: the next database of redis_url"
    )
    namespace: str = Field("l4", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="prefix of all keys")
    durability: Literal["strict", "fast"] = Field(
        "strict", description="strict: AOF appendfsync always; fast: everysec, may lose acknowledged writes"
    )

    model: str = Field("tiny", description="model path or name; tiny builds a small random-weight Llama")
    tokenizer: str = Field("", description="tokenizer path; empty: the model's own")
    max_model_len: int = Field(16_384, ge=16, description="longest prompt + output, tokens")

    max_backlog_tokens: int = Field(50_000_000, ge=1, description="accepted and unfinished tokens")
    max_backlog_bytes: int = Field(1_000_000_000, ge=1, description="accepted and unfinished prompt bytes")
    result_ttl_s: float = Field(86_400.0, gt=0, description="how long a finished request can be read, s")
    idempotency_ttl_s: float = Field(86_400.0, gt=0, description="least time an idempotency key is known, s")

    dispatcher_batch: int = Field(256, ge=1, le=4096, description="requests routed per round")
    dispatcher_claim_idle_s: float = Field(5.0, gt=0, description="age at which another dispatcher adopts")
    ageing_tokens_per_s: float = Field(2000.0, gt=0, description="a second of waiting counts as so many tokens")
    priority_step_s: float = Field(30.0, ge=0, description="head start that one priority class is worth, s")

    starvation_bound_s: float = Field(
        600.0, gt=0, description="nothing that arrives so much later is served first, whatever its priority, s"
    )

    background_priority: int = Field(
        100, description="requests of this priority and beyond are background: held back beside others"
    )
    background_slowdown: float = Field(
        0.2, ge=0, description="share by which background requests may slow down others in an engine"
    )
    background_quiet_s: float = Field(
        10.0, ge=0, description="so long after the last other request the background has a worker for itself, s"
    )

    worker_id: str = Field("", description="stable name of this worker; empty: worker@host")
    engine: Literal["vllm", "emulated"] = Field("vllm", description="engine of the workers")
    cpu_cores: str = Field("", description="cores of the CPU engine, such as 0-3; empty: vLLM chooses")
    cpu_kv_cache_gib: int = Field(1, ge=1, description="KV cache of the CPU engine, GiB")
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one worker, which share the model's layers")
    without_gpu: Literal["fail", "emulated"] = Field(
        "fail", description="what a worker with the GPU build of vLLM does on a machine without a GPU"
    )
    devices_dir: str = Field(
        "",
        description="directory of locks by which workers of one machine take different GPUs or cores; empty: off",
    )
    cpu_cores_per_worker: int = Field(1, ge=1, description="cores that a CPU engine takes by devices_dir")
    gpu_memory_share: float = Field(0.9, gt=0, le=1, description="share of the GPU's memory that vLLM takes")
    kv_handover_bytes: int = Field(
        1 << 30, ge=0, description="most shared memory for the KV of handed-over requests, bytes; 0: prefill again"
    )
    dtype: str = Field("auto", description="weights of the vLLM engine: auto, float32, bfloat16, ...")
    max_running: int = Field(64, ge=1, description="most requests at once in one engine")
    max_batched_tokens: int = Field(
        0, ge=0, description="most tokens in one step of the vLLM engine; 0: vLLM's own default (2,048)"
    )
    lease_s: float = Field(5.0, gt=0.2, description="a silent worker loses its requests after, s")
    stall_limit_s: float = Field(
        60.0, gt=0, description="an engine or event loop without progress this long is dead, s"
    )
    drain_s: float = Field(20.0, gt=0, description="deadline of a graceful stop, s")
    emit_interval_ms: float = Field(
        50.0, ge=0, description="tokens are written at most this often, ms; first tokens and ends at once"
    )
    max_crashes: int = Field(3, ge=1, description="crashes while alone before a request is dead")
    emulated_gpu: str = Field("h100", description="coefficients of the emulated engine")
    emulated_model: str = Field("llama-3.1-8b", description="coefficients of the emulated engine")
    emulated_speed: float = Field(1.0, ge=0, description="time factor of the emulated engine; 0: no model time")
    emulated_kv_bytes_per_s: float = Field(
        0.0, ge=0, description="KV hand-over of the emulated engine, bytes/s; 0: prefill again"
    )

    replan_interval_s: float = Field(10.0, gt=0, description="period of the planner, s")
    demand_half_life_s: float = Field(120.0, gt=0, description="traffic older than this has half its weight, s")
    refine_interval_s: float = Field(2.0, gt=0, description="period in which boundaries are nudged, s")
    hand_over: bool = Field(
        True,
        description="running requests move on when they outgrow a stage, and away from prefills",
    )
    escape: bool = Field(
        True, description="running requests leave before a long prefill, where KV caches move; false: they stay"
    )
    steal_from: Literal["any", "shorter", "none"] = Field(
        "any", description="stages that an idle worker steals from; shorter: best mean, worst tail"
    )
    plan_min_gain: float = Field(0.05, ge=0, description="least predicted gain for a new plan")
    plan_min_life_s: float = Field(20.0, ge=0, description="a plan lives at least so long, s")
    max_stages: int = Field(4, ge=1, le=16, description="most stages of a plan")

    flower_port: int = Field(5555, ge=1, le=65535, description="port of Flower on 127.0.0.1")
    flower_sample_above_per_s: int = Field(
        500,
        ge=0,
        description="requests/s of a worker beyond which Flower sees outcomes only, beyond 4 times that a sample",
    )
    flower_show_prompts: bool = Field(False, description="show prompt text in Flower; off by default")

    metrics_port: int = Field(
        0, ge=0, le=65535, description="port of Prometheus metrics, of each process its own; 0: none"
    )
    metrics_host: str = Field("127.0.0.1", description="address that metrics listen on; 0.0.0.0: all")
    traces: bool = Field(
        False, description="send OpenTelemetry traces of requests; OTEL_ variables say where to (docs/tracing.md)"
    )

    @property
    def worker_name(self) -> str:
        """The stable name of a worker in this process: its setting, else worker@host."""
        return self.worker_id or f"worker@{socket.gethostname()}"

    @property
    def broker_url(self) -> str:
        """The Celery broker: its own setting, or the database after `redis_url`'s."""
        if self.celery_broker_url:
            return self.celery_broker_url
        parts = urlsplit(self.redis_url)
        if "+" in parts.scheme:
            raise ConfigError(
                "L4_CELERY_BROKER_URL: name a Redis of its own for Celery's control messages, which go neither "
                "through Sentinel nor to a cluster: docs/failover.md"
            )
        if parts.scheme == "unix" or not parts.path.strip("/").isdigit():
            database = 0
        else:
            database = int(parts.path.strip("/"))
        options = "&".join(part for part in parts.query.split("&") if not part.startswith("replicas="))
        return urlunsplit(parts._replace(path=f"/{database + 1}", query=options))


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment and `.env`, with overrides; ConfigError names what is wrong."""
    try:
        return Settings(**overrides)
    except ValidationError as error:
        first = error.errors()[0]
        name = "L4_" + "_".join(str(part) for part in first["loc"]).upper()
        raise ConfigError(f"{name}: {first['msg']}") from None


def celery_settings(settings: Settings) -> dict[str, Any]:
    """Celery configuration of every l4queue app: JSON only, no results, events on, short visibility."""
    return {
        "broker_url": settings.broker_url,
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_ignore_result": True,
        "task_default_queue": "l4-control",
        "worker_prefetch_multiplier": 1,
        "task_acks_late": True,
        "worker_send_task_events": True,
        "broker_connection_retry_on_startup": True,
        "broker_transport_options": {
            "visibility_timeout": 60,
            "global_keyprefix": f"{settings.namespace}-celery:",
        },
        "worker_hijack_root_logger": False,
        "enable_utc": True,
    }
