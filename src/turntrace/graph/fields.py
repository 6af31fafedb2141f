"""The ids in the state: what a tracked node is shown of them, and how they get into what it returns."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from langgraph.types import Command
from pydantic import BaseModel

from turntrace.graph.state import FIELDS


def read_field(state: Any, name: str) -> Any:
    """Return a field of a state, whatever its schema is; None of one that it does not have."""
    return state.get(name) if isinstance(state, Mapping) else getattr(state, name, None)


def shown_with(state: Any, fields: Mapping[str, Any]) -> Any:
    """Return a state with these values in the fields that it has; what is no such state is returned as it is.

    A node may be given something else, by `Send`, which may have fields of its own with the same names: the state is
    told by its ``turn_id``.
    """
    if isinstance(state, dict):
        if "turn_id" not in state:
            return state
        changed = copy.copy(state)
        changed.update({name: value for name, value in fields.items() if name in state})
        return changed
    if isinstance(state, BaseModel):
        known = {name: value for name, value in fields.items() if name in type(state).model_fields}
        return state.model_copy(update=known) if known else state
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        instance = copy.copy(state)
        for name in fields.keys() & {each.name for each in dataclasses.fields(state)}:
            object.__setattr__(instance, name, fields[name])  # also of a frozen one
        return instance
    return state


def returned_with(update: Any, fields: dict[str, Any]) -> Any:
    """Return what a node returned, with these fields of the state."""
    if update is None:
        return fields
    if isinstance(update, Command):
        if update.graph is not None or not (update.update is None or isinstance(update.update, Mapping)):
            return update  # it is for the parent's state, or of a form that ids cannot be put into
        return dataclasses.replace(update, update={**(update.update or {}), **fields})
    if isinstance(update, Mapping):
        return {**update, **fields}  # over the ids of a state that the node gave back whole
    if isinstance(update, list) and all(isinstance(part, Command | Mapping) for part in update):
        return [*update, fields]
    # An instance of the state's schema, or of a part of it that has the fields.
    if isinstance(update, BaseModel) and fields.keys() <= type(update).model_fields.keys():
        return update.model_copy(update=fields)
    if dataclasses.is_dataclass(update) and fields.keys() <= {each.name for each in dataclasses.fields(update)}:
        return dataclasses.replace(update, **fields)  # type: ignore[type-var]
    return update


def fields_of(schema: type | None) -> frozenset[str]:
    """Return which fields of `ConversationState` a schema has."""
    kinds = () if schema is None else schema.__mro__
    return frozenset(FIELDS) & {name for kind in kinds for name in getattr(kind, "__annotations__", {})}


def hinted_schema(called: Callable[..., Any]) -> type | None:
    """Return the type hint of a node's first parameter, as LangGraph reads it for the node's input."""
    try:
        first = next(p for p in inspect.signature(called).parameters.values())
        hint = get_type_hints(called).get(first.name)
    except (StopIteration, NameError, TypeError, ValueError):  # none, or names that are known to type checkers only
        return None
    return hint if isinstance(hint, type) else None
