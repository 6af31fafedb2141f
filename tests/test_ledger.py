"""The contract of the ledger: what every backend must do. Each test runs on each of `BACKENDS`.

To add a backend, add one line to `BACKENDS`: how to get the URL of an empty database, and whether several processes
can use it at once.
"""

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import Engine, create_engine, func, select

import fresh
import ledger_processes
import postgres
from ledger_processes import IDLE, NOON, SECOND, begin, ended, finish
from turntrace.errors import LedgerError, TurntraceError
from turntrace.ledger import Ledger, SessionOpened, StageWanted, TurnEnd
from turntrace.ledger.tables import sessions
from turntrace.records import SessionFacts, Step, TurnTags

T = TypeVar("T")
MINUTE = 60 * SECOND
DAY = 86_400 * SECOND


@dataclass(frozen=True)
class Backend:
    """A kind of database.

    Attributes:
        url: Gives the URL of an empty database; it may keep it in the folder.
        shared: Whether several ledgers, also of several processes, can be on one database at once.
        engine: Makes an engine as an app would, where the app brings one.
    """

    url: Callable[[Path], str]
    shared: bool = True
    engine: Callable[[str], Engine] | None = None


def apps_engine(url: str) -> Engine:
    """Make an engine as an app does, which knows nothing of turntrace."""
    return create_engine(url, connect_args={"timeout": 30})


_servers = ExitStack()


@cache
def postgres_url() -> str:
    """Return the URL of the PostgreSQL server of these tests; it is started when it is first asked for."""
    return _servers.enter_context(postgres.server())


BACKENDS = {
    "sqlite-file": Backend(lambda folder: f"sqlite:///{folder}/ledger.db"),
    "sqlite-memory": Backend(lambda folder: "sqlite://", shared=False),
    "sqlite-engine": Backend(lambda folder: f"sqlite:///{folder}/app.db", engine=apps_engine),
    "postgresql": Backend(lambda folder: postgres.new_schema(postgres_url())),
}


@pytest.fixture(scope="module", autouse=True)
def _stop_servers() -> Iterator[None]:
    yield
    _servers.close()
    postgres_url.cache_clear()


class Database:
    """One empty database of a backend, and the ledgers that a test opens on it."""

    def __init__(self, backend: Backend, folder: Path) -> None:
        self.backend = backend
        self.url = backend.url(folder)
        self._opened: list[Ledger] = []
        self._engines: list[Engine] = []

    def open(self) -> Ledger:
        """Open a ledger as another process would; where the database cannot be shared, the one that is open."""
        if self._opened and not self.backend.shared:
            return self._opened[0]
        where: str | Engine = self.url
        if self.backend.engine is not None:
            where = self.backend.engine(self.url)
            self._engines.append(where)
        self._opened.append(Ledger(where))
        return self._opened[-1]

    def close(self) -> None:
        for ledger in self._opened:
            ledger.close()
        for engine in self._engines:
            engine.dispose()
        self._opened.clear()


@pytest.fixture(params=BACKENDS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    made = Database(BACKENDS[request.param], tmp_path)
    yield made
    made.close()


@pytest.fixture
def shared(database: Database) -> Database:
    if not database.backend.shared:
        pytest.skip("a database in memory belongs to one ledger")
    return database


@pytest.fixture
def ledger(database: Database) -> Ledger:
    return database.open()


def open_session(
    ledger: Ledger,
    session_id: str,
    *,
    user: str | None = "u1",
    channel: str = "web",
    at: int = NOON,
    given: bool = False,
    conversation: str | None = None,
    **facts: Any,
) -> SessionOpened:
    wanted = SessionFacts(id=session_id, user_id=user, channel=channel, type="chat", started_ns=at, **facts)
    return ledger.open_session(wanted, idle_ns=IDLE, given_id=given, conversation_id=conversation)


def end(ledger: Ledger, session_id: str, *, reason: str = "user_exit", at: int = NOON) -> Any:
    with ledger.writing() as writer:
        return writer.end_session(session_id, reason, at)


def when_free(write: Callable[[], T]) -> T:
    """Write, again for a minute if the ledger says that it is locked: on a slow disk, others may be first that long."""
    for _ in range(12):
        try:
            return write()
        except LedgerError as error:
            if "is locked by another process" not in str(error):
                raise
    return write()


def at_once(*jobs: Callable[[], T]) -> list[T]:
    """Do jobs in as many threads, begun at the same moment, and return what they return."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], T]) -> T:
        barrier.wait(30)
        return job()

    with ThreadPoolExecutor(len(jobs)) as threads:
        return [done.result() for done in [threads.submit(run, job) for job in jobs]]


# --- turn numbers -----------------------------------------------------------------------------------------------------
def test_turns_are_numbered_from_one_in_each_conversation(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    assert [begin(ledger, f"a{n}", conversation="a") for n in range(3)] == [1, 2, 3]
    assert [begin(ledger, f"b{n}", conversation="b") for n in range(2)] == [1, 2]
    assert begin(ledger, "a3", conversation="a") == 4


def test_a_conversation_that_goes_on_in_a_later_session_goes_on_in_its_numbers(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    assert begin(ledger, "t1") == 1
    finish(ledger, ended("t1"))
    end(ledger, "s1")
    open_session(ledger, "s2", at=NOON + DAY)
    assert begin(ledger, "t2", session="s2", at=NOON + DAY) == 2


def test_only_turns_that_have_ended_are_listed_and_all_are_counted(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    assert [begin(ledger, f"t{n}") for n in range(1, 4)] == [1, 2, 3]
    finish(ledger, ended("t1", number=1))
    finish(ledger, ended("t3", number=3))
    assert ledger.turn_numbers("c1") == [1, 3]
    assert ledger.turn_numbers("unknown") == []
    assert begin(ledger, "t4") == 4


def test_threads_get_numbers_without_gaps_and_none_twice(database: Database) -> None:
    ledgers = [database.open() for _ in range(2)]
    open_session(ledgers[0], "s1")
    each = 20

    def take(thread: int) -> list[int]:
        ledger, numbers = ledgers[thread % 2], []
        for n in range(each):
            number = when_free(partial(begin, ledger, f"t{thread}-{n}"))
            assert number is not None
            numbers.append(number)
            assert when_free(partial(finish, ledger, ended(f"t{thread}-{n}", number=number)))
        return numbers

    taken = at_once(*[lambda thread=thread: take(thread) for thread in range(16)])
    assert all(numbers == sorted(numbers) for numbers in taken)
    assert sorted(number for numbers in taken for number in numbers) == list(range(1, 16 * each + 1))
    assert ledgers[0].turn_numbers("c1") == list(range(1, 16 * each + 1))
    session = ledgers[1].session("s1")
    assert session is not None
    assert session.total_turns == 16 * each


def test_all_that_is_asked_in_one_reading_is_of_the_same_moment(shared: Database) -> None:
    if shared.backend.engine is not None:
        pytest.skip("how an engine of the app's locks is for the app to say")
    ledger, other = shared.open(), shared.open()
    open_session(ledger, "s1")
    count = select(func.count()).select_from(sessions)
    with ledger.asking() as connection:
        before = connection.execute(count).scalar_one()
        open_session(other, "s2", user="u2")
        assert connection.execute(count).scalar_one() == before == 1
    with ledger.asking() as connection:
        assert connection.execute(count).scalar_one() == 2


# --- where a turn may begin -------------------------------------------------------------------------------------------
def test_no_turn_begins_in_a_session_that_has_ended(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    end(ledger, "s1")
    before = ledger.session("s1")
    assert begin(ledger, "t1", at=NOON + SECOND) is None
    assert ledger.session("s1") == before
    assert ledger.turns("s1") == []


def test_no_turn_begins_in_a_session_that_does_not_exist(ledger: Ledger) -> None:
    assert begin(ledger, "t1", session="unknown") is None
    assert ledger.turns("unknown") == []


def test_no_turn_begins_in_a_session_that_has_been_silent_for_too_long(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    before = ledger.session("s1")
    assert begin(ledger, "t1", at=NOON + IDLE + 1, active_since=NOON + 1) is None
    assert ledger.session("s1") == before
    assert ledger.turns("s1") == []
    assert begin(ledger, "t1", at=NOON + IDLE, active_since=NOON) == 1


def test_a_refused_turn_takes_no_number(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    assert begin(ledger, "t1", active_since=NOON + 1) is None
    assert begin(ledger, "t1") == 1
    finish(ledger, ended("t1"))
    end(ledger, "s1")
    assert begin(ledger, "t2") is None
    open_session(ledger, "s1", given=True)
    assert begin(ledger, "t2") == 2


def test_the_end_of_a_turn_is_activity_of_its_session(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    begin(ledger, "t1")
    finish(ledger, ended("t1", ended_ns=NOON + 25 * MINUTE))
    assert begin(ledger, "t2", at=NOON + 50 * MINUTE, active_since=NOON + 20 * MINUTE) == 2


def test_a_turn_that_still_runs_keeps_its_session_from_being_idle(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    begin(ledger, "t1", at=NOON + IDLE, active_since=NOON)
    later = NOON + 2 * IDLE
    assert begin(ledger, "t2", at=later, active_since=later - IDLE) == 2
    opened = open_session(ledger, "s2", at=later)
    assert (opened.session.id, opened.expired_id) == ("s1", None)


def test_a_turn_that_nobody_will_end_does_not_keep_it_for_ever(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    begin(ledger, "t1")
    later = NOON + IDLE + MINUTE
    assert begin(ledger, "t2", at=later, active_since=later - IDLE) is None
    opened = open_session(ledger, "s2", at=later)
    assert (opened.session.id, opened.expired_id) == ("s2", "s1")


# --- how a turn ends --------------------------------------------------------------------------------------------------
def test_a_turn_and_its_steps_can_be_read_back(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    begin(ledger, "t1", at=NOON)
    turn = ended(
        "t1",
        ended_ns=NOON + 2 * SECOND,
        status="failed",
        input_length=5,
        output_length=6,
        input_type="question",
        output_type="error",
        has_attachments=True,
        intent="Kündigung 解約",
        agent_runs=1,
        tool_calls=2,
        llm_calls=3,
        input_tokens=10**12,
        output_tokens=7,
        cost_usd=0.1 + 0.2,
        unpriced_calls=1,
        latency_ms=2000,
        wait_ms=1,
        time_to_first_token_ms=9,
        model="gpt-4o",
        error="ValueError",
    )
    steps = [
        Step("a" * 16, "f" * 16, "agent", "agent", 0, 5),
        Step("b" * 16, "a" * 16, "gpt-4o", "generation", 1, 3, 10, 2, 0.25, "ValueError"),
    ]
    with ledger.writing() as writer:
        assert writer.finish_turn(turn, steps, spans=3)
    assert ledger.turns("s1") == [(turn, steps)]


def test_an_open_turn_can_be_read(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    begin(ledger, "t1", at=NOON + 5)
    [(turn, steps)] = ledger.turns("s1")
    assert (turn.id, turn.status, turn.number, turn.started_ns, turn.ended_ns) == ("t1", "open", 1, NOON + 5, None)
    assert (turn.trace_id, turn.root_span_id, turn.role) == ("t1".rjust(32, "0"), "t1".rjust(16, "0"), "user")
    assert steps == []


def test_a_turn_ends_once(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    begin(ledger, "t1")
    assert finish(ledger, ended("t1", input_tokens=5, latency_ms=100, ended_ns=NOON + SECOND))
    before = ledger.session("s1"), ledger.turns("s1")
    assert not finish(ledger, ended("t1", input_tokens=7, latency_ms=900, status="failed", ended_ns=NOON + MINUTE))
    assert (ledger.session("s1"), ledger.turns("s1")) == before


def test_a_turn_that_many_end_at_once_is_counted_once(database: Database) -> None:
    ledgers = [database.open() for _ in range(2)]
    open_session(ledgers[0], "s1")
    begin(ledgers[0], "t1")
    turn = ended("t1", input_tokens=5)
    done = at_once(*[lambda n=n: finish(ledgers[n % 2], turn) for n in range(8)])
    assert sorted(bool(each) for each in done) == [False] * 7 + [True]
    session = ledgers[0].session("s1")
    assert session is not None
    assert (session.total_turns, session.input_tokens) == (1, 5)


def test_a_turn_that_never_began_does_not_end(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    before = ledger.session("s1")
    assert not finish(ledger, ended("unknown"))
    assert ledger.session("s1") == before


def test_the_totals_of_a_session_are_the_sums_of_its_turns(database: Database) -> None:
    ledgers = [database.open() for _ in range(2)]
    open_session(ledgers[0], "s1")
    chance = random.Random(7)
    turns = []
    for n in range(60):
        numbers = {
            name: chance.randrange(1000)
            for name in ("llm_calls", "tool_calls", "input_tokens", "output_tokens", "unpriced_calls")
        }
        times = {"latency_ms": chance.randrange(10_000), "wait_ms": chance.randrange(100)}
        status = chance.choice(["completed", "failed", "interrupted", "abandoned"])
        conversation, at = f"c{n % 3}", NOON + n * SECOND
        place = {
            "conversation_id": conversation,
            "number": begin(ledgers[0], f"t{n}", conversation=conversation, at=at),
        }
        facts = {**place, **numbers, **times, "cost_usd": chance.randrange(64) / 64, "status": status}
        turns.append(replace(ended(f"t{n}", at=at), **facts))  # type: ignore[arg-type]
    at_once(*[lambda n=n: [finish(ledgers[n % 2], turn) for turn in turns[n::6]] for n in range(6)])
    session = ledgers[0].session("s1")
    assert session is not None
    read = [turn for turn, _ in ledgers[0].turns("s1")]
    assert len(read) == session.total_turns == 60
    for name in ("llm_calls", "tool_calls", "input_tokens", "output_tokens", "unpriced_calls", "wait_ms"):
        assert getattr(session, name) == sum(getattr(turn, name) for turn in read), name
    assert session.active_ms == sum(turn.latency_ms for turn in read)
    assert session.total_cost_usd == sum(turn.cost_usd for turn in read)
    assert session.failed_turns == len([turn for turn in read if turn.status == "failed"])
    assert session.last_activity_ns == NOON + 59 * SECOND


def test_a_turn_is_ended_by_its_own_id_only(ledger: Ledger) -> None:
    # Numbers are given again when a user's data has been erased: a turn of before must not end one of after.
    open_session(ledger, "s1")
    begin(ledger, "t1")
    assert not finish(ledger, ended("erased", number=1))
    assert [(turn.id, turn.status) for turn, _ in ledger.turns("s1")] == [("t1", "open")]
    assert finish(ledger, ended("t1", number=1))


def test_what_ends_after_its_turn_is_added_to_turn_and_session(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    begin(ledger, "t1")
    finish(ledger, ended("t1", input_tokens=5, cost_usd=0.5, llm_calls=1))
    late = {"spans": 2, "llm_calls": 1, "input_tokens": 10, "output_tokens": 3, "cost_usd": 0.25}
    with ledger.writing() as writer:
        writer.add_to_turn(TurnTags("s1", "t1", "c1", 1), late)
    [(turn, _)] = ledger.turns("s1")
    assert (turn.llm_calls, turn.input_tokens, turn.output_tokens, turn.cost_usd) == (2, 15, 3, 0.75)
    session = ledger.session("s1")
    assert session is not None
    assert (session.llm_calls, session.input_tokens, session.output_tokens, session.total_cost_usd) == (2, 15, 3, 0.75)
    assert session.total_turns == 1


def test_what_another_process_adds_while_a_turn_runs_is_in_its_sums_when_it_ends(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    begin(ledger, "t1")
    late = {"spans": 2, "llm_calls": 1, "input_tokens": 10, "cost_usd": 0.25}
    for _ in range(2):
        with ledger.writing() as writer:
            writer.add_to_turn(TurnTags("s1", "t1", "c1", 1), late)
    finish(ledger, ended("t1", input_tokens=5, cost_usd=0.5, llm_calls=1))
    [(turn, _)] = ledger.turns("s1")
    assert (turn.llm_calls, turn.input_tokens, turn.cost_usd) == (3, 25, 1.0)
    session = ledger.session("s1")
    assert session is not None
    assert (session.llm_calls, session.input_tokens, session.total_cost_usd) == (3, 25, 1.0)
    assert ledger.span_counts("s1") == {"t1": 5}


def test_a_turn_that_ends_after_its_session_is_told_from_others(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    for n in (1, 2):
        begin(ledger, f"t{n}")
    assert finish(ledger, ended("t1", number=1)) == TurnEnd.ENDED
    end(ledger, "s1", reason="completed", at=NOON + MINUTE)
    assert finish(ledger, ended("t2", number=2)) == TurnEnd.ENDED_AFTER_SESSION
    assert finish(ledger, ended("t2", number=2)) == TurnEnd.ENDED_BEFORE
    with ledger.writing() as writer:
        summary = writer.ended_session("s1")
        assert writer.ended_session("unknown") is None
    assert summary is not None
    assert (summary.total_turns, summary.end_reason, summary.ended_ns) == (2, "completed", NOON + MINUTE)


def test_a_session_that_is_open_is_no_ended_one(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    with ledger.writing() as writer:
        assert writer.ended_session("s1") is None


def test_a_clock_that_goes_back_takes_no_activity_away(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    begin(ledger, "t1")
    finish(ledger, ended("t1", ended_ns=NOON + MINUTE))
    begin(ledger, "t2", at=NOON - MINUTE)
    assert finish(ledger, ended("t2", number=2, at=NOON - MINUTE))
    session = ledger.session("s1")
    assert session is not None
    assert session.last_activity_ns == NOON + MINUTE


def test_turns_are_read_in_the_order_in_which_they_began(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    for n in (3, 1, 2):
        begin(ledger, f"t{n}", at=NOON + n, conversation=f"c{n}")
    assert [turn.id for turn, _ in ledger.turns("s1")] == ["t1", "t2", "t3"]


# --- sessions ---------------------------------------------------------------------------------------------------------
def test_a_session_begins_with_all_that_is_known(ledger: Ledger) -> None:
    opened = open_session(ledger, "s1", tier="premium", org_id="o1", locale="de-AT", client_version="1.2", at=NOON + 5)
    expected = SessionFacts(
        id="s1",
        user_id="u1",
        channel="web",
        type="chat",
        tier="premium",
        org_id="o1",
        locale="de-AT",
        client_version="1.2",
        previous_id=None,
        sessions_total=1,
        started_ns=NOON + 5,
    )
    assert opened == SessionOpened(expected, is_new=True)
    read = ledger.session("s1")
    assert read is not None
    assert (read.tier, read.org_id, read.locale, read.client_version) == ("premium", "o1", "de-AT", "1.2")
    assert (read.started_ns, read.last_activity_ns, read.ended_ns) == (NOON + 5, NOON + 5, None)
    assert ledger.session("unknown") is None


@pytest.mark.parametrize(("silence", "continued"), [(0, True), (IDLE, True), (IDLE + 1, False), (-MINUTE, True)])
def test_the_open_session_of_a_user_is_continued_within_the_idle_time(
    ledger: Ledger, silence: int, continued: bool
) -> None:
    first = open_session(ledger, "s1")
    second = open_session(ledger, "s2", at=NOON + silence)
    if continued:
        assert second == SessionOpened(first.session, is_new=False)
        assert ledger.session("s2") is None
    else:
        assert (second.session.id, second.is_new, second.expired_id) == ("s2", True, "s1")


def test_a_session_that_silence_is_to_end_is_left_for_its_end(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    open_session(ledger, "s2", at=NOON + IDLE + 1)
    expired = ledger.session("s1")
    assert expired is not None
    assert expired.ended_ns is None  # ended by whoever opened the next, with its span, in one transaction


def test_a_user_has_a_session_on_each_channel(ledger: Ledger) -> None:
    open_session(ledger, "s1", channel="web")
    other = open_session(ledger, "s2", channel="slack", at=NOON + 1)
    assert (other.session.id, other.is_new, other.expired_id) == ("s2", True, None)
    assert (other.session.previous_id, other.session.sessions_total) == ("s1", 2)
    assert open_session(ledger, "s3", channel="web", at=NOON + 2).session.id == "s1"


def test_a_session_knows_the_one_before_it(ledger: Ledger) -> None:
    for n in range(1, 4):
        opened = open_session(ledger, f"s{n}", at=NOON + n * DAY)
        end(ledger, f"s{n}", at=NOON + n * DAY)
        assert opened.expired_id is None
        assert opened.session.previous_id == (f"s{n - 1}" if n > 1 else None)
        assert opened.session.sessions_total == n


def test_users_do_not_share_sessions(ledger: Ledger) -> None:
    open_session(ledger, "s1", user="u1")
    other = open_session(ledger, "s2", user="u2")
    assert (other.session.id, other.is_new) == ("s2", True)
    assert (other.session.previous_id, other.session.sessions_total) == (None, 1)


def test_a_session_that_has_ended_is_not_continued(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    end(ledger, "s1")
    again = open_session(ledger, "s2", at=NOON + 1)
    assert (again.session.id, again.is_new, again.expired_id) == ("s2", True, None)


def test_a_session_of_a_given_id_begins_or_goes_on_whatever_its_age(ledger: Ledger) -> None:
    first = open_session(ledger, "mine", given=True, tier="premium")
    assert first.is_new
    again = open_session(ledger, "mine", given=True, at=NOON + 100 * DAY, tier="free")
    assert again == SessionOpened(first.session, is_new=False)


def test_a_given_id_goes_before_the_open_session(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    given = open_session(ledger, "mine", given=True, at=NOON + 2 * IDLE)
    assert (given.session.id, given.is_new, given.expired_id) == ("mine", True, None)
    assert given.session.previous_id == "s1"


def test_a_session_of_a_given_id_that_had_ended_is_open_again(ledger: Ledger) -> None:
    open_session(ledger, "mine", given=True)
    begin(ledger, "t1", session="mine")
    finish(ledger, ended("t1", session_id="mine", input_tokens=5))
    end(ledger, "mine", at=NOON + SECOND)
    again = open_session(ledger, "mine", given=True, at=NOON + DAY)
    assert not again.is_new
    session = ledger.session("mine")
    assert session is not None
    assert (session.ended_ns, session.end_reason) == (None, None)
    assert (session.total_turns, session.input_tokens) == (1, 5)
    assert begin(ledger, "t2", session="mine", at=NOON + DAY) == 2
    assert end(ledger, "mine", at=NOON + DAY) is not None


def test_opening_a_session_again_takes_no_activity_away(ledger: Ledger) -> None:
    open_session(ledger, "mine", given=True)
    begin(ledger, "t1", session="mine")
    finish(ledger, ended("t1", session_id="mine", ended_ns=NOON + MINUTE))
    end(ledger, "mine", at=NOON + MINUTE)
    open_session(ledger, "mine", given=True, at=NOON)  # the session as it was begun, with its own start
    session = ledger.session("mine")
    assert session is not None
    assert session.last_activity_ns == NOON + MINUTE


def test_a_given_id_does_not_put_one_user_into_the_session_of_another(ledger: Ledger) -> None:
    open_session(ledger, "mine", given=True, user="u1")
    try:
        other = open_session(ledger, "mine", given=True, user="u2")
    except TurntraceError:
        return  # as good: an id that means two things
    assert other.session.user_id == "u2"


def test_a_session_whose_user_becomes_known_is_that_users(ledger: Ledger) -> None:
    open_session(ledger, "mine", given=True, user=None)
    opened = open_session(ledger, "mine", given=True, user="u1", at=NOON + 1)
    assert (opened.session.user_id, opened.is_new) == ("u1", False)
    session = ledger.session("mine")
    assert session is not None
    assert session.user_id == "u1"
    end(ledger, "mine")
    following = open_session(ledger, "s2", user="u1", at=NOON + DAY)
    assert (following.session.previous_id, following.session.sessions_total) == ("mine", 2)


@pytest.mark.parametrize("conversation", ["c1", None])
def test_a_session_without_a_user_is_found_by_its_conversation(ledger: Ledger, conversation: str | None) -> None:
    open_session(ledger, "s1", user=None, conversation="c1")
    begin(ledger, "t1", user=None)
    again = open_session(ledger, "s2", user=None, conversation=conversation, at=NOON + 1)
    assert (again.session.id, again.is_new) == (("s1", False) if conversation else ("s2", True))
    other = open_session(ledger, "s3", user=None, conversation="c2", at=NOON + 1)
    assert (other.session.id, other.is_new, other.expired_id) == ("s3", True, None)
    assert (other.session.previous_id, other.session.sessions_total) == (None, 1)


def test_a_session_without_a_user_expires_too(ledger: Ledger) -> None:
    open_session(ledger, "s1", user=None, conversation="c1")
    begin(ledger, "t1", user=None)
    finish(ledger, ended("t1", user_id=None))
    later = open_session(ledger, "s2", user=None, conversation="c1", at=NOON + IDLE + 1)
    assert (later.session.id, later.expired_id) == ("s2", "s1")


def test_a_conversation_does_not_put_an_unknown_user_into_the_session_of_a_known_one(ledger: Ledger) -> None:
    open_session(ledger, "s1", user="u1", conversation="c1")
    begin(ledger, "t1", user="u1")
    unknown = open_session(ledger, "s2", user=None, conversation="c1", at=NOON + 1)
    assert (unknown.session.id, unknown.session.user_id, unknown.is_new) == ("s2", None, True)
    assert unknown.expired_id is None


def test_a_conversation_does_not_put_a_known_user_into_a_session_without_one(ledger: Ledger) -> None:
    open_session(ledger, "s1", user=None, conversation="c1")
    begin(ledger, "t1", user=None)
    known = open_session(ledger, "s2", user="u1", conversation="c1", at=NOON + 1)
    assert (known.session.id, known.session.user_id, known.is_new) == ("s2", "u1", True)


def test_many_that_open_the_session_of_a_user_at_once_get_one(database: Database) -> None:
    ledgers = [database.open() for _ in range(2)]
    opened = at_once(*[lambda n=n: open_session(ledgers[n % 2], f"s{n}") for n in range(12)])
    assert len({each.session.id for each in opened}) == 1
    assert len([each for each in opened if each.is_new]) == 1


def test_a_session_ends_once_with_its_totals(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    begin(ledger, "t1")
    finish(ledger, ended("t1", input_tokens=5, output_tokens=2, latency_ms=30))
    summary = end(ledger, "s1", reason="completed", at=NOON + MINUTE)
    assert (summary.end_reason, summary.ended_ns, summary.total_turns) == ("completed", NOON + MINUTE, 1)
    assert (summary.total_tokens, summary.active_ms, summary.user_sessions_total) == (7, 30, 1)
    assert end(ledger, "s1", reason="error", at=NOON + DAY) is None
    assert ledger.session("s1") == summary
    assert end(ledger, "unknown") is None


def test_a_session_that_many_end_at_once_ends_once(database: Database) -> None:
    ledgers = [database.open() for _ in range(2)]
    open_session(ledgers[0], "s1")
    done = at_once(*[lambda n=n: end(ledgers[n % 2], "s1", reason=f"r{n}") for n in range(8)])
    assert len([each for each in done if each is not None]) == 1


def test_the_figures_of_a_user_are_over_all_sessions(ledger: Ledger) -> None:
    numbers = count(1)
    for session, day, turns in (("s1", 0, 3), ("s2", 2, 1), ("s3", 5, 2)):
        open_session(ledger, session, at=NOON + day * DAY)
        for n in numbers:
            assert begin(ledger, f"t{n}", session=session, at=NOON + day * DAY) == n
            assert finish(ledger, ended(f"t{n}", number=n, session_id=session, at=NOON + day * DAY))
            turns -= 1
            if not turns:
                break
        summary = end(ledger, session, at=NOON + day * DAY + 1)
    assert (summary.user_sessions_total, summary.user_avg_session_length, summary.user_retention_days) == (3, 2.0, 5)
    open_session(ledger, "other", user="u2", at=NOON)
    assert end(ledger, "other").user_sessions_total == 1


def test_a_session_that_ends_after_the_next_has_begun_does_not_count_the_next(ledger: Ledger) -> None:
    # As it is with every session that silence ends: it is noticed when the user comes again.
    open_session(ledger, "s1")
    for n in (1, 2):
        assert begin(ledger, f"t{n}") == n
        assert finish(ledger, ended(f"t{n}", number=n))
    later = NOON + 3 * DAY
    assert open_session(ledger, "s2", at=later).expired_id == "s1"
    summary = end(ledger, "s1", reason="inactive_timeout", at=later)
    assert (summary.user_sessions_total, summary.user_avg_session_length, summary.user_retention_days) == (1, 2.0, 0)


def test_a_session_of_an_unknown_user_has_no_figures_of_a_user(ledger: Ledger) -> None:
    open_session(ledger, "s1", user=None)
    summary = end(ledger, "s1")
    assert summary.user_sessions_total is None
    assert summary.user_avg_session_length is None
    assert summary.user_retention_days is None


def test_the_start_of_a_session_is_announced_once(database: Database) -> None:
    ledgers = [database.open() for _ in range(2)]
    open_session(ledgers[0], "s1")

    def announce(ledger: Ledger) -> bool:
        with ledger.writing() as writer:
            return writer.announced("s1")

    assert sorted(at_once(*[lambda n=n: announce(ledgers[n % 2]) for n in range(6)])) == [False] * 5 + [True]


def test_the_latest_sessions_come_first(ledger: Ledger) -> None:
    for n in (2, 1, 3):
        open_session(ledger, f"s{n}", user=f"u{n}", at=NOON + n)
    assert [session.id for session in ledger.sessions()] == ["s3", "s2", "s1"]
    assert [session.id for session in ledger.sessions(limit=2)] == ["s3", "s2"]
    assert [session.id for session in ledger.sessions(ids=["s1", "s2", "unknown"])] == ["s2", "s1"]
    assert ledger.sessions(ids=[]) == []


def test_texts_of_any_script_and_the_longest_ids_are_kept(ledger: Ledger) -> None:
    long, text = "x" * 200, "日本" * 100
    open_session(ledger, long, user="f" * 64, channel=text, tier="ß", org_id="😀", given=True)
    begin(ledger, long, session=long, conversation=long, user="f" * 64)
    finish(ledger, ended(long, session_id=long, conversation_id=long, user_id="f" * 64, intent=text))
    session = ledger.session(long)
    assert session is not None
    assert (session.channel, session.tier, session.org_id) == (text, "ß", "😀")
    [(turn, _)] = ledger.turns(long)
    assert (turn.id, turn.conversation_id, turn.intent) == (long, long, text)


# --- the outbox -------------------------------------------------------------------------------------------------------
def test_the_outbox_gives_back_what_was_put_in_the_same_order(ledger: Ledger) -> None:
    bodies = [bytes(range(256)), b"\x00", b"x" * 1_000_000, b""]
    for n, body in enumerate(bodies):
        with ledger.writing() as writer:
            writer.put("spans", body, items=n, created_ns=NOON - n)
    waiting = ledger.outbox()
    assert [item.body for item in waiting] == bodies
    assert [item.items for item in waiting] == [0, 1, 2, 3]
    assert [item.created_ns for item in waiting] == [NOON, NOON - 1, NOON - 2, NOON - 3]
    assert {item.kind for item in waiting} == {"spans"}
    assert [item.id for item in waiting] == sorted({item.id for item in waiting})


def test_the_outbox_is_read_piece_by_piece(ledger: Ledger) -> None:
    with ledger.writing() as writer:
        for n in range(5):
            writer.put("spans", bytes([n]), items=1, created_ns=NOON)
    first = ledger.outbox(limit=2)
    rest = ledger.outbox(after_id=first[-1].id)
    assert [item.body[0] for item in (*first, *rest)] == [0, 1, 2, 3, 4]


def test_what_leaves_the_outbox_is_gone_and_its_id_is_not_given_again(ledger: Ledger) -> None:
    with ledger.writing() as writer:
        writer.put("spans", b"a", items=1, created_ns=NOON)
    [item] = ledger.outbox()
    with ledger.writing() as writer:
        writer.remove(item.id)
    assert ledger.outbox() == []
    with ledger.writing() as writer:
        writer.put("spans", b"b", items=1, created_ns=NOON)
    assert ledger.outbox()[0].id > item.id


# --- transactions -----------------------------------------------------------------------------------------------------
def test_a_block_that_fails_writes_nothing(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    begin(ledger, "t1")
    before = ledger.session("s1"), ledger.turns("s1")
    with pytest.raises(LookupError), ledger.writing() as writer:  # noqa: PT012 - the block is what is tested
        writer.put("spans", b"a", items=1, created_ns=NOON)
        writer.finish_turn(ended("t1"), [], spans=1)
        writer.announced("s1")
        writer.end_session("s1", "error", NOON)
        raise LookupError
    assert (ledger.session("s1"), ledger.turns("s1")) == before
    assert ledger.outbox() == []
    assert finish(ledger, ended("t1"))


def test_a_block_of_which_one_change_is_refused_writes_nothing(ledger: Ledger) -> None:
    body: Any = None
    with pytest.raises(Exception, match=r"(?i)null"), ledger.writing() as writer:  # noqa: PT012
        writer.put("spans", b"a", items=1, created_ns=NOON)
        writer.put("spans", body, items=1, created_ns=NOON)
    assert ledger.outbox() == []
    open_session(ledger, "s1")  # and the ledger can be used as before
    assert begin(ledger, "t1") == 1


def test_a_reader_sees_all_of_a_block_or_nothing_of_it(database: Database) -> None:
    ledgers = [database.open() for _ in range(2)]
    done = threading.Event()
    seen: list[int] = []

    def read() -> None:
        while not done.is_set():
            seen.append(len(ledgers[1].outbox()))

    def write() -> None:
        try:
            for _ in range(40):
                with ledgers[0].writing() as writer:
                    for _ in range(5):
                        writer.put("spans", b"a", items=1, created_ns=NOON)
        finally:
            done.set()

    at_once(read, read, write)
    assert all(number % 5 == 0 for number in seen)
    assert len(ledgers[1].outbox()) == 200


def test_reading_does_not_wait_for_a_writer(shared: Database) -> None:
    if shared.backend.engine is not None:
        pytest.skip("how an engine of the app's locks is for the app to say")
    ledger, other = shared.open(), shared.open()
    open_session(ledger, "s1")
    with ledger.writing() as writer, ThreadPoolExecutor(1) as thread:
        writer.end_session("s1", "completed", NOON)
        for reader in (ledger, other):
            session = thread.submit(reader.session, "s1").result(10)
            assert session is not None
            assert session.ended_ns is None
    session = other.session("s1")
    assert session is not None
    assert session.ended_ns == NOON


def test_turns_begin_while_others_are_read_and_ended(database: Database) -> None:
    ledgers = [database.open() for _ in range(2)]
    open_session(ledgers[0], "s1")

    def take(thread: int) -> int:
        for n in range(25):
            number = begin(ledgers[thread % 2], f"t{thread}-{n}", conversation=f"c{thread}")
            assert number == n + 1
            turn = ended(f"t{thread}-{n}", conversation_id=f"c{thread}", number=number)
            assert finish(ledgers[(thread + 1) % 2], turn)
        return 25

    def look() -> int:
        for _ in range(25):
            session = ledgers[1].session("s1")
            assert session is not None
            assert session.total_turns <= len(ledgers[1].turns("s1"))
        return 0

    assert sum(at_once(*[lambda n=n: take(n) for n in range(4)], look, look)) == 100
    session = ledgers[0].session("s1")
    assert session is not None
    assert session.total_turns == 100


# --- the key for hashing users ----------------------------------------------------------------------------------------
def test_the_key_for_hashing_users_is_made_once(database: Database) -> None:
    keys = at_once(*[database.open().hash_key for _ in range(6)])
    assert len(set(keys)) == 1
    assert len(keys[0]) == 32
    assert database.open().hash_key() == keys[0]


def test_each_ledger_has_a_key_of_its_own(tmp_path: Path) -> None:
    keys = {Ledger("sqlite://").hash_key() for _ in range(3)}
    assert len(keys) == 3


# --- the life of a session --------------------------------------------------------------------------------------------
def enter(ledger: Ledger, stage: str | None, *, at: int = NOON, converts: bool = False, session: str = "s1") -> Any:
    wanted = StageWanted("onboarding", ("a", "b", "c"), stage, converts, session, None, at)
    with ledger.writing() as writer:
        return writer.enter_stage("u1", wanted)


def test_a_journey_goes_on_in_a_later_session(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    begin(ledger, "t1")
    finish(ledger, ended("t1"))
    first = enter(ledger, "a")
    assert (first.stage_number, first.total_stages, first.time_in_stage_ms, first.is_back) == (1, 3, None, False)
    assert enter(ledger, "a", at=NOON + SECOND) is None
    end(ledger, "s1")
    open_session(ledger, "s2", at=NOON + DAY)
    second = enter(ledger, "c", at=NOON + DAY, session="s2")
    assert (second.stage_number, second.time_in_stage_ms) == (3, 86_400_000)
    back = enter(ledger, "b", at=NOON + DAY + SECOND, session="s2")
    assert (back.stage_number, back.is_back, back.converted) == (2, True, False)
    done = enter(ledger, None, at=NOON + DAY + MINUTE, converts=True, session="s2")
    assert (done.stage, done.converted, done.conversion_time_ms) == ("b", True, 86_460_000)
    assert enter(ledger, None, at=NOON + 2 * DAY, converts=True, session="s2") is None
    journey = ledger.journey("u1", "s2", "onboarding")
    assert journey is not None
    assert (journey.stage, journey.converted, journey.started_ns) == ("b", True, NOON)
    assert [step.stage for step in ledger.stages("s1") + ledger.stages("s2")] == ["a", "c", "b", "b"]
    sessions = {session.id: session for session in ledger.sessions()}
    assert (sessions["s1"].journey_stage, sessions["s1"].journey_converted) == ("a", False)
    assert (sessions["s2"].journey_stage, sessions["s2"].journey_converted) == ("b", True)


def test_a_journey_is_converted_once_by_any_number_of_workers(database: Database) -> None:
    ledgers = [database.open() for _ in range(2)]
    open_session(ledgers[0], "s1")
    entered = at_once(*[lambda n=n: enter(ledgers[n % 2], None, at=NOON + n, converts=True) for n in range(8)])
    assert sum(each is not None for each in entered) == 1
    assert len(ledgers[1].stages("s1")) == 1


def give(ledger: Ledger, value: float, *, feedback_id: str = "f1") -> None:
    row = {"id": feedback_id, "session_id": "s1", "turn_id": None, "name": "n", "value": value, "at_ns": NOON}
    with ledger.writing() as writer:
        writer.put_feedback(row)


def test_feedback_is_a_mean_and_the_same_again_replaces_it(ledger: Ledger) -> None:
    open_session(ledger, "s1")
    for value, feedback_id, mean in ((1.0, "f1", 1.0), (0.5, "f2", 0.75), (0.0, "f1", 0.25), (0.0, "f1", 0.25)):
        give(ledger, value, feedback_id=feedback_id)
        session, user = ledger.session("s1"), ledger.user("u1")
        assert session is not None
        assert user is not None
        assert session.user_satisfaction == pytest.approx(mean)
        assert user.user_satisfaction == pytest.approx(mean)


def test_the_figures_of_a_user_are_those_of_all_sessions(ledger: Ledger) -> None:
    assert ledger.user("u1") is None
    for day in range(3):
        open_session(ledger, f"s{day}", at=NOON + day * DAY)
        number = begin(ledger, f"t{day}", session=f"s{day}", at=NOON + day * DAY)
        finish(ledger, ended(f"t{day}", session_id=f"s{day}", number=number, input_tokens=10, cost_usd=0.5))
        if day < 2:
            end(ledger, f"s{day}", at=NOON + day * DAY)
    open_session(ledger, "other", user="u2")
    user = ledger.user("u1")
    assert user is not None
    assert (user.sessions_total, user.open_sessions, user.total_turns, user.total_tokens) == (3, 1, 3, 30)
    assert (user.avg_session_length, user.retention_days, user.total_cost_usd) == (1.0, 2, 1.5)
    assert user.user_satisfaction is None


def test_what_is_silent_is_found_once_by_workers_side_by_side(database: Database) -> None:
    ledgers = [database.open() for _ in range(2)]
    for n in range(12):
        open_session(ledgers[0], f"s{n}", user=f"u{n}", at=NOON + n)
    begin(ledgers[0], "runs", session="s0", user="u0")

    def sweep(thread: int) -> list[str]:
        found = []
        for _ in range(12):
            with ledgers[thread % 2].writing() as writer:
                for session_id, _ in writer.idle_sessions(NOON + 11, 3):
                    assert writer.end_session(session_id, "inactive_timeout", NOON + DAY) is not None
                    found.append(session_id)
        return found

    swept = [session_id for found in at_once(*[lambda n=n: sweep(n) for n in range(4)]) for session_id in found]
    assert sorted(swept) == sorted(f"s{n}" for n in range(1, 11))  # one has a turn that runs, one was active just now


def test_turns_that_nobody_will_end_are_found(ledger: Ledger) -> None:
    open_session(ledger, "s1", tier="pro")
    begin(ledger, "t1")
    with ledger.writing() as writer:
        assert writer.stale_turns(NOON, 10) == []
        [row] = writer.stale_turns(NOON + 1, 10)
        assert (row["id"], row["number"], row["session_tier"]) == ("t1", 1, "pro")
        assert writer.stale_turns(NOON + 1, 10, after="t1") == []


def test_a_user_is_erased_from_every_table(ledger: Ledger) -> None:
    for user, session in (("u1", "s1"), ("u2", "s2")):
        open_session(ledger, session, user=user)
        begin(ledger, f"t-{session}", session=session, conversation=f"c-{session}", user=user)
        finish(ledger, ended(f"t-{session}", session_id=session, conversation_id=f"c-{session}", user_id=user))
    begin(ledger, "open")
    enter(ledger, "a")
    give(ledger, 1.0)
    erased = ledger.forget_user("u1")
    assert (erased.sessions, erased.turns) == (("s1",), 2)
    assert ledger.session("s1") is None
    assert ledger.turns("s1") == []
    assert ledger.stages("s1") == []
    assert ledger.journey("u1", "s1", "onboarding") is None
    assert ledger.user("u1") is None
    assert ledger.turn_numbers("c-s2") == [1]
    assert open_session(ledger, "s3").session.sessions_total == 1  # as if the user had never been here


# --- several ledgers and processes ------------------------------------------------------------------------------------
def test_what_is_written_is_there_when_the_ledger_is_opened_again(shared: Database) -> None:
    ledger = shared.open()
    open_session(ledger, "s1")
    begin(ledger, "t1")
    finish(ledger, ended("t1", input_tokens=5))
    before = ledger.session("s1"), ledger.turns("s1"), ledger.outbox(), ledger.hash_key()
    ledger.close()
    again = shared.open()
    assert (again.session("s1"), again.turns("s1"), again.outbox(), again.hash_key()) == before


def test_a_ledger_that_was_closed_can_be_used_again(shared: Database) -> None:
    ledger = shared.open()
    open_session(ledger, "s1")
    ledger.close()
    assert begin(ledger, "t1") == 1
    ledger.close()
    ledger.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(4, fresh.CONTEXT) as pool:
        yield pool


@pytest.fixture(scope="module")
def manager() -> Iterator[Any]:
    with fresh.CONTEXT.Manager() as made:
        yield made


def test_processes_that_make_one_new_ledger_at_once_agree(
    tmp_path: Path, processes: ProcessPoolExecutor, manager: Any
) -> None:
    rounds, barrier = 15, manager.Barrier(4)
    url = f"sqlite:///{tmp_path}/new{{}}/ledger.db"
    done = [processes.submit(ledger_processes.open_many, url, rounds, barrier) for _ in range(4)]
    found = [each.result(60) for each in done]
    assert [key for keys in found for key in keys if "Error" in key] == []
    assert found[0] == found[1] == found[2] == found[3]
    assert len(set(found[0])) == rounds


def test_processes_share_conversations_without_a_gap_or_a_number_twice(
    shared: Database, processes: ProcessPoolExecutor, manager: Any
) -> None:
    if shared.backend.engine is not None:
        pytest.skip("tested by itself below")
    ledger, barrier, turns = shared.open(), manager.Barrier(4), 50
    done = [
        processes.submit(ledger_processes.take_turns, shared.url, process, turns, 3, barrier) for process in range(4)
    ]
    taken = [pair for each in done for pair in each.result(60)]
    assert len(taken) == len(set(taken)) == 4 * turns
    for conversation in ("c0", "c1", "c2"):
        numbers = sorted(number for name, number in taken if name == conversation)
        assert numbers == list(range(1, len(numbers) + 1)) == ledger.turn_numbers(conversation)
    [session] = ledger.sessions()  # one user on one channel: one sitting, whoever began it
    assert session.total_turns == 4 * turns
    assert session.input_tokens == 4 * sum(range(turns))
    assert session.output_tokens == 4 * turns
    assert sorted(item.body.decode() for item in ledger.outbox(limit=1000)) == sorted(
        f"t{process}-{each}" for process in range(4) for each in range(turns)
    )


def test_processes_share_a_ledger_over_engines_of_the_apps(
    tmp_path: Path, processes: ProcessPoolExecutor, manager: Any
) -> None:
    url, barrier, turns = f"sqlite:///{tmp_path}/app.db", manager.Barrier(3), 20
    Ledger(url).close()
    done = [
        processes.submit(ledger_processes.take_turns_with_engine, url, process, turns, 2, barrier)
        for process in range(3)
    ]
    assert sum(each.result(60) for each in done) == 3 * turns
    assert len(Ledger(url).turn_numbers("c0")) == 3 * turns // 2


def test_an_engine_of_the_apps_stays_open(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/app.db")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE orders (id INTEGER)")
    ledger = Ledger(engine)
    open_session(ledger, "s1")
    begin(ledger, "t1")
    ledger.close()
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO orders VALUES (1)")
        names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars()
        assert all(name == "orders" or name.startswith(("turntrace_", "sqlite_")) for name in names)
    engine.dispose()


def test_records_of_the_ledger_can_be_changed_by_copying_only(ledger: Ledger) -> None:
    opened = open_session(ledger, "s1")
    assert replace(opened.session, tier="free").tier == "free"
    with pytest.raises(AttributeError):
        opened.session.tier = "free"  # type: ignore[misc]
