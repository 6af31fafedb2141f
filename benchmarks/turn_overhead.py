"""What tracking costs a turn, at turns 1 to 400, next to others in the same run.

Each round runs one turn with every variant, in an order that changes; before the clock starts, what others left to do
in the background is done. Three figures a variant:

- caller CPU: what it adds to the CPU time of the thread that calls the graph, against the bare graph in the same round;
- in callbacks: the part of it that is spent in LangChain's calls of handlers. It is measured directly, by a clock
  around each call, so it does not carry the noise of the graph, which at turn 400 is several times as much;
- process CPU: what it adds to the CPU time of the whole process until its background work is done.

LangSmith's and OpenInference's tracers are there too where they are installed (`pip install --group bench`).

    python benchmarks/turn_overhead.py [--rounds 40] [--turns 1 50 100 200 400] [--system-words 0] [--json FILE]
"""

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _app import build_app, history, question
from _peers import Peer, openinference
from _peers import langsmith as find_langsmith
from _tables import machine, middle
from langchain_core.callbacks import BaseCallbackHandler, manager
from langfuse import Langfuse
from langfuse.langchain import CallbackHandler
from langgraph.checkpoint.memory import InMemorySaver
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from rich.console import Console
from rich.table import Table

from turntrace import SessionCallbackHandler, SessionTracker
from turntrace.export import to_otlp

BARE = "bare graph"
WARM_UP = 6


class CountingExporter(SpanExporter):
    """Encodes spans as an exporter does, and counts the bytes instead of sending them."""

    def __init__(self) -> None:
        self.bytes = 0
        self.spans = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.bytes += len(to_otlp(spans))
        self.spans += len(spans)
        return SpanExportResult.SUCCESS


class Nothing(BaseCallbackHandler):
    """A handler that does nothing."""

    run_inline = True

    def on_chat_model_start(self, *_: Any, **__: Any) -> None:
        """Do nothing; LangChain writes all messages into one text for a handler that has no such method."""


class CallbackClock:
    """A clock around LangChain's calls of handlers."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._handle = manager.handle_event
        manager.handle_event = self._timed

    def _timed(self, *args: Any, **kwargs: Any) -> None:
        start = time.thread_time()
        try:
            self._handle(*args, **kwargs)
        finally:
            self.seconds += time.thread_time() - start


class OneSpanARun(BaseCallbackHandler):
    """A handler that makes one OpenTelemetry span of 12 attributes a run, and nothing else."""

    run_inline = True

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer
        self._attributes = {f"session.attribute_{i}": f"a value of some length {i}" for i in range(12)}
        self._spans: dict[Any, trace.Span] = {}

    def _start(self, name: str, run_id: Any, parent_id: Any) -> None:
        parent = self._spans.get(parent_id)
        context = None if parent is None else trace.set_span_in_context(parent)
        self._spans[run_id] = self._tracer.start_span(name, context=context, attributes=self._attributes)

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: Any, parent_run_id: Any = None, **kw: Any
    ) -> None:
        self._start(kw.get("name") or "chain", run_id, parent_run_id)

    def on_chat_model_start(
        self, serialized: Any, messages: Any, *, run_id: Any, parent_run_id: Any = None, **kw: Any
    ) -> None:
        self._start("model", run_id, parent_run_id)

    def on_tool_start(self, *_: Any, run_id: Any, parent_run_id: Any = None, **kw: Any) -> None:
        self._start("tool", run_id, parent_run_id)

    def _end(self, output: Any, *, run_id: Any, **kw: Any) -> None:
        self._spans.pop(run_id).end()

    on_chain_end = on_llm_end = on_tool_end = _end


@dataclass
class Variant:
    """One way to track, with what it cost in each round."""

    name: str
    handler: BaseCallbackHandler | None = None
    drain: Callable[[], Any] = lambda: None
    exported: Callable[[], int] = lambda: 0
    caller_ms: list[float] = field(default_factory=list)
    callbacks_ms: list[float] = field(default_factory=list)
    process_ms: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)


def make_variants(folder: Path, langsmith: Peer | None) -> list[Variant]:
    plain_exporter, langfuse_exporter = CountingExporter(), CountingExporter()
    plain, for_langfuse = TracerProvider(), TracerProvider()
    plain.add_span_processor(BatchSpanProcessor(plain_exporter))
    Langfuse(
        public_key="pk-benchmark",
        secret_key="sk-benchmark",
        base_url="http://127.0.0.1:9",
        tracer_provider=for_langfuse,
        span_exporter=langfuse_exporter,
    )
    tracker = SessionTracker(f"sqlite:///{folder / 'ledger.db'}", tracer_provider=TracerProvider(), outbox=True)
    seen = [0, 0]

    def outbox_bytes() -> int:
        for item in tracker.ledger.outbox(after_id=seen[0]):
            seen[0], seen[1] = item.id, seen[1] + len(item.body)
        return seen[1]

    variants = [
        Variant(BARE),
        Variant("a handler that does nothing", Nothing()),
        Variant(
            "one bare OTel span a run",
            OneSpanARun(plain.get_tracer("benchmark")),
            plain.force_flush,
            lambda: plain_exporter.bytes,
        ),
        Variant("turntrace", SessionCallbackHandler(tracker), tracker.flush, outbox_bytes),
        Variant(
            "langfuse.langchain.CallbackHandler",
            CallbackHandler(public_key="pk-benchmark"),
            for_langfuse.force_flush,
            lambda: langfuse_exporter.bytes,
        ),
    ]
    other_exporter = CountingExporter()
    other = openinference(other_exporter)
    if other is not None:
        variants.append(Variant(other.name, other.handler, other.drain, lambda: other_exporter.bytes))
    if langsmith is not None:
        variants.append(Variant(langsmith.name, langsmith.handler, langsmith.drain))
    return variants


def measure(variants: list[Variant], clock: CallbackClock, turn: int, rounds: int, system_words: int) -> None:
    """Run `rounds` turns of this number with every variant, each on a conversation that has the turns before."""
    before = list(history(turn - 1, system_words))
    order = random.Random(turn)
    saver = InMemorySaver()
    app = build_app(saver)
    for round_ in range(-WARM_UP, rounds):
        gc.collect()  # here for all, and in no turn that is measured
        gc.disable()
        for variant in order.sample(variants, len(variants)):
            thread = {"configurable": {"thread_id": f"{turn}-{round_}"}}
            if before:
                app.update_state(thread, {"messages": before}, as_node="route")
            config: Any = thread | {
                "metadata": {"user_id": "a user", "langfuse_session_id": f"session-{turn}"},
                "callbacks": [] if variant.handler is None else [variant.handler],
            }
            message = {"messages": [("user", question(turn + round_))]}
            bytes_before = variant.exported()
            clock.seconds = 0.0
            caller, process = time.thread_time(), time.process_time()
            app.invoke(message, config)
            caller = time.thread_time() - caller
            variant.drain()
            process = time.process_time() - process
            saver.delete_thread(thread["configurable"]["thread_id"])
            if round_ >= 0:
                variant.caller_ms.append(caller * 1e3)
                variant.callbacks_ms.append(clock.seconds * 1e3)
                variant.process_ms.append(process * 1e3)
                variant.bytes.append(variant.exported() - bytes_before)
        gc.enable()


def added(values: list[float], bare: list[float]) -> list[float]:
    return [value - base for value, base in zip(values, bare, strict=True)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=42)
    arguments.add_argument("--turns", type=int, nargs="+", default=[1, 50, 100, 200, 400])
    arguments.add_argument("--system-words", type=int, default=0, help="words of a system prompt; none by default")
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    console = Console(width=140)
    console.print(f"[bold]Cost of tracking a turn[/] on {machine()}")
    results: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, find_langsmith() as langsmith:
        variants = make_variants(Path(folder), langsmith)
        clock = CallbackClock()
        table = Table("turn", "variant", "caller CPU, ms", "in callbacks, ms", "process CPU, ms", "OTLP bytes")
        for turn in options.turns:
            for variant in variants:
                variant.caller_ms, variant.callbacks_ms, variant.process_ms, variant.bytes = [], [], [], []
            measure(variants, clock, turn, options.rounds, options.system_words)
            bare = variants[0]
            table.add_section()
            for variant in variants:
                own = variant is bare
                caller = variant.caller_ms if own else added(variant.caller_ms, bare.caller_ms)
                process = variant.process_ms if own else added(variant.process_ms, bare.process_ms)
                size = statistics.median(variant.bytes)
                callbacks = variant.callbacks_ms
                table.add_row(
                    str(turn), variant.name, middle(caller), middle(callbacks), middle(process), f"{size:,.0f}"
                )
                results.setdefault(variant.name, {})[turn] = {
                    "caller_ms": statistics.median(caller),
                    "callbacks_ms": statistics.median(callbacks),
                    "process_ms": statistics.median(process),
                    "otlp_bytes": size,
                }
    console.print(table)
    console.print("The row of the bare graph is its own cost; medians, in brackets the middle half.")
    print_ratios(console, results, options.turns)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=2), encoding="utf-8")


def print_ratios(console: Console, results: dict[str, dict[int, dict[str, float]]], turns: list[int]) -> None:
    ours, theirs = results["turntrace"], results["langfuse.langchain.CallbackHandler"]
    one_span = results["one bare OTel span a run"]
    ratios = Table(
        "turn", "Langfuse's to ours: caller", "in callbacks", "process", "ours to one span a run: in callbacks"
    )
    for turn in turns:
        figures = [theirs[turn][name] / ours[turn][name] for name in ("caller_ms", "callbacks_ms", "process_ms")]
        figures.append(ours[turn]["callbacks_ms"] / one_span[turn]["callbacks_ms"])
        ratios.add_row(str(turn), *(f"{figure:.1f}" for figure in figures[:3]), f"{figures[3]:.2f}")
    console.print(ratios)
    first, last = turns[0], turns[-1]
    for name, words in (("callbacks_ms", "in callbacks"), ("otlp_bytes", "in OTLP bytes")):
        console.print(
            f"turntrace {words}: turn {last} is {ours[last][name] / ours[first][name]:.2f} times turn {first}."
        )


if __name__ == "__main__":
    main()
