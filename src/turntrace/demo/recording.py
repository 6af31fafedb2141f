"""A recorded conversation, split into the exchanges that are played as turns.

Its messages have OpenAI's form. Each message of the user begins an exchange, so several in a row are exchanges without
a reply; what the assistant says before the first of them is an exchange that the agent began. A system message goes
in with the exchange that it stands in front of, or, after replies, with the next one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from langchain_core.messages.ai import UsageMetadata

HANDOFF_PREFIX: Final = "transfer_to_"
"""How tools that hand over are named by langgraph-swarm, langgraph-supervisor and OpenAI's Agents SDK."""

Content: TypeAlias = str | list[Any]
"""What a message says: a text, or parts in OpenAI's form."""


@dataclass(slots=True, eq=False)
class RecordedCall:
    """A call of a tool.

    Attributes:
        id: Its id. Providers use one again later in a conversation, so it is unique within one reply only.
        arguments: The arguments as the model wrote them.
        result: What the tool returned; None when the recording ends before.
    """

    id: str
    name: str
    arguments: str
    result: Content | None = None


@dataclass(frozen=True, slots=True)
class RecordedReply:
    """What the model answered to one call.

    Attributes:
        usage: Its tokens, where the recording has them.
        refusal: Whether the model marked it as a refusal.
    """

    content: Content
    calls: tuple[RecordedCall, ...] = ()
    usage: UsageMetadata | None = None
    name: str | None = None
    refusal: bool = False


@dataclass(slots=True)
class Exchange:
    """What becomes one turn: a message of the user and what the agent did until the next one.

    Attributes:
        message: The user's message; None when the agent began.
        system: The system messages that go in before it.
        replies: The model's answers, in order; none when nobody answered.
        fingerprint: Stands for the conversation up to the end of this exchange.
    """

    message: HumanMessage | None = None
    system: list[SystemMessage] = field(default_factory=list)
    replies: list[RecordedReply] = field(default_factory=list)
    fingerprint: str = ""

    @property
    def role(self) -> Literal["user", "assistant"]:
        """Who began it."""
        return "assistant" if self.message is None else "user"

    @property
    def input(self) -> list[BaseMessage]:
        """The messages that the graph is given."""
        return [*self.system, *([] if self.message is None else [self.message])]


@dataclass(frozen=True, slots=True)
class Transcript:
    """A recorded conversation.

    Attributes:
        topic: What it is about; None where that is not said.
        succeeded: Whether the user got what they came for; None where that is not known.
        messages: How many messages it has.
    """

    conversation_id: str
    user_id: str
    topic: str | None
    model: str
    succeeded: bool | None
    messages: int
    exchanges: tuple[Exchange, ...]

    @property
    def calls(self) -> Iterator[RecordedCall]:
        """The calls of tools, in order."""
        return (call for exchange in self.exchanges for reply in exchange.replies for call in reply.calls)

    @property
    def end_reason(self) -> str:
        """Why the session ended.

        ``handoff`` when the last tool called hands over (its name begins with ``transfer_to_``), else ``completed``
        when the outcome is a success, else ``user_exit``: the user left without what they came for, as far as is known.
        """
        names = [call.name for call in self.calls]
        if names and names[-1].startswith(HANDOFF_PREFIX):
            return "handoff"
        return "completed" if self.succeeded else "user_exit"
