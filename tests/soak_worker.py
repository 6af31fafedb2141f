"""What a worker of the soak does: hundreds of conversations at once, and a journal of what it saw of them."""

import asyncio
import itertools
import json
import logging
import os
import random
import resource
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langgraph.types import Command

from soak_graphs import JOURNEY, STAGES, TALLIES, Graphs, Tally, await_for, says
from turntrace import SessionCallbackHandler, SessionTracker, Turn, boundary
from turntrace.errors import StateError

HASH_KEY = "a key for hashing users in the soak"
THREADS = 12
CHANNELS = ("web", "slack")

KINDS: dict[str, float] = {
    "invoke": 14,
    "ainvoke": 14,
    "stream": 6,
    "astream": 6,
    "fan out": 4,
    "afan out": 4,
    "retried": 3,
    "aretried": 3,
    "node fails": 3,
    "anode fails": 3,
    "tool fails": 3,
    "model fails": 3,
    "own spans": 4,
    "aown spans": 4,
    "block": 4,
    "ablock": 4,
    "by id": 3,
    "stream left": 4,
    "astream left": 4,
    "cancelled": 4,
    "takes long": 8,
    "answered": 5,
    "aanswered": 5,
    "answered elsewhere": 4,
    "unanswered": 3,
    "carried": 4,
}
"""What a turn may be, and how often."""

RACES: dict[str, float] = {
    "answered twice": 3,
    "answered late": 3,
    "handed unwritten": 3,
    "outlives the sweep": 2,
    "carried untold": 2,
}
"""Those where two processes, or a sweep, are at one turn at the same moment, or know different things of it."""
_UNWRITTEN = "handed unwritten"


@dataclass(frozen=True)
class Task:
    """What one worker is to do.

    Attributes:
        url: Where the ledger is.
        folder: What all workers share beside it: journals, checkpoints, what they hand over.
        worker: Its number.
        workers: How many there are.
        life: How often it was started before.
        seed: Of its chance.
        until: When no turn is begun any more, by the clock of the machine.
        talks: Its conversations, by their numbers.
        pause_s: How long a user thinks on average.
        idle_s: Silence after which a session ends.
        sweeps: Whether it sweeps.
        kinds: What turns may be, and how often.
        variables: What is set in its environment.
    """

    url: str
    folder: Path
    worker: int
    workers: int
    life: int
    seed: int
    until: float
    talks: range
    pause_s: float
    idle_s: float
    sweeps: bool
    kinds: dict[str, float]
    variables: dict[str, str]


class Journal:
    """What a worker saw and did, a line each; what it says survives its end."""

    def __init__(self, task: Task) -> None:
        name = f"journal-{task.worker}-{task.life}"
        self._file = os.open(task.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lock = threading.RLock()
        self.lines = 0

    def add(self, do: str, **words: Any) -> None:
        """Add a line."""
        with self._lock:
            os.write(self._file, (json.dumps({"do": do, "at": time.time(), **words}) + "\n").encode())
            self.lines += 1

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Have what is said and what is done in one order over all threads."""
        with self._lock:
            yield


@dataclass
class Talk:
    """A conversation as its worker knows it.

    Attributes:
        number: Its number.
        waits: Id of the turn that waits for a person, where one does.
        carrier: A turn that another worker handed over.
        carried: What was asked in it.
        seen: Turns and sessions to give feedback on.
    """

    number: int
    waits: str | None = None
    carrier: dict[str, str] | None = None
    carried: str = ""
    seen: tuple[str, str] | None = None

    @property
    def id(self) -> str:
        return f"c-{self.number}"

    @property
    def user(self) -> str | None:
        """Two conversations have a user in common; some have none."""
        return None if self.number % 10 == 9 else f"user {self.number // 2}"

    @property
    def channel(self) -> str:
        return CHANNELS[self.number // 2 % 2]

    @property
    def topic(self) -> str:
        return f"topic {self.number % 7}"

    @property
    def thread(self) -> dict[str, Any]:
        return {"configurable": {"thread_id": self.id}}

    def config(self, **more: Any) -> dict[str, Any]:
        metadata = {"channel": self.channel, "topic": self.topic, **more}
        if self.user is not None:
            metadata["user_id"] = self.user
        return {**self.thread, "metadata": metadata}


@dataclass
class Done:
    """What one part of a turn is to be in the ledger."""

    status: str = "completed"
    exact: bool = True
    waits: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def work(task: Task) -> None:
    """Run the conversations of a worker until its time is up."""
    for name in [name for name in os.environ if name.startswith(("LANGFUSE_", "TURNTRACE_", "OTEL_"))]:
        del os.environ[name]
    os.environ.update(task.variables)
    logged = logging.FileHandler(task.folder / f"log-{task.worker}-{task.life}", delay=True)
    logged.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.getLogger("turntrace").addHandler(logged)
    # LangGraph's own, of nodes that end after their stream was left.
    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL + 1)
    journal = Journal(task)
    with boundary.strict():
        try:
            asyncio.run(_Worker(task, journal).run())
        except BaseException:
            journal.add("broken", what=traceback.format_exc())
            raise


class _Worker:
    def __init__(self, task: Task, journal: Journal) -> None:
        self.task = task
        self.journal = journal
        self.chance = random.Random(f"{task.seed} {task.worker} {task.life}")
        self.tracker = SessionTracker(
            task.url, idle_after=task.idle_s, user_hash_key=HASH_KEY, journeys={JOURNEY: STAGES}
        )
        self.handler = SessionCallbackHandler(self.tracker)
        self.graphs = Graphs(self.handler, task.folder)
        self.pool = ThreadPoolExecutor(THREADS)
        self.keys = itertools.count()
        self.inbox = task.folder / f"inbox-{task.worker}"
        self.running: set[asyncio.Task[None]] = set()

    # --- its life -----------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        await self.graphs.open()
        self.inbox.mkdir(exist_ok=True)
        self.journal.add("start", pid=os.getpid())
        for talk in self._own_talks():
            self._go_on(talk)
        helpers = [self._look_for_talks, self._mark_written, *[self._sweep] * self.task.sweeps]
        beside = [asyncio.create_task(helper()) for helper in helpers]
        while not self._is_over():
            await asyncio.sleep(0.1)
        for each in beside:
            await each
        while self.running:
            await asyncio.wait(self.running)
        await asyncio.to_thread(self._written)
        assert self.handler.open_runs == 0, f"{self.handler.open_runs} runs are open"
        await self.graphs.close()
        await self.tracker.ashutdown()
        self.journal.add("stop", rss=_peak_mb())

    def _is_over(self) -> bool:
        return time.time() >= self.task.until

    def _own_talks(self) -> list[Talk]:
        """Return the conversations of this worker: of one that was killed, where they stood by its journals."""
        talks = {number: Talk(number) for number in self.task.talks}
        for line in (line for life in range(self.task.life) for line in self._lines_of(life)):
            if line["do"] == "hand":
                talks.pop(line["talk"], None)
            elif line["do"] == "adopt":
                talks[line["talk"]] = Talk(line["talk"], waits=line["waits"])
            elif line["do"] == "end" and line["talk"] in talks:
                talks[line["talk"]].waits = line["turn"] if line["waits"] else None
            elif line["do"] == "begin" and line["talk"] in talks:
                talks[line["talk"]].waits = None  # what waited may have been answered
        return list(talks.values())

    def _lines_of(self, life: int) -> Iterator[dict[str, Any]]:
        yield from lines_of(self.task.folder / f"journal-{self.task.worker}-{life}")

    def _go_on(self, talk: Talk, *, to_keep: bool = True) -> None:
        going = asyncio.create_task(self._converse(talk) if to_keep else self._answer_too(talk))
        self.running.add(going)
        going.add_done_callback(self.running.discard)

    async def _look_for_talks(self) -> None:
        while not self._is_over():
            for path in sorted(self.inbox.glob("*.json")):
                found = json.loads(path.read_text(encoding="utf-8"))
                talk, to_keep = Talk(**found["talk"]), found["to_keep"]
                if to_keep:
                    self.journal.add("adopt", talk=talk.number, waits=talk.waits)
                path.unlink()
                self._go_on(talk, to_keep=to_keep)
            await asyncio.sleep(0.05)

    async def _mark_written(self) -> None:
        while not self._is_over():
            await asyncio.sleep(1.0)
            await asyncio.to_thread(self._written)

    def _written(self) -> None:
        """Note how far the journal tells of what is in the ledger, whatever becomes of this process."""
        lines = self.journal.lines
        if self.tracker.flush_writer():
            self.journal.add("written", lines=lines, rss=_peak_mb())

    async def _sweep(self) -> None:
        while not self._is_over():
            await asyncio.sleep(self.task.idle_s / 4 * self.chance.uniform(0.5, 1.5))
            swept = await self.tracker.asweep()
            self.journal.add("sweep", sessions=swept.sessions, turns=swept.turns)

    # --- a conversation -----------------------------------------------------------------------------------------------
    async def _answer_too(self, talk: Talk) -> None:
        """Answer what another worker answers at the same time."""
        try:
            await self._answer(talk, is_async=False, exact=False)
        except Exception:
            self.journal.add("broken", what=traceback.format_exc(), talk=talk.number)

    async def _converse(self, talk: Talk) -> None:
        kinds, weights = list(self.task.kinds), list(self.task.kinds.values())
        try:
            while not self._is_over():
                if talk.waits is None and talk.carrier is None:
                    await asyncio.sleep(self._pause())
                    if self._is_over():
                        return
                if talk.carrier is not None:
                    await self._take_up(talk, talk.carrier)
                elif talk.waits is not None and self.chance.random() < 0.8:
                    await self._answer(talk, is_async=self.chance.random() < 0.5)
                else:
                    talk.waits = None
                    [kind] = self.chance.choices(kinds, weights)
                    if await self._turn(talk, kind):
                        return  # another worker has it now
                await self._afterwards(talk)
        except Exception:
            self.journal.add("broken", what=traceback.format_exc(), talk=talk.number)

    def _pause(self) -> float:
        return min(self.chance.expovariate(1 / self.task.pause_s), self._left_s())

    def _left_s(self) -> float:
        return max(0.0, self.task.until - time.time())

    @contextmanager
    def _part(self, talk: Talk, kind: str) -> Iterator[tuple[Tally, Done]]:
        """Note what happens in a turn, or in the part of it that is run here, before and after."""
        tally = TALLIES.new(f"{self.task.worker}.{self.task.life}.{next(self.keys)}")
        done = Done()
        self.journal.add("begin", key=tally.key, talk=talk.number, kind=kind)
        try:
            yield tally, done
        finally:
            TALLIES.drop(tally)
        talk.waits = tally.turn if done.waits else None
        talk.seen = (tally.turn, tally.session) if tally.turn else None
        ended = {"status": done.status, "exact": done.exact, "waits": done.waits, **done.extra}
        self.journal.add("end", key=tally.key, talk=talk.number, kind=kind, **tally.words(), **ended)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)

    async def _turn(self, talk: Talk, kind: str) -> bool:
        """Take a turn of a kind; tell whether another worker goes on with the conversation."""
        is_async = kind.startswith("a") and kind[1:] in self.task.kinds
        plain = kind[1:] if is_async else kind
        if kind in ("invoke", "ainvoke", "stream", "astream", "by id"):
            with self._part(talk, kind) as (tally, _):
                more = {"session_id": f"s-{talk.number}"} if kind == "by id" else {}
                config = talk.config(**more)
                await self._run("tools", kind.removesuffix(" id"), tally, config, is_async=is_async or kind[0] == "a")
        elif plain in ("fan out", "retried", "node fails", "tool fails", "model fails", "own spans"):
            name = {"fan out": "fan_out", "retried": "retries", "own spans": "own"}.get(plain, plain.replace(" ", "_"))
            with self._part(talk, kind) as (tally, done):
                if plain.endswith("fails"):
                    done.status = "failed"
                    with suppress(ZeroDivisionError, KeyError, ConnectionError):
                        await self._run(name, "invoke", tally, talk.config(), is_async=is_async)
                        done.status = "did not fail"
                else:
                    await self._run(name, "invoke", tally, talk.config(), is_async=is_async)
        elif plain == "block":
            with self._part(talk, kind) as (tally, done):
                if is_async:
                    await self._ablock(talk, tally, done)
                else:
                    await self._in_thread(self._block, talk, tally, done)
        elif plain == "stream left":
            with self._part(talk, kind) as (tally, done):
                done.status, done.exact = "abandoned", False
                await self._leave(talk, tally, is_async=is_async)
        elif kind == "cancelled":
            with self._part(talk, kind) as (tally, done):
                done.status, done.exact = "abandoned", False
                await self._cancel(talk, tally)
        elif kind in ("takes long", "outlives the sweep"):
            name = "sleeps" if kind == "outlives the sweep" else "takes_long"
            with self._part(talk, kind) as (tally, _):
                await self._run(name, "ainvoke", tally, talk.config(), is_async=True)
        elif plain in ("answered", "unanswered", "answered elsewhere", "answered twice", "answered late", _UNWRITTEN):
            with self._part(talk, kind) as (tally, done):
                done.status, done.waits = "interrupted", True
                await self._run("asks", "invoke", tally, talk.config(), is_async=is_async)
            return await self._let_wait(talk, kind, is_async=is_async)
        elif kind in ("carried", "carried untold"):
            return await self._carry(talk, kind)
        else:
            raise AssertionError(kind)
        return False

    async def _run(self, name: str, how: str, tally: Tally, config: Any, *, is_async: bool, given: Any = None) -> Any:
        graph = self.graphs.get(name, is_async=is_async)
        inputs = {"messages": [("user", says(tally.key))]} if given is None else given
        mode: Any = self.chance.choice(["updates", "values", "messages", ["updates", "messages"]])

        def read() -> None:
            for _ in graph.stream(inputs, config, stream_mode=mode):
                pass

        if not is_async:
            return await self._in_thread(read if how == "stream" else lambda: graph.invoke(inputs, config))
        if how == "astream":
            async for _ in graph.astream(inputs, config, stream_mode=mode):
                pass
            return None
        return await graph.ainvoke(inputs, config)

    # --- kinds of turns -----------------------------------------------------------------------------------------------
    def _facts(self, talk: Talk) -> dict[str, Any]:
        return {"user_id": talk.user, "channel": talk.channel, "tier": "free"}

    def _block(self, talk: Talk, tally: Tally, done: Done) -> None:
        graph = self.graphs.get("tools", is_async=False)
        with self.tracker.session(**self._facts(talk)) as session:
            with session.conversation(talk.id, topic=talk.topic).turn(says(tally.key)) as turn:
                tally.see(turn)
                graph.invoke(turn.input, talk.thread)
                done.extra["journey"] = self._step(talk, turn)
            self.journal.add("exit", session=session.id)
        if self.chance.random() < 0.5:  # it may go on after the end
            session.journey(JOURNEY).convert()

    async def _ablock(self, talk: Talk, tally: Tally, done: Done) -> None:
        graph = self.graphs.get("own", is_async=True)
        async with self.tracker.session(**self._facts(talk)) as session:
            async with session.conversation(talk.id, topic=talk.topic).turn(says(tally.key)) as turn:
                tally.see(turn)
                await graph.ainvoke(turn.input, talk.thread)
                done.extra["journey"] = self._step(talk, turn)
            self.journal.add("exit", session=session.id)

    def _step(self, talk: Talk, turn: Turn) -> str:
        """Go a step of the user's journey; tell which."""
        journey = turn.journey(JOURNEY)
        chosen: str = self.chance.choice([*STAGES, "converted"])
        if chosen == "converted":
            journey.convert()
        else:
            journey.enter(chosen)
        return chosen

    async def _leave(self, talk: Talk, tally: Tally, *, is_async: bool) -> None:
        graph = self.graphs.get("slow", is_async=is_async)
        inputs = {"messages": [("user", says(tally.key))]}
        if is_async:
            aparts = graph.astream(inputs, talk.config(), stream_mode="messages")
            await anext(aparts)
            await aparts.aclose()
            return

        def read() -> None:
            parts = graph.stream(inputs, talk.config(), stream_mode="messages")
            next(parts)
            parts.close()

        await self._in_thread(read)

    async def _cancel(self, talk: Talk, tally: Tally) -> None:
        graph = self.graphs.get("hangs", is_async=True)
        inputs = {"messages": [("user", says(tally.key))]}
        running = asyncio.create_task(graph.ainvoke(inputs, talk.config()))
        await await_for(tally.started)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    async def _let_wait(self, talk: Talk, kind: str, *, is_async: bool) -> bool:
        if kind == "unanswered":
            talk.waits = None
            return False
        if kind in ("answered elsewhere", _UNWRITTEN):
            if kind != _UNWRITTEN:
                await asyncio.to_thread(self._written)
            self._hand_over(talk)
            return True
        least, most = (1.0, 1.5) if kind == "answered late" else (0.0, 0.3)
        await asyncio.sleep(min(self._left_s(), self.task.idle_s * self.chance.uniform(least, most)))
        if kind == "answered twice":  # by somebody who pressed the button again
            again = Talk(talk.number, waits=talk.waits)
            if self.chance.random() < 0.5:  # and was connected with another worker then
                self._send(again, to_keep=False)
                await self._answer(talk, is_async=is_async, exact=False)
            else:
                await asyncio.gather(self._answer(talk, is_async=is_async, exact=False), self._answer_too(again))
            return False
        await self._answer(talk, is_async=is_async)
        return False

    async def _answer(self, talk: Talk, *, is_async: bool, exact: bool = True) -> None:
        asked = talk.waits
        with self._part(talk, "answer") as (tally, done):
            done.exact = exact
            command: Any = Command(resume=says(tally.key, "yes"))
            done.extra["asked"] = asked
            await self._run("asks", "invoke", tally, talk.config(), is_async=is_async, given=command)

    async def _carry(self, talk: Talk, kind: str) -> bool:
        with self._part(talk, kind) as (tally, done):
            done.status = "interrupted"
            session = await self.tracker.astart_session(**self._facts(talk))
            topic = None if kind == "carried untold" else talk.topic
            turn = await session.conversation(talk.id, topic=topic).astart_turn(says(tally.key))
            tally.see(turn)
            if self.chance.random() < 0.5:  # a part of it is done here
                graph = self.graphs.get("fan_out", is_async=True)
                await graph.ainvoke(turn.input, turn.config)
            talk.carrier, talk.carried = await turn.acarrier(), tally.turn
        self._hand_over(talk)
        return True

    async def _take_up(self, talk: Talk, carrier: dict[str, str]) -> None:
        talk.carrier = None
        with self._part(talk, "taken up") as (tally, done):
            tally.turn = talk.carried
            try:
                turn = await self.tracker.aresume_turn(carrier)
            except StateError:  # it waited for too long
                done.status = "abandoned"
                return
            async with turn:
                tally.see(turn)
                graph = self.graphs.get("own", is_async=True)
                await graph.ainvoke({"messages": [("user", says(tally.key))]}, turn.config)

    def _hand_over(self, talk: Talk) -> None:
        """Let another worker go on with a conversation; this one too, when there is no other."""
        self._send(talk, to_keep=True)

    def _send(self, talk: Talk, *, to_keep: bool) -> None:
        others = [each for each in range(self.task.workers) if each != self.task.worker] or [self.task.worker]
        inbox = self.task.folder / f"inbox-{self.chance.choice(others)}"
        inbox.mkdir(exist_ok=True)
        words = {"number": talk.number, "waits": talk.waits, "carrier": talk.carrier, "carried": talk.carried}
        path = inbox / f"{talk.number}-{time.time_ns()}"
        path.write_text(json.dumps({"talk": words, "to_keep": to_keep}), encoding="utf-8")
        if to_keep:
            self.journal.add("hand", talk=talk.number)
        path.rename(path.with_suffix(".json"))

    # --- between turns ------------------------------------------------------------------------------------------------
    async def _afterwards(self, talk: Talk) -> None:
        if talk.seen is None or not talk.seen[1]:
            return
        chance = self.chance.random()
        turn_id, session_id = talk.seen
        if chance < 0.15:
            await self._in_thread(self._feedback, {"turn_id": turn_id}, "user_feedback")
        elif chance < 0.2:
            await self._in_thread(self._feedback, {"session_id": session_id}, f"mood {self.task.worker}")
        elif chance < 0.25 and talk.waits is None:
            self.journal.add("exit", session=session_id)
            self.tracker.end_session(session_id)

    def _feedback(self, about: dict[str, str], name: str) -> None:
        value = self.chance.choice([True, False, 0.25, 0.5])
        with self.journal.in_order():
            self.journal.add("feedback", **about, name=name, value=float(value))
            self.tracker.feedback(value, **about, name=name)


def close(task: Task, patience_s: float) -> None:
    """End what is still open, and have all sent: by a process that did not see any of it."""
    os.environ.update(task.variables)
    logged = logging.FileHandler(task.folder / "log-closing", delay=True)
    logged.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.getLogger("turntrace").addHandler(logged)
    journal = Journal(task)
    until = time.monotonic() + patience_s
    try:
        with boundary.strict(), SessionTracker(task.url, user_hash_key=HASH_KEY) as tracker:
            later = time.time_ns() + 86_400 * 10**9
            swept = tracker.sweep(later)
            again = tracker.sweep(later)
            journal.add("last sweep", sessions=swept.sessions, turns=swept.turns)
            journal.add("sweep again", sessions=again.sessions, turns=again.turns)
            while not tracker.ledger.to_send.status().is_empty and time.monotonic() < until:
                tracker.flush(5)
                time.sleep(0.2)
            left = tracker.ledger.to_send.status()
            journal.add("sent", left=repr(left), empty=left.is_empty, refused=len(left.refused), dropped=left.dropped)
    except BaseException:
        journal.add("broken", what=traceback.format_exc())
        raise


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """Read a journal; the last line of one that was killed may be cut."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            yield json.loads(line)
