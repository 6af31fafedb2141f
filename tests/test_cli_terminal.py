"""The commands in terminals of every kind and in none: widths, colours, encodings, pipes, Ctrl-C, completion."""

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import runner
from test_cli_questions import fill
from turntrace import SessionTracker
from turntrace.cli import links, lookup, running
from turntrace.cli.columns import NEEDED, Column, figures, fitting
from turntrace.cli.main import COMMANDS, app
from turntrace.errors import LedgerError

PROGRAM = (sys.executable, "-m", "turntrace.cli.main")
UNWANTED = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM", "PYTHONIOENCODING", "PYTHONUTF8")
ODD = "caf\u00e9 \U0001f600 \x1b[31m\u202e"
"""A channel with what ASCII does not have, an escape sequence and a change of direction."""
ESCAPES = re.compile(r"\x1b\[[\d;?]*[a-zA-Z]")
COLOURS = re.compile(r"\x1b\[[\d;]*[349]\dm")


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli") / "ledger.db"


@pytest.fixture
def url(file: Path) -> str:
    """Give the URL of a ledger with sessions of every kind, and one of an odd channel."""
    if not file.exists():
        fill(f"sqlite:///{file}")
        with SessionTracker(f"sqlite:///{file}") as tracker:
            session = tracker.start_session(user_id="ann", session_id="odd", channel=ODD)
            with session.conversation("c", topic=ODD).turn("Hi") as turn:
                turn.set_intent(ODD)
            session.end(ODD)
    return f"sqlite:///{file}"


def environment(url: str, **variables: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    return {**known, "TURNTRACE_LEDGER_URL": url, **variables}


def piped(url: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command whose output is read by a pipe."""
    return subprocess.run(
        [*PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(url, **variables),
        timeout=60,
        check=False,
    )


def in_terminal(url: str, *arguments: str, columns: int = 80, **variables: str) -> str:
    """Run a command in a terminal, and return all that it was sent."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    process = subprocess.Popen(
        ["sh", "-c", f'stty cols {columns}; exec "$@"', "sh", *PROGRAM, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(url, **{"TERM": "xterm-256color", **variables}),
    )
    os.close(theirs)
    found = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # nobody has the other end any more
            break
        if not part:
            break
        found += part
    os.close(ours)
    assert process.wait(60) == 0, found
    return found.decode()


# --- widths -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_no_line_is_wider_than_the_terminal(columns: int, url: str) -> None:
    for command in (
        "sessions",
        "users",
        "funnel",
        "dropoff",
        "show people",
        "show fourth",
        "show long --context",
        "show fourth --brief",
        "show fourth --turn 2",
        "sessions --sort slowest-turn",
        "sessions --unsatisfied",
    ):
        result = runner().invoke(app, [*command.split(), "--ledger", url], env={"COLUMNS": str(columns)})
        assert result.exit_code == 0
        assert max(map(len, result.stdout.splitlines())) <= columns, command
        assert "\x1b" not in result.stdout
        assert "\u202e" not in result.stdout


def test_the_columns_that_matter_least_go_first(url: str) -> None:
    heads = {}
    for columns in (60, 80, 100, 130):
        asked = ["sessions", "--ledger", url, "--until", "2026-01-02"]
        result = runner().invoke(app, asked, env={"COLUMNS": str(columns)})
        heads[columns] = re.split(" {2,}", result.stdout.splitlines()[0].strip())
    assert heads[60] == ["session", "user", "channel", "started UTC", "turns", "ended"]
    assert heads[80] == ["session", "user", "channel", "started UTC", "turns", "cost", "ended"]
    assert heads[100] == [*heads[80][:5], "tokens", "cost", "duration", "ended"]
    assert heads[130] == [*heads[100][:-1], "per turn", "satisfied", "last intent", "ended"]


def test_texts_are_cut_before_a_needed_column_goes_and_never_for_one_that_is_not() -> None:
    from rich.text import Text

    name = Column("name", [Text("a long name")], least=5)
    needed, spare = figures("needed", ["1"], rank=NEEDED), figures("spare", ["2"], rank=NEEDED + 1)
    for width, kept in ((26, "name needed spare"), (25, "name needed"), (13, "name needed"), (12, "name"), (1, "name")):
        assert [column.name for column in fitting([name, needed, spare], width)] == kept.split()


def test_the_width_is_that_of_the_terminal(url: str) -> None:
    narrow = in_terminal(url, "sessions", columns=60)
    wide = in_terminal(url, "sessions", columns=140)
    assert "tokens" not in narrow.splitlines()[0]
    assert "last intent" in wide


def words(text: str) -> str:
    """Return what a terminal shows, without its colours and the ends of its lines."""
    return " ".join(ESCAPES.sub("", text).split())


def test_columns_that_are_left_out_are_named_where_there_is_a_terminal_and_nowhere_else(url: str) -> None:
    shown = in_terminal(url, "sessions", columns=60)
    left_out = "left out for width: user, tokens, cost, duration, per turn, satisfied, last intent; --json has all"
    assert words(shown).endswith(left_out)
    assert "\x1b[2mleft out" in shown
    assert "left out" not in in_terminal(url, "sessions", columns=160)
    first_day = "left out for width: first day; --json has all"
    assert words(in_terminal(url, "users", columns=80)).endswith(first_day)
    assert words(in_terminal(url, "funnel", columns=50)).endswith("left out for width: went; --json has all")
    assert "left out" not in in_terminal(url, "sessions", "--json", columns=60)
    for variables in ({"COLUMNS": "60"}, {"COLUMNS": "60", "FORCE_COLOR": "1", "TERM": "xterm-256color"}):
        done = piped(url, "sessions", **variables)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"left out" not in done.stdout


# --- colours and escapes ----------------------------------------------------------------------------------------------
def test_colours_are_for_terminals_that_want_them(url: str) -> None:
    shown = in_terminal(url, "show", "fourth")
    assert COLOURS.search(shown)
    assert not COLOURS.search(in_terminal(url, "show", "fourth", NO_COLOR="1"))
    dumb = in_terminal(url, "show", "fourth", TERM="dumb")
    assert "\x1b" not in dumb
    assert "drop-off" in dumb


def test_a_pipe_gets_no_escapes_unless_they_are_asked_for(url: str) -> None:
    plain = piped(url, "sessions")
    assert (plain.returncode, plain.stderr) == (0, b"")
    assert b"\x1b" not in plain.stdout
    asked = piped(url, "sessions", FORCE_COLOR="1", TERM="xterm-256color")
    assert COLOURS.search(asked.stdout.decode())
    assert ESCAPES.sub("", asked.stdout.decode()) == plain.stdout.decode()
    swept = piped(url, "sweep", FORCE_COLOR="1", TERM="xterm-256color")
    assert (swept.returncode, swept.stderr) == (0, b"")  # no spinner in a file


def test_what_comes_from_outside_never_changes_the_terminal(url: str) -> None:
    for command in ("sessions", "show odd", "dropoff", "sessions --csv"):
        shown = in_terminal(url, *command.split(), NO_COLOR="1", columns=140)
        assert "\x1b[31m" not in shown
        assert "\u202e" not in shown
        if command == "show odd":
            assert "\\x1b[31m\\u202e" in shown


# --- encodings --------------------------------------------------------------------------------------------------------
def test_an_output_of_ascii_gets_ascii(url: str) -> None:
    for command in ("sessions", "show odd", "show long --context", "funnel"):
        done = piped(url, *command.split(), PYTHONIOENCODING="ascii", COLUMNS="120")
        assert (done.returncode, done.stderr) == (0, b""), command
        assert done.stdout.isascii()
        if command == "show odd":
            assert b"caf\\xe9 \\U0001f600 \\x1b[31m\\u202e" in done.stdout
            assert b"+-- " in done.stdout or b"`-- " in done.stdout
        if command == "funnel":
            assert re.search(rb"1 signup +#+ +3", done.stdout)
    wrong = piped(url, "show", "caf\u00e9", PYTHONIOENCODING="ascii")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(b"turntrace: No session, turn or trace has an id that begins with 'caf\\xe9'")


# --- pipes and Ctrl-C -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["show people", "sessions --json", "sessions --csv", "--help"])
def test_a_reader_that_goes_away_is_no_error(command: str, url: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*PROGRAM, *command.split()],
        stdout=write,
        stderr=subprocess.PIPE,
        env=environment(url),
        timeout=60,
        check=False,
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode in (running.NOBODY_READS, 1 if command == "--help" else running.NOBODY_READS)


@pytest.fixture
def served(url: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [*PROGRAM, "report", "--serve", "--channel", "web"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(url),
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    found = re.fullmatch(r"The report is at (http://127\.0\.0\.1:\d+/) until Ctrl-C\.\n", said)
    assert found is not None, said
    yield process, found[1]
    process.kill()
    process.communicate()


def test_a_report_is_served_until_ctrl_c(served: tuple[subprocess.Popen[str], str]) -> None:
    process, address = served
    with urllib.request.urlopen(address, timeout=60) as answer:
        assert "onboarding" in answer.read().decode()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].strip() == ""
    assert process.returncode == 0


def test_ctrl_c_is_one_line_and_130(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("turntrace.cli.looking.sessions_by", stopped)
    result = runner().invoke(app, ["sessions", "--ledger", url])
    assert (result.exit_code, result.stderr) == (130, "turntrace: stopped\n")


# --- what goes wrong --------------------------------------------------------------------------------------------------
def test_a_mistake_of_our_own_is_one_line_too(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr("turntrace.analytics.funnels", broken)
    result = runner().invoke(app, ["funnel", "--ledger", url])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "turntrace: A mistake of turntrace's own: ValueError: two lines. Please report it, with what "
        "TURNTRACE_TRACEBACK=1 in the environment shows.\n"
    )
    monkeypatch.setenv("TURNTRACE_TRACEBACK", "1")
    assert isinstance(runner().invoke(app, ["funnel", "--ledger", url]).exception, ValueError)


def test_what_the_system_refuses_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/there/x.html")

    monkeypatch.setattr("turntrace.report.write_report", full)
    result = runner().invoke(app, ["report", "-o", "x.html", "--ledger", url])
    assert result.exit_code == 2
    assert result.stderr.startswith("turntrace: /there/x.html: No space left on device. Check the place")
    assert result.stderr.count("\n") == 1


def test_help_documents_the_exit_codes_and_every_command_says_what_it_does() -> None:
    whole = runner().invoke(app, ["--help"]).stdout
    for code in ("0    done", "1    done, but", "2    could not be done", "130  stopped", "141  whoever"):
        assert f"\n    {code}" in whole
    assert "..." not in whole.split("Commands:")[1]
    for function in COMMANDS:
        result = runner().invoke(app, [function.__name__, "--help"])
        assert result.exit_code == 0
        assert result.stdout.isascii()
        assert (function.__doc__ or "").splitlines()[0] in result.stdout


def test_a_report_links_to_langfuse_only_where_its_project_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from loopback import LangfuseServer

    assert links.langfuse_place() is None
    with LangfuseServer() as server:
        for name, value in {**server.keys, "LANGFUSE_TIMEOUT": "1"}.items():
            monkeypatch.setenv(name, value)
        place = links.langfuse_place()
        assert place is not None
        assert place.session_url("s").startswith(server.keys["LANGFUSE_BASE_URL"])
        address = server.keys["LANGFUSE_BASE_URL"]
    monkeypatch.setenv("LANGFUSE_BASE_URL", address)
    assert links.langfuse_place() is None


# --- completion -------------------------------------------------------------------------------------------------------
def complete(url: str, shell: str, line: str) -> subprocess.CompletedProcess[bytes]:
    """Ask for what a shell's completion script asks for."""
    words = line.split(" ")
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    return piped(url, _TURNTRACE_COMPLETE=f"complete_{shell}", **asked)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_options_and_sessions(shell: str, url: str) -> None:
    found = complete(url, shell, "turntrace show f")
    assert found.stderr == b""
    ids = re.findall(rb"\w+", re.sub(rb"_arguments|_describe.*", b"", found.stdout))
    assert {b"first", b"fourth"} <= set(ids)
    assert b"second" not in found.stdout
    assert b"dropoff" in complete(url, shell, "turntrace dr").stdout
    assert b"--channel" in complete(url, shell, "turntrace sessions --ch").stdout


def test_a_completion_is_never_an_error(url: str, tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_text("no database " * 1000)
    for wrong in (f"sqlite:///{tmp_path}/none.db", f"sqlite:///{tmp_path}/broken.db", "nonsense"):
        found = complete(wrong, "bash", "turntrace show f")
        assert (found.stdout.strip(), found.stderr) == (b"", b"")
    assert not (tmp_path / "none.db").exists()
    named = complete("nonsense", "bash", f"turntrace show --ledger {url} f")
    assert set(named.stdout.split()) == {b"first", b"fourth"}


def test_a_completion_offers_50_sessions_at_most(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'many.db'}"
    with SessionTracker(url) as tracker:
        for number in range(60):
            tracker.start_session(session_id=f"s-{number:02}")
    assert len(lookup.suggest_sessions(url, "s-")) == 50
    assert sorted(lookup.suggest_sessions(url, "s-1")) == [f"s-{number}" for number in range(10, 20)]
    assert lookup.suggest_sessions(url, "%") == []
    with pytest.raises(LedgerError):
        lookup.open_existing(f"sqlite:///{tmp_path}/none.db")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_shown_and_is_one_of_that_shell(shell: str, url: str, tmp_path: Path) -> None:
    done = piped(url, _TURNTRACE_COMPLETE=f"source_{shell}")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"_TURNTRACE_COMPLETE=complete_" + shell.encode() in done.stdout
    if shutil.which(shell):
        (tmp_path / "script").write_bytes(done.stdout)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash on this machine")
def test_bash_completes_by_the_script_that_is_shown(url: str, tmp_path: Path) -> None:
    script = piped(url, _TURNTRACE_COMPLETE="source_bash").stdout.decode()
    program = tmp_path / "turntrace"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m turntrace.cli.main "$@"\n')
    program.chmod(0o755)
    [name] = re.findall(r"complete .*-F (\w+) turntrace", script)
    asked = f'{script}\nCOMP_WORDS=(turntrace show f) COMP_CWORD=2\n{name} turntrace\necho "${{COMPREPLY[@]}}"'
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", asked], capture_output=True, env=environment(url, PATH=path), timeout=60, check=True
    )
    assert (set(done.stdout.split()), done.stderr) == ({b"first", b"fourth"}, b"")
