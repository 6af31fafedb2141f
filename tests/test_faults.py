"""What may go wrong around an app: it gives the same answers, what can be kept is kept, and the log says it once.

Each fault is caused and ended while the little app of `fault_app` runs. The table of docs/faults.md is what is found
here; ``python tests/test_faults.py`` writes it again.
"""

import json
import logging
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

import pytest
from sqlalchemy import event

import fresh
import postgres
from fault_app import App, Heard, Tracked, Untracked, kept, made_tracker, reconciled
from turntrace import ContentPolicy, ContextTracker, SessionTracker, boundary, content
from turntrace.context import DropOldestTurns
from turntrace.errors import LedgerError
from turntrace.export import Pace, Sender
from turntrace.export.server import LangfuseServer
from turntrace.identity import new_id
from turntrace.ledger import Ledger
from turntrace.ledger.opening import open_engine
from turntrace.lifecycle.dropoff import is_dropoff
from turntrace.lifecycle.sweep import sweep
from turntrace.settings import read_langfuse_settings
from turntrace.testing import Clock

TABLE = Path(__file__).parent.parent / "docs" / "faults.md"
BEGIN, END = "<!-- faults: made by tests/test_faults.py -->", "<!-- /faults -->"
COLUMNS = ("fault", "what the app saw", "what was kept", "what was logged")
pytestmark = [pytest.mark.usefixtures("lenient")]


class Found(NamedTuple):
    """What is found of a fault: the cells of the table."""

    saw: str
    kept: str
    logged: str


class Fault:
    """Something that goes wrong while the app runs, and is put right again.

    Args:
        folder: An empty folder.
        stack: Closes what it opens.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.path = folder / "place" / "ledger.db"
        self.stack = stack
        self.connections: list[sqlite3.Connection] = []
        self.pragmas: list[str] = ["busy_timeout=20"]

    def settings(self) -> dict[str, Any]:
        """Return what the tracker is given beside its ledger."""
        return {}

    def reads(self) -> dict[str, Any]:
        """Return what the handler is given."""
        return {}

    def context(self) -> ContextTracker | None:
        """Return what fits the messages into the window."""
        return None

    def inside(self) -> None:
        """Do something in each node."""

    def ledger(self) -> Any:
        """Return the engine of the ledger: it waits for a lock for 20 ms only, so that no test waits for seconds."""
        engine = open_engine(f"sqlite:///{self.path}")
        event.listen(engine, "connect", self._connected)
        return engine

    def _connected(self, connection: sqlite3.Connection, _: object) -> None:
        self.connections.append(connection)
        for pragma in self.pragmas:
            connection.execute(f"PRAGMA {pragma}")

    def set(self, pragma: str) -> None:
        """Set something of all connections to SQLite, also of those that are made from now on."""
        self.pragmas.append(pragma)
        for connection in self.connections:
            with suppress(sqlite3.ProgrammingError):  # it is closed by now
                connection.execute(f"PRAGMA {pragma}")

    def begin(self, tracker: SessionTracker) -> None:
        """Cause it."""

    def end(self) -> None:
        """Put it right."""

    def found(self) -> Found:
        """Run the app before, during and after it, and say what is found."""
        return through(self)


# --- the ledger -------------------------------------------------------------------------------------------------------
class DiskFull(Fault):
    """disk full (SQLite's `max_page_count`), then room again"""

    def begin(self, tracker: SessionTracker) -> None:
        self.set("max_page_count=1")  # SQLite takes the size that the file has

    def end(self) -> None:
        self.set("max_page_count=1000000000")


class ReadOnly(Fault):
    """ledger read-only while the app runs, then writable again"""

    def begin(self, tracker: SessionTracker) -> None:
        self.set("query_only=ON")

    def end(self) -> None:
        self.set("query_only=OFF")


class Locked(Fault):
    """ledger locked by another process"""

    def begin(self, tracker: SessionTracker) -> None:
        self._process = fresh.Fresh(
            "import sqlite3, os\n"
            "other = sqlite3.connect(os.environ['LEDGER'], isolation_level=None)\n"
            "other.execute('BEGIN IMMEDIATE'); tell(b'locked'); heard(); other.execute('ROLLBACK')",
            LEDGER=str(self.path),
        )
        self.stack.callback(self._process.kill)
        assert self._process.told() == b"locked"

    def end(self) -> None:
        self._process.tell(b"go on")
        self._process.finish()


class FolderGone(Fault):
    """ledger's folder replaced by a file, then put back"""

    def begin(self, tracker: SessionTracker) -> None:
        self.path.parent.rename(self.path.parent.with_name("away"))
        self.path.parent.write_text("a file")

    def end(self) -> None:
        self.path.parent.unlink()
        self.path.parent.with_name("away").rename(self.path.parent)


class Damaged(Fault):
    """ledger's file overwritten with noise, then restored from a copy"""

    def begin(self, tracker: SessionTracker) -> None:
        with closing(sqlite3.connect(self.path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._copy = self.path.read_bytes()
        self._write(b"noise" * (len(self._copy) // 5))

    def end(self) -> None:
        self._write(self._copy)

    def _write(self, what: bytes) -> None:
        with self.path.open("r+b") as file:
            file.write(what)


class Deleted(Fault):
    """ledger's file deleted while the app runs"""

    def begin(self, tracker: SessionTracker) -> None:
        for path in self.path.parent.glob("ledger.db*"):
            path.unlink()


class Replaced(Fault):
    """ledger's file replaced by an older copy"""

    def begin(self, tracker: SessionTracker) -> None:
        copy = self.path.with_name("copy")
        with closing(sqlite3.connect(self.path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        shutil.copy(self.path, copy)
        for path in self.path.parent.glob("ledger.db*"):
            path.unlink()
        copy.rename(self.path)


class PostgresStopped(Fault):
    """PostgreSQL stopped, then started again"""

    def ledger(self) -> Any:
        self._server = self.stack.enter_context(postgres.own_server())
        return self._server.url

    def begin(self, tracker: SessionTracker) -> None:
        self._server.stop("fast")

    def end(self) -> None:
        self._server.start()


class FileLimit(Fault):
    """disk full (files may not grow: `RLIMIT_FSIZE`), then room again"""

    def begin(self, tracker: SessionTracker) -> None:
        size = max(path.stat().st_size for path in self.path.parent.glob("ledger.db*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def end(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def found(self) -> Found:
        """Find it in a process of its own, which the limit is for."""
        return in_process(
            "from test_faults import *\n"
            "with ExitStack() as stack:\n"
            "    fault = FileLimit(Path(os.environ['FOLDER']), stack)\n"
            "    tell(json.dumps(through(fault)).encode())",
            FOLDER=str(self.path.parent.parent),
        )


def in_process(script: str, **variables: str) -> Found:
    """Run a script in a process of its own, and return what it tells."""
    process = fresh.Fresh(f"import json, os, sys\n{script}", **variables)
    try:
        found = Found(*json.loads(process.told()))
        process.finish()
        return found
    finally:
        process.kill()


# --- when the app starts ----------------------------------------------------------------------------------------------
class AtStart(Fault):
    """A fault that is there when the app starts."""

    def found(self) -> Found:
        self.path.parent.mkdir()
        self.cause()
        with Heard() as heard, pytest.raises(LedgerError) as raised:
            SessionTracker(self.url())
        told = "".join(traceback.format_exception(raised.value))
        assert told.count("Traceback (most recent call last)") == 1, told
        words = logged([str(raised.value)], self.path)
        return Found(f"`SessionTracker()` raises `LedgerError`: {words}", "nothing", logged(heard.lines, self.path))

    def url(self) -> str:
        """Return the URL of the ledger."""
        return f"sqlite:///{self.path}"

    def cause(self) -> None:
        """Cause it."""


class NoLedger(AtStart):
    """at the start, the ledger's file is none of SQLite's"""

    def cause(self) -> None:
        self.path.write_bytes(b"This is no database. " * 1000)


class DamagedBefore(AtStart):
    """at the start, the ledger's file is damaged in its middle"""

    def cause(self) -> None:
        SessionTracker(self.url()).shutdown()
        size = self.path.stat().st_size
        with self.path.open("r+b") as file:
            file.seek(100)  # behind the header
            file.write(b"noise" * (size // 5 - 20))


class NoFolder(AtStart):
    """at the start, the ledger's folder is a file"""

    def cause(self) -> None:
        self.path.parent.rmdir()
        self.path.parent.write_text("a file")


class LockedBefore(AtStart):
    """at the start, another process holds the ledger"""

    def cause(self) -> None:
        SessionTracker(self.url()).shutdown()
        other = self.stack.enter_context(closing(sqlite3.connect(self.path, isolation_level=None)))
        other.execute("BEGIN EXCLUSIVE")


class PostgresAway(AtStart):
    """at the start, PostgreSQL is away"""

    def url(self) -> str:
        return f"postgresql+psycopg://app:secret@127.0.0.1:{postgres._free_port()}/postgres"


# --- the clock and the process ----------------------------------------------------------------------------------------
class ClockBack(Fault):
    """the clock goes back an hour, between turns and within each"""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__(folder, stack)
        self.clock = Clock(tick_ns=1_000_000)
        self.is_wrong = False

    def settings(self) -> dict[str, Any]:
        return {"clock": self.clock}

    def inside(self) -> None:
        if self.is_wrong:
            self.clock.advance(minutes=-60)

    def begin(self, tracker: SessionTracker) -> None:
        self.clock.advance(minutes=-60)
        self.is_wrong = True


SETUP = """
import json, os, signal, sys, threading
from fault_app import *

path = os.environ["LEDGER"]
tracker = made_tracker(f"sqlite:///{path}")
"""

FORKS = """
signal.alarm(60)
tracked, plain = Tracked(App(), tracker), Untracked(App())
said, wanted = tracked.say(), plain.say()
turn = tracker.start_session(session_id="mine").conversation("open").start_turn("Hi")
pid = os.fork()
said, wanted = said + tracked.say(), wanted + plain.say()
flushed = tracker.flush(30)
if pid == 0:
    os._exit(0 if said == wanted and flushed else 9)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
turn.end()
assert said == wanted and tracker.flush(30)
"""

ENDS = """
tracked, plain = Tracked(App(), tracker), Untracked(App())
assert tracked.say() == plain.say()
session = tracker.start_session(session_id="mine")
turn = session.conversation("open").start_turn("Hi")
inside = threading.Event()

def wait():
    with session.conversation("waits").turn("Hi"):
        inside.set()
        threading.Event().wait()

threading.Thread(target=wait, daemon=True).start()
inside.wait()
"""

EXITS_AT_ONCE = """
leaving = []
tracked, plain = Tracked(App(inside=lambda: leaving and os._exit(0)), tracker), Untracked(App())
assert tracked.say() == plain.say() and tracker.flush(30)
leaving.append(True)
tracked.say_sync()
"""

NO_THREADS = """
tracked, plain = Tracked(App(), tracker), Untracked(App())
threading.stack_size(1 << 46)  # the system does not have that much memory, and refuses
with tracker.session(session_id="mine") as session:
    with session.conversation("open").turn("Hi"):
        pass
threading.stack_size(0)
assert tracked.say() == plain.say()
"""


class InProcess(Fault):
    """A fault of a whole process: it runs a script, and what it left is found by the next one."""

    script: ClassVar[str]

    def found(self) -> Found:
        done = subprocess.run(
            [sys.executable, "-c", SETUP + self.script],
            capture_output=True,
            text=True,
            timeout=fresh.PATIENCE_S,
            env=fresh.environment(LEDGER=str(self.path), PYTHONPATH=os.pathsep.join(sys.path)),
        )
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if line]
        tracker = made_tracker(self.ledger())
        self.stack.callback(tracker.shutdown)
        before = reconciled(tracker)
        later = time.time_ns() + 3600 * 10**9
        swept = [sweep(tracker, later, tracker.idle_ns).turns for _ in range(2)]
        assert swept[1] == 0
        assert tracker.flush(60)
        found = kept(*before)
        if swept[0]:
            found = f"{found}; then the sweep: {kept(*reconciled(tracker))}"
        return Found("the same answers", found, logged(said, self.path))


READS_ONLY = """
tracker.shutdown()
tracker = made_tracker(f"sqlite:///file:{path}?mode=ro&uri=true")
assert Tracked(App(), tracker).say() == Untracked(App()).say()
"""


class OnlyToRead(InProcess):
    """ledger read-only from the start to the exit"""

    script = READS_ONLY


class Forked(InProcess):
    """the process forks with a turn open, and both go on"""

    script = FORKS


class Ended(InProcess):
    """the interpreter ends with turns open, one of them in a daemon thread"""

    script = ENDS


class ExitedAtOnce(InProcess):
    """`os._exit()` in a node"""

    script = EXITS_AT_ONCE


class NoThreads(InProcess):
    """no thread can be started for a while"""

    script = NO_THREADS


# --- functions of the app's -------------------------------------------------------------------------------------------
class Broken:
    """A function that raises while it is told to.

    Args:
        works: What it does else.
        error: What it raises.
    """

    def __init__(self, works: Callable[..., Any], error: type[BaseException] = RuntimeError) -> None:
        self._works = works
        self._error = error
        self.is_broken = False

    def __call__(self, *args: Any) -> Any:
        if self.is_broken:
            raise self._error("a secret of the user's")
        return self._works(*args)


class BrokenFunction(Fault):
    """A function of the app's that raises."""

    error: ClassVar[type[BaseException]] = RuntimeError
    works: ClassVar[Callable[..., Any]]

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__(folder, stack)
        self.broken = Broken(type(self).works, self.error)

    def begin(self, tracker: SessionTracker) -> None:
        self.broken.is_broken = True

    def end(self) -> None:
        self.broken.is_broken = False


class Classifier(BrokenFunction):
    """`classify=` raises"""

    works = content.classify_input

    def settings(self) -> dict[str, Any]:
        return {"classify": self.broken}


class Dropoff(BrokenFunction):
    """`dropoff=` raises"""

    works = is_dropoff

    def settings(self) -> dict[str, Any]:
        return {"dropoff": self.broken}


class Evaluating(BrokenFunction):
    """an evaluator raises"""

    works = staticmethod(lambda _: {"good": True})

    def settings(self) -> dict[str, Any]:
        return {"evaluators": [self.broken]}


class Redactor(BrokenFunction):
    """`ContentPolicy(redact=)` raises"""

    works = str

    def settings(self) -> dict[str, Any]:
        return {"content": ContentPolicy("turn", redact=self.broken)}


class NewIds(BrokenFunction):
    """`ids=` raises"""

    works = new_id

    def settings(self) -> dict[str, Any]:
        return {"ids": self.broken}


class Watch(BrokenFunction):
    """`clock=` raises"""

    works = time.time_ns

    def settings(self) -> dict[str, Any]:
        return {"clock": self.broken}


class DescribeInput(BrokenFunction):
    """`describe_input=` raises"""

    works = lambda given: given["messages"][-1]  # noqa: E731

    def reads(self) -> dict[str, Any]:
        return {"describe_input": self.broken}


class DescribeOutput(BrokenFunction):
    """`describe_output=` raises"""

    works = lambda given: given["messages"]  # noqa: E731

    def reads(self) -> dict[str, Any]:
        return {"describe_output": self.broken}


class Counting(BrokenFunction):
    """`ContextTracker(counter=)` raises"""

    works = len

    def context(self) -> ContextTracker:
        return ContextTracker("gpt-4o", counter=self.broken)


class Pruning(BrokenFunction):
    """the strategy of a `ContextTracker` raises"""

    works = DropOldestTurns().prune

    def context(self) -> ContextTracker:
        broken = self.broken

        class Strategy(DropOldestTurns):
            def prune(self, overfull: Any) -> Any:
                return broken(overfull)

        return ContextTracker("gpt-4o", limit=40, threshold=0.5, strategy=Strategy())


class ClassifierExits(Classifier):
    """`classify=` calls `sys.exit()`"""

    error = SystemExit


class DropoffExits(Dropoff):
    """`dropoff=` calls `sys.exit()`"""

    error = SystemExit


class EvaluatorExits(Evaluating):
    """an evaluator calls `sys.exit()`"""

    error = SystemExit


class RedactorExits(Redactor):
    """`ContentPolicy(redact=)` calls `sys.exit()`"""

    error = SystemExit


FAULTS: Sequence[type[Fault]] = (
    *(FileLimit, DiskFull, ReadOnly, Locked, FolderGone, Damaged, Deleted, Replaced, PostgresStopped),
    *(NoLedger, DamagedBefore, NoFolder, LockedBefore, PostgresAway, OnlyToRead),
    *(ClockBack, Forked, Ended, ExitedAtOnce, NoThreads),
    *(Classifier, Dropoff, Evaluating, Redactor, NewIds, Watch, DescribeInput, DescribeOutput, Counting, Pruning),
    *(ClassifierExits, DropoffExits, EvaluatorExits, RedactorExits),
)


def through(fault: Fault) -> Found:
    """Run the app before, during and after a fault, and say what is found."""
    app, plain = App(fault.context(), fault.inside), Untracked(App())
    with Heard() as heard:
        tracker = made_tracker(fault.ledger(), **fault.settings())
        tracked = Tracked(app, tracker, **fault.reads())
        fault.stack.callback(tracker.shutdown)
        said, wanted = tracked.say(), plain.say()
        assert tracker.flush(60)
        fault.begin(tracker)
        said, wanted = said + tracked.say(), wanted + plain.say()
        tracker.flush(0.3)
        fault.end()
        said, wanted = said + tracked.say(), wanted + plain.say()
        assert tracker.flush(60)
        turns, spans = reconciled(tracker)
    assert tracked.handler.open_runs == 0
    wrong = [f"{one!r}, not {other!r}" for one, other in zip(said, wanted, strict=True) if one != other]
    saw = "; ".join(wrong) or "the same answers"
    return Found(saw, kept(turns, spans), logged(heard.lines, fault.path))


CUT_OFF = r"consuming input failed: terminating connection .*See whether the server is well\."
REFUSED = (
    'connection failed: connection to server at "127.0.0.1", port 5432 failed: Connection refused. '
    "Is the server running, at that host and port? Start it."
)


def logged(lines: Sequence[str], path: Path) -> str:
    """Return lines of the log as a cell, without what differs from machine to machine."""
    found = []
    for line in lines:
        line = line.replace(str(path), ".../ledger.db").replace(str(path.parent), "...").removeprefix("turntrace: ")
        line = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:5432", line)
        line = re.sub(r"port \d+ failed", "port 5432 failed", line)
        line = re.sub(CUT_OFF, REFUSED, line)  # as the first one that notices is told where it was at work just then
        found.append(line.replace("|", "\\|"))
    return "<br>".join(found) or "nothing"


# --- the table --------------------------------------------------------------------------------------------------------
def row_of(kind: type[Fault], found: Found) -> str:
    """Return what is found of a fault as a row of the table."""
    return f"| {' | '.join((str(kind.__doc__), *found))} |"


def written() -> list[str]:
    """Return the rows of the table as they stand in the file."""
    text = TABLE.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()[2:]


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_a_fault_changes_no_answer_and_costs_no_more_than_the_table_says(kind: type[Fault], tmp_path: Path) -> None:
    content._failures.clear()  # what other tests' redactors raised
    with ExitStack() as stack:
        row = row_of(kind, kind(tmp_path, stack).found())
    assert row in written()


def test_the_table_has_each_fault_once() -> None:
    assert [row.split(" | ")[0] for row in written()] == [f"| {kind.__doc__}" for kind in FAULTS]


# --- time, memory and the log -----------------------------------------------------------------------------------------
def test_a_flush_keeps_to_its_time_while_the_ledger_is_away(tmp_path: Path) -> None:
    with ExitStack() as stack:
        fault = Locked(tmp_path, stack)
        tracker = made_tracker(fault.ledger())
        stack.callback(tracker.shutdown)
        session = tracker.start_session()
        fault.begin(tracker)
        session.conversation("c1").start_turn("Hi").end()
        given: list[float] = []
        provider: Any = tracker.target.provider
        provider.force_flush = lambda millis=30_000: given.append(millis)
        assert not tracker.flush(0.2)
        fault.end()
        assert tracker.flush(60)
    assert given[0] <= 200


def test_what_waits_for_a_ledger_that_is_away_for_long_is_bounded(tmp_path: Path) -> None:
    with ExitStack() as stack, Heard() as heard:
        fault = Locked(tmp_path, stack)
        tracker = made_tracker(fault.ledger())
        stack.callback(tracker.shutdown)
        tracked, plain = Tracked(App(), tracker), Untracked(App())
        said, wanted = tracked.say(), plain.say()
        assert tracker.flush(60)
        writer = tracker._writer
        writer._most_waiting = 20
        fault.begin(tracker)
        for _ in range(5):
            said, wanted = said + tracked.say(), wanted + plain.say()
            assert writer._jobs.qsize() <= 20
        assert tracker._turns == {}, "turns that have ended are held"
        assert len(tracker._finishing) <= 20
        fault.end()
        tracker.flush(60)
        said, wanted = said + tracked.say(), wanted + plain.say()
        assert tracker.flush(60)
        turns, _ = reconciled(tracker)
    assert said == wanted
    assert (tracker._turns, tracker._finishing) == ({}, {})
    assert 6 < len(turns) < 21
    assert {turn.status for turn in turns} == {"completed"}
    away, full, back = heard.lines
    assert "Meanwhile what is tracked stays in memory" in away
    assert "20 steps, turns and sessions wait" in full
    assert re.search(r"can be written again\. \d+ of what began and ended meanwhile were dropped", back)


def test_a_turn_whose_end_was_dropped_is_closed_by_the_sweep(tmp_path: Path) -> None:
    with ExitStack() as stack:
        fault = Locked(tmp_path, stack)
        tracker = made_tracker(fault.ledger())
        stack.callback(tracker.shutdown)
        turn = tracker.start_session().conversation("c1").start_turn("Hi")
        assert tracker.flush(60)
        fault.begin(tracker)
        tracker._writer._most_waiting = 0
        turn.end()
        fault.end()
        tracker._writer._most_waiting = 100
        assert sweep(tracker, time.time_ns() + 3600 * 10**9, tracker.idle_ns).turns == 1
        assert tracker.flush(60)
        ((closed,), _) = reconciled(tracker)
    assert (closed.id, closed.status) == (turn.id, "abandoned")


def test_the_sender_says_once_that_the_outbox_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    ledger.close()
    path.write_bytes(b"This is no database. " * 1000)
    caplog.set_level("DEBUG", "turntrace")
    sender = Sender(ledger.to_send, LangfuseServer(read_langfuse_settings()), Pace(ledger_s=0.01))

    def told(level: int) -> int:
        return len([each for each in caplog.records if each.levelno == level and "Sending waits" in each.getMessage()])

    sender.start()
    give_up = time.monotonic() + fresh.PATIENCE_S
    while told(logging.DEBUG) < 3 and time.monotonic() < give_up:
        time.sleep(0.01)
    sender.stop(fresh.PATIENCE_S)
    assert told(logging.DEBUG) >= 3
    assert told(logging.WARNING) == 1


def test_users_keep_their_hashes_when_the_ledger_is_deleted(tmp_path: Path) -> None:
    with ExitStack() as stack:
        fault = Deleted(tmp_path, stack)
        first = made_tracker(fault.ledger(), user_hash_key=None)
        stack.callback(first.shutdown)
        fault.begin(first)
        first.start_session(user_id="ann")
        assert first.flush(60)
        second = made_tracker(fault.ledger(), user_hash_key=None)
        stack.callback(second.shutdown)
        assert second.hash_user("ann") == first.hash_user("ann")


def main() -> None:
    """Find out about all faults, and write the table."""
    rows = []
    for kind in FAULTS if len(sys.argv) == 1 else [each for each in FAULTS if each.__name__ in sys.argv]:
        boundary.failures.clear()
        content._failures.clear()
        with TemporaryDirectory() as folder, ExitStack() as stack:
            rows.append(row_of(kind, kind(Path(folder), stack).found()))
        print(rows[-1], flush=True)
    if len(sys.argv) > 1:  # some of them only
        return
    table = "\n".join([f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}", *rows])
    text = TABLE.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    TABLE.write_text(f"{before}\n{table}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
