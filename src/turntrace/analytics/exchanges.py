"""Turns: how long they take, by their number, and what they use."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select

from turntrace.analytics.asking import day, quantiles, rows_of, turn_number
from turntrace.analytics.filters import ALL, DAY_NS, Filters, iso_day, of_sessions, of_turns
from turntrace.ledger import Ledger
from turntrace.ledger.tables import sessions, turns


@dataclass(frozen=True, slots=True)
class LatencyOfTurn:
    """How long turns take.

    Attributes:
        number: Their number in the conversation; one more than `MOST_TURNS` stands for all after it, 0 for all turns.
        n: How many turns.
        p50: Half of them took at most so many milliseconds, without what was waited for a person.
        p95: 95 of 100 took at most so many.
        p99: 99 of 100 took at most so many.
        streamed: How many of them told when their first token came.
        first_token_p50: Of half of these it came within so many milliseconds; None without any.
        first_token_p95: Of 95 of 100 it came within so many.
    """

    number: int
    n: int
    p50: int
    p95: int
    p99: int
    streamed: int = 0
    first_token_p50: int | None = None
    first_token_p95: int | None = None


def latency_by_turn(ledger: Ledger, filters: Filters = ALL) -> list[LatencyOfTurn]:
    """Return how long turns take, for all (number 0) and by their number; nothing without any turn."""
    latency = _quantiles(ledger, filters, turns.c.latency_ms)
    first = _quantiles(ledger, filters, turns.c.time_to_first_token_ms)
    found = []
    for number in sorted(latency, key=lambda each: each or 0):
        row, streamed = latency[number], first.get(number)
        known: dict[str, Any] = {}
        if streamed is not None:
            known = {"streamed": int(streamed.n), "first_token_p50": streamed.p50, "first_token_p95": streamed.p95}
        found.append(LatencyOfTurn(number or 0, int(row.n), row.p50, row.p95, row.p99, **known))
    return found


def _quantiles(ledger: Ledger, filters: Filters, value: Any) -> dict[Any, Any]:
    values = select(turn_number(turns.c.number).label("part"), value.label("value"))
    return quantiles(ledger, values.where(of_turns(filters), value.is_not(None)))


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and cost of the turns, or of the sessions, that have something in common.

    Attributes:
        of: What they have in common: a day, a model, a tier; empty where that is not known.
        turns: How many turns.
        input_tokens: Tokens that models were given.
        output_tokens: Tokens that they answered.
        cost_usd: What they cost, in US dollars.
        unpriced_calls: Calls of models whose price is not known: they are not in the cost.
    """

    of: str
    turns: int
    input_tokens: int
    output_tokens: int
    cost_usd: float
    unpriced_calls: int


def usage_by_day(ledger: Ledger, filters: Filters = ALL) -> list[Usage]:
    """Return what was used by the day on which the session began, in order."""
    found = _of_sessions(ledger, filters, day(sessions.c.started_ns))
    return [_usage(row, iso_day(row.of * DAY_NS)) for row in sorted(found, key=lambda row: row.of)]


def usage_by_tier(ledger: Ledger, filters: Filters = ALL) -> list[Usage]:
    """Return what was used by the users' tier, the dearest first."""
    return _dearest([_usage(row, row.of or "") for row in _of_sessions(ledger, filters, sessions.c.tier)])


def usage_by_channel(ledger: Ledger, filters: Filters = ALL) -> list[Usage]:
    """Return what was used by the sessions' channel, the dearest first."""
    return _dearest([_usage(row, row.of or "") for row in _of_sessions(ledger, filters, sessions.c.channel)])


def usage_by_model(ledger: Ledger, filters: Filters = ALL) -> list[Usage]:
    """Return what was used by the model that was called last in a turn, the dearest first."""
    sums = [func.sum(turns.c[name]).label(name) for name in _SUMS]
    query = select(
        turns.c.model.label("of"), func.count().label("turns"), *sums, func.sum(turns.c.cost_usd).label("cost")
    )
    found = rows_of(ledger, query.where(of_turns(filters)).group_by(turns.c.model))
    return _dearest([_usage(row, row.of or "") for row in found])


_SUMS = ("input_tokens", "output_tokens", "unpriced_calls")


def _of_sessions(ledger: Ledger, filters: Filters, of: Any) -> list[Any]:
    sums = [func.sum(sessions.c[name]).label(name) for name in _SUMS]
    counted = func.sum(sessions.c.total_turns).label("turns")
    query = select(of.label("of"), counted, *sums, func.sum(sessions.c.total_cost_usd).label("cost"))
    return rows_of(ledger, query.where(of_sessions(filters)).group_by(of))


def _usage(row: Any, of: str) -> Usage:
    sums = {name: int(getattr(row, name) or 0) for name in _SUMS}
    return Usage(of=of, turns=int(row.turns or 0), cost_usd=float(row.cost or 0.0), **sums)


def _dearest(found: list[Usage]) -> list[Usage]:
    return sorted(found, key=lambda usage: (-usage.cost_usd, -usage.input_tokens, usage.of))
