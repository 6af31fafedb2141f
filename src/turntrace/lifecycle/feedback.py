"""Feedback on a turn or a session: what a user thought of it, from 0 to 1."""

from typing import TYPE_CHECKING, Any, Final

from turntrace import attributes as a
from turntrace.errors import ConfigurationError
from turntrace.export import session_score, trace_score
from turntrace.identity import check_text, derived_id
from turntrace.lifecycle.session_jobs import EndSession, put_scores

if TYPE_CHECKING:
    from turntrace.ledger import LedgerWriter
    from turntrace.lifecycle.tracker import SessionTracker

FEEDBACK_NAME: Final = "user_feedback"
"""Name of feedback that is given none."""


class PutFeedback:
    """Writes down feedback, and what the session's satisfaction is by it.

    Args:
        tracker: The tracker.
        session_id: The session.
        turn: Id and trace id of the turn that it is about; None when it is about the session.
        value: True, False, or a number from 0 to 1.
        name: Its name; feedback of the same name on the same subject replaces it.
        comment: What the user said; it leaves only as far as the content policy allows, and is not in the ledger.

    Raises:
        ConfigurationError: If the value is none of these.
        IdentityError: If the name cannot be used.
    """

    def __init__(
        self,
        tracker: "SessionTracker",
        session_id: str,
        turn: tuple[str, str] | None,
        value: float | bool,
        name: str,
        comment: str | None,
    ) -> None:
        self._tracker = tracker
        self._session_id = session_id
        self._turn = turn
        self._value = _checked(value)
        self._name = check_text(name, "name")
        policy = tracker.content
        self._comment = policy.clean(str(comment)) if comment is not None and policy.records_turn else None
        self._at_ns = tracker.clock()

    def prepare(self) -> None:
        """Do nothing: all is known."""

    def write(self, ledger: "LedgerWriter") -> None:
        """Write the row, and put the scores into the outbox, in one transaction."""
        if ledger.session(self._session_id) is None:
            return  # it was erased
        subject = self._session_id if self._turn is None else self._turn[0]
        row: dict[str, Any] = {"id": derived_id("feedback", subject, self._name), "session_id": self._session_id}
        row |= {"turn_id": None if self._turn is None else subject, "name": self._name, "at_ns": self._at_ns}
        ledger.put_feedback(row | {"value": float(self._value)})
        if self._turn is None:
            score = session_score(subject, self._name, self._value, comment=self._comment)
        else:
            score = trace_score(self._turn[1], subject, self._name, self._value, comment=self._comment)
        scores = [score]
        session = ledger.session(self._session_id)
        if session is not None and session.user_satisfaction is not None:
            scores.append(session_score(session.id, a.SESSION_USER_SATISFACTION, session.user_satisfaction))
        put_scores(self._tracker, ledger, scores)
        if session is not None and session.ended_ns is not None:
            EndSession(self._tracker, session.id).write(ledger)  # its totals are sent again with this


def _checked(value: Any) -> float | bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and 0 <= value <= 1:
        return float(value)
    hint = f"feedback({value / 5:g})" if isinstance(value, int | float) and 1 < value <= 5 else "feedback(1.0)"
    raise ConfigurationError(
        f"The value of feedback is {value!r:.40}. Allowed are True, False, and numbers from 0 to 1: {hint}."
    )
