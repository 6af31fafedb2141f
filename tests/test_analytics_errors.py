"""Turns that failed or were abandoned: every figure against SQL by hand, on each database, and against Python's."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from test_analytics import (
    DATABASES,
    DAY,
    FILTERS,
    MONDAY,
    Records,
    _stop_servers,  # noqa: F401 -- pytest finds it here: it stops the PostgreSQL of engine_of
    by_chance,
    date,
    engine_of,
    exact_types,
    grouped,
    kept_sessions,
    kept_turns,
    numbered,
    plain,
    sql,
)
from turntrace import analytics
from turntrace.analytics import ErrorsAt, Filters, interval
from turntrace.ledger import Ledger
from turntrace.ledger.tables import turn_steps

LOST = ("failed", "abandoned")


def step(span: str, parent: str, name: str, kind: str, error: str | None = None) -> list[Any]:
    return [span, parent, name, kind, 0, 5, None, None, None, error, None, None, None]


def with_errors() -> Records:
    """Return the ledger by chance, whose turns have classes of errors and steps; a few of them neither."""
    chance, records = random.Random(3), by_chance()
    for turn in records.turns:
        if turn["status"] not in LOST:
            continue
        turn["started_ns"] += chance.randrange(DAY)
        error = chance.choice(("ValueError", "TimeoutError", "Überlauf", None))
        turn["error"] = "abandoned" if turn["status"] == "abandoned" else error
        tool = chance.choice(("search", "refund"))
        steps = [
            step("a", "root", "LangGraph", "agent", turn["error"]),
            step("b", "a", "tools", "chain", turn["error"]),
            step("c", "b", tool, "tool", chance.choice((None, "TimeoutError"))),
            step("d", "b", tool, "tool", chance.choice((None, "KeyError"))),
        ]
        if chance.choice((False, True, True)):
            records.add_steps(turn, steps)
    return records


@dataclass
class Made:
    records: Records
    engine: Engine
    ledger: Ledger


@pytest.fixture(scope="module", params=DATABASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    engine, records = engine_of(request.param, tmp_path_factory.mktemp("errors")), with_errors()
    yield Made(records, engine, records.write(engine))
    engine.dispose()


@pytest.fixture(params=DATABASES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    fresh = engine_of(request.param, tmp_path)
    yield fresh
    fresh.dispose()


COUNTED = """count(*), sum(CASE WHEN t.status = 'failed' THEN 1 ELSE 0 END),
             sum(CASE WHEN t.status = 'abandoned' THEN 1 ELSE 0 END)"""


def by_hand(engine: Engine, of: str) -> set[tuple[Any, ...]]:
    query = f"""SELECT {of}, {COUNTED} FROM turntrace_turns t JOIN turntrace_sessions s ON s.id = t.session_id
                GROUP BY 1"""
    return {(at, *map(int, counts)) for at, *counts in sql(engine, query)}


def test_errors_are_counted_by_day_number_and_intent_as_sql_by_hand_does(made: Made) -> None:
    found = analytics.turn_errors(made.ledger)
    days = {(int(day), *counts) for day, *counts in by_hand(made.engine, "s.started_ns / 86400000000000")}
    assert {tuple(plain(each)) for each in found.by_day} == {(date(day * DAY), *counts) for day, *counts in days}
    assert [each.at for each in found.by_day] == sorted(each.at for each in found.by_day)
    numbers = by_hand(made.engine, "CASE WHEN t.number > 50 THEN 51 ELSE t.number END")
    assert {plain(each) for each in found.by_turn} == {(str(at), *counts) for at, *counts in numbers}
    assert [int(each.at) for each in found.by_turn] == sorted(at for at, *_ in numbers)
    assert {plain(each) for each in found.by_intent} == by_hand(made.engine, "coalesce(t.intent, '')")
    assert [each.times for each in found.by_intent] == sorted((each.times for each in found.by_intent), reverse=True)


def test_errors_are_counted_by_class_among_all_turns_as_sql_by_hand_does(made: Made) -> None:
    found = analytics.turn_errors(made.ledger)
    [(every,)] = sql(made.engine, "SELECT count(*) FROM turntrace_turns")
    classes = sql(
        made.engine,
        f"""SELECT coalesce(t.error, ''), {COUNTED} FROM turntrace_turns t
            WHERE t.status IN ('failed', 'abandoned') GROUP BY 1""",
    )
    assert {plain(each) for each in found.by_class} == {
        (at, every, int(failed), int(abandoned)) for at, _, failed, abandoned in classes
    }
    assert found.all == ErrorsAt("", every, *(int(sum(row[at] for row in classes)) for at in (2, 3)))


@pytest.mark.parametrize("name", FILTERS)
def test_errors_meet_every_filter(made: Made, name: str) -> None:
    filters = FILTERS[name]
    found, kept = analytics.turn_errors(made.ledger, filters), kept_turns(made.records, filters)
    began = {row["id"]: date(row["started_ns"]) for row in made.records.sessions}

    def counted(of: Any) -> list[tuple[Any, ...]]:
        return [
            (at, len(rows), *(sum(row["status"] == status for row in rows) for status in LOST))
            for at, rows in grouped(kept, of).items()
        ]

    assert [plain(each) for each in found.by_day] == sorted(counted(lambda turn: began[turn["session_id"]]))
    assert {plain(each) for each in found.by_turn} == set(counted(lambda turn: str(numbered(turn))))
    assert {plain(each) for each in found.by_intent} == set(counted(lambda turn: turn["intent"] or ""))
    lost = [turn for turn in kept if turn["status"] in LOST]
    steps = {row["turn_id"]: row["steps"] for row in made.records.of(turn_steps)}
    assert {each.at: each.times for each in found.by_class} == Counter(turn["error"] or "" for turn in lost)
    assert found.looked_into == len(lost) < analytics.MOST_LOOKED_INTO
    assert {(each.kind, each.name): each.turns for each in found.by_step} == Counter(
        at for turn in lost for at in innermost(steps.get(turn["id"]))
    )
    exact_types([*found.by_day, *found.by_turn, *found.by_intent, *found.by_class, *found.by_step])


def innermost(steps: str | None) -> set[tuple[str, str]]:
    """Return where it arose in a turn of `with_errors`, whose steps are four."""
    if steps is None:
        return set()
    _graph, node, *tools = json.loads(steps)
    failed = {("tool", each[2]) for each in tools if each[9]}
    return failed or ({("chain", node[2])} if node[9] else set())


def test_a_step_is_the_innermost_one_with_its_most_frequent_error(engine: Engine) -> None:
    records = Records()
    session = records.add_session("s", user_id="ann")
    graph = step("a", "", "LangGraph", "agent", "ValueError")
    for number, error in enumerate(("ValueError", "KeyError", "KeyError"), start=1):
        steps = [graph, step("b", "a", "agent", "chain", error), step("c", "b", "gpt-4o", "generation")]
        records.add_steps(records.add_turn(session, "c", number, status="failed", error=error), steps)
    records.add_steps(records.add_turn(session, "c", 4, status="failed", error="ValueError"), [graph])
    tried_again = [step("a", "", "LangGraph", "agent"), step("b", "a", "agent", "chain", "TimeoutError")]
    records.add_steps(records.add_turn(session, "c", 5), tried_again)
    found = analytics.turn_errors(records.write(engine))
    assert [plain(each) for each in found.by_step] == [
        ("agent", "chain", 3, "KeyError"),
        ("LangGraph", "agent", 1, "ValueError"),
    ]
    assert plain(found.all) == ("", 5, 4, 0)


def test_only_the_latest_turns_are_looked_into(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records()
    session = records.add_session("s", user_id="ann")
    for number, name in enumerate(("old", "new", "newest"), start=1):
        at = MONDAY + number
        turn = records.add_turn(session, "c", number, status="failed", error="ValueError", started_ns=at)
        records.add_steps(turn, [step("a", "", name, "tool", "ValueError")])
    ledger = records.write(engine)
    monkeypatch.setattr("turntrace.analytics.errors.MOST_LOOKED_INTO", 2)
    found = analytics.turn_errors(ledger)
    assert ({each.name for each in found.by_step}, found.looked_into) == ({"new", "newest"}, 2)
    assert found.all.failed == 3


def test_rates_of_errors_come_with_their_n_and_interval(made: Made) -> None:
    for each in analytics.turn_errors(made.ledger).by_intent:
        assert each.rate.value == (each.failed + each.abandoned) / each.turns
        assert each.rate.interval == interval(each.failed + each.abandoned, each.turns)


@pytest.mark.parametrize("name", FILTERS)
def test_sessions_with_errors_are_those_with_a_failed_turn_the_latest_first(made: Made, name: str) -> None:
    rows = [row for row in kept_sessions(made.records, FILTERS[name]) if row["failed_turns"]]
    ids = [row["id"] for row in sorted(rows, key=lambda row: (-row["started_ns"], row["id"]))]
    found = analytics.sessions_with_errors(made.ledger, FILTERS[name], limit=500)
    assert [each.id for each in found] == ids
    assert analytics.sessions_with_errors(made.ledger, FILTERS[name]) == found[:10]
    assert name != "none" or len(found) > 10


def test_without_any_turn_there_is_no_rate(engine: Engine) -> None:
    records = Records()
    records.add_session("s", user_id=None)
    ledger = records.write(engine)
    found = analytics.turn_errors(ledger)
    assert found == analytics.TurnErrors()
    assert found.all.rate.value is None
    assert analytics.turn_errors(ledger, Filters(channel="none")) == found
