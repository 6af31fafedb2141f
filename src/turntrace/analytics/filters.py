"""Which sessions and turns a question is about."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, and_, exists, or_, select, true

from turntrace.errors import ConfigurationError
from turntrace.ledger.tables import conversations, sessions, turns

NS: Final = 1_000_000_000
DAY_NS: Final = 86_400 * NS


@dataclass(frozen=True, slots=True)
class Filters:
    """Which sessions and turns a question is about; None leaves nothing out.

    Attributes:
        since_ns: Sessions that began then or later, in nanoseconds since 1970.
        until_ns: Sessions that began before.
        channel: Their channel.
        tier: Their user's tier.
        org_id: Their user's organisation.
        topic: Turns of conversations about it, and sessions with such turns.
        model: Turns whose last call was of this model, and sessions with such turns.
        end_reason: Why they ended; ``open`` for those that have not.
        user_id: Hash of their user's id.
    """

    since_ns: int | None = None
    until_ns: int | None = None
    channel: str | None = None
    tier: str | None = None
    org_id: str | None = None
    topic: str | None = None
    model: str | None = None
    end_reason: str | None = None
    user_id: str | None = None

    def __str__(self) -> str:
        named = {name: getattr(self, name) for name in self.__slots__ if getattr(self, name) is not None}
        for name, word in (("since_ns", "since"), ("until_ns", "until")):
            if name in named:
                named = {word: iso_day(named.pop(name)), **named}
        return ", ".join(f"{name} {value}" for name, value in named.items()) or "everything on record"

    def of(self, **changed: Any) -> "Filters":
        """Return the same with other values."""
        return replace(self, **changed)


ALL: Final = Filters()
OPEN: Final = "open"


def day_of(text: str, name: str = "--since") -> int:
    """Read a day or a time in ISO 8601 (UTC where it says nothing else), in nanoseconds since 1970.

    Raises:
        ConfigurationError: If it is neither.
    """
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigurationError(
            f"{name} is {text!r:.40}. Allowed are a day and a time in ISO 8601: {name} 2026-11-25, "
            f"or {name} 2026-11-25T12:00."
        ) from None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return int(at.timestamp()) * NS + at.microsecond * 1000


def iso_day(at_ns: int) -> str:
    """Return the day of a time, in UTC."""
    return datetime.fromtimestamp(at_ns / NS, UTC).date().isoformat()


def of_sessions(filters: Filters) -> ColumnElement[bool]:
    """Return the condition on sessions."""
    conditions: list[Any] = _on_sessions(filters)
    if filters.model is not None or filters.topic is not None:
        conditions.append(exists(_turns_of(filters).where(turns.c.session_id == sessions.c.id)))
    return and_(true(), *conditions)


def of_turns(filters: Filters) -> ColumnElement[bool]:
    """Return the condition on turns."""
    conditions: list[Any] = []
    on_sessions = _on_sessions(filters)
    if on_sessions:
        conditions.append(turns.c.session_id.in_(select(sessions.c.id).where(*on_sessions)))
    if filters.model is not None:
        conditions.append(turns.c.model == filters.model)
    if filters.topic is not None:
        about = select(conversations.c.id).where(conversations.c.topic == filters.topic)
        conditions.append(turns.c.conversation_id.in_(about))
    return and_(true(), *conditions)


def in_sessions(filters: Filters, session_id: Any) -> ColumnElement[bool]:
    """Return the condition that a row with a session's id is one of the sessions."""
    if filters == ALL:
        return and_(true())
    return and_(session_id.in_(select(sessions.c.id).where(of_sessions(filters))))


def _on_sessions(filters: Filters) -> list[Any]:
    names = ("channel", "tier", "org_id", "user_id")
    conditions: list[Any] = [sessions.c[n] == value for n in names if (value := getattr(filters, n)) is not None]
    if filters.since_ns is not None:
        conditions.append(sessions.c.started_ns >= filters.since_ns)
    if filters.until_ns is not None:
        conditions.append(sessions.c.started_ns < filters.until_ns)
    if filters.end_reason == OPEN:
        conditions.append(sessions.c.ended_ns.is_(None))
    elif filters.end_reason is not None:
        conditions.append(sessions.c.end_reason == filters.end_reason)
    return conditions


def _turns_of(filters: Filters) -> Select[Any]:
    wanted = select(turns.c.id)
    if filters.model is not None:
        wanted = wanted.where(turns.c.model == filters.model)
    if filters.topic is not None:
        wanted = wanted.join(conversations, conversations.c.id == turns.c.conversation_id)
        wanted = wanted.where(or_(conversations.c.topic == filters.topic))
    return wanted
