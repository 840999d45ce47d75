"""Fixtures of tests with real processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.services.batches import Files
from tests.services.pipeline import Pipeline, open_pipeline


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
