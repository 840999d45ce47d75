"""Files of a batch on a real file system: torn lines, locks, broken contents, the identity."""

from __future__ import annotations

import json
import os
import resource
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4queue.client.batch import files
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
        assert [answer["custom_id"] for _, answer in file.numbered()] == ["ü0", "ü1"]
        file.append(LINES[2])
    assert path.read_bytes() == LINES[0] + b"\n" + LINES[1] + LINES[2]


REQUEST = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}'


@pytest.mark.parametrize(
    "line",
    [
        b"text",
        b"[]",
        b"{}",
        b'{"custom_id": 5}',
        b"\xff",
        REQUEST,
        b'{"custom_id": "a", "response": null}',
        b"[" * 10**5,
    ],
)
def test_a_file_that_is_not_from_a_batch_is_not_appended_to(line: bytes, tmp_path: Path) -> None:
    """Its line is named."""
    path = tmp_path / "out"
    path.write_bytes(LINES[0] + line + b"\n" + LINES[1])
    with closing(AnswerFile(path, field="out")) as file, pytest.raises(InvalidRequest, match="line 2 of"):
        list(file.numbered())


@pytest.mark.parametrize(
    "content",
    [
        REQUEST,
        REQUEST + b"\n" + REQUEST,
        b"notes",
        b"{}",
        b"[1,\n2]",
        LINES[0] + REQUEST,
        LINES[0] + b"notes",
        b"5",
    ],
)
def test_the_end_of_a_file_that_is_not_from_a_batch_is_not_cut(content: bytes, tmp_path: Path) -> None:
    """It would be lost: an input given as the output, a text without an end of line."""
    path = tmp_path / "out"
    path.write_bytes(content)
    with (
        pytest.raises(InvalidRequest, match="is not from a batch"),
        closing(AnswerFile(path, field="out")) as file,
    ):
        list(file.numbered())
    assert path.read_bytes() == content
    path.write_bytes(b"")
    AnswerFile(path, field="out").close()  # no lock is left behind


def test_what_is_no_file_takes_no_answers(tmp_path: Path) -> None:
    """A device, a folder, a pipe."""
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/null"), tmp_path, tmp_path / "pipe"):
        with pytest.raises(InvalidRequest) as caught:
            AnswerFile(path, field="out")
        assert caught.value.field == "out"


def test_an_input_that_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    """A pipe is not opened: without a writer that waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero"), tmp_path):
        with pytest.raises(InvalidRequest) as caught:
            InputFile(path)
        assert caught.value.field == "jsonl"


def test_an_identity_is_no_pipe_and_no_folder(tmp_path: Path) -> None:
    """Neither is waited for; what stands where the new one is written gives way, unless it is a folder."""
    file, beside = IdentityFile(tmp_path / "out.batch.json"), tmp_path / "out.batch.json.new"
    os.mkfifo(file.path)
    with pytest.raises(InvalidRequest, match="delete it"):
        file.read()
    os.mkfifo(beside)
    file.write(BatchIdentity(batch_id="b"))
    assert file.read().batch_id == "b"
    beside.mkdir()
    with pytest.raises(InvalidRequest, match="cannot write") as caught:
        file.write(BatchIdentity(batch_id="c"))
    assert (caught.value.field, file.read().batch_id) == ("out", "b")


def test_a_line_longer_than_any_request_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those behind it have their places all the same."""
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 10)
    monkeypatch.setattr(files, "_READ_BYTES", 4)
    path = tmp_path / "in"
    path.write_bytes(b"x" * 10 + b"\n" + b"y" * 25 + b"\n" + b"z\n" + b"w" * 13)
    with closing(InputFile(path)) as file:
        seen = [(line.number, line.offset, line.data) for line in file.lines()]
    assert seen == [(1, 0, b"x" * 10 + b"\n"), (2, 11, b"y" * 11), (3, 37, b"z\n"), (4, 39, b"w" * 11)]


def test_only_one_writes_a_file(tmp_path: Path) -> None:
    """The second is refused until the first has closed it."""
    first = AnswerFile(tmp_path / "out", field="out")
    with closing(first), pytest.raises(InvalidRequest, match="another process"):
        AnswerFile(tmp_path / "out", field="out")
    AnswerFile(tmp_path / "out", field="out").close()


@pytest.mark.parametrize("has_another", [False, True])
def test_a_file_that_was_taken_away_is_told(has_another: bool, tmp_path: Path) -> None:
    """Nothing counts as written: what is appended to it stands nowhere."""
    path = tmp_path / "out"
    with closing(AnswerFile(path, field="out")) as file:
        file.append(LINES[0])
        file.sync()
        path.unlink()
        if has_another:
            path.write_bytes(LINES[0])
        file.append(LINES[1])
        with pytest.raises(InvalidRequest, match="removed or replaced") as caught:
            file.sync()
    assert caught.value.field == "out"


def test_a_full_disk_is_told_and_what_was_written_counts(tmp_path: Path) -> None:
    """The rest is torn, as by a crash. A limit of the process stands for the disk."""
    path, before = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    file = AnswerFile(path, field="out")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(LINES[0]) + 5, before[1]))
        file.append(LINES[0])
        file.sync()
        file.append(LINES[1])
        for write in (file.flush, file.sync, file.close):
            with pytest.raises(InvalidRequest, match="make room") as caught:
                write()
            assert caught.value.field == "out"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.close()
    size_bytes = path.stat().st_size
    with closing(AnswerFile(path, field="out")) as again:
        assert [answer["custom_id"] for _, answer in again.numbered()] == ["ü0"]
    assert path.stat().st_size == size_bytes - 5


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
    for broken in (
        "{",
        "[]",
        '{"batch_id": 5}',
        '{"batch_id": "b", "num_submitted": "x"}',
        "[" * 10**5,
        "9" * 5000,
    ):
        file.path.write_text(broken)
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
        ({"path_errors": "out.batch.json"}, "out"),
        ({"path_in": "out.batch.json"}, "out"),
        ({"path_in": "out.batch.json.new"}, "out"),
        ({"path_errors": "out.batch.json.new"}, "out"),
        ({"path_in": "\0"}, "out"),
        ({"path_out": "\ud800"}, "out"),
        ({"path_in": 5}, "out"),
        ({"max_in_flight": True}, "max_in_flight"),
        ({"max_in_flight": 10**400}, "max_in_flight"),
        ({"priority": float("nan")}, "priority"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"path_out": ""}, "out"),
        ({"path_out": "/"}, "out"),
        ({"path_out": "", "path_errors": "errors"}, "out"),
        ({"cancel_on_exit": "no"}, "cancel_on_exit"),
        ({"keep_results": 1}, "keep_results"),
    ],
)
def test_options_that_cannot_be_used_are_named(more: dict[str, object], field: str) -> None:
    """Before any file is touched."""
    with pytest.raises(InvalidRequest) as caught:
        batch_options(**{"path_in": "in", "path_out": "out", **more})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_two_names_of_one_file_are_one_file(tmp_path: Path) -> None:
    """By a link of either kind."""
    (tmp_path / "in").write_bytes(REQUEST)
    os.link(tmp_path / "in", tmp_path / "hard")
    (tmp_path / "soft").symlink_to(tmp_path / "in")
    for name in ("hard", "soft"):
        with pytest.raises(InvalidRequest, match="different files"):
            batch_options(tmp_path / "in", tmp_path / name)
