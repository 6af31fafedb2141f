"""Where turntrace meets the app: an error of ours never changes what a graph returns, and is told once."""

import asyncio
import copy
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from apps import App, Builder, State, asks, config_of, single
from turntrace import SessionCallbackHandler, SessionTracker, boundary, track_graph
from turntrace import attributes as a
from turntrace.graph import extract
from turntrace.testing import Capture, Ids, assert_all_tagged, captured_spans, outbox_spans

pytestmark = pytest.mark.usefixtures("lenient")

ANSWER = "The price is 5 euros for tea."
SECRET = "ann@example.com"


class Broken:
    """A callable that raises while it is told to."""

    def __init__(self, works: Callable[..., Any], *, times: int | None = None) -> None:
        self._works = works
        self.times = times

    def __call__(self, *args: Any) -> Any:
        if self.times is None or self.times > 0:
            self.times = None if self.times is None else self.times - 1
            raise RuntimeError(SECRET)
        return self._works(*args)


class BrokenProcessor(SpanProcessor):
    """An exporter of the app's that raises."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        raise RuntimeError(SECRET)

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError(SECRET)


def compiled(tracker: SessionTracker) -> Any:
    graph: Any = track_graph(App().tools()).compile(checkpointer=InMemorySaver())
    return graph.with_config(callbacks=[SessionCallbackHandler(tracker)])


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "turntrace" and record.levelno >= 30]


def open_runs(graph: Any) -> int:
    handler: SessionCallbackHandler = graph.config["callbacks"][0]
    return handler.open_runs


# --- whatever of ours breaks ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", ["clock", "ids", "classify"])
def test_a_part_that_always_raises_changes_nothing(
    capture: Capture, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    settings: dict[str, Any] = {part: Broken(lambda *_: "")}
    graph = compiled(capture.tracker(**settings))

    for _ in range(3):
        assert graph.invoke(asks(), config_of())["messages"][-1].content == ANSWER
    asyncio.run(graph.ainvoke(asks(), config_of()))
    list(graph.stream(asks(), config_of(), stream_mode="messages"))

    capture.spans()
    assert open_runs(graph) == 0
    assert sum(boundary.failures.values()) >= 3
    told = logged(caplog)
    assert told
    assert len(told) == len(set(told)), "the same was logged more than once"
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "part",
    [
        "graph.extract.request_of",
        "graph.extract.message_in",
        "graph.extract.step_of",
        "graph.extract.name_of_model",
        "graph.extract.call_of",
        "graph.extract.answer_in",
        "graph.nodes.returned_with",
        "lifecycle.Turn.open_step",
        "lifecycle.Turn.close_step",
        "lifecycle.Turn.note_answer",
        "lifecycle.Turn.end",
    ],
)
def test_a_bug_of_ours_changes_nothing(
    capture: Capture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """One put there by hand, in each part that a run goes through."""
    graph = compiled(capture.tracker())
    monkeypatch.setattr(f"turntrace.{part}", Broken(lambda *_: None))

    for _ in range(2):
        assert graph.invoke(asks(), config_of())["messages"][-1].content == ANSWER
        assert not trace.get_current_span().get_span_context().is_valid, "a span stays current"

    assert open_runs(graph) == 0
    told = logged(caplog)
    assert "the app goes on" in told[0]
    assert len(told) == len(set(told)), "the same was logged more than once"
    assert SECRET not in caplog.text


def test_strict_raises_what_is_caught_otherwise(capture: Capture) -> None:
    graph = compiled(capture.tracker(ids=Broken(Ids())))
    with boundary.strict(), pytest.raises(RuntimeError, match=SECRET):
        graph.invoke(asks(), config_of())


def test_once_a_part_works_again_turns_are_tracked_again(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = compiled(capture.tracker())
    with monkeypatch.context() as patch:
        patch.setattr("turntrace.graph.extract.request_of", Broken(lambda *_: None))
        graph.invoke(asks(), config_of())
    graph.invoke(asks(), config_of("c-2"))

    spans = captured_spans(capture.spans())
    assert_all_tagged(spans)
    (root,) = [span for span in spans if span.name == a.SPAN_TURN]
    assert root.attributes[a.CONVERSATION_ID] == "c-2"
    assert root.attributes[a.TURN_STATUS] == "completed"


def test_the_parts_of_a_run_whose_beginning_failed_become_no_turns(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node has a parent, and so opens no turn, whether its parent is known or not."""
    graph = compiled(capture.tracker())
    monkeypatch.setattr("turntrace.graph.extract.request_of", Broken(extract.request_of, times=1))
    graph.invoke(asks(), config_of())

    assert [span.name for span in capture.spans() if span.name == a.SPAN_TURN] == []
    assert open_runs(graph) == 0


def test_a_classifier_that_raises_costs_the_turn_its_type_only(
    capture: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = capture.tracker(classify=Broken(lambda _: ""), outbox=True)
    graph = compiled(tracker)
    for _ in range(2):
        graph.invoke(asks(), config_of("c-1", user_id="ann"))

    spans = captured_spans(capture.spans())
    roots = [span for span in spans if span.name == a.SPAN_TURN]
    assert len(roots) == 2, "the turns' spans were never ended"
    assert_all_tagged(spans)
    for root in roots:
        assert a.TURN_INPUT_TYPE not in root.attributes
        assert root.attributes[a.TURN_INPUT_LENGTH] == len("What does tea cost?")
    rows = tracker.ledger.turns(str(roots[0].attributes[a.SESSION_ID]))
    assert [row.status for row, _ in rows] == ["completed", "completed"]
    assert {span.span_id for span in outbox_spans(tracker.ledger)} == {span.span_id for span in spans}
    (told,) = logged(caplog)
    assert "classify" in told


def test_a_price_list_that_raises_costs_the_turn_its_cost_only(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genai_prices.calc_price", Broken(lambda *_, **__: None))
    monkeypatch.setattr("turntrace.lifecycle.pricing._prices", {})  # what other tests looked up
    tracker = capture.tracker()
    compiled(tracker).invoke(asks(), config_of("c-1", user_id="ann"))

    spans = captured_spans(capture.spans())
    (root,) = [span for span in spans if span.name == a.SPAN_TURN]
    assert_all_tagged(spans)
    assert (root.attributes[a.TURN_INPUT_TOKENS], root.attributes[a.TURN_LLM_CALLS]) == (200, 2)


def test_a_span_processor_of_the_apps_that_raises_changes_nothing(capture: Capture) -> None:
    tracker = capture.tracker()
    capture.provider.add_span_processor(BrokenProcessor())
    graph = compiled(tracker)

    assert graph.invoke(asks(), config_of())["messages"][-1].content == ANSWER
    tracker.flush()
    assert open_runs(graph) == 0


# --- what the app says wrongly in its config --------------------------------------------------------------------------
@pytest.mark.parametrize("word", ["user_id", "session_id", "conversation_id"])
@pytest.mark.parametrize(
    "wrong", [["a", "list"], {"a": "dict"}, 1.5, object()], ids=["list", "dict", "float", "object"]
)
def test_an_id_of_a_wrong_type_is_left_out_and_explained_once(
    capture: Capture, caplog: pytest.LogCaptureFixture, word: str, wrong: Any
) -> None:
    graph = compiled(capture.tracker())
    for _ in range(2):
        assert graph.invoke(asks(), config_of(**{word: wrong}))["messages"][-1].content == ANSWER

    assert open_runs(graph) == 0
    (told,) = logged(caplog)
    assert word in told
    assert "Allowed is a string" in told
    assert [span.name for span in capture.spans()].count(a.SPAN_TURN) == 2


def test_input_that_is_no_message_changes_nothing(capture: Capture, caplog: pytest.LogCaptureFixture) -> None:
    tracker = capture.tracker()
    odd: Any = track_graph(_any_state()).compile()
    odd = odd.with_config(callbacks=[SessionCallbackHandler(tracker)])
    inputs: list[Any] = [None, 42, [], [None], [[]], {}, b"bytes", [object()], ("user",), {"role": 1}, [{"content": 2}]]
    for messages in inputs:
        assert odd.invoke({"messages": messages}, config_of())["messages"] == messages

    roots = [span for span in captured_spans(capture.spans()) if span.name == a.SPAN_TURN]
    assert len(roots) == len(inputs)
    assert logged(caplog) == []


def _any_state() -> Builder:
    builder: Builder = StateGraph(dict)
    builder.add_node("work", lambda state: state)
    builder.add_edge(START, "work")
    return builder


# --- a ledger that cannot be written ----------------------------------------------------------------------------------
class Ledger:
    """A ledger's file that another program damages and mends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"

    def _run(self, statement: str) -> None:
        connection = sqlite3.connect(self.path, timeout=10)
        with connection:
            connection.execute(statement)
        connection.close()

    def tables(self) -> list[str]:
        connection = sqlite3.connect(self.path, timeout=10)
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        connection.close()
        return [name for name in names if name.startswith("turntrace_")]

    def damage(self) -> None:
        for name in self.tables():
            self._run(f"ALTER TABLE {name} RENAME TO away_{name}")

    def mend(self) -> None:
        connection = sqlite3.connect(self.path, timeout=10)
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        connection.close()
        for name in names:
            if name.startswith("away_"):
                self._run(f"ALTER TABLE {name} RENAME TO {name.removeprefix('away_')}")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.db")


def test_a_ledger_that_fails_before_a_turn_changes_and_loses_nothing(
    capture: Capture, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    graph = compiled(capture.tracker(ledger.url))
    graph.invoke(asks(), config_of("c-1", user_id="ann"))
    capture.spans()

    ledger.damage()
    try:
        for _ in range(3):
            assert graph.invoke(asks(), config_of("c-1", user_id="ann"))["messages"][-1].content == ANSWER
    finally:
        ledger.mend()
    graph.invoke(asks(), config_of("c-1", user_id="ann"))

    spans = captured_spans(capture.spans())
    assert_all_tagged(spans)
    roots = [span for span in spans if span.name == a.SPAN_TURN]
    assert [root.attributes[a.TURN_NUMBER] for root in roots] == [1, 2, 3, 4, 5]
    assert open_runs(graph) == 0
    told, back = logged(caplog)
    assert "TURNTRACE_LEDGER_URL" in told
    assert "can be written again" in back


def test_turns_keep_their_order_while_those_of_an_outage_are_written_down(capture: Capture, ledger: Ledger) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def classify(text: str) -> str:
        if text == "second":
            begun.set()
            assert goes_on.wait(20)
        return "statement"

    tracker = capture.tracker(ledger.url, classify=classify)
    talk = tracker.start_session(user_id="ann").conversation("c-1")
    talk.start_turn("first").end()
    tracker.flush()

    ledger.damage()
    second = talk.start_turn("second")
    time.sleep(0.2)  # its beginning is tried alone
    second.end()
    third = talk.start_turn("third")
    ledger.mend()
    assert begun.wait(30), "the ledger is back, and the second turn is being written down"
    fourth = talk.start_turn("fourth")
    goes_on.set()
    third.end()
    fourth.end()
    capture.spans()

    assert [turn.number for turn in (second, third, fourth)] == [2, 3, 4]


def test_a_ledger_that_fails_while_a_turn_runs_loses_nothing(
    capture: Capture, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = capture.tracker(ledger.url, outbox=True)
    builder = single(lambda state: {"messages": [("ai", ANSWER)]})

    def breaks(state: State) -> None:
        tracker.flush()
        ledger.damage()

    builder.add_node("breaks", breaks)
    builder.add_edge("work", "breaks")
    graph: Any = track_graph(builder).compile().with_config(callbacks=[SessionCallbackHandler(tracker)])
    try:
        assert graph.invoke(asks(), config_of("c-1", user_id="ann"))["messages"][-1].content == ANSWER
        assert not tracker.flush(0.1), "it cannot have been written"
    finally:
        ledger.mend()

    spans = captured_spans(capture.spans())
    assert_all_tagged(spans)
    (root,) = [span for span in spans if span.name == a.SPAN_TURN]
    ((row, _),) = tracker.ledger.turns(str(root.attributes[a.SESSION_ID]))
    assert row.status == "completed"
    assert {span.span_id for span in outbox_spans(tracker.ledger)} == {span.span_id for span in spans}
    told = logged(caplog)
    assert len(told) == 2
    assert "stays in memory" in told[0] or "Tracking goes on" in told[0]
    assert "can be written again" in told[1]


def test_the_log_has_the_traceback_at_debug_only(capture: Capture, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "turntrace")
    graph = compiled(capture.tracker(ids=Broken(Ids())))
    graph.invoke(asks(), config_of())

    told = [record for record in caplog.records if record.name == "turntrace"]
    [traced] = [record for record in told if "raise RuntimeError(SECRET)" in record.getMessage()]
    assert traced.levelno == logging.DEBUG
    assert traced.getMessage().endswith("\nRuntimeError")


def test_no_log_has_the_text_of_an_error_which_may_be_a_users(
    capture: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    def classify(text: str) -> str:
        try:
            raise LookupError(text)
        except LookupError as error:
            raise ValueError(f"no kind for {text}") from error

    caplog.set_level(logging.DEBUG, "turntrace")
    compiled(capture.tracker(classify=classify)).invoke(asks(SECRET), config_of())
    capture.spans()

    assert "classifying" in caplog.text
    assert "in classify" in caplog.text
    assert caplog.text.rindex("LookupError") < caplog.text.rindex("ValueError")
    assert SECRET not in caplog.text


def test_a_config_with_a_handler_can_be_copied(capture: Capture) -> None:
    config: dict[str, Any] = {"callbacks": [SessionCallbackHandler(capture.tracker())], "metadata": {"user_id": "ann"}}
    copied = copy.deepcopy(config)
    assert copied == config
    assert copied["callbacks"][0] is config["callbacks"][0]
