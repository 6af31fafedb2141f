"""The context window: how full it is by the number of the turn, and what is pruned."""

from dataclasses import dataclass
from typing import Final

from sqlalchemy import BigInteger, func, literal, select

from turntrace.analytics.asking import rows_of, turn_number
from turntrace.analytics.filters import ALL, Filters, in_turns, of_turns
from turntrace.analytics.quantiles import QUANTILES, quantiles
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
    # A big integer: three million tokens in thousandths are too many for PostgreSQL's usual ones.
    share = (turns.c.context_tokens * literal(_PER_MILLE, BigInteger)) // func.nullif(
        turns.c.context_limit, 0, type_=BigInteger
    )
    values = select(turn_number(turns.c.number).label("part"), share.label("value"))
    values = values.where(of_turns(filters), turns.c.context_tokens.is_not(None), turns.c.context_limit > 0)
    found = quantiles(ledger, values)
    return [
        WindowOfTurn(number, filled.n, *(filled.at[percent] / _PER_MILLE for percent in QUANTILES))
        for number, filled in sorted(found.items(), key=lambda each: each[0])
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
        tokens: By how many tokens they made the window smaller, as far as that was counted.
    """

    strategy: str
    trigger: str
    decisions: int
    sessions: int
    messages: int
    tokens: int


def prunings(ledger: Ledger, filters: Filters = ALL) -> list[Prunings]:
    """Return what was pruned by which strategy, the most frequent first.

    Filters by model or topic take only decisions of turns that have ended: before, a turn's model is not known.
    """
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
        .where(d.messages_pruned > 0, in_turns(filters, d.turn_id, d.session_id))
        .group_by(d.strategy, d.trigger)
    )
    found = [
        Prunings(row.strategy, row.trigger, row.decisions, row.sessions, int(row.messages), int(row.tokens))
        for row in rows_of(ledger, query)
    ]
    return sorted(found, key=lambda each: (-each.decisions, each.strategy, each.trigger))
