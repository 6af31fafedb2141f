"""Spans of others: what the app's own code starts inside a turn is in the turn's trace and in its session."""

import asyncio
import threading
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langfuse import Langfuse, observe
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, Tracer

from apps import App, Builder, FakeModel, State, asks, config_of, own_spans, single
from turntrace import SessionCallbackHandler, track_graph
from turntrace import attributes as a
from turntrace.testing import (
    Capture,
    CapturedSpan,
    assert_all_tagged,
    captured_spans,
    format_tree,
    outbox_spans,
    span_tree,
)


@pytest.fixture
def tracer(capture: Capture) -> Tracer:
    return capture.provider.get_tracer("the app's own")


@pytest.fixture(params=["callback", "tracked"])
def run(request: pytest.FixtureRequest, capture: Capture) -> Any:
    """Run a graph once as a turn, and return its spans but for those of the session."""

    def invoke(builder: Builder) -> list[CapturedSpan]:
        tracked = track_graph(builder) if request.param == "tracked" else builder
        graph: Any = tracked.compile(checkpointer=InMemorySaver())
        handler = SessionCallbackHandler(capture.tracker())
        graph.invoke(asks(), {**config_of(user_id="ann"), "callbacks": [handler]})
        spans = captured_spans(capture.spans())
        return [span for span in spans if not span.name.startswith("session.")]

    return invoke


def tree_of(spans: list[CapturedSpan]) -> str:
    return format_tree(span_tree(spans))


def named(spans: list[CapturedSpan], name: str) -> CapturedSpan:
    found = [span for span in spans if span.name == name]
    assert len(found) == 1, f"{len(found)} spans are called {name}"
    return found[0]


def test_langfuses_own_client_sends_every_span_of_a_turn(
    capture: Capture, langfuse_client: Langfuse, tracer: Tracer
) -> None:
    graph: Any = App(spans=own_spans(tracer)).tools().compile(checkpointer=InMemorySaver())
    graph.invoke(asks(), {**config_of(), "callbacks": [SessionCallbackHandler(capture.tracker())]})
    caught = {span.span_id for span in captured_spans(capture.spans())}

    langfuse_client.flush()
    exporter: Any = langfuse_client._resources.span_exporter  # type: ignore[union-attr]
    sent = captured_spans(exporter.get_finished_spans())

    assert {span.span_id for span in sent} == caught, "its default filter left spans out"
    assert_all_tagged(sent)


def test_a_span_of_the_langfuse_sdk_has_the_ids_where_langfuse_reads_them(
    capture: Capture, langfuse_client: Langfuse
) -> None:
    @observe(name="look up")
    def look_up() -> None:
        return None

    graph: Any = single(lambda state: look_up()).compile()
    graph.invoke(asks(), {**config_of("t-1", topic="prices"), "callbacks": [SessionCallbackHandler(capture.tracker())]})

    has = named(captured_spans(capture.spans()), "look up").attributes
    assert has["langfuse.observation.metadata.conversation.id"] == "t-1"
    assert has["langfuse.observation.metadata.turn.number"] == 1
    assert has["langfuse.observation.metadata.conversation.topic"] == "prices"
    assert has[a.SESSION_ID] == has["langfuse.observation.metadata.session.id"]


def test_in_tools_retrievers_and_edges(run: Any, tracer: Tracer) -> None:
    class Shelf(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
            with tracer.start_as_current_span("reading"):
                return [Document("tea")]

    def search(state: State) -> Any:
        Shelf().invoke("tea")
        return None

    def onwards(state: State) -> str:
        with tracer.start_as_current_span("deciding"):
            return END

    builder: Builder = StateGraph(State)
    builder.add_node("search", search)
    builder.add_edge(START, "search")
    builder.add_conditional_edges("search", onwards, [END])

    spans = run(builder)

    assert_all_tagged(spans)
    assert tree_of(spans) == (
        "conversation.turn\n  LangGraph\n    search\n      Shelf\n        reading\n      deciding"
    )


def test_in_an_edge_from_the_start_it_hangs_on_the_run_of_the_graph(run: Any, tracer: Tracer) -> None:
    def first(state: State) -> str:
        with tracer.start_as_current_span("deciding"):
            return "work"

    builder: Builder = StateGraph(State)
    builder.add_node("work", lambda state: None)
    builder.add_conditional_edges(START, first, ["work"])

    spans = run(builder)

    assert_all_tagged(spans)
    assert tree_of(spans) == "conversation.turn\n  LangGraph\n    deciding\n    work"


def test_in_a_call_of_a_model_it_hangs_on_the_node(run: Any, tracer: Tracer) -> None:
    def says(_messages: object) -> str:
        with tracer.start_as_current_span("POST /v1/chat"):
            return "5 euros"

    spans = run(single(lambda state: {"messages": [FakeModel(says=says).invoke(state["messages"])]}))

    assert_all_tagged(spans)
    assert span_tree(spans, by_name=True)[0].children[0].children == (
        ("work", (("POST /v1/chat", ()), ("gpt-4o-mini", ()))),
    )


def test_what_is_set_on_the_current_span_is_set_on_the_nodes(run: Any) -> None:
    def work(state: State) -> None:
        span = trace.get_current_span()
        assert span.is_recording()
        span.set_attribute("app.cache", "hit")
        span.add_event("looked up")
        span.end()  # which is not the app's to end

    spans = run(single(work))

    assert named(spans, "work").attributes["app.cache"] == "hit"
    assert "app.cache" not in named(spans, "LangGraph").attributes


def test_siblings_in_tasks_of_an_async_node(capture: Capture, tracer: Tracer) -> None:
    async def fetch(number: int) -> None:
        with tracer.start_as_current_span(f"fetch {number}"):
            await asyncio.sleep(0)
            with tracer.start_as_current_span(f"parse {number}"):
                await asyncio.sleep(0)

    async def work(state: State) -> None:
        await asyncio.gather(*(fetch(number) for number in range(3)))

    graph: Any = single(work).compile()
    handler = SessionCallbackHandler(capture.tracker())
    asyncio.run(graph.ainvoke(asks(), {**config_of(), "callbacks": [handler]}))

    spans = capture.spans()
    assert_all_tagged(spans)
    turn = next(tree for tree in span_tree(spans, by_name=True) if tree.name == a.SPAN_TURN)
    assert turn.children[0].children == (("work", tuple((f"fetch {n}", ((f"parse {n}", ()),)) for n in range(3))),)


def in_thread(work: Any) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_in_a_thread_that_was_given_the_context(run: Any, tracer: Tracer) -> None:
    def work(state: State) -> None:
        context = otel_context.get_current()
        in_thread(lambda: tracer.start_span("in a thread", context=context).end())

    spans = run(single(work))

    assert_all_tagged(spans)
    assert tree_of(spans) == "conversation.turn\n  LangGraph\n    work\n      in a thread"


def test_in_a_thread_that_was_given_the_nodes_span(run: Any, tracer: Tracer) -> None:
    def work(state: State) -> None:
        here = trace.get_current_span()
        in_thread(lambda: tracer.start_span("in a thread", context=trace.set_span_in_context(here)).end())

    spans = run(single(work))

    assert tree_of(spans) == "conversation.turn\n  LangGraph\n    work\n      in a thread"
    assert_all_tagged(spans)


def test_in_a_thread_that_was_given_a_span_of_the_apps_own(run: Any, tracer: Tracer) -> None:
    def work(state: State) -> None:
        with tracer.start_as_current_span("mine") as mine:
            in_thread(lambda: tracer.start_span("in a thread", context=trace.set_span_in_context(mine)).end())

    spans = run(single(work))

    assert tree_of(spans) == "conversation.turn\n  LangGraph\n    work\n      mine\n        in a thread"
    assert_all_tagged(spans)


def test_a_trace_that_the_app_begins_anew_inside_a_node_is_not_the_turns(run: Any, tracer: Tracer) -> None:
    def work(state: State) -> Any:
        with tracer.start_as_current_span("apart", context=Context()):
            return {"messages": [FakeModel().invoke(state["messages"])]}

    spans = run(single(work))

    assert_all_tagged(spans)
    assert tree_of(spans) == "conversation.turn\n  LangGraph\n    work\n      gpt-4o-mini\napart"


def test_a_run_with_a_callback_of_its_own_stays_in_the_turns_trace_also_inside_one_begun_anew(
    capture: Capture, tracer: Tracer
) -> None:
    handler = SessionCallbackHandler(capture.tracker())

    def work(state: State) -> None:
        with tracer.start_as_current_span("apart", context=Context()):
            FakeModel().invoke("What does tea cost?", {"callbacks": [handler]})

    graph: Any = single(work).compile()
    graph.invoke(asks(), {**config_of(), "callbacks": [handler]})

    spans = captured_spans(capture.spans())
    turn = named(spans, a.SPAN_TURN)
    assert named(spans, "gpt-4o-mini").trace_id == turn.trace_id, "a step of the turn is in another trace"
    assert_all_tagged(spans)


def test_a_span_around_the_run_is_linked_and_current_again_afterwards(capture: Capture, tracer: Tracer) -> None:
    graph: Any = single(lambda state: None).compile()
    handler = SessionCallbackHandler(capture.tracker())

    with tracer.start_as_current_span("a job") as job:
        graph.invoke(asks(), {**config_of(), "callbacks": [handler]})
        assert trace.get_current_span() is job
        graph.invoke(asks(), {**config_of(), "callbacks": [handler]})

    spans = capture.spans()
    assert_all_tagged(spans)
    roots = [span for span in spans if span.name == a.SPAN_TURN]
    assert len({span.context.trace_id for span in roots}) == 2
    for root in roots:
        assert root.parent is None
        assert [link.context.span_id for link in root.links] == [job.get_span_context().span_id]
    assert a.TURN_ID not in named(captured_spans(spans), "a job").attributes


def test_a_turn_stands_below_the_request_that_it_serves(capture: Capture, tracer: Tracer) -> None:
    graph: Any = single(lambda state: None).compile()
    handler = SessionCallbackHandler(capture.tracker())

    with tracer.start_as_current_span("POST /chat", kind=SpanKind.SERVER):
        with tracer.start_as_current_span("authenticate"):
            pass
        graph.invoke(asks(), {**config_of(), "callbacks": [handler]})

    spans = [span for span in captured_spans(capture.spans()) if not span.name.startswith("session.")]
    assert_all_tagged(spans)
    assert tree_of(spans) == ("POST /chat\n  authenticate\n  conversation.turn\n    LangGraph\n      work")
    turn = named(spans, a.SPAN_TURN)
    ((row, _),) = handler.tracker.ledger.turns(turn.attributes[a.SESSION_ID])
    assert (row.trace_id, row.root_span_id) == (turn.trace_id, turn.span_id)


def test_two_turns_in_one_request_are_two_traces(capture: Capture, tracer: Tracer) -> None:
    """As a batch endpoint or a websocket has them: a turn is one trace (D3)."""
    graph: Any = single(lambda state: None).compile()
    handler = SessionCallbackHandler(capture.tracker())

    with tracer.start_as_current_span("POST /chats", kind=SpanKind.SERVER):
        for _ in range(2):
            graph.invoke(asks(), {**config_of("c-1"), "callbacks": [handler]})

    assert_all_tagged(capture.spans())


def test_a_span_that_ends_after_its_turn_is_tagged_and_kept(capture: Capture, tracer: Tracer) -> None:
    tracker = capture.tracker(outbox=True)
    open_spans: list[trace.Span] = []
    graph: Any = single(lambda state: open_spans.append(tracer.start_span("late"))).compile()
    graph.invoke(asks(), {**config_of(), "callbacks": [SessionCallbackHandler(tracker)]})
    assert "late" not in {span.name for span in capture.spans()}

    open_spans[0].end()

    caught = captured_spans(capture.spans())
    kept = outbox_spans(tracker.ledger)
    assert_all_tagged(caught)
    assert_all_tagged(kept)
    assert {span.span_id for span in kept} == {span.span_id for span in caught}


def test_the_outbox_holds_what_was_sent_byte_for_byte_the_same_facts(
    capture: Capture, langfuse_client: Langfuse, tracer: Tracer
) -> None:
    tracker = capture.tracker(outbox=True)
    graph: Any = App(spans=own_spans(tracer)).tools().compile(checkpointer=InMemorySaver())
    with tracker.session(user_id="ann") as session, session.conversation("c-1").turn("Hi") as turn:
        graph.invoke(turn.input, turn.config)

    caught = captured_spans(capture.spans())
    kept = outbox_spans(tracker.ledger)

    assert_all_tagged(kept)
    by_id = {span.span_id: span for span in kept}
    assert len(by_id) == len(kept) == len(caught)
    for span in caught:
        assert by_id[span.span_id] == span


def test_a_provider_that_samples_nothing_leaves_the_ledger_right(capture: Capture) -> None:
    quiet = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    tracker = capture.tracker(tracer_provider=quiet, outbox=True)
    graph: Any = App().tools().compile(checkpointer=InMemorySaver())
    with tracker.session() as session, session.conversation("c-1").turn("Hi") as turn:
        graph.invoke(turn.input, turn.config)

    tracker.flush()
    ((row, steps),) = tracker.ledger.turns(session.id)
    assert (row.status, row.llm_calls, row.tool_calls) == ("completed", 2, 1)
    assert len(steps) == 8
    assert outbox_spans(tracker.ledger) == []


def test_a_provider_without_the_sdk_leaves_the_ledger_right(capture: Capture) -> None:
    tracker = capture.tracker(tracer_provider=trace.NoOpTracerProvider())
    graph: Any = App().tools().compile(checkpointer=InMemorySaver())
    with tracker.session() as session, session.conversation("c-1").turn("Hi") as turn:
        graph.invoke(turn.input, turn.config)

    tracker.flush()
    ((row, _),) = tracker.ledger.turns(session.id)
    assert (row.status, row.number, row.input_tokens) == ("completed", 1, 200)


def test_another_exporter_of_the_app_gets_everything_too(capture: Capture, tracer: Tracer) -> None:
    mine = InMemorySpanExporter()
    tracker = capture.tracker()
    capture.provider.add_span_processor(SimpleSpanProcessor(mine))  # after turntrace's
    graph: Any = single(lambda state: tracer.start_span("x").end()).compile()
    graph.invoke(asks(), {**config_of(), "callbacks": [SessionCallbackHandler(tracker)]})

    assert {span.name for span in capture.spans()} == {span.name for span in mine.get_finished_spans()}
    assert_all_tagged(mine.get_finished_spans())
