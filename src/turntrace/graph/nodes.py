"""Tracked nodes: a node whose step is current while it runs, and that writes the ids into the state."""

import dataclasses
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any, TypeVar

from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.config import run_in_executor
from langgraph.channels import LastValue
from langgraph.config import get_config
from langgraph.graph import StateGraph

from turntrace import attributes as a
from turntrace.boundary import caught, never_breaks
from turntrace.current import current_scope
from turntrace.errors import ConfigurationError
from turntrace.graph.callback import SessionCallbackHandler
from turntrace.graph.fields import fields_of, hinted_schema, read_field, returned_with, shown_with
from turntrace.graph.given import reads_what_it_is_given
from turntrace.graph.state import CONTEXT_FIELD, FIELDS, STATE_IDS, ids_of_turn
from turntrace.identity import check_text
from turntrace.lifecycle import Turn
from turntrace.lifecycle.here import current_step
from turntrace.lifecycle.steps import OpenStep

B = TypeVar("B", bound=StateGraph[Any, Any, Any, Any])

_TRACKED = "__turntrace_tracked__"
_IDS = frozenset(STATE_IDS)
_REMOTE = "langgraph.pregel.remote"


def track_graph(builder: B) -> B:
    """Track every node of a graph: the last call before ``compile``.

    Each node gets `track_node`; nodes added later do not. What the graph returns is the same as without it, but for the
    ids in its state. What it compiles also reads ``user_id``, ``session_id`` and the like from a run's ``context`` and
    ``configurable``, where callbacks cannot see them; what the config's metadata says comes first::

        graph = track_graph(builder).compile(checkpointer=saver).with_config(callbacks=[SessionCallbackHandler()])

    Args:
        builder: The `StateGraph` with its nodes, before ``compile``.

    Returns:
        The same builder.

    Raises:
        ConfigurationError: If it is not a `StateGraph`, or has no nodes yet.
    """
    given: object = builder  # whatever its type says: many callers are not type-checked
    if not isinstance(given, StateGraph):
        hint = "call track_graph(builder) before builder.compile()" if hasattr(given, "nodes") else "pass the builder"
        raise ConfigurationError(
            f"track_graph takes a StateGraph and got a {type(given).__name__}: {hint}, as in "
            "track_graph(builder).compile(checkpointer=saver)."
        )
    if not builder.nodes:
        raise ConfigurationError(
            "track_graph was given a graph without nodes: add them first, and call track_graph(builder).compile() last."
        )
    fields = frozenset(name for name in FIELDS if name in builder.channels)
    for name in fields:
        channel = builder.channels[name]
        if type(channel) is LastValue:  # declared without a reducer, as in a model or a dataclass
            builder.channels[name] = _Latest(channel.typ, name)
    for name, spec in builder.nodes.items():
        if not getattr(spec.runnable, _TRACKED, False):
            tracked = _TrackedRunnable(spec.runnable, _Wanted(fields))  # type: ignore[arg-type]
            builder.nodes[name] = dataclasses.replace(spec, runnable=tracked)
    kind: Any = type(builder)
    builder.__class__ = _tracking(kind)
    return builder


@cache
def _tracking(kind: type[Any]) -> type[Any]:
    """Return a class of builders that does the same, and tracks what it compiles, also in a copy of a builder."""
    if hasattr(kind, _TRACKED):
        return kind

    class Tracking(kind):  # type: ignore[misc]
        @wraps(kind.compile)
        def compile(self, *args: Any, **options: Any) -> Any:
            graph = super().compile(*args, **options)
            _keep_ids_from_caches(graph)
            return reads_what_it_is_given(graph)

    setattr(Tracking, _TRACKED, True)
    Tracking.__name__, Tracking.__qualname__, Tracking.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    Tracking.__doc__ = kind.__doc__
    return Tracking


@never_breaks("keeping the ids out of the caches of nodes")
def _keep_ids_from_caches(graph: Any) -> None:
    """Have nodes with a cache write no ids: what they write is kept, and given to other turns of other users."""
    for spec in graph.nodes.values():
        if spec.cache_policy is not None:
            for wanted in _wanted_in(spec.bound):
                wanted.fields = frozenset()


def _wanted_in(node: Any) -> Iterator["_Wanted"]:
    wanted = getattr(node, _TRACKED, None)
    if isinstance(wanted, _Wanted):
        yield wanted
    for name in ("inner", "func", "afunc"):  # a tracked function is in a runnable of LangGraph's, which is tracked too
        inside = node.__dict__.get(name) if hasattr(node, "__dict__") else None
        if inside is not None:
            yield from _wanted_in(inside)


def track_node(
    node: Any = None, *, state_schema: type | None = None, journey: str | None = None, stage: str | None = None
) -> Any:
    """Track one node: its step is current while it runs, and it writes the ids into the state.

    Takes what ``add_node`` takes: functions, coroutine functions, generator functions, callables with an async
    ``__call__``, runnables and compiled graphs. LangGraph finds ``config``, ``runtime``, ``store`` and ``writer`` in
    its signature as before. Also as a decorator::

        @track_node
        def agent(state: State, config: RunnableConfig): ...

    Args:
        node: The node.
        state_schema: The state's schema, where the type hint of the node's first parameter does not say it. The ids
            are written only when the schema has their fields, as every subclass of `ConversationState` does.
        journey: A journey of which the node is a stage: when the node has run without an error, the user has entered
            the stage. Its stages are those of ``SessionTracker(journeys=...)`` or those that it began with.
        stage: The stage.

    Raises:
        ConfigurationError: If it cannot be a node, or only one of journey and stage is given.
    """
    if (journey is None) != (stage is None):
        raise ConfigurationError(
            "track_node was given a journey without a stage, or a stage without a journey. Give both: "
            'track_node(node, journey="onboarding", stage="connect").'
        )
    step = None if journey is None or stage is None else (check_text(journey, "journey"), check_text(stage, "stage"))
    if node is None:
        return lambda given: track_node(given, state_schema=state_schema, journey=journey, stage=stage)
    if getattr(node, _TRACKED, False):
        if step is not None:
            raise ConfigurationError("The node is tracked already. Give journey and stage where it is tracked first.")
        return node
    if isinstance(node, Runnable):
        return _TrackedRunnable(node, _Wanted(fields_of(state_schema), step))
    if not callable(node):
        raise ConfigurationError(
            f"track_node takes a function, a coroutine function, a callable object or a Runnable, and got a "
            f"{type(node).__name__}: track_node(agent)."
        )
    return _tracked_function(node, _Wanted(fields_of(state_schema or hinted_schema(_called(node))), step))


@dataclasses.dataclass(slots=True)
class _Wanted:
    """What a tracked node is to do.

    Attributes:
        fields: The fields of the state that it writes.
        journey: The journey and its stage that the user enters by it.
    """

    fields: frozenset[str]
    journey: tuple[str, str] | None = None


def _tracked_function(node: Callable[..., Any], wanted: _Wanted) -> Callable[..., Any]:
    called = _called(node)
    shell: Callable[..., Any]
    if inspect.isasyncgenfunction(called):

        @wraps(called)
        async def shell(state: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            with _tracked(state, wanted) as track:
                async for update in called(track.shown, *args, **kwargs):
                    yield track.finished(update)

    elif inspect.isgeneratorfunction(called):

        @wraps(called)
        def shell(state: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
            with _tracked(state, wanted) as track:
                for update in called(track.shown, *args, **kwargs):
                    yield track.finished(update)

    elif inspect.iscoroutinefunction(called):

        @wraps(called)
        async def shell(state: Any, *args: Any, **kwargs: Any) -> Any:
            with _tracked(state, wanted) as track:
                return track.finished(await called(track.shown, *args, **kwargs))

    else:

        @wraps(called)
        def shell(state: Any, *args: Any, **kwargs: Any) -> Any:
            with _tracked(state, wanted) as track:
                return track.finished(called(track.shown, *args, **kwargs))

    shell.__name__ = getattr(node, "__name__", type(node).__name__)  # by which LangGraph names a node
    setattr(shell, _TRACKED, wanted)
    return shell


def _called(node: Callable[..., Any]) -> Callable[..., Any]:
    """Return what is called and has the signature: the function itself, or an object's ``__call__``."""
    if inspect.isroutine(node) or not inspect.isfunction(getattr(type(node), "__call__", None)):  # noqa: B004
        return node
    bound: Callable[..., Any] = node.__call__  # type: ignore[operator]
    return bound


class _TrackedRunnable(RunnableLambda[Any, Any]):
    """A runnable as a tracked node.

    It is a `RunnableLambda` by class only, because LangGraph looks through its ``deps`` for subgraphs and at its
    ``afunc`` for whether it can be cancelled; it makes no run of its own.
    """

    def __init__(self, inner: Runnable[Any, Any], wanted: _Wanted) -> None:
        self.inner = inner
        self.wanted = wanted
        self.name = inner.get_name()
        self.func = inner.invoke
        if _has_native_async(inner):
            self.afunc = inner.ainvoke
        named = getattr(inner, "func", None) or inner  # by its place in the code LangGraph tells cached nodes apart
        if hasattr(named, "__qualname__"):
            self.__qualname__ = named.__qualname__
            self.__module__ = named.__module__
        setattr(self, _TRACKED, wanted)

    def __repr__(self) -> str:
        return f"track_node({self.inner!r})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("inner", "afunc", "func", "wanted"):
            raise AttributeError(name)
        return getattr(self.inner, name)  # as LangGraph asks a ToolNode for its tools

    @property
    def deps(self) -> list[Runnable[Any, Any]]:
        return [self.inner]

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        with _tracked(input, self.wanted) as track:
            return track.finished(self.inner.invoke(track.shown, track.carried(config, self.inner), **kwargs))

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        with _tracked(input, self.wanted) as track:
            return track.finished(await self.inner.ainvoke(track.shown, track.carried(config, self.inner), **kwargs))

    stream = Runnable.stream
    astream = Runnable.astream
    transform = Runnable.transform
    atransform = Runnable.atransform
    batch = Runnable.batch
    abatch = Runnable.abatch


def _has_native_async(runnable: Any) -> bool:
    """Tell whether a runnable can be cancelled: whether none of it runs in a thread of LangChain's executor."""
    steps = getattr(runnable, "steps", None)
    if isinstance(steps, list):
        return all(_has_native_async(step) for step in steps)
    if not hasattr(runnable, "func"):
        return True
    afunc = getattr(runnable, "afunc", None)
    return afunc is not None and not (isinstance(afunc, partial) and afunc.func is run_in_executor)


class _Latest(LastValue[Any]):
    """A channel that keeps the last of the values of one step: nodes side by side write the same ids."""

    def update(self, values: Sequence[Any]) -> bool:
        return super().update(values[-1:])


class _Track:
    """One run of a tracked node.

    Attributes:
        turn: The turn that it is in, where there is one.
        step: Its step.
        shown: The state as the node is to see it: with the ids of this turn, also where nothing has written them yet.
    """

    __slots__ = ("_fields", "_is_new", "shown", "step", "turn")

    def __init__(self, turn: Turn | None, step: OpenStep | None, state: Any, fields: frozenset[str]) -> None:
        self.turn = turn
        self.step = step
        self.shown = state
        self._fields = fields
        self._is_new = False
        if turn is not None and fields >= _IDS:
            try:
                self._is_new = read_field(state, "turn_id") != turn.id
                if self._is_new:
                    self.shown = shown_with(state, ids_of_turn(turn))
            except Exception as error:  # a schema of the app's may do anything when it is read or copied
                caught("showing a node the ids of its turn", error)

    def carried(self, config: RunnableConfig | None, inner: Any) -> RunnableConfig | None:
        """Return the config for a node, in which the turn travels to another server where the node is one."""
        if self.turn is None or not self.turn.travels or type(inner).__module__ != _REMOTE:
            return config
        config = config or {}
        return {**config, "metadata": {**config.get("metadata", {}), **self.turn.headers()}}

    def finished(self, update: Any) -> Any:
        """Return what the node returned, with the ids where the state does not have them yet, and the tokens fitted."""
        if self.turn is None:
            return update
        try:
            return self._with_fields(update, self.turn)
        except Exception as error:
            caught("writing the ids into the state", error)
        return update

    def _with_fields(self, update: Any, turn: Turn) -> Any:
        fit = None if self.step is None else self.step.fit
        tokens = None if fit is None else fit.decision.tokens_after
        told = update.get(CONTEXT_FIELD) if isinstance(update, Mapping) else None
        if isinstance(told, int):
            tokens = told
        if tokens is not None and self.step is not None:
            self.step.add(a.CONTEXT_TOKENS, tokens)
        fields: dict[str, Any] = {}
        if tokens is not None and told is None and CONTEXT_FIELD in self._fields:
            fields[CONTEXT_FIELD] = tokens
        if self._is_new:
            fields |= ids_of_turn(turn)
        return returned_with(update, fields) if fields else update


@contextmanager
def _tracked(state: Any, wanted: _Wanted) -> Iterator[_Track]:
    """What happens around the run of a node, sync or async: its step is current in the node's own frame."""
    turn, step = _place()
    track = _Track(turn, step, state, wanted.fields)
    if turn is None or step is None:
        yield track
    else:
        with current_step(turn, step):
            yield track
    if turn is not None and wanted.journey is not None:
        _enter_stage(turn, *wanted.journey)


@never_breaks("entering the stage of a journey that a node was declared with")
def _enter_stage(turn: Turn, journey: str, stage: str) -> None:
    turn.journey(journey).enter(stage)


def _place() -> tuple[Turn | None, OpenStep | None]:
    """Find the turn and the step of the node that runs here, by its run's id."""
    try:
        callbacks = get_config().get("callbacks")
        parent_id = getattr(callbacks, "parent_run_id", None)
        for handler in getattr(callbacks, "handlers", None) or ():
            if isinstance(handler, SessionCallbackHandler):
                place = handler.runs.step_of(parent_id)
                if place is not None:
                    return place
    except RuntimeError:  # called outside of a graph, as in a unit test of the node
        return None, None
    except Exception as error:
        caught("finding the turn of a node", error)
    scope = current_scope()
    turn = None if scope is None else scope.turn
    return (turn, None) if isinstance(turn, Turn) else (None, None)
