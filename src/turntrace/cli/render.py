"""What the commands show in a terminal. All text from outside is shown as text: no markup, no control characters."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Final

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from turntrace.records import Step, TurnSummary
from turntrace.summaries import SessionSummary

_SHORT_ID: Final = 8
_TABLE_WIDTH: Final = 76
_STARTED_WIDTH: Final = 100
_KINDS: Final = {"chain": "node", "generation": "llm"}


# --- small things -----------------------------------------------------------------------------------------------------
def safe(text: object) -> str:
    """Return a text with all that is not printable (control characters, changes of direction) written as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )


def duration(ms: float) -> str:
    """Write a time: ``350 ms``, ``1.2 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if ms < 1_000:
        return f"{ms:.0f} ms"
    if ms < 59_950:  # which would be written as 60.0 s
        return f"{ms / 1_000:.1f} s"
    minutes, seconds = divmod(round(ms / 1_000), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def money(usd: float, digits: int = 6) -> str:
    """Write a price: ``$12.34``, and below a dollar with so many digits."""
    if usd == 0 or usd >= 1:
        return f"${usd:,.2f}"
    return f"${usd:.{digits}f}" if usd >= 10.0**-digits else f"<${10.0**-digits:.{digits}f}"


def error(text: str) -> None:
    """Say in one line on stderr what went wrong."""
    stderr().print(Text(f"turntrace: {safe(' '.join(text.split()))}"), soft_wrap=True)


def working(text: str) -> AbstractContextManager[object]:
    """Say on stderr what goes on, where somebody watches."""
    return stderr().status(text)


def stderr() -> Console:
    """Return the console for what is no result: errors and progress."""
    return Console(stderr=True, highlight=False)


# --- sessions ---------------------------------------------------------------------------------------------------------
def sessions_table(console: Console, sessions: Sequence[SessionSummary]) -> None:
    """Show sessions, one a line; where the terminal is too narrow for that, one below the other."""
    if not sessions:
        console.print("There are no sessions yet.")
    elif console.width < _TABLE_WIDTH:
        for session in sessions:
            console.print(_card(session))
    else:
        console.print(_table(sessions, with_start=console.width >= _STARTED_WIDTH))


def _table(sessions: Sequence[SessionSummary], *, with_start: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("session", "user", "channel"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    if with_start:
        table.add_column("started", no_wrap=True)
    for name in ("turns", "tokens", "cost", "duration"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("ended", no_wrap=True, overflow="ellipsis")
    for session in sessions:
        started = [Text(f"{datetime.fromtimestamp(session.started_ns / 1e9):%Y-%m-%d %H:%M}")] if with_start else []
        table.add_row(
            Text(safe(session.id[:_SHORT_ID]), style="bold"),
            _user(session),
            Text(safe(session.channel)),
            *started,
            f"{session.total_turns:,}",
            f"{session.total_tokens:,}",
            money(session.total_cost_usd, 4),
            duration(session.duration_ms),
            _end(session),
        )
    return table


def _card(session: SessionSummary) -> Group:
    head = Text.assemble((safe(session.id[:_SHORT_ID]), "bold"), f" {safe(session.channel)}, user ", _user(session))
    facts = Text.assemble(_figures(session), ", ", _end(session))
    return Group(head, Padding(facts, (0, 0, 0, 2)))


def _user(session: SessionSummary) -> Text:
    return Text("unknown", style="dim") if session.user_id is None else Text(safe(session.user_id[:_SHORT_ID]))


def _end(session: SessionSummary) -> Text:
    if session.end_reason is None:
        return Text("open", style="dim")
    return Text(safe(session.end_reason), style="red" if session.end_reason == "error" else "")


def _figures(session: SessionSummary) -> str:
    turns = f"{session.total_turns:,} turn" + ("" if session.total_turns == 1 else "s")
    tokens = f"{session.total_tokens:,} tokens"
    return ", ".join((turns, tokens, money(session.total_cost_usd, 4), duration(session.duration_ms)))


# --- one session ------------------------------------------------------------------------------------------------------
def session_tree(console: Console, session: SessionSummary, turns: Sequence[tuple[TurnSummary, list[Step]]]) -> None:
    """Show a session as a tree: its turns, the runs of the graph, nodes, calls of models and tools."""
    tree = Tree(session_head(session), guide_style="dim")
    conversation = None
    for turn, steps in turns:
        if turn.conversation_id != conversation:
            conversation = turn.conversation_id
            branch = tree.add(Text(f"conversation {safe(conversation)}"))
        _add_steps(branch.add(_turn_line(turn)), turn, steps)
    console.print(tree)


def session_head(session: SessionSummary) -> Text:
    """Return the two lines that say which session it is and what it adds up to."""
    head = Text.assemble(
        ("session ", "bold"), (safe(session.id), "bold"), f"  {safe(session.channel)}, user ", _user(session), "\n"
    )
    return Text.assemble(head, _figures(session), ", ", _end(session))


def _add_steps(branch: Tree, turn: TurnSummary, steps: Sequence[Step]) -> None:
    known = {step.span_id for step in steps}
    below: dict[str | None, list[Step]] = {}
    for step in sorted(steps, key=lambda step: step.start_ms):
        # What hangs on a span of other code is shown below the turn: the ledger keeps our own steps only.
        below.setdefault(step.parent_id if step.parent_id in known else turn.root_span_id, []).append(step)
    waiting = [(branch, step) for step in reversed(below.get(turn.root_span_id, []))]
    while waiting:
        above, step = waiting.pop()
        node = above.add(_step_line(step))
        waiting += [(node, child) for child in reversed(below.get(step.span_id, []))]


def _turn_line(turn: TurnSummary) -> Text:
    line = Text.assemble((f"turn {turn.number}", "bold"))
    if turn.input_type is not None:
        line.append(f"  {safe(turn.input_type)}" + ("" if turn.output_type is None else f", {safe(turn.output_type)}"))
    if turn.status != "completed":
        line.append(f"  {safe(turn.status)}", style="red")
    line.append(f"  {duration(turn.latency_ms)}", style="cyan")
    if turn.llm_calls:
        line.append(f"  {turn.input_tokens + turn.output_tokens:,} tokens  {money(turn.cost_usd)}")
    return line


def _step_line(step: Step) -> Text:
    line = Text.assemble((f"{safe(_KINDS.get(step.kind, step.kind))} ", "dim"), safe(step.name))
    line.append(f"  {duration(step.duration_ms)}", style="cyan")
    if step.input_tokens is not None:
        line.append(f"  {step.input_tokens:,} in, {step.output_tokens or 0:,} out")
    if step.cost_usd is not None:
        line.append(f"  {money(step.cost_usd)}")
    if step.error is not None:
        line.append(f"  {safe(step.error)}", style="red")
    return line


def swept_line(sessions: int, turns: int) -> str:
    """Say what a sweep did."""
    ended = f"{sessions:,} session" + ("" if sessions == 1 else "s")
    closed = f"{turns:,} turn" + ("" if turns == 1 else "s")
    return f"Ended {ended}, closed {closed} as abandoned."


def next_steps(console: Console, *, ledger_url: str, waits: bool, session_id: str) -> None:
    """Say where the data of the demo is and what to do with it."""
    console.print(Text(f"\nThe ledger: {safe(ledger_url)}"), soft_wrap=True)
    console.print(Text(f"Look again: turntrace sessions, turntrace show {session_id[:_SHORT_ID]}"), soft_wrap=True)
    if waits:
        hint = (
            "To see it in Langfuse, set LANGFUSE_PUBLIC_KEY, LANGFUSE_SECRET_KEY and LANGFUSE_BASE_URL, then: "
            "turntrace export"
        )
    else:
        hint = "The spans go to Langfuse, whose keys are set: open its Sessions page."
    console.print(Text(hint))
