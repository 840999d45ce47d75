"""A run of `bench queue`: rounds in which each entrant is started, measured alone and stopped."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from l4queue.cli.bench.queue.ceiling import Ceiling, fsync_times_ms, measure_ceiling
from l4queue.cli.bench.queue.entrant import Durability, Entrant, L4Entrant
from l4queue.cli.bench.queue.environments import environment_of
from l4queue.cli.bench.queue.measure import QueueLoad, QueueRound, measure
from l4queue.cli.bench.queue.peer_entrant import PeerEntrant
from l4queue.cli.bench.queue.peers import Peer
from l4queue.errors import ConfigError

__all__ = ("OURS", "QueueStudy", "StudyWatcher")

OURS = "l4queue"
_WITHOUT_MODEL = {"L4_EMULATED_SPEED": "0", "L4_MAX_MODEL_LEN": "262144"}
"""No model time; room for prompts of 400 kB, however badly the tiny model's tokenizer does on them."""
_NOT_OURS = ("L4_REDIS_URL", "L4_ENGINE", "L4_MODEL")  # of a deployment of the user's, which is left alone


@dataclass(slots=True)
class StudyWatcher:
    """Who is told of progress, and the entrant that runs now."""

    on_phase: Callable[[str, str], None]
    on_round: Callable[[QueueRound], None]
    on_note: Callable[[str], None]
    running: Entrant | None = None

    def kill(self) -> None:
        """End the running entrant at once."""
        if self.running is not None:
            self.running.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStudy:
    """What to measure."""

    loads: Sequence[QueueLoad]
    rounds: int
    durabilities: Sequence[Durability]
    num_clients: int
    num_workers: int
    data_dir: Path
    peers: Sequence[Peer] = ()

    @property
    def names(self) -> list[str]:
        """Of the entrants, in their order."""
        return [*(f"{OURS} {durability}" for durability in self.durabilities), *(peer.name for peer in self.peers)]

    @property
    def num_steps(self) -> int:
        """For a progress bar."""
        return self.rounds * len(self.names) * len(self.loads)

    async def run(self, watcher: StudyWatcher) -> tuple[list[QueueRound], list[Ceiling], list[float]]:
        """All rounds, Redis alone, and times of an fsync where their data is, ms."""
        done: list[QueueRound] = []
        with _environment(), _temporary(self.data_dir) as folder:
            environments = {}
            for peer in self.peers:
                watcher.on_phase(peer.name, "install")
                environments[peer.name] = await environment_of(peer, note=watcher.on_note)
            fsyncs_ms = fsync_times_ms(folder)
            ceilings = []
            for load in self.loads:
                watcher.on_phase("redis alone", "")
                ceilings.append(await measure_ceiling(load.prompt_bytes, folder / f"alone-{load.prompt_bytes}"))
            for number in range(self.rounds):
                for index, (load, name) in enumerate(product(self.loads, self.names)):
                    place = folder / f"{number}-{index}"
                    place.mkdir()
                    watcher.on_phase(name, "start")
                    watcher.running = self._entrant(name, place, environments)
                    on_phase = partial(watcher.on_phase, name)
                    async with watcher.running as entrant:
                        found = await measure(entrant, load, number=number, on_phase=on_phase)
                        watcher.on_phase(name, "stop")
                    done.append(found)
                    watcher.on_round(found)
        return done, ceilings, fsyncs_ms

    def _entrant(self, name: str, place: Path, environments: Mapping[str, Path]) -> Entrant:
        index = self.names.index(name)
        if index < len(self.durabilities):
            return L4Entrant(
                name,
                durability=self.durabilities[index],
                num_clients=self.num_clients,
                num_workers=self.num_workers,
                folder=place,
            )
        peer = self.peers[index - len(self.durabilities)]
        return PeerEntrant(
            peer,
            environments[peer.name],
            durability=self.durabilities[0],
            num_clients=self.num_clients,
            num_workers=self.num_workers,
            folder=place,
        )


@contextmanager
def _temporary(data_dir: Path) -> Iterator[Path]:
    """A directory on the disk of `data_dir`, gone in the end. /tmp may be memory, whose fsync costs nothing."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".l4queue-bench-", dir=data_dir)
    except OSError as error:
        raise ConfigError(f"--data-dir {data_dir} cannot be used: {error.strerror}") from error
    with folder as name:
        yield Path(name).absolute()


@contextmanager
def _environment() -> Iterator[None]:
    """Settings of the deployments that are measured; those of the user's own one are put aside."""
    before = {name: os.environ.pop(name, None) for name in (*_NOT_OURS, *_WITHOUT_MODEL)}
    os.environ.update(_WITHOUT_MODEL)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
