"""Whatever a server answers: nothing is lost, nothing is raised, and whoever asked reads one clear line."""

import contextlib
import gzip
import json
import socket
import threading
from collections.abc import Iterator
from http.client import responses
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from command_line import runner
from loopback import PUBLIC_KEY, SECRET_KEY
from odd import PLANTED, steady
from turntrace import SessionTracker
from turntrace.analytics.langfuse import LangfuseMetrics
from turntrace.cli.main import app
from turntrace.doctor import read_turns, verify
from turntrace.doctor.checks import asked, run_checks
from turntrace.errors import DeliveryError
from turntrace.export import LangfuseServer, Outcome, Sender, session_score
from turntrace.export.scores import write_score
from turntrace.ledger import Ledger
from turntrace.settings import LangfuseSettings
from turntrace.testing import Capture

pytestmark = pytest.mark.usefixtures("lenient")


class Stranger:
    """A server that answers each request with the same bytes, whatever they are, and goes.

    Attributes:
        says: The bytes.
    """

    def __init__(self) -> None:
        self.says = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # it was closed
                return
            with connection, contextlib.suppress(OSError):
                _read_request(connection)
                connection.sendall(self.says)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def server(self) -> LangfuseServer:
        keys: Any = {"public_key": PUBLIC_KEY, "secret_key": SECRET_KEY, "base_url": self.url, "timeout": 20}
        return LangfuseServer(LangfuseSettings(**keys))


def _read_request(connection: socket.socket) -> None:
    head = b""
    while b"\r\n\r\n" not in head:
        more = connection.recv(65536)
        if not more:
            return
        head += more
    head, _, body = head.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    missing = int(lengths[0]) - len(body) if lengths else 0
    while missing > 0:
        missing -= len(connection.recv(min(missing, 65536)))


@pytest.fixture(scope="module")
def stranger() -> Iterator[Stranger]:
    running = Stranger()
    yield running
    running.close()


def answer(status: int, body: bytes, **headers: str) -> bytes:
    """Return an answer as its bytes."""
    named = {"Content-Length": str(len(body)), "Connection": "close"}
    named |= {name.replace("_", "-"): text for name, text in headers.items()}
    lines = [f"HTTP/1.1 {status} {responses.get(status, 'Odd')}"]
    lines += [f"{name}: {text}" for name, text in named.items()]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


shapes = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["data", "meta", "cursor", "id", "name", "traceId", "subject", "version", "value"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
pages = st.fixed_dictionaries({"data": st.lists(shapes, max_size=3) | shapes}) | shapes
"""What could be a page of what was asked for, and is none, or nearly one."""

ABOUT = (
    *("text/html; charset=hex", "text/plain; charset=undefined", "text/html; charset=utf-16", "; charset=", "\udcff"),
    *("application/json; charset=rot13", "application/json", "application/x-protobuf", "text/html; charset=idna"),
)
bodies = (
    st.binary(max_size=40)
    | pages.map(lambda value: json.dumps(value).encode())
    | pages.map(lambda value: json.dumps(value).encode()[:-1])
    | st.sampled_from([text.encode("utf-8") for text in PLANTED])
    | st.sampled_from([b"\x0a\xff\xff\xff\xff\x0f", b"[" * 100_000, b"x" * 2_000_000, gzip.compress(b"{}")[:-5]])
)
statuses = st.sampled_from(
    [200, 204, 206, 207, 300, 301, 302, 304, 308, 400, 401, 403, 404, 408, 413, 422, 429, 500, 502, 503, 599, 999]
)
headers = st.fixed_dictionaries(
    {},
    optional={
        "Content_Type": st.sampled_from(ABOUT),
        "Content_Encoding": st.sampled_from(["gzip", "deflate", "br", "zstd", "none"]),
        "Retry_After": st.sampled_from(
            ["-1", "nan", "inf", "9" * 400, "soon", "Wed, 99 Foo 9999", "Mon, 01 Jan 0001 00:00:00 +9999", "\u00b2"]
        ),
        "Date": st.sampled_from(["", "today", "Mon, 01 Jan 0001 00:00:00 -0000", "Fri, 31 Dec 9999 23:59:59 -2359"]),
        "Location": st.sampled_from(["http://127.0.0.1:9/", "file:///etc/passwd", "", "//"]),
    },
)
answers = st.builds(lambda status, body, more: answer(status, body, **more), statuses, bodies, headers)
raw = (
    answers | st.binary(max_size=60) | st.sampled_from([b"", b"HTTP/1.1 200", b"HTTP/9.9 200 OK\r\n\r\n", b"\x16\x03"])
)


# --- sending ----------------------------------------------------------------------------------------------------------
@steady(60)
@given(raw)
@example(answer(400, b"no", Content_Type="text/html; charset=hex"))
@example(answer(400, b"no", Content_Type="text/html; charset=undefined"))
@example(answer(429, b"no", Retry_After="Mon, 01 Jan 0001 00:00:00 +9999"))
@example(answer(429, b"no", Retry_After="9" * 400))
@example(answer(401, b"\x1b[31mno\x1b]0;title\x07\r\nforged"))
@example(answer(307, b"", Location="file:///etc/passwd"))
@example(answer(200, b"\x0a\xff\xff\xff\xff\x0f", Content_Type="application/x-protobuf"))
def test_whatever_is_answered_what_was_to_be_sent_is_sent_or_waits_or_is_set_apart(
    stranger: Stranger, waiting: bytes, said: bytes
) -> None:
    stranger.says = said
    ledger = Ledger("sqlite://")
    with ledger.writing() as writer:
        writer.put("spans", waiting, items=3, created_ns=1)
        for name in ("a", "b"):
            writer.put("score", write_score(session_score("s", name, 1)), items=1, created_ns=1)
    sender = Sender(ledger.to_send, stranger.server())

    sent = sender.send_waiting()

    status = ledger.to_send.status()
    apart = sum(items for _, items in status.refused)
    assert sent.items + apart + status.spans.items + status.scores.items == 5
    assert sent.refused == apart
    for words in [sender.failing.words if sender.failing else "", *(why for why, _ in status.refused)]:
        assert len(words) <= 300
        assert words.isprintable()
    if sent.stopped_by is not None:
        assert sent.stopped_by.outcome in (Outcome.LATER, Outcome.CLOSED)
        assert 0 <= sender._pace.delay(1, sent.stopped_by) <= 3600
    sender.stop(0)
    ledger.close()


@pytest.fixture(scope="module")
def waiting() -> bytes:
    """Return what waits in the outbox after a turn: three spans."""
    with SessionTracker("sqlite://") as tracker:
        session = tracker.start_session(user_id="ann")
        session.conversation("c").start_turn("Hi").end()
        session.end()
        tracker.flush()
        return b"".join(item.body for item in tracker.ledger.outbox() if item.kind == "spans")


# --- asking -----------------------------------------------------------------------------------------------------------
def told(question: Any) -> None:
    """Ask; when there is no answer, look that it is said in one line that a terminal shows as it is."""
    said = ""
    try:
        question()
    except DeliveryError as error:
        said = str(error)
    assert said.isprintable()
    assert len(said) < 800


QUESTIONS = ("sessions_over_time", "latency_by_day", "usage_by_model", "users_by", "dropoff_rate", "end_reasons")


@steady(60)
@given(raw, st.sampled_from(QUESTIONS))
@example(answer(200, b'{"data": 5}'), "sessions_over_time")
@example(answer(200, b'{"data": [5]}'), "users_by")
@example(answer(200, b'{"data": [{"count_count": "many", "userId": 5}]}'), "end_reasons")
@example(answer(200, b'{"data": [{"count_count": 1e400}]}'), "dropoff_rate")
@example(answer(200, b"[" * 100_000), "usage_by_model")
def test_whatever_the_metrics_api_answers_is_an_answer_or_a_clear_error(
    stranger: Stranger, said: bytes, question: str
) -> None:
    stranger.says = said
    server = stranger.server()
    told(getattr(LangfuseMetrics(server), question))
    server.close()


@steady(25)
@given(raw)
@example(answer(200, b'{"version": "4"}', Date="today"))
@example(answer(200, b'{"version": "4", "data": ["x"]}'))
@example(answer(200, b"[" * 100_000))
def test_whatever_is_answered_the_doctor_names_what_is_wrong(stranger: Stranger, said: bytes) -> None:
    stranger.says = said
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PUBLIC_KEY", PUBLIC_KEY), ("SECRET_KEY", SECRET_KEY), ("BASE_URL", stranger.url)):
            patch.setenv(f"LANGFUSE_{name}", value)
        checks = list(run_checks("sqlite://"))
    assert {"keys", "server", "ledger"} <= {check.name for check in checks}
    assert all(check.todo for check in checks if check.ok is False)


@pytest.mark.parametrize(
    "said",
    [
        *(b'{"data": "x"}', b'{"data": ["x"]}', b'{"data": [{"traceId": []}]}', b'{"data": [], "meta": null}', b"[]"),
        *(b'{"data": [{"traceId": "t", "id": "i", "inputUsage": "many"}]}', b"[" * 100_000, b"\x1b[31m", b"", b"null"),
        *(b'{"data": [{"id": "i", "traceId": "t", "startTime": 5, "level": {}}]}', b'{"data": [{"id": {}}]}'),
    ],
)
def test_a_session_is_compared_with_a_strangers_answer_in_one_line(
    stranger: Stranger, said: bytes, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with SessionTracker(url) as tracker:
        session = tracker.start_session(user_id="ann")
        with session.conversation("c").turn("Hi") as turn:
            turn.feedback(1)
        session.end()
    for name, value in (("PUBLIC_KEY", PUBLIC_KEY), ("SECRET_KEY", SECRET_KEY), ("BASE_URL", stranger.url)):
        monkeypatch.setenv(f"LANGFUSE_{name}", value)
    stranger.says = answer(200, said)
    ran = runner().invoke(app, ["doctor", "--verify", session.id, "--ledger", url])

    assert ran.exit_code in (1, 2), ran.output
    assert "own:" not in ran.stderr
    assert ran.stderr.count("\n") == (ran.exit_code == 2)
    assert "\x1b" not in ran.stdout + ran.stderr

    ran = runner().invoke(app, ["report", "-o", str(tmp_path / "report.html"), "--ledger", url])
    assert (ran.exit_code, ran.stderr) == (0, "")


def test_a_server_that_gives_the_same_page_for_ever_is_not_asked_for_ever(stranger: Stranger) -> None:
    stranger.says = answer(200, b'{"data": [], "meta": {"cursor": "again"}}')
    server = stranger.server()
    with pytest.raises(DeliveryError, match="the same page"):
        list(server.observations("s"))
    server.close()


@steady(30)
@given(st.lists(shapes, max_size=3), st.lists(shapes, max_size=3))
def test_observations_and_scores_of_any_shape_are_compared_or_refused(observations: Any, scores: Any) -> None:
    with Capture() as capture:
        tracker = capture.tracker()
        session = tracker.start_session(user_id="ann")
        session.conversation("c").start_turn("Hi").end()
        session.end()
        whole = session.summary()
        turns = read_turns(tracker.ledger, session.id)
        told(lambda: asked(lambda: verify(whole, turns, observations, scores)))
