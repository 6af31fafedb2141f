"""A turn that had waited goes on: it is the same turn and the same trace, in this process or another."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentelemetry import trace

from turntrace.attributes import AttributeValue
from turntrace.identity import time_of_checkpoint
from turntrace.ledger import ABANDONED, INTERRUPT, INTERRUPTED, OPEN, TurnTakenUp
from turntrace.lifecycle.rooting import RootStart
from turntrace.lifecycle.session import Conversation, Session
from turntrace.lifecycle.steps import OpenStep
from turntrace.lifecycle.turn import Turn
from turntrace.records import TurnRequest, TurnSummary

if TYPE_CHECKING:
    from turntrace.ledger import Ledger
    from turntrace.lifecycle.tracker import SessionTracker


def is_to_resume(turn: TurnSummary, checkpoint_id: str | None, *, answers: bool) -> bool:
    """Tell whether a run goes on with the newest turn of its conversation.

    Args:
        turn: That turn, which does not run in this process.
        checkpoint_id: LangGraph's checkpoint that the run is to go on from, when it names one.
        answers: Whether the run answers what a turn waits for; else it goes on without any input.
    """
    if turn.status == OPEN:  # LangGraph takes an answer only when the run has stopped: its process was killed since
        return answers
    if turn.status != INTERRUPTED and not (turn.status == ABANDONED and turn.output_type == INTERRUPT):
        return False
    if checkpoint_id is None or checkpoint_id == turn.checkpoint_id:
        return True
    at_ns = time_of_checkpoint(checkpoint_id)  # of one that was made since by an update of the state
    return at_ns is not None and at_ns >= (turn.ended_ns or turn.started_ns)


def forked_from(ledger: "Ledger", request: TurnRequest, checkpoint_id: str | None, *, has_input: bool) -> str | None:
    """Return the id of the turn that a run replays from a checkpoint, or without one goes on from, or None.

    Front ends name the checkpoint that they show with each message: one within the newest turn is no fork.
    """
    conversation_id = str(request.conversation_id)
    at_ns = None if checkpoint_id is None else time_of_checkpoint(checkpoint_id)
    found = ledger.forked_turn(conversation_id, at_ns)
    if found is None:
        return None
    if has_input:
        newest = ledger.forked_turn(conversation_id, None)
        if newest is not None and newest.id == found.id:
            return None
    return found.id


def resumed_turn(tracker: "SessionTracker", found: TurnTakenUp) -> Turn:
    """Go on with a turn.

    Args:
        tracker: The tracker.
        found: The turn as the ledger has it.
    """
    known, session = found.turn, found.session
    begun = RootStart.again(known, session)
    linked = trace.get_current_span().get_span_context()
    is_other = linked.is_valid and trace.format_trace_id(linked.trace_id) != begun.ids[0]

    def start_root(root: OpenStep, late: Mapping[str, AttributeValue]) -> trace.Span:
        ended = root.end_ns is not None
        return begun.start(tracker.target, late, linked=linked if is_other else None, has_ended=ended)

    return Turn(
        Conversation(Session(tracker, session), known.conversation_id, begun.tags.topic),
        begun.tags,
        start_root=start_root,
        planned_ids=begun.ids,
        started_ns=known.started_ns,
        message=None,
        role=known.role or "user",
        forked_from=known.forked_from,
        before=found.before,
        wait_ns=known.wait_ms * 1_000_000 + _waited_ns(tracker, known),
        own=known.own,
    )


def _waited_ns(tracker: "SessionTracker", known: TurnSummary) -> int:
    """Return how long a person was waited for; a turn that was handed over waited for none."""
    if known.ended_ns is None or known.output_type != INTERRUPT:
        return 0
    return max(0, tracker.clock() - known.ended_ns)
