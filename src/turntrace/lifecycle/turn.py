"""A turn: one exchange between a user and the app, which is one trace."""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from opentelemetry import baggage, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.content import last_message, read_message, text_of
from turntrace.current import ContextMeter, Scope, current_scope, enter, leave
from turntrace.decisions import PruningDecision
from turntrace.errors import StateError
from turntrace.identity import check_text, safe_text
from turntrace.ledger import TurnWritten
from turntrace.lifecycle.feedback import FEEDBACK_NAME, PutFeedback
from turntrace.lifecycle.journey import Journey
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

_SETTLE_AT: Final = 200
"""Steps that a long turn may hold in memory before they are written down."""

TURN_ID_KEY: Final = "turntrace_turn_id"
"""Key by which a run joins a turn, in the config's metadata, and by which a process takes one up, in a carrier."""


class Turn:
    """One exchange: what the user said, what the agent did, what it answered.

    A turn is made by `Conversation.turn` or `Conversation.start_turn`, or by the callback for a run that stands alone.
    Within its block, or with its `config`, runs of graphs join it.

    Attributes:
        id: Id of the turn and, when it began a trace of its own, of its trace: 32 hexadecimal digits.
        number: Its number in the conversation, from 1.
        conversation: The conversation that it is a turn of.
    """

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
        self.before = before
        self.agent_runs = 0 if before is None else before.turn.agent_runs
        self.intent: str | None = None if before is None else before.turn.intent
        self.answer: Any = None
        self.error: str | None = None
        self.checkpoint_id: str | None = None
        self.handed_over = False
        self.wait_ns = wait_ns
        self._waits_since_ns: int | None = None
        self._words = tags
        self._tags: Mapping[str, AttributeValue] | None = None
        self._tracker: SessionTracker = conversation.session.tracker
        self._clock = self._tracker.clock
        self.account = TurnAccount() if before is None else account_before(before)
        self._running: dict[int, OpenStep] = {}
        self._ended: deque[OpenStep] = deque()
        self._foreign: deque[ReadableSpan] = deque()
        self._noted: deque[Fit | Glimpse] = deque()
        self._fit: Fit | None = None
        self._finished = False
        self._entered: tuple[Scope, Context, Context] | None = None

    def __repr__(self) -> str:
        return f"<Turn {self.number} of conversation {self.conversation.id!r}, {self.id}>"

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

    @property
    def input(self) -> Any:
        """The input for the graph: the user's message under the handler's ``messages_key``; empty without a message."""
        if self.message is None:
            return {}
        key = next((handler.messages_key for handler in self._tracker.callbacks()), "messages")
        return {key: [("user", self.message) if isinstance(self.message, str) else self.message]}

    @property
    def config(self) -> Any:
        """The config for the graph: the thread, the callback, and what makes the run join this turn.

        It is needed where the turn's block does not reach: in other threads, or with `Conversation.start_turn`.
        """
        carried = self.headers() if self.travels else {}
        return {
            "configurable": {"thread_id": self.conversation.id},
            "metadata": {TURN_ID_KEY: self.id, **carried},
            "callbacks": self._tracker.callbacks(),
        }

    # --- what the app tells -------------------------------------------------------------------------------------------
    def set_intent(self, intent: str) -> None:
        """Say what the user wants in this turn, as ``turn.intent``; the last word counts."""
        self.intent = safe_text(intent)

    def set_answer(self, message: Any) -> None:
        """Say what the app answered, where no run of a graph tells it.

        Args:
            message: A text or a message; of it only its length and kind are recorded unless the content policy allows
                more.
        """
        self.answer = message

    def feedback(self, value: float | bool, name: str = FEEDBACK_NAME, comment: str | None = None) -> None:
        """Give feedback on the turn. Nobody waits for it to be written; it may come after the turn has ended.

        Args:
            value: True, False, or a number from 0 to 1.
            name: Its name; feedback of the same name on the same turn replaces it.
            comment: What the user said; it leaves only as far as the content policy allows.

        Raises:
            ConfigurationError: If the value cannot be used.
        """
        about = (self.id, self.planned_ids[0])
        session_id = self.conversation.session.id
        self._tracker.submit(PutFeedback(self._tracker, session_id, about, value, name, comment))

    def journey(self, name: str, stages: Sequence[str] | None = None) -> Journey:
        """Begin or continue a journey of the user, whose steps are events of this turn; as `Session.journey`."""
        session = self.conversation.session
        return Journey(session, check_text(name, "name"), self._tracker.stages_of(session, name, stages), self)

    def end(self, status: str = "completed", *, error: BaseException | None = None) -> None:
        """End the turn; ending it again does nothing.

        Nobody waits: the spans and the ledger's row are written by a thread of turntrace's own.

        Args:
            status: ``completed``, ``failed``, ``abandoned``, or ``interrupted``: then it waits for a person, and goes
                on with `Conversation.resume_turn` or with the run that answers.
            error: The error that ended it; then the status is ``failed``. Only its class is recorded.

        Raises:
            StateError: If the status is none of these.
        """
        if status not in _STATUSES:
            raise StateError(f"A turn cannot end as {status!r}. Allowed are {', '.join(_STATUSES)}.")
        ended_ns = self.leave(error)
        if ended_ns is not None:
            if error is not None:
                status = "abandoned" if is_abandoning(error) else "failed"
            self._tracker.finish(self, status, ended_ns)

    def leave(self, error: BaseException | None) -> int | None:
        """End what still runs in the turn; return when that was, or None when the turn had ended before."""
        with self._lock:
            if self._finished:
                return None
            self._finished = True
        if error is not None:
            self.error = type(error).__name__
        ended_ns = max(self._clock(), self.started_ns)
        for step in list(self._running.values()):  # a stream that was left, a task that was cancelled
            step.abandoned = True
            self._note_end(step, ended_ns)
        return ended_ns

    async def aend(self, status: str = "completed", *, error: BaseException | None = None) -> None:
        """End the turn, as `end` does, which does not wait either."""
        self.end(status, error=error)

    def carrier(self) -> dict[str, str]:
        """Hand the turn over to another process, and return what that takes up: `SessionTracker.resume_turn`.

        The turn goes on there, as the same turn and the same trace; here it is over. It waits until what happened in
        it so far is written down.

        Returns:
            A small dictionary of texts, to go with the job: it holds no content, and nothing of the user.

        Raises:
            StateError: If the turn has ended.
        """
        if self._finished:
            raise StateError(
                f"{self!r} has ended, so it cannot be handed over. Call turn.carrier() instead of its end."
            )
        self.handed_over = True
        self.end("interrupted")
        self._tracker.flush_writer()
        return {TURN_ID_KEY: self.id}

    async def acarrier(self) -> dict[str, str]:
        """Hand the turn over, as `carrier` does, without blocking the event loop."""
        return await self._tracker.run_off_loop(self.carrier)

    def headers(self) -> dict[str, str]:
        """Return the turn as HTTP headers: W3C ``traceparent`` and ``baggage``, for a request to another server.

        The server's handler finds the turn by them when its tracker has ``propagate=True``. What they hold is what
        every span carries: ids, the hash of the user, channel, tier, organisation and topic.
        """
        scope = current_scope()
        here: Any = None if scope is None or scope.turn is not self else scope.step
        context = trace.set_span_in_context((here or self.root).span, self.baggage_in(_EMPTY))
        carrier: dict[str, str] = {}
        _TRACE.inject(carrier, context)
        _BAGGAGE.inject(carrier, context)
        return carrier

    def baggage_in(self, context: Context) -> Context:
        """Return a context with what every span of the turn carries as baggage."""
        for name, value in self.tags.items():
            context = baggage.set_baggage(name, str(value), context)
        return context

    @property
    def travels(self) -> bool:
        """Whether what runs inside takes the turn along in its requests to other servers."""
        return self._tracker.propagate

    # --- for adapters -------------------------------------------------------------------------------------------------
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
        context = step.context
        if context is None:
            above = self.root if step.parent is None else step.parent
            context = trace.set_span_in_context(above.span, _EMPTY)
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
        return self._tracker.target.start(step.name, attributes=begun, start_ns=step.start_ns, parent=context)

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
            step.error = type(error).__name__
            step.abandoned = is_abandoning(error)
            if self._tracker.content.records_turn:
                step.error_text = text_of(error)
        self._note_end(step, self._clock() if end_ns is None else end_ns)
        if self._finished or len(self._ended) >= _SETTLE_AT:
            self._tracker.settle(self)

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
        step = None if scope is None or scope.turn is not self else scope.step
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
            self._tracker.settle(self)

    def collect(self, span: ReadableSpan) -> None:
        """Take a span of other code that ended in this turn, or after it."""
        self._foreign.append(span)
        if self._finished or len(self._foreign) >= _SETTLE_AT:
            self._tracker.settle(self)

    def take_ended(self) -> tuple[list[OpenStep], list[ReadableSpan], list[Fit | Glimpse]]:
        """Hand over the steps and the spans of others that have ended since the last time, and what was noted."""
        return list(_drained(self._ended)), list(_drained(self._foreign)), list(_drained(self._noted))

    def note_answer(self, messages: Any) -> None:
        """Note the last message that a run of a graph gave back."""
        message = last_message(messages)
        read = read_message(message)
        if read is not None and read.role != "user":
            self.answer = message

    # --- the block ----------------------------------------------------------------------------------------------------
    def __enter__(self) -> Self:
        if self._entered is not None:
            raise StateError(f"{self!r} is entered already. Use one block a turn: with conversation.turn(...) as turn:")
        self._entered = enter(self, self.root)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        entered, self._entered = self._entered, None
        if entered is not None:
            leave(*entered)
        self.end("interrupted" if self.interrupted else "completed", error=error)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.__exit__(kind, error, traceback)


T = TypeVar("T")


def _drained(waiting: deque[T]) -> Iterator[T]:
    while waiting:  # one by one: another thread may add to it meanwhile
        yield waiting.popleft()


_STATUSES: Final = ("completed", "interrupted", "failed", "abandoned")
_EMPTY: Final = Context()
_TRACE: Final = TraceContextTextMapPropagator()
_BAGGAGE: Final = W3CBaggagePropagator()


def is_abandoning(error: BaseException) -> bool:
    """Tell whether an error means that nobody waits any more: a closed generator, a cancelled task, an exit."""
    return not isinstance(error, Exception)
