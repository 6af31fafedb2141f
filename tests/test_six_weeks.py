"""A user over six weeks, by a clock that is set: every word of sessions, turns, journeys and drop-offs by a table."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from apps import FakeModel, State, asks, single
from turntrace import SessionCallbackHandler, SessionTracker, Turn, current_turn
from turntrace import attributes as a
from turntrace.lifecycle.sweep import Swept
from turntrace.records import TurnRequest
from turntrace.summaries import JourneySummary
from turntrace.testing import Capture, CapturedSpan, Clock, Ids, assert_all_tagged, outbox_spans

STAGES = ["signup", "connect", "done"]
OTHERS = ("gen_ai.operation.", "langfuse.", "error.")


def at(day: int, clock: str) -> int:
    """Return a time of a day, of which 0 is a Monday, in nanoseconds since 1970."""
    hour, minute, second = map(int, clock.split(":"))
    then = datetime(2026, 1, 5, tzinfo=UTC) + timedelta(days=day, hours=hour, minutes=minute, seconds=second)
    return int(then.timestamp()) * 1_000_000_000


def iso(day: int, clock: str) -> str:
    return f"{datetime(2026, 1, 5, tzinfo=UTC) + timedelta(days=day):%Y-%m-%d}T{clock}.000000+00:00"


def words(span: CapturedSpan) -> dict[str, Any]:
    """Return a span's attributes without those whose names are others'."""
    return {name: value for name, value in span.attributes.items() if not name.startswith(OTHERS)}


# --- the table --------------------------------------------------------------------------------------------------------
class Said(NamedTuple):
    """A turn: when it began, what was said, and what it is to be called by."""

    day: int
    clock: str
    took_s: int
    channel: str
    conversation: str
    asked: str
    answer: str | None
    intent: str | None
    session: str
    number: int
    input_type: str
    output_type: str | None
    tokens: tuple[int, int] = (0, 0)
    cost: float = 0.0


TURNS = {
    # 29 minutes after the first one's end it is still that sitting, 31 minutes after the second's it is the next
    "t1": Said(0, "09:00:00", 2, "web", "billing", "What is it?", "Tea, 5.", "price", "S1", 1, "question", "answer"),
    "t2": Said(0, "09:29:02", 3, "web", "billing", "Please cancel", "Done.", "cancel", "S1", 2, "command", "answer"),
    "t3": Said(0, "10:00:05", 1, "web", "billing", "My order", "Which?", "cancel", "S2", 3, "statement", "question"),
    # the next day: the same conversation in a new session, and two channels at once
    "t4": Said(1, "09:00:00", 4, "web", "billing", "The second", "Cancelled.", None, "S3", 4, "statement", "answer"),
    "t5": Said(1, "09:10:00", 2, "mobile", "travel", "Is it late?", "No.", "train", "S4", 1, "question", "answer"),
    "t6": Said(1, "09:15:00", 2, "web", "billing", "Thanks!", "Welcome.", None, "S3", 5, "feedback", "answer"),
    "t7": Said(1, "09:20:00", 1, "mobile", "travel", "And mine?", None, "train", "S4", 2, "question", None),
    # a journey over three sessions, and one that is opened again
    "t8": Said(8, "12:00:00", 5, "web", "setup", "Help me", "Connected.", "setup", "S5", 1, "command", "answer"),
    "t9": Said(20, "18:00:00", 6, "web", "setup", "I have it", "All is done.", "setup", "S6", 2, "statement", "answer"),
    "t10": Said(30, "08:00:00", 7, "web", "setup", "Anything else?", "No.", None, "S5", 3, "question", "answer"),
    # a run of a graph, with a model
    "t11": Said(
        *(41, "23:59:00", 2, "web", "tea", "What does tea cost?", "It costs 5 euros.", None, "S7", 1),
        *("question", "answer", (100, 20), 0.000027),
    ),
}


class Ended(NamedTuple):
    """A session as its last ``session.end`` is to tell of it."""

    channel: str
    started: tuple[int, str]
    previous: str | None
    number: int
    reason: str
    ended: tuple[int, str]
    duration_ms: int
    active_ms: int
    turns: int
    idle_ms: int
    length: float
    days: int
    last: tuple[int, str | None, str, int]
    dropoff: bool = False
    tokens: int = 0
    cost: float = 0.0
    satisfaction: float | None = None
    journey: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, which nobody changes


MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
IDLE = 30 * MINUTE
CONNECTED = {a.JOURNEY_NAME: "onboarding", a.JOURNEY_STAGE: "connect", a.JOURNEY_CONVERTED: False}
SIGNED_UP = {**CONNECTED, a.JOURNEY_STAGE: "signup"}
CONVERTED = {
    a.JOURNEY_NAME: "onboarding",
    a.JOURNEY_STAGE: "done",
    a.JOURNEY_CONVERTED: True,
    a.JOURNEY_CONVERSION_TURN: 2,
    a.JOURNEY_CONVERSION_TIME_MS: 19 * DAY + 9 * HOUR + 1000,
}
SESSIONS = {
    "S1": Ended(
        *("web", (0, "09:00:00"), None, 1, "inactive_timeout", (0, "09:59:05"), 29 * MINUTE + 5000, 5000, 2, IDLE),
        *(2.0, 0, (2, "cancel", "answered", IDLE)),
    ),
    "S2": Ended(  # the agent asked, and silence followed
        *("web", (0, "10:00:05"), "S1", 2, "inactive_timeout", (0, "10:30:06"), 1000, 1000, 1, IDLE),
        *(1.5, 0, (3, "cancel", "asked_question", IDLE), True),
    ),
    "S3": Ended(
        *("web", (1, "09:00:00"), "S2", 3, "completed", (1, "09:30:02"), 15 * MINUTE + 2000, 6000, 2, 15 * MINUTE),
        *(5 / 3, 1, (5, None, "answered", 15 * MINUTE)),
        satisfaction=0.5,
        journey=SIGNED_UP,
    ),
    "S4": Ended(
        *("mobile", (1, "09:10:00"), "S3", 4, "inactive_timeout", (1, "09:50:01"), 10 * MINUTE + 1000, 3000, 2, IDLE),
        *(1.75, 1, (2, "train", "answered", IDLE)),
    ),
    "S5": Ended(  # handed over, and three weeks later opened again by its id
        *("web", (8, "12:00:00"), "S4", 5, "user_exit", (30, "08:00:07"), 22 * DAY - 4 * HOUR + 7000, 12_000, 2, 0),
        *(9 / 5, 8, (3, None, "answered", 0)),
        journey=SIGNED_UP,
    ),
    "S6": Ended(  # silence too, but all was said and done
        *("web", (20, "18:00:00"), "S5", 6, "inactive_timeout", (20, "18:30:06"), 6000, 6000, 1, IDLE),
        *(10 / 6, 20, (2, "setup", "answered", IDLE)),
        satisfaction=0.75,
        journey=CONVERTED,
    ),
    "S7": Ended(
        *("web", (41, "23:59:00"), "S6", 7, "inactive_timeout", (42, "00:29:02"), 2000, 2000, 1, IDLE),
        *(11 / 7, 41, (1, None, "answered", IDLE), False, 120, 0.000027),
    ),
}
FIRST_END_OF_S5 = SESSIONS["S5"]._replace(
    reason="handoff",
    ended=(8, "12:10:05"),
    duration_ms=5000,
    active_ms=5000,
    turns=1,
    idle_ms=10 * MINUTE,
    length=8 / 5,
    last=(1, "setup", "answered", 10 * MINUTE),
)
# S5 had not been opened again by then, when S6 was told of, nor when feedback came a day late
FIRST_END_OF_S6 = SESSIONS["S6"]._replace(satisfaction=None, length=9 / 6)
SECOND_END_OF_S6 = SESSIONS["S6"]._replace(length=9 / 6)


class Entered(NamedTuple):
    """A step of the journey: where it was, and in which turn, if in one."""

    session: str
    turn: str | None
    at: tuple[int, str]
    stage: str
    number: int
    in_stage_ms: int | None = None
    is_back: bool = False
    converted: bool = False


STEPS = [
    Entered("S3", "t4", (1, "09:00:04"), "signup", 1),
    Entered("S5", "t8", (8, "12:00:05"), "connect", 2, 7 * DAY + 3 * HOUR + 1000),
    Entered("S5", None, (8, "12:05:05"), "signup", 1, 5 * MINUTE, is_back=True),
    Entered("S6", "t9", (20, "18:00:00"), "connect", 2, 12 * DAY + 6 * HOUR - 5 * MINUTE - 5000),
    Entered("S6", "t9", (20, "18:00:05"), "done", 3, 5000),
    Entered("S6", "t9", (20, "18:00:05"), "done", 3, 0, converted=True),
]


# --- the walk ---------------------------------------------------------------------------------------------------------
@dataclass
class Walk:
    """The six weeks, walked by a tracker."""

    tracker: SessionTracker
    clock: Clock
    sessions: dict[str, str] = field(default_factory=dict)
    turns: dict[str, str] = field(default_factory=dict)
    swept: list[Swept] = field(default_factory=list)

    def known_as(self, name: str, turn_id: str, session_id: str) -> None:
        self.turns[name] = turn_id
        assert self.sessions.setdefault(TURNS[name].session, session_id) == session_id

    def begin(self, name: str) -> Turn:
        said = TURNS[name]
        self.clock.set(at(said.day, said.clock))
        request = TurnRequest(
            user_id="alice",
            channel=said.channel,
            conversation_id=said.conversation,
            topic=f"about {said.conversation}",
            tier="premium",
            org_id="o1",
            locale="de-AT",
            client_version="3.1",
        )
        turn = self.tracker.begin_turn(request, said.asked)
        self.known_as(name, turn.id, turn.conversation.session.id)
        return turn

    def end(self, turn: Turn, name: str, *, after_s: int | None = None) -> None:
        said = TURNS[name]
        self.clock.advance(seconds=said.took_s if after_s is None else after_s)
        if said.intent is not None:
            turn.set_intent(said.intent)
        if said.answer is not None:
            turn.set_answer(said.answer)
        turn.end()
        self.tracker.flush()  # in real life there are minutes for it

    def exchange(self, name: str) -> Turn:
        turn = self.begin(name)
        self.end(turn, name)
        return turn

    def sweep(self, day: int, clock: str) -> None:
        self.clock.set(at(day, clock))
        self.swept.append(self.tracker.sweep())

    def walk(self, elsewhere: SessionTracker) -> None:
        """Walk through the weeks; what comes late is told to another tracker of the same ledger."""
        for name in ("t1", "t2", "t3"):
            self.exchange(name)
        self.sweep(0, "23:00:00")

        turn = self.begin("t4")
        self.clock.advance(seconds=4)
        turn.journey("onboarding", STAGES).enter("signup")
        self.end(turn, "t4", after_s=0)
        for name in ("t5", "t6"):
            self.exchange(name)
        self.clock.set(at(1, "09:16:00"))
        turn.feedback(False)
        turn.conversation.session.feedback(True, comment="all is well")
        self.exchange("t7")
        self.clock.set(at(1, "09:30:02"))
        self.tracker.end_session(turn.conversation.session.id, "completed")
        self.sweep(1, "09:50:01")  # not longer than 30 minutes yet
        self.sweep(1, "09:50:02")

        turn = self.begin("t8")
        self.clock.advance(seconds=5)
        turn.journey("onboarding").enter("connect")
        self.end(turn, "t8", after_s=0)
        self.clock.set(at(8, "12:05:05"))
        session = turn.conversation.session
        session.journey("onboarding").enter("signup")
        self.clock.set(at(8, "12:10:05"))
        session.end("handoff")

        turn = self.begin("t9")
        journey = turn.journey("onboarding")
        journey.enter("connect")
        self.clock.advance(seconds=5)
        journey.enter("done")
        journey.enter("done")
        journey.convert()
        journey.convert()
        self.end(turn, "t9", after_s=1)
        self.sweep(20, "19:00:00")
        self.clock.set(at(21, "18:00:00"))
        elsewhere.feedback(0.75, turn_id=turn.id)
        elsewhere.flush()

        said = TURNS["t10"]
        self.clock.set(at(said.day, said.clock))
        session = elsewhere.start_session(session_id=session.id, user_id="alice")
        turn = session.conversation(said.conversation, topic="about setup").start_turn(said.asked)
        self.known_as("t10", turn.id, session.id)
        self.end(turn, "t10")
        session.end()
        elsewhere.flush()

        self.run_graph("t11")
        self.sweep(42, "01:00:00")
        self.swept.append(elsewhere.sweep())

    def run_graph(self, name: str) -> None:
        said = TURNS[name]
        self.clock.set(at(said.day, said.clock))

        def says(_messages: Any) -> str:
            self.clock.advance(seconds=said.took_s)
            return str(said.answer)

        model = FakeModel(says=says)

        def agent(state: State) -> Any:
            turn = current_turn()
            self.known_as(name, turn.id, turn.conversation.session.id)
            return {"messages": [model.invoke(state["messages"])]}

        handler = SessionCallbackHandler(self.tracker)
        graph: Any = single(agent).compile(checkpointer=InMemorySaver()).with_config(callbacks=[handler])
        told = {"user_id": "alice", "channel": "web", "tier": "premium", "org_id": "o1", "locale": "de-AT"}
        told |= {"client_version": "3.1", "topic": "about tea"}
        graph.invoke(asks(said.asked), {"configurable": {"thread_id": said.conversation}, "metadata": told})


@pytest.fixture(params=["a file", "memory"])
def walk(request: pytest.FixtureRequest, capture: Capture, clock: Clock, ids: Ids, tmp_path: Path) -> Walk:
    url = f"sqlite:///{tmp_path / 'ledger.db'}" if request.param == "a file" else "sqlite://"
    tracker = capture.tracker(url, outbox=True, clock=clock, ids=ids)
    walk = Walk(tracker, clock)
    in_memory = url == "sqlite://"
    walk.walk(tracker if in_memory else capture.tracker(url, outbox=True, clock=clock, ids=ids))
    tracker.flush()
    return walk


def test_every_word_of_six_weeks(walk: Walk) -> None:
    seen = outbox_spans(walk.tracker.ledger)
    assert_all_tagged(seen)
    assert list(walk.sessions) == list(SESSIONS)
    hashed = walk.tracker.hash_user("alice")

    def tags(session: str, channel: str) -> dict[str, Any]:
        return {
            a.SESSION_ID: walk.sessions[session],
            a.SESSION_CHANNEL: channel,
            a.USER_ID: hashed,
            a.USER_TIER: "premium",
            a.USER_ORG_ID: "o1",
        }

    def turn_tags(name: str) -> dict[str, Any]:
        said = TURNS[name]
        return {
            **tags(said.session, said.channel),
            a.TURN_ID: walk.turns[name],
            a.TURN_NUMBER: said.number,
            a.CONVERSATION_TURN_NUMBER: said.number,
            a.CONVERSATION_ID: said.conversation,
            a.GEN_AI_CONVERSATION_ID: said.conversation,
            a.CONVERSATION_TOPIC: f"about {said.conversation}",
        }

    # --- session.start
    starts = {span.attributes[a.SESSION_ID]: span for span in seen if span.name == "session.start"}
    assert len(starts) == len([span for span in seen if span.name == "session.start"])
    for name, row in SESSIONS.items():
        expected = tags(name, row.channel) | {
            a.SESSION_START_TIME: iso(*row.started),
            a.SESSION_TYPE: "chat",
            a.SESSION_LOCALE: "de-AT",
            a.SESSION_CLIENT_VERSION: "3.1",
            a.USER_SESSIONS_TOTAL: row.number,
        }
        if row.previous is not None:
            expected[a.SESSION_PREVIOUS_ID] = walk.sessions[row.previous]
        start = starts[walk.sessions[name]]
        assert words(start) == expected, name
        assert start.start_ns == start.end_ns == at(*row.started)

    # --- session.end
    def end_words(name: str, row: Ended) -> dict[str, Any]:
        number, intent, action, since = row.last
        expected: dict[str, Any] = {
            a.SESSION_START_TIME: iso(*row.started),
            a.SESSION_END_TIME: iso(*row.ended),
            a.SESSION_END_REASON: row.reason,
            a.SESSION_DURATION_MS: row.duration_ms,
            a.SESSION_ACTIVE_MS: row.active_ms,
            a.SESSION_WAIT_MS: 0,
            a.SESSION_TOTAL_TURNS: row.turns,
            a.SESSION_TOTAL_TOKENS: row.tokens,
            a.SESSION_TOTAL_COST_USD: pytest.approx(row.cost),
            a.SESSION_AVG_TURN_LATENCY_MS: row.active_ms / row.turns,
            a.SESSION_AVG_TURN_TOKENS: row.tokens / row.turns,
            a.SESSION_USER_SATISFACTION: row.satisfaction,
            a.SESSION_INACTIVE_TIMEOUT: row.reason == "inactive_timeout",
            a.SESSION_IDLE_TIME_MS: row.idle_ms,
            a.USER_SESSIONS_TOTAL: row.number,
            a.USER_AVG_SESSION_LENGTH: pytest.approx(row.length),
            a.USER_RETENTION_DAYS: row.days,
            a.DROPOFF_DETECTED: row.dropoff,
            a.DROPOFF_LAST_TURN: number,
            a.DROPOFF_LAST_INTENT: intent,
            a.DROPOFF_AGENT_LAST_ACTION: action,
            a.DROPOFF_TIME_SINCE_LAST_TURN_MS: since,
        }
        known = {word: value for word, value in expected.items() if value is not None}
        return tags(name, row.channel) | known | row.journey

    ends: dict[str, list[CapturedSpan]] = {}
    for span in seen:
        if span.name == "session.end":
            ends.setdefault(span.attributes[a.SESSION_ID], []).append(span)
    told = {**{name: [row] for name, row in SESSIONS.items()}}
    told["S5"] = [FIRST_END_OF_S5, SESSIONS["S5"]]
    told["S6"] = [FIRST_END_OF_S6, SECOND_END_OF_S6]
    assert len(ends) == len(told)
    for name, expected_ends in told.items():
        spans = ends[walk.sessions[name]]
        assert [words(span) for span in spans] == [end_words(name, row) for row in expected_ends], name
        assert [span.start_ns for span in spans] == [at(*row.ended) for row in expected_ends]
        assert len({(span.trace_id, span.span_id) for span in spans}) == 1  # the later one replaces the earlier

    # --- conversation.turn
    roots = {span.attributes[a.TURN_ID]: span for span in seen if span.name == "conversation.turn"}
    assert len(roots) == len([span for span in seen if span.name == "conversation.turn"]) == len(TURNS)
    for name, said in TURNS.items():
        root = roots[walk.turns[name]]
        is_run = said.tokens != (0, 0)
        turn_words: dict[str, Any] = {
            a.SESSION_TYPE: "chat",
            a.SESSION_LOCALE: "de-AT",
            a.SESSION_CLIENT_VERSION: "3.1",
            a.CONVERSATION_SESSION_ID: walk.sessions[said.session],
            a.CONVERSATION_TOTAL_TURNS: said.number,
            a.TURN_ROLE: "user",
            a.TURN_STATUS: "completed",
            a.TURN_INPUT_LENGTH: len(said.asked),
            a.TURN_OUTPUT_LENGTH: None if said.answer is None else len(said.answer),
            a.TURN_INPUT_TYPE: said.input_type,
            a.TURN_OUTPUT_TYPE: said.output_type,
            a.TURN_HAS_ATTACHMENTS: False,
            a.TURN_INTENT: said.intent,
            a.TURN_AGENT_RUNS: int(is_run),
            a.TURN_LLM_CALLS: int(is_run),
            a.TURN_TOOL_CALLS: 0,
            a.TURN_INPUT_TOKENS: said.tokens[0],
            a.TURN_OUTPUT_TOKENS: said.tokens[1],
            a.TURN_COST_USD: pytest.approx(said.cost),
            a.TURN_LATENCY_MS: said.took_s * 1000,
            a.TURN_WAIT_MS: 0,
        }
        if is_run:
            turn_words |= {
                a.CONVERSATION_MESSAGES_IN_CONTEXT: 1,
                a.CONVERSATION_CONTEXT_TOKENS: 100,
                a.CONVERSATION_CONTEXT_WINDOW_PCT: 100 / 128_000,
                a.CONTEXT_PRUNED: False,
                a.CONTEXT_MESSAGES_PRUNED: 0,
                a.CONTEXT_TOKENS_PRUNED: 0,
            }
        expected = turn_tags(name) | {word: value for word, value in turn_words.items() if value is not None}
        assert words(root) == expected, name
        assert (root.start_ns, root.end_ns - root.start_ns) == (at(said.day, said.clock), said.took_s * 1_000_000_000)

    # --- journey.stage
    events = [span for span in seen if span.name == "journey.stage"]
    for span, step in zip(events, STEPS, strict=True):
        own = tags(step.session, "web") if step.turn is None else turn_tags(step.turn)
        expected = own | {
            a.JOURNEY_NAME: "onboarding",
            a.JOURNEY_STAGE: step.stage,
            a.JOURNEY_STAGE_NUMBER: step.number,
            a.JOURNEY_TOTAL_STAGES: 3,
            a.JOURNEY_CONVERTED: step.converted,
        }
        if step.in_stage_ms is not None:
            expected[a.JOURNEY_TIME_IN_STAGE_MS] = step.in_stage_ms
        if step.converted:
            expected |= {name: CONVERTED[name] for name in (a.JOURNEY_CONVERSION_TURN, a.JOURNEY_CONVERSION_TIME_MS)}
        assert words(span) == expected, step
        assert span.start_ns == span.end_ns == at(*step.at)
        above = None if step.turn is None else roots[walk.turns[step.turn]].span_id
        assert span.parent_id == above


def test_what_the_ledger_says_after_six_weeks(walk: Walk) -> None:
    tracker = walk.tracker
    for name, row in SESSIONS.items():
        summary = tracker.session_summary(walk.sessions[name])
        assert summary is not None
        expected = {
            "id": walk.sessions[name],
            "channel": row.channel,
            "started_ns": at(*row.started),
            "ended_ns": at(*row.ended),
            "end_reason": row.reason,
            "duration_ms": row.duration_ms,
            "active_ms": row.active_ms,
            "total_turns": row.turns,
            "total_tokens": row.tokens,
            "total_cost_usd": pytest.approx(row.cost),
            "avg_turn_latency_ms": row.active_ms / row.turns,
            "avg_turn_tokens": row.tokens / row.turns,
            "user_satisfaction": row.satisfaction,
            "dropoff": row.dropoff,
            "last_turn": row.last[0],
            "last_intent": row.last[1],
            "last_action": row.last[2],
            "previous_id": None if row.previous is None else walk.sessions[row.previous],
            "user_sessions_total": row.number,
            "user_avg_session_length": pytest.approx(row.length),
            "user_retention_days": row.days,
            "journey_name": row.journey.get(a.JOURNEY_NAME),
            "journey_stage": row.journey.get(a.JOURNEY_STAGE),
            "journey_converted": row.journey.get(a.JOURNEY_CONVERTED),
            "journey_conversion_turn": row.journey.get(a.JOURNEY_CONVERSION_TURN),
            "journey_conversion_time_ms": row.journey.get(a.JOURNEY_CONVERSION_TIME_MS),
        }
        assert {word: getattr(summary, word) for word in expected} == expected, name

    user = tracker.user_summary("alice")
    assert user is not None
    assert (user.sessions_total, user.open_sessions, user.total_turns, user.failed_turns) == (7, 0, 11, 0)
    assert user.avg_session_length == pytest.approx(11 / 7)
    assert user.retention_days == 41
    assert user.user_satisfaction == pytest.approx((0 + 1 + 0.75) / 3)
    assert user.dropoffs == 1
    assert user.total_tokens == 120
    assert user.total_cost_usd == pytest.approx(0.000027)
    assert user.active_ms == sum(said.took_s for said in TURNS.values()) * 1000
    assert (user.first_session_ns, user.latest_session_ns) == (at(0, "09:00:00"), at(41, "23:59:00"))
    assert user.last_activity_ns == at(41, "23:59:02")
    assert dict(user.journeys) == {
        "onboarding": JourneySummary(
            name="onboarding",
            stages=tuple(STAGES),
            stage="done",
            started_ns=at(1, "09:00:04"),
            entered_ns=at(20, "18:00:05"),
            converted_ns=at(20, "18:00:05"),
            conversion_turn=2,
        )
    }
    assert tracker.user_summary("bob") is None

    steps = [(name, step) for name, session_id in walk.sessions.items() for step in tracker.ledger.stages(session_id)]
    assert [
        (name, step.stage, step.stage_number, step.at_ns, step.time_in_stage_ms, step.is_back, step.converted)
        for name, step in steps
    ] == [
        (step.session, step.stage, step.number, at(*step.at), step.in_stage_ms, step.is_back, step.converted)
        for step in STEPS
    ]
    assert tracker.ledger.turn_numbers("billing") == [1, 2, 3, 4, 5]
    assert tracker.ledger.turn_numbers("setup") == [1, 2, 3]
    assert walk.swept == [Swept(1), Swept(0), Swept(1), Swept(1), Swept(1), Swept(0)]
