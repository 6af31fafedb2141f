"""Replays files of recorded conversations, several at a time, and sums up what the ledger then has of them."""

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

from turntrace.boundary import is_strict, traceback_of
from turntrace.demo.player import Outcome, Player
from turntrace.demo.recording import Transcript
from turntrace.demo.transcripts import Line
from turntrace.errors import ContextOverflowError, TranscriptError, TurntraceError
from turntrace.summaries import SessionSummary

logger = logging.getLogger("turntrace")

Start: TypeAlias = Callable[[Transcript], "Future[Outcome]"]


@dataclass(slots=True)
class Totals:
    """What the ledger has of the conversations that were read, and what became of their lines.

    The figures are sums over the sessions in the ledger, those that were complete before included; only ``messages``
    is counted while reading, since the ledger does not count them. A conversation that is read twice counts once.

    Attributes:
        unpriced_calls: Calls of models whose price is not known: they are not in ``cost_usd``.
        played: Conversations that were played from their start.
        continued: Conversations that were played from where an earlier replay had stopped.
        skipped: Conversations that were complete in the ledger.
        malformed: Lines that could not be played.
    """

    conversations: int = 0
    sessions: int = 0
    turns: int = 0
    messages: int = 0
    llm_calls: int = 0
    tool_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    unpriced_calls: int = 0
    played: int = 0
    continued: int = 0
    skipped: int = 0
    malformed: int = 0

    def add(self, transcript: Transcript, session: SessionSummary) -> None:
        """Add a conversation and its session."""
        self.conversations += 1
        self.sessions += 1
        self.messages += transcript.messages
        self.turns += session.total_turns
        self.llm_calls += session.llm_calls
        self.tool_calls += session.tool_calls
        self.input_tokens += session.input_tokens
        self.output_tokens += session.output_tokens
        self.cost_usd += session.total_cost_usd
        self.unpriced_calls += session.unpriced_calls


class Replay:
    """Replays lines of transcripts with a player.

    Args:
        player: What plays them; it stays the caller's to close.
        concurrency: How many conversations are played at a time: in threads, or in tasks of an event loop.
        is_async: Whether to play them in an event loop, with ``ainvoke``.
        on_line: Is told each line when it is done.
        on_problem: Is told each line that could not be played, and why.
    """

    def __init__(
        self,
        player: Player,
        *,
        concurrency: int = 1,
        is_async: bool = False,
        on_line: Callable[[Line], None] = lambda line: None,
        on_problem: Callable[[Line, str], None] = lambda line, why: None,
    ) -> None:
        self._player = player
        self._concurrency = concurrency
        self._is_async = is_async
        self._on_line = on_line
        self._on_problem = on_problem
        self._playing: dict[Future[Outcome], tuple[Line, Transcript]] = {}
        self._counted = _Counted()
        self._is_reading = False
        self._is_interrupted = False
        self.totals = Totals()

    def run(self, lines: Iterable[Line]) -> Totals:
        """Replay all lines; the same can be run again at any time and plays only what is missing.

        When it is interrupted (Ctrl-C), each conversation that is being played stops at the end of its turn.

        Raises:
            LedgerError: If the ledger cannot be read or written.
            KeyboardInterrupt: If it was interrupted.
        """
        starting = _in_tasks(self._player) if self._is_async else _in_threads(self._player, self._concurrency)
        with starting as start:
            try:
                for line in self._read(lines):
                    if line.transcript is None:
                        self._failed(line, line.problem or "it cannot be read")
                        continue
                    self._make_room_for(line.transcript)
                    self._playing[start(line.transcript)] = line, line.transcript
                self._reap(until=lambda: not self._playing)
            except BaseException:
                self._player.stop()
                wait(self._playing)
                raise
        return self.totals

    def interrupt(self) -> None:
        """Have `run` stop between two turns, and raise a `KeyboardInterrupt` then; from a handler of Ctrl-C.

        Python's own handler raises it wherever the main thread is. In the midst of waiting for what is played that
        leaves locks held, or comes out as another error. Only reading may last, so there it is raised at once.
        """
        self._is_interrupted = True
        self._player.stop()
        if self._is_reading:
            raise KeyboardInterrupt

    def _stop_if_interrupted(self) -> None:
        if self._is_interrupted:
            raise KeyboardInterrupt

    def _read(self, lines: Iterable[Line]) -> Iterator[Line]:
        reading = iter(lines)
        while True:
            self._is_reading = True
            try:
                self._stop_if_interrupted()
                line = next(reading, None)
            finally:
                self._is_reading = False
            if line is None:
                return
            yield line

    def _make_room_for(self, transcript: Transcript) -> None:
        """Wait until fewer are played than may be, and none of them is the same conversation."""
        self._reap(
            until=lambda: (
                len(self._playing) < self._concurrency
                and all(playing.conversation_id != transcript.conversation_id for _, playing in self._playing.values())
            )
        )

    def _reap(self, until: Callable[[], bool]) -> None:
        while not until():
            done, _ = wait(self._playing, return_when=FIRST_COMPLETED)
            self._stop_if_interrupted()
            for future in done:
                self._done(future, *self._playing.pop(future))

    def _done(self, future: "Future[Outcome]", line: Line, transcript: Transcript) -> None:
        try:
            outcome = future.result()
        except (TranscriptError, ContextOverflowError) as error:
            self._failed(line, str(error))
            return
        except TurntraceError:
            raise
        except Exception as error:
            if is_strict():
                raise
            logger.debug("turntrace: a conversation could not be played:\n%s", traceback_of(error))
            self._failed(line, f"it could not be played: {type(error).__name__}")
            return
        if outcome in ("played", "continued", "skipped"):
            setattr(self.totals, outcome, getattr(self.totals, outcome) + 1)
        session = self._player.summary(transcript)
        if session is not None and self._counted.add(transcript.conversation_id):
            self.totals.add(transcript, session)
        self._on_line(line)

    def _failed(self, line: Line, why: str) -> None:
        self.totals.malformed += 1
        self._on_problem(line, why)
        self._on_line(line)


@contextmanager
def _in_threads(player: Player, concurrency: int) -> Iterator[Start]:
    with ThreadPoolExecutor(concurrency, thread_name_prefix="turntrace-replay") as pool:
        yield lambda transcript: pool.submit(player.play, transcript)


@contextmanager
def _in_tasks(player: Player) -> Iterator[Start]:
    # In a thread of its own: there Ctrl-C does not cancel a turn half way. Here it may come between any two steps, so
    # what is begun is begun there, and what was begun is waited for, whether or not it was handed on.
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="turntrace-replay-loop")
    thread.start()
    tasks: set[asyncio.Task[None]] = set()

    def start(transcript: Transcript) -> "Future[Outcome]":
        told: Future[Outcome] = Future()
        loop.call_soon_threadsafe(lambda: tasks.add(loop.create_task(_told(told, player, transcript))))
        return told

    try:
        yield start
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


async def _told(told: "Future[Outcome]", player: Player, transcript: Transcript) -> None:
    try:
        told.set_result(await player.aplay(transcript))
    except BaseException as error:  # it is raised where it is waited for
        told.set_exception(error)


_CREATE: Final = "CREATE TABLE counted (id TEXT PRIMARY KEY) WITHOUT ROWID"


class _Counted:
    """The conversations that have been counted, on disk: memory does not grow with what is replayed."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")  # a file of SQLite's own, which goes with the connection
        self._database.execute(_CREATE)

    def add(self, conversation_id: str) -> bool:
        """Note a conversation; tell whether it was not there before."""
        done = self._database.execute("INSERT OR IGNORE INTO counted VALUES (?)", (conversation_id,))
        return done.rowcount == 1
