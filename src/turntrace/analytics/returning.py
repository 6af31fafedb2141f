"""Users who come back: retention by the week of their first session, and users by what they used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import func, literal, select

from turntrace.analytics.asking import count_if, rows_of
from turntrace.analytics.filters import ALL, DAY_NS, Filters, iso_day, of_sessions
from turntrace.ledger import Ledger
from turntrace.ledger.tables import sessions

_WEEK_NS: Final = 7 * DAY_NS
_MONDAY: Final = 3 * DAY_NS
"""What a Thursday, as the first of January 1970 was, is after a Monday."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """Users whose first session was in the same week.

    Attributes:
        week: The Monday of that week, in UTC.
        users: How many users.
        active: How many of them had a session so many weeks later, by weeks; week 0 is the first itself.
    """

    week: str
    users: int
    active: Mapping[int, int]

    def rate(self, weeks: int) -> float:
        """Users who had a session so many weeks later, from 0 to 1."""
        return self.active.get(weeks, 0) / self.users if self.users else 0.0


def retention(ledger: Ledger, filters: Filters = ALL) -> list[Cohort]:
    """Return the weekly cohorts, in order: users of these sessions by the week of the first of these."""
    week = ((sessions.c.started_ns + _MONDAY) // literal(_WEEK_NS, type_=sessions.c.started_ns.type)).label("week")
    wanted = of_sessions(filters), sessions.c.user_id.is_not(None)
    seen = select(sessions.c.user_id, week).where(*wanted).distinct().subquery()
    first = select(seen.c.user_id, func.min(seen.c.week).label("week")).group_by(seen.c.user_id).subquery()
    later = (seen.c.week - first.c.week).label("later")
    query = (
        select(first.c.week, later, func.count().label("users"))
        .join(seen, seen.c.user_id == first.c.user_id)
        .group_by(first.c.week, later)
        .order_by(first.c.week, later)
    )
    cohorts: dict[int, dict[int, int]] = {}
    for row in rows_of(ledger, query):
        cohorts.setdefault(row.week, {})[int(row.later)] = row.users
    return [Cohort(iso_day(at * _WEEK_NS - _MONDAY), active[0], active) for at, active in sorted(cohorts.items())]


@dataclass(frozen=True, slots=True)
class UserFigures:
    """What is known of a user over these sessions.

    Attributes:
        user_id: Hash of the user's id.
        sessions: How many sessions.
        turns: Their turns.
        tokens: Their tokens.
        cost_usd: What they cost, in US dollars.
        dropoffs: Sessions that ended as a drop-off.
        first_ns: When the first of them began, in nanoseconds since 1970.
        last_ns: When the user was active last.
        satisfaction: Mean of the feedback, from 0 to 1; None without any.
    """

    user_id: str
    sessions: int
    turns: int
    tokens: int
    cost_usd: float
    dropoffs: int
    first_ns: int
    last_ns: int
    satisfaction: float | None


UserOrder = Literal["latest", "most sessions", "most turns", "dearest", "most dropoffs"]


def users(ledger: Ledger, by: UserOrder = "latest", filters: Filters = ALL, *, limit: int = 50) -> list[UserFigures]:
    """Return the users of these sessions who come first in an order."""
    s = sessions.c
    columns: dict[str, Any] = {
        "sessions": func.count(),
        "turns": func.sum(s.total_turns),
        "tokens": func.sum(s.input_tokens + s.output_tokens),
        "cost_usd": func.sum(s.total_cost_usd),
        "dropoffs": count_if(s.dropoff.is_(True)),
        "first_ns": func.min(s.started_ns),
        "last_ns": func.max(s.last_activity_ns),
        "feedback_sum": func.sum(s.feedback_sum),
        "feedback_count": func.sum(s.feedback_count),
    }
    orders = {
        "latest": columns["last_ns"],
        "most sessions": columns["sessions"],
        "most turns": columns["turns"],
        "dearest": columns["cost_usd"],
        "most dropoffs": columns["dropoffs"],
    }
    query = (
        select(s.user_id, *(column.label(name) for name, column in columns.items()))
        .where(of_sessions(filters), s.user_id.is_not(None))
        .group_by(s.user_id)
        .order_by(orders[by].desc(), s.user_id)
        .limit(limit)
    )
    found = []
    for row in rows_of(ledger, query):
        whole = {n: int(getattr(row, n)) for n in ("sessions", "turns", "tokens", "dropoffs", "first_ns", "last_ns")}
        count = int(row.feedback_count)
        satisfaction = min(1.0, max(0.0, float(row.feedback_sum) / count)) if count else None
        found.append(UserFigures(user_id=row.user_id, cost_usd=float(row.cost_usd), satisfaction=satisfaction, **whole))
    return found
