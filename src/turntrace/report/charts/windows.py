"""The context window: how full it is, what is pruned, and how good our counts are."""

from collections.abc import Callable, Sequence

from turntrace.analytics import ContextOfTurn, EstimateError, Prunings, WindowOfTurn
from turntrace.report.charts.exchanges import SAME, number_of_turn, quantile, turn_axis
from turntrace.report.collect import Report
from turntrace.report.figures import (
    BLUE,
    FEW,
    GRAY,
    MIDDLE,
    SOFT,
    Chart,
    Data,
    Plot,
    Section,
    Table,
    first_ones,
    layout,
    left_out,
    lying,
    lying_layout,
    of_names,
    titled,
    whole,
)
from turntrace.report.words import NONE, count, label, percent, visible


def window_section(report: Report) -> Section:
    """Return the section about the models' windows."""
    charts = []
    if report.context_tokens and report.windows:
        charts.append(_tokens(report.context_tokens, report.windows))
    elif report.windows:
        charts.append(_fill(report.windows))
    if report.prunings:
        charts.append(_prunings(report.prunings))
    if report.estimate_errors:
        charts.append(_errors(report.estimate_errors))
    return Section(
        "context",
        "Context window",
        charts,
        "It is known of calls of models whose window is known; a ContextTracker counts before a call, and prunes.",
    )


def _fill(windows: Sequence[WindowOfTurn]) -> Chart:
    rows = [
        (number_of_turn(e.number), count(e.n), percent(e.p50, 1), percent(e.p95, 1), percent(e.p99, 1)) for e in windows
    ]
    reading = (
        "Of the turns with the same number, half filled at most p50 of their model's window, 95 of 100 at most p95, 99 "
        f"of 100 at most p99; at 100% a call fails, and a hollow point stands for fewer than {FEW} turns."
    )
    return _by_turn(
        *("Context fill by turn number", reading, windows, rows),
        *(titled("of the window", nticks=6, ticksuffix="%"), "%{y:.1f}% full"),
        values=lambda name: [round(100 * getattr(each, name), 1) for each in windows],
    )


def _tokens(contexts: Sequence[ContextOfTurn], windows: Sequence[WindowOfTurn]) -> Chart:
    rows = [(number_of_turn(e.number), count(e.n), count(e.p50), count(e.p95), count(e.p99)) for e in contexts]
    most = max(each.p99 for each in windows)
    filled = f"at most {percent(most, 1)}" if most else "less than 0.1%"
    reading = (
        "Of the turns with the same number, half gave their model at most p50 tokens, 95 of 100 at most p95, 99 of 100 "
        f"at most p99, which is {filled} of the windows; a hollow point stands for fewer than {FEW} turns."
    )
    return _by_turn(
        *("Context by turn number, in tokens", reading, contexts, rows),
        *(titled("tokens", nticks=6, **whole(max(each.p99 for each in contexts))), "%{y:,} tokens"),
        values=lambda name: [getattr(each, name) for each in contexts],
    )


def _by_turn(
    title: str,
    reading: str,
    found: Sequence[WindowOfTurn] | Sequence[ContextOfTurn],
    rows: Sequence[Sequence[str]],
    values_axis: Data,
    hover: str,
    *,
    values: Callable[[str], list[float | None]],
) -> Chart:
    numbers, n = [each.number for each in found], [each.n for each in found]
    data = [
        quantile(name, numbers, values(name), f"{name}: {hover} (%{{customdata:,}} turns)", n)
        for name in ("p50", "p95", "p99")
    ]
    looks = layout(height=320, hovermode="x unified", xaxis=turn_axis(numbers), yaxis=values_axis)
    table = Table(("turn", "turns", "p50", "p95", "p99"), rows)
    return Chart("context-fill", title, reading, [Plot(data, looks)], table, SAME, is_wide=True)


def _prunings(found: Sequence[Prunings]) -> Chart:
    strategies = list(dict.fromkeys(each.strategy for each in found))
    names = list(first_ones(strategies))
    data = []
    for trigger, color in zip(dict.fromkeys(each.trigger for each in found), (BLUE, SOFT, GRAY, MIDDLE), strict=False):
        by_strategy = {each.strategy: each.decisions for each in found if each.trigger == trigger}
        values = [by_strategy.get(name, 0) for name in names]
        word = label(trigger)
        hover = f"%{{hovertext}}: %{{x:,}} decisions ({word})"
        data.append(lying(word, values, color, hover, hovertext=of_names(names)))
    rows = [
        (
            visible(each.strategy) or "not known",
            visible(each.trigger) or "not known",
            count(each.decisions),
            count(each.sessions),
            count(each.messages),
            count(each.tokens),
        )
        for each in found
    ]
    looks = lying_layout(
        names, "decisions that pruned", most=max(each.decisions for each in found), barmode="stack", showlegend=True
    )
    return Chart(
        "prunings",
        "Prunings by strategy",
        "Each bar is how often a strategy left messages out, its parts what made it: the threshold, the limit, or "
        "code outside of turntrace (external).",
        [Plot(data, looks)],
        Table(("strategy", "trigger", "decisions", "sessions", "messages", "tokens"), rows, texts=("trigger",)),
        left_out(strategies, "strategies"),
    )


def _errors(found: Sequence[EstimateError]) -> Chart:
    shown = first_ones(found)
    names = [each.model for each in shown]
    values = [None if each.error_pct is None else round(each.error_pct, 2) for each in shown]
    hover = "%{hovertext}: %{x:+.1f}%"
    data = [lying("error", values, BLUE, hover, hovertext=of_names(names))]
    rows = [
        (
            visible(each.model) or "not known",
            count(each.turns),
            count(each.counted),
            count(each.provided),
            NONE if each.error_pct is None else f"{each.error_pct:+.1f}%",
        )
        for each in found
    ]
    looks = lying_layout(names, "ours against the provider's", showlegend=False)
    looks["xaxis"] |= {"ticksuffix": "%", "zerolinecolor": "var(--muted)"}
    return Chart(
        "estimate-error",
        "Error of our token counts",
        "Each bar is how far our counts before the calls are from what the provider counted: right of zero we counted "
        "too much, left of it too little.",
        [Plot(data, looks)],
        Table(("model", "turns", "we counted", "provider counted", "error"), rows),
        left_out(found, "models"),
    )
