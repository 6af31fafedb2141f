"""The soak: thousands of conversations at once, with all that goes wrong, and in the end everything agrees.

    python tests/soak.py --seconds 600 --conversations 2000 --workers 4 --seed 1

Several workers share one ledger and take turns of every kind with scripted models through real graphs: sync, async,
streaming, failing, tried again, interrupted and answered by the same or another worker or by nobody, left half-way,
cancelled, handed over; with journeys, feedback, sessions that end by hand or by a sweep. The server that the spans go
to comes and goes, and one worker is killed and started again. In the end what the workers saw, the ledger, the spans
received and the scores must agree exactly; each difference is printed, and makes it fail.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fresh
import postgres
from loopback import Failure, LangfuseServer
from loopback_store import Span
from soak_check import Seen, differences, read_journals, read_ledger
from soak_worker import KINDS, RACES, Task, close, work

JOIN_S = 120.0
CLOSE_S = 240.0


@dataclass(frozen=True)
class Plan:
    """How long, how much, and what of it.

    Attributes:
        seconds: For how long turns are begun.
        conversations: How many there are at once.
        workers: How many processes.
        seed: Of the chance.
        rate: Turns a second that are wished for, over all workers.
        kills: How often a worker is killed and started again.
        races: Whether to have two processes at one turn at the same moment, too.
        without: Kinds of turns to leave out.
        only: The kinds of turns to take, where it is not to be all.
        is_postgres: Whether the ledger is a PostgreSQL.
        score_arrays: Whether the server takes scores as arrays, as newer ones do.
    """

    seconds: float
    conversations: int
    workers: int
    seed: int
    rate: float = 30.0
    kills: int = 3
    races: bool = False
    without: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    is_postgres: bool = False
    score_arrays: bool = True

    @property
    def pause_s(self) -> float:
        """How long a user thinks on average."""
        return self.conversations / self.rate

    @property
    def idle_s(self) -> float:
        """Silence after which a session ends: one in a few ends by it; longer than a busy machine keeps a turn."""
        return max(5.0, 1.5 * self.pause_s)


@dataclass
class Result:
    """What came of it.

    Attributes:
        differences: Where not all agree.
        table: What happened, for people.
        check: Looks for differences again, with other spans and scores than the server has.
        spans: The spans that it has.
        scores: The scores that it has.
    """

    differences: list[str]
    table: dict[str, Any]
    check: Callable[[list[Span], dict[str, Any]], list[str]] = field(repr=False)
    spans: list[Span] = field(repr=False)
    scores: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        lines = [f"{name:<22}  {value}" for name, value in self.table.items() if not isinstance(value, dict)]
        for name, group in self.table.items():
            if isinstance(group, dict):
                lines += [f"{name}:"] + [f"  {key:<32}{value:>10,}" for key, value in sorted(group.items())]
        lines += [f"DIFFERENCE: {each}" for each in self.differences] or ["all agree: nothing lost, nothing twice"]
        return "\n".join(lines)


class Outages:
    """Has a server come and go."""

    def __init__(self, server: LangfuseServer, seed: int, seconds: float) -> None:
        self._server = server
        self._chance = random.Random(f"outages {seed}")
        self._longest_s = max(0.3, min(10.0, seconds / 12))
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.counts: Counter[str] = Counter()

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Have it back for good."""
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        chance = self._chance
        while not self._ends.wait(chance.uniform(0.3, 1.0) * self._longest_s):
            kind = chance.choice(["away", "status", "lost", "reset", "half", "timeout"])
            self.counts[kind] += 1
            if kind == "away":
                self._server.stop()
                self._ends.wait(chance.uniform(0.1, self._longest_s))
                self._server.start()
                continue
            status = chance.choice([429, 500, 502, 503])
            times = 1 if kind == "timeout" else chance.randrange(1, 4)
            self._server.fail(Failure(kind, status, "{}"), times=times, path=chance.choice([None, "otel", "scores"]))
            self._ends.wait(chance.uniform(0.1, self._longest_s))
            self._server.recover()
        self._server.recover()


def run(plan: Plan, folder: Path, url: str) -> Result:
    """Do it.

    Args:
        plan: How long, how much, and what of it.
        folder: Where the workers keep what they share beside the ledger.
        url: Where the ledger is.
    """
    began = time.monotonic()
    server = LangfuseServer(score_arrays=plan.score_arrays).start()
    outages = Outages(server, plan.seed, plan.seconds)
    kinds = KINDS | (RACES if plan.races else {})
    kinds = {name: kinds[name] for name in plan.only or kinds if name not in plan.without}
    until = time.time() + plan.seconds
    tasks = [
        Task(
            url=url,
            folder=folder,
            worker=worker,
            workers=plan.workers,
            life=0,
            seed=plan.seed,
            until=until,
            talks=_share(plan.conversations, worker, plan.workers),
            pause_s=plan.pause_s,
            idle_s=plan.idle_s,
            sweeps=worker != 0 or plan.workers == 1,
            kinds=kinds,
            variables={**server.keys, "LANGFUSE_TIMEOUT": "1", "NO_PROXY": "*"},
        )
        for worker in range(plan.workers)
    ]
    processes = [_start(work, task) for task in tasks]
    outages.start()
    kills = 0
    broken: list[str] = []
    try:
        chance = random.Random(f"kills {plan.seed}")
        for number in range(plan.kills):
            at = until - plan.seconds + plan.seconds * (number + chance.uniform(0.4, 0.9)) / plan.kills
            while time.time() < at and processes[0].is_alive():
                time.sleep(0.02)
            processes[0].kill()
            processes[0].join()
            kills += 1
            tasks[0] = replace(tasks[0], life=tasks[0].life + 1)
            processes[0] = _start(work, tasks[0])
        give_up = until + JOIN_S
        for worker, process in enumerate(processes):
            process.join(max(0.1, give_up - time.time()))
            if process.exitcode != 0:
                broken.append(f"worker {worker} ended with {process.exitcode}")
        outages.stop()
        closing = replace(tasks[0], worker=plan.workers, talks=range(0))
        processes.append(_start(close, closing, CLOSE_S))
        processes[-1].join(CLOSE_S + 60)
        if processes[-1].exitcode != 0:
            broken.append(f"the closing process ended with {processes[-1].exitcode}")
    finally:
        for process in processes:
            process.kill()
        outages.stop()
        server.stop()
    seen = read_journals(folder)
    spans, scores = server.spans(), server.scores()

    def check(spans: list[Span], scores: dict[str, Any]) -> list[str]:
        return broken + differences(seen, url, spans, scores, _logs(folder))

    found = check(spans, scores)
    table = _table(plan, seen, server, url, len(spans)) | {"kills": kills, "outages": dict(outages.counts)}
    table["seconds"] = round(time.monotonic() - began, 1)
    return Result(found, table, check, spans, scores)


def _share(count: int, worker: int, workers: int) -> range:
    """Return the conversations of a worker: those of one user are in one."""
    return range(count * worker // workers // 2 * 2, count * (worker + 1) // workers // 2 * 2)


def _start(target: Any, *arguments: Any) -> Any:
    process = fresh.CONTEXT.Process(target=target, args=arguments)  # type: ignore[attr-defined]
    process.start()
    return process


def _logs(folder: Path) -> list[str]:
    return [line for path in sorted(folder.glob("log-*")) for line in path.read_text(encoding="utf-8").split("\n")]


def _table(plan: Plan, seen: Seen, server: LangfuseServer, url: str, spans: int) -> dict[str, Any]:
    tables = read_ledger(url)
    requests = Counter("taken" if each.status == 200 else "refused" for each in server.requests)
    marks = [*seen.words["written"], *seen.words["stop"]]
    sweeps = seen.words["sweep"] + seen.words["last sweep"]
    return {
        "seed": plan.seed,
        "ledger": "PostgreSQL" if plan.is_postgres else "SQLite",
        "conversations": len(tables["conversations"]),
        "workers": plan.workers,
        "turns": len(tables["turns"]),
        "sessions": len(tables["sessions"]),
        "turns cut short": seen.begun_only,
        "conversations handed": len(seen.words["adopt"]),
        "sweeps": len(sweeps),
        "sessions swept": sum(line["sessions"] for line in sweeps),
        "turns swept": sum(line["turns"] for line in sweeps),
        "feedback": len(tables["feedback"]),
        "steps of journeys": len(tables["stages"]),
        "requests taken": requests["taken"],
        "requests refused": requests["refused"],
        "spans received": spans,
        "spans received again": sum(each.spans for each in server.requests) - spans,
        "scores": len(server.store.scores),
        "scores received again": sum(server.store.score_counts.values()) - len(server.store.scores),
        "peak RSS of a worker": f"{max((line['rss'] for line in marks), default=0):.0f} MB",
        "parts of turns": {f"{kind}: {status}": count for (kind, status), count in seen.kinds.items()},
        "turns by status": dict(Counter(row["status"] for row in tables["turns"])),
        "sessions by reason": dict(Counter(row["end_reason"] for row in tables["sessions"])),
    }


def soak(plan: Plan, folder: Path) -> Result:
    """Do it on a ledger of its own in a folder, or on a PostgreSQL."""
    with ExitStack() as stack:
        url = f"sqlite:///{folder}/ledger.db"
        if plan.is_postgres:
            url = postgres.new_schema(stack.enter_context(postgres.server()))
        return run(plan, folder, url)


def main() -> int:
    """Read the command line, and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--conversations", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=30, help="turns a second that are wished for")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--scores-one-by-one", action="store_true", help="the server takes no arrays of scores")
    parser.add_argument("--races", action="store_true", help=f"also: {', '.join(RACES)}")
    parser.add_argument("--without", default="", help=f"kinds to leave out, with commas between: {', '.join(KINDS)}")
    parser.add_argument("--only", default="", help="kinds to take, and no others")
    parser.add_argument("--json", type=Path, help="a file for the table and the differences")
    parser.add_argument("--keep", type=Path, help="a folder to leave the ledger and the journals in")
    given = parser.parse_args()
    plan = Plan(
        seconds=given.seconds,
        conversations=given.conversations,
        workers=given.workers,
        seed=given.seed,
        rate=given.rate,
        kills=given.kills,
        races=given.races,
        without=tuple(filter(None, given.without.split(","))),
        only=tuple(filter(None, given.only.split(","))),
        is_postgres=given.postgres,
        score_arrays=not given.scores_one_by_one,
    )
    with ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="turntrace-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        result = soak(plan, folder)
    print(result)
    if given.json:
        given.json.write_text(json.dumps({**result.table, "differences": result.differences}, indent=2))
    return 1 if result.differences else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", os.pathsep.join(sys.path))
    sys.exit(main())
