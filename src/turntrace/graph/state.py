"""The state schema."""

from typing import Annotated, Any, NotRequired, TypeVar

from langgraph.graph import MessagesState

from turntrace.lifecycle import Turn

T = TypeVar("T")


def latest(_before: T, now: T) -> T:
    """Keep the new value: nodes that run side by side may write the same ids in one step."""
    return now


class ConversationState(MessagesState):
    """State of a graph whose turns are tracked; subclass it and add fields of your own.

    Tracked nodes see the ids of the turn that runs, and the first one writes them (see `turntrace.track_graph`), so
    nodes, edges and checkpoints of the graph have them without any code. An edge before the first node sees those of
    the turn before.

    Attributes:
        messages: The messages of the conversation.
        session_id: The sitting that the turn is in.
        conversation_id: The conversation: LangGraph's ``thread_id``.
        turn_id: The turn that runs, or ran last.
        turn_number: Its number in the conversation, from 1.
        context_tokens: Tokens that the model was given last, when a `turntrace.ContextTracker` fits them.
    """

    session_id: NotRequired[Annotated[str, latest]]
    conversation_id: NotRequired[Annotated[str, latest]]
    turn_id: NotRequired[Annotated[str, latest]]
    turn_number: NotRequired[Annotated[int, latest]]
    context_tokens: NotRequired[Annotated[int, latest]]


STATE_IDS = ("session_id", "conversation_id", "turn_id", "turn_number")
"""The fields of `ConversationState` with the ids of the turn."""

CONTEXT_FIELD = "context_tokens"
"""Its field with the tokens that the model was given."""

FIELDS = (*STATE_IDS, CONTEXT_FIELD)
"""The fields of `ConversationState` that tracked nodes write."""


def ids_of_turn(turn: Turn) -> dict[str, Any]:
    """Return the ids of a turn by the fields of `ConversationState`."""
    return {
        "session_id": turn.conversation.session.id,
        "conversation_id": turn.conversation.id,
        "turn_id": turn.id,
        "turn_number": turn.number,
    }
