"""The little app that every fault is put to, tracked and untracked, and what is to be seen of it afterwards.

Its answers depend on the conversation so far. It is also imported by processes that the tests start.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from langgraph.checkpoint.memory import InMemorySaver
from opentelemetry.sdk.trace import TracerProvider

from apps import FakeModel, State, asks, config_of, single
from turntrace import ContextTracker, SessionCallbackHandler, SessionTracker, track_graph
from turntrace import attributes as a
from turntrace.records import TurnSummary
from turntrace.testing import CapturedSpan, assert_all_tagged, outbox_spans

ASKED = "What does tea cost?"
STAGES = ["asked", "bought"]
WAYS = ("sync", "async", "block")


class App:
    """Two graphs of one node: one that is sync, and one that is async.

    Args:
        context: Fits what the model is given, where the app has one.
        inside: Called in each node.
    """

    def __init__(self, context: ContextTracker | None = None, inside: Callable[[], object] = lambda: None) -> None:
        def answer(state: State) -> dict[str, Any]:
            inside()
            messages = state["messages"]
            FakeModel().invoke(messages if context is None else context.fit(messages).messages)
            return {"messages": [("ai", f"{len(messages)} messages: tea costs 5 euros.")]}

        async def aanswer(state: State) -> dict[str, Any]:
            await asyncio.sleep(0)
            return answer(state)

        self.sync_graph, self.async_graph = single(answer), single(aanswer)


class Untracked:
    """The app as it is without turntrace."""

    def __init__(self, app: App) -> None:
        saver = InMemorySaver()
        self._sync: Any = app.sync_graph.compile(checkpointer=saver)
        self._async: Any = app.async_graph.compile(checkpointer=saver)

    def say(self) -> list[str]:
        """Say the same in each of the ways, and return the answers."""
        states = [self._sync.invoke(asks(ASKED), config_of("sync"))]
        states.append(asyncio.run(self._async.ainvoke(asks(ASKED), config_of("async"))))
        states.append(self._sync.invoke(asks(ASKED), config_of("block")))
        return [str(state["messages"][-1].content) for state in states]


class Tracked:
    """The app with turntrace: two graphs with the callback, and a block."""

    def __init__(self, app: App, tracker: SessionTracker, **reads: Any) -> None:
        self.tracker = tracker
        self.handler = SessionCallbackHandler(tracker, **reads)
        saver = InMemorySaver()
        both = (track_graph(graph).compile(checkpointer=saver) for graph in (app.sync_graph, app.async_graph))
        self._sync: Any
        self._async: Any
        self._sync, self._async = (graph.with_config(callbacks=[self.handler]) for graph in both)
        self._plain: Any = app.sync_graph.compile(checkpointer=saver)

    def say(self) -> list[str]:
        """Say the same in each of the ways, and return the answers."""
        return [self.say_sync(), self.say_async(), self.say_in_a_block()]

    def say_sync(self) -> str:
        """Run the sync graph, with the callback."""
        state = self._sync.invoke(asks(ASKED), config_of("sync", user_id="ann"))
        return str(state["messages"][-1].content)

    def say_async(self) -> str:
        """Run the async graph, with the callback."""
        state = asyncio.run(self._async.ainvoke(asks(ASKED), config_of("async", user_id="bob")))
        return str(state["messages"][-1].content)

    def say_in_a_block(self) -> str:
        """Run the sync graph inside the block of a turn, in a session of its own, with a journey and feedback."""
        with self.tracker.session(user_id="cyd") as session:
            journey = session.journey("buying", stages=STAGES)
            with session.conversation("block").turn(ASKED) as turn:
                journey.enter("asked")
                state = self._plain.invoke(turn.input, config_of("block"))
            turn.feedback(True)
        return str(state["messages"][-1].content)


class Heard(logging.Handler):
    """Keeps what turntrace logs from WARNING on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> "Heard":
        logging.getLogger("turntrace").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("turntrace").removeHandler(self)


def made_tracker(ledger: Any, **settings: Any) -> SessionTracker:
    """Make a tracker as an app without Langfuse's keys has it: spans wait in the outbox."""
    settings = {"user_hash_key": "a key of the tests", "outbox": True, "tracer_provider": TracerProvider(), **settings}
    return SessionTracker(ledger, **settings)


def reconciled(tracker: SessionTracker) -> tuple[list[TurnSummary], list[CapturedSpan]]:
    """Return the turns that have ended and the spans of the outbox, once it is sure that they agree."""
    ledger = tracker.ledger
    spans = list({span.span_id: span for span in outbox_spans(ledger)}.values())
    turns: list[TurnSummary] = []
    for session in ledger.sessions(limit=1000):
        of_session = [turn for turn, _ in ledger.turns(session.id)]
        assert session.total_turns == len([turn for turn in of_session if turn.status != "open"]), session
        assert min(session.duration_ms or 0, session.active_ms, session.wait_ms) >= 0, session
        turns += of_session
    ended = [turn for turn in turns if turn.status != "open"]
    of_turns = [span for span in spans if a.TURN_ID in span.attributes]
    if ended or of_turns:
        assert_all_tagged(of_turns)
    roots = {str(span.attributes[a.TURN_ID]): span for span in spans if span.name == a.SPAN_TURN}
    assert roots.keys() == {turn.id for turn in ended}, "a turn without its root, or a root without its turn"
    for turn in ended:
        root, own = roots[turn.id], [span for span in spans if span.attributes.get(a.TURN_ID) == turn.id]
        assert {span.attributes[a.TURN_NUMBER] for span in own} == {turn.number}
        assert (root.attributes[a.TURN_STATUS], root.attributes[a.SESSION_ID]) == (turn.status, turn.session_id)
        assert {span.trace_id for span in own} == {turn.trace_id}
        assert min(turn.latency_ms or 0, turn.wait_ms) >= 0, turn
    for way in {turn.conversation_id for turn in turns}:
        numbers = sorted(turn.number for turn in turns if turn.conversation_id == way)
        assert numbers == list(range(1, len(numbers) + 1)), (way, numbers)
    return ended, spans


def kept(turns: Sequence[TurnSummary], spans: Sequence[CapturedSpan]) -> str:
    """Say in a few words what was kept."""
    statuses = [turn.status for turn in turns if turn.status != "completed"]
    others = "".join(f", {statuses.count(each)} {each}" for each in sorted({str(each) for each in statuses}))
    return f"{len(turns)} turns{others}, {len(spans)} spans"
