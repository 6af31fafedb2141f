"""What becomes of what waits when Langfuse answers in every way that it can."""

import json
import logging
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import postgres
from loopback import OTLP, SCORES, Failure, LangfuseServer
from loopback_store import decode
from turntrace import SessionTracker
from turntrace.errors import ConfigurationError
from turntrace.export import Answer, Outcome, Pace, Sender, Sent, to_otlp
from turntrace.export import LangfuseServer as Address
from turntrace.export.encode import halves
from turntrace.ledger import Ledger
from turntrace.settings import LangfuseSettings
from turntrace.waiting import SCORE, SPANS, OutboxItem, Refusal

QUICK = Pace(linger_s=0.0, first_s=0.02, most_s=0.1, closed_s=0.05, closed_most_s=0.1)
PATIENCE_S = 30.0


def address(server: LangfuseServer, *, secret: str | None = None, timeout: float = 2.0) -> Address:
    secret_key: Any = secret or server.secret_key
    return Address(
        LangfuseSettings(public_key=server.public_key, secret_key=secret_key, base_url=server.url, timeout=timeout)
    )


def spans_of(count: int, *, name: str = "agent", size: int = 0) -> bytes:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for number in range(count):
        attributes: dict[str, int | str] = {"number": number, "text": "x" * size}
        provider.get_tracer("turntrace").start_span(f"{name}-{number}", attributes=attributes).end()
    return to_otlp(exporter.get_finished_spans())


def score(number: int, value: float = 1.0, **more: Any) -> bytes:
    facts = {"id": f"score-{number}", "sessionId": "s1", "name": "n", "value": value, "dataType": "NUMERIC"}
    return json.dumps(facts | more).encode()


@pytest.fixture
def server() -> Iterator[LangfuseServer]:
    with LangfuseServer() as server:
        yield server


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    yield ledger
    ledger.close()


def put(ledger: Ledger, kind: str, *bodies: bytes, items: int = 1) -> None:
    with ledger.writing() as writer:
        for body in bodies:
            writer.put(kind, body, items=items, created_ns=1_700_000_000_000_000_000)


def send(ledger: Ledger, server: LangfuseServer, **address_of: Any) -> Sent:
    sender = Sender(ledger.to_send, address(server, **address_of), QUICK)
    try:
        return sender.send_waiting()
    finally:
        sender.stop(PATIENCE_S)


def names(server: LangfuseServer) -> list[str]:
    return sorted({span.name for span in server.spans()})


def waits(ledger: Ledger) -> tuple[int, int]:
    status = ledger.to_send.status()
    return status.spans.items, status.scores.items


def until(true: Any) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.01)


# --- every answer -----------------------------------------------------------------------------------------------------
LATER, CLOSED = Outcome.LATER, Outcome.CLOSED
ANSWERS: dict[str, tuple[Failure | None, Outcome, str]] = {
    "nobody listens": (None, LATER, "ConnectError"),
    "no answer in time": (Failure("timeout"), LATER, "ReadTimeout"),
    "cut while it is sent": (Failure("reset"), LATER, "Error"),
    "cut in the answer": (Failure("half"), LATER, "Error"),
    "taken, and the answer lost": (Failure("lost"), LATER, "Error"),
    "408": (Failure("status", 408), LATER, "408"),
    "429": (Failure("status", 429, headers={"Retry-After": "0.2"}), LATER, "429"),
    "500": (Failure("status", 500, body="it broke"), LATER, "500: it broke"),
    "503": (Failure("status", 503), LATER, "503"),
    "401": (Failure("status", 401), CLOSED, "401"),
    "403": (Failure("status", 403), CLOSED, "403"),
    "404": (Failure("status", 404), CLOSED, "404"),
}


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("path", [OTLP, SCORES])
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_the_server_does_not_take_now_waits_until_it_does(
    answer: str, path: str, server: LangfuseServer, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    failure, outcome, words = ANSWERS[answer]
    put(ledger, SPANS, spans_of(3), items=3)
    put(ledger, SCORE, score(1), score(2))
    sender = Sender(ledger.to_send, address(server, timeout=0.3), QUICK)
    if failure is None:
        server.stop()
    else:
        server.fail(failure, path=path)
    sent = sender.send_waiting()
    assert sent.stopped_by is not None
    assert sent.stopped_by.outcome is outcome
    assert words in sent.stopped_by.words
    assert sent.refused == 0
    spans_waiting = 0 if failure is not None and path == SCORES else 3
    assert waits(ledger) == (spans_waiting, 2)
    assert ledger.to_send.status().refused == ()
    assert sum("cannot take anything now" in line or "let us in" in line for line in caplog.messages) == 1
    sender.start()  # and while it goes on by itself, it is said no second time
    time.sleep(0.4)
    assert sum("cannot take anything now" in line or "let us in" in line for line in caplog.messages) == 1
    assert waits(ledger) == (spans_waiting, 2)
    server.start() if failure is None else server.recover()
    until(lambda: waits(ledger) == (0, 0))
    sender.stop(PATIENCE_S)
    assert names(server) == ["agent-0", "agent-1", "agent-2"]
    assert set(server.scores()) == {"score-1", "score-2"}
    assert sum("takes what is sent again" in line for line in caplog.messages) == 1


def test_what_is_put_there_while_another_sends_is_sent_by_one_of_the_two(ledger: Ledger) -> None:
    """As where processes end at the same time: who sees that another sends, and goes, relies on it."""
    left: list[Sent] = []

    class Meanwhile(LangfuseServer):
        def next_failure(self, path: str) -> Failure | None:
            if not left:
                put(ledger, SCORE, score(1))
                left.append(send(ledger, self))
            return super().next_failure(path)

    put(ledger, SPANS, spans_of(1))
    with Meanwhile() as server:
        assert send(ledger, server).is_all
        assert [sent.busy_s > 0 for sent in left] == [True]
        assert waits(ledger) == (0, 0)
        assert set(server.scores()) == {"score-1"}


def test_the_pauses_grow_up_to_a_bound_and_differ(server: LangfuseServer) -> None:
    pace, answer = Pace(first_s=1.0, most_s=8.0), Answer(Outcome.LATER)
    delays = [[pace.delay(failures, answer) for _ in range(200)] for failures in range(1, 8)]
    for grown, some in zip([1, 2, 4, 8, 8, 8, 8], delays, strict=True):
        assert all(grown / 2 <= delay <= grown for delay in some)
        assert max(some) - min(some) > grown / 8
    assert pace.delay(1, Answer(Outcome.LATER, retry_after_s=30.0)) == 30.0
    assert pace.delay(10_000, Answer(Outcome.CLOSED)) <= pace.closed_most_s


@pytest.mark.parametrize("said", ["1", "date"])
def test_retry_after_is_honoured(said: str, server: LangfuseServer, ledger: Ledger) -> None:
    after = formatdate(time.time() + 2, usegmt=True) if said == "date" else said
    server.fail(Failure("status", 429, headers={"Retry-After": after}), times=1)
    put(ledger, SPANS, spans_of(1))
    sender = Sender(ledger.to_send, address(server), QUICK)
    sender.start()
    until(lambda: waits(ledger) == (0, 0))
    sender.stop(PATIENCE_S)
    first, second = [request.at for request in server.requests]
    assert second - first >= 0.9


def test_the_keys_turn_right(server: LangfuseServer, ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    put(ledger, SPANS, spans_of(2), items=2)
    with caplog.at_level(logging.CRITICAL, "turntrace"):
        wrong = send(ledger, server, secret="sk-lf-wrong")
    assert wrong.stopped_by is not None
    assert "Invalid credentials" in wrong.stopped_by.words
    assert waits(ledger) == (2, 0)
    until(lambda: send(ledger, server).is_all)
    assert waits(ledger) == (0, 0)
    assert len(server.spans()) == 2


# --- too large, and refused -------------------------------------------------------------------------------------------
def test_a_request_is_not_larger_than_langfuse_cloud_takes(server: LangfuseServer, ledger: Ledger) -> None:
    server.max_bytes = 4_500_000
    big = [spans_of(4, name=f"turn{number}", size=300_000) for number in range(6)]  # 1.2 MB each
    huge = spans_of(5, name="huge", size=1_500_000)  # 7.5 MB in one row
    put(ledger, SPANS, *big, items=4)
    put(ledger, SPANS, huge, items=5)
    sent = send(ledger, server)
    assert (sent.items, sent.refused, sent.is_all) == (29, 0, True)
    assert len(server.spans()) == 29
    assert [request.status for request in server.requests] == [200] * len(server.requests)


def test_413_splits_down_to_the_span_that_is_too_large(
    server: LangfuseServer, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    server.max_bytes = 20_000
    put(ledger, SPANS, spans_of(40, size=1_000), items=40)
    put(ledger, SPANS, spans_of(1, name="large", size=50_000))
    sent = send(ledger, server)
    assert (sent.items, sent.refused) == (40, 1)
    assert len(server.spans()) == 40
    assert waits(ledger) == (0, 0)
    [(why, count)] = ledger.to_send.status().refused
    assert count == 1
    assert "413" in why
    server.max_bytes = 1 << 30
    assert ledger.to_send.try_again() == 1
    assert send(ledger, server).items == 1
    assert ledger.to_send.status().refused == ()
    assert "large-0" in names(server)


def test_400_because_of_one_span_among_a_hundred_sets_that_one_apart(
    server: LangfuseServer, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    server.refuses = lambda span: span.name == "agent-41"
    put(ledger, SPANS, spans_of(100), items=100)
    put(ledger, SPANS, spans_of(3, name="next"), items=3)
    sent = send(ledger, server)
    assert (sent.items, sent.refused, sent.is_all) == (102, 1, True)
    assert names(server) == sorted(
        [f"agent-{number}" for number in range(100) if number != 41] + [f"next-{number}" for number in range(3)]
    )
    assert ledger.to_send.status().refused == (('400: {"error": "Failed to parse OTel Protobuf Trace"}', 1),)
    assert len(server.requests) < 25  # halving, not one by one
    assert sum("turntrace export --status" in line for line in caplog.messages) == 1


def test_what_is_no_otlp_is_set_apart_and_the_rest_goes(
    server: LangfuseServer, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    put(ledger, SPANS, spans_of(2), items=2)
    put(ledger, SPANS, b"\xff\xff no protobuf", items=2)
    put(ledger, "from-the-future", b"?")
    sent = send(ledger, server)
    assert sent.refused == 2
    assert waits(ledger) == (0, 0)
    assert len(server.spans()) == 2
    assert len(ledger.to_send.status().refused) == 2


def test_a_split_keeps_resources_scopes_and_spans() -> None:
    body = spans_of(5)
    first, second = halves(body)
    assert (first[1], second[1]) == (2, 3)
    whole = [span for part in (first[0], second[0]) for span in decode(part)]
    assert whole == list(decode(body))


# --- scores -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("takes_arrays", "requests"), [(True, [200, 200]), (False, [400, 200, 200, 200, 200, 200, 200])]
)
def test_scores_go_as_an_array_where_it_is_taken_and_else_one_by_one(
    takes_arrays: bool, requests: list[int], ledger: Ledger
) -> None:
    with LangfuseServer(score_arrays=takes_arrays) as server:
        for first in (0, 3):
            put(ledger, SCORE, *[score(number) for number in range(first, first + 3)])
            assert send(ledger, server).items == 3
        assert set(server.scores()) == {f"score-{number}" for number in range(6)}
        # That an array is not taken is found out once for a server.
        assert [request.status for request in server.requests] == requests
        if takes_arrays:
            assert server.scores()["score-1"]["timestamp"] == "2023-11-14T22:13:20.000+00:00"


@pytest.mark.parametrize("takes_arrays", [True, False])
def test_a_score_that_is_refused_is_set_apart_and_the_others_arrive(
    takes_arrays: bool, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    with LangfuseServer(score_arrays=takes_arrays) as server:
        put(ledger, SCORE, score(1), score(2, dataType="BOOLEAN", value=2), score(3))
        sent = send(ledger, server)
        assert (sent.items, sent.refused) == (2, 1)
        assert set(server.scores()) == {"score-1", "score-3"}
        [(why, _)] = ledger.to_send.status().refused
        assert "equal to either 0 or 1" in why


def test_an_array_of_which_some_are_refused_loses_none(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    with LangfuseServer(score_arrays=True) as server:
        server.fail(Failure("status", 207, body='{"accepted": 1, "rejected": 1}'), times=1)
        put(ledger, SCORE, score(1), score(2, dataType="BOOLEAN", value=2))
        sent = send(ledger, server)
        assert (sent.items, sent.refused) == (1, 1)
        assert set(server.scores()) == {"score-1"}


def test_of_a_score_that_was_given_again_the_newest_value_counts(server: LangfuseServer, ledger: Ledger) -> None:
    put(ledger, SCORE, score(1, 0.1), score(2), score(1, 0.9))
    assert send(ledger, server).is_all
    assert server.scores()["score-1"]["value"] == 0.9
    assert waits(ledger) == (0, 0)


# --- who sends, and how much may wait ---------------------------------------------------------------------------------
@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'ledger.db'}"
        return
    with postgres.server() as running:
        yield postgres.new_schema(running)


def test_several_senders_never_send_at_once_and_send_each_row_once(server: LangfuseServer, url: str) -> None:
    ledgers = [Ledger(url) for _ in range(4)]
    bodies = [spans_of(1, name=f"turn{number}") for number in range(300)]
    senders = [Sender(ledger.to_send, address(server), QUICK) for ledger in ledgers]
    for sender in senders:
        sender.start()
    for number, body in enumerate(bodies):
        put(ledgers[number % 4], SPANS, body)
        senders[number % 4].wake()
    until(lambda: waits(ledgers[0]) == (0, 0))
    for sender in senders:
        sender.stop(PATIENCE_S)
    assert len(server.spans()) == 300
    assert sum(request.spans for request in server.requests) == 300
    assert server.in_flight_max == 1
    for ledger in ledgers:
        ledger.close()


def test_a_lease_runs_out_with_its_process(server: LangfuseServer, ledger: Ledger) -> None:
    put(ledger, SPANS, spans_of(1))
    assert ledger.to_send.claim("killed", lease_s=2.0, max_rows=10, max_bytes=1000).items
    sent = send(ledger, server)
    assert 0 < sent.busy_s <= 2.0
    assert not sent.is_all
    assert server.requests == []
    until(lambda: send(ledger, server).is_all)
    assert len(server.spans()) == 1


def test_who_comes_when_all_is_sent_keeps_nobody_waiting(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = ledger.to_send
    monkeypatch.setattr(outbox, "waits", lambda: True)  # as when another process sends what there was just then
    late = outbox.claim("late", lease_s=60, max_rows=10, max_bytes=1000)
    assert (late.items, late.is_all) == ((), True)
    put(ledger, SPANS, spans_of(1))
    assert outbox.claim("other", lease_s=60, max_rows=10, max_bytes=1000).items


@pytest.mark.parametrize(("max_rows", "max_bytes"), [(3, 10**6), (10, 1)])
def test_a_claim_says_whether_it_is_all(ledger: Ledger, max_rows: int, max_bytes: int) -> None:
    for _ in range(4):
        put(ledger, SPANS, spans_of(1))
    outbox = ledger.to_send
    found: list[OutboxItem] = []
    while not (claim := outbox.claim("one", lease_s=60, max_rows=max_rows, max_bytes=max_bytes)).is_all:
        outbox.settle("one", [item.id for item in claim.items], [], lease_s=60)
        found += claim.items
    assert len({item.id for item in [*found, *claim.items]}) == len([*found, *claim.items]) == 4


def test_whoever_lost_the_lease_in_a_delivery_stops(server: LangfuseServer, ledger: Ledger) -> None:
    put(ledger, SPANS, spans_of(1))
    outbox = ledger.to_send
    assert outbox.claim("slow", lease_s=0.001, max_rows=10, max_bytes=1000).items
    time.sleep(0.01)
    assert outbox.claim("other", lease_s=60, max_rows=10, max_bytes=1000).items
    assert not outbox.renew("slow", lease_s=60)
    assert outbox.renew("other", lease_s=60)


def test_beyond_its_bound_the_oldest_go_and_are_counted(url: str) -> None:
    ledger = Ledger(url)
    for number in range(20):
        put(ledger, SPANS, bytes([number]) * 1_000, items=2)
    assert ledger.to_send.trim(20_000) == (0, 0)
    put(ledger, SPANS, b"x" * 3_500, items=2)
    assert ledger.to_send.trim(20_000) == (8, 4_000)
    assert [item.body[0] for item in ledger.outbox()][:2] == [4, 5]
    status = ledger.to_send.status()
    assert (status.dropped, status.spans.items, status.spans.size) == (8, 34, 19_500)
    ledger.to_send.settle("me", [], [Refusal(ledger.outbox()[0], "so it says")], lease_s=0)
    assert ledger.to_send.status().refused == (("so it says", 2),)
    assert ledger.to_send.try_again() == 1
    assert ledger.to_send.status().spans.items == 36
    ledger.close()


def test_what_is_dropped_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    provider = TracerProvider()
    tracker = SessionTracker(
        f"sqlite:///{tmp_path / 'small.db'}", tracer_provider=provider, outbox=True, outbox_max_mb=0.02
    )
    with tracker.session() as session:
        conversation = session.conversation("c")
        for _ in range(50):
            with conversation.turn("Hello"):
                pass
            tracker.flush()
    status = tracker.ledger.to_send.status()
    assert status.spans.size + status.scores.size < 30_000
    assert status.dropped > 0
    assert any("the outbox is full (0.02 MB" in line for line in caplog.messages)
    summary = session.summary()
    assert summary is not None
    assert summary.total_turns == 50
    tracker.shutdown()


def test_a_thread_of_the_apps_never_waits_for_the_network(
    server: LangfuseServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in server.keys.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LANGFUSE_TIMEOUT", "30")
    server.fail(Failure("timeout"))
    provider = TracerProvider()
    tracker = SessionTracker(f"sqlite:///{tmp_path / 'ledger.db'}", tracer_provider=provider, pace=QUICK)
    with tracker.session(session_id="s1") as session:
        with session.conversation("c").turn("Hello"):
            pass
        until(lambda: server.requests)  # the sender hangs in its request
        for _ in range(20):
            with session.conversation("c").turn("Hello"):
                pass
    summary = session.summary()
    assert summary is not None
    assert summary.total_turns == 21
    server.recover()
    until(lambda: waits(tracker.ledger) == (0, 0))
    tracker.shutdown()
    assert [span.name for span in server.spans()].count("conversation.turn") == 21


@pytest.mark.parametrize("value", [0, -1, True, "512", float("inf")])
def test_a_bound_that_cannot_be_used_is_refused_at_the_call(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="outbox_max_mb=512"):
        SessionTracker("sqlite://", outbox_max_mb=value)


def test_a_process_whose_keys_are_wrong_keeps_no_other_from_sending(
    server: LangfuseServer, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, lenient: None
) -> None:
    """As where keys are changed while the app is deployed anew, one process after the other."""
    monkeypatch.setattr("turntrace.export.sender._HELD_S", 0.05)
    slow = Pace(linger_s=0.0, first_s=0.02, most_s=0.1, closed_s=300.0, closed_most_s=300.0)
    put(ledger, SPANS, spans_of(3), items=3)
    old, new = (
        Sender(ledger.to_send, address(server, secret="sk-lf-old"), slow),
        Sender(ledger.to_send, address(server), slow),
    )
    try:
        old.wake()
        until(lambda: old.failing is not None)
        new.wake()
        until(lambda: waits(ledger) == (0, 0))
        assert old.failing is not None
        assert new.failing is None
    finally:
        old.stop(PATIENCE_S)
        new.stop(PATIENCE_S)


@pytest.mark.usefixtures("lenient")
def test_a_flush_keeps_to_its_time_while_the_server_does_not_answer(server: LangfuseServer, ledger: Ledger) -> None:
    """As where it is called before a process is frozen; what was begun is sent all the same."""
    put(ledger, SPANS, spans_of(3), items=3)
    server.fail(Failure("timeout"), times=1)
    sender = Sender(ledger.to_send, address(server, timeout=PATIENCE_S), QUICK)
    began = time.monotonic()
    assert not sender.drain(0.2)
    assert time.monotonic() - began < PATIENCE_S / 2
    server.recover()
    until(lambda: sender.drain(0.2))
    sender.stop(PATIENCE_S)
    assert waits(ledger) == (0, 0)
    assert len(names(server)) == 3


def test_spans_do_not_wait_for_scores_that_are_not_taken(
    server: LangfuseServer, ledger: Ledger, caplog: pytest.LogCaptureFixture, lenient: None
) -> None:
    server.fail(Failure("status", 500), path=SCORES)
    for number in range(4):  # more scores than fit into a request lie between the spans
        put(ledger, SPANS, spans_of(2, name=f"agent-{number}"), items=2)
        put(ledger, SCORE, *(score(1000 * number + each) for each in range(300)))
    sender = Sender(ledger.to_send, address(server), QUICK)
    sent = sender.send_waiting()
    assert sent.stopped_by is not None
    assert (sent.items, waits(ledger)) == (8, (0, 1200))
    assert len(server.spans()) == 8
    assert sender.failing is not None
    server.recover()
    assert sender.send_waiting().is_all
    sender.stop(PATIENCE_S)
    assert waits(ledger) == (0, 0)
    assert len(server.scores()) == 1200
    said = [record.message for record in caplog.records if "cannot take" in record.message or "again" in record.message]
    assert ["cannot take" in line for line in said] == [True, False]  # each once


def test_a_web_page_is_no_sign_that_anything_was_taken(server: LangfuseServer, ledger: Ledger, lenient: None) -> None:
    """As where LANGFUSE_BASE_URL is that of a portal, or what stands before Langfuse wants a sign-in."""
    put(ledger, SPANS, spans_of(3), items=3)
    put(ledger, SCORE, score(1))
    server.fail(
        Failure("status", 200, body="<html>Sign in</html>", headers={"Content-Type": "text/html; charset=utf-8"})
    )
    sent = send(ledger, server)
    assert sent.stopped_by is not None
    assert sent.stopped_by.outcome is Outcome.CLOSED
    assert "not Langfuse's API" in sent.stopped_by.words
    assert waits(ledger) == (3, 1)
    server.recover()
    assert send(ledger, server).is_all
