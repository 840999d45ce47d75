"""Source of batch requests: reads the input file and reports every line that cannot be sent."""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from l4queue.client.batch.answers import (
    Answer,
    duplicate_line,
    invalid_line,
    read_answer,
    refused_line,
    success_line,
)
from l4queue.client.batch.files import InputFile, RawLine
from l4queue.client.batch.flight import Submission, Ticket
from l4queue.client.batch.halves import Halves
from l4queue.client.batch.index import LineIndex, LineState, word_of
from l4queue.client.batch.lines import (
    LineObject,
    body_of,
    digest_of_bytes,
    object_of,
    parse_line,
    written_names,
)
from l4queue.client.batch.options import LineOptions
from l4queue.client.batch.places import Answers
from l4queue.client.batch.served import ServedModels
from l4queue.client.core import ClientCore, request_id_of
from l4queue.errors import ConfigError, InvalidRequest, ServiceUnavailable
from l4queue.protocol.records import OutputEntry, RequestRecord
from l4queue.sampling import DEFAULT_MAX_TOKENS

__all__ = ("LineSource", "check_files")

_LOOK_EVERY_LINES = 1000  # between two looks at the stop flag: milliseconds
_STRAY = "answers no line of this input: another input was computed to it, or the same with other options"
_UNSAID = "does not say which line it answers: an earlier release wrote it, or another program"


def check_files(
    lines: InputFile,
    out: Answers,
    errors: Answers,
    *,
    stop: threading.Event,
    progress: Callable[[int], None],
    max_tokens: int | None,
    batch_id: str | None = None,
) -> LineIndex | None:
    """First pass: which lines there are and which of them are finished; None when told to stop.

    `progress` is called with the number of lines read. InvalidRequest names a line of an answer file that is
    not from a batch, or that answers another line than the input has. Answers of earlier releases do not say
    which line they answer: they count where the batch `batch_id` has not ended, by the ids of its requests.
    """
    proofs = _Proofs(max_tokens=max_tokens, batch_id=batch_id, is_wanted=not (out.is_empty and errors.is_empty))
    index = LineIndex(num_proofs=proofs.number)
    for line in lines.lines():
        if line.number % _LOOK_EVERY_LINES == 0:
            progress(line.number)
            if stop.is_set():
                return None
        if not line.data.strip():
            index.add(None, is_empty=True)
            continue
        try:
            found = object_of(line.data)
        except InvalidRequest:
            index.add(None, proofs=proofs.of_bytes(line.data))
        else:
            index.add(found.custom_id, proofs=proofs.of_object(found, line.data))
    _match(index, out, errors, proofs)
    return index


def _match(index: LineIndex, out: Answers, errors: Answers, proofs: _Proofs) -> None:
    """Mark the lines that have an answer; InvalidRequest names an answer that belongs to none."""
    places: dict[LineState, array[int]] = {LineState.SUCCEEDED: array("Q"), LineState.FAILED: array("Q")}
    reported: dict[int, int] = {}
    for file, state in ((out, LineState.SUCCEEDED), (errors, LineState.FAILED)):
        for place, told in file.numbered():
            answer = read_answer(told)
            if answer is None:
                raise file.unusable(place, "is not an answer")
            if answer.is_success is not (state is LineState.SUCCEEDED):
                what = "is an answer among errors" if answer.is_success else "is an error among answers"
                raise file.unusable(place, what)
            if answer.line is not None:
                if not proofs.is_shown(index, answer):
                    raise _stray(file, place)
                reported[answer.line] = place
            elif answer.custom_id is not None:
                index.add_finished(answer.custom_id, state, proof=word_of(answer.digest or answer.name))
                places[state].append(place)
    strays = index.resolve(reported=reported)
    if strays.succeeded:
        raise _stray(out, places[LineState.SUCCEEDED][strays.succeeded[0]])
    if strays.failed:
        raise _stray(errors, places[LineState.FAILED][strays.failed[0]])
    if strays.reported:
        raise _stray(errors, reported[strays.reported[0]])


def _stray(file: Answers, place: int) -> InvalidRequest:
    """The error of an answer that belongs to no line; with its custom_id, if it has one."""
    told = next(told for number, told in file.numbered() if number == place)
    answer = read_answer(told)
    why = _STRAY if answer is not None and answer.digest else _UNSAID
    custom_id = told["custom_id"]
    return file.unusable(place, f"{why} (custom_id {custom_id[:80]!r})" if custom_id else why)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proofs:
    """Proof that an answer belongs to a line: its digest, or the id of its request in an unfinished batch."""

    max_tokens: int | None
    batch_id: str | None
    is_wanted: bool

    @property
    def number(self) -> int:
        """Proofs of each line."""
        return 0 if not self.is_wanted else 1 if self.batch_id is None else 3

    def of_bytes(self, raw: bytes) -> tuple[int, ...]:
        """Of a line that is no request."""
        return (word_of(digest_of_bytes(raw)), 0, 0)[: self.number]

    def of_object(self, found: LineObject, raw: bytes) -> tuple[int, ...]:
        """Of a line that may be one."""
        if not self.is_wanted:
            return ()
        digest = word_of(found.digest(max_tokens=self.max_tokens))
        if self.batch_id is None:
            return (digest,)
        key = _key(self.batch_id, self.max_tokens, raw)
        return digest, word_of(request_id_of(key)), word_of(_refused_id(key))

    def is_shown(self, index: LineIndex, answer: Answer) -> bool:
        """Whether an error about a line is about this one."""
        if not answer.digest:
            return self.batch_id is not None
        return answer.line is not None and index.has_proof(answer.line, word_of(answer.digest))


def _key(batch_id: str, max_tokens: int | None, raw: bytes) -> str:
    """The idempotency key of a line."""
    return (
        "batch:"
        + hashlib.sha256(f"{batch_id}:{max_tokens or DEFAULT_MAX_TOKENS}:".encode() + raw.strip()).hexdigest()
    )


def _refused_id(key: str) -> str:
    return key[-32:]


class LineSource:
    """Second pass: the lines that are to be sent, in order.

    `fail` is told of each line that never can be sent: its number and its line for the error file. `halves` is the
    gateway that writes requests and makes their answers, if there is one. Where that is away
    ServiceUnavailable is raised: the same call goes on later.
    """

    def __init__(
        self,
        lines: InputFile,
        index: LineIndex,
        *,
        options: LineOptions,
        batch_id: str,
        core: ClientCore,
        served: ServedModels,
        halves: Halves | None,
        fail: Callable[[int, bytes], None],
    ) -> None:
        self._lines = lines
        self._index = index
        self._options = options
        self._batch_id = batch_id
        self._core = core
        self._served = served
        self._halves = halves
        self._fail = fail
        self._due: RawLine | None = None
        self._version = lines.opened_version
        self._open = self._open_lines()
        self.is_exhausted = False

    def next(self) -> Submission | None:
        """The next line to be sent; None when there is none. InvalidRequest when the file has changed."""
        while True:
            self._due = self._due or next(self._open, None)
            if self._due is None:
                self.is_exhausted = True
                return None
            submission = self._submission(self._due)
            self._due = None
            if submission is not None:
                return submission

    def again(self, ticket: Ticket) -> Submission | None:
        """A line once more, because nothing is known of it now. InvalidRequest when the file has changed."""
        self._check_version()
        return self._submission(self._lines.again(ticket.number, ticket.offset, ticket.size), is_again=True)

    def answer(
        self, ticket: Ticket, record: RequestRecord, outputs: Sequence[OutputEntry], *, model: str
    ) -> tuple[bytes, bool]:
        """The line for the output file of a request that is done, or for the error file, and which of both."""
        made = None
        if ticket.by_gateway and self._halves is not None:
            self._check_version()
            line = self._lines.again(ticket.number, ticket.offset, ticket.size)
            body = body_of(line.data, ticket.url, max_tokens=self._options.max_tokens)
            try:
                made = self._halves.answer(ticket.url, body, request_id=record.request_id)
            except InvalidRequest as error:
                told = refused_line(
                    error,
                    request_id=record.request_id,
                    custom_id=ticket.custom_id,
                    digest=ticket.digest,
                    status=500,
                )
                return told, False
        told = success_line(
            record,
            outputs,
            custom_id=ticket.custom_id,
            url=ticket.url,
            model=model,
            digest=ticket.digest,
            made=made,
        )
        return told, True

    def _open_lines(self) -> Iterator[RawLine]:
        for line in self._lines.lines():
            if line.number > len(self._index):
                raise self._has_changed()
            if line.number % _LOOK_EVERY_LINES == 0:
                self._check_version()
            state = self._index.state(line.number)
            if state is LineState.OPEN:
                yield line
            elif state is LineState.INVALID:
                self._report_invalid(line)
            elif state is LineState.DUPLICATE:
                self._report_duplicate(line)
        self._check_version()

    def _check_version(self) -> None:
        if self._lines.version() != self._version:
            raise self._has_changed()

    def _has_changed(self) -> InvalidRequest:
        return InvalidRequest(f"{self._lines.path} has changed; run the command again", field="jsonl")

    def _submission(self, line: RawLine, *, is_again: bool = False) -> Submission | None:
        """A line ready to be sent; None when its body cannot be right, which is reported."""
        options = self._options
        key = _key(self._batch_id, options.max_tokens, line.data)
        try:
            parsed = parse_line(
                line.data,
                max_tokens=options.max_tokens,
                priority=options.priority,
                idempotency_key=key,
                writer=self._halves,
            )
            self._served.check(parsed.model)
            prepared = self._core.prepare(parsed.spec)
        except InvalidRequest as error:
            self._report_refused(line, key, error)
            return None
        except (MemoryError, ServiceUnavailable, ConfigError):
            raise
        except Exception as error:  # whatever a line may do, the others are computed
            refusal = InvalidRequest(f"cannot be read: {type(error).__name__}", field="body")
            self._report_refused(line, key, refusal)
            return None
        ticket = Ticket(
            request_id=prepared.request_id,
            key_id=prepared.request_id,
            number=line.number,
            offset=line.offset,
            size=len(line.data),
            custom_id=parsed.custom_id,
            url=parsed.url,
            model=parsed.model or self._core.settings.model,
            digest=parsed.digest,
            names=parsed.names,
            by_gateway=parsed.by_gateway,
        )
        return Submission(ticket=ticket, prepared=prepared, is_again=is_again)

    def _report_invalid(self, line: RawLine) -> None:
        try:
            object_of(line.data)
        except InvalidRequest as error:
            digest = digest_of_bytes(line.data)
            self._fail(line.number, invalid_line(error, number=line.number, digest=digest))

    def _report_duplicate(self, line: RawLine) -> None:
        found, first = object_of(line.data), self._index.first_of(line.number)
        digest = found.digest(max_tokens=self._options.max_tokens)
        answer = duplicate_line(found.custom_id, number=line.number, first=first, digest=digest)
        self._fail(line.number, answer)

    def _report_refused(self, line: RawLine, key: str, error: InvalidRequest) -> None:
        found = object_of(line.data)
        digest = found.digest(max_tokens=self._options.max_tokens)
        answer = refused_line(
            error,
            request_id=_refused_id(key),
            custom_id=found.custom_id,
            digest=digest,
            names=written_names(found.fields.get("body")),
        )
        self._fail(line.number, answer)
