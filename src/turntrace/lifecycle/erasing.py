"""Erasing a user, or what is old: from the ledger, from the outbox, and from what this process remembers."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from turntrace.errors import ConfigurationError

if TYPE_CHECKING:
    from turntrace.lifecycle.tracker import SessionTracker

_FLUSH_S: Final = 30.0
_AT_ONCE: Final = 500
"""Sessions that are erased in one transaction, for which other writers wait."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What was erased of a user, and what Langfuse may hold still.

    Attributes:
        user_id: Hash of the user's id: what the user is called in Langfuse.
        sessions: Ids of the sessions that were erased; in Langfuse, they are to be deleted by hand or by its API.
        turns: How many turns were erased.
        waiting: How many spans and scores were taken out of the outbox before they were sent.
    """

    user_id: str
    sessions: tuple[str, ...]
    turns: int
    waiting: int

    def __str__(self) -> str:
        if not self.sessions:
            return f"Nothing of the user {self.user_id} was on record."
        return (
            f"{len(self.sessions)} sessions with {self.turns} turns were erased, and {self.waiting} spans and scores "
            "that had not been sent. What Langfuse was sent is still there: delete the traces of the user "
            f"{self.user_id}, or of the sessions {', '.join(self.sessions[:5])}"
            f"{', ...' if len(self.sessions) > 5 else ''}."
        )


def forget_user(tracker: "SessionTracker", user_id: str) -> Forgotten:
    """Erase a user by the hash of the user's id."""
    tracker.flush(_FLUSH_S)
    erased = tracker.ledger.forget_user(user_id)
    tracker.forget_sessions(erased.sessions)
    waiting = tracker.ledger.erase_waiting(user_id, erased)
    tracker.ledger.scrub()
    return Forgotten(user_id=user_id, sessions=erased.sessions, turns=erased.turns, waiting=waiting)


def forget_before(tracker: "SessionTracker", before: Any) -> int:
    """Erase the sessions that ended before a time, or so long ago; return how many.

    Of users who never came back nobody has noticed the end: those that were silent since before then are ended first.
    """
    now_ns = tracker.clock()
    before_ns = _time_of(before, now_ns)
    tracker.flush(_FLUSH_S)
    tracker.sweep(now=min(before_ns, now_ns))
    count = 0
    while erased := tracker.ledger.forget_ended(before_ns, _AT_ONCE):
        count += len(erased)
    return count


def _time_of(before: Any, now_ns: int) -> int:
    if isinstance(before, timedelta):
        return now_ns - before // timedelta(microseconds=1) * 1_000
    if isinstance(before, datetime):
        at = before if before.tzinfo is not None else before.replace(tzinfo=UTC)
        return int(at.timestamp() * 1e9)
    raise ConfigurationError(
        f"before is {before!r:.40}. Allowed are a time and how long ago: "
        "tracker.forget_before(timedelta(days=90)) or tracker.forget_before(datetime(2026, 1, 1, tzinfo=UTC))."
    )
