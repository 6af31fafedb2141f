"""``turntrace doctor``: what it finds when all is well and when something is not, and what it says to do."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import fresh
from loopback import SCORES, Failure, LangfuseServer
from turntrace import SessionTracker
from turntrace.cli.doctor import doctor
from turntrace.doctor import Check, Comparison, LedgerTurn, read_turns, run_checks, verify
from turntrace.errors import ConfigurationError, DeliveryError, IdentityError, LedgerError
from turntrace.export import LangfuseServer as Address
from turntrace.ledger import Ledger
from turntrace.records import SessionFacts
from turntrace.settings import LangfuseSettings
from turntrace.summaries import SessionSummary

SECRET = LangfuseServer.secret_key
TRACKS = """
from turntrace import SessionTracker
from turntrace.demo import support_desk
tracker = SessionTracker()
support_desk.run(tracker)
with tracker.session(session_id="mine") as session:
    session.journey("sale", ["seen", "bought"]).enter("seen")
    for number in range(2):
        with session.conversation("c1").turn("Hello") as turn:
            step = turn.open_step("agent", "chain")
            turn.close_step(step)
        turn.feedback(bool(number), name="helpful")
    turn.feedback(0.25)
    session.feedback(0.5, name="ease")
tracker.shutdown()
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def server() -> Iterator[LangfuseServer]:
    with LangfuseServer() as server:
        yield server


@pytest.fixture
def keys(server: LangfuseServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the keys of the server, changed as is asked for; they are set already."""

    def set_keys(**changed: str) -> None:
        for name, value in {**server.keys, **changed}.items():
            monkeypatch.setenv(name, value)

    monkeypatch.setenv("COLUMNS", "140")
    set_keys()
    return set_keys


def made(url: str) -> None:
    """Make a ledger with a session in it, of which nothing waits."""
    with SessionTracker(url, outbox=False) as tracker:
        session = tracker.start_session(session_id="mine")
        with session.conversation("c1").turn("Hello"):
            pass
        session.end()
    ledger = Ledger(url)
    with ledger.writing() as writer:
        for item in ledger.outbox():
            writer.remove(item.id)
    ledger.close()


def checks(url: str, **options: Any) -> dict[str, Check]:
    found = {check.name: check for check in run_checks(url, **options)}
    assert SECRET not in repr(found)
    assert all(check.todo for check in found.values() if check.ok is False)
    return found


def marks(found: dict[str, Check], ok: bool | None) -> set[str]:
    return {name for name, check in found.items() if check.ok is ok}


# --- the checks -------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("keys")
def test_all_is_well(server: LangfuseServer, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as without_keys:
        for name in server.keys:
            without_keys.delenv(name)
        made(url)
    assert doctor(url, None) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert [line.split()[:2] for line in lines[:-2]] == [
        ["ok", name]
        for name in (
            *("keys", "server", "clock", "project", "scores", "ledger", "outbox", "encodings"),
            *("langfuse", "langgraph", "langchain-core", "python"),
        )
    ]
    for words in ("Langfuse 4.16.0 answers at " + server.url, "project Local Project", "schema version", "1 session"):
        assert words in shown
    assert lines[-1] == "All is well."
    assert SECRET not in shown
    assert server.spans() == []
    assert server.scores() == {}


def test_without_keys_spans_wait_which_is_no_problem(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(url, None) == 0
    shown = capsys.readouterr().out
    assert "note     keys" in shown
    assert "spans wait in the ledger" in shown
    assert "what to do: To send them, set LANGFUSE_PUBLIC_KEY" in shown
    assert shown.splitlines()[-1] == "All is well, with 3 notes."
    assert not Path(url.removeprefix("sqlite:///")).exists()
    assert not Path(url.removeprefix("sqlite:///")).parent.joinpath("ledger.db-wal").exists()


@pytest.mark.parametrize(
    ("changed", "found", "todo"),
    [
        ({"LANGFUSE_SECRET_KEY": ""}, "LANGFUSE_PUBLIC_KEY is set and LANGFUSE_SECRET_KEY is not", "Set LANGFUSE_SEC"),
        ({"LANGFUSE_PUBLIC_KEY": ""}, "LANGFUSE_SECRET_KEY is set and LANGFUSE_PUBLIC_KEY is not", "Set LANGFUSE_PUB"),
        ({"LANGFUSE_SECRET_KEY": f"{SECRET}\n"}, "LANGFUSE_SECRET_KEY has a blank, a line break", "as it is"),
        ({"LANGFUSE_PUBLIC_KEY": SECRET, "LANGFUSE_SECRET_KEY": "pk-lf-test"}, "are swapped", "pk-..."),
        ({"LANGFUSE_SAMPLE_RATE": "often"}, "LANGFUSE_SAMPLE_RATE is 'often'. Allowed is", "Set that variable"),
    ],
)
def test_keys_that_cannot_be_right_are_no_reason_to_ask(
    keys: Callable[..., None], server: LangfuseServer, url: str, changed: dict[str, str], found: str, todo: str
) -> None:
    keys(**changed)
    check = checks(url)["keys"]
    assert check.ok is False
    assert found in check.found
    assert todo in check.todo
    assert server.requests == []


def test_wrong_keys(keys: Callable[..., None], url: str, capsys: pytest.CaptureFixture[str]) -> None:
    keys(LANGFUSE_SECRET_KEY="sk-lf-of-another")
    found = checks(url)
    assert marks(found, False) == {"project"}
    assert "401" in found["project"].found
    assert "Set LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY" in found["project"].todo
    assert "scores" not in found
    assert doctor(url, None) == 1
    shown = capsys.readouterr().out
    assert "problem  project" in shown
    assert "1 problem, 1 note." in shown
    assert "sk-lf-of-another" not in shown


@pytest.mark.usefixtures("keys")
def test_the_server_is_away(server: LangfuseServer, url: str) -> None:
    server.stop()
    found = checks(url)
    assert marks(found, False) == {"server"}
    assert "cannot be reached" in found["server"].found
    assert "Set LANGFUSE_BASE_URL" in found["server"].todo
    assert {"clock", "project", "scores"}.isdisjoint(found)


def test_no_password_of_a_url_is_shown(keys: Callable[..., None], server: LangfuseServer, url: str) -> None:
    keys(LANGFUSE_BASE_URL=server.url.replace("//", "//me:hidden@"))
    server.stop()
    assert "hidden" not in repr(checks(url))


@pytest.mark.parametrize("body", ["no JSON", "[]", '{"data": 1}', "{}"])
@pytest.mark.parametrize("path", ["/api/public/health", "/api/public/projects"])
@pytest.mark.usefixtures("keys")
def test_what_answers_is_no_langfuse(server: LangfuseServer, url: str, path: str, body: str) -> None:
    server.fail(Failure("status", 200, body=body), path=path)
    assert marks(checks(url), False) == {"server" if "health" in path else "project"}


@pytest.mark.usefixtures("keys")
def test_a_server_that_is_not_well_has_no_wrong_keys(server: LangfuseServer, url: str) -> None:
    server.fail(Failure("status", 503), path="/projects")
    assert "See whether the server is well" in checks(url)["project"].todo


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    ("skew_s", "ok", "words"), [(0, True, "within 2 s"), (-20, None, "20 s behind"), (300, False, "300 s ahead of")]
)
def test_the_clock(server: LangfuseServer, url: str, skew_s: float, ok: bool | None, words: str) -> None:
    server.clock_skew_s = skew_s
    clock = checks(url)["clock"]
    assert clock.ok is ok
    assert all(word in clock.found for word in words.split() if not word.isdecimal())  # to a second or so
    assert ("timedatectl" in clock.todo) is (ok is not True)


@pytest.mark.usefixtures("keys")
def test_the_form_of_scores(server: LangfuseServer, url: str) -> None:
    assert "one in a request" in checks(url)["scores"].found
    server.score_arrays = True
    assert checks(url)["scores"] == Check("scores", True, "many in a request")
    server.fail(Failure("status", 400, body='{"message": "Array must contain at least 1 element"}'), path=SCORES)
    assert checks(url)["scores"].found == "many in a request"
    server.recover()
    server.fail(Failure("status", 500, body="it broke"), path=SCORES)
    assert checks(url)["scores"].ok is None
    assert server.scores() == {}


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("LANGFUSE_TRACING_ENABLED", "false", "is false"), ("LANGFUSE_SAMPLE_RATE", "0.5", "is 0.5")],
)
def test_that_spans_are_not_all_made_is_said(
    url: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    check = checks(url)["tracing"]
    assert check.ok is None
    assert f"{variable} {words}" in check.found
    assert variable in check.todo


def test_the_ledger(url: str, tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    assert checks(url)["ledger"].ok is None
    assert not file.exists()
    assert checks("sqlite://")["ledger"].ok is None
    for wrong in ("nonsense", "mysql://host/db"):
        assert checks(wrong)["ledger"].ok is False
    file.write_bytes(b"")
    assert checks(url)["ledger"].ok is None
    assert file.read_bytes()[:1] in (b"", b"S")  # no tables were made
    made(url)
    found = checks(url)
    assert (found["ledger"].ok, found["outbox"].ok) == (True, True)
    for version, ok, words in (("1", None, "of an older turntrace"), ("99", False, "99"), ("x", False, "version x")):
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("UPDATE turntrace_meta SET value = ? WHERE key = 'schema_version'", (version,))
            connection.commit()
        found = checks(url)
        assert found["ledger"].ok is ok
        assert words in found["ledger"].found
        assert "outbox" not in found
    with closing(sqlite3.connect(file)) as connection:  # and it was not brought up
        assert connection.execute("SELECT value FROM turntrace_meta WHERE key = 'schema_version'").fetchone() == ("x",)
    other = tmp_path / "other.db"
    other.write_bytes(b"no database" * 1000)
    assert "not a database" in checks(f"sqlite:///{other}")["ledger"].found


def test_what_waits_is_a_note_and_what_was_set_apart_a_problem(url: str, tmp_path: Path) -> None:
    ledger = Ledger(url)
    with ledger.writing() as writer:
        writer.put("spans", b"x", items=3, created_ns=1)
    ledger.close()
    outbox = checks(url)["outbox"]
    assert (outbox.ok, outbox.found) == (None, "3 spans and 0 scores wait")
    assert "turntrace export --status" in outbox.todo
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        columns = "(kind, body, items, created_ns, why)"
        connection.execute(f"INSERT INTO turntrace_refused {columns} VALUES ('spans', 'x', 2, 1, '400: no')")
        connection.commit()
    outbox = checks(url)["outbox"]
    assert outbox.ok is False
    assert "2 were set apart" in outbox.found


@pytest.mark.parametrize("found", ["4.13.9", "6.0.0", None])
def test_a_version_that_is_not_supported(url: str, found: str | None) -> None:
    def version_of(name: str) -> str:
        if name == "langfuse":
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found
        return metadata.version(name)

    check = checks(url, version_of=version_of)["langfuse"]
    assert check.ok is False
    assert check.todo == 'pip install "langfuse>=4.14,<6"'
    assert (found or "not installed") in check.found
    assert checks(url)["langfuse"].ok is True


# --- a session against Langfuse ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, LangfuseServer]]:
    """Give a ledger, and a server that has all of it."""
    url = f"sqlite:///{tmp_path_factory.mktemp('tracked') / 'ledger.db'}"
    with LangfuseServer() as server:
        fresh.run(TRACKS, TURNTRACE_LEDGER_URL=url, **server.keys)
        yield url, server


@pytest.fixture
def there(tracked: tuple[str, LangfuseServer], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, LangfuseServer]]:
    """Give them, with the keys set and what the server has put back afterwards."""
    url, server = tracked
    monkeypatch.setenv("COLUMNS", "140")
    for name, value in server.keys.items():
        monkeypatch.setenv(name, value)
    server.spans()
    kept = dict(server.store._spans), dict(server.store.scores)
    yield url, server
    server.recover()
    server.store._spans, server.store.scores = kept


Sides = tuple[SessionSummary, list[LedgerTurn], list[dict[str, Any]], list[dict[str, Any]]]


def sides_of(url: str, server: LangfuseServer, session_id: str | None = None) -> Sides:
    words: Any = {name.removeprefix("LANGFUSE_").lower(): value for name, value in server.keys.items()}
    ledger, address = Ledger(url), Address(LangfuseSettings(**words))
    try:
        session = ledger.session(session_id or max(ledger.sessions(), key=lambda each: each.total_tokens).id)
        assert session is not None
        there = list(address.observations(session.id)), list(address.scores(session_id=session.id))
        return session, read_turns(ledger, session.id), *there
    finally:
        ledger.close()
        address.close()


def wrong(compared: list[Comparison]) -> dict[str, tuple[str, ...]]:
    assert all(each.ok is not bool(each.differences) or each.what == "observations" for each in compared)
    return {each.what: each.differences for each in compared if not each.ok}


def test_what_has_arrived_agrees(there: tuple[str, LangfuseServer], capsys: pytest.CaptureFixture[str]) -> None:
    url, server = there
    ledger = Ledger(url)
    sessions = ledger.sessions()
    ledger.close()
    assert len(sessions) == 6
    for session in sessions:
        assert doctor(url, session.id[:12]) == 0
        shown = capsys.readouterr().out
        assert f"session {session.id}" in shown
        assert "The ledger and Langfuse agree." in shown
        assert "differs" not in shown
    session, _, observations, _ = sides_of(url, server)
    assert session.input_tokens > 0
    assert doctor(url, session.id) == 0
    shown = capsys.readouterr().out
    for what in (str(len(observations)), f"{session.input_tokens:,}", f"{session.output_tokens:,}"):
        assert what in shown


def test_a_span_that_is_missing_is_named(there: tuple[str, LangfuseServer], capsys: pytest.CaptureFixture[str]) -> None:
    url, server = there
    session, turns, observations, scores = sides_of(url, server)
    turn, step = next((turn, step) for turn in turns for step in turn.steps if step.kind == "generation")
    server.store.forget(step.span_id)
    assert doctor(url, session.id) == 1
    shown = capsys.readouterr().out
    assert f"- {turn.name}: {turn.spans} spans here, {turn.spans - 1} in Langfuse; not there: generation" in shown
    assert step.span_id in shown
    assert f"input tokens: {session.input_tokens:,} here" in shown
    assert "a second or two" in shown
    found = wrong(verify(session, turns, [each for each in observations if each["id"] != step.span_id], scores))
    assert set(found) == {
        *("observations", "observations of each turn", "tokens of each turn"),
        *("input tokens", "output tokens"),
    }


def test_a_score_that_is_missing_or_differs_is_named(
    there: tuple[str, LangfuseServer], capsys: pytest.CaptureFixture[str]
) -> None:
    url, server = there
    by_name = {score["name"]: score for score in server.scores().values() if score.get("sessionId") == "mine"}
    del server.store.scores[by_name["session.total_turns"]["id"]]
    other = by_name["session.end_reason"]
    del server.store.scores[other["id"]]
    server.store.put_score({**other, "id": "another-id"})
    server.store.put_score({**by_name["dropoff.detected"], "value": 1})
    assert doctor(url, "mine") == 1
    shown = capsys.readouterr().out
    assert "- the score session.total_turns is not there" in shown
    assert f"- the score session.end_reason has the id another-id and not {other['id']}" in shown
    assert "- the score dropoff.detected is false here and true in Langfuse" in shown
    assert shown.count("\n- ") == 3


def test_feedback_on_turns_is_compared_too(
    there: tuple[str, LangfuseServer], capsys: pytest.CaptureFixture[str]
) -> None:
    url, server = there
    assert doctor(url, "mine") == 0
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith("score ")]
    assert [row[1] for row in rows if "c1" in row] == ["helpful", "helpful", "user_feedback"]
    assert ["score", "ease", "0.5", "0.5", "ok"] in rows
    second = {turn.summary.number: turn.summary.trace_id for turn in sides_of(url, server, "mine")[1]}[2]
    rated = {score["name"]: score for score in server.scores().values() if score.get("traceId") == second}
    assert rated["helpful"]["value"] == 1
    server.store.put_score({**rated["helpful"], "value": 0})
    del server.store.scores[rated["user_feedback"]["id"]]
    assert doctor(url, "mine") == 1
    shown = capsys.readouterr().out
    assert "- the score helpful of turn 2 of the conversation c1 is 1 here and false in Langfuse" in shown
    assert "- the score user_feedback of turn 2 of the conversation c1 is not there" in shown
    assert shown.count("\n- ") == 2


def test_what_waits_is_said(there: tuple[str, LangfuseServer], url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as without_keys:
        for name in there[1].keys:
            without_keys.delenv(name)
        fresh.run(TRACKS.replace("support_desk.run(tracker)", ""), TURNTRACE_LEDGER_URL=url)
    ledger = Ledger(url)
    ledger.close()
    there[1].store._spans, there[1].store.scores = {}, {}
    assert doctor(url, "mine") == 1
    shown = capsys.readouterr().out
    assert "7 spans of it still wait in the outbox: turntrace export" in shown
    assert "scores of it still wait in the outbox" in shown
    assert "a second or two" not in shown
    assert "session.start is not there" in shown
    assert "its trace is not there" in shown


def test_what_cannot_be_asked(there: tuple[str, LangfuseServer], url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked_url, server = there
    with closing(Ledger(f"{url}.commas")) as ledger:
        ledger.open_session(SessionFacts(id="a,b", channel="web", type="chat"), idle_ns=1, given_id=True)
    with pytest.raises(DeliveryError, match="it takes an id with a comma for several ids"):
        doctor(f"{url}.commas", "a,b")
    with pytest.raises(IdentityError, match="No session has an id that begins with"):
        doctor(tracked_url, "nobody")
    with pytest.raises(LedgerError, match="There is no ledger"):
        doctor(url, "mine")
    server.fail(Failure("status", 500), path="observations")
    with pytest.raises(DeliveryError, match="500"):
        doctor(tracked_url, "mine")
    server.recover()
    server.fail(Failure("status", 200, body="[]"), path="scores")
    with pytest.raises(DeliveryError, match="does not answer as a Langfuse"):
        doctor(tracked_url, "mine")
    monkeypatch.delenv("LANGFUSE_SECRET_KEY")
    with pytest.raises(ConfigurationError, match="LANGFUSE_SECRET_KEY"):
        doctor(tracked_url, "mine")


def test_turns_that_run_and_those_of_a_process_that_died(tracked: tuple[str, LangfuseServer]) -> None:
    session, turns, observations, scores = sides_of(*tracked, "mine")
    assert wrong(verify(session, turns, observations, scores)) == {}
    is_open = replace(session, ended_ns=None, end_reason=None)
    # A session that went on again: the end that is there is of no account, and neither are the scores.
    names = [each.what for each in verify(is_open, turns, observations, scores)]
    assert "session.end" not in names
    assert not [name for name in names if name.startswith("score ")]
    assert wrong(verify(is_open, turns, observations, [])) == {}
    first, *others = turns
    running = replace(first, summary=replace(first.summary, status="open"), spans=0, steps=())
    assert wrong(verify(is_open, [running, *others], observations, [])) == {}
    died = replace(first, summary=replace(first.summary, status="abandoned"), spans=1, steps=())
    assert wrong(verify(is_open, [died, *others], observations, [])) == {}


def test_observations_of_no_turn_and_without_the_id_are_named(tracked: tuple[str, LangfuseServer]) -> None:
    session, turns, observations, scores = sides_of(*tracked, "mine")
    stray = {"id": "1" * 16, "traceId": "2" * 32, "name": "stray", "sessionId": "other", "usageDetails": {"input": 3}}
    found = wrong(verify(session, turns, [*observations, stray, *observations], scores))
    assert found["observations"] == (f"stray ({'1' * 16}, trace {'2' * 32}) is in no turn of the ledger",)
    assert found["input tokens"] == ("input tokens: 0 here, 3 in Langfuse",)
    assert "does not carry the session's id" in found["with the session's id"][0]
    many = [{**stray, "id": f"{number:016x}"} for number in range(30)]
    assert verify(session, turns, [*observations, *many], scores)[0].differences[-1] == (
        "and 10 more are in no turn of the ledger"
    )


def test_numbers_need_not_agree_to_the_last_digit(tracked: tuple[str, LangfuseServer]) -> None:
    session, turns, observations, scores = sides_of(*tracked)
    assert session.total_cost_usd > 0
    for score in scores:
        if score["name"] == "session.total_cost_usd":
            score["value"] *= 1 + 1e-9
    assert wrong(verify(session, turns, observations, scores)) == {}
    for score in scores:
        score["value"] = {bool: 1.5, str: "another word"}.get(type(score["value"]), 777)
    found = [each for each in verify(session, turns, observations, scores) if each.what.startswith("score ")]
    assert len(found) >= 8
    assert [each for each in found if each.ok] == []
