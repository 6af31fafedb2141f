"""Turns that do not end well: left streams, cancelled tasks, nodes that raise. Nothing stays open, nothing is told."""

import asyncio
import gc
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.errors import GraphRecursionError
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import RetryPolicy, interrupt
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from apps import App, Builder, FakeModel, State, asks, calls_a_tool_first, config_of, for_events, single
from turntrace import SessionCallbackHandler, SessionTracker, current_turn, track_graph
from turntrace import attributes as a
from turntrace.records import Step, TurnSummary
from turntrace.testing import Capture, CapturedSpan, assert_all_tagged, captured_spans, outbox_spans

SECRET = "ann@example.com has no credit"


class OpenSpans(SpanProcessor):
    """Knows which spans have begun and not ended."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        context = span.get_span_context()
        assert context is not None
        self.names[context.span_id] = span.name

    def on_end(self, span: ReadableSpan) -> None:
        assert span.context is not None
        del self.names[span.context.span_id]


class Bench:
    """A tracker whose ledger is a file, and all that is to be looked at afterwards."""

    def __init__(self, capture: Capture, path: Path, tracked: bool) -> None:
        self.capture = capture
        self.path = path
        self.tracked = tracked
        self.open_spans = OpenSpans()
        capture.provider.add_span_processor(self.open_spans)
        self.tracker: SessionTracker = capture.tracker(f"sqlite:///{path}", outbox=True)
        self.handler = SessionCallbackHandler(self.tracker)

    def compile(self, builder: Builder) -> Any:
        builder = track_graph(builder) if self.tracked else builder
        return builder.compile(checkpointer=InMemorySaver()).with_config(callbacks=[self.handler])

    def spans(self) -> list[CapturedSpan]:
        return captured_spans(self.capture.spans())

    def span(self, name: str) -> CapturedSpan:
        (found,) = [span for span in self.spans() if span.name == name]
        return found

    def rows(self) -> list[tuple[TurnSummary, list[Step]]]:
        self.tracker.flush()
        ids = [summary.id for summary in self.tracker.ledger.sessions()]
        return [row for session_id in ids for row in self.tracker.ledger.turns(session_id)]

    def row(self) -> tuple[TurnSummary, list[Step]]:
        (row,) = self.rows()
        return row

    def nothing_is_open(self) -> None:
        """Assert that no span, no run, no turn and no context is open."""
        spans = self.spans()
        assert_all_tagged(spans)
        assert self.open_spans.names == {}
        assert self.handler.open_runs == 0
        assert not trace.get_current_span().get_span_context().is_valid
        assert not current_turn()
        for row, _ in self.rows():
            assert row.ended_ns is not None, "a turn is open in the ledger"
            assert self.tracker.live_turn(row.id) is None
        turns = {span.attributes[a.TURN_ID] for span in spans if a.TURN_ID in span.attributes}
        assert turns == {row.id for row, _ in self.rows()}

    def everything(self) -> bytes:
        """Return all that was exported or stored."""
        spans = "".join(span.to_json() for span in self.capture.spans())
        files = [path.read_bytes() for path in self.path.parent.glob(self.path.name + "*")]
        return spans.encode() + b"".join(files)

    def ended_as(self, status: str, error: str | None) -> None:
        """Assert that there is one turn, and that it ended like this."""
        self.nothing_is_open()
        row, _ = self.row()
        assert (row.status, row.error) == (status, error)
        root = self.span(a.SPAN_TURN).attributes
        assert root[a.TURN_STATUS] == status
        assert root.get(a.ERROR_TYPE) == (error if status in ("failed", "abandoned") else None)
        assert SECRET.encode() not in self.everything()


@pytest.fixture(params=[False, True], ids=["callback", "tracked"])
def is_tracked(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=["callback", "tracked"])
def bench(request: pytest.FixtureRequest, capture: Capture, tmp_path: Path) -> Bench:
    return Bench(capture, tmp_path / "bench.db", request.param == "tracked")


# --- streams that are left --------------------------------------------------------------------------------------------
def test_a_stream_that_is_closed(bench: Bench) -> None:
    stream = bench.compile(App().tools()).stream(asks(), config_of(user_id="ann"))
    next(stream)

    stream.close()

    bench.ended_as("abandoned", "GeneratorExit")
    assert bench.span(a.SPAN_TURN).attributes[a.LANGFUSE_OBSERVATION_LEVEL] == "WARNING"


def test_a_stream_that_is_dropped(bench: Bench) -> None:
    stream = bench.compile(App().tools()).stream(asks(), config_of(user_id="ann"), stream_mode="messages")
    next(stream)

    del stream
    gc.collect()

    bench.ended_as("abandoned", "GeneratorExit")


def test_a_stream_that_was_never_read(bench: Bench) -> None:
    bench.compile(App().tools()).stream(asks(), config_of(user_id="ann"))
    gc.collect()

    assert bench.rows() == []
    assert bench.handler.open_runs == 0


@pytest.mark.parametrize("is_async", [False, True], ids=["sync-nodes", "async-nodes"])
def test_an_async_stream_that_is_closed(bench: Bench, is_async: bool) -> None:
    graph = bench.compile(App(is_async=is_async).tools())

    async def main() -> None:
        stream = graph.astream(asks(), config_of(user_id="ann"))
        await anext(stream)
        await stream.aclose()
        assert not current_turn()
        assert not trace.get_current_span().get_span_context().is_valid

    asyncio.run(main())
    bench.ended_as("abandoned", "GeneratorExit")


def test_an_async_stream_that_is_dropped(bench: Bench) -> None:
    graph = bench.compile(App(is_async=True, model=FakeModel(delay=0.002)).tools())

    async def main() -> None:
        stream = graph.astream(asks(), config_of(user_id="ann"), stream_mode="messages")
        await anext(stream)
        del stream
        gc.collect()
        await asyncio.sleep(0.02)

    asyncio.run(main())
    bench.nothing_is_open()
    assert bench.row()[0].status == "abandoned"


def test_a_stream_of_events_that_is_left(bench: Bench) -> None:
    graph = bench.compile(App(is_async=True).tools())
    config = config_of(user_id="ann") | for_events(bench.handler)

    async def main() -> None:
        events = graph.astream_events(asks(), config, version="v2")
        async for event in events:
            if event["event"] == "on_chat_model_start":
                break
        await events.aclose()

    asyncio.run(main())
    bench.nothing_is_open()
    assert bench.row()[0].status == "abandoned"


def test_a_session_goes_on_after_a_turn_that_was_left(bench: Bench) -> None:
    graph, config = bench.compile(App().tools()), config_of("c-1", user_id="ann")
    stream = graph.stream(asks(), config)
    next(stream)
    stream.close()

    graph.invoke(asks(), config)

    bench.nothing_is_open()
    assert [(row.number, row.status) for row, _ in bench.rows()] == [(1, "abandoned"), (2, "completed")]
    assert len({row.session_id for row, _ in bench.rows()}) == 1


# --- tasks that are cancelled -----------------------------------------------------------------------------------------
def cancel_when(graph: Any, started: threading.Event) -> None:
    """Run a graph in a task, and cancel it once something has started."""

    async def main() -> None:
        task = asyncio.create_task(graph.ainvoke(asks(), config_of(user_id="ann")))
        while not started.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not current_turn()

    asyncio.run(main())


def test_a_task_cancelled_while_a_node_runs(bench: Bench) -> None:
    started = threading.Event()

    async def work(state: State) -> None:
        started.set()
        await asyncio.sleep(30)

    cancel_when(bench.compile(single(work)), started)

    bench.ended_as("abandoned", "CancelledError")
    assert bench.span("work").attributes[a.ERROR_TYPE] == "CancelledError"


def test_a_task_cancelled_while_nodes_run_side_by_side(bench: Bench) -> None:
    started = [threading.Event() for _ in range(3)]
    builder: Builder = StateGraph(State)

    def waits(event: threading.Event) -> Any:
        async def work(state: State) -> None:
            event.set()
            await asyncio.sleep(30)

        return work

    for number, event in enumerate(started):
        builder.add_node(f"work {number}", waits(event))
        builder.add_edge(START, f"work {number}")

    cancel_when(bench.compile(builder), started[-1])

    bench.ended_as("abandoned", "CancelledError")


def test_a_task_cancelled_while_a_model_is_called(bench: Bench) -> None:
    started = threading.Event()
    graph = bench.compile(App(is_async=True, model=FakeModel(delay=30, started=started)).child())

    cancel_when(graph, started)

    bench.ended_as("abandoned", "CancelledError")
    assert bench.row()[0].llm_calls == 1


def test_a_task_cancelled_while_a_model_streams(bench: Bench) -> None:
    graph = bench.compile(App(is_async=True, model=FakeModel(says=lambda _: "word " * 500, delay=0.05)).child())

    async def main() -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in graph.astream(asks(), config_of(user_id="ann"), stream_mode="messages"):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    bench.nothing_is_open()
    row, steps = bench.row()
    assert row.status == "abandoned"
    assert row.time_to_first_token_ms is not None
    assert "generation" in {step.kind for step in steps}


def test_a_turn_that_takes_too_long(bench: Bench) -> None:
    limits: list[asyncio.Timeout] = []

    async def work(state: State) -> None:
        limits[0].reschedule(asyncio.get_running_loop().time() + 0.03)
        await asyncio.sleep(30)

    graph = bench.compile(single(work))

    async def main() -> None:
        async with asyncio.timeout(None) as limit:
            limits.append(limit)
            await graph.ainvoke(asks(), config_of(user_id="ann"))

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    bench.ended_as("abandoned", "CancelledError")


def test_a_sync_node_that_goes_on_after_its_task_was_cancelled_opens_no_turn(bench: Bench) -> None:
    started, goes_on, over = threading.Event(), threading.Event(), threading.Event()

    def work(state: State) -> Any:
        started.set()
        goes_on.wait(5)
        try:
            return {"messages": [FakeModel().invoke(state["messages"])]}
        finally:
            over.set()

    graph = bench.compile(single(work))

    async def main() -> None:
        task = asyncio.create_task(graph.ainvoke(asks(), config_of(user_id="ann")))
        while not started.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        goes_on.set()
        while not over.is_set():
            await asyncio.sleep(0.001)

    asyncio.run(main())
    row, _ = bench.row()  # what the thread did afterwards is no turn of its own
    assert bench.handler.open_runs == 0
    assert (row.status, row.llm_calls, row.input_tokens, row.output_tokens) == ("abandoned", 1, 100, 20)


@pytest.mark.parametrize("how", ["cancelled", "in the background", "beside a node that raises"])
def test_what_a_call_used_is_on_record_though_nobody_waited_for_it(how: str, tmp_path: Path, is_tracked: bool) -> None:
    """A client that has gone, a task that writes memories: what the model's provider was asked for is to be paid."""
    model, goes_on = FakeModel(delay=0.05, started=threading.Event()), threading.Event()
    waits: list[Any] = []

    def call(state: State) -> Any:
        try:
            return {"messages": [model.invoke(state["messages"])]}
        finally:
            goes_on.set()

    async def begins(state: State) -> Any:
        waits.append(asyncio.create_task(model.ainvoke(state["messages"])))
        await asyncio.sleep(0)
        return {"messages": [AIMessage("Done.")]}

    async def raises(_: State) -> Any:
        while not model.started.is_set():  # type: ignore[union-attr]
            await asyncio.sleep(0.001)
        raise ValueError

    builder: Any = single(begins if how == "in the background" else call)
    if how == "beside a node that raises":
        builder.add_node("raises", raises).add_edge(START, "raises")
    tracker = SessionTracker(f"sqlite:///{tmp_path}/ledger.db", user_hash_key="a key of the tests")
    graph: Any = (track_graph(builder) if is_tracked else builder).compile()
    config: Any = {**config_of("c", user_id="ann"), "callbacks": [SessionCallbackHandler(tracker)]}

    async def main() -> None:
        task = asyncio.create_task(graph.ainvoke(asks(), config))
        if how == "cancelled":
            while not model.started.is_set():  # type: ignore[union-attr]
                await asyncio.sleep(0.001)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        tracker.flush()  # the turn has been written down, and the call has not ended
        await asyncio.gather(*waits)
        while not waits and not goes_on.is_set():
            await asyncio.sleep(0.001)

    asyncio.run(main())
    assert tracker.flush()
    [session] = tracker.ledger.sessions()
    [(row, _)] = tracker.ledger.turns(session.id)
    assert (row.llm_calls, row.input_tokens, row.output_tokens, row.unpriced_calls) == (1, 100, 20, 0)
    assert (session.llm_calls, session.total_tokens, session.total_cost_usd) == (1, 120, row.cost_usd)
    spans = {span.span_id: span for span in outbox_spans(tracker.ledger) if a.TURN_ID in span.attributes}
    assert_all_tagged(spans.values())
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        assert connection.execute("SELECT spans FROM turntrace_turns").fetchone() == (len(spans),)
    [call_span] = [span for span in spans.values() if span.attributes[a.LANGFUSE_OBSERVATION_TYPE] == "generation"]
    assert call_span.attributes[a.GEN_AI_INPUT_TOKENS] == 100
    [root] = [span for span in spans.values() if span.name == a.SPAN_TURN]
    assert root.attributes[a.TURN_INPUT_TOKENS] == 100
    tracker.shutdown()


# --- nodes that raise -------------------------------------------------------------------------------------------------
def failing(_state: Any) -> Any:
    raise ValueError(SECRET)


async def afailing(_state: Any) -> Any:
    await asyncio.sleep(0)
    raise ValueError(SECRET)


@pytest.mark.parametrize("node", [failing, afailing], ids=["sync", "async"])
def test_a_node_that_raises(bench: Bench, node: Any) -> None:
    graph = bench.compile(single(node))

    with pytest.raises(ValueError, match="no credit"):
        asyncio.run(graph.ainvoke(asks(), config_of(user_id="ann")))

    bench.ended_as("failed", "ValueError")
    assert bench.span("work").attributes[a.ERROR_TYPE] == "ValueError"
    assert bench.span("work").attributes[a.LANGFUSE_OBSERVATION_LEVEL] == "ERROR"
    assert bench.span("work").attributes[a.LANGFUSE_STATUS_MESSAGE] == "ValueError"
    assert bench.span(a.SPAN_TURN).attributes[a.TURN_OUTPUT_TYPE] == "error"


@pytest.mark.parametrize("way", ["invoke", "stream", "batch"])
def test_a_sync_node_that_raises(bench: Bench, way: str) -> None:
    graph = bench.compile(single(failing))

    def run() -> None:
        if way == "batch":
            graph.batch([asks()], [config_of(user_id="ann")])
        else:
            list(getattr(graph, way)(asks(), config_of(user_id="ann")))

    with pytest.raises(ValueError, match="no credit"):
        run()

    bench.ended_as("failed", "ValueError")


def test_a_batch_of_which_one_fails(bench: Bench) -> None:
    def picky(state: State) -> None:
        if state["messages"][-1].content == "fail":
            raise ValueError(SECRET)

    graph = bench.compile(single(picky))
    texts = ["one", "fail", "three"]

    results = graph.batch(
        [asks(text) for text in texts], [config_of(text, user_id=text) for text in texts], return_exceptions=True
    )

    assert [isinstance(result, ValueError) for result in results] == [False, True, False]
    bench.nothing_is_open()
    assert {row.conversation_id: row.status for row, _ in bench.rows()} == {
        "one": "completed",
        "fail": "failed",
        "three": "completed",
    }


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_one_of_several_nodes_side_by_side_raises(bench: Bench, is_async: bool) -> None:
    def slow(_state: State) -> None:
        time.sleep(0.02)

    async def aslow(_state: State) -> None:
        await asyncio.sleep(0.02)

    builder: Builder = StateGraph(State)
    nodes: dict[str, Any] = {"slow": aslow if is_async else slow, "bad": afailing if is_async else failing}
    for name, node in nodes.items():
        builder.add_node(name, node)
        builder.add_edge(START, name)
    graph = bench.compile(builder)

    def run() -> None:
        if is_async:
            asyncio.run(graph.ainvoke(asks(), config_of(user_id="ann")))
        else:
            graph.invoke(asks(), config_of(user_id="ann"))

    with pytest.raises(ValueError, match="no credit"):
        run()

    bench.ended_as("failed", "ValueError")


def test_a_model_that_raises(bench: Bench) -> None:
    graph = bench.compile(App(model=FakeModel(fails=ConnectionError(SECRET))).child())

    with pytest.raises(ConnectionError):
        graph.invoke(asks(), config_of(user_id="ann"))

    bench.ended_as("failed", "ConnectionError")
    assert bench.span("gpt-4o-mini").attributes[a.ERROR_TYPE] == "ConnectionError"
    assert bench.row()[0].llm_calls == 1


def test_a_model_that_raises_after_its_first_word(bench: Bench) -> None:
    graph = bench.compile(App(model=FakeModel(fails=ConnectionError(SECRET))).child())

    with pytest.raises(ConnectionError):
        list(graph.stream(asks(), config_of(user_id="ann"), stream_mode="messages"))

    bench.ended_as("failed", "ConnectionError")


def test_a_tool_that_raises_and_is_told_to_the_model(bench: Bench) -> None:
    """An error that the app handles is one of the tool, not of the turn."""

    @tool
    def price_of(item: str) -> str:
        """Look up the price of an item."""
        raise LookupError(SECRET)

    model = FakeModel(says=calls_a_tool_first)
    builder: Builder = StateGraph(State)
    builder.add_node("agent", lambda state: {"messages": [model.invoke(state["messages"])]})
    builder.add_node("tools", ToolNode([price_of], handle_tool_errors="It cannot be looked up."))
    builder.add_edge(START, "agent")
    builder.add_conditional_edges("agent", lambda state: "tools" if state["messages"][-1].tool_calls else END)
    builder.add_edge("tools", "agent")

    bench.compile(builder).invoke(asks(), config_of(user_id="ann"))

    bench.ended_as("completed", None)
    assert bench.span("price_of").attributes[a.ERROR_TYPE] == "LookupError"
    assert bench.row()[0].tool_calls == 1


def test_an_edge_that_raises(bench: Bench) -> None:
    builder: Builder = StateGraph(State)
    builder.add_node("work", lambda state: None)
    builder.add_edge(START, "work")
    builder.add_conditional_edges("work", failing, [END])

    with pytest.raises(ValueError, match="no credit"):
        bench.compile(builder).invoke(asks(), config_of(user_id="ann"))

    bench.ended_as("failed", "ValueError")


def test_a_subgraph_that_raises(bench: Bench) -> None:
    graph = bench.compile(single(single(failing, "inner").compile(name="helper")))

    with pytest.raises(ValueError, match="no credit"):
        graph.invoke(asks(), config_of(user_id="ann"))

    bench.ended_as("failed", "ValueError")


def test_an_error_that_a_node_catches_is_not_the_turns(bench: Bench) -> None:
    inner = single(failing, "inner").compile(name="helper")

    def work(state: State) -> None:
        with pytest.raises(ValueError, match="no credit"):
            inner.invoke(asks())

    bench.compile(single(work)).invoke(asks(), config_of(user_id="ann"))

    bench.ended_as("completed", None)
    assert bench.span("helper").attributes[a.ERROR_TYPE] == "ValueError"


def test_a_node_that_succeeds_at_the_second_try(bench: Bench) -> None:
    tries: list[int] = []

    def work(state: State) -> None:
        tries.append(len(tries))
        if len(tries) == 1:
            raise ConnectionError(SECRET)

    builder: Builder = StateGraph(State)
    builder.add_node("work", work, retry_policy=RetryPolicy(initial_interval=0.001, jitter=False))
    builder.add_edge(START, "work")

    bench.compile(builder).invoke(asks(), config_of(user_id="ann"))

    bench.ended_as("completed", None)
    tried = [span.attributes.get(a.ERROR_TYPE) for span in bench.spans() if span.name == "work"]
    assert tried == ["ConnectionError", None]


def test_too_many_steps(bench: Bench) -> None:
    builder: Builder = StateGraph(State)
    builder.add_node("work", lambda state: None)
    builder.add_edge(START, "work")
    builder.add_edge("work", "work")

    with pytest.raises(GraphRecursionError):
        bench.compile(builder).invoke(asks(), {**config_of(user_id="ann"), "recursion_limit": 4})

    bench.ended_as("failed", "GraphRecursionError")


def test_an_interrupt_is_no_error(bench: Bench) -> None:
    def ask(state: State) -> None:
        interrupt(SECRET)

    bench.compile(single(ask)).invoke(asks(), config_of(user_id="ann"))

    assert a.ERROR_TYPE not in bench.span("work").attributes
    assert bench.handler.open_runs == 0
    assert bench.span(a.SPAN_TURN).attributes[a.TURN_STATUS] == "interrupted"
    assert bench.span(a.SPAN_TURN).attributes[a.TURN_OUTPUT_TYPE] == "interrupt"
    assert SECRET.encode() not in bench.everything()


# --- blocks -----------------------------------------------------------------------------------------------------------
def test_an_error_that_leaves_the_blocks(bench: Bench) -> None:
    graph = bench.compile(single(failing))

    with (
        pytest.raises(ValueError, match="no credit"),
        bench.tracker.session(user_id="ann") as session,
        session.conversation("c-1").turn("Hi") as turn,
    ):
        graph.invoke(turn.input, turn.config)

    bench.ended_as("failed", "ValueError")
    assert bench.span("session.end").attributes[a.SESSION_END_REASON] == "error"
    assert session.summary().failed_turns == 1


def test_an_error_that_is_caught_inside_the_block(bench: Bench) -> None:
    graph = bench.compile(single(failing))

    with bench.tracker.session(user_id="ann") as session, session.conversation("c-1").turn("Hi") as turn:
        with pytest.raises(ValueError, match="no credit"):
            graph.invoke(turn.input, turn.config)
        turn.set_answer("Something went wrong, sorry.")

    bench.ended_as("completed", None)
    assert bench.span("LangGraph").attributes[a.ERROR_TYPE] == "ValueError"
    assert bench.span("session.end").attributes[a.SESSION_END_REASON] == "user_exit"


def test_a_task_cancelled_inside_the_blocks(bench: Bench) -> None:
    started = threading.Event()

    async def work(state: State) -> None:
        started.set()
        await asyncio.sleep(30)

    graph = bench.compile(single(work))

    async def sitting() -> None:
        async with bench.tracker.session(user_id="ann") as session, session.conversation("c-1").turn("Hi") as turn:
            await graph.ainvoke(turn.input, turn.config)

    async def main() -> None:
        task = asyncio.create_task(sitting())
        while not started.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    bench.ended_as("abandoned", "CancelledError")
    assert bench.span("session.end").attributes[a.SESSION_END_REASON] == "user_exit"


def test_a_turn_that_is_never_ended_leaves_nothing_current_where_it_was_begun(bench: Bench) -> None:
    session = bench.tracker.start_session(user_id="ann")
    turn = session.conversation("c-1").start_turn("Hi")
    assert not current_turn(), "start_turn has no block, so it makes nothing current"
    turn.end("abandoned")
    session.end()

    bench.nothing_is_open()
    assert bench.row()[0].status == "abandoned"
