"""Lists in a terminal: sessions and users, one a line, or one below the other where it is too narrow for that."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from rich.console import Console, Group
from rich.padding import Padding
from rich.text import Text

from turntrace.analytics import UNSATISFIED_BELOW, SlowestTurn, UserFigures
from turntrace.cli.choosing import Chosen
from turntrace.cli.columns import Column, draw, figures, fits, fitting, say_left_out
from turntrace.cli.render import SHORT_ID, clock, count, duration, money, percent, safe, short_clock, stderr
from turntrace.summaries import SessionSummary


# --- sessions ---------------------------------------------------------------------------------------------------------
def sessions_table(
    console: Console,
    sessions: Sequence[SessionSummary],
    *,
    about: Collection[str] = (),
    slowest: Mapping[str, SlowestTurn] | None = None,
    abandoned: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Show sessions; there must be some.

    Args:
        console: Where to show them.
        sessions: The sessions.
        about: Names of the columns that they were asked for by, which are shown in any width.
        slowest: The slowest turn of each, by the session's id; None for no column of these.
        abandoned: How many turns were abandoned, by the session's id; nothing for no column of these.
    """
    now_ns = time.time_ns()
    columns = [
        Column("session", [Text(safe(each.id[:SHORT_ID]), style="bold") for each in sessions]),
        Column("user", [user_of(each) for each in sessions], rank=3),
        Column("channel", [Text(safe(each.channel)) for each in sessions], rank=2, least=8),
        Column("started UTC", [Text(short_clock(each.started_ns, now_ns)) for each in sessions]),
        figures("turns", [f"{each.total_turns:,}" for each in sessions], rank=1),
        *_failed(sessions, about),
        *_abandoned(sessions, abandoned),
        figures("tokens", [f"{each.total_tokens:,}" for each in sessions], rank=5),
        figures("cost", [money(each.total_cost_usd, 4) for each in sessions], rank=4),
        figures("duration", [duration(each.duration_ms) for each in sessions], rank=6),
        *_slowest(sessions, slowest),
        figures("per turn", [_latency(each) for each in sessions], rank=8),
        *_satisfied(sessions, about),
        Column("last intent", [Text(safe(each.last_intent or "")) for each in sessions], rank=9, least=12),
        Column("ended", [end_of(each) for each in sessions], least=12),
    ]
    columns = [replace(column, rank=0) if column.name in about else column for column in columns]
    if not fits(fitting(columns, console.width), console.width):
        for session in sessions:
            slow, left = (slowest or {}).get(session.id), abandoned.get(session.id, 0)
            console.print(_session_card(session, now_ns, about, slow, left))
    else:
        say_left_out(console, draw(console, columns))


def _failed(sessions: Sequence[SessionSummary], about: Collection[str]) -> list[Column]:
    """Return the column of turns that failed, where some did or it is about them."""
    if "failed" not in about and not any(each.failed_turns for each in sessions):
        return []
    cells = [Text(f"{each.failed_turns:,}", style="red" if each.failed_turns else "") for each in sessions]
    return [Column("failed", cells, justify="right")]


def _abandoned(sessions: Sequence[SessionSummary], abandoned: Mapping[str, int]) -> list[Column]:
    if not abandoned:
        return []
    return [figures("abandoned", [f"{abandoned.get(each.id, 0):,}" for each in sessions])]


def _satisfied(sessions: Sequence[SessionSummary], about: Collection[str]) -> list[Column]:
    """Return the column of the feedback, where there is some or it is about it."""
    given = [each.user_satisfaction for each in sessions]
    if "satisfied" not in about and given.count(None) == len(given):
        return []
    cells = [Text("" if mean is None else percent(mean), style="red" if _is_low(mean) else "") for mean in given]
    return [Column("satisfied", cells, 7, "right")]


def _is_low(satisfaction: float | None) -> bool:
    return satisfaction is not None and satisfaction < UNSATISFIED_BELOW


def _slowest(sessions: Sequence[SessionSummary], slowest: Mapping[str, SlowestTurn] | None) -> list[Column]:
    if slowest is None:
        return []
    found = [slowest.get(each.id) for each in sessions]
    return [figures("slowest turn", ["" if turn is None else _turn(turn) for turn in found])]


def _turn(turn: SlowestTurn) -> str:
    return f"{turn.number:,}: {duration(turn.latency_ms)}"


def _latency(session: SessionSummary) -> str:
    return "" if session.avg_turn_latency_ms is None else duration(session.avg_turn_latency_ms)


def _session_card(
    session: SessionSummary, now_ns: int, about: Collection[str], slowest: SlowestTurn | None, abandoned: int
) -> Group:
    head = Text.assemble((safe(session.id[:SHORT_ID]), "bold"), f" {safe(session.channel)}, user ", user_of(session))
    facts = Text.assemble(short_clock(session.started_ns, now_ns), ", ")
    if session.failed_turns or "failed" in about:
        facts.append(f"{session.failed_turns:,} failed", style="red" if session.failed_turns else "").append(", ")
    if abandoned:
        facts.append(f"{abandoned:,} abandoned, ")
    facts.append(totals_of(session))
    if "per turn" in about and session.avg_turn_latency_ms is not None:
        facts.append(f", {_latency(session)} per turn")
    if slowest is not None:
        facts.append(f", slowest turn {_turn(slowest)}")
    if session.user_satisfaction is not None:
        facts.append(f", satisfied {percent(session.user_satisfaction)}")
    facts.append(", ").append_text(end_of(session))
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
def users_table(console: Console, users: Sequence[UserFigures], *, about: Collection[str] = ()) -> None:
    """Show users; there must be some.

    Args:
        console: Where to show them.
        users: The users.
        about: Names of the columns that they were asked for by, which are shown in any width.
    """
    columns = [
        Column("user", [Text(safe(each.user_id[:SHORT_ID]), style="bold") for each in users]),
        figures("sessions", [f"{each.sessions:,}" for each in users]),
        figures("turns", [f"{each.turns:,}" for each in users]),
        figures("tokens", [f"{each.tokens:,}" for each in users], rank=2),
        figures("cost", [money(each.cost_usd, 4) for each in users]),
        figures("drop-offs", [f"{each.dropoffs:,}" for each in users], rank=1),
        figures("satisfied", [_satisfaction(each) for each in users], rank=3),
        Column("first day", [Text(clock(each.first_ns, "day")) for each in users], rank=5),
        Column("last day", [Text(clock(each.last_ns, "day")) for each in users], rank=4),
    ]
    columns = [replace(column, rank=0) if column.name in about else column for column in columns]
    if not fits(fitting(columns, console.width), console.width):
        for user in users:
            console.print(_user_card(user, about))
    else:
        say_left_out(console, draw(console, columns))


def _satisfaction(user: UserFigures) -> str:
    return "" if user.satisfaction is None else percent(user.satisfaction)


def _user_card(user: UserFigures, about: Collection[str]) -> Group:
    known = [count(user.turns, "turn"), money(user.cost_usd, 4), count(user.dropoffs, "drop-off")]
    if "tokens" in about:
        known.append(f"{user.tokens:,} tokens")
    if user.satisfaction is not None:
        known.append(f"satisfied {percent(user.satisfaction)}")
    facts = ", ".join(known)
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


def warn_of_nothing(chosen: Chosen, found: Sequence[object]) -> None:
    """Say beside a list for programs, where it is empty, which filters nothing meets: one may be misspelt."""
    if not found:
        for line in chosen.wrong():
            stderr().print(Text(safe(line)), soft_wrap=True)


def nothing(console: Console, chosen: Chosen, what: str = "sessions") -> None:
    """Say that there are no sessions, or none like that."""
    words = f"There are no {what} yet." if chosen.is_all else f"There are no {what} like that: {chosen.said}."
    for line in (words, *chosen.wrong()):
        console.print(Text(safe(line)), soft_wrap=True)
