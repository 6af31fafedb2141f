"""While the ledger cannot be written the app goes on as ever, and what it did is on record when the ledger is back."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt
from sqlalchemy import event

from apps import Builder, FakeModel, State, asks, config_of
from turntrace import SessionCallbackHandler, SessionTracker, track_graph
from turntrace import attributes as a
from turntrace.ledger.opening import open_engine
from turntrace.records import TurnSummary
from turntrace.testing import CapturedSpan, assert_all_tagged, outbox_spans

HOW = pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream"])


class Desk:
    """A tracker on a file that another process may lock, and waits 20 ms for it, so that no test waits for seconds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        engine = open_engine(f"sqlite:///{path}")
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout=20"))
        self.tracker = SessionTracker(engine, user_hash_key="a key of the tests", outbox=True)
        self.saver = InMemorySaver()

    @contextmanager
    def away(self) -> Iterator[None]:
        with closing(sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)) as other:
            other.execute("BEGIN IMMEDIATE")
            try:
                yield
            finally:
                other.execute("ROLLBACK")

    def compile(self, builder: Builder) -> Any:
        handler = SessionCallbackHandler(self.tracker)
        return track_graph(builder).compile(checkpointer=self.saver).with_config(callbacks=[handler])

    def turns(self) -> list[TurnSummary]:
        assert self.tracker.flush(60)
        return [turn for each in self.tracker.ledger.sessions() for turn, _ in self.tracker.ledger.turns(each.id)]

    def spans(self) -> list[CapturedSpan]:
        assert self.tracker.flush(60)
        return list({span.span_id: span for span in outbox_spans(self.tracker.ledger)}.values())


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "ledger.db")
    yield made
    made.tracker.shutdown()


def one_node(node: Any) -> Builder:
    builder: Builder = StateGraph(State)
    builder.add_node("agent", node)
    builder.add_edge(START, "agent")
    return builder


def ask(_state: State) -> dict[str, Any]:
    return {"messages": [("ai", f"You said {interrupt('Really?')}.")]}


def answers() -> Builder:
    return one_node(lambda _state: {"messages": [FakeModel().invoke("x")]})


def call(graph: Any, how: str, given: Any, config: Any) -> Any:
    if how == "stream":
        return list(graph.stream(given, config, stream_mode="values"))[-1]
    return asyncio.run(graph.ainvoke(given, config)) if how == "ainvoke" else graph.invoke(given, config)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@HOW
def test_turns_of_the_callback_are_on_record_afterwards(how: str, desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    graph = desk.compile(answers())
    said = [call(graph, how, asks(), config_of("c1", user_id="ann"))["messages"][-1].content]
    desk.tracker.flush()
    with desk.away():
        for conversation, user in (("c1", "ann"), ("c1", "ann"), ("c2", "bob")):
            said.append(call(graph, how, asks(), config_of(conversation, user_id=user))["messages"][-1].content)
    said.append(call(graph, how, asks(), config_of("c1", user_id="ann"))["messages"][-1].content)

    assert len(set(said)) == 1
    turns = desk.turns()
    assert sorted((turn.conversation_id, turn.number) for turn in turns) == [
        *(("c1", number) for number in (1, 2, 3, 4)),
        ("c2", 1),
    ]
    assert {turn.status for turn in turns} == {"completed"}
    assert {turn.llm_calls for turn in turns} == {1}
    assert len({turn.session_id for turn in turns}) == 2
    spans = desk.spans()
    assert_all_tagged(spans)
    roots = {span.attributes[a.TURN_ID]: span.attributes for span in spans if span.name == a.SPAN_TURN}
    assert {turn.id: turn.number for turn in turns} == {each: roots[each][a.TURN_NUMBER] for each in roots}
    assert len([span for span in spans if span.name == a.SPAN_SESSION_START]) == 2
    told = logged(caplog)
    assert len(told) == 2
    assert "Meanwhile what is tracked stays in memory, and the app goes on" in told[0]
    assert "the ledger can be written again" in told[1]


def test_blocks_go_on_too(desk: Desk) -> None:
    graph = desk.compile(answers())
    with desk.away(), desk.tracker.session(user_id="ann", channel="web", tier="premium") as session:
        conversation = session.conversation("c1", topic="help")
        for said in ("Hi", "And?"):
            with conversation.turn(said) as turn:
                graph.invoke(turn.input, turn.config)
                turn.set_intent("greet")
            turn.feedback(True)
    turns = desk.turns()
    assert [(turn.number, turn.intent, turn.status) for turn in turns] == [(n, "greet", "completed") for n in (1, 2)]
    [summary] = desk.tracker.ledger.sessions()
    assert (summary.id, summary.total_turns, summary.end_reason) == (session.id, 2, "user_exit")
    assert (summary.tier, summary.user_satisfaction) == ("premium", 1.0)
    assert_all_tagged(desk.spans())


def test_a_number_that_was_guessed_wrong_is_put_right(tmp_path: Path) -> None:
    first, second = Desk(tmp_path / "ledger.db"), Desk(tmp_path / "ledger.db")
    for desk in (first, second, second):
        desk.compile(answers()).invoke(asks(), config_of("c1", user_id="ann"))
    graph = first.compile(answers())
    with first.away():  # it knows of one turn; there are three
        state = graph.invoke(asks(), config_of("c1", user_id="ann"))
    turns = first.turns()
    assert sorted(turn.number for turn in turns) == [1, 2, 3, 4]
    [late] = [turn for turn in turns if turn.number == 4]
    assert late.id == state["turn_id"]
    spans = [span for span in first.spans() if span.attributes.get(a.TURN_ID) == late.id]
    assert {span.attributes[a.TURN_NUMBER] for span in spans} == {4}
    for desk in (first, second):
        desk.tracker.shutdown()


def test_a_session_that_ended_meanwhile_is_open_again(desk: Desk) -> None:
    graph = desk.compile(answers())
    session = desk.tracker.start_session(user_id="ann")
    conversation = session.conversation("c1")
    desk.tracker.flush()
    with desk.away():
        session.end("completed")
        with conversation.turn("One more thing") as turn:
            graph.invoke(turn.input, turn.config)
    assert len(desk.turns()) == 1
    [summary] = desk.tracker.ledger.sessions()
    assert (summary.id, summary.total_turns, summary.end_reason) == (session.id, 1, None)


@pytest.mark.usefixtures("lenient")
def test_who_asks_the_ledger_meanwhile_does_not_wait_for_long(desk: Desk) -> None:
    turn = desk.tracker.start_session(user_id="ann").conversation("c").start_turn("Hello?")
    turn.end()
    assert desk.tracker.flush(60)
    with desk.away():
        desk.tracker.start_session(user_id="ann").conversation("c").start_turn("And now?").end()
        assert desk.tracker.is_ledger_away
        began = time.monotonic()
        desk.tracker.feedback(True, turn_id=turn.id)
        assert desk.tracker.user_summary("ann") is not None
        assert time.monotonic() - began < 15
    assert desk.tracker.flush(60)
    [session] = [each for each in desk.tracker.ledger.sessions() if each.user_satisfaction is not None]
    assert session.user_satisfaction == 1.0


def test_a_question_of_that_time_is_answered_later(desk: Desk) -> None:
    graph = desk.compile(one_node(ask))
    with desk.away():
        graph.invoke(asks(), config_of("c1", user_id="ann"))
    desk.tracker.flush(60)
    graph.invoke(Command(resume="yes"), config_of("c1", user_id="ann"))
    assert [(turn.status, turn.agent_runs) for turn in desk.turns()] == [("completed", 2)]


def test_an_answer_of_that_time_is_a_turn_of_its_own(desk: Desk) -> None:
    graph = desk.compile(one_node(ask))
    graph.invoke(asks(), config_of("c1", user_id="ann"))
    desk.tracker.flush()
    with desk.away():
        state = graph.invoke(Command(resume="yes"), config_of("c1", user_id="ann"))
    assert state["messages"][-1].content == "You said yes."
    assert sorted(str(turn.status) for turn in desk.turns()) == ["abandoned", "completed"]
