"""Reports of results that were read: in batches, none twice, none lost on the way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from l4queue.client.read_marks import ReadMarks
from l4queue.protocol.keys import Keys
from l4queue.protocol.retention import Retention


@given(st.lists(st.floats(0.0, 2.0), max_size=600))
def test_each_read_is_reported_once_and_in_few_calls(pauses_s: list[float]) -> None:
    """At most one report in five seconds, but for full ones; the rest at the end."""
    marks, now_s, reported, num_early = ReadMarks(Retention(Keys("t")), now_s=0.0), 0.0, [], 0
    for number, pause_s in enumerate(pauses_s):
        now_s += pause_s
        report = marks.add(str(number), now_s=now_s)
        if report is not None:
            reported += report.args
            num_early += len(report.args) < 256
    rest = marks.rest()
    reported += rest.args if rest is not None else ()

    assert reported == [str(number) for number in range(len(pauses_s))]
    assert num_early <= now_s / 5
    assert marks.rest() is None
