"""Beginning a turn: its number, the ids of its trace, and what its root is started with."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace

from turntrace.attributes import AttributeValue
from turntrace.errors import LedgerError
from turntrace.export import ids_of
from turntrace.identity import derived_id, is_trace_id, new_span_id
from turntrace.ledger import TurnBegun, own_text
from turntrace.lifecycle.abandoning import AbandonWaiting
from turntrace.lifecycle.late import BeginTurnLate
from turntrace.lifecycle.rooting import RootStart, above_of
from turntrace.lifecycle.session import Conversation
from turntrace.lifecycle.steps import OpenStep
from turntrace.lifecycle.turn import Turn
from turntrace.records import SessionFacts, TurnOwn, TurnRequest

if TYPE_CHECKING:
    from turntrace.lifecycle.tracker import SessionTracker


_NOTHING: Final = TurnOwn()


def begun_turn(
    tracker: "SessionTracker",
    conversation: Conversation,
    request: TurnRequest,
    message: Any,
    role: str,
    active_since_ns: int,
) -> Turn | None:
    """Begin a turn of a conversation.

    Args:
        tracker: The tracker.
        conversation: The conversation.
        request: What the run says about itself.
        message: What the user said.
        role: ``user``, or ``assistant`` when the agent began the exchange.
        active_since_ns: The session must have been active since then, in nanoseconds since 1970.

    Returns:
        The turn; None when its session has ended, or has been silent for too long. While the ledger is away the turn
        begins all the same, with a guess at its number, and gets its own when it is written down.
    """
    session = conversation.session.facts
    turn_id = tracker.new_id()
    around = trace.get_current_span()
    below = around if tracker.target.claim_request(around) else None
    trace_id = turn_id if is_trace_id(turn_id) else derived_id("trace", turn_id)
    if below is not None:
        trace_id = ids_of(below)[0]
    span_id = new_span_id()
    started_ns = tracker.clock()
    own = _own_of(session, conversation, request, below)
    kept = None if own is _NOTHING else own_text(own)

    def begin(since_ns: int = 0) -> TurnBegun | None:
        return tracker.ledger.begin_turn(
            turn_id,
            session_id=session.id,
            conversation_id=conversation.id,
            user_id=session.user_id,
            role=role,
            started_ns=started_ns,
            active_since_ns=since_ns,
            trace_id=trace_id,
            root_span_id=span_id,
            own=kept,
        )

    def meets(begun: TurnBegun) -> None:
        tracker.note_number(conversation.id, begun.number)
        if begun.unanswered_id is not None:
            tracker.submit(AbandonWaiting(tracker, begun.unanswered_id))

    is_late = tracker.begins_late(conversation.id)
    begun: TurnBegun | None = None
    if not is_late:
        try:
            begun = begin(active_since_ns)
        except LedgerError as error:
            tracker.note_ledger_away(error)
            is_late = True
    if begun is not None:
        meets(begun)
    elif not is_late:
        return None
    begins = RootStart.of(
        session,
        own,
        turn_id=turn_id,
        conversation_id=conversation.id,
        number=tracker.next_number(conversation.id) if begun is None else begun.number,
        ids=(trace_id, span_id),
        started_ns=started_ns,
    )
    linked = around.get_span_context()

    def start_root(root: OpenStep, late: Mapping[str, AttributeValue]) -> trace.Span:
        known = begins._replace(tags=turn.words)  # a turn that was written down late has another number now
        return known.start(
            tracker.target,
            late,
            below=below,
            linked=linked if linked.is_valid else None,
            has_ended=root.end_ns is not None,
        )

    turn = Turn(
        conversation,
        begins.tags,
        start_root=start_root,
        planned_ids=begins.ids,
        started_ns=started_ns,
        message=message,
        role=role,
        forked_from=request.forked_from,
        own=kept,
    )
    if is_late:
        turn.is_lost = not tracker.begin_late(turn, BeginTurnLate(turn, begin, meets))
    return turn


def _own_of(
    session: SessionFacts, conversation: Conversation, request: TurnRequest, below: trace.Span | None
) -> TurnOwn:
    """Return what a turn begins with that its session does not tell."""
    tier = request.tier if request.tier != session.tier else None
    org_id = request.org_id if request.org_id != session.org_id else None
    if not (tier or org_id or conversation.topic or request.tags or below is not None):
        return _NOTHING
    return TurnOwn(
        tier=tier,
        org_id=org_id,
        topic=conversation.topic,
        tags=request.tags,
        above=None if below is None else above_of(below),
    )
