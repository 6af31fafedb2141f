"""The background thread that writes: nothing is lost, nothing is written twice, and nobody waits for long."""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from turntrace import boundary
from turntrace.ledger import Ledger, LedgerWriter
from turntrace.ledger.opening import open_engine
from turntrace.lifecycle.writer import Writer

NOON = 1_767_268_800_000_000_000
PATIENCE = 20.0


class Put:
    """A job that puts a text into the outbox."""

    def __init__(self, text: str, *, prepare: Callable[[], object] = lambda: None) -> None:
        self.text = text
        self.prepared = 0
        self.written = 0
        self._prepare = prepare

    def prepare(self) -> None:
        self.prepared += 1
        self._prepare()

    def write(self, ledger: LedgerWriter) -> None:
        self.written += 1
        ledger.put("spans", self.text.encode(), items=1, created_ns=NOON)


class Bad(Put):
    """A job that puts something into the outbox, and then fails for a reason that another try will not mend."""

    def __init__(self, fail: Callable[[LedgerWriter], object]) -> None:
        super().__init__("bad")
        self._fail = fail

    def write(self, ledger: LedgerWriter) -> None:
        super().write(ledger)
        self._fail(ledger)


class Gate(Put):
    """A job that keeps the thread busy until it is let through: what is submitted meanwhile is one batch."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        super().__init__("gate", prepare=self._wait)

    def _wait(self) -> None:
        self.reached.set()
        assert self.open.wait(PATIENCE)


def raising(error: Exception) -> Callable[..., object]:
    def fail(*_: object) -> object:
        raise error

    return fail


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine whose statements wait for a lock for 20 ms only, so that no test waits for seconds."""
    made = open_engine(f"sqlite:///{tmp_path}/ledger.db")
    event.listen(made, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout=20"))
    yield made
    made.dispose()


@pytest.fixture
def ledger(engine: Engine) -> Iterator[Ledger]:
    made = Ledger(engine)
    yield made
    made.close()


@pytest.fixture
def writer(ledger: Ledger) -> Writer:
    return Writer(ledger)


def texts(ledger: Ledger) -> list[str]:
    return [item.body.decode() for item in ledger.outbox()]


@contextmanager
def locked(ledger: Ledger) -> Iterator[None]:
    """Hold the write lock of a ledger's file, as another process that writes for long."""
    path = ledger.url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")


@contextmanager
def one_batch(writer: Writer) -> Iterator[None]:
    """Have all that is submitted in the block done as one batch."""
    gate = Gate()
    writer.submit(gate)
    assert gate.reached.wait(PATIENCE)
    try:
        yield
    finally:
        gate.open.set()


# --- what is submitted is written -------------------------------------------------------------------------------------
def test_jobs_are_done_in_the_order_in_which_they_came(writer: Writer, ledger: Ledger) -> None:
    jobs = [Put(str(n)) for n in range(300)]
    for job in jobs:
        writer.submit(job)
    assert writer.drain(PATIENCE)
    assert texts(ledger) == [str(n) for n in range(300)]
    assert {(job.prepared, job.written) for job in jobs} == {(1, 1)}


def test_jobs_of_many_threads_are_each_done_once_and_those_of_a_thread_in_order(writer: Writer, ledger: Ledger) -> None:
    def submit(thread: int) -> None:
        for n in range(50):
            writer.submit(Put(f"{thread}:{n}"))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(submit, range(8)))
    assert writer.drain(PATIENCE)
    written = texts(ledger)
    assert len(written) == len(set(written)) == 400
    for thread in range(8):
        assert [text for text in written if text.startswith(f"{thread}:")] == [f"{thread}:{n}" for n in range(50)]


def test_several_jobs_share_a_transaction(writer: Writer, ledger: Ledger, engine: Engine) -> None:
    commits: list[object] = []
    event.listen(engine, "commit", commits.append)
    with one_batch(writer):
        for n in range(50):
            writer.submit(Put(str(n)))
    assert writer.drain(PATIENCE)
    assert len(texts(ledger)) == 51
    assert len(commits) <= 4


def test_jobs_that_come_soon_after_a_transaction_share_the_next_one(ledger: Ledger) -> None:
    """In a busy process a turn ends every few milliseconds; a transaction for each would cost more than the turn."""
    transactions: list[threading.Event] = []
    writer = Writer(ledger, lambda: transactions[-1].set())

    def share_one() -> bool:
        transactions.append(threading.Event())
        writer.submit(Put("first"))
        assert transactions[-1].wait(PATIENCE)  # nobody asked for it to be written
        jobs = [Put("second"), Put("third")]
        transactions.append(threading.Event())
        writer.submit(jobs[0])
        time.sleep(0.015)  # longer than a job waits that comes by itself
        were_none = not transactions[-1].is_set()
        writer.submit(jobs[1])
        assert writer.drain(PATIENCE)
        return were_none

    assert any(share_one() for _ in range(10))  # a slow machine may come too late with some


def test_a_job_may_submit_another(writer: Writer, ledger: Ledger) -> None:
    writer.submit(Put("a", prepare=lambda: writer.submit(Put("b"))))
    assert writer.drain(PATIENCE)
    assert writer.drain(PATIENCE)
    assert texts(ledger) == ["a", "b"]


# --- draining ---------------------------------------------------------------------------------------------------------
def test_there_is_nothing_to_wait_for_before_the_first_job(writer: Writer) -> None:
    before = threading.active_count()
    assert writer.drain()
    assert writer.drain(0)
    assert threading.active_count() == before


def test_draining_waits_for_what_was_submitted_before(writer: Writer, ledger: Ledger) -> None:
    for n in range(20):
        writer.submit(Put(str(n)))
        assert writer.drain(PATIENCE)
        assert len(texts(ledger)) == n + 1


def test_draining_gives_up_after_its_time_and_loses_nothing(writer: Writer, ledger: Ledger) -> None:
    with one_batch(writer):
        writer.submit(Put("a"))
        assert not writer.drain(0.01)
        assert not writer.drain(0)
    assert writer.drain(PATIENCE)
    assert texts(ledger) == ["gate", "a"]


def test_many_threads_may_drain_at_once(writer: Writer, ledger: Ledger) -> None:
    def work(thread: int) -> list[bool]:
        seen = []
        for n in range(10):
            writer.submit(Put(f"{thread}:{n}"))
            seen.append(writer.drain(PATIENCE) and f"{thread}:{n}" in texts(ledger))
        return seen

    with ThreadPoolExecutor(6) as threads:
        assert all(all(seen) for seen in threads.map(work, range(6)))
    assert len(texts(ledger)) == 60


def test_a_job_that_drains_does_not_wait_for_itself(writer: Writer, ledger: Ledger) -> None:
    drained: list[bool] = []
    writer.submit(Put("a", prepare=lambda: drained.append(writer.drain(PATIENCE))))
    assert writer.drain(PATIENCE)
    assert drained == [False]
    assert texts(ledger) == ["a"]


# --- a database that cannot be written for a while --------------------------------------------------------------------
def test_a_locked_database_delays_and_loses_nothing(
    writer: Writer, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [Put(str(n)) for n in range(100)]
    with locked(ledger):
        for job in jobs:
            writer.submit(job)
        assert not writer.drain(0.4)
        assert texts(ledger) == []
    assert writer.drain(PATIENCE)
    assert texts(ledger) == [str(n) for n in range(100)]
    assert {job.prepared for job in jobs} == {1}
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 2
    assert "locked" in lines[0]
    assert "TURNTRACE_LEDGER_URL" in lines[0]
    assert "can be written again" in lines[1]


def test_the_app_can_go_on_submitting_while_the_database_is_locked(writer: Writer, ledger: Ledger) -> None:
    with locked(ledger):
        writer.submit(Put("first"))
        assert not writer.drain(0.1)
        for n in range(1000):
            writer.submit(Put(str(n)))
    assert writer.drain(PATIENCE)
    assert len(texts(ledger)) == 1000  # the outbox is read 1,000 at a time
    assert texts(ledger)[:2] == ["first", "0"]


def test_each_time_that_the_database_is_locked_is_told_once(
    writer: Writer, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(2):
        with locked(ledger):
            writer.submit(Put(str(n)))
            assert not writer.drain(0.1)
        assert writer.drain(PATIENCE)
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 4


# --- jobs that fail ---------------------------------------------------------------------------------------------------
def test_a_job_that_cannot_be_prepared_does_not_stop_the_others(
    lenient: None, writer: Writer, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    with one_batch(writer):
        writer.submit(Put("a"))
        writer.submit(Put("secret", prepare=raising(ValueError("secret"))))
        writer.submit(Put("b"))
    assert writer.drain(PATIENCE)
    assert texts(ledger) == ["gate", "a", "b"]
    assert boundary.failures["writing down (Put): ValueError"] == 1
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert "ValueError" in lines[0]
    assert "secret" not in lines[0]


BAD: Any = None
FAILURES: dict[str, Callable[[LedgerWriter], object]] = {
    "an error of ours": raising(LookupError("secret")),
    "what must not be empty": lambda ledger: ledger.put("spans", BAD, items=1, created_ns=NOON),
    "what the database cannot hold": lambda ledger: ledger.put("spans", object(), items=1, created_ns=NOON),  # type: ignore[arg-type]
    "a number that is too large": lambda ledger: ledger.put("spans", b"", items=2**70, created_ns=NOON),
    "a text that is no UTF-8": lambda ledger: ledger.put("\ud800", b"", items=1, created_ns=NOON),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_job_that_cannot_be_written_does_not_stop_the_others(
    failure: str, lenient: None, writer: Writer, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [Put("a"), Put("b"), Bad(FAILURES[failure]), Put("c")]
    with one_batch(writer):
        for job in jobs:
            writer.submit(job)
    assert writer.drain(3), "the job is tried again and again, and keeps back all others"
    assert texts(ledger) == ["gate", "a", "b", "c"]  # and nothing of the one that failed
    assert sum(boundary.failures.values()) == 1
    assert {job.prepared for job in jobs} == {1}
    assert "secret" not in "".join(record.getMessage() for record in caplog.records)


def test_the_thread_goes_on_after_any_number_of_failures(
    lenient: None, writer: Writer, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(30):
        writer.submit(Bad(raising(LookupError())))
        writer.submit(Put(str(n)))
    assert writer.drain(PATIENCE)
    assert texts(ledger) == [str(n) for n in range(30)]
    assert boundary.failures["writing down (Bad): LookupError"] == 30
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_errors_of_ours_are_not_hidden_from_our_own_tests(writer: Writer, ledger: Ledger) -> None:
    class Hearing(logging.Handler):
        heard = 0

        def emit(self, record: logging.LogRecord) -> None:
            Hearing.heard += 1

    logger = logging.getLogger("turntrace")
    handler, others = Hearing(logging.ERROR), list(logger.handlers)
    for other in others:  # the one of conftest.py would fail this test
        logger.removeHandler(other)
    logger.addHandler(handler)
    try:
        writer.submit(Bad(raising(LookupError())))
        writer.submit(Put("a"))
        assert writer.drain(PATIENCE)
    finally:
        logger.removeHandler(handler)
        for other in others:
            logger.addHandler(other)
    assert Hearing.heard == 1
    assert texts(ledger) == ["a"]
