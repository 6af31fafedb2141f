"""What the writer does when sessions begin and end: it makes their spans and writes their rows together."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.export import EndedSpan, Score, scores_of, session_score, write_score
from turntrace.identity import derived_id
from turntrace.lifecycle.abandoning import abandon_waiting
from turntrace.lifecycle.dropoff import DropoffFacts
from turntrace.lifecycle.ending import end_span
from turntrace.lifecycle.jobs import SpanJob, known_json
from turntrace.records import SessionFacts
from turntrace.summaries import SessionSummary
from turntrace.waiting import SCORE

if TYPE_CHECKING:
    from turntrace.ledger import LedgerWriter
    from turntrace.lifecycle.tracker import SessionTracker

INACTIVE_TIMEOUT: Final = "inactive_timeout"
"""Reason of the end of a session that was silent too long."""

_MOST_WAITING: Final = 1_000
_UNKNOWN: Final = "unknown"


class AnnounceSession(SpanJob):
    """Writes the span ``session.start``."""

    def __init__(self, tracker: "SessionTracker", session: SessionFacts) -> None:
        super().__init__(tracker)
        self._session = session

    def prepare(self) -> None:
        """Make the span."""
        self._keep(_session_start(self._tracker, self._session))

    def write(self, ledger: "LedgerWriter") -> None:
        """Put the span into the outbox, once for the session."""
        if ledger.announced(self._session.id):
            self._put_spans(ledger)


class EndSession(SpanJob):
    """Ends a session: its row, and the span ``session.end`` with its totals.

    Args:
        tracker: The tracker.
        session_id: The session.
        reason: Why it ends; None to send the totals of one that has ended again.
        ended_ns: When it ends, in nanoseconds since 1970.
    """

    def __init__(
        self, tracker: "SessionTracker", session_id: str, reason: str | None = None, ended_ns: int = 0
    ) -> None:
        super().__init__(tracker)
        self._session_id = session_id
        self._reason = reason
        self._ended_ns = ended_ns
        self._evaluated = False

    def write(self, ledger: "LedgerWriter") -> None:
        """End the session and put its span into the outbox, in one transaction, once."""
        if self._reason == INACTIVE_TIMEOUT:  # whom it waited for did not come back
            for row in ledger.waiting_turns(_MOST_WAITING, session_id=self._session_id):
                abandon_waiting(self._tracker, ledger, row)
        before = ledger.session(self._session_id)
        if self._reason is None:
            ended = ledger.ended_session(self._session_id)
        else:
            ended = ledger.end_session(self._session_id, self._reason, self._ended_ns)
        if ended is None:
            return
        tracker = self._tracker
        detected = tracker.is_dropoff(
            DropoffFacts(ended, ended.last_action, ended.last_intent, ledger.unconverted(ended))
        )
        ledger.note_dropoff(ended.id, detected)
        ended = replace(ended, dropoff=detected)
        if not self._spans:
            if ledger.announced(self._session_id):  # the process that began it was killed before it could say so
                self._keep(_session_start(tracker, _facts_of(ended)))
            self._keep(_session_end(tracker, ended))
        self._put_spans(ledger)
        scores = scores_of(ended)
        if ended.last_intent is None and before is not None and before.last_intent is not None:
            scores[a.DROPOFF_LAST_INTENT] = _UNKNOWN  # what was sent before is not to stay in Langfuse
        put_scores(tracker, ledger, [session_score(ended.id, *score) for score in scores.items()])
        if self._reason is not None and not self._evaluated:  # an end that is sent again is none
            self._evaluated = True
            tracker.evaluate(ended)


def put_scores(tracker: "SessionTracker", ledger: "LedgerWriter", scores: Iterable[Score]) -> None:
    """Put scores into the outbox, where there is a Langfuse to take them; none of a trace that is not sampled."""
    target = tracker.target
    if target.takes_scores:
        now = tracker.clock()
        for score in scores:
            if target.is_sampled(score.get("traceId", "")):
                ledger.put(SCORE, write_score(score, environment=target.environment), items=1, created_ns=now)


def tags_of(session: SessionFacts) -> dict[str, AttributeValue]:
    """Return what every span of a session carries that is in no turn."""
    return {name: value for name, value in session.attributes().items() if name in a.EVERY_SPAN}


def _facts_of(session: SessionSummary) -> SessionFacts:
    facts = {name: getattr(session, name) for name in SessionFacts.__slots__ if name != "sessions_total"}
    return SessionFacts(**facts, sessions_total=session.user_sessions_total)


def _session_start(tracker: "SessionTracker", session: SessionFacts) -> list[EndedSpan]:
    asked = {"channel": session.channel, "type": session.type, "locale": session.locale}
    known = {"previous_session": session.previous_id, "sessions_total": session.sessions_total}
    return _session_span(tracker, a.SPAN_SESSION_START, session.attributes(), session.started_ns, asked, known)


def _session_end(tracker: "SessionTracker", ended: SessionSummary) -> list[EndedSpan]:
    words = {name: getattr(ended, name) for name in ("id", "user_id", "channel", "tier", "org_id", "started_ns")}
    tags = SessionFacts(**words)
    return _session_span(
        tracker,
        a.SPAN_SESSION_END,
        {**tags.attributes(), **ended.attributes()},
        ended.ended_ns or ended.last_activity_ns,
        {"reason": ended.end_reason, "duration_ms": ended.duration_ms},
        {
            "turns": ended.total_turns,
            "tokens": ended.total_tokens,
            "cost_usd": ended.total_cost_usd,
            "active_ms": ended.active_ms,
        },
    )


def _session_span(
    tracker: "SessionTracker",
    name: str,
    attributes: Mapping[str, AttributeValue],
    at_ns: int,
    asked: dict[str, Any],
    known: dict[str, Any],
) -> list[EndedSpan]:
    shown = {
        a.LANGFUSE_OBSERVATION_TYPE: "event",
        a.LANGFUSE_TRACE_NAME: name,
        # Langfuse's client exports a span of another scope only when it starts with a name of OTel GenAI.
        a.GEN_AI_OPERATION_NAME: name,
        a.LANGFUSE_OBSERVATION_INPUT: known_json(asked),
        a.LANGFUSE_OBSERVATION_OUTPUT: known_json(known),
    }
    # Ids that derive from the session: a second sending overwrites, as does the end after the session went on again.
    session_id = str(attributes[a.SESSION_ID])
    trace_id, span_id = derived_id(name, session_id), derived_id(name, session_id, "span")
    with tracker.target.capturing() as ended:
        span = tracker.target.start_root(
            name,
            attributes={**attributes, **shown},
            start_ns=at_ns,
            ids=(int(trace_id, 16), int(span_id[:16], 16)),
            has_ended=True,
        )
        end_span(span, at_ns, None)
    return ended
