"""Runs the reproduction and writes its tables: docs/reproduction.md, bench/results/reproduction.md and .json.

    python bench/reproduction.py [--jobs 2] [--results DIR]
    python bench/reproduction.py --from bench/results/reproduction.json     # the tables again, from the record

Traces are read from the folder in L4_SHARED_DIR (default ../shared), below `traces`; without it only what is made
here is run. Each run is kept in DIR under a hash of its settings and of the code, so that a report that is cut off
goes on where it was, and nothing old is taken for new. `--available` runs nothing: it reports what is there.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reproduction_cases import MODEL, Results, Spec, code_version, shared
from reproduction_figures import Compared
from reproduction_grid import Grid
from reproduction_text import LongTables, Tables

HEAD = """# Reproduction: the tables

Every policy on every window, in seconds. [docs/reproduction.md](../../docs/reproduction.md) explains the terms and
compares.
"""
JSON, LONG, PAGE = (Path(name) for name in ("reproduction.json", "reproduction.md", "docs/reproduction.md"))


def written(page: str, blocks: dict[str, list[str]]) -> str:
    """A page with its blocks made anew. Blocks stand between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    for name, lines in blocks.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        if found:
            page = f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{rest.partition(end)[2]}"
    return page


def read(path: Path) -> tuple[str, dict[Spec, dict[str, Any]]]:
    """Figures on record, and how they were made."""
    on_record = json.loads(path.read_text("utf-8"))
    return on_record["made"], {Spec.of(one["spec"]): one["figures"] for one in on_record["runs"]}


def short(value: Any) -> Any:
    """A number to five digits."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write(path: Path, made: str, found: dict[Spec, dict[str, Any]]) -> None:
    """Figures by run, a line for each."""
    runs = [
        json.dumps(
            {"spec": spec.told, "figures": {name: short(figures[name]) for name in figures if name != "spec"}}
        )
        for spec, figures in found.items()
    ]
    path.write_text(f'{{"made": {json.dumps(made)}, "runs": [\n' + ",\n".join(runs) + "\n]}\n", "utf-8")


def main() -> None:
    """Run what is missing and write all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("build/reproduction"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the long tables")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--available", action="store_true", help="run nothing: report on the runs that are there")
    parser.add_argument("--from", dest="record", type=Path, help="report on figures on record")
    given = parser.parse_args()
    grid = Grid(has_traces=bool(given.record) or shared().is_dir())
    if given.record:
        made, found = read(given.record)
    else:
        results = Results(given.results)
        wanted = list(grid.specs())
        if not given.available:
            results.fill(wanted, jobs=given.jobs)
        found = results.found(wanted)
        made = (
            f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, code {code_version('l4')}, "
            f"{len(found)} of {len(wanted)} runs; {MODEL}, simulated"
        )
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.record:
        write(given.out / JSON, made, found)
        made, found = read(given.out / JSON)  # as rounded as the record
    compared = Compared(found)
    long = "\n".join(LongTables(grid, compared).lines())
    (given.out / LONG).write_text(
        f"{HEAD}\nMade by `python bench/reproduction.py` on {made}.\n\n{long}\n", "utf-8"
    )
    if given.page.is_file():
        blocks = {
            "made": [f"Made by `python bench/reproduction.py` on {made}."],
            **Tables(grid, compared).blocks(),
        }
        given.page.write_text(written(given.page.read_text("utf-8"), blocks), "utf-8")


if __name__ == "__main__":
    main()
