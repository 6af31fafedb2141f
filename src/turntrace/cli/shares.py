"""Funnels and drop-offs in a terminal: counts and shares, each with a bar and what it is a share of."""

from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from turntrace.analytics import MOST_TURNS, Dropoffs, Funnel
from turntrace.cli.columns import Column, draw, figures, gaps
from turntrace.cli.render import bar, count, duration, is_plain, percent, safe

_NARROWEST: Final = 8
_WIDEST: Final = 40
_GAP: Final = 2


def _with_bars(console: Console, columns: list[Column], shares: Sequence[float], style: str) -> list[Column]:
    """Return the columns with one of bars after the first, as wide as there is room."""
    beside = [column for column in columns if column.rank < 2]
    room = console.width - gaps(beside) - _GAP
    width = min(_WIDEST, room - sum(column.width for column in beside))
    if width < _NARROWEST:  # rather cut names than have no bars
        width = min(_NARROWEST, room - sum(column.least_width for column in beside))
    if width < _NARROWEST:
        return columns
    bars = [bar(share, width, plain=is_plain(console), style=style) for share in shares]
    return [columns[0], Column("", bars, rank=1), *columns[1:]]


# --- funnels ----------------------------------------------------------------------------------------------------------
def funnel_chart(console: Console, funnel: Funnel) -> list[str]:
    """Show a journey: who reached and entered its stages, how long they stayed, and how many were converted.

    Returns:
        The names of the columns that there is no room for.
    """
    console.print(_funnel_head(funnel))
    reached = [each.reached for each in funnel.stages] + [funnel.converted]
    shares = [users / funnel.begun if funnel.begun else 0.0 for users in reached]
    stays = [("", "") if s.stayed_p50_ms is None else (duration(s.stayed_p50_ms), f"{s.left:,}") for s in funnel.stages]
    names = [Text(f"{each.number} {safe(each.stage)}") for each in funnel.stages]
    columns = [
        Column("stage", [*names, Text("converted", style="green")], least=12),
        figures("reached", [f"{users:,}" for users in reached]),
        figures("share", [percent(share) for share in shares]),
        figures("entered", [*(f"{each.entered:,}" for each in funnel.stages), ""]),
        figures("median stay", [*(stay for stay, _ in stays), ""], rank=1),
        figures("went", [*(left for _, left in stays), ""], rank=2),
    ]
    left_out = draw(console, _with_bars(console, columns, shares, "cyan"))
    last = funnel.stages[-1]
    if last.entered and not funnel.converted:
        entered = f"{count(last.entered, 'user')} entered the last stage"
        console.print(Text(f"{entered}; that one is converted is said by journey.convert().", style="dim"))
    return left_out


def _funnel_head(funnel: Funnel) -> Text:
    head = Text.assemble((safe(funnel.name), "bold"), f"  {count(funnel.begun, 'user')}")
    head.append(", ").append(
        f"{funnel.converted:,} converted ({percent(funnel.rate)})", style="green" if funnel.converted else ""
    )
    if funnel.conversion_p50_ms is not None:
        head.append(f", median {duration(funnel.conversion_p50_ms)}")
    if funnel.conversion_turns_p50 is not None:
        head.append(f", in turn {funnel.conversion_turns_p50}")
    return head


# --- drop-offs --------------------------------------------------------------------------------------------------------
def dropoff_charts(
    console: Console, turns: Sequence[Dropoffs], intents: Sequence[Dropoffs], actions: Sequence[Dropoffs]
) -> None:
    """Show after which turn, intent and action of the agent sessions ended as a drop-off; there must be some."""
    ended, dropped = sum(each.ended for each in turns), sum(each.dropoffs for each in turns)
    share = percent(dropped / ended if ended else 0.0)
    console.print(Text(f"{dropped:,} of {count(ended, 'ended session')} dropped off ({share})."))
    parts = (
        ("turn of conversation", [_point(turn_name(each.at)) for each in turns], turns),
        ("last intent", [_point(each.at) for each in intents], intents),
        ("the agent had", [_point(each.at) for each in actions], actions),
    )
    widest = max(Column(name, points).width for name, points, _ in parts)
    for name, points, rows in parts:
        console.print()
        columns = [
            Column(name, points, least=13, fill=min(widest, _WIDEST)),
            figures("ended", [f"{each.ended:,}" for each in rows]),
            figures("drop-offs", [f"{each.dropoffs:,}" for each in rows]),
            figures("rate", [f"{percent(each.rate)}" for each in rows]),
        ]
        draw(console, _with_bars(console, columns, [each.rate for each in rows], "yellow"))


def _point(at: str) -> Text:
    return Text(safe(at)) if at else Text("not known", style="dim")


def turn_name(at: str) -> str:
    """Return how the number of a turn is written, where those after the last that is told apart are one."""
    return f"after {MOST_TURNS}" if at == str(MOST_TURNS + 1) else at
