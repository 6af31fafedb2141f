"""The context window: how full it is by the number of the turn, what is pruned, and how good our counts are."""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, select

from turntrace.analytics.asking import count_if, quantiles, rows_of, turn_number
from turntrace.analytics.filters import ALL, Filters, in_sessions, of_turns
from turntrace.ledger import Ledger
from turntrace.ledger.tables import decisions, turns

_PER_MILLE: Final = 1000


@dataclass(frozen=True, slots=True)
class WindowOfTurn:
    """How full the models' windows were at their fullest in turns of the same number.

    Attributes:
        number: Their number in the conversation; one more than `MOST_TURNS` stands for all after it.
        n: How many turns whose model's window is known.
        p50: Half of them filled at most this share, from 0 to 1, in steps of a thousandth.
        p95: 95 of 100 filled at most this share.
        p99: 99 of 100 filled at most this share.
    """

    number: int
    n: int
    p50: float
    p95: float
    p99: float


def window_by_turn(ledger: Ledger, filters: Filters = ALL) -> list[WindowOfTurn]:
    """Return how full the models' windows were, by the number of the turn."""
    share = (turns.c.context_tokens * _PER_MILLE) // func.nullif(turns.c.context_limit, 0)
    values = select(turn_number(turns.c.number).label("part"), share.label("value"))
    values = values.where(of_turns(filters), turns.c.context_tokens.is_not(None), turns.c.context_limit > 0)
    found = quantiles(ledger, values)
    return [
        WindowOfTurn(number, int(row.n), row.p50 / _PER_MILLE, row.p95 / _PER_MILLE, row.p99 / _PER_MILLE)
        for number, row in sorted((number, row) for number, row in found.items() if number is not None)
    ]


@dataclass(frozen=True, slots=True)
class Prunings:
    """Decisions of one strategy that pruned something.

    Attributes:
        strategy: The strategy, or the name of the node whose code pruned.
        trigger: ``threshold``, ``limit`` or ``external``.
        decisions: How many.
        sessions: In how many sessions.
        messages: How many messages they left out, each time counted.
        tokens: How many tokens that were, as far as they were counted.
    """

    strategy: str
    trigger: str
    decisions: int
    sessions: int
    messages: int
    tokens: int


def prunings(ledger: Ledger, filters: Filters = ALL) -> list[Prunings]:
    """Return what was pruned by which strategy, the most frequent first."""
    d = decisions.c
    query = (
        select(
            func.coalesce(d.strategy, "").label("strategy"),
            func.coalesce(d.trigger, "").label("trigger"),
            func.count().label("decisions"),
            func.count(d.session_id.distinct()).label("sessions"),
            func.sum(d.messages_pruned).label("messages"),
            func.sum(func.coalesce(d.tokens_before - d.tokens_after, 0)).label("tokens"),
        )
        .where(d.messages_pruned > 0, in_sessions(filters, d.session_id))
        .group_by(d.strategy, d.trigger)
    )
    found = [
        Prunings(row.strategy, row.trigger, row.decisions, row.sessions, int(row.messages), int(row.tokens))
        for row in rows_of(ledger, query)
    ]
    return sorted(found, key=lambda each: (-each.decisions, each.strategy, each.trigger))


@dataclass(frozen=True, slots=True)
class EstimateError:
    """How far our counts are from what the providers counted.

    Attributes:
        model: The model.
        turns: Turns whose calls both counted.
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
    query = (
        select(
            func.coalesce(turns.c.model, "").label("model"),
            count_if(both).label("turns"),
            func.sum(turns.c.counted_tokens).label("counted"),
            func.sum(turns.c.counted_of_tokens).label("provided"),
        )
        .where(of_turns(filters), both)
        .group_by(turns.c.model)
    )
    rows = rows_of(ledger, query)
    found = [EstimateError(row.model, int(row.turns), int(row.counted), int(row.provided)) for row in rows]
    return sorted(found, key=lambda each: (-each.turns, each.model))
