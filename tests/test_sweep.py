"""Silence: sessions that the sweep ends, turns of processes that died, drop-offs; other ends, and erasing a user."""

import asyncio
import json
import logging
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from turntrace import Session, SessionTracker, Turn
from turntrace import attributes as a
from turntrace.errors import ConfigurationError, IdentityError
from turntrace.export import to_otlp
from turntrace.lifecycle.dropoff import DropoffFacts
from turntrace.lifecycle.sweep import Swept
from turntrace.records import TurnRequest
from turntrace.testing import Capture, CapturedSpan, Clock, assert_all_tagged, outbox_spans

MINUTE = 60 * 1_000_000_000
IDLE = 30 * MINUTE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def tracker(capture: Capture, clock: Clock) -> SessionTracker:
    return capture.tracker(clock=clock, outbox=True)


@pytest.fixture
def workers(capture: Capture, clock: Clock, path: Path) -> list[SessionTracker]:
    """Two trackers on one file, as of two processes."""
    return [capture.tracker(f"sqlite:///{path}", clock=clock, outbox=True) for _ in range(2)]


def named(tracker: SessionTracker, name: str) -> list[CapturedSpan]:
    return [span for span in outbox_spans(tracker.ledger) if span.name == name]


def reasons(tracker: SessionTracker) -> dict[str, str | None]:
    return {session.id: session.end_reason for session in tracker.ledger.sessions(limit=10_000)}


def exchange(session: Session, answer: Any = "It costs 5.", *, conversation: str = "c1", **end: Any) -> Turn:
    turn = session.conversation(conversation).start_turn("Hello")
    if answer is not None:
        turn.set_answer(answer)
    turn.end(**end)
    return turn


# --- sessions ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("silent_ns", "ends"), [(0, 0), (29 * MINUTE, 0), (IDLE, 0), (IDLE + 1, 1), (10**6 * MINUTE, 1)]
)
def test_the_sweep_ends_what_was_silent_for_longer_than_the_idle_time(
    silent_ns: int, ends: int, tracker: SessionTracker, clock: Clock
) -> None:
    session = tracker.start_session(user_id="alice")
    clock.advance(seconds=5)
    exchange(session)
    tracker.flush()
    active = clock()
    clock.advance(silent_ns)
    assert tracker.sweep() == Swept(sessions=ends)
    summary = session.summary()
    assert summary.end_reason == ("inactive_timeout" if ends else None)
    assert summary.ended_ns == (active + IDLE if ends else None)  # whenever it is found out
    assert summary.last_activity_ns == active
    assert tracker.sweep() == Swept()
    assert [span.end_ns for span in named(tracker, "session.end")] == [active + IDLE] * ends


def test_a_session_without_a_turn_is_swept_too(tracker: SessionTracker, clock: Clock) -> None:
    session = tracker.start_session()
    begun = clock()
    clock.advance(minutes=31)
    assert tracker.sweep() == Swept(sessions=1)
    [end] = named(tracker, "session.end")
    assert end.end_ns == begun + IDLE
    assert not [name for name in end.attributes if name.startswith("dropoff.") and name != a.DROPOFF_DETECTED]
    assert session.summary().dropoff is False


def test_a_time_and_an_idle_time_may_be_given(tracker: SessionTracker, clock: Clock) -> None:
    session = tracker.start_session()
    later = clock() + 10 * MINUTE
    assert tracker.sweep(later) == Swept()
    assert tracker.sweep(later, idle_after=600) == Swept()
    assert tracker.sweep(now=later, idle_after=timedelta(minutes=9)) == Swept(sessions=1)
    assert session.summary().ended_ns == clock() + 9 * MINUTE
    other = tracker.start_session()
    assert asyncio.run(tracker.asweep(later, idle_after=599)) == Swept(sessions=1)
    assert other.summary().ended_ns == clock() + 599 * 1_000_000_000


@pytest.mark.parametrize("idle_after", [0, -1, True, "1800", float("nan"), float("inf"), timedelta(0)])
def test_an_idle_time_that_cannot_be_used_is_refused(idle_after: Any, tracker: SessionTracker, clock: Clock) -> None:
    tracker.start_session()
    clock.advance(minutes=31)
    with pytest.raises(ConfigurationError, match="idle_after is"):
        tracker.sweep(idle_after=idle_after)
    with pytest.raises(ConfigurationError, match="idle_after is"):
        asyncio.run(tracker.asweep(idle_after=idle_after))
    assert tracker.sweep() == Swept(sessions=1)


def test_two_workers_end_a_session_once(workers: list[SessionTracker], clock: Clock) -> None:
    one, two = workers
    session = one.start_session()
    exchange(session)
    one.flush()
    clock.advance(minutes=31)
    assert [two.sweep(), one.sweep(), two.sweep()] == [Swept(sessions=1), Swept(), Swept()]
    assert len(named(one, "session.end")) == 1


def test_sweeps_at_once_end_each_of_a_thousand_sessions_once(workers: list[SessionTracker], clock: Clock) -> None:
    one = workers[0]
    for number in range(1000):
        one.start_session(session_id=f"s{number}", user_id=f"user {number}")
    clock.advance(minutes=30)
    awake = one.start_session(session_id="awake")
    one.flush()
    clock.advance(minutes=1)
    swept: list[Swept] = []
    ready = threading.Barrier(4)

    def sweep(worker: SessionTracker) -> None:
        ready.wait()
        swept.append(worker.sweep())

    threads = [threading.Thread(target=sweep, args=(worker,)) for worker in workers * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each.sessions for each in swept) == 1000
    ended = [span.attributes[a.SESSION_ID] for span in named(one, "session.end")]
    assert len(ended) == len(set(ended)) == 1000
    assert awake.summary().ended_ns is None


def test_the_next_run_and_the_sweep_end_a_session_at_the_same_time_and_once(
    workers: list[SessionTracker], clock: Clock
) -> None:
    one, two = workers
    one.begin_turn(TurnRequest(user_id="alice", conversation_id="c1")).end()
    one.flush()
    active = clock()
    clock.advance(minutes=45)
    one.begin_turn(TurnRequest(user_id="alice", conversation_id="c1")).end()
    two.sweep()
    one.flush()
    [end] = named(one, "session.end")
    assert end.end_ns == active + IDLE
    assert sorted(reasons(one).values(), key=str) == [None, "inactive_timeout"]


def test_a_session_that_was_swept_goes_on_when_it_is_used(tracker: SessionTracker, clock: Clock) -> None:
    session = tracker.start_session(user_id="alice")
    exchange(session)
    tracker.flush()
    clock.advance(minutes=31)
    assert tracker.sweep() == Swept(sessions=1)
    turn = exchange(session)
    assert (turn.number, turn.conversation.session.id) == (2, session.id)
    assert session.summary().ended_ns is None
    assert tracker.sweep() == Swept()
    session.end()
    first, last = named(tracker, "session.end")
    assert (first.trace_id, first.span_id) == (last.trace_id, last.span_id)
    assert (first.attributes[a.SESSION_TOTAL_TURNS], last.attributes[a.SESSION_TOTAL_TURNS]) == (1, 2)
    assert last.attributes[a.SESSION_INACTIVE_TIMEOUT] is False


# --- turns ------------------------------------------------------------------------------------------------------------
def test_a_turn_that_runs_keeps_its_session_open(workers: list[SessionTracker], clock: Clock) -> None:
    one, two = workers
    session = one.start_session(user_id="alice")
    exchange(session)
    one.flush()
    clock.advance(minutes=29)
    turn = session.conversation("c1").start_turn("Again")  # the session was silent for 29 minutes then
    clock.advance(minutes=29)
    assert two.sweep() == Swept()  # the turn has run for 29
    assert one.sweep() == Swept()
    turn.end()
    assert session.summary().total_turns == 2
    assert one.sweep() == Swept()


def test_the_turns_of_this_process_are_never_swept(tracker: SessionTracker, clock: Clock) -> None:
    session = tracker.start_session(user_id="alice")
    turn = session.conversation("c1").start_turn("Take your time")
    clock.advance(minutes=600)
    assert tracker.sweep() == Swept()
    turn.end()
    [(summary, _)] = tracker.ledger.turns(session.id)
    assert (summary.status, summary.latency_ms) == ("completed", 600 * 60_000)
    assert session.summary().ended_ns is None


def test_a_turn_whose_process_died_is_closed_with_the_root_that_its_trace_lacks(
    workers: list[SessionTracker], clock: Clock
) -> None:
    dead, other = workers
    session = dead.start_session(
        user_id="alice", channel="web", tier="premium", org_id="o1", locale="de-AT", client_version="3.1"
    )
    exchange(session)
    first = session.conversation("c1", topic="billing").start_turn("Hello")
    first.end()
    dead.flush()
    clock.advance(minutes=1)
    turn = session.conversation("c1", topic="billing").start_turn("Hello?")
    begun = clock()
    [row] = [summary for summary, _ in other.ledger.turns(session.id) if summary.status == "open"]
    clock.advance(minutes=31)
    assert other.sweep() == Swept(sessions=1, turns=1)
    assert other.sweep() == Swept()
    spans = outbox_spans(other.ledger)
    assert_all_tagged(spans)
    [root] = [span for span in spans if span.attributes.get(a.TURN_ID) == turn.id]
    assert (root.name, root.trace_id, root.span_id) == ("conversation.turn", row.trace_id, row.root_span_id)
    assert (root.parent_id, root.start_ns, root.end_ns) == (None, begun, begun)
    assert {**turn.tags}.items() <= {**root.attributes}.items()
    expected = {
        a.SESSION_TYPE: "chat",
        a.SESSION_LOCALE: "de-AT",
        a.SESSION_CLIENT_VERSION: "3.1",
        a.TURN_STATUS: "abandoned",
        a.TURN_ROLE: "user",
        a.TURN_LATENCY_MS: 0,
        a.CONVERSATION_SESSION_ID: session.id,
        a.ERROR_TYPE: "abandoned",
        "langfuse.trace.name": "chat_turn",
        "langfuse.observation.type": "agent",
        "langfuse.observation.level": "WARNING",
    }
    assert expected.items() <= {**root.attributes}.items()
    closed = other.ledger.turn(turn.id)
    assert closed is not None
    assert (closed.status, closed.number, closed.error) == ("abandoned", 3, "abandoned")
    summary = session.summary()
    assert (summary.total_turns, summary.failed_turns) == (3, 0)
    # what the user wrote last had no answer
    assert (summary.last_turn, summary.last_action, summary.dropoff) == (3, "failed", True)
    assert summary.ended_ns == begun + IDLE


def test_a_session_whose_last_turn_is_closed_after_its_end_is_told_with_it(
    workers: list[SessionTracker], clock: Clock
) -> None:
    died, other = workers
    session = died.start_session(session_id="s1")
    exchange(session)
    session.conversation("c2").start_turn("Hello")  # its process is killed
    died.flush()
    other.end_session("s1")
    clock.advance(minutes=31)
    assert other.sweep() == Swept(turns=1)
    ends = [span.attributes for span in named(other, "session.end")]
    assert [(end[a.SESSION_TOTAL_TURNS], end[a.SESSION_END_REASON]) for end in ends] == [
        (1, "user_exit"),
        (2, "user_exit"),
    ]
    sent = [json.loads(item.body) for item in other.ledger.outbox() if item.kind == "score"]
    assert [score["value"] for score in sent if score["name"] == a.SESSION_TOTAL_TURNS] == [1, 2]


def test_many_turns_of_processes_that_died_are_closed_in_batches(workers: list[SessionTracker], clock: Clock) -> None:
    dead, other = workers
    sessions = [dead.start_session(session_id=f"s{number}") for number in range(450)]
    for session in sessions:
        session.conversation(f"c of {session.id}").start_turn("Hello")
    own = [other.start_session(session_id=f"own{number}") for number in range(250)]
    turns = [session.conversation(f"c of {session.id}").start_turn("Hello") for session in own]
    dead.flush()
    other.flush()
    clock.advance(minutes=31)
    assert other.sweep() == Swept(sessions=450, turns=450)
    roots = [span.attributes[a.SESSION_ID] for span in named(other, "conversation.turn")]
    assert sorted(roots) == sorted(session.id for session in sessions)
    for turn in turns:
        turn.end()


# --- the thread -------------------------------------------------------------------------------------------------------
def test_a_tracker_sweeps_by_itself_until_it_is_shut_down(capture: Capture, clock: Clock) -> None:
    ended = threading.Event()

    def rule(_facts: DropoffFacts) -> bool:
        ended.set()
        return False

    tracker = capture.tracker(clock=clock, sweep_every=1, dropoff=rule)
    session = tracker.start_session()
    tracker.flush()
    clock.advance(minutes=31)
    assert ended.wait(30)
    summary = session.summary()
    assert summary.end_reason == "inactive_timeout"
    assert "turntrace-sweeper" in [thread.name for thread in threading.enumerate()]
    tracker.shutdown()
    assert "turntrace-sweeper" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("sweep_every", [0, 0.5, -1, True, "60", float("nan"), 86_401])
def test_a_sweep_every_that_cannot_be_used_is_refused(sweep_every: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"sweep_every is .*sweep_every=60"):
        SessionTracker("sqlite://", sweep_every=sweep_every)


# --- why a session ends -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reason", ["user_exit", "error", "completed", "handoff", "bought something"])
def test_a_session_ends_for_a_reason_and_once(reason: str, tracker: SessionTracker, clock: Clock) -> None:
    session = tracker.start_session()
    exchange(session)
    clock.advance(seconds=9)
    session.end(reason)
    session.end("another")
    tracker.end_session(session.id, "yet another")
    clock.advance(minutes=600)
    assert tracker.sweep() == Swept()
    [end] = named(tracker, "session.end")
    assert (end.attributes[a.SESSION_END_REASON], end.attributes[a.SESSION_INACTIVE_TIMEOUT]) == (reason, False)
    assert end.attributes[a.SESSION_IDLE_TIME_MS] == 9000
    assert session.summary().end_reason == reason


@pytest.mark.parametrize("reason", ["", None, 3.5, "x" * 201])
def test_a_reason_that_cannot_be_used_is_refused(reason: Any, tracker: SessionTracker) -> None:
    session = tracker.start_session()
    with pytest.raises(IdentityError, match="reason"):
        session.end(reason)
    assert session.summary().ended_ns is None


def test_blocks_tell_why_they_were_left(tracker: SessionTracker) -> None:
    with tracker.session(session_id="s1"):
        pass
    with pytest.raises(LookupError), tracker.session(session_id="s2"):
        raise LookupError
    with pytest.raises(KeyboardInterrupt), tracker.session(session_id="s3"):
        raise KeyboardInterrupt
    assert reasons(tracker) == {"s1": "user_exit", "s2": "error", "s3": "user_exit"}


def test_a_shutdown_ends_the_open_sessions_only_when_it_is_told_to(workers: list[SessionTracker], path: Path) -> None:
    one, two = workers
    with one.session(session_id="left"):
        pass
    one.start_session(session_id="open")
    two.start_session(session_id="of another process")
    two.flush()
    one.shutdown()
    assert reasons(two) == {"left": "user_exit", "open": None, "of another process": None}
    one.start_session(session_id="open")
    asyncio.run(one.ashutdown(end_sessions=True))
    assert reasons(two) == {"left": "user_exit", "open": "shutdown", "of another process": None}
    ends = {span.attributes[a.SESSION_ID]: span.attributes for span in named(two, "session.end")}
    assert ends["open"][a.SESSION_END_REASON] == "shutdown"
    assert ends["open"][a.DROPOFF_DETECTED] is False


# --- drop-off ---------------------------------------------------------------------------------------------------------
LAST: dict[str, tuple[Callable[[Session], object], str | None, bool]] = {
    "asked": (lambda session: exchange(session, "Which one?"), "asked_question", True),
    "answered": (lambda session: exchange(session), "answered", False),
    "refused": (lambda session: exchange(session, "I'm sorry, but I can't help."), "answered", False),
    "said nothing": (lambda session: exchange(session, None), "answered", False),
    "called a tool": (lambda session: exchange(session, {"role": "tool", "content": "5"}), "called_tool", False),
    "failed": (lambda session: exchange(session, "Which?", error=LookupError("x")), "failed", True),
    "was left": (lambda session: exchange(session, "Which?", status="abandoned"), "failed", True),
    "interrupted": (lambda session: exchange(session, "It costs 5.", status="interrupted"), "interrupted", True),
    "no turn": (lambda session: None, None, False),
}
JOURNEY: dict[str, Callable[[Session], None]] = {
    "none": lambda session: None,
    "open": lambda session: session.journey("onboarding", ["a", "b"]).enter("a"),
    "converted": lambda session: session.journey("onboarding", ["a", "b"]).convert(),
}


@pytest.mark.parametrize("journey", JOURNEY)
@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("reason", ["inactive_timeout", "user_exit", "completed", "error", "handoff"])
def test_a_dropoff_is_silence_while_something_is_open(
    reason: str, last: str, journey: str, tracker: SessionTracker, clock: Clock
) -> None:
    session = tracker.start_session(user_id="alice")
    act, action, is_open = LAST[last]
    exchange(session, "Which?")  # what was before counts no more
    if action is None:
        session = tracker.start_session(user_id="alice")
    clock.advance(seconds=1)
    act(session)
    JOURNEY[journey](session)
    tracker.flush()
    clock.advance(minutes=31)
    if reason == "inactive_timeout":
        tracker.sweep()
    else:
        session.end(reason)
    summary = session.summary()
    detected = reason == "inactive_timeout" and (is_open or journey == "open")
    assert (summary.end_reason, summary.last_action, summary.dropoff) == (reason, action, detected)
    [end] = [span for span in named(tracker, "session.end") if span.attributes[a.SESSION_ID] == session.id]
    assert end.attributes[a.DROPOFF_DETECTED] is detected
    assert end.attributes.get(a.DROPOFF_AGENT_LAST_ACTION) == action


def test_a_journey_of_another_session_of_the_user_is_not_open_in_this_one(
    tracker: SessionTracker, clock: Clock
) -> None:
    tracker.start_session(user_id="alice", session_id="s1").journey("onboarding", ["a", "b"]).enter("a")
    exchange(tracker.start_session(user_id="alice", session_id="s2"))
    tracker.flush()
    clock.advance(minutes=31)
    tracker.sweep()
    assert {session.id: session.dropoff for session in tracker.ledger.sessions()} == {"s1": True, "s2": False}
    user = tracker.user_summary("alice")
    assert user is not None
    assert user.dropoffs == 1


def test_a_session_that_goes_on_is_no_dropoff_any_more(tracker: SessionTracker, clock: Clock) -> None:
    session = tracker.start_session(user_id="alice")
    exchange(session, "Which one?")
    tracker.flush()
    clock.advance(minutes=31)
    tracker.sweep()
    assert session.summary().dropoff is True
    exchange(session)
    assert session.summary().dropoff is None
    session.end()
    assert session.summary().dropoff is False


def test_a_rule_of_the_app_takes_the_place_of_ours(capture: Capture, clock: Clock) -> None:
    told: list[DropoffFacts] = []

    def rule(facts: DropoffFacts) -> bool:
        told.append(facts)
        return facts.last_intent == "buy" and facts.session.end_reason == "user_exit"

    tracker = capture.tracker(clock=clock, dropoff=rule)
    session = tracker.start_session(user_id="alice", session_id="s1")
    turn = session.conversation("c1").start_turn("Hello")
    turn.set_intent("buy")
    turn.set_answer("It costs 5.")
    turn.end()
    session.journey("tour", ["a", "b"]).enter("a")
    session.journey("onboarding", ["a", "b"]).enter("a")
    session.journey("upgrade", ["a", "b"]).convert()
    session.end()
    silent = tracker.start_session(session_id="s2")
    exchange(silent, "Which one?", conversation="c2")
    tracker.flush()
    clock.advance(minutes=31)
    tracker.sweep()
    assert [session.summary().dropoff, silent.summary().dropoff] == [True, False]
    first, second = told
    assert (first.session.id, first.last_action, first.last_intent) == ("s1", "answered", "buy")
    assert first.open_journeys == ("onboarding", "tour")
    assert (second.session.id, second.last_action, second.last_intent) == ("s2", "asked_question", None)


@pytest.mark.usefixtures("lenient")
def test_a_rule_that_raises_is_said_once_and_ours_decides(
    capture: Capture, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def rule(_facts: DropoffFacts) -> bool:
        raise LookupError("secret")

    tracker = capture.tracker(clock=clock, dropoff=rule)
    asked, answered = tracker.start_session(), tracker.start_session()
    exchange(asked, "Which one?")
    exchange(answered, conversation="c2")
    tracker.flush()
    clock.advance(minutes=31)
    with caplog.at_level(logging.WARNING, "turntrace"):
        assert tracker.sweep() == Swept(sessions=2)
    assert [asked.summary().dropoff, answered.summary().dropoff] == [True, False]
    [warning] = [record.getMessage() for record in caplog.records]
    assert "deciding on a drop-off by dropoff=... failed with LookupError" in warning
    assert "secret" not in warning


# --- erasing a user ---------------------------------------------------------------------------------------------------
TABLES = (
    *("sessions", "conversations", "turns", "open_turns", "decisions", "journeys", "stages", "feedback", "outbox"),
    *("gates", "meta"),
)


def dump(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as connection:
        return {name: repr(connection.execute(f"SELECT * FROM turntrace_{name}").fetchall()) for name in TABLES}


def everything_in(path: Path) -> bytes:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM")
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(f"{path.name}*")))


def live(tracker: SessionTracker, user_id: str | None, name: str) -> list[str]:
    """Have a user do all that leaves a trace; return what stands for the user."""
    session = tracker.start_session(session_id=f"{name}-one")  # not known at first
    session.journey("tour", ["a", "b"]).enter("a")
    session.journey("onboarding", ["a", "b"]).enter("a")
    tracker.flush()
    session = tracker.start_session(session_id=f"{name}-one", user_id=user_id)
    conversation = session.conversation(f"{name}-chat", topic="billing")
    with conversation.turn("Hello") as turn:
        turn.journey("onboarding", ["a", "b"]).enter("b")
        turn.close_step(turn.open_step("agent", "chain"))
    turn.feedback(True)
    session.feedback(0.5)
    session.end()
    open_session = tracker.start_session(session_id=f"{name}-two", user_id=user_id)
    running = open_session.conversation(f"{name}-chat").start_turn("Are you there?")
    tracker.flush()
    tracker._turns.pop(running.id)  # as if its process had died
    hashed = [] if user_id is None else [tracker.hash_user(user_id)]
    return [*hashed, session.id, open_session.id, turn.id, running.id, conversation.id]


def test_of_a_user_who_is_forgotten_nothing_is_left(capture: Capture, clock: Clock, path: Path) -> None:
    tracker = capture.tracker(f"sqlite:///{path}", clock=clock, outbox=True)
    theirs = live(tracker, "bob", "bob")
    before = dump(path)
    with tracker.session(user_id="alice", session_id="alice-zero") as session:
        session.journey("onboarding", ["a", "b"]).enter("a")  # of hers there is one, so the other stays the session's
    tracker.flush()
    hers = [*live(tracker, "alice", "alice"), "alice-zero"]
    turns = [turn for turn in hers if len(turn) == 32]
    forgotten = tracker.forget_user("alice")
    assert forgotten.user_id == tracker.hash_user("alice")
    assert set(forgotten.sessions) == {"alice-zero", "alice-one", "alice-two"}
    assert forgotten.turns == len(turns) == 2
    assert forgotten.waiting > 0
    for words in (*hers, "alice"):
        for name, rows in dump(path).items():
            assert words not in rows, f"{name} has {words}"
    tracker.shutdown()
    stored = everything_in(path)
    for words in hers:
        assert words.encode() not in stored, words
        if len(words) == 32:
            assert bytes.fromhex(words) not in stored  # as spans have it
    for words in theirs:
        assert words.encode() in stored, words
    assert dump(path) == before
    assert tracker.user_summary("alice") is None
    user = tracker.user_summary("bob")
    assert user is not None
    assert (user.sessions_total, user.total_turns, user.user_satisfaction) == (2, 1, 0.75)


def test_what_waits_of_two_users_in_one_batch_is_parted(capture: Capture, clock: Clock) -> None:
    tracker = capture.tracker(clock=clock, outbox=True)
    turns: dict[str, Turn] = {}
    for name in ("alice", "bob"):
        session = tracker.start_session(user_id=name, session_id=f"of {name}")
        turns[name] = exchange(session, conversation=f"c of {name}")
        session.feedback(True)
        turns[name].feedback(True)
        session.end()
    both = capture.spans()
    with tracker.ledger.writing() as ledger:
        ledger.put("spans", to_otlp(both), items=len(both), created_ns=clock())
    assert len(both) == 6  # of each the session's start and end, and the turn
    waiting = [json.loads(item.body) for item in tracker.ledger.outbox() if item.kind == "score"]
    subjects = {"of alice", turns["alice"].id}
    hers = [score for score in waiting if {score.get("sessionId"), score.get("traceId")} & subjects]
    assert 0 < len(hers) < len(waiting)
    forgotten = tracker.forget_user("alice")
    assert forgotten.waiting == 6 + len(hers)
    left = outbox_spans(tracker.ledger)
    assert [span.attributes[a.SESSION_ID] for span in left] == ["of bob"] * 6
    items = tracker.ledger.outbox()
    assert [item.items for item in items if item.kind == "spans"][-1] == 3
    assert sum(item.items for item in items if item.kind == "spans") == 6
    assert [json.loads(item.body) for item in items if item.kind == "score"] == [
        score for score in waiting if score not in hers
    ]


def test_what_langfuse_holds_of_a_user_is_said(tracker: SessionTracker) -> None:
    for number in range(7):
        with tracker.session(user_id="alice", session_id=f"s{number}") as session:
            exchange(session)
    forgotten = asyncio.run(tracker.aforget_user("alice"))
    hashed = tracker.hash_user("alice")
    assert str(forgotten) == (
        f"7 sessions with 7 turns were erased, and {forgotten.waiting} spans and scores that had not been sent. What "
        f"Langfuse was sent is still there: delete the traces of the user {hashed}, or of the sessions "
        f"{', '.join(forgotten.sessions[:5])}, ...."
    )
    again = tracker.forget_user("alice")
    assert str(again) == f"Nothing of the user {hashed} was on record."
    with pytest.raises(IdentityError):
        tracker.forget_user("")


def test_runs_of_a_user_who_was_forgotten_begin_anew(tracker: SessionTracker) -> None:
    first = tracker.begin_turn(TurnRequest(user_id="alice", conversation_id="c1"))
    first.end()
    tracker.forget_user("alice")
    turn = tracker.begin_turn(TurnRequest(user_id="alice", conversation_id="c1"))
    turn.end()
    assert turn.conversation.session.id != first.conversation.session.id
    assert (turn.number, turn.conversation.session.facts.sessions_total) == (1, 1)
    user = tracker.user_summary("alice")
    assert user is not None
    assert (user.sessions_total, user.total_turns) == (1, 1)


@pytest.mark.parametrize("steps", [1, 450], ids=["short", "long"])
def test_a_turn_that_runs_elsewhere_while_its_user_is_forgotten_leaves_nothing(
    steps: int, workers: list[SessionTracker], path: Path
) -> None:
    one, other = workers
    session = other.start_session(user_id="alice")
    turn = session.conversation("of alice").start_turn("Hello")
    other.flush()
    one.forget_user("alice")
    for _ in range(steps):
        turn.close_step(turn.open_step("agent", "chain"))
    other.flush()
    turn.end()
    session.end()
    for tracker in workers:
        tracker.shutdown()
    stored = everything_in(path)
    for words in (one.hash_user("alice"), session.id, turn.id, "of alice"):
        assert words.encode() not in stored, words
    assert bytes.fromhex(turn.id) not in stored


@pytest.mark.parametrize("last", ["alice", "bob"])
def test_a_conversation_that_two_users_share_stays_the_others(
    last: str, capture: Capture, clock: Clock, path: Path
) -> None:
    tracker = capture.tracker(f"sqlite:///{path}", clock=clock)
    other = "bob" if last == "alice" else "alice"
    sessions = {name: tracker.start_session(user_id=name, session_id=f"of {name}") for name in ("alice", "bob")}
    for name in (other, last, other, last):
        exchange(sessions[name], conversation="shared")
        clock.advance(seconds=1)
    tracker.forget_user("alice")
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT id, session_id, user_id, total_turns FROM turntrace_conversations"
        rows = connection.execute(query).fetchall()
    begun_by_bob = other == "bob"
    assert rows == [("shared", "of bob", tracker.hash_user("bob") if begun_by_bob else None, 2)]
    assert tracker.ledger.turn_numbers("shared") == ([1, 3] if begun_by_bob else [2, 4])
    assert exchange(sessions["bob"], conversation="shared").number == (4 if begun_by_bob else 5)


def test_a_turn_that_goes_on_after_it_was_swept_is_whole_when_it_ends(tmp_path: Path, clock: Clock) -> None:
    """It ran longer than sessions may be silent, in a process that the sweeper cannot see."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    works, sweeps = (
        SessionTracker(url, clock=clock, tracer_provider=TracerProvider(), outbox=True, user_hash_key="k" * 16)
        for _ in range(2)
    )
    session = works.start_session(user_id="ann")
    turn = session.conversation("c").start_turn("A long piece of work, please")
    clock.advance(minutes=31)
    swept = sweeps.sweep()
    assert (swept.turns, swept.sessions) == (1, 1)
    turn.set_answer("Done.")
    turn.end()
    works.flush()
    [(row, _)] = sweeps.ledger.turns(session.id)
    assert (row.status, row.number, row.latency_ms) == ("completed", 1, 31 * 60_000)
    summary = sweeps.session_summary(session.id)
    assert summary is not None
    assert (summary.total_turns, summary.active_ms, summary.end_reason) == (1, 31 * 60_000, "inactive_timeout")
    roots = [span for span in outbox_spans(sweeps.ledger) if span.name == "conversation.turn"]
    assert [root.attributes["turn.status"] for root in roots] == ["abandoned", "completed"]
    assert len({(root.trace_id, root.span_id) for root in roots}) == 1  # the later one overwrites the earlier
    ends = [span for span in outbox_spans(sweeps.ledger) if span.name == "session.end"]
    assert [end.attributes["session.total_turns"] for end in ends] == [1, 1]
    assert ends[-1].attributes["session.active_ms"] == 31 * 60_000
    assert len({(end.trace_id, end.span_id) for end in ends}) == 1
    assert session.conversation("c").start_turn("Next").number == 2
    works.shutdown()
    sweeps.shutdown()
