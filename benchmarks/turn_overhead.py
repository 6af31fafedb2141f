"""What tracking costs a turn, at turns 1 to 1,000, next to others in the same run.

Each round runs a turn of each number with every variant, in an order that changes, on a conversation in which the turn
before was run in this process too: with turntrace, where that is measured, since it remembers what it saw of a
conversation; the others keep nothing from turn to turn. All send to a sink on loopback in a process of its own, by
their own senders. Five figures a variant:

- caller CPU: what it adds to the CPU time of the app's threads until the run returns, against the bare graph in the
  same round;
- in callbacks: the part of it that is spent in LangChain's calls of handlers. It is measured directly, by a clock
  around each call, so it does not carry the noise of the graph, which at turn 400 is several times as much;
- wall: what it adds to the time until the run returns;
- process CPU: what it adds to the CPU time of the whole process until all is sent; turn by turn, which is dear for who
  writes to a disk first, and ten turns sent together, as senders do that wait a moment for more;
- bytes: what arrives at the sink, unpacked.

The peers are there where they are installed (`make bench` does it, group `bench`).

    python benchmarks/turn_overhead.py [--rounds 42] [--turns 1 50 400 1000] [--together 1 400] [--json FILE]
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _app import build_app, history, question
from _sink import Sink
from _tables import Report, arguments, ranged, ratio
from _variants import (
    BARE,
    HEADER,
    LANGFUSE,
    NOTHING,
    ONE_SPAN,
    OURS,
    WARM_UP,
    CallbackClock,
    Cost,
    Variant,
    all_variants,
    cells,
    config,
    found_of,
    measure,
    shuffled,
    without_collection,
)
from langgraph.checkpoint.memory import InMemorySaver

Costs = dict[str, Cost]
TOGETHER = 10
MOST_OVER_ONE_SPAN = 2.0
MOST_GROWTH = 1.15
LEAST_BELOW_LANGFUSE = {1: (3.0, 5.0), 400: (150.0, 200.0)}
"""How many times less process CPU than Langfuse's handler a turn of this number is to take: at least, and better."""


class Rounds:
    """Runs turns with every variant."""

    def __init__(self, variants: list[Variant], sink: Sink, system_words: int) -> None:
        self._variants = variants
        self._sink = sink
        self._system_words = system_words
        self._clock = CallbackClock()
        self._saver = InMemorySaver()
        self._app = build_app(self._saver)

    def measure(self, turns: Sequence[int], rounds: int, together: int = 1) -> dict[int, Costs]:
        """Run rounds of turns of these numbers, each on a conversation that has the turns before."""
        costs = {turn: {variant.name: Cost() for variant in self._variants} for turn in turns}
        for round_ in range(-WARM_UP if together == 1 else -1, rounds):
            for turn in turns:
                self._round(turn, round_, together, costs[turn])
        return costs

    def _round(self, turn: int, round_: int, together: int, costs: Costs) -> None:
        before = None if turn == 1 else list(history(turn - 2, self._system_words))  # and the last of them is run
        with without_collection():
            for variant in shuffled(self._variants, turn * 1_000_003 + round_):
                threads = [f"{turn}-{together}-{round_}-{each}" for each in range(together)]
                runs = [self._ready(variant, thread, before, turn + round_) for thread in threads]
                if variant.remembers:
                    variant.drain()
                    self._sink.counts(variant.at_sink)
                measure(variant, costs[variant.name], runs, self._sink, self._clock, keep=round_ >= 0)
                for thread in threads:
                    self._saver.delete_thread(thread)

    def _ready(self, variant: Variant, thread: str, before: list[Any] | None, number: int) -> Callable[[], Any]:
        """Return what runs a turn, on a conversation that is made now, up to the turn before."""
        its = config(variant, thread)
        bare = {"configurable": its["configurable"]}
        if before:
            self._app.update_state(bare, {"messages": before}, as_node="route")
        if before is not None:
            last = {"messages": [("user", question(number - 1))]}
            self._app.invoke(last, its if variant.remembers else bare)
        given = {"messages": [("user", question(number))]}
        return lambda: self._app.invoke(given, its)


def between(costs: Costs, kind: str, over: str, under: str) -> dict[str, float]:
    """Return the ratio of what two variants add."""
    bare = costs[BARE]
    return ratio(costs[over].added(kind, bare), costs[under].added(kind, bare))


def rows_of(label: str, costs: Costs, report: Report) -> list[list[str]]:
    """Return the rows of a table, and put the figures into the report."""
    bare = costs[BARE]
    rows = []
    for name, cost in costs.items():
        arrived = f"{cost.median_of('bytes'):,.0f}" if cost.arrived else ""
        rows.append([label, name, *cells(cost, bare), arrived])
        report.results.setdefault(label, {})[name] = found_of(cost, bare)
    return [*rows, []]


def show(report: Report, by_turn: dict[int, Costs], together: dict[int, Costs]) -> None:
    """Print the tables and the targets."""
    first, last = min(by_turn), max(by_turn)
    labelled = {f"{turn:,}": costs for turn, costs in by_turn.items()}
    labelled |= {f"{turn:,}, {TOGETHER} sent together": costs for turn, costs in together.items()}
    rows = [row for label, costs in labelled.items() for row in rows_of(label, costs, report)]
    report.table("What is added to a turn", ("turn", "variant", *HEADER, "bytes"), rows)
    report.say("The row of the bare graph is its own cost; medians, in brackets the middle half.")
    kinds = {"caller_ms": "caller CPU", "callbacks_ms": "in callbacks", "process_ms": "process CPU"}
    pairs = [("Langfuse's to ours", LANGFUSE, OURS, kind) for kind in kinds]
    pairs += [("ours to one span a run", OURS, ONE_SPAN, kind) for kind in ("caller_ms", "callbacks_ms")]
    pairs.append(("one span a run to nothing", ONE_SPAN, NOTHING, "callbacks_ms"))
    pairs.append(("Langfuse's to one span a run", LANGFUSE, ONE_SPAN, "process_ms"))  # what could be reached at most
    found = {label: [between(costs, kind, a, b) for _, a, b, kind in pairs] for label, costs in labelled.items()}
    report.table(
        "Ratios of what is added, in brackets where nine in ten of resampled rounds lie",
        ("turn", *(f"{words}: {kinds[kind]}" for words, _, _, kind in pairs)),
        [[label, *map(ranged, ratios)] for label, ratios in found.items()],
    )
    report.results["ratios"] = {
        label: {f"{words}: {kinds[kind]}": each for (words, _, _, kind), each in zip(pairs, ratios, strict=True)}
        for label, ratios in found.items()
    }
    for kind in ("caller_ms", "callbacks_ms"):
        of = between(by_turn[first], kind, OURS, ONE_SPAN)
        what = f"turntrace to one span a run, {kinds[kind]} at turn {first}"
        report.target(what, of, at_most=MOST_OVER_ONE_SPAN, unit=" times")
    grown = ratio(by_turn[last][OURS].callbacks_ms, by_turn[first][OURS].callbacks_ms)
    report.results["growth"] = grown
    for turn in sorted(by_turn)[1:-1]:
        later = ratio(by_turn[last][OURS].callbacks_ms, by_turn[turn][OURS].callbacks_ms)
        report.say(f"turntrace in callbacks, turn {last:,} to turn {turn}: {ranged(later)}.")
    bare_span = ratio(by_turn[last][ONE_SPAN].callbacks_ms, by_turn[first][ONE_SPAN].callbacks_ms)
    report.say(f"One bare OTel span a run in callbacks, turn {last:,} to turn {first}: {ranged(bare_span)}.")
    report.target(f"turntrace in callbacks, turn {last:,} to turn {first}", grown, at_most=MOST_GROWTH, unit=" times")
    ways = (("sent turn by turn", by_turn), (f"{TOGETHER} turns sent together", together))
    for turn, wanted in LEAST_BELOW_LANGFUSE.items():
        for words, costs in ways:
            if turn in costs:
                of = between(costs[turn], "process_ms", LANGFUSE, OURS)
                for least, better in zip(wanted, ("", ", better"), strict=True):
                    what = f"process CPU below Langfuse's at turn {turn}, {words}{better}"
                    report.target(what, of, at_least=least, unit=" times")


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=42)
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 50, 400, 1000])
    parser.add_argument("--together", type=int, nargs="*", default=list(LEAST_BELOW_LANGFUSE), help="turns to send so")
    parser.add_argument("--system-words", type=int, default=0, help="words of a system prompt; none by default")
    options = parser.parse_args()
    report = Report("Cost of tracking a turn", __doc__)
    with tempfile.TemporaryDirectory() as folder, Sink() as sink:
        rounds = Rounds(all_variants(sink, Path(folder), report), sink, options.system_words)
        by_turn = rounds.measure(options.turns, options.rounds)
        together = rounds.measure(options.together, max(3, options.rounds // 4), TOGETHER)  # each is of ten turns
    show(report, by_turn, together)
    report.write(options.json)


if __name__ == "__main__":
    main()
