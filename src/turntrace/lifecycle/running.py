"""A turn while it runs: its steps, what was seen of its messages, and whether it waits for a person.

What the app says to a turn is in `turntrace.lifecycle.turn`; this is what adapters tell it, and what its writer takes.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan

from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.content import last_message, read_message, text_of
from turntrace.current import ContextMeter, current_scope
from turntrace.decisions import PruningDecision
from turntrace.identity import safe_text
from turntrace.ledger import TurnWritten
from turntrace.lifecycle.steps import (
    OPERATION_OF,
    Fit,
    Glimpse,
    OpenStep,
    Sent,
    Starter,
    StepKind,
    TurnAccount,
    account_before,
)
from turntrace.records import LLMCall, TurnTags

if TYPE_CHECKING:
    from turntrace.lifecycle.session import Conversation
    from turntrace.lifecycle.tracker import SessionTracker
    from turntrace.lifecycle.turn import Turn

_SETTLE_AT: Final = 200
"""Steps that a long turn may hold in memory before they are written down."""

T = TypeVar("T")


class RunningTurn:
    """What is told to a turn while it runs, and handed over to its writer.

    Attributes:
        id: Id of the turn.
        number: Its number in the conversation, from 1.
        conversation: The conversation that it is a turn of.
        account: What its steps add up to; only the writer's thread touches it.
        is_visit: Whether it is a turn of another process, perhaps with another ledger, that a run here belongs to.
        wait_ns: How long it has waited for a person, in nanoseconds.
        is_lost: Whether nothing of it is written down: it began when too much waited for a ledger that is away.
    """

    is_visit = False

    def __init__(
        self,
        conversation: "Conversation",
        tags: TurnTags,
        *,
        start_root: Starter,
        planned_ids: tuple[str, str],
        started_ns: int,
        message: Any,
        role: str,
        forked_from: str | None = None,
        before: TurnWritten | None = None,
        wait_ns: int = 0,
        own: str | None = None,
    ) -> None:
        self.id = tags.turn_id
        self.number = tags.number
        self.conversation = conversation
        self.started_ns = started_ns
        self.role = role
        self.message = message
        self._lock = threading.RLock()
        self.root = OpenStep(start_root, self._lock, a.SPAN_TURN, "agent", started_ns)
        self.planned_ids = planned_ids
        self.forked_from = forked_from
        self.own = own
        self.before = before
        self.agent_runs = 0 if before is None else before.turn.agent_runs
        self.intent: str | None = None if before is None else before.turn.intent
        self.answer: Any = None
        self.error: str | None = None
        self.checkpoint_id: str | None = None
        self.handed_over = False
        self.is_lost = False
        self.wait_ns = wait_ns
        self._waits_since_ns: int | None = None
        self._words = tags
        self._tags: Mapping[str, AttributeValue] | None = None
        self._tracker: SessionTracker = conversation.session.tracker
        self._clock = self._tracker.clock
        self.account = TurnAccount() if before is None else account_before(before)
        self._running: dict[int, OpenStep] = {}
        self._ended: deque[OpenStep] = deque()
        self._failed: list[OpenStep] = []
        self._foreign: deque[ReadableSpan] = deque()
        self._noted: deque[Fit | Glimpse] = deque()
        self._fit: Fit | None = None
        self._finished = False

    @property
    def tracker(self) -> "SessionTracker":
        """The tracker that the turn belongs to."""
        return self._tracker

    @property
    def tags(self) -> Mapping[str, AttributeValue]:
        """What every span of the turn carries, by attribute name."""
        if self._tags is None:
            self._tags = MappingProxyType(self._words.attributes())
        return self._tags

    @property
    def words(self) -> TurnTags:
        """What every span of the turn carries."""
        return self._words

    def renumber(self, number: int) -> None:
        """Give it the number that the ledger has for it, where it began with a guess while the ledger was away."""
        self.number = number
        self._words, self._tags = replace(self._words, number=number), None

    @property
    def trace_id(self) -> int:
        """Id of its trace."""
        return self.root.span.get_span_context().trace_id

    @property
    def is_finished(self) -> bool:
        """Whether the turn has ended."""
        return self._finished

    @property
    def interrupted(self) -> bool:
        """Whether the run of a graph that ended last in it stopped to wait for a person."""
        return self._waits_since_ns is not None

    def run_began(self) -> None:
        """Note that a run of a graph begins in it: what it waited for, where it did, has come."""
        with self._lock:
            self.agent_runs += 1
            since, self._waits_since_ns = self._waits_since_ns, None
            if since is not None:
                self.wait_ns += max(0, self._clock() - since)

    def run_ended(self, *, interrupted: bool, checkpoint_id: str | None = None) -> None:
        """Note that a run of a graph ended in it.

        Args:
            interrupted: Whether it stopped to wait for a person.
            checkpoint_id: LangGraph's checkpoint at which it did.
        """
        with self._lock:
            self._waits_since_ns = self._clock() if interrupted else None
            self.checkpoint_id = checkpoint_id if interrupted else None

    def leave(self, error: BaseException | None) -> int | None:
        """End what still runs in the turn; return when that was, or None when the turn had ended before."""
        with self._lock:
            if self._finished:
                return None
            self._finished = True
        if error is not None:
            self.error = safe_text(type(error).__name__)
        ended_ns = max(self._clock(), self.started_ns)
        for step in list(self._running.values()):  # a stream that was left, a task that was cancelled
            step.abandoned = True
            self._note_end(step, ended_ns)
        return ended_ns

    def open_step(
        self,
        name: str,
        kind: StepKind,
        *,
        parent: OpenStep | None = None,
        context: Context | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
        start_ns: int | None = None,
    ) -> OpenStep:
        """Begin a step of the turn; its span is started when somebody needs it (see `OpenStep`).

        Args:
            name: Name of the node, the model, the tool or the graph.
            kind: What it is.
            parent: The step above it; None for one right below the root.
            context: The context whose current span is to be its parent instead.
            attributes: What is known at its start.
            start_ns: When it began, in nanoseconds since 1970; now by default.
        """
        started = self._clock() if start_ns is None else start_ns
        step = OpenStep(self._start_span, self._lock, name, kind, started, parent, context, attributes)
        self._running[id(step)] = step
        return step

    def _start_span(self, step: OpenStep, late: Mapping[str, AttributeValue]) -> trace.Span:
        above: Context | trace.Span | None = step.context
        if above is None:
            above = (step.parent or self.root).span
        begun = dict(self.tags)
        begun[a.LANGFUSE_OBSERVATION_TYPE] = step.kind
        operation = OPERATION_OF.get(step.kind)
        if operation is not None:
            begun[a.GEN_AI_OPERATION_NAME] = operation
        agent = step.agent
        if agent is not None and agent.known is not None and a.GEN_AI_AGENT_NAME in agent.known:
            begun[a.GEN_AI_AGENT_NAME] = agent.known[a.GEN_AI_AGENT_NAME]
        if step.known is not None:
            begun.update(step.known)
        begun.update(late)
        again = step.again_of
        return self._tracker.target.start(
            step.name,
            attributes=begun,
            start_ns=step.start_ns,
            parent=above,
            has_ended=step.end_ns is not None,
            span_id=None if again is None else again.span.get_span_context().span_id,
        )

    def close_step(
        self,
        step: OpenStep,
        *,
        error: BaseException | None = None,
        call: LLMCall | None = None,
        end_ns: int | None = None,
    ) -> None:
        """End a step; a step that has ended is left alone.

        Args:
            step: The step.
            error: The error that ended it; its class is recorded, its text only as far as the content policy allows.
            call: What is known of the call, for a generation.
            end_ns: When it ended, in nanoseconds since 1970; now by default.
        """
        step.call = call
        if error is not None:
            step.error = safe_text(type(error).__name__)
            step.abandoned = is_abandoning(error)
            if self._tracker.content.records_steps:
                step.error_text = text_of(error)
        self._note_end(step, self._clock() if end_ns is None else end_ns)
        if self._finished or len(self._ended) >= _SETTLE_AT:
            self._settle()

    def call_ended_late(self, step: OpenStep, call: LLMCall) -> None:
        """Note what a call of a model used that went on when nobody waited for it any more, and was closed then."""
        again = replace(
            step, call=call, abandoned=False, end_ns=self._clock(), started=None, fit=None, sent=None, again_of=step
        )
        self._ended.append(again)
        if self._finished:
            self._settle()

    def _note_end(self, step: OpenStep, end_ns: int) -> None:
        if self._running.pop(id(step), None) is not None:
            step.end_ns = max(end_ns, step.start_ns)
            self._ended.append(step)

    def event_step(
        self, name: str, attributes: Mapping[str, AttributeValue], above: OpenStep | None, end_ns: int, took_ns: int
    ) -> OpenStep:
        """Make the step of something that has happened, for the writer; it is not one that runs."""
        start_ns = max(self.started_ns, end_ns - took_ns)
        step = OpenStep(self._start_span, self._lock, name, "event", start_ns, above, None, attributes)
        step.end_ns = max(start_ns, end_ns)
        return step

    def note_fit(self, decision: PruningDecision, window: Sequence[Any], meter: ContextMeter) -> None:
        """Note how messages were fitted into a model's window, in the step that runs here."""
        scope = current_scope()
        running: object = None if scope is None else scope.turn
        step = scope.step if scope is not None and running is self else None
        inside = step if isinstance(step, OpenStep) and step is not self.root else None
        fit = self._fit = Fit(decision, window, meter, inside, self._clock())
        if inside is not None:
            inside.fit = fit
        self._note(fit)

    def note_state(self, step: OpenStep, messages: Sequence[Any], namespace: str, *, at_ns: int | None = None) -> None:
        """Note the messages that a node found in its state, or that a graph left there."""
        self._note(Glimpse(messages, step, namespace, False, step.start_ns if at_ns is None else at_ns))

    def recall(self, messages: Sequence[Any]) -> None:
        """Find in the state what the user said in a turn that waited, where that may be recorded; nobody kept it."""
        if self.message is not None or self.before is None or not self._tracker.content.records_turn:
            return
        for message in reversed(messages):
            read = read_message(message)
            if read is not None and read.role == "user" and len(read.text) == self.before.turn.input_length:
                self.message = message
                return

    def note_sent(self, step: OpenStep, messages: Sequence[Any], tools: Sequence[Any], namespace: str) -> None:
        """Note what a model is sent."""
        fit = None if step.parent is None else step.parent.fit
        step.sent = Sent(messages, tools, fit or self._fit)
        self._note(Glimpse(messages, step, namespace, True, step.start_ns))

    def _note(self, seen: Fit | Glimpse) -> None:
        self._noted.append(seen)
        if self._finished:
            self._settle()

    def collect(self, span: ReadableSpan) -> None:
        """Take a span of other code that ended in this turn, or after it."""
        self._foreign.append(span)
        if self._finished or len(self._foreign) >= _SETTLE_AT:
            self._settle()

    def take_ended(self) -> tuple[list[OpenStep], list[ReadableSpan], list[Fit | Glimpse]]:
        """Hand over the steps and the spans of others that have ended since the last time, and what was noted.

        While the turn runs, what failed is kept back: it may be an attempt, which is told when it is tried again.
        """
        ended = [*self._failed, *_drained(self._ended)]
        self._failed = [] if self._finished else [step for step in ended if step.error and not step.is_retried]
        if self._failed:
            kept = {id(step) for step in self._failed}
            ended = [step for step in ended if id(step) not in kept]
        return ended, list(_drained(self._foreign)), list(_drained(self._noted))

    def note_answer(self, messages: Any) -> None:
        """Note the last message that a run of a graph gave back."""
        message = last_message(messages)
        read = read_message(message)
        if read is not None and read.role != "user":
            self.answer = message

    def _settle(self) -> None:
        self._tracker.settle(cast("Turn", self))


def _drained(waiting: deque[T]) -> Iterator[T]:
    while waiting:  # one by one: another thread may add to it meanwhile
        yield waiting.popleft()


def is_abandoning(error: BaseException) -> bool:
    """Tell whether an error means that nobody waits any more: a closed generator, a cancelled task, an exit."""
    return not isinstance(error, Exception)
