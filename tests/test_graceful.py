"""Beside others: our handler twice, Langfuse's own, LangSmith's, and handlers of the app that raise or wait."""

import asyncio
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers import LangChainTracer
from langfuse.langchain import CallbackHandler
from langgraph.checkpoint.memory import InMemorySaver
from langsmith import Client

import fresh
from apps import App, Builder, FakeModel, State, asks, config_of, single
from turntrace import SessionCallbackHandler, SessionTracker, track_graph
from turntrace import attributes as a
from turntrace.testing import Capture, CapturedSpan, assert_all_tagged, captured_spans

ANSWER = "The price is 5 euros for tea."
SECRET = "ann@example.com"
STEPS = {"LangGraph": 1, "prepare": 1, "agent": 2, "gpt-4o-mini": 2, "tools": 1, "price_of": 1}

sync_and_async = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
callback_and_tracked = pytest.mark.parametrize("is_tracked", [False, True], ids=["callback", "tracked"])
both_orders = pytest.mark.parametrize("ours_first", [True, False], ids=["ours-first", "theirs-first"])


def compiled(*, is_async: bool = False, is_tracked: bool = False) -> Any:
    builder = App(is_async=is_async).tools()
    return (track_graph(builder) if is_tracked else builder).compile(checkpointer=InMemorySaver())


def run(graph: Any, config: Any, *, is_async: bool = False) -> Any:
    """Run a graph once; the app's answer is the same whatever listens."""
    state = asyncio.run(graph.ainvoke(asks(), config)) if is_async else graph.invoke(asks(), config)
    assert state["messages"][-1].content == ANSWER
    return state


def heard_by(*handlers: Any, ours_first: bool = True, **metadata: Any) -> Any:
    heard = list(handlers if ours_first else reversed(handlers))
    return {**config_of("c-1", **{"user_id": "ann", **metadata}), "callbacks": heard}


def ours(capture: Capture) -> list[CapturedSpan]:
    return [span for span in captured_spans(capture.spans()) if span.scope == a.SCOPE_NAME]


def theirs(capture: Capture) -> list[CapturedSpan]:
    return [span for span in captured_spans(capture.spans()) if span.scope == "langfuse-sdk"]


def assert_turns(
    capture: Capture, tracker: SessionTracker, times: int, *, together: bool = False
) -> list[CapturedSpan]:
    """Assert that there are so many turns with each step once, on spans and in the ledger; return their roots.

    Spans of others are looked at when they are to be in the turns, together with ours.
    """
    spans = ours(capture)
    assert_all_tagged(capture.spans() if together else spans)
    [session] = tracker.ledger.sessions()
    rows = tracker.ledger.turns(session.id)
    assert [row.number for row, _ in rows] == list(range(1, times + 1))
    for row, steps in rows:
        assert (row.status, row.agent_runs) == ("completed", 1)
        assert (row.input_tokens, row.output_tokens, row.llm_calls, row.tool_calls) == (200, 40, 2, 1)
        assert Counter(step.name for step in steps) == STEPS
        names = Counter(span.name for span in spans if span.attributes.get(a.TURN_ID) == row.id)
        assert names == {**STEPS, a.SPAN_TURN: 1}
    assert session.total_tokens == 240 * times
    return [span for span in spans if span.name == a.SPAN_TURN and span.attributes[a.SESSION_ID] == session.id]


def assert_turns_beside(capture: Capture, other: Any, ours_first: bool, is_async: bool) -> None:
    """Run two turns with another handler beside ours, and assert that they are as if it were not there."""
    tracker = capture.tracker()
    handler = SessionCallbackHandler(tracker)
    graph = compiled(is_async=is_async)
    for _ in range(2):
        run(graph, heard_by(handler, other, ours_first=ours_first), is_async=is_async)
    assert_turns(capture, tracker, 2)
    assert handler.open_runs == 0


# --- our handler twice ------------------------------------------------------------------------------------------------
TWICE = {
    "the same in one list": lambda tracker: (None, [one := SessionCallbackHandler(tracker), one]),
    "the same, bound and in the call": lambda tracker: (one := SessionCallbackHandler(tracker), [one]),
    "two of one tracker in one list": lambda tracker: (None, [SessionCallbackHandler(tracker) for _ in range(2)]),
    "two of one tracker, bound and in the call": lambda tracker: (
        SessionCallbackHandler(tracker),
        [SessionCallbackHandler(tracker)],
    ),
}


@pytest.mark.parametrize("attach", TWICE.values(), ids=TWICE.keys())
@sync_and_async
@callback_and_tracked
def test_a_handler_that_is_attached_twice_makes_one_turn(
    capture: Capture, attach: Any, is_async: bool, is_tracked: bool
) -> None:
    tracker = capture.tracker()
    bound, given = attach(tracker)
    graph = compiled(is_async=is_async, is_tracked=is_tracked)
    graph = graph if bound is None else graph.with_config(callbacks=[bound])

    states = [run(graph, heard_by(*given), is_async=is_async) for _ in range(2)]

    roots = assert_turns(capture, tracker, 2)
    assert [handler.open_runs for handler in given] == [0] * len(given)
    if is_tracked:
        assert [state["turn_id"] for state in states] == [root.attributes[a.TURN_ID] for root in roots]


@sync_and_async
def test_a_handler_in_the_config_inside_a_turns_block_makes_no_turn_of_its_own(
    capture: Capture, is_async: bool
) -> None:
    tracker = capture.tracker()
    graph = compiled(is_async=is_async).with_config(callbacks=[SessionCallbackHandler(tracker)])
    with tracker.session(user_id="ann") as session:
        for _ in range(2):
            with session.conversation("c-1").turn("What does tea cost?") as turn:
                run(graph, turn.config, is_async=is_async)
    assert_turns(capture, tracker, 2)


@sync_and_async
@callback_and_tracked
def test_handlers_of_two_trackers_make_a_turn_each(tmp_path: Path, is_async: bool, is_tracked: bool) -> None:
    with Capture() as one, Capture() as other:
        trackers = [each.tracker(f"sqlite:///{tmp_path / name}") for each, name in ((one, "1.db"), (other, "2.db"))]
        handlers = [SessionCallbackHandler(tracker) for tracker in trackers]
        graph = compiled(is_async=is_async, is_tracked=is_tracked)

        states = [run(graph, heard_by(*handlers), is_async=is_async) for _ in range(2)]

        of_each = [assert_turns(*pair, 2) for pair in zip((one, other), trackers, strict=True)]
        assert [handler.open_runs for handler in handlers] == [0, 0]
        ids = [[root.attributes[a.TURN_ID] for root in roots] for roots in of_each]
        assert not set(ids[0]) & set(ids[1])
        if is_tracked:
            assert [state["turn_id"] for state in states] in ids, "the ids of two trackers are mixed in the state"


# --- beside Langfuse's own handler ------------------------------------------------------------------------------------
@pytest.mark.usefixtures("langfuse_client")
@both_orders
@sync_and_async
def test_beside_langfuses_own_handler_turns_and_tokens_are_counted_once_and_what_it_starts_in_our_steps_is_tagged(
    capture: Capture, ours_first: bool, is_async: bool
) -> None:
    """Its root, and with it first its nodes, begin before a step of ours is current: they are a trace of their own."""
    assert_turns_beside(capture, CallbackHandler(), ours_first, is_async)

    turn_of = {span.trace_id: span.attributes[a.TURN_ID] for span in theirs(capture) if a.TURN_ID in span.attributes}
    inner = [span for span in theirs(capture) if span.name in ("FakeModel", "price_of", "tools_condition")]
    assert Counter(span.name for span in inner) == {"FakeModel": 4, "price_of": 2, "tools_condition": 4}
    assert [span.attributes[a.TURN_ID] for span in inner] == [turn_of[span.trace_id] for span in inner]
    assert set(turn_of.values()) == {span.attributes[a.TURN_ID] for span in ours(capture) if span.name == a.SPAN_TURN}


@pytest.mark.usefixtures("langfuse_client")
@both_orders
@sync_and_async
def test_inside_a_turns_block_the_spans_of_langfuses_own_handler_fall_into_the_turn(
    capture: Capture, ours_first: bool, is_async: bool
) -> None:
    tracker = capture.tracker()
    graph = compiled(is_async=is_async)
    with tracker.session(user_id="ann") as session:
        for _ in range(2):
            with session.conversation("c-1").turn("What does tea cost?") as turn:
                heard = heard_by(SessionCallbackHandler(tracker), CallbackHandler(), ours_first=ours_first)
                run(graph, {**turn.config, "callbacks": heard["callbacks"]}, is_async=is_async)

    roots = assert_turns(capture, tracker, 2, together=True)
    assert {span.trace_id for span in theirs(capture)} == {root.trace_id for root in roots}


NOTED = """
import logging, sys
sys.path.insert(0, {tests!r})
from apps import App, asks, config_of
from langfuse import Langfuse
from langfuse.langchain import CallbackHandler
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter as Nowhere
from turntrace import SessionCallbackHandler
from turntrace.testing import Capture

logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
with Capture() as capture:
    Langfuse(public_key="pk", secret_key="sk", tracer_provider=capture.provider, span_exporter=Nowhere())
    for step in (1, -1, 1):
        handlers = [SessionCallbackHandler(capture.tracker()), *([CallbackHandler()] if {beside} else [])]
        App().tools().compile().invoke(asks(), {{**config_of(), "callbacks": handlers[::step]}})
"""


def noted(beside: bool) -> list[str]:
    output = fresh.run(NOTED.format(tests=str(Path(__file__).parent), beside=beside))
    return [line for line in output.splitlines() if " turntrace " in line]


def test_that_spans_are_made_twice_is_said_once_a_process() -> None:
    assert noted(beside=False) == []
    [line] = noted(beside=True)
    assert line.startswith("WARNING turntrace ")
    assert "CallbackHandler" in line
    assert re.search(r"Langfuse counts the tokens.*(twice|both)", line), "it does not say what is wrong"
    assert re.search(r"[Rr]emove one of (both|the two)", line), "it does not say what to do"


# --- beside LangSmith's tracer ----------------------------------------------------------------------------------------
class Smith:
    """LangSmith's tracer, whose client sends what it would send into a list."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        client = Client(api_url="http://127.0.0.1:9", api_key="none", session=self, auto_batch_tracing=False)  # type: ignore[arg-type]
        self.tracer = LangChainTracer(client=client, project_name="tests")

    def request(self, method: str, url: str, data: bytes = b"", **_: Any) -> Any:
        self.sent.append(data)
        return SimpleNamespace(status_code=202, text="", content=b"{}", raise_for_status=lambda: None)

    def mount(self, *_: Any) -> None: ...

    def close(self) -> None: ...

    def metadata(self) -> set[tuple[str, str]]:
        """Return names and values of the metadata of all runs but for LangGraph's ids of its own tasks."""
        runs = [json.loads(body) for body in self.sent]
        found = {(name, str(value)) for each in runs for name, value in each["extra"]["metadata"].items()}
        return {pair for pair in found if not pair[0].endswith(("checkpoint_ns", "revision_id"))}


@both_orders
@sync_and_async
def test_beside_langsmiths_tracer_there_is_one_turn_and_the_tracer_sees_no_more_metadata(
    capture: Capture, ours_first: bool, is_async: bool
) -> None:
    tracker, beside, alone = capture.tracker(), Smith(), Smith()
    handler = SessionCallbackHandler(tracker)
    for _ in range(2):
        config = heard_by(handler, beside.tracer, ours_first=ours_first, channel="web")
        run(compiled(is_async=is_async), config, is_async=is_async)
        run(compiled(is_async=is_async), heard_by(alone.tracer, channel="web"), is_async=is_async)

    assert_turns(capture, tracker, 2)
    assert handler.open_runs == 0
    assert len(beside.sent) == len(alone.sent) > 0
    assert beside.metadata() == alone.metadata()


@sync_and_async
def test_langsmiths_tracer_sees_nothing_of_the_user_of_a_session_by_hand(capture: Capture, is_async: bool) -> None:
    tracker, smith = capture.tracker(), Smith()
    graph = compiled(is_async=is_async, is_tracked=True)
    with tracker.session(user_id=SECRET) as session, session.conversation("c-1").turn("What does tea cost?") as turn:
        run(graph, {**turn.config, "callbacks": [*turn.config["callbacks"], smith.tracer]}, is_async=is_async)

    assert_turns(capture, tracker, 1)
    assert {name for name, _ in smith.metadata() if "turntrace" in name} == {"turntrace_turn_id"}
    assert not any(SECRET.encode() in body for body in smith.sent)


# --- beside handlers of the app ---------------------------------------------------------------------------------------
def raising(method: str, *, raise_error: bool = False, below_the_root: bool = False) -> Any:
    """Make a handler of the app's one of whose methods raises."""

    def raises(*_: Any, parent_run_id: Any = None, **__: Any) -> None:
        if parent_run_id is not None or not below_the_root:
            raise ValueError("the app's own")

    return type("Raising", (BaseCallbackHandler,), {method: staticmethod(raises), "raise_error": raise_error})()


@pytest.mark.parametrize(
    "method",
    ["on_chain_start", "on_chain_end", "on_chat_model_start", "on_llm_end", "on_tool_start", "on_tool_end"],
)
@both_orders
@sync_and_async
def test_a_handler_of_the_apps_that_raises_changes_nothing(
    capture: Capture, method: str, ours_first: bool, is_async: bool
) -> None:
    assert_turns_beside(capture, raising(method), ours_first, is_async)


@pytest.mark.parametrize("method", ["on_chain_start", "on_chain_end", "on_chat_model_start", "on_llm_end"])
@both_orders
@sync_and_async
def test_an_error_that_a_handler_of_the_apps_raises_into_it_ends_the_turn(
    capture: Capture, method: str, ours_first: bool, is_async: bool
) -> None:
    tracker = capture.tracker()
    handler = SessionCallbackHandler(tracker)
    other = raising(method, raise_error=True, below_the_root=method == "on_chain_start")
    graph = compiled(is_async=is_async)
    with pytest.raises(ValueError, match="the app's own"):
        run(graph, heard_by(handler, other, ours_first=ours_first), is_async=is_async)
    assert handler.open_runs == 0
    run(graph, heard_by(handler), is_async=is_async)

    spans = ours(capture)
    assert_all_tagged(spans)
    roots = [span.attributes for span in spans if span.name == a.SPAN_TURN]
    assert [(has[a.TURN_NUMBER], has[a.TURN_STATUS]) for has in roots] == [(1, "failed"), (2, "completed")]
    assert roots[0][a.ERROR_TYPE] == "ValueError"


@both_orders
@sync_and_async
def test_an_error_raised_before_the_graph_has_begun_leaves_the_next_turn_right(
    capture: Capture, ours_first: bool, is_async: bool
) -> None:
    """Nobody tells our handler that the run which it heard of never came about: it stays open."""
    handler, other = SessionCallbackHandler(capture.tracker()), raising("on_chain_start", raise_error=True)
    graph = compiled(is_async=is_async)
    with pytest.raises(ValueError, match="the app's own"):
        run(graph, heard_by(handler, other, ours_first=ours_first), is_async=is_async)
    run(graph, heard_by(handler), is_async=is_async)

    spans = ours(capture)
    assert_all_tagged(spans)
    [root] = [span for span in spans if span.name == a.SPAN_TURN]
    assert root.attributes[a.TURN_STATUS] == "completed"
    assert handler.open_runs <= 1


class Waiting(AsyncCallbackHandler):
    """A handler of the app's that is async."""

    def __init__(self) -> None:
        self.heard: Counter[str] = Counter()

    async def on_chain_start(self, *_: Any, **__: Any) -> None:
        await asyncio.sleep(0.001)
        self.heard["start"] += 1

    async def on_chain_end(self, *_: Any, **__: Any) -> None:
        await asyncio.sleep(0.001)
        self.heard["end"] += 1


@both_orders
@sync_and_async
def test_an_async_handler_of_the_apps_hears_all_beside_ours(capture: Capture, ours_first: bool, is_async: bool) -> None:
    waiting = Waiting()
    assert_turns_beside(capture, waiting, ours_first, is_async)
    assert waiting.heard["start"] == waiting.heard["end"] > 0


# --- our handler on a part of the graph -------------------------------------------------------------------------------
@callback_and_tracked
def test_a_handler_that_is_given_to_one_call_in_a_node_makes_it_a_turn_of_the_thread(
    capture: Capture, is_tracked: bool
) -> None:
    handler = SessionCallbackHandler(capture.tracker())

    def work(state: State) -> Any:
        return {"messages": [FakeModel().invoke(state["messages"], {"callbacks": [handler]})]}

    graph: Any = (track_graph(single(work)) if is_tracked else single(work)).compile(checkpointer=InMemorySaver())
    for _ in range(2):
        graph.invoke(asks(), config_of("c-1", user_id="ann"))

    spans = ours(capture)
    assert_all_tagged(spans)
    names = (a.CONVERSATION_ID, a.TURN_NUMBER, a.TURN_LLM_CALLS)
    roots = [tuple(span.attributes[name] for name in names) for span in spans if span.name == a.SPAN_TURN]
    assert roots == [("c-1", 1, 1), ("c-1", 2, 1)]
    assert handler.open_runs == 0


@callback_and_tracked
def test_what_has_the_handler_below_a_graph_without_it_is_a_turn_of_its_own(capture: Capture, is_tracked: bool) -> None:
    handler = SessionCallbackHandler(capture.tracker())
    node: Any = RunnableLambda(lambda state: {"messages": [FakeModel().invoke(state["messages"])]})
    builder: Builder = single(node.with_config(callbacks=[handler]))
    graph: Any = (track_graph(builder) if is_tracked else builder).compile(checkpointer=InMemorySaver())

    state = graph.invoke(asks(), config_of("c-1", user_id="ann"))

    assert [message.type for message in state["messages"]] == ["human", "ai"]
    assert handler.open_runs == 0
    (root,) = [span for span in ours(capture) if span.name == a.SPAN_TURN]
    assert root.attributes[a.CONVERSATION_ID] == "c-1"
