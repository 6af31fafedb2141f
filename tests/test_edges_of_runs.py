"""Runs that do not go as drawn: streams that are left, states that are edited, tasks that outlive nodes, caches."""

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.cache.memory import InMemoryCache
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import CachePolicy, Command, RetryPolicy, Send, interrupt
from opentelemetry import trace

from apps import Builder, FakeModel, State, asks, config_of, line
from turntrace import ConversationState, SessionCallbackHandler, track_graph, track_node
from turntrace import attributes as a
from turntrace.records import LLMCall, TurnSummary, Usage
from turntrace.testing import Capture, assert_all_tagged, captured_spans, format_tree, outbox_spans, span_tree

ASYNC = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
FAST = RetryPolicy(initial_interval=0.001, jitter=False, retry_on=ValueError)


class Desk:
    """A tracker, its handler, and what became of the runs."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.tracker = capture.tracker()
        self.handler = SessionCallbackHandler(self.tracker)

    def compile(self, builder: Builder, **options: Any) -> Any:
        return builder.compile(checkpointer=InMemorySaver(), **options).with_config(callbacks=[self.handler])

    def turns(self) -> list[TurnSummary]:
        self.tracker.flush()
        return [turn for each in self.tracker.ledger.sessions() for turn, _ in self.tracker.ledger.turns(each.id)]

    def turn(self) -> TurnSummary:
        """Return the only turn, after it was seen that all is tagged and nothing is open."""
        [turn] = self.turns()
        assert_all_tagged(self.capture.spans())
        assert self.handler.open_runs == 0
        return turn

    def tree(self) -> str:
        return format_tree(
            span_tree([span for span in captured_spans(self.capture.spans()) if span.name != "session.start"])
        )


@pytest.fixture
def desk(capture: Capture) -> Desk:
    return Desk(capture)


def ask(_state: State) -> dict[str, Any]:
    return {"messages": [("ai", f"You said {interrupt('Really?')}.")]}


def says(text: str) -> Any:
    return lambda _state: {"messages": [("ai", text)]}


# --- whoever reads the stream leaves it at the question ---------------------------------------------------------------
@ASYNC
@pytest.mark.parametrize("mode", ["updates", "values", ["updates", "messages"]], ids=str)
def test_a_stream_that_is_left_at_the_question_is_one_turn_with_the_answer(
    mode: Any, is_async: bool, desk: Desk
) -> None:
    graph = desk.compile(line(("ask", ask)))

    def read() -> None:
        parts = graph.stream(asks(), config_of("c1"), stream_mode=mode)
        next(part for part in parts if "__interrupt__" in str(part))
        parts.close()

    async def aread() -> None:
        parts = graph.astream(asks(), config_of("c1"), stream_mode=mode)
        async for part in parts:
            if "__interrupt__" in str(part):
                break
        await parts.aclose()

    if is_async:
        asyncio.run(aread())
    else:
        read()
    assert [(turn.status, turn.error) for turn in desk.turns()] == [("interrupted", None)]
    graph.invoke(Command(resume="yes"), config_of("c1"))
    assert (desk.turn().status, desk.turn().agent_runs) == ("completed", 2)


def test_a_model_that_is_called_after_the_question_leaves_the_turn_waiting(desk: Desk) -> None:
    graph = desk.compile(line(("ask", ask)))
    with desk.tracker.session(user_id="ann") as session:
        conversation = session.conversation("c1")
        with conversation.turn("Hi") as turn:
            graph.invoke(turn.input, turn.config)
            FakeModel().invoke("phrase the question")
        assert [each.status for each in desk.turns()] == ["interrupted"]
        with conversation.resume_turn() as turn:
            graph.invoke(Command(resume="yes"), turn.config)
    assert (desk.turn().status, desk.turn().llm_calls, desk.turn().agent_runs) == ("completed", 1, 2)


def test_a_tool_that_asks_is_one_call(desk: Desk) -> None:
    @tool
    def refund(amount: int) -> str:
        """Pay it back."""
        return f"{amount}: {interrupt('May I?')}"

    call = AIMessage("", tool_calls=[{"name": "refund", "args": {"amount": 5}, "id": "c1"}])
    graph = desk.compile(line(("call", lambda _state: {"messages": [call]}), ("tools", ToolNode([refund]))))
    graph.invoke(asks(), config_of("c1"))
    graph.invoke(Command(resume="yes"), config_of("c1"))
    assert (desk.turn().status, desk.turn().tool_calls) == ("completed", 1)


def test_what_describes_an_output_is_not_asked_about_a_question(capture: Capture) -> None:
    class Asked(ConversationState, total=False):
        question: str
        answer: str

    tracker = capture.tracker()
    described: list[Any] = []

    def answer_in(state: Any) -> str:
        described.append(state)
        return str(state["answer"])

    handler = SessionCallbackHandler(tracker, describe_input=lambda given: given["question"], describe_output=answer_in)
    builder: Builder = StateGraph(Asked)
    builder.add_node("ask", lambda _state: {"answer": interrupt("?")})
    builder.add_edge(START, "ask")
    graph: Any = builder.compile(checkpointer=InMemorySaver()).with_config(callbacks=[handler])
    graph.invoke({"question": "how long?"}, config_of("c1"))
    assert described == []
    graph.invoke(Command(resume="12345"), config_of("c1"))
    tracker.flush()
    [session] = tracker.ledger.sessions()
    [(turn, _)] = tracker.ledger.turns(session.id)
    assert (len(described), turn.input_length, turn.output_length) == (1, len("how long?"), 5)


# --- a graph as a part of a chain -------------------------------------------------------------------------------------
@ASYNC
def test_a_graph_in_a_chain_waits_and_goes_on_as_one_turn(is_async: bool, desk: Desk) -> None:
    graph = line(("ask", ask)).compile(checkpointer=InMemorySaver())
    chain = (graph | RunnableLambda(lambda state: state["messages"][-1].content)).with_config(callbacks=[desk.handler])
    config: Any = {"configurable": {"thread_id": "c1"}, "metadata": {"conversation_id": "c1"}}
    given: list[Any] = [asks(), Command(resume="yes")]
    status = []
    for each in given:
        asyncio.run(chain.ainvoke(each, config)) if is_async else chain.invoke(each, config)
        status.append([turn.status for turn in desk.turns()])
    assert status == [["interrupted"], ["completed"]]
    assert desk.turn().agent_runs == 2


# --- a state that is edited -------------------------------------------------------------------------------------------
@ASYNC
def test_editing_the_state_of_a_turn_that_waits_is_no_turn(is_async: bool, desk: Desk) -> None:
    builder = line(("agent", says("Shall I?")))
    builder.add_node("act", says("Done."))
    builder.add_conditional_edges("agent", lambda _state: "act", ["act"])
    asks_then: Any = ask
    builder.add_node("asks", asks_then)
    builder.add_edge("act", "asks")
    graph = desk.compile(builder)
    graph.invoke(asks(), config_of("c1"))
    edit = {"messages": [("ai", "edited")]}
    if is_async:
        asyncio.run(graph.aupdate_state(config_of("c1"), edit, as_node="agent"))
    else:
        graph.update_state(config_of("c1"), edit, as_node="agent")
    assert [(turn.number, turn.status) for turn in desk.turns()] == [(1, "interrupted")]
    graph.invoke(Command(resume="yes"), config_of("c1"))
    assert "UpdateState" not in desk.tree()
    assert desk.handler.open_runs == 0


def test_a_message_to_the_newest_checkpoint_is_no_fork_and_one_to_an_older_is(desk: Desk) -> None:
    graph = desk.compile(line(("agent", says("ok"))))
    checkpoints: list[Any] = []
    for _ in range(3):  # as a front end does, which names the checkpoint that it shows
        config = config_of("c1") if not checkpoints else {"configurable": checkpoints[-1]["configurable"]}
        graph.invoke(asks(), config)
        checkpoints.append(graph.get_state(config_of("c1")).config)
    graph.invoke(asks(), {"configurable": checkpoints[0]["configurable"]})
    turns = desk.turns()
    assert [turn.forked_from for turn in turns] == [None, None, None, turns[0].id]


# --- what a node leaves running ---------------------------------------------------------------------------------------
def test_a_task_that_outlives_its_node_belongs_to_the_turn(desk: Desk) -> None:
    own = desk.capture.provider.get_tracer("app")
    tasks: list[asyncio.Task[None]] = []
    second_began = asyncio.Event()

    async def remember() -> None:
        await second_began.wait()
        with own.start_as_current_span("write"):
            await FakeModel().ainvoke("remember this")

    async def one(_state: State) -> dict[str, Any]:
        tasks.append(asyncio.create_task(remember()))
        return {"messages": [("ai", "1")]}

    async def two(_state: State) -> dict[str, Any]:
        second_began.set()
        await tasks[0]
        return {"messages": [("ai", "2")]}

    async def main() -> None:
        await desk.compile(line(("one", one), ("two", two))).ainvoke(asks(), config_of("c1"))

    asyncio.run(main())
    assert (desk.turn().llm_calls, desk.turn().output_length) == (1, 1)
    tree = desk.tree()
    assert "\n  write" in tree
    assert "gpt-4o-mini" in tree


def test_a_task_that_outlives_its_turn_is_no_part_of_the_next(desk: Desk) -> None:
    own = desk.capture.provider.get_tracer("app")
    goes_on = asyncio.Event()
    tasks: list[asyncio.Task[trace.SpanContext]] = []

    async def late() -> trace.SpanContext:
        await goes_on.wait()
        with own.start_as_current_span("late") as span:
            return span.get_span_context()

    async def node(_state: State) -> dict[str, Any]:
        if not tasks:
            tasks.append(asyncio.create_task(late()))
        else:
            goes_on.set()
            await tasks[0]
        return {"messages": [("ai", "ok")]}

    async def main() -> trace.SpanContext:
        graph = desk.compile(line(("node", node)))
        for _ in range(2):
            await graph.ainvoke(asks(), config_of("c1"))
        return await tasks[0]

    context = asyncio.run(main())
    assert context.trace_id not in {int(str(turn.trace_id), 16) for turn in desk.turns()}
    [span] = [span for span in captured_spans(desk.capture.spans()) if span.name == "late"]
    assert a.TURN_ID not in span.attributes


def test_a_call_that_ends_after_its_session_is_in_the_totals_that_were_sent(capture: Capture) -> None:
    tracker = capture.tracker(outbox=True)
    session = tracker.start_session(user_id="ann")
    turn = session.conversation("c1").start_turn("Hi")
    turn.end()
    session.end()
    tracker.flush()
    step = turn.open_step("gpt-4o-mini", "generation")  # of a task that outlives the turn
    turn.close_step(step, call=LLMCall("gpt-4o-mini", "openai", Usage(100, 20)))
    tracker.flush()
    assert session.summary().total_tokens == 120
    scores = [json.loads(item.body) for item in tracker.ledger.outbox() if item.kind == "score"]
    assert [score["value"] for score in scores if score["name"] == a.SESSION_TOTAL_TOKENS][-1] == 120
    ends = [span for span in outbox_spans(tracker.ledger) if span.name == a.SPAN_SESSION_END]
    assert ends[-1].attributes[a.SESSION_TOTAL_TOKENS] == 120


def test_an_error_beside_a_question_ends_the_wait(desk: Desk) -> None:
    def fails(_state: State) -> dict[str, Any]:
        raise ValueError("no")

    builder: Builder = StateGraph(State)
    nodes: dict[str, Any] = {"ask": ask, "fails": fails}
    for name, node in nodes.items():
        builder.add_node(name, node)
        builder.add_edge(START, name)
    graph = desk.compile(builder)
    with desk.tracker.session(user_id="ann") as session, session.conversation("c1").turn("Hi") as turn:
        with pytest.raises(ValueError, match="no"):
            graph.invoke(turn.input, turn.config)
        turn.set_answer("Sorry, that failed.")
    assert [turn.status for turn in desk.turns()] == ["completed"]


# --- attempts in long turns -------------------------------------------------------------------------------------------
def test_attempts_among_hundreds_of_nodes_are_warnings(desk: Desk) -> None:
    tried: Counter[int] = Counter()

    def work(state: Any) -> dict[str, Any]:
        tried[state["n"]] += 1
        if tried[state["n"]] == 1:
            raise ValueError("not yet")
        return {}

    builder: Builder = StateGraph(State)
    builder.add_node("work", work, retry_policy=FAST)
    builder.add_conditional_edges(START, lambda _state: [Send("work", {"n": n}) for n in range(250)], ["work"])
    builder.add_edge("work", END)
    desk.compile(builder).invoke(asks(), {**config_of("c1"), "max_concurrency": 16})
    assert desk.turn().status == "completed"
    spans = [span for span in captured_spans(desk.capture.spans()) if span.name == "work"]
    seen = Counter(
        (span.attributes.get(a.TURN_ATTEMPT), span.attributes.get(a.LANGFUSE_OBSERVATION_LEVEL)) for span in spans
    )
    assert seen == {(None, "WARNING"): 250, (2, None): 250}


def test_what_failed_inside_of_an_attempt_is_a_warning_too(desk: Desk) -> None:
    calls = iter(range(100))

    def inner(_state: State) -> dict[str, Any]:
        if next(calls) == 0:
            raise ValueError("not yet")
        return {"messages": [("ai", "in")]}

    builder: Builder = StateGraph(State)
    builder.add_node("sub", line(("inner", inner)).compile(), retry_policy=FAST)
    builder.add_edge(START, "sub")
    desk.compile(builder).invoke(asks(), config_of("c1"))
    assert desk.turn().status == "completed"
    levels = [
        (span.name, span.attributes[a.LANGFUSE_OBSERVATION_LEVEL])
        for span in captured_spans(desk.capture.spans())
        if a.LANGFUSE_OBSERVATION_LEVEL in span.attributes
    ]
    assert sorted(levels) == [("LangGraph", "WARNING"), ("inner", "WARNING"), ("sub", "WARNING")]


# --- caches of nodes --------------------------------------------------------------------------------------------------
CACHED = CachePolicy(key_func=lambda state: str(state["messages"][-1].content))


def answers(app: Any, user: str) -> Any:
    return app.invoke(asks(), config_of(user, user_id=user))


def test_tracked_nodes_of_two_graphs_on_one_cache_are_told_apart(desk: Desk) -> None:
    cache = InMemoryCache[Any]()

    def billing(_state: State) -> dict[str, Any]:
        return {"messages": [("ai", "from billing")]}

    def support(_state: State) -> dict[str, Any]:
        return {"messages": [("ai", "from support")]}

    said = []
    nodes: list[Any] = [billing, support]
    for node in nodes:
        builder: Builder = StateGraph(State)
        builder.add_node("answer", node, cache_policy=CACHED)
        builder.add_edge(START, "answer")
        said.append(answers(desk.compile(track_graph(builder), cache=cache), "ann")["messages"][-1].content)
    assert said == ["from billing", "from support"]


@pytest.mark.parametrize("how", ["track_graph", "track_node"])
def test_a_cache_gives_nobody_the_ids_of_another(how: str, desk: Desk) -> None:
    def node(_state: State) -> dict[str, Any]:
        return {"messages": [("ai", "the same for all")]}

    builder: Builder = StateGraph(State)
    builder.add_node("answer", track_node(node) if how == "track_node" else node, cache_policy=CACHED)
    builder.add_edge(START, "answer")
    graph = desk.compile(track_graph(builder), cache=InMemoryCache())
    given = {user: answers(graph, user) for user in ("ann", "bob")}
    assert [state["messages"][-1].content for state in given.values()] == ["the same for all"] * 2
    for turn in desk.turns():
        assert given[turn.conversation_id]["turn_id"] in ("", turn.id)
