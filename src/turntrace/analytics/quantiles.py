"""Quantiles of whole numbers, found in SQL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    FromClause,
    Integer,
    Select,
    String,
    func,
    literal,
    or_,
    select,
    tuple_,
    union_all,
)

from turntrace.analytics.asking import rows_of
from turntrace.ledger import Ledger

QUANTILES: Final = (50, 95, 99)
_SPAN: Final = 2**40
"""More than any value of numbered parts, which are milliseconds or thousandths: 34 years of them."""
_NEIGHBOURS: Final = 64
"""Values that are counted together first; a divisor of the span."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Quantiles of whole numbers.

    Attributes:
        n: How many numbers there are; at least 1.
        at: By percent, the smallest number with so many of the hundred at or below it.
    """

    n: int
    at: Mapping[int, int]


def quantiles(
    ledger: Ledger, values: Select[Any], percents: Sequence[int] = QUANTILES, *, overall: bool = False
) -> dict[Any, Quantiles]:
    """Return quantiles of a value, exact and by the nearest rank: the smallest value with so many at or below it.

    Equal values are counted. What is put in order are counts of neighbouring values together, and then, of all values,
    those near a quantile: to order all of them would take half as long again as to count them.

    Args:
        ledger: The ledger.
        values: Rows of ``value``, a whole number from 0 and below 2**40 that is not NULL, and perhaps of ``part``, a
            number from 0 or a text that the values are told apart by, which is not NULL either.
        percents: Which quantiles.
        overall: Whether those of all parts together are wanted too.

    Returns:
        The quantiles by each part, and by None for all together (also where there are no parts); nothing without any
        value.
    """
    has_parts = "part" in values.selected_columns
    counts = _counted(values if has_parts else values.add_columns(_one(BigInteger())))
    coarse = _summed(counts, counts.c.part, counts.c.bucket).cte("coarse")
    queries = [_reached(counts, coarse, percents, of_all=not has_parts)]
    if has_parts and overall:
        part = _one(counts.c.part.type)
        together = select(part, counts.c.bucket, counts.c.value, counts.c.times).subquery()
        coarser = select(part, coarse.c.bucket, coarse.c.times).subquery()
        in_all = _summed(coarser, coarser.c.part, coarser.c.bucket).cte("coarse_of_all")
        queries.append(_reached(together, in_all, percents, of_all=True))
    found: dict[Any, tuple[int, dict[int, int]]] = {}
    for row in rows_of(ledger, union_all(*queries)):
        _, at = found.setdefault(None if row.of_all else row.part, (int(row.n), {}))
        at |= {percent: int(row.value) for percent in percents if _is_at(row, percent)}
    return {part: Quantiles(n, at) for part, (n, at) in found.items()}


def _one(kind: Any) -> ColumnElement[Any]:
    return literal("" if isinstance(kind, String) else 0, kind).label("part")


def _counted(values: Select[Any]) -> CTE:
    """Return how many times there is each value of each part, and the bucket of neighbours that it is in.

    Where the parts are numbers, SQLite sorts one number a row, which takes it two thirds of the time of two.
    """
    given, span, times = values.subquery(), literal(_SPAN, BigInteger), func.count().label("times")
    part, value = given.c.part, given.c.value
    if isinstance(part.type, Integer):
        key = (part * span + value).label("key")
        by_key = select(key, times).group_by(key).subquery()
        counted = select((by_key.c.key // span).label("part"), (by_key.c.key % span).label("value"), by_key.c.times)
    else:
        counted = select(part, value, times).group_by(part, value)
    each = counted.subquery()
    return select(each, (each.c.value // literal(_NEIGHBOURS, BigInteger)).label("bucket")).cte("counts")


def _summed(counts: FromClause, *by: ColumnElement[Any]) -> Select[Any]:
    return select(*by, func.sum(counts.c.times).label("times")).group_by(*by)


def _reached(counts: FromClause, coarse: CTE, percents: Sequence[int], *, of_all: bool) -> Select[Any]:
    """Return the query for the values at which a quantile is reached, with how many are at or below them."""
    c = coarse.c
    whole = func.sum(c.times).over(partition_by=c.part, order_by=c.bucket, rows=(None, None))  # so it is sorted once
    upto = _upto(c.times, c.part, by=c.bucket)
    summed = select(c.part, c.bucket, c.times, upto.label("upto"), whole.label("n"))
    buckets = _at(summed.subquery(), percents).cte()
    # Values are sought by IN: SQLite, which does not know how few buckets there are, joins by reading all for each.
    bucket = counts.c.part, counts.c.bucket
    in_them = tuple_(*bucket).in_(select(buckets.c.part, buckets.c.bucket))
    near = _summed(counts, *bucket, counts.c.value).where(in_them).cte().prefix_with("MATERIALIZED")
    n = near.c
    same = (n.part == buckets.c.part) & (n.bucket == buckets.c.bucket)
    upto = buckets.c.upto - buckets.c.times + _upto(n.times, n.part, n.bucket, by=n.value)
    found = select(n.part, n.value, n.times, upto.label("upto"), buckets.c.n, literal(of_all).label("of_all"))
    return _at(found.join_from(near, buckets, same).subquery(), percents)


def _upto(times: Any, *apart: Any, by: Any) -> ColumnElement[int]:
    upto: ColumnElement[int] = func.sum(times).over(partition_by=apart, order_by=by, rows=(None, 0))
    return upto


def _at(summed: FromClause, percents: Sequence[int]) -> Select[Any]:
    return select(summed).where(or_(*(_is_at(summed.c, percent) for percent in percents)))


def _is_at(row: Any, percent: int) -> Any:
    """Tell, in SQL or in Python, whether a quantile is reached at a counted value, and not at the one before."""
    return (row.upto * 100 >= row.n * percent) & ((row.upto - row.times) * 100 < row.n * percent)
