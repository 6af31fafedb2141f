"""Messages that are too many: what a strategy is given, and what must hold of what it gives back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress, count
from operator import is_
from typing import Any, Final, TypeAlias

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
)

from turntrace.context.counter import role_of

SUMMARY_KEY: Final = "turntrace_summary"
"""Key of a message's ``additional_kwargs`` that marks it as the summary of what was dropped before it."""

_SYSTEM_ROLES: Final = ("system", "developer")
_USER_ROLES: Final = ("user", "human")
_KINDS: Final = (AIMessage, ToolMessage, HumanMessage)
_EXACT: Final = frozenset((*_KINDS, SystemMessage))

_Places: TypeAlias = Sequence[int | None]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a strategy gave back, set against what it was given.

    Attributes:
        messages: The messages that it gave back.
        places: Where each of them stood; None for one that was put in.
        homes: The same, and for one that was put in the place of the message that it replaces: that of its id, or,
            without an id, one like it between the places of its neighbours.
    """

    messages: Sequence[BaseMessage]
    places: _Places
    homes: _Places


class Overfull:
    """Messages that are to become fewer tokens.

    Attributes:
        messages: The messages, the oldest first.
        tokens: Tokens of each, in the same order.
        target: Tokens that the messages are to have at most.
        most: Tokens that they may have at most, when the target cannot be reached.
        count: Counts a message that is not among them, as a placeholder.
        pinned: Indexes of the messages that stay: system messages, the user's newest message, summaries.
        summaries: Indexes of the summaries of what was dropped before; they go only where all else is not enough.
        turn_starts: Indexes of the user's messages.
        is_crossing: Whether a call of tools and a result of it stand in two turns.
    """

    def __init__(
        self,
        messages: Sequence[BaseMessage],
        tokens: Sequence[int],
        *,
        target: int,
        most: int,
        count: Callable[[BaseMessage], int],
    ) -> None:
        self.messages = tuple(messages)  # no strategy changes what the others are given
        self.tokens = tuple(tokens)
        self.target = target
        self.most = most
        self.count = count
        self.pinned, self.summaries, self.turn_starts, self._linked, self.is_crossing = _read(messages)

    @property
    def total(self) -> int:
        """Tokens of all messages."""
        return sum(self.tokens)

    def together(self, index: int) -> Sequence[int]:
        """Return the indexes of the messages that stay or go with one: a call of tools and its results."""
        return self._linked.get(index) or (index,)

    def without(self, dropped: Iterable[int]) -> list[BaseMessage]:
        """Return the messages but those of some indexes."""
        stays = bytearray(b"\1") * len(self.messages)
        for index in dropped:
            stays[index] = 0
        return list(compress(self.messages, stays))

    def oldest_first(self, indexes: Iterable[int], *, until: int, gone: set[int], total: int) -> int:
        """Drop messages in this order, each with what belongs to it, until the rest is few enough.

        Args:
            indexes: The messages that may go. Pinned ones, and what belongs to a pinned one, stay.
            until: Tokens at which to stop.
            gone: The indexes that are dropped already; it grows.
            total: Tokens of the rest.

        Returns:
            Tokens of the rest now.
        """
        tokens, pinned, linked = self.tokens, self.pinned, self._linked
        for index in indexes:
            if total <= until:
                break
            if index in pinned or index in gone:
                continue
            for each in linked.get(index) or (index,):
                gone.add(each)
                total -= tokens[each]
        return total

    def with_summaries(self, gone: set[int]) -> set[int]:
        """Drop summaries, too, the oldest first, where the rest is still more than fits."""
        if self.summaries:
            total = self.total_without(gone)
            for index in self.summaries:
                if total <= self.most:
                    break
                gone.add(index)
                total -= self.tokens[index]
        return gone

    def total_without(self, gone: Iterable[int]) -> int:
        """Tokens of all messages but those of some indexes."""
        return self.total - sum(map(self.tokens.__getitem__, gone))

    def again(self, pruned: Pruned) -> "Overfull":
        """Return what is still to be pruned after a strategy has pruned."""
        return Overfull(pruned.messages, self.counts(pruned), target=self.target, most=self.most, count=self.count)

    # --- what a strategy gave back ------------------------------------------------------------------------------------
    def read(self, messages: Sequence[BaseMessage]) -> Pruned:
        """Set what a strategy gave back against these messages."""
        places = self._places_of_kept(messages)
        if places is None:
            places = self._places_of_any(messages)
        return Pruned(messages, places, self._homes(messages, places) if None in places else places)

    def counts(self, pruned: Pruned) -> list[int]:
        """Return the tokens of each message of what a strategy gave back."""
        tokens = self.tokens
        return [
            self.count(each) if at is None else tokens[at]
            for each, at in zip(pruned.messages, pruned.places, strict=True)
        ]

    def objection(self, pruned: Pruned) -> str | None:
        """Say what is wrong with what a strategy gave back, or None when nothing is.

        Messages may be dropped, replaced by one of the same id and role, and new ones put in. System messages and the
        user's newest message stay, a call of tools and its results stay or go together, and the order stays.
        """
        order = [home for home in pruned.homes if home is not None]
        kept = set(order)
        if len(kept) < len(order) or order != sorted(order):
            return "it changed the order of the messages, or has one twice"
        if pruned.homes is not pruned.places:
            for message, place, home in zip(pruned.messages, pruned.places, pruned.homes, strict=True):
                if place is None and home is not None and not _alike(message, self.messages[home]):
                    kept.discard(home)  # it took the id of a message that is gone
        for index in self.pinned - kept:
            if index not in self.summaries:
                return f"it dropped message {index}, a {role_of(self.messages[index])} message that must stay"
        for index, group in self._linked.items():
            if index not in kept and not kept.isdisjoint(group):
                return f"it separated the call of tools in message {group[0]} from its results"
        return None

    def _places_of_kept(self, messages: Sequence[BaseMessage]) -> list[int | None] | None:
        """Return where each message stood, as late as can be; None where some were put in, or the order is another."""
        end = len(self.messages)
        # Nearly always the newest stay, and of those before them what is pinned.
        tail = min(end, max(0, len(messages) - sum(index < end - len(messages) for index in self.pinned)))
        if not all(map(is_, reversed(messages[-tail:] if tail else ()), reversed(self.messages))):
            tail = 0
        places: list[int | None] = list(reversed(range(end - tail, end)))
        others = iter(messages[len(messages) - tail - 1 :: -1] if len(messages) > tail else ())
        wanted = next(others, None)
        for index in reversed(range(end - tail)):
            if wanted is None:
                break
            if self.messages[index] is wanted:
                places.append(index)
                wanted = next(others, None)
        return places[::-1] if wanted is None else None

    def _places_of_any(self, messages: Sequence[BaseMessage]) -> list[int | None]:
        """Return the same of any messages; one object may stand more than once."""
        standing: dict[int, list[int]] = {}
        for index, message in enumerate(self.messages):
            standing.setdefault(id(message), []).append(index)
        places: list[int | None] = []
        before = len(self.messages)
        for message in reversed(messages):
            indexes = standing.get(id(message))
            place = None if indexes is None else next((at for at in reversed(indexes) if at < before), indexes[-1])
            places.append(place)
            before = before if place is None else place
        return places[::-1]

    def _homes(self, messages: Sequence[BaseMessage], places: _Places) -> list[int | None]:
        by_id: dict[str | None, int] = {}
        by_id.update((each.id, index) for index, each in enumerate(self.messages) if each.id is not None)
        homes, kept, before = list(places), set(places), len(self.messages)
        for at in reversed(range(len(homes))):
            if homes[at] is None:
                homes[at] = self._home(messages[at], before, kept, by_id)
            before = before if (home := homes[at]) is None else home
        return homes

    def _home(
        self, message: BaseMessage, before: int, kept: set[int | None], by_id: Mapping[str | None, int]
    ) -> int | None:
        if message.id is not None and message.id not in by_id:
            return None
        for index in reversed(range(before)):
            if index in kept:
                break
            other = self.messages[index]
            if other.id == message.id and (message.id is not None or _alike(message, other)):
                return index
        return by_id.get(message.id)


def is_summary(message: BaseMessage) -> bool:
    """Tell whether a message is the summary of what was dropped: ours, or that of LangChain's middleware."""
    marks = message.additional_kwargs
    return SUMMARY_KEY in marks or marks.get("lc_source") == "summarization"


_Read: TypeAlias = tuple[set[int], list[int], list[int], Mapping[int, list[int]], bool]


def _read(messages: Sequence[BaseMessage]) -> _Read:
    """Return which messages must stay, which are summaries, where turns begin, and which belong together.

    Last, whether any of the latter stand in two turns. A result belongs to the last call of its id before it, else to
    the first after it: providers use an id again later in a conversation.
    """
    pinned: set[int] = set()
    summaries: list[int] = []
    starts: list[int] = []
    linked: dict[int, list[int]] = {}
    calls: dict[str | None, int] = {}
    waiting: dict[str | None, list[int]] = {}
    crossing = False
    kinds: list[Any] = list(map(type, messages))
    if not _EXACT.issuperset(kinds):
        kinds = [kind if kind in _EXACT else _kind_of(each) for each, kind in zip(messages, kinds, strict=True)]
    message: Any
    for index, message, kind in zip(count(), messages, kinds, strict=False):
        if kind is AIMessage:
            if message.tool_calls or message.invalid_tool_calls:
                for call in _calls_of(message):
                    calls[call["id"]] = index
                    if waiting:
                        for early in waiting.pop(call["id"], ()):
                            crossing = crossing or (bool(starts) and starts[-1] > early)
                            _link(linked, early, index)
        elif kind is ToolMessage:
            if (at := calls.get(message.tool_call_id)) is None:
                waiting.setdefault(message.tool_call_id, []).append(index)
                continue
            crossing = crossing or (bool(starts) and starts[-1] > at)
            _link(linked, index, at)
        elif kind is HumanMessage:
            (summaries if message.additional_kwargs and is_summary(message) else starts).append(index)
        elif (role := role_of(message)) in _SYSTEM_ROLES:
            pinned.add(index)
        elif role in _USER_ROLES:
            starts.append(index)
    if starts:
        pinned.add(starts[-1])
    pinned.update(summaries)
    return pinned, summaries, starts, linked, crossing


def _kind_of(message: BaseMessage) -> Any:
    return next((kind for kind in _KINDS if isinstance(message, kind)), None)


def _link(linked: dict[int, list[int]], result: int, call: int) -> None:
    group = linked[result] = linked.setdefault(call, [call])
    group.append(result)


def _alike(message: BaseMessage, other: BaseMessage) -> bool:
    """Tell whether a message can stand for another: of its role, and with its call of tools."""
    return role_of(message) == role_of(other) and _ties(message) == _ties(other)


def _ties(message: BaseMessage) -> Any:
    if isinstance(message, ToolMessage):
        return message.tool_call_id
    return [call["id"] for call in _calls_of(message)] if isinstance(message, AIMessage) else None


def _calls_of(message: AIMessage) -> Sequence[ToolCall | InvalidToolCall]:
    if message.invalid_tool_calls:
        return [*message.tool_calls, *message.invalid_tool_calls]
    return message.tool_calls
