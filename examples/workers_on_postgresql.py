"""Several worker processes on one ledger in PostgreSQL: the same users, the same conversations, nothing twice.

It needs ``pip install 'turntrace[postgres]'`` and a database of its own (it ends all sessions that it finds there):

    TURNTRACE_LEDGER_URL=postgresql+psycopg://user:password@localhost/trial python examples/workers_on_postgresql.py
"""

import multiprocessing
import os
import sys
import time
import uuid

from langchain_core.messages import AIMessage
from langgraph.graph import START, MessagesState, StateGraph

from turntrace import SessionCallbackHandler, SessionTracker
from turntrace.analytics import Filters, sessions_by

WORKERS = 4
ROUNDS = 5
USERS = ("ann", "bob", "cyd")


def agent(state: MessagesState) -> dict:
    """Answer; a real one would call its model, and remember by a checkpointer that all workers share."""
    return {"messages": [AIMessage("Done.")]}


def work(trial: str, begin) -> None:
    """Serve each user a few times: one worker of several."""
    # The tracker is made here, in the process that uses it: connections to a database cannot be handed to a child.
    # All workers find the ledger by TURNTRACE_LEDGER_URL. Leaving the block writes down what has ended.
    with SessionTracker() as tracker:
        graph = StateGraph(MessagesState).add_node("agent", agent).add_edge(START, "agent").compile()
        graph = graph.with_config(callbacks=[SessionCallbackHandler(tracker)])
        begin.wait(60)  # for the others, so that they get in each other's way
        for _ in range(ROUNDS):
            for user in USERS:
                config = {
                    "configurable": {"thread_id": f"{user}'s, {trial}"},
                    "metadata": {"user_id": f"{user}, {trial}", "channel": "web"},
                }
                graph.invoke({"messages": [("user", "Do it")]}, config)


def main() -> None:
    """Start the workers, and look at what they left in the ledger."""
    if not os.environ.get("TURNTRACE_LEDGER_URL", "").startswith("postgresql+psycopg://"):
        print("Set TURNTRACE_LEDGER_URL to a PostgreSQL database for trying things out, as in")
        print("TURNTRACE_LEDGER_URL=postgresql+psycopg://user:password@localhost/trial")
        sys.exit(2)

    trial = uuid.uuid4().hex[:8]  # users and conversations of this run only
    fresh = multiprocessing.get_context("spawn")  # not fork, which copies locks and connections in whatever state
    begin = fresh.Barrier(WORKERS)
    workers = [fresh.Process(target=work, args=(trial, begin)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"{WORKERS} workers, each {ROUNDS} turns with {len(USERS)} users: {[each.exitcode for each in workers]}")
    if any(each.exitcode for each in workers):
        sys.exit(1)

    with SessionTracker() as tracker:
        # Sweep in one process: SessionTracker(sweep_every=60), or `turntrace sweep` from cron. (More do no harm.) Here
        # it is made to believe that half an hour has gone by.
        later = time.time_ns() + 31 * 60 * 1_000_000_000
        first, second = tracker.sweep(later), tracker.sweep(later)
        print(f"the first sweep ends {first.sessions} sessions, the second {second.sessions}")
        for user in USERS:
            of_user = Filters(user_id=tracker.hash_user(f"{user}, {trial}"))  # the ledger knows hashes only
            [session] = sessions_by(tracker.ledger, filters=of_user)
            numbers = sorted(turn.number for turn, _steps in tracker.ledger.turns(session.id))
            assert numbers == list(range(1, WORKERS * ROUNDS + 1))  # whoever served it, without a gap
            print(f"{user}: 1 session, turns {numbers[0]} to {numbers[-1]}, ended by {session.end_reason}")


if __name__ == "__main__":
    main()
