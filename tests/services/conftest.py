"""Fixtures of tests with real processes."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from l4queue import AsyncClient, Client, Settings
from tests.services.batches import Files
from tests.services.foreign_place import Place, open_place
from tests.services.pipeline import Pipeline, open_pipeline

COMPILER = re.compile(r"(^|-)(cc|c\+\+|g\+\+|gcc|clang|clang\+\+)(-[0-9.]+)?$")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without merges: one token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    built = Tokenizer(models.BPE(vocab=letters, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=built, model_max_length=16_384).save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """In the test's own folder."""
    return Files(tmp_path)


@pytest.fixture
async def pipeline(redis_url: str, namespace: str) -> AsyncIterator[Pipeline]:
    """A dispatcher with upkeep; no worker yet."""
    async with open_pipeline(redis_url, namespace) as opened:
        yield opened


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[AsyncClient]:
    """An asyncio client of the scene's namespace."""
    async with AsyncClient(settings=Settings(redis_url=redis_url, namespace=namespace)) as opened:
        yield opened


@pytest.fixture
def blocking(redis_url: str, namespace: str) -> Iterator[Client]:
    """A blocking one."""
    with Client(settings=Settings(redis_url=redis_url, namespace=namespace)) as opened:
        yield opened


@pytest.fixture
async def place(redis_url: str, namespace: str) -> AsyncIterator[Place]:
    """One that serves already, for foreign entries."""
    async with open_place(redis_url, namespace) as opened:
        yield opened


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A PATH with every program but compilers, as in a container image, and nothing compiled earlier."""
    programs = tmp_path_factory.mktemp("bin")
    for folder in reversed(os.environ["PATH"].split(os.pathsep)):
        for path in Path(folder).glob("*"):
            if path.is_file() and not COMPILER.search(path.name):
                (programs / path.name).unlink(missing_ok=True)
                (programs / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(programs))
        patch.delenv("CXX", raising=False)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield
