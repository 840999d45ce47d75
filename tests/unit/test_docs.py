"""Pages cannot rot: links, anchors, settings, commands and placeholders of every page, held against the code."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest
import typer
from pydantic import TypeAdapter

from l4queue.cli import build_app
from l4queue.config import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/results/*.md")])
SOURCES = {".py", ".yml", ".sh", ""}
CODE = ("l4queue", "dispatcher", "workers", "tests", "bench", "tools", "docker", "Makefile", "docker-compose.yml")

PLACEHOLDER = re.compile(r"@[A-Z]{2,}@|\bTBD\b|\bTODO\b|\bFIXME\b|\bFILL ?IN\b")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
VARIABLE = re.compile(r"\bL4_[A-Z0-9]+(?:_[A-Z0-9]+)*\b(?!_)")
QUOTED_DEFAULT = re.compile(
    r"`(L4_[A-Z0-9_]+)`\s\((\d[\d,.]*\d|\d)(?: ?(ms|s|GiB|MiB|tokens|%))?(?: by default)?\)"
)
SOURCE_FILE = re.compile(r"(?<![\w./-])((?:\w[\w-]*/)+\w+\.(?:py|lua))\b")
ASSIGNED = re.compile(r"`(L4_[A-Z0-9_]+)=([^`\s]*)`")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(text: str, *languages: str) -> Iterator[str]:
    """Contents of the fenced blocks in one of these languages."""
    for found in FENCE.finditer(text):
        if found[1] in languages:
            yield found[2]


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", text)


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub makes of the headings of a page."""
    seen: dict[str, int] = {}
    found = set()
    for title in re.findall(r"^#+ +(.+?) *#*$", prose(page.read_text("utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = seen.get(slug, 0)
        seen[slug] = count + 1
        found.add(slug if count == 0 else f"{slug}-{count}")
    return frozenset(found)


@cache
def variables_in_code() -> frozenset[str]:
    """Every environment variable of this project that its code or its tests name, settings included."""
    found = {"L4_" + name.upper() for name in Settings.model_fields}
    for name in CODE:
        path = ROOT / name
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in SOURCES]
        for file in files:
            if file.is_file() and file != Path(__file__):
                found.update(VARIABLE.findall(file.read_text("utf-8", errors="replace")))
    return frozenset(found)


@pages
def test_no_page_has_a_placeholder(page: Path) -> None:
    assert PLACEHOLDER.findall(page.read_text("utf-8")) == []


@pages
def test_every_relative_link_and_anchor_resolves(page: Path) -> None:
    broken = []
    for target in LINK.findall(prose(page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.resolve())):
            broken.append(target)
    assert broken == []


@cache
def files_in_tree() -> tuple[str, ...]:
    """Paths of the source files, each after a slash: a page may leave out the folders at the beginning."""
    found = [p for name in CODE for p in (ROOT / name).rglob("*") if p.suffix in {".py", ".lua"}]
    return tuple("/" + str(p.relative_to(ROOT)) for p in found)


@pages
def test_every_source_file_that_a_page_names_exists(page: Path) -> None:
    named = set(SOURCE_FILE.findall(page.read_text("utf-8")))
    missing = {name for name in named if not any(path.endswith("/" + name) for path in files_in_tree())}
    assert missing == set()


def test_the_tables_of_the_reproduction_are_those_of_its_record(tmp_path: Path) -> None:
    """Otherwise: python bench/reproduction.py --from bench/results/reproduction.json"""
    page, record = ROOT / "docs" / "reproduction.md", ROOT / "bench" / "results" / "reproduction.json"
    made = tmp_path / page.name
    made.write_text(page.read_text("utf-8"), "utf-8")
    command = [sys.executable, "bench/reproduction.py", "--from", str(record), "--out", str(tmp_path / "long")]

    subprocess.run([*command, "--page", str(made)], cwd=ROOT, check=True)

    assert made.read_text("utf-8") == page.read_text("utf-8")
    long = "reproduction.md"
    assert (tmp_path / "long" / long).read_text("utf-8") == (record.parent / long).read_text("utf-8")


def test_readme_links_every_page_of_the_docs() -> None:
    linked = set(LINK.findall(prose((ROOT / "README.md").read_text("utf-8"))))
    pages_of_docs = {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md")}
    assert pages_of_docs - linked == set()


@pages
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    named = set(VARIABLE.findall(page.read_text("utf-8")))
    assert named - variables_in_code() == set()


@pages
def test_every_default_that_a_page_quotes_is_the_default(page: Path) -> None:
    wrong = []
    for name, number, unit in QUOTED_DEFAULT.findall(page.read_text("utf-8")):
        field = Settings.model_fields.get(name.removeprefix("L4_").lower())
        if field is None or not isinstance(field.default, (int, float)):
            continue
        quoted = float(number.replace(",", "")) * {"GiB": 2.0**30, "MiB": 2.0**20}.get(unit, 1.0)
        if quoted != field.default:
            wrong.append(f"{name} ({number} {unit}) is {field.default}")
    assert wrong == []


@pages
def test_every_value_that_a_page_gives_a_setting_is_accepted(page: Path) -> None:
    for name, value in ASSIGNED.findall(page.read_text("utf-8")):
        field = Settings.model_fields.get(name.removeprefix("L4_").lower())
        if field is not None and value and value.upper() != value.strip("."):
            TypeAdapter(field.annotation).validate_strings(value)


def commands(page: Path) -> list[str]:
    """The command lines of `l4queue` in the console blocks of a page, continued lines joined."""
    found = []
    for block in blocks(page.read_text("utf-8"), "console", "bash", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ").strip()
            if line.startswith("$ ") and re.match(r"(?:L4_\w+=\S+ +)*l4queue\b", command):
                found.append(re.sub(r"^(?:L4_\w+=\S+ +)*", "", command))
    return found


def parse(arguments: list[str]) -> None:
    """Parse as the command line does, down to the last subcommand, and run nothing. Raises click's errors."""
    command: click.Command = typer.main.get_command(build_app())
    context = click.Context(command)
    while isinstance(command, click.Group):
        name, found, arguments = command.resolve_command(context, arguments)
        assert found is not None
        command = found
        if not isinstance(command, click.Group):
            command.make_context(name, arguments, parent=context)


@pages
def test_every_command_line_of_a_page_parses(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        words = shlex.split(re.split(r" [|&>#] ?|&$", line)[0], comments=True)[1:]
        for word in words:  # files that a reader has
            if re.search(r"\.(csv|jsonl|json|gz)$", word) and "/" not in word:
                (tmp_path / word).touch()
        try:
            parse(words)
        except (click.UsageError, click.exceptions.Exit) as error:
            pytest.fail(f"{line}: {error}")
