"""Files of a batch on a real file system: torn lines, locks, broken contents, the identity."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.client.batch.files import AnswerFile, BatchIdentity, IdentityFile, InputFile
from l4queue.client.batch.options import batch_options
from l4queue.errors import InvalidRequest

LINES = [json.dumps({"custom_id": f"ü{i}", "response": "x" * i}).encode() + b"\n" for i in range(3)]
WHOLE = b"".join(LINES)


@given(cut=st.integers(0, len(WHOLE)), tail=st.sampled_from((b"", b"\0\0\0", b'{"cus')))
def test_a_file_cut_anywhere_goes_on_with_whole_lines(
    cut: int, tail: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Nothing complete is lost, nothing torn is kept, and what is appended stands on a line of its own."""
    path = tmp_path_factory.mktemp("cut") / "out"
    path.write_bytes(WHOLE[:cut] + tail)
    with closing(AnswerFile(path, field="out")) as file:
        file.append(b'{"custom_id": "new"}\n')
        file.sync()
    ids = [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]

    num_whole = sum(1 for i in range(3) if len(b"".join(LINES[: i + 1])) <= cut)
    is_whole_but_its_end = not tail and cut in [len(b"".join(LINES[: i + 1])) - 1 for i in range(3)]
    assert ids == [*(f"ü{i}" for i in range(num_whole + is_whole_but_its_end)), "new"]


def test_answers_are_those_of_the_file_and_can_be_appended_to(tmp_path: Path) -> None:
    """Empty lines do no harm; reading does not move the place where the next one goes."""
    path = tmp_path / "out"
    path.write_bytes(LINES[0] + b"\n" + LINES[1])
    with closing(AnswerFile(path, field="out")) as file:
        assert [answer["custom_id"] for answer in file.answers()] == ["ü0", "ü1"]
        file.append(LINES[2])
    assert path.read_bytes() == LINES[0] + b"\n" + LINES[1] + LINES[2]


@pytest.mark.parametrize("line", [b"text", b"[]", b"{}", b'{"custom_id": 5}', b"\xff"])
def test_a_file_that_is_not_from_a_batch_is_not_appended_to(line: bytes, tmp_path: Path) -> None:
    """Its line is named."""
    path = tmp_path / "out"
    path.write_bytes(LINES[0] + line + b"\n" + LINES[1])
    with closing(AnswerFile(path, field="out")) as file, pytest.raises(InvalidRequest, match="line 2 of"):
        list(file.answers())


def test_only_one_writes_a_file(tmp_path: Path) -> None:
    """The second is refused until the first has closed it."""
    first = AnswerFile(tmp_path / "out", field="out")
    with closing(first), pytest.raises(InvalidRequest, match="another process"):
        AnswerFile(tmp_path / "out", field="out")
    AnswerFile(tmp_path / "out", field="out").close()


def test_files_that_cannot_be_opened_name_their_option(tmp_path: Path) -> None:
    """Missing input, output in no folder."""
    with pytest.raises(InvalidRequest) as caught:
        InputFile(tmp_path / "none")
    assert caught.value.field == "jsonl"
    with pytest.raises(InvalidRequest) as caught:
        AnswerFile(tmp_path / "none" / "out", field="out")
    assert caught.value.field == "out"


def test_a_line_is_found_again_while_others_are_read(tmp_path: Path) -> None:
    """Also the last one, which has no end."""
    path = tmp_path / "in"
    path.write_bytes(b"one\n\ntwo\r\nthree")
    with closing(InputFile(path)) as file:
        seen = []
        for line in file.lines():
            seen.append(line)
            assert file.again(seen[0].number, seen[0].offset, len(seen[0].data)) == seen[0]
            assert file.again(line.number, line.offset, len(line.data)) == line
    assert [(line.number, line.data) for line in seen] == [
        (1, b"one\n"),
        (2, b"\n"),
        (3, b"two\r\n"),
        (4, b"three"),
    ]


def test_an_identity_lasts_until_it_is_removed(tmp_path: Path) -> None:
    """A new one each time before it is written; a broken one is not guessed at."""
    file = IdentityFile(tmp_path / "out.batch.json")
    assert file.read().batch_id != file.read().batch_id
    identity = BatchIdentity(batch_id="b", num_submitted=5)
    file.write(identity)
    assert file.read() == identity
    file.path.write_text("{")
    with pytest.raises(InvalidRequest, match="delete it"):
        file.read()
    file.remove()
    file.remove()
    assert file.read().num_submitted == 0


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"path_out": "in"}, "out"),
        ({"path_errors": "out"}, "out"),
        ({"max_in_flight": 0}, "max_in_flight"),
        ({"priority": 101}, "priority"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"speed": 3}, "speed"),
    ],
)
def test_options_that_cannot_be_used_are_named(more: dict[str, object], field: str) -> None:
    """Before any file is touched."""
    with pytest.raises(InvalidRequest) as caught:
        batch_options(**{"path_in": "in", "path_out": "out", **more})  # type: ignore[arg-type]
    assert caught.value.field == field
