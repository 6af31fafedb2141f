"""A turn whose graph calls another server: its ids travel as W3C trace context and baggage, when that is asked for.

The other process is a guest of the turn: its spans fall into the turn's trace, below the span that called it, and carry
its ids. It gives no number, ends no turn and needs no ledger in common.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import baggage, trace
from opentelemetry.context import Context

from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.current import Scope
from turntrace.errors import IdentityError
from turntrace.identity import check_id, safe_text
from turntrace.lifecycle.carrying import CARRIED, context_in
from turntrace.lifecycle.session import Conversation, Session
from turntrace.lifecycle.steps import OpenStep, TurnAccount
from turntrace.lifecycle.turn import Turn
from turntrace.records import SessionFacts, TurnTags

if TYPE_CHECKING:
    from turntrace.lifecycle.tracker import SessionTracker

_MOST_TURNS: Final = 2**31 - 1
_HASH: Final = re.compile(r"[0-9a-f]{64}")


def tags_in(carrier: Mapping[str, Any] | None) -> tuple[TurnTags, trace.SpanContext] | None:
    """Read the turn that a request belongs to, and the span that made the request.

    Args:
        carrier: The request's headers, or some of them, by lower-case names; None for what is current in this context.

    Returns:
        None when there is no whole turn in it.
    """
    if carrier is None:
        context: Context | None = None
        span = trace.get_current_span()
        if isinstance(span, Scope):  # a turn that runs here is no visit
            return None
    else:
        texts = {name: text for name in CARRIED if isinstance(text := carrier.get(name), str)}
        if len(texts) < len(CARRIED):
            return None
        try:
            context = context_in(texts)
        except ValueError:  # of a text that UTF-8 cannot hold, which comes with no request
            return None
        span = trace.get_current_span(context)
    carried = baggage.get_all(context)
    called_by = span.get_span_context()
    if a.TURN_ID not in carried or not called_by.is_valid:
        return None
    try:
        return _tags(carried), called_by
    except (IdentityError, ValueError, KeyError):
        return None


def _tags(carried: Mapping[str, object]) -> TurnTags:
    def text(name: str) -> str | None:
        return safe_text(carried[name]) if carried.get(name) else None

    user_id = text(a.USER_ID)
    return TurnTags(
        session_id=check_id(carried[a.SESSION_ID], "session_id"),
        turn_id=check_id(carried[a.TURN_ID], "turn_id"),
        conversation_id=check_id(carried[a.CONVERSATION_ID], "conversation_id"),
        number=_turn_number(str(carried[a.TURN_NUMBER])),
        user_id=user_id if user_id is not None and _HASH.fullmatch(user_id) else None,
        channel=text(a.SESSION_CHANNEL),
        tier=text(a.USER_TIER),
        org_id=text(a.USER_ORG_ID),
        topic=text(a.CONVERSATION_TOPIC),
    )


def _turn_number(text: str) -> int:
    """Return the number of a turn, or raise ValueError: what no turn can have, no database holds either."""
    number = int(text)
    if not 1 <= number <= _MOST_TURNS:
        raise ValueError(text)
    return number


def visited(tracker: "SessionTracker", tags: TurnTags, called_by: trace.SpanContext) -> "VisitingTurn":
    """Return the turn of another process that a run here belongs to.

    Args:
        tracker: The tracker.
        tags: What every span of the turn carries.
        called_by: The span that made the request.
    """
    facts = SessionFacts(
        id=tags.session_id, user_id=tags.user_id, channel=tags.channel, tier=tags.tier, org_id=tags.org_id
    )
    conversation = Conversation(Session(tracker, facts), tags.conversation_id, tags.topic)
    caller = trace.NonRecordingSpan(called_by)

    def start_root(_: OpenStep, _late: Mapping[str, AttributeValue]) -> trace.Span:
        return caller

    turn = VisitingTurn(
        conversation,
        tags,
        start_root=start_root,
        planned_ids=(trace.format_trace_id(called_by.trace_id), trace.format_span_id(called_by.span_id)),
        started_ns=tracker.clock(),
        message=None,
        role="user",
    )
    turn.account = TurnAccount(is_closed=True)  # what happens here is added to the turn, where the ledger is the same
    return turn


class VisitingTurn(Turn):
    """A turn of another process, while a run of this one belongs to it."""

    def end(self, status: str = "completed", *, error: BaseException | None = None) -> None:
        """End the visit; the turn goes on where it began."""
        if self.leave(error) is not None:
            self._tracker.settle(self)
