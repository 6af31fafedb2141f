"""Strategies: what goes when the messages are too many for the model's window.

A strategy is any object with the one method of `Strategy`. For all of them: system messages and the user's newest
message stay, a call of tools and its results stay or go together, and the order stays. A strategy that does otherwise
is set aside for that call, with a line in the log, and `DropOldestTurns` does its work.
"""

import inspect
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final, Protocol, runtime_checkable

from langchain_core.messages import BaseMessage, ToolMessage

from turntrace.context.overfull import Overfull, Pruned
from turntrace.errors import ConfigurationError, ContextError

PLACEHOLDER: Final = "[cleared: an old result of a tool]"
"""What stands in place of a tool's result that `ClearToolResults` took out."""

_ALL: Final = -1  # tokens that are never reached


class Strategy(Protocol):
    """Chooses what the model is given when the messages are too many."""

    def prune(self, overfull: Overfull) -> Sequence[BaseMessage]:
        """Return the messages that the model is to be given.

        One that is put in place of others, as a summary, takes the id of the first of them: so `Window.update` puts it
        there in a graph's state, too.

        Args:
            overfull: The messages, the tokens of each, and how many tokens they are to have.
        """


@runtime_checkable
class AsyncStrategy(Protocol):
    """A strategy that waits for something, as for a model: `ContextTracker.afit` awaits it."""

    async def aprune(self, overfull: Overfull) -> Sequence[BaseMessage]:
        """Return the messages that the model is to be given."""


class DropOldestTurns:
    """Drops the oldest turns: a message of the user with all that follows until the next one.

    Where the newest turns alone are over the model's limit, the oldest of their messages go too, until they fit.

    Args:
        keep_last: How many of the newest turns are kept whole as long as they fit, at least 1.
    """

    def __init__(self, keep_last: int = 1) -> None:
        self._keep_last = check_count(keep_last, "keep_last", least=1)

    def __repr__(self) -> str:
        return f"DropOldestTurns(keep_last={self._keep_last})"

    def prune(self, overfull: Overfull) -> Sequence[BaseMessage]:
        """Return the newest turns that fit."""
        gone = oldest_turns(overfull, self._keep_last, until=overfull.target, most=overfull.most)
        return overfull.without(overfull.with_summaries(gone))


class KeepLast:
    """Keeps the last messages, and of them only as many as fit.

    Args:
        n: How many messages, beside the system messages and the user's newest one. A call of tools whose results are
            not all among them is not among them either.
    """

    def __init__(self, n: int) -> None:
        self._n = check_count(n, "n", least=0)

    def __repr__(self) -> str:
        return f"KeepLast({self._n})"

    def prune(self, overfull: Overfull) -> Sequence[BaseMessage]:
        """Return the last messages that fit."""
        end = len(overfull.messages)
        first = max(0, end - self._n)
        gone: set[int] = set()
        rest = overfull.oldest_first(range(first), until=_ALL, gone=gone, total=overfull.total)
        overfull.oldest_first(range(first, end), until=overfull.target, gone=gone, total=rest)
        return overfull.without(overfull.with_summaries(gone))


class ClearToolResults:
    """Puts a short placeholder in place of old results of tools; the calls and the order stay.

    A result that is not longer than the placeholder stays as it is.

    Args:
        keep: How many of the newest results stay, at least 0.
        placeholder: What stands in their place.
    """

    def __init__(self, keep: int = 3, *, placeholder: str = PLACEHOLDER) -> None:
        self._keep = check_count(keep, "keep", least=0)
        if not isinstance(placeholder, str) or not placeholder:
            raise ConfigurationError(
                f"placeholder is {placeholder!r:.40}. Allowed is a text that is not empty: models refuse empty results."
            )
        self._placeholder = placeholder

    def __repr__(self) -> str:
        return f"ClearToolResults(keep={self._keep})"

    def prune(self, overfull: Overfull) -> Sequence[BaseMessage]:
        """Return the messages with old results cleared."""
        pruned = list(overfull.messages)
        results = [index for index, message in enumerate(pruned) if isinstance(message, ToolMessage)]
        for index in results[: len(results) - self._keep]:
            cleared = pruned[index].model_copy(update={"content": self._placeholder})
            if overfull.count(cleared) < overfull.tokens[index]:
                pruned[index] = cleared
        return pruned


class Chain:
    """Asks strategies one after the other, each only if the messages are still too many.

    Args:
        strategies: The strategies, in their order.
    """

    def __init__(self, *strategies: Strategy) -> None:
        if not strategies:
            raise ConfigurationError(
                "Chain was given no strategy. Pass some: Chain(ClearToolResults(), DropOldestTurns())."
            )
        self._strategies = tuple(check_strategy(strategy) for strategy in strategies)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self._strategies))})"

    def prune(self, overfull: Overfull) -> Sequence[BaseMessage]:
        """Return what the strategies leave together."""
        for strategy in self._strategies:
            overfull = overfull.again(sound(overfull, strategy, strategy.prune(overfull)))
            if overfull.total <= overfull.target:
                break
        return overfull.messages

    async def aprune(self, overfull: Overfull) -> Sequence[BaseMessage]:
        """Return what the strategies leave together, waiting for those that wait."""
        for strategy in self._strategies:
            overfull = overfull.again(sound(overfull, strategy, await apruned(strategy, overfull)))
            if overfull.total <= overfull.target:
                break
        return overfull.messages


async def apruned(strategy: Strategy, overfull: Overfull) -> Sequence[BaseMessage]:
    """Return what a strategy leaves; one that can wait is awaited."""
    return await strategy.aprune(overfull) if isinstance(strategy, AsyncStrategy) else strategy.prune(overfull)


def oldest_turns(overfull: Overfull, keep_last: int, *, until: int, most: int) -> set[int]:
    """Return the indexes of the oldest turns that must go, whole turns as far as the limit allows.

    Args:
        overfull: The messages.
        keep_last: How many of the newest turns go only when they do not fit, and then message by message.
        until: Tokens that the rest is to have at most.
        most: Tokens that the newest turns may have at most.
    """
    starts, end = overfull.turn_starts, len(overfull.messages)
    gone: set[int] = set()
    total = overfull.total
    if not starts:
        overfull.oldest_first(range(end), until=until, gone=gone, total=total)
        return gone
    begin, old = 0, starts[: max(0, len(starts) - keep_last + 1)]
    if old and not overfull.is_crossing:  # whole turns go in one piece, but for what is pinned
        begin, freed = _whole_turns(overfull, old, total - until)
        gone.update(range(begin))
        gone -= overfull.pinned
        total -= freed
        if total <= until:
            return gone
        old = []
    for start in old:
        if total <= until:
            return gone
        total = overfull.oldest_first(range(begin, start), until=_ALL, gone=gone, total=total)
        begin = start
    overfull.oldest_first(range(begin, end), until=most, gone=gone, total=total)
    return gone


def _whole_turns(overfull: Overfull, starts: Sequence[int], needed: int) -> tuple[int, int]:
    """Return where the turns that must go end, at one of some starts, and how many tokens go with them."""
    tokens = list(overfull.tokens)
    for index in overfull.pinned:
        tokens[index] = 0
    freed = [0, *accumulate(tokens)]
    enough = bisect_left(freed, needed)
    begin = 0 if enough == 0 else starts[min(bisect_left(starts, enough), len(starts) - 1)]
    return begin, freed[begin]


def check_strategy(strategy: Any) -> Strategy:
    """Return a strategy, or say why it cannot be one."""
    prune, wrong = getattr(strategy, "prune", None), None
    if isinstance(strategy, type):
        wrong = f"strategy is the class {strategy.__name__}. Pass an object of it: strategy={strategy.__name__}(...)."
    elif not callable(prune):
        wrong = f"strategy is a {type(strategy).__name__}, which has no method prune. Pass DropOldestTurns(), say."
    elif inspect.iscoroutinefunction(prune):
        wrong = f"{type(strategy).__name__}.prune is async. Name it aprune, which afit awaits, and add a prune for fit."
    if wrong is not None:
        raise ConfigurationError(f"{wrong} Allowed is an object with a method prune(overfull).")
    found: Strategy = strategy
    return found


def check_count(value: Any, name: str, *, least: int) -> int:
    """Return a number of turns or messages, or say why it cannot be one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} is {value!r:.40}. Allowed is a whole number of at least {least}: {name}=3.")
    return value


def sound(overfull: Overfull, strategy: Strategy, pruned: Any) -> Pruned:
    """Return what a strategy gave back, or say why it cannot be given to a model.

    Raises:
        ContextError: If it breaks what must hold of every strategy (see `Overfull.objection`).
    """
    if not isinstance(pruned, Sequence) or isinstance(pruned, str):
        objection: str | None = f"it returned a {type(pruned).__name__} where a list of messages is needed"
    elif strange := [kind.__name__ for kind in set(map(type, pruned)) if not issubclass(kind, BaseMessage)]:
        objection = f"it returned a list that has a {strange[0]} among its messages"
    else:
        read = overfull.read(pruned)
        objection = overfull.objection(read)
        if objection is None:
            return read
    raise ContextError(f"{strategy!r} is set aside for this call: {objection}. Mend its method prune.")
