"""Finding what a command names: ledgers, sessions, users."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from sqlalchemy import select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from turntrace.errors import IdentityError, LedgerError
from turntrace.identity import hash_user
from turntrace.ledger import Ledger
from turntrace.ledger.tables import sessions
from turntrace.settings import read_settings
from turntrace.summaries import SessionSummary

_ALL: Final = 2**62
_SUGGESTED: Final = 50


def open_existing(url: str | None) -> Ledger:
    """Open a ledger to read from it, without making one where there is none.

    Args:
        url: Its URL. Default: ``TURNTRACE_LEDGER_URL``, else the one in the user's data folder.

    Raises:
        ConfigurationError: If the URL cannot be used.
        LedgerError: If there is no ledger, or it cannot be opened.
    """
    chosen = url or read_settings().ledger
    try:
        parsed = make_url(chosen)
    except (ArgumentError, ValueError):
        return Ledger(chosen)  # which says what is wrong with it
    file = parsed.database
    if parsed.get_backend_name() == "sqlite" and file not in (None, "", ":memory:") and not Path(str(file)).exists():
        raise LedgerError(f"There is no ledger at {file} yet. turntrace demo makes one; --ledger URL names another.")
    return Ledger(chosen)


def find_session(ledger: Ledger, session_id: str) -> SessionSummary:
    """Find a session by its id, or by the beginning of it.

    Raises:
        IdentityError: If there is none, or more than one.
    """
    can_be_one = session_id.isascii() and session_id.isprintable()  # a database cannot even be asked for others
    found = ledger.session(session_id) if can_be_one else None
    if found is not None:
        return found
    matches = [each.id for each in ledger.sessions(limit=_ALL, id_begins=session_id)] if can_be_one else []
    if not matches:
        raise IdentityError(f"No session has an id that begins with {session_id!r}. turntrace sessions lists them.")
    if len(matches) > 1:
        raise IdentityError(f"{len(matches):,} sessions have ids that begin with {session_id!r}: type more of it.")
    only = ledger.session(matches[0])
    if only is None:
        raise IdentityError(f"The session {matches[0]!r} was erased meanwhile.")
    return only


def find_user(ledger: Ledger, begins: str) -> str:
    """Find a user by the hash of the id, or by the beginning of it; return the hash.

    Raises:
        IdentityError: If there is none, or more than one.
    """
    query = select(sessions.c.user_id).where(sessions.c.user_id.startswith(begins, autoescape=True)).distinct()
    found: list[str] = []
    if begins.isascii() and begins.isprintable():
        with ledger.asking() as connection:
            found = list(connection.execute(query.limit(2)).scalars())
    if begins in found:
        return begins
    if not found:
        raise IdentityError(
            f"No user has a hash that begins with {begins!r}. turntrace users lists them; --user-id takes the id as "
            "your app has it."
        )
    if len(found) > 1:
        raise IdentityError(f"Several users have hashes that begin with {begins!r}: type more of it.")
    return str(found[0])


def hash_of(ledger: Ledger, user_id: str) -> str:
    """Return the hash of a user's id, by the key of the environment, else by the one that the ledger keeps.

    Raises:
        ConfigurationError: If the key of the environment cannot be used.
        IdentityError: If the id is empty.
    """
    from turntrace.lifecycle.checks import hash_key_of

    return hash_user(user_id, hash_key_of(None, read_settings().user_hash_key, ledger))


def suggest_sessions(url: str | None, begins: str) -> Sequence[str]:
    """Return ids of sessions that begin so, the newest first; none where that cannot be told."""
    try:
        with closing(open_existing(url)) as ledger:
            return [session.id for session in ledger.sessions(limit=_SUGGESTED, id_begins=begins)]
    except Exception:  # whoever presses a key is not to read of an error
        return []
