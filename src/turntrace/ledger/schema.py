"""Creating the ledger's tables and bringing those of an older version up."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Column, Connection, Table, inspect, select, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateColumn

from turntrace.errors import LedgerError
from turntrace.ledger.tables import (
    SCHEMA_VERSION,
    conversations,
    decisions,
    failing_turns,
    feedback,
    gates,
    journeys,
    know_postgresql,
    leases,
    meta,
    metadata,
    open_turns,
    outbox,
    refused,
    sessions,
    stages,
    turn_figures,
    turn_steps,
    turns,
    waiting_turns,
)

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql

_VERSION_KEY: Final = "schema_version"


def _add_columns(connection: Connection, table: Table, *names: str) -> None:
    for name in names:
        column: Column[Any] = table.c[name]
        connection.exec_driver_sql(
            f"ALTER TABLE {table.name} ADD COLUMN {CreateColumn(column).compile(dialect=connection.dialect)}"
        )


def _to_2(connection: Connection) -> None:
    """Add the context window: how full it was, and the decisions about it."""
    _add_columns(connection, sessions, "prunings")
    sizes = ("context_tokens", "context_messages", "context_limit")
    _add_columns(connection, turns, *sizes, "prunings", "messages_pruned", "tokens_pruned")
    decisions.create(connection)


def _to_3(connection: Connection) -> None:
    """Add what writers side by side meet at, feedback, journeys, and what a session's end says."""
    how_it_ended = ("dropoff", "last_turn", "last_intent", "last_action", "last_turn_ns")
    journey = ("name", "stage", "converted", "conversion_turn", "conversion_time_ms")
    _add_columns(connection, sessions, "feedback_sum", "feedback_count", *how_it_ended)
    _add_columns(connection, sessions, *(f"journey_{name}" for name in journey))
    for table in (gates, journeys, stages, feedback):
        table.create(connection)


def _to_4(connection: Connection) -> None:
    """Add who sends and what was refused, each in a table of its own; rows of the outbox do not change any more."""
    for table in (refused, leases):
        table.create(connection)
    for name in ("attempts", "next_try_ns", "leased_until_ns", "refused"):  # no version wrote anything into them
        connection.exec_driver_sql(f"ALTER TABLE {outbox.name} DROP COLUMN {name}")


def _to_5(connection: Connection) -> None:
    """Add what a turn was forked from, where one waits for a person, and which those are."""
    _add_columns(connection, turns, "counted_tokens", "counted_of_tokens", "forked_from", "checkpoint_id")
    _add_columns(connection, open_turns, "late")
    waiting_turns.create(connection)


def _to_6(connection: Connection) -> None:
    """Add what a turn began with that its session does not tell; those that can go on have their topic from before."""
    for table in (turns, open_turns):
        _add_columns(connection, table, "own")
        about = select(table.c.id, conversations.c.topic)
        about = about.join(conversations, conversations.c.id == table.c.conversation_id)
        about = about.where(conversations.c.topic.is_not(None))
        if table is turns:
            about = about.where(turns.c.status == "interrupted")
        for row in connection.execute(about).all():
            own = json.dumps({"topic": row.topic})
            connection.execute(update(table).where(table.c.id == row.id).values(own=own))


def _to_7(connection: Connection) -> None:
    """Add which turns failed or were abandoned."""
    failing_turns.create(connection)


def _to_8(connection: Connection) -> None:
    """Add the table of the steps of turns that end from now on, and to the index by session what is asked of many."""
    turn_steps.create(connection)
    turn_figures.create(connection)
    connection.exec_driver_sql("DROP INDEX turntrace_turns_session")


MIGRATIONS: Final[dict[int, Callable[[Connection], None]]] = {
    1: _to_2,
    2: _to_3,
    3: _to_4,
    4: _to_5,
    5: _to_6,
    6: _to_7,
    7: _to_8,
}
"""By version: what brings a ledger of that version to the next, in one transaction."""


def prepare(connection: Connection) -> None:
    """Create the tables, or bring them up to this version of turntrace.

    Args:
        connection: A connection in a transaction that other writers wait for.

    Raises:
        LedgerError: If the ledger was written by a newer version of turntrace.
    """
    if connection.dialect.name == "postgresql":
        know_postgresql()
    if not inspect(connection).has_table(meta.name):
        metadata.create_all(connection)
        connection.execute(meta.insert().values(key=_VERSION_KEY, value=str(SCHEMA_VERSION)))
        return
    version = _version(connection, alone=True)
    for older in range(version, SCHEMA_VERSION):
        MIGRATIONS[older](connection)
    if version < SCHEMA_VERSION:
        connection.execute(update(meta).where(meta.c.key == _VERSION_KEY).values(value=str(SCHEMA_VERSION)))


def is_current(connection: Connection) -> bool:
    """Tell whether there is a ledger, and of this version of turntrace.

    Raises:
        LedgerError: If it was written by a newer one.
    """
    return inspect(connection).has_table(meta.name) and _version(connection) == SCHEMA_VERSION


def _version(connection: Connection, *, alone: bool = False) -> int:
    query = select(meta.c.value).where(meta.c.key == _VERSION_KEY)
    value = connection.execute(query.with_for_update() if alone else query).scalar_one_or_none()
    if value is None or not value.isdecimal():
        raise LedgerError(
            f"The table {meta.name} does not say which version the ledger has: it was changed by hand or is damaged. "
            "Point TURNTRACE_LEDGER_URL at another ledger, or restore this one from a copy."
        )
    version = int(value)
    if version > SCHEMA_VERSION:
        raise LedgerError(
            f"The ledger has schema version {version}; this turntrace knows versions up to {SCHEMA_VERSION}. "
            "Upgrade turntrace (pip install -U turntrace), or point TURNTRACE_LEDGER_URL at another ledger."
        )
    return version


def noted(connection: Connection, key: str) -> str | None:
    """Return what the ledger keeps under a key, or None."""
    return connection.execute(select(meta.c.value).where(meta.c.key == key)).scalar_one_or_none()


def remembered(connection: Connection, key: str, make: Callable[[], str]) -> str:
    """Return what the ledger keeps under a key; where there is nothing yet, it is made, once for all processes."""
    value = noted(connection, key)
    if value is None:
        insert = insert_for(connection.dialect.name, meta)
        connection.execute(insert.values(key=key, value=make()).on_conflict_do_nothing())
        value = noted(connection, key)  # another process may have been first: then its value counts
    return str(value)


def insert_for(dialect: str, table: Table) -> "sqlite.Insert | postgresql.Insert":
    """Return an INSERT that knows ON CONFLICT, in the words of the database."""
    if dialect != "postgresql":
        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql  # a seventh of what importing turntrace would take

    return postgresql.insert(table)
