"""The report as one HTML file: its own style and scripts inside, and a policy that forbids it any network."""

import base64
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from importlib.metadata import version
from typing import Any, Final

from turntrace.analytics import ALL, SATISFIED, interval
from turntrace.errors import ConfigurationError
from turntrace.report.charts import sections
from turntrace.report.charts.endings import outcomes_table
from turntrace.report.collect import Report
from turntrace.report.figures import Chart, Section
from turntrace.report.filtering import applied, filter_form
from turntrace.report.langfuse import LangfusePlace
from turntrace.report.markup import Markup, element, joined, json_for_script, raw
from turntrace.report.tables import COLUMNS, OPEN, WITH_FEEDBACK, folded, session_table, table
from turntrace.report.words import between, count, duration, moment, money, percent, times, visible

TITLE: Final = "Sessions of the agent"
_NO_CHARTS: Final = "The charts need JavaScript; the tables below them hold the same figures."
_SESSION_TABLES: Final = (
    ("failing", "Sessions with failed turns", "Those that began last in which a turn failed.", COLUMNS),
    (
        "unsatisfied",
        "Least satisfied sessions",
        f"By the mean of their feedback, where that is below {percent(SATISFIED)}; the latest of equal ones first.",
        WITH_FEEDBACK,
    ),
    ("latest", "Latest sessions", "Those that began last.", COLUMNS),
    ("slowest", "Slowest sessions", "By the mean latency of a turn.", COLUMNS),
    ("dearest", "Dearest sessions", "By their cost.", COLUMNS),
    ("longest", "Longest sessions", "By the time from the first to the last activity.", COLUMNS),
)


def render(report: Report, *, langfuse: LangfusePlace | None = None, refresh_s: float | None = None) -> str:
    """Return the report as HTML.

    Args:
        report: The figures.
        langfuse: Where sessions are in Langfuse; None for no links.
        refresh_s: None for a file. For the page of `serve`, which has a form for the filters, seconds after which it
            loads itself again; 0 for never.

    Raises:
        ConfigurationError: If plotly is not installed.
    """
    parts = sections(report)
    figures = {
        f"plot-{chart.id}-{number}": {"data": plot.data, "layout": plot.layout}
        for part in parts
        for chart in part.charts
        for number, plot in enumerate(chart.plots)
    }
    scripts = _scripts(has_charts=bool(figures))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy(scripts, is_served=refresh_s is not None)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{TITLE} \N{MIDDLE DOT} turntrace"),
        element("link", rel="icon", href="data:,"),
        element("style", raw(_own("report.css"))),
    )
    body = element(
        "body",
        _header(report, parts, refresh_s),
        element(
            "main",
            element("noscript", element("p", _NO_CHARTS, class_="empty")),
            _tiles(report),
            *(_section(report, part) for part in parts),
            _sessions(report, langfuse),
        ),
        _footer(),
        element("script", json_for_script(figures), type="application/json", id="figures"),
        *(element("script", raw(script)) for script in scripts),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def policy(scripts: Sequence[str] | None = None, *, is_served: bool) -> str:
    """Return the page's content security policy: its own scripts, by their hashes, and nothing else.

    Args:
        scripts: The scripts of the page. Default: those of a page with charts.
        is_served: Whether it may send its form.

    Raises:
        ConfigurationError: If plotly is not installed.
    """
    scripts = _scripts(has_charts=True) if scripts is None else scripts
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    rules = (
        "default-src 'none'",
        f"script-src {hashes}",
        "style-src 'unsafe-inline'",  # plotly adds rules to the page as it draws
        "img-src data: blob:",  # a chart saved as a picture
        "base-uri 'none'",
        f"form-action {chr(39)}{'self' if is_served else 'none'}{chr(39)}",
    )
    return "; ".join(rules)


def _scripts(*, has_charts: bool) -> tuple[str, ...]:
    """Return the scripts of a page: plotly's, of some megabytes, only where there is something to draw."""
    plotly = _plotly_script()  # also where it is not needed: whether it is installed is said at once
    return (plotly, _own("report.js")) if has_charts else (_own("report.js"),)


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


@lru_cache(maxsize=2)
def _own(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _plotly_script() -> str:
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigurationError(
            "The charts of the report are drawn by plotly, which is not installed. "
            "Install it: pip install 'turntrace[report]'."
        ) from error
    return _fit_for_page(get_plotlyjs)


@lru_cache(maxsize=1)
def _fit_for_page(get_script: Any) -> str:
    """Return plotly's script as it can stand in a page: nothing in it ends the element."""
    script: str = get_script()
    return script.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


# --- the top ----------------------------------------------------------------------------------------------------------
def _header(report: Report, parts: Sequence[Section], refresh_s: float | None) -> Markup:
    made = element("time", moment(report.at_ns))
    links = [(part.id, part.title) for part in parts] + [("look-at", "Sessions to look at")]
    is_served = refresh_s is not None
    return element(
        "header",
        element("h1", TITLE),
        element("p", *_of(report), " Made ", made, "; all days and times are in UTC.", class_="about"),
        filter_form(report.filters, report.choices) if is_served else applied(report.filters),
        _refresh(refresh_s) if refresh_s else None,
        element(
            "nav",
            element("ul", *(element("li", element("a", title, href=f"#{an_id}")) for an_id, title in links)),
            aria_label="Sections",
        ),
    )


def _of(report: Report) -> Sequence[str]:
    total = report.totals
    if total.first_ns is None or total.last_ns is None:
        return ("No sessions.",)
    first, last = (element("time", moment(at)[:10]) for at in (total.first_ns, total.last_ns))
    days = ("on ", first) if first == last else ("from ", first, " to ", last)
    return (times(total.sessions, "session"), " ", *days, ".")


def _refresh(refresh_s: float) -> Markup:
    seconds = f"{refresh_s:g}"
    box = element("input", type="checkbox", id="refresh", checked=True, data_seconds=seconds)
    return element("p", element("label", box, f" Load again every {seconds} s", class_="refresh"))


def _footer() -> Markup:
    words = (
        f"Made by turntrace {version('turntrace')} from its ledger. Users are shown by the hash of their id; what they "
        "and the agent wrote is not in here."
    )
    return element("footer", element("p", words))


def _tiles(report: Report) -> Markup:
    total = report.totals
    sessions, turns = total.sessions, total.turns
    everything = next((each for each in report.latency if each.number == 0), None)
    satisfaction = (
        "no feedback yet"
        if not total.with_feedback
        else f"mean of {times(total.with_feedback, 'session')} with feedback"
    )
    tiles = (
        ("Sessions", count(sessions), f"{total.open:,} open"),
        ("Users", count(total.users), _each(sessions, total.users, "session", "user")),
        ("Turns", count(turns), f"{_each(turns, sessions, 'turn', 'session')}, {total.failed_turns:,} failed"),
        (
            "Turn latency, p50",
            duration(None if everything is None else everything.p50),
            "no turn yet" if everything is None else f"p95 {duration(everything.p95)}, p99 {duration(everything.p99)}",
        ),
        ("Tokens", count(total.tokens), f"{total.input_tokens:,} in, {total.output_tokens:,} out"),
        (
            "Cost",
            money(total.cost_usd),
            f"{money(total.cost_usd / sessions)} a session" if sessions else "no session yet",
        ),
        ("Drop-off rate", percent(total.dropoff_rate, 1), _dropoffs(report)),
        ("Satisfaction", percent(total.satisfaction), satisfaction),
    )
    return element(
        "dl",
        *(
            element(
                "div",
                element("dt", name),
                element("dd", figure, class_="figure"),
                element("dd", beside, class_="beside"),
                class_="tile",
            )
            for name, figure, beside in tiles
        ),
        class_="tiles",
        id="figures-at-a-glance",
    )


def _dropoffs(report: Report) -> str:
    total = report.totals
    if not total.ended:
        return "no session has ended"
    bounds = between(interval(total.dropoffs, total.ended))
    return f"{total.dropoffs:,} of {total.ended:,} that ended (95%: {bounds})"


def _each(part: int, whole: int, one: str, of: str) -> str:
    return f"{part / whole:,.1f} {one}s a {of}" if whole else f"no {of} yet"


# --- sections ---------------------------------------------------------------------------------------------------------
def _section(report: Report, section: Section) -> Markup:
    is_outcomes = section.id == "outcomes" and report.outcomes
    cards = [_card(chart, is_wide=is_wide) for chart, is_wide in _widths(section.charts)]
    if is_outcomes:
        compared = element(
            "div",
            element("h3", "Successful sessions and others"),
            element("p", "Each column is the sessions of one outcome, each figure the mean of one.", class_="reading"),
            element("div", table(outcomes_table(report.outcomes), "Outcomes"), class_="scroll", tabindex="0"),
            class_="card wide",
            id="outcomes-table",
        )
        cards.insert(0, compared)
    intro = [element("p", words, class_="intro") for words in section.intro] if cards else []
    return element(
        "section",
        element("h2", section.title, id=f"{section.id}-title"),
        *intro,
        element("div", *cards, class_="cards") if cards else _empty(report, f"{section.nothing} {section.empty}"),
        id=section.id,
        aria_labelledby=f"{section.id}-title",
    )


def _widths(charts: Sequence[Chart]) -> list[tuple[Chart, bool]]:
    """Return charts with whether they are wide: also those that have no other of half the width beside them."""
    found: list[tuple[Chart, bool]] = []
    has_left = False
    for number, chart in enumerate(charts):
        is_last = number + 1 == len(charts) or charts[number + 1].is_wide
        is_wide = chart.is_wide or (not has_left and is_last)
        has_left = not is_wide and not has_left
        found.append((chart, is_wide))
    return found


def _card(chart: Chart, *, is_wide: bool) -> Markup:
    plots = [
        element(
            "div",
            element("p", plot.title, class_="plot-title") if plot.title else None,
            element(
                "div",
                class_="plot",
                id=f"plot-{chart.id}-{number}",
                style=f"height:{plot.layout['height']}px",
                role="img",
                aria_label=": ".join(filter(None, ("Chart", chart.title, plot.title))) + ". A table follows.",
            ),
        )
        for number, plot in enumerate(chart.plots)
    ]
    return element(
        "section",
        element("h3", element("bdi", chart.title)),
        element("p", chart.reading, class_="reading"),
        element("div", *plots, class_="plots"),
        element("p", chart.note, class_="note") if chart.note else None,
        folded(chart.table, chart.title, chart.id),
        class_="card wide" if is_wide else "card",
        id=chart.id,
    )


def _empty(report: Report, hint: str) -> Markup:
    demo = element("code", "turntrace demo")
    if not report.is_empty:
        return element("p", hint, class_="empty")
    if report.filters != ALL:
        return element("p", "No session meets these filters. Leave some of them out.", class_="empty")
    return element(
        "p",
        "There is nothing on record yet. ",
        demo,
        " records five sessions; then make the report again.",
        class_="empty",
    )


# --- sessions to look at ----------------------------------------------------------------------------------------------
def _sessions(report: Report, langfuse: LangfusePlace | None) -> Markup:
    tables = [
        session_table(an_id, title, reading, found, langfuse, columns)
        for an_id, title, reading, columns in _SESSION_TABLES
        if (found := getattr(report, an_id)) or an_id == "latest"
    ]
    intro = "Look again in a terminal by the command of a row"
    intro += ", or follow the session's id to Langfuse." if langfuse else "."
    content = [element("p", intro, class_="intro"), _table_filter(report), *tables]
    return element(
        "section",
        element("h2", "Sessions to look at", id="look-at-title"),
        *(content if report.latest else [_empty(report, "")]),
        id="look-at",
        aria_labelledby="look-at-title",
    )


def _table_filter(report: Report) -> Markup:
    shown = [session for an_id, *_ in _SESSION_TABLES for session in getattr(report, an_id)]
    channels = sorted({visible(session.channel) for session in shown})
    ends = sorted({visible(session.end_reason or OPEN) for session in shown})
    return element(
        "div",
        element(
            "label",
            "Find in these tables",
            element("input", type="search", name="text", placeholder="id, user, intent"),
        ),
        element("label", "Channel", _choice("channel", channels)),
        element("label", "Ended by", _choice("end", ends)),
        joined(element("output", aria_live="polite")),
        class_="filters",
        id="table-filter",
        role="search",
    )


def _choice(name: str, values: Sequence[str]) -> Markup:
    options = (element("option", value, value=value) for value in values)
    return element("select", element("option", "any", value=""), *options, name=name)
