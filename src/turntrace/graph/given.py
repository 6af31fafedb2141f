"""Ids that a run is given in its ``context`` or ``configurable``, which LangGraph does not show to callbacks.

Callbacks see a run's metadata, and of its ``configurable`` the thread only. What `track_graph` compiles looks into both
where a run begins, and holds what it finds there for the handler to read.
"""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from typing import Any, Final

from langchain_core.runnables import RunnableConfig
from langgraph.graph.state import CompiledStateGraph

from turntrace.boundary import caught
from turntrace.graph.extract import is_said
from turntrace.lifecycle.carrying import CARRIED

_NAMES: Final = (
    *("session_id", "user_id", "conversation_id"),
    *("channel", "topic", "tier", "org_id", "locale", "client_version"),
    *CARRIED,
)
_SERVERS_USER: Final = "langgraph_auth_user_id"
"""Where LangGraph's server puts whom it has authenticated."""

_NOTHING: Final[Mapping[str, Any]] = {}
_given: ContextVar[Mapping[str, Any]] = ContextVar("turntrace_given", default=_NOTHING)


def given_ids() -> Mapping[str, Any]:
    """Return the ids that the run which begins here was given beside its metadata, by the names of the metadata."""
    return _given.get()


def reads_what_it_is_given(graph: Any) -> Any:
    """Have a compiled graph hold the ids that its runs are given; returns the same graph.

    Args:
        graph: What ``StateGraph.compile`` returned.
    """
    if isinstance(graph, CompiledStateGraph):
        graph.__class__ = _reading(type(graph))
    return graph


@cache
def _reading(kind: type[Any]) -> type[Any]:
    """Return a class of compiled graphs that does the same, and holds the ids while a run begins.

    A graph is run by ``stream`` and ``astream``, which ``invoke`` and all others call. Its root begins with the first
    step of the generator, so the ids are held only as long as that takes, in the context that asks for it.
    """
    if getattr(kind, "_turntrace_reads", False):
        return kind

    class Reading(kind):  # type: ignore[misc]
        _turntrace_reads = True

        def stream(
            self, input: Any, config: RunnableConfig | None = None, *, context: Any = None, **options: Any
        ) -> Iterator[Any]:
            parts = super().stream(input, config, context=context, **options)
            found = _found(self.config, config, context)
            return parts if not found else _stream(parts, found)

        def astream(
            self, input: Any, config: RunnableConfig | None = None, *, context: Any = None, **options: Any
        ) -> AsyncIterator[Any]:
            parts = super().astream(input, config, context=context, **options)
            found = _found(self.config, config, context)
            return parts if not found else _astream(parts, found)

    Reading.__name__, Reading.__qualname__, Reading.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    Reading.__doc__ = kind.__doc__
    return Reading


def _stream(parts: Any, found: Mapping[str, Any]) -> Iterator[Any]:
    before = _given.get()
    _given.set(found)
    try:
        first = next(parts, _NOTHING)
    finally:
        _given.set(before)
    if first is not _NOTHING:
        try:
            yield first
            yield from parts
        finally:
            parts.close()


async def _astream(parts: Any, found: Mapping[str, Any]) -> AsyncIterator[Any]:
    before = _given.get()
    _given.set(found)
    try:
        first = await anext(parts, _NOTHING)
    finally:
        _given.set(before)
    if first is not _NOTHING:
        try:
            yield first
            async for part in parts:
                yield part
        finally:
            await parts.aclose()


def _found(bound: Any, config: Any, context: Any) -> Mapping[str, Any]:
    try:
        found: dict[str, Any] = {}
        for each in (bound, config):
            configurable = each.get("configurable") if isinstance(each, Mapping) else None
            if isinstance(configurable, Mapping):
                user = configurable.get(_SERVERS_USER)
                users = {"user_id": user} if is_said(user) else {}
                found |= users | _named(configurable)
        return found if context is None else found | _named(context)
    except Exception as error:  # a context of the app's may do anything when it is read
        caught("reading the ids in the context of a run", error)
        return _NOTHING


def _named(source: Any) -> dict[str, Any]:
    is_mapping = isinstance(source, Mapping)
    values = ((name, source.get(name) if is_mapping else getattr(source, name, None)) for name in _NAMES)
    return {name: value for name, value in values if is_said(value)}
