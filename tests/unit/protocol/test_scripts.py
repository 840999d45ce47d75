"""Lists in the Lua scripts are those of their readers; seeded mistakes fit the scripts they are planted in."""

from __future__ import annotations

import re

import pytest

from l4queue.protocol.records import RequestRecord
from l4queue.protocol.scripts import lua_text
from tests.protocol.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_of_a_mutant_occurs_once(mutant: Mutant) -> None:
    assert lua_text(mutant.script).count(mutant.old) == 1


def test_the_end_of_an_output_tells_all_of_the_record() -> None:
    """Its state is told by the end itself; what was dropped is read from the record."""
    text = lua_text("endings")
    (listed,) = re.findall(r"local TOLD = \{([^}]*)\}", text)
    names = re.findall(r"'(\w+)'", listed)
    names += re.findall(r"facts\[i\] == '(\w+)'", text)  # of those that are stored with the end
    names += re.findall(r"entry\[#entry \+ 1\], entry\[#entry \+ 2\] = '(\w+)'", text)
    assert sorted(names) == sorted(set(RequestRecord.field_names()) - {"state", "dropped_ms"})
