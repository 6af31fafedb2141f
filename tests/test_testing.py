"""What turntrace gives to the tests of others: caught spans, trees, a clock, ids, and `assert_all_tagged`."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from langfuse import Langfuse
from langgraph.checkpoint.memory import InMemorySaver
from opentelemetry.trace import SpanKind

from apps import App, asks, config_of, own_spans, single
from turntrace import SessionCallbackHandler
from turntrace import attributes as a
from turntrace.identity import is_trace_id
from turntrace.testing import (
    Capture,
    CapturedSpan,
    Clock,
    Ids,
    SpanTree,
    assert_all_tagged,
    captured_spans,
    decoded_spans,
    format_tree,
    outbox_spans,
    span_tree,
)


# --- the clock and the ids --------------------------------------------------------------------------------------------
def test_a_clock_stands_still_until_it_is_told() -> None:
    clock = Clock(100)
    assert [clock(), clock(), clock.now_ns] == [100, 100, 100]
    clock.advance(5)
    clock.advance(seconds=1.5, minutes=2)
    assert clock() == 105 + 121_500_000_000
    clock.set(7)
    assert clock() == 7
    assert repr(clock) == "<Clock at 7>"


def test_a_clock_begins_at_a_date_of_its_own() -> None:
    assert datetime.fromtimestamp(Clock()() / 1e9, UTC) == datetime(2026, 1, 1, tzinfo=UTC)


def test_a_clock_may_tick() -> None:
    clock = Clock(0, tick_ns=10)
    assert [clock(), clock(), clock()] == [0, 10, 20]
    assert clock.now_ns == 30


def test_ids_come_in_order_and_have_the_form_of_a_trace_id() -> None:
    ids = Ids()
    first, second = ids(), ids()
    assert (first, second) == ("0" * 31 + "1", "0" * 31 + "2")
    assert is_trace_id(first)
    assert Ids(255)() == "0" * 30 + "ff"


def test_clock_and_ids_serve_many_threads() -> None:
    clock, ids = Clock(0, tick_ns=1), Ids()
    with ThreadPoolExecutor(8) as pool:
        times = list(pool.map(lambda _: clock(), range(400)))
        given = list(pool.map(lambda _: ids(), range(400)))
    assert sorted(times) == list(range(400))
    assert len(set(given)) == 400


# --- catching ---------------------------------------------------------------------------------------------------------
def test_a_run_is_the_same_each_time() -> None:
    def told() -> list[Any]:
        with Capture() as capture:
            handler = SessionCallbackHandler(capture.tracker(clock=Clock(tick_ns=1000), ids=Ids()))
            graph: Any = single(lambda state: None).compile()
            graph.invoke(asks(), {**config_of("c-1", user_id="ann"), "callbacks": [handler]})
            tags = {a.SESSION_ID, a.TURN_ID, a.USER_ID}
            return [
                (span.name, span.trace_id, {name: span.attributes.get(name) for name in tags}, span.start_ns)
                for span in captured_spans(capture.spans())
            ]

    assert told() == told()


def test_spans_are_there_at_once_and_can_be_forgotten(capture: Capture) -> None:
    tracker = capture.tracker()
    with tracker.session() as session, session.conversation().turn("Hi"):
        pass
    assert [span.name for span in capture.spans()] == ["session.start", "conversation.turn", "session.end"]
    assert repr(capture) == "<Capture of 3 spans>"
    capture.clear()
    assert capture.spans() == []


def test_two_trackers_share_a_capture(capture: Capture) -> None:
    for _ in range(2):
        with capture.tracker().session():
            pass
    assert len(capture.spans()) == 4


def test_nothing_is_left_when_a_capture_is_closed() -> None:
    before = set(threading.enumerate())
    with Capture() as capture:
        with capture.tracker().session() as session, session.conversation().turn("Hi"):
            pass
        capture.spans()
    left = [thread for thread in threading.enumerate() if thread not in before and thread.is_alive()]
    for thread in left:
        thread.join(0.5)
    assert [thread.name for thread in left if thread.is_alive()] == []


# --- trees ------------------------------------------------------------------------------------------------------------
def a_span(name: str, span_id: str, parent_id: str | None = None, start_ns: int = 0, **attributes: Any) -> CapturedSpan:
    return CapturedSpan(name, "t1", span_id, parent_id, "app", attributes, start_ns)


def test_a_tree_is_in_the_order_of_starts_or_of_names() -> None:
    spans = [a_span("b", "2", "1", 20), a_span("root", "1"), a_span("c", "3", "2", 30), a_span("a", "4", "1", 40)]
    assert span_tree(spans) == [("root", (("b", (("c", ()),)), ("a", ())))]
    assert span_tree(spans, by_name=True) == [("root", (("a", ()), ("b", (("c", ()),))))]


def test_a_tree_is_legible() -> None:
    tree = SpanTree("root", (SpanTree("b", (SpanTree("c"),)), SpanTree("a")))
    assert str(tree) == "root\n  b\n    c\n  a"
    assert format_tree([tree, SpanTree("other")]) == f"{tree}\nother"


def test_a_span_whose_parent_is_not_there_is_a_root() -> None:
    assert span_tree([a_span("lost", "2", "1")]) == [("lost", ())]


def test_parents_are_looked_for_in_the_same_trace() -> None:
    one, other = a_span("one", "1"), replace(a_span("other", "2", "1"), trace_id="t2")
    assert span_tree([one, other], by_name=True) == [("one", ()), ("other", ())]


# --- assert_all_tagged ------------------------------------------------------------------------------------------------
def converse(capture: Capture) -> list[CapturedSpan]:
    """Return the spans of a session with two turns, with spans of others in them."""
    graph: Any = App(spans=own_spans(capture.provider.get_tracer("own"))).child().compile(checkpointer=InMemorySaver())
    tracker = capture.tracker(outbox=True)
    with tracker.session(user_id="ann", channel="web", tier="gold", org_id="org-1") as session:
        conversation = session.conversation("c-1", topic="prices")
        for _ in range(2):
            with conversation.turn("Hi") as turn:
                graph.invoke(turn.input, turn.config)
    return captured_spans(capture.spans())


_recorded: list[CapturedSpan] = []


@pytest.fixture
def good(request: pytest.FixtureRequest) -> list[CapturedSpan]:
    """Return good spans, to be spoilt; they are recorded once."""
    if not _recorded:
        request.getfixturevalue("langfuse_client")
        _recorded.extend(converse(request.getfixturevalue("capture")))
    return list(_recorded)


def index_of(spans: list[CapturedSpan], name: str) -> int:
    return next(number for number, span in enumerate(spans) if span.name == name)


def without(span: CapturedSpan, *names: str) -> CapturedSpan:
    return replace(span, attributes={name: value for name, value in span.attributes.items() if name not in names})


def having(span: CapturedSpan, **changed: Any) -> CapturedSpan:
    words = {name.replace("__", "."): value for name, value in changed.items()}
    return replace(span, attributes={**span.attributes, **words})


def test_good_spans_are_good_in_any_form_and_order(capture: Capture, langfuse_client: Langfuse) -> None:
    good = converse(capture)
    assert_all_tagged(good)
    assert_all_tagged(reversed(good))
    assert_all_tagged(capture.spans())
    assert_all_tagged(iter(capture.spans()))


@pytest.mark.parametrize("name", a.EVERY_SPAN)
@pytest.mark.parametrize("on", ["expert", "gpt-4o-mini", "LangGraph", "expert.plain", "observed"])
def test_a_span_that_lacks_a_starred_name(good: list[CapturedSpan], on: str, name: str) -> None:
    at = index_of(good, on)
    good[at] = without(good[at], name)
    with pytest.raises(AssertionError, match=rf"'{on}' \(.*\) lacks {name}"):
        assert_all_tagged(good)


@pytest.mark.parametrize("name", a.REQUIRED_ON_EVERY_SPAN)
def test_a_turn_all_of_whose_spans_lack_a_required_name(good: list[CapturedSpan], name: str) -> None:
    with pytest.raises(AssertionError, match=f"lacks {name}"):
        assert_all_tagged(without(span, name) for span in good)


@pytest.mark.parametrize("name", a.EVERY_SPAN)
def test_a_span_that_differs_from_its_root(good: list[CapturedSpan], name: str) -> None:
    at = index_of(good, "expert")
    good[at] = replace(good[at], attributes={**good[at].attributes, name: "another"})
    with pytest.raises(AssertionError, match=f"has {name} = 'another' where its root has"):
        assert_all_tagged(good)


def test_a_span_of_the_langfuse_sdk_without_the_names_it_keeps(good: list[CapturedSpan]) -> None:
    at = index_of(good, "observed")
    good[at] = without(good[at], "langfuse.observation.metadata.turn.number")
    with pytest.raises(AssertionError, match=r"lacks langfuse\.observation\.metadata\.turn\.number"):
        assert_all_tagged(good)


def test_a_span_without_any_tag(good: list[CapturedSpan]) -> None:
    at = index_of(good, "expert.inside")
    good[at] = replace(good[at], attributes={})
    with pytest.raises(AssertionError, match=r"'expert\.inside' \(own, span \w+\) lacks session\.id"):
        assert_all_tagged(good)


def test_two_sessions_in_one_trace(good: list[CapturedSpan]) -> None:
    at = index_of(good, "gpt-4o-mini")
    good[at] = having(good[at], session__id="another")
    with pytest.raises(AssertionError, match="2 sessions meet"):
        assert_all_tagged(good)


def test_two_turns_in_one_trace(good: list[CapturedSpan]) -> None:
    traces = list(dict.fromkeys(span.trace_id for span in good if a.TURN_ID in span.attributes))
    merged = [replace(span, trace_id=traces[0]) if span.trace_id == traces[1] else span for span in good]
    with pytest.raises(AssertionError, match="2 turns meet"):
        assert_all_tagged(merged)


def test_one_turn_in_two_traces(good: list[CapturedSpan]) -> None:
    at = index_of(good, "gpt-4o-mini")
    good[at] = replace(good[at], trace_id="f" * 32, parent_id=None)
    with pytest.raises(AssertionError, match="is in two traces"):
        assert_all_tagged(good)


def test_a_parent_that_is_not_in_the_trace(good: list[CapturedSpan]) -> None:
    del good[index_of(good, "expert")]
    with pytest.raises(AssertionError, match="has a parent that is not in its trace"):
        assert_all_tagged(good)


def test_a_root_that_is_not_there(good: list[CapturedSpan]) -> None:
    del good[index_of(good, a.SPAN_TURN)]
    with pytest.raises(AssertionError, match="has a parent that is not in its trace"):
        assert_all_tagged(good)


def test_a_span_of_the_session_without_its_session(good: list[CapturedSpan]) -> None:
    at = index_of(good, "session.end")
    good[at] = without(good[at], a.SESSION_ID)
    with pytest.raises(AssertionError, match=r"'session\.end' \(.*\) lacks session\.id"):
        assert_all_tagged(good)


def test_no_turn_at_all(good: list[CapturedSpan]) -> None:
    with pytest.raises(AssertionError, match="none of the 0 spans belongs to a turn"):
        assert_all_tagged([])
    with pytest.raises(AssertionError, match="none of the 2 spans"):
        assert_all_tagged(span for span in good if span.name.startswith("session."))


def test_spans_of_others_outside_of_turns_are_not_looked_at(good: list[CapturedSpan], capture: Capture) -> None:
    capture.provider.get_tracer("own").start_span("a job of its own").end()
    assert_all_tagged([*good, *capture.spans()])


def test_what_stands_around_a_turn_is_not_looked_at_but_all_below_it_is(capture: Capture) -> None:
    tracer = capture.provider.get_tracer("own")
    handler = SessionCallbackHandler(capture.tracker())
    graph: Any = single(lambda state: tracer.start_span("inside").end()).compile()
    with tracer.start_as_current_span("POST /chat", kind=SpanKind.SERVER):
        tracer.start_span("authenticate").end()
        graph.invoke(asks(), {**config_of(), "callbacks": [handler]})
    spans = captured_spans(capture.spans())
    assert_all_tagged(spans)

    at = index_of(spans, "inside")
    spans[at] = replace(spans[at], attributes={})
    with pytest.raises(AssertionError, match="'inside'"):
        assert_all_tagged(spans)


def test_the_message_is_short_enough_to_read(good: list[CapturedSpan]) -> None:
    spans = [replace(span, span_id=f"{number:016x}") for span in good for number in range(9)]
    with pytest.raises(AssertionError) as caught:
        assert_all_tagged(spans)
    lines = str(caught.value).splitlines()
    assert lines[0] == "Not every span is tagged with its turn:"
    assert len(lines) == 22
    assert lines[-1].endswith("more")


# --- from the outbox --------------------------------------------------------------------------------------------------
def test_spans_read_back_from_the_outbox_are_the_same(capture: Capture, langfuse_client: Langfuse) -> None:
    good = converse(capture)
    (tracker,) = capture._trackers
    kept = outbox_spans(tracker.ledger)

    assert_all_tagged(kept)
    order: Callable[[CapturedSpan], str] = lambda span: span.span_id  # noqa: E731
    assert sorted(kept, key=order) == sorted(good, key=order)
    first = tracker.ledger.outbox(limit=1)[0]
    assert len(decoded_spans(first.body)) == first.items
