"""The run registry: which run of LangChain's belongs to which turn and which step.

Ids travel by run tree: every run is found by its id, and hangs on the step of its parent. Nothing depends on where or
in which context LangChain calls the handler.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from langchain_core.outputs import LLMResult

from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.boundary import never_breaks, off_watched_loop
from turntrace.content import to_json
from turntrace.current import current_scope, enter, leave, turn_that_left, was_in_turn
from turntrace.forking import lock_of
from turntrace.graph import extract, tree
from turntrace.graph.given import given_ids
from turntrace.graph.neighbours import neighbours
from turntrace.graph.reading import Reading
from turntrace.graph.tree import Metadata, Root, Run, Tags, joined, next_attempt, note_failure
from turntrace.lifecycle import SessionTracker, Turn
from turntrace.lifecycle.running import is_abandoning
from turntrace.lifecycle.steps import OpenStep, StepKind
from turntrace.lifecycle.turn import TURN_ID_KEY

# One for all handlers of a tracker: a run that two of them hear is one run.
_runs_of: "WeakKeyDictionary[SessionTracker, dict[UUID, Run]]" = WeakKeyDictionary()


class RunRegistry:
    """Turns what a handler hears into turns and steps.

    Args:
        tracker: The tracker whose turns they are.
        reads: How to read the input and output of runs.
    """

    def __init__(self, tracker: SessionTracker, reads: Reading) -> None:
        self._tracker = tracker
        self.reads = reads
        self._runs: dict[UUID, Run] = _runs_of.setdefault(tracker, {})
        self._late = tree.LateRuns()
        self._unheard: set[UUID] = set()  # runs that are none of the app's, and what is below them
        self._lock = lock_of(self)

    def __len__(self) -> int:
        return len(self._runs)

    def step_of(self, run_id: UUID | None) -> tuple[Turn, OpenStep | None] | None:
        """Return the turn and the step that a run belongs to, or None."""
        run = None if run_id is None else self._runs.get(run_id)
        return None if run is None else (run.root.turn, run.step)

    # --- what begins --------------------------------------------------------------------------------------------------
    def chain_started(
        self, run_id: UUID, parent_id: UUID | None, name: str | None, inputs: Any, tags: Tags, metadata: Metadata
    ) -> None:
        """Note a run of a graph, a node, or of what is between them, which makes no step of its own."""
        if run_id in self._runs:  # heard by another handler of this tracker
            return
        if self._is_unheard(run_id, parent_id) or (parent_id is None and extract.is_edit_of_state(name)):
            self._unheard.add(run_id)
            return
        parent = self._parent(parent_id)
        if parent is None:
            try:
                root = self._root_of(parent_id, inputs, metadata)
            except Exception:
                self._unheard.add(run_id)  # or each of its nodes would be a turn of its own
                raise
            if root is not None:
                if parent_id is not None:
                    root.prompt = extract.prompt_of(metadata)
                    root.names_prompts = root.prompt is not None
                    is_part = extract.is_task(metadata) or extract.step_of(tags) is not None
                    if is_part and not root.owns_turn:  # of a graph that has ended, which left it running
                        self._step_began(run_id, root, None, extract.name_of_node(name), "chain", {})
                        return
                root.turn.run_began()
                root.is_graph = True
                name = extract.name_of(name, "graph")
                self._step_began(run_id, root, None, name, "agent", {a.GEN_AI_AGENT_NAME: name})
            return
        prompt = extract.prompt_of(metadata)
        if prompt is not None:
            parent.prompt = prompt
            parent.root.names_prompts = True
        number, namespace = extract.step_of(tags), extract.namespace_of(metadata)
        is_task = number is None and namespace != parent.namespace and extract.is_task(metadata)
        if (number is None and not is_task) or extract.is_hidden(tags):
            known_as = None if name is None else extract.name_of(name, "graph")
            run = Run(parent.root, parent.step, parent=parent, name=known_as, started_ns=self._tracker.clock())
            self._note(run_id, run)
        else:
            if number is not None:
                self._make_graph(parent)
            known: dict[str, AttributeValue] = {} if number is None else {a.TURN_STEP: number}
            attempt = next_attempt(parent, namespace)
            if attempt is not None:
                known[a.TURN_ATTEMPT] = attempt
            run = self._step_began(run_id, parent.root, parent, extract.name_of_node(name), "chain", known)
            if run.step is not None:
                run.step.attempt = attempt
            messages = extract.messages_of_state(inputs, self.reads.messages_key, metadata)
            if messages is not None and run.step is not None:
                run.root.turn.recall(messages)
                run.root.turn.note_state(run.step, messages, extract.namespace_of(metadata))
        run.namespace = namespace
        if prompt is None:  # what is named beside a chain is also for the calls inside of it
            run.prompt = parent.prompt
        self._enter(run)

    def llm_started(
        self, run_id: UUID, parent_id: UUID | None, messages: Any, metadata: Metadata, options: Mapping[str, Any]
    ) -> None:
        """Note a call of a model."""
        model, provider = extract.name_of_model(metadata, options), extract.name_of_provider(metadata)
        known: dict[str, AttributeValue] = {}
        if model is not None:
            known[a.GEN_AI_REQUEST_MODEL] = model
        if provider is not None:
            known[a.GEN_AI_PROVIDER_NAME] = provider
        name = model or extract.name_of(options.get("name"), "model")
        run = self._call_began(run_id, parent_id, name, "generation", known, messages, metadata)
        if run is not None and run.step is not None:
            neighbours.look()
            run.model, run.provider = model, provider
            if run.root.names_prompts:
                self._link_prompt(run, run.step)
            if isinstance(messages, list):
                tools = extract.tools_of(options)
                run.root.turn.note_sent(run.step, messages, tools, extract.namespace_of(metadata))

    def _link_prompt(self, run: Run, step: OpenStep) -> None:
        """Link a call of a model to the nearest prompt that was named above it and is not linked yet."""
        with self._lock:  # of calls that begin at once, one is linked
            holder: Run | Root = run.root
            above = run.parent
            while above is not None:
                if above.prompt is not None:
                    holder = above
                    break
                above = above.parent
            prompt, holder.prompt = holder.prompt, None
        for name, value in (prompt or {}).items():
            step.add(name, value)

    def tool_started(
        self, run_id: UUID, parent_id: UUID | None, name: str | None, arguments: Any, metadata: Metadata
    ) -> None:
        """Note a call of a tool."""
        name = extract.name_of(name, "tool")
        run = self._call_began(run_id, parent_id, name, "tool", {a.GEN_AI_TOOL_NAME: name}, None, metadata)
        if run is not None and run.step is not None:
            if self._tracker.content.records_steps:
                self._record(run.step, a.LANGFUSE_OBSERVATION_INPUT, extract.arguments_of(arguments))
            self._enter(run)

    def retriever_started(self, run_id: UUID, parent_id: UUID | None, name: str | None, metadata: Metadata) -> None:
        """Note a call of a retriever."""
        run = self._call_began(run_id, parent_id, extract.name_of(name, "retriever"), "retriever", {}, None, metadata)
        if run is not None:
            self._enter(run)

    def _call_began(
        self,
        run_id: UUID,
        parent_id: UUID | None,
        name: str,
        kind: StepKind,
        known: Mapping[str, AttributeValue],
        inputs: Any,
        metadata: Metadata,
    ) -> Run | None:
        if run_id in self._runs or self._is_unheard(run_id, parent_id):
            return None
        parent = self._parent(parent_id)
        root = self._root_of(parent_id, inputs, metadata) if parent is None else parent.root
        return None if root is None else self._step_began(run_id, root, parent, name, kind, known)

    def _step_began(
        self,
        run_id: UUID,
        root: Root,
        parent: Run | None,
        name: str,
        kind: StepKind,
        known: Mapping[str, AttributeValue],
    ) -> Run:
        above, context = (root.above, root.context) if parent is None else (parent.step, None)
        step = root.turn.open_step(name, kind, parent=above, context=context, attributes=known)
        run = Run(root, step, is_step=True, is_root=parent is None, parent=parent)
        self._note(run_id, run)
        return run

    def _parent(self, run_id: UUID | None) -> Run | None:
        """Return the run above another one, also where it was closed before its end was told."""
        return None if run_id is None else self._runs.get(run_id) or self._late.get(run_id)

    def _is_unheard(self, run_id: UUID, parent_id: UUID | None) -> bool:
        if not self._unheard or parent_id not in self._unheard:
            return False
        self._unheard.add(run_id)
        return True

    def _note(self, run_id: UUID, run: Run) -> None:
        self._runs[run_id] = run
        if not run.is_root:
            run.root.below.add(run_id)

    def _make_graph(self, run: Run) -> None:
        """Make a run a step after all: a node began below it, so it is that of a subgraph."""
        if run.is_step or run.name is None:
            return
        with self._lock:
            if not run.is_step:  # the first nodes of a graph may begin at once
                run.step = run.root.turn.open_step(
                    run.name,
                    "agent",
                    parent=run.step,
                    attributes={a.GEN_AI_AGENT_NAME: run.name},
                    start_ns=run.started_ns,
                )
                run.is_step = True

    def _root_of(self, parent_id: UUID | None, inputs: Any, metadata: Metadata) -> Root | None:
        """Find the turn of a run whose parent is not known: the one that runs here, the one it names, or a new one."""
        turn_id = (metadata or {}).get(TURN_ID_KEY)
        named = self._tracker.live_turn(turn_id) if isinstance(turn_id, str) else None
        scope = current_scope()
        running: Any = None if scope is None else scope.turn
        if named is not None and named is not running:
            return Root(named, owns_turn=False)
        if scope is not None and isinstance(running, Turn) and running.tracker is self._tracker:
            return joined(running, scope)
        if parent_id is not None and extract.is_inside_graph(metadata) and was_in_turn():
            # What a run that has ended left running; else it is one that has the handler below a graph without it.
            left_by: Any = turn_that_left()
            if isinstance(left_by, Turn) and left_by.tracker is self._tracker:
                return Root(left_by, owns_turn=False)
            tree.say_once_that_it_is_late()
            return None
        return Root(off_watched_loop(lambda: self._turn_of_its_own(inputs, metadata or {})), owns_turn=True)

    def _turn_of_its_own(self, inputs: Any, metadata: Mapping[str, Any]) -> Turn:
        """Begin the turn of a run that stands alone, or go on with the one that waits for it."""
        given = given_ids()
        visit = self._tracker.visit((metadata, given, None))
        if visit is not None:
            return visit
        request = extract.request_of(metadata, given)
        checkpoint_id, answers = extract.checkpoint_of(metadata), extract.is_answer(inputs)
        if answers or inputs is None:
            turn = self._tracker.resume_for_run(request, checkpoint_id, answers=answers)
            if turn is not None:
                return turn
        if checkpoint_id is not None or inputs is None:
            has_input = inputs is not None and not answers
            forked_from = self._tracker.forked_from(request, checkpoint_id, has_input=has_input)
            request = replace(request, forked_from=forked_from)
        return self._tracker.begin_turn(request, self.reads.message_in(inputs))

    # --- what ends ----------------------------------------------------------------------------------------------------
    def chain_ended(self, run_id: UUID, outputs: Any) -> None:
        """Note that a chain ended."""
        run = self._forget(run_id)
        if run is None:
            return
        run.prompt = None  # also for what it left running
        if run.is_root and extract.has_interrupts(outputs):
            run.root.interrupted = True
        asked = run.root.asked
        if asked is not None and run is not asked and run.name is not None and run.name == asked.name:
            run.root.interrupted, run.root.asked = False, None  # a chain around the graph has answered by itself
        answer = self.reads.answer_in(outputs, waits=run.root.interrupted) if run.is_root else None
        if run.is_step and run.step is not None:
            # While it waits, what nodes beside the question wrote is shown but not yet in the state.
            if isinstance(answer, list) and len(answer) > 1 and not run.root.interrupted:
                run.root.turn.note_state(run.step, answer, "", at_ns=self._tracker.clock())
            if not run.is_root and (intent := self.reads.intent_in(outputs)) is not None:
                run.root.turn.set_intent(intent)
            run.root.turn.close_step(run.step)
        if run.is_root:
            self._root_ended(run.root, answer)

    def llm_ended(self, run_id: UUID, result: LLMResult) -> None:
        """Note what a call of a model used."""
        run = self._forget(run_id)
        late = None if run is not None else self._late.pop(run_id, None)
        if late is not None and late.step is not None and late.step.kind == "generation":
            call = extract.call_of(result, model=late.model, provider=late.provider)
            late.root.turn.call_ended_late(late.step, call)
        if run is None or run.step is None:
            return
        if self._tracker.content.records_steps:
            self._record(run.step, a.LANGFUSE_OBSERVATION_OUTPUT, extract.answer_of(result))
        call = extract.call_of(result, model=run.model, provider=run.provider)
        run.root.turn.close_step(run.step, call=call)
        if run.is_root:
            self._root_ended(run.root, extract.message_of(result))

    def call_ended(self, run_id: UUID, output: Any = None) -> None:
        """Note that a call of a tool or a retriever ended."""
        run = self._forget(run_id)
        if run is None or run.step is None:
            return
        self._record(run.step, a.LANGFUSE_OBSERVATION_OUTPUT, getattr(output, "content", output))
        if (agent := extract.handed_to(output)) is not None:
            run.step.add(a.TURN_HANDOFF_TO, agent)
        run.root.turn.close_step(run.step)
        if run.is_root:
            self._root_ended(run.root, None)

    def failed(self, run_id: UUID, error: BaseException) -> None:
        """Note that a run ended with an error, or was left."""
        run = self._forget(run_id)
        if run is None:
            return
        control_flow = extract.is_control_flow(error)
        if extract.is_interrupt(error) and (run.is_root or (run.parent is not None and not run.parent.namespace)):
            run.root.interrupted = True  # one further below may be caught on its way
            run.root.asked = run.parent
        if run.is_step and run.step is not None:
            run.step.waits = extract.is_interrupt(error)
            run.root.turn.close_step(run.step, error=None if control_flow else error)
            if not control_flow:
                note_failure(run)
            if is_abandoning(error):
                self._late.keep(run_id, run)
        if run.is_root:
            self._root_ended(run.root, None, error=None if control_flow else error)

    def interrupted(self, run_id: UUID | None, checkpoint_id: str) -> None:
        """Note that a graph stopped to wait for a person."""
        run = None if run_id is None else self._runs.get(run_id)
        if run is not None and not run.namespace:  # the graph itself, which may be a part of a chain
            run.root.interrupted, run.root.asked = True, run
            run.root.checkpoint_id = checkpoint_id

    def token_came(self, run_id: UUID) -> None:
        """Note the first token of a call; later ones cost a look-up."""
        run = self._runs.get(run_id)
        if run is not None and run.step is not None and run.step.first_token_ns is None:
            run.step.first_token_ns = self._tracker.clock()

    @never_breaks("recording what a step was given or gave back")
    def _record(self, step: OpenStep, name: str, value: Any) -> None:
        """Record content on a step, where the policy lets it out; each text in it goes through the redactor."""
        policy = self._tracker.content
        if value is not None and policy.records_steps:
            cleaned = policy.clean_all(value)
            step.add(name, cleaned if isinstance(cleaned, str) else to_json(cleaned))

    def _forget(self, run_id: UUID) -> Run | None:
        run = self._runs.pop(run_id, None)
        if run is not None:
            run.root.below.discard(run_id)
            self._leave(run)
        elif self._unheard:
            self._unheard.discard(run_id)
        return run

    def _root_ended(self, root: Root, answer: Any, *, error: BaseException | None = None) -> None:
        for run_id in list(root.below):  # of a stream that was left, or a task that was cancelled: nobody tells
            run = self._forget(run_id)
            if run is not None and run.is_step and run.step is not None:
                run.step.abandoned = True
                root.turn.close_step(run.step)
                self._late.keep(run_id, run)
        if root.interrupted and error is not None and is_abandoning(error):
            error = None  # whoever read the stream left it at the question: the graph waits all the same
        turn = root.turn
        if root.is_graph:
            turn.run_ended(interrupted=root.interrupted and error is None, checkpoint_id=root.checkpoint_id)
        turn.note_answer(answer)
        if root.owns_turn:
            turn.end("interrupted" if root.interrupted else "completed", error=error)

    # --- the context of user code -------------------------------------------------------------------------------------
    def _enter(self, run: Run) -> None:
        """Make the run's step current, so that what user code starts inside falls below it."""
        if run.step is None:
            return
        scope = current_scope()
        if scope is None or scope.step is not run.step:
            run.entered = enter(run.root.turn, run.step)

    def _leave(self, run: Run) -> None:
        entered, run.entered = run.entered, None
        if entered is not None:
            leave(*entered)
