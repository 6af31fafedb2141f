"""Finding what a command names."""

from pathlib import Path
from typing import Final

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from turntrace.errors import IdentityError, LedgerError
from turntrace.ledger import Ledger
from turntrace.settings import read_settings
from turntrace.summaries import SessionSummary

_ALL: Final = 2**62


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
    except ArgumentError:
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
    found = ledger.session(session_id)
    if found is not None:
        return found
    matches = [session.id for session in ledger.sessions(limit=_ALL, id_begins=session_id)]
    if not matches:
        raise IdentityError(f"No session has an id that begins with {session_id!r}. turntrace sessions lists them.")
    if len(matches) > 1:
        raise IdentityError(f"{len(matches):,} sessions have ids that begin with {session_id!r}: type more of it.")
    only = ledger.session(matches[0])
    if only is None:
        raise IdentityError(f"The session {matches[0]!r} was erased meanwhile.")
    return only
