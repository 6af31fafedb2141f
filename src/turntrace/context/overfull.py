"""Messages that are too many: what a strategy is given, and what must hold of what it gives back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import lt
from typing import Any, Final

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

from turntrace.context.counter import role_of

SUMMARY_KEY: Final = "turntrace_summary"
"""Key of a message's ``additional_kwargs`` that marks it as the summary of what was dropped before it."""

_SYSTEM_ROLES: Final = ("system", "developer")
_USER_ROLES: Final = ("user", "human")


class Overfull:
    """Messages that are to become fewer tokens.

    Attributes:
        messages: The messages, the oldest first.
        tokens: Tokens of each, in the same order.
        target: Tokens that the messages are to have at most.
        most: Tokens that they may have at most, when the target cannot be reached.
        count: Counts a message that is not among them, as a placeholder.
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
        self.messages = messages
        self.tokens = tokens
        self.target = target
        self.most = most
        self.count = count
        self.pinned, self.turn_starts, self._linked = _read(messages)

    @property
    def total(self) -> int:
        """Tokens of all messages."""
        return sum(self.tokens)

    def together(self, index: int) -> Sequence[int]:
        """Return the indexes of the messages that stay or go with one: a call of tools and its results."""
        return self._linked.get(index) or (index,)

    def without(self, dropped: Iterable[int]) -> list[BaseMessage]:
        """Return the messages but those of some indexes."""
        gone = set(dropped)
        return [message for index, message in enumerate(self.messages) if index not in gone]

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

    def again(self, pruned: Sequence[BaseMessage], places: Sequence[int | None]) -> "Overfull":
        """Return what is still to be pruned after a strategy has pruned.

        Args:
            pruned: What it gave back.
            places: What `places` says of it.
        """
        return Overfull(pruned, self.counts(pruned, places), target=self.target, most=self.most, count=self.count)

    def counts(self, pruned: Sequence[BaseMessage], places: Sequence[int | None]) -> list[int]:
        """Return the tokens of each message of what a strategy gave back."""
        tokens = self.tokens
        return [self.count(each) if at is None else tokens[at] for each, at in zip(pruned, places, strict=True)]

    def places(self, pruned: Sequence[BaseMessage]) -> list[int | None]:
        """Return where each message stood; None for one that is not among these."""
        by_object = {id(message): index for index, message in enumerate(self.messages)}
        return list(map(by_object.get, map(id, pruned)))

    def objection(self, pruned: Any, places: Sequence[int | None]) -> str | None:
        """Say what is wrong with what a strategy gave back, or None when nothing is.

        Messages may be dropped, replaced by one of the same id and role, and new ones put in. System messages and the
        user's newest message stay, a call of tools and its results stay or go together, and the order stays.

        Args:
            pruned: What it gave back.
            places: What `places` says of it.
        """
        if None in places:
            by_id = {(m.id, m.type): index for index, m in enumerate(self.messages) if m.id is not None}
            places = [by_id.get((m.id, m.type)) if at is None else at for m, at in zip(pruned, places, strict=True)]
        order = [place for place in places if place is not None]
        if not all(map(lt, order, order[1:])):
            return "it changed the order of the messages, or has one twice"
        kept = set(order)
        for index in self.pinned - kept:
            if not is_summary(self.messages[index]):
                return f"it dropped message {index}, a {role_of(self.messages[index])} message that must stay"
        for index, group in self._linked.items():
            if index not in kept and not kept.isdisjoint(group):
                return f"it separated the call of tools in message {group[0]} from its results"
        return None


def is_summary(message: BaseMessage) -> bool:
    """Tell whether a message is the summary of what was dropped: ours, or that of LangChain's middleware."""
    marks = message.additional_kwargs
    return bool(marks) and (SUMMARY_KEY in marks or marks.get("lc_source") == "summarization")


def _read(messages: Sequence[BaseMessage]) -> tuple[set[int], list[int], Mapping[int, list[int]]]:
    """Return which messages must stay, where turns begin, and which belong together.

    A result belongs to the last call of its id before it, else to the first after it: providers use an id again later
    in a conversation.
    """
    pinned: set[int] = set()
    starts: list[int] = []
    linked: dict[int, list[int]] = {}
    calls: dict[str | None, int] = {}
    waiting: dict[str, list[int]] = {}
    for index, message in enumerate(messages):
        kind = message.type
        if kind == "ai" or kind == "AIMessageChunk":
            if isinstance(message, AIMessage) and (message.tool_calls or message.invalid_tool_calls):
                for call in (*message.tool_calls, *message.invalid_tool_calls):
                    calls[call["id"]] = index
                    for early in waiting.pop(call["id"] or "", ()):
                        _link(linked, early, index)
        elif kind == "tool" or kind == "ToolMessageChunk":
            if isinstance(message, ToolMessage):
                at = calls.get(message.tool_call_id)
                if at is None:
                    waiting.setdefault(message.tool_call_id, []).append(index)
                else:
                    _link(linked, index, at)
        elif kind == "human" or kind == "HumanMessageChunk":
            if is_summary(message):
                pinned.add(index)
            else:
                starts.append(index)
        elif kind == "system" or role_of(message) in _SYSTEM_ROLES:
            pinned.add(index)
        elif role_of(message) in _USER_ROLES:
            starts.append(index)
    if starts:
        pinned.add(starts[-1])
    return pinned, starts, linked


def _link(linked: dict[int, list[int]], result: int, call: int) -> None:
    group = linked.get(call)
    if group is None:
        group = linked[call] = [call]
    group.append(result)
    linked[result] = group
