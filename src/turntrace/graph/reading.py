"""How a handler reads what the user said from a run's input, and what the app answered from its output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from langgraph.types import Command

from turntrace.boundary import never_breaks
from turntrace.errors import ConfigurationError
from turntrace.graph import extract
from turntrace.lifecycle import SessionTracker


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read the input and output of runs.

    Attributes:
        messages_key: Key of the state that holds its messages.
        intent_key: Key of the state in which nodes say what the user wants; None reads none.
        describe_input: Returns what the user said in an input, as a text or a message; by default the last message.
        describe_output: Returns what the app answered in an output; by default the messages.
    """

    messages_key: str = "messages"
    intent_key: str | None = None
    describe_input: Callable[[Any], Any] | None = None
    describe_output: Callable[[Any], Any] | None = None

    def message_in(self, inputs: Any) -> Any:
        """Return what the user said, or None."""
        if self.describe_input is None:
            return _message_in(inputs, self.messages_key)
        return never_breaks("describing an input by describe_input=...")(self.describe_input)(inputs)

    def answer_in(self, outputs: Any, *, waits: bool) -> Any:
        """Return what the app answered: a text, a message or messages; or None.

        Args:
            outputs: What a run gave back.
            waits: Whether it stopped to wait for a person: the app's function expects the output of one that is done.
        """
        if self.describe_output is None:
            return _answer_in(outputs, self.messages_key)
        if waits:
            return None
        answer = never_breaks("describing an output by describe_output=...")(self.describe_output)(outputs)
        return ("assistant", answer) if isinstance(answer, str) else answer

    @never_breaks("reading the intent in the output of a node")
    def intent_in(self, outputs: Any) -> str | None:
        """Return what the user wants, where a node has written it into the state."""
        if self.intent_key is None:
            return None
        for each in outputs if isinstance(outputs, list | tuple) else (outputs,):
            update = each.update if isinstance(each, Command) else each
            read = update.get if isinstance(update, Mapping) else partial(getattr, update)
            intent = read(self.intent_key, None)
            if isinstance(intent, str) and intent:
                return intent
        return None


@never_breaks("reading the input of a run")
def _message_in(inputs: Any, key: str) -> Any:
    return extract.message_in(inputs, key)


@never_breaks("reading the output of a run")
def _answer_in(outputs: Any, key: str) -> Any:
    return extract.answer_in(outputs, key)


def checked_key(key: Any, name: str) -> str:
    """Return a key of the state.

    Raises:
        ConfigurationError: If it is no text.
    """
    if isinstance(key, str) and key:
        return key
    raise ConfigurationError(
        f"{name} is {key!r:.40}. It is the name of a field of the graph's state: "
        f'SessionCallbackHandler({name}="{name.removesuffix("_key")}").'
    )


def checked_tracker(tracker: Any) -> SessionTracker:
    """Return the tracker.

    Raises:
        ConfigurationError: If it is none.
    """
    if isinstance(tracker, SessionTracker):
        return tracker
    raise ConfigurationError(
        f"SessionCallbackHandler takes a SessionTracker and got a {type(tracker).__name__}: pass "
        "SessionCallbackHandler(SessionTracker(...)), or nothing for the tracker of the process."
    )


def checked_describer(describe: Any, name: str) -> Callable[[Any], Any] | None:
    """Return what describes inputs or outputs.

    Raises:
        ConfigurationError: If it is no function.
    """
    if describe is None or callable(describe):
        found: Callable[[Any], Any] | None = describe
        return found
    raise ConfigurationError(
        f"{name} is a {type(describe).__name__}. It is a function that gets what a run was given or gave back, and "
        f'returns a text or a message: SessionCallbackHandler({name}=lambda state: state["question"]).'
    )
