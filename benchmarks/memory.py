"""How much memory tracking takes over the bare graph, and whether it grows while users come back.

Each variant runs in a process of its own, which imports nothing of the others. 50 users come back again and again, with
ten turns a conversation, which is then deleted from the checkpointer. Most memory is `VmHWM`, memory now `VmRSS` of
Linux. All send to a sink on loopback. turntrace has its keys and no more, as in the README: Langfuse's client, which
takes about 7 MB in an app that needs it, is not in its row. With a ContextTracker, the agent fits what it gives its
model.

- most: the peak after 500 turns, over the bare graph's; of three processes a variant, in turn;
- growth: memory at each quarter of many turns, of one process a variant.

    python benchmarks/memory.py [--turns 500] [--growth 50000] [--repeats 3] [--json FILE]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _sink import Sink
from _tables import Report, arguments, as_installed, summary

BARE, OURS, FITTING, LANGFUSE = "bare graph", "turntrace", "turntrace, ContextTracker", "langfuse.langchain's handler"
VARIANTS = (BARE, OURS, FITTING, LANGFUSE)
GROWING = (BARE, OURS, FITTING)
USERS = 50
TURNS_OF_CONVERSATION = 10
SENT_EVERY = 500
MOST_MB = 40.0
MOST_GROWTH_MB = 2.0
"""What allocators and caches of the operating system's move by themselves."""


# --- the process of a variant -----------------------------------------------------------------------------------------
def memory_mb(name: str) -> float:
    """Read a figure of this process from Linux."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e6


def tracking(variant: str, sink_url: str, folder: Path) -> tuple[Any, Callable[[], Any]]:
    """Return the handler of a variant, and what sends what it holds."""
    if variant == BARE:
        return None, lambda: None
    import _variants

    at = AtSink(sink_url)
    its = _variants.langfuse(at) if variant == LANGFUSE else _variants.turntrace(at, folder, is_alone=True)
    return its.handler, its.drain


class AtSink(Sink):
    """The sink that another process began."""

    def __init__(self, url: str) -> None:
        self._url = url


def run_turns(variant: str, turns: int, sink_url: str) -> dict[str, Any]:
    """Run turns, and say how much memory there was after each quarter of them."""
    from _app import build_app, question
    from langgraph.checkpoint.memory import InMemorySaver

    saver = InMemorySaver()
    with tempfile.TemporaryDirectory() as folder:
        handler, drain = tracking(variant, sink_url, Path(folder))
        fit = None
        if variant == FITTING:
            from turntrace import ContextTracker

            fit = ContextTracker("gpt-4o").fit
        app = build_app(saver, fit=fit)
        quarters = []
        for number in range(turns):
            conversation, in_it = divmod(number, TURNS_OF_CONVERSATION)
            its: Any = {
                "configurable": {"thread_id": f"{conversation}"},
                "metadata": {"user_id": f"{conversation % USERS}", "langfuse_session_id": f"{conversation}"},
                "callbacks": [] if handler is None else [handler],
            }
            app.invoke({"messages": [("user", question(in_it + 1))]}, its)
            if in_it == TURNS_OF_CONVERSATION - 1:
                saver.delete_thread(f"{conversation}")
            if (number + 1) % SENT_EVERY == 0:
                drain()
            if (number + 1) % max(1, turns // 4) == 0:
                quarters.append(memory_mb("VmRSS"))
        drain()
        return {"peak_mb": memory_mb("VmHWM"), "quarters_mb": quarters[:4], "tiktoken": "tiktoken" in sys.modules}


# --- all processes ----------------------------------------------------------------------------------------------------
def run_child(variant: str, turns: int, sink: Sink) -> dict[str, Any]:
    """Run turns in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--variant",
        variant,
        "--turns",
        str(turns),
        "--sink",
        sink.url("").rstrip("/"),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=as_installed())
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(report: Report, options: argparse.Namespace) -> None:
    """Run all processes, and print what they took."""
    with Sink() as sink:
        peaks: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
        for _ in range(options.repeats):
            for variant, found in peaks.items():
                found.append(run_child(variant, options.turns, sink))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # two at a time: memory is no matter of time
            grown = pool.map(lambda variant: run_child(variant, options.growth, sink)["quarters_mb"], GROWING)
            growth = dict(zip(GROWING, grown, strict=True))
    bare = statistics.median(each["peak_mb"] for each in peaks[BARE])
    rows = []
    for variant, found in peaks.items():
        most = summary([each["peak_mb"] for each in found])
        over = most["median"] - bare
        tiktoken = found[0]["tiktoken"]
        rows.append([variant, f"{most['median']:.1f}", f"{over:.1f}", "yes" if tiktoken else "no"])
        report.results[variant] = {"peak_mb": most, "over_bare_mb": over, "tiktoken": tiktoken}
    report.table(
        f"Most memory, {options.turns:,} turns", ("variant", "peak, MB", "over bare, MB", "tiktoken loaded"), rows
    )
    quarters = [f"{options.growth * each // 4:,} turns, MB" for each in (1, 2, 3, 4)]
    report.table(
        "Memory while users come back",
        ("variant", *quarters, "last quarters, MB"),
        [[name, *(f"{each:.1f}" for each in mb), f"{mb[3] - mb[1]:+.1f}"] for name, mb in growth.items()],
    )
    report.results["growth"] = {"turns": options.growth, "quarters_mb": growth}
    report.target(
        "most memory of turntrace over the bare graph, without tiktoken",
        report.results[OURS]["over_bare_mb"],
        at_most=MOST_MB,
        unit=" MB",
    )
    of_graph = growth[BARE][3] - growth[BARE][1]
    for variant in GROWING[1:]:
        added = growth[variant][3] - growth[variant][1] - of_graph
        what = f"growth of {variant} from half to all of {options.growth:,} turns, over the bare graph's"
        report.target(what, added, at_most=MOST_GROWTH_MB, unit=" MB")


def main() -> None:
    """Run the benchmark, or the process of a variant."""
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=500)
    parser.add_argument("--growth", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--sink", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant is not None:
        print(json.dumps(run_turns(options.variant, options.turns, options.sink)))
        return
    report = Report("Memory", __doc__)
    run(report, options)
    report.write(options.json)


if __name__ == "__main__":
    main()
