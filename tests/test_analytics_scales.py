"""Figures on a finer scale: each against SQL by hand and Python's own, on each database, with every filter."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from sqlalchemy import Engine

from test_analytics import (
    DATABASES,
    FILTERS,
    Records,
    _stop_servers,  # noqa: F401 -- pytest finds it here: it stops the PostgreSQL of engine_of
    all_plain,
    by_chance,
    engine_of,
    exact_types,
    grouped,
    kept_sessions,
    kept_turns,
    numbered,
    rank,
    sql,
)
from turntrace import analytics
from turntrace.analytics import DURATION_EDGES_MS
from turntrace.ledger import Ledger


@dataclass
class Made:
    records: Records
    engine: Engine
    ledger: Ledger


@pytest.fixture(scope="module", params=DATABASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    engine, records = engine_of(request.param, tmp_path_factory.mktemp("scales")), by_chance()
    for at, row in enumerate(records.sessions):
        row["last_activity_ns"] = row["started_ns"] + 10 ** (at % 15) * (1 + at % 7) * 10 + at
    yield Made(records, engine, records.write(engine))
    engine.dispose()


def upto(ms: int) -> int | None:
    return next((edge for edge in DURATION_EDGES_MS if ms <= edge), None)


@pytest.mark.parametrize("name", FILTERS)
def test_sessions_are_counted_by_how_long_they_last_from_milliseconds_to_a_day(made: Made, name: str) -> None:
    found = analytics.session_durations(made.ledger, FILTERS[name])
    kept = kept_sessions(made.records, FILTERS[name])
    lasted = Counter(upto((row["last_activity_ns"] - row["started_ns"]) // 1_000_000) for row in kept)
    assert {each.upto_ms: each.sessions for each in found} == lasted
    edges = [each.upto_ms for each in found if each.upto_ms is not None]
    assert edges == sorted(edges)
    assert name != "none" or (found[0].upto_ms, found[-1].upto_ms) == (0, None)
    exact_types(found)


def test_sessions_of_about_a_second_are_those_of_sql_by_hand(made: Made) -> None:
    [(n,)] = sql(
        made.engine,
        """SELECT count(*) FROM turntrace_sessions WHERE last_activity_ns - started_ns >= 501000000
           AND last_activity_ns - started_ns < 1001000000""",
    )
    assert next(each.sessions for each in analytics.session_durations(made.ledger) if each.upto_ms == 1000) == n > 0


@pytest.mark.parametrize("name", FILTERS)
def test_context_tokens_are_of_the_turns_whose_window_is_known(made: Made, name: str) -> None:
    found = analytics.context_tokens_by_turn(made.ledger, FILTERS[name])
    known = [
        turn
        for turn in kept_turns(made.records, FILTERS[name])
        if turn["context_tokens"] is not None and turn["context_limit"]
    ]
    assert all_plain(found) == [
        (number, len(rows), *(rank((row["context_tokens"] for row in rows), percent) for percent in (50, 95, 99)))
        for number, rows in sorted(grouped(known, numbered).items())
    ]
    assert [(each.number, each.n) for each in found] == [
        (each.number, each.n) for each in analytics.window_by_turn(made.ledger, FILTERS[name])
    ]
    exact_types(found)
