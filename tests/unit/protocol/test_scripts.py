"""Seeded mistakes fit the scripts they are planted in."""

from __future__ import annotations

import pytest

from l4queue.protocol.scripts import lua_text
from tests.protocol.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_of_a_mutant_occurs_once(mutant: Mutant) -> None:
    assert lua_text(mutant.script).count(mutant.old) == 1
