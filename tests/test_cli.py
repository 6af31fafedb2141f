"""The commands, as somebody at a terminal sees them."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from typer.testing import Result

import turntrace
from command_line import runner
from loopback import LangfuseServer
from turntrace import SessionTracker
from turntrace.cli.main import app
from turntrace.cli.render import duration, money, safe

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """Run a command in a terminal of 100 columns, or as many as are asked for."""

    def invoke(*arguments: str, columns: int = 100, given: str | bytes | None = None) -> Result:
        environment = {"COLUMNS": str(columns), "TERM": "dumb"}
        return runner().invoke(app, list(arguments), env=environment, input=given)

    return invoke


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


def talk(conversation_id: str = "c-1", user_id: str = "alice@example.com", **changed: Any) -> str:
    messages = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "On its way."}]
    return json.dumps(
        {
            "conversation_id": conversation_id,
            "user_id": user_id,
            "topic": "orders",
            "model": "gpt-4o",
            "outcome": {"success": True},
            "messages": messages,
            **changed,
        }
    )


def figures(result: Result) -> dict[str, str]:
    """Return the totals of a replay by their names."""
    found = re.findall(r"^([a-zA-Z ]+?)  +(\$?[\d,.]+)(?: .*)?$", result.stdout, re.MULTILINE)
    return dict(found)


# --- the commands as such ---------------------------------------------------------------------------------------------
def test_the_version(run: Run) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"turntrace {turntrace.__version__}\n")


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in ("demo", "replay", "sessions", "show", "sweep"):
        assert re.search(rf"^\s+{name} ", result.stdout, re.MULTILINE)
    assert "export" in result.stdout


def test_an_unknown_command_or_option_is_a_mistake_of_the_caller(run: Run) -> None:
    assert run("nonsense").exit_code == 2
    assert run("sessions", "--limit", "0").exit_code == 2
    assert run("replay").exit_code == 2
    assert run("replay", "-", "--concurrency", "0").exit_code == 2


def test_what_goes_wrong_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, why in (
        (
            ("sessions", "--ledger", "nonsense"),
            "The ledger is 'nonsense', which is no database URL. Pass 'sqlite:///nonsense'",
        ),
        (("sessions", "--ledger", f"sqlite:///{tmp_path}/none.db"), "none.db yet. turntrace demo makes one"),
        (("show", "x", "--ledger", f"sqlite:///{tmp_path}/none.db"), "There is no ledger at"),
        (("sessions", "--ledger", f"sqlite:///file:{tmp_path}/none.db?uri=true"), "none.db yet. turntrace demo"),
        (("demo", "--ledger", "mysql://host/db"), "'mysql'"),
        (("replay", "-", "--ledger", "sqlite:////proc/none/x.db"), "/proc/none, cannot be made"),
    ):
        result = run(*arguments, columns=40, given="")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("turntrace: ")
        assert why in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "none.db").exists()
    monkeypatch.setenv("TURNTRACE_IDLE_AFTER", "soon")
    assert "turntrace: The environment variable TURNTRACE_IDLE_AFTER is 'soon'. Allowed is" in run("demo").stderr


def test_a_ledger_that_may_only_be_read_can_be_looked_at(run: Run, tmp_path: Path) -> None:
    with SessionTracker(f"sqlite:///{tmp_path}/ledger.db") as tracker:
        with tracker.session(user_id="ann") as session, session.conversation("c-1").turn("Hello?"):
            session_id = session.id
        tracker.flush()
    url = f"sqlite:///file:{tmp_path}/ledger.db?mode=ro&immutable=1&uri=true"
    for asked in (["sessions"], ["show", "c-1"], ["sessions", "--user-id", "ann"]):
        found = run(*asked, "--ledger", url)
        assert (found.exit_code, found.stderr) == (0, "")
        assert session_id[:8] in found.stdout
    assert "1 session" in run("doctor", "--ledger", url).stdout


# --- replay -----------------------------------------------------------------------------------------------------------
def test_a_replay_ends_with_totals(run: Run, tmp_path: Path, url: str) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join(talk(f"c-{number}") for number in range(3)))
    first = run("replay", str(file), "--ledger", url, columns=60)
    assert (first.exit_code, first.stderr) == (0, "")
    expected = {
        "conversations": "3",
        "sessions": "3",
        "turns": "3",
        "messages": "6",
        "LLM calls": "3",
        "tool calls": "0",
    }
    # "Where is it?" has 4 tokens, 3 for its frame, 1 for its role, and 3 begin the reply, which has 4
    expected |= {"tool calls": "0", "tokens in": "33", "tokens out": "12", "cost": "$0.0002"}
    assert expected.items() <= figures(first).items()
    assert figures(first)["played"] == "3"
    assert url in first.stdout

    again = run("replay", str(file), "--ledger", url)
    assert again.exit_code == 0
    assert expected.items() <= figures(again).items()
    assert (figures(again)["played"], figures(again)["skipped"]) == ("0", "3")


@pytest.mark.parametrize("options", [(), ("--async",), ("--concurrency", "3"), ("--async", "-n", "3")])
def test_every_way_to_replay_comes_to_the_same(options: tuple[str, ...], run: Run, tmp_path: Path, url: str) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join(talk(f"c-{number}") for number in range(5)))
    result = run("replay", str(file), "--ledger", url, *options)
    assert result.exit_code == 0
    assert (figures(result)["played"], figures(result)["turns"]) == ("5", "5")


def test_files_folders_and_stdin_are_read_in_one_go(run: Run, tmp_path: Path, url: str) -> None:
    folder = tmp_path / "talks"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text(talk(name) + "\n")
    (tmp_path / "three.json").write_text(talk("three"))
    stdin = f"{talk('four')}\n\nnonsense\n{talk('five')}\n"
    environment = {**os.environ, "TURNTRACE_LEDGER_URL": url}
    command = [sys.executable, "-m", "turntrace.cli.main", "replay", str(folder), str(tmp_path / "three.json"), "-"]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "<stdin>:3: it is not JSON: Expecting value at column 1\n"
    assert re.search(r"^played +5$", done.stdout, re.MULTILINE)


def test_malformed_lines_are_named_one_a_line(run: Run, tmp_path: Path, url: str) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(f"{talk('a')}\nnonsense\n{talk('b', topic=7)}\n\n{talk('c')}\n{talk('c', user_id='bob')}\n")
    result = run("replay", str(file), "--ledger", url, columns=40)
    assert result.exit_code == 1
    problems = result.stderr.splitlines()
    assert [problem.split(": ")[0] for problem in problems] == [f"{file}:{number}" for number in (2, 3, 6)]
    assert "its conversation_id is in the ledger already" in problems[2]
    assert (figures(result)["played"], figures(result)["malformed"]) == ("2", "3")


def test_nothing_is_replayed_when_a_file_is_missing(run: Run, tmp_path: Path, url: str) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(talk())
    (tmp_path / "empty").mkdir()
    for wrong, why in (("missing.jsonl", "No such file or directory"), ("empty", "has no file *.jsonl")):
        result = run("replay", str(file), str(tmp_path / wrong), "--ledger", url)
        assert (result.exit_code, result.stdout) == (2, "")
        assert wrong in result.stderr
        assert why in result.stderr
    assert not (tmp_path / "ledger.db").exists()


def test_names_of_files_cannot_change_the_terminal(run: Run, tmp_path: Path, url: str) -> None:
    file = tmp_path / "a\x1b[31m[bold]\u202eb.jsonl"
    file.write_text("nonsense\n")
    result = run("replay", str(file), "--ledger", url)
    assert (
        result.stderr == f"{tmp_path}/a\\x1b[31m[bold]\\u202eb.jsonl:1: it is not JSON: Expecting value at column 1\n"
    )


# --- sessions and show ------------------------------------------------------------------------------------------------
@pytest.fixture
def ids(url: str) -> list[str]:
    """Make three sessions, the ids of two of which begin the same; they are named as nobody should name them."""
    found = ["ab-1", "ab-2", "[red]c"]
    with SessionTracker(url) as tracker:
        for session_id in found:
            session = tracker.start_session(user_id="alice", session_id=session_id, channel="[bold]\x1b[2J")
            conversation = session.conversation("[link=x]talk", topic="t")
            with conversation.turn("Hello?") as turn:
                turn.set_answer("Hi.")
            session.end("gone\n[/]")
    return found


def test_sessions_are_listed_the_newest_first(run: Run, url: str, ids: list[str]) -> None:
    result = run("sessions", "--ledger", url)
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()[2:]] == ["[red]c", "ab-2", "ab-1"]
    assert "[bold]\\x1b[2J" in result.stdout
    assert "gone\\n[/]" in result.stdout
    assert "\x1b" not in result.stdout
    assert run("sessions", "--ledger", url, "--limit", "1").stdout.splitlines()[2].startswith("[red]c ")


def test_a_ledger_without_sessions_says_so(run: Run, url: str) -> None:
    SessionTracker(url).shutdown()
    result = run("sessions", "--ledger", url)
    assert (result.exit_code, result.stdout) == (0, "There are no sessions yet.\n")


def test_a_session_is_found_by_the_beginning_of_its_id(run: Run, url: str, ids: list[str]) -> None:
    for given in ("ab-1", "[red]c", "[r"):
        result = run("show", given, "--ledger", url)
        assert result.exit_code == 0
        assert result.stdout.startswith(f"session {next(i for i in ids if i.startswith(given))} ")
        assert "conversation [link=x]talk" in result.stdout
        assert "question → answer" in result.stdout
    for given, why in (
        ("zz", "No session, turn or trace has an id that begins with 'zz', and no conv"),
        ("ab", "2 sessions have ids"),
    ):
        result = run("show", given, "--ledger", url)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"turntrace: {why}")


# --- demo -------------------------------------------------------------------------------------------------------------
def test_the_demo_shows_a_session_as_a_tree_and_all_as_a_table(run: Run, url: str) -> None:
    result = run("demo", "--ledger", url, columns=80)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert max(map(len, lines[: lines.index(f"The ledger: {url}")])) <= 80
    tree = [line.lstrip("│├└─` |+-") for line in lines]
    begin = next(number for number, line in enumerate(tree) if line.startswith("turn 5"))
    assert re.fullmatch(r"turn 5  \d\d:\d\d:\d\d  completed  intent refund  statement → answer", tree[begin])
    assert re.fullmatch(r"\d+ ms, first token \d+ ms, 975 tokens, \$0.000168, window \S{10} 75%", tree[begin + 1])
    assert re.fullmatch(r"waited \d+\.\d s for a person", tree[begin + 2])
    kinds = [line.split("  ")[0] for line in tree[begin + 3 : begin + 24]]
    assert kinds == [
        "agent support_desk",
        "node triage",
        *(["node account", "node knowledge"] if "node account" in kinds[2] else ["node knowledge", "node account"]),
        *("node agent", "llm gpt-4o-mini", "node tools", "tool order_status"),
        *("node agent", "llm gpt-4o-mini", "node tools", "tool refund"),
        *("agent support_desk", "node tools", "tool refund"),  # once a person has approved it
        *("node agent", "llm gpt-4o-mini", "node tools", "tool refund"),
        *("node agent", "llm gpt-4o-mini"),
    ]
    [failed] = [line for line in tree if "ConnectionError" in line]
    assert re.fullmatch(r"tool refund  \d+ ms  ConnectionError", failed)
    assert [line for line in tree if line.startswith("pruned")] == [
        "pruned 4 messages, 41 tokens",
        *["pruned 6 messages, 74 tokens"] * 2,
    ]
    after = [tree[number + 1] for number, line in enumerate(tree) if line.startswith("event context.prune")]
    assert [line.split("  ")[0] for line in after] == ["llm gpt-4o-mini"] * 3
    head = next(number for number, line in enumerate(lines) if line.startswith("session  "))
    assert lines[head].split() == ["session", "user", "channel", "started", "UTC", "turns", "failed", "cost", "ended"]
    shown = [line.split()[-1] for line in lines[head + 2 : head + 7]]
    assert sorted(shown) == ["completed", "handoff", "inactive_tim\u2026", "user_exit", "user_exit"]
    assert url in result.stdout
    assert "LANGFUSE_PUBLIC_KEY" in result.stdout
    assert "turntrace export" in result.stdout

    session_id = re.search(r"turntrace show (\w+)", result.stdout)
    assert session_id is not None
    assert run("show", session_id[1], "--ledger", url, columns=80).stdout.splitlines()[: head - 1] == lines[: head - 1]
    run("demo", "--ledger", url)
    assert len(run("sessions", "--ledger", url).stdout.splitlines()) == 2 + 10


@pytest.mark.parametrize("on_path", [True, False])
def test_the_demos_commands_work_as_they_stand(
    on_path: bool, run: Run, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after `make demo`: the program is in .venv/bin, which is on the PATH of few.
    program = tmp_path / ".venv" / "bin" / "turntrace"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m turntrace.cli.main "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [".venv/bin/turntrace", "demo"])
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin" if on_path else "/usr/bin:/bin")
    result = run("demo", "--ledger", url)
    name = "turntrace" if on_path else ".venv/bin/turntrace"
    commands = re.findall(rf"(?:^|  |: ){re.escape(name)} .*$", result.stdout, re.MULTILINE)
    verbs = [command.strip(": ").split()[1] for command in commands]
    assert verbs == ["sessions", "show", "show", "funnel", "dropoff", "report", "export"]
    for command in commands[: 1 if on_path else 5]:
        done = subprocess.run(command.strip(": "), shell=True, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


def test_a_narrow_terminal_gets_cards_and_no_line_too_long(run: Run, url: str) -> None:
    result = run("demo", "--ledger", url, columns=40)
    lines = result.stdout.splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith("The ledger:"))
    assert max(map(len, lines[:end])) <= 40
    assert len(re.findall(r"^\w{8} (web|mobile|api), user \w{8}$", result.stdout, re.MULTILINE)) == 5


def test_colours_only_where_they_are_wanted(run: Run, url: str, ids: list[str]) -> None:
    code = f"""
import os
from typer.testing import CliRunner
from turntrace.cli.main import app
app(["sessions", "--ledger", {url!r}], standalone_mode=False)
os.environ["NO_COLOR"] = "1"
print("without")
app(["sessions", "--ledger", {url!r}], standalone_mode=False)
"""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "80"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, timeout=60, check=True)
    os.close(theirs)
    coloured, without = os.read(ours, 100_000).decode().split("without")
    os.close(ours)
    assert re.search(r"\x1b\[[\d;]*m", coloured)
    styles = {int(code) for codes in re.findall(r"\x1b\[([\d;]+)m", without) for code in codes.split(";")}
    assert {0, 1} <= styles <= {0, 1, 2}  # NO_COLOR asks for no colour: bold and dim stay
    assert "\x1b" not in run("sessions", "--ledger", url).stdout


# --- how figures are written ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ms", "written"),
    [
        *((0, "0 ms"), (999, "999 ms"), (1_000, "1.0 s"), (59_940, "59.9 s"), (59_999, "1 min 00 s")),
        *((60_000, "1 min 00 s"), (3_599_600, "1 h 00 min"), (7_500_000, "2 h 05 min")),
    ],
)
def test_durations(ms: int, written: str) -> None:
    assert duration(ms) == written


@pytest.mark.parametrize(
    ("usd", "written"),
    [(0, "$0.00"), (0.0000001, "<$0.000001"), (0.000035, "$0.000035"), (0.25, "$0.250000"), (1234.5, "$1,234.50")],
)
def test_prices(usd: float, written: str) -> None:
    assert money(usd) == written
    assert money(0.00001, 4) == "<$0.0001"


def test_what_is_not_printable_is_escaped() -> None:
    assert safe("a\x1b]0;x\x07\u202e\u200b\n\u00e9 \U0001f600") == "a\\x1b]0;x\\x07\\u202e\\u200b\\n\u00e9 \U0001f600"


# --- the window -------------------------------------------------------------------------------------------------------
def long_talk(turns: int) -> str:
    """Write a recorded conversation whose messages have about 70 tokens each."""
    messages = []
    for number in range(turns):
        messages.append({"role": "user", "content": f"{number} " + "tea " * 60})
        messages.append({"role": "assistant", "content": f"{number} " + "cup " * 60})
    return talk(messages=messages)


@pytest.fixture
def fitted(run: Run, url: str, tmp_path: Path) -> Result:
    file = tmp_path / "talks.jsonl"
    file.write_text(long_talk(6), encoding="utf-8")
    return run("replay", str(file), "--ledger", url, "--context-limit", "500")


def only_session(url: str) -> str:
    from turntrace.ledger import Ledger

    [session] = Ledger(url).sessions()
    return session.id


def test_the_window_is_drawn_turn_by_turn_with_its_prunings(run: Run, url: str, fitted: Result) -> None:
    assert fitted.exit_code == 0
    result = run("show", only_session(url), "--context", "--ledger", url, columns=140)
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("turn ")]
    assert len(lines) == 6
    shares = [int(re.findall(r"(\d+)% of 500", line)[0]) for line in lines]
    assert shares[:3] == sorted(shares[:3])
    assert max(shares) <= 80
    bars = [len(re.findall("\u2588", line)) for line in lines]
    assert bars == [round(share / 100 * 40) for share in shares]
    assert ["pruned" in line for line in lines] == [False, False, False, True, True, True]
    assert "pruned 2 messages, " in lines[3]
    assert "(DropOldestTurns, " in lines[3]


def test_the_window_in_a_narrow_terminal_stays_within_it(run: Run, url: str, fitted: Result) -> None:
    result = run("show", only_session(url), "--context", "--ledger", url, columns=50)
    assert all(len(line) <= 50 for line in result.stdout.splitlines())
    assert "turn 6" in result.stdout


def test_a_session_without_calls_of_a_model_says_that_there_is_no_window(run: Run, url: str) -> None:
    with SessionTracker(url) as tracker, tracker.session() as session, session.conversation("c").turn("Hi"):
        pass
    result = run("show", session.id, "--context", "--ledger", url)
    assert result.exit_code == 0
    assert "No model was called in this session" in result.stdout


def test_a_context_limit_of_nothing_is_a_mistake_of_the_caller(run: Run, url: str) -> None:
    assert run("replay", "-", "--context-limit", "0", "--ledger", url, given=talk()).exit_code == 2


def test_what_does_not_fit_is_said_by_line(run: Run, url: str, tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(talk(), encoding="utf-8")
    result = run("replay", str(file), "--context-limit", "10", "--ledger", url)
    assert result.exit_code == 1
    assert "10 fit" in result.output


def test_a_window_that_is_nearly_empty_is_drawn_against_its_fullest_turn(run: Run, url: str, tmp_path: Path) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(long_talk(3), encoding="utf-8")
    run("replay", str(file), "--ledger", url)
    result = run("show", only_session(url), "--context", "--ledger", url, columns=140)
    bars = [len(re.findall("\u2588", line)) for line in result.stdout.splitlines() if line.startswith("turn ")]
    assert bars == sorted(bars)
    assert bars[-1] == 40
    assert "<1% of 128,000" in result.stdout
    assert "as a share of the fullest turn" in result.stdout


def test_a_sweep_ends_what_was_silent(run: Run, url: str) -> None:
    with SessionTracker(url, clock=lambda: 1_000_000_000) as tracker:
        tracker.start_session(user_id="u")
    result = run("sweep", "--ledger", url)
    assert (result.exit_code, result.stdout) == (0, "Ended 1 session, closed 0 turns as abandoned.\n")
    assert "Ended 0 sessions" in run("sweep", "--ledger", url, "--idle-after", "1m30s").stdout
    told = " ".join(run("sweep", "--help").stdout.split())
    assert "Default: TURNTRACE_IDLE_AFTER, else 1800." in told
    assert "it holds for every session of the ledger" in told
    wrong = run("sweep", "--ledger", url, "--idle-after", "-1")
    assert wrong.exit_code == 2
    assert "idle_after" in wrong.output
    odd = run("sweep", "--ledger", url, "--idle-after", "soon")
    assert odd.exit_code == 2
    assert "--idle-after is 'soon'" in odd.output


def test_a_sweep_does_not_make_a_ledger(run: Run, tmp_path: Path) -> None:
    result = run("sweep", "--ledger", f"sqlite:///{tmp_path}/none.db")
    assert result.exit_code == 2
    assert not (tmp_path / "none.db").exists()


# --- export -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def waiting(url: str) -> str:
    """A ledger with a session whose spans and scores wait."""
    tracker = SessionTracker(url, tracer_provider=TracerProvider(), outbox=True)
    with tracker.session() as session, session.conversation("c-1").turn("Hello"):
        pass
    tracker.shutdown()
    return url


def set_keys(monkeypatch: pytest.MonkeyPatch, server: LangfuseServer) -> None:
    for name, value in {**server.keys, "LANGFUSE_TIMEOUT": "1"}.items():
        monkeypatch.setenv(name, value)


def test_export_without_keys_says_what_to_set(run: Run, waiting: str) -> None:
    result = run("export", "--ledger", waiting)
    assert result.exit_code == 2
    assert "set LANGFUSE_PUBLIC_KEY" in result.stderr


def test_export_sends_what_waits_and_says_so(run: Run, waiting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with LangfuseServer() as server:
        set_keys(monkeypatch, server)
        result = run("export", "--ledger", waiting)
        assert result.exit_code == 0
        assert "Nothing waits." in result.stdout
        assert {span.name for span in server.spans()} == {"session.start", "conversation.turn", "session.end"}
        assert server.scores()
        before = len(server.requests)
        assert run("export", "--ledger", waiting).exit_code == 0
        assert len(server.requests) == before


@pytest.mark.usefixtures("lenient")
def test_export_to_a_server_that_is_away_ends_with_1_and_keeps_all(
    run: Run, waiting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = LangfuseServer().start()
    server.stop()
    set_keys(monkeypatch, server)
    result = run("export", "--ledger", waiting)
    assert result.exit_code == 1
    assert re.search(r"3 spans and \d+ scores wait: ConnectError", result.stdout)
    with server:
        assert run("export", "--ledger", waiting).exit_code == 0


@pytest.mark.usefixtures("lenient")
def test_export_with_wrong_keys_says_so_at_once(run: Run, waiting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with LangfuseServer() as server:
        set_keys(monkeypatch, server)
        monkeypatch.setenv("LANGFUSE_SECRET_KEY", "sk-lf-wrong")
        result = run("export", "--ledger", waiting)
        assert result.exit_code == 1
        assert "turntrace doctor" in result.stdout
        assert len(server.requests) == 1


def test_export_shows_what_waits_and_what_was_set_apart_and_sends_that_again(
    run: Run, waiting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = run("export", "--status", "--ledger", waiting)
    assert status.exit_code == 0
    assert re.search(r"^spans that wait +3  ", status.stdout, re.MULTILINE)
    assert re.search(r"^oldest +\d{4}-\d\d-\d\d .* ago$", status.stdout, re.MULTILINE)
    with LangfuseServer() as server:
        set_keys(monkeypatch, server)
        server.refuses = lambda span: span.name == "conversation.turn"
        result = run("export", "--ledger", waiting)
        assert result.exit_code == 0
        assert "1 were refused and set apart" in result.stdout
        status = run("export", "--status", "--ledger", waiting)
        assert re.search(r"^set apart +1$", status.stdout, re.MULTILINE)
        assert "1: 400:" in status.stdout
        server.refuses = None
        assert run("export", "--again", "--ledger", waiting).exit_code == 0
        assert "conversation.turn" in {span.name for span in server.spans()}


def test_export_watches_until_it_is_stopped(waiting: str) -> None:
    with LangfuseServer() as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "turntrace.cli.main", "export", "--watch", "--ledger", waiting],
            env={**os.environ, **server.keys},
            stdout=subprocess.PIPE,
            text=True,
        )
        until(lambda: len(server.spans()) == 3)
        tracker = SessionTracker(waiting, tracer_provider=TracerProvider(), outbox=True)
        with tracker.session() as session, session.conversation("c-2").turn("Hello"):
            pass
        tracker.shutdown()
        until(lambda: len(server.spans()) == 6 and tracker.ledger.to_send.status().is_empty)
        process.send_signal(signal.SIGINT)
        assert "Nothing waits." in process.communicate(timeout=60)[0]
        assert process.returncode == 0


def until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.05)
