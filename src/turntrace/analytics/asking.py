"""How questions are asked of the ledger: rows to results, days, and quantiles in SQL."""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from sqlalchemy import ColumnElement, Executable, FromClause, Select, case, func, literal, select, union_all

from turntrace.analytics.filters import DAY_NS
from turntrace.ledger import Ledger

T = TypeVar("T")

MOST_TURNS: Final = 50
"""Turns of a conversation that are told apart; those after it are one."""

QUANTILES: Final = (50, 95, 99)


def rows_of(ledger: Ledger, query: Executable) -> list[Any]:
    """Ask a question, and return all rows."""
    with ledger.asking() as connection:
        return list(connection.execute(query).all())


def read(ledger: Ledger, query: Executable, kind: Callable[..., T]) -> list[T]:
    """Ask a question, and return the rows as results, by the names of their columns."""
    with ledger.asking() as connection:
        return [kind(**row) for row in connection.execute(query).mappings().all()]


def day(column: Any) -> ColumnElement[int]:
    """Return the day of a time, counted from 1970, in UTC."""
    whole: ColumnElement[int] = column // literal(DAY_NS, type_=column.type)
    return whole


def count_if(condition: Any) -> ColumnElement[int]:
    """Return how many rows meet a condition; 0 of none."""
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


def turn_number(column: Any) -> ColumnElement[int]:
    """Return the number of a turn, where those after `MOST_TURNS` are one more than that."""
    return case((column > MOST_TURNS, MOST_TURNS + 1), else_=column)


def quantiles(ledger: Ledger, values: Select[Any], percents: Sequence[int] = QUANTILES) -> dict[Any, Any]:
    """Return quantiles of a value, exact and by the nearest rank: the smallest value with so many at or below it.

    Equal values are counted before they are ordered, which spares most of the sorting.

    Args:
        ledger: The ledger.
        values: Rows of ``part``, what the values are told apart by, and ``value``, which is not NULL.
        percents: Which quantiles.

    Returns:
        By each part and by None for all together, rows with ``n`` and ``p50``, ``p95``, ...; nothing without any value.
    """
    given = values.subquery()
    by_value = given.c.part, given.c.value
    counts = select(*by_value, func.count().label("times")).group_by(*by_value).cte("counts")
    together = select(counts.c.value, func.sum(counts.c.times).label("times")).group_by(counts.c.value).subquery()
    of_all = select(literal(1).label("part"), together.c.value, together.c.times).subquery()
    found: dict[Any, Any] = {}
    with ledger.asking() as connection:
        rows = connection.execute(union_all(_ranked(of_all, 1, percents), _ranked(counts, 0, percents))).all()
    for row in rows:
        found[None if row.is_all else row.part] = row
    return found


def _ranked(counts: FromClause, is_all: int, percents: Sequence[int]) -> Select[Any]:
    upto = func.sum(counts.c.times).over(partition_by=counts.c.part, order_by=counts.c.value)
    n = func.sum(counts.c.times).over(partition_by=counts.c.part)
    ranked = select(counts.c.part, counts.c.value, upto.label("upto"), n.label("n")).subquery()
    columns: list[Any] = [literal(is_all).label("is_all"), ranked.c.part, func.max(ranked.c.n).label("n")]
    for percent in percents:
        reached = ranked.c.upto * 100 >= ranked.c.n * percent
        columns.append(func.min(case((reached, ranked.c.value))).label(f"p{percent}"))
    return select(*columns).group_by(ranked.c.part)
