"""Old sessions are erased from the ledger with all that is theirs, and with nothing of others."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

import postgres
from apps import single
from command_line import runner
from turntrace import SessionTracker, track_graph
from turntrace.cli.main import app
from turntrace.errors import ConfigurationError
from turntrace.ledger.tables import metadata
from turntrace.records import TurnRequest
from turntrace.testing import Clock

DAY = 24 * 60
GRAPH: Any = track_graph(single(lambda state: {"messages": [("ai", "Hello.")]})).compile()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres.server() as made:
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.db"
    return postgres.new_schema(request.getfixturevalue("server"))


def rows(url: str) -> dict[str, int]:
    engine = create_engine(url)
    names = [name for name in metadata.tables if not name.endswith("_meta")]
    with engine.connect() as connection:
        found = {name: connection.execute(text(f"SELECT COUNT(*) FROM {name}")).scalar_one() for name in names}
    engine.dispose()
    return found


def visit(tracker: SessionTracker, user: str | None, *conversations: str) -> str:
    session = tracker.start_session(user_id=user, channel="web")
    for conversation in conversations:
        with session.conversation(conversation).turn("Hello there?") as turn:
            GRAPH.invoke(turn.input, turn.config)
            turn.journey("help", stages=["asked", "helped"]).enter("asked")
        turn.feedback(True)
    session.end("completed")
    tracker.flush()
    return session.id


def test_what_is_old_goes_with_all_that_is_its_own_and_nothing_else(url: str) -> None:
    clock = Clock()
    with SessionTracker(url, clock=clock, user_hash_key="a key of the tests") as tracker:
        visit(tracker, "ann", "c1", "c2")
        visit(tracker, None, "c3")
        clock.advance(minutes=100 * DAY)
        kept = visit(tracker, "ann", "c2", "c4")
        open_session = tracker.start_session(user_id="bob")
        tracker.flush()
        assert tracker.forget_before(timedelta(days=90)) == 2
        assert tracker.forget_before(timedelta(days=90)) == 0
        assert {each.id for each in tracker.ledger.sessions()} == {kept, open_session.id}
        assert [turn.conversation_id for turn, _ in tracker.ledger.turns(kept)] == ["c2", "c4"]
        left = rows(url)
        assert (left["turntrace_sessions"], left["turntrace_turns"], left["turntrace_conversations"]) == (2, 2, 2)
        assert (left["turntrace_steps"], left["turntrace_feedback"]) == (2, 2)
        assert left["turntrace_journeys"] == 1  # of ann, who is still known
        with tracker.start_session(user_id="ann").conversation("c2").turn("Again") as turn:
            assert turn.number == 3
        with tracker.start_session(user_id="ann").conversation("c1").turn("Once more") as turn:
            assert turn.number == 1


def test_a_user_who_is_gone_for_long_leaves_nothing(url: str) -> None:
    clock = Clock()
    with SessionTracker(url, clock=clock, user_hash_key="a key of the tests") as tracker:
        for _ in range(3):
            visit(tracker, "ann", "c1")
        clock.advance(minutes=100 * DAY)
        assert tracker.forget_before(datetime.fromtimestamp(clock() / 1e9, UTC)) == 3
        waits = {"turntrace_outbox"}
        assert {name: count for name, count in rows(url).items() if count and name not in waits} == {}


def test_more_sessions_than_fit_into_one_transaction(tmp_path: Path) -> None:
    clock = Clock()
    with SessionTracker(f"sqlite:///{tmp_path}/ledger.db", clock=clock) as tracker:
        for n in range(520):
            tracker.start_session(session_id=f"s{n}").end()
        tracker.flush()
        clock.advance(minutes=DAY)
        assert tracker.forget_before(timedelta(hours=1)) == 520


@pytest.mark.parametrize("given", [90, "90d", None], ids=str)
def test_what_is_no_time_says_what_to_type(given: Any, tmp_path: Path) -> None:
    with (
        SessionTracker(f"sqlite:///{tmp_path}/ledger.db") as tracker,
        pytest.raises(ConfigurationError, match=re.escape("tracker.forget_before(timedelta(days=90))")),
    ):
        tracker.forget_before(given)


def test_the_command_erases_what_is_old_or_a_user(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    with SessionTracker(url) as tracker:
        visit(tracker, "ann", "c1")
        visit(tracker, "bob", "c2")
    told = runner().invoke(app, ["forget", "--before", "1h", "--ledger", url])
    assert (told.exit_code, told.stdout.startswith("Erased 0 sessions")) == (0, True)
    told = runner().invoke(app, ["forget", "--user-id", "ann", "--ledger", url])
    assert (told.exit_code, told.stdout.startswith("1 sessions with 1 turns were erased")) == (0, True)
    told = runner().invoke(app, ["forget", "--before", "0s", "--ledger", url])
    assert (told.exit_code, told.stdout.startswith("Erased 1 session that ended before")) == (0, True)
    told = runner().invoke(app, ["forget", "--ledger", url])
    assert (told.exit_code, told.stderr.count("\n")) == (2, 1)
    assert "turntrace forget --before 90d" in told.stderr


def test_users_who_never_came_back_are_forgotten_in_time_too(url: str) -> None:
    """Nobody has noticed the end of their sessions, where no sweep runs."""
    clock = Clock()
    with SessionTracker(url, clock=clock, user_hash_key="a key of the tests") as tracker:
        for user in ("ann", "bob"):
            tracker.start_session(user_id=user).conversation(f"c-{user}").start_turn("Hello?").end()
        clock.advance(minutes=80 * DAY)
        later = tracker.start_session(user_id="cid")
        later.conversation("c-cid").start_turn("Hello?").end()
        clock.advance(minutes=20 * DAY)
        assert tracker.forget_before(timedelta(days=90)) == 2
        assert [each.id for each in tracker.ledger.sessions()] == [later.id]
        assert tracker.ledger.sessions()[0].ended_ns is None  # it is not long enough ago
        assert tracker.forget_before(timedelta(days=10)) == 1
        left = rows(url)
        assert (left["turntrace_sessions"], left["turntrace_turns"], left["turntrace_conversations"]) == (0, 0, 0)


def test_a_user_who_goes_on_after_being_forgotten_is_on_record_again(url: str) -> None:
    """As where "delete my data" is pressed in a sitting whose id the app has chosen."""
    with SessionTracker(url, user_hash_key="a key of the tests") as tracker:
        request = TurnRequest(user_id="ann", session_id="web-1", conversation_id="c")
        tracker.begin_turn(request, "Hello?").end()
        running = tracker.begin_turn(request, "And this?")
        tracker.forget_user("ann")
        running.end()
        for _ in range(2):
            tracker.begin_turn(request, "Hello again?").end()
        tracker.flush()
        assert [turn.status for turn, _ in tracker.ledger.turns("web-1")] == ["completed"] * 2
        found = tracker.session_summary("web-1")
        assert found is not None
        assert found.total_turns == 2
