"""Analytics: every question with every filter, on each database, against figures that are counted here in Python."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta, timezone
from datetime import date as date_type
from fractions import Fraction
from functools import cache, partial
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from sqlalchemy import Engine, create_engine, insert, select
from sqlalchemy.pool import StaticPool

import postgres
from conftest import AIRLINE
from turntrace import SessionTracker, analytics, boundary
from turntrace.analytics import ALL, MOST_TURNS, ORDERS, Cohort, Dropoffs, Filters, FunnelStage, Rate, day_of, interval
from turntrace.analytics.times import iso_day
from turntrace.demo.player import Player
from turntrace.demo.replay import Replay
from turntrace.demo.transcripts import find_sources, read_lines
from turntrace.errors import ConfigurationError
from turntrace.ledger import Ledger
from turntrace.ledger.tables import conversations, decisions, journeys, sessions, stages, turn_steps, turns
from turntrace.records import TurnSummary

SECOND = 1_000_000_000
DAY = 86_400 * SECOND
MONDAY = int(datetime(2026, 11, 2, tzinfo=UTC).timestamp()) * SECOND
TABLES = (sessions, conversations, turns, turn_steps, decisions, journeys, stages)
DATABASES = ("sqlite-file", "sqlite-memory", "postgresql")
Row = dict[str, Any]

_servers = ExitStack()


@cache
def postgres_url() -> str:
    return _servers.enter_context(postgres.server())


@pytest.fixture(scope="module", autouse=True)
def _stop_servers() -> Iterator[None]:
    yield
    _servers.close()
    postgres_url.cache_clear()


def engine_of(database: str, folder: Path) -> Engine:
    if database == "sqlite-memory":
        return create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    url = postgres.new_schema(postgres_url()) if database == "postgresql" else f"sqlite:///{folder}/ledger.db"
    return create_engine(url)


@dataclass
class Records:
    """The rows of a ledger, as Python's own values."""

    rows: dict[str, list[Row]] = field(default_factory=lambda: {table.name: [] for table in TABLES})

    @property
    def sessions(self) -> list[Row]:
        return self.rows[sessions.name]

    @property
    def turns(self) -> list[Row]:
        return self.rows[turns.name]

    def of(self, table: Any) -> list[Row]:
        return self.rows[table.name]

    def add_session(self, name: str, **given: Any) -> Row:
        row = {column.name: None for column in sessions.c} | {
            **{"id": name, "channel": "web", "type": "chat", "sessions_total": 1, "announced": True},
            **{"started_ns": MONDAY, "last_activity_ns": given.get("started_ns", MONDAY)},
            **dict.fromkeys(
                ("total_turns", "failed_turns", "llm_calls", "tool_calls", "input_tokens", "output_tokens"), 0
            ),
            **dict.fromkeys(("unpriced_calls", "active_ms", "wait_ms", "prunings", "feedback_count"), 0),
            **{"total_cost_usd": 0.0, "feedback_sum": 0.0},
            **given,
        }
        self.sessions.append(row)
        return row

    def add_steps(self, turn: Row, steps: list[list[Any]]) -> None:
        self.of(turn_steps).append(
            {"started_ns": turn["started_ns"], "turn_id": turn["id"], "steps": json.dumps(steps)}
        )

    def add_turn(self, session: Row, conversation: str, number: int, **given: Any) -> Row:
        """Add a turn, to the sums of its session too."""
        name = f"{conversation}/{number}"
        row = {column.name: None for column in turns.c} | {
            **{"id": name, "conversation_id": conversation, "number": number, "session_id": session["id"]},
            **{"user_id": session["user_id"], "status": "completed", "role": "user"},
            **{"started_ns": session["started_ns"], "ended_ns": session["started_ns"]},
            **{"trace_id": "a" * 32, "root_span_id": "b" * 16, "cost_usd": 0.0},
            **dict.fromkeys(("agent_runs", "tool_calls", "llm_calls", "input_tokens", "output_tokens"), 0),
            **dict.fromkeys(("unpriced_calls", "latency_ms", "wait_ms", "spans", "prunings", "messages_pruned"), 0),
            **dict.fromkeys(("tokens_pruned", "counted_tokens", "counted_of_tokens"), 0),
            **given,
        }
        self.turns.append(row)
        session["total_turns"] += 1
        session["failed_turns"] += row["status"] == "failed"
        session["active_ms"] += row["latency_ms"]
        session["total_cost_usd"] += row["cost_usd"]
        for column in ("input_tokens", "output_tokens", "unpriced_calls", "prunings"):
            session[column] += row[column]
        return row

    def add_conversation(self, name: str, session: Row, topic: str | None) -> None:
        known = {"id": name, "session_id": session["id"], "user_id": session["user_id"], "topic": topic}
        self.of(conversations).append(known | {"total_turns": 1, "started_ns": 0, "last_activity_ns": 0})

    def add_decision(self, turn: Row, strategy: str | None, pruned: int, before: int | None, after: int | None) -> None:
        row = {column.name: None for column in decisions.c} | {
            **{"id": len(self.of(decisions)) + 1, "turn_id": turn["id"], "session_id": turn["session_id"]},
            **{"conversation_id": turn["conversation_id"], "turn_number": turn["number"], "at_ns": 1},
            **{"strategy": strategy, "trigger": "threshold", "tokens_before": before, "tokens_after": after},
            **{"messages_before": 9, "messages_after": 9 - pruned, "messages_pruned": pruned, "duration_us": 5},
        }
        self.of(decisions).append(row)

    def step(self, owner: str, session: str, stage: str, at_s: int, in_stage_ms: int | None, **given: Any) -> None:
        row = {
            **{"id": len(self.of(stages)) + 1, "owner": owner, "name": "onboarding", "stage": stage},
            **{"stage_number": 1, "total_stages": 3, "session_id": session, "turn_number": None},
            **{"at_ns": MONDAY + at_s * SECOND, "time_in_stage_ms": in_stage_ms, "is_back": False, "converted": False},
        }
        self.of(stages).append(row | given)

    def journey(
        self, owner: str, stage: str, *, took_ms: int | None = None, turn: int | None = None, **given: Any
    ) -> None:
        row = {
            **{"owner": owner, "name": "onboarding", "stages": '["begin", "middle", "done"]', "stage": stage},
            **{"started_ns": MONDAY, "entered_ns": MONDAY, "conversion_turn": turn},
            **{"converted_ns": None if took_ms is None else MONDAY + took_ms * 1_000_000 + 999_999},
        }
        self.of(journeys).append(row | given)

    def write(self, engine: Engine) -> Ledger:
        ledger = Ledger(engine)
        with engine.begin() as connection:
            for table in TABLES:
                if self.of(table):
                    connection.execute(insert(table), self.of(table))
        return ledger


def read_records(engine: Engine) -> Records:
    records = Records()
    with engine.connect() as connection:
        for table in TABLES:
            records.rows[table.name] = [dict(row) for row in connection.execute(select(table)).mappings()]
    return records


# --- by chance: a ledger of everything that can be -------------------------------------------------------------------
def by_chance(seed: int = 7, count: int = 160) -> Records:
    """Return sessions of five weeks with all that may be unknown, ties, waiting and abandoned turns, and long ones."""
    chance, records = random.Random(seed), Records()
    for n in range(count):
        began = MONDAY + chance.randrange(35) * DAY + chance.choice((0, 1, DAY - 1, chance.randrange(DAY)))
        reason = chance.choice((None, "completed", "user_exit", "inactive_timeout", "error", "Own"))
        rated = chance.choice((0, 0, 1, 2))
        session = records.add_session(
            f"{chance.choice(('S', 's', 'é'))}{n}",
            user_id=chance.choice((None, *(f"user{k}" for k in range(25)))),
            channel=chance.choice(("web", "mobile")),
            tier=chance.choice((None, "free", "premium")),
            org_id=chance.choice((None, "acme")),
            started_ns=began,
            last_activity_ns=began + chance.choice((0, 1, 60 * SECOND, chance.randrange(2 * DAY))),
            ended_ns=None if reason is None else began + 3 * DAY,
            end_reason=reason,
            dropoff=None if reason is None else chance.random() < 0.4,
            prunings=chance.choice((0, 0, 3)),
            feedback_count=rated,
            feedback_sum=float(sum(chance.choice((0, 1)) for _ in range(rated))),
            last_turn=None if reason is None else chance.choice((None, 1, 2, 50, 51, 70)),
            last_intent=chance.choice((None, "refund", "Rebook", "éclair")),
            last_action=chance.choice((None, "answered", "failed")),
            journey_name="onboarding",
            journey_converted=chance.choice((None, None, True, False)),
        )
        for part in range(chance.choice((0, 1, 1, 2))):
            name = f"c{n}-{part}"
            records.add_conversation(name, session, chance.choice((None, "billing", "travel")))
            first, many = chance.choice(((1, 3), (1, 6), (48, 6)))
            for number in range(first, first + chance.randrange(1, many + 1)):
                turn_by_chance(chance, records, session, name, number)
    for owner in sorted({owner_of(row) for row in records.sessions if row["journey_converted"]}):
        records.journey(owner, "done", took_ms=chance.randrange(35) * DAY // 1_000_000)
    return records


def owner_of(session: Row) -> str:
    return str(session["user_id"] or f"session:{session['id']}")


def turn_by_chance(chance: random.Random, records: Records, session: Row, conversation: str, number: int) -> None:
    limit = chance.choice((None, 0, 1000, 128_000))
    counted = chance.choice((0, 100, 900))
    turn = records.add_turn(
        session,
        conversation,
        number,
        status=chance.choice(("completed",) * 5 + ("failed", "interrupted", "abandoned")),
        latency_ms=chance.choice((0, 500, 500, chance.randrange(9000))),
        time_to_first_token_ms=chance.choice((None, 80, chance.randrange(500))),
        model=chance.choice((None, "gpt-4o", "claude")),
        intent=chance.choice((None, "refund", "Rebook", "éclair")),
        input_tokens=chance.randrange(5000),
        output_tokens=chance.randrange(500),
        cost_usd=chance.randrange(64) / 1024,
        unpriced_calls=chance.choice((0, 0, 1)),
        context_tokens=chance.choice((None, chance.randrange(1200))),
        context_limit=limit,
        counted_of_tokens=counted,
        counted_tokens=counted and chance.randrange(1000),
    )
    turn["error"] = ("TimeoutError", "ValueError")[number % 2] if turn["status"] == "failed" else None
    if chance.random() < 0.3:
        strategy, pruned = chance.choice((None, "drop", "Drop", "summarize")), chance.choice((0, 2, 5))
        records.add_decision(turn, strategy, pruned, *chance.choice(((None, None), (500, 200), (100, 300))))


# --- the same figures, counted in Python -----------------------------------------------------------------------------
def meets(row: Row, **wanted: str | None) -> bool:
    return all(value is None or row[name] == (value or None) for name, value in wanted.items())


def kept_sessions(records: Records, filters: Filters, *, of_turns: bool = True) -> list[Row]:
    own = {name: getattr(filters, name) for name in ("channel", "tier", "org_id", "user_id")}
    found = [
        row
        for row in records.sessions
        if meets(row, **own)
        and (filters.since_ns is None or row["started_ns"] >= filters.since_ns)
        and (filters.until_ns is None or row["started_ns"] < filters.until_ns)
        and (filters.end_reason != "open" or row["ended_ns"] is None)
        and (filters.end_reason in (None, "open") or row["end_reason"] == filters.end_reason)
        and (not filters.unsatisfied or (row["feedback_count"] and row["feedback_sum"] / row["feedback_count"] < 0.5))
    ]
    if not of_turns or not filters.of_some_turns:
        return found
    having = {turn["session_id"] for turn in records.turns if its(records, filters, turn)}
    return [row for row in found if row["id"] in having]


def its(records: Records, filters: Filters, turn: Row) -> bool:
    topics = {row["id"]: row for row in records.of(conversations)}
    own = {name: getattr(filters, name) for name in ("model", "conversation_id", "error")}
    if filters.failed and turn["status"] not in ("failed", "abandoned"):
        return False
    return meets(turn, **own) and meets(topics[turn["conversation_id"]], topic=filters.topic)


def kept_turns(records: Records, filters: Filters) -> list[Row]:
    ids = {row["id"] for row in kept_sessions(records, filters, of_turns=False)}
    return [turn for turn in records.turns if turn["session_id"] in ids and its(records, filters, turn)]


def rank(values: Iterable[Any], percent: int) -> Any:
    """Return a quantile by the nearest rank."""
    ordered = sorted(values)
    return ordered[max(1, ceil(Fraction(percent * len(ordered), 100))) - 1] if ordered else None


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return found


def total(rows: Iterable[Row], *names: str) -> Any:
    return sum(row[name] for row in rows for name in names)


def date(at_ns: int) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=at_ns // SECOND)).strftime("%Y-%m-%d")


def numbered(turn: Row) -> int:
    return min(int(turn["number"]), MOST_TURNS + 1)


def expected_days(records: Records, filters: Filters) -> list[tuple[Any, ...]]:
    days = grouped(kept_sessions(records, filters), lambda row: date(row["started_ns"]))
    return [
        (
            day,
            len(rows),
            len({row["user_id"] for row in rows} - {None}),
            total(rows, "total_turns"),
            sum(row["dropoff"] is True for row in rows),
            total(rows, "input_tokens", "output_tokens"),
            pytest.approx(total(rows, "total_cost_usd")),
        )
        for day, rows in sorted(days.items())
    ]


def expected_lengths(records: Records, filters: Filters) -> tuple[Any, ...]:
    kept = kept_sessions(records, filters)
    ms = [(row["last_activity_ns"] - row["started_ns"]) // 1_000_000 for row in kept]
    minutes = Counter(min(1440, ceil(Fraction(each, 60_000))) for each in ms)
    many = [row["total_turns"] for row in kept]
    quantiles = [rank(values, percent) for values in (many, ms) for percent in (50, 95)]
    return sorted(Counter(many).items()), sorted(minutes.items()), len(kept), *quantiles


def expected_latencies(records: Records, filters: Filters) -> list[tuple[Any, ...]]:
    ended = [turn for turn in kept_turns(records, filters) if turn["status"] in ("completed", "failed")]
    parts = grouped(ended, numbered) | ({0: ended} if ended else {})
    found = []
    for number, rows in sorted(parts.items()):
        took = [row["latency_ms"] for row in rows]
        first = [row["time_to_first_token_ms"] for row in rows if row["time_to_first_token_ms"] is not None]
        quantiles = [rank(values, percent) for values in (took, first) for percent in (50, 95, 99)]
        found.append((number, len(rows), *quantiles[:3], len(first), *quantiles[3:]))
    return found


def expected_windows(records: Records, filters: Filters) -> list[tuple[Any, ...]]:
    known = [
        turn for turn in kept_turns(records, filters) if turn["context_tokens"] is not None and turn["context_limit"]
    ]
    return [
        (
            number,
            len(rows),
            *(rank((r["context_tokens"] * 1000 // r["context_limit"] for r in rows), p) / 1000 for p in (50, 95, 99)),
        )
        for number, rows in sorted(grouped(known, numbered).items())
    ]


def expected_usage(records: Records, filters: Filters, of: Callable[[Row], str]) -> list[tuple[Any, ...]]:
    """Of the turns, which also where a session's own sums are asked for come to the same."""
    found = []
    for name, rows in grouped(kept_turns(records, filters), of).items():
        sums = [total(rows, column) for column in ("input_tokens", "output_tokens", "cost_usd", "unpriced_calls")]
        found.append((name, len(rows), *sums))
    return sorted(found, key=lambda row: (-row[4], -row[2], row[0]))


def expected_estimates(records: Records, filters: Filters) -> list[tuple[Any, ...]]:
    both = [turn for turn in kept_turns(records, filters) if turn["counted_of_tokens"] > 0]
    found = [
        (model or "", len(rows), total(rows, "counted_tokens"), total(rows, "counted_of_tokens"))
        for model, rows in grouped(both, lambda turn: turn["model"]).items()
    ]
    return sorted(found, key=lambda row: (-row[1], row[0]))


def expected_prunings(records: Records, filters: Filters) -> list[tuple[Any, ...]]:
    ids = {turn["id"] for turn in kept_turns(records, filters)}
    rows = [row for row in records.of(decisions) if row["messages_pruned"] > 0 and row["turn_id"] in ids]
    found = []
    for (strategy, trigger), of_it in grouped(rows, lambda row: (row["strategy"] or "", row["trigger"] or "")).items():
        tokens = sum(row["tokens_before"] - row["tokens_after"] for row in of_it if row["tokens_before"] is not None)
        among = len({row["session_id"] for row in of_it})
        found.append((strategy, trigger, len(of_it), among, total(of_it, "messages_pruned"), tokens))
    return sorted(found, key=lambda row: (-row[2], row[0], row[1]))


def expected_dropoffs(records: Records, filters: Filters, column: str) -> set[tuple[Any, ...]]:
    ended = [row for row in kept_sessions(records, filters) if row["ended_ns"] is not None]

    def at(row: Row) -> str:
        value = row[column]
        return "" if value is None else str(min(value, MOST_TURNS + 1) if column == "last_turn" else value)

    return {(name, len(rows), sum(row["dropoff"] is True for row in rows)) for name, rows in grouped(ended, at).items()}


def outcome(row: Row, records: Records) -> str:
    whose = [
        each for each in records.of(journeys) if (each["owner"], each["name"]) == (owner_of(row), row["journey_name"])
    ]
    converted = any((each["converted_ns"] or 0) >= row["started_ns"] for each in whose) and row["journey_converted"]
    if row["ended_ns"] is None:
        return "unknown"
    if row["feedback_count"]:
        return "successful" if row["feedback_sum"] / row["feedback_count"] >= 0.5 else "unsuccessful"
    if converted or row["end_reason"] == "completed":
        return "successful"
    return "unsuccessful" if row["end_reason"] == "error" or row["dropoff"] else "unknown"


def expected_outcomes(records: Records, filters: Filters) -> list[tuple[Any, ...]]:
    by_outcome, found = grouped(kept_sessions(records, filters), lambda row: outcome(row, records)), []
    for name in ("successful", "unsuccessful", "unknown"):
        if rows := by_outcome.get(name):
            n, many, rated = len(rows), total(rows, "total_turns"), total(rows, "feedback_count")
            ms = sum((row["last_activity_ns"] - row["started_ns"]) // 1_000_000 for row in rows)
            means = [many / n, ms / n / 60_000, total(rows, "active_ms") / many if many else None]
            means += [total(rows, "input_tokens", "output_tokens") / n, total(rows, "total_cost_usd") / n]
            counts = [sum(row[column] > 0 for row in rows) for column in ("failed_turns", "prunings", "feedback_count")]
            satisfaction = total(rows, "feedback_sum") / rated if rated else None
            found.append((name, n, *map(pytest.approx, means), *counts, pytest.approx(satisfaction)))
    return found


def expected_intents(records: Records, filters: Filters) -> list[tuple[Any, ...]]:
    ids = {row["id"]: outcome(row, records) for row in kept_sessions(records, filters)}
    pairs = {(turn["intent"], turn["session_id"]) for turn in kept_turns(records, filters) if turn["intent"]}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for intent, session_id in pairs:
        counts[intent][ids[session_id]] += 1
    found = [(name, *(of[each] for each in ("successful", "unsuccessful", "unknown"))) for name, of in counts.items()]
    return sorted(found, key=lambda row: (-sum(row[1:]), row[0]))


def expected_cohorts(records: Records, filters: Filters) -> list[tuple[Any, ...]]:
    rows = kept_sessions(records, filters.of(since_ns=None))
    weeks = {
        user: [(r["started_ns"] - MONDAY) // (7 * DAY) for r in of]
        for user, of in grouped(rows, lambda r: r["user_id"]).items()
        if user
    }
    began = {user: min(r["started_ns"] for r in rows if r["user_id"] == user) for user in weeks}
    new = [user for user in weeks if filters.since_ns is None or began[user] >= filters.since_ns]
    found = []
    for first in sorted({min(weeks[user]) for user in new}):
        users = [user for user in new if min(weeks[user]) == first]
        active = Counter(week - first for user in users for week in set(weeks[user]))
        latest = (max(r["started_ns"] for r in rows) - MONDAY) // (7 * DAY)
        found.append((date(MONDAY + first * 7 * DAY), len(users), dict(active), latest - first))
    return found


def expected_users(records: Records, filters: Filters, order: Callable[[Row], Any]) -> list[tuple[Any, ...]]:
    by_user = grouped(kept_sessions(records, filters), lambda row: row["user_id"])
    found = []
    for user in by_user.keys() - {None}:
        rows = by_user[user]
        rated = total(rows, "feedback_count")
        figures = {
            "user_id": user,
            "sessions": len(rows),
            "turns": total(rows, "total_turns"),
            "tokens": total(rows, "input_tokens", "output_tokens"),
            "cost_usd": total(rows, "total_cost_usd"),
            "dropoffs": sum(row["dropoff"] is True for row in rows),
            "first_ns": min(row["started_ns"] for row in rows),
            "last_ns": max(row["last_activity_ns"] for row in rows),
            "satisfaction": total(rows, "feedback_sum") / rated if rated else None,
        }
        found.append(figures)
    return [tuple(row.values()) for row in sorted(found, key=lambda row: (-order(row), row["user_id"]))][:50]


SESSION_ORDERS: dict[str, Callable[[Row], Any]] = {
    "newest": lambda row: row["started_ns"],
    "longest": lambda row: row["last_activity_ns"] - row["started_ns"],
    "most turns": lambda row: row["total_turns"],
    "dearest": lambda row: row["total_cost_usd"],
    "slowest": lambda row: row["active_ms"] / row["total_turns"] if row["total_turns"] else -1,
    "most tokens": lambda row: row["input_tokens"] + row["output_tokens"],
    "most failed": lambda row: row["failed_turns"],
    "least satisfied": lambda row: (
        -row["feedback_sum"] / row["feedback_count"] if row["feedback_count"] else -2,
        row["started_ns"],
    ),
}


# --- every question, every filter, each database ----------------------------------------------------------------------
def plain(answer: Any) -> tuple[Any, ...]:
    """Return what an answer says, as a tuple."""
    return tuple(getattr(answer, each.name) for each in fields(answer))


def all_plain(answers: Iterable[Any]) -> list[tuple[Any, ...]]:
    return [plain(each) for each in answers]


def exact_types(answers: Iterable[Any]) -> None:
    """Check that no database's own numbers get out: a Decimal is no JSON."""
    for answer in answers:
        for value in plain(answer):
            assert value is None or type(value) in (int, float, str, bool, list, dict), (answer, type(value))


FILTERS = {
    "none": ALL,
    "since": Filters(since_ns=MONDAY + 9 * DAY),
    "until": Filters(until_ns=MONDAY + 20 * DAY),
    "a week": Filters(since_ns=MONDAY + 7 * DAY, until_ns=MONDAY + 14 * DAY),
    "channel": Filters(channel="mobile"),
    "tier": Filters(tier="free"),
    "tier not known": Filters(tier=""),
    "org": Filters(org_id="acme"),
    "topic": Filters(topic="billing"),
    "topic not known": Filters(topic=""),
    "model": Filters(model="gpt-4o"),
    "model not known": Filters(model=""),
    "topic and model": Filters(topic="travel", model="claude"),
    "end reason": Filters(end_reason="inactive_timeout"),
    "open": Filters(end_reason="open"),
    "user": Filters(user_id="user3"),
    "all of them": Filters(MONDAY, MONDAY + 34 * DAY, "web", "premium", "acme", "billing", "gpt-4o", "completed"),
    "conversation": Filters(conversation_id="c5-0"),
    "error": Filters(error="TimeoutError"),
    "failed": Filters(failed=True),
    "failed, of a model": Filters(failed=True, model="gpt-4o", channel="web"),
    "unsatisfied": Filters(unsatisfied=True),
    "unsatisfied, of a topic": Filters(unsatisfied=True, topic="billing", channel="web"),
    "nothing meets it": Filters(channel="telex"),
}


@dataclass
class Made:
    records: Records
    ledger: Ledger


@pytest.fixture(scope="module", params=DATABASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    engine, records = engine_of(request.param, tmp_path_factory.mktemp("chance")), by_chance()
    yield Made(records, records.write(engine))
    engine.dispose()


@pytest.fixture(params=FILTERS)
def filters(request: pytest.FixtureRequest) -> Filters:
    return FILTERS[request.param]


def test_sessions_over_time_are_those_of_each_day(made: Made, filters: Filters) -> None:
    found = analytics.sessions_over_time(made.ledger, filters)
    assert all_plain(found) == expected_days(made.records, filters)
    exact_types(found)


def test_session_lengths_are_counted_in_turns_and_begun_minutes(made: Made, filters: Filters) -> None:
    found = analytics.session_lengths(made.ledger, filters)
    turns_of, minutes, *others = plain(found)
    counted = ([plain(each) for each in turns_of], [plain(each) for each in minutes], *others)
    assert counted == expected_lengths(made.records, filters)
    exact_types([found, *turns_of, *minutes])


def test_latency_by_turn_is_of_turns_that_ended_by_the_nearest_rank(made: Made, filters: Filters) -> None:
    found = analytics.latency_by_turn(made.ledger, filters)
    assert all_plain(found) == expected_latencies(made.records, filters)
    exact_types(found)


def test_window_by_turn_is_in_thousandths_of_what_is_known(made: Made, filters: Filters) -> None:
    found = analytics.window_by_turn(made.ledger, filters)
    assert all_plain(found) == expected_windows(made.records, filters)
    exact_types(found)


def test_usage_by_day_tier_channel_and_model_is_that_of_the_turns(made: Made, filters: Filters) -> None:
    by_id = {row["id"]: row for row in made.records.sessions}
    used: dict[str, Callable[[Row], str]] = {
        "usage_by_day": lambda turn: date(by_id[turn["session_id"]]["started_ns"]),
        "usage_by_tier": lambda turn: by_id[turn["session_id"]]["tier"] or "",
        "usage_by_channel": lambda turn: by_id[turn["session_id"]]["channel"],
        "usage_by_model": lambda turn: turn["model"] or "",
    }
    for name, of in used.items():
        found = getattr(analytics, name)(made.ledger, filters)
        expected = expected_usage(made.records, filters, of)
        if name == "usage_by_day":
            expected.sort()
        assert [each for each in all_plain(found) if each[1]] == expected, name  # days of sessions without turns
        exact_types(found)


def test_estimate_errors_are_of_turns_in_which_both_counted(made: Made, filters: Filters) -> None:
    found = analytics.estimate_errors(made.ledger, filters)
    assert all_plain(found) == expected_estimates(made.records, filters)
    exact_types(found)


def test_by_model_answers_two_questions_as_each_alone(made: Made, filters: Filters) -> None:
    alone = analytics.usage_by_model(made.ledger, filters), analytics.estimate_errors(made.ledger, filters)
    assert analytics.by_model(made.ledger, filters) == alone


def test_prunings_are_by_strategy_in_the_turns_that_are_asked_for(made: Made, filters: Filters) -> None:
    found = analytics.prunings(made.ledger, filters)
    assert all_plain(found) == expected_prunings(made.records, filters)
    exact_types(found)


@pytest.mark.parametrize(
    ("question", "column"),
    [
        ("dropoff_by_turn", "last_turn"),
        ("dropoff_by_intent", "last_intent"),
        ("dropoff_by_action", "last_action"),
        ("dropoff_by_reason", "end_reason"),
    ],
)
def test_dropoffs_are_of_ended_sessions(made: Made, filters: Filters, question: str, column: str) -> None:
    found = getattr(analytics, question)(made.ledger, filters)
    assert len(found) == len({each.at for each in found})
    assert set(all_plain(found)) == expected_dropoffs(made.records, filters, column)
    exact_types(found)


def test_outcomes_are_told_by_feedback_journey_reason_and_dropoff(made: Made, filters: Filters) -> None:
    found = analytics.outcomes(made.ledger, filters)
    assert all_plain(found) == expected_outcomes(made.records, filters)
    exact_types(found)


def test_outcomes_by_intent_count_a_session_once_for_each_intent(made: Made, filters: Filters) -> None:
    found = analytics.outcomes_by_intent(made.ledger, filters)
    assert all_plain(found) == expected_intents(made.records, filters)
    assert analytics.outcomes_by_intent(made.ledger, filters, limit=2) == found[:2]
    exact_types(found)


def test_cohorts_are_of_users_whose_first_session_ever_is_in_the_range(made: Made, filters: Filters) -> None:
    found = analytics.retention(made.ledger, filters)
    assert all_plain(found) == expected_cohorts(made.records, filters)
    exact_types(found)


def test_users_come_in_each_order(made: Made, filters: Filters) -> None:
    orders: dict[Any, Callable[[Row], Any]] = {
        "latest": lambda row: row["last_ns"],
        "most sessions": lambda row: row["sessions"],
        "most turns": lambda row: row["turns"],
        "dearest": lambda row: row["cost_usd"],
        "most dropoffs": lambda row: row["dropoffs"],
        "least satisfied": lambda row: -2 if row["satisfaction"] is None else -row["satisfaction"],
    }
    for by, order in orders.items():
        found = analytics.users(made.ledger, by, filters)
        assert all_plain(found) == expected_users(made.records, filters, order), by
        exact_types(found)
        assert analytics.users(made.ledger, by, filters, limit=3) == found[:3]


def test_sessions_come_in_each_order_with_ties_by_their_ids(made: Made, filters: Filters) -> None:
    slowest = {key: max(row["latency_ms"] for row in rows) for key, rows in turns_by_session(made.records).items()}
    orders = SESSION_ORDERS | {"slowest turn": lambda row: slowest.get(row["id"], -1)}
    assert set(ORDERS) == set(orders)
    for by, order in orders.items():
        rows = sorted(kept_sessions(made.records, filters), key=lambda row: row["id"])
        ids = [row["id"] for row in sorted(rows, key=order, reverse=True)]
        ask: Any = by
        assert [each.id for each in analytics.sessions_by(made.ledger, ask, filters, limit=500)] == ids, by
        page = analytics.sessions_by(made.ledger, ask, filters, limit=5, offset=3)
        assert [each.id for each in page] == ids[3:8]


def test_the_least_satisfied_of_equal_ones_are_the_latest_also_where_a_sum_is_not_exact(engine: Engine) -> None:
    records = Records()
    given = {"late": (1e-17, 1), "early": (-1e-17, 2), "third": (1.0, 3), "most": (2.0, 2), "none": (0.0, 0)}
    for n, (name, (total, times)) in enumerate(given.items()):
        records.add_session(name, user_id="u", started_ns=MONDAY - n * 10**9, feedback_sum=total, feedback_count=times)
    ledger = records.write(engine)
    found = analytics.sessions_by(ledger, "least satisfied")
    assert [session.id for session in found] == list(given)
    assert [session.user_satisfaction for session in found] == [1e-17, 0.0, 1 / 3, 1.0, None]


def test_a_mean_that_is_a_half_but_for_the_last_digit_is_no_dissatisfaction(engine: Engine) -> None:
    records = Records()
    for name, total in {"half": 1.4999999999999998, "less": 1.49}.items():
        records.add_session(name, user_id="u", feedback_sum=total, feedback_count=3, ended_ns=MONDAY + 10**9)
    ledger = records.write(engine)
    assert [each.id for each in analytics.sessions_by(ledger, "newest", Filters(unsatisfied=True))] == ["less"]
    assert {each.outcome: each.n for each in analytics.outcomes(ledger)} == {"successful": 1, "unsuccessful": 1}


def turns_by_session(records: Records) -> dict[str, list[Row]]:
    return grouped(records.turns, lambda turn: turn["session_id"])


def test_the_slowest_turn_of_each_session_is_told_with_its_number(made: Made) -> None:
    ids = [row["id"] for row in made.records.sessions]
    found = analytics.slowest_turns(made.ledger, [*ids, "none such"])
    assert found.keys() == turns_by_session(made.records).keys()
    for session_id, rows in turns_by_session(made.records).items():
        most = max(row["latency_ms"] for row in rows)
        assert found[session_id].latency_ms == most
        assert found[session_id].number in [row["number"] for row in rows if row["latency_ms"] == most]
    assert analytics.slowest_turns(made.ledger, []) == {}


def test_abandoned_turns_are_counted_by_session(made: Made) -> None:
    ids = [row["id"] for row in made.records.sessions]
    abandoned = [row["session_id"] for row in made.records.turns if row["status"] == "abandoned"]
    assert analytics.abandoned_turns(made.ledger, [*ids, "none such"]) == Counter(abandoned)
    assert abandoned
    assert analytics.abandoned_turns(made.ledger, []) == {}


# --- what must hold of any figures ------------------------------------------------------------------------------------
def test_groups_sum_up_to_all_sessions_and_turns(made: Made) -> None:
    ledger, rows = made.ledger, made.records.sessions
    days = analytics.sessions_over_time(ledger)
    assert sum(each.sessions for each in days) == len(rows)
    lengths = analytics.session_lengths(ledger)
    assert sum(each.sessions for each in lengths.turns) == sum(each.sessions for each in lengths.minutes) == len(rows)
    assert sum(each.n for each in analytics.outcomes(ledger)) == len(rows)
    ended = sum(row["ended_ns"] is not None for row in rows)
    for ask in ("dropoff_by_turn", "dropoff_by_intent", "dropoff_by_action", "dropoff_by_reason"):
        assert sum(each.ended for each in getattr(analytics, ask)(ledger)) == ended
    every, *by_number = analytics.latency_by_turn(ledger)
    assert every.n == sum(each.n for each in by_number)
    assert every.streamed == sum(each.streamed for each in by_number)
    for filters in (ALL, Filters(model="gpt-4o"), Filters(topic="billing")):
        sums = {
            (sum(u.turns for u in used), sum(u.input_tokens for u in used), round(sum(u.cost_usd for u in used), 9))
            for ask in ("usage_by_day", "usage_by_tier", "usage_by_channel", "usage_by_model")
            for used in [getattr(analytics, ask)(ledger, filters)]
        }
        assert len(sums) == 1


EVERY_QUESTION = sorted(
    name
    for name in analytics.__all__
    if callable(getattr(analytics, name))
    and name
    not in ("ask_together", "day_of", "interval", "funnel", "users", "users_that_begin", "sessions_by", "choices")
    and name not in ("slow_above_ms", "slowest_turns", "abandoned_turns")
    and not name[0].isupper()
)


def every_answer(ledger: Ledger, filters: Filters = ALL) -> dict[str, Any]:
    answers = {name: getattr(analytics, name)(ledger, filters) for name in EVERY_QUESTION}
    answers |= {f"sessions_by {by}": analytics.sessions_by(ledger, by, filters) for by in ORDERS}  # type: ignore[arg-type]
    answers["choices"] = analytics.choices(ledger)
    return answers | {"users": analytics.users(ledger, "dearest", filters)}


def test_a_filter_that_all_meet_is_as_none(made: Made) -> None:
    assert every_answer(made.ledger, Filters(since_ns=0, until_ns=2**63 - 1)) == every_answer(made.ledger)


def test_the_time_range_is_half_open(made: Made) -> None:
    at = sorted(row["started_ns"] for row in made.records.sessions)[70]
    before, after = Filters(until_ns=at), Filters(since_ns=at)
    both = [analytics.session_lengths(made.ledger, filters).n for filters in (before, after)]
    assert both == [sum(row["started_ns"] < at for row in made.records.sessions), len(made.records.sessions) - both[0]]
    assert min(row.started_ns for row in analytics.sessions_by(made.ledger, filters=after, limit=500)) == at


def test_asked_together_the_answers_are_the_same(made: Made) -> None:
    questions: dict[str, Callable[[], Any]] = {
        name: partial(getattr(analytics, name), made.ledger) for name in EVERY_QUESTION
    }
    together = analytics.ask_together(questions)
    assert list(together) == EVERY_QUESTION
    assert together == {name: ask() for name, ask in questions.items()}


def test_an_error_of_a_question_asked_together_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        analytics.ask_together({"one": lambda: 1, "other": lambda: 1 // 0})


def test_what_was_converted_before_a_session_is_no_success_of_it(engine: Engine) -> None:
    records = Records()
    for name, began in (("first", 0), ("second", 10 * DAY)):
        ended = {"ended_ns": MONDAY + began + DAY, "end_reason": "inactive_timeout", "dropoff": True}
        known = {"user_id": "ann", "journey_name": "onboarding", "journey_converted": True}
        records.add_session(name, started_ns=MONDAY + began, **known, **ended)
    records.journey("ann", "done", took_ms=5_000)
    found = analytics.outcomes(records.write(engine))
    assert [(each.outcome, each.n) for each in found] == [("successful", 1), ("unsuccessful", 1)]


# --- the recorded conversations ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory, airline: Path) -> Iterator[Records]:
    path = tmp_path_factory.mktemp("replay") / "ledger.db"
    with boundary.strict():
        settings: dict[str, Any] = {
            "user_hash_key": "a key for hashing users in tests",
            "content": "metadata",
            "context_limit": 4000,
        }
        player = Player(f"sqlite:///{path}", tracer_provider=TracerProvider(), outbox=True, **settings)
        totals = Replay(player, concurrency=2).run(read_lines(find_sources([str(AIRLINE)])))
        player.close()
    assert totals.sessions >= 90
    engine = create_engine(f"sqlite:///{path}")
    yield read_records(engine)
    engine.dispose()


@pytest.fixture(scope="module", params=DATABASES)
def airline_ledger(
    request: pytest.FixtureRequest, replayed: Records, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Ledger]]:
    engine = engine_of(request.param, tmp_path_factory.mktemp("airline"))
    yield engine, replayed.write(engine)
    engine.dispose()


def sql(engine: Engine, query: str) -> list[tuple[Any, ...]]:
    """Run SQL as it stands here, on the driver."""
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


def test_of_the_recorded_conversations_the_figures_are_those_of_sql_by_hand(
    airline_ledger: tuple[Engine, Ledger],
) -> None:
    engine, ledger = airline_ledger
    [(count, many, tokens, cost, users_of)] = sql(
        engine,
        "SELECT count(*), sum(total_turns), sum(input_tokens + output_tokens), sum(total_cost_usd), "
        "count(DISTINCT user_id) FROM turntrace_sessions",
    )
    days = analytics.sessions_over_time(ledger)
    assert sum(each.sessions for each in days) == count
    assert sum(each.turns for each in days) == many
    assert sum(each.tokens for each in days) == tokens
    assert sum(each.cost_usd for each in days) == pytest.approx(cost)
    assert sum(cohort.users for cohort in analytics.retention(ledger)) == users_of
    assert {
        (*plain(each)[:4], round(each.cost_usd, 9), each.unpriced_calls) for each in analytics.usage_by_model(ledger)
    } == {
        (model or "", n, int(given), int(answered), round(price, 9), int(unpriced))
        for model, n, given, answered, price, unpriced in sql(
            engine,
            "SELECT model, count(*), sum(input_tokens), sum(output_tokens), sum(cost_usd), sum(unpriced_calls) "
            "FROM turntrace_turns GROUP BY model",
        )
    }
    took = sql(engine, "SELECT number, latency_ms FROM turntrace_turns WHERE status IN ('completed', 'failed')")
    every, *by_number = analytics.latency_by_turn(ledger)
    assert plain(every)[1:5] == (len(took), *(rank((ms for _, ms in took), percent) for percent in (50, 95, 99)))
    assert [(each.number, each.n, each.p50) for each in by_number] == [
        (number, len(of), rank((ms for _, ms in of), 50))
        for number, of in sorted({n: [row for row in took if row[0] == n] for n, _ in took}.items())
    ]
    reasons = sql(engine, "SELECT end_reason, count(*) FROM turntrace_sessions GROUP BY end_reason")
    assert {each.at: each.ended for each in analytics.dropoff_by_reason(ledger)} == dict(reasons)
    pruned = sql(
        engine,
        'SELECT strategy, "trigger", count(*), sum(messages_pruned) FROM turntrace_decisions '
        'WHERE messages_pruned > 0 GROUP BY strategy, "trigger"',
    )
    assert pruned
    assert {(each.strategy, each.trigger, each.decisions, each.messages) for each in analytics.prunings(ledger)} == {
        (*by, int(messages)) for *by, messages in pruned
    }
    dearest = sql(engine, "SELECT id FROM turntrace_sessions ORDER BY total_cost_usd DESC, id LIMIT 10")
    assert [each.id for each in analytics.sessions_by(ledger, "dearest")] == [name for (name,) in dearest]


def test_of_the_recorded_conversations_every_figure_is_that_of_python(
    airline_ledger: tuple[Engine, Ledger], replayed: Records
) -> None:
    _, ledger = airline_ledger
    assert all_plain(analytics.sessions_over_time(ledger)) == expected_days(replayed, ALL)
    assert all_plain(analytics.latency_by_turn(ledger)) == expected_latencies(replayed, ALL)
    assert all_plain(analytics.window_by_turn(ledger)) == expected_windows(replayed, ALL)
    assert all_plain(analytics.prunings(ledger)) == expected_prunings(replayed, ALL)
    assert all_plain(analytics.outcomes(ledger)) == expected_outcomes(replayed, ALL)
    assert all_plain(analytics.retention(ledger)) == expected_cohorts(replayed, ALL)


@pytest.fixture(scope="module")
def answers_of_sqlite(replayed: Records, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    engine = engine_of("sqlite-file", tmp_path_factory.mktemp("first"))
    yield every_answer(replayed.write(engine))
    engine.dispose()


def test_every_answer_is_the_same_on_each_database(
    airline_ledger: tuple[Engine, Ledger], answers_of_sqlite: dict[str, Any]
) -> None:
    found = every_answer(airline_ledger[1])
    for name, expected in answers_of_sqlite.items():
        assert listed(found[name]) == listed(expected, nearly=True), name


def listed(value: Any, *, nearly: bool = False) -> Any:
    """Sums of floats depend on the order of the rows, which is a database's own: they are nearly the same."""
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-9) if nearly else value
    if isinstance(value, list | tuple):
        return [listed(each, nearly=nearly) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        told = (listed(getattr(value, name), nearly=nearly) for name in value.__dataclass_fields__)
        return [type(value).__name__, *told]
    return value


# --- by hand: what chance does not make -------------------------------------------------------------------------------
@pytest.fixture(params=DATABASES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    made = engine_of(request.param, tmp_path)
    yield made
    made.dispose()


def test_an_empty_ledger_is_answered_with_nothing_and_no_error(engine: Engine) -> None:
    ledger = Records().write(engine)
    for filters in FILTERS.values():
        answers = every_answer(ledger, filters)
        assert plain(answers.pop("session_lengths")) == ([], [], 0, None, None, None, None)
        assert answers.pop("by_model") == ([], [])
        assert answers.pop("turn_errors") == analytics.TurnErrors()
        assert set(plain(answers.pop("totals"))) == {0, None}
        assert plain(answers.pop("choices")) == ([],) * 6
        assert list(answers.values()) == [[]] * len(answers)
        assert analytics.funnel(ledger, "onboarding", filters) is None


def test_one_session_without_a_turn_is_a_session(engine: Engine) -> None:
    records = Records()
    records.add_session("s", user_id=None)
    ledger = records.write(engine)
    assert all_plain(analytics.sessions_over_time(ledger)) == [("2026-11-02", 1, 0, 0, 0, 0, 0.0)]
    assert plain(analytics.session_lengths(ledger))[2:] == (1, 0, 0, 0, 0)
    assert [each.latency_ms for each in analytics.outcomes(ledger)] == [None]
    assert [analytics.latency_by_turn(ledger), analytics.dropoff_by_turn(ledger), analytics.retention(ledger)] == [
        []
    ] * 3
    assert all_plain(analytics.usage_by_tier(ledger)) == [("", 0, 0, 0, 0.0, 0)]


def test_a_turn_that_waits_or_that_nobody_ended_has_no_latency_but_its_usage_counts(engine: Engine) -> None:
    records = Records()
    session = records.add_session("s", user_id="u")
    records.add_conversation("c", session, None)
    for number, (status, ms) in enumerate(
        (("completed", 900), ("failed", 700), ("interrupted", 5), ("abandoned", 0)), 1
    ):
        records.add_turn(session, "c", number, status=status, latency_ms=ms, input_tokens=10)
    ledger = records.write(engine)
    assert [(each.number, each.n, each.p50) for each in analytics.latency_by_turn(ledger)] == [
        (0, 2, 700),
        (1, 1, 900),
        (2, 1, 700),
    ]
    assert analytics.usage_by_model(ledger)[0].input_tokens == 40


def test_turns_after_the_fiftieth_are_one(engine: Engine) -> None:
    records = Records()
    session = records.add_session("s", user_id="u", ended_ns=MONDAY + 1, last_turn=77, dropoff=True)
    records.add_conversation("c", session, None)
    for number in (50, 51, 77):
        records.add_turn(session, "c", number, latency_ms=number, context_tokens=number, context_limit=100)
    ledger = records.write(engine)
    assert [(each.number, each.n, each.p99) for each in analytics.latency_by_turn(ledger)] == [
        (0, 3, 77),
        (50, 1, 50),
        (MOST_TURNS + 1, 2, 77),
    ]
    assert [(each.number, each.p50) for each in analytics.window_by_turn(ledger)] == [(50, 0.5), (51, 0.51)]
    assert analytics.dropoff_by_turn(ledger) == [Dropoffs("51", 1, 1)]


def test_dropoffs_by_turn_are_in_the_order_of_numbers_and_sessions_without_a_turn_come_last(engine: Engine) -> None:
    records = Records()
    for n, last in enumerate((10, 2, None, 2)):
        records.add_session(f"s{n}", user_id=None, ended_ns=MONDAY + 1, last_turn=last, dropoff=n == 1)
    found = analytics.dropoff_by_turn(records.write(engine))
    assert found == [Dropoffs("2", 2, 1), Dropoffs("10", 1, 0), Dropoffs("", 1, 0)]
    assert [each.rate for each in found] == [0.5, 0.0, 0.0]


def test_a_window_of_three_million_tokens_is_a_share_too(engine: Engine) -> None:
    records = Records()
    session = records.add_session("s", user_id="u")
    records.add_conversation("c", session, None)
    records.add_turn(session, "c", 1, context_tokens=2_999_999, context_limit=3_000_000)
    assert [each.p50 for each in analytics.window_by_turn(records.write(engine))] == [0.999]


def journeys_by_hand() -> Records:
    """Return who goes through, who leaves a stage out, who goes back, and an unknown user who only begins."""
    records = Records()
    for name, channel in (("web1", "web"), ("app", "mobile"), ("web2", "web")):
        records.add_session(name, user_id="u", channel=channel)
    records.step("ann", "web1", "begin", 0, None)
    records.step("ann", "app", "middle", 10, 10_000)
    records.step("ann", "web2", "done", 40, 30_000)
    records.step("ann", "web2", "done", 45, 5_000, converted=True)
    records.journey("ann", "done", took_ms=45_000, turn=2)
    records.step("bob", "web1", "begin", 0, None)
    records.step("bob", "web1", "done", 7, 7_000, converted=True)
    records.journey("bob", "done", took_ms=7_000)
    records.step("cem", "app", "begin", 0, None)
    records.step("cem", "app", "middle", 20, 20_000)
    records.step("cem", "app", "begin", 21, 1_000, is_back=True)
    records.journey("cem", "begin", started_ns=MONDAY + 5)
    records.step("session:web2", "web2", "begin", 0, None)
    records.journey("session:web2", "begin")
    return records


def test_a_funnel_says_how_many_came_how_far_and_how_long_they_stayed(engine: Engine) -> None:
    ledger = journeys_by_hand().write(engine)
    [funnel] = analytics.funnels(ledger)
    assert funnel == analytics.funnel(ledger, "onboarding")
    assert funnel.stages == [
        FunnelStage("begin", 1, entered=4, stayed_p50_ms=10_000, left=3, reached=4),
        FunnelStage("middle", 2, entered=2, stayed_p50_ms=1_000, left=2, reached=3),
        FunnelStage("done", 3, entered=2, stayed_p50_ms=None, left=0, reached=2),
    ]
    assert (funnel.name, funnel.begun, funnel.converted) == ("onboarding", 4, 2)
    assert (funnel.conversion_p50_ms, funnel.conversion_turns_p50) == (7_000, 2)
    assert funnel.rate == 0.5
    assert funnel.interval == interval(2, 4)
    exact_types([funnel, *funnel.stages])
    assert analytics.funnel(ledger, "other") is None


def test_the_stage_that_a_filtered_step_left_is_that_of_the_step_before_wherever_it_was(engine: Engine) -> None:
    ledger = journeys_by_hand().write(engine)
    web = analytics.funnel(ledger, "onboarding", Filters(channel="web"))
    assert web is not None
    # Ann left "middle" in a session of the web; that she had entered it was in the app.
    assert [(each.stage, each.entered, each.left) for each in web.stages] == [
        ("begin", 3, 1),
        ("middle", 0, 1),
        ("done", 2, 0),
    ]
    assert [each.reached for each in web.stages] == [3, 2, 2]
    assert (web.begun, web.converted) == (3, 2)


def test_a_stage_that_is_no_more_comes_after_those_that_are(engine: Engine) -> None:
    records = journeys_by_hand()
    records.step("dan", "app", "waitlist", 3, None)
    records.journey("dan", "waitlist", stages='["waitlist", "begin"]', started_ns=MONDAY - 1)
    funnel = analytics.funnel(records.write(engine), "onboarding")
    assert funnel is not None
    assert [(each.stage, each.number) for each in funnel.stages] == [
        ("begin", 1),
        ("middle", 2),
        ("done", 3),
        ("waitlist", 4),
    ]


def test_funnels_come_with_the_most_users_first(engine: Engine) -> None:
    records = journeys_by_hand()
    records.step("ann", "app", "cart", 1, None, name="buying")
    ledger = records.write(engine)
    assert [(each.name, each.begun) for each in analytics.funnels(ledger)] == [("onboarding", 4), ("buying", 1)]
    assert analytics.funnels(ledger, Filters(user_id="nobody")) == []
    assert [each.begun for each in analytics.funnels(ledger, Filters(channel="mobile"))] == [2, 1]


def test_a_user_who_was_there_before_the_range_is_no_new_one(engine: Engine) -> None:
    records = Records()
    for n, (user, week) in enumerate((("old", 0), ("old", 2), ("new", 2), ("new", 4), ("late", 6))):
        records.add_session(f"s{n}", user_id=user, started_ns=MONDAY + week * 7 * DAY)
    ledger = records.write(engine)
    second = MONDAY + 14 * DAY
    assert analytics.retention(ledger, Filters(since_ns=second, until_ns=second + 28 * DAY)) == [
        Cohort("2026-11-16", users=1, active={0: 1, 2: 1}, observed=2)
    ]
    cohorts = analytics.retention(ledger)
    assert [(each.week, each.users, each.observed) for each in cohorts] == [
        ("2026-11-02", 1, 6),
        ("2026-11-16", 1, 4),
        ("2026-12-14", 1, 0),
    ]
    assert (cohorts[0].rate(2), cohorts[0].rate(3)) == (1.0, 0.0)
    assert cohorts[0].interval(6) == interval(0, 1)
    assert cohorts[2].interval(1) is None


def test_weeks_begin_on_mondays_in_utc(engine: Engine) -> None:
    records = Records()
    records.add_session("sunday", user_id="a", started_ns=MONDAY - 1)
    records.add_session("monday", user_id="b", started_ns=MONDAY)
    assert [each.week for each in analytics.retention(records.write(engine))] == ["2026-10-26", "2026-11-02"]


def test_the_satisfaction_of_an_outcome_stays_within_0_and_1(engine: Engine) -> None:
    records = Records()
    records.add_session("s", user_id="u", ended_ns=MONDAY, feedback_sum=1.0000000000000002, feedback_count=1)
    ledger = records.write(engine)
    assert [each.satisfaction for each in analytics.outcomes(ledger)] == [1.0]
    assert [each.satisfaction for each in analytics.users(ledger)] == [1.0]


def test_rates_come_with_what_they_are_of(engine: Engine) -> None:
    records = Records()
    for n in range(4):
        failed = int(n == 0)
        records.add_session(
            f"s{n}", user_id="u", ended_ns=MONDAY, end_reason="completed", failed_turns=failed, prunings=n
        )
    [found] = analytics.outcomes(records.write(engine))
    assert (found.errors, found.pruned, found.rated) == (Rate(1, 4), Rate(3, 4), Rate(0, 4))
    assert (found.errors.value, found.errors.interval) == (0.25, interval(1, 4))
    assert Rate(0, 0).value is None


def test_an_order_that_is_none_is_a_mistake_of_the_caller(engine: Engine) -> None:
    ledger, wrong = Records().write(engine), "cheapest"
    order: Any = wrong
    with pytest.raises(ConfigurationError, match=r"'cheapest'\. Allowed are: newest, longest"):
        analytics.sessions_by(ledger, order)
    with pytest.raises(ConfigurationError, match=r"'cheapest'\. Allowed are: latest, most sessions"):
        analytics.users(ledger, order)


# --- without a ledger -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("times", "n", "expected"),
    [(0, 10, (0.0, 0.2775)), (1, 10, (0.0179, 0.4042)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1.0))],
)
def test_the_interval_is_wilsons(times: int, n: int, expected: tuple[float, float]) -> None:
    assert interval(times, n) == pytest.approx(expected, abs=5e-5)


def test_the_interval_holds_the_rate_and_narrows_with_n() -> None:
    assert interval(0, 0) is None
    widths = []
    for n in (1, 4, 16, 64, 1024, 10**6):
        for times in {0, n // 4, n // 2, n}:
            bounds = interval(times, n)
            assert bounds is not None
            assert 0.0 <= bounds[0] <= times / n <= bounds[1] <= 1.0
        half = interval(n // 2, n)
        assert half is not None
        widths.append(half[1] - half[0])
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-02", MONDAY),
        (" 2026-11-02T00:00 ", MONDAY),
        ("2026-11-02T01:00+01:00", MONDAY),
        ("2026-11-02T00:00:00.000001Z", MONDAY + 1000),
        ("1969-12-31T23:59:59.5", -SECOND // 2),
        ("9999-12-31", 2**63 - 1),
        ("0001-01-01", -(2**63)),
    ],
)
def test_days_and_times_are_read_in_utc(text: str, expected: int) -> None:
    assert day_of(text) == expected


@pytest.mark.parametrize("text", ["tomorrow", "", "25.11.2026", "7", "-7d", "7 parsecs", "1h30", "h", "14.05", "14"])
def test_what_is_no_day_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        day_of(text, "--until")
    assert str(caught.value) == (
        f"--until is {text!r}. Allowed are a day and a time in ISO 8601, a time of today, how long ago, today and "
        "yesterday: --until 2026-11-25, --until 2026-11-25T12:00, --until 14:05, --until 7d, --until 2h or --until "
        "1h30m."
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("2026-13-01", "month"),
        ("2026-02-30", "day"),
        ("2026-11-25T25:00", "hour"),
        ("25:00", "hour"),
        ("9:60", "minute"),
    ],
)
def test_a_day_that_there_is_not_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^--since is '{text}': {why} .*\. Allowed are "):
        day_of(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7d", MONDAY - 6 * DAY),
        ("2h", MONDAY + DAY - 7200 * SECOND),
        ("90m", MONDAY + DAY - 5400 * SECOND),
        (" 1 W ", MONDAY - 6 * DAY),
        ("30s", MONDAY + DAY - 30 * SECOND),
        ("1h30m", MONDAY + DAY - 5400 * SECOND),
        ("1d 2H 3m", MONDAY - (2 * 3600 + 180) * SECOND),
        ("999999999w", -(2**63)),
        ("today", MONDAY + DAY),
        ("Yesterday", MONDAY),
    ],
)
def test_how_long_ago_is_counted_from_now(text: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    later_that_day = 0 if text[0].isdigit() or text[0] == " " else 3600 * SECOND
    monkeypatch.setattr("time.time_ns", lambda: MONDAY + DAY + later_that_day)
    assert day_of(text) == expected
    assert Filters(since=text).since_ns == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("14:05", MONDAY + (14 * 60 + 5) * 60 * SECOND),
        ("9:30", MONDAY + (9 * 60 + 30) * 60 * SECOND),
        (" 00:00 ", MONDAY),
        ("18:00:00", MONDAY + 18 * 3600 * SECOND),
        ("17:59:59Z", MONDAY + (18 * 3600 - 1) * SECOND),
        ("01:00+01:00", MONDAY),
        ("00:30-05:00", MONDAY + 5 * 3600 * SECOND + 1800 * SECOND),
    ],
)
def test_a_time_is_one_of_today(text: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: MONDAY + 18 * 3600 * SECOND)
    assert day_of(text) == expected
    assert Filters(since=text).since_ns == expected


def test_a_time_of_today_that_lies_ahead_is_refused_with_how_to_say_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: MONDAY + 18 * 3600 * SECOND)
    for name, text, typed in (
        ("--since", "18:01", "--since 2026-11-01T18:01"),
        ("until", "23:59:59", "until='2026-11-01T23:59'"),
        ("since", "20:00+01:00", "since='2026-11-01T20:00+01:00'"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            day_of(text, name)
        now = "19:00 there" if "+" in text else "18:00 UTC"
        assert str(caught.value) == (
            f"{name} is {text!r}, a time of today that lies ahead: it is {now}. Say the day too, as by {typed}."
        )


def test_a_range_that_ends_before_it_begins_is_refused() -> None:
    for until in ("2026-11-01T12:00:00", "2026-11-02"):
        with pytest.raises(ConfigurationError) as caught:
            Filters(since="2026-11-02", until=until)
        assert str(caught.value) == (
            f"until is {until} and since is 2026-11-02: nothing lies between. until is to be later than since; it is "
            "the first moment that does not count."
        )
    with pytest.raises(ConfigurationError, match="nothing lies between"):
        Filters(since_ns=MONDAY).of(until_ns=MONDAY - 1)
    assert Filters(since="2026-11-02", until_ns=MONDAY + 1).until_ns == MONDAY + 1


def test_a_slow_turn_takes_over_a_second_and_three_times_the_median() -> None:
    def limit(*latencies: int, status: str = "completed") -> float | None:
        return analytics.slow_above_ms([TurnSummary("t", "s", latency_ms=ms, status=status) for ms in latencies])

    assert limit(1000, 2000, 9000) == 6000
    assert limit(100, 100, 900) == 1000
    assert limit(1000, 3000) == 6000
    assert limit(5000, status="failed") == 15_000
    assert limit() is limit(5000, status="open") is limit(5000, status="abandoned") is None


def test_a_day_is_the_one_that_a_time_is_in() -> None:
    assert [iso_day(MONDAY + ns) for ns in (-1, 0, DAY - 1, DAY)] == [
        "2026-11-01",
        "2026-11-02",
        "2026-11-02",
        "2026-11-03",
    ]


def test_filters_say_what_they_leave_in() -> None:
    assert str(ALL) == "everything on record"
    shown = Filters(since_ns=MONDAY, until_ns=MONDAY + 5400 * SECOND, channel="web", tier="")
    assert str(shown) == "since 2026-11-02, until 2026-11-02T01:30:00, channel web, tier not known"
    assert shown.of(until_ns=None, tier=None) == Filters(since_ns=MONDAY, channel="web")
    assert str(Filters(conversation_id="c-1", error="TimeoutError", failed=True)) == (
        "conversation_id c-1, error TimeoutError, a failed turn"
    )
    assert Filters(failed=False, unsatisfied=False) == ALL
    assert str(Filters(channel="web", unsatisfied=True)) == "channel web, feedback below 0.5"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("2026-11-02", MONDAY),
        ("2026-11-02T01:00+01:00", MONDAY),
        (date_type(2026, 11, 2), MONDAY),
        (datetime(2026, 11, 2, 1, tzinfo=timezone(timedelta(hours=1))), MONDAY),
        (datetime(2026, 11, 2), MONDAY),
        (timedelta(days=1), MONDAY),
        ("1d", MONDAY),
        ("yesterday", MONDAY),
    ],
)
def test_filters_take_days_and_times_as_people_have_them(
    said: Any, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time_ns", lambda: MONDAY + DAY)
    assert Filters(since=said) == Filters(since_ns=expected) == Filters(since_ns=1).of(since=said)
    assert Filters(until=said, channel="web") == Filters(until_ns=expected, channel="web")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (
            {"since_ns": "2026-11-01"},
            "since_ns is '2026-11-01'. Allowed are nanoseconds since 1970, as an int. For days",
        ),
        ({"until_ns": "yesterday"}, "there is until: until='2026-11-25', until='7d'."),
        ({"since_ns": date_type(2026, 11, 2)}, "since_ns is datetime.date(2026, 11, 2). Allowed are nanoseconds"),
        ({"since_ns": 1.5e18}, "since_ns is 1.5e+18. Allowed are nanoseconds"),
        ({"since_ns": True}, "since_ns is True. Allowed are nanoseconds"),
        ({"until_ns": 2**63}, "Allowed are nanoseconds from the years 1677 to 2262."),
        (
            {"since": "x"},
            "since is 'x'. Allowed are a day and a time in ISO 8601, a time of today, how long ago, today and",
        ),
        ({"until": 1_700_000_000}, "until is 1700000000, of type int. Allowed are a date, a datetime, a timedelta"),
        ({"since": "7d", "since_ns": 1}, "since and since_ns say the same in two ways: pass one of them."),
        ({"channel": 4}, "channel is 4. Allowed are a text, as channel='...', and None for any."),
        ({"user_id": b"x"}, "user_id is b'x'. Allowed are a text"),
        ({"topic": ["a"]}, "topic is ['a']. Allowed are a text"),
        ({"failed": "yes"}, "failed is 'yes'. Allowed are True, and False or None for any."),
        ({"unsatisfied": 1}, "unsatisfied is 1. Allowed are True, and False or None for any."),
    ],
    ids=str,
)
def test_filters_that_would_find_nothing_are_refused_at_once(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Filters(**given)
    assert why in str(caught.value)
    with pytest.raises(ConfigurationError):
        ALL.of(**given)


def test_what_is_no_ledger_and_what_are_no_filters_is_refused_with_what_to_pass() -> None:
    ledger = Ledger("sqlite://")
    questions = {name: getattr(analytics, name) for name in (*EVERY_QUESTION, "users", "sessions_by", "choices")}
    questions["funnel"] = lambda ledger, filters=ALL: analytics.funnel(ledger, "onboarding", filters)
    questions["users"] = lambda ledger, filters=ALL: analytics.users(ledger, filters=filters)
    questions["sessions_by"] = lambda ledger, filters=ALL: analytics.sessions_by(ledger, filters=filters)
    with SessionTracker("sqlite://", tracer_provider=TracerProvider()) as tracker:
        for name, ask in questions.items():
            for wrong in (tracker, "sqlite:///ledger.db", None):
                with pytest.raises(ConfigurationError, match=r"^The ledger is a \w+\. .* pass tracker\.ledger, or"):
                    ask(wrong)
            if name != "choices":
                for given in ("web", {"channel": "web"}, None):
                    with pytest.raises(ConfigurationError, match=r"^The filters are a \w+\. .* pass Filters\(channel="):
                        ask(ledger, given)
    ledger.close()
