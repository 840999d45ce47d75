"""Redis fails over under load: Sentinel's primary killed, a cluster's node restarted and relieved."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from l4queue.cli.stack.embedded import free_port
from l4queue.errors import ServiceUnavailable, UnknownRequest
from l4queue.models import TERMINAL, RequestState
from l4queue.protocol.calls import Call, Verdict
from l4queue.protocol.executor import AsyncExecutor, Executor
from l4queue.protocol.keys import Keys
from l4queue.protocol.reads import Reads
from tests.chaos.storm import WORKERS, Storm, open_storm
from tests.chaos.verdict import judge
from tests.chaos.wishes import expected
from tests.conftest import SEED
from tests.protocol.scene import Scene
from tests.protocol.server import VOLATILE, RedisServer
from tests.services.pipeline import Pipeline, open_pipeline, until
from tests.services.redis_sets import Cluster, Sentinels, has_tls, make_certificate, open_cluster, open_sentinels

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]


@pytest.fixture
def sentinels(redis_executable: str, tmp_path: Path) -> Iterator[Sentinels]:
    """For one test alone."""
    with open_sentinels(redis_executable, tmp_path) as opened:
        yield opened


@pytest.fixture
def cluster(redis_executable: str, tmp_path: Path) -> Iterator[Cluster]:
    """For one test alone."""
    with open_cluster(redis_executable, tmp_path) as opened:
        yield opened


async def _more_done(executor: AsyncExecutor, reads: Reads, number: int) -> None:
    """Wait until so many more have ended as done."""

    async def num_done() -> int:
        return int((await executor.run(reads.counts())).get("done", 0))

    before = await num_done()

    async def is_enough() -> bool:
        return await num_done() >= before + number

    await until(is_enough, timeout_s=120)


async def _begin(storm: Storm, executor: AsyncExecutor, reads: Reads) -> None:
    """Four workers, two dispatchers, a planner and a client at work. Leases are the default's: nobody is slow."""
    storm.cast(settings={"lease_s": 5.0}, is_quiet=True, most=8)
    await storm.launch(*WORKERS, "d0", "d1", "p0", "c0")
    await _more_done(executor, reads, 25)


def _blamed(url: str, namespace: str) -> list[str]:
    """Ids of requests on which a crash was blamed."""
    executor, reads = Executor(url), Reads(Keys(namespace))
    ids = executor.run(Call(None, (), ("KEYS", reads.keys.request("*")), list))
    names = [key.decode().removeprefix(reads.keys.request("")) for key in ids]
    found = [record for record in executor.run_many([reads.record(name) for name in names]) if record is not None]
    executor.close()
    return [record.request_id for record in found if record.crashes]


async def test_nothing_is_lost_when_the_primary_is_killed(
    sentinels: Sentinels, namespace: str, tmp_path: Path
) -> None:
    """With replicas=1: every outcome, every stream is whole, nobody is blamed, no process ends."""
    url = sentinels.url + "?replicas=1"
    async with open_storm(url, namespace=namespace, folder=tmp_path, seed=SEED) as (storm, executor, reads):
        await _begin(storm, executor, reads)
        await asyncio.to_thread(sentinels.fail_over)
        await asyncio.to_thread(sentinels.come_back)  # until then no write is confirmed, and nothing goes on
        await _more_done(executor, reads, 25)
        await storm.calm()
        verdict = judge(storm, sentinels.replica.url, namespace)
    assert verdict.errors == ()
    assert _blamed(sentinels.replica.url, namespace) == []


async def test_what_the_replica_lacked_is_computed_again_or_unknown(sentinels: Sentinels, namespace: str) -> None:
    """Without replicas=1: outputs and endings that were lost come again, lost requests can be repeated."""
    prompt = "the last writes of a dead primary"
    async with open_pipeline(sentinels.url, namespace, lease_s=2.0) as pipeline:
        pipeline.start("w", speed=1.0)
        long = await pipeline.client.enqueue(prompt, max_tokens=1200, ignore_eos=True)
        short = await pipeline.client.enqueue(prompt, max_tokens=100, ignore_eos=True)
        await pipeline.running("w", 2)
        await until(lambda: _has_tokens(pipeline, long.id, short.id))
        sentinels.cut_replication()
        lost = await pipeline.client.enqueue(prompt, max_tokens=5, ignore_eos=True, idempotency_key="once")
        for handle, num_tokens in ((lost, 5), (short, 100)):
            assert (await handle.result(timeout=120)).token_ids == expected(prompt, num_tokens)
        await asyncio.to_thread(sentinels.fail_over)

        with pytest.raises(UnknownRequest):
            await lost.status()
        assert (await short.status()).state not in TERMINAL
        again = await pipeline.client.enqueue(prompt, max_tokens=5, ignore_eos=True, idempotency_key="once")
        assert again.id == lost.id
        for handle, num_tokens in ((again, 5), (short, 100), (long, 1200)):
            assert (await handle.result(timeout=120)).token_ids == expected(prompt, num_tokens)
            record = await handle.status()
            assert (record.state, record.crashes) == (RequestState.DONE, 0)


async def test_a_cluster_serves_while_a_node_restarts_and_another_takes_over(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    """Found from nodes that do not own the slot; SIGKILL of the owner, then its replica takes over, under load."""
    keys = Keys(namespace)
    owner = cluster.owner(keys.prefix)
    others = [node for node in cluster.nodes if node is not owner]
    url = cluster.url(*others)
    async with open_storm(url, namespace=namespace, folder=tmp_path, seed=SEED) as (storm, executor, reads):
        await _begin(storm, executor, reads)
        await asyncio.to_thread(owner.restart)
        await _more_done(executor, reads, 25)
        heir = await asyncio.to_thread(cluster.move, owner)
        await _more_done(executor, reads, 25)
        await storm.calm()
        verdict = judge(storm, heir.url, namespace)
    assert verdict.errors == ()
    assert _blamed(heir.url, namespace) == []


async def test_a_cluster_spreads_namespaces_over_its_nodes(cluster: Cluster, namespace: str) -> None:
    """Three fleets at work at the same time, each on a node of its own, which has all that they keep."""
    of_node: dict[int, str] = {}
    for name in (f"{namespace}-{number}" for number in itertools.count()):
        of_node.setdefault(cluster.owner(Keys(name).prefix).port, name)
        if len(of_node) == len(cluster.nodes):
            break

    async def serve(name: str) -> None:
        async with open_pipeline(cluster.url(), name) as pipeline:
            pipeline.start("w0")
            pipeline.start("w1")
            handles = await pipeline.client.enqueue_many(["hello"] * 50, max_tokens=8, ignore_eos=True)
            results = await asyncio.gather(*(handle.result(timeout=120) for handle in handles))
            assert [len(result.token_ids) for result in results] == [8] * 50

    await asyncio.gather(*(serve(name) for name in of_node.values()))
    for node in cluster.nodes:
        executor = Executor(node.url)
        names = executor.run(Call(None, (), ("KEYS", "*"), list))
        executor.close()
        assert {Keys(of_node[node.port]).prefix} == {name.decode().partition(":")[0] + ":" for name in names}


def test_calls_wait_for_the_replicas_that_redis_demands(redis_executable: str, tmp_path: Path) -> None:
    """min-replicas-to-write: refused while there is none, accepted as soon as one follows."""
    folders = [tmp_path / name for name in ("primary", "replica")]
    for folder in folders:
        folder.mkdir()
    demands = (*VOLATILE, "--min-replicas-to-write", "1", "--repl-diskless-sync-delay", "0")
    primary = RedisServer(redis_executable, folders[0], demands).start()
    replica = RedisServer(redis_executable, folders[1], ("--replicaof", "127.0.0.1", str(primary.port)))
    hasty, patient = Executor(primary.url, retry_s=0.2), Executor(primary.url, retry_s=20.0)
    try:
        with pytest.raises(ServiceUnavailable, match="lacks the replicas"):
            Scene(hasty, "few").submit("a")
        replica.start()
        assert Scene(patient, "few").submit("a").verdict is Verdict.OK
    finally:
        for server in (replica, primary):
            server.kill()


async def test_passwords_and_certificates_reach_all(redis_executable: str, tmp_path: Path) -> None:
    """TLS only, a password for the primary, another for the sentinel, a database that is not the first."""
    if not has_tls(redis_executable):
        pytest.skip("this redis-server was built without TLS")
    certificate, key = make_certificate(tmp_path)
    files = ("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-ca-cert-file", certificate)
    common = (*files, "--tls-auth-clients", "no", "--tls-replication", "yes", "--port", "0")
    ports = [free_port(), free_port()]
    config = tmp_path / "sentinel.conf"
    config.write_text(f"sentinel monitor queue 127.0.0.1 {ports[0]} 1\nsentinel auth-pass queue secret\n")
    commands = (
        (redis_executable, *common, "--tls-port", str(ports[0]), "--requirepass", "secret", "--save", ""),
        (
            redis_executable,
            str(config),
            "--sentinel",
            *common,
            "--tls-port",
            str(ports[1]),
            "--requirepass",
            "other",
        ),
    )
    options = f"sentinel_password=other&ssl_ca_certs={certificate}"
    url = f"rediss+sentinel://:secret@127.0.0.1:{ports[1]}/queue/3?{options}"
    set_one = Call(None, (), ("SET", "{t}:a", "1"), bool)
    database = Call(None, (), ("CLIENT", "INFO"), lambda reply: b" db=3 " in reply)
    async with AsyncExitStack() as stack:
        for command in commands:
            server = await asyncio.create_subprocess_exec(
                *command, cwd=tmp_path, stdout=asyncio.subprocess.DEVNULL
            )
            stack.push_async_callback(server.wait)
            stack.callback(server.kill)
        executor, blocking = AsyncExecutor(url, retry_s=10.0), Executor(url, retry_s=10.0)
        assert await executor.run_many([set_one, database]) == [True, True]
        assert await asyncio.to_thread(blocking.run_many, [set_one, database]) == [True, True]
        with pytest.raises(ServiceUnavailable, match="no sentinel knows the primary of 'other'"):
            Executor(url.replace("/queue/", "/other/"), retry_s=0.0).run(set_one)
        await executor.close()
        blocking.close()


async def _has_tokens(pipeline: Pipeline, *request_ids: str) -> bool:
    records = [await (await pipeline.client.get(request_id)).status() for request_id in request_ids]
    return all(record.output_tokens > 0 for record in records)
