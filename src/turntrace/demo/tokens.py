"""Counting the tokens of a recorded conversation, where the recording does not say them."""

from collections.abc import Sequence
from typing import Final

import tiktoken
from langchain_core.messages import BaseMessage

from turntrace.context import count_text
from turntrace.demo.recording import Content, RecordedReply

_FRAME_TOKENS: Final = 3
_REPLY_TOKENS: Final = 3
_ROLES: Final = {"human": "user", "ai": "assistant"}


class TokenCount:
    """Counts what a model is given, each message once.

    The framing is OpenAI's: 3 tokens a message and its role, 1 for a name, 3 to begin the reply
    (https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken). The schemas of tools are not in a
    recording, so they are not counted; nor are images.

    Args:
        encoding: The encoding of the model.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self._known: dict[str | None, int] = {}

    def of_prompt(self, messages: Sequence[BaseMessage]) -> int:
        """Return the tokens of a prompt."""
        for message in messages:
            if message.id not in self._known or message.id is None:
                self._known[message.id] = self._of_message(message)
        return sum(self._known[message.id] for message in messages) + _REPLY_TOKENS

    def of_reply(self, reply: RecordedReply) -> int:
        """Return the tokens that a model wrote: its text, and the names and arguments of calls."""
        return self._of_content(reply.content) + sum(
            self._of_text(call.name) + self._of_text(call.arguments) for call in reply.calls
        )

    def _of_message(self, message: BaseMessage) -> int:
        tokens = _FRAME_TOKENS + self._of_text(_ROLES.get(message.type, message.type))
        if message.name:
            tokens += 1 + self._of_text(message.name)
        for call in message.additional_kwargs.get("tool_calls", ()):
            tokens += self._of_text(call["function"]["name"]) + self._of_text(call["function"]["arguments"])
        return tokens + self._of_content(message.content)

    def _of_content(self, content: Content) -> int:
        if isinstance(content, str):
            return self._of_text(content)
        return sum(self._of_text(part["text"]) for part in content if isinstance(part.get("text"), str))

    def _of_text(self, text: str) -> int:
        return count_text(text, self._encoding)
