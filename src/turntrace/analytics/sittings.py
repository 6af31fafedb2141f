"""Sessions over time, how long they are, and the ones that stand out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import case, func, select

from turntrace.analytics.asking import checked_ledger, count_if, day, in_bytes, read, rows_of
from turntrace.analytics.filters import ALL, Filters, of_sessions
from turntrace.analytics.quantiles import Quantiles, quantiles
from turntrace.analytics.times import DAY_NS, iso_day
from turntrace.errors import ConfigurationError
from turntrace.ledger import Ledger
from turntrace.ledger.rows import plain_summary
from turntrace.ledger.shapes import ABANDONED
from turntrace.ledger.tables import sessions, turns
from turntrace.summaries import SessionSummary

_MINUTE_MS: Final = 60_000
_MOST_MINUTES: Final = 24 * 60
_AT_ONCE: Final = 500
"""Sessions that are named in one question."""


@dataclass(frozen=True, slots=True)
class DayOfSessions:
    """The sessions that began on a day.

    Attributes:
        day: The day, in UTC.
        sessions: How many began.
        users: How many known users they were of.
        turns: Their turns.
        dropoffs: Those that ended as a drop-off.
        tokens: Their tokens.
        cost_usd: What they cost, in US dollars.
    """

    day: str
    sessions: int
    users: int
    turns: int
    dropoffs: int
    tokens: int
    cost_usd: float


def sessions_over_time(ledger: Ledger, filters: Filters = ALL) -> list[DayOfSessions]:
    """Return the days on which sessions began, in order; days without any are left out."""
    on = day(sessions.c.started_ns)
    query = (
        select(
            on.label("on"),
            func.count().label("sessions"),
            func.count(sessions.c.user_id.distinct()).label("users"),
            func.sum(sessions.c.total_turns).label("turns"),
            count_if(sessions.c.dropoff.is_(True)).label("dropoffs"),
            func.sum(sessions.c.input_tokens + sessions.c.output_tokens).label("tokens"),
            func.sum(sessions.c.total_cost_usd).label("cost_usd"),
        )
        .where(of_sessions(filters))
        .group_by(on)
        .order_by(on)
    )
    return [
        DayOfSessions(
            iso_day(row.on * DAY_NS),
            row.sessions,
            row.users,
            int(row.turns),
            int(row.dropoffs),
            int(row.tokens),
            float(row.cost_usd),
        )
        for row in rows_of(ledger, query)
    ]


@dataclass(frozen=True, slots=True)
class Length:
    """How many sessions have so many turns, or last so many minutes."""

    length: int
    sessions: int


@dataclass(frozen=True, slots=True)
class SessionLengths:
    """How long sessions are.

    Attributes:
        turns: Sessions by their number of turns.
        minutes: Sessions by their minutes from the first to the last activity, begun ones counted whole; those of more
            than a day stand with a day's 1,440.
        n: How many sessions there are.
        p50_turns: Half of the sessions have at most so many turns; None without any session.
        p95_turns: 95 of 100 have at most so many.
        p50_ms: Half of the sessions last at most so long, in milliseconds.
        p95_ms: 95 of 100 last at most so long.
    """

    turns: Sequence[Length]
    minutes: Sequence[Length]
    n: int
    p50_turns: int | None
    p95_turns: int | None
    p50_ms: int | None
    p95_ms: int | None


def session_lengths(ledger: Ledger, filters: Filters = ALL) -> SessionLengths:
    """Return how long sessions are, in turns and in time."""
    lasted_ms = (sessions.c.last_activity_ns - sessions.c.started_ns) // 1_000_000
    minutes = (lasted_ms + (_MINUTE_MS - 1)) // _MINUTE_MS
    minutes = case((minutes > _MOST_MINUTES, _MOST_MINUTES), else_=minutes)
    wanted = of_sessions(filters)

    def counted(value: Any) -> list[Length]:
        label = value.label("length")
        query = select(label, func.count().label("sessions")).where(wanted).group_by(label).order_by(label)
        return read(ledger, query, Length)

    def middle(value: Any) -> Quantiles | None:
        return quantiles(ledger, select(value.label("value")).where(wanted), (50, 95)).get(None)

    of_turns, of_time = middle(sessions.c.total_turns), middle(lasted_ms)
    return SessionLengths(
        turns=counted(sessions.c.total_turns),
        minutes=counted(minutes),
        n=0 if of_turns is None else of_turns.n,
        p50_turns=None if of_turns is None else of_turns.at[50],
        p95_turns=None if of_turns is None else of_turns.at[95],
        p50_ms=None if of_time is None else of_time.at[50],
        p95_ms=None if of_time is None else of_time.at[95],
    )


SortedBy = Literal[
    "newest",
    "longest",
    "most turns",
    "dearest",
    "slowest",
    "slowest turn",
    "most tokens",
    "most failed",
    "least satisfied",
]

_latest: Final = sessions.c.started_ns.desc()
# In millionths: sums of feedback are kept by adding and taking back, so equal means may differ in their last digits.
_satisfied: Final = func.round(1_000_000.0 * sessions.c.feedback_sum / func.nullif(sessions.c.feedback_count, 0))
# By session: an index finds the few turns of each, so that other filters spare most of them.
_slowest_turn: Final = (
    select(func.max(turns.c.latency_ms)).where(turns.c.session_id == sessions.c.id).correlate(sessions)
).scalar_subquery()
_ORDERS: Final[dict[str, Sequence[Any]]] = {
    "newest": [_latest],
    "longest": [(sessions.c.last_activity_ns - sessions.c.started_ns).desc()],
    "most turns": [sessions.c.total_turns.desc()],
    "dearest": [sessions.c.total_cost_usd.desc()],
    "slowest": [(sessions.c.active_ms * 1.0 / func.nullif(sessions.c.total_turns, 0)).desc().nulls_last()],
    "slowest turn": [_slowest_turn.desc().nulls_last()],
    "most tokens": [(sessions.c.input_tokens + sessions.c.output_tokens).desc()],
    "most failed": [sessions.c.failed_turns.desc()],
    "least satisfied": [_satisfied.asc().nulls_last(), _latest],
}
ORDERS: Final = tuple(_ORDERS)


def sessions_by(
    ledger: Ledger, by: SortedBy = "newest", filters: Filters = ALL, *, limit: int | None = 10, offset: int = 0
) -> list[SessionSummary]:
    """Return the sessions that come first in an order, without the figures of their users.

    The slowest are so by the mean latency of their turns, or by that of their slowest turn (those without any come
    last), the longest by the time from their first to their last activity. The least satisfied have the lowest mean of
    feedback, and the latest of equal ones come first (those without any feedback come last). Equal ones come in the
    order of their ids.

    Args:
        ledger: The ledger.
        by: The order.
        filters: Which sessions.
        limit: How many at most; None for all.
        offset: How many to leave out before.

    Raises:
        ConfigurationError: If there is no such order.
    """
    if by not in _ORDERS:
        raise ConfigurationError(f"The order of sessions is {by!r:.40}. Allowed are: {', '.join(ORDERS)}.")
    query = select(sessions).where(of_sessions(filters)).order_by(*_ORDERS[by], in_bytes(sessions.c.id)).limit(limit)
    with checked_ledger(ledger).asking() as connection:
        return [plain_summary(row) for row in connection.execute(query.offset(offset)).mappings().all()]


@dataclass(frozen=True, slots=True)
class SlowestTurn:
    """The slowest turn of a session.

    Attributes:
        session_id: The session.
        number: Its number in its conversation.
        latency_ms: How long it took, in milliseconds, without what was waited for a person.
    """

    session_id: str
    number: int
    latency_ms: int


def slowest_turns(ledger: Ledger, session_ids: Sequence[str]) -> dict[str, SlowestTurn]:
    """Return the slowest turn of each of these sessions, by the session's id; of equal ones that which began first.

    Sessions without a turn that has ended are left out.

    Args:
        ledger: The ledger.
        session_ids: Ids of the sessions.
    """
    found: dict[str, SlowestTurn] = {}
    columns = turns.c.session_id, turns.c.number, turns.c.latency_ms
    for begin in range(0, len(session_ids), _AT_ONCE):
        query = select(*columns).where(turns.c.session_id.in_(session_ids[begin : begin + _AT_ONCE]))
        for turn in read(ledger, query.order_by(turns.c.started_ns), SlowestTurn):
            known = found.get(turn.session_id)
            if known is None or turn.latency_ms > known.latency_ms:
                found[turn.session_id] = turn
    return found


def abandoned_turns(ledger: Ledger, session_ids: Sequence[str]) -> dict[str, int]:
    """Return how many turns of each of these sessions were abandoned, by the session's id; those without are left out.

    Args:
        ledger: The ledger.
        session_ids: Ids of the sessions.
    """
    found: dict[str, int] = {}
    for begin in range(0, len(session_ids), _AT_ONCE):
        those = turns.c.session_id.in_(session_ids[begin : begin + _AT_ONCE])
        query = select(turns.c.session_id, func.count().label("turns")).where(those, turns.c.status == ABANDONED)
        found |= {row.session_id: row.turns for row in rows_of(ledger, query.group_by(turns.c.session_id))}
    return found
