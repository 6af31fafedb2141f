"""The ledger's connections and transactions, and statements compiled once."""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

from sqlalchemy import Connection, Engine, Executable
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolIsUsedUp
from sqlalchemy.sql import ClauseElement

from turntrace.errors import LedgerError
from turntrace.forking import in_child
from turntrace.ledger.opening import (
    BUSY_TIMEOUT_MS,
    LedgerFile,
    checked,
    is_busy,
    is_memory,
    is_passing,
    named,
    open_engine,
)

logger = logging.getLogger("turntrace")


class Prepared:
    """A statement compiled once, to be run on the driver's own cursor.

    What happens at every turn goes this way: SQLAlchemy's execution of a statement costs about 100 microseconds, the
    driver's own about 20, and a turn begins in the app's own thread.

    Args:
        statement: The statement, with a named parameter for every value.
        dialect: The dialect of the database.
    """

    def __init__(self, statement: Executable, dialect: Dialect) -> None:
        assert isinstance(statement, ClauseElement)
        compiled = statement.compile(dialect=dialect)
        self._sql = str(compiled)
        self._order: list[str] | None = getattr(compiled, "positiontup", None)
        self._defaults: dict[str, Any] = {k: v for k, v in compiled.params.items() if v is not None}

    def run(self, cursor: Any, values: Mapping[str, Any]) -> Any:
        """Run the statement and return the cursor."""
        if self._order is not None:
            defaults = self._defaults
            cursor.execute(self._sql, [values[k] if k in values else defaults.get(k) for k in self._order])
        else:
            cursor.execute(self._sql, {**self._defaults, **values})
        return cursor


class Database:
    """The ledger's connections: on SQLite one that writes and those of the pool for reading, elsewhere the pool's.

    Within a process, writers to SQLite take turns by a lock, since SQLite's own waiting sleeps for milliseconds. They
    share one connection, since SQLite forgets what it has read when another one has written.

    Args:
        engine_or_url: A URL (then the engine is ours and closed with us) or an engine of the app's (which is not).
        prepare: Called in a transaction when another file is found at the place of the one that was there.
    """

    def __init__(
        self, engine_or_url: Engine | str | URL, prepare: Callable[[Connection], object] = lambda _: None
    ) -> None:
        self._prepare = prepare
        self._owns_engine = not isinstance(engine_or_url, Engine)
        self.engine = checked(engine_or_url) if isinstance(engine_or_url, Engine) else open_engine(engine_or_url)
        self._is_sqlite = self.engine.dialect.name == "sqlite"
        # An engine of the app's may be one that commits by itself, or that sees no more than its first query saw.
        own = self._owns_engine or self._is_sqlite
        self._writes = self.engine if own else self.engine.execution_options(isolation_level="READ COMMITTED")
        one_moment = {} if self._is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._reads = self.engine.execution_options(**one_moment)
        self._in_memory = self._is_sqlite and is_memory(self.engine.url)
        self._alone = self.engine if self._is_sqlite else self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._lock = threading.RLock()
        self._writer: Connection | None = None
        self._file: LedgerFile | None = None
        self._gate = threading.Condition()
        self._readers = 0
        self._forking = False
        _at_fork(self)
        in_child(self._after_fork_in_child)

    @property
    def dialect(self) -> Dialect:
        """The dialect of the database."""
        return self.engine.dialect

    @property
    def is_sqlite(self) -> bool:
        """Whether writers take turns; elsewhere they are side by side, and lock the rows that they change."""
        return self._is_sqlite

    @contextmanager
    def writing(self, *, many_rows: bool = False) -> Iterator[Connection]:
        """Give a connection in a transaction that is committed at the end of the block.

        Args:
            many_rows: Whether it changes rows of several sessions or conversations. Such transactions take turns also
                where writers are side by side: each would hold rows that another one waits for.

        Raises:
            LedgerError: If the database cannot be written.
        """
        with self._turn_of_writers(), self._named_errors(writes=True):
            if not self._is_sqlite:
                with self._writes.begin() as connection:
                    if many_rows:
                        connection.exec_driver_sql(_ALONE)
                    yield connection
                return
            connection = self._write_connection()
            with connection.begin():
                # One that reads first and then writes could be refused when another wrote in between.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                yield connection

    @contextmanager
    def erasing(self) -> Iterator[Connection]:
        """Give a connection as `writing` does; on SQLite, what is deleted is overwritten. `scrub` is to follow.

        Raises:
            LedgerError: If the database cannot be written.
        """
        with self._turn_of_writers():
            self._run_alone("PRAGMA secure_delete=ON")  # an engine of the app's may have it off
            with self.writing(many_rows=True) as connection:
                yield connection

    def scrub(self) -> None:
        """Leave no bytes of what was erased in SQLite's files: copies that its pages kept, and those of its log.

        The file is written anew where that takes a second or two, for which other writers wait. What cannot be done is
        logged.
        """
        if not self._is_sqlite or self._in_memory:
            return
        with self._turn_of_writers():
            try:
                pages, size = (self._run_alone(f"PRAGMA {name}")[0] for name in ("page_count", "page_size"))
                is_large = pages * size > _MOST_SCRUBBED
                if not is_large:
                    self._run_alone("VACUUM")
                is_read = self._run_alone("PRAGMA wal_checkpoint(TRUNCATE)")[0]
            except LedgerError as error:
                logger.warning("turntrace: %s What was erased may have left bytes in unused parts of the file.", error)
                return
        where = self.engine.url.render_as_string(hide_password=True)
        if is_large:
            logger.warning(
                "turntrace: the ledger at %s is too large to be written anew while it is in use, so unused parts of "
                "it may still hold bytes of what was erased. At a quiet hour, run VACUUM on it with sqlite3.",
                where,
            )
        if is_read:
            logger.warning(
                "turntrace: somebody reads the ledger at %s, so its write-ahead log still holds what was erased. "
                "Erase the same again when that is over: tracker.forget_user(...).",
                where,
            )

    def _run_alone(self, words: str) -> Any:
        if not self._is_sqlite:
            return None
        with self._named_errors(writes=True):
            return self._write_connection().connection.cursor().execute(words).fetchone()

    def _turn_of_writers(self) -> AbstractContextManager[object]:
        return self._lock if self._is_sqlite else nullcontext()

    @contextmanager
    def _patient_turn_of_writers(self) -> Iterator[None]:
        """Take a turn, for a caller that an app waits for: not behind a writer that waits for another process."""
        if not self._is_sqlite:
            yield
            return
        if not self._lock.acquire(timeout=_PATIENCE_S):
            raise LedgerError(
                f"The ledger at {self.engine.url.render_as_string(hide_password=True)} is locked by another process "
                f"for more than {_PATIENCE_S:g} s. It can be written again when that has ended."
            )
        try:
            yield
        finally:
            self._lock.release()

    def _write_connection(self) -> Connection:
        if self._writer is not None and self._file is not None and not self._file.is_there():
            self._forget_connections()
        if self._writer is None:
            self._writer = self.engine.connect()
            self._look_at_file(self._writer)
        return self._writer

    def _look_at_file(self, connection: Connection) -> None:
        """Note which file the ledger is; one that took the place of another is made a ledger."""
        if not self._is_sqlite or self._in_memory:
            return
        before, self._file = self._file, LedgerFile.of(connection)
        # A number of one that was deleted may be given to the next: that one is empty.
        if before is not None and (self._file != before or self._is_empty(connection)):
            logger.warning(
                "turntrace: the file of the ledger at %s was deleted or replaced while the app runs, and what it held "
                "is not there any more. Tracking goes on in the one that is there now.",
                self.engine.url.render_as_string(hide_password=True),
            )
            with connection.begin():
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                self._prepare(connection)

    @staticmethod
    def _is_empty(connection: Connection) -> bool:
        cursor = connection.connection.cursor()
        return cursor.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None

    def _forget_connections(self) -> None:
        """Close the connections to a file, which remember what they have read of it, so that it is opened again."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.invalidate()
            writer.close()
        self.engine.dispose()

    @contextmanager
    def _named_errors(self, *, writes: bool) -> Iterator[None]:
        """Have errors of the database raised as a `LedgerError`, but for those that are mistakes of ours."""
        driver = self.engine.dialect.loaded_dbapi  # a statement that is prepared raises the driver's own errors
        mistakes = (*_MISTAKES, driver.IntegrityError, driver.ProgrammingError, driver.DataError)
        try:
            yield
        except (DatabaseError, PoolIsUsedUp, driver.Error) as error:
            is_of_url = getattr(error, "statement", "") is None  # nothing was asked yet: an option of the URL is none
            is_mistake = isinstance(error, mistakes) and not is_of_url and not is_passing(error)
            if is_mistake or "syntax error" in str(getattr(error, "orig", error)):
                raise  # another try would fail again
            if writes and self._is_sqlite and not self._in_memory and not is_busy(error):
                self._forget_connections()
            raise named(error, self.engine.url) from None  # the driver's errors say no more, at length

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Give a connection that sees the database as it is at the first query.

        Raises:
            LedgerError: If the database cannot be read.
        """
        with self._named_errors(writes=False):
            if self._in_memory:  # one connection for all: readers must take turns with writers
                with self._lock, self.engine.connect() as connection:
                    yield connection
            else:
                with self._counted(), self._reads.connect() as connection:
                    if self._is_sqlite:
                        connection.exec_driver_sql("BEGIN")
                    yield connection

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a reader, for whom a fork waits."""
        with self._gate:
            self._gate.wait_for(lambda: not self._forking)
            self._readers += 1
        try:
            yield
        finally:
            with self._gate:
                self._readers -= 1
                self._gate.notify_all()

    def run_fast(self, statement: Prepared, values: Mapping[str, Any]) -> Any:
        """Run one statement on the driver's own cursor, by itself, and return its first row or None.

        Raises:
            LedgerError: If the database cannot be written.
        """
        with self._patient_turn_of_writers(), self._named_errors(writes=True):
            if not self._is_sqlite:
                return self._run_on_pool(statement, values)
            connection = self._write_connection().connection
            try:
                row = statement.run(connection.cursor(), values).fetchone()
            except BaseException:
                connection.rollback()
                raise
            connection.commit()  # nothing to do for an engine of ours, which is in autocommit
            return row

    def _run_on_pool(self, statement: Prepared, values: Mapping[str, Any]) -> Any:
        """Run one statement in a transaction of its own.

        Again when it was the one that the server broke off so that others could go on, and on a new connection when
        the server had closed this one.
        """
        for is_last in (*[False] * _TRIES, True):
            with self._alone.connect() as connection:
                try:
                    return statement.run(connection.connection.cursor(), values).fetchone()
                except Exception as error:
                    raw = connection.connection.driver_connection
                    is_closed = getattr(raw, "closed", False)
                    if is_last or not (is_closed or getattr(error, "sqlstate", None) in _BROKEN_OFF):
                        raise
                    if is_closed:
                        connection.invalidate(error)
                        self.engine.dispose()  # the others are as old
        return None

    def close(self) -> None:
        """Close the connections; those of an engine of the app's stay open."""
        with self._lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if self._owns_engine:
                self.engine.dispose()

    def _before_fork(self) -> None:
        # SQLite's locks belong to a process: one that a transaction holds at the fork would be the child's for ever.
        self._lock.acquire()
        with self._gate:
            self._forking = True
            self._gate.wait_for(lambda: self._readers == 0, timeout=BUSY_TIMEOUT_MS / 1000)

    def _after_fork_in_parent(self) -> None:
        self._forking = False
        with self._gate:
            self._gate.notify_all()
        self._lock.release()

    def _after_fork_in_child(self) -> None:
        self._lock = threading.RLock()
        self._gate = threading.Condition()
        self._forking, self._readers = False, 0
        if self._in_memory:
            return  # a copy of the parent's memory, which is the child's own
        # What is inherited is closed before anything new is opened: SQLite would take the parent's locks for ours.
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        # A server would take the goodbye of an inherited connection for the parent's.
        self.engine.dispose(close=self._owns_engine and self._is_sqlite)


def _at_fork(database: Database) -> None:
    weak = weakref.ref(database)

    def call(method: Callable[[Database], None]) -> Callable[[], None]:
        return lambda: None if (alive := weak()) is None else method(alive)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=call(Database._before_fork),
            after_in_parent=call(Database._after_fork_in_parent),
        )


# A lock of the server's that belongs to this ledger (its schema's) and goes with the transaction. A process that is
# stopped in the middle, but not killed, must not keep the others waiting for ever.
_ALONE: Final = (
    "SELECT pg_advisory_xact_lock(1953853044, ('turntrace_meta'::regclass::oid::bigint & 2147483647)::int), "
    "set_config('idle_in_transaction_session_timeout', '60000', true)"
)
_PATIENCE_S: Final = 5.0
_BROKEN_OFF: Final = ("40P01", "40001")  # deadlock_detected, serialization_failure
_TRIES: Final = 3
_MOST_SCRUBBED: Final = 200_000_000
"""The largest file that is written anew, in bytes: about 100 MB a second, so others wait for less than they would."""
_MISTAKES: Final = (IntegrityError, ProgrammingError, DataError)
