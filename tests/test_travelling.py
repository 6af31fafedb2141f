"""A turn whose graph asks another server: with propagate=True its spans there are in the turn, else nothing is sent."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from apps import FakeModel, asks, config_of, single
from turntrace import SessionCallbackHandler, SessionTracker, current_turn, track_graph
from turntrace import attributes as a
from turntrace.testing import CapturedSpan, assert_all_tagged, outbox_spans

SECRET = "zoe-42@example.com"


class Place:
    """A process with a tracker, a ledger and a graph of its own."""

    def __init__(self, path: Path, node: Callable[[Any], Any], *, propagate: bool) -> None:
        self.tracker = SessionTracker(
            f"sqlite:///{path}", tracer_provider=TracerProvider(), outbox=True, propagate=propagate
        )
        self.handler = SessionCallbackHandler(self.tracker)
        self.graph: Any = track_graph(single(node)).compile().with_config(callbacks=[self.handler])

    def spans(self) -> list[CapturedSpan]:
        self.tracker.flush()
        return outbox_spans(self.tracker.ledger)

    def turns(self) -> list[Any]:
        self.tracker.flush()
        return [turn for each in self.tracker.ledger.sessions() for turn, _ in self.tracker.ledger.turns(each.id)]


def elsewhere(call: Callable[[], Any]) -> Any:
    """Call in a thread with an empty context, as a server does."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def prices(_state: Any) -> dict[str, Any]:
    return {"messages": [FakeModel().invoke("what is the price?")]}


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    made: list[Place] = []

    def make(node: Callable[[Any], Any], *, propagate: bool) -> Place:
        made.append(Place(tmp_path / f"{len(made)}.db", node, propagate=propagate))
        return made[-1]

    yield make
    for place in made:
        place.tracker.shutdown()


def by_metadata(server: Place, headers: dict[str, str]) -> Any:
    """Call as RemoteGraph does, which hands the metadata of a run on."""
    config = {"configurable": {"thread_id": "the server's own"}, "metadata": headers}
    return server.graph.invoke(asks("price?"), config)


def by_configurable(server: Place, headers: dict[str, str]) -> Any:
    """Call as LangGraph's server does with the headers that it is told to include."""
    return server.graph.invoke(asks("price?"), {"configurable": {"thread_id": "the server's own", **headers}})


def by_context(server: Place, headers: dict[str, str]) -> Any:
    """Call as an instrumented web framework does, which takes the headers into the context."""
    arrived = W3CBaggagePropagator().extract(headers, TraceContextTextMapPropagator().extract(headers))
    token = context.attach(arrived)
    try:
        return server.graph.invoke(asks("price?"), {"configurable": {"thread_id": "the server's own"}})
    finally:
        context.detach(token)


@pytest.mark.parametrize("way", [by_metadata, by_configurable, by_context])
def test_what_another_server_does_is_in_the_turn(way: Any, places: Callable[..., Place]) -> None:
    server = places(prices, propagate=True)
    seen: list[dict[str, str]] = []

    def asks_the_server(_state: Any) -> dict[str, Any]:
        seen.append(current_turn().headers())
        return {"messages": elsewhere(lambda: way(server, seen[-1]))["messages"][-1:]}

    client = places(asks_the_server, propagate=True)
    client.graph.invoke(asks(), config_of("c1", user_id=SECRET, channel="web", topic="prices"))
    [turn] = client.turns()
    here, there = client.spans(), server.spans()
    [caller] = [span for span in here if span.name == "work"]
    assert {span.name for span in there} == {"LangGraph", "work", "gpt-4o-mini"}
    assert {span.trace_id for span in there} == {turn.trace_id}
    [called] = [span for span in there if span.name == "LangGraph"]
    assert called.parent_id == caller.span_id
    assert_all_tagged([span for span in here if a.TURN_ID in span.attributes] + there)
    for name in (a.SESSION_ID, a.TURN_ID, a.CONVERSATION_ID, a.USER_ID, a.SESSION_CHANNEL, a.CONVERSATION_TOPIC):
        assert {span.attributes.get(name) for span in there} == {caller.attributes[name]}, name
    assert server.turns() == []  # it is no turn there
    assert server.handler.open_runs == 0
    assert SECRET not in str(seen)


def test_on_one_ledger_the_turn_has_the_tokens_of_both(tmp_path: Path) -> None:
    server = Place(tmp_path / "shared.db", prices, propagate=True)

    def asks_the_server(_state: Any) -> dict[str, Any]:
        headers = current_turn().headers()
        return {
            "messages": [FakeModel().invoke("think"), elsewhere(lambda: by_metadata(server, headers))["messages"][-1]]
        }

    client = Place(tmp_path / "shared.db", asks_the_server, propagate=True)
    client.graph.invoke(asks(), config_of("c1", user_id=SECRET))
    server.tracker.shutdown()
    [turn] = client.turns()
    assert (turn.status, turn.llm_calls, turn.input_tokens) == ("completed", 2, 200)
    [session] = client.tracker.ledger.sessions()
    assert (session.total_turns, session.llm_calls, session.input_tokens) == (1, 2, 200)
    assert client.tracker.ledger.span_counts(session.id) == {
        turn.id: len({span.span_id for span in client.spans()}) - 1
    }
    client.tracker.shutdown()


def test_by_default_nothing_goes_out_and_nothing_is_believed(places: Callable[..., Place]) -> None:
    found: list[Any] = []

    def looks(_state: Any) -> dict[str, Any]:
        found.append(dict(baggage.get_all()))
        return {"messages": [("ai", "fine")]}

    client = places(looks, propagate=False)
    server = places(prices, propagate=False)
    client.graph.invoke(asks(), config_of("c1", user_id=SECRET))
    with client.tracker.session(user_id=SECRET) as session, session.conversation("c2").turn("Hi") as turn:
        assert "baggage" not in turn.config["metadata"]
        headers = turn.headers()  # asked for by hand, it is there
        elsewhere(lambda: by_metadata(server, headers))
    assert found == [{}]
    [own] = server.turns()
    assert own.id != turn.id
    assert own.number == 1


def test_inside_a_node_the_turn_is_baggage_where_it_may_travel(places: Callable[..., Place]) -> None:
    found: list[Any] = []

    def looks(_state: Any) -> dict[str, Any]:
        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        found.append((dict(baggage.get_all()), carrier, current_turn().headers()))
        return {"messages": [("ai", "fine")]}

    client = places(looks, propagate=True)
    client.graph.invoke(asks(), config_of("c1", user_id=SECRET))
    [turn] = client.turns()
    [(carried, carrier, headers)] = found
    assert carried[a.TURN_ID] == turn.id
    assert carried[a.TURN_NUMBER] == "1"
    assert carrier["traceparent"] == headers["traceparent"]
    assert SECRET not in str(found)
    assert baggage.get_all() == {}


@pytest.mark.parametrize(
    "headers",
    [
        {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
        {"traceparent": "nonsense", "baggage": "turn.id=t1,session.id=s1,conversation.id=c1,turn.number=1"},
        {
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "baggage": "turn.id=t1,session.id=s1,conversation.id=c1,turn.number=many",
        },
        {
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "baggage": "turn.id=t1,session.id=%C3%A9,conversation.id=c1,turn.number=1",
        },
        {"traceparent": 7, "baggage": ["turn.id"]},
    ],
)
def test_what_is_no_whole_turn_is_a_turn_of_its_own(headers: Any, places: Callable[..., Place]) -> None:
    server = places(prices, propagate=True)
    elsewhere(lambda: by_metadata(server, headers))
    [turn] = server.turns()
    assert (turn.number, turn.status) == (1, "completed")


def test_a_user_id_that_is_no_hash_is_not_taken_over(places: Callable[..., Place]) -> None:
    server = places(prices, propagate=True)
    headers = {
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "baggage": "turn.id=t1,session.id=s1,conversation.id=c1,turn.number=1,user.id=zoe-42@example.com",
    }
    elsewhere(lambda: by_metadata(server, headers))
    spans = server.spans()
    assert {span.attributes.get(a.USER_ID) for span in spans} == {None}
    assert {span.attributes[a.SESSION_ID] for span in spans} == {"s1"}


def test_two_requests_of_one_turn_at_once_keep_their_callers(places: Callable[..., Place]) -> None:
    server = places(prices, propagate=True)
    turn = "turn.id=t1,session.id=s1,conversation.id=c1,turn.number=1"
    callers = ("b7ad6b7169203331", "c7ad6b7169203332")
    threads = [
        threading.Thread(
            target=by_metadata,
            args=(server, {"traceparent": f"00-0af7651916cd43dd8448eb211c80319c-{span}-01", "baggage": turn}),
        )
        for span in callers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(span.parent_id or "" for span in server.spans() if span.name == "LangGraph") == sorted(callers)
    assert trace.get_current_span() is trace.INVALID_SPAN
