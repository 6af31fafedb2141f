"""Closing turns that nobody ends: their process died, or the person whom they waited for does not answer."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from turntrace import attributes as a
from turntrace.export import EndedSpan
from turntrace.ledger import ABANDONED
from turntrace.lifecycle.ending import Failure, end_span, words_of
from turntrace.lifecycle.jobs import SpanJob, known_json
from turntrace.lifecycle.rooting import RootStart
from turntrace.records import SessionFacts, TurnSummary

if TYPE_CHECKING:
    from turntrace.ledger import LedgerWriter
    from turntrace.lifecycle.tracker import SessionTracker


def abandon_running(tracker: "SessionTracker", ledger: "LedgerWriter", row: Any) -> bool:
    """Close a turn whose process died: its row, and the span that its trace lacks, the root.

    Args:
        tracker: The tracker.
        ledger: What writes.
        row: The turn and what its session is, as `LedgerWriter.stale_turns` returns it.

    Returns:
        Whether it was closed by this.
    """
    names = ("id", "session_id", "conversation_id", "user_id", "number", "started_ns", "role", "own")
    known = {name: row[name] for name in (*names, "trace_id", "root_span_id")}
    turn = TurnSummary(**known, ended_ns=row["started_ns"])  # nobody saw its end
    before = ledger.written_turn(row["id"])  # what it did before it waited
    root = _AbandonedRoot(tracker, row, replace(before.turn if before else turn, status=ABANDONED, error=ABANDONED))
    root.put(ledger)
    steps, spans = (before.steps, before.spans) if before else ((), 0)
    ended = ledger.finish_turn(root.turn, steps, spans=spans + root.spans, topic=root.topic, before=before)
    return bool(ended)


def abandon_waiting(tracker: "SessionTracker", ledger: "LedgerWriter", row: Any) -> bool:
    """Close a turn that waits for a person who does not answer; tell whether it was closed by this.

    Args:
        tracker: The tracker.
        ledger: What writes.
        row: The turn and what its session is, as `LedgerWriter.waiting_turns` returns it.
    """
    names = (name for name in TurnSummary.__slots__ if name in row)
    turn = TurnSummary(**{**{name: row[name] for name in names}, "status": ABANDONED, "error": ABANDONED})
    if not ledger.abandon_waiting(turn.id):
        return False
    _AbandonedRoot(tracker, row, turn).put(ledger)
    return True


class AbandonWaiting:
    """Closes a turn that waits for a person who went on with something else instead.

    Args:
        tracker: The tracker.
        turn_id: The turn.
    """

    def __init__(self, tracker: "SessionTracker", turn_id: str) -> None:
        self._tracker = tracker
        self._turn_id = turn_id

    def prepare(self) -> None:
        """Do nothing: what it is about is in the ledger."""

    def write(self, ledger: "LedgerWriter") -> None:
        """Close it, unless it goes on after all."""
        for row in ledger.waiting_turns(1, turn_id=self._turn_id):
            abandon_waiting(self._tracker, ledger, row)


class _AbandonedRoot(SpanJob):
    """The root span of a turn that is closed as abandoned."""

    def __init__(self, tracker: "SessionTracker", row: Any, turn: TurnSummary) -> None:
        super().__init__(tracker)
        self.turn = turn
        names = ("channel", "type", "tier", "org_id", "locale", "client_version")
        facts = {name: row[f"session_{name}"] for name in names}
        session = SessionFacts(id=turn.session_id, user_id=turn.user_id, **facts)
        begun = RootStart.again(turn, session)
        self.topic = begun.tags.topic
        self._keep(self._root(begun))

    @property
    def spans(self) -> int:
        """How many spans that is: one, or none where spans are not recorded."""
        return len(self._spans)

    def put(self, ledger: "LedgerWriter") -> None:
        """Put the span into the outbox."""
        self._put_spans(ledger)

    def _root(self, begun: RootStart) -> list[EndedSpan]:
        turn, target = self.turn, self._tracker.target
        failure = Failure(ABANDONED, None, failed=False)
        asked = {"turn": turn.number, "type": turn.input_type, "length": turn.input_length}
        shown = {
            a.LANGFUSE_OBSERVATION_INPUT: known_json(asked),
            a.LANGFUSE_OBSERVATION_OUTPUT: known_json({"status": turn.status, "type": turn.output_type}),
        }
        with target.capturing() as ended:
            span = begun.start(target, turn.attributes() | shown | words_of(failure))
            end_span(span, turn.ended_ns, failure)
        return ended
