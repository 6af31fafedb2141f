"""The background thread that ends spans and writes to the ledger, so that the app's threads do not."""

import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from typing import TYPE_CHECKING, Final, Protocol

from turntrace.boundary import caught
from turntrace.errors import LedgerError
from turntrace.forking import at_exit, in_child

if TYPE_CHECKING:
    from turntrace.ledger import Ledger, LedgerWriter

logger = logging.getLogger("turntrace")

MOST_WAITING: Final = 100_000
"""How many jobs may wait for the ledger: at about 10 KB a turn that is a gigabyte of memory at most."""

_BATCH: Final = 64
_LINGER_S: Final = 0.005
_EVERY_S: Final = 0.05
"""How soon after a transaction the next one begins: at twenty a second, many turns share one. One by itself is not kept
waiting for it, so that little is lost with a process that is killed."""
_RETRY_S: Final = (0.05, 0.2, 1.0, 5.0, 15.0)
_ASKED_S: Final = 1.0
_EXIT_S: Final = 10.0


def time_left(timeout: float | None) -> Callable[[], float | None]:
    """Return what tells how many seconds are left of a time that begins now; None when it has no end."""
    if timeout is None:
        return lambda: None
    until = time.monotonic() + timeout
    return lambda: max(0.0, until - time.monotonic())


class Job(Protocol):
    """Something to be written down."""

    def prepare(self) -> None:
        """Do what needs no transaction of the writer's; called again only when it raised a `LedgerError`."""

    def write(self, ledger: "LedgerWriter") -> None:
        """Write, within a transaction; called again when that failed."""


class _Mark:
    """A place among the jobs, of a class that nobody patches."""

    def __init__(self) -> None:
        self.reached = threading.Event()


_STOP: Final = _Mark()


class Writer:
    """Does jobs one after the other, several in one transaction.

    A job that fails because of the database is tried again until it succeeds; nothing is lost while the process lives,
    and meanwhile `is_ledger_away` says so. A job that fails for another reason is logged and left out; others go on.
    Only so many wait: beyond them what is submitted is dropped, which is said once.

    Args:
        ledger: Where to write.
        written: Called after each transaction.
        most_waiting: How many jobs may wait.

    Attributes:
        is_ledger_away: Whether the ledger could not be written when it was tried last.
    """

    def __init__(
        self, ledger: "Ledger", written: Callable[[], object] = lambda: None, *, most_waiting: int = MOST_WAITING
    ) -> None:
        self._most_waiting = most_waiting
        self._dropped = itertools.count()
        self._is_full = False
        self._ledger = ledger
        self._written = written
        self._jobs: queue.SimpleQueue[Job | _Mark] = queue.SimpleQueue()
        self._hurry = threading.Event()
        self._next_at = 0.0
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()
        self._here = threading.Lock()
        self.is_ledger_away = False
        self._exits_by: float | None = None
        in_child(self._after_fork)
        weak_self = weakref.ref(self)
        at_exit(lambda: None if (alive := weak_self()) is None else alive._at_exit())

    def submit(self, job: Job) -> bool:
        """Have a job done soon; returns at once.

        Returns:
            Whether it will be done: not so when too many wait already.
        """
        if self._jobs.qsize() >= self._most_waiting:
            self._drop()
            return False
        self._put(job)
        return True

    def _drop(self) -> None:
        next(self._dropped)
        if not self._is_full:
            self._is_full = True
            logger.warning(
                "turntrace: %s steps, turns and sessions wait to be written: what begins and ends from now on is "
                "dropped, until they are.",
                f"{self._most_waiting:,}",
            )

    def mark(self) -> threading.Event:
        """Return an event that is set when all that was submitted before is written."""
        mark = _Mark()
        self._put(mark)
        return mark.reached

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until all that was submitted is written.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            Whether all is written.
        """
        if threading.current_thread() is self._thread:
            return False  # a flush from within a job must not wait for itself
        if self._thread is None and self._jobs.empty():
            return True
        self._hurry.set()
        return self.mark().wait(timeout)

    def settle(self, timeout: float) -> bool:
        """Do what `drain` does for who asks the ledger something; while that is away nobody waits for long."""
        return self.drain(min(timeout, _ASKED_S) if self.is_ledger_away else timeout)

    def stop(self, timeout: float | None = None) -> None:
        """End the thread when all that was submitted is written; another job starts it again."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            self._hurry.set()
            self._jobs.put(_STOP)
            thread.join(timeout)

    def _put(self, job: Job | _Mark) -> None:
        self._jobs.put(job)
        if self._thread is None:
            self._start()

    def _start(self) -> None:
        with self._start_lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="turntrace-writer", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # the interpreter ends, and begins no thread any more
                    logger.debug("turntrace: what waits is written without a thread (%s)", error)
                else:
                    self._thread = thread
        if self._thread is None:
            self._write_here()

    def _write_here(self) -> None:
        """Do what waits in this thread, without waiting for a ledger that is away."""
        if not self._here.acquire(blocking=False):
            return  # another thread is at it, or this one, whose job submits another
        try:
            while not self._jobs.empty():
                job = self._jobs.get()
                if isinstance(job, _Mark):
                    job.reached.set()
                    continue
                try:
                    job.prepare()
                    self._transact([job])
                except Exception as error:
                    _caught(job, error)
        finally:
            self._here.release()

    def _run(self) -> None:
        while not self._write_some():
            pass
        self._stopped()

    def _write_some(self) -> bool:
        """Wait for jobs and do them; tell whether to stop. Between two calls the thread holds no turn in memory."""
        batch = [self._jobs.get()]
        if self._jobs.qsize() < _BATCH:  # a moment for more to come: one transaction then serves them all
            self._hurry.wait(max(_LINGER_S, self._next_at - time.monotonic()))
        while len(batch) < _BATCH:
            try:
                batch.append(self._jobs.get_nowait())
            except queue.Empty:
                break
        marks = [job for job in batch if isinstance(job, _Mark)]
        if marks:
            self._hurry.clear()
        jobs = self._prepared([job for job in batch if not isinstance(job, _Mark)])
        if jobs:
            self._write(jobs)
            self._next_at = time.monotonic() + _EVERY_S
        del batch, jobs
        for mark in marks:
            mark.reached.set()
        return _STOP in marks

    def _stopped(self) -> None:
        with self._start_lock:
            self._thread = None
        if not self._jobs.empty():  # submitted meanwhile
            self._start()

    def _prepared(self, batch: list[Job]) -> list[Job]:
        return [job for job in batch if self._try(job.prepare, job)]

    def _write(self, batch: list[Job]) -> None:
        if len(batch) > 1:
            try:
                return self._wait_for_ledger(lambda: self._transact(batch))
            except BaseException:
                logger.debug("turntrace: %s jobs are written one by one: one of them fails", len(batch))
        for job in batch:  # so that a bad one does not keep back the others
            self._try(partial(self._transact, [job]), job)
        return None

    def _transact(self, batch: list[Job]) -> None:
        with self._ledger.writing() as ledger:
            for job in batch:
                job.write(ledger)
        self._note_back()
        self._after_writing()

    def _try(self, step: Callable[[], object], job: Job) -> bool:
        """Do a step of a job, waiting for the ledger as long as it takes; tell whether it succeeded."""
        try:
            self._wait_for_ledger(step)
        except BaseException as error:  # an exit in a function of the app's would end this thread without a word
            _caught(job, error)
            return False
        return True

    def _wait_for_ledger(self, step: Callable[[], object]) -> None:
        pauses = chain(_RETRY_S, repeat(_RETRY_S[-1]))
        while True:
            try:
                step()
            except LedgerError as error:
                self.note_away(error)
                time.sleep(next(pauses))
            else:
                return

    def note_away(self, error: LedgerError) -> None:
        """Note that the ledger cannot be written; it is said once, until it can be again."""
        if not self.is_ledger_away:
            self.is_ledger_away = True
            logger.warning("turntrace: %s Meanwhile what is tracked stays in memory, and the app goes on.", error)

    def _note_back(self) -> None:
        if self._is_full and (self.is_ledger_away or self._jobs.qsize() < self._most_waiting // 2):
            self._is_full, dropped, self._dropped = False, next(self._dropped), itertools.count()
            lost = f" {dropped:,} of what began and ended meanwhile were dropped."
        else:
            lost = ""
        if self.is_ledger_away or lost:
            self.is_ledger_away = False
            logger.warning("turntrace: the ledger can be written again.%s", lost)

    def _after_writing(self) -> None:
        try:
            self._written()
        except BaseException as error:  # what was written is written
            _caught(self._written, error)

    def time_to_exit(self) -> float:
        """Return the seconds that are left for all that is still to be done when the interpreter exits."""
        self._exits_by = self._exits_by or time.monotonic() + _EXIT_S
        return max(0.0, self._exits_by - time.monotonic())

    def _at_exit(self) -> None:
        if not self.drain(self.time_to_exit()):
            logger.warning(
                "turntrace: the ledger could not be written within %g s of the exit; what waited for it is lost.",
                _EXIT_S,
            )

    def _after_fork(self) -> None:
        # The parent's jobs are the parent's to write; its thread and locks do not exist here.
        self._jobs = queue.SimpleQueue()
        self._hurry = threading.Event()
        self._start_lock = threading.Lock()
        self._here = threading.Lock()
        self._thread = None
        self.is_ledger_away = self._is_full = False
        self._exits_by = None


def _caught(job: object, error: BaseException) -> None:
    try:
        caught(f"writing down ({type(job).__name__})", error)
    except BaseException:
        logger.exception("turntrace: a job failed")  # strict: this thread must go on all the same
