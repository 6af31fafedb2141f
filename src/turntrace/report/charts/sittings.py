"""Sessions over time, and how long they are."""

from collections.abc import Sequence
from datetime import date, timedelta
from typing import Final

from turntrace.analytics import DURATION_EDGES_MS, DayOfSessions, Lasted, SessionLengths
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
    numbered,
    roomy,
    titled,
    whole,
    without_gaps,
)
from turntrace.report.words import count, duration, money, times

_MOST_DAYS: Final = 1_100
_MOST_BARS: Final = 60
_MOST_EDGES: Final = 14
_MINUTE_MS: Final = 60_000
_BEGINS: Final = ((1, 2_000), (1_000, 5 * _MINUTE_MS))
"""The end of the first bar of the sessions' durations, and below how much 95 of 100 are for it."""
_UNITS: Final = ((3_600_000, "h"), (_MINUTE_MS, "min"), (1_000, "s"), (1, "ms"))


def sessions_section(report: Report) -> Section:
    """Return the section about sessions."""
    charts = [_over_time(report.days)] if report.days else []
    lengths = report.lengths
    if lengths.n and lengths.turns and report.durations:  # each was asked at its own time
        charts += [_turns(lengths), _durations(lengths, report.durations)]
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
        yaxis=titled("sessions, users", nticks=6, **whole(max(sessions))),
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
        xaxis=titled("turns of the session", showgrid=False, rangemode="normal"),
        yaxis=titled("sessions", nticks=6, **whole(max(y))),
        showlegend=False,
    )
    if more:
        x, y = [*x, _MOST_BARS + 1], [*y, more]
        looks["xaxis"]["labelalias"] = {str(_MOST_BARS + 1): f"over {_MOST_BARS}"}
    looks["xaxis"] |= {"range": roomy(x[0], x[-1], 8), **numbered(x)}
    return Chart(
        "session-turns",
        "Session length in turns",
        f"Each bar is the sessions with so many turns: half of all have at most {lengths.p50_turns:,}, "
        f"95 of 100 at most {lengths.p95_turns:,}.",
        [Plot([bars("sessions", x, y, BLUE, "%{x} turns: %{y:,} sessions")], looks)],
        Table(("turns", "sessions"), [(count(each.length), count(each.sessions)) for each in lengths.turns]),
    )


def _durations(lengths: SessionLengths, found: Sequence[Lasted]) -> Chart:
    names, sums, is_longer = _binned(found, lengths.p95_ms or 0)
    edges = [(0, ""), *(_parts(edge) for edge in names)]
    ticks = [f"{number}<br>{unit}" for number, unit in edges[1:]]
    spoken = [f"up to {number} {unit}" for number, unit in edges[1:]]
    if is_longer:
        number, unit = edges[-1]
        ticks.append("longer")
        spoken.append(f"more than {number} {unit}")
    looks = layout(
        xaxis=named(ticks, range=roomy(0, len(ticks) - 1, 6), title={"text": "up to", "font": {"size": 12}}),
        yaxis=titled("sessions", nticks=6, **whole(max(sums))),
        showlegend=False,
        meta={"thin": True},
    )
    looks["xaxis"] |= {"tickangle": 0}
    hover = "%{customdata}: %{y:,} sessions"
    trace = bars("sessions", list(range(len(sums))), sums, BLUE, hover, customdata=spoken)
    return Chart(
        "session-durations",
        "Session length in time",
        "Each bar is the sessions that lasted at most so long and longer than the bar before, from the first to the "
        f"last activity: half of all at most {duration(lengths.p50_ms)}, 95 of 100 at most {duration(lengths.p95_ms)}.",
        [Plot([trace], looks)],
        Table(("lasted", "sessions"), [(name, count(n)) for name, n in zip(spoken, sums, strict=True)]),
        note=f"Of {times(sum(sums), 'session')}.",
    )


def _binned(found: Sequence[Lasted], p95_ms: int) -> tuple[list[int], list[int], bool]:
    """Return bars on a scale that fits most sessions: their edges, how many, and whether the last one is all longer.

    It begins with a millisecond, a second or a minute; bars grow in width, as few sessions are very long.
    """
    first = next((at for at, most in _BEGINS if p95_ms < most), _MINUTE_MS)
    by_edge = {each.upto_ms: each.sessions for each in found}
    used = [edge for edge in by_edge if edge is not None]
    last = max([first, *used])
    edges = [edge for edge in DURATION_EDGES_MS if first <= edge <= last][:_MOST_EDGES]
    sums = [sum(n for upto, n in by_edge.items() if upto is not None and upto <= edges[0])]
    sums += [by_edge.get(edge, 0) for edge in edges[1:]]
    longer = sum(by_edge.values()) - sum(sums)
    return edges, [*sums, longer] if longer else sums, longer > 0


def _parts(ms: int) -> tuple[int, str]:
    """Return a time as a whole number of the largest unit."""
    return next((ms // length, unit) for length, unit in _UNITS if ms >= length)
