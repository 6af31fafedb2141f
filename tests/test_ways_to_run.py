"""Every way to run a graph: one trace a turn, the right tree, every span tagged, and nothing left behind."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from textwrap import indent
from typing import Any, NamedTuple

import pytest
from langfuse import Langfuse
from langgraph.checkpoint.memory import InMemorySaver
from opentelemetry import trace

from apps import App, Builder, asks, for_events, new_thread, own_spans
from turntrace import SessionCallbackHandler, SessionTracker, current_turn, track_graph
from turntrace import attributes as a
from turntrace.testing import Capture, CapturedSpan, assert_all_tagged, captured_spans, format_tree, span_tree

Graph = Any
Call = tuple[dict[str, Any], dict[str, Any]]  # an input and its config
Run = Callable[[Graph, Sequence[Call]], None]  # runs a graph, once for each call
Way = Sequence[Run]  # how the first, the second, ... turn of each conversation is run
STREAM_MODES: Sequence[Any] = (
    "values",
    "updates",
    "messages",
    "custom",
    ["values", "updates", "messages", "custom"],
)


# --- ways to run ------------------------------------------------------------------------------------------------------
def one_by_one(run: Callable[[Graph, Call], Any]) -> Run:
    def runs(graph: Graph, calls: Sequence[Call]) -> None:
        for call in calls:
            run(graph, call)

    return runs


def awaited(run: Callable[[Graph, Call], Awaitable[Any]]) -> Run:
    def runs(graph: Graph, calls: Sequence[Call]) -> None:
        async def main() -> None:
            outside = current_turn(), trace.get_current_span().get_span_context()
            for call in calls:
                await run(graph, call)
                assert (current_turn(), trace.get_current_span().get_span_context()) == outside

        asyncio.run(main())

    return runs


def streamed(mode: Any) -> Callable[[Graph, Call], None]:
    def run(graph: Graph, call: Call) -> None:
        outside = current_turn()
        for _ in graph.stream(*call, stream_mode=mode):
            assert current_turn() is outside, "the turn is current between the parts of a stream"

    return run


def astreamed(mode: Any) -> Callable[[Graph, Call], Awaitable[None]]:
    async def run(graph: Graph, call: Call) -> None:
        outside = current_turn()
        async for _ in graph.astream(*call, stream_mode=mode):
            assert current_turn() is outside, "the turn is current between the parts of a stream"

    return run


async def events(graph: Graph, call: Call) -> None:
    outside = current_turn()
    async for _ in graph.astream_events(*call, version="v2"):
        assert current_turn() is outside, "the turn is current between two events"


def batch(graph: Graph, calls: Sequence[Call]) -> None:
    graph.batch([asked for asked, _ in calls], [config for _, config in calls])


def abatch(graph: Graph, calls: Sequence[Call]) -> None:
    async def main() -> None:
        await graph.abatch([asked for asked, _ in calls], [config for _, config in calls])

    asyncio.run(main())


WAYS: dict[str, Way] = {
    "invoke": 2 * [one_by_one(lambda graph, call: graph.invoke(*call))],
    "stream": [one_by_one(streamed(mode)) for mode in STREAM_MODES],
    "batch": 2 * [batch],
}
ASYNC_WAYS: dict[str, Way] = {
    "ainvoke": 2 * [awaited(lambda graph, call: graph.ainvoke(*call))],
    "astream": [awaited(astreamed(mode)) for mode in STREAM_MODES],
    "astream_events": 2 * [awaited(events)],
    "abatch": 2 * [abatch],
}
CASES = [pytest.param(way, False, id=name) for name, way in (WAYS | ASYNC_WAYS).items()] + [
    pytest.param(way, True, id=f"{name}-async-nodes") for name, way in ASYNC_WAYS.items()
]


def nothing_current() -> None:
    assert not trace.get_current_span().get_span_context().is_valid, "a span is current where none should be"
    assert not current_turn()


# --- graphs, and their trees ------------------------------------------------------------------------------------------
def own(name: str) -> str:
    return f"{name}.plain\n  observed\n    {name}.inside\n"


def node(name: str, inside: str) -> str:
    return name + "\n" + indent(inside, "  ")


AGENT = own("agent") + "gpt-4o-mini\n"


class Shape(NamedTuple):
    """A graph, and the tree of its run."""

    build: Callable[[App], Builder]
    tree: str


CHILD = node("child", node("inner", own("inner")) + node("expert", own("expert") + "gpt-4o-mini\n"))
SHAPES = {
    "tools": Shape(
        App.tools,
        node("prepare", own("prepare"))
        + node("agent", AGENT)
        + node("tools", node("price_of", own("tool")))
        + node("agent", AGENT),
    ),
    "fan_out": Shape(
        App.fan_out,
        node("plan", own("plan")) + 3 * node("work", own("work")) + node("join", own("join") + "gpt-4o-mini\n"),
    ),
    "subgraph": Shape(App.subgraph, node("first", own("first")) + node("child", CHILD)),
    "nested": Shape(App.nested, node("first", own("first")) + node("caller", own("caller") + CHILD)),
}


def whole_turn(shape: Shape) -> str:
    return node("conversation.turn", node("LangGraph", shape.tree)).strip()


# --- ways to attach ---------------------------------------------------------------------------------------------------
class Running(NamedTuple):
    """A tracked graph and how it runs."""

    capture: Capture
    tracker: SessionTracker
    handler: SessionCallbackHandler
    graph: Graph
    converse: Callable[[Way, int], None]


def by_config(graph: Graph, handler: SessionCallbackHandler) -> Callable[[Way, int], None]:
    """Run threads of a user each, told apart by their configs."""

    def converse(way: Way, conversations: int) -> None:
        threads = [new_thread() for _ in range(conversations)]
        more = for_events(handler) if way is ASYNC_WAYS["astream_events"] else {}
        for run in way:
            calls = [
                (asks(), {"configurable": {"thread_id": thread}, "metadata": {"user_id": f"user of {thread}"}} | more)
                for thread in threads
            ]
            run(graph, calls)
            nothing_current()

    return converse


def by_block(tracker: SessionTracker, graph: Graph) -> Callable[[Way, int], None]:
    """Run sessions in blocks, with neither callback nor metadata in the config."""

    def converse(way: Way, conversations: int) -> None:
        for number in range(conversations):
            with tracker.session(user_id=f"user {number}") as session:
                conversation = session.conversation(new_thread(), topic="prices")
                for run in way:
                    with conversation.turn("What does tea cost?") as turn:
                        run(graph, [(turn.input, {"configurable": {"thread_id": conversation.id}})])
                        assert current_turn() is turn
                    nothing_current()

    return converse


@pytest.fixture(params=["callback", "tracked", "block"])
def attach(request: pytest.FixtureRequest, capture: Capture, langfuse_client: Langfuse) -> Callable[[Builder], Running]:
    def attached(builder: Builder) -> Running:
        tracker = capture.tracker()
        handler = tracker.callbacks()[0]
        if "tracked" in request.param:
            builder = track_graph(builder)
        graph: Graph = builder.compile(checkpointer=InMemorySaver())
        if "block" in request.param:
            return Running(capture, tracker, handler, graph, by_block(tracker, graph))
        graph = graph.with_config(callbacks=[handler])
        return Running(capture, tracker, handler, graph, by_config(graph, handler))

    return attached


def turns_in(spans: Sequence[CapturedSpan]) -> list[list[CapturedSpan]]:
    """Return the spans of each turn."""
    traces: dict[str, list[CapturedSpan]] = {}
    for span in spans:
        traces.setdefault(span.trace_id, []).append(span)
    return [members for members in traces.values() if any(span.name == a.SPAN_TURN for span in members)]


# --- the tests --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("way", "is_async"), CASES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_way_to_run(
    attach: Callable[[Builder], Running],
    capture: Capture,
    shape: Shape,
    way: Way,
    is_async: bool,
) -> None:
    app = App(is_async=is_async, spans=own_spans(capture.provider.get_tracer("the app's own")))
    running = attach(shape.build(app))

    conversations = 2 if way[0] in (batch, abatch) else 1
    running.converse(way, conversations)

    spans = captured_spans(running.capture.spans())
    assert_all_tagged(spans)
    turns = turns_in(spans)
    assert len(turns) == conversations * len(way)
    outside = [span.name for span in spans if not any(span in members for members in turns)]
    assert set(outside) <= {"session.start", "session.end"}, "spans fell out of their turns"
    for members in turns:
        assert format_tree(span_tree(members)) == whole_turn(shape)
    numbers: dict[str, list[int]] = {}
    for members in turns:
        root = next(span for span in members if span.name == a.SPAN_TURN)
        assert root.attributes[a.TURN_STATUS] == "completed"
        assert running.tracker.live_turn(root.attributes[a.TURN_ID]) is None
        numbers.setdefault(root.attributes[a.CONVERSATION_ID], []).append(root.attributes[a.TURN_NUMBER])
    assert [sorted(given) for given in numbers.values()] == [list(range(1, len(way) + 1))] * conversations
    assert len({span.attributes[a.SESSION_ID] for span in spans}) == conversations
    assert running.handler.open_runs == 0
    ledger_agrees(running.tracker, turns)


def ledger_agrees(tracker: SessionTracker, turns: list[list[CapturedSpan]]) -> None:
    """Assert that the ledger has the turns with the steps that the spans say."""
    for members in turns:
        root = next(span for span in members if span.name == a.SPAN_TURN)
        rows = tracker.ledger.turns(root.attributes[a.SESSION_ID])
        (row, steps) = next((row, steps) for row, steps in rows if row.id == root.attributes[a.TURN_ID])
        assert (row.status, row.number) == ("completed", root.attributes[a.TURN_NUMBER])
        assert (row.trace_id, row.root_span_id) == (root.trace_id, root.span_id)
        assert row.ended_ns is not None
        ours = {span.span_id: span for span in members if span.scope == a.SCOPE_NAME and span is not root}
        assert {step.span_id: (step.name, step.parent_id) for step in steps} == {
            span.span_id: (span.name, span.parent_id) for span in ours.values()
        }
