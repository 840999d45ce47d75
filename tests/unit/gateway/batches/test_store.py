"""The store of files: the same over a directory, a URL of one, and a store that is no directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.batches.store import FileStore, StoreUnavailable
from l4queue.errors import ConfigError


@pytest.fixture(params=["{}", "file://{}", "memory://{}"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param).format(tmp_path / "store")


def test_what_was_put_is_read(url: str) -> None:
    """Whole, by lines and as a file; it replaces what had the name."""
    store = FileStore(url)
    store.check()
    assert store.put("files/a", [b"x"]) == 1
    assert store.put("files/a", [b"one\nt", b"wo\n", b"three"]) == 13
    assert b"".join(store.chunks("files/a")) == b"one\ntwo\nthree"
    assert list(store.lines("files/a")) == [b"one\n", b"two\n", b"three"]
    with store.as_path("files/a") as path:
        assert path.read_bytes() == b"one\ntwo\nthree"
    assert store.put("files/empty", []) == 0
    assert list(store.chunks("files/empty")) == []


def test_objects_and_folders_are_removed(url: str) -> None:
    """Also what is not there; reading that is an error of its own."""
    store = FileStore(url)
    for name in ("batches/b/1", "batches/b/2", "batches/c/1"):
        store.put(name, [b"x"])
    store.delete("batches/b")
    store.delete("batches/b")
    assert list(store.chunks("batches/c/1")) == [b"x"]
    for name in ("batches/b/1", "batches/b/2"):
        with pytest.raises(FileNotFoundError):
            store.chunks(name)
    with pytest.raises(FileNotFoundError), store.as_path("batches/b/1"):
        pass


def test_a_store_has_one_id(url: str, tmp_path: Path) -> None:
    """Every opening of a store finds the same id; another store has another."""
    assert FileStore(url).store_id == FileStore(url).store_id
    assert FileStore(url).store_id != FileStore(str(tmp_path / "other")).store_id


def test_a_torn_write_leaves_what_was_there(tmp_path: Path) -> None:
    """A directory's file is there whole or not at all."""
    store = FileStore(str(tmp_path))
    store.put("files/a", [b"old"])

    def torn() -> object:
        yield b"new"
        raise OSError("disk full")

    with pytest.raises(StoreUnavailable, match="disk full"):
        store.put("files/a", torn())  # type: ignore[arg-type] # it never ends
    assert list(store.chunks("files/a")) == [b"old"]
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["a"]


def test_a_store_that_cannot_be_used_is_a_wrong_setting(tmp_path: Path) -> None:
    """Named, before anything is served."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="L4_HTTP_FILES"):
        FileStore(str(tmp_path / "file")).check()
    with pytest.raises(ConfigError, match="L4_HTTP_FILES"):
        FileStore("nosuchprotocol://x")
