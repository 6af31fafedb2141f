"""Turns that failed or were abandoned."""

from collections.abc import Sequence

from turntrace.analytics import ErrorsAt, ErrorsAtStep, Rate, TurnErrors
from turntrace.report.charts.exchanges import number_of_turn, turn_axis
from turntrace.report.collect import Report
from turntrace.report.figures import (
    FEW,
    GRAY,
    MUTED,
    NOTHING,
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
    layout,
    left_out,
    line,
    lying,
    lying_layout,
    of_names,
    titled,
    whole,
    without_gaps,
)
from turntrace.report.words import between, count, percent, times, visible

_UNKNOWN = "not known"
_BETWEEN = "95% between"
_KINDS = {"generation": "model", "chain": "node", "agent": "graph"}
_MOST_WHISKERS = 31


def errors_section(report: Report) -> Section:
    """Return the section about turns that failed or were abandoned."""
    found = report.errors
    charts = []
    if found.all.times:
        charts = [_by_day(found.by_day), _by_turn(found.by_turn), _by_class(found.by_class)]
        if any(each.at for each in found.by_intent):
            charts.append(_by_intent(found.by_intent))
        if found.by_step:
            charts.append(_by_step(found))
    nothing = "No errors." if found.all.turns else NOTHING
    return Section("errors", "Errors", charts, _none(found.all), _intro(found.all), nothing)


def _none(every: ErrorsAt) -> str:
    if not every.turns:
        return "No turn has ended yet."
    return f"Of {times(every.turns, 'turn')} none failed or was abandoned (95%: {between(every.rate.interval)} do)."


def _intro(every: ErrorsAt) -> Sequence[str]:
    return (
        f"{percent(every.rate.value, 1)} of {times(every.turns, 'turn')} failed or were abandoned ({_BETWEEN} "
        f"{between(every.rate.interval)}): an error ended {every.failed:,} (failed), and nobody ended "
        f"{every.abandoned:,} (abandoned), since the process died, the caller went away or nobody answered. A step "
        "that was tried again with success is not in it.",
    )


def _known(rate: Rate) -> str:
    return f"{percent(rate.value, 1)} of {times(rate.n, 'turn')}, {_BETWEEN} {between(rate.interval)}"


def _table(of: str, found: Sequence[ErrorsAt], names: Sequence[str]) -> Table:
    rows = [
        (
            name,
            count(each.turns),
            count(each.failed),
            count(each.abandoned),
            percent(each.rate.value, 1),
            between(each.rate.interval),
        )
        for name, each in zip(names, found, strict=True)
    ]
    return Table((of, "turns", "failed", "abandoned", "rate", _BETWEEN), rows)


def _rates(found: Sequence[ErrorsAt]) -> list[float | None]:
    return [None if each.rate.value is None else round(100 * each.rate.value, 2) for each in found]


def _whiskers(found: Sequence[ErrorsAt]) -> Data:
    """Return the bounds of rates as whiskers: how far each is from its rate, in percent."""
    bounds = [(each.rate.value or 0.0, each.rate.interval or (0.0, 0.0)) for each in found]
    return {
        "type": "data",
        "symmetric": False,
        "array": [round(100 * (high - rate), 2) for rate, (_, high) in bounds],
        "arrayminus": [round(100 * (rate - low), 2) for rate, (low, _) in bounds],
        "color": MUTED,
        "thickness": 1,
        "width": 3,
        "visible": len(found) <= _MOST_WHISKERS,
    }


def _whisker(found: Sequence[ErrorsAt]) -> str:
    return ", its whisker where that lies with 95% confidence" if len(found) <= _MOST_WHISKERS else ""


# --- by day and by turn -----------------------------------------------------------------------------------------------
def _by_day(found: Sequence[ErrorsAt]) -> Chart:
    on = [each.at for each in found]
    days, width = day_axis(on, 6), day_width(on)
    counted = [bars("failed", on, [each.failed for each in found], ORANGE, "%{y:,} failed", width=width)]
    gone = [each.abandoned for each in found]
    if any(gone):
        counted.append(bars("abandoned", on, gone, GRAY, "%{y:,} abandoned", width=width))
    most = max(each.times for each in found)
    turns = titled("turns", nticks=6, **whole(most))
    share = line(
        *("rate", on, _rates(found), ORANGE, "%{text}"),
        n=[each.turns for each in found],
        text=[_known(each.rate) for each in found],
        error_y=_whiskers(found),
    )
    plots = [
        Plot(
            counted,
            layout(barmode="stack", hovermode="x unified", xaxis=days, yaxis=turns, showlegend=any(gone)),
            "Turns",
        ),
        Plot([share], layout(showlegend=False, xaxis=days, yaxis=_of_turns()), "Share of all turns"),
    ]
    return Chart(
        "errors-by-day",
        "Errors by day",
        "Each bar is the turns of the sessions that began on a day which failed or were abandoned, each point their "
        f"share of all turns{_whisker(found)}; a hollow point stands for fewer than {FEW} turns.",
        plots,
        _table("day", found, on),
        without_gaps(on),
        is_wide=True,
    )


def _of_turns() -> Data:
    return titled("of the turns", nticks=6, ticksuffix="%")


def _by_turn(found: Sequence[ErrorsAt]) -> Chart:
    numbers = [int(each.at) for each in found]
    known = [_known(each.rate) for each in found]
    trace = bars(
        *("rate", numbers, _rates(found), ORANGE, "turn %{x}: %{customdata}"),
        customdata=known,
        error_y=_whiskers(found),
        marker={"color": [ORANGE if each.turns >= FEW else GRAY for each in found]},
    )
    return Chart(
        "errors-by-turn",
        "Errors by turn number",
        "Each bar is the share of the turns with the same number in their conversation that failed or were "
        f"abandoned{_whisker(found)}; bars that rise say that long conversations break, and a gray one stands for "
        f"fewer than {FEW} turns.",
        [Plot([trace], layout(showlegend=False, xaxis=turn_axis(numbers), yaxis=_of_turns()))],
        _table("turn", found, [number_of_turn(number) for number in numbers]),
        is_wide=True,
    )


# --- by class, intent and step ----------------------------------------------------------------------------------------
def _by_class(found: Sequence[ErrorsAt]) -> Chart:
    shown = first_ones(found)
    names = [each.at for each in shown]
    full = of_names(names)
    failed = [each.failed for each in shown]
    known = [_known(each.rate) for each in shown]
    gone = [each.abandoned for each in shown]
    hover = "%{hovertext}: %{x:,} failed (%{customdata})"
    data = [lying("failed", failed, ORANGE, hover, hovertext=full, customdata=known)]
    if any(gone):
        hover = "%{hovertext}: %{x:,} abandoned (%{customdata})"
        data.append(lying("abandoned", gone, GRAY, hover, hovertext=full, customdata=known))
    most = max(each.times for each in shown)
    return Chart(
        "errors-by-class",
        "Errors by class",
        "Each bar is the turns that ended with an error of this class; the table has their share of all turns.",
        [Plot(data, lying_layout(names, "turns", most=most, barmode="stack", showlegend=any(gone)))],
        _table("class", found, [visible(each.at) or _UNKNOWN for each in found]),
        left_out(found, "classes"),
    )


def _by_intent(found: Sequence[ErrorsAt]) -> Chart:
    shown = first_ones(found)
    names = [each.at for each in shown]
    full = of_names(names)
    most = max(each.turns for each in shown)
    beside = {"text": [percent(each.rate.value, 1) for each in shown], "textposition": "outside"}
    hover = "%{hovertext}: %{x:,} failed or abandoned (%{customdata})"
    known = [_known(each.rate) for each in shown]
    data = [
        lying("turns", [each.turns for each in shown], SOFT, "%{hovertext}: %{x:,} turns", hovertext=full) | beside,
        lying("errors", [each.times for each in shown], ORANGE, hover, hovertext=full, customdata=known),
    ]
    looks = lying_layout(names, "turns", most=most, barmode="overlay")
    looks["xaxis"]["range"] = [0, 1.25 * most]  # room for the shares
    return Chart(
        "errors-by-intent",
        "Errors by intent",
        "Each bar is the turns in which users wanted this, its orange part those that failed or were abandoned, whose "
        "share stands beside.",
        [Plot(data, looks)],
        _table("intent", found, [visible(each.at) or _UNKNOWN for each in found]),
        left_out(found, "intents"),
    )


def _by_step(errors: TurnErrors) -> Chart:
    found = errors.by_step
    shown = first_ones(found)
    names = [each.name for each in shown]
    full = [f"{each.name} ({_kind(each)})" for each in shown]
    most = [f"{times(each.turns, 'turn')}, mostly {visible(each.error)}" for each in shown]
    hover = "%{hovertext}: %{customdata}"
    data = [lying("turns", [e.turns for e in shown], ORANGE, hover, hovertext=of_names(full))]
    data[0]["customdata"] = of_names(most)
    rows = []
    for each in found:
        rate = Rate(each.turns, errors.looked_into)
        share = (percent(rate.value, 1), between(rate.interval))
        rows.append((visible(each.name), _kind(each), visible(each.error), count(each.turns), *share))
    latest = "latest " if errors.all.times > errors.looked_into else ""
    return Chart(
        "errors-by-step",
        "Errors by step",
        "Each bar is the turns that failed or were abandoned in which this tool, model or node was the innermost step "
        "to end so: begin to look there.",
        [Plot(data, lying_layout(names, "turns", most=max(each.turns for each in shown), showlegend=False))],
        Table(
            ("step", "kind", "mostly", "turns", "of these turns", _BETWEEN),
            rows,
            texts=("kind", "mostly"),
        ),
        " ".join(filter(None, (left_out(found, "steps"), _of(latest, errors.looked_into)))),
    )


def _of(latest: str, looked_into: int) -> str:
    return (
        f"Of the {latest}{times(looked_into, 'turn')} that failed or {'was' if looked_into == 1 else 'were'} abandoned."
    )


def _kind(step: ErrorsAtStep) -> str:
    return _KINDS.get(step.kind, visible(step.kind))
