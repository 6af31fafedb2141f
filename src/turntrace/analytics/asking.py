"""How questions are asked of the ledger: rows to results, days, texts in order, and several questions at once."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from sqlalchemy import ColumnElement, Executable, case, func, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from turntrace.analytics.times import DAY_NS
from turntrace.errors import ConfigurationError
from turntrace.ledger import Ledger

T = TypeVar("T")

MOST_TURNS: Final = 50
"""Turns of a conversation that are told apart; those after it are one."""


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
