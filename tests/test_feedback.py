"""Feedback, evaluators, and the scores that come of them and of a session's end."""

import asyncio
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.trace import SpanKind

import fresh
from turntrace import SessionSummary, SessionTracker
from turntrace import attributes as a
from turntrace.content import ContentPolicy
from turntrace.errors import ConfigurationError, IdentityError, StateError
from turntrace.identity import derived_id
from turntrace.ledger import Ledger
from turntrace.lifecycle.evaluating import Evaluator
from turntrace.testing import Capture, CapturedSpan, Clock, outbox_spans

TOTALS = {
    *("session.total_turns", "session.total_tokens", "session.total_cost_usd", "session.duration_ms"),
    *("session.end_reason", "dropoff.detected", "context.prunings"),
}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def tracker(capture: Capture, clock: Clock) -> SessionTracker:
    return capture.tracker(clock=clock, outbox=True)


def scores(ledger: Ledger) -> list[dict[str, Any]]:
    return [json.loads(item.body) for item in ledger.outbox() if item.kind == "score"]


def by_name(ledger: Ledger) -> dict[str, dict[str, Any]]:
    """Return the scores by name, the later ones in the place of the earlier, as in Langfuse."""
    found = {score["id"]: score for score in scores(ledger)}
    assert len({score["name"] for score in found.values()}) == len(found)
    return {score["name"]: score for score in found.values()}


def ends(ledger: Ledger) -> list[CapturedSpan]:
    return [span for span in outbox_spans(ledger) if span.name == "session.end"]


# --- feedback ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "kept", "sent", "kind"),
    [
        (True, 1.0, 1, "BOOLEAN"),
        (False, 0.0, 0, "BOOLEAN"),
        (1, 1.0, 1.0, "NUMERIC"),
        (0, 0.0, 0.0, "NUMERIC"),
        (0.25, 0.25, 0.25, "NUMERIC"),
        (1.0, 1.0, 1.0, "NUMERIC"),
    ],
)
@pytest.mark.parametrize("subject", ["turn", "session"])
def test_feedback_is_a_score_of_what_it_is_about(
    subject: str, value: float | bool, kept: float, sent: float, kind: str, tracker: SessionTracker
) -> None:
    session = tracker.start_session(user_id="alice")
    with session.conversation("c1").turn("Hello") as turn:
        pass
    (turn if subject == "turn" else session).feedback(value)
    assert session.summary().user_satisfaction == kept
    user = tracker.user_summary("alice")
    assert user is not None
    assert user.user_satisfaction == kept
    about = {"traceId": turn.id} if subject == "turn" else {"sessionId": session.id}
    mine, mean = scores(tracker.ledger)
    subject_id = turn.id if subject == "turn" else session.id
    assert mine == {
        "id": derived_id("score", subject_id, "user_feedback"),
        **about,
        "name": "user_feedback",
        "value": sent,
        "dataType": kind,
    }
    assert type(mine["value"]) is type(sent)  # Langfuse refuses true where it wants 1
    assert mean == {
        "id": derived_id("score", session.id, "session.user_satisfaction"),
        "sessionId": session.id,
        "name": "session.user_satisfaction",
        "value": kept,
        "dataType": "NUMERIC",
    }


def test_feedback_of_the_same_name_replaces_and_of_another_adds(tracker: SessionTracker) -> None:
    session = tracker.start_session(user_id="alice")
    turns = [session.conversation("c1").start_turn("Hello") for _ in range(2)]

    def satisfaction() -> float | None:
        return session.summary().user_satisfaction

    assert satisfaction() is None
    turns[0].feedback(0.2)
    assert satisfaction() == pytest.approx(0.2)
    turns[0].feedback(0.6)  # instead of 0.2
    assert satisfaction() == pytest.approx(0.6)
    turns[1].feedback(True)  # on another turn
    assert satisfaction() == pytest.approx(0.8)
    session.feedback(False)  # on the session
    assert satisfaction() == pytest.approx(1.6 / 3)
    turns[0].feedback(0.0, "tone")  # of another name
    assert satisfaction() == pytest.approx(0.4)
    session.feedback(False)
    assert satisfaction() == pytest.approx(0.4)
    ids = {(score["id"], score["name"]) for score in scores(tracker.ledger)}
    assert len(ids) == 5  # one each for four subjects and names, and the mean


def test_the_mean_of_a_user_is_over_all_feedback_of_all_sessions(tracker: SessionTracker) -> None:
    first, second, others = (tracker.start_session(user_id=name) for name in ("alice", "alice", "bob"))
    first.feedback(True)
    first.feedback(True, "tone")
    second.feedback(False)
    others.feedback(0.3)
    users = [tracker.user_summary(name) for name in ("alice", "bob")]
    assert [user and user.user_satisfaction for user in users] == [pytest.approx(2 / 3), pytest.approx(0.3)]


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (5, r"feedback\(1\)"),
        (4, r"feedback\(0\.8\)"),
        (1.5, r"feedback\(0\.3\)"),
        (-1, r"feedback\(1\.0\)"),
        (100, r"feedback\(1\.0\)"),
        pytest.param(10**400, r"feedback\(1\.0\)", id="huge"),
        (float("nan"), r"feedback\(1\.0\)"),
        (float("inf"), r"feedback\(1\.0\)"),
        ("good", r"'good'.*feedback\(1\.0\)"),
        ("1", "from 0 to 1"),
        (None, "from 0 to 1"),
        ([1], "from 0 to 1"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_at_the_call(value: Any, hint: str, tracker: SessionTracker) -> None:
    session = tracker.start_session()
    with session.conversation("c1").turn("Hello") as turn:
        pass
    for give in (session.feedback, turn.feedback):
        with pytest.raises(ConfigurationError, match=hint):
            give(value)
    with pytest.raises(ConfigurationError, match=hint):
        tracker.feedback(value, session_id=session.id)
    assert session.summary().user_satisfaction is None
    assert scores(tracker.ledger) == []


def test_a_name_that_cannot_be_used_is_refused_at_the_call(tracker: SessionTracker) -> None:
    session = tracker.start_session()
    for name in ("", "x" * 201, "\ud800"):
        with pytest.raises(IdentityError, match="name"):
            session.feedback(True, name)


# --- comments ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("level", "is_sent"), [("metadata", False), ("turn", True), ("full", True)])
@pytest.mark.parametrize("subject", ["turn", "session", "tracker"])
def test_a_comment_leaves_only_when_it_may_and_is_never_kept(
    subject: str, level: Any, is_sent: bool, capture: Capture, url: str, tmp_path: Path
) -> None:
    policy = ContentPolicy(level, redact=lambda text: text.replace("alice", "[name]"))
    tracker = capture.tracker(url, outbox=True, content=policy)
    with tracker.session() as session, session.conversation("c1").turn("Hello") as turn:
        pass
    comment = "I, alice, like it"
    if subject == "turn":
        turn.feedback(True, comment=comment)
    elif subject == "session":
        session.feedback(True, comment=comment)
    else:
        tracker.flush()
        tracker.feedback(True, turn_id=turn.id, comment=comment)
    commented = {score["name"]: score["comment"] for score in scores(tracker.ledger) if "comment" in score}
    assert commented == ({"user_feedback": "I, [name], like it"} if is_sent else {})
    with tracker.ledger.writing() as ledger:
        for item in tracker.ledger.outbox():
            ledger.remove(item.id)  # as if all was sent
    tracker.shutdown()
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        connection.execute("VACUUM")  # what is free is not what is kept
    stored = b"".join(file.read_bytes() for file in tmp_path.glob("ledger.db*"))
    assert session.id.encode() in stored
    assert b"like it" not in stored
    assert b"alice" not in stored


def test_half_an_emoji_does_not_cost_the_feedback(capture: Capture) -> None:
    tracker = capture.tracker(outbox=True, content="turn")
    session = tracker.start_session()
    session.feedback(True, comment="Nice \ud83d")
    assert by_name(tracker.ledger)["user_feedback"]["comment"] == "Nice ?"


# --- later, and from elsewhere ----------------------------------------------------------------------------------------
def test_feedback_comes_later_and_from_another_process(capture: Capture, url: str, clock: Clock) -> None:
    one = capture.tracker(url, outbox=True, clock=clock)
    with one.session(user_id="alice") as session, session.conversation("c1").turn("Hello") as turn:
        clock.advance(seconds=1)
    one.flush()
    clock.advance(minutes=60 * 24)
    two = capture.tracker(url, outbox=True, clock=clock)
    two.feedback(True, turn_id=turn.id)
    asyncio.run(two.afeedback(0.5, session_id=session.id, name="survey"))
    two.flush()
    assert session.summary().user_satisfaction == 0.75
    sent = ends(one.ledger)
    assert [span.attributes.get(a.SESSION_USER_SATISFACTION) for span in sent] == [None, 1.0, 0.75]
    assert len({(span.trace_id, span.span_id) for span in sent}) == 1
    named = by_name(one.ledger)
    assert named["user_feedback"]["traceId"] == turn.id
    assert named["survey"]["sessionId"] == session.id
    assert named["session.user_satisfaction"]["value"] == 0.75
    before, *_, after = ends(one.ledger)
    changed = {name for name, value in after.attributes.items() if before.attributes.get(name) != value}
    assert changed == {a.SESSION_USER_SATISFACTION}  # the rest of what was said of the end is the same


def test_feedback_while_a_turn_runs_is_given_by_its_id_too(capture: Capture, url: str) -> None:
    one, two = capture.tracker(url), capture.tracker(url, outbox=True)
    turn = one.start_session().conversation("c1").start_turn("Hello")
    two.feedback(True, turn_id=turn.id)
    two.flush()
    [score, _] = scores(two.ledger)
    assert score["traceId"] == turn.id
    turn.end()


def test_feedback_on_a_turn_below_a_request_is_on_the_trace_of_that(capture: Capture, tracker: SessionTracker) -> None:
    with capture.provider.get_tracer("app").start_as_current_span("request", kind=SpanKind.SERVER) as request:
        turn = tracker.start_session().conversation("c1").start_turn("Hello")
    turn.end()
    tracker.flush()
    turn.feedback(True)
    tracker.feedback(0.5, turn_id=turn.id, name="later")
    named = by_name(tracker.ledger)
    trace_id = f"{request.get_span_context().trace_id:032x}"
    assert [named[name]["traceId"] for name in ("user_feedback", "later")] == [trace_id, trace_id]


def test_feedback_needs_one_id_that_is_known(tracker: SessionTracker) -> None:
    session = tracker.start_session()
    with session.conversation("c1").turn("Hello") as turn:
        pass
    with pytest.raises(StateError, match="exactly one of turn_id"):
        tracker.feedback(True)
    with pytest.raises(StateError, match="exactly one of turn_id"):
        tracker.feedback(True, turn_id=turn.id, session_id=session.id)
    with pytest.raises(StateError, match="no turn 'other'"):
        tracker.feedback(True, turn_id="other")
    with pytest.raises(StateError, match="no session 'other'"):
        tracker.feedback(True, session_id="other")
    with pytest.raises(StateError, match="no turn"):
        asyncio.run(tracker.afeedback(True, turn_id=session.id))
    with pytest.raises(IdentityError, match="turn_id"):
        tracker.feedback(True, turn_id="")


def test_feedback_on_a_session_that_was_erased_leaves_nothing(tracker: SessionTracker) -> None:
    session = tracker.start_session(user_id="alice")
    with session.conversation("c1").turn("Hello") as turn:
        pass
    tracker.forget_user("alice")
    turn.feedback(True)
    session.feedback(True)
    tracker.flush()
    assert tracker.ledger.outbox() == []
    with tracker.ledger._database.reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM turntrace_feedback").scalar() == 0


# --- scores of an end -------------------------------------------------------------------------------------------------
def test_an_end_is_told_by_scores_of_the_session(tracker: SessionTracker, clock: Clock) -> None:
    session = tracker.start_session(user_id="alice", session_id="s1")
    with session.conversation("c1").turn("Hello") as turn:
        clock.advance(seconds=2)
        turn.set_intent("greet")
        turn.set_answer("Who?")
    session.journey("onboarding", ["a", "b"]).enter("b")
    session.end("completed")
    sent = by_name(tracker.ledger)
    values = {name: (score["value"], score["dataType"]) for name, score in sent.items()}
    assert values == {
        "session.total_turns": (1, "NUMERIC"),
        "session.total_tokens": (0, "NUMERIC"),
        "session.total_cost_usd": (0.0, "NUMERIC"),
        "session.duration_ms": (2000, "NUMERIC"),
        "session.avg_turn_latency_ms": (2000.0, "NUMERIC"),
        "session.end_reason": ("completed", "CATEGORICAL"),
        "dropoff.detected": (0, "BOOLEAN"),
        "dropoff.last_intent": ("greet", "CATEGORICAL"),
        "journey.stage": ("b", "CATEGORICAL"),
        "journey.converted": (0, "BOOLEAN"),
        "context.prunings": (0, "NUMERIC"),
    }
    for name, score in sent.items():
        assert set(score) == {"id", "sessionId", "name", "value", "dataType"}
        assert (score["id"], score["sessionId"]) == (derived_id("score", "s1", name), "s1")


def test_an_end_that_is_said_again_is_told_under_the_same_ids(tracker: SessionTracker) -> None:
    session = tracker.start_session(session_id="s1")
    session.end()
    first = {score["name"]: score["id"] for score in scores(tracker.ledger)}
    assert set(first) == TOTALS
    session = tracker.start_session(session_id="s1")
    session.conversation("c1").start_turn("Hello").end()
    session.end("handoff")
    again = scores(tracker.ledger)[len(first) :]
    assert first.items() <= {s["name"]: s["id"] for s in again}.items()
    assert {score["name"]: score["value"] for score in again}["session.end_reason"] == "handoff"


def test_an_intent_that_was_told_and_holds_no_longer_does_not_stay_in_langfuse(tracker: SessionTracker) -> None:
    session = tracker.start_session(session_id="s1")
    with session.conversation("c1").turn("Hello") as turn:
        turn.set_intent("greet")
    late = session.conversation("c1").start_turn("And now?")  # nobody says what is wanted in it
    session.end()
    assert by_name(tracker.ledger)["dropoff.last_intent"]["value"] == "greet"
    late.end()
    assert session.summary().last_intent is None
    assert by_name(tracker.ledger)["dropoff.last_intent"]["value"] == "unknown"
    session.feedback(True)  # which has the totals sent again
    tracker.flush()
    assert [score["value"] for score in scores(tracker.ledger) if score["name"] == "dropoff.last_intent"] == [
        "greet",
        "unknown",
    ]


def test_every_score_has_one_subject(tracker: SessionTracker) -> None:
    with tracker.session(user_id="alice") as session, session.conversation("c1").turn("Hello") as turn:
        turn.feedback(True)
        session.feedback(0.5)
    found = scores(tracker.ledger)
    assert found
    assert all(("sessionId" in score) != ("traceId" in score) for score in found)


def test_no_scores_wait_where_spans_go_to_the_apps_own_provider(capture: Capture) -> None:
    tracker = capture.tracker(evaluators=[lambda _session: {"resolved": True}])
    with tracker.session() as session, session.conversation("c1").turn("Hello") as turn:
        turn.feedback(True)
    session.feedback(True)
    tracker.flush()
    assert session.summary().user_satisfaction == 1.0
    assert tracker.ledger.outbox() == []


# --- evaluators -------------------------------------------------------------------------------------------------------
def end_one(tracker: SessionTracker) -> dict[str, Any]:
    """End a session and return the scores that evaluators gave to it."""
    with tracker.session(session_id="s1", user_id="alice") as session:
        session.conversation("c1").start_turn("Hello").end()
    assert tracker.flush()
    given = {name: score for name, score in by_name(tracker.ledger).items() if "." not in name}
    assert all(score["sessionId"] == "s1" for score in given.values())
    assert all(score["id"] == derived_id("score", "s1", name) for name, score in given.items())
    return {name: (score["value"], score["dataType"]) for name, score in given.items()}


def test_evaluators_give_scores_to_a_session_that_has_ended(capture: Capture) -> None:
    seen: list[SessionSummary] = []

    def rule(session: SessionSummary) -> Mapping[str, Any]:
        seen.append(session)
        return {"resolved": True, "effort": 0.3}

    async def judge(session: SessionSummary) -> Mapping[str, Any]:
        await asyncio.sleep(0)
        return {"tone": "friendly", "turns": session.total_turns}

    class Silent:
        def __call__(self, _session: SessionSummary) -> Any:
            return None

    tracker = capture.tracker(outbox=True, evaluators=[rule, judge, Silent(), lambda _session: {}])
    assert end_one(tracker) == {
        "resolved": (1, "BOOLEAN"),
        "effort": (0.3, "NUMERIC"),
        "tone": ("friendly", "CATEGORICAL"),
        "turns": (1, "NUMERIC"),
    }
    [session] = seen
    assert (session.id, session.end_reason, session.total_turns, session.dropoff) == ("s1", "user_exit", 1, False)
    assert session.user_id == tracker.hash_user("alice")


def fails(_session: SessionSummary) -> Any:
    raise LookupError("secret of alice")


async def fails_later(_session: SessionSummary) -> Any:
    await asyncio.sleep(0)
    raise LookupError("secret of alice")


def returns_text(_session: SessionSummary) -> Any:
    return "good"


def returns_a_list(_session: SessionSummary) -> Any:
    return {"good": ["secret of alice"]}


def returns_no_number(_session: SessionSummary) -> Any:
    return {"good": float("nan")}


def returns_no_name(_session: SessionSummary) -> Any:
    return {"": 1}


async def waits_for_ever(_session: SessionSummary) -> Any:
    await asyncio.Event().wait()


BAD: dict[str, tuple[Evaluator, str]] = {
    "fails": (fails, "LookupError"),
    "fails later": (fails_later, "LookupError"),
    "text": (returns_text, "returned a str. Allowed is a mapping"),
    "a list": (returns_a_list, "score 'good' is a list. Allowed are"),
    "not a number": (returns_no_number, "score 'good' is nan"),
    "no name": (returns_no_name, "The name of a score has 0 characters"),
    "too long": (waits_for_ever, "TimeoutError"),
}


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("kind", BAD)
def test_an_evaluator_that_goes_wrong_is_said_once_and_the_others_go_on(
    kind: str, capture: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    bad, said = BAD[kind]
    tracker = capture.tracker(
        outbox=True,
        evaluators=[lambda _session: {"first": 1}, bad, lambda _session: {"last": 2}],
        evaluator_timeout=1.0,
    )
    with caplog.at_level(logging.WARNING, "turntrace"):
        assert end_one(tracker) == {"first": (1, "NUMERIC"), "last": (2, "NUMERIC")}
        with tracker.session(session_id="s2"):
            pass
        tracker.flush()
    [warning] = [record.getMessage() for record in caplog.records]
    assert said in warning
    assert f"evaluating a session by {bad.__name__}" in warning
    assert "alice" not in warning


@pytest.mark.usefixtures("lenient")
def test_a_sync_evaluator_that_takes_too_long_is_left_behind(
    capture: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on = threading.Event()

    def hangs(_session: SessionSummary) -> Any:
        goes_on.wait()
        return {"late": 1}

    tracker = capture.tracker(outbox=True, evaluators=[hangs, lambda _session: {"other": 1}], evaluator_timeout=1.0)
    try:
        with caplog.at_level(logging.WARNING, "turntrace"):
            assert end_one(tracker) == {"other": (1, "NUMERIC")}
        [warning] = [record.getMessage() for record in caplog.records]
        assert "evaluating a session by hangs of evaluators=... failed with TimeoutError" in warning
    finally:
        goes_on.set()
    tracker.flush()
    assert "late" not in by_name(tracker.ledger)


def test_names_and_words_of_evaluators_are_made_fit(capture: Capture) -> None:
    odd: Any = {7: 0.5, "mood": "half \ud83d an emoji"}
    tracker = capture.tracker(outbox=True, evaluators=[lambda _session: odd])
    assert end_one(tracker) == {"7": (0.5, "NUMERIC"), "mood": ("half ? an emoji", "CATEGORICAL")}
    assert tracker.flush()


def test_an_evaluator_may_ask_the_tracker(capture: Capture) -> None:
    asked: list[SessionTracker] = []

    def looks(session: SessionSummary) -> Mapping[str, Any]:
        found = asked[0].session_summary(session.id)
        return {"ended": found is not None and found.ended_ns is not None}

    tracker = capture.tracker(outbox=True, evaluators=[looks])
    asked.append(tracker)
    assert end_one(tracker) == {"ended": (1, "BOOLEAN")}


def test_sessions_that_the_sweep_ends_are_evaluated(capture: Capture, clock: Clock) -> None:
    tracker = capture.tracker(outbox=True, clock=clock, evaluators=[lambda session: {"why": session.end_reason or ""}])
    tracker.start_session(session_id="s1")
    clock.advance(minutes=31)
    assert tracker.sweep().sessions == 1
    tracker.flush()
    assert by_name(tracker.ledger)["why"]["value"] == "inactive_timeout"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"evaluators": ["resolved"]}, "An evaluator is a str"),
        ({"evaluators": [None]}, "An evaluator is a NoneType"),
        ({"evaluators": [len, 3]}, "An evaluator is a int"),
        ({"evaluator_timeout": 0}, "evaluator_timeout is 0"),
        ({"evaluator_timeout": -1}, "evaluator_timeout is -1"),
        ({"evaluator_timeout": True}, "evaluator_timeout is True"),
        ({"evaluator_timeout": "10"}, "evaluator_timeout is '10'"),
        ({"evaluator_timeout": float("nan")}, "evaluator_timeout is nan"),
        ({"evaluator_timeout": 3601}, "evaluator_timeout is 3601"),
        ({"dropoff": "silence"}, "dropoff is a str"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any], why: str) -> None:
    make: Callable[..., SessionTracker] = SessionTracker
    with pytest.raises(ConfigurationError, match=why):
        make("sqlite://", **settings)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_process_that_was_forked_evaluates_its_own_sessions_only(tmp_path: Path) -> None:
    """While the parent's evaluator is at work: the child neither waits for it nor does its work again."""
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    script = f"""
import json, os, threading, time
from opentelemetry.sdk.trace import TracerProvider
from turntrace import SessionTracker

def slow(session):
    time.sleep(1.0)
    return {{"by": "child" if os.getpid() != parent else "parent"}}

parent = os.getpid()
tracker = SessionTracker({url!r}, tracer_provider=TracerProvider(), outbox=True, evaluators=[slow])
with tracker.session(session_id="of the parent"):
    pass
tracker.session_summary("of the parent")  # its evaluation has begun
child = os.fork()
if child == 0:
    with tracker.session(session_id="of the child"):
        pass
    tracker.flush()
    os._exit(0)
os.waitpid(child, 0)
tracker.flush()
tell(json.dumps([json.loads(i.body) for i in tracker.ledger.outbox() if i.kind == "score"]).encode())
"""
    process = fresh.Fresh(script)
    scores = json.loads(process.told())
    process.finish()
    assert sorted((score["sessionId"], score["value"]) for score in scores if score["name"] == "by") == [
        ("of the child", "child"),
        ("of the parent", "parent"),
    ]
