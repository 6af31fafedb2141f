"""Sessions, conversations and turns by the explicit API: what they leave in the ledger and as spans."""

import asyncio
import contextlib
import gc
import json
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan

from turntrace import Conversation, Session, SessionCallbackHandler, SessionTracker, Turn, current_turn
from turntrace import attributes as a
from turntrace.content import ContentPolicy
from turntrace.errors import ConfigurationError, IdentityError, StateError
from turntrace.records import LLMCall, Step, TurnRequest, TurnSummary, Usage, iso_time
from turntrace.testing import (
    Capture,
    CapturedSpan,
    Clock,
    Ids,
    assert_all_tagged,
    captured_spans,
    outbox_spans,
    span_tree,
)

SECOND = 1_000_000_000
FIRST, SECOND_ID, THIRD = (f"{n:032x}" for n in (1, 2, 3))
OTHERS = ("gen_ai.operation.", "langfuse.", "error.")


@pytest.fixture
def tracker(capture: Capture, clock: Clock, ids: Ids) -> SessionTracker:
    return capture.tracker(clock=clock, ids=ids)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def on_disk(capture: Capture, path: Path) -> SessionTracker:
    """A tracker whose ledger is a file, and whose spans go into its outbox beside being caught."""
    return capture.tracker(f"sqlite:///{path}", outbox=True)


def named(spans: Capture | list[CapturedSpan], name: str) -> list[CapturedSpan]:
    seen = captured_spans(spans.spans()) if isinstance(spans, Capture) else spans
    return [span for span in seen if span.name == name]


def ordered(capture: Capture) -> list[CapturedSpan]:
    """Return all spans in the order of their starts; that of their export is nobody's business."""
    return sorted(captured_spans(capture.spans()), key=lambda span: (span.start_ns, span.name == a.SPAN_SESSION_END))


def words(span: CapturedSpan) -> dict[str, Any]:
    """Return a span's attributes without those whose names are others'."""
    return {name: value for name, value in span.attributes.items() if not name.startswith(OTHERS)}


def only_turn(tracker: SessionTracker, session_id: str) -> TurnSummary:
    [(turn, _)] = tracker.ledger.turns(session_id)
    return turn


def rows(path: Path, query: str, *values: object) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query, values).fetchall()


# --- the spans of a session -------------------------------------------------------------------------------------------
def play(tracker: SessionTracker, clock: Clock) -> None:
    with tracker.session(
        user_id="alice", channel="web", tier="premium", org_id="o1", locale="de-AT", client_version="1.2"
    ) as session:
        clock.advance(seconds=1)
        conversation = session.conversation("c1", topic="billing")
        with conversation.turn("What does it cost?") as turn:
            turn.set_intent("price")
            turn.set_answer("It costs 5.")
            clock.advance(seconds=2)
        clock.advance(seconds=10)
        with contextlib.suppress(LookupError), conversation.turn({"role": "user", "content": "Cancel it."}):
            clock.advance(seconds=4)
            raise LookupError("secret")
        clock.advance(seconds=3)


async def aplay(tracker: SessionTracker, clock: Clock) -> None:
    async with tracker.session(
        user_id="alice", channel="web", tier="premium", org_id="o1", locale="de-AT", client_version="1.2"
    ) as session:
        clock.advance(seconds=1)
        conversation = session.conversation("c1", topic="billing")
        async with conversation.turn("What does it cost?") as turn:
            turn.set_intent("price")
            turn.set_answer("It costs 5.")
            clock.advance(seconds=2)
        clock.advance(seconds=10)
        with contextlib.suppress(LookupError):
            async with conversation.turn({"role": "user", "content": "Cancel it."}):
                clock.advance(seconds=4)
                raise LookupError("secret")
        clock.advance(seconds=3)


def play_without_blocks(tracker: SessionTracker, clock: Clock) -> None:
    session = tracker.start_session(
        user_id="alice", channel="web", tier="premium", org_id="o1", locale="de-AT", client_version="1.2"
    )
    clock.advance(seconds=1)
    conversation = session.conversation("c1", topic="billing")
    turn = conversation.start_turn("What does it cost?")
    turn.set_intent("price")
    turn.set_answer("It costs 5.")
    clock.advance(seconds=2)
    turn.end()
    clock.advance(seconds=10)
    turn = conversation.start_turn({"role": "user", "content": "Cancel it."})
    clock.advance(seconds=4)
    turn.end(error=LookupError("secret"))
    clock.advance(seconds=3)
    session.end()


async def aplay_without_blocks(tracker: SessionTracker, clock: Clock) -> None:
    session = await tracker.astart_session(
        user_id="alice", channel="web", tier="premium", org_id="o1", locale="de-AT", client_version="1.2"
    )
    clock.advance(seconds=1)
    conversation = session.conversation("c1", topic="billing")
    turn = await conversation.astart_turn("What does it cost?")
    turn.set_intent("price")
    turn.set_answer("It costs 5.")
    clock.advance(seconds=2)
    await turn.aend()
    clock.advance(seconds=10)
    turn = await conversation.astart_turn({"role": "user", "content": "Cancel it."})
    clock.advance(seconds=4)
    await turn.aend(error=LookupError("secret"))
    clock.advance(seconds=3)
    await session.aend()


WAYS: dict[str, Callable[[SessionTracker, Clock], None]] = {
    "with": play,
    "async with": lambda tracker, clock: asyncio.run(aplay(tracker, clock)),
    "without blocks": play_without_blocks,
    "async without blocks": lambda tracker, clock: asyncio.run(aplay_without_blocks(tracker, clock)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_spans_of_a_session_whole(way: str, capture: Capture, tracker: SessionTracker, clock: Clock) -> None:
    start = clock.now_ns
    WAYS[way](tracker, clock)
    spans = ordered(capture)
    assert [span.name for span in spans] == ["session.start", "conversation.turn", "conversation.turn", "session.end"]
    begin, first, second, end = spans
    user = tracker.hash_user("alice")
    every = {
        "session.id": FIRST,
        "user.id": user,
        "session.channel": "web",
        "user.tier": "premium",
        "user.org_id": "o1",
    }
    client = {"session.type": "chat", "session.locale": "de-AT", "session.client_version": "1.2"}
    assert words(begin) == {
        **every,
        **client,
        "session.start_time": iso_time(start),
        "user.sessions_total": 1,
    }
    assert words(first) == {
        **every,
        **client,
        "conversation.id": "c1",
        "gen_ai.conversation.id": "c1",
        "conversation.session_id": FIRST,
        "conversation.topic": "billing",
        "conversation.turn_number": 1,
        "conversation.total_turns": 1,
        "turn.number": 1,
        "turn.id": SECOND_ID,
        "turn.role": "user",
        "turn.status": "completed",
        "turn.intent": "price",
        "turn.input_length": 18,
        "turn.input_type": "question",
        "turn.has_attachments": False,
        "turn.output_length": 11,
        "turn.output_type": "answer",
        "turn.agent_runs": 0,
        "turn.tool_calls": 0,
        "turn.llm_calls": 0,
        "turn.input_tokens": 0,
        "turn.output_tokens": 0,
        "turn.cost_usd": 0.0,
        "turn.latency_ms": 2000,
        "turn.wait_ms": 0,
    }
    assert words(second) == {
        **every,
        **client,
        "conversation.id": "c1",
        "gen_ai.conversation.id": "c1",
        "conversation.session_id": FIRST,
        "conversation.topic": "billing",
        "conversation.turn_number": 2,
        "conversation.total_turns": 2,
        "turn.number": 2,
        "turn.id": THIRD,
        "turn.role": "user",
        "turn.status": "failed",
        "turn.input_length": 10,
        "turn.input_type": "command",
        "turn.has_attachments": False,
        "turn.output_type": "error",
        "turn.agent_runs": 0,
        "turn.tool_calls": 0,
        "turn.llm_calls": 0,
        "turn.input_tokens": 0,
        "turn.output_tokens": 0,
        "turn.cost_usd": 0.0,
        "turn.latency_ms": 4000,
        "turn.wait_ms": 0,
    }
    assert words(end) == {
        **every,
        "session.start_time": iso_time(start),
        "session.end_time": iso_time(start + 20 * SECOND),
        "session.end_reason": "user_exit",
        "session.duration_ms": 17_000,
        "session.active_ms": 6_000,
        "session.wait_ms": 0,
        "session.total_turns": 2,
        "session.total_tokens": 0,
        "session.total_cost_usd": 0.0,
        "session.avg_turn_latency_ms": 3000.0,
        "session.avg_turn_tokens": 0.0,
        "session.inactive_timeout": False,
        "session.idle_time_ms": 3_000,
        "user.sessions_total": 1,
        "user.avg_session_length": 2.0,
        "user.retention_days": 0,
        "dropoff.detected": False,
        "dropoff.last_turn": 2,
        "dropoff.agent_last_action": "failed",
        "dropoff.time_since_last_turn_ms": 3_000,
    }
    assert [(span.start_ns - start, span.end_ns - start) for span in spans] == [
        (0, 0),
        (1 * SECOND, 3 * SECOND),
        (13 * SECOND, 17 * SECOND),
        (20 * SECOND, 20 * SECOND),
    ]
    for span in spans:
        for name, value in span.attributes.items():
            assert type(value) is a.ATTRIBUTES[name].type, name


def test_all_ways_to_write_it_give_the_same_spans() -> None:
    seen: list[list[CapturedSpan]] = []
    for way in WAYS.values():
        with Capture() as capture:
            clock = Clock()
            way(capture.tracker(clock=clock, ids=Ids()), clock)
            seen.append([replace(span, span_id="") for span in ordered(capture)])
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_every_span_is_the_root_of_a_trace_of_its_own(capture: Capture, tracker: SessionTracker, clock: Clock) -> None:
    play(tracker, clock)
    spans = ordered(capture)
    assert [span.parent_id for span in spans] == [None] * 4
    assert len({span.trace_id for span in spans}) == 4
    assert [span.trace_id for span in spans[1:3]] == [SECOND_ID, THIRD]  # a turn's id is its trace's
    assert {span.scope for span in spans} == {"turntrace"}
    assert_all_tagged(spans)


def test_what_langfuse_shows_of_a_span_holds_no_content(
    capture: Capture, tracker: SessionTracker, clock: Clock
) -> None:
    play(tracker, clock)
    begin, first, second, end = ordered(capture)
    assert [span.attributes["langfuse.observation.type"] for span in (begin, first, second, end)] == [
        "event",
        "agent",
        "agent",
        "event",
    ]
    assert [span.attributes["langfuse.trace.name"] for span in (begin, first, second, end)] == [
        "session.start",
        "chat_turn",
        "chat_turn",
        "session.end",
    ]
    for span in (begin, first, second, end):
        for name in ("langfuse.observation.input", "langfuse.observation.output"):
            assert isinstance(json.loads(span.attributes[name]), dict)
    assert second.attributes["error.type"] == "LookupError"
    assert second.attributes["langfuse.observation.level"] == "ERROR"
    assert "error.type" not in first.attributes
    everything = repr([begin, first, second, end])
    for text in ("alice", "secret", "cost?", "It costs", "Cancel it"):
        assert text not in everything


def test_the_ledger_and_the_spans_agree(capture: Capture, tracker: SessionTracker, clock: Clock) -> None:
    play(tracker, clock)
    end = named(capture, "session.end")[0]
    summary = tracker.session_summary(FIRST)
    assert summary is not None
    assert {name: end.attributes[name] for name in summary.attributes()} == summary.attributes()
    turns = tracker.ledger.turns(FIRST)
    for (turn, _), span in zip(turns, named(capture, "conversation.turn"), strict=True):
        assert {name: span.attributes[name] for name in turn.attributes()} == turn.attributes()
        assert (turn.trace_id, turn.root_span_id) == (span.trace_id, span.span_id)
        assert (turn.started_ns, turn.ended_ns) == (span.start_ns, span.end_ns)
    assert [turn.error for turn, _ in turns] == [None, "LookupError"]


def test_tokens_and_cost_of_calls_add_up(capture: Capture, tracker: SessionTracker, clock: Clock) -> None:
    call = LLMCall("gpt-4o", "openai", Usage(1_000_000, 0))
    unknown = LLMCall("no-such-model", None, Usage(10, 5))
    with tracker.session() as session:
        for _ in range(2):
            with session.conversation("c1").turn("Hello") as turn:
                for each in (call, unknown):
                    turn.close_step(turn.open_step("model", "generation"), call=each)
                turn.close_step(turn.open_step("search", "tool"))
    first, second = (turn for turn, _ in tracker.ledger.turns(session.id))
    for turn_summary in (first, second):
        assert (turn_summary.llm_calls, turn_summary.tool_calls, turn_summary.unpriced_calls) == (2, 1, 1)
        assert (turn_summary.input_tokens, turn_summary.output_tokens) == (1_000_010, 5)
        assert turn_summary.cost_usd > 0
    end = named(capture, "session.end")[0].attributes
    assert end["session.total_tokens"] == 2_000_030
    assert end["session.avg_turn_tokens"] == 1_000_015.0
    assert end["session.total_cost_usd"] == first.cost_usd + second.cost_usd
    generations = [span.attributes for span in captured_spans(capture.spans()) if span.name == "model"]
    assert sum(each["gen_ai.usage.input_tokens"] for each in generations) == 2_000_020
    assert not any("gen_ai.usage.input_tokens" in span.attributes for span in named(capture, "conversation.turn"))


# --- sessions ---------------------------------------------------------------------------------------------------------
def test_a_session_that_little_is_known_of(capture: Capture, tracker: SessionTracker, clock: Clock) -> None:
    start = clock.now_ns
    with tracker.session():
        pass
    begin, end = ordered(capture)
    assert words(begin) == {
        "session.id": FIRST,
        "session.channel": "unknown",
        "session.type": "chat",
        "session.start_time": iso_time(start),
    }
    assert words(end) == {
        "session.id": FIRST,
        "session.channel": "unknown",
        "session.start_time": iso_time(start),
        "session.end_time": iso_time(start),
        "session.end_reason": "user_exit",
        "session.duration_ms": 0,
        "session.active_ms": 0,
        "session.wait_ms": 0,
        "session.total_turns": 0,
        "session.total_tokens": 0,
        "session.total_cost_usd": 0.0,
        "session.inactive_timeout": False,
        "session.idle_time_ms": 0,
        "dropoff.detected": False,
    }


def test_leaving_the_block_ends_the_session(tracker: SessionTracker) -> None:
    with tracker.session() as session:
        assert session.summary().ended_ns is None
    assert session.summary().end_reason == "user_exit"


def test_an_exception_that_leaves_the_block_ends_the_session_with_error(tracker: SessionTracker) -> None:
    with pytest.raises(LookupError), tracker.session() as session:
        raise LookupError("secret")
    assert session.summary().end_reason == "error"


def test_an_exception_that_leaves_the_async_block_ends_the_session_with_error(tracker: SessionTracker) -> None:
    async def run() -> Session:
        with contextlib.suppress(LookupError):
            async with tracker.session() as session:
                raise LookupError("secret")
        return session

    assert asyncio.run(run()).summary().end_reason == "error"


@pytest.mark.parametrize("reason", ["completed", "handoff", "shutdown", "error", "mein Grund", "x" * 200])
def test_a_session_ends_for_the_reason_that_is_given(reason: str, capture: Capture, tracker: SessionTracker) -> None:
    tracker.start_session().end(reason)
    assert named(capture, "session.end")[0].attributes["session.end_reason"] == reason


def test_a_session_that_silence_ended_says_so(capture: Capture, tracker: SessionTracker) -> None:
    tracker.start_session().end("inactive_timeout")
    assert named(capture, "session.end")[0].attributes["session.inactive_timeout"] is True


@pytest.mark.parametrize("reason", ["", "x" * 201, None, 1.5])
def test_a_reason_that_cannot_be_used_is_refused(reason: Any, capture: Capture, tracker: SessionTracker) -> None:
    session = tracker.start_session()
    with pytest.raises(IdentityError, match="reason"):
        session.end(reason)
    with pytest.raises(IdentityError, match="reason"):
        tracker.end_session(session.id, reason)
    assert named(capture, "session.end") == []


def test_a_session_ends_once(capture: Capture, tracker: SessionTracker, clock: Clock) -> None:
    with tracker.session() as session:
        session.end("completed")
        clock.advance(seconds=5)
        session.end("error")
    tracker.end_session(session.id, "handoff")
    assert session.summary().end_reason == "completed"
    assert len(named(capture, "session.end")) == 1


def test_ending_a_session_that_is_not_there_does_nothing(capture: Capture, tracker: SessionTracker) -> None:
    tracker.end_session("unknown")
    assert capture.spans() == []


def test_a_session_knows_the_one_before_it(capture: Capture, tracker: SessionTracker, clock: Clock) -> None:
    with tracker.session(user_id="alice") as one:
        one.conversation("c1").start_turn("Hello").end()
    clock.advance(minutes=60 * 50)
    with tracker.session(user_id="alice") as two:
        pass
    with tracker.session(user_id="bob"):
        pass
    starts = [span.attributes for span in named(capture, "session.start")]
    assert [start.get("session.previous_id") for start in starts] == [None, one.id, None]
    assert [start["user.sessions_total"] for start in starts] == [1, 2, 1]
    end = named(capture, "session.end")[1].attributes
    assert (end["user.sessions_total"], end["user.avg_session_length"], end["user.retention_days"]) == (2, 0.5, 2)
    assert two.facts.previous_id == one.id


def test_a_session_of_a_given_id_goes_on(capture: Capture, tracker: SessionTracker, clock: Clock) -> None:
    first = tracker.start_session(session_id="mine", user_id="alice", tier="premium")
    clock.advance(minutes=600)
    again = tracker.start_session(session_id="mine", user_id="alice")
    assert again.facts == first.facts
    again.end()
    assert len(named(capture, "session.start")) == 1


@pytest.mark.parametrize("ended_is_written", [True, False])
def test_a_turn_in_a_session_that_has_ended_opens_it_again(
    ended_is_written: bool, capture: Capture, tracker: SessionTracker, clock: Clock
) -> None:
    session = tracker.start_session(user_id="alice")
    conversation = session.conversation("c1")
    conversation.start_turn("Hello").end()
    session.end()
    if ended_is_written:
        tracker.flush()
    clock.advance(seconds=60)
    conversation.start_turn("One more thing").end()
    clock.advance(seconds=1)
    tracker.flush()
    assert session.summary().ended_ns is None, "the session ended silently with a turn after its end"
    session.end("completed")
    ends = named(capture, "session.end")
    assert ends[-1].attributes["session.total_turns"] == 2
    assert ends[-1].attributes["session.end_reason"] == "completed"
    assert ends[-1].attributes["session.duration_ms"] == 60_000
    assert len({(end.trace_id, end.span_id) for end in ends}) == 1  # the later overwrites the earlier
    assert len(named(capture, "session.start")) == 1
    assert tracker.ledger.turn_numbers("c1") == [1, 2]


def test_a_turn_that_runs_when_its_session_ends_is_in_its_totals_after_all(
    capture: Capture, tracker: SessionTracker, clock: Clock
) -> None:
    session = tracker.start_session(user_id="alice")
    turn = session.conversation("c1").start_turn("Hello")
    session.end()
    tracker.flush()
    clock.advance(seconds=5)
    turn.end()
    tracker.flush()
    assert session.summary().total_turns == 1
    last = named(capture, "session.end")[-1].attributes
    assert last["session.total_turns"] == 1
    assert last["session.active_ms"] == 5_000


def test_silence_ends_the_session_of_a_turn_that_stands_alone(
    capture: Capture, tracker: SessionTracker, clock: Clock
) -> None:
    request = TurnRequest(user_id="alice", conversation_id="c1", channel="web")
    tracker.begin_turn(request, "Hello").end()
    clock.advance(minutes=30)
    tracker.begin_turn(request, "Hello").end()
    tracker.flush()
    clock.advance(minutes=30, ns=1)
    third = tracker.begin_turn(request, "Hello")
    third.end()
    end = named(capture, "session.end")[0].attributes
    assert end["session.end_reason"] == "inactive_timeout"
    assert end["session.inactive_timeout"] is True
    assert end["session.total_turns"] == 2
    assert end["session.duration_ms"] == 30 * 60_000
    assert end["session.idle_time_ms"] == 30 * 60_000
    # What the user had done when that session ended; the next one has not been yet.
    assert (end["user.sessions_total"], end["user.avg_session_length"], end["user.retention_days"]) == (1, 2.0, 0)
    start = named(capture, "session.start")[1].attributes
    assert start["session.previous_id"] == end["session.id"]
    assert third.number == 3
    assert third.conversation.session.id == start["session.id"]


def test_a_session_that_is_erased_has_no_summary(on_disk: SessionTracker, path: Path) -> None:
    session = on_disk.start_session()
    on_disk.flush()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM turntrace_sessions")
    with pytest.raises(StateError, match="erased"):
        session.summary()
    assert on_disk.session_summary(session.id) is None


# --- conversations and turns ------------------------------------------------------------------------------------------
def test_turns_of_two_conversations_are_numbered_each_from_one(tracker: SessionTracker) -> None:
    with tracker.session() as session:
        one, two = session.conversation("one"), session.conversation("two")
        numbers = []
        for conversation in (one, two, one, one, two):
            with conversation.turn("Hello") as turn:
                numbers.append((conversation.id, turn.number))
    assert numbers == [("one", 1), ("two", 1), ("one", 2), ("one", 3), ("two", 2)]


def test_a_conversation_may_go_on_in_a_later_session(capture: Capture, tracker: SessionTracker) -> None:
    for _ in range(2):
        with tracker.session(user_id="alice") as session, session.conversation("c1").turn("Hello"):
            pass
    first, second = (span.attributes for span in named(capture, "conversation.turn"))
    assert (first["turn.number"], second["turn.number"]) == (1, 2)
    assert first["conversation.session_id"] != second["conversation.session_id"] == session.id
    assert tracker.ledger.turn_numbers("c1") == [1, 2]


def test_a_conversation_gets_an_id_of_the_tracker_when_it_has_none(tracker: SessionTracker) -> None:
    with tracker.session() as session:
        assert session.conversation().id == SECOND_ID


def test_the_agent_may_begin_an_exchange(capture: Capture, tracker: SessionTracker) -> None:
    with tracker.session() as session, session.conversation("c1").turn(role="assistant") as turn:
        assert turn.input == {}
        turn.set_answer("How are you?")
    span = named(capture, "conversation.turn")[0].attributes
    assert span["turn.role"] == "assistant"
    assert span["turn.output_type"] == "question"
    assert not {"turn.input_length", "turn.input_type", "turn.has_attachments"} & set(span)


def test_attachments_are_seen(capture: Capture, tracker: SessionTracker) -> None:
    content: Any = [{"type": "text", "text": "What is this?"}, {"type": "image", "base64": "aGVsbG8="}]
    with tracker.session() as session, session.conversation("c1").turn(HumanMessage(content)):
        pass
    span = named(capture, "conversation.turn")[0].attributes
    assert (span["turn.has_attachments"], span["turn.input_length"]) == (True, 13)
    assert "aGVsbG8" not in repr(span)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (None, {}),
        ("Hello", {"messages": [("user", "Hello")]}),
        (("user", "Hello"), {"messages": [("user", "Hello")]}),
        ({"role": "user", "content": "Hello"}, {"messages": [{"role": "user", "content": "Hello"}]}),
    ],
)
def test_the_input_for_the_graph_is_the_users_message(message: Any, expected: Any, tracker: SessionTracker) -> None:
    with tracker.session() as session, session.conversation("c1").turn(message) as turn:
        assert turn.input == expected
        assert turn.config["configurable"] == {"thread_id": "c1"}


def test_blocks_use_the_handler_that_the_app_made(tracker: SessionTracker) -> None:
    handler = SessionCallbackHandler(tracker, messages_key="chat")
    SessionCallbackHandler(tracker)  # another one, for something else
    with tracker.session() as session, session.conversation("c1").turn("Hello") as turn:
        assert turn.config["callbacks"] == [handler]
        assert turn.input == {"chat": [("user", "Hello")]}


@pytest.mark.parametrize("status", ["completed", "failed", "abandoned"])
def test_a_turn_ends_with_the_status_that_is_given(status: str, capture: Capture, tracker: SessionTracker) -> None:
    turn = tracker.start_session().conversation("c1").start_turn("Hello")
    turn.end(status)
    assert turn.is_finished
    assert named(capture, "conversation.turn")[0].attributes["turn.status"] == status


@pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit(), KeyboardInterrupt()])
def test_a_turn_that_nobody_waits_for_any_more_is_abandoned(
    error: BaseException, capture: Capture, tracker: SessionTracker
) -> None:
    conversation = tracker.start_session().conversation("c1")
    with contextlib.suppress(type(error)), conversation.turn("Hello"):
        raise error
    span = named(capture, "conversation.turn")[0].attributes
    assert span["turn.status"] == "abandoned"
    assert span["langfuse.observation.level"] == "WARNING"


def test_a_turn_ends_once(capture: Capture, tracker: SessionTracker, clock: Clock) -> None:
    with tracker.session() as session:
        with session.conversation("c1").turn("Hello") as turn:
            turn.end("abandoned")
            clock.advance(seconds=9)
        turn.end("failed", error=LookupError("secret"))
    summary = only_turn(tracker, session.id)
    assert (summary.status, summary.latency_ms, summary.error) == ("abandoned", 0, None)
    assert len(named(capture, "conversation.turn")) == 1
    assert session.summary().total_turns == 1
    assert session.summary().failed_turns == 0


def test_a_turn_whose_clock_went_back_has_no_negative_time(
    capture: Capture, tracker: SessionTracker, clock: Clock
) -> None:
    with tracker.session() as session, session.conversation("c1").turn("Hello") as turn:
        step = turn.open_step("agent", "chain")
        clock.set(clock.now_ns - 60 * SECOND)
        turn.close_step(step)
    for span in captured_spans(capture.spans()):
        assert span.start_ns <= span.end_ns
    assert only_turn(tracker, session.id).latency_ms == 0


def test_the_last_word_on_the_intent_counts(tracker: SessionTracker) -> None:
    with tracker.session() as session, session.conversation("c1").turn("Hello") as turn:
        turn.set_intent("first")
        turn.set_intent("x" * 500)
    assert only_turn(tracker, session.id).intent == "x" * 200


def test_the_apps_own_classifier_is_asked(capture: Capture) -> None:
    tracker = capture.tracker(classify=lambda text: "complaint" if "broken" in text else "statement")
    with tracker.session() as session, session.conversation("c1").turn("It is broken"):
        pass
    assert only_turn(tracker, session.id).input_type == "complaint"


def test_steps_of_a_turn_are_kept_in_the_ledger(tracker: SessionTracker, clock: Clock, capture: Capture) -> None:
    with tracker.session() as session, session.conversation("c1").turn("Hello") as turn:
        clock.advance(seconds=1)
        agent = turn.open_step("agent", "chain", attributes={a.TURN_STEP: 1})
        clock.advance(seconds=1)
        tool = turn.open_step("search", "tool", parent=agent)
        clock.advance(seconds=2)
        turn.close_step(tool, error=LookupError("secret"))
        turn.close_step(tool)
        turn.close_step(agent)
        left = turn.open_step("slow", "chain")
    assert left.abandoned
    spans = {span.name: span for span in captured_spans(capture.spans())}
    root = spans["conversation.turn"].span_id
    [(_, steps)] = tracker.ledger.turns(session.id)
    assert steps == [
        Step(spans["search"].span_id, spans["agent"].span_id, "search", "tool", 2000, 2000, error="LookupError"),
        Step(spans["agent"].span_id, root, "agent", "chain", 1000, 3000),
        Step(spans["slow"].span_id, root, "slow", "chain", 4000, 0, error="abandoned"),
    ]
    turns = [span for span in spans.values() if a.TURN_ID in span.attributes]
    assert span_tree(turns) == [("conversation.turn", (("agent", (("search", ()),)), ("slow", ())))]
    assert_all_tagged(turns)


# --- what the caller gets wrong ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("facts", "error", "match"),
    [
        ({"session_id": "ü"}, IdentityError, "session_id"),
        ({"session_id": ""}, IdentityError, "session_id"),
        ({"user_id": ""}, IdentityError, "user_id"),
        ({"user_id": b"alice"}, IdentityError, "user_id"),
        ({"channel": ""}, IdentityError, "channel"),
        ({"channel": "secret\ud800"}, IdentityError, "channel"),
        ({"tier": "x" * 201}, IdentityError, "tier"),
        ({"org_id": 1.5}, IdentityError, "org_id"),
        ({"locale": ""}, IdentityError, "locale"),
        ({"client_version": ""}, IdentityError, "client_version"),
        ({"session_type": "phone"}, ConfigurationError, "Allowed are chat, api, batch"),
    ],
    ids=repr,
)
def test_a_session_that_cannot_be_is_refused(
    facts: dict[str, Any], error: type[Exception], match: str, capture: Capture, tracker: SessionTracker
) -> None:
    with pytest.raises(error, match=match):
        tracker.start_session(**facts)
    with pytest.raises(error, match=match), tracker.session(**facts):
        pass
    assert tracker.ledger.sessions() == []
    assert capture.spans() == []


def test_a_conversation_or_turn_that_cannot_be_is_refused(tracker: SessionTracker) -> None:
    session = tracker.start_session()
    for given in ("", "ü", "x" * 201, 1.5):
        with pytest.raises(IdentityError, match="conversation_id"):
            session.conversation(given)  # type: ignore[arg-type]
    for topic in ("", "x" * 201, "\ud800"):
        with pytest.raises(IdentityError, match="topic"):
            session.conversation("c1", topic=topic)
    with pytest.raises(StateError, match="Allowed are user and assistant"):
        session.conversation("c1").start_turn("Hello", role="system")
    with pytest.raises(StateError, match="Allowed are completed"):
        session.conversation("c1").start_turn("Hello").end("done")
    assert tracker.ledger.turn_numbers("c1") == []


def test_a_block_that_has_not_begun_says_how_to_begin_it(tracker: SessionTracker) -> None:
    with pytest.raises(AttributeError, match=r"with tracker.session\(...\) as session"):
        tracker.session().conversation  # noqa: B018
    with pytest.raises(AttributeError, match=r"turn = conversation.start_turn\(...\)"):
        tracker.start_session().conversation("c1").turn("Hello").id  # noqa: B018


def test_a_turn_is_entered_once(tracker: SessionTracker) -> None:
    with tracker.session() as session, session.conversation("c1").turn("Hello") as turn:
        with pytest.raises(StateError, match="entered already"), turn:
            pass
        assert current_turn() is turn
    assert only_turn(tracker, session.id).status == "completed"


# --- what must not lose a turn ----------------------------------------------------------------------------------------
def raising(text: str) -> str:
    raise LookupError(text)


ODD_CLASSIFIERS: dict[str, Callable[[str], Any]] = {
    "raises": raising,
    "says nothing": lambda text: None,
    "says no text": lambda text: object(),
    "says too much": lambda text: "x" * 1000,
    "says what is no UTF-8": lambda text: "\ud800",
}


@pytest.mark.parametrize("odd", ODD_CLASSIFIERS)
def test_a_classifier_that_fails_does_not_lose_the_turn(odd: str, lenient: None, capture: Capture) -> None:
    tracker = capture.tracker(classify=ODD_CLASSIFIERS[odd], outbox=True)
    with tracker.session() as session, session.conversation("c1").turn("Hello") as turn:
        turn.set_answer("Hi")
    assert tracker.flush(3), "nothing is written any more"
    summary = only_turn(tracker, session.id)
    assert (summary.status, summary.input_length, summary.output_length) == ("completed", 5, 2)
    assert summary.input_type is None or len(summary.input_type) <= 200
    assert len(named(outbox_spans(tracker.ledger), "conversation.turn")) == 1
    assert session.summary().total_turns == 1


BROKEN = "Broken \ud83d emoji"  # half a surrogate pair, as a stream that is cut gives it


@pytest.mark.parametrize("level", ["metadata", "turn", "full"])
def test_a_text_that_is_no_utf8_does_not_lose_the_turn(level: Any, lenient: None, capture: Capture) -> None:
    tracker = capture.tracker(content=level, outbox=True)
    with tracker.session() as session, session.conversation("c1").turn(BROKEN) as turn:
        turn.set_intent(BROKEN)
        turn.close_step(turn.open_step("agent", "chain"), error=LookupError(BROKEN))
        turn.set_answer(BROKEN)
    assert tracker.flush(3)
    summary = only_turn(tracker, session.id)
    assert (summary.status, summary.input_length) == ("completed", len(BROKEN))
    assert len(named(outbox_spans(tracker.ledger), "conversation.turn")) == 1


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise LookupError


@pytest.mark.parametrize("level", ["metadata", "full"])
def test_an_error_that_cannot_be_printed_does_not_break_the_app(level: Any, capture: Capture) -> None:
    tracker = capture.tracker(content=level)
    with tracker.session() as session, session.conversation("c1").turn("Hello") as turn:
        turn.close_step(turn.open_step("agent", "chain"), error=UnprintableError())
    assert only_turn(tracker, session.id).status == "completed"
    assert named(capture, "agent")[0].attributes["error.type"] == "UnprintableError"


def test_a_redactor_that_fails_does_not_lose_the_turn(capture: Capture) -> None:
    tracker = capture.tracker(content=ContentPolicy("turn", redact=raising))
    with tracker.session() as session, session.conversation("c1").turn("secret") as turn:
        turn.set_answer("secret")
    assert only_turn(tracker, session.id).status == "completed"
    span = named(capture, "conversation.turn")[0]
    assert "withheld" in span.attributes["langfuse.observation.input"]
    assert "secret" not in repr(span)


def test_a_turn_that_was_not_begun_when_its_task_was_cancelled_is_not_left_open(tmp_path: Path) -> None:
    # The thread that asks the ledger cannot be stopped: it begins the turn after all, and then nobody has it.
    path = tmp_path / "ledger.db"
    with Capture() as capture:
        tracker = capture.tracker(f"sqlite:///{path}")
        conversation = tracker.start_session().conversation("c1")
        tracker.flush()

        async def ask() -> None:
            async with conversation.turn("Hello"):
                pytest.fail("the turn began")

        async def run() -> None:
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                asking = asyncio.create_task(ask())
                await asyncio.sleep(0.05)
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asking
                other.execute("ROLLBACK")

        asyncio.run(run())
        tracker.flush()
        assert "open" not in [turn.status for turn, _ in tracker.ledger.turns(conversation.session.id)]


# --- D8: what the ledger calls finished has its spans -----------------------------------------------------------------
def counted(path: Path, turn_id: str) -> int:
    [(spans,)] = rows(path, "SELECT spans FROM turntrace_turns WHERE id = ?", turn_id)
    return int(spans)


def found(tracker: SessionTracker, turn_id: str) -> int:
    return len([span for span in outbox_spans(tracker.ledger) if span.attributes.get(a.TURN_ID) == turn_id])


def test_the_row_of_a_turn_counts_its_spans(capture: Capture, on_disk: SessionTracker, path: Path) -> None:
    other = capture.provider.get_tracer("app")
    with on_disk.session() as session, session.conversation("c1").turn("Hello") as turn:
        for _ in range(450):  # more than a turn holds in memory
            turn.close_step(turn.open_step("agent", "chain"))
        with other.start_as_current_span("work"):
            pass
    on_disk.flush()
    assert counted(path, turn.id) == found(on_disk, turn.id) == 452


def test_spans_that_end_after_their_turn_are_counted_once(
    capture: Capture, on_disk: SessionTracker, path: Path
) -> None:
    other = capture.provider.get_tracer("app")
    with on_disk.session() as session:
        with session.conversation("c1").turn("Hello") as turn:
            soon, late = other.start_span("soon"), other.start_span("late")
        soon.end()  # at once: it is written together with the end of the turn
        on_disk.flush()
        late.end()
        on_disk.flush()
    assert counted(path, turn.id) == found(on_disk, turn.id) == 3


def test_spans_that_end_while_the_end_of_their_turn_is_written_are_counted_once(capture: Capture, path: Path) -> None:
    gates = {text: (threading.Event(), threading.Event()) for text in ("first", "second")}

    def classify(text: str) -> str:  # called by the thread that writes, which is held here
        reached, go_on = gates[text]
        reached.set()
        assert go_on.wait(20)
        return "statement"

    tracker, other = (
        capture.tracker(f"sqlite:///{path}", outbox=True, classify=classify),
        capture.provider.get_tracer("app"),
    )
    session = tracker.start_session()
    session.conversation("c1").start_turn("first").end()
    assert gates["first"][0].wait(20)
    with session.conversation("c2").turn("second") as turn:
        soon, late = other.start_span("soon"), other.start_span("late")
    soon.end()  # both wait for the first turn, and are one batch
    gates["first"][1].set()
    assert gates["second"][0].wait(20)
    late.end()
    gates["second"][1].set()
    tracker.flush()
    assert counted(path, turn.id) == found(tracker, turn.id) == 3


def test_steps_that_end_after_their_turn_are_in_the_totals(
    capture: Capture, on_disk: SessionTracker, path: Path
) -> None:
    with on_disk.session() as session:
        turn = session.conversation("c1").start_turn("Hello")
        turn.end()
        on_disk.flush()
        late = turn.open_step("model", "generation")  # a task that the app left running
        turn.close_step(late, call=LLMCall("no-such-model", None, Usage(10, 5)))
    spans = [span.attributes for span in outbox_spans(on_disk.ledger)]
    assert sum(each.get("gen_ai.usage.input_tokens", 0) for each in spans) == 10
    assert only_turn(on_disk, session.id).input_tokens == 10
    assert session.summary().input_tokens == 10
    roots = [span for span in outbox_spans(on_disk.ledger) if span.name == a.SPAN_TURN]
    assert [root.attributes.get(a.TURN_LLM_CALLS) for root in roots] == [0, 1]
    assert len({(root.trace_id, root.span_id, root.start_ns, root.end_ns) for root in roots}) == 1  # one overwrites


def test_no_turn_is_called_finished_before_its_spans_are_there(
    capture: Capture, on_disk: SessionTracker, path: Path
) -> None:
    """Read the file over and over while turns end: whatever is read is whole."""
    done = threading.Event()
    torn: list[str] = []

    def watch() -> None:
        while not done.is_set():
            with closing(sqlite3.connect(path, isolation_level=None)) as connection:
                connection.execute("BEGIN")
                ended = [each for (each,) in connection.execute("SELECT id FROM turntrace_turns")]
                bodies = b"".join(body for (body,) in connection.execute("SELECT body FROM turntrace_outbox"))
                torn.extend(each for each in ended if each.encode() not in bodies)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with on_disk.session() as session:
            for _ in range(60):
                with session.conversation("c1").turn("Hello"):
                    pass
            on_disk.flush()
    finally:
        done.set()
        watching.join()
    assert torn == []


# --- waiting, and the end ---------------------------------------------------------------------------------------------
def test_whoever_asks_sees_all_that_has_ended(on_disk: SessionTracker) -> None:
    with on_disk.session() as session:
        for n in range(20):
            with session.conversation("c1").turn("Hello"):
                pass
            assert session.summary().total_turns == n + 1
            assert asyncio.run(session.asummary()).total_turns == n + 1
    summary = asyncio.run(on_disk.asession_summary(session.id))
    assert summary is not None
    assert summary.end_reason == "user_exit"


def test_flushing_says_whether_all_is_written(on_disk: SessionTracker, path: Path) -> None:
    assert on_disk.flush()
    session = on_disk.start_session()
    session.end()
    assert asyncio.run(on_disk.aflush())
    assert rows(path, "SELECT end_reason FROM turntrace_sessions") == [("user_exit",)]


def test_shutting_down_writes_all_and_leaves_sessions_open(capture: Capture, path: Path) -> None:
    with capture.tracker(f"sqlite:///{path}", outbox=True) as tracker:
        session = tracker.start_session(user_id="alice")
        session.conversation("c1").start_turn("Hello").end()
    assert rows(path, "SELECT total_turns, ended_ns FROM turntrace_sessions") == [(1, None)]
    again = capture.tracker(f"sqlite:///{path}")
    assert again.start_session(session_id=session.id, user_id="alice").conversation("c1").start_turn().number == 2


def test_a_tracker_can_be_shut_down_twice_and_used_after(on_disk: SessionTracker) -> None:
    session = on_disk.start_session()
    on_disk.shutdown()
    asyncio.run(on_disk.ashutdown())
    session.conversation("c1").start_turn("Hello").end()
    assert session.summary().total_turns == 1


def test_a_tracker_is_an_async_block_too(capture: Capture, path: Path) -> None:
    async def run() -> bool:
        tracker: Any = capture.tracker(f"sqlite:///{path}")
        async with tracker, tracker.session() as session, session.conversation("c1").turn("Hello") as turn:
            return bool(turn)

    assert asyncio.run(run())
    assert rows(path, "SELECT total_turns FROM turntrace_sessions") == [(1,)]


def test_a_turn_that_has_ended_is_not_kept_in_memory(tracker: SessionTracker) -> None:
    with tracker.session() as session:
        with session.conversation("c1").turn("Hello") as turn:
            assert tracker.live_turn(turn.id) is turn
        assert tracker.live_turn(turn.id) is None
        tracker.flush()
        gone = weakref.ref(turn)
        del turn
        gc.collect()
        assert gone() is None


# --- what is current --------------------------------------------------------------------------------------------------
def test_spans_of_the_app_fall_into_the_turn_whose_block_is_open_and_into_no_other(
    capture: Capture, tracker: SessionTracker
) -> None:
    other = capture.provider.get_tracer("app")

    def work(name: str) -> None:
        with other.start_as_current_span(name):
            pass

    work("before")
    with tracker.session() as session:
        work("in the session")
        with session.conversation("c1").turn("Hello") as one:
            work("in one")
            thread = threading.Thread(target=work, args=("in a thread without context",))
            thread.start()
            thread.join()
        work("between")
        with session.conversation("c2").turn("Hello") as two:
            work("in two")
    work("after")
    spans = {span.name: span for span in captured_spans(capture.spans())}
    assert spans["in one"].trace_id == one.id
    assert spans["in two"].trace_id == two.id
    for name in ("before", "in the session", "in a thread without context", "between", "after"):
        assert spans[name].parent_id is None
        assert spans[name].attributes == {}
    assert_all_tagged(span for span in spans.values() if span.trace_id in (one.id, two.id))


def test_a_turn_without_a_block_makes_nothing_current(capture: Capture, tracker: SessionTracker) -> None:
    turn = tracker.start_session().conversation("c1").start_turn("Hello")
    assert not trace.get_current_span().get_span_context().is_valid
    assert not current_turn()
    turn.end()


def test_a_turn_hangs_below_the_span_of_a_request_and_below_no_other(capture: Capture, tracker: SessionTracker) -> None:
    other = capture.provider.get_tracer("app")
    session = tracker.start_session()
    with other.start_as_current_span("request", kind=trace.SpanKind.SERVER):
        session.conversation("c1").start_turn("Hello").end()
    with other.start_as_current_span("job"):
        session.conversation("c2").start_turn("Hello").end()
    session.end()
    spans = captured_spans(capture.spans())
    first, second = named(spans, "conversation.turn")
    [request], [job] = named(spans, "request"), named(spans, "job")
    assert (first.trace_id, first.parent_id) == (request.trace_id, request.span_id)
    assert second.parent_id is None
    assert second.trace_id != job.trace_id
    assert (request.attributes, job.attributes) == ({}, {})
    for span in (*named(spans, "session.start"), *named(spans, "session.end")):
        assert span.parent_id is None
    # The ledger knows where the turn is, also while it runs: its resume goes on there.
    assert [turn.trace_id for turn, _ in tracker.ledger.turns(session.id)] == [first.trace_id, second.trace_id]


def test_the_ledger_knows_the_trace_of_a_turn_while_it_runs(capture: Capture, tracker: SessionTracker) -> None:
    other = capture.provider.get_tracer("app")
    session = tracker.start_session()
    with other.start_as_current_span("request", kind=trace.SpanKind.SERVER):
        turn = session.conversation("c1").start_turn("Hello")
    running = only_turn(tracker, session.id)
    turn.end()
    assert running.status == "open"
    span = named(capture, "conversation.turn")[0]
    assert (running.trace_id, running.root_span_id) == (span.trace_id, span.span_id)


def test_a_turn_within_a_turn_is_a_trace_of_its_own(capture: Capture, tracker: SessionTracker) -> None:
    with tracker.session() as session, session.conversation("c1").turn("Hello") as outer:
        with session.conversation("c2").turn("Hello") as inner:
            assert current_turn() is inner
        assert current_turn() is outer
    one, two = named(capture, "conversation.turn")
    assert {one.trace_id, two.trace_id} == {outer.id, inner.id}
    assert (one.parent_id, two.parent_id) == (None, None)


def test_tasks_have_each_their_own_turn(capture: Capture, tracker: SessionTracker) -> None:
    other = capture.provider.get_tracer("app")

    async def converse(session: Session, n: int) -> None:
        for _ in range(5):
            async with session.conversation(f"c{n}").turn("Hello") as turn:
                await asyncio.sleep(0)
                with other.start_as_current_span(f"work {n}"):
                    await asyncio.sleep(0)
                assert current_turn() is turn

    async def run() -> None:
        async with tracker.session() as session:
            await asyncio.gather(*[converse(session, n) for n in range(10)])

    asyncio.run(run())
    spans = captured_spans(capture.spans())
    work = [span for span in spans if span.name.startswith("work")]
    assert len(work) == 50
    assert all(span.attributes["conversation.id"] == f"c{span.name[5:]}" for span in work)
    assert_all_tagged(span for span in spans if not span.name.startswith("session."))


def test_threads_share_a_tracker(capture: Capture, on_disk: SessionTracker) -> None:
    def converse(n: int) -> None:
        with on_disk.session(user_id=f"user {n}") as session:
            for _ in range(15):
                with session.conversation(f"c{n}").turn("Hello"), session.conversation("shared").turn("Hello"):
                    pass

    threads = [threading.Thread(target=converse, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert on_disk.ledger.turn_numbers("shared") == list(range(1, 121))
    sessions = on_disk.ledger.sessions()
    assert [(session.total_turns, session.end_reason) for session in sessions] == [(30, "user_exit")] * 8
    assert_all_tagged(outbox_spans(on_disk.ledger))


# --- users ------------------------------------------------------------------------------------------------------------
def everything_in(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def raw(spans: list[ReadableSpan]) -> str:
    return "".join(span.to_json() for span in spans)


def test_no_raw_user_id_and_no_content_is_stored_or_exported(tmp_path: Path, capture: Capture) -> None:
    folder = tmp_path / "ledger"
    tracker = capture.tracker(f"sqlite:///{folder}/ledger.db", outbox=True, user_hash_key=None)
    secrets = ["alice.secret@example.com", "The question is private", "The answer is private", "It failed privately"]
    user, question, answer, failure = secrets
    with tracker.session(user_id=user) as session:
        with session.conversation("c1").turn(question) as turn:
            step = turn.open_step("agent", "chain")
            turn.close_step(step, error=LookupError(failure))
            turn.set_answer(answer)
        with contextlib.suppress(LookupError), session.conversation("c1").turn(question):
            raise LookupError(failure)
    tracker.begin_turn(TurnRequest(user_id=user, conversation_id="c2"), question).end()
    tracker.flush()
    stored, exported = everything_in(folder), raw(capture.spans())
    tracker.shutdown()
    assert tracker.hash_user(user).encode() in stored
    assert tracker.hash_user(user) in exported
    for secret in secrets:
        assert secret.encode() not in stored + everything_in(folder)
        assert secret not in exported


def test_a_user_has_the_same_hash_in_every_process_of_a_ledger(capture: Capture, path: Path) -> None:
    made = [capture.tracker(f"sqlite:///{path}", user_hash_key=None) for _ in range(2)]
    assert made[0].hash_user("alice") == made[1].hash_user("alice")
    assert made[0].hash_user("alice") != made[0].hash_user("bob")
    elsewhere = capture.tracker(user_hash_key=None)
    assert elsewhere.hash_user("alice") != made[0].hash_user("alice")


def test_a_key_that_is_given_is_not_kept(capture: Capture, tmp_path: Path) -> None:
    tracker = capture.tracker(f"sqlite:///{tmp_path}/x/ledger.db", user_hash_key="my own secret key, 32 bytes long")
    with tracker.session(user_id="alice"):
        pass
    tracker.shutdown()
    assert b"my own secret key" not in everything_in(tmp_path / "x")


@pytest.mark.parametrize("user_id", [42, "42"])
def test_a_number_may_be_a_user(user_id: Any, tracker: SessionTracker) -> None:
    assert tracker.start_session(user_id=user_id).user_id == tracker.hash_user("42")


def test_what_is_shown_of_an_object_tells_no_secret(capture: Capture) -> None:
    tracker = capture.tracker(user_hash_key="my own secret key, 32 bytes long")
    with tracker.session(user_id="alice") as session, session.conversation("c1", topic="billing").turn("Hi") as turn:
        shown = repr([tracker, session, turn.conversation, turn, tracker.content])
    assert "alice" not in shown
    assert "secret key" not in shown
    assert "sqlite://" in shown
    assert "'c1'" in shown


# --- content that may leave -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("level", "is_shown"), [("metadata", False), ("turn", True), ("full", True)])
def test_what_was_said_stands_on_the_turn_only_when_it_may(level: Any, is_shown: bool, capture: Capture) -> None:
    policy = ContentPolicy(level, redact=lambda text: text.replace("alice", "[name]"))
    tracker = capture.tracker(content=policy)
    with tracker.session() as session, session.conversation("c1").turn("I am alice") as turn:
        turn.set_answer(("ai", "Hello alice"))
    span = named(capture, "conversation.turn")[0]
    asked: Any = json.loads(span.attributes["langfuse.observation.input"])
    told: Any = json.loads(span.attributes["langfuse.observation.output"])
    if is_shown:
        assert asked == [{"role": "user", "content": "I am [name]"}]
        assert told == {"role": "assistant", "content": "Hello [name]"}
    else:
        assert asked == {"turn": 1, "type": "statement", "length": 10}
        assert told == {"status": "completed", "type": "answer", "length": 11}
    assert "alice" not in repr(span)


@pytest.mark.parametrize("level", ["turn", "full"])
@pytest.mark.parametrize(
    ("said", "status", "is_shown"),
    [
        (("user", "It is said"), "completed", True),
        (("system", "It is said"), "completed", False),
        ({"role": "developer", "content": "It is said"}, "completed", False),
        (ToolMessage("It is said", tool_call_id="1"), "completed", True),  # as of a tool that returns directly
        (ToolMessage("It is said", tool_call_id="1"), "interrupted", False),
        (("assistant", "It is said"), "interrupted", True),
    ],
)
def test_instructions_are_never_taken_for_an_answer(
    said: Any, status: str, is_shown: bool, level: Any, capture: Capture
) -> None:
    tracker = capture.tracker(content=level, outbox=True)
    turn = tracker.start_session().conversation("c1").start_turn("Hello")
    turn.set_answer(said)
    turn.end(status)
    assert only_turn(tracker, turn.conversation.session.id).output_length == len("It is said")
    [root] = named(outbox_spans(tracker.ledger), "conversation.turn")
    assert ("It is said" in root.attributes["langfuse.observation.output"]) is is_shown


@pytest.mark.parametrize("level", ["turn", "full"])
@pytest.mark.parametrize("said", [("system", "It is said"), ToolMessage("It is said", tool_call_id="1")])
def test_instructions_are_never_taken_for_what_the_user_said(said: Any, level: Any, capture: Capture) -> None:
    tracker = capture.tracker(content=level)
    with tracker.session() as session, session.conversation("c1").turn(said):
        pass
    assert "It is said" not in repr(named(capture, "conversation.turn")[0].attributes)


@pytest.mark.parametrize(("level", "is_shown"), [("metadata", False), ("turn", False), ("full", True)])
def test_the_text_of_an_error_stands_on_its_step_only_when_it_may(level: Any, is_shown: bool, capture: Capture) -> None:
    tracker = capture.tracker(content=ContentPolicy(level, redact=lambda text: text.replace("alice", "[name]")))
    with tracker.session() as session, session.conversation("c1").turn("Hello") as turn:
        turn.close_step(turn.open_step("agent", "chain"), error=LookupError("alice is unknown"))
    message = named(capture, "agent")[0].attributes["langfuse.observation.status_message"]
    assert message == ("LookupError: [name] is unknown" if is_shown else "LookupError")


# --- parity -----------------------------------------------------------------------------------------------------------
def methods(kind: type) -> Mapping[str, Callable[..., Any]]:
    return {name: value for name, value in vars(kind).items() if callable(value)}


@pytest.mark.parametrize("kind", [SessionTracker, Session, Conversation, Turn])
def test_what_is_async_has_a_sync_twin_and_the_other_way_round(kind: type) -> None:
    names = methods(kind)
    waits = {"start_session", "session_summary", "flush", "shutdown", "summary", "start_turn", "end"}
    asyncs = {name for name, method in names.items() if asyncio.iscoroutinefunction(method) and name[0] == "a"}
    assert {name[1:] for name in asyncs} <= set(names)
    assert {f"a{name}" for name in waits & set(names)} <= asyncs
    assert ("__enter__" in names) == ("__aenter__" in names)
    assert ("__exit__" in names) == ("__aexit__" in names)


def test_the_blocks_work_in_both_ways(tracker: SessionTracker) -> None:
    for kind in (tracker.session(), tracker.start_session().conversation("c1").turn()):
        for name in ("__enter__", "__exit__", "__aenter__", "__aexit__"):
            assert name in methods(type(kind))


@pytest.fixture(autouse=True)
def _no_turn_is_left_current() -> Iterator[None]:
    yield
    assert not current_turn()
