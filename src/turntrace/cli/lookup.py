"""Finding what a command names: ledgers, sessions, users."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from sqlalchemy import func, or_, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from turntrace.analytics import users_that_begin
from turntrace.errors import IdentityError, LedgerError
from turntrace.identity import hash_user, safe_id
from turntrace.ledger import Ledger
from turntrace.ledger.opening import file_of
from turntrace.ledger.tables import open_turns, turns
from turntrace.settings import read_settings
from turntrace.summaries import SessionSummary

_ALL: Final = 2**62
_SUGGESTED: Final = 50


def open_existing(url: str | None) -> Ledger:
    """Open a ledger to read from it, without making one where there is none, or needing the right to write.

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
    file = file_of(parsed)
    if file is not None and not file.exists():
        raise LedgerError(f"There is no ledger at {file} yet. turntrace demo makes one; --ledger URL names another.")
    return Ledger(chosen, only_reads=True)


@dataclass(frozen=True, slots=True)
class Named:
    """What an id names.

    Attributes:
        session_ids: Ids of its sessions, the earliest first; there is at least one.
        conversation_id: The conversation that it names; None for one that names something else.
        turn_id: The turn that it names, by the turn's id or that of its trace.
        only: The turns that are wanted alone; none for all.
    """

    session_ids: Sequence[str]
    conversation_id: str | None = None
    turn_id: str | None = None
    only: Sequence[str] = ()


def find_session(ledger: Ledger, session_id: str) -> SessionSummary:
    """Find a session by its id, or by the beginning of it.

    Raises:
        IdentityError: If there is none, or more than one.
    """
    found = ledger.session(_kept(session_id))
    if found is not None:
        return found
    matches = _that_begin(ledger, session_id)
    if not matches:
        nothing = f"No session has an id that begins with {session_id!r}"
        raise IdentityError(f"{nothing}. turntrace sessions lists the sessions.")
    return session_of(ledger, _only(matches, session_id))


def find_named(ledger: Ledger, given: str) -> Named:
    """Find what an id names: a session, a conversation, a turn or a trace.

    Or the one session that begins so; where none does, the one turn or trace.

    Raises:
        IdentityError: If there is none, or several begin so.
    """
    kept = _kept(given)
    found = ledger.session(kept)
    if found is not None:
        return Named([found.id])
    named = _turn(ledger, kept) or _conversation(ledger, kept)
    if named is None and not (matches := _that_begin(ledger, given)):
        named = _turn_that_begins(ledger, given)
    return named or Named([_only(matches, given)])


def numbered(ledger: Ledger, named: Named, number: int) -> Named:
    """Narrow what was named to its turns of a number: one of a conversation, one of each in a session.

    Raises:
        IdentityError: If there is none.
    """
    wanted: dict[str, str] = {}
    numbers: set[int] = set()
    with ledger.asking() as connection:
        for table in (turns, open_turns):
            of_it = table.c.session_id == named.session_ids[0]
            if named.conversation_id is not None:
                of_it = table.c.conversation_id == named.conversation_id
            for row in connection.execute(select(table.c.id, table.c.session_id, table.c.number).where(of_it)):
                numbers.add(row.number)
                if row.number == number:
                    wanted[row.id] = row.session_id
    if wanted:
        return Named(list(dict.fromkeys(wanted.values())), named.conversation_id, only=list(wanted))
    of = f"session {named.session_ids[0]!r}"
    if named.conversation_id is not None:
        of = f"conversation {named.conversation_id!r}"
    if not numbers:
        raise IdentityError(f"The {of} has no turns yet.")
    first, last = min(numbers), max(numbers)
    raise IdentityError(f"The {of} has no turn {number}. It has turns from {first} to {last}: --turn {last}.")


def session_of(ledger: Ledger, session_id: str) -> SessionSummary:
    """Return a session that was there.

    Raises:
        IdentityError: If it is there no more.
    """
    found = ledger.session(session_id)
    if found is None:
        raise IdentityError(f"The session {session_id!r} was erased meanwhile.")
    return found


def _kept(given: str) -> str:
    """Return what stands in the ledger for an id that a run was given."""
    return safe_id(given) if given else given


def _turn(ledger: Ledger, given: str) -> Named | None:
    with ledger.asking() as connection:
        for table in (turns, open_turns):
            for column in (table.c.id, table.c.trace_id):
                query = select(table.c.session_id, table.c.id).where(column == given).limit(1)
                if (row := connection.execute(query).first()) is not None:
                    return Named([row.session_id], turn_id=row.id)
    return None


def _conversation(ledger: Ledger, given: str) -> Named | None:
    began: dict[str, int] = {}
    with ledger.asking() as connection:
        for table in (turns, open_turns):
            first = select(table.c.session_id, func.min(table.c.started_ns).label("began"))
            query = first.where(table.c.conversation_id == given).group_by(table.c.session_id)
            for row in connection.execute(query):
                began[row.session_id] = min(row.began, began.get(row.session_id, row.began))
    return Named(sorted(began, key=lambda session_id: began[session_id]), conversation_id=given) if began else None


def _turn_that_begins(ledger: Ledger, begins: str) -> Named:
    """Find the one turn that begins so, or whose trace does.

    Raises:
        IdentityError: If there is none, or more than one.
    """
    found: dict[str, str] = {}
    with ledger.asking() as connection:
        for table in (turns, open_turns):
            begin = [column.startswith(_kept(begins), autoescape=True) for column in (table.c.id, table.c.trace_id)]
            query = select(table.c.id, table.c.session_id).where(or_(*begin)).limit(2)
            found |= {row.id: row.session_id for row in connection.execute(query)}
    if not found:
        nothing = f"No session, turn or trace has an id that begins with {begins!r}, and no conversation has that id"
        raise IdentityError(f"{nothing}. turntrace sessions lists the sessions.")
    if len(found) > 1:
        raise IdentityError(f"Several turns have ids or traces that begin with {begins!r}: type more of it.")
    [(turn_id, session_id)] = found.items()
    return Named([session_id], turn_id=turn_id)


def _that_begin(ledger: Ledger, begins: str) -> list[str]:
    return [session.id for session in ledger.sessions(limit=_ALL, id_begins=_kept(begins))]


def _only(matches: Sequence[str], begins: str) -> str:
    if len(matches) > 1:
        raise IdentityError(f"{len(matches):,} sessions have ids that begin with {begins!r}: type more of it.")
    return matches[0]


def find_user(ledger: Ledger, begins: str) -> str:
    """Find a user by the hash of the id, or by the beginning of it; return the hash.

    Raises:
        IdentityError: If there is none, or more than one.
    """
    found = users_that_begin(ledger, begins)
    if begins in found:
        return begins
    if not found:
        raise IdentityError(
            f"No user has a hash that begins with {begins!r}. turntrace users lists them; --user-id takes the id as "
            "your app has it."
        )
    if len(found) > 1:
        raise IdentityError(f"Several users have hashes that begin with {begins!r}: type more of it.")
    return found[0]


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
