"""The callback handler: LangChain's events to calls of the run registry."""

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.tracers.context import register_configure_hook

from turntrace import boundary
from turntrace.boundary import never_breaks
from turntrace.current import current_scope
from turntrace.graph.reading import Reading, checked_describer, checked_key, checked_tracker
from turntrace.graph.runs import RunRegistry
from turntrace.lifecycle import SessionTracker, Turn, default_tracker

try:
    from langgraph.callbacks import GraphCallbackHandler
except ImportError:  # an older langgraph tells of an interrupt only by the error of the node
    GraphCallbackHandler = BaseCallbackHandler  # type: ignore[assignment, misc]


class SessionCallbackHandler(GraphCallbackHandler):
    """Makes each run of a graph a turn, in its session, with every step tagged.

    One handler serves all requests of a process, concurrently::

        graph = builder.compile(checkpointer=saver).with_config(callbacks=[SessionCallbackHandler()])

    It reads from the config's metadata: ``session_id``, ``user_id``, ``conversation_id`` (else ``thread_id``),
    ``channel``, ``topic``, ``tier``, ``org_id``, ``locale`` and ``client_version``; ``langfuse_session_id``,
    ``langfuse_user_id`` and ``langfuse_tags`` mean the same as with Langfuse's own handler. So does ``langfuse_prompt``
    in the metadata of a prompt template or a chain: the call of a model that follows is linked to that prompt.

    Args:
        tracker: The tracker that keeps the turns. Default: one for the process, with settings from the environment.
        messages_key: Key of the graph's state that holds its messages.
        intent_key: Key of the graph's state in which a node says what the user wants in this turn, as ``"refund"``:
            recorded as ``turn.intent`` when a node writes a text there, as with ``current_turn().set_intent(...)``.
            Default: none is read, since a state's texts may be what a user wrote.
        describe_input: For graphs without messages: gets the input of a run and returns what the user said in it, as a
            text or a message, or None. Of it only length and type are recorded, unless the content policy allows more.
        describe_output: The same for what a run gave back, and what the app answered.
    """

    # Inline, in the context of the run: a handler that LangChain moves to an executor loses events of cancelled tasks,
    # and costs a hop for every token.
    run_inline = True

    def __init__(
        self,
        tracker: SessionTracker | None = None,
        *,
        messages_key: str = "messages",
        intent_key: str | None = None,
        describe_input: Callable[[Any], Any] | None = None,
        describe_output: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.tracker = default_tracker() if tracker is None else checked_tracker(tracker)
        reads = Reading(
            checked_key(messages_key, "messages_key"),
            None if intent_key is None else checked_key(intent_key, "intent_key"),
            checked_describer(describe_input, "describe_input"),
            checked_describer(describe_output, "describe_output"),
        )
        self._runs = RunRegistry(self.tracker, reads)
        self.tracker.use(self)

    def __repr__(self) -> str:
        return f"<SessionCallbackHandler of {self.tracker!r}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> "SessionCallbackHandler":
        """Return the same handler: apps copy configs, and what it knows of runs is not theirs to copy."""
        return self

    @property
    def raise_error(self) -> bool:  # type: ignore[override]
        """Whether an error of ours reaches the app: only in turntrace's own tests."""
        return boundary.is_strict()

    @property
    def messages_key(self) -> str:
        """Key of the graph's state that holds its messages."""
        return self._runs.reads.messages_key

    @property
    def runs(self) -> RunRegistry:
        """Which run belongs to which turn and step."""
        return self._runs

    @property
    def open_runs(self) -> int:
        """How many runs have begun and not ended."""
        return len(self._runs)

    @never_breaks("reading the start of a run")
    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: Any,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Hear that a graph, a node or a chain begins."""
        self._runs.chain_started(run_id, parent_run_id, kwargs.get("name"), inputs, tags, metadata)

    @never_breaks("reading the end of a run")
    def on_chain_end(self, outputs: Any, *, run_id: UUID, **_: Any) -> None:
        """Hear that a graph, a node or a chain ended."""
        self._runs.chain_ended(run_id, outputs)

    @never_breaks("reading the error of a run")
    def on_chain_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Hear that a graph, a node or a chain failed or was left."""
        self._runs.failed(run_id, error)

    @never_breaks("reading the start of a call of a model")
    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Hear that a chat model is called."""
        self._runs.llm_started(run_id, parent_run_id, messages[0] if messages else None, metadata, kwargs)

    @never_breaks("reading the start of a call of a model")
    def on_llm_start(
        self,
        serialized: dict[str, Any],
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Hear that a text model is called."""
        self._runs.llm_started(run_id, parent_run_id, prompts[0] if prompts else None, metadata, kwargs)

    def on_llm_new_token(self, token: Any, *, run_id: UUID, **_: Any) -> None:
        """Hear that a token came."""
        self._runs.token_came(run_id)

    @never_breaks("reading the end of a call of a model")
    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **_: Any) -> None:
        """Hear that a model answered."""
        self._runs.llm_ended(run_id, response)

    @never_breaks("reading the error of a call of a model")
    def on_llm_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Hear that a call of a model failed."""
        self._runs.failed(run_id, error)

    @never_breaks("reading the start of a call of a tool")
    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        inputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Hear that a tool is called."""
        name = kwargs.get("name") or (serialized or {}).get("name")
        self._runs.tool_started(run_id, parent_run_id, name, input_str if inputs is None else inputs, metadata)

    @never_breaks("reading the end of a call of a tool")
    def on_tool_end(self, output: Any, *, run_id: UUID, **_: Any) -> None:
        """Hear that a tool returned."""
        self._runs.call_ended(run_id, output)

    @never_breaks("reading the error of a call of a tool")
    def on_tool_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Hear that a call of a tool failed."""
        self._runs.failed(run_id, error)

    @never_breaks("reading the start of a retrieval")
    def on_retriever_start(
        self,
        serialized: dict[str, Any] | None,
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Hear that a retriever is asked."""
        name = kwargs.get("name") or (serialized or {}).get("name")
        self._runs.retriever_started(run_id, parent_run_id, name, metadata)

    @never_breaks("reading the end of a retrieval")
    def on_retriever_end(self, documents: Sequence[Any], *, run_id: UUID, **_: Any) -> None:
        """Hear that a retriever answered."""
        self._runs.call_ended(run_id)

    @never_breaks("reading the error of a retrieval")
    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Hear that a retrieval failed."""
        self._runs.failed(run_id, error)

    @never_breaks("reading an interrupt")
    def on_interrupt(self, event: Any) -> None:
        """Hear that a graph stopped to wait for a person."""
        self._runs.interrupted(event.run_id, event.checkpoint_id)


class _HandlerOfTurn:
    """What LangChain asks for a handler whenever it configures a run: inside a turn there is one, with no config."""

    def get(self) -> SessionCallbackHandler | None:
        """Return the handler of the turn that runs here."""
        scope = current_scope()
        turn: Any = None if scope is None else scope.turn
        if not isinstance(turn, Turn):
            return None
        handlers = turn.tracker.callbacks()
        return handlers[0] if handlers else None


SessionTracker.callback_factory = SessionCallbackHandler
register_configure_hook(_HandlerOfTurn(), inheritable=True, handle_class=SessionCallbackHandler)  # type: ignore[arg-type]
