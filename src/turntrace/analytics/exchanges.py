"""Turns: how long they take, by their number, and what they use."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from sqlalchemy import Select, func, select

from turntrace.analytics.asking import count_if, day, rows_of, turn_number
from turntrace.analytics.filters import ALL, Filters, checked, of_sessions, of_turns, of_turns_joined
from turntrace.analytics.quantiles import Quantiles, quantiles
from turntrace.analytics.times import DAY_NS, iso_day
from turntrace.ledger import Ledger
from turntrace.ledger.tables import sessions, turns
from turntrace.records import TurnSummary

_ENDED: Final = ("completed", "failed")
_SLOW_TIMES: Final = 3
_SLOW_MS: Final = 1_000
_SUMS: Final = ("input_tokens", "output_tokens", "unpriced_calls")


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
        first_token_p99: Of 99 of 100 it came within so many.
    """

    number: int
    n: int
    p50: int
    p95: int
    p99: int
    streamed: int = 0
    first_token_p50: int | None = None
    first_token_p95: int | None = None
    first_token_p99: int | None = None


def latency_by_turn(ledger: Ledger, filters: Filters = ALL) -> list[LatencyOfTurn]:
    """Return how long turns took that ended, for all (number 0) and by their number; nothing without any.

    Those that wait for a person, that nobody ended or that nobody answered are left out: how long they would have taken
    is not known.
    """
    latency = _quantiles(ledger, filters, turns.c.latency_ms)
    first = _quantiles(ledger, filters, turns.c.time_to_first_token_ms)
    found = []
    for number in sorted(latency, key=lambda each: each or 0):
        took, streamed = latency[number], first.get(number)
        known: dict[str, Any] = {}
        if streamed is not None:
            known = {
                "streamed": streamed.n,
                "first_token_p50": streamed.at[50],
                "first_token_p95": streamed.at[95],
                "first_token_p99": streamed.at[99],
            }
        found.append(LatencyOfTurn(number or 0, took.n, took.at[50], took.at[95], took.at[99], **known))
    return found


def slow_above_ms(turns: Iterable[TurnSummary]) -> float | None:
    """Return above how many milliseconds a turn is slow among these turns of a session; None where none has ended.

    That is three times the median of those that ended, without what was waited for a person, and at least a second:
    what is told by it stands out to who waits, not to a statistician.

    Args:
        turns: The turns, in any order.
    """
    took = [turn.latency_ms for turn in turns if turn.status in _ENDED]
    return max(_SLOW_MS, _SLOW_TIMES * median(took)) if took else None


def _quantiles(ledger: Ledger, filters: Filters, value: Any) -> dict[Any, Quantiles]:
    values = select(turn_number(turns.c.number).label("part"), value.label("value"))
    wanted = of_turns(filters), turns.c.status.in_(_ENDED), value.is_not(None)
    return quantiles(ledger, values.where(*wanted), overall=True)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and cost of the turns that have something in common.

    What turns used counts, also of those that failed or wait.

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
    """Return what was used by the day in UTC on which the session began, in order; days without any are left out."""
    found = _by_session(ledger, filters, day(sessions.c.started_ns))
    return [_usage(row, iso_day(row.of * DAY_NS)) for row in sorted(found, key=lambda row: row.of)]


def usage_by_tier(ledger: Ledger, filters: Filters = ALL) -> list[Usage]:
    """Return what was used by the users' tier, the dearest first."""
    return _dearest([_usage(row, row.of or "") for row in _by_session(ledger, filters, sessions.c.tier)])


def usage_by_channel(ledger: Ledger, filters: Filters = ALL) -> list[Usage]:
    """Return what was used by the sessions' channel, the dearest first."""
    return _dearest([_usage(row, row.of or "") for row in _by_session(ledger, filters, sessions.c.channel)])


def usage_by_model(ledger: Ledger, filters: Filters = ALL) -> list[Usage]:
    """Return what was used by the model that was called last in a turn, the dearest first.

    A turn that called several models counts whole for the last one.
    """
    query = _used_by_turns(turns.c.model).where(of_turns(filters)).group_by(turns.c.model)
    return _dearest([_usage(row, row.of or "") for row in rows_of(ledger, query)])


@dataclass(frozen=True, slots=True)
class EstimateError:
    """How far our counts are from what the providers counted.

    Attributes:
        model: The model that was called last in a turn; empty where that is not known.
        turns: Turns in which both counted.
        counted: What we counted in them, in tokens.
        provided: What the provider counted.
    """

    model: str
    turns: int
    counted: int
    provided: int

    @property
    def error_pct(self) -> float | None:
        """Our count against the provider's, in percent: 5 when ours is 5 % more; None when there is nothing counted."""
        return 100 * (self.counted - self.provided) / self.provided if self.provided else None


def estimate_errors(ledger: Ledger, filters: Filters = ALL) -> list[EstimateError]:
    """Return how good our counts are by model, those with the most turns first."""
    both = turns.c.counted_of_tokens > 0
    query = select(turns.c.model.label("of"), *_COUNTED).where(of_turns(filters), both).group_by(turns.c.model)
    return _most_turns([_estimate(row) for row in rows_of(ledger, query)])


def by_model(ledger: Ledger, filters: Filters = ALL) -> tuple[list[Usage], list[EstimateError]]:
    """Return what `usage_by_model` and `estimate_errors` return, in half the time of both."""
    query = _used_by_turns(turns.c.model).add_columns(*_COUNTED).where(of_turns(filters)).group_by(turns.c.model)
    rows = rows_of(ledger, query)
    counted = [_estimate(row) for row in rows if row.both]
    return _dearest([_usage(row, row.of or "") for row in rows]), _most_turns(counted)


_COUNTED: Final = (
    count_if(turns.c.counted_of_tokens > 0).label("both"),
    func.sum(turns.c.counted_tokens).label("counted"),
    func.sum(turns.c.counted_of_tokens).label("provided"),
)


def _estimate(row: Any) -> EstimateError:
    return EstimateError(row.of or "", int(row.both), int(row.counted), int(row.provided))


def _most_turns(found: list[EstimateError]) -> list[EstimateError]:
    return sorted(found, key=lambda each: (-each.turns, each.model))


def _by_session(ledger: Ledger, filters: Filters, of: Any) -> list[Any]:
    """Return what was used by something of the sessions: their own sums, unless turns of a session are told apart."""
    if checked(filters).of_some_turns:
        joined = turns.join(sessions, sessions.c.id == turns.c.session_id)
        query = _used_by_turns(of).select_from(joined).where(of_turns_joined(filters))
    else:
        sums = [func.sum(sessions.c[name]).label(name) for name in _SUMS]
        counted, cost = func.sum(sessions.c.total_turns), func.sum(sessions.c.total_cost_usd)
        query = select(of.label("of"), counted.label("turns"), *sums, cost.label("cost")).where(of_sessions(filters))
    return rows_of(ledger, query.group_by(of))


def _used_by_turns(of: Any) -> Select[Any]:
    sums = [func.sum(turns.c[name]).label(name) for name in _SUMS]
    return select(of.label("of"), func.count().label("turns"), *sums, func.sum(turns.c.cost_usd).label("cost"))


def _usage(row: Any, of: str) -> Usage:
    sums = {name: int(getattr(row, name)) for name in _SUMS}
    return Usage(of=of, turns=int(row.turns), cost_usd=float(row.cost), **sums)


def _dearest(found: list[Usage]) -> list[Usage]:
    return sorted(found, key=lambda usage: (-usage.cost_usd, -usage.input_tokens, usage.of))
