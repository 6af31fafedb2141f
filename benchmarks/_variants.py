"""The ways to track that are compared, each with a sender of its own to one sink, and what a turn with one costs.

What a way needs is imported where it is made, so that a process with one of them has nothing of the others.
"""

import gc
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _peers
from _sink import Counts, Sink
from _tables import Report, middle, summary
from langchain_core.callbacks import BaseCallbackHandler, manager
from opentelemetry import trace

BARE, NOTHING, ONE_SPAN = "bare graph", "a handler that does nothing", "one bare OTel span a run"
OURS, LANGFUSE = "turntrace", "langfuse.langchain.CallbackHandler"
OUR_KEY, LANGFUSE_KEY, SECRET = "pk-lf-turntrace", "pk-lf-handler", "sk-lf-benchmark"
APPS_OWN = ("asyncio_", "ThreadPoolExecutor")
"""The threads that run the graph's own work, by how their names begin."""
THREAD_CLOCK = 6
KINDS = ("caller_ms", "callbacks_ms", "wall_ms", "process_ms")
HEADER = ("caller CPU, ms", "in callbacks, ms", "wall, ms", "process CPU, ms")
WARM_UP = 6


# --- handlers to compare with -----------------------------------------------------------------------------------------
class Nothing(BaseCallbackHandler):
    """A handler that does nothing."""

    run_inline = True

    def on_chat_model_start(self, *_: Any, **__: Any) -> None:
        """Do nothing; LangChain writes all messages into one text for a handler that has no such method."""


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


# --- the variants -----------------------------------------------------------------------------------------------------
@dataclass
class Variant:
    """A way to track.

    Attributes:
        name: What it is called in tables.
        handler: Its handler; None for the bare graph.
        drain: Sends all that it holds.
        at_sink: Whose its data is at the sink; empty for one that sends nothing.
        remembers: Whether it keeps what it saw of a conversation from turn to turn.
    """

    name: str
    handler: BaseCallbackHandler | None = None
    drain: Callable[[], Any] = lambda: None
    at_sink: str = ""
    remembers: bool = False

    @property
    def callbacks(self) -> list[BaseCallbackHandler]:
        """What goes into a config."""
        return [] if self.handler is None else [self.handler]


def one_span(sink: Sink) -> Variant:
    provider = _peers.provider_to(sink.url("one-span"))
    return Variant(ONE_SPAN, OneSpanARun(provider.get_tracer("benchmark")), provider.force_flush, "one-span")


def turntrace(sink: Sink, folder: Path, *, is_alone: bool = False) -> Variant:
    """Return turntrace; without a provider of the app's, as in the README, where no other way is in the process."""
    from opentelemetry.sdk.trace import TracerProvider

    from turntrace import SessionCallbackHandler, SessionTracker

    os.environ |= {
        "LANGFUSE_PUBLIC_KEY": OUR_KEY,
        "LANGFUSE_SECRET_KEY": SECRET,
        "LANGFUSE_BASE_URL": sink.url("turntrace"),
    }
    provider = None if is_alone else TracerProvider()
    tracker = SessionTracker(f"sqlite:///{folder / 'ledger.db'}", tracer_provider=provider)
    assert tracker.target.to_outbox
    return Variant(OURS, SessionCallbackHandler(tracker), tracker.flush, "turntrace", remembers=True)


def langfuse(sink: Sink) -> Variant:
    from langfuse import Langfuse
    from langfuse.langchain import CallbackHandler
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()
    Langfuse(public_key=LANGFUSE_KEY, secret_key=SECRET, base_url=sink.url("langfuse"), tracer_provider=provider)
    return Variant(LANGFUSE, CallbackHandler(public_key=LANGFUSE_KEY), provider.force_flush, "langfuse")


def all_variants(sink: Sink, folder: Path, report: Report) -> list[Variant]:
    """Return all that can be run here, the bare graph first; the report says which are missing."""
    peers, missing = _peers.found(sink)
    for line in missing:
        report.say(line)
    variants = [Variant(BARE), Variant(NOTHING, Nothing()), one_span(sink), turntrace(sink, folder), langfuse(sink)]
    return variants + [Variant(*peer) for peer in peers]


def config(variant: Variant, thread: str) -> Any:
    """Return the config of a run: each finds its session in it as its documents say."""
    return {
        "configurable": {"thread_id": thread},
        "metadata": {"user_id": "a user", "langfuse_user_id": "a user", "langfuse_session_id": "a session"},
        "callbacks": variant.callbacks,
    }


# --- what a call costs ------------------------------------------------------------------------------------------------
@dataclass
class Cost:
    """What the calls with a variant cost, of each round: milliseconds a turn, and what arrived."""

    caller_ms: list[float] = field(default_factory=list)
    process_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    callbacks_ms: list[float] = field(default_factory=list)
    arrived: list[Counts] = field(default_factory=list)

    def added(self, kind: str, bare: "Cost") -> list[float]:
        """Return what it adds to the bare graph's in each round; for the bare graph, its own."""
        if self is bare:
            return list(getattr(self, kind))
        return [value - base for value, base in zip(getattr(self, kind), getattr(bare, kind), strict=True)]

    @property
    def session_share(self) -> float | None:
        """The share of spans that carry their session, or None where nothing came."""
        spans = sum(each.spans for each in self.arrived)
        return sum(each.with_session for each in self.arrived) / spans if spans else None

    def median_of(self, what: str) -> float:
        """Return the median of what arrived a turn."""
        return statistics.median(getattr(each, what) for each in self.arrived) if self.arrived else 0


def background_cpu() -> float:
    """Return the CPU seconds of the threads that are not the app's: what tracers do behind its back."""
    mine = threading.get_native_id()
    seconds = 0.0
    for thread in threading.enumerate():
        if thread.native_id not in (mine, None) and not thread.name.startswith(APPS_OWN):
            try:
                seconds += time.clock_gettime((~thread.native_id << 3) | THREAD_CLOCK)  # Linux's clock of a thread
            except OSError:
                continue  # it has ended, or this is no Linux: then all of the process counts as the caller's
    return seconds


class CallbackClock:
    """A clock around LangChain's calls of handlers; it does not see those that an event loop gives to a thread."""

    def __init__(self) -> None:
        self._parts: list[float] = []
        handle, ahandle = manager.handle_event, manager.ahandle_event

        def handle_event(*args: Any, **kwargs: Any) -> None:
            start = time.thread_time()
            handle(*args, **kwargs)
            self._parts.append(time.thread_time() - start)

        async def ahandle_event(*args: Any, **kwargs: Any) -> None:
            start = time.thread_time()
            await ahandle(*args, **kwargs)
            self._parts.append(time.thread_time() - start)

        manager.handle_event, manager.ahandle_event = handle_event, ahandle_event

    def take(self) -> float:
        """Return the CPU seconds since it was last asked."""
        parts, self._parts = self._parts, []
        return sum(parts)


def measure(
    variant: Variant,
    cost: Cost,
    calls: Sequence[Callable[[], Any]],
    sink: Sink,
    clock: CallbackClock,
    *,
    keep: bool,
) -> None:
    """Run the calls, each a turn, and have all sent that they left to do; nobody else works meanwhile."""
    clock.take()
    behind = background_cpu()
    wall, process = time.perf_counter(), time.process_time()
    for call in calls:
        call()
    of_call = time.process_time() - process
    wall = time.perf_counter() - wall
    of_caller = of_call - (background_cpu() - behind)
    rest = time.process_time()
    variant.drain()
    of_process = of_call + time.process_time() - rest
    in_callbacks = clock.take()
    arrived = sink.counts(variant.at_sink) if variant.at_sink else None
    if keep:
        a_turn = 1e3 / len(calls)
        cost.caller_ms.append(of_caller * a_turn)
        cost.callbacks_ms.append(in_callbacks * a_turn)
        cost.process_ms.append(of_process * a_turn)
        cost.wall_ms.append(wall * a_turn)
        if arrived is not None:
            cost.arrived.append(arrived)


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect garbage before a block, for all, and in nothing that is measured."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def shuffled(things: Sequence[Any], number: int) -> list[Any]:
    """Return things in an order that a number gives."""
    return random.Random(number).sample(things, len(things))


def cells(cost: Cost, bare: Cost) -> list[str]:
    """Return cells of a table: what is added to the bare graph's; for the bare graph, its own."""
    return [middle(cost.added(kind, bare)) for kind in KINDS]


def found_of(cost: Cost, bare: Cost) -> dict[str, Any]:
    """Return the same for the JSON, with what arrived."""
    found: dict[str, Any] = {kind: summary(cost.added(kind, bare)) for kind in KINDS}
    if cost.arrived:
        found |= {what: cost.median_of(what) for what in ("bytes", "wire_bytes", "spans", "requests")}
        found["session_share"] = cost.session_share
    return found
