"""What a worker of `test_many_workers` does: its process imports this module and little else."""

import contextlib
import logging
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from opentelemetry.sdk.trace import TracerProvider

from turntrace import SessionTracker, Turn, boundary
from turntrace.records import LLMCall, TurnRequest, Usage

USERS = 200
CHANNELS = ("web", "slack")
ROOMS = 4  # few, so that writers meet at them
HELD = 5
FLUSH_EVERY = 8
KEPT_OPEN = 3


@dataclass(frozen=True)
class Work:
    """What one worker is to do.

    Attributes:
        url: Where the ledger is.
        folder: Where the worker notes what it has done.
        worker: Its number.
        turns: How many turns it is to end.
        idle_s: Silence after which its sweeps end a session.
        pause_s: What it rests between two turns.
        sweeps: Whether it sweeps beside its turns.
        is_doomed: Whether it then holds turns open, and goes on until it is killed.
    """

    url: str
    folder: Path
    worker: int
    turns: int
    idle_s: float
    pause_s: float
    sweeps: bool = False
    is_doomed: bool = False


class Notes:
    """What a worker notes outside of the ledger, a line each; what is noted survives its end."""

    def __init__(self, folder: Path, kind: str, worker: int) -> None:
        self._path = folder / f"{kind}-{worker}"

    def add(self, *lines: object) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def noted(folder: Path, kind: str) -> list[str]:
    """Return what all workers noted of a kind."""
    return [
        line for path in sorted(folder.glob(f"{kind}-*")) for line in path.read_text(encoding="utf-8").split("\n")[:-1]
    ]


def open_tracker(url: str) -> SessionTracker:
    """Open a tracker whose spans wait in the outbox."""
    return SessionTracker(url, tracer_provider=TracerProvider(shutdown_on_exit=False), outbox=True)


def work(task: Work) -> None:
    """Take turns with random users in sessions and conversations that the other workers are in, too."""
    logged = logging.FileHandler(task.folder / f"log-{task.worker}", delay=True)
    logging.getLogger("turntrace").addHandler(logged)
    with boundary.strict():
        tracker = open_tracker(task.url)
        with _sweeping(tracker, task):
            _take_turns(tracker, task)
        tracker.shutdown()


def _take_turns(tracker: SessionTracker, task: Work) -> None:
    chance = random.Random(task.worker)
    written = Notes(task.folder, "written", task.worker)
    running: list[Turn] = []
    ended: list[str] = []
    each = 0
    while each < task.turns or task.is_doomed:
        if each == task.turns:
            held = [_begin(tracker, chance) for _ in range(HELD)]
            Notes(task.folder, "held", task.worker).add(*(turn.id for turn in held))
        running.append(_begin(tracker, chance))
        each += 1
        while len(running) > (0 if each == task.turns else chance.randrange(KEPT_OPEN)):
            turn = running.pop(0)
            _end(turn, chance)
            ended.append(turn.id)
            if chance.random() < 0.05:
                session_id = turn.conversation.session.id
                tracker.end_session(session_id, "user_exit")
                Notes(task.folder, "exit", task.worker).add(session_id)
        if len(ended) >= FLUSH_EVERY or each == task.turns:
            assert tracker.flush(60)
            written.add(*ended)
            ended.clear()
        time.sleep(task.pause_s * chance.random() * 2)


def _begin(tracker: SessionTracker, chance: random.Random) -> Turn:
    user = f"user {chance.randrange(USERS)}"
    in_room = chance.random() < 0.6
    request = TurnRequest(
        user_id=user,
        conversation_id=f"room {chance.randrange(ROOMS)}" if in_room else f"{user}, {chance.randrange(2)}",
        channel=chance.choice(CHANNELS),
    )
    return tracker.begin_turn(request, "text")


def _end(turn: Turn, chance: random.Random) -> None:
    for _ in range(chance.randrange(3)):
        call = LLMCall("gpt-4o", "openai", Usage(chance.randrange(1, 2000), chance.randrange(1, 500)))
        turn.close_step(turn.open_step("model", "generation"), call=call)
    if chance.random() < 0.3:
        turn.close_step(turn.open_step("search", "tool"))
    turn.end(error=LookupError("none") if chance.random() < 0.1 else None)


@contextlib.contextmanager
def _sweeping(tracker: SessionTracker, task: Work) -> Iterator[None]:
    done = threading.Event()
    swept = Notes(task.folder, "swept", task.worker)

    def sweep() -> None:
        while not done.wait(task.idle_s / 4):
            ended = tracker.sweep(idle_after=task.idle_s)
            swept.add(ended.sessions)

    thread = threading.Thread(target=sweep)
    if task.sweeps:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if task.sweeps:
            thread.join()
