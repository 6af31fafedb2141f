"""Spans that are written down whole: the same bytes as OpenTelemetry's SDK and its encoder make of the same."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command, interrupt
from opentelemetry import trace
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtlpSpan
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Status, StatusCode

from apps import App, asks, config_of, own_spans, single
from turntrace import ContentPolicy, ContextTracker, SessionCallbackHandler, SessionTracker, track_graph
from turntrace import attributes as a
from turntrace.export import from_otlp, to_otlp
from turntrace.export.written import Around, WrittenSpan
from turntrace.ledger import Ledger
from turntrace.testing import Clock, Ids, decoded_spans

RESOURCE = Resource({"service.name": "shop ☂", "langfuse.environment": "staging"}, "https://example.com/schema")
AROUND = Around.of(RESOURCE)

VALUES = st.one_of(
    st.text(),
    st.text(alphabet="a☂\ud800\udfff\0", max_size=300),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.lists(st.text(), max_size=5),
    st.lists(st.integers(-5, 5), max_size=3),
    st.tuples(st.booleans(), st.floats()),
)
NAMES = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300)
IDS = st.integers(1, 2**64 - 1)


# --- one span ---------------------------------------------------------------------------------------------------------
@given(
    name=NAMES,
    attributes=st.dictionaries(NAMES, VALUES, max_size=8),
    ids=st.tuples(IDS, IDS),
    parent=st.none() | st.tuples(IDS, st.booleans()),
    times=st.tuples(st.integers(0, 2**63), st.integers(0, 2**40)),
    status=st.none() | NAMES,
)
@example(name="x" * 5000, attributes={"a": "b" * 100_000}, ids=(1, 2), parent=None, times=(0, 0), status="☂" * 3000)
@settings(deadline=None)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_span_is_the_same_as_the_sdks(
    name: str,
    attributes: dict[str, Any],
    ids: tuple[int, int],
    parent: tuple[int, bool] | None,
    times: tuple[int, int],
    status: str | None,
) -> None:
    context = trace.SpanContext(*ids, is_remote=False)
    above = None if parent is None else trace.SpanContext(ids[0], parent[0], is_remote=parent[1])
    ended: list[WrittenSpan] = []
    ours = WrittenSpan(AROUND, name, context, above, attributes, times[0], ended.append)
    if status is not None:
        ours.set_status(StatusCode.ERROR, status)
    ours.end(sum(times))
    sdks = ReadableSpan(
        name,
        context=context,
        parent=above,
        resource=RESOURCE,
        attributes=attributes,
        kind=trace.SpanKind.INTERNAL,
        instrumentation_scope=InstrumentationScope("turntrace"),
        status=Status(StatusCode.UNSET) if status is None else Status(StatusCode.ERROR, status),
        start_time=times[0],
        end_time=sum(times),
    )
    assert ended == [ours]
    assert not ours.is_recording()
    # In the order of fields that protobuf itself writes, so that NaN is compared as well.
    assert from_otlp(to_otlp([ours])).SerializeToString() == from_otlp(to_otlp([sdks])).SerializeToString()


def test_a_number_of_an_enum_is_written_as_the_sdk_writes_it() -> None:
    context = trace.SpanContext(1, 2, is_remote=False)
    ours = WrittenSpan(AROUND, "same", context, None, {"code": HTTPStatus.OK}, 1, lambda _: None)
    ours.end(2)
    assert b"code" in to_otlp([ours])
    [span] = decoded_spans(to_otlp([ours]))
    assert span.attributes == {"code": 200}


@pytest.mark.parametrize("others", [{}, {"mapping": {"a": 1}, "none at all": None}], ids=["as ours", "of other kinds"])
def test_what_stands_around_spans_is_written_as_the_sdk_writes_it(others: dict[str, Any]) -> None:
    class Code(IntEnum):
        OK = 200

    held: dict[str, Any] = {
        "code": Code.OK,
        "text": "shop ☂",
        "whole": -3,
        "part": 0.5,
        "yes": True,
        "no": False,
        "many": ("a", "b"),
        "none": (),
    }
    resource = Resource({**held, "long": "x" * 5_000}, "https://example.com/schema")
    object.__setattr__(resource, "_attributes", {**resource.attributes, **others})  # newer SDKs let them in
    context = trace.SpanContext(1, 2, is_remote=False)
    ours = WrittenSpan(Around.of(resource), "same", context, None, {}, 1, lambda _: None)
    ours.end(2)
    scope = InstrumentationScope("turntrace")
    sdks = ReadableSpan("same", context, None, resource, instrumentation_scope=scope, start_time=1, end_time=2)
    assert from_otlp(to_otlp([ours])) == from_otlp(to_otlp([sdks]))


def test_spans_of_both_kinds_go_together() -> None:
    context = trace.SpanContext(1, 2, is_remote=False)
    ours = WrittenSpan(AROUND, "ours", context, None, {}, 1, lambda _: None)
    ours.end(2)
    sdks = ReadableSpan("theirs", context=context, resource=RESOURCE)
    request = from_otlp(to_otlp([ours, sdks, ours]))
    names = [span.name for each in request.resource_spans for scope in each.scope_spans for span in scope.spans]
    assert sorted(names) == ["ours", "ours", "theirs"]


def test_what_is_set_after_the_end_is_not_told() -> None:
    span = WrittenSpan(AROUND, "a", trace.SpanContext(1, 2, is_remote=False), None, {"a": 1}, 1, lambda _: None)
    span.set_attribute("b", 2)
    span.end(5)
    before = span.to_bytes()
    span.set_attributes({"c": 3})
    span.set_status(StatusCode.ERROR, "late")
    span.end(9)
    assert span.to_bytes() == before


# --- whole turns ------------------------------------------------------------------------------------------------------
class Listener(SpanProcessor):
    """Somebody else who listens to the provider: the SDK makes the spans then."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_end(self, span: ReadableSpan) -> None:
        """Note its name."""
        self.names.append(span.name)


Play = Callable[[SessionTracker, TracerProvider], None]


def plain(tracker: SessionTracker, provider: TracerProvider) -> None:
    graph: Any = track_graph(App().tools()).compile(checkpointer=InMemorySaver())
    config = {
        **config_of("c", user_id="ann", channel="web", tier="gold"),
        "callbacks": [SessionCallbackHandler(tracker)],
    }
    for _ in range(2):
        graph.invoke(asks(), config)
    agraph: Any = track_graph(App(is_async=True).tools()).compile()
    asyncio.run(agraph.ainvoke(asks(), config))
    list(graph.stream(asks(), config, stream_mode=["updates", "messages"]))


def run(graph: Any, tracker: SessionTracker) -> None:
    graph.invoke(asks(), {**config_of("c"), "callbacks": [SessionCallbackHandler(tracker)]})


def failing(tracker: SessionTracker, provider: TracerProvider) -> None:
    def fails(state: Any) -> Any:
        raise LookupError("no \ud800 such ☂ thing")

    with pytest.raises(LookupError):
        run(single(fails).compile(), tracker)


def waiting(tracker: SessionTracker, provider: TracerProvider) -> None:
    builder = single(lambda state: {"messages": [HumanMessage(str(interrupt("well?")))]})
    graph: Any = builder.compile(checkpointer=InMemorySaver())
    config = {**config_of("c"), "callbacks": [SessionCallbackHandler(tracker)]}
    graph.invoke(asks(), config)
    tracker.flush()
    graph.invoke(Command(resume="yes"), config)


def with_spans_of_others(tracker: SessionTracker, provider: TracerProvider) -> None:
    app = App(spans=own_spans(provider.get_tracer("shop")))
    with provider.get_tracer("shop").start_as_current_span("request"):
        run(track_graph(app.subgraph()).compile(), tracker)


def by_hand(tracker: SessionTracker, provider: TracerProvider) -> None:
    with tracker.session(user_id="ann") as session:
        with session.conversation("c").turn("Hello") as turn:
            turn.set_intent("☂")
            turn.journey("onboarding", stages=["begin", "done"]).enter("begin")
            step = turn.open_step(
                "look", "tool", attributes={"list": ("a", "b"), "yes": True, "share": 0.5, "less": -1}
            )
            turn.close_step(step)
        turn.feedback(True)
        session.journey("onboarding").enter("done")


def pruning(tracker: SessionTracker, provider: TracerProvider) -> None:
    context = ContextTracker("gpt-4o", limit=60, threshold=0.5)

    def node(state: Any) -> Any:
        window = context.fit(state["messages"])
        return {"messages": [HumanMessage("ok"), *window.update]}

    config = {**config_of("c"), "callbacks": [SessionCallbackHandler(tracker)]}
    graph: Any = track_graph(single(node)).compile(checkpointer=InMemorySaver())
    for number in range(4):
        graph.invoke(asks("word " * 20 + str(number)), config)


PLAYS: dict[str, Play] = {
    play.__name__: play for play in (plain, failing, waiting, with_spans_of_others, by_hand, pruning)
}


@contextmanager
def played(play: Play, folder: Path, provider: TracerProvider, **settings: Any) -> Iterator[list[OtlpSpan]]:
    """Give the spans that are in the outbox after a play, the oldest first."""
    url = f"sqlite:///{folder}/{id(provider)}.db"
    names = Ids()
    tracker = SessionTracker(
        url,
        outbox=True,
        tracer_provider=provider,
        clock=Clock(tick_ns=1_000_000),
        ids=names,
        user_hash_key="a key of many bytes",
        **settings,
    )
    play(tracker, provider)
    tracker.shutdown(end_sessions=True)
    ledger = Ledger(url)
    requests = [from_otlp(item.body) for item in ledger.outbox() if item.kind == "spans"]
    ledger.close()
    yield [
        span
        for request in requests
        for each in request.resource_spans
        for scope in each.scope_spans
        for span in scope.spans
    ]


def as_told(spans: list[OtlpSpan]) -> list[Any]:
    """Return what spans tell, without their ids, which are made by chance; each with the names of those above it."""
    by_id = {span.span_id: span for span in spans}

    def above(span: OtlpSpan) -> list[str]:
        parent = by_id.get(span.parent_span_id)
        return [] if parent is None else [parent.name, *above(parent)]

    def told(span: OtlpSpan) -> Any:
        attributes = sorted((each.key, str(each.value)) for each in span.attributes)
        return (span.name, above(span), attributes, span.kind, str(span.status), span.flags, len(span.links))

    return sorted(map(told, spans), key=repr)


@pytest.mark.parametrize("content", ["metadata", "full"])
@pytest.mark.parametrize("name", PLAYS)
def test_turns_are_told_the_same_whoever_makes_their_spans(
    name: str, content: Any, tmp_path: Path, lenient: None
) -> None:
    listened = TracerProvider(resource=RESOURCE)
    listener = Listener()
    listened.add_span_processor(listener)
    policy = ContentPolicy(content)
    with (
        played(PLAYS[name], tmp_path, TracerProvider(resource=RESOURCE), content=policy) as ours,
        played(PLAYS[name], tmp_path, listened, content=policy) as sdks,
    ):
        assert as_told(ours) == as_told(sdks)
        assert listener.names
        assert {span.name for span in ours} >= {a.SPAN_TURN}


# --- when the SDK is to make them -------------------------------------------------------------------------------------
def makes_whole(provider: TracerProvider, **attributes: Any) -> bool:
    """Tell whether a span of what has ended is written down whole."""
    tracker = SessionTracker("sqlite://", outbox=True, tracer_provider=provider)
    root = tracker.target.start_root("root", attributes=attributes, start_ns=1, ids=(1, 2), has_ended=True)
    below = trace.set_span_in_context(root)
    step = tracker.target.start("step", attributes=attributes, start_ns=1, parent=below, has_ended=True)
    assert isinstance(root, WrittenSpan) == isinstance(step, WrittenSpan)
    tracker.shutdown()
    return isinstance(root, WrittenSpan)


def test_spans_are_written_whole_where_nobody_else_listens() -> None:
    assert makes_whole(TracerProvider())


SAMPLERS: dict[str, Sampler] = {
    "a ratio": TraceIdRatioBased(0.5),
    "a ratio below": ParentBased(TraceIdRatioBased(0.5)),
    "off": ALWAYS_OFF,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_a_sampler_the_sdk_makes_them(sampler: str) -> None:
    assert not makes_whole(TracerProvider(sampler=SAMPLERS[sampler]))


@pytest.mark.parametrize("limits", [{"max_attribute_length": 10}, {"max_span_attribute_length": 10}])
def test_with_a_limit_of_length_the_sdk_makes_them(limits: dict[str, int]) -> None:
    assert not makes_whole(TracerProvider(span_limits=SpanLimits(**limits)))


def test_with_more_attributes_than_allowed_the_sdk_makes_them() -> None:
    limits = SpanLimits(max_span_attributes=5)
    assert makes_whole(TracerProvider(span_limits=limits), one=1)
    assert not makes_whole(TracerProvider(span_limits=limits), **{f"a{n}": n for n in range(6)})


def test_somebody_who_comes_later_is_told(tmp_path: Path) -> None:
    provider, listener = TracerProvider(), Listener()
    tracker = SessionTracker(f"sqlite:///{tmp_path}/l.db", outbox=True, tracer_provider=provider)
    graph = track_graph(App().tools()).compile()
    run(graph, tracker)
    tracker.flush()
    provider.add_span_processor(listener)
    run(graph, tracker)
    tracker.flush()
    assert listener.names.count(a.SPAN_TURN) == 1
    assert {"agent", "tools", "price_of"} <= set(listener.names)
    tracker.shutdown()


def test_a_turn_below_a_request_that_is_not_sampled_has_no_spans(tmp_path: Path) -> None:
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(0.0)))
    tracker = SessionTracker(f"sqlite:///{tmp_path}/l.db", outbox=True, tracer_provider=provider)
    with provider.get_tracer("web").start_as_current_span("GET /", kind=trace.SpanKind.SERVER):
        run(track_graph(App().tools()).compile(), tracker)
    tracker.flush()
    assert tracker.ledger.outbox() == []
    [session] = tracker.ledger.sessions()
    assert session.total_turns == 1
    tracker.shutdown()
