"""What other processes see: one that is killed, one that exits without a flush, and one that forks."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import fresh
from turntrace import attributes as a
from turntrace.ledger import Ledger
from turntrace.testing import assert_all_tagged, outbox_spans

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def assert_whole(path: Path) -> int:
    """Assert that the ledger and its outbox agree; return how many turns have ended."""
    ledger = Ledger(f"sqlite:///{path}")
    waiting = ledger.outbox(limit=100_000)
    spans = outbox_spans(ledger)  # a torn body cannot be read
    assert sum(item.items for item in waiting if item.kind == "spans") == len(spans)
    ids = [(span.trace_id, span.span_id) for span in spans if span.name != a.SPAN_SESSION_END]
    assert len(set(ids)) == len(ids), "a span is there twice"  # but for the end of a session that had been opened again
    spans_of = Counter(span.attributes.get(a.TURN_ID) for span in spans)
    ended = rows(path, "SELECT id, spans, session_id FROM turntrace_turns")
    assert {turn: spans for turn, spans, _ in ended} == {turn: spans_of[turn] for turn, _, _ in ended}
    roots = {span.attributes[a.TURN_ID] for span in spans if span.name == a.SPAN_TURN}
    assert roots == {turn for turn, _, _ in ended}, "a turn's root is there, and the turn is not called finished"
    turns_of = Counter(session for _, _, session in ended)
    for session in ledger.sessions(limit=1000):
        assert session.total_turns == turns_of[session.id]
    for conversation, numbers in _numbers(path).items():
        assert numbers == list(range(1, len(numbers) + 1)), conversation
    if ended:
        assert_all_tagged(span for span in spans if span.attributes.get(a.TURN_ID) in {turn for turn, _, _ in ended})
    ledger.close()
    return len(ended)


def assert_sound(path: Path) -> None:
    """Assert that SQLite finds nothing wrong with the file."""
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]


def _numbers(path: Path) -> dict[str, list[int]]:
    query = "SELECT conversation_id, number FROM turntrace_turns UNION ALL SELECT conversation_id, number FROM {}"
    found: dict[str, list[int]] = {}
    for conversation, number in sorted(rows(path, query.format("turntrace_open_turns"))):
        found.setdefault(conversation, []).append(number)
    return found


# --- killed -----------------------------------------------------------------------------------------------------------
RUNS_UNTIL_KILLED = """
import threading
from opentelemetry import trace
from turntrace import SessionTracker

tracker = SessionTracker()
other = trace.get_tracer("app")
telling = threading.Lock()

def converse(k):
    n = 0
    while True:
        with tracker.session(user_id=f"user {k}") as session:
            for _ in range(5):
                n += 1
                with session.conversation(f"c{k}-{n % 2}").turn("Hello") as turn:
                    agent = turn.open_step("agent", "chain")
                    with other.start_as_current_span("work"):
                        turn.close_step(turn.open_step("search", "tool", parent=agent))
                    turn.close_step(agent)
                    if n % 7 == 0:
                        for _ in range(300):
                            turn.close_step(turn.open_step("many", "chain"))
                with telling:
                    tell(b"turn")

for k in range(3):
    threading.Thread(target=converse, args=(k,), daemon=True).start()
threading.Event().wait()
"""


def test_a_process_that_is_killed_leaves_no_finished_turn_without_its_spans(tmp_path: Path) -> None:
    chance = random.Random(11)
    running = []
    for turns in (1, 20, 60, 150):
        path = tmp_path / f"{turns}.db"
        running.append((path, fresh.Fresh(RUNS_UNTIL_KILLED, TURNTRACE_LEDGER_URL=f"sqlite:///{path}"), turns))
    try:
        for _, process, turns in running:
            assert [process.told() for _ in range(turns)] == [b"turn"] * turns
            time.sleep(chance.random() / 50)
            process.process.kill()
            process.process.join(fresh.PATIENCE_S)
            assert process.process.exitcode == -signal.SIGKILL
    finally:
        for _, process, _ in running:
            process.kill()
    ended = [assert_whole(path) for path, _, _ in running]
    assert sum(ended) > 0


# --- exits ------------------------------------------------------------------------------------------------------------
EXITS = """
import sys
from turntrace import SessionTracker
tracker = SessionTracker()
session = tracker.start_session(session_id="mine")
for n in range(50):
    with session.conversation("c1").turn("Hello") as turn:
        turn.close_step(turn.open_step("agent", "chain"))
        if n == 49 and sys.argv[1] == "in a turn":
            sys.exit(3)
        if n == 49 and sys.argv[1] == "by an error":
            raise LookupError
session.end("completed")
"""


@pytest.mark.parametrize(("how", "code"), [("at its end", 0), ("in a turn", 3), ("by an error", 1)])
def test_a_process_that_exits_without_a_flush_has_written_everything(how: str, code: int, path: Path, url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXITS, how],
        capture_output=True,
        text=True,
        timeout=fresh.PATIENCE_S,
        env=fresh.environment(TURNTRACE_LEDGER_URL=url),
    )
    assert done.returncode == code, done.stderr
    assert assert_whole(path) == 50
    last = rows(path, "SELECT status, error FROM turntrace_turns WHERE number = 50")
    assert last == [
        {0: ("completed", None), 3: ("abandoned", "SystemExit"), 1: ("failed", "LookupError")}[code],
    ]
    reason = "completed" if code == 0 else None
    assert rows(path, "SELECT id, end_reason FROM turntrace_sessions") == [("mine", reason)]


RUNS_LOOPS = """
import asyncio
from turntrace import SessionTracker

tracker = SessionTracker()

async def main():
    async with tracker.session(session_id="mine") as session:
        async with session.conversation("c1").turn("Hello"):
            pass

for _ in range(3):
    asyncio.run(main())
tracker.flush()
"""


def test_a_process_may_run_several_event_loops(path: Path, url: str) -> None:
    fresh.run(RUNS_LOOPS, TURNTRACE_LEDGER_URL=url)
    assert assert_whole(path) == 3
    assert rows(path, "SELECT total_turns, end_reason FROM turntrace_sessions") == [(3, "user_exit")]


# --- forks ------------------------------------------------------------------------------------------------------------
FORKS = """
import os, signal, sys
from turntrace import SessionTracker
from opentelemetry import trace

signal.alarm(40)
tracker = SessionTracker()
other = trace.get_tracer("app")

def turns(session, who, number):
    for _ in range(number):
        for conversation in (who, "shared"):
            with session.conversation(conversation).turn("Hello") as turn:
                turn.close_step(turn.open_step("agent", "chain"))
                with other.start_as_current_span("work"):
                    pass

session = tracker.start_session(session_id="mine")
turns(session, "parent", 5)  # some of it is still to be written when the process forks
children = []
for n in range(3):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        turns(session, f"child {n}", 5)
        with tracker.session(user_id=f"child {n}") as own:
            turns(own, f"child {n}", 5)
        os._exit(0 if tracker.flush(20) else 9)
    children.append(pid)
    turns(session, "parent", 5)
assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
session.end("completed")
tracker.flush()
"""


@needs_fork
def test_a_process_that_forks_tracks_on_in_parent_and_child(path: Path, url: str) -> None:
    fresh.run(FORKS, TURNTRACE_LEDGER_URL=url)
    assert assert_whole(path) == 2 * (20 + 3 * 10)
    numbers = _numbers(path)
    assert {name: len(each) for name, each in numbers.items()} == {
        "parent": 20,
        "shared": 50,
        "child 0": 10,
        "child 1": 10,
        "child 2": 10,
    }
    totals = dict(rows(path, "SELECT coalesce(user_id, id), total_turns FROM turntrace_sessions"))
    assert totals.pop("mine") == 2 * (20 + 3 * 5)
    assert list(totals.values()) == [10, 10, 10]


FORKS_WHILE_WRITING = """
import os, signal, sys, threading, time
from turntrace import SessionTracker

signal.alarm(40)
tracker = SessionTracker()
session = tracker.start_session(session_id="mine")
writing = threading.Event()

def write():
    with tracker.ledger.writing() as ledger:
        ledger.put("other", b"x", items=1, created_ns=1)
        writing.set()
        time.sleep(0.3)

thread = threading.Thread(target=write)
thread.start()
writing.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    with session.conversation("child").turn("Hello"):
        pass
    os._exit(0 if tracker.flush(10) else 9)
thread.join()
with session.conversation("parent").turn("Hello"):
    pass
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
tracker.flush()
sys.exit(code)
"""


@needs_fork
def test_a_process_that_forks_while_it_writes_can_write_in_the_child(path: Path, url: str) -> None:
    # SQLite's locks belong to a process: a child that inherits a connection in the middle of a transaction takes its
    # lock for its own, which nobody gives back.
    fresh.run(FORKS_WHILE_WRITING, TURNTRACE_LEDGER_URL=url)
    assert sorted(rows(path, "SELECT conversation_id, number FROM turntrace_turns")) == [("child", 1), ("parent", 1)]
    assert rows(path, "SELECT count(*) FROM turntrace_outbox WHERE kind = 'other'") == [(1,)]


FORKS_WHILE_THE_LEDGER_IS_AWAY = """
import os, signal, sqlite3, time
from contextlib import closing
from turntrace import SessionTracker
from turntrace.records import TurnRequest

signal.alarm(60)
tracker = SessionTracker(idle_after=1)

def rename(table, to):
    with closing(sqlite3.connect(os.environ["TURNTRACE_LEDGER_URL"].removeprefix("sqlite:///"))) as connection:
        connection.execute(f"ALTER TABLE {table} RENAME TO {to}")

session = tracker.start_session(user_id="ann")
session.conversation("c").start_turn("Hello").end()
tracker.flush()
rename("turntrace_open_turns", "away")
session.conversation("c").start_turn("Hello").end()  # its beginning waits, and is the parent's to write
assert tracker.is_ledger_away
pid = os.fork()
if pid == 0:
    sittings = set()
    for _ in range(3):  # each after a silence that ends a sitting
        time.sleep(1.6)
        turn = tracker.begin_turn(TurnRequest(user_id="ann", conversation_id="c"))
        sittings.add(turn.conversation.session.id)
        turn.end()
        assert tracker.flush(20)
    os._exit(len(sittings))
rename("away", "turntrace_open_turns")
assert tracker.flush(20)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
"""


@needs_fork
def test_what_a_parent_has_still_to_write_is_not_waited_for_in_the_child(path: Path, url: str) -> None:
    fresh.run(FORKS_WHILE_THE_LEDGER_IS_AWAY, TURNTRACE_LEDGER_URL=url)
    assert sorted(rows(path, "SELECT conversation_id, number FROM turntrace_turns")) == [("c", n) for n in range(1, 6)]


OUTLIVES = """
import os, signal
from turntrace import SessionTracker

signal.alarm(60)
tracker = SessionTracker()
session = tracker.start_session(session_id="mine")

def turns(conversation, number):
    for _ in range(number):
        with session.conversation(conversation).turn("Hello"):
            pass

turns("parent", 5)
asking, answering = os.pipe(), os.pipe()
if os.fork() == 0:
    signal.alarm(60)
    turns("child", 5)
    tracker.flush()
    os.write(answering[1], b"1")
    os.read(asking[0], 1)
    turns("child", 50)
    session.end("completed")
    os._exit(0 if tracker.flush(20) else 9)
os.read(answering[0], 1)
turns("parent", 5)
tracker.shutdown()  # the parent closes its last connection, and SQLite clears up if it takes it for the last of all
tell(b"closed")
os.write(asking[1], b"1")
os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@needs_fork
def test_a_child_that_outlives_the_connections_of_its_parent_loses_nothing(path: Path, url: str) -> None:
    process = fresh.Fresh(OUTLIVES, TURNTRACE_LEDGER_URL=url)
    process.finish()
    assert_sound(path)
    assert assert_whole(path) == 65
    assert rows(path, "SELECT end_reason, total_turns FROM turntrace_sessions") == [("completed", 65)]


OUTLIVES_AMONG_OTHERS = OUTLIVES.replace('tell(b"closed")', 'tell(b"closed")\nheard()')


@needs_fork
def test_a_child_and_a_later_process_do_not_disturb_each_other(path: Path, url: str) -> None:
    process = fresh.Fresh(OUTLIVES_AMONG_OTHERS, TURNTRACE_LEDGER_URL=url)
    try:
        assert process.told() == b"closed"
        other = Ledger(url)  # as the command line does, while the child has its connections
        assert len(other.sessions()) == 1
        assert other.hash_key() == other.hash_key()
        process.tell(b"go on")
        process.finish()
        other.close()
    finally:
        process.kill()
    assert_sound(path)
    assert assert_whole(path) == 65


FORKS_WITH_MEMORY = """
import os, signal, sys
from turntrace import SessionTracker

signal.alarm(40)
tracker = SessionTracker("sqlite://")
session = tracker.start_session(session_id="mine")
session.conversation("c1").start_turn("Hello").end()
tracker.flush()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    session.conversation("c1").start_turn("Hello").end()
    os._exit(0 if tracker.flush(10) and session.summary().total_turns == 2 else 9)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert session.summary().total_turns == 1
sys.exit(code)
"""


@needs_fork
def test_a_ledger_in_memory_goes_on_in_the_child_as_a_copy(url: str) -> None:
    fresh.run(FORKS_WITH_MEMORY, TURNTRACE_LEDGER_URL=url)


MULTIPROCESSES = """
import multiprocessing, os
from turntrace import SessionTracker

def work(n):
    for _ in range(2):
        tracker = SessionTracker()
        with tracker.session(user_id=f"u{n}") as session:
            for _ in range(5):
                with session.conversation("shared").turn("Hello"):
                    pass
        assert tracker.flush(20)

first = SessionTracker()
first.start_session().end()
forking = multiprocessing.get_context("fork")
workers = [forking.Process(target=work, args=(n,)) for n in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join(40)
first.flush()
assert [worker.exitcode for worker in workers] == [0] * 4
"""


@needs_fork
def test_the_workers_of_a_process_track_with_trackers_of_their_own(path: Path, url: str) -> None:
    fresh.run(MULTIPROCESSES, TURNTRACE_LEDGER_URL=url)
    assert assert_whole(path) == 40
    assert _numbers(path) == {"shared": list(range(1, 41))}


ENDS_IN_A_BLOCK = """
import multiprocessing
from turntrace import SessionTracker

first = SessionTracker()

def work(tracker, n):
    tracker = tracker or SessionTracker()
    with tracker.session(user_id=f"u{n}") as session, session.conversation(f"c{n}").turn("Hello"):
        pass

forking = multiprocessing.get_context("fork")
workers = [forking.Process(target=work, args=(first if n % 2 else None, n)) for n in range(6)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join(40)
assert [worker.exitcode for worker in workers] == [0] * 6
first.flush()
"""


@needs_fork
def test_what_ends_with_a_forked_child_of_multiprocessings_is_written_down(path: Path, url: str) -> None:
    """Such children leave by ``os._exit``: nothing that Python does at its exit is done."""
    fresh.run(ENDS_IN_A_BLOCK, TURNTRACE_LEDGER_URL=url)
    assert assert_whole(path) == 6
    assert [each.end_reason for each in Ledger(url).sessions()] == ["user_exit"] * 6


IMPORTS_SLOWLY = """
import importlib.abc, os, sys, threading, time
from turntrace import SessionTracker
from turntrace.records import LLMCall, Usage

class Slow(importlib.abc.MetaPathFinder):
    began = threading.Event()

    def find_spec(self, name, path, target=None):
        if name.startswith("genai_prices"):
            self.began.set()
            time.sleep(0.05)

sys.meta_path.insert(0, Slow())
tracker = SessionTracker()

def talk(name):
    turn = tracker.start_session().conversation(name).start_turn("Hi")
    step = turn.open_step("model", "generation")
    turn.close_step(step, call=LLMCall("gpt-4o", "openai", Usage(10, 5)))
    turn.end()

talk("parent")
assert Slow.began.wait(30)  # the writer imports the price list now
pid = os.fork()
if pid == 0:
    for _ in range(4):  # or the child's writer may have the very id of the thread that held the lock
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    talk("child")
    os._exit(0 if tracker.flush(20) else 9)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert tracker.flush(20)
"""


@needs_fork
def test_a_fork_waits_while_the_writer_imports_the_price_list(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    fresh.run(IMPORTS_SLOWLY, TURNTRACE_LEDGER_URL=url)
    ledger = Ledger(url)
    assert [session.total_cost_usd > 0 for session in ledger.sessions()] == [True, True]
    ledger.close()
