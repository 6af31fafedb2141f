"""Charts as what plotly's script draws: traces and layouts in plain dictionaries, colours by the page's variables."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Final

from turntrace.report.words import label

INK: Final = "var(--ink)"
MUTED: Final = "var(--muted)"
LINE: Final = "var(--line)"
SURFACE: Final = "var(--surface)"
BLUE: Final = "var(--blue)"
SOFT: Final = "var(--soft)"
MIDDLE: Final = "var(--middle)"
ORANGE: Final = "var(--orange)"
GRAY: Final = "var(--gray)"
"""The colours, told apart also by those who do not see red or green: blue for what is, orange for what went wrong or
took long."""

FEW: Final = 20
"""Points that stand for fewer are drawn hollow."""

NOTHING: Final = "Nothing of this is on record."
_DAY_WIDE_MS: Final = 65_000_000
_FEW_DAYS: Final = 8
_LONG_DAYS: Final = 31
_SPARSE: Final = 4
_BARS_MOST: Final = 15
_ROW_PX: Final = 30
_BARE_PX: Final = 10
_NARROW: Final = 16
_MANY: Final = 10_000
_FEW_NUMBERS: Final = 12
_CLOSE: Final = 16
Data = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes:
        columns: Names of its columns; the first one names the rows.
        rows: Its rows, as written.
        texts: Which columns, beside the first, hold texts rather than figures.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Plot:
    """What plotly draws.

    Attributes:
        data: The traces.
        layout: The layout.
        title: What it shows, where a chart has several.
    """

    data: Sequence[Data]
    layout: Data
    title: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of the report.

    Attributes:
        id: Its id in the page.
        title: What it shows.
        reading: One sentence that says how to read it.
        plots: What is drawn, side by side where there is room.
        table: What it was drawn from.
        note: What else must be known.
        is_wide: Whether it needs the whole width.
    """

    id: str
    title: str
    reading: str
    plots: Sequence[Plot]
    table: Table
    note: str = ""
    is_wide: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report.

    Attributes:
        id: Its id in the page.
        title: Its heading.
        charts: Its charts; none when there is nothing to draw.
        empty: What to do to see something here.
        intro: What is to be known of all of it.
        nothing: What is said before `empty`.
    """

    id: str
    title: str
    charts: Sequence[Chart]
    empty: str
    intro: Sequence[str] = field(default_factory=tuple)
    nothing: str = NOTHING


def unit_of_ms(most: float) -> tuple[str, float]:
    """Return the unit in which times up to this many milliseconds are drawn, and its length in milliseconds."""
    if most < 2_000:
        return "ms", 1.0
    return ("s", 1_000.0) if most < 600_000 else ("min", 60_000.0)


def in_unit(values: Sequence[float | None], length: float) -> list[float | None]:
    """Return times in a unit of so many milliseconds."""
    return [None if value is None else value if length == 1.0 else round(value / length, 3) for value in values]


_LEGEND: Final = {
    **{"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "top", "yref": "container"},
    "traceorder": "normal",
}
_LEGEND_PX: Final = 37
"""What plotly makes of a row of the legend; those beside it that have none begin at the same height."""
_BELOW_PX: Final = 44
"""The ticks and the title below lying bars."""


# --- layouts ----------------------------------------------------------------------------------------------------------
def layout(*, height: int = 300, **more: Any) -> Data:
    """Return a layout: calm, on the page's own ground, with the legend above."""
    base: Data = {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": _LEGEND_PX if more.get("showlegend", True) else _BARE_PX, "b": 8},
        "minreducedheight": _ROW_PX,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12, "color": MUTED},
        "legend": _LEGEND,
        "hoverlabel": {"bgcolor": SURFACE, "bordercolor": LINE, "font": {"color": INK}, "align": "left"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GRAY, "activecolor": INK},
        "bargap": 0.25,
    }
    return base | more


def axis(**more: Any) -> Data:
    """Return an axis for figures."""
    base = {"gridcolor": LINE, "linecolor": LINE, "zerolinecolor": LINE, "automargin": True, "rangemode": "tozero"}
    return {**base, "title": {"font": {"size": 12}}, **more}


def titled(text: str, **more: Any) -> Data:
    """Return an axis for figures with its title."""
    return axis(**more) | {"title": {"text": text, "font": {"size": 12}, "standoff": 8}}


def whole(most: float | None) -> Data:
    """Return how an axis of counts is written: by ones where there are few, never by halves, and many as 20k or 3M."""
    if most is None:
        return {}
    return {"dtick": 1, "tick0": 0} if most <= 5 else {"tickformat": ",d" if most < _MANY else "~s"}


def numbered(numbers: Sequence[int]) -> Data:
    """Return how an axis of numbers is written: each where they are few and close, else as there is room."""
    few = len(numbers) <= _FEW_NUMBERS and numbers[-1] - numbers[0] < _CLOSE
    return {"tickmode": "array", "tickvals": list(numbers)} if few else {"tickformat": ",d"}


def roomy(low: float, high: float, least: float) -> list[float]:
    """Return the range of an axis with at least so much on it, so that few bars do not grow wide."""
    return [low - 0.6, max(high, low + least - 1) + 0.6]


def named(names: Sequence[str], **more: Any) -> Data:
    """Return an axis for things with names: they stand at 0, 1, 2, ..., so that equal names stay apart."""
    ticks = {"ticks": "", "tickmode": "array", "tickvals": list(range(len(names))), "ticktext": list(names)}
    return axis(showgrid=False, rangemode="normal", zeroline=False) | ticks | more


def are_few_days(on: Sequence[str]) -> bool:
    """Tell whether days are so few, or so far from each other, that each stands in its own place, without the gaps."""
    length = (date.fromisoformat(on[-1]) - date.fromisoformat(on[0])).days + 1
    return len(on) <= _FEW_DAYS or (length > _LONG_DAYS and _SPARSE * len(on) < length)


def without_gaps(on: Sequence[str]) -> str:
    """Say that days are left out, where they are."""
    has_gaps = (date.fromisoformat(on[-1]) - date.fromisoformat(on[0])).days >= len(on)
    return "Days without a session are left out." if has_gaps and are_few_days(on) else ""


def day_axis(on: Sequence[str], most: int) -> Data:
    """Return an axis for days with at most so many labels; the last day has one where days are few."""
    shared = axis(showgrid=False, tickangle=0)
    if not are_few_days(on):
        return shared | {"type": "date", "hoverformat": "%a %Y-%m-%d", "nticks": most}
    step = -(-len(on) // most)
    shown = on[::-1][::step][::-1]
    texts, year = [], 0
    for day in map(date.fromisoformat, shown):
        texts.append(
            f"{day:%b} {day.day}" + ("" if day.year == year and day.isoformat() != on[-1] else f"<br>{day.year}")
        )
        year = day.year
    ticks = {"tickmode": "array", "tickvals": list(shown), "ticktext": texts, "rangemode": "normal"}
    return shared | {"type": "category", "range": roomy(0, len(on) - 1, 6)} | ticks


def day_width(on: Sequence[str]) -> float:
    """Return how wide the bar of a day is on its axis: three quarters of the day."""
    return 0.6 if are_few_days(on) else _DAY_WIDE_MS


# --- traces -----------------------------------------------------------------------------------------------------------
def line(name: str, x: Sequence[Any], y: Sequence[float | None], color: str, hover: str, **more: Any) -> Data:
    """Return a line with a point for each value."""
    n: Sequence[int] | None = more.pop("n", None)
    dash = more.pop("dash", "solid")
    trace: Data = {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= 120 else "lines",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": color, "width": 2, "dash": dash},
        "marker": {"color": color, "size": 6},
        "hovertemplate": f"{hover}<extra></extra>",
    }
    if n is not None:
        trace["customdata"] = list(n)
        symbols = ["circle" if each >= FEW else "circle-open" for each in n]
        trace["marker"] = {"color": color, "size": 6, "symbol": symbols}
    return trace | more


def bars(name: str, x: Sequence[Any], y: Sequence[float | None], color: str, hover: str, **more: Any) -> Data:
    """Return standing bars."""
    return {
        "type": "bar",
        "name": name,
        "x": list(x),
        "y": list(y),
        "marker": {"color": color},
        "hovertemplate": f"{hover}<extra></extra>",
    } | more


def lying(name: str, values: Sequence[float | None], color: str, hover: str, **more: Any) -> Data:
    """Return lying bars for things with names, which `named` puts beside them."""
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": list(range(len(values))),
        "x": list(values),
        "marker": {"color": color},
        "hovertemplate": f"{hover}<extra></extra>",
        "textposition": "auto",
        "cliponaxis": False,
        "insidetextfont": {"color": SURFACE},
    } | more


def lying_layout(names: Sequence[str], title: str, *, most: float | None = None, **more: Any) -> Data:
    """Return the layout of lying bars, the first one at the top; `most` is the largest number of what is counted."""
    above = _LEGEND_PX if more.get("showlegend", True) else _BARE_PX
    height = above + _ROW_PX * max(1, len(names)) + _BELOW_PX
    beside = named([label(name) for name in names], autorange="reversed", fixedrange=True)
    narrow = {"names": [label(name, length=_NARROW) for name in names]}  # for a phone
    return layout(
        height=height, xaxis=titled(title, nticks=6, tickangle=0, **whole(most)), yaxis=beside, meta=narrow, **more
    )


def of_names(names: Sequence[str], unknown: str = "not known") -> list[str]:
    """Return names for the boxes that are shown on hovering."""
    return [label(name, unknown, 60) for name in names]


def first_ones(rows: Sequence[Any]) -> Sequence[Any]:
    """Return as many as a chart of lying bars has; the table has all."""
    return rows[:_BARS_MOST]


def left_out(rows: Sequence[Any], what: str) -> str:
    """Say that the chart does not show all."""
    return f"The chart shows the first {_BARS_MOST} of {len(rows):,} {what}." if len(rows) > _BARS_MOST else ""
