"""The tables of the report: behind each chart, and of sessions to look at."""

from collections.abc import Sequence
from typing import Final

from turntrace.report.figures import Table
from turntrace.report.langfuse import LangfusePlace
from turntrace.report.markup import Markup, element, joined
from turntrace.report.words import (
    beginning,
    count,
    duration,
    moment,
    money,
    percent,
    short_id,
    show_command,
    times,
    visible,
)
from turntrace.summaries import SessionSummary

OPEN: Final = "open"
_SHORT: Final = 24
COLUMNS: Final = (
    *("session", "began", "user", "channel", "turns", "failed"),
    *("tokens", "cost", "lasted", "mean turn", "ended", "look again"),
)
"""The columns of a table of sessions."""

WITH_FEEDBACK: Final = tuple("feedback" if name == "tokens" else name for name in COLUMNS)
"""The same with the mean of the feedback."""

_TEXTS: Final = ("began", "user", "channel", "ended", "look again")


def table(content: Table, caption: str) -> Markup:
    """Return a table: its first column names the rows, the others are figures."""
    texts = {number for number, name in enumerate(content.columns) if name in content.texts}
    head = [
        element("th", name, scope="col", class_="text" if number in texts else None)
        for number, name in enumerate(content.columns)
    ]
    rows = [
        element(
            "tr",
            element("th", element("bdi", row[0]), scope="row", class_="short" if len(row[0]) <= _SHORT else None),
            *(
                element("td", cell, class_="text" if number in texts else None)
                for number, cell in enumerate(row[1:], start=1)
            ),
        )
        for row in content.rows
    ]
    return element(
        "table",
        element("caption", caption, class_="unseen"),
        element("thead", element("tr", *head)),
        element("tbody", *rows),
    )


def folded(content: Table, caption: str, an_id: str) -> Markup:
    """Return a table that is folded away."""
    scrolled = element(
        "div", table(content, caption), class_="scroll", tabindex="0", role="region", aria_label=f"{caption}, table"
    )
    summary = element("summary", f"Table, {times(len(content.rows), 'row')}")
    return element("details", summary, scrolled, id=f"{an_id}-table")


# --- sessions ---------------------------------------------------------------------------------------------------------
def session_table(
    an_id: str,
    title: str,
    reading: str,
    sessions: Sequence[SessionSummary],
    langfuse: LangfusePlace | None,
    columns: Sequence[str] = COLUMNS,
) -> Markup:
    """Return sessions as a table, whose rows become blocks where there is no room."""
    head = [element("th", name, scope="col", class_="text" if name in _TEXTS else None) for name in columns]
    body = element(
        "table",
        element("caption", title, class_="unseen"),
        element("thead", element("tr", *head)),
        element("tbody", *(_row(session, langfuse, columns) for session in sessions)),
    )
    return element(
        "details",
        element("summary", element("h3", title)),
        element("p", reading, class_="reading"),
        element("div", body, class_="scroll"),
        element("p", "No session of this table matches.", class_="none note", hidden=True),
        id=an_id,
        class_="card sessions",
        open=True,
    )


def _row(session: SessionSummary, langfuse: LangfusePlace | None, columns: Sequence[str]) -> Markup:
    end = session.end_reason or OPEN
    texts = (session.id, session.user_id, session.channel, session.tier, session.org_id, end, session.last_intent)
    command = visible(show_command(beginning(session.id)))
    cells = {
        "began": moment(session.started_ns),
        "user": _user(session),
        "channel": element("bdi", visible(session.channel)),
        "turns": count(session.total_turns),
        "failed": _failed(session),
        "feedback": percent(session.user_satisfaction),
        "tokens": count(session.total_tokens),
        "cost": money(session.total_cost_usd),
        "lasted": duration(session.duration_ms),
        "mean turn": duration(session.avg_turn_latency_ms),
        "ended": _end(session, end),
        "look again": element("code", element("bdi", command), title=visible(session.id)),
    }
    return element(
        "tr",
        element("th", _session(session, langfuse), scope="row"),
        *(
            element("td", cells[name], class_="text" if name in _TEXTS else None, data_name=name)
            for name in columns[1:]
        ),
        data_text=" ".join(visible(text) for text in texts if text).lower(),
        data_channel=visible(session.channel),
        data_end=visible(end),
    )


def _session(session: SessionSummary, langfuse: LangfusePlace | None) -> Markup:
    words = element("bdi", short_id(session.id))
    if langfuse is None:
        return element("span", words, class_="id", title=visible(session.id))
    return element(
        "a",
        words,
        class_="id",
        href=langfuse.session_url(session.id),
        title=f"{visible(session.id)} in Langfuse",
        target="_blank",
        rel="noopener noreferrer",
    )


def _user(session: SessionSummary) -> Markup:
    if session.user_id is None:
        return joined("unknown")
    return element("span", element("bdi", short_id(session.user_id)), title=visible(session.user_id))


def _failed(session: SessionSummary) -> Markup:
    failed = count(session.failed_turns)
    return element("strong", failed, class_="wrong") if session.failed_turns else joined(failed)


def _end(session: SessionSummary, end: str) -> Markup:
    badge = element("span", "drop-off", class_="badge") if session.dropoff else None
    return joined(element("bdi", visible(end)), badge)
