"""The runs of LangChain's that have not ended, as a tree: what hangs on which step of which turn."""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, TypeAlias
from uuid import UUID

from opentelemetry import trace
from opentelemetry.context import Context

from turntrace.attributes import AttributeValue
from turntrace.current import Scope, current_span
from turntrace.lifecycle import Turn
from turntrace.lifecycle.steps import OpenStep

logger = logging.getLogger("turntrace")

_MOST_LATE: Final = 64
Metadata: TypeAlias = Mapping[str, Any] | None
Tags: TypeAlias = Sequence[str] | None
Prompt: TypeAlias = Mapping[str, AttributeValue]
"""What links a call of a model to a prompt of Langfuse's: attributes, none for a prompt that cannot be linked."""


@dataclass(slots=True, eq=False)
class Root:
    """A run without a parent: that of a graph, or of a call that stands alone.

    Attributes:
        turn: The turn that it opened or joined.
        context: Where it began inside a span of other code in a turn that runs: the context of that span.
        above: Where it began inside a step of that turn: the step.
        owns_turn: Whether the turn ends with it.
        below: The runs below it that have not ended.
        is_graph: Whether it is a run of a graph, or of a chain around one, and not a call that stands alone.
        interrupted: Whether it stopped to wait for a person.
        checkpoint_id: LangGraph's checkpoint at which it did.
        asked: The run of the graph that did.
        names_prompts: Whether a run below it named a prompt, so that calls of models have one to look for.
        prompt: The prompt that it named itself, for a run whose parent is not known.
    """

    turn: Turn
    owns_turn: bool
    context: Context | None = None
    above: OpenStep | None = None
    below: set[UUID] = field(default_factory=set)
    is_graph: bool = False
    interrupted: bool = False
    checkpoint_id: str | None = None
    asked: "Run | None" = None
    names_prompts: bool = False
    prompt: Prompt | None = None


@dataclass(slots=True, eq=False)
class Run:
    """A run of LangChain's.

    Attributes:
        root: The run without a parent that it is, or is below.
        step: The step that it is, or the nearest one above it.
        is_step: Whether it is a step itself.
        is_root: Whether it is its root.
        parent: The run above it; None for its root.
        prompt: The prompt that a run right below it named, until a call of a model is linked to it.
        name: Its name, for a run that may turn out to be that of a graph.
        started_ns: When it began, in nanoseconds since 1970.
        entered: What `turntrace.current.enter` returned, to be given to `leave`.
        model: The model that a call asks for.
        provider: The vendor of that model.
        namespace: LangGraph's checkpoint namespace of the node or task that it is, or is in.
        failed: Of a graph, its nodes and tasks that failed, by namespace: another run of the same is another attempt.
    """

    root: Root
    step: OpenStep | None
    is_step: bool = False
    is_root: bool = False
    parent: "Run | None" = None
    prompt: Prompt | None = None
    name: str | None = None
    started_ns: int = 0
    entered: tuple[Scope, Context, Context] | None = None
    model: str | None = None
    provider: str | None = None
    namespace: str = ""
    failed: dict[str, OpenStep] | None = None


class LateRuns(OrderedDict[UUID, Run]):
    """Runs that were closed before their end was told: in a thread they may go on, and what they call is paid."""

    def keep(self, run_id: UUID, run: Run) -> None:
        """Keep a run; the oldest of too many is forgotten."""
        self[run_id] = run
        if len(self) > _MOST_LATE:
            self.popitem(last=False)


def joined(turn: Turn, scope: Scope) -> Root:
    """Return the root of a run that begins inside a turn that runs: below its step, or a span of other code in it."""
    span = current_span()
    step = scope.step
    if not isinstance(span, Scope) and span.get_span_context().trace_id == turn.trace_id:
        return Root(turn, owns_turn=False, context=trace.set_span_in_context(span, Context()))
    above = step if isinstance(step, OpenStep) and step is not turn.root else None
    return Root(turn, owns_turn=False, above=above)


def next_attempt(parent: Run, namespace: str) -> int | None:
    """Return which attempt a run of a node or a task is that begins below a graph's; None for the first.

    The step of the one before is marked as tried again, so its error counts as a warning.
    """
    before = None if parent.failed is None else parent.failed.pop(namespace, None)
    if before is None:
        return None
    before.retried = True
    return (before.attempt or 1) + 1


def note_failure(run: Run) -> None:
    """Note that a node or a task failed: what runs next in its place is another attempt."""
    if run.parent is not None and run.step is not None and run.is_step and run.namespace:
        if run.parent.failed is None:
            run.parent.failed = {}
        run.parent.failed[run.namespace] = run.step


@cache
def say_once_that_it_is_late() -> None:
    """Say that something of a turn is on no record, since it began when the turn had ended."""
    logger.warning(
        "turntrace: a run began in what a node left running after its turn had ended, as in a background task, and is "
        "on no record. Keep the turn open until then (with conversation.turn(...)), or give the run its own config."
    )
