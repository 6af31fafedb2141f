"""Journeys: stages on the way to a conversion, in turns and outside of them, over sessions, by workers side by side."""

import asyncio
import json
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver

from apps import State, asks, config_of, single
from turntrace import Journey, SessionCallbackHandler, SessionTracker, current_turn, track_node
from turntrace import attributes as a
from turntrace.errors import ConfigurationError, IdentityError
from turntrace.summaries import StageEntered
from turntrace.testing import Capture, CapturedSpan, Clock, assert_all_tagged, captured_spans, outbox_spans

STAGES = ["signup", "connect", "done"]


@pytest.fixture
def tracker(capture: Capture, clock: Clock) -> SessionTracker:
    return capture.tracker(clock=clock, outbox=True)


def events(capture: Capture) -> list[CapturedSpan]:
    return [span for span in captured_spans(capture.spans()) if span.name == "journey.stage"]


def passed(tracker: SessionTracker, session_id: str) -> list[tuple[str, bool, bool]]:
    """Return the stages of a session's steps, with whether each was back and whether it was converted."""
    return [(step.stage, step.is_back, step.converted) for step in tracker.ledger.stages(session_id)]


def test_after_a_flush_the_spans_of_a_turn_are_counted_with_those_of_its_stages(tmp_path: Path) -> None:
    tracker = SessionTracker(f"sqlite:///{tmp_path}/l.db", outbox=True)
    for number in range(10):
        turn = tracker.start_session().conversation(f"c{number}").start_turn("Hi")
        turn.journey("onboarding", stages=STAGES).enter("signup")
        turn.end()
        assert tracker.flush()
        with closing(sqlite3.connect(tmp_path / "l.db")) as connection:
            query = "SELECT spans FROM turntrace_turns WHERE id = ?"
            assert connection.execute(query, [turn.id]).fetchone() == (2,)
    tracker.shutdown()


# --- entering and converting ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("calls", "steps"),
    [
        ("signup", [("signup", False, False)]),
        ("signup signup", [("signup", False, False)]),
        ("signup connect", [("signup", False, False), ("connect", False, False)]),
        ("done", [("done", False, False)]),
        ("done signup", [("done", False, False), ("signup", True, False)]),
        ("signup done connect", [("signup", False, False), ("done", False, False), ("connect", True, False)]),
        ("signup convert", [("signup", False, False), ("signup", False, True)]),
        ("signup convert convert", [("signup", False, False), ("signup", False, True)]),
        ("signup convert signup", [("signup", False, False), ("signup", False, True)]),
        ("connect convert signup", [("connect", False, False), ("connect", False, True), ("signup", True, True)]),
        ("convert", [("signup", False, True)]),
        ("convert convert signup", [("signup", False, True)]),
        ("convert done convert", [("signup", False, True), ("done", False, True)]),
    ],
)
def test_what_changes_nothing_is_no_step_and_back_is_one(
    calls: str, steps: list[tuple[str, bool, bool]], capture: Capture, tracker: SessionTracker
) -> None:
    session = tracker.start_session(user_id="alice")
    journey = session.journey("onboarding", STAGES)
    for call in calls.split():
        if call == "convert":
            journey.convert()
        else:
            journey.enter(call)
    assert passed(tracker, session.id) == steps
    assert [(span.attributes[a.JOURNEY_STAGE], span.attributes[a.JOURNEY_CONVERTED]) for span in events(capture)] == [
        (stage, converted) for stage, _, converted in steps
    ]
    summary = journey.summary()
    assert summary is not None
    assert (summary.stage, summary.converted) == (steps[-1][0], steps[-1][2])


def test_a_stage_that_is_none_is_refused_with_the_list(tracker: SessionTracker) -> None:
    session = tracker.start_session()
    journey = session.journey("onboarding", STAGES)
    wrong: Any
    for wrong in ("setup", "Signup", "", None, 1):
        with pytest.raises(ConfigurationError, match=r"no stage .* Its stages are signup, connect, done"):
            journey.enter(wrong)
    assert tracker.ledger.stages(session.id) == []
    assert journey.summary() is None


@pytest.mark.parametrize("stages", ["signup", [], (), 3, {"signup", "done"}, {"signup": 1}, ["a", "b", "a"]])
def test_stages_that_cannot_be_used_are_refused_at_the_call(stages: Any, tracker: SessionTracker) -> None:
    session = tracker.start_session()
    with session.conversation("c1").turn() as turn:
        for take in (session.journey, turn.journey):
            with pytest.raises(ConfigurationError, match="'onboarding'"):
                take("onboarding", stages)
    with pytest.raises(ConfigurationError, match="'onboarding'"):
        SessionTracker("sqlite://", journeys={"onboarding": stages})


def test_what_is_wrong_with_stages_is_said(tracker: SessionTracker) -> None:
    session = tracker.start_session()
    with pytest.raises(ConfigurationError, match=r"'signup'\. Allowed is a list .*stages=\["):
        session.journey("onboarding", "signup")  # a string is a sequence too, of its letters
    with pytest.raises(ConfigurationError, match="has the stage 'a' twice"):
        session.journey("onboarding", ["a", "b", "a"])
    with pytest.raises(IdentityError, match="stage"):
        session.journey("onboarding", ["a", ""])
    with pytest.raises(IdentityError, match="name"):
        session.journey("", STAGES)


# --- where the stages come from ---------------------------------------------------------------------------------------
def test_stages_come_from_the_tracker(capture: Capture) -> None:
    tracker = capture.tracker(journeys={"onboarding": STAGES})
    journey = tracker.start_session().journey("onboarding")
    assert journey.stages == tuple(STAGES)
    journey.enter("connect")
    summary = journey.summary()
    assert summary is not None
    assert (summary.stages, summary.stage_number) == (tuple(STAGES), 2)


def test_stages_come_from_what_the_journey_began_with_in_another_process(capture: Capture, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    one, two = capture.tracker(url), capture.tracker(url)
    one.start_session(user_id="alice").journey("onboarding", STAGES).enter("signup")
    one.flush()
    assert two.start_session(user_id="alice").journey("onboarding").stages == tuple(STAGES)


def test_stages_that_are_nowhere_said_are_asked_for(capture: Capture, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    one, two = capture.tracker(url), capture.tracker(url)
    one.start_session(user_id="bob").journey("onboarding", STAGES).enter("signup")
    one.flush()
    session = two.start_session(user_id="alice")
    with pytest.raises(ConfigurationError, match=r"not known.*stages=\[\.\.\.\].*journeys=\{'onboarding'"):
        session.journey("onboarding")
    with session.conversation("c1").turn() as turn, pytest.raises(ConfigurationError, match="not known"):
        turn.journey("onboarding")


def test_stages_that_are_given_go_before_those_that_were(tracker: SessionTracker) -> None:
    session = tracker.start_session(user_id="alice")
    session.journey("onboarding", STAGES).enter("connect")
    longer = session.journey("onboarding", ["signup", "verify", *STAGES[1:]])
    longer.enter("done")
    summary = longer.summary()
    assert summary is not None
    assert (summary.stages, summary.stage_number) == (("signup", "verify", "connect", "done"), 4)
    assert [step.total_stages for step in tracker.ledger.stages(session.id)] == [3, 4]


# --- the events -------------------------------------------------------------------------------------------------------
def test_a_step_in_a_turn_is_an_event_below_its_root(capture: Capture, tracker: SessionTracker, clock: Clock) -> None:
    session = tracker.start_session(user_id="alice", channel="web", tier="premium", org_id="o1")
    with session.conversation("c1", topic="setup").turn("Hello") as turn:
        journey = turn.journey("onboarding", STAGES)
        journey.enter("signup")
        clock.advance(seconds=3)
        journey.enter("connect")
        tracker.flush()  # an event is written while the turn runs too
        clock.advance(seconds=1)
        journey.enter("done")
        journey.convert()
    session.end()
    spans = captured_spans(capture.spans())
    assert_all_tagged(spans)
    assert_all_tagged(outbox_spans(tracker.ledger))
    [root] = [span for span in spans if span.name == "conversation.turn"]
    steps = events(capture)
    assert {(span.trace_id, span.parent_id) for span in steps} == {(turn.id, root.span_id)}
    assert all({**turn.tags}.items() <= {**span.attributes}.items() for span in steps)
    assert [span.attributes.get(a.JOURNEY_TIME_IN_STAGE_MS) for span in steps] == [None, 3000, 1000, 0]
    assert [span.attributes.get(a.JOURNEY_CONVERSION_TURN) for span in steps] == [None, None, None, 1]
    assert [span.attributes.get(a.JOURNEY_CONVERSION_TIME_MS) for span in steps] == [None, None, None, 4000]
    assert {span.attributes["langfuse.observation.type"] for span in steps} == {"event"}


def test_a_step_after_its_turn_has_ended_is_in_the_turn_all_the_same(capture: Capture, tracker: SessionTracker) -> None:
    session = tracker.start_session(user_id="alice")
    with session.conversation("c1").turn("Hello") as turn:
        journey = turn.journey("onboarding", STAGES)
    tracker.flush()
    journey.enter("signup")
    [step] = events(capture)
    assert step.trace_id == turn.id
    assert_all_tagged(capture.spans())


def test_a_step_of_the_session_is_in_its_turn_that_runs_here(capture: Capture, tracker: SessionTracker) -> None:
    session, other = tracker.start_session(user_id="alice"), tracker.start_session(user_id="bob")
    with session.conversation("c1").turn("Hello") as turn:
        session.journey("onboarding", STAGES).enter("signup")
        other.journey("onboarding", STAGES).enter("signup")
    mine, others = sorted(events(capture), key=lambda span: span.attributes[a.SESSION_ID] != session.id)
    assert mine.attributes[a.TURN_ID] == turn.id
    assert a.TURN_ID not in others.attributes
    assert (others.attributes[a.SESSION_ID], others.parent_id) == (other.id, None)


def test_a_step_outside_of_a_turn_is_in_the_session(capture: Capture, tracker: SessionTracker, clock: Clock) -> None:
    session = tracker.start_session(user_id="alice", channel="web", tier="premium", org_id="o1")
    session.conversation("c1").start_turn("Hello").end()
    session.conversation("c1").start_turn("Hello").end()
    journey = session.journey("onboarding", STAGES)
    journey.enter("signup")
    clock.advance(seconds=5)
    journey.convert()
    first, second = events(capture)
    tags = {
        a.SESSION_ID: session.id,
        a.USER_ID: session.user_id,
        a.SESSION_CHANNEL: "web",
        a.USER_TIER: "premium",
        a.USER_ORG_ID: "o1",
    }
    for span in (first, second):
        assert tags.items() <= {**span.attributes}.items()
        assert not {a.TURN_ID, a.CONVERSATION_ID} & set(span.attributes)
        assert span.parent_id is None
    assert first.trace_id != second.trace_id
    assert second.attributes[a.JOURNEY_CONVERSION_TURN] == 2  # the last one before
    assert second.attributes[a.JOURNEY_CONVERSION_TIME_MS] == 5000
    summary = session.summary()
    assert (summary.journey_name, summary.journey_stage, summary.journey_converted) == ("onboarding", "signup", True)


def test_a_step_after_the_end_of_its_session_is_told_with_the_session(tracker: SessionTracker) -> None:
    with tracker.session(user_id="alice") as session, session.conversation("c1").turn("Hello"):
        session.journey("onboarding", STAGES).enter("signup")
    session.journey("onboarding").enter("done")
    session.journey("onboarding").convert()
    tracker.flush()
    ends = [span.attributes for span in outbox_spans(tracker.ledger) if span.name == "session.end"]
    assert (ends[0][a.JOURNEY_STAGE], ends[0][a.JOURNEY_CONVERTED]) == ("signup", False)
    assert (ends[-1][a.JOURNEY_STAGE], ends[-1][a.JOURNEY_CONVERTED]) == ("done", True)
    sent = [json.loads(item.body) for item in tracker.ledger.outbox() if item.kind == "score"]
    latest = {score["name"]: score["value"] for score in sent}
    assert (latest["journey.stage"], latest["journey.converted"]) == ("done", 1)


def test_the_rows_of_turns_count_the_events_among_their_spans(tmp_path: Path, capture: Capture) -> None:
    tracker = capture.tracker(f"sqlite:///{tmp_path / 'ledger.db'}", outbox=True)
    session = tracker.start_session(user_id="alice")
    for number in range(1, 6):
        with session.conversation("c1").turn("Hello") as turn:
            turn.journey(f"j{number}", STAGES).enter("signup")
            if number % 2:
                tracker.flush()
            turn.journey(f"j{number}").enter("connect")
    turn.journey("late", STAGES).enter("signup")
    tracker.flush()
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        counted = dict(connection.execute("SELECT trace_id, spans FROM turntrace_turns").fetchall())
    spans = outbox_spans(tracker.ledger)
    assert counted == {trace: len([span for span in spans if span.trace_id == trace]) for trace in counted}


# --- whose it is ------------------------------------------------------------------------------------------------------
def test_a_journey_is_the_users_and_goes_on_in_a_later_session(tracker: SessionTracker, clock: Clock) -> None:
    with tracker.session(user_id="alice") as first:
        first.journey("onboarding", STAGES).enter("signup")
    clock.advance(minutes=60)
    second = tracker.start_session(user_id="alice", channel="mobile")
    second.journey("onboarding").enter("connect")
    other = tracker.start_session(user_id="bob")
    other.journey("onboarding", STAGES).enter("done")
    assert tracker.ledger.stages(second.id) == [
        StageEntered("onboarding", "connect", 2, 3, clock(), time_in_stage_ms=3_600_000)
    ]
    users = [tracker.user_summary(name) for name in ("alice", "bob")]
    assert [user and {name: each.stage for name, each in user.journeys.items()} for user in users] == [
        {"onboarding": "connect"},
        {"onboarding": "done"},
    ]


def test_a_journey_of_an_unknown_user_is_the_sessions(tracker: SessionTracker) -> None:
    one, two = tracker.start_session(), tracker.start_session()
    one.journey("onboarding", STAGES).enter("done")
    two.journey("onboarding", STAGES).enter("connect")
    assert passed(tracker, one.id) == [("done", False, False)]
    assert passed(tracker, two.id) == [("connect", False, False)]
    summaries = [each.journey("onboarding").summary() for each in (one, two)]
    assert [summary and summary.stage for summary in summaries] == ["done", "connect"]


def test_journeys_of_two_names_are_apart(tracker: SessionTracker) -> None:
    session = tracker.start_session(user_id="alice")
    session.journey("onboarding", STAGES).enter("signup")
    session.journey("upgrade", ["asked", "paid"]).enter("asked")
    session.journey("upgrade").convert()
    user = tracker.user_summary("alice")
    assert user is not None
    assert {name: each.converted for name, each in user.journeys.items()} == {"onboarding": False, "upgrade": True}
    assert session.summary().journey_name == "upgrade"  # the one that was stepped on last


def test_a_user_who_says_who_it_is_takes_the_journey_along(tracker: SessionTracker) -> None:
    unknown = tracker.start_session(session_id="s1")
    unknown.journey("onboarding", STAGES).enter("signup")
    tracker.flush()
    unknown.journey("tour", ["begun", "seen"]).enter("begun")  # perhaps written only when the user is known
    known = tracker.start_session(session_id="s1", user_id="alice")
    known.journey("onboarding").enter("connect")
    assert passed(tracker, "s1") == [("signup", False, False), ("begun", False, False), ("connect", False, False)]
    user = tracker.user_summary("alice")
    assert user is not None
    assert {name: each.stage for name, each in user.journeys.items()} == {"onboarding": "connect", "tour": "begun"}


def test_a_user_who_was_further_before_stays_there(tracker: SessionTracker) -> None:
    tracker.start_session(user_id="alice").journey("onboarding", STAGES).enter("done")
    unknown = tracker.start_session(session_id="s1")
    unknown.journey("onboarding", STAGES).enter("signup")
    tracker.flush()
    known = tracker.start_session(session_id="s1", user_id="alice")
    summary = known.journey("onboarding").summary()
    assert summary is not None
    assert summary.stage == "done"


# --- side by side -----------------------------------------------------------------------------------------------------
def test_workers_at_once_convert_once_and_enter_once(capture: Capture, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    workers = [capture.tracker(url, outbox=True) for _ in range(2)]
    sessions = [worker.start_session(user_id="alice") for worker in workers for _ in range(4)]
    ready = threading.Barrier(len(sessions))

    def work(journey: Journey) -> None:
        ready.wait()
        journey.enter("signup")
        journey.convert()

    threads = [threading.Thread(target=work, args=(each.journey("onboarding", STAGES),)) for each in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker in workers:
        worker.flush()
    steps = [step for session in sessions for step in workers[0].ledger.stages(session.id)]
    # whoever is first enters, and whoever is first converts
    assert sorted((step.stage, step.converted) for step in steps) == [("signup", False), ("signup", True)]
    spans = [span for span in outbox_spans(workers[0].ledger) if span.name == "journey.stage"]
    assert sorted(span.attributes[a.JOURNEY_CONVERTED] for span in spans) == [False, True]


# --- in a graph -------------------------------------------------------------------------------------------------------
def test_a_node_takes_a_step_of_the_turn_that_runs(capture: Capture, tracker: SessionTracker) -> None:
    def node(_state: State) -> Any:
        journey = current_turn().journey("onboarding", STAGES)
        journey.enter("signup")
        journey.convert()
        current_turn().feedback(True)
        return {"messages": [("ai", "Done.")]}

    graph: Any = single(node).compile(checkpointer=InMemorySaver())
    graph = graph.with_config(callbacks=[SessionCallbackHandler(tracker)])
    graph.invoke(asks(), config_of("c1", user_id="alice"))
    spans = captured_spans(capture.spans())
    assert_all_tagged(spans)
    [root] = [span for span in spans if span.name == "conversation.turn"]
    assert [(span.parent_id, span.attributes[a.JOURNEY_CONVERTED]) for span in events(capture)] == [
        (root.span_id, False),
        (root.span_id, True),
    ]
    user = tracker.user_summary("alice")
    assert user is not None
    assert user.journeys["onboarding"].conversion_turn == 1
    assert user.user_satisfaction == 1.0


def test_a_step_of_a_session_that_was_erased_is_none(capture: Capture, tracker: SessionTracker) -> None:
    session = tracker.start_session(user_id="alice")
    journey = session.journey("onboarding", STAGES)
    tracker.forget_user("alice")
    journey.enter("signup")
    assert events(capture) == []
    assert journey.summary() is None


def test_where_no_turn_runs_all_of_it_is_taken_and_nothing_done(capture: Capture, tracker: SessionTracker) -> None:
    turn = current_turn()
    assert not turn
    journey = turn.journey("onboarding", STAGES)
    journey.enter("nowhere")
    journey.convert()
    assert journey.summary() is None
    assert asyncio.run(journey.asummary()) is None
    turn.feedback(5, "anything", comment="x")
    turn.feedback(True)
    assert capture.spans() == []
    assert tracker.ledger.outbox() == []


def test_an_async_app_asks_where_a_journey_stands(capture: Capture, tracker: SessionTracker) -> None:
    async def run() -> str:
        async with tracker.session(user_id="alice") as session, session.conversation("c1").turn("Hello") as turn:
            turn.journey("onboarding", STAGES).enter("connect")
            summary = await turn.journey("onboarding").asummary()
            assert summary is not None
            return summary.stage

    assert asyncio.run(run()) == "connect"
    assert_all_tagged(capture.spans())


def test_what_is_shown_of_a_journey_tells_no_user(tracker: SessionTracker) -> None:
    journey = tracker.start_session(user_id="alice", session_id="s1").journey("onboarding", STAGES)
    assert repr(journey) == "<Journey 'onboarding' of <Session 's1'>>"


# --- declared on a node -----------------------------------------------------------------------------------------------
def plain(_: State) -> Any:
    return {"found": ["it"]}


async def waiting(_: State) -> Any:
    return {"found": ["it"]}


def generating(_: State) -> Iterator[Any]:
    yield {"found": ["it"]}


async def generating_later(_: State) -> AsyncIterator[Any]:
    yield {"found": ["it"]}


@pytest.mark.parametrize("node", [plain, waiting, generating, generating_later, RunnableLambda(plain, waiting)])
def test_a_node_is_declared_as_a_stage(capture: Capture, node: Any) -> None:
    tracker = capture.tracker(journeys={"onboarding": STAGES})
    graph: Any = single(track_node(node, journey="onboarding", stage="connect")).compile()
    config = {**config_of(user_id="ann"), "callbacks": [SessionCallbackHandler(tracker)]}
    asyncio.run(graph.ainvoke(asks(), config))
    [session] = tracker.ledger.sessions()
    assert passed(tracker, session.id) == [("connect", False, False)]
    assert_all_tagged(capture.spans())


def test_a_node_that_fails_enters_nothing(capture: Capture) -> None:
    def failing(_: State) -> Any:
        raise LookupError("no")

    tracker = capture.tracker(journeys={"onboarding": STAGES})
    config = {**config_of(user_id="ann"), "callbacks": [SessionCallbackHandler(tracker)]}
    graph: Any = single(track_node(journey="onboarding", stage="connect")(failing)).compile()
    with pytest.raises(LookupError):
        graph.invoke(asks(), config)
    assert tracker.ledger.stages(tracker.ledger.sessions()[0].id) == []


def test_a_node_whose_stage_is_unknown_works_all_the_same(
    capture: Capture, lenient: None, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = capture.tracker(journeys={"onboarding": STAGES})
    graph: Any = single(track_node(plain, journey="onboarding", stage="nowhere")).compile()
    result = graph.invoke(asks(), {**config_of(), "callbacks": [SessionCallbackHandler(tracker)]})
    assert result["found"] == ["it"]
    [told] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "no stage 'nowhere'" in told
    assert "signup, connect, done" in told


@pytest.mark.parametrize("given", [{"journey": "onboarding"}, {"stage": "connect"}])
def test_a_journey_needs_a_stage_and_a_stage_a_journey(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r'journey="onboarding", stage="connect"'):
        track_node(plain, **given)
