"""Lists in a terminal: sessions and users, one a line, or one below the other where it is too narrow for that."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.padding import Padding
from rich.text import Text

from turntrace.analytics import UserFigures
from turntrace.cli.choosing import Chosen
from turntrace.cli.columns import Column, draw, figures, fits, fitting
from turntrace.cli.render import SHORT_ID, clock, count, duration, money, percent, safe
from turntrace.summaries import SessionSummary


# --- sessions ---------------------------------------------------------------------------------------------------------
def sessions_table(console: Console, sessions: Sequence[SessionSummary], *, failed: bool = False) -> None:
    """Show sessions; there must be some.

    Args:
        console: Where to show them.
        sessions: The sessions.
        failed: Whether it is about turns that failed, so that how many did is shown in any width.
    """
    columns = [
        Column("session", [Text(safe(each.id[:SHORT_ID]), style="bold") for each in sessions]),
        Column("user", [user_of(each) for each in sessions]),
        Column("channel", [Text(safe(each.channel)) for each in sessions], least=8),
        Column("started, UTC", [Text(clock(each.started_ns)) for each in sessions], rank=3),
        figures("turns", [f"{each.total_turns:,}" for each in sessions]),
        *([_failed(sessions, 0 if failed else 4)] if failed or any(each.failed_turns for each in sessions) else []),
        figures("tokens", [f"{each.total_tokens:,}" for each in sessions], rank=1),
        figures("cost", [money(each.total_cost_usd, 4) for each in sessions]),
        figures("duration", [duration(each.duration_ms) for each in sessions], rank=2),
        figures("per turn", [_latency(each) for each in sessions], rank=5),
        Column("last intent", [Text(safe(each.last_intent or "")) for each in sessions], rank=6, least=12),
        Column("ended", [end_of(each) for each in sessions], least=12),
    ]
    if not fits(fitting(columns, console.width), console.width):
        for session in sessions:
            console.print(_session_card(session))
    else:
        draw(console, columns)


def _failed(sessions: Sequence[SessionSummary], rank: int) -> Column:
    cells = [Text(f"{each.failed_turns:,}", style="red" if each.failed_turns else "") for each in sessions]
    return Column("failed", cells, rank, "right")


def _latency(session: SessionSummary) -> str:
    return "" if session.avg_turn_latency_ms is None else duration(session.avg_turn_latency_ms)


def _session_card(session: SessionSummary) -> Group:
    head = Text.assemble((safe(session.id[:SHORT_ID]), "bold"), f" {safe(session.channel)}, user ", user_of(session))
    facts = Text.assemble(totals_of(session), ", ", end_of(session))
    return Group(head, Padding(facts, (0, 0, 0, 2)))


def user_of(session: SessionSummary) -> Text:
    """Return the beginning of the hash of a session's user."""
    return Text("unknown", style="dim") if session.user_id is None else Text(safe(session.user_id[:SHORT_ID]))


def end_of(session: SessionSummary) -> Text:
    """Return why a session ended."""
    if session.ended_ns is None:
        return Text("open", style="dim")
    style = "red" if session.end_reason == "error" else "yellow" if session.dropoff else ""
    return Text(safe(session.end_reason), style=style)


def totals_of(session: SessionSummary) -> str:
    """Return what a session adds up to."""
    turns, tokens = count(session.total_turns, "turn"), f"{session.total_tokens:,} tokens"
    return ", ".join((turns, tokens, money(session.total_cost_usd, 4), duration(session.duration_ms)))


# --- users ------------------------------------------------------------------------------------------------------------
def users_table(console: Console, users: Sequence[UserFigures]) -> None:
    """Show users; there must be some."""
    columns = [
        Column("user", [Text(safe(each.user_id[:SHORT_ID]), style="bold") for each in users]),
        figures("sessions", [f"{each.sessions:,}" for each in users]),
        figures("turns", [f"{each.turns:,}" for each in users]),
        figures("tokens", [f"{each.tokens:,}" for each in users], rank=2),
        figures("cost", [money(each.cost_usd, 4) for each in users]),
        figures("drop-offs", [f"{each.dropoffs:,}" for each in users], rank=1),
        figures("satisfied", [_satisfied(each) for each in users], rank=3),
        Column("first day", [Text(clock(each.first_ns, "day")) for each in users], rank=5),
        Column("last day", [Text(clock(each.last_ns, "day")) for each in users], rank=4),
    ]
    if not fits(fitting(columns, console.width), console.width):
        for user in users:
            console.print(_user_card(user))
    else:
        draw(console, columns)


def _satisfied(user: UserFigures) -> str:
    return "" if user.satisfaction is None else percent(user.satisfaction)


def _user_card(user: UserFigures) -> Group:
    facts = ", ".join((count(user.turns, "turn"), money(user.cost_usd, 4), count(user.dropoffs, "drop-off")))
    head = Text.assemble((safe(user.user_id[:SHORT_ID]), "bold"), f" {count(user.sessions, 'session')}")
    return Group(head, Padding(Text(facts), (0, 0, 0, 2)))


# --- what is not there, and what is not shown -------------------------------------------------------------------------
def cut(console: Console, shown: int, there: int, what: str) -> None:
    """Say that there are more than were shown, where there are."""
    if there > shown:
        console.print(Text(f"{shown:,} of {there:,} {what}; --limit {there} shows all", style="dim"))


def cut_conversation(console: Console, shown: int, there: int, conversation_id: str) -> None:
    """Say that a conversation is in more sessions than are shown."""
    words = f"{shown:,} of {there:,} sessions, the latest; turntrace sessions --conversation lists all of"
    console.print(Text(f"{words} {safe(conversation_id)}\n", style="dim"), soft_wrap=True)


def nothing(console: Console, chosen: Chosen, what: str = "sessions") -> None:
    """Say that there are no sessions, or none like that."""
    words = f"There are no {what} yet." if chosen.is_all else f"There are no {what} like that: {chosen.said}."
    for line in (words, *chosen.wrong()):
        console.print(Text(safe(line)), soft_wrap=True)
