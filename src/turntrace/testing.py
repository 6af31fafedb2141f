"""For tests of an app that uses turntrace: its spans caught, a clock and ids to set, and what must hold of every span.

::

    from turntrace import SessionCallbackHandler
    from turntrace.testing import Capture, assert_all_tagged, format_tree, span_tree

    def test_agent():
        with Capture() as capture:
            handler = SessionCallbackHandler(capture.tracker())
            graph.invoke({"messages": [("user", "Hi")]}, {"callbacks": [handler]})
            spans = capture.spans()
        assert_all_tagged(spans)
        print(format_tree(span_tree(spans)))

Nothing here needs a server, a key or a file.
"""

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self, TypeAlias

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from turntrace import SessionTracker
from turntrace import attributes as a
from turntrace.export import from_otlp
from turntrace.ledger import Ledger

NS_PER_SECOND: Final = 1_000_000_000

_EPOCH_NS: Final = 1_767_225_600 * NS_PER_SECOND  # 2026-01-01T00:00:00Z
_HASH_KEY: Final = "turntrace-testing-key-not-secret"
_LANGFUSE_SDK: Final = "langfuse-sdk"
_MOST_PROBLEMS: Final = 20


class Clock:
    """A clock that goes only when it is told to, for ``SessionTracker(clock=...)``.

    Args:
        now_ns: The time it begins at, in nanoseconds since 1970. Default: the beginning of 2026 in UTC.
        tick_ns: What it goes on by each time it is read, in nanoseconds.
    """

    def __init__(self, now_ns: int = _EPOCH_NS, *, tick_ns: int = 0) -> None:
        self._now_ns = now_ns
        self._tick_ns = tick_ns
        self._lock = threading.Lock()

    def __call__(self) -> int:
        """Return the time in nanoseconds since 1970, and tick."""
        with self._lock:
            now = self._now_ns
            self._now_ns += self._tick_ns
            return now

    def __repr__(self) -> str:
        return f"<Clock at {self._now_ns}>"

    @property
    def now_ns(self) -> int:
        """The time in nanoseconds since 1970, without a tick."""
        return self._now_ns

    def set(self, now_ns: int) -> None:
        """Set the time, in nanoseconds since 1970; it may go back, as the clock of a machine may."""
        with self._lock:
            self._now_ns = now_ns

    def advance(self, ns: int = 0, *, seconds: float = 0, minutes: float = 0) -> None:
        """Go on by so many nanoseconds, seconds and minutes together."""
        with self._lock:
            self._now_ns += ns + round((seconds + 60 * minutes) * NS_PER_SECOND)


class Ids:
    """Ids of 32 hexadecimal digits in order, for ``SessionTracker(ids=...)``: the first ends in 1, the next in 2.

    Args:
        first: The number of the first id, at least 1: an id of zeros only is none.
    """

    def __init__(self, first: int = 1) -> None:
        self._numbers = itertools.count(first)

    def __call__(self) -> str:
        """Return the next id."""
        return f"{next(self._numbers):032x}"


@dataclass(frozen=True, slots=True)
class CapturedSpan:
    """A span that has ended, the same whether it was caught in memory or read back from the outbox.

    Attributes:
        name: Its name.
        trace_id: Id of its trace, 32 hexadecimal digits.
        span_id: Its id, 16 hexadecimal digits.
        parent_id: Id of the span above it, or None.
        scope: Name of its instrumentation scope: ``turntrace`` for spans of ours.
        attributes: Its attributes.
        start_ns: When it began, in nanoseconds since 1970.
        end_ns: When it ended; 0 when it has not.
    """

    name: str
    trace_id: str
    span_id: str
    parent_id: str | None
    scope: str
    attributes: Mapping[str, Any]
    start_ns: int = 0
    end_ns: int = 0

    def __str__(self) -> str:
        return f"{self.name!r} ({self.scope or 'no scope'}, span {self.span_id})"


AnySpan: TypeAlias = ReadableSpan | CapturedSpan


class Capture:
    """Catches the spans of trackers in memory, instead of sending them.

    Attributes:
        provider: The OpenTelemetry provider whose spans are caught; give it to what else makes spans in the test.
    """

    def __init__(self) -> None:
        self.provider = TracerProvider(shutdown_on_exit=False)
        self._exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._trackers: list[SessionTracker] = []

    def __repr__(self) -> str:
        return f"<Capture of {len(self._exporter.get_finished_spans())} spans>"

    def tracker(self, ledger: Any = "sqlite://", **settings: Any) -> SessionTracker:
        """Make a tracker whose spans are caught.

        Args:
            ledger: Its ledger, by default one in memory.
            settings: What `SessionTracker` takes, as ``clock=Clock()`` or ``ids=Ids()``. Users are hashed with a fixed
                key unless ``user_hash_key`` is given, so that hashes are the same in each run.
        """
        settings = {"tracer_provider": self.provider, "user_hash_key": _HASH_KEY, **settings}
        tracker = SessionTracker(ledger, **settings)
        self._trackers.append(tracker)
        return tracker

    def spans(self) -> list[ReadableSpan]:
        """Return the spans that have ended, in the order of their ends, once all trackers have written theirs.

        Raises:
            TimeoutError: If a tracker cannot write down what has ended.
        """
        for tracker in self._trackers:
            if not tracker.flush():
                raise TimeoutError(f"{tracker!r} could not write down all that has ended.")
        return list(self._exporter.get_finished_spans())

    def clear(self) -> None:
        """Forget the spans caught so far."""
        self.spans()
        self._exporter.clear()

    def close(self) -> None:
        """Shut the trackers and the provider down."""
        for tracker in self._trackers:
            tracker.shutdown()
        self._trackers.clear()
        self.provider.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


# --- spans, whatever form they come in --------------------------------------------------------------------------------
def captured_spans(spans: Iterable[AnySpan]) -> list[CapturedSpan]:
    """Return spans of either form as `CapturedSpan`."""
    return [span if isinstance(span, CapturedSpan) else _of_sdk(span) for span in spans]


def decoded_spans(body: bytes) -> list[CapturedSpan]:
    """Return the spans of an OTLP ``ExportTraceServiceRequest`` in protobuf, as the outbox holds them."""
    return list(_of_otlp(from_otlp(body)))


def outbox_spans(ledger: Ledger) -> list[CapturedSpan]:
    """Return the spans that wait in a ledger's outbox, the oldest first."""
    spans: list[CapturedSpan] = []
    after = 0
    while waiting := ledger.outbox(after_id=after):
        after = waiting[-1].id
        for item in waiting:
            if item.kind == "spans":
                spans.extend(decoded_spans(item.body))
    return spans


def _of_sdk(span: ReadableSpan) -> CapturedSpan:
    context = span.context
    assert context is not None, f"the span {span.name!r} has no ids"
    return CapturedSpan(
        name=span.name,
        trace_id=f"{context.trace_id:032x}",
        span_id=f"{context.span_id:016x}",
        parent_id=None if span.parent is None else f"{span.parent.span_id:016x}",
        scope="" if span.instrumentation_scope is None else span.instrumentation_scope.name,
        attributes=dict(span.attributes or {}),
        start_ns=span.start_time or 0,
        end_ns=span.end_time or 0,
    )


def _of_otlp(request: ExportTraceServiceRequest) -> Iterator[CapturedSpan]:
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield CapturedSpan(
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex() or None,
                    scope=scope.scope.name,
                    attributes={pair.key: _value(pair.value) for pair in span.attributes},
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                )


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(_value(each) for each in value.array_value.values)
    return None if kind is None else getattr(value, kind)


# --- trees ------------------------------------------------------------------------------------------------------------
class SpanTree(NamedTuple):
    """A span and what is below it; equal to the same nested ``(name, children)``."""

    name: str
    children: "tuple[SpanTree, ...]" = ()

    def __str__(self) -> str:
        return format_tree([self])


def span_tree(spans: Iterable[AnySpan], *, by_name: bool = False) -> list[SpanTree]:
    """Return spans as trees, one for each span whose parent is not among them.

    Args:
        spans: The spans, in any order.
        by_name: Whether to put siblings in the order of their names instead of their starts, for steps that run side
            by side.

    Returns:
        Nested ``(name, children)``, to be compared as a whole: ``[("conversation.turn", (("LangGraph", ()),))]``.
    """
    seen = sorted(captured_spans(spans), key=lambda span: span.start_ns)
    known = {(span.trace_id, span.span_id) for span in seen}
    below: dict[tuple[str, str], list[CapturedSpan]] = {}
    tops: list[CapturedSpan] = []
    for span in seen:
        above = (span.trace_id, span.parent_id or "")
        if above in known:
            below.setdefault(above, []).append(span)
        else:
            tops.append(span)

    def grow(span: CapturedSpan) -> SpanTree:
        children = [grow(child) for child in below.get((span.trace_id, span.span_id), ())]
        return SpanTree(span.name, tuple(sorted(children) if by_name else children))

    trees = [grow(top) for top in tops]
    return sorted(trees) if by_name else trees


def format_tree(trees: Iterable[SpanTree]) -> str:
    """Write trees with a line for each span, indented by two spaces below its parent."""
    lines: list[str] = []

    def write(tree: SpanTree, depth: int) -> None:
        lines.append("  " * depth + tree.name)
        for child in tree.children:
            write(child, depth + 1)

    for tree in trees:
        write(tree, 0)
    return "\n".join(lines)


# --- what must hold ---------------------------------------------------------------------------------------------------
def assert_all_tagged(spans: Iterable[AnySpan]) -> None:
    """Assert that every span of every turn is in its session, its conversation and its turn.

    A turn's spans are all those of its trace, but for the spans around its root (as that of the HTTP request that it
    serves). Spans outside of any turn's trace are looked at only when they are turntrace's own.

    Args:
        spans: Finished spans, of turntrace and of others, from `Capture.spans` or `outbox_spans`.

    Raises:
        AssertionError: If a span of a turn lacks one of `turntrace.attributes.REQUIRED_ON_EVERY_SPAN` or what its root
            has of `turntrace.attributes.EVERY_SPAN`, or differs from its root in one of them; if it is one of
            Langfuse's SDK and lacks their ``langfuse.observation.metadata.`` forms; if its parent is not in its trace;
            if two sessions or two turns meet in one trace, or one turn is in two; if a span of turntrace's own has no
            session; or if there is no turn at all.
    """
    __tracebackhide__ = True  # pytest shows the test's line then, and the message
    seen = captured_spans(spans)
    traces: dict[str, list[CapturedSpan]] = {}
    for span in seen:
        traces.setdefault(span.trace_id, []).append(span)
    problems: list[str] = []
    trace_of: dict[Any, str] = {}
    for trace_id, members in traces.items():
        problems.extend(f"trace {trace_id}: {problem}" for problem in _problems(members))
        turn_ids = {span.attributes[a.TURN_ID] for span in members if a.TURN_ID in span.attributes}
        problems.extend(
            f"turn {turn_id} is in two traces: {trace_of[turn_id]} and {trace_id}"
            for turn_id in turn_ids
            if trace_of.setdefault(turn_id, trace_id) != trace_id
        )
    if not trace_of and not problems:
        problems.append(f"none of the {len(seen)} spans belongs to a turn")
    if problems:
        shown = problems[:_MOST_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        raise AssertionError("Not every span is tagged with its turn:\n" + "\n".join(f"  - {each}" for each in shown))


def _problems(members: list[CapturedSpan]) -> Iterator[str]:
    for name, what in ((a.SESSION_ID, "sessions"), (a.TURN_ID, "turns")):
        values = sorted({str(span.attributes[name]) for span in members if name in span.attributes})
        if len(values) > 1:
            yield f"{len(values)} {what} meet: {', '.join(values)}"
    roots = [span for span in members if _is_root(span)]
    if len(roots) > 1:
        yield f"{len(roots)} spans are roots of a turn: {', '.join(map(str, roots))}"
    of_turn = [span for span in members if a.TURN_ID in span.attributes]
    if not roots and not of_turn:
        for span in members:
            if span.scope == a.SCOPE_NAME and a.SESSION_ID not in span.attributes:
                yield f"{span} lacks {a.SESSION_ID}"
        return
    root = roots[0] if roots else of_turn[0]
    known = {span.span_id for span in members}
    expected = {name: root.attributes[name] for name in a.EVERY_SPAN if name in root.attributes}
    around = _around(root, members)
    for span in members:
        if span.span_id not in around:
            yield from _problems_of(span, expected)
            if span is not root and span.parent_id not in known:
                yield f"{span} has a parent that is not in its trace: {span.parent_id}"


def _is_root(span: CapturedSpan) -> bool:
    return span.name == a.SPAN_TURN and span.scope == a.SCOPE_NAME


def _around(root: CapturedSpan, members: list[CapturedSpan]) -> set[str]:
    """Return the ids of the spans around a root that has a parent: those above it, and what is below them only."""
    if root.parent_id is None or not _is_root(root):
        return set()
    inside = {root.span_id}
    while more := {span.span_id for span in members if span.parent_id in inside} - inside:
        inside |= more
    return {span.span_id for span in members if span.span_id not in inside and a.TURN_ID not in span.attributes}


def _problems_of(span: CapturedSpan, expected: Mapping[str, Any]) -> Iterator[str]:
    has = span.attributes
    lacking = [name for name in dict.fromkeys((*a.REQUIRED_ON_EVERY_SPAN, *expected)) if name not in has]
    if lacking:
        yield f"{span} lacks {', '.join(lacking)}"
    for name in a.EVERY_SPAN:
        if name in has and (name not in expected or has[name] != expected[name]):
            yield f"{span} has {name} = {has[name]!r} where its root has {expected.get(name, 'none')!r}"
    if span.scope.startswith(_LANGFUSE_SDK):
        prefix = a.LANGFUSE_METADATA_PREFIX
        wrong = [prefix + name for name, value in expected.items() if has.get(prefix + name) != value]
        if wrong:
            yield f"{span} lacks {', '.join(wrong)}, without which Langfuse drops them"
