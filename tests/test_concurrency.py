"""Many sessions at once on one handler object: nothing mixed, nothing leaked."""

import asyncio
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langfuse import Langfuse
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span, SpanProcessor

from apps import App, FakeModel, State, asks, config_of, own_spans, single
from turntrace import SessionCallbackHandler, current_turn, track_graph
from turntrace import attributes as a
from turntrace.testing import Capture, CapturedSpan, assert_all_tagged, captured_spans, span_tree

SESSIONS = 20
TURNS = 2


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def handler(capture: Capture) -> SessionCallbackHandler:
    return SessionCallbackHandler(capture.tracker())


@pytest.fixture(params=["callback", "tracked"])
def graph(request: pytest.FixtureRequest, capture: Capture, langfuse_client: Langfuse) -> Callable[[bool], Any]:
    def compiled(is_async: bool) -> Any:
        app = App(is_async=is_async, spans=own_spans(capture.provider.get_tracer("own")), model=FakeModel(delay=0.001))
        builder = app.tools()
        return (track_graph(builder) if request.param == "tracked" else builder).compile(checkpointer=InMemorySaver())

    return compiled


def config_for(handler: SessionCallbackHandler, number: int) -> dict[str, Any]:
    return {**config_of(f"c-{number}", user_id=f"user {number}", topic=f"topic {number}"), "callbacks": [handler]}


def check(capture: Capture, handler: SessionCallbackHandler) -> None:
    """Assert that each session has its turns, alike and complete, with nothing of another one's."""
    spans = captured_spans(capture.spans())
    assert_all_tagged(spans)
    assert handler.open_runs == 0
    assert not trace.get_current_span().get_span_context().is_valid
    assert not current_turn()
    traces: dict[str, list[CapturedSpan]] = {}
    for span in spans:
        if not span.name.startswith("session."):
            traces.setdefault(span.trace_id, []).append(span)
    assert len(traces) == SESSIONS * TURNS
    trees = {str(span_tree(members, by_name=True)) for members in traces.values()}
    assert len(trees) == 1, "some turns look different from others"
    roots = [span for span in spans if span.name == a.SPAN_TURN]
    assert len({root.attributes[a.SESSION_ID] for root in roots}) == SESSIONS
    assert len({root.attributes[a.USER_ID] for root in roots}) == SESSIONS
    for root in roots:
        number = str(root.attributes[a.CONVERSATION_ID]).removeprefix("c-")
        assert root.attributes[a.CONVERSATION_TOPIC] == f"topic {number}"
        assert root.attributes[a.USER_ID] == handler.tracker.hash_user(f"user {number}")
        assert handler.tracker.live_turn(str(root.attributes[a.TURN_ID])) is None
    numbers = Counter((root.attributes[a.CONVERSATION_ID], root.attributes[a.TURN_NUMBER]) for root in roots)
    assert numbers == Counter({(f"c-{n}", turn): 1 for n in range(SESSIONS) for turn in range(1, TURNS + 1)})


def test_in_threads(graph: Callable[[bool], Any], capture: Capture, handler: SessionCallbackHandler) -> None:
    app = graph(False)

    def sitting(number: int) -> None:
        for _ in range(TURNS):
            app.invoke(asks(), config_for(handler, number))
            assert not trace.get_current_span().get_span_context().is_valid

    with ThreadPoolExecutor(SESSIONS) as pool:
        list(pool.map(sitting, range(SESSIONS)))

    check(capture, handler)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync-nodes", "async-nodes"])
def test_in_tasks(
    graph: Callable[[bool], Any], capture: Capture, handler: SessionCallbackHandler, is_async: bool
) -> None:
    app = graph(is_async)

    async def sitting(number: int) -> None:
        for _ in range(TURNS):
            await app.ainvoke(asks(), config_for(handler, number))
            assert not trace.get_current_span().get_span_context().is_valid

    async def main() -> None:
        await asyncio.gather(*map(sitting, range(SESSIONS)))

    asyncio.run(main())
    check(capture, handler)


def test_in_threads_and_tasks(graph: Callable[[bool], Any], capture: Capture, handler: SessionCallbackHandler) -> None:
    app, async_app = graph(False), graph(True)

    async def sitting(number: int) -> None:
        for _ in range(TURNS):
            if number % 2:
                await async_app.ainvoke(asks(), config_for(handler, number))
            else:
                await asyncio.to_thread(app.invoke, asks(), config_for(handler, number))

    async def main() -> None:
        await asyncio.gather(*map(sitting, range(SESSIONS)))

    asyncio.run(main())
    check(capture, handler)


def test_in_blocks_in_threads_and_tasks(
    graph: Callable[[bool], Any], capture: Capture, handler: SessionCallbackHandler
) -> None:
    app, async_app = graph(False), graph(True)
    tracker = handler.tracker

    def sitting(number: int) -> None:
        with tracker.session(user_id=f"user {number}") as session:
            conversation = session.conversation(f"c-{number}", topic=f"topic {number}")
            for _ in range(TURNS):
                with conversation.turn("What does tea cost?") as turn:
                    app.invoke(turn.input, {"configurable": {"thread_id": conversation.id}})
                    assert current_turn() is turn

    async def asitting(number: int) -> None:
        async with tracker.session(user_id=f"user {number}") as session:
            conversation = session.conversation(f"c-{number}", topic=f"topic {number}")
            for _ in range(TURNS):
                async with conversation.turn("What does tea cost?") as turn:
                    await async_app.ainvoke(turn.input, {"configurable": {"thread_id": conversation.id}})
                    assert current_turn() is turn

    async def main() -> None:
        tasks = [asitting(n) if n % 2 else asyncio.to_thread(sitting, n) for n in range(SESSIONS)]
        await asyncio.gather(*tasks)

    asyncio.run(main())
    check(capture, handler)
    ends = [span for span in captured_spans(capture.spans()) if span.name == "session.end"]
    assert [end.attributes[a.SESSION_TOTAL_TURNS] for end in ends] == [TURNS] * SESSIONS


def test_two_streams_read_alternately_in_one_thread(
    graph: Callable[[bool], Any], capture: Capture, handler: SessionCallbackHandler
) -> None:
    app = graph(False)
    first = app.stream(asks(), config_for(handler, 1), stream_mode=["updates", "messages"])
    second = app.stream(asks(), config_for(handler, 2), stream_mode=["updates", "messages"])

    parts = 0
    for _ in zip(first, second, strict=True):
        parts += 1
        assert not trace.get_current_span().get_span_context().is_valid
        assert not current_turn()

    assert parts > 4
    check_two(capture, handler)


def test_two_streams_read_alternately_in_one_task(
    graph: Callable[[bool], Any], capture: Capture, handler: SessionCallbackHandler
) -> None:
    app = graph(True)

    async def main() -> None:
        streams = [
            app.astream(asks(), config_for(handler, number), stream_mode=["updates", "messages"]) for number in (1, 2)
        ]
        while streams:
            for stream in list(streams):
                if await anext(stream, None) is None:
                    streams.remove(stream)
                assert not trace.get_current_span().get_span_context().is_valid
                assert not current_turn()

    asyncio.run(main())
    check_two(capture, handler)


def check_two(capture: Capture, handler: SessionCallbackHandler) -> None:
    spans = [span for span in captured_spans(capture.spans()) if not span.name.startswith("session.")]
    assert_all_tagged(spans)
    assert handler.open_runs == 0
    one, two = span_tree(spans, by_name=True)
    assert one == two
    assert one.name == a.SPAN_TURN
    assert {span.attributes[a.CONVERSATION_ID] for span in spans} == {"c-1", "c-2"}


def test_one_user_at_once_has_one_session(capture: Capture, handler: SessionCallbackHandler) -> None:
    app: Any = single(lambda state: None).compile()
    start = threading.Barrier(SESSIONS)

    def ask(number: int) -> None:
        start.wait()
        app.invoke(asks(), {**config_of(f"c-{number}", user_id="ann"), "callbacks": [handler]})

    with ThreadPoolExecutor(SESSIONS) as pool:
        list(pool.map(ask, range(SESSIONS)))

    roots = [span for span in captured_spans(capture.spans()) if span.name == a.SPAN_TURN]
    assert len(roots) == SESSIONS
    assert len({root.attributes[a.SESSION_ID] for root in roots}) == 1
    assert [span.name for span in capture.spans()].count("session.start") == 1


def test_turns_of_one_conversation_at_once_have_each_a_number(
    capture: Capture, handler: SessionCallbackHandler
) -> None:
    app: Any = single(lambda state: None).compile()
    start = threading.Barrier(SESSIONS)

    def ask(_number: int) -> None:
        start.wait()
        app.invoke(asks(), {**config_of("c-1", user_id="ann"), "callbacks": [handler]})

    with ThreadPoolExecutor(SESSIONS) as pool:
        list(pool.map(ask, range(SESSIONS)))

    roots = [span for span in captured_spans(capture.spans()) if span.name == a.SPAN_TURN]
    assert sorted(root.attributes[a.TURN_NUMBER] for root in roots) == list(range(1, SESSIONS + 1))


class _Meet(SpanProcessor):
    """Holds each span of a name until another one of that name starts, or for a moment."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._meeting = threading.Barrier(2)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if span.name == self._name:
            try:
                self._meeting.wait(0.3)
            except threading.BrokenBarrierError:
                self._meeting.reset()


def test_a_subgraph_whose_first_nodes_start_at_once_is_one_step(
    capture: Capture, handler: SessionCallbackHandler
) -> None:
    capture.provider.add_span_processor(_Meet("helpers"))
    child: StateGraph[Any, Any, Any, Any] = StateGraph(State)
    for name in ("left", "right"):
        child.add_node(name, lambda state: None)
        child.add_edge(START, name)
    app: Any = single(child.compile(name="helpers")).compile()

    app.invoke(asks(), {**config_of(), "callbacks": [handler]})

    spans = [span for span in captured_spans(capture.spans()) if not span.name.startswith("session.")]
    assert_all_tagged(spans)
    (turn,) = span_tree(spans, by_name=True)
    assert turn.children[0].children == (("work", (("helpers", (("left", ()), ("right", ()))),)),)


def test_turns_that_are_over_are_not_kept(capture: Capture, handler: SessionCallbackHandler) -> None:
    """What a context or a registry still held would grow with every turn of a task that lives for days."""
    import gc
    import weakref

    turns: weakref.WeakSet[Any] = weakref.WeakSet()

    async def work(state: State) -> None:
        turns.add(current_turn())
        await asyncio.sleep(0)

    app: Any = single(work).compile()

    async def main() -> None:
        for number in range(10):
            await app.ainvoke(asks(), {**config_of(f"c-{number % 3}", user_id="ann"), "callbacks": [handler]})
        assert await handler.tracker.aflush()
        gc.collect()
        assert len(turns) <= 1  # the last may stand in a variable somewhere

    asyncio.run(main())
    assert handler.open_runs == 0
