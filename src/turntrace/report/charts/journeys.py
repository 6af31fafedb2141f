"""Journeys as funnels, and users who come back."""

from collections.abc import Sequence
from datetime import date
from typing import Final

from turntrace.analytics import Cohort, Funnel
from turntrace.report.collect import Report
from turntrace.report.figures import (
    BLUE,
    INK,
    SURFACE,
    Chart,
    Plot,
    Section,
    Table,
    layout,
    lying,
    lying_layout,
    named,
    of_names,
)
from turntrace.report.words import NONE, between, count, duration, percent, times, visible

_MOST_WEEKS: Final = 26
_LEAST_WEEKS: Final = 8


# --- journeys ---------------------------------------------------------------------------------------------------------
def journey_section(report: Report) -> Section:
    """Return the section about journeys."""
    charts = [_funnel(each, number) for number, each in enumerate(report.funnels, start=1)]
    return Section(
        "journeys",
        "Journeys",
        charts,
        "SessionTracker(journeys={...}) names the stages, and turn.journey(name).enter(stage) takes a step.",
    )


def _funnel(funnel: Funnel, number: int) -> Chart:
    names = [*(stage.stage for stage in funnel.stages), "converted"]
    values = [*(stage.reached for stage in funnel.stages), funnel.converted]
    shares = [percent(value / funnel.begun) if funnel.begun else "" for value in values]
    texts = [f"{count(value)} ({share})" for value, share in zip(values, shares, strict=True)]
    trace = lying(
        "users",
        values,
        BLUE,
        "%{hovertext}: %{x:,} users",
        hovertext=of_names(names),
        text=texts,
        textposition="auto",
        textangle=0,
    )
    rows = []
    before = funnel.begun
    for stage in funnel.stages:
        kept = percent(stage.reached / before) if before else percent(None)
        of_begun = percent(stage.reached / funnel.begun) if funnel.begun else percent(None)
        stayed = duration(stage.stayed_p50_ms)
        reached, entered = count(stage.reached), count(stage.entered)
        rows.append((visible(stage.stage), reached, entered, of_begun, kept, stayed, count(stage.left)))
        before = stage.reached
    kept = percent(funnel.converted / before) if before else percent(None)
    rows.append(("converted", count(funnel.converted), NONE, percent(funnel.rate), kept, NONE, NONE))
    looks = lying_layout(names, "users", most=max(values), showlegend=False)
    return Chart(
        f"journey-{number}",
        f"Journey: {visible(funnel.name)}",
        f"Each bar is those of the {times(funnel.begun, 'user')} on this journey who entered a stage or a later one; "
        "where a bar is much shorter than the one above, users stop.",
        [Plot([trace], looks)],
        Table(("stage", "came so far", "entered it", "of all", "of the stage before", "median stay", "moved on"), rows),
        note=_converted(funnel),
    )


def _converted(funnel: Funnel) -> str:
    if not funnel.converted:
        return "Nobody was converted."
    words = f"{percent(funnel.rate)} were converted (95% between {between(funnel.interval)}), "
    words += f"half of them within {duration(funnel.conversion_p50_ms)}"
    if funnel.conversion_turns_p50 is not None:
        words += f" and by turn {funnel.conversion_turns_p50:,} of a conversation"
    return f"{words}. Users who are not known count by their session."


# --- retention --------------------------------------------------------------------------------------------------------
def retention_section(report: Report) -> Section:
    """Return the section about users who come back."""
    charts = [_retention(report.retention)] if report.retention else []
    return Section(
        "retention", "Retention", charts, "Sessions with a user_id show up here, as those of turntrace demo."
    )


def _retention(cohorts: Sequence[Cohort]) -> Chart:
    weeks = range(1 + max(cohort.observed for cohort in cohorts))
    rows = []
    for cohort in cohorts:
        cells = [
            f"{percent(cohort.rate(w))} ({cohort.active.get(w, 0):,})" if w <= cohort.observed else "" for w in weeks
        ]
        rows.append((cohort.week, count(cohort.users), *cells))
    shown = cohorts[-_MOST_WEEKS:]
    columns = range(min(len(weeks), _MOST_WEEKS))
    shares = [[100 * c.rate(w) if w <= c.observed else None for w in columns] for c in shown]
    active = [[c.active.get(w, 0) for w in columns] for c in shown]
    trace = {
        "type": "heatmap",
        "x": list(columns),
        "y": list(range(len(shown))),
        "z": shares,
        "customdata": active,
        "zmin": 0,
        "zmax": 100,
        "xgap": 2,
        "ygap": 2,
        "hoverongaps": False,
        "colorscale": [[0, "var(--heat-0)"], [1, "var(--heat-1)"]],
        "colorbar": {"ticksuffix": "%", "thickness": 10, "outlinewidth": 0, "tickvals": [0, 50, 100], "len": 0.9},
        "showscale": False,
        "text": [["" if share is None else f"{share:.0f}%" for share in row] for row in shares],
        "texttemplate": "%{text}",
        "textfont": {"size": 11},
        "hovertemplate": "%{x} weeks later: %{customdata:,} users, %{z:.0f}%<extra></extra>",
    }
    names = [f"{_day(c.week)} ({c.users:,})" for c in shown]
    looks = layout(
        height=90 + 30 * len(shown),
        xaxis=named([str(w) for w in columns], title={"text": "weeks later", "font": {"size": 12}}, side="bottom"),
        yaxis=named(names, autorange="reversed", fixedrange=True),
        hoverlabel={"bgcolor": SURFACE, "font": {"color": INK}, "align": "left"},
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        meta={"names": [_day(c.week) for c in shown]},  # for a phone
    )
    looks["xaxis"]["range"] = [-0.5, max(len(columns), _LEAST_WEEKS) - 0.5]  # so that few weeks do not grow wide
    if len(columns) > 12:
        looks["xaxis"] |= {"tickvals": list(columns)[::4], "ticktext": [str(w) for w in columns][::4]}
    return Chart(
        "retention-by-week",
        "Retention by weekly cohort",
        "Each row is the users whose first session was in the week from a Monday (how many), each cell those of them "
        "who had a session so many weeks later; rows that stay strong in colour to the right are users who come back.",
        [Plot([trace], looks)],
        Table(("week from", "users", *(f"week {w}" for w in weeks)), rows),
        note=_retention_note(cohorts, len(weeks)),
        is_wide=True,
    )


def _day(week: str) -> str:
    monday = date.fromisoformat(week)
    return f"{monday:%b} {monday.day}, {monday.year}"


def _retention_note(cohorts: Sequence[Cohort], weeks: int) -> str:
    if weeks == 1:
        return "Who comes back is seen from the second week on."
    shown = f"The chart shows the last {_MOST_WEEKS} weeks. " if len(cohorts) > _MOST_WEEKS else ""
    return f"{shown}The newest week of each row may not be over yet."
