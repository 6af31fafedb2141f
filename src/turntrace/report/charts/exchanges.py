"""How long turns take, and what they use."""

from collections.abc import Sequence

from turntrace.analytics import MOST_TURNS, LatencyOfTurn, Usage
from turntrace.report.collect import Report
from turntrace.report.figures import (
    BLUE,
    FEW,
    INK,
    MIDDLE,
    ORANGE,
    SOFT,
    Chart,
    Data,
    Plot,
    Section,
    Table,
    bars,
    day_axis,
    day_width,
    first_ones,
    in_unit,
    layout,
    left_out,
    line,
    lying,
    lying_layout,
    numbered,
    of_names,
    roomy,
    titled,
    unit_of_ms,
    whole,
    without_gaps,
)
from turntrace.report.words import count, duration, money, times, visible

_UNKNOWN = "not known"
_UNITS = {"ms": "milliseconds", "s": "seconds", "min": "minutes"}


# --- latency ----------------------------------------------------------------------------------------------------------
def latency_section(report: Report) -> Section:
    """Return the section about how long turns take."""
    by_number = [each for each in report.latency if each.number > 0]
    charts = [_latency(report.latency, by_number)] if by_number else []
    return Section("latency", "Latency", charts, "turntrace demo records some, and so does any turn that ends.")


def number_of_turn(number: int) -> str:
    """Write the number of a turn; those after `MOST_TURNS` are one."""
    return f"over {MOST_TURNS}" if number > MOST_TURNS else str(number)


def turn_axis(numbers: Sequence[int]) -> Data:
    """Return the axis for numbers of turns."""
    found = titled("turn of the conversation", showgrid=False, rangemode="normal", zeroline=False)
    found |= {"range": roomy(numbers[0], numbers[-1], 8), **numbered(numbers)}
    return found | {"labelalias": {str(MOST_TURNS + 1): f">{MOST_TURNS}"}}


SAME = "Of fewer than 100 turns p99 is the largest, and of fewer than 20 p95 is: then their lines are one."
_QUANTILES = {
    "p50": (BLUE, "solid", "circle", 9),
    "p95": (ORANGE, "dash", "square", 6),
    "p99": (INK, "dot", "circle", 4),
}


def quantile(name: str, x: Sequence[int], y: Sequence[float | None], hover: str, n: Sequence[int]) -> Data:
    """Return the line of a quantile: those of higher ones lie upon it and leave gaps, so equal ones are all seen."""
    color, dash, symbol, size = _QUANTILES[name]
    trace = line(name, x, y, color, hover, n=n, dash=dash)
    symbols = [symbol if each >= FEW else f"{symbol}-open" for each in n]
    return trace | {"marker": {"color": color, "size": size, "symbol": symbols}}


def _latency(all_turns: Sequence[LatencyOfTurn], by_number: Sequence[LatencyOfTurn]) -> Chart:
    numbers = [each.number for each in by_number]
    n = [each.n for each in by_number]
    unit, length = unit_of_ms(max(each.p99 for each in by_number))
    quantiles = {
        "p50": [e.p50 for e in by_number],
        "p95": [e.p95 for e in by_number],
        "p99": [e.p99 for e in by_number],
    }
    data = [quantile(name, numbers, in_unit(ms, length), _hover(name, unit), n) for name, ms in quantiles.items()]
    first_token = ""
    if any(each.streamed for each in by_number):
        first = in_unit([each.first_token_p50 for each in by_number], length)
        streamed = [each.streamed for each in by_number]
        hover = f"first token, p50: %{{y:,}} {unit} (%{{customdata:,}} streamed)"
        data.append(line("first token, p50", numbers, first, MIDDLE, hover, n=streamed, dash="dashdot"))
        first_token = " First token, p50: half of the turns that stream their answer had its first token by then."
    looks = layout(
        height=340,
        hovermode="x unified",
        xaxis=turn_axis(numbers),
        yaxis=titled(_UNITS[unit], nticks=7, tickformat=","),
    )
    names = ("turn", "turns", "p50", "p95", "p99", "streamed", "first token p50", "first token p95")
    rows = [
        (
            "all" if each.number == 0 else number_of_turn(each.number),
            count(each.n),
            duration(each.p50),
            duration(each.p95),
            duration(each.p99),
            count(each.streamed),
            duration(each.first_token_p50),
            duration(each.first_token_p95),
        )
        for each in all_turns
    ]
    return Chart(
        "latency-by-turn",
        "Turn latency by turn number",
        "Of the turns with the same number in their conversation, half took at most p50, 95 of 100 at most p95, 99 of "
        "100 at most p99; a line that rises says that long conversations get slow, and a hollow point stands for fewer "
        f"than {FEW} turns.",
        [Plot(data, looks)],
        Table(names, rows),
        note="The time that a turn waited for a person is not in it, nor are turns that were abandoned. "
        f"{SAME}{first_token}",
        is_wide=True,
    )


def _hover(name: str, unit: str) -> str:
    return f"{name}: %{{y:,}} {unit} (%{{customdata:,}} turns)"


# --- tokens and cost --------------------------------------------------------------------------------------------------
def usage_section(report: Report) -> Section:
    """Return the section about tokens and cost."""
    charts = []
    if any(each.input_tokens or each.output_tokens or each.cost_usd for each in report.usage_by_day):
        charts = [
            _by_day(report.usage_by_day),
            _by("model", report.usage_by_model, "the model that was called last in a turn", is_wide=True),
            _by("tier", report.usage_by_tier, "the user's tier", is_wide=False),
            _by("channel", report.usage_by_channel, "the session's channel", is_wide=False),
        ]
    unpriced = report.totals.unpriced_calls
    intro = [
        f"{times(unpriced, 'call')} of models without a known price {'is' if unpriced == 1 else 'are'} not in the cost."
    ]
    return Section(
        "usage",
        "Tokens and cost",
        charts,
        "turntrace demo has calls of a model; tokens are counted for every call whose provider counts them.",
        intro if charts and unpriced else (),
    )


def _table(of: str, usages: Sequence[Usage]) -> Table:
    rows = [
        (
            visible(each.of) or _UNKNOWN,
            count(each.turns),
            count(each.input_tokens),
            count(each.output_tokens),
            money(each.cost_usd),
            count(each.unpriced_calls),
        )
        for each in usages
    ]
    return Table((of, "turns", "input tokens", "output tokens", "cost", "calls without a price"), rows)


def _by_day(usages: Sequence[Usage]) -> Chart:
    on = [each.of for each in usages]
    days, width = day_axis(on, 6), day_width(on)
    tokens = [
        bars("input", on, [e.input_tokens for e in usages], BLUE, "%{y:,} tokens in", width=width),
        bars("output", on, [e.output_tokens for e in usages], SOFT, "%{y:,} tokens out", width=width),
    ]
    cost = [bars("cost", on, [each.cost_usd for each in usages], BLUE, "$%{y:,.4f}", width=width)]
    plots = [
        Plot(
            tokens,
            layout(
                barmode="stack",
                hovermode="x unified",
                xaxis=days,
                yaxis=titled("tokens", nticks=6, **whole(_most_tokens(usages))),
            ),
            "Tokens",
        ),
        Plot(
            cost,
            layout(hovermode="x unified", xaxis=days, showlegend=False, yaxis=titled("US dollars", **_dollars(usages))),
            "Cost",
        ),
    ]
    return Chart(
        "usage-by-day",
        "Tokens and cost by day",
        "Each bar is what the sessions that began on a day used, to their end: tokens that models were given and "
        "answered, and what that cost.",
        plots,
        _table("day", usages),
        without_gaps(on),
        is_wide=True,
    )


def _by(of: str, usages: Sequence[Usage], what: str, *, is_wide: bool) -> Chart:
    shown = first_ones(usages)
    names = [each.of for each in shown]
    full = of_names(names)
    tokens = [
        lying("input", [e.input_tokens for e in shown], BLUE, "%{hovertext}: %{x:,} tokens in", hovertext=full),
        lying("output", [e.output_tokens for e in shown], SOFT, "%{hovertext}: %{x:,} tokens out", hovertext=full),
    ]
    cost = [lying("cost", [each.cost_usd for each in shown], BLUE, "%{hovertext}: $%{x:,.4f}", hovertext=full)]
    tokens_looks = lying_layout(names, "tokens", most=_most_tokens(shown), barmode="stack")
    cost_looks = lying_layout(names, "US dollars", showlegend=False)
    cost_looks |= {name: tokens_looks[name] for name in ("height", "margin")}  # its bars are beside those of the tokens
    cost_looks["xaxis"] |= _dollars(usages)
    return Chart(
        f"usage-by-{of}",
        f"Tokens and cost by {of}",
        f"Each bar is what was used by {what}, the dearest first: tokens in and out, and what they cost.",
        [Plot(tokens, tokens_looks, "Tokens"), Plot(cost, cost_looks, "Cost")],
        _table(of, usages),
        left_out(usages, f"{of}s"),
        is_wide=is_wide,
    )


def _most_tokens(usages: Sequence[Usage]) -> int:
    return max((each.input_tokens + each.output_tokens for each in usages), default=0)


def _dollars(usages: Sequence[Usage]) -> Data:
    """Return how an axis of dollars is written: with cents only where they tell something."""
    most = max((each.cost_usd for each in usages), default=0.0)
    return {"nticks": 5, "tickprefix": "$", "tickformat": "," if most >= 5 else ",.2f" if most >= 0.1 else ",.2~r"}
