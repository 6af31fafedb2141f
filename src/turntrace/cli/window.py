"""How full a model's window was, turn by turn, drawn in a terminal."""

from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from turntrace.cli.render import bar, is_plain, percent, safe
from turntrace.cli.tree import session_head
from turntrace.decisions import PruningDecision
from turntrace.records import TurnSummary
from turntrace.summaries import SessionSummary

_NARROWEST: Final = 10
_WIDEST: Final = 40
_BESIDE: Final = 64
_NEARLY_EMPTY: Final = 0.05


def context_chart(
    console: Console,
    session: SessionSummary,
    turns: Sequence[TurnSummary],
    decisions: Iterable[tuple[str, PruningDecision]],
) -> None:
    """Draw how full the window was at each turn's fullest call, with what was pruned.

    Args:
        console: Where to draw.
        session: The session.
        turns: Its turns, in order.
        decisions: The decisions about its windows, each with the id of its turn.
    """
    console.print(session_head(session))
    if all(turn.context_messages is None for turn in turns):
        console.print("No model was called in this session, so there is no window to draw.")
        return
    by_turn: dict[str, list[PruningDecision]] = {}
    for turn_id, decision in decisions:
        if decision.pruned:
            by_turn.setdefault(turn_id, []).append(decision)
    width = min(_WIDEST, max(_NARROWEST, console.width - _BESIDE))
    most = max((turn.context_tokens or 0 for turn in turns), default=0)
    of_window = max((turn.context_window_pct or 0.0 for turn in turns), default=0.0) >= _NEARLY_EMPTY
    conversation = None
    table = _table()
    for turn in turns:
        if turn.conversation_id != conversation:
            if table.row_count:
                console.print(table)
                table = _table()
            conversation = turn.conversation_id
            console.print(Text(f"conversation {safe(conversation)}"))
        share = turn.context_window_pct if of_window else (turn.context_tokens or 0) / most if most else 0.0
        drawn = bar(share or 0.0, width, plain=is_plain(console))
        table.add_row(f"turn {turn.number}", drawn, *_figures(turn), _prunings(turn, by_turn.get(turn.id, [])))
    console.print(table)
    whole = "what its model can be given" if of_window else "the fullest turn: the window is nearly empty, or not known"
    console.print(Text(f"The bar is the fullest call of the turn, as a share of {whole}.", "dim"))


def _table() -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for justify in ("left", "left", "right", "right", "left"):
        table.add_column(justify=justify, no_wrap=justify != "left")
    return table


def _figures(turn: TurnSummary) -> tuple[str, str]:
    if turn.context_tokens is None:
        return "-", ""
    share = turn.context_window_pct
    if share is None:
        return f"{turn.context_tokens:,}", ""
    return f"{turn.context_tokens:,}", f"{percent(share)} of {turn.context_limit:,}"


def _prunings(turn: TurnSummary, decisions: Sequence[PruningDecision]) -> Text:
    if not decisions:
        return Text()
    messages = f"{turn.messages_pruned:,} message" + ("" if turn.messages_pruned == 1 else "s")
    tokens = f", {turn.tokens_pruned:,} tokens" if turn.tokens_pruned else ""
    why = dict.fromkeys(f"{each.strategy or 'other code'}, {each.trigger}" for each in decisions)
    return Text(f"pruned {messages}{tokens} ({safe('; '.join(why))})", style="magenta")
