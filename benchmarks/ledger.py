"""What the ledger costs a turn with a thousand and with a million turns on record, next to a checkpoint of LangGraph's.

Both sizes are measured in the same run and round, in an order that changes: each round begins and finishes one turn of
a random user at each size, puts one checkpoint into the same database by LangGraph's own saver, and asks for a session
and a user. The tables are filled by SQL: ten turns a session, five sessions a user, the last of them open.

- begin_turn: what the app's thread waits for, once a turn;
- finish: what the writer's thread does, once a turn: the spans into the outbox, the row of the turn, the totals; alone
  in its transaction, and as one of sixteen;
- checkpoint: one `put` of the saver, of which a run of a graph makes one a step.

CPU is that of the calling thread, so on PostgreSQL without the server's. A PostgreSQL is started from the system's own
programs as tests/postgres.py does it, without fsync; on SQLite turntrace writes with synchronous=NORMAL, the saver with
what it sets by itself.

    python benchmarks/ledger.py [--turns 1000000] [--rounds 300] [--json FILE]
"""

import hashlib
import json
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _tables import Report, arguments, middle, summary
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.base import empty_checkpoint
from sqlalchemy import create_engine, event

from turntrace.identity import new_id, new_span_id
from turntrace.ledger import Ledger
from turntrace.records import Step, TurnSummary

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import postgres

FEW = 1_000
TURNS_OF_SESSION = 10
SESSIONS_OF_USER = 5
BATCH = 16
WARM_UP = 20
BEGAN_NS = 1_767_225_600 * 1_000_000_000
SECOND_NS = 1_000_000_000
SPANS = b"x" * 2_000  # two or three spans
STEPS = [Step("a" * 16, "b" * 16, name, "generation", 0, 500, 900, 60, 0.001) for name in ("agent", "model", "answer")]

BEGIN, FINISH, FINISH_MANY = "begin_turn", "finish, alone", f"finish, one of {BATCH}"
ALL, ALL_MANY = "bookkeeping: both, alone", f"bookkeeping: both, one of {BATCH}"
CHECKPOINT = "checkpoint"
SESSION, USER = "ledger.session", "ledger.user"
MOST_GROWTH = 1.5
MOST_MS = 5.0


# --- what is on record ------------------------------------------------------------------------------------------------
def fill(url: str, turns: int) -> None:
    """Fill the tables of a ledger by SQL."""
    sessions = turns // TURNS_OF_SESSION
    users = max(1, sessions // SESSIONS_OF_USER)
    is_sqlite = url.startswith("sqlite")
    engine = create_engine(url)
    if is_sqlite:
        event.listen(engine, "connect", _with_md5)

    def series(count: int) -> str:
        if is_sqlite:
            counted = f"SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < {count}"
            return f"(WITH RECURSIVE n(i) AS ({counted}) SELECT i FROM n)"
        return f"generate_series(0, {count - 1})"

    session = "md5('session ' || ({}))"
    conversation = "md5('conversation ' || ({}))"
    user = f"md5('user ' || (({{}}) % {users}))"
    at = f"{BEGAN_NS} + CAST({{}} AS BIGINT) * {SECOND_NS}"
    zeros = ["unpriced_calls", "prunings", "wait_ms"]
    of_session = {
        "id": session.format("i"),
        "user_id": user.format("i"),
        "channel": "'web'",
        "type": "'chat'",
        "sessions_total": f"i / {users} + 1",
        "started_ns": at.format(f"i * {TURNS_OF_SESSION}"),
        "last_activity_ns": at.format(f"i * {TURNS_OF_SESSION} + 9"),
        "ended_ns": f"CASE WHEN i < {sessions - users} THEN {at.format(f'i * {TURNS_OF_SESSION} + 1800')} END",
        "end_reason": f"CASE WHEN i < {sessions - users} THEN 'inactive_timeout' END",
        "announced": "1 = 1",
        "total_turns": str(TURNS_OF_SESSION),
        "failed_turns": "0",
        "llm_calls": "10",
        "tool_calls": "3",
        "input_tokens": "9000",
        "output_tokens": "600",
        "total_cost_usd": "0.01",
        "active_ms": "12000",
        **dict.fromkeys(zeros, "0"),
    }
    its = f"i / {TURNS_OF_SESSION}"
    of_turn = {
        "id": "md5('turn ' || i)",
        "conversation_id": conversation.format(its),
        "number": f"i % {TURNS_OF_SESSION} + 1",
        "session_id": session.format(its),
        "user_id": user.format(its),
        "status": "'completed'",
        "role": "'user'",
        "started_ns": at.format("i"),
        "ended_ns": at.format("i"),
        "trace_id": "md5('turn ' || i)",
        "root_span_id": "substr(md5('turn ' || i), 1, 16)",
        "agent_runs": "1",
        "llm_calls": "1",
        "tool_calls": "0",
        "input_tokens": "900",
        "output_tokens": "60",
        "cost_usd": "0.001",
        "latency_ms": "1200",
        "spans": "3",
        **dict.fromkeys(zeros, "0"),
    }
    step = json.dumps(["a" * 16, "b" * 16, "agent", "chain", 0, 500, 900, 60, 0.001, None, None, None, None])
    of_steps = {"started_ns": of_turn["started_ns"], "turn_id": of_turn["id"], "steps": f"'[{', '.join([step] * 7)}]'"}
    of_conversation = {
        "id": conversation.format("i"),
        "session_id": session.format("i"),
        "user_id": user.format("i"),
        "total_turns": str(TURNS_OF_SESSION),
        "started_ns": str(BEGAN_NS),
        "last_activity_ns": str(BEGAN_NS),
    }
    of_gate = {"key": "'number:' || " + conversation.format("i"), "number": str(TURNS_OF_SESSION)}
    with engine.begin() as connection:
        for table, row, count in (
            ("sessions", of_session, sessions),
            ("conversations", of_conversation, sessions),
            ("turns", of_turn, turns),
            ("steps", of_steps, turns),
            *([] if is_sqlite else [("gates", of_gate, sessions)]),
        ):
            connection.exec_driver_sql(
                f"INSERT INTO turntrace_{table} ({', '.join(row)}) "
                f"SELECT {', '.join(row.values())} FROM {series(count)} AS series{'' if is_sqlite else '(i)'}".replace(
                    "%", "%" if is_sqlite else "%%"
                )
            )
    if not is_sqlite:
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")  # as the server does by itself
            connection.exec_driver_sql("CHECKPOINT")
    engine.dispose()


def _with_md5(connection: sqlite3.Connection, _record: object) -> None:
    connection.create_function("md5", 1, lambda text: hashlib.md5(text.encode()).hexdigest(), deterministic=True)


def _md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


# --- what is measured -------------------------------------------------------------------------------------------------
@dataclass
class Figures:
    """Microseconds a turn, of each round."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def add(self, do: Callable[[], Any], share: int = 1) -> Any:
        cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
        result = do()
        wall_now, cpu_now = time.perf_counter_ns(), time.thread_time_ns()
        self.cpu.append((cpu_now - cpu) / 1000 / share)
        self.wall.append((wall_now - wall) / 1000 / share)
        return result


class Size:
    """A ledger with so many turns on record."""

    def __init__(self, url: str, turns: int, stack: ExitStack) -> None:
        self.turns = turns
        self._sessions = turns // TURNS_OF_SESSION
        self._users = max(1, self._sessions // SESSIONS_OF_USER)
        self._ledger = Ledger(url)
        stack.callback(self._ledger.close)
        fill(url, turns)
        self._put_checkpoint = checkpointer(url, stack)
        self.figures: dict[str, Figures] = {}
        self._begun_in_many = Figures()
        self.chance = random.Random(turns)

    def add_up(self) -> None:
        """Add up what each round's turn cost in all."""
        for name, part in ((ALL, FINISH), (ALL_MANY, FINISH_MANY)):
            begun = self.figures[BEGIN] if part is FINISH else self._begun_in_many
            both, finished = Figures(), self.figures[part]
            both.cpu = [sum(pair) for pair in zip(begun.cpu, finished.cpu, strict=True)]
            both.wall = [sum(pair) for pair in zip(begun.wall, finished.wall, strict=True)]
            self.figures[name] = both

    def forget(self) -> None:
        self.figures.clear()
        self._begun_in_many = Figures()

    def _measure(self, name: str, do: Callable[[], Any], share: int = 1) -> Any:
        return self.figures.setdefault(name, Figures()).add(do, share)

    def _some(self) -> int:
        return self._sessions - 1 - self.chance.randrange(self._users)  # an open one

    def _begin(self, into: Figures) -> TurnSummary:
        some, turn_id, span_id, now = self._some(), new_id(), new_span_id(), time.time_ns()
        known = {
            "conversation_id": _md5(f"conversation {some}"),
            "session_id": _md5(f"session {some}"),
            "user_id": _md5(f"user {some % self._users}"),
            "role": "user",
            "started_ns": now,
            "trace_id": turn_id,
            "root_span_id": span_id,
        }
        begun = into.add(lambda: self._ledger.begin_turn(turn_id, active_since_ns=0, **known))
        assert begun is not None
        number = begun.number
        assert number > TURNS_OF_SESSION
        used = {"llm_calls": 1, "input_tokens": 900, "output_tokens": 60, "cost_usd": 0.001, "latency_ms": 1200}
        return TurnSummary(id=turn_id, number=number, status="completed", ended_ns=now + SECOND_NS, **known, **used)

    def _finish(self, turns: list[TurnSummary]) -> None:
        with self._ledger.writing() as writer:
            for turn in turns:
                writer.put("spans", SPANS, items=3, created_ns=turn.started_ns)
                assert writer.finish_turn(turn, STEPS, spans=3)

    def round(self) -> None:
        one = [self._begin(self.figures.setdefault(BEGIN, Figures()))]
        self._measure(FINISH, lambda: self._finish(one))
        if self._put_checkpoint is not None:
            self._put_checkpoint(self, _md5(f"conversation {self._some()}"))
        some = _md5(f"session {self.chance.randrange(self._sessions)}")
        assert self._measure(SESSION, lambda: self._ledger.session(some)) is not None
        user = _md5(f"user {self.chance.randrange(self._users)}")
        assert self._measure(USER, lambda: self._ledger.user(user)) is not None

    def round_of_many(self) -> None:
        begun = Figures()
        many = [self._begin(begun) for _ in range(BATCH)]
        self._begun_in_many.cpu.append(statistics.fmean(begun.cpu))
        self._begun_in_many.wall.append(statistics.fmean(begun.wall))
        self._measure(FINISH_MANY, lambda: self._finish(many), BATCH)

    def put(self, saver: Any, thread_id: str) -> None:
        checkpoint = empty_checkpoint()
        version = f"{self.chance.random()}"
        checkpoint["channel_values"] = {"messages": MESSAGES}
        checkpoint["channel_versions"] = {"messages": version}
        config = {"configurable": {"thread_id": thread_id, "checkpoint_ns": ""}}
        self._measure(
            CHECKPOINT,
            lambda: saver.put(config, checkpoint, {"source": "loop", "step": 1, "parents": {}}, {"messages": version}),
        )


MESSAGES = [
    message
    for n in range(5)
    for message in (
        HumanMessage(f"What does the {n}th plan cost?", id=f"h{n}"),
        AIMessage("It costs 5. " * 20, id=f"a{n}"),
    )
]


def checkpointer(url: str, stack: ExitStack) -> Callable[[Size, str], None] | None:
    """Return what puts a checkpoint by LangGraph's saver for this database, or None when that is not installed."""
    if url.startswith("sqlite"):
        if find_spec("langgraph.checkpoint.sqlite") is None:
            return None
        from langgraph.checkpoint.sqlite import SqliteSaver

        saver: Any = stack.enter_context(SqliteSaver.from_conn_string(url.removeprefix("sqlite:///")))
    else:
        if find_spec("langgraph.checkpoint.postgres") is None:
            return None
        from langgraph.checkpoint.postgres import PostgresSaver

        saver = stack.enter_context(PostgresSaver.from_conn_string(url.replace("+psycopg", "")))
    saver.setup()
    return lambda size, thread_id: size.put(saver, thread_id)


# --- databases --------------------------------------------------------------------------------------------------------
@contextmanager
def sqlite_urls() -> Iterator[Callable[[int], str]]:
    with tempfile.TemporaryDirectory(prefix="turntrace-ledger-") as folder:
        yield lambda turns: f"sqlite:///{folder}/{turns}.db"


@contextmanager
def postgres_urls() -> Iterator[Callable[[int], str]]:
    with postgres.server() as url:
        yield lambda turns: postgres.new_schema(url)


def measure(urls: Callable[[int], str], turns: int, rounds: int, report: Report) -> list[Size]:
    with ExitStack() as stack:
        start = time.monotonic()
        sizes = [Size(urls(count), count, stack) for count in (FEW, turns)]
        report.say(f"Filled in {time.monotonic() - start:.0f} s.")
        chance = random.Random(1)
        for each in range(-WARM_UP, rounds):
            if each == 0:
                for size in sizes:
                    size.forget()
            for size in chance.sample(sizes, len(sizes)):
                size.round()
                if each % 4 == 0:
                    size.round_of_many()
        for size in sizes:
            size.add_up()
        return sizes


# --- what is said -----------------------------------------------------------------------------------------------------
def show(report: Report, name: str, sizes: list[Size]) -> None:
    few, many = sizes
    header = [f"{kind} at {size.turns:,}, µs" for kind in ("CPU", "wall") for size in sizes]
    rows, targets = [], []
    found = report.results[name] = {}
    for what in (BEGIN, FINISH, FINISH_MANY, ALL, ALL_MANY, CHECKPOINT, SESSION, USER):
        if what not in few.figures:
            continue
        small, large = few.figures[what], many.figures[what]
        cpu, wall = ratio(large.cpu, small.cpu), ratio(large.wall, small.wall)
        values = [middle(each) for each in (small.cpu, large.cpu, small.wall, large.wall)]
        rows.append([what, *values, f"{cpu:.2f}", f"{wall:.2f}"])
        if what in (ALL, ALL_MANY):
            words = f"{name}, {what}: {many.turns:,} turns to {few.turns:,}"
            targets.append((words, max(cpu, wall), MOST_GROWTH, " times"))
        elif what in (SESSION, USER):
            targets.append((f"{name}, {what} at {many.turns:,} turns", of(many, what, "wall") / 1000, MOST_MS, " ms"))
        found[what] = {
            f"{size.turns}": {kind: summary(getattr(size.figures[what], kind)) for kind in ("cpu", "wall")}
            for size in sizes
        } | {"ratio_cpu": cpu, "ratio_wall": wall}
    report.table(name, ("what", *header, "CPU, ratio", "wall, ratio"), rows)
    for words, measured, most, unit in targets:
        report.target(words, measured, at_most=most, unit=unit)
    if CHECKPOINT in few.figures:
        for size in sizes:
            both = [of(size, ALL, kind) / of(size, CHECKPOINT, kind) for kind in ("cpu", "wall")]
            report.say(
                f"{name}: at {size.turns:,} turns a turn's bookkeeping costs {both[0]:.2f} times the CPU and "
                f"{both[1]:.2f} times the time of one checkpoint; begin_turn alone "
                f"{of(size, BEGIN, 'wall') / of(size, CHECKPOINT, 'wall'):.2f} times the time."
            )
    else:
        report.say(f"{name}: LangGraph's saver is not installed: pip install langgraph-checkpoint-sqlite or -postgres.")


def of(size: Size, what: str, kind: str) -> float:
    return statistics.median(getattr(size.figures[what], kind))


def ratio(large: list[float], small: list[float]) -> float:
    return statistics.median(large) / statistics.median(small)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=1_000_000, help="turns on record at the larger size")
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    report = Report("Cost of the ledger", __doc__)
    backends: dict[str, Any] = {"SQLite": sqlite_urls, "PostgreSQL": postgres_urls}
    for name, opened in backends.items():
        if name == "PostgreSQL" and not postgres.GIVEN and postgres.programs() is None:
            report.say(f"PostgreSQL is left out: {postgres.WHY_NOT}.")
            continue
        with opened() as urls:
            show(report, name, measure(urls, options.turns, options.rounds, report))
    report.write(options.json)


if __name__ == "__main__":
    main()
