"""Sessions over time, and how long they are."""

from collections.abc import Sequence
from datetime import date, timedelta
from typing import Final

from turntrace.analytics import DayOfSessions, Length, SessionLengths
from turntrace.report.collect import Report
from turntrace.report.figures import (
    BLUE,
    INK,
    ORANGE,
    SURFACE,
    Chart,
    Data,
    Plot,
    Section,
    Table,
    are_few_days,
    bars,
    day_axis,
    day_width,
    layout,
    line,
    named,
    roomy,
    titled,
    whole,
    without_gaps,
)
from turntrace.report.words import count, duration, money, times

_MOST_DAYS: Final = 1_100
_MOST_BARS: Final = 60
_EDGES: Final = (0, 1, 2, 5, 10, 15, 20, 30, 45, 60, 120, 240, 480, 1440)
"""Minutes at which the bars of the sessions' lengths end."""


def sessions_section(report: Report) -> Section:
    """Return the section about sessions."""
    charts = [_over_time(report.days)] if report.days else []
    lengths = report.lengths
    if lengths.n and lengths.turns and lengths.minutes:  # each was asked at its own time
        charts += [_turns(lengths), _minutes(lengths)]
    return Section("sessions", "Sessions", charts, "turntrace demo records five of them.")


def _over_time(days: Sequence[DayOfSessions]) -> Chart:
    known = {day.day: day for day in days}
    on = _all_days(days)
    width = day_width(on)
    found = [known.get(day) for day in on]
    sessions = [0 if day is None else day.sessions for day in found]
    dropoffs = [0 if day is None else day.dropoffs for day in found]
    users = [0 if day is None else day.users for day in found]
    data = [
        bars("sessions", on, sessions, BLUE, "%{y:,} sessions", width=width),
        bars("drop-offs", on, dropoffs, ORANGE, "%{y:,} drop-offs", width=width),
        line("users", on, users, INK, "%{y:,} users", marker=_points(on)),
    ]
    looks = layout(
        height=320,
        barmode="overlay",
        hovermode="x unified",
        xaxis=day_axis(on, 8),
        yaxis=titled("sessions, users", nticks=6, tickformat=",d", **whole(max(sessions))),
    )
    rows = [
        (
            d.day,
            count(d.sessions),
            count(d.users),
            count(d.turns),
            count(d.dropoffs),
            count(d.tokens),
            money(d.cost_usd),
        )
        for d in days
    ]
    return Chart(
        "sessions-over-time",
        "Sessions over time",
        "Each bar is the sessions that began on a day, its orange part those that ended as a drop-off; the line is how "
        "many known users they were of.",
        [Plot(data, looks)],
        Table(("day", "sessions", "users", "turns", "drop-offs", "tokens", "cost"), rows),
        without_gaps(on),
        is_wide=True,
    )


def _points(on: Sequence[str]) -> Data:
    """Return the points of a line, which stand out from the bars behind them where bars are wide."""
    if not are_few_days(on):
        return {"color": INK, "size": 4}
    return {"color": INK, "size": 11, "line": {"color": SURFACE, "width": 2}}


def _all_days(days: Sequence[DayOfSessions]) -> list[str]:
    """Return all days from the first to the last, those without a session too, unless few have one or all are many."""
    on = [day.day for day in days]
    first, last = date.fromisoformat(on[0]), date.fromisoformat(on[-1])
    length = (last - first).days + 1
    if length > _MOST_DAYS or are_few_days(on):
        return on
    return [(first + timedelta(days=n)).isoformat() for n in range(length)]


def _turns(lengths: SessionLengths) -> Chart:
    exact = [each for each in lengths.turns if each.length <= _MOST_BARS]
    more = sum(each.sessions for each in lengths.turns if each.length > _MOST_BARS)
    x, y = [each.length for each in exact], [each.sessions for each in exact]
    looks = layout(
        xaxis=titled("turns of the session", tickformat=",d", showgrid=False, rangemode="normal"),
        yaxis=titled("sessions", nticks=6, tickformat=",d", **whole(max(y))),
        showlegend=False,
    )
    if more:
        x, y = [*x, _MOST_BARS + 1], [*y, more]
        looks["xaxis"]["labelalias"] = {str(_MOST_BARS + 1): f"over {_MOST_BARS}"}
    looks["xaxis"]["range"] = roomy(min(x), max(x), 8)
    if len(x) <= 12:
        looks["xaxis"] |= {"tickmode": "array", "tickvals": x}
    return Chart(
        "session-turns",
        "Session length in turns",
        f"Each bar is the sessions with so many turns: half of all have at most {lengths.p50_turns:,}, "
        f"95 of 100 at most {lengths.p95_turns:,}.",
        [Plot([bars("sessions", x, y, BLUE, "%{x} turns: %{y:,} sessions")], looks)],
        Table(("turns", "sessions"), [(count(each.length), count(each.sessions)) for each in lengths.turns]),
    )


def _minutes(lengths: SessionLengths) -> Chart:
    names, sums = _binned(lengths.minutes)
    short = [name.rpartition("\N{EN DASH}")[2] for name in names]
    looks = layout(
        xaxis=named(short, range=roomy(0, len(short) - 1, 6), title={"text": "minutes, up to", "font": {"size": 12}}),
        yaxis=titled("sessions", nticks=6, tickformat=",d"),
        showlegend=False,
    )
    trace = bars(
        "sessions", list(range(len(names))), sums, BLUE, "%{customdata} min: %{y:,} sessions", customdata=names
    )
    return Chart(
        "session-minutes",
        "Session length in minutes",
        "Each bar is the sessions that lasted so long, from the first to the last activity: half of all at most "
        f"{duration(lengths.p50_ms)}, "
        f"95 of 100 at most {duration(lengths.p95_ms)}.",
        [Plot([trace], looks)],
        Table(
            ("up to minutes", "sessions"),
            [(count(each.length), count(each.sessions)) for each in lengths.minutes],
        ),
        note=f"Of {times(lengths.n, 'session')}; those of a day and longer are counted as one day.",
    )


def _binned(minutes: Sequence[Length]) -> tuple[list[str], list[int]]:
    """Return bars of growing width, since most sessions are short and some are very long."""
    most = minutes[-1].length
    edges = [edge for at, edge in enumerate(_EDGES) if at == 0 or _EDGES[at - 1] < max(1, most)]
    names, sums = [], []
    for below, edge in zip((-1, *edges), edges, strict=False):
        found = sum(each.sessions for each in minutes if below < each.length <= edge)
        if edge > 0 or found:
            names.append("0" if edge == 0 else f"{below}\N{EN DASH}{edge}")
            sums.append(found)
    return names, sums
