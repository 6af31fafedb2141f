"""The run registry: which run of LangChain's belongs to which turn and which step.

Ids travel by run tree: every run is found by its id, and hangs on the step of its parent. Nothing depends on where or
in which context LangChain calls the handler.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import UUID
from weakref import WeakKeyDictionary

from langchain_core.outputs import LLMResult
from opentelemetry import context as otel_context
from opentelemetry.context import Context

from turntrace import attributes as a
from turntrace.content import to_json
from turntrace.current import Scope, current_scope, enter, leave
from turntrace.graph import extract
from turntrace.lifecycle import SessionTracker, Turn
from turntrace.lifecycle.steps import OpenStep
from turntrace.lifecycle.turn import is_abandoning

Metadata: TypeAlias = Mapping[str, Any] | None
Tags: TypeAlias = Sequence[str] | None


@dataclass(slots=True, eq=False)
class Run:
    """A run of LangChain's.

    Attributes:
        turn: The turn that it belongs to.
        step: The step that it is, or the nearest one above it.
        is_step: Whether it is a step itself.
        owns_turn: Whether the turn ends with it.
        name: Its name, for a run that may turn out to be that of a graph.
        started_ns: When it began, in nanoseconds since 1970.
        entered: What `turntrace.current.enter` returned, to be given to `leave`.
    """

    turn: Turn
    step: OpenStep | None
    is_step: bool = False
    owns_turn: bool = False
    name: str | None = None
    started_ns: int = 0
    entered: tuple[Scope, Context, Context] | None = None
    model: str | None = None
    provider: str | None = None


# One for all handlers of a tracker: a run that two of them hear is one run.
_runs_of: "WeakKeyDictionary[SessionTracker, dict[UUID, Run]]" = WeakKeyDictionary()


class RunRegistry:
    """Turns what a handler hears into turns and steps.

    Args:
        tracker: The tracker whose turns they are.
        messages_key: Key of the graph's state that holds its messages.
    """

    def __init__(self, tracker: SessionTracker, messages_key: str = "messages") -> None:
        self._tracker = tracker
        self._messages_key = messages_key
        self._runs: dict[UUID, Run] = _runs_of.setdefault(tracker, {})

    def __len__(self) -> int:
        return len(self._runs)

    def step_of(self, run_id: UUID | None) -> tuple[Turn, OpenStep | None] | None:
        """Return the turn and the step that a run belongs to, or None."""
        run = None if run_id is None else self._runs.get(run_id)
        return None if run is None else (run.turn, run.step)

    # --- chains: graphs, nodes, and what is between them --------------------------------------------------------------
    def chain_started(
        self, run_id: UUID, parent_id: UUID | None, name: str | None, inputs: Any, tags: Tags, metadata: Metadata
    ) -> None:
        """Note a run of a graph, a node, or of plumbing, which makes no step of its own."""
        if run_id in self._runs:  # a handler that is attached twice
            return
        parent = self._parent(parent_id)
        if parent is None:
            self._root_started(run_id, name or "graph", inputs, metadata or {})
            return
        number = extract.step_of(tags)
        if number is None or extract.is_hidden(tags):
            run = Run(parent.turn, parent.step, name=name, started_ns=self._tracker.clock())
        else:
            self._make_graph(parent)
            step = parent.turn.open_step(name or "node", "chain", parent=parent.step, attributes={a.TURN_STEP: number})
            run = Run(parent.turn, step, is_step=True)
        self._runs[run_id] = run
        self._enter(run)

    def _parent(self, parent_id: UUID | None) -> Run | None:
        return None if parent_id is None else self._runs.get(parent_id)

    def _make_graph(self, run: Run) -> None:
        """Make a run a step after all: a node began below it, so it is that of a subgraph."""
        if not run.is_step and run.name is not None:
            run.step = run.turn.open_step(
                run.name,
                "agent",
                parent=run.step,
                attributes={a.GEN_AI_AGENT_NAME: run.name},
                start_ns=run.started_ns,
            )
            run.is_step = True

    def _root_started(self, run_id: UUID, name: str, inputs: Any, metadata: Mapping[str, Any]) -> None:
        turn, context, owns = self._turn_for(inputs, metadata)
        turn.agent_runs += 1
        step = turn.open_step(name, "agent", context=context, attributes={a.GEN_AI_AGENT_NAME: name})
        self._runs[run_id] = Run(turn, step, is_step=True, owns_turn=owns)

    def _turn_for(self, inputs: Any, metadata: Mapping[str, Any]) -> tuple[Turn, Context | None, bool]:
        """Find the turn of a run without a parent: the one that runs here, the one it names, or a new one."""
        scope = current_scope()
        running: Any = None if scope is None else scope.turn
        if isinstance(running, Turn) and running.tracker is self._tracker:
            return running, otel_context.get_current(), False
        request = extract.request_of(metadata)
        if request.turn_id is not None:
            named = self._tracker.live_turn(request.turn_id)
            if named is not None:
                return named, None, False
        return self._tracker.begin_turn(request, extract.message_in(inputs, self._messages_key)), None, True

    def chain_ended(self, run_id: UUID, outputs: Any) -> None:
        """Note that a chain ended."""
        run = self._runs.pop(run_id, None)
        if run is None:
            return
        self._leave(run)
        if run.is_step and run.step is not None:
            run.turn.close_step(run.step)
            if run.step.parent is None and run.step.kind == "agent":
                run.turn.note_answer(extract.answer_in(outputs, self._messages_key))
        if run.owns_turn:
            self._turn_ended(run.turn)

    def chain_failed(self, run_id: UUID, error: BaseException) -> None:
        """Note that a chain ended with an error, or was left."""
        run = self._runs.pop(run_id, None)
        if run is None:
            return
        self._leave(run)
        if extract.is_control_flow(error):
            run.turn.interrupted = run.turn.interrupted or extract.is_interrupt(error)
            if run.is_step and run.step is not None:
                run.turn.close_step(run.step)
            if run.owns_turn:
                self._turn_ended(run.turn)
            return
        if run.is_step and run.step is not None:
            run.turn.close_step(run.step, error=error)
        if run.owns_turn:
            self._forget_runs_of(run.turn, needed=is_abandoning(error))
            run.turn.end(error=error)

    def interrupted(self, run_id: UUID | None) -> None:
        """Note that a graph stopped to wait for a person."""
        run = None if run_id is None else self._runs.get(run_id)
        if run is not None:
            run.turn.interrupted = True

    def _turn_ended(self, turn: Turn) -> None:
        turn.end("interrupted" if turn.interrupted else "completed")

    def _forget_runs_of(self, turn: Turn, *, needed: bool) -> None:
        """Forget runs whose end will not be heard: their tasks were cancelled with the root."""
        if not needed:
            return
        for run_id, run in list(self._runs.items()):
            if run.turn is turn:
                self._leave(run)
                self._runs.pop(run_id, None)

    # --- calls of models ----------------------------------------------------------------------------------------------
    def llm_started(
        self, run_id: UUID, parent_id: UUID | None, messages: Any, metadata: Metadata, options: Mapping[str, Any]
    ) -> None:
        """Note a call of a model."""
        if run_id in self._runs:
            return
        turn, above, context, owns = self._place_of(parent_id, messages, metadata)
        model = extract.name_of_model(metadata, options)
        provider = extract.name_of_provider(metadata)
        known: dict[str, Any] = {}
        if model is not None:
            known[a.GEN_AI_REQUEST_MODEL] = model
        if provider is not None:
            known[a.GEN_AI_PROVIDER_NAME] = provider
        name = model or options.get("name") or "model"
        step = turn.open_step(name, "generation", parent=above, context=context, attributes=known)
        self._runs[run_id] = Run(
            turn,
            step,
            is_step=True,
            owns_turn=owns,
            model=model,
            provider=provider if isinstance(provider, str) else None,
        )

    def _place_of(
        self, parent_id: UUID | None, inputs: Any, metadata: Metadata
    ) -> tuple[Turn, OpenStep | None, Context | None, bool]:
        parent = self._parent(parent_id)
        if parent is not None:
            return parent.turn, parent.step, None, False
        turn, context, owns = self._turn_for(inputs, metadata or {})
        return turn, None, context, owns

    def token_came(self, run_id: UUID) -> None:
        """Note the first token of a call; later ones cost a look-up."""
        run = self._runs.get(run_id)
        if run is not None and run.step is not None and run.step.first_token_ns is None:
            run.step.first_token_ns = self._tracker.clock()

    def llm_ended(self, run_id: UUID, result: LLMResult) -> None:
        """Note what a call of a model used."""
        run = self._runs.pop(run_id, None)
        if run is None or run.step is None:
            return
        if self._tracker.content.records_steps:
            answer = self._tracker.content.clean(extract.answer_text(result))
            run.step.add(a.LANGFUSE_OBSERVATION_OUTPUT, answer)
        run.turn.close_step(run.step, call=extract.call_of(result, model=run.model, provider=run.provider))
        if run.owns_turn:
            run.turn.note_answer(extract.message_of(result))
            self._turn_ended(run.turn)

    # --- calls of tools and retrievers --------------------------------------------------------------------------------
    def tool_started(
        self, run_id: UUID, parent_id: UUID | None, name: str | None, arguments: Any, metadata: Metadata
    ) -> None:
        """Note a call of a tool."""
        if run_id in self._runs:
            return
        turn, above, context, owns = self._place_of(parent_id, None, metadata)
        step = turn.open_step(
            name or "tool", "tool", parent=above, context=context, attributes={a.GEN_AI_TOOL_NAME: name or "tool"}
        )
        if self._tracker.content.records_steps and arguments is not None:
            step.add(a.LANGFUSE_OBSERVATION_INPUT, self._tracker.content.clean(str(arguments)))
        run = Run(turn, step, is_step=True, owns_turn=owns)
        self._runs[run_id] = run
        self._enter(run)

    def retriever_started(self, run_id: UUID, parent_id: UUID | None, name: str | None, metadata: Metadata) -> None:
        """Note a call of a retriever."""
        if run_id in self._runs:
            return
        turn, above, context, owns = self._place_of(parent_id, None, metadata)
        step = turn.open_step(name or "retriever", "retriever", parent=above, context=context)
        run = Run(turn, step, is_step=True, owns_turn=owns)
        self._runs[run_id] = run
        self._enter(run)

    def call_ended(self, run_id: UUID, output: Any = None) -> None:
        """Note that a call of a tool or a retriever ended."""
        run = self._runs.get(run_id)
        if run is not None and run.step is not None and output is not None and self._tracker.content.records_steps:
            told = getattr(output, "content", output)
            text = told if isinstance(told, str) else to_json(told)
            run.step.add(a.LANGFUSE_OBSERVATION_OUTPUT, self._tracker.content.clean(text))
        self.chain_ended(run_id, None)

    # --- the context of user code -------------------------------------------------------------------------------------
    def _enter(self, run: Run) -> None:
        """Make the run's step current, so that what user code starts inside falls below it."""
        if run.step is None:
            return
        scope = current_scope()
        if scope is None or not scope.stands_for(run.step.span):
            run.entered = enter(run.turn, run.step.span)

    def _leave(self, run: Run) -> None:
        entered, run.entered = run.entered, None
        if entered is not None:
            leave(*entered)
