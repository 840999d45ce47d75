"""A whole deployment on this machine: its processes, their environment, and the moment it is ready."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from l4queue.cli.stack.devices import may_have_gateway, usable_gpus
from l4queue.cli.stack.disk import full_disk
from l4queue.cli.stack.embedded import EmbeddedRedis, free_port, is_port_free, write_private
from l4queue.cli.stack.engine_servers import check_models, known_servers
from l4queue.cli.stack.flower_place import FlowerPlace, flower_place, is_well
from l4queue.cli.stack.http_place import HttpPlace, choose_http_place
from l4queue.cli.stack.logs import FileLog, Log
from l4queue.cli.stack.names import NameClaims
from l4queue.cli.stack.overrides import settings_with
from l4queue.cli.stack.own_models import chosen_model, model_path
from l4queue.cli.stack.scrape import with_metrics, write_targets
from l4queue.cli.stack.supervisor import ChildSpec, RestartPolicy, Supervisor
from l4queue.config import URL_FILE
from l4queue.errors import ConfigError, L4QueueError
from l4queue.failure import EXIT_CONFIG
from l4queue.hardware import Gpu, cores_of_worker
from l4queue.model_config import served_names, with_model_facts
from l4queue.observe.overview import read_overview_async
from l4queue.protocol.executor import AsyncExecutor
from l4queue.redis_url import SecretUrl, parse_url

__all__ = ("DEFAULT_DATA_DIR", "DEFAULT_WORKERS", "Stack", "StackOptions")

DEFAULT_DATA_DIR = URL_FILE.parent
DEFAULT_WORKERS = 2  # without a GPU; the least with which requests move
_STOP_WORKERS, _STOP_SERVICES, _STOP_REDIS = 0, 1, 2  # ranks: workers stop first, Redis last
_FINAL = frozenset({EXIT_CONFIG})
_IGNORED = "ignore:L4_"
_SERVICE_MARGIN_S = 10.0  # beyond the drain deadline, for the interpreter's end; chosen: as long as services have
_WORKER_MARGIN_S = 20.0
"""Beyond the drain deadline: the worker's own margins for its engine (10 s) and interpreter (5 s), and ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackOptions:
    """Options of a deployment; None leaves one to the settings or to this machine's hardware.

    `workers_per_process` above 1 is for emulated engines only: fewer processes on few cores. `quiet` keeps notes
    off standard error; `verbose` logs the planner's rounds too, whatever they decide.
    """

    workers: int | None = None
    workers_per_process: int = 1
    dispatchers: int = 1
    engine: str | None = None
    engine_url: str | None = None
    model: str | None = None
    redis_url: str | None = field(default=None, repr=False)
    redis_port: int | None = None
    durability: str | None = None
    data_dir: Path | None = None
    flower_port: int | None = None
    flower: bool = True
    http_port: int | None = None
    http: bool = False
    metrics_port: int | None = None
    log_format: str | None = None
    quiet: bool = False
    verbose: bool = False

    def overrides(self) -> dict[str, Any]:
        """The options that are settings."""
        ports = ("flower_port", "http_port", "metrics_port")
        names = (*ports, "engine", "engine_url", "model", "redis_url", "durability", "log_format")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class Stack:
    """Redis (unless a URL is given), services, workers, Flower and gateway as supervised children.

    `async with` starts everything and stops it in order: workers drain, then the services, Redis last.
    `settings` and the URLs hold once started. Child output goes to `log`, by default to
    files under the data directory. Belongs to one event loop, best on the main thread: children end with
    the thread that started them.
    """

    def __init__(
        self,
        options: StackOptions,
        *,
        log: Log | None = None,
        restart: RestartPolicy | None = None,
        state_dir: Path | None = None,
    ) -> None:
        self.options = options
        self.settings = settings_with(options.overrides())
        self.data_dir = (options.data_dir or DEFAULT_DATA_DIR).absolute()
        self.state_dir = state_dir or self.data_dir
        self.log = log or FileLog(self.data_dir / "logs", notes=None if options.quiet else sys.stderr)
        self.supervisor = Supervisor(log=self.log, restart=restart)
        self.flower: FlowerPlace | None = None
        self.gateway: HttpPlace | None = None
        self.not_ready: list[str] = []
        self.metrics_urls: dict[str, str] = {}
        self._redis: EmbeddedRedis | None = None
        self._executor: AsyncExecutor | None = None
        self._names: NameClaims | None = None

    @property
    def redis_url(self) -> SecretUrl:
        """Of the Redis that all processes use."""
        return self.settings.redis_url

    @property
    def flower_url(self) -> str | None:
        """Of Flower, for a browser on this machine; None without Flower."""
        return None if self.flower is None or self.flower.socket else self.flower.url

    @property
    def openai_url(self) -> str | None:
        """Base URL for clients of OpenAI's API on this machine; None without a gateway."""
        return None if self.gateway is None else self.gateway.url

    @property
    def url_file(self) -> Path | None:
        """Where clients find the URL of the Redis started here, which has its password; None for another Redis."""
        return None if self._redis is None else self.data_dir / URL_FILE.name

    @property
    def targets_file(self) -> Path:
        """Where Prometheus finds the processes (`file_sd_configs`), with metrics only."""
        return self.state_dir / "prometheus-targets.json"

    def note(self, text: str) -> None:
        """Say something of our own in the log."""
        self.log.write("l4queue", text)

    async def __aenter__(self) -> Stack:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _start(self) -> None:
        options = self.options
        gpus = usable_gpus(self.settings, workers=options.workers, workers_per_process=options.workers_per_process)
        servers = await known_servers(self.settings, num_workers=options.workers, note=self.note)
        num_workers = (
            len(servers) or options.workers or len(gpus) // self.settings.tensor_parallel or DEFAULT_WORKERS
        )
        chosen = self.settings.model_copy(update={"model": chosen_model(self.settings, servers)})
        self.settings = await asyncio.to_thread(with_model_facts, chosen)
        self._choose_flower_port()
        if options.http and may_have_gateway(self.settings):
            self.gateway = choose_http_place(self.settings, port=options.http_port)
            self.settings = self.settings.model_copy(update={"http_port": self.gateway.port})
        if not options.dispatchers and not (self.gateway and self.settings.http_dispatcher):
            raise ConfigError(
                "--dispatchers 0: nothing would be routed; it takes a gateway with L4_HTTP_DISPATCHER=true"
            )
        await self._start_redis()
        parse_url(self.redis_url)
        assert self.settings.broker_url  # both are right, or this is the end
        names = await self._choose_names(num_workers)
        model = await model_path(self.settings, note=self.note, quiet=options.quiet)
        there = check_models(servers, self.settings, model)
        served = shlex.join(dict.fromkeys((*served_names(self.settings), model, *there)))
        self.settings = self.settings.model_copy(update={"model": model, "served_model_name": served})
        self._executor = AsyncExecutor(self.redis_url, retry_s=0.0)
        serving = self._serving_specs(names.workers, gpus, list(servers))
        specs = [*self._service_specs(names.planner), *serving]
        self.metrics_urls, specs = with_metrics(specs, self.settings)
        if self.metrics_urls:
            write_targets(self.targets_file, self.metrics_urls)
        for spec in specs:
            self.supervisor.add(spec)

    async def ready(self) -> None:
        """Wait until every worker serves and every service runs; ServiceUnavailable if one cannot start.

        Flower, the gateway and the exporter hold nothing up: where they are late or fail, `not_ready` names them.
        """

        def still_waiting(waited_s: float, missing: list[str]) -> None:
            self.note(f"waiting for {', '.join(missing)} ({waited_s:.0f} s so far; engines take a while to load)")

        self.not_ready = await self.supervisor.ready(on_wait=still_waiting)

    async def stop(self) -> None:
        """Stop everything in order; safe to call twice."""
        if self._names is not None:
            await self._names.close()
            self._names = None
        await self.supervisor.stop()
        if self._executor is not None:
            await self._executor.close()
            self._executor = None
        if self._redis is not None:
            if self.url_file is not None:
                self.url_file.unlink(missing_ok=True)
            self._redis.release()
            self._redis = None
        self.log.close()

    def note_end(self) -> None:
        """Say that a signal has come."""
        self.note("stopping: workers drain first; once more to stop at once")

    def kill(self) -> None:
        """Do not wait for anything any more: SIGKILL to all but Redis, which ends quickly by itself."""
        for name, child in self.supervisor.children.items():
            if name != "redis":
                child.end()

    def _check_foreign(self) -> None:
        """Say whose choice the Redis is; ConfigError where an option asks for one that is started here."""
        source = "L4_REDIS_URL" if self.options.redis_url is None else "--redis-url"
        if self.options.redis_port is not None:
            raise ConfigError(
                f"--redis-port {self.options.redis_port} starts a Redis here, and {source} names the one at "
                f"{self.redis_url}: unset {source}, or leave --redis-port out"
            )
        self.note(f"using the Redis at {self.redis_url}, which {source} names")

    async def _choose_names(self, num_workers: int) -> NameClaims:
        self._names = names = NameClaims(self.redis_url, self.settings.namespace)
        await names.choose(num_workers, is_shared=self._redis is None)
        if names.others:
            self.note(f"this Redis has workers of others: {', '.join(names.others)}")
        return names

    async def _start_redis(self) -> None:
        if "redis_url" in self.settings.model_fields_set:
            self._check_foreign()
            return
        redis = EmbeddedRedis(
            self.data_dir / "redis", durability=self.settings.durability, port=self.options.redis_port
        )
        await asyncio.to_thread(redis.acquire)
        self._redis = redis  # and not before: the directory, and its URL, may be another one's
        self.settings = self.settings.model_copy(update={"redis_url": redis.url})
        self.note(f"starting {redis.server.text} at {redis.url}, data in {redis.data_dir}")
        self.supervisor.add(
            ChildSpec(
                name="redis",
                argv=redis.argv,
                is_ready=redis.is_ready,
                stop_order=_STOP_REDIS,
                stop_s=30.0,
                dies_gently=True,
                pass_fds=(redis.lock_fd,),
                explain=lambda lines: full_disk(redis.data_dir, lines),
            )
        )
        await self.supervisor.ready(["redis"])
        write_private(self.data_dir / URL_FILE.name, f"{redis.url.reveal()}\n")

    def _choose_flower_port(self) -> None:
        if not self.options.flower:
            return
        place = flower_place(self.settings)
        if self.options.flower_port is not None:
            place = replace(place, port=self.options.flower_port, socket="")
        if not place.socket and not is_port_free(place.port):
            if self.options.flower_port is not None:
                raise ConfigError(
                    f"port {place.port} is in use; choose another with --flower-port, or use --no-flower"
                )
            place = replace(place, port=free_port())
        self.settings = self.settings.model_copy(update={"flower_port": place.port})
        self.flower = place

    def _environment(self) -> dict[str, str]:
        names = (
            "namespace",
            "durability",
            "engine",
            "model",
            "served_model_name",
            "flower_port",
            "http_port",
            "log_format",
        )
        ours = {f"L4_{name.upper()}": str(getattr(self.settings, name)) for name in names}
        ours |= {"L4_REDIS_URL": self.redis_url, "PYTHONUNBUFFERED": "1"}
        if "http_files" not in self.settings.model_fields_set:
            ours["L4_HTTP_FILES"] = str(self.data_dir / "files")
        return {**ours, "PYTHONWARNINGS": _IGNORED}  # we have warned of misspelt settings

    def _service_specs(self, planner_name: str) -> list[ChildSpec]:
        # Celery warns root about pickle, which is off here.
        env = {**self._environment(), "PYTHONWARNINGS": f"ignore:You're running the worker,{_IGNORED}"}

        def service(name: str, *arguments: str, **more: Any) -> ChildSpec:
            return ChildSpec(
                name=name,
                argv=(sys.executable, "-m", *arguments),
                env=env,
                stop_order=_STOP_SERVICES,
                final_codes=_FINAL,
                **more,
            )

        celery = ("celery", "--quiet", "-A", "dispatcher.app")
        planner = f"-P solo -Q l4-control -n {planner_name}@%h --without-gossip --without-mingle".split()
        drain_s = self.settings.drain_s + _SERVICE_MARGIN_S
        specs = [
            service(f"dispatcher-{i}", "dispatcher", ready_text=" ready: ", stop_s=drain_s)
            for i in range(self.options.dispatchers)
        ]
        if self.settings.metrics_port:
            specs.append(service("exporter", "dispatcher.exporter", ready_text=" ready: ", essential=False))
        rounds = "INFO" if self.options.verbose else "WARNING"
        specs.append(service("planner", *celery, "worker", *planner, "--loglevel", rounds, ready_text=" ready: "))
        specs.append(service("beat", *celery, "beat", "--loglevel", "WARNING", "--pidfile="))
        if self.flower is not None:
            place = self.flower
            flower = service("flower", "dispatcher.flower", is_ready=lambda: is_well(place), essential=False)
            own = {"FLOWER_PORT": str(place.port), "FLOWER_UNIX_SOCKET": place.socket}  # they win over ours
            specs.append(replace(flower, env={**flower.env, **own}))
        if self.gateway is not None:
            gateway = service("gateway", "gateway", ready_text=" ready: ", is_ready=self.gateway.answers)
            specs.append(replace(gateway, essential=not self.options.dispatchers))
        return specs

    def _serving_specs(self, names: list[str], gpus: list[Gpu], urls: list[str]) -> list[ChildSpec]:
        size = self.options.workers_per_process
        if size == 1:
            return [self._worker_spec(i, names=names, gpus=gpus, urls=urls) for i in range(len(names))]
        firsts = range(0, len(names), size)
        return [self._group_spec(f"workers-{first // size}", names[first : first + size]) for first in firsts]

    def _worker_spec(self, index: int, *, names: list[str], gpus: list[Gpu], urls: list[str]) -> ChildSpec:
        name = names[index]
        env = {**self._environment(), "L4_WORKER_ID": name}
        if urls:
            env["L4_ENGINE_URL"] = urls[index]
        elif gpus:
            group = self.settings.tensor_parallel
            ours = gpus[index * group : (index + 1) * group]
            env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(g.cuda_name for g in ours)}
        elif "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
            cores = cores_of_worker(index, num_workers=len(names), cores=sorted(os.sched_getaffinity(0)))
            env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        return self._serving_spec(name, "workers", env=env, worker_ids=[name])

    def _group_spec(self, name: str, worker_ids: list[str]) -> ChildSpec:
        env = {**self._environment(), "L4_WORKER_ID": name}
        return self._serving_spec(name, "workers.worker_group", *worker_ids, env=env, worker_ids=worker_ids)

    def _serving_spec(
        self, name: str, module: str, *arguments: str, env: dict[str, str], worker_ids: list[str]
    ) -> ChildSpec:
        """A process that is ready when its workers have their leases, and may take its time to drain.

        It has to say so too: leases of an earlier process of that name hold for a while after it was killed.
        """
        return ChildSpec(
            name=name,
            argv=(sys.executable, "-m", module, *arguments),
            env=env,
            ready_text=" ready: ",
            is_ready=self._workers_serve(*worker_ids),
            final_codes=_FINAL,
            stop_order=_STOP_WORKERS,
            stop_s=self.settings.drain_s + _WORKER_MARGIN_S,
        )

    def _workers_serve(self, *worker_ids: str) -> Callable[[], Awaitable[bool]]:
        async def have_leases() -> bool:
            if self._executor is None:
                return False
            try:
                overview = await read_overview_async(self._executor, self.settings.namespace)
            except L4QueueError:  # Redis is away or loading; the supervisor asks again
                return False
            return {load.worker_id for load in overview.workers}.issuperset(worker_ids)

        return have_leases
