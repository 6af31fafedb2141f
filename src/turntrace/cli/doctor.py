"""``turntrace doctor``: says whether all is well, and with ``--verify`` whether Langfuse has what the ledger has."""

from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from turntrace.cli.lookup import find_session, open_existing
from turntrace.cli.render import safe, stdout, working
from turntrace.errors import ConfigurationError, DeliveryError
from turntrace.settings import read_langfuse_settings

if TYPE_CHECKING:
    from turntrace.doctor import Check, Comparison

ALL_WELL: Final = 0
SOMETHING_WRONG: Final = 1
_MARKS: Final = {True: ("ok", "green"), None: ("note", "yellow"), False: ("problem", "bold red")}
_NAME_WIDTH: Final = 15


def doctor(ledger_url: str | None, verify: str | None) -> int:
    """Check what turntrace needs, or compare a session with what Langfuse has of it; return the exit code.

    Args:
        ledger_url: The ledger. Default: ``TURNTRACE_LEDGER_URL``, else the one in the user's data folder.
        verify: Id of the session to compare, or its beginning; None to check what turntrace needs.

    Returns:
        0 when all is well, 1 when something is not.

    Raises:
        TurntraceError: If the session is not known, or Langfuse cannot be asked for it.
    """
    return _check(stdout(), ledger_url) if verify is None else _verify(stdout(), ledger_url, verify)


def _check(console: Console, ledger_url: str | None) -> int:
    from turntrace.doctor import run_checks

    problems = notes = 0
    for check in run_checks(ledger_url):
        _show_check(console, check)
        problems += check.ok is False
        notes += check.ok is None
    if problems:
        console.print(Text(f"\n{_count(problems, 'problem')}, {_count(notes, 'note')}.", style="bold red"))
        return SOMETHING_WRONG
    console.print(Text("\nAll is well" + (f", with {_count(notes, 'note')}." if notes else ".")))
    return ALL_WELL


def _show_check(console: Console, check: "Check") -> None:
    mark, style = _MARKS[check.ok]
    line = Text.assemble((mark.ljust(9), style), (check.name.ljust(_NAME_WIDTH), "bold"), safe(check.found))
    console.print(line, soft_wrap=True)
    if check.ok is not True and check.todo:
        console.print(Text(" " * 9 + f"what to do: {safe(check.todo)}"), soft_wrap=True)


def _verify(console: Console, ledger_url: str | None, session_id: str) -> int:
    from turntrace.doctor import read_turns, verify, waiting_of
    from turntrace.doctor.checks import asked
    from turntrace.export import LangfuseServer

    settings = read_langfuse_settings()
    if not settings.has_keys:
        raise ConfigurationError(
            "There is no Langfuse to ask: set LANGFUSE_PUBLIC_KEY, LANGFUSE_SECRET_KEY and LANGFUSE_BASE_URL "
            "(turntrace doctor says what is set)."
        )
    ledger = open_existing(ledger_url)
    server = LangfuseServer(settings)
    try:
        found = find_session(ledger, session_id).id
        with working("Asking Langfuse"):
            waiting = waiting_of(ledger, found, read_turns(ledger, found))
            observations = asked(lambda: list(server.observations(found)))
            session, turns, feedback = find_session(ledger, found), read_turns(ledger, found), ledger.feedback(found)
            rated = {given.turn_id for given in feedback}
            traces = [turn.summary.trace_id for turn in turns if turn.summary.id in rated]
            if "," in found:
                raise DeliveryError(
                    f"Langfuse cannot be asked for the scores of the session {found!r}: it takes an id with a comma "
                    "for several ids. Its spans and scores were sent as any others: look at its page in Langfuse."
                )
            scores = asked(lambda: list(server.scores(session_id=found)))
            scores += asked(lambda: [score for trace_id in traces for score in server.scores(trace_id=trace_id)])
            compared = asked(lambda: verify(session, turns, observations, scores, feedback))
    finally:
        server.close()
        ledger.close()
    console.print(Text.assemble(("session ", "bold"), (safe(found), "bold"), "\n"), soft_wrap=True)
    console.print(_table(compared))
    return _say(console, compared, waiting, is_open=session.ended_ns is None)


def _table(compared: "list[Comparison]") -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("what")
    table.add_column("ledger", justify="right")
    table.add_column("Langfuse", justify="right")
    table.add_column("ok")
    for each in compared:
        mark = Text("ok", style="green") if each.ok else Text("differs", style="bold red")
        table.add_row(Text(safe(each.what)), Text(safe(each.ledger)), Text(safe(each.langfuse)), mark)
    return table


def _say(console: Console, compared: "list[Comparison]", waiting: tuple[int, int], *, is_open: bool) -> int:
    console.print()
    for difference in (words for each in compared for words in each.differences):
        console.print(Text(f"- {safe(difference)}"), soft_wrap=True)
    for count, what in zip(waiting, ("span", "score"), strict=True):
        if count:
            verb = "waits" if count == 1 else "wait"
            words = f"{_count(count, what)} of it still {verb} in the outbox: turntrace export"
            console.print(Text(words), soft_wrap=True)
    if is_open:
        console.print(Text("The session is open: the scores of its totals are sent when it ends."))
    if all(each.ok for each in compared):
        console.print(Text("The ledger and Langfuse agree."))
        return ALL_WELL
    if not any(waiting):
        hint = "Langfuse shows what it was sent after a second or two; turntrace export --status says what it refused."
        console.print(Text(hint), soft_wrap=True)
    return SOMETHING_WRONG


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
