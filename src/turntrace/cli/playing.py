"""The commands that make sessions: demo, replay."""

import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.text import Text

from turntrace.cli.lists import sessions_table
from turntrace.cli.render import SHORT_ID, safe, stdout, working
from turntrace.cli.running import NOT_WELL, OK, LedgerOption
from turntrace.cli.tree import session_tree

_NAME: Final = "turntrace"


def demo(ledger: LedgerOption = None) -> int:
    """Run a small support desk and show what was tracked.

    Three users have five sessions with an agent that has tools, in a few seconds: a person approves a refund, a window
    is pruned, a user leaves. It needs no key, no server and no network; with Langfuse's keys set, the spans go there.
    """
    from turntrace.demo import support_desk
    from turntrace.lifecycle import SessionTracker

    console = stdout()
    with SessionTracker(ledger) as tracker:
        with working("A support desk serves three users"):
            session_ids = support_desk.run(tracker)
        shown = session_ids[support_desk.SHOWN]
        summary = tracker.session_summary(shown)
        assert summary is not None
        kept = tracker.ledger
        session_tree(console, summary, kept.turns(shown), kept.stages(shown), kept.feedback(shown))
        console.print()
        sessions_table(console, kept.sessions(ids=session_ids))
        console.print(Text(f"\nThe ledger: {safe(kept.url)}"), soft_wrap=True)
        called, of_it = called_by(), "" if ledger is None or "***" in kept.url else f" --ledger {shlex.quote(kept.url)}"
        again = f"show {shown[:SHORT_ID]}"
        for what, command in (
            ("Look again:", "sessions"),
            ("A person approved:", again),
            ("The window, pruned:", f"{again} --context"),
            ("The journey:", f"funnel {support_desk.JOURNEY}"),
            ("Who dropped off:", "dropoff"),
            ("As a page:", "report --serve"),
        ):
            console.print(Text(f"{what:<20}{safe(f'{called} {command}{of_it}')}"), soft_wrap=True)
        if tracker.target.to_outbox:
            hint = (
                "To see it in Langfuse, set LANGFUSE_PUBLIC_KEY, LANGFUSE_SECRET_KEY and LANGFUSE_BASE_URL, then: "
                f"{called} export{of_it}"
            )
        else:
            hint = "The spans go to Langfuse, whose keys are set: open its Sessions page."
        console.print(Text(hint))
    return OK


def called_by() -> str:
    """Return how this program is called from here: by its name where that is on the PATH, else by where it is."""
    if shutil.which(_NAME):
        return _NAME
    for place in (Path(sys.argv[0]), Path(sys.executable).with_name(_NAME)):
        if place.name == _NAME and place.exists():
            found = place.absolute()
            return shlex.quote(str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found))
    return f"{shlex.quote(sys.executable)} -m turntrace.cli.main"


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
    and what was stopped goes on where it stood. A line is {"conversation_id", "user_id", "model", "messages"}, the
    messages in OpenAI's form; "topic" and "outcome": {"success": true} may be beside them.
    Exit code 1 when a line could not be played.
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
            with _ctrl_c(playing.interrupt):
                totals = playing.run(read_lines(sources))
        replay_totals(stdout(), totals, ledger_url=player.tracker.ledger.url)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on from here") from None
    finally:
        player.close()
    return NOT_WELL if totals.malformed else OK


@contextmanager
def _ctrl_c(interrupt: Callable[[], None]) -> Iterator[None]:
    """Have the first Ctrl-C in a block call a function, and the second do what it always does: raise where it comes."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        interrupt()

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
