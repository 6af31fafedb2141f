"""Users who come back: retention by the week of their first session, and users by what they used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import BigInteger, func, literal, select

from turntrace.analytics.asking import count_if, in_bytes, mean_satisfaction, rows_of
from turntrace.analytics.confidence import interval
from turntrace.analytics.filters import ALL, Filters, checked, of_sessions
from turntrace.analytics.times import DAY_NS, iso_day
from turntrace.errors import ConfigurationError
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
        active: How many of them had a session so many weeks later, by weeks; week 0 is the first itself. Weeks in
            which nobody had one are left out.
        observed: How many weeks after the first are on record: up to the week of the latest session of anybody, which
            may not be over yet. Of later weeks nothing is known.
    """

    week: str
    users: int
    active: Mapping[int, int]
    observed: int = 0

    def rate(self, weeks: int) -> float:
        """Users who had a session so many weeks later, from 0 to 1; 0 too where nothing is known (see `observed`)."""
        return self.active.get(weeks, 0) / self.users if self.users else 0.0

    def interval(self, weeks: int) -> tuple[float, float] | None:
        """Bounds between which the rate lies with 95 % confidence; None of weeks of which nothing is known."""
        return interval(self.active.get(weeks, 0), self.users) if 0 <= weeks <= self.observed else None


def retention(ledger: Ledger, filters: Filters = ALL) -> list[Cohort]:
    """Return the weekly cohorts, in order: known users by the week of their first session.

    The time range says which cohorts are wanted, by when the first session began, and until when sessions count. A user
    who was there before it is in none. The other filters say which sessions count at all.
    """
    until = of_sessions(checked(filters).of(since_ns=None))
    wanted = until, sessions.c.user_id.is_not(None)
    begun = func.min(sessions.c.started_ns)
    first = select(sessions.c.user_id, _week(begun).label("week")).where(*wanted).group_by(sessions.c.user_id)
    if filters.since_ns is not None:
        first = first.having(begun >= filters.since_ns)
    cohort = first.subquery()
    seen = select(sessions.c.user_id, _week(sessions.c.started_ns).label("week")).where(*wanted).distinct().subquery()
    later = (seen.c.week - cohort.c.week).label("later")
    query = (
        select(cohort.c.week, later, func.count().label("users"))
        .join(seen, seen.c.user_id == cohort.c.user_id)
        .group_by(cohort.c.week, later)
        .order_by(cohort.c.week, later)
    )
    cohorts: dict[int, dict[int, int]] = {}
    for row in rows_of(ledger, query):
        cohorts.setdefault(row.week, {})[row.later] = row.users
    latest = rows_of(ledger, select(_week(func.max(sessions.c.started_ns)).label("week")).where(until))[0].week
    return [Cohort(iso_day(at * _WEEK_NS - _MONDAY), of[0], of, latest - at) for at, of in sorted(cohorts.items())]


def _week(at_ns: Any) -> Any:
    """Return the week of a time, counted from the one that 1970 began in; weeks begin on Mondays, in UTC."""
    return (at_ns + literal(_MONDAY, BigInteger)) // literal(_WEEK_NS, BigInteger)


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


UserOrder = Literal["latest", "most sessions", "most turns", "dearest", "most dropoffs", "least satisfied"]


def users(
    ledger: Ledger, by: UserOrder = "latest", filters: Filters = ALL, *, limit: int | None = 50
) -> list[UserFigures]:
    """Return the known users of these sessions who come first in an order; equal ones in the order of their hashes.

    Users without feedback are the last of the least satisfied.

    Args:
        ledger: The ledger.
        by: The order.
        filters: Which sessions.
        limit: How many users at most; None for all.

    Raises:
        ConfigurationError: If there is no such order.
    """
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
        "latest": columns["last_ns"].desc(),
        "most sessions": columns["sessions"].desc(),
        "most turns": columns["turns"].desc(),
        "dearest": columns["cost_usd"].desc(),
        "most dropoffs": columns["dropoffs"].desc(),
        "least satisfied": (columns["feedback_sum"] / func.nullif(columns["feedback_count"], 0)).asc().nulls_last(),
    }
    if by not in orders:
        raise ConfigurationError(f"The order of users is {by!r:.40}. Allowed are: {', '.join(orders)}.")
    query = (
        select(s.user_id, *(column.label(name) for name, column in columns.items()))
        .where(of_sessions(filters), s.user_id.is_not(None))
        .group_by(s.user_id)
        .order_by(orders[by], in_bytes(s.user_id))
        .limit(limit)
    )
    found = []
    for row in rows_of(ledger, query):
        whole = {n: int(getattr(row, n)) for n in ("sessions", "turns", "tokens", "dropoffs", "first_ns", "last_ns")}
        cost, satisfaction = float(row.cost_usd), mean_satisfaction(row)
        found.append(UserFigures(user_id=row.user_id, cost_usd=cost, satisfaction=satisfaction, **whole))
    return found
