"""Secrets are planted in all that an app hands over, every path is gone, and every byte that leaves is searched.

What is planted where is in `planted_paths`, by the list `PATHS`; how it is searched is in `planted`.
"""

import base64
import gzip
import hashlib
import html
import json
import sqlite3
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit

import pytest
from opentelemetry.sdk.trace import TracerProvider
from sqlalchemy import create_engine, event

from command_line import runner
from loopback import OTLP, SCORES, SECRET_KEY, LangfuseServer
from planted import Logs, Secrets, Wire
from planted_paths import PATHS, Life, transcript_of
from planted_paths import Path as PlantedPath
from turntrace import ContentPolicy, SessionTracker
from turntrace import attributes as a
from turntrace.cli.main import app
from turntrace.export import from_otlp
from turntrace.ledger import Ledger, engine
from turntrace.testing import Capture, outbox_spans

CONTENT = ("roots", "steps", "outbox", "file", "log of the database")
"""The places where there is what a policy lets out, and nothing else."""

OTHERS_LOGS = ("langgraph", "langchain")
"""What LangGraph itself logs, as the errors of nodes that it tries again, is none of turntrace's doing."""


def withholding(text: str) -> str:
    raise LookupError(f"no words for {text}")


POLICIES: dict[str, Callable[[Secrets], ContentPolicy]] = {
    "metadata": lambda s: ContentPolicy(),
    "turn": lambda s: ContentPolicy("turn"),
    "full": lambda s: ContentPolicy("full"),
    "turn, redacted": lambda s: ContentPolicy("turn", redact=s.replaced),
    "full, redacted": lambda s: ContentPolicy("full", redact=s.replaced),
    "full, with a redactor that fails": lambda s: ContentPolicy("full", redact=withholding),
}


LIFE = (
    "callback only, astream",
    "blocks of a session and a turn",
    "a node that fails",
    "an interrupt and its answer, here and by another process",
    "pruning by Summarize",
    "feedback with comments on a turn, a session and by id",
    "journeys and intents, which are recorded as they are said",
    "the replay of transcripts, good lines and malformed ones",
)
"""Paths that together are about all that an app does: what is shown and sent is searched after these."""

CASES = [(path, policy) for path in PATHS for policy in POLICIES if policy != "turn, redacted" or path in LIFE]


def allowed(policy: str, path: PlantedPath) -> set[str]:
    if policy == "turn":
        return set(path.turn)
    return set(path.turn | path.full) if policy == "full" else set()


@dataclass
class Places:
    """All places that the bytes of a life reach."""

    life: Life
    logs: Logs

    def everything(self) -> dict[str, bytes]:
        """Write down what has ended, and return every byte by its place."""
        spans = self.life.capture.spans()
        ledger = Ledger(self.life.url)
        try:
            places = {
                "roots": "\n".join(span.to_json() for span in spans if span.name == a.SPAN_TURN).encode(),
                "steps": "\n".join(span.to_json() for span in spans if span.name != a.SPAN_TURN).encode(),
                "outbox": b"\n".join(item.body for item in ledger.outbox()) + repr(outbox_spans(ledger)).encode(),
                "file": self.files(),  # with what is in the write-ahead log and the shared memory now
                "other tables": self.tables(),
                "told": "\n".join(self.life.told).encode(),
            }
        finally:
            ledger.close()
        self.life.capture.close()
        places["file"] += self.files()
        return places | self.logged()

    def logged(self) -> dict[str, bytes]:
        of_database = [line for line in self.logs.lines if line.startswith("sqlalchemy")]
        rest = [line for line in self.logs.lines if not line.startswith((*OTHERS_LOGS, "sqlalchemy"))]
        return {"log": "\n".join(rest).encode(), "log of the database": "\n".join(of_database).encode()}

    def files(self) -> bytes:
        return b"".join(file.read_bytes() for file in sorted(self.life.folder.glob("ledger.db*")))

    def tables(self) -> bytes:
        """Return the rows of the ledger but for what waits to be sent."""
        with closing(sqlite3.connect(self.life.folder / "ledger.db")) as connection:
            names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            kept = [name for name in names if name not in ("turntrace_outbox", "turntrace_refused")]
            return repr([connection.execute(f"SELECT * FROM {name}").fetchall() for name in kept]).encode()


@pytest.fixture
def secrets() -> Secrets:
    return Secrets()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a ledger without anything in it, since making one takes as long as most paths."""
    path = tmp_path_factory.mktemp("empty") / "ledger.db"
    Ledger(f"sqlite:///{path}").close()
    return path.read_bytes()


@pytest.fixture
def places(secrets: Secrets, capture: Capture, tmp_path: Path, empty: bytes) -> Iterator[Callable[[str], Places]]:
    """Make the life of a process under a policy, with all that is logged in it."""
    logs = Logs()

    def live(policy: str) -> Places:
        folder = tmp_path / "life"
        folder.mkdir()
        (folder / "ledger.db").write_bytes(empty)
        return Places(Life(secrets, POLICIES[policy](secrets), capture, folder), logs)

    with logs.of_everybody():
        yield live


# --- the search -------------------------------------------------------------------------------------------------------
def words_of(text: str) -> bytes:
    return text.encode()


FORMS: dict[str, Callable[[str], bytes]] = {
    "raw": words_of,
    "JSON": lambda text: json.dumps({"a": text}).encode(),
    "JSON that keeps scripts": lambda text: json.dumps({"a": text}, ensure_ascii=False).encode(),
    "JSON in JSON": lambda text: json.dumps({"a": json.dumps([text])}).encode(),
    "JSON that keeps scripts, in JSON": lambda text: json.dumps({"a": json.dumps([text], ensure_ascii=False)}).encode(),
    "a URL": lambda text: f"https://example.com/{quote(text, safe='')}".encode(),
    "a query": lambda text: f"a={quote_plus(text)}&b=1".encode(),
    "baggage": lambda text: f"baggage: user.id={quote_plus(text)}".encode(),
    "HTML": lambda text: f"<p title='{html.escape(text)}'>".encode(),
    "HTML that keeps quotes": lambda text: html.escape(text, quote=False).encode(),
    "JSON in HTML": lambda text: html.escape(json.dumps(text)).encode(),
    "Python": lambda text: repr([text]).encode(),
    "Python, with single quotes in it": lambda text: repr(["it's", f"it's {text}"]).encode(),
    "Python, with double quotes in it": lambda text: repr(f'a "b" {text}').encode(),
    "Python, with both in it": lambda text: ascii(f"""a "b" 'c' {text}""").encode(),
    "JSON in Python": lambda text: repr({"a": json.dumps({"it's": text}, ensure_ascii=False)}).encode(),
    "JSON in Python's bytes": lambda text: repr((1, json.dumps({"it's": text}, ensure_ascii=False).encode())).encode(),
    "Python's bytes": lambda text: repr(text.encode()).encode(),
    "base64": lambda text: base64.b64encode(f"x{text}yz".encode()),
    "base64, otherwise aligned": lambda text: base64.urlsafe_b64encode(f"xy{text}".encode()),
    "hexadecimal": lambda text: text.encode().hex().encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "gzip": lambda text: b"head" + gzip.compress(text.encode()) + b"tail",
    "zlib": lambda text: b"head" + zlib.compress(text.encode()) + b"tail",
    "gzip in base64": lambda text: b'"' + base64.b64encode(gzip.compress(json.dumps(text).encode())) + b'"',
}


@pytest.mark.parametrize("half", [0, 1], ids=["letters", "what is escaped"])
@pytest.mark.parametrize("form", FORMS)
def test_the_search_finds_a_secret_in_any_form(form: str, half: int, secrets: Secrets) -> None:
    text = secrets.halves("a")[half]
    assert secrets.found_in(b"before" + FORMS[form](text) + b"after") == {"a"}
    assert secrets.found_in(FORMS[form](Secrets()["a"])) == set()


def test_the_search_finds_parts_of_secrets_and_hashes_without_a_key(secrets: Secrets) -> None:
    letters, _ = secrets.halves("a")
    assert secrets.found_in(letters[:-2].encode()) == {"?"}
    assert secrets.found_in(hashlib.sha256(secrets["user"].encode()).hexdigest()[:32].encode()) == {"user, hashed"}


# --- every path, under every policy -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("path", "policy"), CASES)
def test_what_the_policy_lets_out_leaves_and_nothing_else(
    path: str, policy: str, lenient: None, secrets: Secrets, places: Callable[[str], Places], capfd: Any
) -> None:
    here = places(policy)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        PATHS[path].run(here.life)
        everything = here.everything()
    printed = capfd.readouterr()
    everything |= {"stdout": printed.out.encode(), "stderr": printed.err.encode()}
    everything["warnings"] = "\n".join(str(each) for each in warned).encode()
    found = {place: secrets.found_in(blob) for place, blob in everything.items()}
    may = allowed(policy, PATHS[path])
    elsewhere = {place: what for place, what in found.items() if what and place not in CONTENT}
    assert elsewhere == {}, f"where none is to be: {elsewhere}"
    shown = found["roots"] | found["steps"] | found["outbox"]
    assert shown == may, f"too much: {shown - may}, not found: {may - shown}"
    kept = (found["file"] | found["log of the database"]) - ({"?"} if may else set())  # which are cut anywhere
    assert kept <= may, f"too much: {kept - may}"
    if policy == "turn":
        assert found["steps"] == set()


# --- what is shown and sent of a whole life ---------------------------------------------------------------------------
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("sessions",),
    ("sessions", "--json"),
    ("sessions", "--csv"),
    ("users",),
    ("users", "--json"),
    ("show", "SESSION"),
    ("show", "SESSION", "--json"),
    ("show", "SESSION", "--context"),
    ("funnel", "onboarding"),
    ("funnel", "onboarding", "--json"),
    ("dropoff",),
    ("dropoff", "--json"),
    ("report", "-o", "REPORT"),
    ("replay", "TALKS"),
    ("replay", "TALKS", "--ledger", "OTHER"),
    ("replay", "TALKS", "--ledger", "OTHER", "--context-limit", "4000", "--concurrency", "2"),
    ("sweep",),
    ("export", "--status"),
    ("doctor",),
    ("export",),
    ("doctor", "--verify", "SESSION"),
    ("export", "--status"),
)


@pytest.fixture
def server() -> Iterator[LangfuseServer]:
    with LangfuseServer() as server:
        yield server


@pytest.mark.parametrize("policy", ["metadata", "turn", "full", "full, redacted"])
def test_what_is_shown_and_sent_of_a_whole_life(
    policy: str,
    lenient: None,
    secrets: Secrets,
    places: Callable[[str], Places],
    server: LangfuseServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = places(policy)
    may: set[str] = set()
    for path in LIFE:
        PATHS[path].run(here.life)
        may |= allowed(policy, PATHS[path])
    here.life.capture.spans()
    with SessionTracker(here.life.url, outbox=True, tracer_provider=TracerProvider()) as tracker:
        sessions = [session.id for session in tracker.ledger.sessions()]
        monkeypatch.setenv("TURNTRACE_USER_HASH_KEY", secrets["hash key"])
        # No command takes a redactor.
        monkeypatch.setenv("TURNTRACE_CONTENT", "metadata" if "redacted" in policy else policy)
        monkeypatch.setenv("TURNTRACE_LEDGER_URL", here.life.url)
        report, talks = here.life.folder / "report.html", transcript_of(secrets, here.life.folder / "talks.jsonl")
    other = here.life.folder / "other.db"
    with Wire(urlsplit(server.url).port or 0) as wire:
        for name, value in {**server.keys, "LANGFUSE_BASE_URL": wire.url}.items():
            monkeypatch.setenv(name, value)
        for words in COMMANDS:
            given = {"REPORT": str(report), "TALKS": str(talks), "OTHER": f"sqlite:///{other}"}
            for session in sessions if "SESSION" in words else ("",):
                told = runner().invoke(app, [given.get(word, session if word == "SESSION" else word) for word in words])
                shown = secrets.found_in(f"{told.stdout}\n{told.stderr}\n{told.exception!r}".encode())
                assert shown == set(), f"turntrace {' '.join(words)} shows {shown}"
                assert told.exit_code in (0, 1), told.stderr
        assert secrets.found_in(report.read_bytes()) == set()
        assert secrets.found_in(other.read_bytes()) <= may
        requests = wire.requests()
    spans = [request for request in requests if OTLP.encode() in request.head]
    scores = [request for request in requests if SCORES.encode() in request.head and request.body]
    assert spans
    assert scores
    found = secrets.found_in(wire.raw) | secrets.found_in(b"\n".join(request.body for request in requests))
    assert found == may
    assert secrets.found_in(repr([from_otlp(request.body) for request in spans]).encode()) == may - {"comment"}
    assert secrets.found_in(b"\n".join(request.head for request in requests)) == set()
    assert secrets.found_in(b"\n".join(request.body for request in scores)) == may & {"comment"}
    key = base64.b64encode(f"{server.public_key}:{SECRET_KEY}".encode())
    assert all(key in request.head for request in spans + scores)  # how else would they be let in
    everywhere = here.everything() | {"report": report.read_bytes()}
    assert {place for place, blob in everywhere.items() if SECRET_KEY.encode() in blob or key in blob} == set()
    assert secrets.found_in(everywhere["log"]) == set()


# --- erasing ----------------------------------------------------------------------------------------------------------


def live_long(tracker: SessionTracker, secrets: Secrets, users: list[str], turns: int) -> None:
    """Have users talk by turns, so that their rows lie on the same pages and are moved about."""
    for number in range(turns):
        user = users[number % len(users)]
        mine = secrets if user == secrets["user"] else Secrets()
        session = tracker.start_session(user_id=user)
        with session.conversation(tracker.new_id()).turn(mine["question"]) as turn:
            turn.close_step(turn.open_step("agent", "chain"), error=LookupError(mine["node error"]))
            turn.journey("onboarding", ["a", "b"]).enter("a")
            turn.set_answer(mine["answer"])
        turn.feedback(True, comment=mine["comment"])
        if number % 3:
            session.end()
    tracker.flush()


def sends_all(ledger: Ledger) -> None:
    """Take out of the outbox what was sent, as the sender does."""
    while waiting := ledger.outbox():
        ledger.to_send.settle("test", [item.id for item in waiting], [], lease_s=0)


def careless(path: Path) -> Any:
    """Return an engine of the app's that leaves what is deleted where it was, as SQLite does unless it is told."""
    made = create_engine(f"sqlite:///{path}", connect_args={"check_same_thread": False, "timeout": 0.2})

    @event.listens_for(made, "connect")
    def _leave_it(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=OFF", "secure_delete=OFF"):
            connection.execute(f"PRAGMA {pragma}")

    return made


def traces_in(folder: Path, secrets: Secrets, hashed: str) -> set[str]:
    """Return what the files of a ledger have of a user."""
    stored = b"".join(file.read_bytes() for file in sorted(folder.glob("ledger.db*")))
    return secrets.found_in(stored) | ({"hash"} if hashed.encode() in stored else set())


@pytest.fixture
def life(capture: Capture, tmp_path: Path, secrets: Secrets) -> Callable[..., SessionTracker]:
    """Make a tracker on the ledger, on an engine of the app's or of its own, that has seen many users."""

    def make(*, is_own: bool = True, turns: int = 90) -> SessionTracker:
        path = tmp_path / "ledger.db"
        place = f"sqlite:///{path}" if is_own else careless(path)
        tracker = capture.tracker(place, outbox=True, content="full")
        live_long(tracker, secrets, [secrets["user"], *(f"user {number}" for number in range(4))], turns)
        return tracker

    return make


@pytest.mark.parametrize("is_sent", [False, True], ids=["waits", "sent"])
@pytest.mark.parametrize("is_own", [True, False], ids=["our engine", "the app's engine"])
def test_of_a_user_who_is_forgotten_no_byte_is_left_in_the_files(
    is_own: bool, is_sent: bool, life: Callable[..., SessionTracker], secrets: Secrets, tmp_path: Path
) -> None:
    tracker = life(is_own=is_own)
    user = secrets["user"]
    if is_sent:
        sends_all(tracker.ledger)
    hashed, theirs = tracker.hash_user(user), tracker.hash_user("user 1")
    assert "hash" in traces_in(tmp_path, secrets, hashed)
    forgotten = tracker.forget_user(user)
    assert len(forgotten.sessions) == 18
    assert (forgotten.waiting == 0) is is_sent
    assert traces_in(tmp_path, secrets, hashed) == set()  # as it is, with the process running on
    assert secrets.found_in(str(forgotten).encode()) == set()
    assert tracker.user_summary("user 1") is not None
    with tracker.session(user_id="user 1") as session, session.conversation("c").turn("Hello"):
        pass
    tracker.shutdown()
    assert traces_in(tmp_path, secrets, hashed) == set()
    assert "hash" in traces_in(tmp_path, secrets, theirs)


def test_what_was_sent_is_not_left_in_the_file(
    life: Callable[..., SessionTracker], secrets: Secrets, tmp_path: Path
) -> None:
    tracker = life(turns=30)
    sends_all(tracker.ledger)
    tracker.shutdown()
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        free = connection.execute("PRAGMA freelist_count").fetchone()[0]
    assert free > 0, "nothing was deleted"
    assert traces_in(tmp_path, secrets, "") - {"hash"} == set()


def test_who_reads_the_ledger_while_a_user_is_erased_is_told_of(
    life: Callable[..., SessionTracker], secrets: Secrets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = life(is_own=False, turns=20)
    hashed = tracker.hash_user(secrets["user"])
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM turntrace_sessions").fetchone()
        tracker.forget_user(secrets["user"])
        assert "its write-ahead log still holds what was erased" in caplog.text
        assert "hash" in traces_in(tmp_path, secrets, hashed)
    caplog.clear()
    tracker.forget_user(secrets["user"])
    assert caplog.text == ""
    assert traces_in(tmp_path, secrets, hashed) == set()


def test_a_ledger_that_is_too_large_to_be_written_anew_is_told_of(
    life: Callable[..., SessionTracker],
    secrets: Secrets,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = life(turns=20)
    monkeypatch.setattr(engine, "_MOST_SCRUBBED", 10_000)
    tracker.forget_user(secrets["user"])
    assert "run VACUUM on it" in caplog.text
    tracker.shutdown()
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        connection.execute("VACUUM")
    assert traces_in(tmp_path, secrets, tracker.hash_user(secrets["user"])) == set()


def test_a_ledger_that_is_locked_when_it_is_to_be_written_anew_loses_no_erasing(
    life: Callable[..., SessionTracker], secrets: Secrets, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = life(is_own=False, turns=20)
    erased = tracker.ledger.forget_user(tracker.hash_user(secrets["user"]))
    assert len(erased.sessions) == 4
    with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        tracker.ledger.scrub()
        assert "may have left bytes in unused parts of the file" in caplog.text
        writer.execute("ROLLBACK")
