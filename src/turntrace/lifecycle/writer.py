"""The background thread that ends spans and writes to the ledger, so that the app's threads do not."""

import atexit
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final, Protocol

from turntrace.boundary import caught
from turntrace.errors import LedgerError
from turntrace.ledger import Ledger, LedgerWriter

logger = logging.getLogger("turntrace")

_BATCH: Final = 64
_LINGER_S: Final = 0.005
_RETRY_S: Final = (0.05, 0.2, 1.0, 5.0, 15.0)
_EXIT_S: Final = 10.0
_STOP: Final = threading.Event()


class Job(Protocol):
    """Something to be written down."""

    def prepare(self) -> None:
        """Do what needs no transaction; called once."""

    def write(self, ledger: LedgerWriter) -> None:
        """Write, within a transaction; called again when that failed."""


class Writer:
    """Does jobs one after the other, several in one transaction.

    A job whose transaction fails because of the database is tried again until it succeeds; nothing is lost while the
    process lives. A job that fails for another reason is logged and left out, and the others go on.

    Args:
        ledger: Where to write.
        written: Called after each transaction.
    """

    def __init__(self, ledger: Ledger, written: Callable[[], object] = lambda: None) -> None:
        self._ledger = ledger
        self._written = written
        self._jobs: queue.SimpleQueue[Job | threading.Event] = queue.SimpleQueue()  # an event marks a place
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()
        self._failing = False
        weak_self = weakref.ref(self)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: _call(weak_self(), Writer._after_fork))
        atexit.register(lambda: _call(weak_self(), Writer._at_exit))

    def submit(self, job: Job) -> None:
        """Have a job done soon; returns at once."""
        self._put(job)

    def mark(self) -> threading.Event:
        """Return an event that is set when all that was submitted before is written."""
        reached = threading.Event()
        self._put(reached)
        return reached

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
        reached = threading.Event()
        self._hurry.set()
        self._put(reached)
        return reached.wait(timeout)

    def stop(self, timeout: float | None = None) -> None:
        """End the thread when all that was submitted is written; another job starts it again."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            self._hurry.set()
            self._jobs.put(_STOP)
            thread.join(timeout)

    def _put(self, job: Job | threading.Event) -> None:
        self._jobs.put(job)
        if self._thread is None:
            self._start()

    def _start(self) -> None:
        with self._start_lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="turntrace-writer", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            batch = [self._jobs.get()]
            self._hurry.wait(_LINGER_S)  # a moment for more to come: one transaction then serves them all
            while len(batch) < _BATCH:
                try:
                    batch.append(self._jobs.get_nowait())
                except queue.Empty:
                    break
            marks = [job for job in batch if isinstance(job, threading.Event)]
            if marks:
                self._hurry.clear()
            jobs = self._prepared([job for job in batch if not isinstance(job, threading.Event)])
            if jobs:
                self._write(jobs)
            for mark in marks:
                mark.set()
            if _STOP in marks:
                return self._stopped()

    def _stopped(self) -> None:
        with self._start_lock:
            self._thread = None
        if not self._jobs.empty():  # submitted meanwhile
            self._start()

    def _prepared(self, batch: list[Job]) -> list[Job]:
        ready = []
        for job in batch:
            try:
                job.prepare()
            except Exception as error:
                _caught(job, error)
            else:
                ready.append(job)
        return ready

    def _write(self, batch: list[Job]) -> None:
        if not self._try(batch):
            for job in batch:  # one by one, so that one bad job does not keep back the others
                while not self._try([job]):
                    pass

    def _try(self, batch: list[Job]) -> bool:
        """Write a batch, waiting for the database as long as it takes; tell whether the rest may go on."""
        for attempt in range(1_000_000):
            try:
                with self._ledger.writing() as ledger:
                    for job in batch:
                        job.write(ledger)
            except LedgerError as error:
                if not self._failing:
                    self._failing = True
                    logger.warning("turntrace: %s What is tracked stays in memory until it can be written.", error)
                time.sleep(_RETRY_S[min(attempt, len(_RETRY_S) - 1)])
            except Exception as error:
                if len(batch) > 1:
                    return False
                _caught(batch[0], error)
                return True
            else:
                if self._failing:
                    self._failing = False
                    logger.warning("turntrace: the ledger can be written again.")
                self._after_writing()
                return True
        return True

    def _after_writing(self) -> None:
        try:
            self._written()
        except Exception as error:  # what was written is written
            _caught(self._written, error)

    def _at_exit(self) -> None:
        if not self.drain(_EXIT_S):
            logger.warning("turntrace: the ledger could not be written within %s s of the exit.", _EXIT_S)

    def _after_fork(self) -> None:
        # The parent's jobs are the parent's to write; its thread and locks do not exist here.
        self._jobs = queue.SimpleQueue()
        self._hurry = threading.Event()
        self._start_lock = threading.Lock()
        self._thread = None


def _call(writer: Writer | None, method: Callable[[Writer], None]) -> None:
    if writer is not None:
        method(writer)


def _caught(job: object, error: Exception) -> None:
    try:
        caught(f"writing down ({type(job).__name__})", error)
    except Exception:
        logger.exception("turntrace: a job failed")  # strict: this thread must go on all the same
