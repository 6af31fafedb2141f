"""Checks of what turntrace needs: keys, a Langfuse that answers, the ledger, encodings and versions."""

import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Final, TypeVar

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from sqlalchemy import Connection, func, inspect, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, ProgrammingError

from turntrace.errors import DeliveryError, LedgerError, TurntraceError
from turntrace.export import LangfuseServer, Outcome
from turntrace.ledger.engine import Database
from turntrace.ledger.opening import file_of, is_memory
from turntrace.ledger.outbox import StoredOutbox
from turntrace.ledger.tables import SCHEMA_VERSION, meta, sessions
from turntrace.settings import LangfuseSettings, read_langfuse_settings, read_settings, unknown_variables
from turntrace.waiting import OutboxStatus

SKEW_NOTED_S: Final = 2.0
SKEW_WRONG_S: Final = 60.0
_SUPPORTED: Final = ("langfuse", "langgraph", "langchain-core")
_ENCODINGS: Final = ("o200k_base", "cl100k_base")
_ALL_KEYS: Final = "LANGFUSE_PUBLIC_KEY, LANGFUSE_SECRET_KEY and LANGFUSE_BASE_URL"
_WHERE_KEYS_ARE: Final = "Langfuse's Settings, API Keys, shows them"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Check:
    """What came of a check.

    Attributes:
        name: What was looked at.
        ok: True when it is as it should be, False when it is a problem, None for a note.
        found: What was found.
        todo: What to do; empty when there is nothing to do.
    """

    name: str
    ok: bool | None
    found: str
    todo: str = ""


def run_checks(ledger_url: str | None = None, *, version_of: Callable[[str], str] | None = None) -> Iterator[Check]:
    """Give the checks one by one, as they are done. Nothing is written, here or on the server.

    Args:
        ledger_url: The ledger. Default: ``TURNTRACE_LEDGER_URL``, else the one in the user's data folder.
        version_of: Returns the version of an installed package, as `importlib.metadata.version`.
    """
    yield from _langfuse()
    yield from _variables()
    yield from _ledger(ledger_url)
    yield _encodings()
    yield from _versions(version_of or metadata.version)


# --- Langfuse ---------------------------------------------------------------------------------------------------------
def _langfuse() -> Iterator[Check]:
    try:
        settings = read_langfuse_settings()
    except TurntraceError as error:
        yield Check("keys", False, str(error), "Set that variable to a value that can be used, or unset it.")
        return
    checks = [_keys(settings), *_tracing(settings)]
    yield from checks
    if checks[0].ok is None:
        yield Check("server", None, "not asked, since there are no keys to ask with")
    elif checks[0].ok:
        server = LangfuseServer(settings)
        try:
            for check in _server(server, settings):
                yield replace(
                    check,
                    found=_without_secrets(check.found, settings),
                    todo=_without_secrets(check.todo, settings),
                )
        finally:
            server.close()


def _variables() -> Iterator[Check]:
    """Name the variables that nothing reads: a typo in one leaves the default as it is, without a word."""
    unknown = unknown_variables()
    if unknown:
        found = f"nothing reads {', '.join(name for name, _ in unknown)}"
        meant = [f"{name} as {alike}" for name, alike in unknown if alike is not None]
        known = "the README lists those that are read, under Settings"
        todo = f"Unset them, or set {', '.join(meant)}." if meant else f"Unset them; {known}."
        yield Check("variables", None, found, todo)


def _keys(settings: LangfuseSettings) -> Check:
    secret = "" if settings.secret_key is None else settings.secret_key.get_secret_value()
    given = {"LANGFUSE_PUBLIC_KEY": settings.public_key or "", "LANGFUSE_SECRET_KEY": secret}
    missing = [name for name, value in given.items() if not value]
    if len(missing) == 2:
        found = "LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY are not set: spans wait in the ledger"
        return Check("keys", None, found, f"To send them, set {_ALL_KEYS}, then: turntrace export")
    if missing:
        [there] = given.keys() - set(missing)
        found = f"{there} is set and {missing[0]} is not: spans wait in the ledger"
        return Check("keys", False, found, f"Set {missing[0]} ({_WHERE_KEYS_ARE}), then: turntrace export")
    for name, value in given.items():
        if value != value.strip() or not (value.isascii() and value.isprintable()):
            found = f"{name} has a blank, a line break or a letter that is not ASCII in it"
            return Check("keys", False, found, f"Set {name} to the key as it is, without anything around it.")
    if given["LANGFUSE_PUBLIC_KEY"].startswith("sk-") or secret.startswith("pk-"):
        found = "LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY are swapped"
        return Check("keys", False, found, "Set LANGFUSE_PUBLIC_KEY to the key pk-..., LANGFUSE_SECRET_KEY to sk-...")
    address = next((n for n in ("base_url", "host") if getattr(settings, n)), None)
    where = "LANGFUSE_BASE_URL is not set, so they are of" if address is None else f"LANGFUSE_{address.upper()} is"
    found = f"LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY are set; {where} {settings.server}"
    return Check("keys", True, _without_secrets(found, settings))


def _tracing(settings: LangfuseSettings) -> Iterator[Check]:
    if not settings.tracing_enabled:
        found = "LANGFUSE_TRACING_ENABLED is false: no spans and no scores are made, the ledger alone is written"
        yield Check("tracing", None, found, "To have them, unset LANGFUSE_TRACING_ENABLED, or set it to true.")
    elif settings.sample_rate < 1:
        found = f"LANGFUSE_SAMPLE_RATE is {settings.sample_rate:g}: spans of that share of the turns are made"
        yield Check("tracing", None, found, "For those of all turns, unset LANGFUSE_SAMPLE_RATE.")


def _server(server: LangfuseServer, settings: LangfuseSettings) -> Iterator[Check]:
    try:
        version, skew_s = asked(server.health)
    except DeliveryError as error:
        todo = f"Set LANGFUSE_BASE_URL to the address of Langfuse, as {settings.server.split('//')[0]}//localhost:3000"
        yield Check("server", False, str(error), todo + ", and see that it runs and can be reached from here.")
        return
    yield Check("server", True, f"Langfuse {version} answers at {settings.server}")
    yield _clock(skew_s)
    try:
        project = asked(server.project)
    except DeliveryError as error:
        yield Check("project", False, str(error), _how_to_get_in(str(error), settings))
        return
    yield Check("project", True, f"the keys open the project {project}")
    yield _score_form(server)


def _how_to_get_in(words: str, settings: LangfuseSettings) -> str:
    if re.search(r" with 40[13]: ", words):
        return (
            f"Set LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY to the keys of a project of {settings.server} "
            f"({_WHERE_KEYS_ARE}), or LANGFUSE_BASE_URL to the server that the keys are of."
        )
    return "See whether the server is well, and that LANGFUSE_BASE_URL is the address of a Langfuse."


def _clock(skew_s: float) -> Check:
    side = "ahead of" if skew_s > 0 else "behind"
    found = f"the server's is {abs(skew_s):,.0f} s {side} this machine's"
    if abs(skew_s) <= SKEW_NOTED_S:
        return Check("clock", True, f"within {SKEW_NOTED_S:g} s of the server's")
    todo = "Spans carry the times of this machine. Set its clock, as by: timedatectl set-ntp true"
    return Check("clock", False if abs(skew_s) > SKEW_WRONG_S else None, found, todo)


def _score_form(server: LangfuseServer) -> Check:
    """Find out by an array without any scores, of which nothing is written."""
    answer = server.post_scores(b"[]")
    if answer.outcome in (Outcome.ACCEPTED, Outcome.REFUSED):
        one_by_one = "received array" in answer.words.lower()
        form = "one in a request: it refuses arrays, so turntrace sends objects" if one_by_one else "many in a request"
        return Check("scores", True, form)
    todo = "turntrace finds out which form it takes when it sends; see whether the server is well."
    return Check("scores", None, f"it is not known how the server takes them: {answer.words}", todo)


def asked(question: Callable[[], T]) -> T:
    """Ask a server, and name it when the answer has another form than a Langfuse's.

    Raises:
        DeliveryError: If it cannot be asked.
    """
    try:
        return question()
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, TurntraceError):
            raise
        words = f"The server does not answer as a Langfuse ({type(error).__name__}). Check LANGFUSE_BASE_URL."
        raise DeliveryError(words) from error


def _without_secrets(text: str, settings: LangfuseSettings) -> str:
    """Take out the secret key, and what may stand before the host of a URL."""
    if settings.secret_key is not None and settings.secret_key.get_secret_value():
        text = text.replace(settings.secret_key.get_secret_value(), "***")
    return re.sub(r"//[^/\s@]+@", "//***@", text)


# --- the ledger -------------------------------------------------------------------------------------------------------
def _ledger(ledger_url: str | None) -> Iterator[Check]:
    try:
        chosen = ledger_url or read_settings().ledger
        missing = _missing(chosen)
        if missing is not None:
            yield missing
            return
        database = Database(chosen)
    except TurntraceError as error:
        yield Check("ledger", False, str(error), "Name another: --ledger URL, or TURNTRACE_LEDGER_URL.")
        return
    where = database.engine.url.render_as_string(hide_password=True)
    try:
        with database.reading() as connection:
            found = _read_ledger(connection)
        yield replace(found, found=f"{where}: {found.found}")
        if found.ok:
            yield from _writable(database)
            yield _outbox(StoredOutbox(database).status())
    except (LedgerError, ProgrammingError) as error:
        why = str(error).splitlines()[0]
        yield Check("ledger", False, why, "Or name another: --ledger URL.")
    finally:
        database.close()


def _writable(database: Database) -> Iterator[Check]:
    """Say so where the ledger can be read and not be written: then nothing is tracked in it."""
    try:
        with database.writing():
            pass  # nothing is written: that it may begin says enough
    except LedgerError as error:
        advice = "Run the doctor as the user that your app runs as; if it says this then, let that user write there."
        yield Check("ledger", False, str(error).splitlines()[0], advice)


def _missing(url: str) -> Check | None:
    """Say that there is none, where opening it would make one."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return None
    if parsed.get_backend_name() != "sqlite":
        return None
    if is_memory(parsed):
        return Check("ledger", None, "it is in memory, and gone with the process", "Set TURNTRACE_LEDGER_URL.")
    file = file_of(parsed)
    if file is None or file.exists():
        return None
    todo = "It is made when something is tracked; turntrace demo does that. --ledger URL names another."
    return Check("ledger", None, f"there is none at {file} yet", todo)


def _read_ledger(connection: Connection) -> Check:
    if not inspect(connection).has_table(meta.name):
        return Check("ledger", None, "a database without a ledger in it yet", "It is made when something is tracked.")
    noted = connection.execute(select(meta.c.value).where(meta.c.key == "schema_version")).scalar_one_or_none() or "?"
    version = int(noted) if noted.isdecimal() else None
    if version is None or version > SCHEMA_VERSION:
        todo = "Upgrade turntrace (pip install -U turntrace), or name another ledger: --ledger URL."
        return Check("ledger", False, f"schema version {noted}; this turntrace knows 1 to {SCHEMA_VERSION}", todo)
    if version < SCHEMA_VERSION:
        todo = f"It is brought to version {SCHEMA_VERSION} when it is used next, as by: turntrace sessions"
        return Check("ledger", None, f"schema version {version}, of an older turntrace", todo)
    count = connection.execute(select(func.count()).select_from(sessions)).scalar_one()
    return Check("ledger", True, f"schema version {version}, {count:,} session" + ("" if count == 1 else "s"))


def _outbox(status: OutboxStatus) -> Check:
    apart = sum(items for _, items in status.refused)
    parts = [] if status.is_empty else [f"{status.spans.items:,} spans and {status.scores.items:,} scores wait"]
    parts += [f"{apart:,} were set apart, since Langfuse refused them"] if apart else []
    parts += [f"{status.dropped:,} were dropped, since more waited than outbox_max_mb allows"] if status.dropped else []
    if not parts:
        return Check("outbox", True, "nothing waits to be sent")
    todo = "turntrace export --status says what and why; turntrace export sends what waits."
    return Check("outbox", False if apart else None, ", ".join(parts), todo)


# --- what is installed ------------------------------------------------------------------------------------------------
def _encodings() -> Check:
    from turntrace.context.encodings import count_text, encoding

    try:
        for name in _ENCODINGS:
            count_text("Hello", encoding(name))
    except TurntraceError as error:
        return Check("encodings", False, str(error), "pip install --force-reinstall turntrace")
    return Check("encodings", True, f"{' and '.join(_ENCODINGS)} came with turntrace: nothing is downloaded")


def _versions(version_of: Callable[[str], str]) -> Iterator[Check]:
    needed = {each.name: each for each in map(Requirement, metadata.requires("turntrace") or []) if each.marker is None}
    for name in _SUPPORTED:
        supported = needed[name].specifier
        allowed = ",".join(sorted(map(str, supported), reverse=True))
        todo = f'pip install "{name}{allowed}"'
        try:
            found = version_of(name)
        except metadata.PackageNotFoundError:
            yield Check(name, False, "it is not installed", todo)
            continue
        yield _version(name, found, supported, allowed, todo)
    about: Any = metadata.metadata("turntrace")
    allowed = about["Requires-Python"] or ""
    todo = f"Run turntrace with a Python {allowed}."
    yield _version("python", platform.python_version(), SpecifierSet(allowed), allowed, todo)


def _version(name: str, found: str, supported: SpecifierSet, allowed: str, todo: str) -> Check:
    if supported.contains(found, prereleases=True):
        return Check(name, True, f"{found} (supported: {allowed})")
    return Check(name, False, f"{found} is not supported: {allowed} is", todo)
