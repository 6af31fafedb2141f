"""The steps of a turn while it runs: open spans, and what the turn's writer is told when they end."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from opentelemetry.context import Context
from opentelemetry.trace import Span

from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.current import ContextMeter
from turntrace.decisions import ContextGiven, PruningDecision
from turntrace.ledger import TurnWritten
from turntrace.records import LLMCall, SessionFacts, Step, TurnTags

StepKind = Literal["agent", "chain", "generation", "tool", "retriever", "event"]

OPERATION_OF: Final[Mapping[str, str]] = {"agent": "invoke_agent", "generation": "chat", "tool": "execute_tool"}
"""The ``gen_ai.operation.name`` of a kind of step, where OpenTelemetry defines one."""


Starter: TypeAlias = "Callable[[OpenStep, Mapping[str, AttributeValue]], Span]"
"""Starts the span of a step, with attributes that came to be known late."""


class Fit(NamedTuple):
    """How messages were fitted into a model's window.

    Attributes:
        decision: What was decided.
        window: The messages that came out.
        meter: What counted them.
        step: The step in which it was.
        at_ns: When it was done, in nanoseconds since 1970.
    """

    decision: PruningDecision
    window: Sequence[Any]
    meter: ContextMeter
    step: "OpenStep | None"
    at_ns: int


class Sent(NamedTuple):
    """What a model was sent.

    Attributes:
        messages: The messages.
        tools: The schemas of the tools.
        fit: How messages had been fitted last, in the step around the call, else in the turn.
    """

    messages: Sequence[Any]
    tools: Sequence[Any]
    fit: Fit | None


class Glimpse(NamedTuple):
    """Messages of a conversation as a node found them in its state, or as a model was sent them.

    Attributes:
        messages: The messages.
        step: The node, or the call of the model.
        namespace: LangGraph's checkpoint namespace of the node.
        is_call: Whether a model was sent them.
        at_ns: When, in nanoseconds since 1970.
    """

    messages: Sequence[Any]
    step: "OpenStep"
    namespace: str
    is_call: bool
    at_ns: int


@dataclass(slots=True, eq=False)
class OpenStep:
    """A step that has begun.

    Its span is started when somebody needs it: user code that runs inside and starts spans or asks which is current,
    else the writer, when the step has ended. So a step costs the app's thread next to nothing, and the span is started
    with all that is known of it, at its true time.

    Attributes:
        starter: Starts its span.
        lock: Held while the span is started: by the writer, or by user code inside.
        name: Name of the node, the model, the tool or the graph.
        kind: What it is, as Langfuse's observation type.
        start_ns: When it began, in nanoseconds since 1970.
        parent: The step above it; None right below the root or below a span of other code.
        context: The context of that span of other code.
        known: What is known at its start.
        end_ns: When it ended; None while it runs.
        call: What is known of the call, for a generation.
        extra: Attributes that came to be known while it ran.
        error: Class of the error that ended it.
        error_text: What may be recorded of that error's text.
        abandoned: Whether nobody waited for it any more.
        waits: Whether it stopped to wait for a person, and is run again with the answer.
        retried: Whether it failed and another attempt took its place.
        attempt: Which attempt of a node or a task it is, for those after the first.
        fit: How messages were fitted in it last.
        sent: What the model was sent, for a generation.
        again_of: The step as it was written down before, where this tells what came to be known of it later.
    """

    starter: Starter
    lock: threading.RLock
    name: str
    kind: StepKind
    start_ns: int
    parent: "OpenStep | None" = None
    context: Context | None = None
    known: Mapping[str, AttributeValue] | None = None
    end_ns: int | None = None
    call: LLMCall | None = None
    first_token_ns: int | None = None
    extra: dict[str, AttributeValue] | None = None
    error: str | None = None
    error_text: str | None = None
    abandoned: bool = False
    waits: bool = False
    retried: bool = False
    attempt: int | None = None
    started: Span | None = None
    fit: Fit | None = None
    sent: Sent | None = None
    again_of: "OpenStep | None" = None

    @property
    def span(self) -> Span:
        """Its span; it is started when it has not been."""
        return self.started or self.start({})

    def start(self, late: Mapping[str, AttributeValue]) -> Span:
        """Start its span with what came to be known late; where it has been started, set that."""
        with self.lock:
            if self.started is None:
                self.started = self.starter(self, late)
                return self.started
        if late:
            self.started.set_attributes(late)
        return self.started

    @property
    def is_retried(self) -> bool:
        """Whether it, or what it was a part of, failed and another attempt took its place."""
        step: OpenStep | None = self
        while step is not None and not step.retried:
            step = step.parent
        return step is not None

    @property
    def agent(self) -> "OpenStep | None":
        """The nearest step above it that is an agent, or None."""
        step = self.parent
        while step is not None and step.kind != "agent":
            step = step.parent
        return step

    def add(self, name: str, value: AttributeValue) -> None:
        """Note an attribute, to be set when the step has ended."""
        if self.extra is None:
            self.extra = {}
        self.extra[name] = value


def root_attributes(tags: TurnTags, session: SessionFacts, trace_tags: tuple[str, ...]) -> dict[str, AttributeValue]:
    """Return what the root of a turn carries from its start."""
    begun = tags.attributes()
    begun[a.LANGFUSE_OBSERVATION_TYPE] = "agent"
    begun[a.LANGFUSE_TRACE_NAME] = a.TRACE_NAME_TURN
    if session.type is not None:
        begun[a.SESSION_TYPE] = session.type
    if session.locale is not None:
        begun[a.SESSION_LOCALE] = session.locale
    if session.client_version is not None:
        begun[a.SESSION_CLIENT_VERSION] = session.client_version
    if trace_tags:
        begun[a.LANGFUSE_TRACE_TAGS] = trace_tags
    return begun


@dataclass(slots=True)
class TurnAccount:
    """What the steps of a turn add up to. Only the writer's thread touches it.

    Attributes:
        steps: The steps that have been written, for looking at.
        spans: Spans of the turn that have ended so far.
        first_token_ns: When the first token of the turn came, in nanoseconds since 1970.
        model: The model that was called last.
        context_tokens: Tokens that a model was given when its window was fullest.
        context_messages: Messages that it was given then.
        context_limit: Tokens that it can be given.
        counted_tokens: Tokens that were counted here, in calls whose provider counted them too.
        counted_of_tokens: What the provider counted in these calls.
        prunings: Decisions that pruned something.
        messages_pruned: Messages that were pruned; one that several decisions left out counts once.
        tokens_pruned: Tokens of them, as far as they were counted.
        left_out: Ids of what the latest decision left out.
        left_out_tokens: Tokens that it left out.
        fitted: The fullest window that messages were fitted into, for a turn whose calls of models nobody tells.
        is_closed: Whether the turn has been summed up: what ends from then on is added to its row.
    """

    steps: list[Step] = field(default_factory=list)
    spans: int = 0
    llm_calls: int = 0
    tool_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    unpriced_calls: int = 0
    first_token_ns: int | None = None
    model: str | None = None
    context_tokens: int | None = None
    context_messages: int | None = None
    context_limit: int | None = None
    counted_tokens: int = 0
    counted_of_tokens: int = 0
    prunings: int = 0
    messages_pruned: int = 0
    tokens_pruned: int = 0
    left_out: frozenset[str] = frozenset()
    left_out_tokens: int = 0
    fitted: ContextGiven | None = None
    is_closed: bool = False


def account_before(before: TurnWritten) -> TurnAccount:
    """Return the account of a turn that goes on, as it stood when it began to wait."""
    turn = before.turn
    names = (
        *("llm_calls", "tool_calls", "input_tokens", "output_tokens", "cost_usd", "unpriced_calls", "prunings"),
        *("messages_pruned", "tokens_pruned", "model", "context_tokens", "context_messages", "context_limit"),
        *("counted_tokens", "counted_of_tokens"),
    )
    account = TurnAccount(steps=list(before.steps), spans=before.spans, **{n: getattr(turn, n) for n in names})
    if turn.time_to_first_token_ms is not None:
        account.first_token_ns = turn.started_ns + turn.time_to_first_token_ms * 1_000_000
    return account
