"""The commands that look after the ledger: sweep, forget, export, doctor."""

from contextlib import closing
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.text import Text

from turntrace.cli.lookup import open_existing
from turntrace.cli.render import count, stdout, working
from turntrace.cli.running import OK, LedgerOption
from turntrace.errors import ConfigurationError


def sweep(
    idle_after: Annotated[
        str | None,
        typer.Option(
            "--idle-after",
            metavar="TIME",
            help="Silence after which a session has ended: seconds, or 30m, 2h; it holds for every session of the "
            "ledger, also those of other apps. Default: TURNTRACE_IDLE_AFTER, else 1800.",
        ),
    ] = None,
    ledger: LedgerOption = None,
) -> int:
    """End the sessions that have been silent too long, as for cron.

    Turns whose process died are closed as abandoned. Each is ended once, however many sweep at the same time.
    """
    from turntrace.analytics.times import seconds_of
    from turntrace.lifecycle import SessionTracker

    silence_s = None if idle_after is None else seconds_of(idle_after, "--idle-after")
    open_existing(ledger).close()  # a ledger that is not there is not to be made
    with SessionTracker(ledger) as tracker, working("Sweeping"):
        swept = tracker.sweep(idle_after=silence_s)
    closed = f"closed {count(swept.turns, 'turn')} as abandoned"
    stdout().print(Text(f"Ended {count(swept.sessions, 'session')}, {closed}."), soft_wrap=True)
    return OK


def forget(
    before: Annotated[
        str | None,
        typer.Option("--before", metavar="WHEN", help="Sessions that ended before it: a day, a time, or 90d."),
    ] = None,
    user_id: Annotated[
        str | None, typer.Option("--user-id", metavar="ID", help="A user, by the id that your app has.")
    ] = None,
    ledger: LedgerOption = None,
) -> int:
    """Erase old sessions from the ledger, or all of a user.

    The former is for cron, as the ledger keeps what it has. What Langfuse was sent is still there afterwards; of a user
    it is said what that is.
    """
    from turntrace.analytics.times import day_of
    from turntrace.lifecycle import SessionTracker

    if (before is None) == (user_id is None):
        raise ConfigurationError("forget takes --before WHEN or --user-id ID: turntrace forget --before 90d.")
    open_existing(ledger).close()
    with SessionTracker(ledger) as tracker, working("Erasing"):
        if user_id is not None:
            said = str(tracker.forget_user(user_id))
        else:
            at = datetime.fromtimestamp(day_of(str(before), "--before") / 1e9, UTC)
            said = f"Erased {count(tracker.forget_before(at), 'session')} that ended before {at:%Y-%m-%d %H:%M:%S} UTC."
    stdout().print(Text(said), soft_wrap=True)
    return OK


def export(
    watch: Annotated[bool, typer.Option("--watch", help="Go on, and send what comes, until Ctrl-C.")] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Send nothing: show what waits, what was set apart and why.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Try what was set apart once more.")] = False,
    ledger: LedgerOption = None,
) -> int:
    """Send what waits in the outbox to Langfuse.

    Its server and keys are LANGFUSE_BASE_URL, LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY. Exit codes: 0 when nothing
    waits any more, 1 when something does.
    """
    from turntrace.cli import sending

    with closing(open_existing(ledger)) as opened:
        if status:
            sending.show_status(stdout(), opened.to_send.status(), ledger_url=opened.url)
            return OK
        return sending.send(opened, watch=watch, again=again)


def doctor(
    verify: Annotated[
        str | None,
        typer.Option("--verify", metavar="SESSION", help="Compare a session in the ledger with what Langfuse has."),
    ] = None,
    ledger: LedgerOption = None,
) -> int:
    """Look whether all is well, and say what to do.

    At keys, server, clock, ledger, encodings and versions, or with --verify at one session in Langfuse. Exit codes: 1
    when something is to be put right, or what was tracked has not arrived.
    """
    from turntrace.cli import doctor

    return doctor.doctor(ledger, verify)
