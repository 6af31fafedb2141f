"""The commands that add many sessions up: funnel, dropoff, report."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from turntrace import analytics
from turntrace.cli import lists, machine, shares
from turntrace.cli.choosing import Chosen, about_sessions
from turntrace.cli.columns import say_left_out
from turntrace.cli.links import langfuse_place
from turntrace.cli.render import count, duration, safe, stderr, stdout, working
from turntrace.cli.running import OK, CsvOption, JsonOption
from turntrace.errors import ConfigurationError
from turntrace.settings import read_settings

if TYPE_CHECKING:
    from turntrace.report import ReportServer


@about_sessions
def funnel(
    chosen: Chosen,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only the journey of this name.")] = None,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> int:
    """Show how far users come on journeys.

    How many reached each stage, which are those who entered it or a later one, and what share of all that is; how many
    entered it, how long half of them stayed at most, how often users went on from it to another stage,
    and how many were converted.
    """
    machine.check_one_form(as_json, as_csv)
    with working("Asking the ledger"):
        found = analytics.funnels(chosen.ledger, chosen.filters)
    if name is not None and name not in [each.name for each in found]:
        raise ConfigurationError(f"No journey {name!r} was begun in these sessions. {_journeys(chosen, found)}")
    wanted = [each for each in found if name in (None, each.name)]
    if as_json:
        machine.write_json([machine.plain(each, "rate") for each in wanted])
    elif as_csv:
        machine.write_csv(machine.STAGE_NAMES, machine.stage_rows(wanted))
    elif wanted:
        console, left_out = stdout(), dict[str, None]()
        for number, each in enumerate(wanted):
            if number:
                console.print()
            left_out |= dict.fromkeys(shares.funnel_chart(console, each))
        say_left_out(console, list(left_out))
    else:
        for line in ("No journey was begun in these sessions.", _journeys(chosen, found), *chosen.wrong()):
            stdout().print(Text(safe(line)), soft_wrap=True)
    return OK


def _journeys(chosen: Chosen, found: Sequence[analytics.Funnel]) -> str:
    """Return which journeys there are, or how one is begun."""
    if found:
        return f"Those that were: {', '.join(each.name for each in found)}."
    everywhere = [] if chosen.is_all else [each.name for each in analytics.funnels(chosen.ledger)]
    if everywhere:
        return f"Those on record: {', '.join(everywhere)}, in sessions that are not like that: {chosen.said}."
    return (
        "None is on record: the app begins one with "
        "turn.journey('onboarding', stages=['signup', 'done']).enter('signup')."
    )


@about_sessions
def dropoff(chosen: Chosen, as_json: JsonOption = False, as_csv: CsvOption = False) -> int:
    """Show where users drop off.

    That is after which turn, which intent, which action of the agent. A drop-off is a session that silence ended while
    something was open. Each rate is of the sessions that ended at the same point.
    """
    machine.check_one_form(as_json, as_csv)
    with working("Asking the ledger"):
        turns = analytics.dropoff_by_turn(chosen.ledger, chosen.filters)
        intents = analytics.dropoff_by_intent(chosen.ledger, chosen.filters)
        actions = analytics.dropoff_by_action(chosen.ledger, chosen.filters)
    if as_json:
        by = {"by_turn": turns, "by_intent": intents, "by_action": actions}
        machine.write_json({name: [machine.plain(each, "rate") for each in rows] for name, rows in by.items()})
    elif as_csv:
        rows = machine.dropoff_rows({"turn": turns, "intent": intents, "action": actions})
        machine.write_csv(machine.DROPOFF_NAMES, rows)
    elif turns:
        shares.dropoff_charts(stdout(), turns, intents, actions)
    else:
        _no_ended_sessions(chosen)
    return OK


def _no_ended_sessions(chosen: Chosen) -> None:
    lists.nothing(stdout(), chosen, "ended sessions")
    still_open = analytics.totals(chosen.ledger, chosen.filters).open
    if still_open:
        are = f"{count(still_open, 'session')} {'is' if still_open == 1 else 'are'} open"
        silence = duration(read_settings().idle_after * 1000)
        words = (
            f"{are}. Silence of {silence} ends a session: when its user comes back, or by turntrace sweep, which with "
            "--idle-after TIME ends those that were silent for less."
        )
        stdout().print(Text(words), soft_wrap=True)


@about_sessions
def report(
    chosen: Chosen,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the report into this HTML file.")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show it at an address of this machine only, until Ctrl-C.")
    ] = False,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Where to serve it; 0 takes a free port.")
    ] = 0,
) -> int:
    """Write or serve a report of sessions.

    It is one HTML file that needs no network.
    """
    if (output is None) is (not serve):
        raise ConfigurationError(
            "A report is either written or served: turntrace report -o report.html, or turntrace report --serve."
        )
    from turntrace.report import serve as serve_report
    from turntrace.report import write_report

    with working("Asking Langfuse for its project"):
        place = langfuse_place()
    if output is not None:
        with working("Making the report"):
            written = write_report(chosen.ledger, output, chosen.filters, langfuse=place)
        if not written.totals.sessions:
            lists.nothing(stderr(), chosen)
        stdout().print(Text(f"The report is in {safe(output)}"), soft_wrap=True)
        return OK
    try:
        serve_report(chosen.ledger, chosen.filters, port=port, on_ready=_say_where, langfuse=place)
    except KeyboardInterrupt:
        stderr().print()
    return OK


def _say_where(server: "ReportServer") -> None:
    stdout().print(Text(f"The report is at {safe(server.url)} until Ctrl-C."), soft_wrap=True)
    sys.stdout.flush()  # whoever reads it from a pipe waits for it
