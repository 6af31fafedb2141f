"""Eight workers on one ledger, with sessions that end under them, sweeps, and one worker that is killed."""

import asyncio
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from sqlalchemy import Connection, create_engine, select, text

import fresh
import many_workers
import postgres
from ledger_processes import IDLE, NOON, begin, ended, finish
from many_workers import HELD, Work, noted, open_tracker
from turntrace import SessionTracker
from turntrace import attributes as a
from turntrace.errors import LedgerError
from turntrace.ledger import Ledger
from turntrace.ledger.tables import conversations, metadata, open_turns, outbox, sessions, turns
from turntrace.records import SessionFacts
from turntrace.testing import CapturedSpan, assert_all_tagged, outbox_spans

WORKERS = 8
SWEEPERS = (1, 2, 3)
TURNS = 4000
OF_DOOMED = 200
OF_EACH = -(-(TURNS - OF_DOOMED) // (WORKERS - 1))
IDLE_S = 4.0  # longer than the end of a turn waits to be written, also on a machine that is busy
PAUSE_S = 0.01
PATIENCE_S = 100
DAY_NS = 86_400 * 1_000_000_000


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with ExitStack() as stack:
        is_postgres = request.param == "postgresql"
        server = stack.enter_context(postgres.server()) if is_postgres else ""
        yield postgres.new_schema(server) if is_postgres else f"sqlite:///{tmp_path}/ledger.db"


def run_workers(url: str, folder: Path) -> None:
    """Let the workers do all their turns, and kill the first in the middle, while it holds turns open."""
    tasks = [
        Work(
            url,
            folder,
            worker,
            turns=OF_EACH if worker else OF_DOOMED,
            idle_s=IDLE_S,
            pause_s=PAUSE_S,
            sweeps=worker in SWEEPERS,
            is_doomed=worker == 0,
        )
        for worker in range(WORKERS)
    ]
    workers: list[Any] = [
        fresh.CONTEXT.Process(target=many_workers.work, args=(task,))  # type: ignore[attr-defined]
        for task in tasks
    ]
    give_up = time.monotonic() + PATIENCE_S
    try:
        for worker in workers:
            worker.start()
        while len(noted(folder, "held")) < HELD:
            assert workers[0].is_alive(), log(folder)
            assert time.monotonic() < give_up, log(folder)
            time.sleep(0.005)
        workers[0].kill()
        for worker in workers:
            worker.join(max(0.0, give_up - time.monotonic()))
        assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] + [0] * (WORKERS - 1), log(folder)
    finally:
        for worker in workers:
            worker.kill()


def log(folder: Path) -> str:
    return "\n".join(noted(folder, "log"))


def read(url: str) -> dict[str, list[dict[str, Any]]]:
    """Return all rows of the ledger by table."""
    engine = create_engine(url)
    with engine.connect() as connection:
        found = {
            name: [dict(row) for row in connection.execute(select(table)).mappings()]
            for name, table in metadata.tables.items()
        }
    engine.dispose()
    return found


SUMS = {
    "llm_calls": "llm_calls",
    "tool_calls": "tool_calls",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "unpriced_calls": "unpriced_calls",
    "active_ms": "latency_ms",
    "wait_ms": "wait_ms",
}


def assert_sums(of_sessions: list[dict[str, Any]], of_turns: list[dict[str, Any]]) -> None:
    """Assert that each session's totals are the sums over its turns."""
    in_session: dict[str, list[dict[str, Any]]] = {session["id"]: [] for session in of_sessions}
    for turn in of_turns:
        in_session[turn["session_id"]].append(turn)
    for session in of_sessions:
        own = in_session[session["id"]]
        assert session["total_turns"] == len(own), session["id"]
        assert session["failed_turns"] == sum(turn["status"] == "failed" for turn in own), session["id"]
        for total, name in SUMS.items():
            assert session[total] == sum(turn[name] for turn in own), (session["id"], total)
        assert session["total_cost_usd"] == pytest.approx(sum(turn["cost_usd"] for turn in own)), session["id"]


def assert_numbered(of_turns: list[dict[str, Any]]) -> None:
    """Assert that the turns of each conversation are numbered from 1, without a gap."""
    numbers: dict[str, list[int]] = {}
    for turn in of_turns:
        numbers.setdefault(turn["conversation_id"], []).append(turn["number"])
    for conversation, found in numbers.items():
        assert sorted(found) == list(range(1, len(found) + 1)), conversation


def ids_of(spans: list[CapturedSpan], name: str) -> dict[Any, set[tuple[str, str]]]:
    """Return the ids of the spans of a name by their sessions."""
    found: dict[Any, set[tuple[str, str]]] = {}
    for span in spans:
        if span.name == name:
            found.setdefault(span.attributes[a.SESSION_ID], set()).add((span.trace_id, span.span_id))
    return found


@pytest.mark.parametrize("url", ["postgresql", "sqlite"], indirect=True)
def test_eight_workers_of_whom_one_is_killed_lose_nothing_and_count_nothing_twice(url: str, tmp_path: Path) -> None:
    open_tracker(url).shutdown()
    run_workers(url, tmp_path)
    with open_tracker(url) as tracker:
        last = tracker.sweep(time.time_ns() + DAY_NS)
        assert tracker.sweep(time.time_ns() + DAY_NS) == type(last)()
        spans = outbox_spans(tracker.ledger)
    tables = read(url)
    of_turns, of_sessions = tables[turns.name], tables[sessions.name]

    # No turn is lost, none is there twice, and those that nobody ended are closed.
    status = {turn["id"]: turn["status"] for turn in of_turns}
    written, held = noted(tmp_path, "written"), noted(tmp_path, "held")
    assert len(written) == len(set(written)) >= TURNS
    assert len(status) == len(of_turns)
    assert [turn_id for turn_id in written if status.get(turn_id) not in ("completed", "failed")] == []
    assert {status[turn_id] for turn_id in held} == {"abandoned"}
    assert {status[turn_id] for turn_id in status.keys() - set(written) - set(held)} <= {
        "completed",
        "abandoned",
        "failed",
    }
    assert tables[open_turns.name] == []
    assert_numbered(of_turns)
    counted = Counter(turn["conversation_id"] for turn in of_turns)
    assert {each["id"]: each["total_turns"] for each in tables[conversations.name]} == counted

    # Each session ended once, and its totals are those of its turns.
    reasons = Counter(session["end_reason"] for session in of_sessions)
    swept = sum(map(int, noted(tmp_path, "swept")))
    assert swept > 0, "no session ended while work went on"
    assert reasons["user_exit"] > 0
    assert reasons.keys() == {"user_exit", "inactive_timeout"}
    # A worker that waited for too long for a locked file goes on in the sessions that it had, and opens them again.
    opened_again = swept + last.sessions - reasons["inactive_timeout"]
    assert opened_again == 0 or (opened_again > 0 and "the ledger can be written again" in log(tmp_path))
    assert {session["id"] for session in of_sessions if session["end_reason"] == "user_exit"} <= set(
        noted(tmp_path, "exit")
    )
    assert all(session["ended_ns"] for session in of_sessions)
    assert_sums(of_sessions, of_turns)

    # The outbox says the same.
    roots = Counter(span.attributes[a.TURN_ID] for span in spans if span.name == a.SPAN_TURN)
    assert roots == dict.fromkeys(status, 1)
    planned = {turn["id"]: (turn["trace_id"], turn["root_span_id"]) for turn in of_turns}
    assert planned == {
        span.attributes[a.TURN_ID]: (span.trace_id, span.span_id) for span in spans if span.name == a.SPAN_TURN
    }
    assert_all_tagged(spans)
    for name in (a.SPAN_SESSION_START, a.SPAN_SESSION_END):
        ids = ids_of(spans, name)
        assert ids.keys() == {session["id"] for session in of_sessions}
        assert {len(found) for found in ids.values()} == {1}
    starts = Counter(span.attributes[a.SESSION_ID] for span in spans if span.name == a.SPAN_SESSION_START)
    assert set(starts.values()) == {1}
    # On a machine that is slow for a moment SQLite's file may be locked for over 5 s, which is told and costs nothing.
    told = [line for line in log(tmp_path).splitlines() if "database is locked" not in line]
    assert set(told) <= {"turntrace: the ledger can be written again."}, "a worker had something to warn of"


# --- what the workers brought to light --------------------------------------------------------------------------------
def take_batches(ledger: Ledger, thread: int, batches: int, together: threading.Barrier) -> None:
    """End turns of the same sessions and conversations as others do, in another order each time."""
    chance = random.Random(thread)
    for batch in range(batches):
        turns_of_batch = []
        for each in chance.sample(range(6), 6):
            turn_id, session, conversation = f"t{thread}-{batch}-{each}", f"s{each}", f"c{5 - each}"
            number = begin(ledger, turn_id, session=session, conversation=conversation)
            assert number is not None
            turns_of_batch.append(
                ended(turn_id, session_id=session, conversation_id=conversation, number=number, output_tokens=1)
            )
        together.wait(60)
        try:
            with ledger.writing() as writer:
                for turn in turns_of_batch:
                    assert writer.finish_turn(turn, [], spans=1)
        except BaseException:
            together.abort()  # the others need not wait
            raise


@pytest.mark.parametrize("url", ["postgresql", "sqlite"], indirect=True)
def test_writers_that_change_the_same_rows_in_another_order_do_not_break_each_other_off(url: str) -> None:
    ledgers = [Ledger(url) for _ in range(3)]
    for each in range(6):
        wanted = SessionFacts(id=f"s{each}", user_id="u1", channel="web", type="chat", started_ns=NOON)
        ledgers[0].open_session(wanted, idle_ns=IDLE, given_id=True)
    together = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(take_batches, ledger, thread, 20, together) for thread, ledger in enumerate(ledgers)]
        for each_done in done:
            each_done.result(60)
    for session in ledgers[0].sessions():
        assert (session.total_turns, session.output_tokens) == (60, 60)
    for ledger in ledgers:
        ledger.close()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_connection_that_is_lost_in_the_middle_is_named_and_the_next_try_works(url: str) -> None:
    ledger, engine = Ledger(url), create_engine(url)
    wanted = SessionFacts(id="s1", user_id="u1", channel="web", type="chat", started_ns=NOON)
    ledger.open_session(wanted, idle_ns=IDLE, given_id=True)
    assert begin(ledger, "t1") == 1
    with pytest.raises(LedgerError, match="failed"), ledger.writing() as writer:  # noqa: PT012
        writer.put("spans", b"first", items=1, created_ns=NOON)
        with engine.begin() as connection:
            others = "FROM pg_stat_activity WHERE state = 'idle in transaction' AND pid <> pg_backend_pid()"
            connection.execute(text(f"SELECT pg_terminate_backend(pid, 5000) {others}"))
        writer.put("spans", b"second", items=1, created_ns=NOON)
    assert finish(ledger, ended("t1"))
    assert [item.body for item in ledger.outbox()] == [b"t1"]
    engine.dispose()
    ledger.close()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_what_the_driver_says_at_a_turn_is_named_as_an_error_of_the_ledger(url: str) -> None:
    engine = create_engine(url)
    options = str(engine.url.query["options"])
    ledger = Ledger(engine.url.update_query_dict({"options": f"{options} -clock_timeout=20"}))
    wanted = SessionFacts(id="s1", user_id="u1", channel="web", type="chat", started_ns=NOON)
    ledger.open_session(wanted, idle_ns=IDLE, given_id=True)
    with engine.begin() as connection:
        connection.execute(text(f"LOCK TABLE {open_turns.name}, {outbox.name}"))
        with pytest.raises(LedgerError, match="lock timeout"):
            begin(ledger, "t1")
        with pytest.raises(LedgerError, match="lock timeout"):
            finish(ledger, ended("t1"))
    assert begin(ledger, "t1") == 1
    assert finish(ledger, ended("t1"))
    engine.dispose()
    ledger.close()


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_the_event_loop_goes_on_while_the_server_lets_a_session_and_a_turn_wait(url: str) -> None:
    """The tables are locked by somebody else until the loop has gone round many times more."""
    tracker = SessionTracker(url, tracer_provider=TracerProvider(), outbox=True)
    engine = create_engine(url)

    async def rounds_until_free(waiting: asyncio.Task[Any], locked: Connection) -> Any:
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert not waiting.done()
        locked.rollback()
        return await asyncio.wait_for(waiting, 30)

    async def talk() -> int:
        with engine.connect() as locked:
            locked.exec_driver_sql("LOCK TABLE turntrace_sessions IN ACCESS EXCLUSIVE MODE")
            session = await rounds_until_free(asyncio.create_task(tracker.astart_session(user_id="ann")), locked)
            locked.exec_driver_sql("LOCK TABLE turntrace_open_turns IN ACCESS EXCLUSIVE MODE")
            waiting = asyncio.create_task(session.conversation("c").astart_turn("Hello"))
            turn = await rounds_until_free(waiting, locked)
            await turn.aend()
            locked.exec_driver_sql("LOCK TABLE turntrace_turns IN ACCESS EXCLUSIVE MODE")
            summary = await rounds_until_free(asyncio.create_task(session.asummary()), locked)
            return int(summary.total_turns)

    assert asyncio.run(talk()) == 1
    tracker.shutdown()
    engine.dispose()
