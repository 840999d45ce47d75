"""redis-servers that belong together: a primary and its replica under three sentinels, a cluster of three."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.protocol.server import DURABLE, VOLATILE, RedisServer
from tests.services.processes import until

__all__ = ("Cluster", "Sentinels", "has_tls", "make_certificate", "open_cluster", "open_sentinels")

SERVICE = "queue"
_DOWN_AFTER_MS = 600
_NUM_SLOTS = 16384
_NODE_TIMEOUT_MS = 1500
_LOGIN = "copies"  # the user that replicas log in with


class Sentinels:
    """A primary, its replica, three sentinels. `cut_replication` makes the primary's last writes its own."""

    def __init__(self, binary: str, folder: Path) -> None:
        self._binary = binary
        self._folder = folder
        self.primary = self._server("a", ())
        login = ("--masteruser", _LOGIN, "--masterauth", "x")
        self.replica = self._server("b", (*_follows(self.primary), *login))
        self.sentinels: list[RedisServer] = []

    @property
    def url(self) -> str:
        """What users write into L4_REDIS_URL."""
        places = ",".join(f"127.0.0.1:{one.port}" for one in self.sentinels)
        return f"redis+sentinel://{places}/{SERVICE}/0"

    def start(self) -> None:
        """All up, the replica in step, each sentinel aware of the other two."""
        self.primary.start()
        _ask(self.primary, "ACL", "SETUSER", _LOGIN, "on", ">x", "+@all", "~*", "&*")
        self.replica.start()
        until(lambda: self._is_in_step(self.replica), "the replica is in step")
        self.sentinels = [self._sentinel(name) for name in ("s1", "s2", "s3")]
        until(lambda: all(self._is_aware(one) for one in self.sentinels), "sentinels know all")

    def cut_replication(self) -> None:
        """From now on the replica hears nothing."""
        _ask(self.primary, "ACL", "SETUSER", _LOGIN, "off")
        _ask(self.primary, "CLIENT", "KILL", "TYPE", "replica")

    def fail_over(self) -> None:
        """SIGKILL the primary and wait until the replica is the primary."""
        self.primary.kill()
        until(lambda: self.role(self.replica) == "master", "the replica is promoted", timeout_s=120)

    def come_back(self) -> None:
        """The old primary as the replica of the new one."""
        self.primary = self._server("c", _follows(self.replica)).start()
        until(lambda: self._is_in_step(self.primary), "the old primary is in step")

    def role(self, server: RedisServer) -> str:
        """What a server says that it is."""
        return str(_ask(server, "ROLE")[0].decode())

    def close(self) -> None:
        """Kill all."""
        for server in (*self.sentinels, self.primary, self.replica):
            server.kill()

    def _server(self, name: str, options: tuple[str, ...]) -> RedisServer:
        folder = self._folder / name
        folder.mkdir()
        return RedisServer(self._binary, folder, (*VOLATILE, "--repl-diskless-sync-delay", "0", *options))

    def _sentinel(self, name: str) -> RedisServer:
        folder = self._folder / name
        folder.mkdir()
        config = folder / "sentinel.conf"
        config.write_text(
            f"sentinel monitor {SERVICE} 127.0.0.1 {self.primary.port} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} {_DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {SERVICE} 5000\n"
        )
        return RedisServer(self._binary, folder, (), head=(str(config), "--sentinel")).start()

    def _is_in_step(self, replica: RedisServer) -> bool:
        return bool(_ask(replica, "ROLE")[3] == b"connected")

    def _is_aware(self, sentinel: RedisServer) -> bool:
        rows = _ask(sentinel, "SENTINEL", "MASTERS")
        facts = dict(zip(rows[0][::2], rows[0][1::2], strict=True))
        return (facts[b"num-slaves"], facts[b"num-other-sentinels"]) == (b"1", b"2")


class Cluster:
    """Three nodes without replicas; each owns a third of the slots and keeps its data over a restart."""

    def __init__(self, binary: str, folder: Path) -> None:
        self._binary = binary
        self._folder = folder
        self.nodes = [self._node(name) for name in ("n1", "n2", "n3")]

    def start(self) -> None:
        """All up and agreed on the slots."""
        for number, node in enumerate(self.nodes):
            node.start()
            bounds = (number * _NUM_SLOTS // 3, (number + 1) * _NUM_SLOTS // 3)
            _ask(node, "CLUSTER", "ADDSLOTS", *range(*bounds))
        for node in self.nodes[1:]:
            _ask(self.nodes[0], "CLUSTER", "MEET", "127.0.0.1", node.port)
        until(lambda: all(b"cluster_state:ok" in self._info(n) for n in self.nodes), "the cluster is up")
        until(lambda: all(b"cluster_known_nodes:3" in self._info(n) for n in self.nodes), "all know all")

    def owner(self, key: str) -> RedisServer:
        """The node that has the slot of a key."""
        slot = int(_ask(self.nodes[0], "CLUSTER", "KEYSLOT", key))
        return self.nodes[next(i for i in range(3) if slot < (i + 1) * _NUM_SLOTS // 3)]

    def url(self, *nodes: RedisServer) -> str:
        """What users write into L4_REDIS_URL; some of the nodes are enough."""
        places = ",".join(f"127.0.0.1:{node.port}" for node in nodes or self.nodes)
        return f"redis+cluster://{places}"

    def move(self, owner: RedisServer) -> RedisServer:
        """Give what a node owns to a new one, as an operator does: a replica first, then CLUSTER FAILOVER."""
        heir = self._node("heir").start()
        self.nodes.append(heir)
        _ask(heir, "CLUSTER", "MEET", "127.0.0.1", owner.port)
        owner_id = _ask(owner, "CLUSTER", "MYID").decode()
        until(lambda: owner_id in _ask(heir, "CLUSTER", "NODES").decode(), "it knows the owner")
        _ask(heir, "CLUSTER", "REPLICATE", owner_id)
        until(lambda: _ask(heir, "ROLE")[3:4] == [b"connected"], "it is in step")
        heir_id = _ask(heir, "CLUSTER", "MYID").decode()
        until(lambda: all(self._follows(heir_id, owner_id, by=node) for node in self.nodes), "all know what it is")
        _ask(heir, "CLUSTER", "FAILOVER")
        until(lambda: _ask(heir, "ROLE")[0] == b"master", "it is the owner")
        return heir

    def close(self) -> None:
        """Kill all."""
        for node in self.nodes:
            node.kill()

    def _follows(self, replica_id: str, owner_id: str, *, by: RedisServer) -> bool:
        rows = [line.split() for line in _ask(by, "CLUSTER", "NODES").decode().splitlines()]
        return any(row[0] == replica_id and row[3] == owner_id for row in rows)

    def _node(self, name: str) -> RedisServer:
        (self._folder / name).mkdir()
        timeout = ("--cluster-node-timeout", str(_NODE_TIMEOUT_MS), "--cluster-announce-ip", "127.0.0.1")
        options = ("--cluster-enabled", "yes", *timeout, "--repl-diskless-sync-delay", "0", *DURABLE)
        return RedisServer(self._binary, self._folder / name, options)

    def _info(self, node: RedisServer) -> bytes:
        return bytes(_ask(node, "CLUSTER", "INFO"))


def _ask(server: RedisServer, *command: Any) -> Any:
    with redis.Redis(port=server.port, protocol=2) as client:
        client.response_callbacks.clear()
        return client.execute_command(*command)


def _follows(server: RedisServer) -> tuple[str, ...]:
    return ("--replicaof", "127.0.0.1", str(server.port))


@contextmanager
def open_sentinels(binary: str, folder: Path) -> Iterator[Sentinels]:
    """Started, and killed afterwards."""
    opened = Sentinels(binary, folder)
    try:
        opened.start()
        yield opened
    finally:
        opened.close()


@contextmanager
def open_cluster(binary: str, folder: Path) -> Iterator[Cluster]:
    """Started, and killed afterwards."""
    opened = Cluster(binary, folder)
    try:
        opened.start()
        yield opened
    finally:
        opened.close()


def has_tls(binary: str) -> bool:
    """Whether this redis-server was built with TLS."""
    return b"tls-ca-cert-file" in Path(binary).read_bytes()


def make_certificate(folder: Path) -> tuple[str, str]:
    """A certificate of 127.0.0.1 that vouches for itself, and its key: two files."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "l4queue")])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(built.public_bytes(serialization.Encoding.PEM))
    secret = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    files[1].write_bytes(key.private_bytes(*secret))
    return str(files[0]), str(files[1])
