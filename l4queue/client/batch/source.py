"""From the input file to requests that can be sent; what cannot be sent is reported on the way."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator

from l4queue.client.batch.answers import duplicate_line, invalid_line, is_about_a_line, refused_line
from l4queue.client.batch.files import AnswerFile, InputFile, RawLine
from l4queue.client.batch.flight import Submission, Ticket
from l4queue.client.batch.index import LineIndex, LineState
from l4queue.client.batch.lines import custom_id_of, parse_line
from l4queue.client.batch.options import BatchOptions
from l4queue.client.compose import Composer
from l4queue.errors import InvalidRequest
from l4queue.sampling import DEFAULT_MAX_TOKENS

__all__ = ("LineSource", "check_files")

_LOOK_EVERY_LINES = 1000


def check_files(
    lines: InputFile,
    out: AnswerFile,
    errors: AnswerFile,
    *,
    stop: threading.Event,
    progress: Callable[[int], None],
) -> LineIndex | None:
    """First pass: which lines there are and which of them are finished; None when told to stop.

    `progress` is called with the number of lines read. InvalidRequest names a line of an answer file that is
    not from a batch.
    """
    index = LineIndex()
    for line in lines.lines():
        if line.number % _LOOK_EVERY_LINES == 0:
            progress(line.number)
            if stop.is_set():
                return None
        if not line.data.strip():
            index.add(None, is_empty=True)
            continue
        try:
            index.add(custom_id_of(line.data))
        except InvalidRequest:
            index.add(None)
    for answer in out.answers():
        if answer["custom_id"] is not None:
            index.add_finished(answer["custom_id"], LineState.SUCCEEDED)
    reported = []
    for answer in errors.answers():
        number = is_about_a_line(answer)
        if number is not None:
            reported.append(number)
        elif answer["custom_id"] is not None:
            index.add_finished(answer["custom_id"], LineState.FAILED)
    index.resolve(reported=reported)
    return index


class LineSource:
    """Second pass: the lines that are to be sent, in order.

    `fail` is told of each line that never can be sent: its number and its line for the error file.
    """

    def __init__(
        self,
        lines: InputFile,
        index: LineIndex,
        *,
        options: BatchOptions,
        batch_id: str,
        composer: Composer,
        fail: Callable[[int, bytes], None],
    ) -> None:
        self._lines = lines
        self._index = index
        self._options = options
        self._salt = f"{batch_id}:{options.max_tokens or DEFAULT_MAX_TOKENS}:".encode()
        self._composer = composer
        self._fail = fail
        self._version = lines.version()
        self._open = self._open_lines()
        self.is_exhausted = False

    def next(self) -> Submission | None:
        """The next line to be sent; None when there is none. InvalidRequest when the file has changed."""
        submission = next(self._open, None)
        self.is_exhausted = submission is None
        return submission

    def again(self, ticket: Ticket) -> Submission | None:
        """A line once more, because nothing is known of it any longer."""
        return self._submission(self._lines.again(ticket.number, ticket.offset, ticket.size), is_again=True)

    def _open_lines(self) -> Iterator[Submission]:
        for line in self._lines.lines():
            is_known = line.number <= len(self._index)
            if not is_known or (line.number % _LOOK_EVERY_LINES == 0 and self._lines.version() != self._version):
                raise InvalidRequest(f"{self._lines.path} has changed; run the command again", field="jsonl")
            state = self._index.state(line.number)
            if state is LineState.OPEN:
                submission = self._submission(line)
                if submission is not None:
                    yield submission
            elif state is LineState.INVALID:
                self._report_invalid(line)
            elif state is LineState.DUPLICATE:
                first = self._index.first_of(line.number)
                self._fail(line.number, duplicate_line(custom_id_of(line.data), number=line.number, first=first))

    def _submission(self, line: RawLine, *, is_again: bool = False) -> Submission | None:
        """A line ready to be sent; None when its body cannot be right, which is reported."""
        options = self._options
        key = "batch:" + hashlib.sha256(self._salt + line.data.strip()).hexdigest()
        try:
            parsed = parse_line(
                line.data, max_tokens=options.max_tokens, priority=options.priority, idempotency_key=key
            )
        except InvalidRequest as error:
            answer = refused_line(error, request_id=key[-32:], custom_id=custom_id_of(line.data))
            self._fail(line.number, answer)
            return None
        prepared = self._composer.prepare(parsed.spec)
        ticket = Ticket(
            request_id=prepared.request_id,
            number=line.number,
            offset=line.offset,
            size=len(line.data),
            custom_id=parsed.custom_id,
            url=parsed.url,
            model=parsed.model or self._composer.settings.model,
        )
        return Submission(ticket=ticket, prepared=prepared, is_again=is_again)

    def _report_invalid(self, line: RawLine) -> None:
        try:
            custom_id_of(line.data)
        except InvalidRequest as error:
            self._fail(line.number, invalid_line(error, number=line.number))
