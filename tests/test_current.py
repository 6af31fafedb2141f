"""``current_turn()``: the turn wherever the app's code runs in it, and something false wherever it does not."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.runnables import RunnableLambda
from langchain_core.runnables.config import ContextThreadPoolExecutor
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode
from opentelemetry import trace

from apps import App, Builder, FakeModel, State, asks, calls_a_tool_first, config_of, single
from turntrace import SessionCallbackHandler, current_turn, track_graph
from turntrace import attributes as a
from turntrace.errors import StateError
from turntrace.testing import Capture, assert_all_tagged, captured_spans


@pytest.fixture
def handler(capture: Capture) -> SessionCallbackHandler:
    return SessionCallbackHandler(capture.tracker())


@pytest.fixture(params=["callback", "tracked"])
def run(request: pytest.FixtureRequest, handler: SessionCallbackHandler, capture: Capture) -> Any:
    """Run a graph, and return the id of the one turn that this was."""

    def invoke(builder: Builder, *, is_async: bool = False) -> str:
        tracked = track_graph(builder) if request.param == "tracked" else builder
        graph: Any = tracked.compile(checkpointer=InMemorySaver())
        config = {**config_of(user_id="ann"), "callbacks": [handler]}
        if is_async:
            asyncio.run(graph.ainvoke(asks(), config))
        else:
            graph.invoke(asks(), config)
        assert not current_turn()
        spans = captured_spans(capture.spans())
        assert_all_tagged(spans)
        (root,) = [span for span in spans if span.name == a.SPAN_TURN]
        return str(root.attributes[a.TURN_ID])

    return invoke


def test_where_no_turn_runs_it_is_false_and_takes_everything() -> None:
    nothing = current_turn()
    assert not nothing
    assert (nothing.id, nothing.number, nothing.intent) == ("", 0, None)
    nothing.set_intent("buy")
    nothing.set_answer("5 euros")
    assert nothing.intent is None
    assert repr(nothing) == "<no turn>"


@pytest.mark.parametrize("name", ["set_intent", "set_answer", "end", "aend", "input", "config"])
def test_where_no_turn_runs_it_has_what_a_turn_has(name: str) -> None:
    """Else a node would need an ``if`` in the app's own unit tests."""
    assert hasattr(current_turn(), name)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "sync-under-async"])
def test_in_sync_nodes_tools_and_edges(run: Any, is_async: bool) -> None:
    seen: dict[str, str] = {}

    @tool
    def price_of(item: str) -> str:
        """Look up the price of an item."""
        seen["tool"] = current_turn().id
        return "5 euros"

    def note(name: str, result: Any) -> Any:
        seen[name] = current_turn().id
        return result

    def says(messages: Any) -> Any:
        return note("model", calls_a_tool_first(messages))

    model = FakeModel(says=says)
    builder: Builder = StateGraph(State)
    builder.add_node("agent", lambda state: note("node", {"messages": [model.invoke(state["messages"])]}))
    builder.add_node("tools", ToolNode([price_of]))
    builder.add_conditional_edges(START, lambda state: note("first edge", "agent"), ["agent"])
    builder.add_conditional_edges(
        "agent", lambda state: note("edge", "tools" if state["messages"][-1].tool_calls else END), ["tools", END]
    )
    builder.add_edge("tools", "agent")

    turn_id = run(builder, is_async=is_async)

    assert seen == dict.fromkeys(("node", "tool", "model", "edge", "first edge"), turn_id)


def test_in_async_nodes_tools_and_edges(run: Any) -> None:
    seen: dict[str, str] = {}

    @tool
    async def price_of(item: str) -> str:
        """Look up the price of an item."""
        await asyncio.sleep(0)
        seen["tool"] = current_turn().id
        return "5 euros"

    model = FakeModel(says=calls_a_tool_first)

    async def agent(state: State) -> Any:
        await asyncio.sleep(0)
        seen["node"] = current_turn().id
        return {"messages": [await model.ainvoke(state["messages"])]}

    async def edge(state: Any) -> str:
        await asyncio.sleep(0)
        seen["edge"] = current_turn().id
        return "tools" if state["messages"][-1].tool_calls else END

    builder: Builder = StateGraph(State)
    builder.add_node("agent", agent)
    builder.add_node("tools", ToolNode([price_of]))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", edge, ["tools", END])
    builder.add_edge("tools", "agent")

    turn_id = run(builder, is_async=True)

    assert seen == dict.fromkeys(("node", "tool", "edge"), turn_id)


def test_in_subgraphs_lambdas_and_sequences(run: Any) -> None:
    seen: list[str] = []

    def note(value: Any) -> Any:
        seen.append(current_turn().id)
        return value

    inner: Any = single(lambda state: note(None), "inner").compile(name="helper")

    def work(state: State) -> None:
        inner.invoke({"messages": []})
        (RunnableLambda(note) | RunnableLambda(note)).invoke("x")
        RunnableLambda(note).batch(["x", "y"])

    turn_id = run(single(work))

    assert seen == [turn_id] * 5


def test_in_tasks_and_threads_that_a_node_starts(run: Any) -> None:
    seen: list[str] = []

    def note(*_: Any) -> None:
        seen.append(current_turn().id)

    async def anote() -> None:
        note()

    async def work(state: State) -> None:
        await asyncio.gather(anote(), anote())
        await asyncio.to_thread(note)
        with ContextThreadPoolExecutor() as pool:  # LangChain's own, which takes the context along
            list(pool.map(note, range(2)))

    turn_id = run(single(work), is_async=True)

    assert seen == [turn_id] * 5


def test_in_a_thread_without_the_context_it_is_false(run: Any) -> None:
    seen: list[Any] = []

    def work(state: State) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: seen.append(bool(current_turn()))).result()

    run(single(work))

    assert seen == [False]


def test_a_task_that_outlives_its_turn_is_outside_of_it(handler: SessionCallbackHandler, capture: Capture) -> None:
    seen: list[bool] = []

    async def main() -> None:
        over = asyncio.Event()

        async def later() -> None:
            seen.append(bool(current_turn()))
            await over.wait()
            seen.append(bool(current_turn()))
            seen.append(trace.get_current_span().get_span_context().is_valid)

        tasks: list[asyncio.Task[None]] = []

        async def work(state: State) -> None:
            tasks.append(asyncio.create_task(later()))
            await asyncio.sleep(0)

        graph: Any = single(work).compile()
        await graph.ainvoke(asks(), {**config_of(), "callbacks": [handler]})
        over.set()
        await tasks[0]

    asyncio.run(main())
    assert seen == [True, False, False]


def test_a_run_of_a_task_that_outlives_its_turn_opens_none(handler: SessionCallbackHandler, capture: Capture) -> None:
    """It has a parent: LangChain hands the node's callbacks on to the tasks that the node starts."""
    inner: Any = single(lambda state: None, "inner").compile()

    async def main() -> None:
        over = asyncio.Event()

        async def later() -> None:
            await over.wait()
            await inner.ainvoke(asks())

        tasks: list[asyncio.Task[None]] = []

        async def work(state: State) -> None:
            tasks.append(asyncio.create_task(later()))

        graph: Any = single(work).compile()
        await graph.ainvoke(asks(), {**config_of("c-1"), "callbacks": [handler]})
        over.set()
        await tasks[0]

    asyncio.run(main())
    spans = captured_spans(capture.spans())
    assert_all_tagged(spans)
    assert len([span for span in spans if span.name == a.SPAN_TURN]) == 1
    assert handler.open_runs == 0


def test_what_a_node_says_of_its_turn_is_on_it(run: Any, capture: Capture, handler: SessionCallbackHandler) -> None:
    def work(state: State) -> None:
        current_turn().set_intent("buy tea")

    turn_id = run(single(work))

    (root,) = [span for span in captured_spans(capture.spans()) if span.name == a.SPAN_TURN]
    assert root.attributes[a.TURN_INTENT] == "buy tea"
    ((row, _),) = handler.tracker.ledger.turns(str(root.attributes[a.SESSION_ID]))
    assert (row.id, row.intent) == (turn_id, "buy tea")


# --- blocks -----------------------------------------------------------------------------------------------------------
def test_in_a_block_and_in_none_around_it(handler: SessionCallbackHandler) -> None:
    with handler.tracker.session() as session:
        assert not current_turn()
        with session.conversation("c-1").turn("Hi") as turn:
            assert current_turn() is turn
            assert trace.get_current_span().get_span_context().trace_id == int(turn.id, 16)
        assert not current_turn()
        assert not trace.get_current_span().get_span_context().is_valid


def test_blocks_within_blocks(handler: SessionCallbackHandler) -> None:
    session = handler.tracker.start_session()
    with session.conversation("c-1").turn("Hi") as outer:
        with session.conversation("c-2").turn("Hi") as inner:
            assert current_turn() is inner
        assert current_turn() is outer
    assert not current_turn()


def test_blocks_left_in_another_order(handler: SessionCallbackHandler) -> None:
    session = handler.tracker.start_session()
    first, second = session.conversation("c-1").turn("Hi"), session.conversation("c-2").turn("Hi")
    one = first.__enter__()
    two = second.__enter__()
    first.__exit__(None, None, None)
    assert current_turn() is two
    second.__exit__(None, None, None)
    assert one.is_finished
    assert not current_turn()
    assert not trace.get_current_span().get_span_context().is_valid


def test_restored_when_an_error_leaves_the_block(handler: SessionCallbackHandler) -> None:
    session = handler.tracker.start_session()
    with pytest.raises(KeyError), session.conversation("c-1").turn("Hi"):
        raise KeyError
    assert not current_turn()


def test_a_block_in_each_of_parallel_tasks(handler: SessionCallbackHandler) -> None:
    session = handler.tracker.start_session()

    async def sitting(number: int) -> None:
        async with session.conversation(f"c-{number}").turn("Hi") as turn:
            for _ in range(3):
                await asyncio.sleep(0)
                assert current_turn() is turn
        assert not current_turn()

    async def main() -> None:
        await asyncio.gather(*map(sitting, range(10)))

    asyncio.run(main())


def test_a_block_does_not_reach_into_other_threads(handler: SessionCallbackHandler) -> None:
    seen: list[bool] = []
    with handler.tracker.session() as session, session.conversation("c-1").turn("Hi"):
        thread = threading.Thread(target=lambda: seen.append(bool(current_turn())))
        thread.start()
        thread.join()
    assert seen == [False]


def test_a_turn_has_one_block(handler: SessionCallbackHandler) -> None:
    with handler.tracker.session() as session, session.conversation("c-1").turn("Hi") as turn:
        with pytest.raises(StateError, match="is entered already"):
            turn.__enter__()
        assert current_turn() is turn


def test_the_turn_of_a_block_is_told_what_the_graph_answered(handler: SessionCallbackHandler, capture: Capture) -> None:
    graph: Any = App().tools().compile()
    with handler.tracker.session() as session, session.conversation("c-1").turn("Hi") as turn:
        graph.invoke(turn.input)

    (root,) = [span for span in captured_spans(capture.spans()) if span.name == a.SPAN_TURN]
    assert root.attributes[a.TURN_INPUT_LENGTH] == 2
    assert root.attributes[a.TURN_OUTPUT_LENGTH] == len("The price is 5 euros for tea.")


def test_what_the_sdk_tells_of_a_span_is_told_of_the_current_one(handler: SessionCallbackHandler) -> None:
    """Apps read the current span's attributes and name; without turntrace that is the SDK's span of their server."""
    seen: list[Any] = []

    def node(state: State) -> Any:
        span: Any = trace.get_current_span()
        seen.extend((span.name, span.attributes[a.SESSION_ID], span.parent.span_id, span.context.trace_id))
        seen.append((hasattr(span, "no_such_thing"), hasattr(span, "_no_such_thing")))

    graph: Any = single(node).compile()
    graph.invoke(asks(), {**config_of(session_id="mine"), "callbacks": [handler]})
    assert seen[:2] == ["work", "mine"]
    assert all(seen[2:4])
    assert seen[4] == (False, False)
