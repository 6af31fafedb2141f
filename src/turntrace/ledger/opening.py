"""Opening the engine of the ledger's database: SQLite as turntrace wants it, or PostgreSQL."""

import logging
import os
import re
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.exc import TimeoutError as PoolIsUsedUp
from sqlalchemy.pool import StaticPool

from turntrace.errors import ConfigurationError, LedgerError
from turntrace.settings import default_ledger_path

logger = logging.getLogger("turntrace")

BUSY_TIMEOUT_MS: Final = 2_000
"""How long a statement waits for another process that writes to the same SQLite file."""

_SQLITE: Final = ("sqlite", "sqlite+pysqlite")
_POSTGRESQL: Final = ("postgresql", "postgresql+psycopg")
_FILE: Final = re.compile(r"([A-Za-z]:[\\/])?[\w ./\\~-]{1,200}")
"""What a file is named by, and nothing with a user and a password."""
_LONGEST: Final = 300
_LOCK_POLL_S: Final = 0.01
_CONNECTION: Final = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
"""Options of libpq: a server that has gone without a word is given up within seconds, not within the system's hours."""
_RECYCLE_S: Final = 1800
_ADVICE: Final = (
    (r'database "([^"]*)" does not exist', "Make the database, as by: createdb {0}. Or correct its name in the URL."),
    (r"password authentication failed|no password supplied", "Correct the user and the password in the URL."),
    (r'role "([^"]*)" does not exist', "Make the user, as by: createuser {0}. Or correct it in the URL."),
    (r"no pg_hba\.conf entry", "Have the server let this user and machine in: its pg_hba.conf says who may."),
    (r"[Cc]onnection refused|No such file or directory", "Is the server running, at that host and port? Start it."),
    (r"failed to resolve host|could not translate host", "Correct the host in the URL: its name is not known here."),
    (
        r"timeout expired|timed out|No route to host|unreachable",
        "Does the host run, and can it be reached from here?",
    ),
    (r"too many clients|remaining connection slots", "Raise max_connections of the server, or use fewer processes."),
)
"""What to do about which error of PostgreSQL's, by what its client library says in English."""


def open_engine(url: str | URL) -> Engine:
    """Open the engine for a database URL.

    Args:
        url: A SQLAlchemy URL: ``sqlite:///path/to/file.db``, ``sqlite://`` for one in memory, or
            ``postgresql+psycopg://user:password@host/database``.

    Raises:
        ConfigurationError: If it is not a URL of a database that turntrace can use, or its driver is not installed.
        LedgerError: If its folder cannot be made.
    """
    if hasattr(url, "sync_engine"):
        raise ConfigurationError(_ASYNC)
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the latter for a port that is no number
        raise ConfigurationError(_no_url(url)) from None
    if parsed.drivername in _POSTGRESQL:
        return _open_postgresql(parsed)
    if parsed.drivername not in _SQLITE:
        raise ConfigurationError(
            f"The ledger cannot use {parsed.drivername!r}. Allowed are sqlite and postgresql+psycopg: pass a URL like "
            "sqlite:////var/lib/app/turntrace.db or postgresql+psycopg://user@host/database."
        )
    try:
        SQLiteDialect_pysqlite().create_connect_args(parsed)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "The ledger's URL of SQLite cannot be used: it names a host, or an option with a value that is none. Pass "
            "one like sqlite:////var/lib/app/turntrace.db, or set TURNTRACE_LEDGER_URL to it."
        ) from None
    if is_memory(parsed):
        engine = create_engine(parsed, poolclass=StaticPool, connect_args={"check_same_thread": False})
    else:
        if "uri" not in parsed.query:  # such a URL names no path, and its folder is the user's to make
            _make_folder(Path(str(parsed.database)))
        engine = create_engine(parsed, connect_args={"check_same_thread": False})
    event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _no_url(given: object) -> str:
    if isinstance(given, str | Path) and _FILE.fullmatch(str(given)):
        return (
            f"The ledger is {str(given)!r}, which is no database URL. Pass {f'sqlite:///{given}'!r} for a SQLite file "
            "there, or set TURNTRACE_LEDGER_URL to it."
        )
    return (  # without the text: it may hold a password
        "The ledger's place is not a database URL. Pass one like sqlite:////var/lib/app/turntrace.db, "
        "or set TURNTRACE_LEDGER_URL to it."
    )


def is_memory(url: URL) -> bool:
    """Tell whether a SQLite URL names a database in memory."""
    return url.database in (None, "", ":memory:")


def file_of(url: URL) -> Path | None:
    """Return the file that a URL of SQLite names; None for one in memory, or of another database."""
    if url.get_backend_name() != "sqlite" or is_memory(url) or url.query.get("mode") == "memory":
        return None
    database = str(url.database)
    return Path(unquote(database.removeprefix("file:")) if "uri" in url.query else database)


def checked(engine: Engine) -> Engine:
    """Return an engine of the app's, or say why it cannot be used.

    Raises:
        ConfigurationError: If it is asynchronous.
    """
    if engine.dialect.is_async:
        raise ConfigurationError(_ASYNC)
    return engine


_ASYNC: Final = (
    "The ledger's engine is asynchronous, and the ledger waits for its database in threads of its own. Pass the URL, "
    "or an engine of create_engine with psycopg: SessionTracker('postgresql+psycopg://user@host/database')."
)


def _open_postgresql(url: URL) -> Engine:
    options: dict[str, int | None] = {name: value for name, value in _CONNECTION.items() if name not in url.query}
    # A pooler between (PgBouncer) may give each transaction another connection, which knows no prepared statements.
    prepare = url.query.get("prepare_threshold")
    options["prepare_threshold"] = int(prepare) if isinstance(prepare, str) and prepare.isdecimal() else None
    url = url.set(drivername="postgresql+psycopg").difference_update_query(["prepare_threshold"])
    try:
        return create_engine(url, pool_recycle=_RECYCLE_S, connect_args=options)
    except ImportError as error:
        raise ConfigurationError(
            "The ledger is to be on PostgreSQL, and its driver psycopg is not installed. "
            "Install it: pip install 'turntrace[postgres]'."
        ) from error


def _advice_on_postgresql(words: str) -> str | None:
    """Return what to do about an error of a connection to PostgreSQL, by its words; None where they are not known."""
    for pattern, advice in _ADVICE:
        if (found := re.search(pattern, words)) is not None:
            return advice.format(*found.groups())
    return None


def _make_folder(path: Path) -> None:
    """Make the folder of a file: workers begin with empty volumes. More than one that was missing looks like a typo."""
    try:
        missing = [folder for folder in path.parent.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LedgerError(
            f"The folder of the ledger, {path.parent}, cannot be made: {error.strerror}. "
            "Set TURNTRACE_LEDGER_URL to a place that can be written, as sqlite:////tmp/turntrace.db."
        ) from None
    if missing and path != default_ledger_path():
        words = "turntrace: made the folder %r for the ledger, since %r was not there. Is the ledger's URL right?"
        logger.warning(words, str(path.parent), str(missing[-1]))


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say so, not where the driver guesses
    # What is deleted is overwritten: what was sent long ago would else stay in the file when its user is erased.
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "synchronous=NORMAL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")
    _use_write_ahead_log(connection)


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch the file to WAL; for this one change SQLite does not wait for others by itself."""
    give_up = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise  # as for a file that may only be read
            if time.monotonic() > give_up:
                raise
            time.sleep(_LOCK_POLL_S)
        else:
            return


class LedgerFile(NamedTuple):
    """The file that a connection to SQLite has open.

    Attributes:
        path: Where it was opened.
        device: The device that it is on.
        inode: Its number there, which another file at the same place does not have.
    """

    path: str
    device: int
    inode: int

    @classmethod
    def of(cls, connection: Connection) -> "LedgerFile | None":
        """Return the file of a connection; None where it has none."""
        path = connection.connection.cursor().execute("PRAGMA database_list").fetchone()[2]
        return cls._at(path) if path else None

    @classmethod
    def _at(cls, path: str) -> "LedgerFile | None":
        try:
            found = Path(path).stat()
        except OSError:
            return None
        return cls(path, found.st_dev, found.st_ino)

    def is_there(self) -> bool:
        """Tell whether it is still the one at its path."""
        try:
            found = os.stat(self.path)  # noqa: PTH116 - before each turn, and half as dear as Path.stat
        except OSError:
            return False
        return found.st_ino == self.inode and found.st_dev == self.device


_DAMAGED: Final = (
    "It is damaged or no ledger: restore it from a copy, move it away with its -wal and -shm (then a new one is begun),"
)
_PASSING: Final = frozenset({"42P01", "42501", "3F000", "26000", "42P05"})
"""No such table or schema, as while a backup is restored; no rights; statements that a pooler mixed up."""
_SQLITE_HINTS: Final[Mapping[int, str]] = {
    sqlite3.SQLITE_BUSY: "Another process writes to it for long: end that,",
    sqlite3.SQLITE_LOCKED: "Another process writes to it for long: end that,",
    sqlite3.SQLITE_FULL: "Make room there,",
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
}


def _code_of(error: Exception) -> int:
    """Return SQLite's code of an error, 0 for others."""
    return int(getattr(getattr(error, "orig", None) or error, "sqlite_errorcode", 0)) & 0xFF


def is_passing(error: Exception) -> bool:
    """Tell whether PostgreSQL says what somebody mends: tables that are away, rights that are missing."""
    return getattr(getattr(error, "orig", None) or error, "sqlstate", None) in _PASSING


def is_busy(error: Exception) -> bool:
    """Tell whether SQLite waited for another one that writes, in vain."""
    return _code_of(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def named(error: Exception, url: URL) -> LedgerError:
    """Return an error of the database as one that says where the ledger is, what is wrong and what to do."""
    where = url.render_as_string(hide_password=True)
    whole = str(getattr(error, "orig", None) or error)
    if isinstance(error, PoolIsUsedUp):
        return LedgerError(
            f"The ledger at {where} failed: the engine that the tracker was given has no connection left. Give it a "
            "larger pool, or pass the URL, with which the ledger has connections of its own."
        )
    if url.drivername.startswith("sqlite"):
        hint = _SQLITE_HINTS.get(_code_of(error), "Check that the place can be written and has room,")
        return LedgerError(
            f"The ledger at {where} failed: {whole.splitlines()[0]}. {hint} or set TURNTRACE_LEDGER_URL to another."
        )
    why = " ".join(whole.split("Is the server running")[0].split())[:_LONGEST].rstrip(".")
    advice = _advice_on_postgresql(whole) or "See whether the server is well."
    return LedgerError(f"The ledger at {where} failed: {why}. {advice} TURNTRACE_LEDGER_URL names another ledger.")
