"""The commands of ``turntrace``."""

from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from turntrace.cli import render, window
from turntrace.cli.lookup import find_session, open_existing
from turntrace.errors import TurntraceError

OK: Final = 0
SOME_LINES_FAILED: Final = 1
CANNOT: Final = 2
INTERRUPTED: Final = 130
"""The exit codes: 130 is what a shell says of a program that Ctrl-C ended."""

app = typer.Typer(
    name="turntrace",
    help="Session, conversation and turn tracking for LangGraph agents in Langfuse.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

LedgerOption = Annotated[
    str | None,
    typer.Option(
        "--ledger",
        metavar="URL",
        help="The ledger, as sqlite:///path/to/file.db. Default: TURNTRACE_LEDGER_URL, else one in your data folder.",
    ),
]


def main() -> None:
    """Run the command that the command line names."""
    app()


def _command(function: Callable[..., int]) -> Callable[..., None]:
    """Make a command of a function that returns an exit code: what goes wrong becomes one line, never a traceback."""

    @wraps(function)
    def command(**arguments: Any) -> None:
        try:
            code = function(**arguments)
        except TurntraceError as error:
            render.error(str(error))
            code = CANNOT
        except KeyboardInterrupt as stop:
            render.error(str(stop) or "stopped")
            code = INTERRUPTED
        raise typer.Exit(code)

    app.command()(command)
    return command


def _version(wanted: bool) -> None:
    if wanted:
        print(f"turntrace {version('turntrace')}")
        raise typer.Exit(OK)


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@_command
def demo(ledger: LedgerOption = None) -> int:
    """Run a small support desk and show what was tracked.

    Three users have five sessions with an agent that has tools, in a few seconds. It needs no key, no server and no
    network; with Langfuse's keys set, the spans go there.
    """
    from turntrace.demo import support_desk
    from turntrace.lifecycle import SessionTracker

    console = Console()
    with SessionTracker(ledger) as tracker:
        with render.working("A support desk serves three users"):
            session_ids = support_desk.run(tracker)
        shown = session_ids[support_desk.SHOWN]
        summary = tracker.session_summary(shown)
        assert summary is not None
        render.session_tree(console, summary, tracker.ledger.turns(shown))
        console.print()
        render.sessions_table(console, tracker.ledger.sessions(ids=session_ids))
        render.next_steps(console, ledger_url=tracker.ledger.url, waits=tracker.target.to_outbox, session_id=shown)
    return OK


@_command
def replay(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Files with one recorded conversation a line, as JSON; folders (all *.jsonl in them); - for stdin.",
        ),
    ],
    is_async: Annotated[bool, typer.Option("--async", help="Play in an event loop, with ainvoke.")] = False,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "-n", min=1, max=1000, help="Conversations played at a time.")
    ] = 1,
    context_limit: Annotated[
        int | None,
        typer.Option(
            "--context-limit",
            metavar="TOKENS",
            min=1,
            help="Fit what the model is given into so many tokens; by default it is given the whole history.",
        ),
    ] = None,
    ledger: LedgerOption = None,
) -> int:
    """Play recorded conversations through a LangGraph graph.

    Each becomes a session with a turn for each message of its user. What is in the ledger already is not played again,
    and what was stopped goes on where it stood. Exit codes: 1 when a line could not be played, 2 when nothing could.
    """
    from turntrace.cli.progress import ReplayProgress, replay_totals
    from turntrace.demo.player import Player
    from turntrace.demo.replay import Replay
    from turntrace.demo.transcripts import find_sources, read_lines

    sources = find_sources(files)
    player = Player(ledger, context_limit=context_limit)
    try:
        with ReplayProgress(sources) as progress:
            playing = Replay(
                player,
                concurrency=concurrency,
                is_async=is_async,
                on_line=progress.line_done,
                on_problem=progress.problem,
            )
            totals = playing.run(read_lines(sources))
        replay_totals(Console(), totals, ledger_url=player.tracker.ledger.url)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from here") from None
    finally:
        player.close()
    return SOME_LINES_FAILED if totals.malformed else OK


@_command
def sessions(
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many to show at most.")] = 20,
    ledger: LedgerOption = None,
) -> int:
    """Show the latest sessions."""
    opened = open_existing(ledger)
    render.sessions_table(Console(), opened.sessions(limit=limit))
    return OK


@_command
def show(
    session_id: Annotated[str, typer.Argument(metavar="ID", help="Id of a session, or as much of it as is unique.")],
    context: Annotated[
        bool, typer.Option("--context", help="Draw how full the model's window was, turn by turn, prunings marked.")
    ] = False,
    ledger: LedgerOption = None,
) -> int:
    """Show a session as a tree.

    Its turns, and what the agent did in each: runs of the graph, nodes, calls of models and tools.
    """
    opened = open_existing(ledger)
    summary = find_session(opened, session_id)
    if context:
        turns = [turn for turn, _ in opened.turns(summary.id)]
        window.context_chart(Console(), summary, turns, opened.decisions(summary.id))
        return OK
    render.session_tree(Console(), summary, opened.turns(summary.id))
    return OK


@_command
def sweep(
    idle_after: Annotated[
        float | None,
        typer.Option("--idle-after", metavar="SECONDS", help="Silence after which a session has ended. Default: 1800."),
    ] = None,
    ledger: LedgerOption = None,
) -> int:
    """End the sessions that have been silent too long, as for cron.

    Turns whose process died are closed as abandoned. Each is ended once, however many sweep at the same time.
    """
    from turntrace.lifecycle import SessionTracker

    open_existing(ledger).close()  # a ledger that is not there is not to be made
    with SessionTracker(ledger) as tracker, render.working("Sweeping"):
        swept = tracker.sweep(idle_after=idle_after)
    Console().print(render.swept_line(swept.sessions, swept.turns))
    return OK


@_command
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

    opened = open_existing(ledger)
    if status:
        sending.show_status(Console(), opened.to_send.status(), ledger_url=opened.url)
        return OK
    return sending.send(opened, watch=watch, again=again)


@_command
def doctor(
    verify: Annotated[
        str | None,
        typer.Option("--verify", metavar="SESSION", help="Compare a session in the ledger with what Langfuse has."),
    ] = None,
    ledger: LedgerOption = None,
) -> int:
    """Look at keys, server, clock, ledger, encodings and versions, and say what to do.

    Exit codes: 1 when something is to be put right, or what was tracked has not arrived.
    """
    from turntrace.cli import doctor

    return doctor.doctor(ledger, verify)


if __name__ == "__main__":
    main()
