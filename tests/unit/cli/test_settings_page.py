"""docs/settings.md is generated and up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from l4queue.config import Settings

ROOT = Path(__file__).parents[3]
GENERATOR = ROOT / "tools" / "generate_settings.py"


def test_the_page_is_what_the_settings_say() -> None:
    """Otherwise: make docs."""
    done = subprocess.run(
        [sys.executable, GENERATOR, "--check"], capture_output=True, text=True, timeout=300, check=False
    )

    assert done.returncode == 0, done.stderr


def test_every_setting_has_a_row_with_a_meaning() -> None:
    """An undocumented setting is not a setting."""
    rows = [line.split(" | ") for line in (ROOT / "docs" / "settings.md").read_text().splitlines()]
    documented = {row[0].strip("| `"): row[-1].strip(" |") for row in rows if row[0].startswith("| `L4_")}

    assert set(documented) == {f"L4_{name.upper()}" for name in Settings.model_fields}
    assert all(documented.values())
