"""The turn of this context, and the span that stands for its running step.

A `Scope` stands for a span of ours while a node, a tool or a turn's block runs, and from then on for whatever was
current before it; in what a node left running, as a background task, for the root of its turn until that is finished,
too. It is put into OpenTelemetry's context, so spans that the app's own code starts become its children,
and under a key of our own, so that they are found to belong to the turn however deep they nest.

Nothing breaks when a scope is never taken out again, as happens where LangChain calls the end of a run in another
context than its start: every look-up goes through the scope, and an ended one answers with what was before it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from weakref import ReferenceType, ref

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context

from turntrace.decisions import PruningDecision

_SCOPE_KEY = otel_context.create_key("turntrace.scope")


class ContextMeter(Protocol):
    """What counts the tokens that a model is given, and learns from what its provider counted."""

    def count(self, messages: Sequence[Any], *, tools: Sequence[Any] = ()) -> int:
        """Return the tokens of messages and tools, the reply's priming included."""

    def calibrate(self, counted: int, provided: int) -> None:
        """Set a count against what the provider counted of the same."""


class CurrentTurn(Protocol):
    """What may be told to the turn of this context by code that does not know the lifecycle above it."""

    @property
    def id(self) -> str:
        """Id of the turn."""

    @property
    def tags(self) -> Mapping[str, Any]:
        """What every span of the turn carries."""

    @property
    def root(self) -> "Step":
        """Its root."""

    @property
    def is_finished(self) -> bool:
        """Whether it has ended."""

    @property
    def travels(self) -> bool:
        """Whether what runs inside takes the turn along in its requests to other servers."""

    def baggage_in(self, context: Context) -> Context:
        """Return a context with what every span of the turn carries as baggage."""

    def note_fit(self, decision: PruningDecision, window: Sequence[Any], meter: ContextMeter) -> None:
        """Note how messages were fitted into the model's window: the decision, what came out, and what counted."""


class Step(Protocol):
    """What a scope stands for."""

    @property
    def span(self) -> trace.Span:
        """Its span; it need not have been started before somebody asks for it."""


class Scope(trace.Span):
    """The span of a step of ours while it runs; afterwards whatever was current before.

    Args:
        turn: The turn that the step belongs to.
        step: The step to stand for.
        parent: The context in which the scope is made.
    """

    def __init__(self, turn: CurrentTurn, step: Step, parent: Context) -> None:
        self._turn: CurrentTurn | None = turn
        self._step: Step | None = step
        self._was: ReferenceType[CurrentTurn] | None = None
        before = otel_context.get_value(_SCOPE_KEY, parent)
        self._before_scope = before.settled() if isinstance(before, Scope) else None
        current = trace.get_current_span(parent)
        while isinstance(current, Scope) and not current.is_live:  # or chains of ended ones would grow
            current = current._before_span
        self._before_span: trace.Span = current

    @property
    def turn(self) -> CurrentTurn | None:
        """The turn that runs here, or None when this and all before it have ended."""
        scope = self.settled()
        return None if scope is None else scope._turn

    @property
    def is_live(self) -> bool:
        """Whether the span that this stands for is still running."""
        return self._turn is not None

    @property
    def before(self) -> trace.Span:
        """What was current before."""
        return self._before_span

    def settled(self) -> "Scope | None":
        """Return the nearest scope that still runs: this one, or one that was current before it."""
        scope: Scope | None = self
        while scope is not None and scope._turn is None:
            scope = scope._before_scope
        return scope

    def resolved(self) -> trace.Span:
        """Return the span that this stands for now."""
        span: trace.Span = self
        while isinstance(span, Scope):
            step = span._step
            if step is None and (left_by := span.left_by) is not None:
                step = left_by.root
            span = span._before_span if step is None else step.span
        return span

    @property
    def left_by(self) -> CurrentTurn | None:
        """The turn of a step that has ended while the turn goes on: what the step left running belongs to it."""
        turn = None if self._was is None else self._was()
        return None if turn is None or turn.is_finished else turn

    @property
    def step(self) -> Step | None:
        """The step that this stands for, or None when that has ended."""
        return self._step

    def close(self) -> None:
        """Stop standing for the step."""
        if self._turn is not None:
            self._was = ref(self._turn)  # contexts may live for long, and must not keep turns alive
        self._turn = self._step = None

    # --- the interface of a span: all but its end goes to the span that this stands for -------------------------------
    def __getattr__(self, name: str) -> Any:
        """Return what the span that this stands for has beyond the interface, as ``name`` and ``attributes``."""
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.resolved(), name)

    def end(self, end_time: int | None = None) -> None:
        """Do nothing: a span of ours is ended by what started it."""

    def get_span_context(self) -> trace.SpanContext:
        """Return the ids of the span that this stands for now."""
        return self.resolved().get_span_context()

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes on the span that this stands for now."""
        self.resolved().set_attributes(attributes)

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute on the span that this stands for now."""
        self.resolved().set_attribute(key, value)

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Add an event to the span that this stands for now."""
        self.resolved().add_event(name, attributes, timestamp)

    def add_link(self, context: trace.SpanContext, attributes: Any = None) -> None:
        """Add a link to the span that this stands for now."""
        self.resolved().add_link(context, attributes)

    def update_name(self, name: str) -> None:
        """Rename the span that this stands for now."""
        self.resolved().update_name(name)

    def is_recording(self) -> bool:
        """Tell whether the span that this stands for now records."""
        return self.resolved().is_recording()

    def set_status(self, status: Any, description: str | None = None) -> None:
        """Set the status of the span that this stands for now."""
        self.resolved().set_status(status, description)

    def record_exception(
        self, exception: BaseException, attributes: Any = None, timestamp: int | None = None, escaped: bool = False
    ) -> None:
        """Record an exception on the span that this stands for now."""
        self.resolved().record_exception(exception, attributes, timestamp, escaped)

    def __exit__(self, *exc_info: object) -> None:
        """Do nothing: a span of ours is ended by what started it."""


def current_scope(context: Context | None = None) -> Scope | None:
    """Return the running scope of a context, by default of the current one."""
    scope = otel_context.get_value(_SCOPE_KEY, context)
    return scope.settled() if isinstance(scope, Scope) else None


def turn_that_left(context: Context | None = None) -> CurrentTurn | None:
    """Return the unfinished turn of an ended step that left running what runs in a context, or None."""
    scope = otel_context.get_value(_SCOPE_KEY, context)
    return scope.left_by if isinstance(scope, Scope) else None


def was_in_turn(context: Context | None = None) -> bool:
    """Tell whether a context is that of a turn of ours, or was handed on from one that may have ended since."""
    return otel_context.get_value(_SCOPE_KEY, context) is not None


def current_span() -> trace.Span:
    """Return the current span as it is: a scope that runs, or a span of other code."""
    span = trace.get_current_span()
    while isinstance(span, Scope) and not span.is_live:
        span = span.before
    return span


def enter(turn: CurrentTurn, step: Step) -> tuple[Scope, Context, Context]:
    """Make a step's span current.

    Returns:
        The scope, the context as it now is, and the one before: what `leave` takes.
    """
    before = otel_context.get_current()
    scope = Scope(turn, step, before)
    after = otel_context.set_value(_SCOPE_KEY, scope, trace.set_span_in_context(scope, before))
    if turn.travels:
        after = turn.baggage_in(after)
    otel_context.attach(after)
    return scope, after, before


def leave(scope: Scope, after: Context, before: Context) -> None:
    """Close a scope, and put back what was current before where this is the context that `enter` changed.

    It is put back by value, not by token: a token cannot be used in another `contextvars.Context` than the one it was
    made in, and LangChain often ends a run in a copy.
    """
    scope.close()
    if otel_context.get_current() is after:
        otel_context.attach(before)
