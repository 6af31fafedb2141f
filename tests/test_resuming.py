"""A turn that several processes have a part in is one turn: its numbers are whole, and its words are its own."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

import postgres
from apps import Builder, FakeModel, State, asks, config_of
from turntrace import SessionCallbackHandler, SessionTracker
from turntrace import attributes as a
from turntrace.lifecycle.sweep import Swept
from turntrace.records import Step, TurnSummary
from turntrace.testing import Capture, CapturedSpan, Clock, assert_all_tagged, outbox_spans

MINUTE = 60_000
_servers = ExitStack()


@cache
def postgres_url() -> str:
    """Return the URL of the PostgreSQL server of these tests; it is started when it is first asked for."""
    return _servers.enter_context(postgres.server())


@pytest.fixture(scope="module", autouse=True)
def _stop_servers() -> Iterator[None]:
    yield
    _servers.close()
    postgres_url.cache_clear()


def latest(spans: list[CapturedSpan]) -> list[CapturedSpan]:
    """Return spans as a server keeps them: of those that came twice the latter."""
    return list({span.span_id: span for span in spans}.values())


class Workers:
    """Trackers on one ledger, as of several processes, which share the checkpoints of their graphs."""

    def __init__(self, url: str, capture: Capture) -> None:
        self.capture = capture
        self.clock = Clock()
        self.saver = InMemorySaver()
        self.url = url
        self.trackers: list[SessionTracker] = []

    def tracker(self, *, outbox: bool = True) -> SessionTracker:
        """Open one more."""
        self.trackers.append(self.capture.tracker(self.url, clock=self.clock, outbox=outbox))
        return self.trackers[-1]

    def graph(self, tracker: SessionTracker, *nodes: Any) -> Any:
        """Compile the same graph as another process does: nodes in a line, named by their functions."""
        builder: Builder = StateGraph(State)
        before = START
        for node in nodes:
            builder.add_node(node.__name__, node)
            builder.add_edge(before, node.__name__)
            before = node.__name__
        return builder.compile(checkpointer=self.saver).with_config(callbacks=[SessionCallbackHandler(tracker)])

    def rows(self) -> list[tuple[TurnSummary, list[Step]]]:
        for tracker in self.trackers:
            tracker.flush()
        ledger = self.trackers[0].ledger
        return [row for session in ledger.sessions() for row in ledger.turns(session.id)]

    def row(self) -> tuple[TurnSummary, list[Step]]:
        [row] = self.rows()
        return row

    def spans(self) -> list[CapturedSpan]:
        """Return what is sent of turns, as a server keeps it."""
        self.rows()
        return latest([span for span in outbox_spans(self.trackers[0].ledger) if a.TURN_ID in span.attributes])

    def is_whole(self, **figures: Any) -> TurnSummary:
        """Assert that there is one turn, and that its row, its session and its spans tell the same."""
        turn, steps = self.row()
        assert {name: getattr(turn, name) for name in figures} == figures
        [session] = self.trackers[0].ledger.sessions()
        sums = ("llm_calls", "tool_calls", "input_tokens", "output_tokens", "total_cost_usd", "active_ms", "wait_ms")
        of_turn = [getattr(turn, {"total_cost_usd": "cost_usd", "active_ms": "latency_ms"}.get(n, n)) for n in sums]
        assert [getattr(session, name) for name in sums] == of_turn
        assert (session.total_turns, session.failed_turns) == (1, turn.status == "failed")
        spans = self.spans()
        assert_all_tagged(spans)
        assert self.trackers[0].ledger.span_counts(session.id) == {turn.id: len(spans)}
        assert {step.span_id for step in steps} == {span.span_id for span in spans} - {turn.root_span_id}
        [root] = [span for span in spans if span.name == a.SPAN_TURN]
        told = turn.attributes()
        assert {name: root.attributes.get(name) for name in told} == told
        return turn


@pytest.fixture(params=["sqlite", "postgresql"])
def workers(request: pytest.FixtureRequest, capture: Capture, tmp_path: Path) -> Workers:
    url = f"sqlite:///{tmp_path}/shared.db"
    return Workers(postgres.new_schema(postgres_url()) if request.param == "postgresql" else url, capture)


def ask(_state: State) -> dict[str, Any]:
    return {"messages": [("ai", f"You said {interrupt('Really?')}.")]}


def think(_state: State) -> dict[str, Any]:
    FakeModel().invoke("think")
    return {}


# --- the sweep --------------------------------------------------------------------------------------------------------
def test_the_sweep_of_another_process_leaves_a_turn_alone_that_was_just_answered(workers: Workers) -> None:
    tracker, other = workers.tracker(), workers.tracker()
    swept: list[Swept] = []

    def work(_state: State) -> dict[str, Any]:
        workers.clock.advance(minutes=2)
        swept.append(other.sweep())
        return {"messages": [("ai", "Done.")]}

    graph = workers.graph(tracker, ask, work)
    graph.invoke(asks(), config_of("c1", user_id="ann"))
    tracker.flush()
    workers.clock.advance(minutes=29)
    graph.invoke(Command(resume="yes"), config_of("c1", user_id="ann"))
    assert swept == [Swept()]
    workers.is_whole(status="completed", wait_ms=29 * MINUTE)
    workers.clock.advance(seconds=10)
    graph.invoke(asks(), config_of("c2", user_id="ann"))
    tracker.flush()
    assert [(each.end_reason, each.total_turns) for each in tracker.ledger.sessions()] == [(None, 2)]
