"""A PostgreSQL server for the tests: the one that is named, else one started from the system's own programs."""

import itertools
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

GIVEN = os.environ.get("TURNTRACE_TEST_POSTGRES_URL")
WHY_NOT = (
    "there is no PostgreSQL: set TURNTRACE_TEST_POSTGRES_URL, or install one whose initdb and pg_ctl are on the PATH "
    "or under /usr/lib/postgresql"
)
_names = itertools.count(1)


def programs() -> Path | None:
    """Return the folder with ``initdb`` and ``pg_ctl``, or None."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "pg_ctl").exists()), None)


class Server:
    """A server of the tests' own, which may be stopped and started again.

    Args:
        home: An empty folder for all that it writes.
        folder: The folder with PostgreSQL's programs.
    """

    def __init__(self, home: str, folder: Path) -> None:
        self._home = home
        self._pg_ctl = folder / "pg_ctl"
        self._run = _runner(home)
        self._port = 0
        self._run(
            folder / "initdb", "--pgdata", f"{home}/data", "--username", "turntrace", "--auth", "trust", "--no-sync"
        )

    @property
    def url(self) -> str:
        """Where it is."""
        return f"postgresql+psycopg://turntrace@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._port = self._port or _free_port()
        options = f"-p {self._port} -h 127.0.0.1 -k {self._home} -c fsync=off -c max_connections=200"
        data, log = f"{self._home}/data", f"{self._home}/log"
        self._run(self._pg_ctl, "--pgdata", data, "--options", options, "--log", log, "--wait", "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop it, and wait until it is gone."""
        self._run(self._pg_ctl, "--pgdata", f"{self._home}/data", "--mode", mode, "stop")


@contextmanager
def own_server() -> Iterator[Server]:
    """Give a server that runs and is empty; skip the test without the programs, and fail it in CI."""
    folder = programs()
    if folder is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(WHY_NOT)
    with tempfile.TemporaryDirectory(prefix="turntrace-postgres-", ignore_cleanup_errors=True) as home:
        made = Server(home, folder)
        made.start()
        try:
            yield made
        finally:
            made.stop()


@contextmanager
def server() -> Iterator[str]:
    """Give the URL of a server that is empty; skip the test without one, and fail it in CI."""
    if GIVEN:
        yield GIVEN
        return
    with own_server() as made:
        yield made.url


def _runner(home: str) -> Any:
    """Return what runs PostgreSQL's programs: as the user ``postgres`` where this one is root, whom they refuse."""
    as_user: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(home, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]

    def run(program: Path, *arguments: str) -> None:
        done = subprocess.run(
            [*as_user, str(program), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=home,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr.decode()

    return run


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_schema(url: str) -> str:
    """Make an empty schema on a server, and return the URL by which everything goes into it."""
    name = f"turntrace_{os.getpid()}_{time.time_ns()}_{next(_names)}"
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    engine.dispose()
    return make_url(url).update_query_dict({"options": f"-csearch_path={name}"}).render_as_string(hide_password=False)
