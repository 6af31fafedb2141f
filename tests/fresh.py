"""Processes of their own for tests, without the wait for imports.

Each is forked from one that has imported turntrace and done nothing else, so it has no provider, no client of Langfuse
and no tracker yet. What happens at the exit of an interpreter needs a real one: such a process ends without it.
"""

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
if hasattr(os, "fork"):
    CONTEXT.set_forkserver_preload(["turntrace", "turntrace.testing"])

PATIENCE_S = 60
OURS = ("LANGFUSE_", "TURNTRACE_", "OTEL_")


def environment(**variables: str) -> dict[str, str]:
    """Return the environment for a process: this one's, without what is set for turntrace and its neighbours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {**kept, "NO_PROXY": "*", **variables}


def _run(script: str, variables: Mapping[str, str], output: str, told: Connection) -> None:
    os.environ.clear()
    os.environ.update(variables)
    with Path(output).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    exec(
        compile(script, "<script>", "exec"), {"__name__": "__main__", "tell": told.send_bytes, "heard": told.recv_bytes}
    )


class Fresh:
    """A script in a process of its own.

    Args:
        script: What it runs. It may call ``tell(b"...")``, and ``heard()`` to wait for `Fresh.tell`.
        variables: The variables of its environment that matter.
    """

    def __init__(self, script: str, **variables: str) -> None:
        self._told, telling = CONTEXT.Pipe()
        with NamedTemporaryFile(delete=False) as file:
            self._output = Path(file.name)
        arguments = (script, environment(**variables), str(self._output), telling)
        self.process: Any = CONTEXT.Process(target=_run, args=arguments)  # type: ignore[attr-defined]
        self.process.start()
        telling.close()

    def told(self) -> bytes:
        """Wait for what the script tells next."""
        assert self._told.poll(PATIENCE_S), self.output()
        return self._told.recv_bytes()

    def tell(self, what: bytes) -> None:
        """Tell the script something."""
        self._told.send_bytes(what)

    def output(self) -> str:
        """Return what it has written so far."""
        return self._output.read_text(encoding="utf-8")

    def finish(self) -> str:
        """Wait for its end and return what it wrote."""
        self.process.join(PATIENCE_S)
        code, output = self.process.exitcode, self.output()
        self.kill()
        assert code == 0, f"exit code {code}\n{output}"
        return output

    def kill(self) -> None:
        """Kill it, if it still runs."""
        self.process.kill()
        self.process.join(PATIENCE_S)
        self._told.close()
        self._output.unlink(missing_ok=True)


def run(script: str, **variables: str) -> str:
    """Run a script in a process of its own, and return what it wrote."""
    return Fresh(script, **variables).finish()
