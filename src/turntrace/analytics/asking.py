"""How questions are asked of the ledger: rows to results, days, quantiles in SQL, and several questions at once."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Executable,
    Integer,
    Select,
    case,
    func,
    literal,
    null,
    or_,
    select,
    union_all,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from turntrace.analytics.times import DAY_NS
from turntrace.errors import ConfigurationError
from turntrace.ledger import Ledger

T = TypeVar("T")

MOST_TURNS: Final = 50
"""Turns of a conversation that are told apart; those after it are one."""

QUANTILES: Final = (50, 95, 99)
_SPAN: Final = 2**40
"""More than any value of numbered parts, which are milliseconds or thousandths: 34 years of them."""


def checked_ledger(ledger: Ledger) -> Ledger:
    """Return the ledger, or say what was passed instead.

    Raises:
        ConfigurationError: If it is none.
    """
    if isinstance(ledger, Ledger):
        return ledger
    raise ConfigurationError(
        f"The ledger is a {type(ledger).__name__}. Allowed is a turntrace.ledger.Ledger: pass tracker.ledger, or "
        "Ledger('sqlite:///ledger.db')."
    )


def rows_of(ledger: Ledger, query: Executable) -> list[Any]:
    """Ask a question, and return all rows."""
    with checked_ledger(ledger).asking() as connection:
        return list(connection.execute(query).all())


def read(ledger: Ledger, query: Executable, kind: Callable[..., T]) -> list[T]:
    """Ask a question, and return the rows as results, by the names of their columns."""
    with checked_ledger(ledger).asking() as connection:
        return [kind(**row) for row in connection.execute(query).mappings().all()]


def ask_together(questions: Mapping[str, Callable[[], T]], *, threads: int = 2) -> dict[str, T]:
    """Ask several questions at once, and return the answers by their names, in the order of the questions.

    The database works for each outside Python's lock, so two threads take about half the time of one; a ledger in
    memory, which has one connection, takes as long as one after the other. Each sees the ledger as it is when its turn
    comes.

    Args:
        questions: What to ask, by name, the longest ones best first: functions without arguments.
        threads: How many at a time.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="turntrace-analytics") as pool:
        return dict(zip(questions, pool.map(lambda ask: ask(), questions.values()), strict=True))


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


def mean_satisfaction(row: Any) -> float | None:
    """Return the mean of the feedback in a row of ``feedback_sum`` and ``feedback_count``, from 0 to 1; None of none.

    The sum is kept by adding and taking back, so floating point may leave it a little outside.
    """
    return min(1.0, max(0.0, float(row.feedback_sum) / int(row.feedback_count))) if row.feedback_count else None


class in_bytes(FunctionElement[str]):  # noqa: N801 -- reads as SQL's functions do
    """A text to be ordered by its bytes, as Python and SQLite do it, whatever the language of the database is."""

    inherit_cache = True


@compiles(in_bytes)
def _plain(element: in_bytes, compiler: Any, **kw: Any) -> str:
    return str(compiler.process(element.clauses, **kw))


@compiles(in_bytes, "postgresql")
def _collated(element: in_bytes, compiler: Any, **kw: Any) -> str:
    return f'({compiler.process(element.clauses, **kw)}) COLLATE "C"'


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

    Equal values are counted before they are ordered, which spares most of the ordering.

    Args:
        ledger: The ledger.
        values: Rows of ``value``, a whole number from 0 to 2**40 that is not NULL, and perhaps of ``part``, a number or
            a text that the values are told apart by, which is not NULL either.
        percents: Which quantiles.
        overall: Whether those of all parts together are wanted too.

    Returns:
        The quantiles by each part, and by None for all together (also where there are no parts); nothing without any
        value.
    """
    given = values.subquery()
    parts = "part" in given.c
    counts = _counted(given, packed=parts and isinstance(given.c.part.type, Integer))
    queries = [_reached(counts, percents, counts.c.part if parts else None)]
    if parts and overall:
        together = select(counts.c.value, func.sum(counts.c.times).label("times")).group_by(counts.c.value)
        queries.append(_reached(together.cte("together"), percents, None, like=counts.c.part.type))
    found: dict[Any, tuple[int, dict[int, int]]] = {}
    for row in rows_of(ledger, union_all(*queries)):
        _, at = found.setdefault(row.part, (int(row.n), {}))
        at |= {percent: int(row.value) for percent in percents if _is_at(row, percent)}
    return {part: Quantiles(n, at) for part, (n, at) in found.items()}


def _counted(given: Any, *, packed: bool) -> CTE:
    """Return how many times there is each value of each part.

    Where the parts are numbers, SQLite sorts one number a row, which takes it two thirds of the time of two.
    """
    keys = [given.c[name] for name in ("part", "value") if name in given.c]
    if not packed:
        return select(*keys, func.count().label("times")).group_by(*keys).cte("counts")
    span = literal(_SPAN, BigInteger)
    key = (given.c.part * span + given.c.value).label("key")
    by_key = select(key, func.count().label("times")).group_by(key).subquery()
    unpacked = (by_key.c.key // span).label("part"), (by_key.c.key % span).label("value")
    return select(*unpacked, by_key.c.times).cte("counts")


def _reached(counts: CTE, percents: Sequence[int], part: Any, like: Any = None) -> Select[Any]:
    """Return the query for the counted values at which a quantile is reached, with how many are at or below them."""
    apart: dict[str, Any] = {} if part is None else {"partition_by": part}
    times = func.sum(counts.c.times)
    upto = times.over(order_by=counts.c.value, rows=(None, 0), **apart)
    n = times.over(order_by=counts.c.value, rows=(None, None), **apart)  # in this order too: then it is sorted once
    of = (null() if like is None else null().cast(like)) if part is None else part
    columns = of.label("part"), counts.c.value, counts.c.times, upto.label("upto"), n.label("n")
    summed = select(*columns).subquery()
    return select(summed).where(or_(*(_is_at(summed.c, percent) for percent in percents)))


def _is_at(row: Any, percent: int) -> Any:
    """Tell, in SQL or in Python, whether a quantile is reached at a counted value, and not at the one before."""
    return (row.upto * 100 >= row.n * percent) & ((row.upto - row.times) * 100 < row.n * percent)
