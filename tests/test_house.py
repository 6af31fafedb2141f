"""The house: who may import whom, and what the package shows at its top."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import turntrace

PROJECT = Path(__file__).parents[1]
SOURCE = Path(turntrace.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

GROUND = (
    *("attributes", "records", "summaries", "decisions", "identity"),
    *("content", "current", "errors", "settings", "boundary", "waiting", "forking"),
)
FLOORS: dict[str, float] = {
    **dict.fromkeys(GROUND, 1),
    **dict.fromkeys(("context", "export", "ledger"), 2),
    "lifecycle": 3,
    **dict.fromkeys(("graph", "analytics"), 4),
    **dict.fromkeys(("report", "doctor"), 5),
    "demo": 6,
    "cli": 6.5,  # on one floor with the demo, which it runs
}
ABOVE_ALL = ("testing", "__init__", "__main__", "middleware")  # may import anything of ours
READS_MESSAGES = ("content", "context", "graph", "demo", "cli", "testing", "middleware")

PUBLIC_NAMES = {
    "SessionTracker",
    "Session",
    "Conversation",
    "Turn",
    "SessionCallbackHandler",
    "ConversationState",
    "track_node",
    "track_graph",
    "current_turn",
    "ContextTracker",
    "PruningDecision",
    "ContentPolicy",
    "Journey",
    "SessionSummary",
    "UserSummary",
    "TurntraceError",
}
OTHERS = ("langgraph", "langchain", "langchain_core", "langfuse", "opentelemetry")
LATE = ("langfuse", "genai_prices", "tiktoken", "plotly", "typer", "rich")


def room_of(module: str) -> str:
    """Return the part of the house that a module of ours is in: ``turntrace.ledger.store`` is in ``ledger``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path) -> str:
    parts = [part for part in path.relative_to(SOURCE.parent).with_suffix("").parts if part != "__init__"]
    return ".".join(parts)


def imports_of(path: Path) -> Iterator[tuple[str, str, int]]:
    """Give module, imported name (or "") and line of every import, also those within functions and type checks."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name of the module"
            for alias in node.names:
                yield str(node.module), alias.name, node.lineno


def rooms_imported_by(path: Path) -> Iterator[tuple[str, int]]:
    for module, name, line in imports_of(path):
        if module == "turntrace":  # from turntrace import attributes as a
            yield name or "__init__", line
        elif module.startswith("turntrace."):
            yield room_of(module), line


IDS = [str(path.relative_to(SOURCE)) for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_file_imports_only_from_the_floors_below(path: Path) -> None:
    room = room_of(module_of(path))
    if room in ABOVE_ALL:
        return
    assert room in FLOORS, f"{room} stands on no floor: add it to the house"
    for imported, line in rooms_imported_by(path):
        if imported == room or (room in GROUND and imported in GROUND):
            continue
        assert imported in FLOORS, f"{path.name}:{line}: {imported} stands above {room}"
        assert FLOORS[imported] < FLOORS[room], f"{path.name}:{line}: {imported} does not stand below {room}"


def test_the_files_of_the_ground_floor_do_not_import_in_a_circle() -> None:
    needs = {name: {room for room, _ in rooms_imported_by(SOURCE / f"{name}.py")} for name in GROUND}
    assert set(TopologicalSorter(needs).static_order()) == set(GROUND)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_public_names_of_others_are_imported(path: Path) -> None:
    for module, name, line in imports_of(path):
        if module.split(".")[0] in OTHERS:
            private = [part for part in (*module.split("."), name) if part.startswith("_") and part != "__version__"]
            assert private == [], f"{path.name}:{line}: {module} {name} is not public"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_what_reads_messages_knows_langchain(path: Path) -> None:
    if room_of(module_of(path)) in (*READS_MESSAGES, "__init__"):
        return
    known = [module for module, _, _ in imports_of(path) if module.split(".")[0] in OTHERS[:3]]
    assert known == []


def test_the_names_at_the_top_are_a_sorted_literal_of_the_designs_names() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    [value] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
    ]
    names = ast.literal_eval(value)
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    assert set(names) <= PUBLIC_NAMES
    assert names == turntrace.__all__


def test_everything_at_the_top_is_documented_and_there() -> None:
    for name in turntrace.__all__:
        assert getattr(turntrace, name).__doc__


def test_nothing_else_is_public_at_the_top() -> None:
    assert {name for name in dir(turntrace) if not name.startswith("_")} == set(turntrace.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'anything'"):
        turntrace.anything  # noqa: B018


def test_the_command_line_looks_without_langgraph() -> None:
    command = [sys.executable, "-c", "import sys, turntrace.cli.main; print(*sys.modules)"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "turntrace.ledger" in loaded
    assert [name for name in loaded if name.startswith(("langgraph", "langfuse", "plotly", "tiktoken"))] == []


@pytest.mark.parametrize("place", ["turntrace", "turntrace.lifecycle"])
def test_a_tracker_brings_its_callback_along(place: str) -> None:
    script = f"from {place} import SessionTracker\ntracker = SessionTracker('sqlite://')\n"
    asked = "print(len(tracker.start_session().conversation('c').start_turn('Hi').config['callbacks']))"
    command = [sys.executable, "-c", script + asked]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1] == "1"


def test_the_rooms_can_be_reached_from_the_top() -> None:
    rooms = "turntrace.errors.TurntraceError, turntrace.ledger.Ledger, turntrace.analytics.Filters"
    command = [sys.executable, "-c", f"import turntrace\nprint({rooms})"]
    assert "Filters" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_ci_tries_the_floor_of_every_dependency() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for line in [*project["dependencies"], *extras["langchain"], *extras["postgres"]]]
    wanted += [Requirement(line) for line in extras["report"]]
    tried = [Requirement(line.split("#")[0]) for line in (PROJECT / ".ci" / "oldest.txt").read_text().splitlines()[1:]]
    at = {one.name: Version(next(iter(one.specifier)).version) for one in tried}
    for one in wanted:
        (floor,) = (Version(part.version) for part in one.specifier if part.operator == ">=")
        assert at.get(one.name) == floor, f"{one}: .ci/oldest.txt has {at.get(one.name)}"


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert turntrace.__version__ == version("turntrace")
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        turntrace.missing  # noqa: B018


NEIGHBOURS = "import sys, langgraph.graph, langchain_core.tracers.context; before = set(sys.modules)"
"""What is loaded anyway where turntrace is used: httpx, say, loads rich where click is installed."""


def run(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LANGFUSE_", "COV"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert run(f"{NEIGHBOURS}; import turntrace; print(sorted(set({LATE!r}) & set(sys.modules) - before))") == "[]"


def test_tracking_without_keys_loads_no_client_of_langfuse() -> None:
    code = f"""
{NEIGHBOURS}
from turntrace import SessionTracker
with SessionTracker("sqlite://") as tracker, tracker.session(user_id="u") as session:
    with session.conversation("c").turn("Hello"):
        pass
    assert session.summary().total_turns == 1
print(sorted(set({LATE!r}) & set(sys.modules) - before))
"""
    assert run(code) == "[]"


def test_everything_can_be_imported_by_star() -> None:
    assert run("from turntrace import *; print(SessionTracker.__name__, track_graph.__name__)") == (
        "SessionTracker track_graph"
    )


def test_the_package_says_that_it_is_typed() -> None:
    assert (SOURCE / "py.typed").exists()
