"""What may leave the process: the policy, the redactor, and the safe facts of a message.

By default nothing that a person or a model wrote is recorded: lengths, types and counts say how a turn went without
saying what it was about (`ContentPolicy`).
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from langchain_core.messages import BaseMessage, ChatMessage

from turntrace.errors import ConfigurationError

logger = logging.getLogger("turntrace")

ContentLevel = Literal["metadata", "turn", "full"]
LEVELS: Final[tuple[ContentLevel, ...]] = ("metadata", "turn", "full")

WITHHELD: Final = "[withheld: the redactor failed]"
"""Stands where a redactor raised an exception: then the text stays here."""


@dataclass(frozen=True)
class ContentPolicy:
    """What of the content is recorded.

    Args:
        level: ``metadata`` (the default) records lengths, types and counts only. ``turn`` also records the user's
            message and the final answer of each turn, on the turn's root span, and comments of feedback. ``full`` also
            records what each step added: answers of models, arguments and results of tools, texts of errors. The
            history is never recorded again.
        redact: Sees every text before it is recorded, error messages, keys and numbers included, and returns what may
            be recorded. When it raises, the text is withheld.

    Raises:
        ConfigurationError: If the level is unknown or the redactor cannot be called.
    """

    level: ContentLevel = "metadata"
    redact: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ConfigurationError(
                f"content level {self.level!r:.40} is unknown. Allowed are {', '.join(LEVELS)}: "
                'ContentPolicy("turn") records what was said in a turn, ContentPolicy() records none of it.'
            )
        if self.redact is not None and not callable(self.redact):
            raise ConfigurationError(
                f"redact is a {type(self.redact).__name__}, which cannot be called. Pass a function from str to str."
            )

    @property
    def records_turn(self) -> bool:
        """Whether the user's message and the final answer of a turn are recorded."""
        return self.level != "metadata"

    @property
    def records_steps(self) -> bool:
        """Whether what each step added is recorded."""
        return self.level == "full"

    def clean(self, text: str) -> str:
        """Return what may be recorded of a text that the policy lets through."""
        if self.redact is None:
            return text.encode("utf-8", "replace").decode("utf-8")  # half an emoji is not to cost the rest
        try:
            return str(self.redact(text)).encode("utf-8", "replace").decode("utf-8")
        except (Exception, SystemExit) as error:  # an exit would end the thread that writes without a word
            _note_failure(error)
            return WITHHELD

    def clean_all(self, value: Any, depth: int = 20) -> Any:
        """Return a value of lists and mappings with every text in it cleaned, keys and numbers included.

        Below a depth it is replaced by the name of its type.
        """
        if depth == 0 and isinstance(value, Mapping | list | tuple):
            return _name_of_type(value)
        if isinstance(value, Mapping):
            return {self._cleaned(key): self.clean_all(each, depth - 1) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean_all(each, depth - 1) for each in value]
        return self._cleaned(value)

    def _cleaned(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.clean(value)
        if self.redact is not None and isinstance(value, int | float) and not isinstance(value, bool):
            cleaned = self.clean(text := repr(value))  # it may be that of a card or a telephone
            return value if cleaned == text else cleaned
        return value


def text_of(error: BaseException) -> str:
    """Return the text of an error, whatever its ``__str__`` does."""
    try:
        return str(error)
    except Exception as other:
        return f"[no text: {type(other).__name__}]"


_failures: Counter[str] = Counter()


def _note_failure(error: BaseException) -> None:
    """Log what a redactor raised, once a kind."""
    kind = type(error).__name__
    _failures[kind] += 1
    if _failures[kind] == 1:
        logger.warning(
            "turntrace: the redactor raised %s; the text is withheld. Mend the function given as "
            "ContentPolicy(redact=...).",
            kind,
        )


_ATTACHMENT_TYPES: Final = (
    *("image", "image_url", "input_image", "audio", "input_audio", "video", "file", "input_file", "document", "media"),
)
ROLES: Final = {
    "human": "user",
    "HumanMessageChunk": "user",
    "ai": "assistant",
    "AIMessageChunk": "assistant",
    "SystemMessageChunk": "system",
    "ToolMessageChunk": "tool",
    "FunctionMessageChunk": "function",
}


@dataclass(frozen=True, slots=True)
class Message:
    """A message, whatever form it came in: its role, its text, and how many attachments it has."""

    role: str
    text: str
    attachments: int = 0


def read_message(message: Any) -> Message | None:
    """Read one message in any form that LangGraph takes.

    Args:
        message: A `BaseMessage`, a ``(role, content)`` pair, a mapping with ``role`` and ``content``, or a string
            (which LangGraph takes as the user's).

    Returns:
        The message, or None when it is none of these.
    """
    if isinstance(message, BaseMessage):
        return _message(message.role if isinstance(message, ChatMessage) else message.type, message.content)
    if isinstance(message, str):
        return Message("user", message)
    if isinstance(message, Mapping):
        role = message.get("role", message.get("type"))
        return _message(role, message.get("content")) if isinstance(role, str) else None
    if isinstance(message, Sequence) and len(message) == 2 and isinstance(message[0], str):
        return _message(message[0], message[1])
    return None


def _message(role: str, content: Any) -> Message:
    role = ROLES.get(role, role)
    if isinstance(content, str):
        return Message(role, content)
    if not isinstance(content, list | tuple):
        return Message(role, "")
    texts: list[str] = []
    attachments = 0
    for block in content:
        if isinstance(block, str):
            texts.append(block)
        elif isinstance(block, Mapping):
            if block.get("type") in _ATTACHMENT_TYPES:
                attachments += 1
            elif isinstance(text := block.get("text"), str):
                texts.append(text)
    return Message(role, "".join(texts), attachments)


def last_message(messages: Any) -> Any:
    """Return the last of what a graph was given or gave back under its messages key, or None."""
    if isinstance(messages, str | BaseMessage | Mapping):
        return messages
    if isinstance(messages, Sequence) and messages:
        if len(messages) == 2 and isinstance(messages[0], str) and isinstance(messages, tuple):
            return messages
        return messages[-1]
    return None


# Latin, full-width, Arabic, Greek (its own sign, not the semicolon that looks like it), doubled, Armenian, Ethiopic.
_QUESTION_MARKS: Final = ("?", "\uff1f", "\u061f", "\u037e", "\u2047", "\u055e", "\u1367")
# Most write it as a semicolon, as Unicode's normal form does.
_GREEK_QUESTION: Final = re.compile(r"[\u0370-\u03ff\u1f00-\u1fff];\s*$")
_QUESTION_WORDS: Final = re.compile(
    r"(what|who|whom|whose|which|when|where|why|how|is|are|am|was|were|do|does|did|can|could|would|will|should|shall|"
    r"may|might|have|has|had)\b(?!'?t? (not )?to )",
    re.IGNORECASE,
)
_COMMAND_WORDS: Final = re.compile(
    r"(please\b|can you\b|could you\b|would you\b|i (want|need|would like|'d like) (you )?to\b|i'd like to\b|let's\b|"
    r"(add|apply|ask|book|build|buy|calculate|call|cancel|change|check|choose|close|compare|confirm|connect|convert|"
    r"copy|create|delete|describe|do|draft|explain|export|fetch|fill|find|fix|get|give|go|help|import|insert|keep|"
    r"list|look|make|modify|move|open|order|pay|proceed|process|print|put|read|refund|remove|rename|replace|reply|"
    r"request|reset|retry|return|run|search|select|send|set|show|sort|start|stop|submit|summari[sz]e|switch|take|"
    r"tell|translate|try|turn|undo|update|upgrade|upload|use|verify|write)\b)",
    re.IGNORECASE,
)
_FEEDBACK_WORDS: Final = re.compile(
    r"(thanks|thank you|thx|great|perfect|awesome|excellent|wonderful|nice|good (job|answer|work)|well done|"
    r"that('s| is) (wrong|right|correct|not|incorrect|great|perfect)|this is (wrong|not)|wrong|incorrect|"
    r"(you're|you are) (wrong|right)|no,? that|not what i)\b",
    re.IGNORECASE,
)
_REFUSAL: Final = re.compile(
    r"((i'm|i am|we're|we are) (very )?sorry,? but|sorry,? but|"
    r"(sorry,? )?(i|we) (can't|cannot|can not|am unable|'m unable|am not able|'m not able|are unable|won't|will not|"
    r"must decline)\b|"
    r"unfortunately,? (i|we) (can't|cannot|can not|am unable|are unable|won't|will not)\b|"
    r"i'm (unable|not able)\b)",
    re.IGNORECASE,
)
_LOOK_AT: Final = 300


def classify_input(text: str) -> str:
    """Say what kind of message a user's is, by a rule that looks at its beginning and end only.

    A message that ends in a question mark (of any script) is a ``question``, as is one that begins with a question
    word; one that begins by thanking, praising or objecting is ``feedback``; one that begins with a request or an
    imperative is a ``command``; anything else is a ``statement``. The words are English; other languages are told
    apart by their question marks. Give `SessionTracker` a ``classify=`` of your own for more.

    Args:
        text: The user's message.

    Returns:
        ``question``, ``command``, ``feedback`` or ``statement``.
    """
    head = text[:_LOOK_AT].lstrip().replace("\u2019", "'")
    if _asks(text):
        return "question"
    if _FEEDBACK_WORDS.match(head):
        return "feedback"
    if _COMMAND_WORDS.match(head):
        return "command"
    return "question" if _QUESTION_WORDS.match(head) else "statement"


def classify_output(message: Any) -> str:
    """Say what kind of answer a message is, by a rule that looks at its beginning and end only.

    Args:
        message: The last message of the turn, in any form that `read_message` takes.

    Returns:
        ``tool_result`` for a tool's message or a call of a tool that is still to be made, ``refusal`` when the model
        says so or begins by declining, ``question`` when it ends in a question mark, else ``answer``.
    """
    read = read_message(message)
    if read is None:
        return "answer"
    if read.role in ("tool", "function") or _field(message, "tool_calls"):
        return "tool_result"
    more = _field(message, "additional_kwargs")
    if (isinstance(more, Mapping) and more.get("refusal")) or _refuses(_field(message, "content")):
        return "refusal"
    head = read.text[:_LOOK_AT].lstrip().replace("\u2019", "'")
    if _REFUSAL.match(head):
        return "refusal"
    return "question" if _asks(read.text) else "answer"


def _asks(text: str) -> bool:
    if _GREEK_QUESTION.search(text[-_LOOK_AT:]):
        return True
    return text[-_LOOK_AT:].rstrip(" \t\r\n\"')*\u00bb\u201d").endswith(_QUESTION_MARKS)


def _field(message: Any, name: str) -> Any:
    return message.get(name) if isinstance(message, Mapping) else getattr(message, name, None)


def _refuses(content: Any) -> bool:
    blocks = content if isinstance(content, list) else ()
    return any(isinstance(block, Mapping) and block.get("type") == "refusal" for block in blocks)


def to_json(value: Any) -> str:
    """Write a value as compact JSON; what JSON cannot hold is written as the name of its type, never by its text."""
    try:
        return _compact.encode(value)
    except (TypeError, ValueError, RecursionError):  # keys that are no strings, rings, numbers without end
        return json.dumps(_plain(value, _DEPTH), ensure_ascii=False, separators=(",", ":"))


_DEPTH: Final = 20


def _name_of_type(value: Any) -> str:
    return type(value).__name__


_compact: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_name_of_type, allow_nan=False)


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth == 0:
        return _name_of_type(value)
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else _name_of_type(key): _plain(each, depth - 1) for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(each, depth - 1) for each in value]
    return _name_of_type(value)
