"""The report in a real browser: it draws the ledger's numbers without a network, and nothing goes wrong."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from sqlalchemy import delete, update

from test_report import DAY, MONDAY, NASTY, NOW, Synthetic, nasty, served
from turntrace.analytics import Filters
from turntrace.ledger import Ledger
from turntrace.ledger.tables import sessions, turns
from turntrace.report import LangfusePlace, Report, collect, render, write_report
from turntrace.report.words import shortened

SCREENSHOTS = os.environ.get("TURNTRACE_SCREENSHOTS")  # the tests take it out of the environment
CHROMIUM = shutil.which("chromium")
PHONE, DESK = 390, 1440
PLACE = LangfusePlace("https://langfuse.example.com", "project")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        reason = "there is no chromium on the PATH"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM)
        yield running
        running.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def ledger(folder: Path) -> Iterator[Ledger]:
    opened = Ledger(f"sqlite:///{folder / 'ledger.db'}")
    Synthetic().write(opened)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def report(ledger: Ledger, folder: Path) -> Report:
    return write_report(ledger, folder / "report.html", langfuse=PLACE, now_ns=NOW)


@pytest.fixture(scope="module")
def address(report: Report, folder: Path) -> str:
    return (folder / "report.html").as_uri()


@contextmanager
def opened(browser: Browser, address: str, *, width: int = DESK, errors: bool = False, **more: Any) -> Iterator[Page]:
    """Open an address as a person would; nothing may be logged, asked of a network or go wrong."""
    settings = {"offline": address.startswith("file:"), "color_scheme": "light", **more}
    context: BrowserContext = browser.new_context(viewport={"width": width, "height": 900}, **settings)
    page, wrong = context.new_page(), list[str]()
    page.on("console", lambda message: wrong.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: wrong.append(f"request: {request.url}") if _is_other(request.url) else None)

    def _is_other(url: str) -> bool:
        return urlsplit(url)[:2] != urlsplit(address)[:2] and not url.startswith(("data:", "blob:"))

    try:
        page.goto(address)
        if more.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
        yield page
        assert wrong == [] or errors, wrong
    finally:
        context.close()


def picture(page: Page, folder: Path, name: str) -> None:
    """Keep a picture of a whole page, for a person to look at."""
    for place in filter(None, (str(folder), SCREENSHOTS)):
        Path(place).mkdir(parents=True, exist_ok=True)
        path = Path(place) / f"{name}.png"
        page.screenshot(path=path, full_page=True)
        assert path.stat().st_size > 10_000


def is_too_wide(page: Page) -> bool:
    wide: bool = page.evaluate("document.scrollingElement.scrollWidth > innerWidth")
    return wide


def data_of(page: Page, chart: str, plot: int = 0) -> list[dict[str, Any]]:
    """Return the traces that plotly has of a chart."""
    read = """id => document.getElementById(id).data.map(
        trace => ({name: trace.name, x: trace.x, y: trace.y, z: trace.z, customdata: trace.customdata,
                   color: trace.marker?.color}))"""
    found: list[dict[str, Any]] = page.evaluate(read, f"plot-{chart}-{plot}")
    return found


# --- it opens ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_opens_without_a_network_or_an_error(
    browser: Browser, address: str, folder: Path, width: int, scheme: str
) -> None:
    with opened(browser, address, width=width, color_scheme=scheme, has_touch=width == PHONE) as page:
        assert not is_too_wide(page)
        assert page.locator(".plot .main-svg").first.is_visible()
        drawn = page.evaluate("[...document.querySelectorAll('.plot')].map(each => each.data.length)")
        assert len(drawn) == 28
        assert all(drawn)
        picture(page, folder, f"report-{width}-{scheme}")
        for details in page.locator(".card > details").all():
            details.locator("summary").click()
        assert not is_too_wide(page)
        if scheme == "light":
            picture(page, folder, f"report-{width}-tables")


def test_the_charts_hold_the_numbers_of_the_ledger(browser: Browser, address: str, report: Report) -> None:
    with opened(browser, address) as page:
        sessions, dropoffs, _ = data_of(page, "sessions-over-time")
        began = {day: n for day, n in zip(sessions["x"], sessions["y"], strict=True) if n}
        assert began == {day.day: day.sessions for day in report.days}
        assert sum(dropoffs["y"]) == report.totals.dropoffs
        by_name = {trace["name"]: trace for trace in data_of(page, "latency-by-turn")}
        for name in ("p50", "p95", "p99"):
            assert by_name[name]["y"] == [getattr(each, name) / 1000 for each in report.latency[1:]]
        assert by_name["p50"]["customdata"] == [each.n for each in report.latency[1:]]
        [cost] = data_of(page, "usage-by-model", 1)
        assert cost["x"] == [each.cost_usd for each in report.usage_by_model]
        [journey] = data_of(page, "journey-1")
        assert journey["x"] == [*(stage.reached for stage in report.funnels[0].stages), report.funnels[0].converted]
        [heat] = data_of(page, "retention-by-week")
        assert heat["customdata"][0][:2] == [report.retention[0].users, report.retention[0].active[1]]


def test_a_chart_can_be_hovered_and_zoomed(browser: Browser, address: str, report: Report) -> None:
    with opened(browser, address) as page:
        chart = page.locator("#plot-latency-by-turn-0")
        chart.scroll_into_view_if_needed()
        box = chart.locator(".nsewdrag").first.bounding_box()
        assert box is not None
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + 3, middle)
        page.mouse.move(box["x"] + 12, middle, steps=5)
        shown = chart.locator(".hoverlayer")
        expect(shown).to_contain_text(f"p50: {report.latency[1].p50 / 1000:g} s")
        expect(shown).to_contain_text(f"({report.latency[1].n} turns)")
        before = page.evaluate("document.getElementById('plot-latency-by-turn-0').layout.xaxis.range")
        page.mouse.move(box["x"] + 50, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + 250, middle, steps=10)
        page.mouse.up()
        after = page.evaluate("document.getElementById('plot-latency-by-turn-0').layout.xaxis.range")
        assert after[1] - after[0] < (before[1] - before[0]) / 2


def test_its_buttons_send_nothing_anywhere(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        titles = page.eval_on_selector_all(".modebar-btn", "all => [...new Set(all.map(each => each.dataset.title))]")
        assert len(titles) == 6, titles
        assert not [title for title in titles if re.search("cloud|share|edit|studio|upload", title, re.IGNORECASE)]
        chart = page.locator("#plot-session-turns-0")
        chart.scroll_into_view_if_needed()
        chart.hover()
        with page.expect_download() as saved:  # a chart can be kept as a picture, which the policy lets be
            chart.locator("[data-title^='Download']").click()
        assert saved.value.suggested_filename.endswith(".png")


COVERED = """() => [...document.querySelectorAll('.plot')].flatMap(plot => {
    const [bar] = plot.querySelectorAll('.modebar');
    const covers = bar.getBoundingClientRect();
    const drawn = [...plot.querySelectorAll('text, .legend, .point path')];
    const written = [...plot.closest('.card').querySelectorAll('h3, .reading, .plot-title')].map(each => {
        const range = document.createRange();
        range.selectNodeContents(each);
        return range;
    });
    return [...drawn, ...written].filter(each => [...each.getClientRects()].some(box =>
        box.width && box.left < covers.right && box.right > covers.left && box.top < covers.bottom
        && box.bottom > covers.top)).map(each => `${plot.id}: ${each.textContent ?? each}`);
})"""


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_its_buttons_show_while_a_mouse_rests_on_a_chart_and_cover_nothing(
    browser: Browser, address: str, width: int
) -> None:
    with opened(browser, address, width=width) as page:
        assert page.evaluate(COVERED) == []
        chart = page.locator("#plot-journey-1-0")
        group = chart.locator(".modebar-group").first
        assert group.evaluate("each => getComputedStyle(each).opacity") == "0"
        chart.scroll_into_view_if_needed()
        chart.hover()
        expect(group).to_have_css("opacity", "1")
        box = group.bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 10, box["y"] + 5, steps=20)
        expect(group).to_have_css("opacity", "1")


def test_on_a_touch_screen_charts_have_no_buttons(browser: Browser, address: str) -> None:
    with opened(browser, address, width=PHONE, has_touch=True, is_mobile=True) as page:
        assert page.locator(".plot .main-svg").count() > 28
        assert page.locator(".modebar-btn").count() == 0


TOUCHING = """() => [...document.querySelectorAll('.plot')].flatMap(plot => ['x', 'y'].flatMap(axis => {
    const boxes = [...plot.querySelectorAll(`.${axis}tick text`)].map(each => each.getBoundingClientRect());
    const [from, to, least] = axis === 'x' ? ['left', 'right', 6] : ['top', 'bottom', 0];
    boxes.sort((one, other) => one[from] - other[from]);
    const touch = boxes.some((box, at) => at && box[from] - boxes[at - 1][to] < least);
    return touch ? [`${plot.id} ${axis}`] : [];
}))"""


@pytest.mark.parametrize("width", [PHONE, 1100, DESK])
def test_labels_of_ticks_do_not_touch(browser: Browser, address: str, folder: Path, width: int) -> None:
    ledger = Ledger("sqlite://")
    cheap(ledger)
    write_report(ledger, folder / "cheap.html", now_ns=NOW)
    with opened(browser, address, width=width) as page:
        assert page.evaluate(TOUCHING) == []
    with opened(browser, (folder / "cheap.html").as_uri(), width=width) as page:
        assert page.evaluate(TOUCHING) == []
        labels = page.locator("#plot-usage-by-channel-1 .xtick text").all_text_contents()
        assert labels[0] == "$0"
        assert len(labels) >= 2
        picture(page, folder, f"cheap-{width}")


def test_a_window_that_grows_narrow_has_fewer_labels(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        for width in (760, PHONE, DESK):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(1_500)
            assert page.evaluate(TOUCHING) == [], width


def cheap(ledger: Ledger) -> None:
    """Write sessions that cost next to nothing, with few turns whose numbers are far apart."""
    synthetic = Synthetic(seed=3)
    with ledger.asking() as connection:
        engine = connection.engine
    synthetic.write(ledger, users=4)
    with engine.begin() as connection:
        keep = (1, 3, 4, 5, 31)
        connection.execute(delete(turns).where(turns.c.number.not_in(keep)))
        connection.execute(update(turns).values(cost_usd=turns.c.cost_usd / 10_000))
        connection.execute(update(sessions).values(total_cost_usd=sessions.c.total_cost_usd / 10_000))


def test_its_colours_follow_the_scheme_when_it_changes(browser: Browser, address: str) -> None:
    def colours(page: Page) -> tuple[str, str]:
        ground: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return ground, data_of(page, "session-turns")[0]["color"]

    with opened(browser, address) as page:
        light = colours(page)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function(
            "c => document.getElementById('plot-session-turns-0').data[0].marker.color !== c", arg=light[1]
        )
        dark = colours(page)
        assert light[0] != dark[0]
        page.emulate_media(color_scheme="light")
        page.wait_for_function(
            "c => document.getElementById('plot-session-turns-0').data[0].marker.color === c", arg=light[1]
        )


def test_it_is_light_and_narrow_on_paper(browser: Browser, address: str, folder: Path) -> None:
    with opened(browser, address, color_scheme="dark") as page:
        dark = data_of(page, "session-turns")[0]["color"]
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        assert data_of(page, "session-turns")[0]["color"] != dark
        assert page.evaluate("Math.max(...[...document.querySelectorAll('.main-svg')].map(e => e.clientWidth))") <= 640
        assert not page.locator("#table-filter").is_visible()
        page.set_viewport_size({"width": 720, "height": 900})
        assert not is_too_wide(page)
        picture(page, folder, "report-paper")
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert data_of(page, "session-turns")[0]["color"] == dark


def test_on_paper_no_heading_stands_alone_and_no_table_is_cut_off(browser: Browser, address: str) -> None:
    with opened(browser, address) as page:
        pdf = page.pdf(outline=True, tagged=True).decode("latin-1")
        found = re.findall(r"/Title \((.*?)\)\n/Dest \[(\d+) 0 R /XYZ \S+ (\S+) 0\]", pdf)
        places = {title.replace("\\", ""): (int(sheet), float(above)) for title, sheet, above in found}
        headings = [*zip(page.locator("h2, h3").all_inner_texts(), page.locator("h2, h3").all(), strict=True)]
        levels = [heading.evaluate("each => each.tagName") for _, heading in headings]
        assert levels.count("H2") == 10
        for (title, _), (below, _), level in zip(headings, headings[1:], levels, strict=False):
            sheet, above = places[title]
            assert above > 100, f"{title} stands at the foot of a page"
            if level == "H2":
                assert places[below][0] == sheet, f"{title} stands alone"
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 720, "height": 900})
        wide = "all => all.filter(each => each.scrollWidth > each.clientWidth).length"
        assert page.eval_on_selector_all(".sessions .scroll", wide) == 0


def test_without_scripts_the_tables_are_there(browser: Browser, address: str, report: Report) -> None:
    with opened(browser, address, java_script_enabled=False) as page:
        expect(page.locator("noscript .empty")).to_be_visible()
        page.locator("#latency-by-turn summary").click()
        expect(page.locator("#latency-by-turn table")).to_be_visible()
        assert page.locator("#latency-by-turn tbody tr").count() == len(report.latency)


def test_a_cell_of_retention_says_its_share_wherever_there_is_room(browser: Browser, address: str) -> None:
    texts = "#plot-retention-by-week-0 .heatmap-label"
    for width in (PHONE, DESK):
        with opened(browser, address, width=width) as page:
            assert page.locator(texts).first.text_content() == "100%"
    with opened(browser, address, width=300) as page:
        assert page.locator(texts).count() == 0
        assert page.locator("#plot-retention-by-week-0 .colorbar").count() == 1


# --- sessions ---------------------------------------------------------------------------------------------------------
def test_the_filter_of_the_tables_works(browser: Browser, address: str, report: Report) -> None:
    with opened(browser, address) as page:
        rows = page.locator(".sessions tbody tr:visible")
        assert rows.count() == 65
        shown = [
            *report.failing,
            *report.unsatisfied,
            *report.latest,
            *report.slowest,
            *report.dearest,
            *report.longest,
        ]
        page.select_option("#table-filter [name=channel]", "web")
        assert rows.count() == sum(session.channel == "web" for session in shown)
        page.select_option("#table-filter [name=end]", "inactive_timeout")
        silent = [each for each in shown if each.channel == "web" and each.end_reason == "inactive_timeout"]
        assert rows.count() == len(silent)
        expect(page.locator("#table-filter output")).to_have_text(f"{len(silent)} of 65 rows")
        page.select_option("#table-filter [name=channel]", "")
        page.select_option("#table-filter [name=end]", "")
        page.fill("#table-filter [name=text]", report.dearest[0].id[:12].upper())
        assert set(page.locator(".sessions tbody tr:visible th").all_inner_texts()) == {report.dearest[0].id[:8]}
        page.fill("#table-filter [name=text]", "nothing is called so")
        assert rows.count() == 0
        assert page.get_by_text("No session of this table matches.").locator("visible=true").count() == 6


def test_a_row_leads_to_langfuse_and_to_the_terminal(browser: Browser, address: str, report: Report) -> None:
    with opened(browser, address) as page:
        row = page.locator("#dearest tbody tr").first
        assert row.locator("a").get_attribute("href") == PLACE.session_url(report.dearest[0].id)
        command = row.locator("code")
        assert command.text_content() == f"turntrace show {report.dearest[0].id[:8]}"
        assert command.evaluate("code => code.scrollWidth <= code.clientWidth"), "all of it can be read"
        scrolled = page.locator("#dearest .scroll")
        assert scrolled.evaluate("each => each.scrollWidth <= each.clientWidth"), "no column is cut off"


def test_on_a_phone_rows_are_blocks_that_can_be_read(browser: Browser, address: str) -> None:
    with opened(browser, address, width=PHONE, has_touch=True) as page:
        assert page.locator("details.sessions[open]").count() == 1
        first = page.locator("#failing tbody tr").first
        box = first.bounding_box()
        assert box is not None
        assert box["width"] <= PHONE
        assert (
            first.evaluate("row => getComputedStyle(row.querySelector('td:nth-child(3)'), '::before').content")
            != "none"
        )


def test_on_a_phone_a_table_that_goes_on_has_a_shadow_and_breaks_no_word(browser: Browser, address: str) -> None:
    with opened(browser, address, width=PHONE, has_touch=True) as page:
        page.locator("#dropoff-by-reason summary").click()
        cell = page.locator("#dropoff-by-reason tbody th", has_text="inactive_timeout")
        assert cell.evaluate("each => each.clientHeight") < 40, "one line"
        page.locator("#usage-by-model summary").click()
        scrolled = page.locator("#usage-by-model .scroll")
        assert scrolled.evaluate("each => each.scrollWidth > each.clientWidth")
        background = scrolled.evaluate("each => getComputedStyle(each).background")
        assert background.count("linear-gradient") == 4
        assert background.count("local") == 2


# --- texts from outside -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_from_outside_runs_or_breaks_the_page(browser: Browser, folder: Path, width: int) -> None:
    ledger = Ledger("sqlite://")
    nasty(ledger)
    (folder / "nasty.html").write_text(render(collect(ledger, now_ns=NOW), langfuse=PLACE), encoding="utf-8")
    with opened(browser, (folder / "nasty.html").as_uri(), width=width) as page:
        assert not is_too_wide(page)
        assert page.locator("img, .plot a[href], .plot [onmouseover]").count() == 0
        labels = page.locator("#plot-dropoff-by-intent-0 .ytick text").all_text_contents()
        assert len(labels) == 12
        length = 26 if width == DESK else 16
        assert shortened(NASTY[2], length) in labels
        assert shortened(NASTY[5], length) in labels
        chart = page.locator("#plot-dropoff-by-intent-0")
        chart.scroll_into_view_if_needed()
        box = chart.locator(".nsewdrag").first.bounding_box()
        assert box is not None
        for row in range(12):  # what is shown on hovering is a text, too
            page.mouse.move(box["x"] + 20, box["y"] + (row + 0.5) * box["height"] / 12, steps=3)
            page.wait_for_timeout(60)
            assert chart.locator(".hoverlayer a, .hoverlayer tspan[style*='bold']").count() == 0
        picture(page, folder, f"nasty-{width}")
        page.fill("#table-filter [name=text]", "</script>")
        assert page.locator("#latest tbody tr:visible").count() == 1


def test_an_empty_ledger_is_a_page_too(browser: Browser, folder: Path) -> None:
    write_report(Ledger("sqlite://"), folder / "empty.html", now_ns=NOW)
    with opened(browser, (folder / "empty.html").as_uri(), width=PHONE) as page:
        assert page.get_by_text("There is nothing on record yet.").count() == 10
        assert not is_too_wide(page)
        picture(page, folder, "empty-390")


# --- served -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_form_of_the_served_page_works(browser: Browser, ledger: Ledger, folder: Path, width: int) -> None:
    with served(ledger, refresh_s=600) as server, opened(browser, server.url, width=width) as page:
        assert not is_too_wide(page)
        page.select_option("#filters [name=channel]", "web")
        page.select_option("#filters [name=end_reason]", "inactive_timeout")
        page.fill("#filters [name=since]", "2025-11-03T00:00")
        page.click("#filters button")
        page.wait_for_selector("html[data-ready]", state="attached")
        asked = parse_qs(urlsplit(page.url).query)
        assert asked == {"channel": ["web"], "end_reason": ["inactive_timeout"], "since": ["2025-11-03T00:00"]}
        wanted = Filters(channel="web", end_reason="inactive_timeout", since_ns=MONDAY + 21 * DAY)
        expected = collect(ledger, wanted, now_ns=NOW)
        assert page.locator(".tile .figure").first.text_content() == f"{expected.totals.sessions:,}" != "0"
        sessions, _, _ = data_of(page, "sessions-over-time")
        assert sum(sessions["y"]) == expected.totals.sessions
        assert page.input_value("#filters [name=channel]") == "web"
        picture(page, folder, f"served-{width}")
        page.click("#filters a")
        page.wait_for_selector("html[data-ready]", state="attached")
        assert page.locator(".tile .figure").first.text_content() == f"{collect(ledger, now_ns=NOW).totals.sessions:,}"


def test_the_served_page_loads_itself_again_and_keeps_what_was_set(browser: Browser, ledger: Ledger) -> None:
    with served(ledger, refresh_s=3) as server, opened(browser, server.url) as page:
        page.fill("#table-filter [name=text]", "web")
        page.locator("#latency-by-turn summary").click()
        page.evaluate("window.isOld = true")
        page.wait_for_function("() => !window.isOld && document.documentElement.dataset.ready", timeout=60_000)
        assert page.input_value("#table-filter [name=text]") == "web"
        assert page.locator("#latency-by-turn details").evaluate("each => each.open")
        page.uncheck("#refresh")
        page.evaluate("window.isOld = true")
        page.wait_for_timeout(4_000)
        assert page.evaluate("window.isOld")


def test_whoever_fills_in_the_form_is_not_disturbed(browser: Browser, ledger: Ledger) -> None:
    with served(ledger, refresh_s=600) as server, opened(browser, server.url) as page:
        assert page.is_checked("#refresh")
        page.fill("#filters [name=user]", "abc")
        assert not page.is_checked("#refresh")


def test_a_zoomed_chart_stops_the_refreshing(browser: Browser, ledger: Ledger) -> None:
    with served(ledger, refresh_s=600) as server, opened(browser, server.url) as page:
        page.evaluate("Plotly.relayout('plot-session-turns-0', {'xaxis.range[0]': 1, 'xaxis.range[1]': 5})")
        expect(page.locator("#refresh")).not_to_be_checked()
