"""The ledger on PostgreSQL: poolers, engines of the app's own, tables that are away for a moment."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

import postgres
from command_line import runner
from turntrace import SessionTracker
from turntrace.cli.main import app
from turntrace.errors import ConfigurationError
from turntrace.ledger.engine import Database
from turntrace.records import LLMCall, Usage


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres.server() as made:
        yield made


@pytest.fixture
def url(server: str) -> str:
    return postgres.new_schema(server)


def talk(tracker: SessionTracker, turns: int = 1, error: BaseException | None = None) -> str:
    session = tracker.start_session(user_id="ann")
    for _ in range(turns):
        turn = session.conversation("c").start_turn("Hello?")
        step = turn.open_step("gpt-4o", "generation")
        turn.close_step(step, call=LLMCall("gpt-4o", "openai", Usage(1000, 100)))
        turn.end(error=error)
    return session.id


def totals(tracker: SessionTracker) -> tuple[int, int, int]:
    """Return how many turns, calls and tokens there are, by the sessions' sums and by their turns, which must agree."""
    sessions = tracker.ledger.sessions()
    turns = [turn for each in sessions for turn, _ in tracker.ledger.turns(each.id)]
    assert {turn.status for turn in turns} == {"completed"}
    assert sum(each.total_turns for each in sessions) == len(turns)
    calls, tokens = sum(turn.llm_calls for turn in turns), sum(turn.input_tokens + turn.output_tokens for turn in turns)
    assert (sum(each.llm_calls for each in sessions), sum(each.total_tokens for each in sessions)) == (calls, tokens)
    return len(turns), calls, tokens


def prepared(url: str) -> tuple[int, list[str]]:
    """Write and read, and return how many statements the connection has prepared on the server, and its options."""
    database = Database(url)
    with database.writing() as connection:
        for _ in range(20):
            connection.execute(text("SELECT 1"))
        count = connection.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one()
        driver: Any = connection.connection.driver_connection
        options = driver.info.get_parameters()
    database.close()
    return count, [f"{name}={value}" for name, value in options.items()]


def test_a_pooler_may_stand_between(url: str) -> None:
    """One that gives each transaction another connection, which knows no statements that were prepared before."""
    count, options = prepared(url)
    assert count == 0
    assert {"keepalives_idle=10", "tcp_user_timeout=15000"} <= set(options)
    count, options = prepared(f"{url}&prepare_threshold=5&keepalives_idle=60")
    assert count > 0
    assert "keepalives_idle=60" in options


@pytest.mark.usefixtures("lenient")
def test_while_a_table_is_away_the_app_goes_on_and_nothing_is_lost(url: str) -> None:
    """As while a backup is restored, or rights are given anew."""
    tracker, engine = SessionTracker(url, user_hash_key="a key of the tests"), create_engine(url)
    before = talk(tracker)
    assert tracker.flush()
    for away, back in (
        ("ALTER TABLE turntrace_open_turns RENAME TO away", "ALTER TABLE away RENAME TO turntrace_open_turns"),
        ("ALTER TABLE turntrace_turns RENAME TO away", "ALTER TABLE away RENAME TO turntrace_turns"),
    ):
        with engine.begin() as connection:
            connection.execute(text(away))
        talk(tracker, 2)
        tracker.flush(0.2)
        with engine.begin() as connection:
            connection.execute(text(back))
    assert tracker.flush(60)
    assert totals(tracker) == (5, 5, 5500)
    assert len(tracker.ledger.turns(before)) >= 1
    tracker.shutdown()
    engine.dispose()


def test_whoever_may_only_read_can_look_at_all_of_it(url: str) -> None:
    tracker, engine = SessionTracker(url), create_engine(url)
    session_id = talk(tracker, 2)
    tracker.shutdown()
    with engine.begin() as connection:
        schema = connection.execute(text("SELECT current_schema()")).scalar_one()
        for words in (
            f"CREATE ROLE {schema}_reader LOGIN",
            f"GRANT USAGE ON SCHEMA {schema} TO {schema}_reader",
            f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO {schema}_reader",
        ):
            connection.execute(text(words))
    reads = make_url(url).set(username=f"{schema}_reader").render_as_string(hide_password=False)
    looks: dict[tuple[str, ...], str] = {
        ("sessions",): session_id[:8],
        ("show", session_id): "turn 2",
        ("users", "--user-id", "ann"): "2,200",
        ("dropoff",): "sessions",
    }
    for asked, shown in looks.items():
        found = runner().invoke(app, [*asked, "--ledger", reads])
        assert (found.exit_code, found.stderr) == (0, ""), found.stderr
        assert shown in found.stdout, found.stdout
    assert runner().invoke(app, ["sweep", "--ledger", reads]).exit_code != 0
    with engine.begin() as connection:
        connection.execute(text("UPDATE turntrace_meta SET value = '99' WHERE key = 'schema_version'"))
    assert "Upgrade turntrace" in runner().invoke(app, ["sessions", "--ledger", reads]).stderr
    with engine.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {schema}_reader"))
        connection.execute(text(f"DROP ROLE {schema}_reader"))
    engine.dispose()


FAILS_ONCE = (
    "CREATE SEQUENCE once",
    """CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
         IF nextval('once') = 1 THEN RAISE EXCEPTION 'deadlock detected' USING ERRCODE = '40P01'; END IF; RETURN NEW;
       END $$""",
    "CREATE TRIGGER fails BEFORE INSERT OR UPDATE ON turntrace_conversations FOR EACH ROW EXECUTE FUNCTION fail()",
)


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "REPEATABLE READ", "SERIALIZABLE"])
def test_an_engine_of_the_apps_may_have_transactions_of_any_kind(level: Any, url: str, lenient: None) -> None:
    engine = create_engine(url, isolation_level=level)
    tracker = SessionTracker(engine, user_hash_key="a key of the tests")
    talk(tracker, 3)
    assert tracker.flush()
    with engine.begin() as connection:  # a deadlock in the middle of writing a turn down, once
        for statement in FAILS_ONCE:
            connection.exec_driver_sql(statement)
    talk(tracker)
    assert tracker.flush(60)
    assert totals(tracker) == (4, 4, 4400)
    tracker.shutdown()
    engine.dispose()


@pytest.mark.usefixtures("lenient")
def test_a_locked_table_holds_up_one_turn_for_as_long_as_the_url_says_and_nothing_is_lost(url: str) -> None:
    engine = create_engine(url)
    options = f"{engine.url.query['options']} -c lock_timeout=500"
    bounded = engine.url.update_query_dict({"options": options}).render_as_string(hide_password=False)
    tracker = SessionTracker(bounded, user_hash_key="a key of the tests")
    talk(tracker)
    assert tracker.flush()
    with engine.connect() as locked:
        locked.exec_driver_sql("LOCK TABLE turntrace_turns, turntrace_open_turns, turntrace_sessions")
        talking = Thread(target=talk, args=(tracker, 3), daemon=True)
        talking.start()
        talking.join(30)
        assert not talking.is_alive()
        locked.rollback()
    assert tracker.flush(60)
    assert totals(tracker) == (4, 4, 4400)
    assert tracker.ledger.turn_numbers("c") == [1, 2, 3, 4]
    tracker.shutdown()
    engine.dispose()


@pytest.mark.usefixtures("lenient")
def test_an_engine_without_a_connection_left_holds_nobody_up_for_long_and_loses_nothing(url: str) -> None:
    engine = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    tracker = SessionTracker(engine, user_hash_key="a key of the tests")
    talk(tracker)
    assert tracker.flush()
    with engine.connect():  # the app has it
        talk(tracker, 2)
    assert tracker.flush(60)
    assert totals(tracker) == (3, 3, 3300)
    tracker.shutdown()
    engine.dispose()


def test_an_engine_that_is_asynchronous_is_refused_with_advice(url: str) -> None:
    engine = create_async_engine(url)
    for given in (engine, engine.sync_engine):
        with pytest.raises(ConfigurationError, match=r"asynchronous.*Pass the URL"):
            SessionTracker(given)  # type: ignore[arg-type]


def test_a_class_of_errors_with_a_long_name_does_not_cost_the_turn(url: str) -> None:
    with SessionTracker(url, user_hash_key="a key of the tests") as tracker:
        session_id = talk(tracker, error=type("E" * 250, (Exception,), {})())
        assert tracker.flush()
        [(turn, _)] = tracker.ledger.turns(session_id)
        assert turn.status == "failed"
        assert turn.error is not None
        assert turn.error.startswith("EEE")
