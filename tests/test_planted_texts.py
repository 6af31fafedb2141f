"""Texts that something would interpret stay texts: in SQL, in the terminal, in CSV, in the report, in the log."""

import csv
import io
import json
import logging
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langchain_core.tools import StructuredTool

from apps import single
from command_line import runner
from odd import PLANTED
from turntrace import SessionCallbackHandler, SessionTracker, track_graph
from turntrace.analytics import Filters, sessions_by
from turntrace.cli.main import app
from turntrace.errors import TurntraceError
from turntrace.ledger import Ledger
from turntrace.testing import Clock

NAMED = {"channel", "tier", "org_id", "locale", "client_version"}
COMMANDS = ("sessions", "users", "funnel", "dropoff", "export --status", "doctor")


class Sitting:
    """A session in which every name is the same text, and a journey, feedback, a node, a tool and a model of it."""

    def __init__(self, tracker: SessionTracker, text: str) -> None:
        self.text = text
        known: dict[str, Any] = dict.fromkeys(NAMED, text)
        session = tracker.start_session(user_id=text, **known)
        self.id = session.id
        with session.conversation(topic=text).turn(text) as turn:
            turn.set_intent(text)
            graph: Any = track_graph(single(self._work, f"node {text}".replace("|", "").replace(":", ""))).compile()
            graph.invoke({"messages": [("user", text)]}, turn.config)
            turn.journey(f"way {text}", [f"stage {text}", "last"]).enter(f"stage {text}")
        turn.feedback(1, name=text, comment=text)
        with pytest.raises(RuntimeError), session.conversation(topic=text).turn("Again?"):
            raise type(f"Error {text}", (RuntimeError,), {})
        session.end(text)

    def _work(self, _state: Any) -> dict[str, Any]:
        tool = StructuredTool.from_function(lambda item: item, name="tool", description="Gives it back.")
        tool.name = f"tool {self.text}"
        tool.invoke({"item": self.text})
        return {"messages": [AIMessage(self.text, response_metadata={"model_name": self.text})]}


class Place:
    """A ledger with a sitting for each text."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'ledger.db'}"
        with SessionTracker(self.url, clock=Clock(tick_ns=1_000_000)) as tracker:
            SessionCallbackHandler(tracker)
            self.sittings = [Sitting(tracker, text) for text in PLANTED]

    def run(self, *arguments: str) -> str:
        """Run a command, and return what it prints, after looking that a terminal shows it as it is."""
        done = runner().invoke(app, [*arguments, "--ledger", self.url], env={"COLUMNS": "300"})
        assert done.exit_code in (0, 1), done.stderr
        assert done.stderr == ""
        assert done.stdout.replace("\r\n", "\n").replace("\n", "").isprintable(), arguments
        return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("planted"))


def test_a_database_takes_them_as_values_and_finds_them_again(place: Place) -> None:
    ledger = Ledger(place.url)
    for sitting in place.sittings:
        for name in ("channel", "tier", "org_id", "topic", "end_reason"):
            only: Any = {name: sitting.text}
            found = sessions_by(ledger, filters=Filters(**only))
            assert [session.id for session in found] == [sitting.id], name
        (first, steps), _ = ledger.turns(sitting.id)
        assert first.intent == sitting.text
        assert f"tool {sitting.text}" in {step.name for step in steps}
    assert len(ledger.sessions()) == len(PLANTED)
    ledger.close()


def test_no_command_prints_what_a_terminal_would_interpret(place: Place) -> None:
    for command in COMMANDS:
        place.run(*command.split())
    for sitting in place.sittings:
        place.run("show", sitting.id)
        assert json.loads(place.run("show", sitting.id, "--json"))["channel"] == sitting.text
    place.run("show", sitting.id, "--context")
    place.run("sessions", f"--channel={sitting.text}", f"--topic={sitting.text}")
    place.run("funnel", f"way {sitting.text}")


def test_markup_and_emoji_codes_are_shown_as_they_are(place: Place) -> None:
    (sitting,) = (each for each in place.sittings if each.text.startswith("[bold]"))
    assert "[bold]markup[/bold] :smile:" in place.run("show", sitting.id)


def test_a_spreadsheet_runs_no_cell(place: Place) -> None:
    for command in ("sessions", "users"):
        rows = list(csv.reader(io.StringIO(place.run(command, "--csv", "--limit", "100"), newline="")))
        assert len(rows) == len(PLANTED) + 1
        assert {len(row) for row in rows} == {len(rows[0])}
        assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "@", "\t", "\r"))]
        assert not [cell for row in rows for cell in row if cell.startswith("-") and not cell[1:].isdigit()]


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the texts outside of its own scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.comments: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def test_the_report_holds_them_as_text(place: Place, tmp_path: Path) -> None:
    plain = tmp_path / "plain.html"
    with SessionTracker(f"sqlite:///{tmp_path / 'plain.db'}") as tracker:
        Sitting(tracker, "harmless")
    assert runner().invoke(app, ["report", "-o", str(plain), "--ledger", tracker.ledger.url]).exit_code == 0
    place.run("report", "-o", str(tmp_path / "planted.html"))
    planted, harmless = (Elements(path.read_text("utf-8")) for path in (tmp_path / "planted.html", plain))

    assert len([tag for tag, _ in planted.found if tag == "script"]) == 3
    assert {tag for tag, _ in planted.found} <= {tag for tag, _ in harmless.found} | {"select", "option", "details"}
    assert planted.comments == harmless.comments
    for _, given in planted.found:
        assert not [name for name in given if name.startswith("on")]
        links = [given.get(name) or "" for name in ("href", "src", "action", "formaction", "data", "xlink:href")]
        assert not [link for link in links if "script:" in link]
    told = "".join(planted.texts)
    for text in ("<script>alert(1)</script>", "</script><!--", "javascript:alert(1)", "<img src=x onerror=alert(1)>"):
        assert text in told


def failing(text: str) -> Any:
    def rates(_session: Any) -> Any:
        raise type(f"Error {text}", (RuntimeError,), {})(text)

    rates.__name__ = text
    return rates


def test_no_line_of_the_log_is_broken_or_coloured(caplog: pytest.LogCaptureFixture, lenient: None) -> None:
    caplog.set_level(logging.DEBUG, logger="turntrace")
    for text in PLANTED:
        with SessionTracker("sqlite://", evaluators=[failing(text)]) as tracker:
            graph: Any = track_graph(single(lambda _: {"messages": [AIMessage("Done.")]})).compile()
            graph = graph.with_config(callbacks=[SessionCallbackHandler(tracker)])
            graph.invoke({"messages": [("user", text)]}, {"metadata": {"user_id": [text], "session_id": {text: text}}})
            session = tracker.start_session(channel=text)
            session.end(text)
            tracker.flush()
            with pytest.raises(TurntraceError) as told:
                tracker.resume_turn({"turntrace_turn_id": text})
            assert str(told.value).isprintable()
            with pytest.raises(TurntraceError) as told:
                session.journey(text)
            assert str(told.value).isprintable()

    records = [record for record in caplog.records if record.name == "turntrace"]
    lines = [line for record in records for line in record.getMessage().split("\n")]  # a traceback has several
    assert lines
    assert all(line.isprintable() for line in lines), [line for line in lines if not line.isprintable()]
