"""Figures on a finer scale, for apps whose sessions are short and whose windows are nearly empty."""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import case, func, select

from turntrace.analytics.asking import rows_of, turn_number
from turntrace.analytics.filters import ALL, Filters, of_sessions, of_turns
from turntrace.analytics.quantiles import QUANTILES, quantiles
from turntrace.ledger import Ledger
from turntrace.ledger.tables import sessions, turns

_SECOND: Final = 1_000
_MINUTE: Final = 60_000
_HOUR: Final = 3_600_000
DURATION_EDGES_MS: Final = (
    *(0, 1, 2, 5, 10, 20, 50, 100, 200, 500),
    *(n * _SECOND for n in (1, 2, 5, 10, 15, 20, 30, 45)),
    *(n * _MINUTE for n in (1, 2, 5, 10, 15, 20, 30, 45)),
    *(n * _HOUR for n in (1, 2, 4, 8, 24)),
)
"""Up to how many milliseconds sessions last that are counted together."""


@dataclass(frozen=True, slots=True)
class Lasted:
    """Sessions that lasted about as long, from the first to the last activity.

    Attributes:
        upto_ms: They lasted at most so many milliseconds, and more than the edge before: one of `DURATION_EDGES_MS`;
            None for those that lasted longer than the last one, a day.
        sessions: How many.
    """

    upto_ms: int | None
    sessions: int


def session_durations(ledger: Ledger, filters: Filters = ALL) -> list[Lasted]:
    """Return how long sessions last, from milliseconds to a day, in order; edges without any are left out."""
    lasted_ms = (sessions.c.last_activity_ns - sessions.c.started_ns) // 1_000_000
    edge = case(*((lasted_ms <= each, each) for each in DURATION_EDGES_MS), else_=None).label("upto_ms")
    query = select(edge, func.count().label("sessions")).where(of_sessions(filters)).group_by(edge)
    found = [Lasted(row.upto_ms, row.sessions) for row in rows_of(ledger, query)]
    return sorted(found, key=lambda each: (each.upto_ms is None, each.upto_ms or 0))


@dataclass(frozen=True, slots=True)
class ContextOfTurn:
    """How many tokens models were given at their most in turns of the same number.

    Attributes:
        number: Their number in the conversation; one more than `MOST_TURNS` stands for all after it.
        n: How many turns whose model's window is known.
        p50: Half of them were given at most so many tokens.
        p95: 95 of 100 were given at most so many.
        p99: 99 of 100 were given at most so many.
    """

    number: int
    n: int
    p50: int
    p95: int
    p99: int


def context_tokens_by_turn(ledger: Ledger, filters: Filters = ALL) -> list[ContextOfTurn]:
    """Return how many tokens were in the windows that `window_by_turn` is about, by the number of the turn."""
    values = select(turn_number(turns.c.number).label("part"), turns.c.context_tokens.label("value"))
    values = values.where(of_turns(filters), turns.c.context_tokens.is_not(None), turns.c.context_limit > 0)
    found = quantiles(ledger, values)
    return [
        ContextOfTurn(number, given.n, *(given.at[percent] for percent in QUANTILES))
        for number, given in sorted(found.items(), key=lambda each: each[0])
    ]
