"""Workers that are forked, and begin or end in ways of their own: Celery's, RQ's, multiprocessing's, gevent's."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fresh
from loopback import LangfuseServer
from turntrace.ledger import Ledger

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

TASKS = """
from celery import Celery
from turntrace import SessionTracker

app = Celery("tasks", broker="filesystem://")
folder = FOLDER
app.conf.broker_transport_options = {
    "data_folder_in": folder, "data_folder_out": folder, "control_folder": folder + "/control"
}
app.conf.worker_max_tasks_per_child = 1
tracker = SessionTracker()

@app.task
def ask(number):
    with tracker.start_session(session_id=f"s{number}").conversation("c").turn("Hello"):
        pass
"""
TASKS_TO_DO = 8


def completed(url: str, sessions: int) -> int:
    """Return how many turns of the sessions s0, s1, ... are completed, and assert that no others began."""
    ledger = Ledger(url)
    turns = [turn.status for number in range(sessions) for turn, _ in ledger.turns(f"s{number}")]
    ledger.close()
    assert set(turns) <= {"completed"}
    return len(turns)


def test_children_of_celerys_that_are_replaced_lose_no_turn(tmp_path: Path) -> None:
    messages = tmp_path / "messages"
    messages.mkdir()
    (tmp_path / "tasks.py").write_text(TASKS.replace("FOLDER", repr(str(messages))))
    with LangfuseServer() as server:
        url = f"sqlite:///{tmp_path}/ledger.db"
        environment = fresh.environment(TURNTRACE_LEDGER_URL=url, **server.keys)
        sends = f"import tasks; [tasks.ask.delay(number) for number in range({TASKS_TO_DO})]"
        subprocess.run([sys.executable, "-c", sends], check=True, cwd=tmp_path, env=environment)
        command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--concurrency", "2", "--loglevel", "INFO"]
        with (tmp_path / "log").open("wb") as log:
            worker = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        try:
            give_up = time.monotonic() + fresh.PATIENCE_S
            while (tmp_path / "log").read_text().count("succeeded in") < TASKS_TO_DO:
                assert worker.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < give_up, (tmp_path / "log").read_text()
                time.sleep(0.05)
            worker.terminate()
            worker.wait(fresh.PATIENCE_S)
        finally:
            worker.kill()
        assert completed(url, TASKS_TO_DO) == TASKS_TO_DO
        assert sum(span.name == "conversation.turn" for span in server.spans()) == TASKS_TO_DO


JOBS = """
from turntrace import SessionTracker

tracker = SessionTracker()

def ask(number):
    with tracker.start_session(session_id=f"s{number}").conversation("c").turn("Hello"):
        pass
"""
WORKS = """
import sys
from redis import Redis
from rq import Queue, Worker
IMPORTED
redis = Redis(unix_socket_path="redis.sock")
queue = Queue(connection=redis)
for number in range(4):
    queue.enqueue("jobs.ask", number)
Worker([queue], connection=redis).work(burst=True)
"""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[None]:
    program = shutil.which("redis-server")
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("there is no redis-server on the PATH")
    socket = tmp_path / "redis.sock"
    server = subprocess.Popen(
        [program, "--port", "0", "--unixsocket", "redis.sock", "--save", "", "--daemonize", "no"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + fresh.PATIENCE_S
        while not socket.exists():
            assert server.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.01)
        yield
    finally:
        server.kill()
        server.wait()


@pytest.mark.usefixtures("redis")
@pytest.mark.parametrize("imported", ["", "import jobs"], ids=["made in the child", "made before"])
def test_children_of_rqs_lose_no_turn(tmp_path: Path, imported: str) -> None:
    (tmp_path / "jobs.py").write_text(JOBS)
    url = f"sqlite:///{tmp_path}/ledger.db"
    environment = fresh.environment(TURNTRACE_LEDGER_URL=url, PYTHONPATH=str(tmp_path))
    works = [sys.executable, "-c", WORKS.replace("IMPORTED", imported)]
    subprocess.run(works, check=True, cwd=tmp_path, env=environment, timeout=fresh.PATIENCE_S)
    assert completed(url, 4) == 4


IN_POOL = """
import multiprocessing

def ask(number):
    from turntrace import SessionTracker
    with SessionTracker().start_session(session_id=f"s{number}").conversation("c").turn("Hello"):
        pass

if __name__ == "__main__":
    child = multiprocessing.get_context("HOW").Process(target=ask, args=(0,))
    child.start()
    child.join()
"""


@pytest.mark.parametrize("how", ["fork", "forkserver", "spawn"])
def test_a_child_of_multiprocessings_that_imports_turntrace_loses_no_turn(tmp_path: Path, how: str) -> None:
    (tmp_path / "main.py").write_text(IN_POOL.replace("HOW", how))
    url = f"sqlite:///{tmp_path}/ledger.db"
    environment = fresh.environment(TURNTRACE_LEDGER_URL=url)
    subprocess.run([sys.executable, "main.py"], check=True, cwd=tmp_path, env=environment, timeout=fresh.PATIENCE_S)
    assert completed(url, 1) == 1


IS_PATCHED = """
import os, signal, sys
import gevent.monkey
from turntrace import SessionTracker

tracker = SessionTracker()
tracker.start_session(session_id="parent").conversation("c").start_turn("Hello").end()
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    gevent.monkey.patch_all()  # as gunicorn --preload --worker-class gevent does it

    def talk(number):
        with tracker.start_session(session_id=f"child {number}").conversation("c").turn("Hello"):
            gevent.sleep(0.01)

    for first in (0, 5):
        gevent.joinall([gevent.spawn(talk, number) for number in range(first, first + 5)])
        assert tracker.flush(10)
    tracker.shutdown()
    sys.stdout.flush()
    os._exit(0)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
tracker.flush()
print(code)
"""


@pytest.mark.filterwarnings("ignore:Monkey-patching")
def test_a_process_that_gevent_patches_after_the_fork_goes_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    with LangfuseServer() as server:
        environment = fresh.environment(TURNTRACE_LEDGER_URL=url, **server.keys)
        command = [sys.executable, "-W", "ignore", "-c", IS_PATCHED]
        out = subprocess.run(command, env=environment, timeout=fresh.PATIENCE_S, capture_output=True, text=True)
        assert (out.stdout, out.stderr, out.returncode) == ("0\n", "", 0)
        roots = [span.attributes["session.id"] for span in server.spans() if span.name == "conversation.turn"]
    assert sorted(roots) == sorted(["parent", *(f"child {number}" for number in range(10))])
