"""Task events of requests, as a receiver of Celery's own gets them through an in-memory broker."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from celery.events.receiver import EventReceiver
from celery.events.state import State

from workers.host.task_events import TOTALS, Budget, EventSender
from workers.telemetry.observer import LEASE_ENDED, RequestView

WAITED_S = 70.0


class Clock:
    """A clock that stands still until told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Receiver:
    """Celery's receiver and its state, as Flower has them."""

    def __init__(self, app: Celery) -> None:
        self.state = State()
        self.events: list[dict[str, Any]] = []
        self._connection = app.connection_for_read()
        self._receiver = EventReceiver(self._connection, handlers={"*": self._on_event}, app=app)
        # Bound before anything is sent: events are not kept for those who come late.
        self._consumer = self._receiver.get_consumers(
            lambda *args, **given: self._connection.Consumer(*args, **given), self._connection.default_channel
        )[0]
        self._consumer.consume()

    def _on_event(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self.state.event(dict(event))

    def types(self, uuid: str) -> list[str]:
        """Event types of one request in the order of arrival."""
        return [event["type"] for event in self.events if event.get("uuid") == uuid]

    def tasks(self) -> list[dict[str, Any]]:
        """The events of requests."""
        return [event for event in self.events if event["type"].startswith("task-")]

    def totals(self) -> dict[str, int]:
        """What the sender told last of how many there were; zeros are left out."""
        told = [event["totals"] for event in self.events if event["type"] == TOTALS]
        return {name: n for name, n in told[-1].items() if n} if told else {}

    def wait(self, condition: Callable[[], bool]) -> None:
        """Receive until the condition is true."""
        deadline_s = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline_s, f"got only {self.events}"
            try:
                self._connection.drain_events(timeout=0.2)
            except TimeoutError:
                continue

    def close(self) -> None:
        """Let go of the broker."""
        self._consumer.cancel()
        self._connection.release()


@pytest.fixture
def app(namespace: str) -> Iterator[Celery]:
    app = Celery(namespace, broker="memory://", set_as_current=False)
    app.conf.event_exchange = namespace
    app.conf.event_serializer = "json"
    yield app
    app.close()


@pytest.fixture
def receiver(app: Celery) -> Iterator[Receiver]:
    receiver = Receiver(app)
    yield receiver
    receiver.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_sender(app: Celery, clock: Clock) -> Iterator[Callable[..., EventSender]]:
    made: list[EventSender] = []

    def make(**given: Any) -> EventSender:
        sender = EventSender(app, hostname="w1@here", task_name="generate/model", clock=clock, **given)
        made.append(sender)
        return sender

    yield make
    for sender in made:
        sender.close()


def view(request_id: str = "a", **over: Any) -> RequestView:
    """A request as a worker shows it."""
    given: dict[str, Any] = {
        "stage": 1,
        "range_text": "512–4096",
        "prompt_tokens": 812,
        "max_tokens": 256,
        "num_resumed": 0,
        "epoch": 1,
        "submitted_ms": round((time.time() - WAITED_S) * 1000),
    }
    return RequestView(request_id=request_id, **(given | over))


def test_a_request_is_received_started_and_succeeded(
    make_sender: Callable[..., EventSender], receiver: Receiver
) -> None:
    """With its lengths, a short result and its runtime; without its text."""
    sender = make_sender()
    sender.start()

    sender.request_started(view())
    sender.request_succeeded(view(), output_tokens=211, runtime_s=3.21, text="an answer")
    receiver.wait(lambda: len(receiver.types("a")) == 3)

    task = receiver.state.tasks["a"]
    assert receiver.types("a") == ["task-received", "task-started", "task-succeeded"]
    assert task.state == "SUCCESS"
    assert task.name == "generate/model"
    assert re.fullmatch(r"812 → ≤256 tokens, waited [67]\d\.\d s, stage 1 \(512–4096\)", task.args)
    assert task.kwargs.startswith(
        "{'stage': 1, 'range': '512–4096', 'prompt_tokens': 812, 'max_tokens': 256, 'waited_s': "
    )
    assert task.started - task.received >= WAITED_S - 3.21 - 0.001
    assert task.result == "211 tokens, 3.2 s"
    assert task.runtime == 3.21
    assert task.worker.hostname == "w1@here"
    assert "answer" not in repr(receiver.events)


def test_texts_are_shown_only_when_asked_for_and_then_clipped(
    make_sender: Callable[..., EventSender], receiver: Receiver
) -> None:
    """At most 200 characters of the output; prompts are not known here."""
    sender = make_sender(show_outputs=True)
    sender.start()

    sender.request_succeeded(view(), output_tokens=1, runtime_s=1.0, text="t" * 999)
    receiver.wait(lambda: "a" in receiver.state.tasks)

    task = receiver.state.tasks["a"]
    assert task.result == f"1 tokens, 1.0 s: '{'t' * 200}'"


def test_an_outcome_alone_tells_all_that_the_start_would_have_told(
    make_sender: Callable[..., EventSender], receiver: Receiver
) -> None:
    """A start that was dropped or left out costs no information."""
    sender = make_sender()
    sender.start()

    sender.request_failed(view(epoch=3, num_resumed=40), error="out of memory", runtime_s=2.0)
    receiver.wait(lambda: "a" in receiver.state.tasks)

    task = receiver.state.tasks["a"]
    assert (task.state, task.exception, task.retries) == ("FAILURE", "out of memory", 2)
    assert task.name == "generate/model"
    assert "'resumed_tokens': 40" in task.kwargs
    assert task.failed - task.started == pytest.approx(2.0)


@pytest.mark.parametrize("second", ["succeeded", "failed", "cancelled"])
def test_a_request_that_moves_ends_in_the_state_of_the_worker_that_settles_it(
    make_sender: Callable[..., EventSender], receiver: Receiver, second: str
) -> None:
    """Given back it is in RETRY; what the next worker says replaces that."""
    sender = make_sender()
    sender.start()

    sender.request_started(view())
    sender.request_moved(view(), why="worker stops")
    receiver.wait(lambda: "task-retried" in receiver.types("a"))
    assert receiver.state.tasks["a"].state == "RETRY"
    sender.request_started(view(epoch=2))
    receiver.wait(lambda: receiver.types("a").count("task-started") == 2)
    assert receiver.state.tasks["a"].state == "STARTED"
    if second == "succeeded":
        sender.request_succeeded(view(epoch=2), output_tokens=1, runtime_s=1.0, text="")
    elif second == "failed":
        sender.request_failed(view(epoch=2), error="no", runtime_s=1.0)
    else:
        sender.request_cancelled(view(epoch=2))
    sender.request_moved(view(), why=LEASE_ENDED)  # a worker that slept through all this
    sender.request_started(view("b"))
    receiver.wait(lambda: bool(receiver.types("b")))

    expected = {"succeeded": "SUCCESS", "failed": "FAILURE", "cancelled": "REVOKED"}[second]
    assert receiver.state.tasks["a"].state == expected
    assert receiver.state.tasks["a"].retries == 1


@pytest.mark.services  # redis-py tries for seconds before it gives up
def test_without_a_broker_the_queue_is_bounded_and_the_oldest_go_first(app: Celery, clock: Clock) -> None:
    """Nothing blocks, drops are counted, and the end comes in time."""
    app.conf.broker_url = "redis://127.0.0.1:1/0"
    sender = EventSender(app, hostname="w1@here", task_name="t", capacity=100, clock=clock)
    sender.start()

    for number in range(1000):
        sender.request_cancelled(view(str(number)))
    pause, deadline_s = threading.Event(), time.monotonic() + 120
    while not sender.stats()["events_outages"]:
        assert time.monotonic() < deadline_s
        pause.wait(0.01)

    stats = {name: int(str(value)) for name, value in sender.stats().items()}
    sender.close(timeout_s=0.1)
    assert stats["events_sent"] == 0
    assert 100 <= stats["events_waiting"] <= 200  # the queue, and a batch in the sender's hands
    assert stats["events_dropped"] == 1000 - stats["events_waiting"]


def test_events_wait_for_the_broker_and_leave_in_order(
    make_sender: Callable[..., EventSender], receiver: Receiver
) -> None:
    """What was put before the start is sent, in batches, oldest first."""
    sender = make_sender()
    for number in range(450):
        sender.request_cancelled(view(str(number)))

    sender.start()
    receiver.wait(lambda: len(receiver.tasks()) == 450)

    assert [event["uuid"] for event in receiver.tasks()] == [str(number) for number in range(450)]
    sender.close()
    assert sender.stats()["events_sent"] == 450


def test_above_the_rates_starts_are_left_out_first_and_bad_outcomes_never(
    make_sender: Callable[..., EventSender], receiver: Receiver, clock: Clock
) -> None:
    """Successes only above four times the rate, and none whose start was shown. A second later there is room."""
    sender = make_sender(sample_above_per_s=3)
    sender.start()

    for number in range(20):
        sender.request_started(view(str(number)))
    for number in reversed(range(18)):  # those that are shown to run, 0 to 2, end when there is no room any more
        sender.request_succeeded(view(str(number)), output_tokens=1, runtime_s=0.1, text="")
    sender.request_failed(view("18"), error="no", runtime_s=0.1)
    sender.request_cancelled(view("19"))
    clock.now_s = 1.0
    sender.request_started(view("later"))
    receiver.wait(lambda: len(receiver.types("later")) == 2)

    types = [event["type"] for event in receiver.tasks()]
    assert types.count("task-started") == 3 + 1
    assert types.count("task-succeeded") == 4 * 3 + 3
    assert receiver.types("0") == ["task-received", "task-started", "task-succeeded"]
    assert receiver.types("18") == ["task-failed"]
    assert receiver.types("19") == ["task-revoked"]
    assert sender.stats()["events_left_out"] == 2 * 17 + 3
    receiver.wait(lambda: receiver.totals().get("task-received") == 21)
    assert receiver.totals() == {
        "task-received": 21,
        "task-succeeded": 18,
        "task-failed": 1,
        "task-revoked": 1,
    }


def test_totals_are_told_at_the_end_also_when_nothing_else_is_sent(
    make_sender: Callable[..., EventSender], receiver: Receiver
) -> None:
    """With a rate of 0 neither starts nor successes are shown."""
    sender = make_sender(sample_above_per_s=0)
    for number in range(7):
        sender.request_started(view(str(number)))
        sender.request_succeeded(view(str(number)), output_tokens=1, runtime_s=0.1, text="")

    sender.start()
    sender.close()
    receiver.wait(lambda: bool(receiver.totals()))

    assert receiver.totals() == {"task-received": 7, "task-succeeded": 7}
    assert receiver.tasks() == []


def test_close_is_safe_before_start_and_twice(make_sender: Callable[..., EventSender]) -> None:
    """It returns at once."""
    sender = make_sender()

    sender.close()
    sender.close()

    assert sender.stats()["events_sent"] == 0


def test_a_budget_refills_with_time_up_to_one_second(clock: Clock) -> None:
    """Ten a second: ten at once, five after half a second, never more than ten."""
    budget = Budget(10, clock=clock)

    def num_taken() -> int:
        return sum(budget.take() for _ in range(100))

    assert num_taken() == 10
    clock.now_s = 0.5
    assert num_taken() == 5
    clock.now_s = 100.0
    assert num_taken() == 10


def test_starts_and_successes_are_not_made_while_nobody_listens(
    app: Celery, make_sender: Callable[..., EventSender]
) -> None:
    """Who begins to listen hears of what begins then, and how many there were before."""
    sender = make_sender()
    sender.start()
    deaf = threading.Event()
    while sender._is_heard:
        deaf.wait(0.01)
    for name in ("a", "b"):
        sender.request_started(view(name))
    sender.request_succeeded(view("a"), output_tokens=3, runtime_s=0.5, text="")
    assert sender.stats()["events_waiting"] == 0

    receiver = Receiver(app)
    receiver.wait(lambda: receiver.totals() == {"task-received": 2, "task-succeeded": 1})
    sender.request_succeeded(view("b"), output_tokens=3, runtime_s=0.5, text="")
    sender.request_started(view("c"))
    receiver.wait(lambda: receiver.types("c") == ["task-received", "task-started"])
    assert (receiver.types("a"), receiver.types("b")) == ([], ["task-succeeded"])
    receiver.close()
