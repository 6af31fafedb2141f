"""A turn that waits for a person is one turn and one trace, whoever answers, when and in which process."""

import asyncio
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, interrupt

import fresh
from apps import Builder, FakeModel, State, asks, config_of, line
from turntrace import ContentPolicy, SessionCallbackHandler, SessionTracker, track_graph
from turntrace import attributes as a
from turntrace.errors import StateError
from turntrace.ledger import Ledger
from turntrace.lifecycle.turn import TURN_ID_KEY
from turntrace.records import TurnSummary
from turntrace.testing import Capture, CapturedSpan, Clock, assert_all_tagged, outbox_spans

HEARS_STATIC = hasattr(SessionCallbackHandler, "on_resume")
"""Whether this langgraph tells handlers that it stopped; before 1.1.7 it says nothing of static interrupts."""

MINUTE = 60_000


def latest(spans: list[CapturedSpan]) -> list[CapturedSpan]:
    """Return spans as a server keeps them: of those that came twice the latter."""
    return list({span.span_id: span for span in spans}.values())


class Desk:
    """A tracker whose spans wait in its ledger, and a graph that stops to ask."""

    def __init__(self, path: Path, tracked: bool, **settings: Any) -> None:
        self.clock = Clock()
        self.url = f"sqlite:///{path}"
        self.tracked = tracked
        self.saver = InMemorySaver()
        self.settings: dict[str, Any] = {"user_hash_key": "a key of the tests", "clock": self.clock, **settings}
        self.tracker = SessionTracker(self.url, **self.settings)

    def compile(self, builder: Builder, **options: Any) -> Any:
        """Compile a graph with another handler than any before."""
        built = track_graph(builder) if self.tracked else builder
        handler = SessionCallbackHandler(self.tracker)
        return built.compile(checkpointer=self.saver, **options).with_config(callbacks=[handler])

    def restart(self) -> None:
        """Go on as another process would: with another tracker, which knows what is in the ledger only."""
        self.tracker.shutdown()
        self.tracker = SessionTracker(self.url, **self.settings)

    def turns(self) -> list[TurnSummary]:
        self.tracker.flush()
        return [turn for each in self.tracker.ledger.sessions() for turn, _ in self.tracker.ledger.turns(each.id)]

    def spans(self) -> list[CapturedSpan]:
        self.tracker.flush()
        return latest(outbox_spans(self.tracker.ledger))

    def one_trace(self) -> dict[str, list[CapturedSpan]]:
        """Assert that there is one turn, in one trace with one root and no other; return its spans by name."""
        [turn] = self.turns()
        spans = [span for span in self.spans() if a.TURN_ID in span.attributes]
        assert_all_tagged(spans)
        assert {span.attributes[a.TURN_ID] for span in spans} == {turn.id}
        assert {span.trace_id for span in spans} == {turn.trace_id}
        known = {span.span_id for span in spans}
        [root] = [span for span in spans if span.parent_id not in known]
        assert (root.name, root.span_id) == (a.SPAN_TURN, turn.root_span_id)
        by_name: dict[str, list[CapturedSpan]] = {}
        for span in spans:
            by_name.setdefault(span.name, []).append(span)
        by_name["LangGraph"] = [span for span in spans if span.parent_id == root.span_id]
        assert {span.name for span in by_name["LangGraph"]} <= {"LangGraph", "queue"}
        return by_name


@pytest.fixture(params=["callback", "tracked"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path / "ledger.db", request.param == "tracked")
    yield made
    made.tracker.shutdown()


# --- graphs that ask --------------------------------------------------------------------------------------------------
def ask(_state: State) -> dict[str, Any]:
    return {"messages": [("ai", f"You said {interrupt('Really?')}.")]}


async def aask(state: State) -> dict[str, Any]:
    return ask(state)


def think(_state: State) -> dict[str, Any]:
    FakeModel().invoke("think")
    return {}


def in_a_node() -> Builder:
    return line(("think", think), ("ask", ask))


def in_a_subgraph() -> Builder:
    return line(("think", think), ("desk", line(("ask", ask)).compile()))


def side_by_side() -> Builder:
    builder: Builder = StateGraph(State)
    node: Any = ask
    for name in ("left", "right"):
        builder.add_node(name, node)
        builder.add_edge(START, name)
    return builder


def in_a_tool() -> Builder:
    @tool
    def refund(amount: int) -> str:
        """Pay it back."""
        return f"{amount}: {interrupt('May I?')}"

    def call(_state: State) -> dict[str, Any]:
        FakeModel().invoke("call")
        return {"messages": [AIMessage("", tool_calls=[{"name": "refund", "args": {"amount": 5}, "id": "c1"}])]}

    return line(("call", call), ("tools", ToolNode([refund])))


GRAPHS = {"node": in_a_node, "subgraph": in_a_subgraph, "tool": in_a_tool}
Way = Callable[[Any, Any, Any], object]


def by_ainvoke(graph: Any, given: Any, config: Any) -> None:
    asyncio.run(graph.ainvoke(given, config))


def by_astream(graph: Any, given: Any, config: Any) -> None:
    async def main() -> None:
        async for _ in graph.astream(given, config, stream_mode="updates"):
            pass

    asyncio.run(main())


WAYS: dict[str, Way] = {
    "invoke": lambda graph, given, config: graph.invoke(given, config),
    "stream": lambda graph, given, config: list(graph.stream(given, config, stream_mode="updates")),
    "ainvoke": by_ainvoke,
    "astream": by_astream,
}


# --- one turn, one trace ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_an_answered_interrupt_is_one_turn(graph: str, way: str, desk: Desk) -> None:
    run, config = WAYS[way], config_of("c1", user_id="ann")
    run(desk.compile(GRAPHS[graph]()), asks(), config)
    [turn] = desk.turns()
    assert (turn.status, turn.output_type, turn.agent_runs, turn.llm_calls) == ("interrupted", "interrupt", 1, 1)

    desk.clock.advance(minutes=3)
    run(desk.compile(GRAPHS[graph]()), Command(resume="yes"), config)

    spans = desk.one_trace()
    [turn] = desk.turns()
    assert (turn.number, turn.status, turn.error) == (1, "completed", None)
    assert (turn.agent_runs, turn.llm_calls, turn.input_tokens) == (2, 1, 100)
    assert (turn.wait_ms, turn.latency_ms) == (3 * MINUTE, 0)
    assert turn.input_length == len("What does tea cost?")
    [root] = spans[a.SPAN_TURN]
    assert root.attributes[a.TURN_AGENT_RUNS] == 2
    assert root.attributes[a.TURN_WAIT_MS] == 3 * MINUTE
    assert root.attributes[a.TURN_STATUS] == "completed"
    assert not any(a.ERROR_TYPE in span.attributes for each in spans.values() for span in each)
    [session] = desk.tracker.ledger.sessions()
    assert (session.total_turns, session.input_tokens, session.wait_ms) == (1, 100, 3 * MINUTE)


def test_another_process_answers(desk: Desk) -> None:
    config = config_of("c1", user_id="ann", channel="web", topic="billing")
    desk.compile(in_a_node()).invoke(asks(), config)
    desk.restart()
    desk.clock.advance(minutes=5)
    # Another person answers, by another channel: it is the user's turn all the same.
    desk.compile(in_a_node()).invoke(Command(resume="yes"), config_of("c1", user_id="the boss", channel="slack"))
    spans = desk.one_trace()
    [turn] = desk.turns()
    assert (turn.status, turn.agent_runs, turn.wait_ms) == ("completed", 2, 5 * MINUTE)
    assert spans["LangGraph"][1].attributes[a.SESSION_CHANNEL] == "web"
    assert spans["LangGraph"][1].attributes[a.CONVERSATION_TOPIC] == "billing"
    [session] = desk.tracker.ledger.sessions()
    assert session.user_id == desk.tracker.hash_user("ann")


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_static_interrupt_goes_on_without_input(where: str, desk: Desk) -> None:
    stops = {"interrupt_before": ["two"]} if where == "before" else {"interrupt_after": ["one"]}
    builder = [("one", think), ("two", think)]
    config = config_of("c1", user_id="ann")
    desk.compile(line(*builder), **stops).invoke(asks(), config)
    assert [turn.status for turn in desk.turns()] == ["interrupted" if HEARS_STATIC else "completed"]
    desk.clock.advance(minutes=1)
    desk.restart()
    graph = desk.compile(line(*builder), **stops)
    graph.update_state({"configurable": {"thread_id": "c1"}}, {"messages": [("user", "And be quick.")]})
    graph.invoke(None, config)
    turns = desk.turns()
    if HEARS_STATIC:
        assert [(turn.status, turn.llm_calls, turn.wait_ms) for turn in turns] == [("completed", 2, MINUTE)]
        desk.one_trace()
    else:  # this langgraph says nothing of static interrupts: what goes on is a turn that says where it comes from
        assert [turn.forked_from for turn in turns] == [None, turns[0].id]


def test_several_interrupts_are_answered_one_by_one(desk: Desk) -> None:
    graph, config = desk.compile(side_by_side()), config_of("c1", user_id="ann")
    asked = graph.invoke(asks(), config)["__interrupt__"]
    for number, each in enumerate(asked):
        assert [turn.status for turn in desk.turns()] == ["interrupted"]
        desk.clock.advance(minutes=1 + number)
        graph.invoke(Command(resume={each.id: "yes"}), config)
    desk.one_trace()
    [turn] = desk.turns()
    assert (turn.status, turn.agent_runs, turn.wait_ms) == ("completed", 3, 3 * MINUTE)


def test_all_interrupts_are_answered_at_once(desk: Desk) -> None:
    graph, config = desk.compile(side_by_side()), config_of("c1", user_id="ann")
    asked = graph.invoke(asks(), config)["__interrupt__"]
    graph.invoke(Command(resume={each.id: "yes" for each in asked}), config)
    assert len(desk.one_trace()["LangGraph"]) == 2


def test_an_interrupt_that_is_caught_inside_does_not_stop_the_turn(desk: Desk) -> None:
    inner = line(("ask", ask)).compile(checkpointer=InMemorySaver())

    def calls(_state: State) -> dict[str, Any]:
        inner.invoke(asks(), {"configurable": {"thread_id": "inner"}})
        return {"messages": [("ai", "Somebody will look at it.")]}

    desk.compile(line(("calls", calls))).invoke(asks(), config_of("c1", user_id="ann"))
    [turn] = desk.turns()
    assert turn.status == "completed"


# --- nobody answers, or late ------------------------------------------------------------------------------------------
def test_an_interrupt_that_nobody_answers_is_abandoned_by_the_sweep(desk: Desk) -> None:
    desk.compile(in_a_node()).invoke(asks(), config_of("c1", user_id="ann"))
    desk.tracker.flush()
    desk.clock.advance(minutes=31)
    swept = desk.tracker.sweep()
    assert (swept.sessions, swept.turns) == (1, 1)
    [turn] = desk.turns()
    assert (turn.status, turn.output_type, turn.llm_calls) == ("abandoned", "interrupt", 1)
    [root] = desk.one_trace()[a.SPAN_TURN]
    assert root.attributes[a.TURN_STATUS] == "abandoned"
    [session] = desk.tracker.ledger.sessions()
    assert (session.end_reason, session.last_action, session.dropoff) == ("inactive_timeout", "interrupted", True)
    assert (session.total_turns, session.input_tokens) == (1, 100)
    assert desk.tracker.sweep().turns == 0


def test_the_users_next_visit_abandons_it_too(desk: Desk) -> None:
    desk.compile(in_a_node()).invoke(asks(), config_of("c1", user_id="ann"))
    desk.tracker.flush()
    desk.clock.advance(minutes=31)
    desk.compile(line(("think", think))).invoke(asks(), config_of("c2", user_id="ann"))
    assert sorted(turn.status or "" for turn in desk.turns()) == ["abandoned", "completed"]
    assert len(desk.tracker.ledger.sessions()) == 2


def test_a_late_answer_makes_the_turn_whole(desk: Desk) -> None:
    config = config_of("c1", user_id="ann")
    desk.compile(in_a_node()).invoke(asks(), config)
    desk.tracker.flush()
    desk.clock.advance(minutes=100)
    desk.tracker.sweep()
    desk.restart()
    desk.compile(in_a_node()).invoke(Command(resume="yes"), config)
    desk.one_trace()
    [turn] = desk.turns()
    assert (turn.status, turn.error, turn.agent_runs, turn.wait_ms) == ("completed", None, 2, 100 * MINUTE)
    [session] = desk.tracker.ledger.sessions()
    assert (session.total_turns, session.input_tokens) == (1, 100)
    assert (session.end_reason, session.dropoff) == ("inactive_timeout", False)
    [end] = [span for span in desk.spans() if span.name == a.SPAN_SESSION_END]
    assert end.attributes[a.DROPOFF_DETECTED] is False


def test_another_message_instead_of_an_answer_begins_a_new_turn(desk: Desk) -> None:
    graph, config = desk.compile(in_a_node()), config_of("c1", user_id="ann")
    for _ in range(3):
        graph.invoke(asks(), config)
    desk.restart()
    desk.compile(in_a_node()).invoke(asks(), config)
    turns = desk.turns()
    assert [turn.number for turn in turns] == [1, 2, 3, 4]
    assert [turn.status for turn in turns] == ["abandoned", "abandoned", "abandoned", "interrupted"]
    roots = [span for span in desk.spans() if span.name == a.SPAN_TURN]
    assert [span.attributes[a.TURN_STATUS] for span in roots] == [turn.status for turn in turns]
    desk.compile(in_a_node()).invoke(Command(resume="yes"), config)
    assert [turn.status for turn in desk.turns()][-1] == "completed"


def test_an_answer_that_nothing_waits_for_is_a_turn_of_its_own(desk: Desk) -> None:
    graph, config = desk.compile(line(("think", think))), config_of("c1", user_id="ann")
    graph.invoke(asks(), config)
    graph.invoke(Command(resume="yes"), config)
    assert [(turn.number, turn.status) for turn in desk.turns()] == [(1, "completed"), (2, "completed")]


# --- by hand ----------------------------------------------------------------------------------------------------------
def test_a_turns_block_goes_on_in_another_one(desk: Desk) -> None:
    graph = desk.compile(in_a_node())
    with desk.tracker.session(user_id="ann", session_id="s1") as session:
        with session.conversation("c1").turn("Pay it back") as turn:
            graph.invoke(turn.input, turn.config)
            assert turn.interrupted
        desk.clock.advance(minutes=2)
        with session.conversation("c1").resume_turn() as again:
            graph.invoke(Command(resume="yes"), again.config)
        assert (again.id, again.number) == (turn.id, turn.number)
        with pytest.raises(StateError, match="No turn of the conversation 'c1' waits for a person"):
            session.conversation("c1").resume_turn()
    desk.one_trace()
    [summary] = desk.turns()
    assert (summary.status, summary.wait_ms, summary.agent_runs) == ("completed", 2 * MINUTE, 2)


def test_a_person_who_answers_inside_the_block_is_waited_for(desk: Desk) -> None:
    graph = desk.compile(in_a_node())
    with desk.tracker.session(user_id="ann") as session, session.conversation("c1").turn("Pay it back") as turn:
        graph.invoke(turn.input, turn.config)
        desk.clock.advance(minutes=2)
        graph.invoke(Command(resume="yes"), turn.config)
    desk.one_trace()
    [summary] = desk.turns()
    assert (summary.status, summary.wait_ms, summary.latency_ms) == ("completed", 2 * MINUTE, 0)


def test_an_answer_joins_a_turn_that_the_app_has_not_ended_yet(desk: Desk) -> None:
    graph = desk.compile(in_a_node())
    turn = desk.tracker.start_session(user_id="ann").conversation("c1").start_turn("Pay it back")
    graph.invoke(turn.input, turn.config)
    graph.invoke(Command(resume="yes"), config_of("c1", user_id="ann"))
    turn.end()
    desk.one_trace()
    assert [(each.status, each.agent_runs) for each in desk.turns()] == [("completed", 2)]


def test_a_chain_that_answers_its_graphs_question_itself_does_not_wait(desk: Desk) -> None:
    """As by a policy, or where a terminal asks within the chain."""

    def ask(_: State) -> Any:
        return {"messages": [AIMessage(f"Paid: {interrupt('May I?')}")]}

    builder = line(("ask", ask))
    graph: Any = (track_graph(builder) if desk.tracked else builder).compile(checkpointer=desk.saver)

    def handle(inputs: Any, config: RunnableConfig) -> Any:
        found = graph.invoke(inputs, config)
        while "__interrupt__" in found:
            found = graph.invoke(Command(resume="yes"), config)
        return found

    config: Any = {**config_of("c-1", conversation_id="c-1"), "callbacks": [SessionCallbackHandler(desk.tracker)]}
    for _ in range(2):
        found: Any = RunnableLambda(handle).invoke(asks(), config)
        assert found["messages"][-1].content == "Paid: yes"
    assert [turn.status for turn in desk.turns()] == ["completed"] * 2


def test_tasks_that_a_stopped_workflow_left_running_are_its_steps(desk: Desk) -> None:
    @task
    def work(_: int) -> None:
        time.sleep(0.02)  # more than there are threads: some begin when the workflow has stopped

    @entrypoint(checkpointer=desk.saver)
    def flow(_: str) -> Any:
        for number in range(60):
            work(number)
        return interrupt("Really?")

    conversation = desk.tracker.start_session().conversation("c")
    with conversation.turn("Hello?") as turn:
        config: Any = {**turn.config, "callbacks": [SessionCallbackHandler(desk.tracker)]}
        flow.invoke("Hello?", config)
    [found] = desk.turns()
    assert (found.status, found.agent_runs) == ("interrupted", 1)
    spans = [span for span in desk.spans() if span.name == "work"]
    assert len(spans) == 60
    assert {span.attributes[a.LANGFUSE_OBSERVATION_TYPE] for span in spans} == {"chain"}


def test_awaiting_twins(desk: Desk) -> None:
    graph = desk.compile(line(("ask", aask)))

    async def main() -> None:
        async with desk.tracker.session(user_id="ann") as session:
            async with session.conversation("c1").turn("Pay it back") as turn:
                await graph.ainvoke(turn.input, turn.config)
            async with await session.conversation("c1").aresume_turn() as again:
                await graph.ainvoke(Command(resume="yes"), again.config)

    asyncio.run(main())
    desk.one_trace()
    assert [turn.status for turn in desk.turns()] == ["completed"]


# --- another process --------------------------------------------------------------------------------------------------
def test_a_turn_is_handed_over(desk: Desk) -> None:
    with desk.tracker.session(user_id="ann", session_id="s1") as session:
        turn = session.conversation("c1").start_turn("Sum this up")
        step = turn.open_step("queue", "chain")
        turn.close_step(step)
        carrier = turn.carrier()
        assert all(isinstance(text, str) for pair in carrier.items() for text in pair)
        assert turn.is_finished
        with pytest.raises(StateError, match="has ended, so it cannot be handed over"):
            turn.carrier()
    desk.restart()
    desk.clock.advance(minutes=2)
    with desk.tracker.resume_turn(carrier) as again:
        desk.compile(line(("think", think))).invoke(asks(), again.config)
    assert {span.name for span in desk.spans()} >= {"queue", "think", a.SPAN_TURN}
    [summary] = desk.turns()
    assert (summary.id, summary.status, summary.llm_calls) == (turn.id, "completed", 1)
    # Nobody was waited for: a job that lies in a queue is time that the user waits.
    assert (summary.wait_ms, summary.latency_ms) == (0, 2 * MINUTE)
    with pytest.raises(StateError, match="has no turn 'unknown': it is in another ledger, or was erased"):
        desk.tracker.resume_turn({**carrier, TURN_ID_KEY: "unknown"})
    with pytest.raises(StateError, match="The carrier of a turn is what"):
        desk.tracker.resume_turn({"id": turn.id})


def test_a_turn_that_was_handed_over_waits_for_no_user(desk: Desk) -> None:
    conversation = desk.tracker.start_session(user_id="ann").conversation("c1")
    with asyncio.Runner() as runner:
        carrier = runner.run(conversation.start_turn("Sum this up").acarrier())
        with conversation.turn("And this?"):
            pass
        desk.tracker.flush()
        turn = runner.run(desk.tracker.aresume_turn(carrier))
    turn.end()
    assert [each.status for each in desk.turns()] == ["completed", "completed"]


ASKS = """
import sys
sys.path.insert(0, {tests!r})
import sqlite3
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command
from test_interrupts import in_a_node
from apps import asks, config_of
from turntrace import SessionCallbackHandler

saver = SqliteSaver(sqlite3.connect({checkpoints!r}, check_same_thread=False))
handler = SessionCallbackHandler()
graph = in_a_node().compile(checkpointer=saver).with_config(callbacks=[handler])
"""


def test_the_first_process_is_killed_and_a_second_one_answers(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    begins = ASKS.format(tests=str(Path(__file__).parent), checkpoints=str(tmp_path / "checkpoints.db"))
    first = fresh.Fresh(
        begins
        + "graph.invoke(asks(), config_of('c1', user_id='ann'))\nhandler.tracker.flush()\ntell(b'asked')\nheard()",
        TURNTRACE_LEDGER_URL=url,
    )
    assert first.told() == b"asked"
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.join()
    answers = "graph.invoke(Command(resume='yes'), config_of('c1', user_id='ann'))\nhandler.tracker.shutdown()"
    fresh.run(begins + answers, TURNTRACE_LEDGER_URL=url)
    with closing(Ledger(url)) as ledger:
        [session] = ledger.sessions()
        [(turn, steps)] = ledger.turns(session.id)
        spans = latest(outbox_spans(ledger))
    assert (turn.status, turn.agent_runs, session.total_turns) == ("completed", 2, 1)
    assert turn.ended_ns is not None
    assert 0 < turn.wait_ms <= (turn.ended_ns - turn.started_ns) // 1_000_000
    assert {span.trace_id for span in spans if a.TURN_ID in span.attributes} == {turn.trace_id}
    assert [span.name for span in spans].count("LangGraph") == 2
    assert {step.span_id for step in steps} <= {span.span_id for span in spans}


def test_the_first_process_is_killed_before_it_could_write_that_it_waits(tmp_path: Path, desk: Desk) -> None:
    config = config_of("c1", user_id="ann")
    desk.compile(in_a_node()).invoke(asks(), config)
    desk.tracker.flush()
    [turn] = desk.turns()
    with desk.tracker.ledger.writing() as writer:  # as the ledger stood before the turn's end was written
        connection = writer._connection
        connection.exec_driver_sql("DELETE FROM turntrace_turns")
        connection.exec_driver_sql(
            "INSERT INTO turntrace_open_turns (conversation_id, number, id, session_id, user_id, role, started_ns, "
            "trace_id, root_span_id) VALUES ('c1', 1, ?, ?, ?, 'user', ?, ?, ?)",
            (turn.id, turn.session_id, turn.user_id, turn.started_ns, turn.trace_id, turn.root_span_id),
        )
    desk.restart()
    desk.compile(in_a_node()).invoke(Command(resume="yes"), config)
    desk.one_trace()
    assert [(each.id, each.status) for each in desk.turns()] == [(turn.id, "completed")]


def test_a_process_that_dies_after_it_went_on_leaves_what_was_known(desk: Desk) -> None:
    desk.compile(in_a_node()).invoke(asks(), config_of("c1", user_id="ann"))
    desk.tracker.flush()
    desk.clock.advance(minutes=1)
    assert desk.tracker.resume_newest("c1") is not None
    assert [turn.status for turn in desk.turns()] == ["open"]
    desk.tracker = SessionTracker(desk.url, **desk.settings)  # as another process, which does not hold the turn
    desk.clock.advance(minutes=31)
    assert desk.tracker.sweep().turns == 1
    [turn] = desk.turns()
    assert (turn.status, turn.llm_calls, turn.input_tokens) == ("abandoned", 1, 100)
    [session] = desk.tracker.ledger.sessions()
    assert (session.total_turns, session.llm_calls, session.input_tokens) == (1, 1, 100)
    desk.one_trace()


# --- what the root says -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", ["metadata", "turn"])
def test_the_users_message_is_found_again_where_it_may_be_shown(level: str, tmp_path: Path) -> None:
    desk = Desk(tmp_path / "ledger.db", tracked=False, content=ContentPolicy(level))  # type: ignore[arg-type]
    config = config_of("c1", user_id="ann")
    desk.compile(in_a_node()).invoke(asks(), config)
    desk.restart()
    desk.compile(in_a_node()).invoke(Command(resume="yes"), config)
    [root] = desk.one_trace()[a.SPAN_TURN]
    shown = str(root.attributes[a.LANGFUSE_OBSERVATION_INPUT])
    assert ("What does tea cost?" in shown) is (level == "turn")
    assert ("You said yes." in str(root.attributes[a.LANGFUSE_OBSERVATION_OUTPUT])) is (level == "turn")
    desk.tracker.shutdown()


def test_a_provider_of_the_apps_gets_the_root_once(capture: Capture) -> None:
    tracker = capture.tracker()
    graph: Any = in_a_node().compile(checkpointer=InMemorySaver())
    graph = graph.with_config(callbacks=[SessionCallbackHandler(tracker)])
    graph.invoke(asks(), config_of("c1", user_id="ann"))
    names = [span.name for span in capture.spans()]
    assert names.count("LangGraph") == 1
    assert a.SPAN_TURN not in names
    graph.invoke(Command(resume="yes"), config_of("c1", user_id="ann"))
    names = [span.name for span in capture.spans()]
    assert names.count("LangGraph") == 2
    assert names.count(a.SPAN_TURN) == 1
    tracker.shutdown()


# --- time travel ------------------------------------------------------------------------------------------------------
def ann() -> Any:
    """Return a config that was not used before: an older langchain-core writes the checkpoint into its metadata."""
    return config_of("c1", user_id="ann")


def test_a_replay_is_a_turn_that_says_what_it_replays(desk: Desk) -> None:
    desk.tracker.shutdown()
    del desk.settings["clock"]  # LangGraph's checkpoints have the time of the machine
    desk.tracker = SessionTracker(desk.url, **desk.settings)
    graph = desk.compile(line(("one", think), ("two", think)))
    for _ in range(3):
        graph.invoke(asks(), ann())
    history = list(graph.get_state_history(ann()))
    [of_second] = [each.config for each in history if each.next == ("two",)][1:2]
    graph.invoke(None, {**ann(), **of_second})
    edited = graph.update_state(of_second, {"messages": [("user", "What does coffee cost?")]})
    graph.invoke(None, {**ann(), **edited})
    graph.invoke(asks("And cake?"), {**ann(), **of_second})
    turns = desk.turns()
    assert [turn.number for turn in turns] == [1, 2, 3, 4, 5, 6]
    assert [turn.forked_from for turn in turns[:5]] == [None, None, None, turns[1].id, turns[3].id]
    assert turns[5].forked_from == turns[1].id
    roots = {span.attributes[a.TURN_NUMBER]: span for span in desk.spans() if span.name == a.SPAN_TURN}
    assert roots[4].attributes[a.TURN_FORKED_FROM] == turns[1].id
    assert a.TURN_FORKED_FROM not in roots[1].attributes


def test_an_old_checkpoint_of_a_thread_that_waits_is_a_replay(desk: Desk) -> None:
    desk.tracker.shutdown()
    del desk.settings["clock"]
    desk.tracker = SessionTracker(desk.url, **desk.settings)
    graph = desk.compile(in_a_node())
    graph.invoke(asks(), ann())
    [before] = [each.config for each in graph.get_state_history(ann()) if each.next == ("think",)]
    graph.invoke(None, {**ann(), **before})
    turns = desk.turns()
    assert [(turn.number, turn.status) for turn in turns] == [(1, "abandoned"), (2, "interrupted")]
    assert turns[1].forked_from == turns[0].id
    graph.invoke(Command(resume="yes"), ann())
    assert [turn.status for turn in desk.turns()] == ["abandoned", "completed"]


def test_the_checkpoint_at_which_it_waits_is_no_replay(desk: Desk) -> None:
    if not HEARS_STATIC:
        pytest.skip("this langgraph does not tell at which checkpoint a graph stopped")
    graph = desk.compile(in_a_node())
    graph.invoke(asks(), ann())
    here = graph.get_state(ann()).config
    graph.invoke(Command(resume="yes"), {**ann(), **here})
    desk.one_trace()
    assert [turn.status for turn in desk.turns()] == ["completed"]


def test_what_is_no_checkpoint_of_langgraphs_tells_no_time() -> None:
    from turntrace.identity import time_of_checkpoint

    assert time_of_checkpoint("c-42") is None
    assert time_of_checkpoint(str(uuid.uuid4())) is None
    # The example of RFC 9562, A.5: February 22, 2022, 19:22:22 UTC.
    assert time_of_checkpoint("1EC9414C-232A-6B00-B3C8-9F6BDECED846") == 1_645_557_742_000_000_000
