"""How long the questions of the analytics take with a million turns on record, on SQLite: all of a report, and each.

The tables are filled as benchmarks/ledger.py does it, and then made various: 90 days, four models, three tiers, twenty
intents, latencies of 200 ms to 30 s, conversations of ten and of a hundred turns, prunings, journeys, feedback.

Each round asks all questions one after the other, in an order that changes, and then all of a report at once, in two
threads, as the report does it. The first round, which finds the file as it was left by who wrote it, is told apart.

    python benchmarks/analytics.py [--turns 1000000] [--rounds 3] [--filter channel=web] [--json FILE]
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _tables import Report, arguments, summary
from ledger import fill
from sqlalchemy import create_engine

from turntrace import analytics
from turntrace.analytics import ALL, ORDERS, Filters
from turntrace.ledger import Ledger
from turntrace.report.collect import at_once, collect

MOST_S = 3.0
DAYS = 90
DAY_NS = 86_400 * 1_000_000_000


# --- what is on record ------------------------------------------------------------------------------------------------
def one_of(of: str, *values: str) -> str:
    """Return SQL for one of these values, by a number."""
    chosen = " ".join(f"WHEN {n} THEN {value}" for n, value in enumerate(values))
    return f"CASE ({of}) % {len(values)} {chosen} END"


def by_chance(n: str, prime: int) -> str:
    """Return SQL for a number that looks like chance, by the number of a row."""
    return f"(({n}) * {prime} % 1000003)"


def make_various(url: str, turns: int) -> None:
    """Change rows that are all alike to what an app writes in three months."""
    engine = create_engine(url)
    sessions = turns // 10
    step_ns = DAYS * DAY_NS // max(1, sessions)
    n = "(rowid - 1)"
    tiers = one_of(by_chance(n, 7919), "'free'", "'free'", "'premium'", "'enterprise'", "NULL")
    actions = one_of(by_chance(n, 104729), "'answered'", "'answered'", "'asked_question'", "'failed'")
    reasons = one_of(by_chance(n, 7907), "'user_exit'", "'completed'", "'inactive_timeout'", "'inactive_timeout'")
    models = one_of(by_chance(n, 611953), "'gpt-4o'", "'gpt-4o-mini'", "'claude-sonnet-4-5'", "NULL")
    statements = [
        f"""UPDATE turntrace_sessions SET
              started_ns = started_ns - {n} * 10000000000 + {n} * {step_ns},
              last_activity_ns = started_ns - {n} * 10000000000 + {n} * {step_ns}
                + {by_chance(n, 7919)} % 3600 * 1000000000,
              channel = {one_of(by_chance(n, 15485863), "'web'", "'web'", "'mobile'", "'slack'")},
              tier = {tiers}, org_id = 'org ' || ({by_chance(n, 7919)} % 50),
              end_reason = CASE WHEN ended_ns IS NOT NULL THEN {reasons} END,
              dropoff = CASE WHEN ended_ns IS NOT NULL THEN {by_chance(n, 7907)} % 4 = 2 END,
              failed_turns = {by_chance(n, 6700417)} % 10 = 0, prunings = {by_chance(n, 999983)} % 4 = 0,
              active_ms = 2000 + {by_chance(n, 999983)} % 200000,
              total_cost_usd = {by_chance(n, 7919)} / 1000000.0,
              input_tokens = 1000 + {by_chance(n, 7907)} % 90000, output_tokens = {by_chance(n, 7907)} % 3000,
              feedback_count = {by_chance(n, 104729)} % 5 = 0,
              feedback_sum = CASE WHEN {by_chance(n, 104729)} % 5 = 0 THEN {by_chance(n, 7919)} % 2 ELSE 0 END,
              last_turn = CASE WHEN ended_ns IS NOT NULL THEN {by_chance(n, 611953)} % 60 + 1 END,
              last_intent = 'intent ' || ({by_chance(n, 7919)} % 20), last_action = {actions}""",
        f"""UPDATE turntrace_turns SET
              latency_ms = 200 + {by_chance(n, 7919)} * {by_chance(n, 104729)} % 30000,
              time_to_first_token_ms = CASE WHEN {by_chance(n, 7907)} % 2 THEN 100 + {by_chance(n, 7907)} % 3000 END,
              model = {models}, input_tokens = 100 + {by_chance(n, 611953)} % 9000, input_length = 120,
              output_length = 500, input_type = 'question', output_type = 'answer', has_attachments = 0,
              intent = CASE WHEN {by_chance(n, 6700417)} % 3 THEN 'intent ' || ({by_chance(n, 7919)} % 20) END,
              status = {one_of(by_chance(n, 999983), *["'completed'"] * 19, "'failed'")},
              context_tokens = {n} % 10 * 9000 + {by_chance(n, 7907)} % 9000, context_messages = 12,
              context_limit = 128000, counted_tokens = 100 + {by_chance(n, 611953)} % 9100,
              counted_of_tokens = 100 + {by_chance(n, 611953)} % 9000,
              checkpoint_id = substr(id, 1, 8) || '-' || substr(id, 1, 27)""",
        f"""UPDATE turntrace_turns SET conversation_id = 'long ' || ({n} / 100), number = {n} % 100 + 1
            WHERE {n} < {turns // 1000 * 100}""",
        f"UPDATE turntrace_conversations SET topic = 'topic ' || ({by_chance(n, 7919)} % 12)",
        """INSERT INTO turntrace_decisions (turn_id, session_id, conversation_id, turn_number, at_ns, "trigger",
              strategy, tokenizer, model, "limit", tokens_before, tokens_after, messages_before, messages_after,
              messages_pruned, duration_us)
            SELECT id, session_id, conversation_id, number, started_ns, 'threshold', 'drop_oldest_turns', 'o200k_base',
              model, 128000, 110000, 60000, 80, 40, 40, 900 FROM turntrace_turns WHERE rowid % 20 = 0""",
        f"""INSERT INTO turntrace_stages (owner, name, stage, stage_number, total_stages, session_id, turn_number,
              at_ns, time_in_stage_ms, is_back, converted)
            SELECT s.user_id, 'onboarding', k.stage, k.number, 3, s.id, k.number, s.started_ns + k.number * 1000000000,
              CASE WHEN k.number > 1 THEN 1000 + {by_chance("s.rowid", 7919)} % 90000 END, 0, k.number = 3
            FROM (SELECT rowid, id, user_id, started_ns FROM turntrace_sessions GROUP BY user_id) AS s
            JOIN (SELECT 'begin' AS stage, 1 AS number UNION SELECT 'middle', 2 UNION SELECT 'done', 3) AS k
              ON k.number <= s.rowid % 4""",
        """INSERT INTO turntrace_journeys (owner, name, stages, stage, started_ns, entered_ns, converted_ns,
              conversion_turn)
            SELECT owner, name, '["begin", "middle", "done"]', max(stage), min(at_ns), max(at_ns),
              CASE WHEN max(converted) THEN max(at_ns) END, CASE WHEN max(converted) THEN 3 END
            FROM turntrace_stages GROUP BY owner, name""",
    ]
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql("VACUUM")  # rows are written whole in life, not lengthened afterwards
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()


# --- what is asked ----------------------------------------------------------------------------------------------------
def questions(ledger: Ledger, filters: Filters) -> dict[str, Callable[[], Any]]:
    """Return all questions of a report, by name."""
    plain = (
        *("sessions_over_time", "session_lengths", "latency_by_turn", "window_by_turn", "prunings", "by_model"),
        *("usage_by_day", "usage_by_tier", "usage_by_channel", "funnels", "retention"),
        *("dropoff_by_turn", "dropoff_by_intent", "dropoff_by_action", "dropoff_by_reason"),
        *("outcomes", "outcomes_by_intent", "turn_errors", "sessions_with_errors", "session_durations"),
    )
    asked: dict[str, Callable[[], Any]] = {}
    for name in plain:
        function = getattr(analytics, name)
        asked[name] = lambda function=function: function(ledger, filters)
    for by in ORDERS:
        asked[f"sessions_by, {by}"] = lambda by=by: analytics.sessions_by(ledger, by, filters)
    asked["users"] = lambda: analytics.users(ledger, "latest", filters)
    return asked


def timed(do: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    do()
    return time.perf_counter() - begun


def measure(ledger: Ledger, filters: Filters, rounds: int) -> tuple[dict[str, list[float]], list[float], list[float]]:
    """Return the seconds of each question, of all one after the other, and of all of a report; of each round."""
    asked = questions(ledger, filters)
    chance = random.Random(1)
    each: dict[str, list[float]] = {name: [] for name in asked}
    alone, reports = [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        for name in chance.sample(list(asked), len(asked)):
            each[name].append(timed(asked[name]))
        alone.append(time.perf_counter() - begun)
        reports.append(timed(lambda: collect(ledger, filters, now_ns=time.time_ns())))
    return each, alone, reports


# --- what is said -----------------------------------------------------------------------------------------------------
def show(report: Report, title: str, each: dict[str, list[float]], alone: list[float], reports: list[float]) -> None:
    rows = [
        [name, f"{seconds[0]:.3f}", f"{statistics.median(seconds):.3f}"]
        for name, seconds in sorted(each.items(), key=lambda item: -statistics.median(item[1]))
    ]
    rows.append([])
    of_all = {"all, one after the other": alone, f"all of a report, {at_once()} at a time": reports}
    rows += [[name, f"{seconds[0]:.3f}", f"{statistics.median(seconds):.3f}"] for name, seconds in of_all.items()]
    report.table(title, ("question", "first round, s", "median, s"), rows)
    asked = f"all that a report asks, {at_once()} at a time"
    report.target(asked, statistics.median(reports), at_most=MOST_S, unit=" s")


def filters_of(given: list[str]) -> Filters:
    named = dict(pair.split("=", 1) for pair in given)
    return Filters(**{name: int(value) if name.endswith("_ns") else value for name, value in named.items()})


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--filter", action="append", default=[], help="a filter too, as channel=web; several are one")
    options = parser.parse_args()
    report = Report(f"Analytics over {options.turns:,} turns", __doc__)
    with tempfile.TemporaryDirectory(prefix="turntrace-analytics-") as folder:
        path = Path(folder) / "ledger.db"
        url = f"sqlite:///{path}"
        ledger = Ledger(url)
        fill(url, options.turns)
        make_various(url, options.turns)
        report.say(f"The ledger has {path.stat().st_size / 1e6:,.0f} MB.")
        for filters in (ALL, filters_of(options.filter)) if options.filter else (ALL,):
            each, alone, reports = measure(ledger, filters, options.rounds)
            said = ", ".join(options.filter) if filters is not ALL else "all"
            show(report, said, each, alone, reports)
            report.results[said] = {
                "each_s": {name: summary(seconds) for name, seconds in each.items()},
                "one_after_the_other_s": summary(alone),
                "report_s": summary(reports),
            }
        ledger.close()
    report.write(options.json)


if __name__ == "__main__":
    main()
