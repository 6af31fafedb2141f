"""Checking a recorded conversation, and splitting it into exchanges."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata

from turntrace.demo.recording import Content, Exchange, RecordedCall, RecordedReply, Transcript
from turntrace.errors import IdentityError, TranscriptError
from turntrace.identity import check_id, check_text

_MOST_TOKENS: Final = 1_000_000_000


def transcript_of(value: Any) -> Transcript:
    """Check a recorded conversation and split it into exchanges.

    Args:
        value: A line of a file of transcripts, read from JSON.

    Raises:
        TranscriptError: If it is malformed. The message says where and why in one line, and never what stands there.
    """
    if not isinstance(value, Mapping):
        raise TranscriptError("it is not a JSON object")
    try:
        conversation_id = check_id(_field(value, "conversation_id", str), "conversation_id")
    except IdentityError as error:
        raise TranscriptError(str(error)) from None
    model = _short(value, "model")
    messages = _field(value, "messages", list)
    return Transcript(
        conversation_id=conversation_id,
        user_id=_short(value, "user_id"),
        topic=None if value.get("topic") is None else _short(value, "topic"),
        model=model,
        succeeded=_optional(_optional(value, "outcome", Mapping, "") or {}, "success", bool, "outcome."),
        messages=len(messages),
        exchanges=_Reader(model).read(messages),
    )


class _Reader:
    """Reads the messages of one conversation, one after the other."""

    def __init__(self, model: str) -> None:
        self._exchanges: list[Exchange] = []
        self._system: list[SystemMessage] = []
        self._waiting: list[RecordedCall] = []
        self._digest = hashlib.sha256(model.encode())
        self._at = ""

    def read(self, messages: list[Any]) -> tuple[Exchange, ...]:
        for number, message in enumerate(messages, start=1):
            self._at = f"message {number}: "
            if not isinstance(message, Mapping):
                raise self._wrong("it is not a JSON object")
            self._message(_field(message, "role", str, self._at), message)
            self._digest.update(json.dumps(message, sort_keys=True).encode())
            if self._exchanges:
                self._exchanges[-1].fingerprint = self._digest.hexdigest()
        if not self._exchanges:
            raise TranscriptError("it has no message of a user or an assistant")
        self._exchanges[-1].system += self._system
        return tuple(self._exchanges)

    def _message(self, role: str, message: Mapping[str, Any]) -> None:
        name = _optional(message, "name", str, self._at)
        if role in ("system", "developer"):
            self._add_system(SystemMessage(self._content(message), name=name))
        elif role == "user":
            self._begin(Exchange(HumanMessage(self._content(message), name=name)))
        elif role == "assistant":
            if not self._exchanges:
                self._begin(Exchange())
            self._exchanges[-1].replies.append(self._reply(message, name))
        elif role == "tool":
            self._answer(message)
        else:
            raise self._wrong("its role is none of system, developer, user, assistant and tool")

    def _begin(self, exchange: Exchange) -> None:
        exchange.system, self._system = self._system, []
        self._exchanges.append(exchange)

    def _add_system(self, message: SystemMessage) -> None:
        current = self._exchanges[-1] if self._exchanges else None
        (self._system if current is None or current.replies else current.system).append(message)

    def _reply(self, message: Mapping[str, Any], name: str | None) -> RecordedReply:
        calls = tuple(self._calls(_optional(message, "tool_calls", list, self._at) or []))
        refusal = _optional(message, "refusal", str, self._at)
        if message.get("content") is not None:
            content = self._content(message)
        elif refusal or calls:
            content = refusal or ""
        else:
            raise self._wrong("it has neither content nor tool_calls")
        self._waiting += calls
        return RecordedReply(content, calls, self._usage(message), name, bool(refusal))

    def _calls(self, calls: list[Any]) -> Iterator[RecordedCall]:
        seen = set()
        for number, call in enumerate(calls, start=1):
            at = f"{self._at}tool call {number}: "
            if not isinstance(call, Mapping):
                raise TranscriptError(f"{at}it is not a JSON object")
            function = _field(call, "function", Mapping, at)
            read = RecordedCall(
                _short(call, "id", at), _short(function, "name", at), _field(function, "arguments", str, at)
            )
            if read.id in seen:
                raise TranscriptError(f"{at}its id stands twice in one message")
            seen.add(read.id)
            yield read

    def _answer(self, message: Mapping[str, Any]) -> None:
        call_id = _short(message, "tool_call_id", self._at)
        for call in reversed(self._waiting):
            if call.id == call_id:
                call.result = self._content(message)
                self._waiting.remove(call)
                return
        raise self._wrong("it is the result of a tool, and no call before it with its tool_call_id waits for one")

    def _content(self, message: Mapping[str, Any]) -> Content:
        content = message.get("content")
        if isinstance(content, str):
            return content
        if isinstance(content, list) and all(_is_part(part) for part in content):
            return content
        raise self._wrong("its content is neither a string nor a list of parts with a type")

    def _usage(self, message: Mapping[str, Any]) -> UsageMetadata | None:
        usage = _optional(message, "usage", Mapping, self._at)
        if usage is None:
            return None
        within = f"{self._at}usage."
        given, made = _tokens(usage, "prompt_tokens", within), _tokens(usage, "completion_tokens", within)
        counted = UsageMetadata(input_tokens=given, output_tokens=made, total_tokens=given + made)
        of_prompt = _optional(usage, "prompt_tokens_details", Mapping, within) or {}
        if of_prompt.get("cached_tokens") is not None:
            counted["input_token_details"] = InputTokenDetails(cache_read=_tokens(of_prompt, "cached_tokens", within))
        of_reply = _optional(usage, "completion_tokens_details", Mapping, within) or {}
        if of_reply.get("reasoning_tokens") is not None:
            reasoning = _tokens(of_reply, "reasoning_tokens", within)
            counted["output_token_details"] = OutputTokenDetails(reasoning=reasoning)
        return counted

    def _wrong(self, why: str) -> TranscriptError:
        return TranscriptError(self._at + why)


_KINDS: Final = {str: "a string", list: "a list", Mapping: "an object", bool: "true or false", int: "a whole number"}


def _field(value: Mapping[str, Any], name: str, kind: type, within: str = "") -> Any:
    if name not in value:
        raise TranscriptError(f"{within}{name} is missing")
    found = value[name]
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise TranscriptError(f"{within}{name} is not {_KINDS[kind]}")
    return found


def _optional(value: Mapping[str, Any], name: str, kind: type, within: str) -> Any:
    return None if value.get(name) is None else _field(value, name, kind, within)


def _short(value: Mapping[str, Any], name: str, within: str = "") -> str:
    try:
        return check_text(_field(value, name, str, within), f"{within}{name}")
    except IdentityError as error:
        raise TranscriptError(str(error)) from None


def _tokens(usage: Mapping[str, Any], name: str, within: str) -> int:
    tokens: int = _field(usage, name, int, within)
    if not 0 <= tokens <= _MOST_TOKENS:
        raise TranscriptError(f"{within}{name} is not a number of tokens")
    return tokens


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        return False
    return part["type"] != "text" or isinstance(part.get("text"), str)
