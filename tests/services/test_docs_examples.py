"""Examples that pages mark `python runnable`, as they stand, against a deployment with an emulated engine."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from tests.services.pipeline import open_pipeline

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RUNNABLE = re.compile(r"^```python runnable\n(.*?)^```", re.MULTILINE | re.DOTALL)
BATCH_FILE = re.compile(r"^```json\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(RUNNABLE.findall(page.read_text("utf-8")))
]


async def run(code: str, redis_url: str, namespace: str, folder: Path) -> str:
    """What an example prints, in a process and a folder of its own. Its errors fail the test."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("L4_")}
    environment |= {"L4_REDIS_URL": redis_url, "L4_NAMESPACE": namespace, "PYTHONPATH": str(ROOT)}
    example = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=folder, env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(120):
            out, errors = await example.communicate()
    finally:
        if example.returncode is None:
            example.kill()
            await example.wait()
    assert example.returncode == 0, errors.decode()
    return out.decode()


def batch_file() -> str:
    """The input file that docs/batches.md shows."""
    found = BATCH_FILE.search((ROOT / "docs/batches.md").read_text("utf-8"))
    assert found is not None
    return found[1]


def test_readme_and_the_page_of_batches_have_examples() -> None:
    assert {str(example.id) for example in EXAMPLES} >= {"README-0", "batches-0"}


@pytest.mark.parametrize("code", EXAMPLES)
async def test_an_example_runs_as_it_is_written(code: str, redis_url: str, namespace: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(batch_file(), "utf-8")
    async with open_pipeline(redis_url, namespace) as pipeline:
        pipeline.start("w0")
        assert await run(code, redis_url, namespace, tmp_path)


async def test_the_client_example_of_readme_prints_a_result_and_three_completions(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    (code,) = RUNNABLE.findall((ROOT / "README.md").read_text("utf-8"))
    async with open_pipeline(redis_url, namespace) as pipeline:
        pipeline.start("w0")
        lines = (await run(code, redis_url, namespace, tmp_path)).splitlines()
    assert sum(line.endswith(" done") for line in lines) == 3
    (result,) = [line for line in lines if line.startswith("length ")]
    assert result.split()[2] == "32"


async def test_the_batch_example_answers_every_line_of_the_file_on_its_page(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    (code,) = RUNNABLE.findall((ROOT / "docs/batches.md").read_text("utf-8"))
    (tmp_path / "in.jsonl").write_text(batch_file(), "utf-8")
    async with open_pipeline(redis_url, namespace) as pipeline:
        pipeline.start("w0")
        printed = await run(code, redis_url, namespace, tmp_path)
    assert printed.splitlines()[-1].split()[:2] == ["2", "0"]
    assert len((tmp_path / "out.jsonl").read_text("utf-8").splitlines()) == 2
