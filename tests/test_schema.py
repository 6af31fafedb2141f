"""Making the tables, their version, and what is said when a ledger cannot be opened."""

import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, inspect

import postgres
from turntrace import SessionTracker, Turn, analytics
from turntrace import attributes as a
from turntrace.errors import ConfigurationError, LedgerError, TurntraceError
from turntrace.ledger import Ledger
from turntrace.ledger.rows import steps_text
from turntrace.ledger.tables import SCHEMA_VERSION, metadata
from turntrace.records import Step
from turntrace.testing import Capture


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
        yield connection


def version(path: Path) -> str:
    with database(path) as connection:
        return str(connection.execute("SELECT value FROM turntrace_meta WHERE key = 'schema_version'").fetchone()[0])


# --- the tables -------------------------------------------------------------------------------------------------------
def test_a_new_ledger_has_all_tables_and_says_its_version(path: Path, url: str) -> None:
    Ledger(url).close()
    engine = create_engine(url)
    assert set(inspect(engine).get_table_names()) == set(metadata.tables)
    engine.dispose()
    assert version(path) == str(SCHEMA_VERSION)


def test_every_table_is_prefixed() -> None:
    assert all(name.startswith("turntrace_") for name in metadata.tables)
    names = [index.name for table in metadata.tables.values() for index in table.indexes]
    assert all(str(name).startswith("turntrace_") for name in names)


def test_the_file_is_in_wal_mode_so_that_readers_do_not_wait(path: Path, url: str) -> None:
    Ledger(url).close()
    with database(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_opening_a_ledger_again_changes_nothing(path: Path, url: str) -> None:
    Ledger(url).close()
    with database(path) as connection:
        before = connection.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall()
    for _ in range(3):
        Ledger(url).close()
    with database(path) as connection:
        assert connection.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall() == before
        assert connection.execute("SELECT count(*) FROM turntrace_meta").fetchone() == (1,)


def test_a_ledger_can_live_beside_other_tables(path: Path, url: str) -> None:
    with database(path) as connection:
        connection.execute("CREATE TABLE sessions (id TEXT)")
        connection.execute("INSERT INTO sessions VALUES ('mine')")
    Ledger(url).close()
    with database(path) as connection:
        assert connection.execute("SELECT id FROM sessions").fetchall() == [("mine",)]


def test_the_folder_of_a_ledger_is_made(tmp_path: Path) -> None:
    Ledger(f"sqlite:///{tmp_path}/a/b/ledger.db").close()
    assert (tmp_path / "a" / "b" / "ledger.db").exists()


def test_more_than_one_folder_that_was_missing_is_said_once_since_the_url_may_be_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home" / "share"))
    with SessionTracker():  # its usual place, which is nobody's mistake
        pass
    Ledger(f"sqlite:///{tmp_path}/one/ledger.db").close()
    assert caplog.messages == []
    for _ in range(2):
        Ledger(f"sqlite:///{tmp_path}/varr/lib/app/ledger.db").close()
    assert caplog.messages == [
        f"turntrace: made the folder '{tmp_path}/varr/lib/app' for the ledger, since '{tmp_path}/varr' was not there. "
        "Is the ledger's URL right?"
    ]


def test_a_ledger_of_a_newer_version_is_refused_and_left_alone(path: Path, url: str) -> None:
    Ledger(url).close()
    with database(path) as connection:
        connection.execute("UPDATE turntrace_meta SET value = '99' WHERE key = 'schema_version'")
        connection.execute("DROP TABLE turntrace_outbox")
    with pytest.raises(LedgerError) as error:
        Ledger(url)
    message = str(error.value)
    assert "version 99" in message
    assert f"up to {SCHEMA_VERSION}" in message
    assert "pip install -U turntrace" in message
    assert "TURNTRACE_LEDGER_URL" in message
    assert version(path) == "99"
    with database(path) as connection:
        names = connection.execute("SELECT name FROM sqlite_master WHERE name = 'turntrace_outbox'").fetchall()
        assert names == []


@pytest.mark.parametrize(
    "damage",
    ["DELETE FROM turntrace_meta", "UPDATE turntrace_meta SET value = 'x'", "UPDATE turntrace_meta SET value = ''"],
)
def test_a_ledger_that_does_not_say_its_version_is_refused(path: Path, url: str, damage: str) -> None:
    Ledger(url).close()
    with database(path) as connection:
        connection.execute(damage)
    with pytest.raises(LedgerError, match="TURNTRACE_LEDGER_URL"):
        Ledger(url)


def test_a_ledger_waits_while_another_process_makes_the_file(path: Path, url: str) -> None:
    # A file that is not in WAL mode yet, and somebody writes to it: SQLite refuses to change the mode at once, without
    # waiting as long as busy_timeout says.
    with database(path) as other:
        other.execute("CREATE TABLE something (id INTEGER)")
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.2, other.execute, ["COMMIT"])
        release.start()
        try:
            Ledger(url).close()
        finally:
            release.join()
    assert version(path) == str(SCHEMA_VERSION)


def test_threads_that_make_one_new_ledger_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    for each in range(10):
        url, barrier = f"sqlite:///{tmp_path}/{each}.db", threading.Barrier(4)
        errors: list[BaseException] = []

        def make(url: str = url, barrier: threading.Barrier = barrier, errors: list[BaseException] = errors) -> None:
            barrier.wait(30)
            try:
                Ledger(url).close()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []


# --- what cannot be opened --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "url",
    [
        "ledger.db",
        "not a url",
        "",
        "://",
        "postgresql+asyncpg://host/db",
        "mysql://host/db",
        "oracle://host/db",
        "nosuchdatabase:///x.db",
        "sqlite+aiosqlite:///ledger.db",
        "sqlite+nosuchdriver:///ledger.db",
        "mongodb://host/db",
    ],
)
def test_what_is_no_url_of_a_database_is_refused_with_one_that_is(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as error:
        Ledger(url)
    assert "sqlite:///" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [3, b"sqlite://", ["sqlite://"], Path("ledger.db")], ids=repr)
def test_what_is_neither_url_nor_engine_is_refused(given: Any) -> None:
    with pytest.raises(ConfigurationError, match="sqlite:///"):
        Ledger(given)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://app:secret@127.0.0.1:1/db",
        "mysql://app:secret@host/db",
        "postgresql//app:secret@host/db",
    ],
)
def test_a_password_is_not_shown(url: str) -> None:
    with pytest.raises(TurntraceError) as error:
        Ledger(url)
    assert "secret" not in str(error.value)


def test_postgresql_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as where it is not installed
    with pytest.raises(ConfigurationError, match=r"pip install 'turntrace\[postgres\]'"):
        Ledger("postgresql+psycopg://app@127.0.0.1:1/db")


def refused(url: str) -> str:
    with pytest.raises(LedgerError) as error:
        Ledger(url)
    return str(error.value)


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, url: str) -> None:
    path.write_bytes(b"These are my notes, and no database at all. " * 40)
    before = path.read_bytes()
    message = refused(url)
    assert str(path) in message
    assert "not a database" in message
    assert "TURNTRACE_LEDGER_URL" in message
    assert path.read_bytes() == before


def test_a_folder_in_the_place_of_the_file_is_refused(path: Path, url: str) -> None:
    path.mkdir()
    message = refused(url)
    assert str(path) in message
    assert "TURNTRACE_LEDGER_URL" in message


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    message = refused(f"sqlite:///{tmp_path}/notes/ledger.db")
    assert str(tmp_path / "notes") in message
    assert "TURNTRACE_LEDGER_URL" in message
    assert (tmp_path / "notes").read_text(encoding="utf-8") == "mine"


def test_a_file_that_cannot_be_written_is_refused(path: Path) -> None:
    Ledger(f"sqlite:///{path}").close()
    with database(path) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    message = refused(f"sqlite:///file:{path}?mode=ro&uri=true")
    assert "TURNTRACE_LEDGER_URL" in message


def test_a_damaged_file_is_refused(path: Path, url: str) -> None:
    Ledger(url).close()
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 3000)
    assert "TURNTRACE_LEDGER_URL" in refused(url)


def test_the_tracker_says_the_same(path: Path, url: str) -> None:
    path.write_bytes(b"no database " * 100)
    with pytest.raises(LedgerError, match="not a database"):
        SessionTracker(url)
    with pytest.raises(ConfigurationError, match="sqlite:///"):
        SessionTracker("ledger.db")


def test_where_the_ledger_is_can_be_shown(url: str) -> None:
    ledger = Ledger(url)
    assert ledger.url == url
    ledger.close()
    assert Ledger("sqlite://").url == "sqlite://"


# --- older versions ---------------------------------------------------------------------------------------------------
STEP = Step("a" * 16, "b" * 16, "agent", "chain", 0, 500)
OLDEST = Path(__file__).parent / "data" / "ledger-schema-1.sql"


def before_8(connection: Connection) -> None:
    """Take away what version 8 added."""
    connection.exec_driver_sql("DROP TABLE IF EXISTS turntrace_steps")
    connection.exec_driver_sql("DROP INDEX IF EXISTS turntrace_turns_figures")  # it goes with a column of it
    connection.exec_driver_sql("CREATE INDEX turntrace_turns_session ON turntrace_turns (session_id, started_ns)")


def columns_of(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    with database(path) as connection:
        return {
            name: sorted(connection.execute(f"SELECT name, type, \"notnull\", pk FROM pragma_table_info('{name}')"))
            for name in metadata.tables
        }


def indexes_of(path: Path) -> dict[str, str]:
    with database(path) as connection:
        found = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")
        return dict(found.fetchall())


def test_a_ledger_of_the_first_schema_is_brought_up_without_loss(path: Path, url: str, tmp_path: Path) -> None:
    with database(path) as connection:
        connection.executescript(OLDEST.read_text(encoding="utf-8"))
        connection.execute("UPDATE turntrace_turns SET steps = ? WHERE number = 2", [steps_text([STEP])])
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        kept = {
            name: connection.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall()
            for name in tables
            if name.startswith("turntrace_") and name != "turntrace_meta"
        }
    ledger = Ledger(url)
    assert version(path) == str(SCHEMA_VERSION)
    with database(path) as connection:
        for name, rows in kept.items():
            now = connection.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall()
            assert [row[: len(before)] for row, before in zip(now, rows, strict=True)] == rows
    Ledger(f"sqlite:///{tmp_path / 'new.db'}").close()
    assert columns_of(path) == columns_of(tmp_path / "new.db")
    assert indexes_of(path) == indexes_of(tmp_path / "new.db")
    [older, newer] = sorted(ledger.sessions(), key=lambda session: session.started_ns)
    assert (older.total_turns, older.end_reason, older.prunings) == (2, "user_exit", 0)
    assert [steps for _, steps in ledger.turns(older.id)] == [[], [STEP]]
    assert newer.ended_ns is None
    assert [turn.status for turn, _ in ledger.turns(newer.id)] == ["completed", "open"]
    assert ledger.decisions(older.id) == []


def test_turns_go_on_in_a_ledger_that_was_brought_up(path: Path, url: str) -> None:
    with database(path) as connection:
        connection.executescript(OLDEST.read_text(encoding="utf-8"))
    tracker = SessionTracker(url)
    with tracker.session(user_id="u") as session, session.conversation("c-1").turn("Again") as turn:
        assert turn.number == 3
    tracker.shutdown()
    assert Ledger(url).turn_numbers("c-1") == [1, 2, 3]


def test_a_step_up_that_fails_leaves_the_ledger_as_it_was(path: Path, url: str) -> None:
    with database(path) as connection:
        connection.executescript(OLDEST.read_text(encoding="utf-8"))
        connection.execute("CREATE TABLE turntrace_decisions (mine TEXT)")  # in the way of the new table
        before = connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
    with pytest.raises(LedgerError):
        Ledger(url)
    with database(path) as connection:
        assert connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall() == before
    assert version(path) == "1"


ADDED = {
    "turntrace_sessions": (
        *("prunings", "feedback_sum", "feedback_count", "dropoff", "last_turn", "last_intent", "last_action"),
        *("last_turn_ns", "journey_name", "journey_stage", "journey_converted", "journey_conversion_turn"),
        "journey_conversion_time_ms",
    ),
    "turntrace_open_turns": ("late", "own"),
    "turntrace_turns": (
        *("context_tokens", "context_messages", "context_limit"),
        *("prunings", "messages_pruned", "tokens_pruned", "forked_from", "checkpoint_id"),
        *("counted_tokens", "counted_of_tokens", "own"),
    ),
}
FIRST = ("meta", "sessions", "conversations", "open_turns", "turns", "outbox")


def test_a_ledger_of_the_first_schema_on_postgresql_is_brought_up_without_loss() -> None:
    with postgres.server() as server:
        url = postgres.new_schema(server)
        engine = create_engine(url)
        with engine.begin() as connection:
            metadata.create_all(connection, tables=[metadata.tables[f"turntrace_{name}"] for name in FIRST])
            for table, names in ADDED.items():
                for name in names:
                    connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {name}")
            for index in ("waiting", "failing"):
                connection.exec_driver_sql(f"DROP INDEX turntrace_turns_{index}")
            before_8(connection)
            for name in ("attempts", "next_try_ns", "leased_until_ns", "refused"):
                connection.exec_driver_sql(f"ALTER TABLE turntrace_outbox ADD COLUMN {name} BIGINT")
            connection.exec_driver_sql("INSERT INTO turntrace_meta VALUES ('schema_version', '1')")
            connection.exec_driver_sql(
                "INSERT INTO turntrace_sessions (id, channel, type, sessions_total, started_ns, last_activity_ns, "
                "announced, total_turns, failed_turns, llm_calls, tool_calls, input_tokens, output_tokens, "
                "total_cost_usd, unpriced_calls, active_ms, wait_ms) "
                "VALUES ('s1', 'web', 'chat', 1, 1, 2, true, 3, 0, 0, 0, 5, 6, 0.5, 0, 7, 0)"
            )
            connection.exec_driver_sql(
                "INSERT INTO turntrace_turns (id, conversation_id, number, session_id, status, started_ns, ended_ns, "
                "trace_id, root_span_id, role, agent_runs, tool_calls, llm_calls, input_tokens, output_tokens, "
                "cost_usd, unpriced_calls, latency_ms, wait_ms, spans, steps) "
                "VALUES ('t1', 'c1', 1, 's1', 'completed', 1, 2, "
                f"'t1', 't1', 'user', 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, '{steps_text([STEP])}')"
            )
        ledger = Ledger(url)
        assert [(turn.id, steps) for turn, steps in ledger.turns("s1")] == [("t1", [STEP])]
        session = ledger.session("s1")
        assert session is not None
        assert (session.total_turns, session.total_tokens, session.total_cost_usd, session.prunings) == (3, 11, 0.5, 0)
        assert set(inspect(engine).get_table_names()) == set(metadata.tables)
        for table, names in ADDED.items():
            assert set(names) <= {column["name"] for column in inspect(engine).get_columns(table)}
        indexes = {index["name"] for index in inspect(engine).get_indexes("turntrace_turns")}
        assert indexes >= {index.name for index in metadata.tables["turntrace_turns"].indexes}
        assert "turntrace_turns_session" not in indexes
        ledger.close()
        engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def url_of_either(request: pytest.FixtureRequest, path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{path}"
    else:
        with postgres.server() as server:
            yield postgres.new_schema(server)


def test_steps_that_an_older_version_wrote_are_known_and_added_to(url_of_either: str, capture: Capture) -> None:
    def step(turn: Turn, name: str, error: BaseException | None = None) -> None:
        turn.close_step(turn.open_step(name, "tool"), error=error)

    tracker = capture.tracker(url_of_either)
    session = tracker.start_session(user_id="ann")
    waits, fails = (session.conversation(name).start_turn("Sum this up.") for name in ("c1", "c2"))
    step(waits, "begun")
    step(fails, "broken", KeyError())
    carrier = waits.carrier()
    fails.end(error=KeyError())
    tracker.shutdown()
    engine = create_engine(url_of_either)
    with engine.begin() as connection:  # as version 7 wrote them
        of_turn = "SELECT steps FROM turntrace_steps WHERE turn_id = turntrace_turns.id"
        connection.exec_driver_sql(f"UPDATE turntrace_turns SET steps = ({of_turn})")
        before_8(connection)
        connection.exec_driver_sql("UPDATE turntrace_meta SET value = '7' WHERE key = 'schema_version'")
    again = capture.tracker(url_of_either)
    with again.resume_turn(carrier) as turn:
        step(turn, "gone on")
    again.flush()
    known = {each.id: [step.name for step in steps] for each, steps in again.ledger.turns(session.id)}
    assert known == {waits.id: ["begun", "gone on"], fails.id: ["broken"]}
    assert [each.name for each in analytics.turn_errors(again.ledger).by_step] == ["broken"]
    with engine.connect() as connection:
        kept = connection.exec_driver_sql("SELECT turn_id FROM turntrace_steps").scalars().all()
    assert kept == [waits.id]
    again.forget_user("ann")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT turn_id FROM turntrace_steps").all() == []
    engine.dispose()
    again.shutdown()


def test_a_turn_that_waits_in_a_ledger_of_version_5_keeps_its_topic(url_of_either: str, capture: Capture) -> None:
    tracker = capture.tracker(url_of_either)
    session = tracker.start_session(user_id="ann")
    carrier = session.conversation("c1", topic="billing").start_turn("Sum this up.").carrier()
    session.conversation("c2").start_turn("And this.").carrier()
    session.conversation("c1", topic="billing").start_turn("Hello")  # and its process dies
    tracker.shutdown()
    engine = create_engine(url_of_either)
    with engine.begin() as connection:  # as version 5 left it
        for table in ("turntrace_turns", "turntrace_open_turns"):
            connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN own")
        connection.exec_driver_sql("DROP INDEX turntrace_turns_failing")
        before_8(connection)
        connection.exec_driver_sql("UPDATE turntrace_meta SET value = '5' WHERE key = 'schema_version'")
    again = capture.tracker(url_of_either)
    with again.resume_turn(carrier) as turn:
        assert turn.tags[a.CONVERSATION_TOPIC] == "billing"
    again.flush()
    with engine.connect() as connection:
        query = "SELECT id, own FROM turntrace_turns UNION ALL SELECT id, own FROM turntrace_open_turns"
        kept = [row.own for row in connection.exec_driver_sql(query)]
    assert sorted(kept, key=str) == [None, '{"topic": "billing"}', '{"topic": "billing"}']
    engine.dispose()
    again.shutdown()
