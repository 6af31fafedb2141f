"""Each example runs alone, as a user would run it, and says what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_more_examples import MORE

EXAMPLES = Path(__file__).parent.parent / "examples"
EXPECTED = {
    "callback_only.py": ("agent: Your parcel arrives on Friday.", ": 3 turns", "turn 2: question -> answer, 3 steps"),
    "explicit_sessions.py": ("(This is turn 2.)", "2 turns in ", "ended by user_exit"),
    "fastapi_chat.py": (
        "ann, whole:    Your parcel arrives on Friday.",
        "ann, streamed: Your parcel arrives on Friday.",
        "bob, leaves:   Your parcel\n",
        " on web, turns: 2\n  turn 1 of parcel: completed, 3 steps\n  turn 2 of parcel: completed, 3 steps\n",
        " on mobile, turns: 1\n  turn 1 of bobs: abandoned, 3 steps\n",
    ),
    "human_in_the_loop.py": (
        "the first process asks: Pay 25 euros back?",
        "the second process is told yes: 25 euros are on their way.",
        "1 turn, 1 trace, 2 agent runs: completed",
    ),
}
ARGUMENTS = {"fastapi_chat.py": ("--once",)}


def test_every_example_is_run() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted([*EXPECTED, *MORE])


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_runs_alone(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TURNTRACE_LEDGER_URL": f"sqlite:///{tmp_path / 'ledger.db'}"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *ARGUMENTS.get(name, ())],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for line in EXPECTED[name]:
        assert line in done.stdout
