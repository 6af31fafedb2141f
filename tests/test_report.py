"""The report without a browser: its figures are the ledger's, nothing from outside is markup, and it can be served."""

import base64
import hashlib
import http.client
import itertools
import json
import random
import re
import shlex
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest
from sqlalchemy import insert, update

import postgres
from turntrace import analytics
from turntrace.analytics import ALL, Choices, Filters
from turntrace.errors import ConfigurationError, LedgerError
from turntrace.ledger import Ledger
from turntrace.ledger.rows import steps_text
from turntrace.ledger.tables import conversations, decisions, journeys, sessions, stages, turn_steps, turns
from turntrace.records import Step
from turntrace.report import LangfusePlace, Report, ReportServer, collect, render, serve, write_report
from turntrace.report.figures import whole
from turntrace.report.filtering import applied, filter_form, filters_of
from turntrace.report.words import duration, label, money, shortened, show_command, visible

SECOND = 1_000_000_000
DAY = 86_400 * SECOND
MONDAY = 1_760_313_600 * SECOND  # 2025-10-13
NOW = MONDAY + 41 * DAY + 15 * 3600 * SECOND

CHANNELS = (("web", 5), ("mobile", 3), ("slack", 1), ("api", 1))
TIERS = (("free", 6), ("premium", 3), ("enterprise", 1))
MODELS = (("gpt-4o-mini", 6, 0.4), ("gpt-4o", 3, 6.0), ("claude-sonnet-4-5", 2, 8.0))
INTENTS = ("refund", "order_status", "shipping", "cancel_order", "change_address", "invoice", "complaint", "other")
STAGES = ("signup", "connect", "import", "first_answer")


class Synthetic:
    """Six weeks of a made-up app, the same at each run: written as rows, since it is what is asked that is tested."""

    def __init__(self, seed: int = 7) -> None:
        self.random = random.Random(seed)
        self.rows: dict[Any, list[dict[str, Any]]] = {
            table: [] for table in (sessions, conversations, turns, turn_steps, decisions, journeys, stages)
        }
        self.journeys: dict[str, dict[str, Any]] = {}

    def pick(self, weighted: Any) -> Any:
        return self.random.choices(weighted, [each[1] for each in weighted])[0]

    def write(self, ledger: Ledger, users: int = 150) -> None:
        for _ in range(users):
            self.user(f"{self.random.getrandbits(256):064x}", first_day=int(self.random.triangular(0, 41, 4)))
        with ledger.asking() as connection:
            engine = connection.engine
        with engine.begin() as connection:
            for table, rows in self.rows.items():
                if rows:
                    connection.execute(insert(table), rows)

    def user(self, user_id: str, first_day: int) -> None:
        tier, org, day = self.pick(TIERS)[0], self.random.choice(("acme", "globex", None)), float(first_day)
        comes_back, number = self.random.choice((0.3, 0.6, 0.85)), 0
        while day < 41.5:
            number += 1
            began = MONDAY + int(day) * DAY + self.random.randrange(6 * 3600, 22 * 3600) * SECOND
            if began > NOW:
                break
            self.session(user_id, tier, org, number, began)
            if self.random.random() > comes_back:
                break
            day += self.random.expovariate(1 / 6)

    def session(self, user_id: str, tier: str, org: str | None, number: int, began: int) -> None:
        rnd = self.random
        session_id, channel = f"{rnd.getrandbits(128):032x}", self.pick(CHANNELS)[0]
        model, _, price = self.pick(MODELS)
        conversation_id, topic = f"c-{session_id[:12]}", rnd.choice(("orders", "billing", "account"))
        length = min(60, 1 + int(rnd.expovariate(1 / 5)) + (rnd.randrange(20, 50) if rnd.random() < 0.05 else 0))
        at, mine, pruned = began, [], 0
        for turn_number in range(1, length + 1):
            turn = self.turn(session_id, conversation_id, turn_number, at, model, price, user_id)
            mine.append(turn)
            pruned += turn["prunings"]
            at = turn["ended_ns"] + int(rnd.expovariate(1 / 70)) * SECOND
            if at > NOW or (turn["status"] == "failed" and rnd.random() < 0.5):
                break
        last, is_open = mine[-1], NOW - mine[-1]["ended_ns"] < 7200 * SECOND
        asked = last["output_type"] == "question"
        action = "failed" if last["status"] == "failed" else "asked_question" if asked else "answered"
        silent = rnd.random() < (0.75 if action != "answered" else 0.35)
        reason = "inactive_timeout" if silent else rnd.choice(("completed", "completed", "user_exit", "handoff"))
        journey = self.journey(user_id, session_id, began, turn_number) if number <= 3 and channel != "api" else None
        given = rnd.random() < 0.3
        score = 0.0 if action == "failed" or rnd.random() < 0.2 else 1.0
        dropoff = silent and (action != "answered" or (journey is not None and not journey["converted_ns"]))
        self.rows[conversations].append(
            {
                "id": conversation_id,
                "session_id": session_id,
                "user_id": user_id,
                "topic": topic,
                "total_turns": len(mine),
                "started_ns": began,
                "last_activity_ns": last["ended_ns"],
            }
        )
        sums = ("tool_calls", "llm_calls", "input_tokens", "output_tokens", "unpriced_calls", "wait_ms")
        self.rows[sessions].append(
            {name: sum(turn[name] for turn in mine) for name in sums}
            | {
                "id": session_id,
                "user_id": user_id,
                "channel": channel,
                "type": "chat",
                "tier": tier,
                "org_id": org,
                "sessions_total": number,
                "started_ns": began,
                "last_activity_ns": last["ended_ns"],
                "ended_ns": None if is_open else last["ended_ns"] + 1800 * SECOND * silent,
                "end_reason": None if is_open else reason,
                "total_turns": len(mine),
                "failed_turns": sum(turn["status"] == "failed" for turn in mine),
                "total_cost_usd": sum(turn["cost_usd"] for turn in mine),
                "active_ms": sum(turn["latency_ms"] for turn in mine),
                "prunings": pruned,
                "feedback_sum": score if given else 0.0,
                "feedback_count": int(given),
                "dropoff": None if is_open else bool(dropoff),
                "last_turn": last["number"],
                "last_intent": last["intent"],
                "last_action": action,
                "journey_name": None if journey is None else "onboarding",
                "journey_converted": None if journey is None else journey["converted_ns"] is not None,
            }
        )

    def turn(
        self, session_id: str, conversation_id: str, number: int, at: int, model: str, price: float, user_id: str
    ) -> dict[str, Any]:
        rnd = self.random
        tokens = 400 + 310 * number + rnd.randrange(300)
        limit = 16_000
        prunes = tokens > 0.8 * limit
        known = f"{session_id[:20]}{number:012x}"
        if prunes:
            self.rows[decisions].append(
                {
                    "turn_id": known,
                    "session_id": session_id,
                    "conversation_id": conversation_id,
                    "turn_number": number,
                    "at_ns": at,
                    "trigger": rnd.choice(("threshold", "threshold", "limit")),
                    "strategy": rnd.choice(("DropOldestTurns", "ClearToolResults", "Summarize")),
                    "tokenizer": "o200k_base",
                    "model": model,
                    "limit": limit,
                    "tokens_before": tokens,
                    "tokens_after": int(0.6 * limit),
                    "messages_before": 2 * number,
                    "messages_after": number,
                    "messages_pruned": number,
                    "duration_us": 900,
                }
            )
            tokens = int(0.6 * limit) + rnd.randrange(2000)
        latency = int(rnd.lognormvariate(6.6, 0.45) * (1 + number / 12) * (1.6 if model != "gpt-4o-mini" else 1))
        output = rnd.randrange(40, 400)
        failed = rnd.random() < 0.03
        error = ("TimeoutError", "ValueError", "RateLimitError")[number % 3] if failed else None
        row: dict[str, Any] = {
            "id": known,
            "conversation_id": conversation_id,
            "number": number,
            "session_id": session_id,
            "user_id": user_id,
            "status": "failed" if failed else "completed",
            "started_ns": at,
            "ended_ns": at + latency * 1_000_000,
            "trace_id": known,
            "root_span_id": known[:16],
            "role": "user",
            "output_type": rnd.choice(("answer", "answer", "question")),
            "intent": rnd.choices(INTENTS, (8, 6, 4, 3, 2, 2, 2, 1))[0],
            "agent_runs": 1,
            "tool_calls": rnd.randrange(3),
            "llm_calls": 1,
            "input_tokens": tokens,
            "output_tokens": output,
            "cost_usd": price * (tokens + 4 * output) / 1e6,
            "unpriced_calls": 0,
            "latency_ms": latency,
            "wait_ms": 0,
            "time_to_first_token_ms": latency // 3 if rnd.random() < 0.7 else None,
            "model": model,
            "error": error,
            "context_tokens": tokens,
            "context_limit": limit,
            "prunings": int(prunes),
            "counted_tokens": int(tokens * {"gpt-4o": 1.001, "gpt-4o-mini": 0.998}.get(model, 1.06)),
            "counted_of_tokens": tokens,
        }
        self.rows[turns].append(row)
        steps = steps_text(_steps(latency, error, model if number % 2 else None))
        self.rows[turn_steps].append({"started_ns": row["started_ns"], "turn_id": known, "steps": steps})
        return row

    def journey(self, user_id: str, session_id: str, began: int, turn_number: int) -> dict[str, Any]:
        row = self.journeys.get(user_id)
        if row is None:
            row = {
                "owner": user_id,
                "name": "onboarding",
                "stages": '["' + '","'.join(STAGES) + '"]',
                "stage": STAGES[0],
                "started_ns": began,
                "entered_ns": began,
                "converted_ns": None,
                "conversion_turn": None,
            }
            self.journeys[user_id] = row
            self.rows[journeys].append(row)
            self.step(row, session_id, STAGES[0], began, None)
        at = began
        while row["converted_ns"] is None and self.random.random() < 0.65:
            place = STAGES.index(row["stage"]) + 1
            at += self.random.randrange(20, 400) * SECOND
            if place == len(STAGES):
                row |= {"converted_ns": at, "conversion_turn": min(turn_number, 6)}
                break
            self.step(row, session_id, STAGES[place], at, (at - row["entered_ns"]) // 1_000_000)
            row |= {"stage": STAGES[place], "entered_ns": at}
        return row

    def step(self, row: Mapping[str, Any], session_id: str, stage: str, at: int, stayed_ms: int | None) -> None:
        self.rows[stages].append(
            {
                "owner": row["owner"],
                "name": row["name"],
                "stage": stage,
                "stage_number": STAGES.index(stage) + 1,
                "total_stages": len(STAGES),
                "session_id": session_id,
                "at_ns": at,
                "time_in_stage_ms": stayed_ms,
                "is_back": False,
                "converted": False,
            }
        )


def _steps(latency_ms: int, error: str | None, model: str | None) -> list[Step]:
    """Return the steps of a turn, in which a model or a tool may have failed."""
    of_model = Step("c" * 16, "b" * 16, model or "gpt-4o", "generation", 0, latency_ms, error=model and error)
    return [
        Step("a" * 16, "0" * 16, "LangGraph", "agent", 0, latency_ms, error=error),
        Step("b" * 16, "a" * 16, "agent", "chain", 0, latency_ms, error=error),
        of_model if model else Step("c" * 16, "b" * 16, "search_orders", "tool", 0, latency_ms, error=error),
    ]


@pytest.fixture(scope="module")
def six_weeks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    """Six weeks of a made-up app with several of everything."""
    folder: Path = tmp_path_factory.mktemp("six-weeks")
    ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
    Synthetic().write(ledger)
    yield ledger
    ledger.close()


# --- a page as it is read ---------------------------------------------------------------------------------------------
class Page(HTMLParser):
    """What is in a page: its elements, tables by caption, tiles, charts and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.tiles: dict[str, tuple[str, str]] = {}
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = self._tile = ""
        self._values: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br"):
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag == "script":
            self.scripts.append("")
        elif tag == "dt":
            self._tile, self._values = "", []
        elif tag == "dd":
            self._values.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"
        if tag == "table":
            assert self._caption not in self.tables
            self.tables[self._caption] = self._rows
        elif tag == "dd" and len(self._values) == 2:
            self.tiles[self._tile] = (self._values[0], self._values[1])

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
            return
        if "style" in self._open:
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data
        elif "td" in self._open or "th" in self._open:
            self._rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")
        elif "dt" in self._open:
            self._tile += data
        elif "dd" in self._open:
            self._values[-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found

    def trace(self, chart: str, number: int = 0, plot: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.figures[f"plot-{chart}-{plot}"]["data"][number]
        return found


def number(cell: str) -> float:
    """Read what a cell says, without thousands separators and units."""
    return float(re.sub(r"[,$%]", "", cell))


def column(table: list[list[str]], name: str) -> list[float]:
    at = table[0].index(name)
    return [number(row[at]) for row in table[1:]]


@pytest.fixture(scope="module")
def report(six_weeks: Ledger) -> Report:
    return collect(six_weeks, now_ns=NOW)


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(render(report))


# --- figures ----------------------------------------------------------------------------------------------------------
ASKED: dict[str, Any] = {
    "days": analytics.sessions_over_time,
    "lengths": analytics.session_lengths,
    "durations": analytics.session_durations,
    "latency": analytics.latency_by_turn,
    "errors": analytics.turn_errors,
    "usage_by_day": analytics.usage_by_day,
    "usage_by_model": analytics.usage_by_model,
    "usage_by_tier": analytics.usage_by_tier,
    "usage_by_channel": analytics.usage_by_channel,
    "funnels": analytics.funnels,
    "dropoff_by_turn": analytics.dropoff_by_turn,
    "dropoff_by_intent": analytics.dropoff_by_intent,
    "dropoff_by_action": analytics.dropoff_by_action,
    "dropoff_by_reason": analytics.dropoff_by_reason,
    "outcomes": analytics.outcomes,
    "outcomes_by_intent": analytics.outcomes_by_intent,
    "retention": analytics.retention,
    "windows": analytics.window_by_turn,
    "context_tokens": lambda ledger, filters: [],  # since its windows are not nearly empty
    "prunings": analytics.prunings,
    "estimate_errors": analytics.estimate_errors,
    "failing": analytics.sessions_with_errors,
    "unsatisfied": lambda ledger, filters: [
        session
        for session in analytics.sessions_by(ledger, "least satisfied", filters)
        if session.user_satisfaction is not None and session.user_satisfaction < 0.5
    ],
    "latest": lambda ledger, filters: analytics.sessions_by(ledger, "newest", filters, limit=15),
    "slowest": lambda ledger, filters: analytics.sessions_by(ledger, "slowest", filters),
    "dearest": lambda ledger, filters: analytics.sessions_by(ledger, "dearest", filters),
    "longest": lambda ledger, filters: analytics.sessions_by(ledger, "longest", filters),
}
WANTED = (ALL, Filters(channel="web"), Filters(model="gpt-4o", since_ns=MONDAY + 14 * DAY), Filters(tier="none such"))


@pytest.mark.parametrize("filters", WANTED, ids=str)
def test_the_figures_are_those_that_analytics_answers(six_weeks: Ledger, filters: Filters) -> None:
    found = collect(six_weeks, filters, now_ns=NOW)
    assert {name: getattr(found, name) for name in ASKED} == {n: ask(six_weeks, filters) for n, ask in ASKED.items()}
    assert {field.name for field in fields(Report)} == {*ASKED, "at_ns", "filters", "totals", "choices"}
    assert (found.filters, found.at_ns) == (filters, NOW)


def test_the_totals_are_those_of_the_rows(six_weeks: Ledger, report: Report) -> None:
    rows = six_weeks.sessions(limit=10_000)
    total = report.totals
    assert total.sessions == len(rows) > 300
    assert total.users == len({row.user_id for row in rows})
    assert total.open == sum(row.ended_ns is None for row in rows)
    assert total.turns == sum(row.total_turns for row in rows)
    assert total.failed_turns == sum(row.failed_turns for row in rows) > 0
    assert total.tokens == sum(row.total_tokens for row in rows)
    assert total.cost_usd == pytest.approx(sum(row.total_cost_usd for row in rows))
    assert total.dropoffs == sum(bool(row.dropoff) for row in rows) > 0
    assert total.dropoff_rate == total.dropoffs / (total.sessions - total.open)
    given = [row.user_satisfaction for row in rows if row.user_satisfaction is not None]
    assert total.with_feedback == len(given)
    assert total.satisfaction == pytest.approx(sum(given) / len(given))


@pytest.mark.parametrize("url", ["sqlite://", "postgresql"])
def test_it_is_the_same_on_every_database(url: str, report: Report) -> None:
    with postgres.server() if url == "postgresql" else _as_it_is(url) as server:
        ledger = Ledger(postgres.new_schema(server) if url == "postgresql" else server)
        with closing(ledger):
            Synthetic().write(ledger)
            found = collect(ledger, now_ns=NOW)
    for field in fields(Report):
        mine, theirs = getattr(found, field.name), getattr(report, field.name)
        assert repr(_rounded(mine)) == repr(_rounded(theirs)), field.name
    assert Page(render(found)).tables.keys() == Page(render(report)).tables.keys()


@contextmanager
def _as_it_is(url: str) -> Iterator[str]:
    yield url


def _rounded(value: Any) -> str:
    """Return how a value is written, without the last digits of sums, which depend on the order of adding."""
    return re.sub(r"\d+\.\d+(e-\d+)?", lambda found: f"{float(found[0]):.6g}", repr(value))


def test_the_tiles_show_the_totals(report: Report, page: Page) -> None:
    total = report.totals
    tiles = page.tiles
    assert tiles["Sessions"] == (f"{total.sessions:,}", f"{total.open:,} open")
    assert tiles["Users"][0] == f"{total.users:,}"
    assert tiles["Turns"][0] == f"{total.turns:,}"
    assert tiles["Tokens"][0] == f"{total.tokens:,}"
    assert tiles["Cost"][0] == f"${total.cost_usd:,.2f}"
    assert tiles["Drop-off rate"][0] == f"{100 * (total.dropoff_rate or 0):.1f}%"
    assert tiles["Drop-off rate"][1].startswith(f"{total.dropoffs:,} of {total.ended:,} that ended (95%: ")
    assert tiles["Satisfaction"] == (
        f"{100 * (total.satisfaction or 0):.0f}%",
        f"mean of {total.with_feedback} sessions with feedback",
    )
    assert tiles["Turn latency, p50"][0] == duration(report.latency[0].p50).replace("\N{NO-BREAK SPACE}", " ")


def test_the_tables_hold_the_numbers_of_the_answers(report: Report, page: Page) -> None:
    over_time = page.tables["Sessions over time"]
    assert [row[0] for row in over_time[1:]] == [day.day for day in report.days]
    for name in ("sessions", "users", "turns", "tokens"):
        assert column(over_time, name) == [getattr(day, name) for day in report.days]
    assert column(over_time, "drop-offs") == [day.dropoffs for day in report.days]
    latency = page.tables["Turn latency by turn number"]
    assert [row[0] for row in latency[1:4]] == ["all", "1", "2"]
    assert column(latency, "turns") == [each.n for each in report.latency]
    assert latency[-1][0] == "over 50"
    dropoff = page.tables["Drop-off by last intent"]
    assert dropoff[1:] == [
        [each.at, f"{each.ended:,}", f"{each.dropoffs:,}", f"{100 * each.rate:.0f}%", _between(each.interval)]
        for each in report.dropoff_by_intent
    ]
    [journey] = report.funnels
    funnel = page.tables["Journey: onboarding"]
    assert [row[0] for row in funnel[1:]] == [*STAGES, "converted"]
    assert column(funnel, "came so far") == [*(stage.reached for stage in journey.stages), journey.converted]
    outcomes = page.tables["Outcomes"]
    assert outcomes[0][1:] == ["successful", "unsuccessful", "unknown"]
    assert [int(cell.split()[0]) for cell in outcomes[1][1:]] == [each.n for each in report.outcomes]
    retention = page.tables["Retention by weekly cohort"]
    first = report.retention[0]
    assert retention[1][:3] == [first.week, str(first.users), f"100% ({first.users})"]
    assert retention[1][3] == f"{100 * first.rate(1):.0f}% ({first.active[1]})"
    assert retention[-1][-1] == "", "of weeks to come nothing is known"
    usage = page.tables["Tokens and cost by model"]
    assert column(usage, "input tokens") == [each.input_tokens for each in report.usage_by_model]
    assert [row[4] for row in usage[1:]] == [money(each.cost_usd) for each in report.usage_by_model]


def _between(bounds: tuple[float, float] | None) -> str:
    assert bounds is not None
    return f"{100 * bounds[0]:.0f}\N{EN DASH}{100 * bounds[1]:.0f}%"


def test_the_charts_hold_the_numbers_of_the_answers(report: Report, page: Page) -> None:
    sessions_a_day = dict(
        zip(page.trace("sessions-over-time")["x"], page.trace("sessions-over-time")["y"], strict=True)
    )
    assert {day: n for day, n in sessions_a_day.items() if n} == {day.day: day.sessions for day in report.days}
    assert len(sessions_a_day) == 42, "days without a session are there, with none"
    p50, p95, p99, first = (page.trace("latency-by-turn", number) for number in range(4))
    by_number = report.latency[1:]
    assert p50["x"] == [each.number for each in by_number]
    for trace, name in ((p50, "p50"), (p95, "p95"), (p99, "p99"), (first, "first_token_p50")):
        known = [getattr(each, name) for each in by_number]
        assert trace["y"] == [None if ms is None else ms / 1000 for ms in known]
    assert page.trace("dropoff-by-turn", 0)["y"] == [each.ended for each in report.dropoff_by_turn]
    assert page.trace("dropoff-by-turn", 1)["y"] == [each.dropoffs for each in report.dropoff_by_turn]
    assert page.trace("dropoff-by-action", 1)["x"] == [each.dropoffs for each in report.dropoff_by_action]
    assert page.trace("outcome-by-intent", 0)["x"] == [each.successful for each in report.outcomes_by_intent]
    assert page.trace("usage-by-model", 0, plot=1)["x"] == [each.cost_usd for each in report.usage_by_model]
    assert page.trace("context-fill", 0)["y"] == [pytest.approx(100 * each.p50) for each in report.windows]
    assert sum(sum(trace["x"]) for trace in page.figures["plot-prunings-0"]["data"]) == sum(
        each.decisions for each in report.prunings
    )
    assert sum(page.trace("session-durations")["y"]) == report.totals.sessions
    assert sum(page.trace("session-turns")["y"]) == report.totals.sessions
    heat = page.trace("retention-by-week")
    assert heat["customdata"][0][1] == report.retention[0].active[1]
    assert heat["z"][-1][0] == 100
    assert heat["z"][-1][-1] is None


def test_the_errors_are_those_of_the_turns(report: Report, page: Page) -> None:
    errors = report.errors
    assert errors.all.failed == report.totals.failed_turns > 0
    by_day = page.tables["Errors by day"]
    assert column(by_day, "turns") == [each.turns for each in report.usage_by_day]
    assert sum(column(by_day, "failed")) == report.totals.failed_turns
    assert page.trace("errors-by-day")["y"] == [each.failed for each in errors.by_day]
    rates, whiskers = page.trace("errors-by-turn")["y"], page.trace("errors-by-turn")["error_y"]
    for rate, low, high, each in zip(rates, whiskers["arrayminus"], whiskers["array"], errors.by_turn, strict=True):
        assert rate == pytest.approx(100 * each.failed / each.turns, abs=0.01)
        bounds = analytics.interval(each.failed, each.turns)
        assert bounds is not None
        assert (rate - low, rate + high) == pytest.approx((100 * bounds[0], 100 * bounds[1]), abs=0.02)
    by_class = page.tables["Errors by class"]
    assert {row[0] for row in by_class[1:]} == {"TimeoutError", "ValueError", "RateLimitError"}
    assert set(column(by_class, "turns")) == {errors.all.turns}
    by_step = page.tables["Errors by step"]
    assert {tuple(row[:2]) for row in by_step[1:]} == {
        ("search_orders", "tool"),
        *((name, "model") for name, *_ in MODELS),
    }
    assert sum(column(by_step, "turns")) == errors.looked_into == errors.all.failed
    assert f"an error ended {errors.all.failed:,} (failed)" in page.text
    assert sum(column(page.tables["Errors by intent"], "failed")) == errors.all.failed


def test_sessions_with_failed_turns_are_looked_at_first(report: Report, page: Page) -> None:
    captions = list(page.tables)
    assert captions.index("Sessions with failed turns") == captions.index("Latest sessions") - 2
    rows = page.tables["Sessions with failed turns"][1:]
    assert [row[4:6] for row in rows] == [[str(each.total_turns), str(each.failed_turns)] for each in report.failing]
    assert all(each.failed_turns for each in report.failing)


def test_sessions_whose_users_were_least_satisfied_are_told_by_their_feedback(six_weeks: Ledger, page: Page) -> None:
    rows = six_weeks.sessions(limit=10_000)
    poor = [each for each in rows if each.user_satisfaction is not None and each.user_satisfaction < 0.5]
    poor.sort(key=lambda each: (each.user_satisfaction, -each.started_ns))
    head, *found = page.tables["Least satisfied sessions"]
    assert [row[0] for row in found] == [each.id[:8] for each in poor[:10]]
    assert {row[head.index("feedback")] for row in found} == {"0%"}
    assert "feedback" not in page.tables["Latest sessions"][0]


def test_sessions_of_half_satisfied_users_are_not_among_the_least_satisfied() -> None:
    ledger = of_days("2026-11-23", "2026-11-24", "2026-11-25")
    assert "Least satisfied sessions" not in page_of(ledger).tables, "nobody said anything"
    with ledger.asking() as connection:
        for at, total in enumerate((1.0, 0.98)):
            given = {"feedback_sum": total, "feedback_count": 2}
            connection.execute(update(sessions).where(sessions.c.id == f"{at:032x}").values(given))
        connection.commit()
    head, *rows = page_of(ledger).tables["Least satisfied sessions"]
    assert [(row[1][:10], row[head.index("feedback")]) for row in rows] == [("2026-11-24", "49%")]


def test_where_no_turn_failed_it_says_of_how_many() -> None:
    ledger = Ledger("sqlite://")
    nasty(ledger)
    found = Page(render(collect(ledger, now_ns=NOW)))
    assert f"No errors. Of {len(NASTY)} turns none failed or was abandoned (95%: 0\N{EN DASH}24% do)." in found.text
    assert "Sessions with failed turns" not in found.tables


def test_every_chart_is_one_that_plotly_knows(page: Page) -> None:
    from plotly import graph_objects  # type: ignore[import-untyped]

    for figure in page.figures.values():
        text = re.sub(r"var\(--[a-z0-9-]+\)", "#123456", json.dumps(figure))
        graph_objects.Figure(json.loads(text))  # raises for a property or a value that is none


def test_every_chart_has_a_title_a_sentence_and_a_table(report: Report, page: Page) -> None:
    html = render(report)
    assert len(page.figures) == 28
    cards = re.findall(
        r'<section class="card[^"]*" id="[^"]+">.*?</section>|<section id="[^"]+" class="card.*?</section>', html
    )
    assert len(cards) == 23
    for card in cards:
        assert "<h3>" in card
        [reading] = re.findall(r'<p class="reading">(.*?)</p>', card)
        assert reading.endswith(".")
        assert reading.count(". ") == 0, "one sentence"
        assert card.count("<details") == 1
        assert 'role="img" aria-label="Chart: ' in card


def test_what_a_reader_needs_is_there(page: Page) -> None:
    assert page.of("html") == [{"lang": "en"}]
    assert len(page.of("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(cell.get("scope") in ("col", "row") for cell in page.of("th"))
    assert all(page.tables), "every table has a caption"
    known = [each["id"] for _, each in page.elements if "id" in each]
    assert len(known) == len(set(known))
    targets = {str(link["href"])[1:] for link in page.of("a") if str(link["href"]).startswith("#")}
    assert targets <= set(known)
    assert "all days and times are in UTC" in page.text


def test_a_session_has_its_command_and_its_page_in_langfuse(report: Report) -> None:
    place = LangfusePlace("https://langfuse.example.com/", "project 1")
    linked = Page(render(report, langfuse=place))
    slowest = report.slowest[0]
    assert place.session_url(slowest.id) == f"https://langfuse.example.com/project/project%201/sessions/{slowest.id}"
    links = [link for link in linked.of("a") if link.get("target")]
    assert links[35]["href"] == place.session_url(slowest.id)
    assert len(links) == 65
    assert {link["rel"] for link in links} == {"noopener noreferrer"}
    assert linked.tables["Slowest sessions"][1][-1] == f"turntrace show {slowest.id[:8]}"
    assert not [link for link in Page(render(report)).of("a") if link.get("target")]


def test_the_command_of_a_row_is_short_and_finds_its_session(six_weeks: Ledger, report: Report, page: Page) -> None:
    for session, row in zip(report.latest, page.tables["Latest sessions"][1:], strict=True):
        begins = row[-1].removeprefix("turntrace show ")
        assert begins == row[0]
        assert [each.id for each in six_weeks.sessions(id_begins=begins)] == [session.id]
    chosen = Ledger("sqlite://")
    nasty(chosen)
    commands = [row[-1] for row in page_of(chosen).tables["Latest sessions"][1:]]
    whole = {each.id for each in collect(chosen, now_ns=NOW).latest}
    assert {shlex.split(command)[-1] for command in commands} == whole, "an id that somebody chose is whole"


@pytest.mark.parametrize("url", ["javascript:alert(1)", "langfuse.example.com", "", "file:///etc", "http://[x"])
def test_an_address_that_is_none_of_a_page_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="LANGFUSE_BASE_URL"):
        LangfusePlace(url, "p")


def test_an_id_cannot_leave_its_place_in_an_address() -> None:
    place = LangfusePlace("https://langfuse.example.com", "a/b")
    assert place.session_url("x/../y?z#&\"'<>") == (
        "https://langfuse.example.com/project/a%2Fb/sessions/x%2F..%2Fy%3Fz%23%26%22%27%3C%3E"
    )


# --- few and sparse ---------------------------------------------------------------------------------------------------
def of_days(*days: str, lasted_ms: int = 1_000, **more: Any) -> Ledger:
    """Return a ledger with a session of one turn on each of these days."""
    ledger, rows = Ledger("sqlite://"), list[dict[str, Any]]()
    turn_rows = []
    for at, day in enumerate(days):
        began = analytics.day_of(day)
        ended = began + lasted_ms * 1_000_000
        known = {"user_id": f"{at:064x}", "started_ns": began, "input_tokens": 9, "output_tokens": 1}
        rows.append(
            {"id": f"{at:032x}", "channel": "web", "type": "chat", "sessions_total": 1, "last_activity_ns": ended}
            | {"ended_ns": ended, "end_reason": "completed", "total_turns": 1, "total_cost_usd": 0.5}
            | {"last_turn": 1, **known}
        )
        turn_rows.append(
            {"id": f"t{at}", "session_id": f"{at:032x}", "conversation_id": f"c{at}", "number": 1, "role": "user"}
            | {"status": "completed", "ended_ns": ended, "trace_id": f"{at:032x}", "root_span_id": f"{at:016x}"}
            | {"latency_ms": 7, **known, **more}
        )
    with ledger.asking() as connection:
        connection.execute(insert(sessions), rows)
        connection.execute(insert(turns), turn_rows)
        connection.commit()
    return ledger


def page_of(ledger: Ledger) -> Page:
    return Page(render(collect(ledger, now_ns=NOW)))


@pytest.mark.parametrize("chart", ["sessions-over-time", "usage-by-day"])
def test_days_far_apart_stand_side_by_side_each_with_its_name(chart: str) -> None:
    found = page_of(of_days("2026-01-01", "2026-01-04", "2026-11-25"))
    axis = found.figures[f"plot-{chart}-0"]["layout"]["xaxis"]
    assert axis["type"] == "category"
    assert axis["tickvals"] == found.trace(chart)["x"] == ["2026-01-01", "2026-01-04", "2026-11-25"]
    assert axis["ticktext"] == ["Jan 1<br>2026", "Jan 4", "Nov 25<br>2026"]
    assert "Days without a session are left out." in found.text


def test_of_many_days_far_apart_some_have_names_and_the_last_one_has() -> None:
    on = [f"20{year:02}-{month:02}-15" for year in (24, 25) for month in range(1, 12)]
    axis = page_of(of_days(*on)).figures["plot-usage-by-day-0"]["layout"]["xaxis"]
    assert len(axis["ticktext"]) == len(axis["tickvals"]) <= 6
    assert axis["ticktext"][-1] == "Nov 15<br>2025"
    assert {on.index(day) for day in axis["tickvals"]} == {21, 17, 13, 9, 5, 1}
    assert [text for text in axis["ticktext"] if "2024" in text] == ["Feb 15<br>2024"]


def test_days_in_a_row_are_an_axis_of_time_with_those_without_a_session() -> None:
    on = [f"2026-03-{day:02}" for day in range(1, 29) if day % 3]
    found = page_of(of_days(*on))
    assert found.figures["plot-sessions-over-time-0"]["layout"]["xaxis"]["type"] == "date"
    assert found.trace("sessions-over-time")["y"].count(0) == 9
    assert "Days without a session" not in found.text


def test_one_day_of_users_is_a_point_that_stands_out_of_its_bar() -> None:
    users = page_of(of_days("2026-11-25", "2026-11-25")).trace("sessions-over-time", 2)
    assert (users["x"], users["y"]) == (["2026-11-25"], [2])
    assert users["marker"]["size"] > 8
    assert users["marker"]["color"] != "var(--gray)"
    assert users["marker"]["line"] == {"color": "var(--surface)", "width": 2}


def test_the_first_week_of_users_is_one_cell_of_many_and_says_what_comes() -> None:
    found = page_of(of_days("2026-11-25"))
    axis = found.figures["plot-retention-by-week-0"]["layout"]["xaxis"]
    assert axis["range"] == [-0.5, 7.5]
    assert "Who comes back is seen from the second week on." in found.text


def test_cohorts_of_two_years_say_their_years_and_each_cell_its_share() -> None:
    weeks = [f"2025-12-{day}" for day in (16, 22, 30)] + [f"2026-{month:02}-09" for month in range(1, 5)]
    found = page_of(of_days(*weeks))
    names = found.figures["plot-retention-by-week-0"]["layout"]["yaxis"]["ticktext"]
    assert names[:3] == ["Dec 15, 2025 (1)", "Dec 22, 2025 (1)", "Dec 29, 2025 (1)"]
    assert names[-1] == "Apr 6, 2026 (1)"
    heat = found.trace("retention-by-week")
    assert len(heat["x"]) == 17
    assert heat["text"][0] == ["100%", *["0%"] * 16]
    assert heat["texttemplate"] == "%{text}"


@pytest.mark.parametrize("chart", ["latency-by-turn", "context-fill"])
def test_lines_of_quantiles_that_are_equal_can_all_be_seen(page: Page, chart: str) -> None:
    lines = [page.trace(chart, at) for at in range(3)]
    assert [each["name"] for each in lines] == ["p50", "p95", "p99"], "the higher ones lie upon the lower ones"
    assert len({each["line"]["color"] for each in lines}) == 3
    assert [each["line"]["dash"] for each in lines] == ["solid", "dash", "dot"], "and leave gaps"
    sizes = [each["marker"]["size"] for each in lines]
    assert sizes == sorted(set(sizes), reverse=True)
    assert {symbol.removesuffix("-open") for symbol in lines[1]["marker"]["symbol"]} == {"square"}
    for n, symbol in zip(lines[0]["customdata"], lines[0]["marker"]["symbol"], strict=True):
        assert symbol == ("circle" if n >= 20 else "circle-open")
    assert "Of fewer than 100 turns p99 is the largest" in page.text


def test_what_first_token_means_is_said_where_it_is_drawn(page: Page) -> None:
    words = "First token, p50: half of the turns that stream"
    assert words in page.text
    assert words not in page_of(of_days("2026-11-25")).text


@pytest.mark.parametrize(
    ("lasted_ms", "ticks"),
    [
        (0, ["1<br>ms"]),
        (6, [*("1<br>ms", "2<br>ms", "5<br>ms", "10<br>ms")]),
        (9_000, ["1<br>s", "2<br>s", "5<br>s", "10<br>s"]),
        (400_000, ["1<br>min", "2<br>min", "5<br>min", "10<br>min"]),
        (7_000_000, [*(f"{n}<br>min" for n in (1, 2, 5, 10, 15, 20, 30, 45)), "1<br>h", "2<br>h"]),
    ],
)
def test_the_scale_of_sessions_lengths_fits_them(lasted_ms: int, ticks: list[str]) -> None:
    found = page_of(of_days("2026-11-23", "2026-11-24", "2026-11-25", lasted_ms=lasted_ms))
    assert found.figures["plot-session-durations-0"]["layout"]["xaxis"]["ticktext"] == ticks
    assert found.trace("session-durations")["y"] == [*[0] * (len(ticks) - 1), 3]
    assert found.tables["Session length in time"][-1] == [f"up to {ticks[-1].replace('<br>', ' ')}", "3"]


def test_the_longest_of_short_sessions_are_one_bar() -> None:
    days = [f"2026-11-{day:02}" for day in range(1, 22)]
    ledger = of_days(*days, lasted_ms=300)
    with ledger.asking() as connection:
        lasted = {"last_activity_ns": sessions.c.started_ns + 20 * DAY}
        connection.execute(update(sessions).where(sessions.c.id == f"{3:032x}").values(lasted))
        connection.commit()
    found = page_of(ledger)
    assert found.tables["Session length in time"][-1] == ["more than 500 ms", "1"]
    assert sum(found.trace("session-durations")["y"]) == 21


def test_windows_that_are_nearly_empty_are_told_in_tokens() -> None:
    found = page_of(of_days("2026-11-24", "2026-11-25", context_tokens=120, context_limit=128_000))
    assert [found.trace("context-fill", at)["y"] for at in range(3)] == [[120], [120], [120]]
    assert found.figures["plot-context-fill-0"]["layout"]["yaxis"]["title"]["text"] == "tokens"
    assert found.tables["Context by turn number, in tokens"][1] == ["1", "2", "120", "120", "120"]
    assert "which is less than 0.1% of the windows" in found.text
    fuller = page_of(of_days("2026-11-25", context_tokens=4_000, context_limit=128_000))
    assert fuller.trace("context-fill")["y"] == [3.1]
    assert "Context by turn number, in tokens" not in fuller.tables


def test_open_sessions_are_said_to_be_of_unknown_outcome(page: Page) -> None:
    assert "Of all others it is unknown, and of those that are open." in page.text


def test_numbers_of_turns_that_are_few_but_far_apart_are_written_where_there_is_room() -> None:
    def axis(numbers: tuple[int, ...]) -> dict[str, Any]:
        ledger = of_days(*(f"2026-11-{day:02}" for day in range(1, 1 + len(numbers))))
        with ledger.asking() as connection:
            for at, number in enumerate(numbers):
                connection.execute(update(turns).where(turns.c.id == f"t{at}").values(number=number))
            connection.commit()
        found: dict[str, Any] = page_of(ledger).figures["plot-latency-by-turn-0"]["layout"]["xaxis"]
        return found

    assert axis((1, 3, 4, 5))["tickvals"] == [1, 3, 4, 5]
    assert "tickvals" not in axis((1, 3, 4, 5, 40))


def test_large_counts_are_written_short_and_small_ones_whole() -> None:
    assert whole(3) == {"dtick": 1, "tick0": 0}
    assert whole(9_999) == {"tickformat": ",d"}
    assert whole(3_000_000) == {"tickformat": "~s"}


def test_charts_side_by_side_begin_at_the_same_height(page: Page) -> None:
    for chart in ("usage-by-model", "usage-by-tier", "usage-by-channel"):
        tokens, cost = (page.figures[f"plot-{chart}-{number}"]["layout"] for number in range(2))
        assert (tokens["height"], tokens["margin"]) == (cost["height"], cost["margin"])


def test_ticks_of_figures_are_never_slanted(page: Page) -> None:
    lying = [each["layout"]["xaxis"] for each in page.figures.values() if each["data"][0].get("orientation") == "h"]
    assert lying
    assert all(axis["tickangle"] == 0 for axis in lying)


# --- one file, no network ---------------------------------------------------------------------------------------------
def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    for tag, attributes in page.elements:
        assert "src" not in attributes
        assert "srcset" not in attributes
        if tag == "link":
            assert attributes == {"rel": "icon", "href": "data:,"}
        assert not [name for name in attributes if name.startswith("on")]


@pytest.mark.parametrize("refresh_s", [None, 30])
def test_the_policy_allows_the_scripts_of_the_page_and_nothing_else(report: Report, refresh_s: float | None) -> None:
    found = Page(render(report, refresh_s=refresh_s))
    [content] = [each["content"] for each in found.of("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert content is not None
    rules = dict(rule.strip().split(" ", 1) for rule in content.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["form-action"] == ("'none'" if refresh_s is None else "'self'")
    assert rules["base-uri"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    run = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in found.scripts[1:]]
    assert rules["script-src"].split() == [f"'sha256-{each}'" for each in run]
    assert len(found.scripts) == 3
    assert set(rules) == {"default-src", "form-action", "base-uri", "img-src", "script-src", "style-src"}


def test_plotly_is_in_it_once_and_the_rest_is_small(report: Report) -> None:
    html = render(report)
    assert len(re.findall(r"plotly\.js v\d", html)) == 1
    assert len(html.encode()) < 6_500_000
    assert len(html.encode()) - len(Page(html).scripts[1].encode()) < 300_000


def test_no_chart_can_be_sent_to_a_service(report: Report) -> None:
    own = Page(render(report)).scripts[2]
    assert "showSendToCloud: false" in own
    assert 'plotlyServerURL: ""' in own


def test_without_plotly_it_says_what_to_install(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'turntrace\[report\]'"):
        render(report)
    with pytest.raises(ConfigurationError, match="plotly"):
        ReportServer(Ledger("sqlite://"))


def test_importing_the_report_does_not_import_plotly() -> None:
    code = "import sys, turntrace.report; print([name for name in sys.modules if name.startswith('plotly')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# --- filters that were applied ----------------------------------------------------------------------------------------
def test_a_file_states_its_filters(six_weeks: Ledger, page: Page) -> None:
    chosen = Filters(
        since_ns=MONDAY, until_ns=MONDAY + 10 * DAY + 3600 * SECOND, channel="web", end_reason="open", tier=""
    )
    found = Page(render(collect(six_weeks, chosen, now_ns=NOW)))
    assert "from 2025-10-13" in found.text
    assert "before 2025-10-23T01:00" in found.text
    assert "channel web" in found.text
    assert "ended by open" in found.text
    assert "tier not known" in found.text
    assert "No filters: everything on record." in page.text
    assert not found.of("form")


def test_a_session_can_be_found_in_the_tables(report: Report, page: Page) -> None:
    rows = [each for each in page.of("tr") if "data-text" in each]
    assert len(rows) == 65
    first = report.failing[0]
    assert (rows[0]["data-channel"], rows[0]["data-end"]) == (first.channel, first.end_reason or "open")
    assert first.id in str(rows[0]["data-text"])
    assert str(first.user_id) in str(rows[0]["data-text"])


# --- nothing there ----------------------------------------------------------------------------------------------------
SECTIONS = 10


def test_an_empty_ledger_says_so_in_every_section() -> None:
    found = collect(Ledger("sqlite://"), now_ns=NOW)
    empty = Page(render(found))
    assert found.is_empty
    assert empty.figures == {}
    assert empty.tables == {}
    assert empty.text.count("There is nothing on record yet. turntrace demo records five sessions") == SECTIONS
    assert len(empty.of("h2")) == SECTIONS
    assert empty.tiles["Sessions"] == ("0", "0 open")
    assert empty.tiles["Drop-off rate"][0] == "\N{EN DASH}"


@pytest.mark.parametrize("refresh_s", [None, 30])
def test_a_page_without_charts_is_small(six_weeks: Ledger, refresh_s: float | None) -> None:
    html = render(collect(six_weeks, Filters(channel="none"), now_ns=NOW), refresh_s=refresh_s)
    assert len(html.encode()) < 60_000
    found = Page(html)
    [script] = found.scripts[1:]
    [content] = [each["content"] for each in found.of("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}';" in str(content)


def test_filters_that_nothing_meets_say_so(six_weeks: Ledger) -> None:
    empty = Page(render(collect(six_weeks, Filters(channel="none"), now_ns=NOW)))
    assert empty.text.count("No session meets these filters.") == SECTIONS
    assert "turntrace demo" not in empty.text


def test_a_section_of_which_nothing_is_on_record_says_what_to_do(six_weeks: Ledger) -> None:
    found = Page(render(collect(six_weeks, Filters(channel="api"), now_ns=NOW)))
    assert "Nothing of this is on record. SessionTracker(journeys=" in found.text


def test_one_session_that_is_open_and_has_no_turn() -> None:
    ledger = Ledger("sqlite://")
    row = {"id": "s", "channel": "web", "type": "chat", "sessions_total": 1, "started_ns": NOW, "last_activity_ns": NOW}
    with ledger.asking() as connection:
        connection.execute(insert(sessions).values(row))
        connection.commit()
    found = Page(render(collect(ledger, now_ns=NOW)))
    assert found.tiles["Sessions"] == ("1", "1 open")
    assert found.tiles["Users"] == ("0", "no user yet")
    assert found.tables["Latest sessions"][1][-2] == "open"
    assert found.tables["Sessions over time"][1][1] == "1"


# --- what comes from outside ------------------------------------------------------------------------------------------
NASTY = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "{{7*7}} ${7*7} %{x} #{1} <%= 1 %>",
    "&lt;b&gt; &amp; <b>bold</b>",
    "\u202eright to left\u2066\u200f",
    "line\u2028and\u2029ends\r\n\t\x07",
    '<a href="javascript:alert(4)">x</a>',
    "x" * 200,
    "var(--orange)",
    "\N{ARABIC LETTER ALEF}\N{ARABIC LETTER BEH} \N{GRINNING FACE} e\N{COMBINING ACUTE ACCENT}",
)


def nasty(ledger: Ledger) -> None:
    """Write a ledger whose every text is meant to break a page."""
    rows: dict[Any, list[dict[str, Any]]] = {table: [] for table in (sessions, conversations, turns, decisions)}
    rows |= {journeys: [], stages: []}
    for at, text in enumerate(NASTY):
        ascii_id = f"{at:02} {text}".encode("ascii", "replace").decode().translate(dict.fromkeys(range(32), 63))[:200]
        other = NASTY[(at + 1) % len(NASTY)]
        began = NOW - (at + 1) * DAY
        keys = {"session_id": ascii_id, "conversation_id": ascii_id}
        rows[sessions].append(
            {"id": ascii_id, "user_id": f"{at:02}{text}"[:64], "channel": text, "type": "chat", "tier": text}
            | {"org_id": text, "sessions_total": 1, "started_ns": began, "last_activity_ns": began + SECOND}
            | {"ended_ns": began + SECOND, "end_reason": text, "total_turns": 1, "dropoff": at % 2 == 0}
            | {"last_turn": 1, "last_intent": text, "last_action": text[:20], "input_tokens": 9}
        )
        rows[conversations].append(
            {"id": ascii_id, "session_id": ascii_id, "topic": text, "total_turns": 1}
            | {"started_ns": began, "last_activity_ns": began}
        )
        rows[turns].append(
            {**keys, "id": f"t{at}", "number": 1, "status": "completed", "started_ns": began, "ended_ns": began}
            | {"trace_id": f"{at:032x}", "root_span_id": f"{at:016x}", "role": "user", "intent": text, "model": text}
            | {"input_tokens": 9, "counted_tokens": 10, "counted_of_tokens": 9, "latency_ms": 7}
            | {"context_tokens": 9, "context_limit": 100}
        )
        rows[decisions].append(
            {**keys, "turn_id": f"t{at}", "turn_number": 1, "at_ns": began, "trigger": text[:20], "strategy": other}
            | {"messages_before": 3, "messages_after": 1, "messages_pruned": 2, "duration_us": 1}
        )
        owner = f"{at:02}{text}"[:64]
        rows[journeys].append(
            {"owner": owner, "name": text, "stages": json.dumps([text, other]), "stage": text}
            | {"started_ns": began, "entered_ns": began}
        )
        rows[stages].append(
            {"owner": owner, "name": text, "stage": text, "stage_number": 1, "total_stages": 2, "session_id": ascii_id}
            | {"at_ns": began, "is_back": False, "converted": False}
        )
    with ledger.asking() as connection:
        for table, values in rows.items():
            connection.execute(insert(table), values)
        connection.commit()


@pytest.mark.parametrize("refresh_s", [None, 30])
def test_nothing_from_outside_is_markup(report: Report, refresh_s: float | None) -> None:
    ledger = Ledger("sqlite://")
    nasty(ledger)
    html = render(collect(ledger, now_ns=NOW), langfuse=LangfusePlace("https://l.example", "p"), refresh_s=refresh_s)
    found, plain = (
        Page(html),
        Page(render(report, langfuse=LangfusePlace("https://l.example", "p"), refresh_s=refresh_s)),
    )
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in plain.elements} | {"ul", "li", "strong"}
    assert {name for _, each in found.elements for name in each} <= {
        name for _, each in plain.elements for name in each
    }
    assert len(found.scripts) == 3
    assert not any(character in found.scripts[0] for character in "<>&\u2028\u2029")
    shown = re.sub(r'(?<=<option) value="[^"]*"', "", html.split('<script type="application/json"')[0])
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\u2029\u200f\x07]", shown)
    for text in NASTY:
        assert visible(text) in found.text
    intents = found.figures["plot-dropoff-by-intent-0"]["layout"]["yaxis"]["ticktext"]
    assert len(intents) == len(NASTY)
    assert not [text for text in intents if re.search("<|>|\u202e", text)]
    for link in found.of("a"):
        assert urlsplit(str(link["href"])).scheme in ("", "https")
    for figure in found.figures.values():
        for trace in figure["data"]:
            assert "<b>" not in trace["hovertemplate"].replace("<extra></extra>", "")
            assert "<" not in trace["hovertemplate"].replace("<extra></extra>", "")


def test_a_command_is_one_argument_to_a_shell() -> None:
    for an_id in ("abc", "a b; rm -rf $HOME", 'it\'s `x` "y"', "-rf"):
        words = shlex.split(show_command(an_id))
        assert words[:2] == ["turntrace", "show"]
        assert words[2:] in ([an_id], ["--", an_id])
    assert shlex.split(show_command("-rf"))[2] == "--"


def test_texts_and_figures_are_written_to_be_read() -> None:
    assert visible("a\u202eb\x07\u2028") == "a\\u202eb\\x07\\u2028"
    assert shortened("x" * 200, 10) == "xxxxxx\N{HORIZONTAL ELLIPSIS}xxx"
    assert label("<b>&") == "&lt;b&gt;&amp;"
    assert label("") == "not known"
    assert [money(each) for each in (0, 0.00001, 0.0123, 1, 1234.5)] == [
        *("$0.00", "<$0.0001", "$0.0123", "$1.00", "$1,234.50"),
    ]
    spoken = [duration(ms).replace("\N{NO-BREAK SPACE}", " ") for ms in (0, 999, 1234, 59_960, 3_600_000, 9e8)]
    assert spoken == ["0 ms", "999 ms", "1.2 s", "1 min 00 s", "1 h 00 min", "10 d 10 h"]


# --- as a file --------------------------------------------------------------------------------------------------------
def test_it_is_written_into_one_file(six_weeks: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("what was there before", encoding="utf-8")
    written = write_report(six_weeks, path, Filters(channel="web"), now_ns=NOW)
    assert path.read_text(encoding="utf-8") == render(written)
    assert written == collect(six_weeks, Filters(channel="web"), now_ns=NOW)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_says_so(six_weeks: Ledger, tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "report.html", tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be written"):
            write_report(six_weeks, path, now_ns=NOW)
    assert list(tmp_path.iterdir()) == []


# --- served -----------------------------------------------------------------------------------------------------------
@contextmanager
def served(ledger: Ledger, filters: Filters = ALL, **settings: Any) -> Iterator[ReportServer]:
    """Serve a ledger's report in a thread."""
    ready, told = threading.Event(), list[ReportServer]()

    def on_ready(server: ReportServer) -> None:
        told.append(server)
        ready.set()

    settings = {"clock": lambda: NOW, **settings}
    thread = threading.Thread(target=lambda: serve(ledger, filters, on_ready=on_ready, **settings))
    thread.start()
    try:
        assert ready.wait(10)
        yield told[0]
    finally:
        told[0].stop()
        thread.join(10)
    assert not thread.is_alive()


def ask(server: ReportServer, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(server.url).port or 0, timeout=30)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer, answer.read().decode()
    finally:
        connection.close()


def test_it_is_served_with_figures_as_they_are(six_weeks: Ledger, report: Report) -> None:
    ledger = Ledger("sqlite://")
    with served(ledger) as server:
        assert "There is nothing on record yet" in ask(server, "/")[1]
        nasty(ledger)
        answer, body = ask(server, "/")
        assert answer.status == 200
        assert Page(body).tiles["Sessions"][0] == str(len(NASTY))
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert 'data-seconds="30"' in body


def test_it_is_served_on_this_machine_only(six_weeks: Ledger) -> None:
    with served(six_weeks) as server:
        place = urlsplit(server.url)
        assert place.hostname == "127.0.0.1"
        with pytest.raises(OSError, match=r"refused"):  # another address of this same machine
            socket.create_connection(("127.0.0.2", place.port or 0), timeout=5)
        assert ask(server, "/", Host="evil.example:80")[0].status == 421
        assert ask(server, "/", Host=f"localhost:{place.port}")[0].status == 200


@pytest.mark.parametrize("path", ["/report", "/favicon.ico", "/../etc/passwd", "/x/", "/index.html?channel=web"])
def test_there_is_nothing_else(six_weeks: Ledger, path: str) -> None:
    with served(six_weeks) as server:
        answer, body = ask(server, path)
        assert answer.status == 404
        assert "There is nothing at this address" in body
        assert ask(server, "/", "POST")[0].status == 501


def test_head_is_answered_without_the_page(six_weeks: Ledger) -> None:
    with served(six_weeks) as server:
        whole, body = ask(server, "/")
        head, nothing = ask(server, "/", "HEAD")
        assert (head.status, nothing) == (200, "")
        assert head.headers["Content-Length"] == whole.headers["Content-Length"] == str(len(body.encode()))


def test_filters_stand_in_the_address(six_weeks: Ledger) -> None:
    asked = {
        "since": "2025-10-20",
        "until": "2025-11-10",
        "channel": "web",
        "tier": "free",
        "user": "",
        "topic": "orders",
    }
    with served(six_weeks) as server:
        found = Page(ask(server, f"/?{urlencode(asked)}")[1])
        wanted = Filters(
            since_ns=MONDAY + 7 * DAY, until_ns=MONDAY + 28 * DAY, channel="web", tier="free", topic="orders"
        )
        expected = collect(six_weeks, wanted, now_ns=NOW)
        assert found.tiles["Sessions"][0] == str(expected.totals.sessions) != "0"
        chosen = [each["value"] for each in found.of("option") if "selected" in each]
        assert chosen == ["web", "free", "orders"]
        given = {each["name"]: each.get("value") for each in found.of("input") if "name" in each}
        assert (given["since"], given["until"], given["user"]) == ("2025-10-20T00:00", "2025-11-10T00:00", None)
        kinds = {each["name"]: each["type"] for each in found.of("input") if "name" in each}
        assert kinds["since"] == kinds["until"] == "datetime-local"
        values = [each["value"] for each in found.of("option")]
        for known in ("slack", "enterprise", "globex", "billing", "gpt-4o", "handoff", "open"):
            assert known in values


def test_filters_of_the_command_hold_until_they_are_taken_away(six_weeks: Ledger) -> None:
    def sessions_of(**wanted: str) -> str:
        return str(collect(six_weeks, Filters(**wanted), now_ns=NOW).totals.sessions)  # type: ignore[arg-type]

    with served(six_weeks, Filters(channel="web", tier="")) as server:
        first = Page(ask(server, "/")[1])
        assert first.tiles["Sessions"][0] == sessions_of(channel="web", tier="")
        assert [each["value"] for each in first.of("option") if "selected" in each] == ["web", "(not known)"]
        assert Page(ask(server, "/?tier=free")[1]).tiles["Sessions"][0] == sessions_of(channel="web", tier="free")
        [clear] = [str(link["href"]) for link in first.of("a") if str(link["href"]).startswith("/?")]
        assert Page(ask(server, clear)[1]).tiles["Sessions"][0] == sessions_of()
        unknown = f"/?channel=&org={quote('(not known)')}&tier="
        assert Page(ask(server, unknown)[1]).tiles["Sessions"][0] == sessions_of(org_id="")


def fields_of(found: Page) -> dict[str | None, str | None]:
    return {each["name"]: each.get("value") for each in found.of("input") if "name" in each}


def test_a_time_of_a_day_can_be_chosen(six_weeks: Ledger) -> None:
    noon = MONDAY + 20 * DAY + 12 * 3600 * SECOND
    with served(six_weeks) as server:
        found = Page(ask(server, "/?since=2025-11-02T12:00&until=")[1])
        assert found.tiles["Sessions"][0] == str(collect(six_weeks, Filters(since_ns=noon), now_ns=NOW).totals.sessions)
        assert fields_of(found)["since"] == "2025-11-02T12:00"


def test_a_user_is_found_by_the_beginning_of_the_hash_and_one_that_is_none_is_said(
    six_weeks: Ledger, report: Report
) -> None:
    user = str(report.latest[0].user_id)
    with served(six_weeks) as server:
        of_user = collect(six_weeks, Filters(user_id=user), now_ns=NOW).totals.sessions
        assert of_user > 0
        for begins in (user, user[:8]):
            found = Page(ask(server, f"/?user={begins}")[1])
            assert found.tiles["Sessions"][0] == str(of_user)
            assert fields_of(found)["user"] == user
        answer, body = ask(server, "/?user=zzz")
        assert answer.status == 400
        assert "No user has a hash that begins with &#x27;zzz&#x27;" in body
        several = ask(server, f"/?user={user[0]}")[1]
        assert "Several users have hashes that begin with" in several
        assert ask(server, "/?user=%25")[0].status == 400, "no pattern"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("since=<b>soon</b>", "since is &#x27;&lt;b&gt;soon&lt;/b&gt;"),
        ("colour=red", "There is no filter &#x27;colour&#x27;"),
        ("channel=" + "x" * 201, "The filter channel has 201 characters"),
        ("&".join(f"channel={n}" for n in range(60)), "too many fields"),
    ],
)
def test_filters_that_cannot_be_used_are_refused_in_words(six_weeks: Ledger, query: str, words: str) -> None:
    with served(six_weeks) as server:
        answer, body = ask(server, f"/?{query.replace('<', '%3C').replace('>', '%3E')}")
        assert answer.status == 400
        assert words in body
        assert "<b>" not in body


def test_a_ledger_that_cannot_be_read_is_an_answer_too(six_weeks: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Report:
        raise LedgerError("The ledger at <somewhere> failed.")

    with served(six_weeks) as server:
        monkeypatch.setattr("turntrace.report.serving.collect", broken)
        answer, body = ask(server, "/")
        assert answer.status == 500
        assert "The ledger at &lt;somewhere&gt; failed." in body
        monkeypatch.undo()
        assert ask(server, "/")[0].status == 200


def test_a_reader_who_goes_away_disturbs_nobody(six_weeks: Ledger, capfd: pytest.CaptureFixture[str]) -> None:
    with served(six_weeks) as server:
        with socket.create_connection(("127.0.0.1", urlsplit(server.url).port or 0), timeout=5) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
            gone.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ask(server, "/")[0].status == 200
    assert capfd.readouterr().err == ""


def test_a_port_that_is_taken_is_said() -> None:
    with served(Ledger("sqlite://")) as server:
        port = urlsplit(server.url).port or 0
        with pytest.raises(ConfigurationError, match=f"port {port}: "):
            serve(Ledger("sqlite://"), port=port)
    with pytest.raises(ConfigurationError, match="port 99999: "):
        serve(Ledger("sqlite://"), port=99999)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (Filters(failed=True), "turns <strong><bdi>failed or abandoned"),
        (Filters(unsatisfied=True), "feedback <strong><bdi>below 50%"),
        (Filters(error="TimeoutError"), "turns that ended with <strong><bdi>TimeoutError"),
        (Filters(conversation_id="c-42"), "conversation <strong><bdi>c-42"),
    ],
    ids=["failed", "unsatisfied", "error", "conversation"],
)
def test_filters_of_turns_are_stated_and_stand_in_the_form(chosen: Filters, said: str) -> None:
    assert said in str(applied(chosen))
    form = str(filter_form(chosen, Choices((), (), (), (), (), ())))
    assert 'name="failed"' in form
    assert 'name="unsatisfied"' in form
    assert ("selected" in form) == bool(chosen.failed or chosen.unsatisfied)
    asked = {"failed": ["yes"], "unsatisfied": ["yes"], "error": ["TimeoutError"], "conversation": ["c-42"]}
    wanted = Filters(failed=True, unsatisfied=True, error="TimeoutError", conversation_id="c-42")
    assert filters_of(asked, Filters()) == wanted
    assert filters_of({"failed": [""], "unsatisfied": [""]}, Filters(failed=True, unsatisfied=True)) == Filters()
