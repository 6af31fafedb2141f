"""The commands that are asked: what a user sees of sessions, of one session, of users, funnels and drop-offs."""

import csv
import io
import itertools
import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, RetryPolicy, interrupt
from opentelemetry.sdk.trace import TracerProvider
from sqlalchemy.engine import make_url
from typer.testing import Result

import postgres
from apps import FakeModel, State, asks
from command_line import runner
from loopback import LangfuseServer
from turntrace import ContextTracker, SessionCallbackHandler, SessionTracker, track_graph
from turntrace.analytics import ORDERS
from turntrace.cli import looking
from turntrace.cli.main import app
from turntrace.context import DropOldestTurns
from turntrace.demo import support_desk
from turntrace.errors import LedgerError
from turntrace.identity import hash_user
from turntrace.summaries import SessionSummary
from turntrace.testing import Clock

KEY = "a key of the tests"
STAGES = ("signup", "connect", "first_answer")
BEGIN_NS = 1_767_261_600_000_000_000
"""10 o'clock on the first of January 2026, in UTC."""

Run = Callable[..., Result]


# --- a ledger by hand -------------------------------------------------------------------------------------------------
class Office:
    """Makes a ledger with sessions of every kind, by a clock that is set."""

    def __init__(self, url: str) -> None:
        self.clock = Clock(BEGIN_NS)
        self.tracker = SessionTracker(
            url,
            clock=self.clock,
            user_hash_key=KEY,
            tracer_provider=TracerProvider(),
            journeys={"onboarding": list(STAGES)},
        )

    def visit(self, session_id: str, user: str, *said: tuple[str, str, str], end: str | None, **about: Any) -> None:
        """Have a user say something: what, what the agent answers, and the intent."""
        topic = about.pop("topic", None)
        stages, convert = about.pop("stages", ()), about.pop("convert", False)
        session = self.tracker.start_session(user_id=user, session_id=session_id, **about)
        conversation = session.conversation(f"{session_id}-talk", topic=topic)
        for number, (question, answer, intent) in enumerate(said):
            self.clock.advance(seconds=20)
            with conversation.turn(question) as turn:
                self.clock.advance(seconds=1.5 + number)
                turn.set_intent(intent)
                if number < len(stages):
                    turn.journey("onboarding").enter(stages[number])
                turn.set_answer(answer)
                if answer.startswith("!"):
                    turn.feedback(False)
        if convert:
            session.journey("onboarding").convert()
        if end is not None:
            session.end(end)
        self.clock.advance(minutes=5)

    def sweep(self) -> None:
        self.clock.advance(minutes=60)
        self.tracker.sweep()

    def with_a_graph(self) -> None:
        """Have a graph stop for a person, try a node again, replay a turn, and wait."""
        tries = itertools.count()

        def look_up(_state: State) -> dict[str, Any]:
            self.clock.advance(seconds=0.25)
            if next(tries) == 0:
                raise ConnectionError("the database did not answer")
            return {}

        def refund(_state: State) -> dict[str, Any]:
            said = interrupt("May I?")
            self.clock.advance(seconds=2)
            return {"messages": [FakeModel().invoke(f"{said}, please")]}

        builder: Any = StateGraph(State)
        builder.add_node("look_up", look_up, retry_policy=RetryPolicy(initial_interval=0.01, max_attempts=2))
        builder.add_node("refund", refund)
        builder.add_edge(START, "look_up")
        builder.add_edge("look_up", "refund")
        graph: Any = track_graph(builder).compile(checkpointer=InMemorySaver(), name="desk")
        graph = graph.with_config(callbacks=[SessionCallbackHandler(self.tracker)])
        metadata = {"user_id": "dora", "channel": "slack", "session_id": "people"}
        config: Any = {"configurable": {"thread_id": "refunds"}, "metadata": metadata}
        graph.invoke(asks("Pay it back."), config)
        self.clock.advance(minutes=3)
        graph.invoke(Command(resume="yes"), config)
        before = next(each for each in graph.get_state_history(config) if each.next == ("look_up",))
        self.clock.advance(seconds=30)
        graph.invoke(None, before.config | {"metadata": metadata})
        self.tracker.flush()
        self.clock.advance(minutes=5)

    def with_a_window(self) -> None:
        """Have a window be pruned."""
        window = ContextTracker(model="gpt-4o", limit=200, threshold=0.5, strategy=DropOldestTurns())
        session = self.tracker.start_session(user_id="eve", session_id="long", channel="api")
        conversation = session.conversation("long-talk", topic="tea")
        messages: list[Any] = []
        for number in range(3):
            messages.append({"role": "user", "content": f"{number} " + "tea " * 40})
            with conversation.turn(messages[-1]["content"]) as turn:
                window.fit(messages)
                self.clock.advance(seconds=1)
                turn.set_answer("Tea.")
            messages.append({"role": "assistant", "content": "Tea. " * 10})
        session.end("completed")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


def fill(url: str) -> None:
    """Fill a ledger with sessions of every kind."""
    office = Office(url)
    price = ("What does it cost?", "It costs 5 euros.", "price")
    setup = ("How do I connect?", "Which provider do you use?", "setup")
    bad = ("That is wrong!", "!Sorry.", "complaint")
    office.visit("first", "ann", price, setup, end="completed", channel="web", tier="premium", topic="mail",
                 stages=("signup", "connect"), convert=True)  # fmt: skip
    office.visit("second", "bob", price, end="user_exit", channel="web", tier="free", stages=("signup",))
    office.visit("third", "cid", price, setup, end=None, channel="mobile", org_id="initech",
                 stages=("signup", "connect"))  # fmt: skip
    office.visit("fourth", "bob", price, bad, setup, end=None, channel="web", tier="free")
    office.sweep()
    office.with_a_window()
    office.with_a_graph()
    office.visit("last", "ann", price, end=None, channel="web")
    office.tracker.shutdown()


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Name the place of a ledger that the first test fills which asks for it."""
    return tmp_path_factory.mktemp("cli") / "filled.db"


@pytest.fixture
def office(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the URL of a ledger with sessions of every kind, which commands find by themselves."""
    if not filled.exists():
        fill(f"sqlite:///{filled}")
    url = f"sqlite:///{shutil.copy(filled, tmp_path / 'office.db')}"
    monkeypatch.setenv("TURNTRACE_LEDGER_URL", url)
    return url


@pytest.fixture
def run() -> Run:
    """Run a command in a terminal of 100 columns, or as many as are asked for."""

    def invoke(*arguments: str, columns: int = 100) -> Result:
        environment = {"COLUMNS": str(columns), "TERM": "dumb"}
        return runner().invoke(app, list(arguments), env=environment)

    return invoke


def ids(result: Result) -> list[str]:
    """Return the first words of a table's rows."""
    assert result.exit_code == 0, result.output
    return [line.split()[0] for line in result.stdout.splitlines()[2:] if not line.endswith(" shows all")]


def rows(result: Result) -> list[dict[str, Any]]:
    assert (result.exit_code, result.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def read_csv(result: Result) -> list[dict[str, str]]:
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout_bytes.count(b"\r\n") == result.stdout_bytes.count(b"\n")
    return list(csv.DictReader(io.StringIO(result.stdout_bytes.decode(), newline="")))


# --- sessions ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("", "last people long fourth third second first"),
        ("--channel web", "last fourth second first"),
        ("--tier free", "fourth second"),
        ("--org initech", "third"),
        ("--topic mail", "first"),
        ("--topic tea", "long"),
        ("--model gpt-4o-mini", "people"),
        ("--end-reason open", "last people"),
        ("--end-reason inactive_timeout", "fourth third"),
        ("--since 2026-01-01T11:00", "last people long"),
        ("--since 2026-01-01T12:00+01:00 --until 2026-01-01T11:23", "long"),
        ("--until 2026-01-01T10:06", "second first"),
        ("--user-id ann", "last first"),
        ("--user-id bob --channel web --end-reason user_exit", "second"),
        ("--sort longest --limit 2", "people fourth"),
        ("--sort most-turns --limit 2", "fourth long"),
        ("--sort most-tokens --limit 1", "people"),
        ("--sort dearest --limit 1", "people"),
        ("--sort slowest --limit 1", "fourth"),
        ("--sort slowest-turn --limit 2", "fourth first"),
        ("--sort least-satisfied --limit 1", "fourth"),
        ("--unsatisfied", "fourth"),
        ("--unsatisfied --channel mobile", ""),
        ("--sort newest --limit 1", "last"),
        ("--conversation refunds", "people"),
        ("--conversation first-talk", "first"),
        ("--conversation first-talk --model gpt-4o-mini", ""),
    ],
)
def test_sessions_are_filtered_and_sorted(
    options: str, found: str, run: Run, office: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURNTRACE_USER_HASH_KEY", KEY)
    assert ids(run("sessions", *options.split())) == found.split()


def test_sessions_with_failures_are_found_by_them(run: Run, url: str) -> None:
    with SessionTracker(url) as tracker:
        for name, errors in {"well": (), "bad": (TimeoutError, KeyError, None), "late": (TimeoutError,)}.items():
            with tracker.session(session_id=name) as session:
                conversation = session.conversation(f"{name}-thread")
                for error in errors:
                    with pytest.raises(error) if error else nullcontext(), conversation.turn("Hi"):
                        if error:
                            raise error("no")
        with tracker.session(session_id="left") as session:
            session.conversation("left-talk").start_turn("Hi").end("abandoned")
    for asked, found in (
        ("--failed", "left late bad"),
        ("--error KeyError", "bad"),
        ("--error TimeoutError --sort most-failed", "bad late"),
        ("--sort most-failed --limit 2", "bad late"),
        ("--failed --channel web", ""),
    ):
        assert ids(run("sessions", "--ledger", url, *asked.split())) == found.split()
    for columns, options in ((120, []), (72, ["--failed"])):
        head, _, *table = run("sessions", "--ledger", url, *options, columns=columns).stdout.splitlines()
        at = head.split().index("failed") - head.split().index("turns")
        assert at == 1
        failed = {line.split()[0]: line[: head.index("failed") + 6].split()[-1] for line in table}
        assert failed.items() >= {"bad": "2", "late": "1", "left": "0"}.items()
    head, _, *table = run("sessions", "--ledger", url, "--failed", columns=72).stdout.splitlines()
    abandoned = {line.split()[0]: line[: head.index("abandoned") + 9].split()[-1] for line in table}
    assert abandoned == {"bad": "0", "late": "0", "left": "1"}
    cards = run("sessions", "--ledger", url, "--failed", columns=30).stdout
    assert "0 failed, 1 abandoned, 1 turn" in " ".join(cards.split())
    assert "abandoned" not in run("sessions", "--ledger", url, "--error", "KeyError").stdout


def test_who_is_on_call_sees_when_it_began_and_what_failed_in_any_width(
    run: Run, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(BEGIN_NS - 24 * 3600 * 10**9)
    with SessionTracker(url, clock=clock) as tracker:
        for name in ("last-year", "earlier", "now"):
            with tracker.session(session_id=name, user_id="ann", channel="storefront") as session:
                with pytest.raises(TimeoutError), session.conversation(name).turn("Hi"):
                    raise TimeoutError
                session.conversation(name).start_turn("Hi?").end()
            clock.advance(minutes=24 * 60)
    monkeypatch.setattr("time.time_ns", lambda: BEGIN_NS + 25 * 3600 * 10**9)
    for columns in (60, 80, 130):
        head, _, *table = run("sessions", "--ledger", url, columns=columns).stdout.splitlines()
        assert len(table) == 3
        begin, end = head.index("started UTC"), head.index("started UTC") + len("started UTC")
        assert [line[begin:end].strip() for line in table] == ["10:00", "01-01 10:00", "2025-12-31"]
        failed = head.index("failed")
        assert [line[failed : failed + 6].strip() for line in table] == ["1", "1", "1"]
    card = run("sessions", "--ledger", url, columns=30).stdout
    assert card.count("1 failed") == 3
    assert "10:00, 1 failed, 2 turns" in " ".join(card.split())


def test_how_satisfied_users_were_is_a_column_an_order_and_a_filter(run: Run, url: str) -> None:
    with SessionTracker(url, user_hash_key=KEY) as tracker:
        for name, given in {"happy": [1.0], "mixed": [0, 1.0], "cross": [0.0], "quiet": []}.items():
            with tracker.session(session_id=name, user_id=name) as session:
                session.conversation(name).start_turn("Hi").end()
                for value in given:
                    session.feedback(value, name=f"asked {value}")
    assert ids(run("sessions", "--ledger", url, "--sort", "least-satisfied")) == ["cross", "mixed", "happy", "quiet"]
    assert ids(run("sessions", "--ledger", url, "--unsatisfied")) == ["cross"]
    by_user = [hash_user(name, KEY.encode())[:8] for name in ("cross", "mixed", "happy", "quiet")]
    assert ids(run("users", "--ledger", url, "--sort", "least-satisfied")) == by_user
    assert ids(run("users", "--ledger", url, "--unsatisfied")) == by_user[:1]
    for columns, options in ((60, ["--sort", "least-satisfied"]), (60, ["--unsatisfied"]), (150, [])):
        head, _, *table = run("sessions", "--ledger", url, *options, columns=columns).stdout.splitlines()
        at = head.index("satisfied")
        satisfied = {line.split()[0]: line[at : at + 9].strip() for line in table}
        assert satisfied.items() <= {"cross": "0%", "mixed": "50%", "happy": "100%", "quiet": ""}.items()
    for shown in ("sessions", "users"):  # where not even the fewest columns have room
        assert "satisfied 0%" in run(shown, "--ledger", url, "--sort", "least-satisfied", columns=30).stdout
    assert "per turn" in run("sessions", "--ledger", url, "--sort", "slowest", columns=30).stdout
    assert "0 failed" in run("sessions", "--ledger", url, "--sort", "most-failed", columns=30).stdout
    with SessionTracker(url, user_hash_key=KEY) as tracker:
        tracker.forget_user("cross")
    none = run("sessions", "--ledger", url, "--unsatisfied")
    assert none.stdout == "There are no sessions like that: feedback below 0.5.\n"


def test_a_session_with_one_slow_turn_is_found_and_the_turn_named(run: Run, url: str) -> None:
    clock = Clock(BEGIN_NS)
    with SessionTracker(url, clock=clock) as tracker:
        took: dict[str, list[float]] = {"steady": [3] * 4, "spike": [1, 1, 12.5, 1, 1, 1], "none": []}
        for name, seconds in took.items():
            with tracker.session(session_id=name) as session:
                for each in seconds:
                    with session.conversation(name).turn("Hi"):
                        clock.advance(seconds=each)
    for columns in (60, 150):
        result = run("sessions", "--ledger", url, "--sort", "slowest-turn", columns=columns)
        assert ids(result) == ["spike", "steady", "none"]
        assert re.search(r"^spike .* 3: 12\.5 s  ", result.stdout, re.MULTILINE)
        assert re.search(r"^steady .* 1: 3\.0 s  ", result.stdout, re.MULTILINE)
    assert "slowest turn" not in run("sessions", "--ledger", url, columns=150).stdout


@pytest.mark.parametrize(
    ("since", "found"),
    [
        ("1h30m", "last people long fourth third"),
        ("10:40", "last people long"),
        ("90m", "last people long fourth third"),
        ("1h", "last people long"),
        ("7d", "last people long fourth third second first"),
        ("today", "last people long fourth third second first"),
        ("yesterday", "last people long fourth third second first"),
    ],
)
def test_since_takes_how_long_ago(
    since: str, found: str, run: Run, office: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 10 minutes before noon: the first session began at 10:00, the third at 10:11, the fourth at 10:17
    monkeypatch.setattr("time.time_ns", lambda: BEGIN_NS + 100 * 60 * 10**9)
    assert ids(run("sessions", "--since", since)) == found.split()


def test_a_session_whose_first_turn_still_runs_is_found_by_its_conversation(run: Run, url: str) -> None:
    with SessionTracker(url) as tracker:
        turn = tracker.start_session(session_id="s").conversation("c").start_turn("Hi")
        assert ids(run("sessions", "--ledger", url, "--conversation", "c")) == ["s"]
        turn.end()


def test_what_is_typed_wrong_is_said_plainly(run: Run) -> None:
    wrong = run("sessions", "--sort", "fastest").stderr
    assert "'fastest' is not one of 'newest', 'longest'" in wrong
    assert "Value error" not in wrong
    assert "--org" not in run("sessions", "--foo").stderr
    typo = run("sessions", "--chanel", "web").stderr
    assert "--channel" in typo
    assert "--help)" not in typo


def test_every_order_of_analytics_can_be_asked_for() -> None:
    assert tuple(order.value.replace("-", " ") for order in looking.SessionOrder) == ORDERS


def test_a_user_is_found_by_the_hash_or_its_beginning(run: Run, office: str) -> None:
    whole = hash_user("ann", KEY.encode())
    for given in (whole, whole[:6]):
        assert ids(run("sessions", "--user", given)) == ["last", "first"]
    for options, why in (
        (("--user", "ann"), "No user has a hash that begins with 'ann'. turntrace users lists them; --user-id takes"),
        (("--user", ""), "Several users have hashes that begin with ''"),
        (("--user", "%"), "No user has a hash that begins with '%'"),
        (("--user", whole, "--user-id", "ann"), "name the same user in two ways"),
        (("--user-id", ""), "user_id is empty"),
        (("--since", "soon"), "--since is 'soon'. Allowed are a day and a time in ISO 8601, a time of today, how long"),
        (("--until", "2026-13-01"), "--until is '2026-13-01': month must be in 1..12"),
        (
            ("--since", "2026-01-02", "--until", "2026-01-01T12:00"),
            "--until is 2026-01-01T12:00:00 and --since is 2026-01-02: nothing lies between. --until is to be later",
        ),
        (("--json", "--csv"), "give one of them"),
    ):
        result = run("sessions", *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("turntrace: ")
        assert why in result.stderr
        assert result.stderr.count("\n") == 1
    assert run("sessions", "--sort", "oldest").exit_code == 2


def test_a_users_id_is_hashed_with_the_key_that_the_ledger_keeps(run: Run, url: str) -> None:
    with SessionTracker(url) as tracker:
        tracker.start_session(user_id="zoe@example.com", session_id="hers").end()
        tracker.start_session(user_id=42, session_id="his").end()
    assert ids(run("sessions", "--user-id", "zoe@example.com", "--ledger", url)) == ["hers"]
    assert ids(run("sessions", "--user-id", "42", "--ledger", url)) == ["his"]
    nobody = run("sessions", "--user-id", "nobody", "--ledger", url, "--channel", "a\x1b[2Jb")
    assert nobody.exit_code == 0
    assert nobody.stdout.splitlines() == [
        "There are no sessions like that: channel a\\x1b[2Jb, user_id nobody.",
        "No session has --channel a\\x1b[2Jb: there are unknown.",
    ]
    alone = run("users", "--user-id", "nobody", "--ledger", url)
    assert alone.stdout == "There are no users like that: user_id nobody.\n"


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ("--channel webb", "No session has --channel webb: there are api, mobile, slack, web."),
        (
            "--end-reason x",
            "No session has --end-reason x: there are completed, inactive_timeout, user_exit, open.",
        ),
        ("--org acme", "No session has --org acme: there are initech."),
        ("--model gpt-5", "No session has --model gpt-5: there are gpt-4o-mini."),
        ("--topic coffee", "No session has --topic coffee: there are mail, tea."),
        ("--error KeyError", "No session has --error KeyError: there are none on record."),
        ("--channel web --tier gold", "No session has --tier gold: there are free, premium."),
        ("--channel web --topic tea", None),
        ("--since 2027-01-01 --end-reason open", None),
    ],
)
def test_where_nothing_is_found_it_is_said_what_there_is(options: str, hint: str | None, run: Run, office: str) -> None:
    for command in ("sessions", "users", "dropoff"):
        _, *hints = run(command, *options.split()).stdout.splitlines()
        assert hints == ([] if hint is None else [hint])
    found = run("sessions", *options.split(), "--json")
    assert (found.exit_code, json.loads(found.stdout)) == (0, [])
    assert found.stderr.splitlines() == ([] if hint is None else [hint])  # a script may have misspelt it


def test_of_many_values_some_are_named(run: Run, url: str) -> None:
    with SessionTracker(url) as tracker:
        for number in range(20):
            tracker.start_session(channel=f"c-{number:02}").end()
    hint = run("sessions", "--channel", "c", "--ledger", url).stdout.splitlines()[1]
    assert hint.endswith("there are c-00, c-01, c-02, c-03, c-04, c-05, c-06, c-07 and 12 more.")


def test_sessions_as_json_have_the_fields_of_a_summary_and_times_in_iso(run: Run, office: str) -> None:
    found = {row["id"]: row for row in rows(run("sessions", "--json", columns=20))}
    assert list(found) == ["last", "people", "long", "fourth", "third", "second", "first"]
    names = {re.sub("_ns$", "_at", each.name) for each in fields(SessionSummary)}
    added = {"duration_ms", "total_tokens", "avg_turn_latency_ms", "avg_turn_tokens"}
    assert set(found["first"]) == (names | added) - {"user_avg_session_length", "user_retention_days"}
    third = found["third"]
    assert third["started_at"] == "2026-01-01T10:11:05.500000+00:00"
    assert (third["end_reason"], third["dropoff"], third["last_action"]) == ("inactive_timeout", True, "asked_question")
    assert (third["org_id"], third["tier"], third["duration_ms"]) == ("initech", None, 44_000)
    assert found["last"]["ended_at"] is None
    assert json.loads(run("sessions", "--json", "--channel", "none").stdout) == []


def test_sessions_as_csv_are_rows_that_a_spreadsheet_reads(run: Run, office: str) -> None:
    found = read_csv(run("sessions", "--csv"))
    as_json = rows(run("sessions", "--json"))
    assert [list(row) for row in found] == [list(row) for row in as_json]
    for row, same in zip(found, as_json, strict=True):
        for name, value in same.items():
            written = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            assert row[name] == written
    assert list(csv.reader(io.StringIO(run("sessions", "--csv", "--channel", "none").stdout))) == [list(as_json[0])]


def test_a_list_that_is_cut_says_so_and_what_programs_read_is_whole(run: Run, url: str) -> None:
    with SessionTracker(url) as tracker:
        for number in range(23):
            tracker.start_session(session_id=f"s-{number}", user_id=f"user-{number}", channel=f"c{number % 2}").end()
    for what in ("sessions", "users"):
        table = run(what, "--ledger", url).stdout.splitlines()
        assert (len(table), table[-1]) == (2 + 20 + 1, f"20 of 23 {what}; --limit 23 shows all")
        table = run(what, "--ledger", url, "--limit", "3", "--channel", "c1").stdout.splitlines()
        assert (len(table), table[-1]) == (2 + 3 + 1, f"3 of 11 {what}; --limit 11 shows all")
        for whole in (("--limit", "23"), ("--limit", "30"), ("--channel", "c0")):
            assert "shows all" not in run(what, "--ledger", url, *whole).stdout
        assert len(rows(run(what, "--ledger", url, "--json"))) == 23
        assert len(read_csv(run(what, "--ledger", url, "--csv"))) == 23
        assert len(rows(run(what, "--ledger", url, "--json", "--limit", "2"))) == 2
        assert len(read_csv(run(what, "--ledger", url, "--csv", "--limit", "2"))) == 2


def test_no_cell_is_run_by_a_spreadsheet_and_none_changes_the_terminal(run: Run, url: str) -> None:
    channels = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", 'a"b,c\r\nd', "\x1b[2Jx", "plain -1", "=\u202e"]
    with SessionTracker(url) as tracker:
        for number, channel in enumerate(channels):
            tracker.start_session(session_id=f"={number}", channel=channel).end()
    result = run("sessions", "--csv", "--ledger", url)
    found = {row["id"]: row["channel"] for row in read_csv(result)}
    assert [found[f"'={number}"] for number in range(len(channels))] == [
        *("'=1+1", "'+1", "'-1", "'@SUM(A1)", "'\\t=1", 'a"b,c\\r\\nd', "\\x1b[2Jx", "plain -1", "'=\\u202e")
    ]
    as_json = run("sessions", "--json", "--ledger", url)
    assert {row["channel"] for row in rows(as_json)} == set(channels)
    for output in (result.stdout_bytes, as_json.stdout_bytes):
        assert b"\x1b" not in output
        assert output.isascii()


# --- one session ------------------------------------------------------------------------------------------------------
def lines(result: Result) -> list[str]:
    """Return the lines of a tree without its branches."""
    assert (result.exit_code, result.stderr) == (0, "")
    return [line.strip("\u2502\u251c\u2514\u2500 ") for line in result.stdout.splitlines()]


def shown(
    run: Run, session_id: str, url: str, now_ns: int = BEGIN_NS + 3 * 3600 * 10**9, options: str = ""
) -> list[str]:
    """Return the lines of the tree as they are at a time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("time.time_ns", lambda: now_ns)
        found = lines(run("show", session_id, "--ledger", url, *options.split(), columns=120))
    assert not [line for line in found if "Langfuse" in line]  # there are no keys of it
    return found


def test_a_session_with_a_journey_feedback_and_an_end(run: Run, office: str) -> None:
    assert shown(run, "first", office) == [
        "session first  web, user " + hash_user("ann", KEY.encode())[:8],
        "2026-01-01 10:00:00 UTC, tier premium",
        "2 turns, 0 tokens, $0.00, 44.0 s",
        "conversation first-talk",
        "turn 1  10:00:20  completed  intent price  question → answer",
        "1.5 s",
        "turn 2  10:00:41  completed  intent setup  question → question",
        "2.5 s",
        "journey onboarding",
        "10:00:21  signup (1 of 3)",
        "10:00:44  connect (2 of 3)  after 22.5 s",
        "10:00:44  connect  converted, 22.5 s after its first step",
        "end  10:00:44  completed",
    ]


def test_a_session_that_dropped_off_says_where(run: Run, office: str) -> None:
    found = shown(run, "fourth", office)
    assert "feedback user_feedback 0" in found
    assert found[2].endswith("satisfied 0%")
    assert found[-2:] == [
        "end  10:47:57  inactive_timeout after 30 min 00 s of silence",
        "drop-off after turn 3 (setup): the agent had asked something",
    ]


def test_waiting_attempts_and_forks_are_told(run: Run, office: str) -> None:
    found = shown(run, "people", office)
    first, second = (next(n for n, line in enumerate(found) if line.startswith(f"turn {turn} ")) for turn in (1, 2))
    assert found[first : first + 3] == [
        "turn 1  11:23:00  completed  command → answer",
        "2.5 s, 120 tokens, $0.000027, window \u2591\u2591\u2591\u2591\u2591\u2591\u2591\u2591\u2591\u2591 <1%",
        "waited 3 min 00 s for a person",
    ]
    assert found[first + 3 : second] == [
        "agent desk  500 ms",
        "node look_up  250 ms  ConnectionError",
        "node look_up  250 ms  attempt 2",
        "node refund  0 ms",
        "agent desk  2.0 s",
        "node refund  2.0 s",
        "llm gpt-4o-mini  0 ms  100 in, 20 out  $0.000027",
    ]
    assert found[second : second + 4] == [
        "turn 2  11:26:32  interrupted",
        "250 ms",
        "waits for a person, 1 h 33 min so far",
        "forked from turn 1",
    ]
    assert found[-1] == "open, last active 1 h 33 min ago"
    assert found[2].endswith(", waited 3 min 00 s for a person")


def test_how_full_the_window_was_and_what_was_pruned(run: Run, office: str) -> None:
    found = shown(run, "long", office)
    full, empty = "\u2588", "\u2591"
    assert found[5] == f"1.0 s, window {full * 2}{empty * 8} 24%"
    assert "pruned 2 messages, 71 tokens" in found
    assert found[2].endswith("2 prunings")
    assert "pruned 2 messages, 71 tokens" in run("show", "long", "--context", columns=120).stdout


@pytest.fixture
def twice(url: str) -> tuple[str, list[str]]:
    """Give the URL of a ledger in which a conversation goes on in a second session, and the ids of its turns."""
    clock, turn_ids = Clock(BEGIN_NS), []
    with SessionTracker(url, clock=clock) as tracker:
        for session_id, questions in (("monday", 4), ("tuesday", 2)):
            with tracker.session(session_id=session_id) as session:
                session.conversation(f"small talk {session_id}").start_turn("Hi").end()
                clock.advance(seconds=1)
                for number in range(questions):
                    turn = session.conversation("c-42").start_turn("Where is it?")
                    turn_ids.append(turn.id)
                    turn.set_answer("On its way.")
                    clock.advance(seconds=1)
                    turn.end("failed" if number == 1 else "completed")
            clock.advance(minutes=60 * 24)
    return url, turn_ids


def test_a_session_is_found_by_its_conversation_turn_or_trace_which_is_marked(
    run: Run, twice: tuple[str, list[str]]
) -> None:
    url, turn_ids = twice
    found = shown(run, "c-42", url)
    assert [line.split()[1] for line in found if line.startswith("session ")] == ["monday", "tuesday"]
    assert [line for line in found if "asked for" in line] == [
        *("conversation c-42  <- asked for", "conversation c-42, turns 5 to 6 of it  <- asked for"),
    ]
    assert [row["id"] for row in json.loads(run("show", "c-42", "--json", "--ledger", url).stdout)] == [
        *("monday", "tuesday"),
    ]
    assert run("show", "c-42", "--context", "--ledger", url).stdout.count("No model was called") == 2

    fifth = turn_ids[4]
    whole = json.loads(run("show", fifth, "--json", "--ledger", url).stdout)
    trace_id = next(turn["trace_id"] for turn in whole["turns"] if turn["id"] == fifth)
    for given in (fifth, trace_id):
        found = shown(run, given, url)
        [at] = [number for number, line in enumerate(found) if "asked for" in line]
        assert found[at] == "turn 5  10:00:06  completed  question \u2192 answer  <- asked for"
        assert f"trace {trace_id}" in found[at:]
        assert found[0].startswith("session tuesday ")
    assert [line for line in shown(run, "monday", url) if line.startswith("trace ") or "asked for" in line] == [
        f"trace {turn_ids[1]}",  # of the turn that failed
    ]


@pytest.fixture
def hundred(url: str) -> tuple[str, list[str]]:
    """Give the URL of a ledger with a session of a hundred turns, of which the 30th was slow, and the turns' ids."""
    clock, turn_ids = Clock(BEGIN_NS), []
    with SessionTracker(url, clock=clock) as tracker:
        with tracker.session(session_id="one of many", channel="web") as session:
            conversation = session.conversation("c-7")
            for number in range(1, 101):
                with conversation.turn("Where is it?") as turn:
                    turn_ids.append(turn.id)
                    turn.set_intent("track")
                    clock.advance(seconds=9 if number == 30 else 1.5)
                    turn.set_answer("On its way.")
            turn.feedback(False)
            session.journey("onboarding", list(STAGES)).enter("connect")
        with tracker.session(session_id="next") as session:
            session.conversation("c-7").start_turn("Hi").end()
    return url, turn_ids


ALL_OF_IT = "turntrace show 'one of many' shows all, with --brief a line each"


def test_a_turn_is_shown_alone_by_its_number(run: Run, hundred: tuple[str, list[str]]) -> None:
    url, turn_ids = hundred
    for given in ("one", "c-7"):
        assert shown(run, given, url, options="--turn 30") == [
            *("session one of many  web, user unknown", "2026-01-01 10:00:00 UTC"),
            "100 turns, 0 tokens, $0.00, 2 min 38 s, satisfied 0%",
            "conversation c-7" + ("  <- asked for" if given == "c-7" else ""),
            "turn 30  10:00:43  completed  intent track  question \u2192 answer",
            "9.0 s slow",
            f"trace {turn_ids[29]}",
            f"1 of 100 turns; {ALL_OF_IT}",
        ]
    [turn] = json.loads(run("show", "one", "--turn", "30", "--json", "--ledger", url).stdout)["turns"]
    assert (turn["number"], turn["latency_ms"]) == (30, 9000)
    [session] = json.loads(run("show", "c-7", "--turn", "101", "--json", "--ledger", url).stdout)
    assert (session["id"], [turn["number"] for turn in session["turns"]]) == ("next", [101])
    for given, number, why in (
        ("one", "102", "The session 'one of many' has no turn 102. It has turns from 1 to 100: --turn 100."),
        ("c-7", "102", "The conversation 'c-7' has no turn 102. It has turns from 1 to 101: --turn 101."),
    ):
        wrong = run("show", given, "--turn", number, "--ledger", url)
        assert (wrong.exit_code, wrong.stdout, wrong.stderr) == (2, "", f"turntrace: {why}\n")


def test_a_turn_or_trace_is_shown_with_its_neighbours_in_a_line_each(run: Run, hundred: tuple[str, list[str]]) -> None:
    url, turn_ids = hundred
    for given in (turn_ids[29], turn_ids[29][:12]):
        assert shown(run, given, url)[3:] == [
            "conversation c-7",
            "turn 29   10:00:42  completed  1.5 s  intent track",
            "turn 30  10:00:43  completed  intent track  question \u2192 answer  <- asked for",
            "9.0 s slow",
            f"trace {turn_ids[29]}",
            "turn 31   10:00:52  completed  1.5 s  intent track",
            f"3 of 100 turns; {ALL_OF_IT}",
        ]
    last = shown(run, turn_ids[99], url)[4:]
    assert [line.split("  ")[0].strip() for line in last] == [
        *("turn 99", "turn 100", "1.5 s", f"trace {turn_ids[99]}", "feedback user_feedback 0"),
        f"2 of 100 turns; {ALL_OF_IT}",
    ]
    assert len(json.loads(run("show", turn_ids[29], "--json", "--ledger", url).stdout)["turns"]) == 100


def test_what_happened_in_a_turn_is_shown_of_that_turn_alone(run: Run, office: str) -> None:
    whole = json.loads(run("show", "people", "--json").stdout)["turns"]
    first = shown(run, whole[0]["id"], office)
    assert "agent desk  500 ms" in first
    [second] = [line for line in first if line.startswith("turn 2 ")]
    assert second == "turn 2  11:26:32  interrupted  250 ms"
    assert first[-2:] == [second, "2 of 2 turns; turntrace show people shows all, with --brief a line each"]
    assert "node look_up  250 ms  attempt 2" not in shown(run, whole[1]["id"], office)


def test_a_session_is_shown_with_one_line_a_turn(run: Run, hundred: tuple[str, list[str]]) -> None:
    url, turn_ids = hundred
    found = shown(run, "one", url, options="--brief")
    at = [line for line in found if line.startswith("turn ")]
    assert len(at) == 100
    assert len(found) == 4 + 100 + 2
    assert at[8] == "turn 9    10:00:12  completed  1.5 s  intent track"
    assert at[29] == "turn 30   10:00:43  completed  9.0 s  slow  intent track"
    assert at[99].endswith("feedback user_feedback 0  intent track")
    assert sum("slow" in line for line in at) == 1
    assert found[-2:] == ["journey onboarding  connect (2 of 3)", "end  10:02:37  user_exit"]
    marked = shown(run, turn_ids[41], url, options="--brief")
    assert len(marked) == len(found)
    assert [line.split()[1] for line in marked if "<- asked for" in line] == ["42"]
    narrow = run("show", "one", "--brief", "--ledger", url, columns=40).stdout.splitlines()
    assert len([line for line in narrow if " turn " in line]) == 100
    for other in ("--json", "--context"):
        wrong = run("show", "one", "--brief", other, "--ledger", url)
        assert (wrong.exit_code, wrong.stdout) == (2, "")
        assert f"--brief and {other} show a session in two ways: give one." in wrong.stderr


def test_a_turn_or_trace_is_found_by_its_beginning(run: Run, url: str) -> None:
    with SessionTracker(url) as tracker, tracker.session(session_id="ab-session") as session:
        conversation = session.conversation("talk")
        turn_ids = []
        for _ in range(3):
            with conversation.turn("Hi") as turn:
                turn_ids.append(turn.id)
        whole = json.loads(run("show", "ab-session", "--json", "--ledger", url).stdout)["turns"]
        running = conversation.start_turn("Hi")
        for wanted in [*(turn["trace_id"] for turn in whole), *turn_ids, running.id]:
            asked = [line for line in shown(run, wanted[:10], url) if "asked for" in line]
            number = [*turn_ids, running.id].index(wanted) + 1
            assert [line.split()[1] for line in asked] == [str(number)]
        running.end()
    missing = run("show", "zz", "--ledger", url)
    assert missing.stderr == (
        "turntrace: No session, turn or trace has an id that begins with 'zz', and no conversation has that id. "
        "turntrace sessions lists the sessions.\n"
    )
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        connection.execute("UPDATE turntrace_turns SET id = 'x-' || number")
    connection.close()
    several = run("show", "x-", "--ledger", url)
    assert several.stderr == "turntrace: Several turns have ids or traces that begin with 'x-': type more of it.\n"
    assert shown(run, "x-3", url)[0].startswith("session ab-session ")


def test_a_conversation_that_runs_or_that_begins_as_a_session_does_is_found(run: Run, url: str) -> None:
    with SessionTracker(url) as tracker:
        tracker.start_session(session_id="c-10").end()
        turn = tracker.start_session(session_id="s").conversation("c-1").start_turn("Hi")
        assert shown(run, "c-1", url)[0].startswith("session s ")
        assert shown(run, turn.id, url)[0].startswith("session s ")
        assert shown(run, "c-", url)[0].startswith("session c-10 ")
        turn.end()


def test_of_a_conversation_in_many_sessions_the_latest_are_shown(run: Run, url: str) -> None:
    clock = Clock(BEGIN_NS)
    with SessionTracker(url, clock=clock) as tracker:
        for number in range(7):
            with tracker.session(session_id=f"s{number}") as session:
                session.conversation("c").start_turn("Hi").end()
            clock.advance(minutes=5)
    found = shown(run, "c", url)
    assert found[0] == "5 of 7 sessions, the latest; turntrace sessions --conversation lists all of c"
    assert [line.split()[1] for line in found if line.startswith("session ")] == ["s2", "s3", "s4", "s5", "s6"]
    assert len(json.loads(run("show", "c", "--json", "--ledger", url).stdout)) == 7


def test_an_id_that_was_hashed_is_found_as_the_app_has_it(run: Run, url: str) -> None:
    builder: Any = StateGraph(State)
    graph: Any = builder.add_node("agent", lambda _state: {}).add_edge(START, "agent")
    with SessionTracker(url) as tracker:
        config: Any = {
            "configurable": {"thread_id": "thread 1 \u00fc"},
            "metadata": {"session_id": "sess 1 \u00fc"},
            "callbacks": tracker.callbacks(),
        }
        graph.compile().invoke(asks("Hi"), config)
    for given in ("sess 1 \u00fc", "thread 1 \u00fc"):
        assert shown(run, given, url)[0].startswith("session sha256-")
    assert len(ids(run("sessions", "--ledger", url, "--conversation", "thread 1 \u00fc"))) == 1
    missing = run("show", "sess 2 \u00fc", "--ledger", url)
    assert missing.exit_code == 2
    assert "No session, turn or trace has an id that begins with 'sess 2 \u00fc', and no conv" in missing.stderr


def test_a_session_says_where_it_is_in_langfuse(
    run: Run, twice: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LangfuseServer() as server:
        for name, value in {**server.keys, "LANGFUSE_TIMEOUT": "1"}.items():
            monkeypatch.setenv(name, value)
        found = lines(run("show", "c-42", "--ledger", twice[0]))
        address = server.keys["LANGFUSE_BASE_URL"]
        for line, session_id in zip(found[-2:], ("monday", "tuesday"), strict=True):
            assert re.fullmatch(f"in Langfuse: {address}/project/[^/]+/sessions/{session_id}", line)
        assert "in Langfuse" not in run("show", "monday", "--json", "--ledger", twice[0]).stdout
    assert lines(run("show", "monday", "--ledger", twice[0]))[-1] == (
        f"in Langfuse: Sessions, by the session's id; {address} did not say which project it is in"
    )


def test_a_call_that_named_no_model_is_shown_by_the_model_that_answered(run: Run, url: str) -> None:
    class Unnamed(FakeModel):
        def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
            return {"ls_model_type": "chat"}

        @property
        def _identifying_params(self) -> dict[str, Any]:
            return {}

    def agent(_state: State) -> dict[str, Any]:
        return {"messages": [Unnamed(llm_output={"model_name": "gpt-4o-mini-2024"}).invoke("Hi")]}

    builder: Any = StateGraph(State)
    graph: Any = builder.add_node("agent", agent).add_edge(START, "agent")
    with SessionTracker(url) as tracker:
        config: Any = {"metadata": {"session_id": "s"}, "callbacks": tracker.callbacks()}
        graph.compile().invoke(asks("Hi"), config)
    [call] = [line for line in shown(run, "s", url) if line.startswith("llm ")]
    assert call.startswith("llm gpt-4o-mini-2024  ")


def test_a_turn_that_runs_says_since_when(run: Run, url: str) -> None:
    clock = Clock(BEGIN_NS)
    with SessionTracker(url, clock=clock) as tracker:
        turn = tracker.start_session(session_id="s").conversation("c").start_turn("Hi")
        found = shown(run, "s", url, BEGIN_NS + 7_000_000_000)
        turn.end()
    assert found[-3:] == ["turn 1  10:00:00  open", "has not ended, began 7.0 s ago", "open, last active 7.0 s ago"]


def test_a_session_as_json_is_whole(run: Run, office: str) -> None:
    result = run("show", "peo", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert (found["id"], found["ended_at"], found["wait_ms"], found["user_retention_days"]) == (
        "people",
        None,
        180_000,
        0,
    )
    first, second = found["turns"]
    assert (first["number"], first["status"], second["status"], second["forked_from"]) == (
        *(1, "completed", "interrupted", first["id"]),
    )
    assert [step["name"] for step in first["steps"]][:3] == ["look_up", "look_up", "refund"]
    assert first["context_window_pct"] == pytest.approx(first["context_tokens"] / first["context_limit"])
    assert second["pruned"] == []  # it began at an older checkpoint
    assert json.loads(run("show", "first", "--json").stdout)["journey_steps"][1]["stage"] == "connect"
    [given] = json.loads(run("show", "fourth", "--json").stdout)["feedback"]
    assert (given["value"], given["at"][:10]) == (0.0, "2026-01-01")


# --- users, funnels, drop-offs ----------------------------------------------------------------------------------------
def test_users_and_what_they_used(run: Run, office: str) -> None:
    hashes = {hash_user(name, KEY.encode()): name for name in ("ann", "bob", "cid", "dora", "eve")}
    by_beginning = {value[:8]: name for value, name in hashes.items()}
    for sort, names in (
        ("latest", "ann dora eve bob cid"),
        ("most-sessions", None),
        ("most-turns", "bob"),
        ("dearest", "dora"),
        ("most-dropoffs", None),
    ):
        found = [by_beginning[each] for each in ids(run("users", "--sort", sort))]
        assert sorted(found) == sorted(hashes.values())
        if names is not None:
            assert found[: len(names.split())] == names.split()
    assert {
        hashes[row["user_id"]] for row in rows(run("users", "--json", "--sort", "most-dropoffs", "--limit", "2"))
    } == {
        *("bob", "cid"),
    }
    [ann] = rows(run("users", "--json", "--limit", "1"))
    assert (ann["sessions"], ann["turns"], ann["first_at"]) == (2, 3, "2026-01-01T10:00:00.000000+00:00")
    assert ann["satisfaction"] is None
    [same] = read_csv(run("users", "--csv", "--limit", "1"))
    assert list(same) == list(ann)
    assert (same["user_id"], same["satisfaction"]) == (ann["user_id"], "")
    assert len(ids(run("users", "--channel", "web"))) == 2


def test_a_funnel_has_bars_counts_shares_and_times(run: Run, office: str) -> None:
    result = run("funnel")
    assert (result.exit_code, result.stderr) == (0, "")
    head, _, _, *stages = result.stdout.splitlines()
    assert head == "onboarding  3 users, 1 converted (33%), median 22.5 s, in turn 2"
    assert [re.sub("[\u2588\u2591]+", "|", " ".join(line.split())) for line in stages] == [
        *("1 signup | 3 100% 3 22.5 s 2", "2 connect | 2 67% 2", "3 first_answer | 0 0% 0", "converted | 1 33%"),
    ]
    bars = [line.count("\u2588") for line in stages]
    assert bars[0] > bars[1] > bars[3] > bars[2] == 0
    assert run("funnel", "onboarding").stdout == result.stdout
    [journey] = rows(run("funnel", "--json"))
    assert (journey["name"], journey["begun"], journey["converted"], journey["rate"]) == ("onboarding", 3, 1, 1 / 3)
    assert [stage["entered"] for stage in journey["stages"]] == [3, 2, 0]
    [journey] = rows(run("funnel", "onboarding", "--json", "--channel", "mobile"))
    assert [stage["entered"] for stage in journey["stages"]] == [1, 1, 0]


def test_a_funnel_tells_who_came_so_far_from_who_entered_and_narrows(run: Run, url: str) -> None:
    with SessionTracker(url) as tracker:
        for user, stages in {"ann": ["signup", "first_answer"], "bob": ["first_answer"], "cid": ["signup"]}.items():
            with tracker.session(user_id=user) as session:
                for stage in stages:
                    session.journey("onboarding", list(STAGES)).enter(stage)
    for columns in (50, 100):
        head, line, _, *table = run("funnel", "--ledger", url, columns=columns).stdout.splitlines()
        table, said = table[:4], " ".join(" ".join(table[4:]).split())
        assert said == "2 users entered the last stage; that one is converted is said by journey.convert()."
        assert head.startswith("onboarding  3 users")
        found = {row.split("  ")[0]: row for row in table}
        reached, entered = (
            {name: row[(at := line.index(column)) : at + 7].strip() for name, row in found.items()}
            for column in ("reached", "entered")
        )
        assert [*reached.values()] == ["3", "2", "2", "0"]
        assert [*entered.values()] == ["2", "0", "2", ""]
        assert [re.findall(r"\d+%", row) for row in table] == [["100%"], ["67%"], ["67%"], ["0%"]]
    assert [row["reached"] for row in read_csv(run("funnel", "--csv", "--ledger", url))] == ["3", "2", "2"]


def test_a_journey_that_nobody_began_is_said_to_be_none(run: Run, office: str) -> None:
    wrong = run("funnel", "checkout")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "No journey 'checkout' was begun in these sessions. Those that were: onboarding." in wrong.stderr
    elsewhere = "Those on record: onboarding, in sessions that are not like that: channel api."
    none = run("funnel", "--channel", "api")
    assert none.exit_code == 0
    assert none.stdout == f"No journey was begun in these sessions.\n{elsewhere}\n"
    assert rows(run("funnel", "--channel", "api", "--json")) == []
    assert elsewhere in run("funnel", "checkout", "--channel", "api").stderr
    assert "--channel fax: there are api" in run("funnel", "--channel", "fax").stdout


def test_without_any_journey_it_is_said_how_one_is_begun(run: Run, url: str) -> None:
    with SessionTracker(url) as tracker, tracker.session() as session, session.conversation("c").turn("Hi") as turn:
        begin = "turn.journey('onboarding', stages=['signup', 'done']).enter('signup')"
        for result in (run("funnel", "--ledger", url), run("funnel", "onboarding", "--ledger", url)):
            assert f"None is on record: the app begins one with {begin}." in result.output
            assert "turntrace demo" not in result.output
        turn.journey("onboarding", stages=["signup", "done"]).enter("signup")  # what it says works
    assert "onboarding  1 user" in run("funnel", "--ledger", url).stdout


def test_funnels_and_dropoffs_as_csv(run: Run, office: str) -> None:
    found = read_csv(run("funnel", "--csv"))
    assert [(row["name"], row["stage"], row["entered"]) for row in found] == [
        *(("onboarding", "signup", "3"), ("onboarding", "connect", "2"), ("onboarding", "first_answer", "0")),
    ]
    assert (found[0]["begun"], found[0]["converted"], found[0]["stayed_p50_ms"]) == ("3", "1", "22500")
    assert list(csv.reader(io.StringIO(run("funnel", "--csv", "--channel", "api").stdout))) == [list(found[0])]
    found = read_csv(run("dropoff", "--csv"))
    assert [tuple(row.values()) for row in found if row["by"] == "turn"] == [
        *(("turn", "1", "1", "0", "0.0"), ("turn", "2", "2", "1", "0.5"), ("turn", "3", "2", "1", "0.5")),
    ]
    assert {row["by"] for row in found} == {"turn", "intent", "action"}
    for command in ("funnel", "dropoff"):
        assert "give one of them" in run(command, "--csv", "--json").stderr


def test_a_fresh_app_is_told_when_sessions_end(run: Run, url: str) -> None:
    with SessionTracker(url) as tracker:
        tracker.start_session(session_id="s")
        assert run("dropoff", "--ledger", url).stdout.splitlines() == [
            "There are no ended sessions yet.",
            "1 session is open. Silence of 30 min 00 s ends a session: when its user comes back, or by turntrace "
            "sweep, which with --idle-after TIME ends those that were silent for less.",
        ]
        tracker.start_session().end()
    assert run("dropoff", "--ledger", url).stdout.startswith("0 of 1 ended session dropped off")


def test_dropoffs_by_turn_intent_and_action_with_their_rates(run: Run, office: str) -> None:
    result = run("dropoff")
    assert (result.exit_code, result.stderr) == (0, "")
    plain = [re.sub("[\u2588\u2591]+", "|", " ".join(line.split())) for line in result.stdout.splitlines()]
    assert plain[0] == "2 of 5 ended sessions dropped off (40%)."
    for row in ("1 | 1 0 0%", "2 | 2 1 50%", "3 | 2 1 50%", "setup | 3 2 67%", "asked_question | 3 2 67%"):
        assert row in plain
    assert [line for line in plain if line.endswith("ended drop-offs rate")] == [
        *(
            "turn of conversation ended drop-offs rate",
            "last intent ended drop-offs rate",
            "the agent had ended drop-offs rate",
        ),
    ]
    found = json.loads(run("dropoff", "--json", "--channel", "web").stdout)
    assert found["by_turn"] == [
        {"at": "1", "ended": 1, "dropoffs": 0, "rate": 0.0},
        {"at": "2", "ended": 1, "dropoffs": 0, "rate": 0.0},
        {"at": "3", "ended": 1, "dropoffs": 1, "rate": 1.0},
    ]
    assert set(found) == {"by_turn", "by_intent", "by_action"}
    assert run("dropoff", "--channel", "fax").stdout.startswith("There are no ended sessions like that: channel fax.\n")


# --- the report -------------------------------------------------------------------------------------------------------
def test_a_report_is_written(run: Run, office: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    result = run("report", "-o", str(file), "--channel", "web")
    assert (result.exit_code, result.stderr) == (0, "")
    assert str(file) in result.stdout
    page = file.read_text(encoding="utf-8")
    assert "</html>" in page
    assert "onboarding" in page


def test_a_report_of_those_who_were_unsatisfied(run: Run, office: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    assert run("report", "-o", str(file), "--unsatisfied").exit_code == 0
    page = file.read_text(encoding="utf-8")
    assert "feedback <strong><bdi>below 50%" in page
    assert "fourth" in page
    assert "second" not in re.sub("seconds?", "", page)


def test_a_report_of_nothing_says_so_and_is_written(run: Run, office: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    result = run("report", "-o", str(file), "--channel", "webb")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "There are no sessions like that: channel webb.",
        "No session has --channel webb: there are api, mobile, slack, web.",
    ]
    assert str(file) in result.stdout
    assert file.exists()


def test_a_report_needs_to_know_where_it_goes(run: Run, office: str, tmp_path: Path) -> None:
    for options in ((), ("-o", str(tmp_path / "x.html"), "--serve")):
        wrong = run("report", *options)
        assert (wrong.exit_code, wrong.stdout) == (2, "")
        assert "turntrace report -o report.html, or turntrace report --serve" in wrong.stderr
    nowhere = run("report", "-o", str(tmp_path / "none" / "report.html"))
    assert nowhere.exit_code == 2
    assert nowhere.stderr.count("\n") == 1


# --- the demo ---------------------------------------------------------------------------------------------------------
def test_the_demos_sessions_can_all_be_shown(run: Run, url: str) -> None:
    with SessionTracker(url) as tracker:
        found = support_desk.run(tracker)
    for session_id in found:
        for columns in (40, 60, 80, 120):
            result = run("show", session_id, "--ledger", url, columns=columns)
            assert result.exit_code == 0
            assert max(map(len, result.stdout.splitlines())) <= max(columns, 42)
    assert {row["id"] for row in rows(run("sessions", "--json", "--ledger", url))} == set(found)


# --- what is wrong with a ledger --------------------------------------------------------------------------------------
def test_a_file_that_is_no_ledger_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("This is no database at all. " * 100)
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE turntrace_sessions (id INTEGER)")
    other.close()
    commands = ["sessions", "show x", "users", "funnel", "dropoff", "sweep", "report -o x.html", "export --status"]
    for name, command in (*(("text.db", each) for each in commands), ("other.db", "sessions"), ("other.db", "show x")):
        result = run(*command.split(), "--ledger", f"sqlite:///{tmp_path / name}")
        assert (result.exit_code, result.stdout) == (2, ""), command
        assert result.stderr.startswith(f"turntrace: The ledger at sqlite:///{tmp_path / name} failed: ")
        assert result.stderr.count("\n") == 1


def test_a_postgresql_that_refuses_is_said_with_what_to_do(run: Run) -> None:
    url = "postgresql+psycopg://me:hunter2@127.0.0.1:1/db"
    for command in ("sessions", "show x", "demo", "sweep"):
        result = run(*command.split(), "--ledger", url)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "failed: Connection refused. Is the server running, at that host and port? Start it." in result.stderr
        assert "has room" not in result.stderr
        assert "hunter2" not in result.stderr
        assert result.stderr.count("\n") == 1
    with pytest.raises(LedgerError) as caught:
        SessionTracker(url)
    assert caught.value.__suppress_context__  # no traceback of SQLAlchemy's
    assert caught.value.__cause__ is None


def test_a_database_or_a_user_that_there_is_not_is_said_with_how_to_make_it(run: Run) -> None:
    with postgres.server() as url:
        where = make_url(url)
        for wrong, advice in (
            (where.set(database="nope"), "Make the database, as by: createdb nope."),
            (where.set(username="nobody"), "Make the user, as by: createuser nobody."),
        ):
            result = run("sessions", "--ledger", wrong.render_as_string(hide_password=False))
            assert result.exit_code == 2
            assert advice in result.stderr


def test_asking_changes_nothing(run: Run, office: str) -> None:
    def everything() -> list[str]:
        with sqlite3.connect(office.removeprefix("sqlite:///")) as connection:
            found = list(connection.iterdump())
        connection.close()
        return found

    before = everything()
    for command in ("sessions", "users", "funnel", "dropoff", "show first", "show people --json", "sessions --csv"):
        assert run(*command.split()).exit_code == 0
    assert everything() == before
