"""What tracking costs in each way to run a graph, next to others in the same run, and what of it carries the session.

A round runs one turn of every app with every variant, in an order that changes: the linear app, a fan-out of eight
nodes, the linear app by an event loop, and the same streamed word for word (`astream`, messages). All send to a sink on
loopback in a process of its own.

- caller CPU: what it adds to the CPU time of the app's threads until the run returns, against the bare graph in the
  same round; threads of the tracers' own are not in it;
- in callbacks: the part of it that is spent in LangChain's calls of handlers, measured directly; what an event loop
  gives to a thread is not in it;
- process CPU: what it adds to that of the whole process until all is sent;
- the share of spans that carry their session: of spans that arrived, those with `session.id`; of LangSmith's runs,
  those with the metadata that makes a thread of them; of Opik's traces and spans, those with a thread.

    python benchmarks/ways.py [--rounds 40] [--json FILE]
"""

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from _app import build_app, build_parallel_app, question
from _sink import Sink
from _tables import Report, arguments, ranged, ratio
from _variants import (
    BARE,
    HEADER,
    LANGFUSE,
    ONE_SPAN,
    OURS,
    WARM_UP,
    CallbackClock,
    Cost,
    all_variants,
    cells,
    config,
    found_of,
    measure,
    shuffled,
    without_collection,
)
from langgraph.checkpoint.memory import InMemorySaver

LINEAR, PARALLEL, ASYNC, STREAMING = "linear", "parallel", "async", "streaming"
MOST_ASYNC = 1.2


@contextmanager
def apps(saver: InMemorySaver) -> Iterator[dict[str, Callable[[Any, Any], Any]]]:
    """Give what runs a turn of each app."""
    linear, parallel, by_loop = build_app(saver), build_parallel_app(saver), build_app(saver, is_async=True)

    async def streamed(given: Any, config: Any) -> int:
        return len([part async for part in by_loop.astream(given, config, stream_mode="messages")])

    with asyncio.Runner() as runner:
        yield {
            LINEAR: linear.invoke,
            PARALLEL: parallel.invoke,
            ASYNC: lambda given, config: runner.run(by_loop.ainvoke(given, config)),
            STREAMING: lambda given, config: runner.run(streamed(given, config)),
        }


def share(cost: Cost) -> str:
    """Write the share of what carries its session."""
    return "n/a" if cost.session_share is None else f"{cost.session_share:.0%}"


def run(report: Report, rounds: int) -> None:
    """Run the rounds."""
    saver = InMemorySaver()
    with tempfile.TemporaryDirectory() as folder, Sink() as sink, apps(saver) as ways:
        variants = all_variants(sink, Path(folder), report)
        clock = CallbackClock()
        costs = {(way, variant.name): Cost() for way, variant in product(ways, variants)}
        for round_ in range(-WARM_UP, rounds):
            given = {"messages": [("user", question(round_))]}
            with without_collection():
                for way, variant in shuffled(list(product(ways, variants)), round_):
                    its = config(variant, f"{round_}")
                    call = ways[way]
                    turn = [lambda call=call, given=given, its=its: call(given, its)]
                    measure(variant, costs[way, variant.name], turn, sink, clock, keep=round_ >= 0)
                    saver.delete_thread(f"{round_}")
    show(report, list(ways), [variant.name for variant in variants], costs)


def show(report: Report, ways: list[str], names: list[str], costs: dict[tuple[str, str], Cost]) -> None:
    """Print the tables."""
    rows: list[list[str]] = []
    for way in ways:
        bare = costs[way, BARE]
        rows.append([])
        for name in names:
            cost = costs[way, name]
            arrived = [f"{cost.median_of('spans'):g}", f"{cost.median_of('bytes'):,.0f}", share(cost)]
            rows.append([way, name, *cells(cost, bare), *(arrived if cost.arrived else [""] * 3)])
            report.results.setdefault(way, {})[name] = found_of(cost, bare)
    report.table(
        "What a way to run adds to a turn",
        ("app", "variant", *HEADER, "spans", "bytes", "with session"),
        rows,
    )
    report.say("The row of the bare graph is its own cost; medians, in brackets the middle half. n/a: sends nothing.")
    pairs = [("ours to one span a run", OURS, ONE_SPAN), ("Langfuse's to ours", LANGFUSE, OURS)]
    kinds = [("caller_ms", "caller CPU"), ("callbacks_ms", "in callbacks"), ("process_ms", "process CPU")]

    def between(way: str, over: str, under: str, kind: str, below: str | None = None) -> dict[str, float]:
        bare, below = costs[way, BARE], below or way
        under_bare = costs[below, BARE]
        return ratio(costs[way, over].added(kind, bare), costs[below, under].added(kind, under_bare))

    report.table(
        "Ratios of what is added, in brackets where nine in ten of resampled rounds lie",
        ("app", *(f"{words}: {kind}" for words, *_ in pairs for _, kind in kinds)),
        [
            [way, *(ranged(between(way, over, under, kind)) for _, over, under in pairs for kind, _ in kinds)]
            for way in ways
        ],
    )
    found = {kind: between(ASYNC, OURS, OURS, kind, LINEAR) for kind, _ in kinds}
    report.results["async_to_sync"] = found
    report.say("Async to sync, turntrace: " + ", ".join(f"{words} {ranged(found[kind])}" for kind, words in kinds))
    for name in (ONE_SPAN, LANGFUSE):
        same = between(ASYNC, name, name, "callbacks_ms", LINEAR)
        report.say(f"Async to sync in callbacks, {name}: {ranged(same)}")
    report.target("async to sync, turntrace in callbacks", found["callbacks_ms"], at_most=MOST_ASYNC, unit=" times")
    for way in ways:
        carried = costs[way, OURS].session_share or 0.0
        report.target(f"share of turntrace's spans with their session, {way}", carried, at_least=1.0)


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    report = Report("Ways to run a graph", __doc__)
    run(report, options.rounds)
    report.write(options.json)


if __name__ == "__main__":
    main()
