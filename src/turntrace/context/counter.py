"""Counting the tokens of messages: each message once, by what it says and how it is framed."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Final, TypeAlias

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_messages,
)

from turntrace.boundary import caught
from turntrace.content import ROLES
from turntrace.context.encodings import DEFAULT_ENCODING, count_text, encoding, encoding_name
from turntrace.context.images import IMAGE_TYPES, image_tokens, read_image
from turntrace.context.schemas import ToolCounter, as_json
from turntrace.errors import ConfigurationError, ContextError
from turntrace.forking import lock_of

Counter: TypeAlias = Callable[[Sequence[BaseMessage]], int]
"""A counter of the app's: from messages to their tokens."""

REPLY_TOKENS: Final = 3
"""What begins the reply, by OpenAI's rule."""

_MESSAGE_TOKENS: Final = 3
_NAME_TOKENS: Final = 1
_CALL_TOKENS: Final = 3
_DATA_TOKENS: Final = 85
_DATA_LENGTH: Final = 256
_TEXT_TYPES: Final = ("text", "input_text", "output_text", None)
_CALL_TYPES: Final = ("tool_use", "tool_call", "function_call", "tool_call_chunk", "input_json_delta")
_REMEMBERED: Final = 21_000  # a dict of 21,846 takes twice the room
_FIELDS: Final = attrgetter("__dict__")
_CONTENT: Final = attrgetter("content")
_CALLS: Final = attrgetter("tool_calls", "invalid_tool_calls", "additional_kwargs")
_HELD: Final = 8
_HELD_TOKENS: Final = 500_000
_WORTH_IT: Final = 100
_WITHOUT_CALLS: Final = frozenset((HumanMessage, SystemMessage, ToolMessage))
_CLASSES: Final = _WITHOUT_CALLS | {AIMessage}
_KINDS_OF_PLAIN: Final = frozenset((str, type(None)))


class _Seen:
    """A list of messages that was counted, held as it is: an agent's loop counts the same objects again and again.

    Args:
        messages: The messages.
        counts: The tokens of each.
        changeable: The indexes of what may have changed while its content is the same object: blocks, calls of tools.
            Those beyond what was held before are left out where their calls can be held, too.
        before: What was held of the same messages without the last ones.
    """

    __slots__ = ("_callers", "_calls", "_contents", "_messages", "changeable", "counts")

    def __init__(
        self,
        messages: Sequence[BaseMessage],
        counts: list[int],
        changeable: list[int],
        before: "_Seen | None" = None,
    ) -> None:
        known: tuple[Any, ...] = () if before is None else before._contents
        self._messages = tuple(messages)
        self._contents: tuple[Any, ...] = (*known, *map(_CONTENT, messages[len(known) :]))
        self.counts = list(counts)
        self.changeable: list[int] = []
        self._callers: list[BaseMessage] = [] if before is None else [*before._callers]
        self._calls: list[_Calls] = [] if before is None else [*before._calls]
        for index in changeable:
            calls = _plain_calls(messages[index]) if index >= len(known) else None
            if calls is None:
                self.changeable.append(index)
            else:
                self._callers.append(messages[index])
                self._calls.append(calls)

    def begins(self, messages: Sequence[BaseMessage]) -> bool:
        """Tell whether other messages begin with these, the objects, their contents and calls being the same."""
        return (
            len(self._messages) <= len(messages)
            and all(map(is_, self._messages, messages))
            and all(map(is_, self._contents, map(_CONTENT, self._messages)))
            and [*map(_CALLS, self._callers)] == self._calls
        )


class MessageCounter:
    """Counts the tokens of messages for one model, and remembers the counts.

    A message is what OpenAI's rule says (https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken): 3
    tokens, its role, its content, and 1 more for a name and the name. Beyond that rule:

    - A call of a tool is 3 tokens, its name, and its arguments as JSON, in the form in which LangChain sends them.
    - An image is counted by OpenAI's rule for its size and detail (see `turntrace.context.images`).
    - Any other block of content (audio, files, reasoning, citations) is an estimate: the tokens of its JSON without
      what looks like data (over 256 characters of ASCII without a space), and 85 for each of those.

    What was counted is remembered by the message's id and all that counts of it, up to 42,000 messages (about 3 MB),
    so a history costs its new messages only; the last 8 long histories are held as they are. Threads may count at once.

    Args:
        model: Name of the model.
        counter: A counter of the app's in place of tiktoken. It is asked for one message at a time, in a list, and its
            answers are remembered and added up; what it says of a message includes the message's frame.

    Attributes:
        tokenizer: What counts: an encoding's name, ``o200k_base~estimate`` for a model that tiktoken does not know, or
            ``custom``.

    Raises:
        ConfigurationError: If the counter cannot be called.
    """

    def __init__(self, model: str, counter: Counter | None = None) -> None:
        if counter is not None and not callable(counter):
            raise ConfigurationError(
                f"counter is a {type(counter).__name__}, which cannot be called. Pass a function from a list of "
                "messages to their tokens: counter=llm.get_num_tokens_from_messages, or none for tiktoken."
            )
        known = encoding_name(model)
        self._model = model
        self._counter = counter
        self._encoding = encoding(known or DEFAULT_ENCODING)
        self.tokenizer = "custom" if counter is not None else known or f"{DEFAULT_ENCODING}~estimate"
        self.of_tools = ToolCounter(self._encoding.name, self.of_text)
        self._of_role = lru_cache(maxsize=64)(self.of_text)
        # Two generations: when the newer one is full it becomes the older one, which is forgotten.
        self._new: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._seen: OrderedDict[int, _Seen] = OrderedDict()
        self._lock = lock_of(self)

    @property
    def is_estimate(self) -> bool:
        """Whether tiktoken does not know the model."""
        return self.tokenizer.endswith("~estimate")

    @property
    def remembered(self) -> int:
        """How many counts are remembered."""
        return len(self._new) + len(self._old)

    def of_text(self, text: str) -> int:
        """Return the tokens of a text."""
        return count_text(text, self._encoding)

    def counts(self, messages: Sequence[BaseMessage]) -> list[int]:
        """Return the tokens of each message, its frame included."""
        if len(messages) < _WORTH_IT:
            return self._counted(messages)[0]
        seen = self._seen.get(id(messages[0]))
        if seen is None or not seen.begins(messages):
            seen = None
            counts, changeable = self._counted(messages)
        else:
            known = len(seen.counts)
            new, changeable = self._counted(messages[known:])
            counts = seen.counts + new
            again, _ = self._counted([messages[index] for index in seen.changeable])
            for index, tokens in zip(seen.changeable, again, strict=True):
                counts[index] = tokens
            if not new:
                return counts
            changeable = seen.changeable + [known + index for index in changeable]
        if sum(counts) <= _HELD_TOKENS:
            self._hold(_Seen(messages, counts, changeable, seen), id(messages[0]))
        return counts

    def _counted(self, messages: Sequence[BaseMessage]) -> tuple[list[int], list[int]]:
        """Return the tokens of each message, and the indexes of those that say more than a text."""
        keys, saying_more = _keys_of(messages)
        counts: list[Any] = list(map(self._new.get, keys))
        if None in counts:
            for index in range(counts.index(None), len(counts)):
                if counts[index] is None:
                    counts[index] = self._look_closer(keys[index], messages[index])
        return counts, saying_more

    def _hold(self, seen: _Seen, key: int) -> None:
        with self._lock:
            self._seen[key] = seen
            self._seen.move_to_end(key)
            if len(self._seen) > _HELD:
                self._seen.popitem(last=False)

    def count(self, message: BaseMessage) -> int:
        """Return the tokens of one message, its frame included."""
        return self.counts((message,))[0]

    def _look_closer(self, key: int, message: BaseMessage) -> int:
        """Return the tokens of a message that is new, or was counted long ago."""
        tokens = self._new.get(key)  # it may stand twice among the messages
        if tokens is None:
            tokens = self._old.get(key)
        if tokens is None:
            tokens = self._of_message(message)
        if len(self._new) >= _REMEMBERED:
            self._old, self._new = self._new, {}
        self._new[key] = tokens
        return tokens

    # --- one message --------------------------------------------------------------------------------------------------
    def _of_message(self, message: BaseMessage) -> int:
        if self._counter is not None:
            tokens = self._by_the_app(self._counter, message)
            if tokens is not None:
                return tokens
        tokens = _MESSAGE_TOKENS + self._of_role(role_of(message))
        if message.name:
            tokens += _NAME_TOKENS + self.of_text(message.name)
        calls = _calls_of(message)
        for call in calls:
            tokens += _CALL_TOKENS + self.of_text(str(call["name"] or "")) + self.of_text(_arguments(call["args"]))
        content: Any = message.content
        if isinstance(content, str):
            return tokens + self.of_text(content)
        return tokens + sum(self._of_block(block, has_calls=bool(calls)) for block in content or ())

    def _by_the_app(self, counter: Counter, message: BaseMessage) -> int | None:
        """Ask the app's counter; None when it fails, and tiktoken counts instead."""
        try:
            tokens: Any = counter([message])
            if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0:
                return tokens
            raise ContextError(
                f"counter=... returned {tokens!r:.50}. Allowed is an int of 0 or more; tiktoken counts instead."
            )
        except Exception as error:
            caught("counting tokens by counter=...", error)
            return None

    def _of_block(self, block: Any, *, has_calls: bool) -> int:
        if isinstance(block, str):
            return self.of_text(block)
        if not isinstance(block, Mapping):
            return self._of_other(block)
        kind = block.get("type")
        if kind in _TEXT_TYPES and isinstance(block.get("text"), str):
            return self.of_text(block["text"])
        if kind in IMAGE_TYPES:
            return image_tokens(self._model, *read_image(block))
        if has_calls and kind in _CALL_TYPES:
            return 0  # the same calls stand in the message's tool_calls
        return self._of_other(block)

    def _of_other(self, value: Any) -> int:
        text, data = _without_data(value)
        return self.of_text(as_json(text)) + _DATA_TOKENS * data


def read_messages(messages: Sequence[Any]) -> list[BaseMessage]:
    """Return messages in any form that LangGraph takes as messages.

    Raises:
        ContextError: If one of them is none of these forms; it is named by its position.
    """
    if isinstance(messages, BaseMessage | str | Mapping) or not isinstance(messages, Sequence):
        raise ContextError(
            f"messages is a {type(messages).__name__}. Allowed is a list of messages: pass state['messages'], or "
            "[message] for one."
        )
    read = list(messages)
    if _CLASSES.issuperset(map(type, read)):  # nearly always
        return read
    for position, message in enumerate(read):
        if not isinstance(message, BaseMessage):
            read[position] = _read_message(message, position)
    return read


def _read_message(message: Any, position: int) -> BaseMessage:
    try:
        return convert_to_messages([message])[0]
    except (ValueError, TypeError, NotImplementedError, KeyError, AttributeError) as error:
        role = message.get("role", message.get("type")) if isinstance(message, Mapping) else None
        what = f"a {type(message).__name__}" if role is None else f"a mapping with the role {role!r:.40}"
        raise ContextError(
            f"Message {position} cannot be read: it is {what}. Allowed are LangChain's messages, (role, content) "
            'pairs, and mappings with role and content: {"role": "user", "content": "Hi"}, with a role of user, '
            "assistant, system, developer, tool or function."
        ) from error


def role_of(message: BaseMessage) -> str:
    """Return the role of a message, by the name that OpenAI gives it."""
    if isinstance(message, ChatMessage):
        return message.role
    return ROLES.get(message.type, message.type)


def _calls_of(message: BaseMessage) -> Sequence[Mapping[str, Any]]:
    if not isinstance(message, AIMessage):
        return ()
    if not (message.additional_kwargs or message.invalid_tool_calls):
        return message.tool_calls
    if message.invalid_tool_calls:
        return [*message.tool_calls, *message.invalid_tool_calls]
    if not message.tool_calls and "function_call" in message.additional_kwargs:  # from before tools
        call = message.additional_kwargs["function_call"]
        return [{"name": call.get("name"), "args": call.get("arguments")}] if isinstance(call, Mapping) else ()
    return message.tool_calls


def _arguments(args: Any) -> str:
    return args if isinstance(args, str) else as_json(args or {})


def _keys_of(messages: Sequence[BaseMessage]) -> tuple[list[int], list[int]]:
    """Return a hash for each message of all that counts of it, and the indexes of those that say more than a text."""
    keys: list[int] = []
    saying_more: list[int] = []
    for message, said in zip(messages, map(_FIELDS, messages), strict=True):
        content, more = said["content"], None
        if content.__class__ is not str:
            content = _print_of(content)
            saying_more.append(len(keys))
        if "tool_calls" in said:
            if said["tool_calls"] or said["invalid_tool_calls"] or said["additional_kwargs"]:
                more = _print_of_calls(_calls_of(message))
        elif "role" in said:
            more = said["role"]
        if more is not None and saying_more[-1:] != [len(keys)]:
            saying_more.append(len(keys))
        keys.append(hash((said["id"], said["type"], content, said["name"], more)))
    return keys, saying_more


_Calls = tuple[list[Any], list[Any], dict[str, Any]]


def _plain_calls(message: BaseMessage) -> _Calls | None:
    """Return a copy of the calls of a message, to which they are equal as long as they count the same.

    None where there can be none, or where more than texts are in them: 1, 1.0 and True are equal, and not in JSON.
    """
    if not isinstance(message, AIMessage) or not isinstance(message.content, str) or message.invalid_tool_calls:
        return None
    if not _KINDS_OF_PLAIN.issuperset(map(type, message.additional_kwargs.values())):
        return None
    calls: list[Any] = []
    for call in message.tool_calls:
        args = call["args"]
        if type(args) is not dict or type(call["name"]) is not str or {*map(type, chain(args, args.values()))} - {str}:
            return None
        calls.append({**call, "args": {**args}})
    return calls, [], {**message.additional_kwargs}


def _print_of_calls(calls: Sequence[Mapping[str, Any]]) -> int:
    """Return a hash of the names and arguments of calls; 1, 1.0 and True are told apart, as they are in JSON."""
    facts: list[Any] = []
    for call in calls:
        args = call["args"]
        if args.__class__ is dict:
            facts += (call["name"], len(args))
            facts += args
            facts += [value if value.__class__ is str else _print_of(value) for value in args.values()]
        else:
            facts += (call["name"], -1, _print_of(args))
    return hash(tuple(facts))


def _print_of(value: Any) -> int:
    """Return a hash of a value of lists and mappings."""
    kind = value.__class__
    if kind is str or kind is bytes:
        return hash(value)
    if kind is dict:
        return hash((kind, *value, *[_print_of(each) for each in value.values()]))
    if kind is list or kind is tuple:
        return hash((kind, *[_print_of(each) for each in value]))
    return hash((kind, repr(value)))


def _without_data(value: Any) -> tuple[Any, int]:
    """Return a value with what looks like data left out, and how often that was."""
    if isinstance(value, bytes | bytearray | memoryview) or (isinstance(value, str) and _is_data(value)):
        return "", 1
    if isinstance(value, Mapping):
        parts = {str(key): _without_data(each) for key, each in value.items()}
        return {key: part for key, (part, _) in parts.items()}, sum(data for _, data in parts.values())
    if isinstance(value, list | tuple):
        items = [_without_data(each) for each in value]
        return [item for item, _ in items], sum(data for _, data in items)
    return value, 0


def _is_data(text: str) -> bool:
    return len(text) > _DATA_LENGTH and text.isascii() and " " not in text
