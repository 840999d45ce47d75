"""The store of files: a directory, or any URL that fsspec knows. Objects are written whole and never changed."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from l4queue.errors import ConfigError, ServiceUnavailable

__all__ = ("FileStore", "StoreUnavailable", "batch_folder", "file_name")

_CHUNK_BYTES = 2**20  # of one read or write
_ID_NAME = "store-id"


class StoreUnavailable(ServiceUnavailable):
    """The store of files cannot be reached or refuses; that may pass."""


def file_name(file_id: str) -> str:
    """The name of a file's contents in the store."""
    return f"files/{file_id}"


def batch_folder(batch_id: str) -> str:
    """The folder of the parts of an unfinished batch."""
    return f"batches/{batch_id}"


class FileStore:
    """Objects under names with slashes. Every method blocks; StoreUnavailable where the store fails.

    A store has an id of its own, so that a gateway tells its store from that of another, which may have the same
    path on another host. Threads may share it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"L4_HTTP_FILES: {url} cannot be used: {error}") from None
        self._root = str(root).rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._store_id = ""

    @property
    def store_id(self) -> str:
        """The id of this store; made by the first gateway that uses it."""
        if not self._store_id:
            with self._telling():
                self._store_id = self._read_id() or self._make_id()
            if not self._store_id:  # another gateway is making it right now
                raise StoreUnavailable(f"the store of files at {self.url} has no id yet")
        return self._store_id

    def put(self, name: str, chunks: Iterable[bytes]) -> int:
        """Write an object, durably and whole or not at all; its size in bytes."""
        with self._telling():
            if self._is_local:
                return self._put_local(name, chunks)
            size_bytes = 0
            with self._fs.open(self._path(name), "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    size_bytes += len(chunk)
            return size_bytes

    def chunks(self, name: str) -> Iterator[bytes]:
        """The contents of an object. FileNotFoundError where there is none, before the first of them."""
        with self._telling():
            file = self._fs.open(self._path(name), "rb")
        return self._read_on(file)

    def lines(self, name: str) -> Iterator[bytes]:
        """The lines of an object, with their ends."""
        rest = b""
        for chunk in self.chunks(name):
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line + b"\n" for line in whole)
        if rest:
            yield rest

    @contextmanager
    def as_path(self, name: str) -> Iterator[Path]:
        """An object as a file of this machine within the context; FileNotFoundError where there is none."""
        if self._is_local:
            path = Path(self._path(name))
            path.stat()
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="l4queue-batch-") as folder:
            path = Path(folder) / "input.jsonl"
            with path.open("wb") as file:
                for chunk in self.chunks(name):
                    file.write(chunk)
            yield path

    def delete(self, name: str) -> None:
        """Remove an object or a folder with all in it; nothing where there is none."""
        with self._telling():
            if self._is_local:
                path = Path(self._path(name))
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            elif self._fs.exists(self._path(name)):
                self._fs.rm(self._path(name), recursive=True)

    def names(self, folder: str) -> list[str]:
        """Last parts of the names of what lies in a folder."""
        with self._telling():
            self._fs.invalidate_cache()
            if not self._fs.exists(self._path(folder)):
                return []
            found = self._fs.ls(self._path(folder), detail=False)
            return [str(path).rstrip("/").rpartition("/")[2] for path in found]

    def check(self) -> None:
        """ConfigError where a directory cannot be written: that will not pass by itself."""
        if not self._is_local:
            return
        try:
            Path(self._root).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._root):
                pass
        except OSError as error:
            told = f"L4_HTTP_FILES: {self._root} cannot be written: {error.strerror or error}"
            raise ConfigError(f"{told}; name another directory, or none to serve no files") from None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _put_local(self, name: str, chunks: Iterable[bytes]) -> int:
        path = Path(self._path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with beside.open("xb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
                size_bytes = file.tell()
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return size_bytes

    def _read_on(self, file: Any) -> Iterator[bytes]:
        with file:
            while True:
                with self._telling():
                    chunk = file.read(_CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk

    def _read_id(self) -> str:
        try:
            return bytes(self._fs.cat_file(self._path(_ID_NAME))).decode()
        except FileNotFoundError:
            return ""

    def _make_id(self) -> str:
        """Of several that make one at once, one wins: it is made new where the store can do that."""
        made = uuid.uuid4().hex
        self._fs.makedirs(self._root, exist_ok=True)
        try:
            with self._fs.open(self._path(_ID_NAME), "xb") as file:
                file.write(made.encode())
        except FileExistsError:
            pass
        except (ValueError, NotImplementedError):  # a store without exclusive creation
            self._fs.pipe_file(self._path(_ID_NAME), made.encode())
        self._fs.invalidate_cache()
        return self._read_id()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, StoreUnavailable):
            raise
        except Exception as error:  # each store has errors of its own
            raise StoreUnavailable(f"the store of files fails: {type(error).__name__}: {error}") from error


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
