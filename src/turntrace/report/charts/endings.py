"""Where users drop off, and what tells successful sessions from others."""

from collections.abc import Sequence

from turntrace.analytics import Dropoffs, IntentOutcome, Outcome
from turntrace.report.charts.exchanges import number_of_turn, turn_axis
from turntrace.report.collect import Report
from turntrace.report.figures import (
    BLUE,
    GRAY,
    ORANGE,
    SOFT,
    Chart,
    Plot,
    Section,
    Table,
    bars,
    first_ones,
    layout,
    left_out,
    lying,
    lying_layout,
    of_names,
    titled,
    whole,
)
from turntrace.report.words import between, count, decimal, duration, money, percent, visible

_UNKNOWN = "not known"
BETWEEN = "95% between"


# --- drop-off ---------------------------------------------------------------------------------------------------------
def dropoff_section(report: Report) -> Section:
    """Return the section about drop-offs."""
    by = (
        ("intent", "Drop-off by last intent", "what the user wanted last", report.dropoff_by_intent),
        ("action", "Drop-off by the agent's last action", "what the agent did last", report.dropoff_by_action),
        ("reason", "Drop-off by end of the session", "why the session ended", report.dropoff_by_reason),
    )
    charts = [*_by_turn(report.dropoff_by_turn), *(_by(*each) for each in by if each[-1])]
    return Section(
        "dropoff",
        "Drop-off",
        charts,
        "A session is here once it has ended: turntrace demo has some, and turntrace sweep ends those that are silent.",
        (
            "A drop-off is a session that silence ended while something was open: the agent had asked, failed or been "
            "interrupted, or a journey was not converted. Rates are of the sessions that have "
            "ended; of few sessions a rate says little, which its bounds (95% between) show.",
        ),
    )


def _table(of: str, found: Sequence[Dropoffs]) -> Table:
    rows = [
        (
            visible(each.at) or _UNKNOWN,
            count(each.ended),
            count(each.dropoffs),
            percent(each.rate),
            between(each.interval),
        )
        for each in found
    ]
    return Table((of, "ended", "drop-offs", "rate", BETWEEN), rows)


def _by_turn(all_ended: Sequence[Dropoffs]) -> list[Chart]:
    """Return the chart, unless no session that has ended had a turn."""
    found = [each for each in all_ended if each.at]
    if not found:
        return []
    numbers = [int(each.at) for each in found]
    rates = [f"{percent(each.rate)}, {BETWEEN} {between(each.interval)}" for each in found]
    data = [
        bars("ended", numbers, [each.ended for each in found], SOFT, "%{y:,} ended"),
        bars(
            "drop-offs",
            numbers,
            [each.dropoffs for each in found],
            ORANGE,
            "%{y:,} drop-offs (%{customdata})",
            customdata=rates,
        ),
    ]
    looks = layout(
        height=320,
        barmode="overlay",
        hovermode="x unified",
        xaxis=turn_axis(numbers),
        yaxis=titled("sessions", nticks=6, **whole(max(each.ended for each in found))),
    )
    rows = [
        (number_of_turn(int(each.at)) if each.at else "no turn", *row[1:])
        for each, row in zip(all_ended, _table("last turn", all_ended).rows, strict=True)
    ]
    chart = Chart(
        "dropoff-by-turn",
        "Drop-off by turn",
        "Each bar is the sessions whose last turn had this number in its conversation, its orange part those that were "
        "left there with something open.",
        [Plot(data, looks)],
        Table(("last turn", "ended", "drop-offs", "rate", BETWEEN), rows),
        is_wide=True,
    )
    return [chart]


def _by(of: str, title: str, what: str, found: Sequence[Dropoffs]) -> Chart:
    shown = first_ones(found)
    names = [each.at for each in shown]
    full = of_names(names)
    rates = [percent(each.rate) for each in shown]
    known = [f"{percent(each.rate)}, {BETWEEN} {between(each.interval)}" for each in shown]
    hover = "%{hovertext}: %{x:,} drop-offs (%{customdata})"
    data = [
        lying(
            *("ended", [each.ended for each in shown], SOFT, "%{hovertext}: %{x:,} ended"),
            hovertext=full,
            text=rates,
            textposition="outside",
        ),
        lying("drop-offs", [e.dropoffs for e in shown], ORANGE, hover, hovertext=full, customdata=known),
    ]
    looks = lying_layout(names, "sessions", most=max(each.ended for each in shown), barmode="overlay")
    looks["xaxis"]["range"] = [0, 1.22 * max(each.ended for each in shown)]  # room for the shares
    return Chart(
        f"dropoff-by-{of}",
        title,
        f"Each bar is the sessions that ended, by {what}; its orange part is the drop-offs, their share stands beside.",
        [Plot(data, looks)],
        _table({"reason": "ended by"}.get(of, f"last {of}"), found),
        left_out(found, f"{of}s"),
    )


# --- outcomes ---------------------------------------------------------------------------------------------------------
def outcome_section(report: Report) -> Section:
    """Return the section about successful sessions and others; its small table is made by `outcomes_table`."""
    charts = [_by_intent(report.outcomes_by_intent)] if report.outcomes_by_intent else []
    return Section(
        "outcomes",
        "Successful or not",
        charts,
        "turntrace demo has sessions that end as completed; turn.set_intent(...) says what users want.",
        (
            "The outcome of a session that has ended is decided by the first of these that is known. Feedback: a mean "
            "of at least 0.5 is success. The journey that it took the last step of: converted is success. Its end: "
            "completed is success, error is not. A drop-off is not. Of all others it is unknown, "
            "and of those that are open.",
        ),
    )


def outcomes_table(outcomes: Sequence[Outcome]) -> Table:
    """Return the table that compares successful sessions with others."""
    columns = ("mean of a session", *(visible(each.outcome) for each in outcomes))
    of_sessions = sum(each.n for each in outcomes)

    def row(name: str, write: "Sequence[str]") -> tuple[str, ...]:
        return (name, *write)

    def share(part: int, whole: int) -> str:
        return f"{count(part)} ({percent(part / whole)})" if whole else count(part)

    rows = [
        row("sessions (n)", [share(each.n, of_sessions) for each in outcomes]),
        row("turns", [decimal(each.turns) for each in outcomes]),
        row("lasted", [duration(60_000 * each.minutes) for each in outcomes]),
        row("turn latency", [duration(each.latency_ms) for each in outcomes]),
        row("tokens", [count(each.tokens) for each in outcomes]),
        row("cost", [money(each.cost_usd) for each in outcomes]),
        row("failed turn", [share(each.with_errors, each.n) for each in outcomes]),
        row(f"failed turn, {BETWEEN}", [between(each.errors.interval) for each in outcomes]),
        row("pruned", [share(each.with_prunings, each.n) for each in outcomes]),
        row(f"pruned, {BETWEEN}", [between(each.pruned.interval) for each in outcomes]),
        row("feedback given", [share(each.with_feedback, each.n) for each in outcomes]),
        row("mean feedback", [percent(each.satisfaction) for each in outcomes]),
    ]
    return Table(columns, rows)


def _by_intent(found: Sequence[IntentOutcome]) -> Chart:
    shown = first_ones(found)
    names = [each.intent for each in shown]
    full = of_names(names)
    rates = [f" ({percent(each.rate)} of those known)" for each in shown]
    parts = (
        ("successful", [each.successful for each in shown], BLUE, rates),
        ("unsuccessful", [each.unsuccessful for each in shown], ORANGE, None),
        ("unknown", [each.unknown for each in shown], GRAY, None),
    )
    data = []
    for name, values, color, beside in parts:
        hover = f"%{{hovertext}}: %{{x:,}} {name}" + ("" if beside is None else "%{customdata}")
        more = {} if beside is None else {"customdata": beside}
        data.append(lying(name, values, color, hover, hovertext=full, **more))
    rows = [
        (
            visible(each.intent),
            count(each.successful),
            count(each.unsuccessful),
            count(each.unknown),
            count(each.n),
            percent(each.rate),
            between(each.interval),
        )
        for each in found
    ]
    return Chart(
        "outcome-by-intent",
        "Outcome by intent",
        "Each bar is the sessions in which users wanted this, in any turn: blue came out well, orange did not, of gray "
        "nobody knows.",
        [
            Plot(
                data,
                lying_layout(names, "sessions", most=max(each.n + each.unknown for each in shown), barmode="stack"),
            )
        ],
        Table(("intent", "successful", "unsuccessful", "unknown", "n known", "success rate", BETWEEN), rows),
        left_out(found, "intents"),
        is_wide=True,
    )
