"""Every setting, once: name, default, unit, meaning. Environment variables carry the prefix `L4_`."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from l4queue.compat import MAX_NUMBER
from l4queue.errors import ConfigError
from l4queue.redis_url import SecretUrl, celery_url, parse_url, with_password
from l4queue.strict_json import check_text
from l4queue.validation import first_fault

__all__ = ("URL_FILE", "Settings", "client_settings", "default_of", "load_settings", "misspelt")

URL_FILE = Path(".l4queue/url")
"""Where `l4queue up` leaves the URL of the Redis that it has started, for clients in the same directory."""
_OTHER_BROKERS = ("amqp", "amqps", "pyamqp", "redis+socket")  # as kombu has them


MAX_SETTING = MAX_NUMBER
"""Largest number of a setting, in milliseconds or bytes or tokens: what Redis and Lua count exactly."""
MAX_SETTING_CHARS = 4096  # longer than any path or URL; an error then still shows the start
_OF_KUBERNETES = ("L4_SERVICE_", "L4_PORT")  # set by it in every pod where a service is called l4
_NEAR = 0.8  # L4_MODLE, L4_REDISURL and L4_MAX_MODEL_LENGTH are that near to a setting, L4_TEST_SEED is not


class Settings(BaseSettings):
    """Settings shared by client, dispatcher, planner, workers and gateway."""

    model_config = SettingsConfigDict(
        env_prefix="L4_",
        env_file=".env",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    redis_url: SecretUrl = Field(
        SecretUrl("redis://127.0.0.1:6379/0"),
        description="Redis or Valkey that holds the queue; all forms: docs/failover.md",
    )
    redis_password: SecretStr = Field(
        SecretStr(""), description="password for a redis_url without one, as it is: nothing is encoded"
    )
    celery_broker_url: SecretUrl = Field(
        SecretUrl(""),
        description="broker for control tasks and Flower events; empty: the next database of redis_url",
    )
    namespace: str = Field("l4", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="prefix of all keys")
    durability: Literal["strict", "fast"] = Field(
        "strict", description="strict: AOF appendfsync always; fast: everysec, may lose acknowledged writes"
    )

    model: str = Field(
        "tiny",
        description="model path or name; smollm2 answers in English, tiny has random weights; where none is set, "
        "`up` and `demo` take smollm2 if it is installed",
    )
    tokenizer: str = Field("", description="tokenizer path; empty: the model's own")
    served_model_name: str = Field(
        "",
        description="names by which requests may ask for the model, by spaces, the one in answers first; "
        "empty: --served-model-name of L4_VLLM_ARGS, else the model",
    )
    max_model_len: int = Field(
        16_384, ge=16, description="longest prompt + output, tokens; not set: what model and KV cache hold"
    )

    max_backlog_tokens: int = Field(50_000_000, ge=1, description="accepted and unfinished tokens")
    max_backlog_bytes: int = Field(
        1_000_000_000, ge=1, description="memory of Redis for accepted and unfinished requests, bytes"
    )
    max_result_bytes: int = Field(
        800_000_000,
        ge=1,
        description="Redis memory of what has ended, bytes; beyond it results go, read ones first",
    )
    result_ttl_s: float = Field(86_400.0, gt=0, description="how long a finished request can be read, s")
    idempotency_ttl_s: float = Field(
        86_400.0, gt=0, description="least time an idempotency key is known after the end, s"
    )

    dispatcher_batch: int = Field(256, ge=1, le=4096, description="requests routed per round")
    dispatcher_claim_idle_s: float = Field(5.0, gt=0, description="age at which another dispatcher adopts")
    constraint_check_s: float = Field(
        5.0, gt=0, description="longest check of a request's structured_outputs before it is refused, s"
    )
    ageing_tokens_per_s: float | None = Field(
        None,
        gt=0,
        description="tokens that a second of waiting counts as; not set: a thirtieth of an engine's "
        "measured prefill rate (docs/planner.md)",
    )
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
    engine: Literal["vllm", "http", "emulated"] = Field(
        "vllm", description="engine of the workers; http: a vllm serve that is already running (docs/engines.md)"
    )
    engine_url: str = Field(
        "", description="server of the http engine, such as http://127.0.0.1:8000; for `up` several, by spaces"
    )
    engine_key: SecretStr = Field(SecretStr(""), description="API key of that server; empty: none")
    engine_model: str = Field(
        "", description="name of the model at that server; empty: L4_MODEL or one of L4_SERVED_MODEL_NAME"
    )
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
    kv_handover_bytes: int | None = Field(
        None,
        ge=0,
        description="most shared memory for the KV of moving requests, bytes; not set: by model, workers and "
        "memory (docs/kv-handover.md); 0: prefill again",
    )
    dtype: str = Field(
        "auto",
        description="weights of the vLLM engine: float32, bfloat16, ...; auto: the model's, if the CPU is fast",
    )
    vllm_args: str = Field(
        "", description="more options for the engine, as `vllm serve` has them (docs/engines.md)"
    )
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
    emulated_prefix_cache: bool = Field(False, description="the emulated engine has a prefix cache, as vLLM does")

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
        "any", description="stages that a worker with room steals from; shorter: best mean, worst tail"
    )
    objective: Literal["balanced", "mean", "normalized", "goodput"] = Field(
        "balanced", description="what plans minimise (docs/planner.md); balanced: the mean, long requests bounded"
    )
    slo_ttft_ms: float = Field(5000.0, gt=0, description="service level of goodput: time to the first token, ms")
    slo_tpot_ms: float = Field(100.0, gt=0, description="service level of goodput: time per output token, ms")
    prefix_affinity: Literal["auto", "true", "false"] = Field(
        "auto",
        description="requests go where their prompt is cached, in one stage; auto: where a replay of what came "
        "proves it (docs/prefix-affinity.md)",
    )
    plan_min_gain: float = Field(0.05, ge=0, description="least predicted gain for a new plan")
    plan_min_life_s: float = Field(20.0, ge=0, description="a plan lives at least so long, s")
    max_stages: int = Field(4, ge=1, le=16, description="most stages of a plan")

    flower_port: int = Field(5555, ge=1, le=65535, description="port of Flower on 127.0.0.1")
    flower_login: SecretStr = Field(
        SecretStr(""), description="user:password that Flower asks for; empty: none on loopback (docs/flower.md)"
    )
    flower_hosts: str = Field(
        "", description="names, beside loopback's, by which browsers reach a Flower without login; by commas"
    )
    flower_sample_above_per_s: int = Field(
        500,
        ge=0,
        description="requests/s of a worker beyond which Flower sees outcomes only, beyond 4 times that a sample",
    )
    flower_show_prompts: bool = Field(
        False, description="show the first 200 characters of each output in Flower; prompts are never shown"
    )

    http_host: str = Field(
        "127.0.0.1", description="address of the HTTP gateway; another than loopback needs a key"
    )
    http_port: int = Field(8000, ge=1, le=65535, description="port of the HTTP gateway (docs/http.md)")
    http_args: str = Field(
        "", description="more options for the gateway, as `vllm serve` has them about its server (docs/http.md)"
    )
    http_dispatcher: bool = Field(False, description="a gateway has a dispatcher in its process (docs/http.md)")
    http_key: SecretStr = Field(
        SecretStr(""),
        description="API key that the gateway asks for, or sha256: and its digest; empty: see the file",
    )
    http_keys_file: str = Field(
        "", description="file of API keys with names and limits (docs/http.md); empty and no key: loopback only"
    )

    http_files: str = Field(
        ".l4queue/files",
        description="directory or fsspec URL of /v1/files, the same for all gateways; empty: no files, no batches",
    )
    http_file_max_bytes: int = Field(200 * 2**20, ge=1, description="largest file that /v1/files takes, bytes")
    http_files_ttl_s: float = Field(
        30 * 86_400.0, gt=0, description="how long files, and batches that have ended, are kept, s"
    )

    metrics_port: int = Field(
        0, ge=0, le=65535, description="port of Prometheus metrics, of each process its own; 0: none"
    )
    metrics_host: str = Field("127.0.0.1", description="address that metrics listen on; 0.0.0.0: all")
    log_format: Literal["text", "json"] = Field(
        "text", description="log lines of all processes: text for people, json with one object a line"
    )
    traces: bool = Field(
        False, description="send OpenTelemetry traces of requests; OTEL_ variables say where to (docs/tracing.md)"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, environment, `.env`. ConfigError for an argument that is no setting."""
        for name in sorted(init_settings().keys() - cls.model_fields.keys()):
            near = get_close_matches(name, cls.model_fields, n=1)
            raise ConfigError(f"{name} is no setting of l4queue{f'; did you mean {near[0]}?' if near else ''}")
        return init_settings, env_settings, dotenv_settings, file_secret_settings

    @field_validator("ageing_tokens_per_s", "kv_handover_bytes", mode="before")
    @classmethod
    def _empty_is_not_set(cls, value: object) -> object:
        """A line without a value, as .env.example has it."""
        return None if value == "" else value

    @field_validator("*")
    @classmethod
    def _can_be_kept(cls, value: object) -> object:
        """A number that Redis and Lua count exactly, a text of bounded length in valid Unicode."""
        if isinstance(value, str):
            check_text(value)
            if len(value) > MAX_SETTING_CHARS:
                raise ValueError(f"has {len(value)} characters; at most {MAX_SETTING_CHARS} are accepted")
        elif isinstance(value, int | float) and abs(value) > MAX_SETTING:
            raise ValueError("must lie within ±2^53")
        return value

    @property
    def worker_name(self) -> str:
        """The stable name of a worker in this process: its setting, else worker@host."""
        return self.worker_id or f"worker@{socket.gethostname()}"

    @model_validator(mode="after")
    def _put_password_in(self) -> Settings:
        password = self.redis_password.get_secret_value()
        if password:
            object.__setattr__(self, "redis_url", with_password(self.redis_url, password))  # frozen for others
        return self

    @property
    def broker_url(self) -> SecretUrl:
        """The Celery broker in kombu's form: its own setting, or the database after `redis_url`'s."""
        return self._broker()[0]

    @property
    def broker_tls(self) -> dict[str, Any]:
        """What Celery's `broker_use_ssl` must be; {} without TLS. Certificates are checked as the queue's are."""
        return self._broker()[1]

    def _broker(self) -> tuple[SecretUrl, dict[str, Any]]:
        own = self.celery_broker_url
        if own.partition("://")[0] in _OTHER_BROKERS:
            return own, {}
        address = parse_url(own, name="L4_CELERY_BROKER_URL") if own else parse_url(self.redis_url)
        if address.way:
            raise ConfigError(
                "L4_CELERY_BROKER_URL: name a Redis of its own for Celery's control messages, which go neither "
                "through Sentinel nor to a cluster: docs/failover.md"
            )
        return celery_url(address if own else replace(address, database=address.database + 1))


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment and `.env`, with overrides; ConfigError names what is wrong.

    Where none of them names a Redis, it is the one that `l4queue up` has started from this directory, if any.
    """
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        place, told = first_fault(error)
        raise ConfigError(f"L4_{'_'.join(map(str, place)).upper()}: {told}") from None
    except (OSError, ValueError, SettingsError) as error:
        raise ConfigError(f".env cannot be read: {error}") from None
    _warn_of_misspelt()
    return _with_redis_of_up(settings)


def client_settings(given: Settings | None) -> Settings:
    """Settings of a client: those given to it, else those of its environment. Both find the Redis of `up`."""
    return load_settings() if given is None else _with_redis_of_up(given)


def _with_redis_of_up(settings: Settings) -> Settings:
    found = None if {"redis_url", "redis_password"} & settings.model_fields_set else _url_of_up()
    if found is None:
        return settings
    settings = settings.model_copy(update={"redis_url": found})
    settings.model_fields_set.discard("redis_url")  # nobody has set it
    return settings


def misspelt(names: Iterable[str]) -> dict[str, str]:
    """Those of these names that are nearly the variable of a setting, each with that variable."""
    known = {f"L4_{name.upper()}" for name in Settings.model_fields}
    ours = {name: name.upper() for name in names if name.upper().startswith("L4_")}
    ours = {name: upper for name, upper in ours.items() if not upper.startswith(_OF_KUBERNETES)}
    near = {name: get_close_matches(ours[name], known, n=1, cutoff=_NEAR) for name in sorted(ours)}
    return {name: found[0] for name, found in near.items() if found and ours[name] not in known}


@cache
def _warn_of_misspelt() -> None:
    """Once in each process: pydantic ignores a variable that it does not know."""
    names = set(os.environ)
    if Path(".env").is_file():
        from dotenv import dotenv_values  # takes its time, and pydantic has read the file with it

        names |= dotenv_values(".env").keys()
    for name, meant in misspelt(names).items():
        warnings.warn(f"{name} is no setting of l4queue; did you mean {meant}?", stacklevel=4)


def _url_of_up() -> SecretUrl | None:
    """What `URL_FILE` says, if it is a file of this user."""
    try:
        with URL_FILE.open(encoding="utf-8") as file:
            is_ours = os.fstat(file.fileno()).st_uid in (_user_id(), 0)
            text = file.read(4096).strip() if is_ours else ""
    except (OSError, UnicodeDecodeError):
        return None
    return SecretUrl(text) if text else None


def _user_id() -> int:
    """The user of this process; on Windows, where all files are of user 0, that one."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def default_of(name: str) -> float:
    """Default of a numeric setting, in its unit: planner and simulator begin with the same."""
    return float(Settings.model_fields[name].default)
