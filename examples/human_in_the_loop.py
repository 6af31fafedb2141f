"""A turn that waits for a person, over two processes: it stays one turn and one trace.

Run it alone: ``python examples/human_in_the_loop.py``. It needs ``pip install langgraph-checkpoint-sqlite``, but no
server or keys. The first process runs until the graph asks, and exits; the second one brings the answer.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.types import Command, interrupt

from turntrace import SessionCallbackHandler, SessionTracker


def refund(state: MessagesState) -> dict:
    """Pay money back, if a person agrees."""
    agreed = interrupt("Pay 25 euros back?")  # the run ends here; with the answer the node runs again from its top
    return {"messages": [("ai", "25 euros are on their way." if agreed else "I must not pay that back.")]}


def run(folder: Path, given: object) -> dict:
    """Run the graph, in whatever process: what it remembers is in the folder."""
    # Both processes need the same two things: LangGraph's checkpoints, and turntrace's ledger (TURNTRACE_LEDGER_URL),
    # where the turn waits. Nothing has to be handed over: the thread id of the conversation finds it.
    with SqliteSaver.from_conn_string(str(folder / "checkpoints.db")) as saver, SessionTracker() as tracker:
        builder = StateGraph(MessagesState).add_node("refund", refund).add_edge(START, "refund")
        graph = builder.compile(checkpointer=saver).with_config(callbacks=[SessionCallbackHandler(tracker)])
        config = {"configurable": {"thread_id": "order 17"}, "metadata": {"user_id": "ann@example.com"}}
        return graph.invoke(given, config)


def ask(folder: Path) -> None:
    """Run until the graph asks: the first process."""
    result = run(folder, {"messages": [("user", "I want my money back")]})
    print(f"the first process asks: {result['__interrupt__'][0].value}", flush=True)


def answer(folder: Path) -> None:
    """Say yes, and look at the turn: the second process."""
    result = run(folder, Command(resume=True))
    print(f"the second process is told yes: {result['messages'][-1].content}")

    with SessionTracker() as tracker:
        for session in tracker.ledger.sessions():
            turns = [turn for turn, _steps in tracker.ledger.turns(session.id)]
            traces = {turn.trace_id for turn in turns}
            print(f"\n{len(turns)} turn, {len(traces)} trace, {turns[0].agent_runs} agent runs: {turns[0].status}")
            print(f"it waited {turns[0].wait_ms / 1000:.1f} s for a person and worked for {turns[0].latency_ms} ms")


def main() -> None:
    """Start the first process, and be the second one."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TURNTRACE_LEDGER_URL"] = f"sqlite:///{folder}/ledger.db"  # inherited by the first process
        subprocess.run([sys.executable, __file__, folder], check=True)
        answer(Path(folder))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        ask(Path(sys.argv[1]))
    else:
        main()
