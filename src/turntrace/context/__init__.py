"""What the model is given: counting its tokens, and fitting it into the model's window."""

from turntrace.context.counter import MessageCounter
from turntrace.context.encodings import count_text, encoding, encoding_for_model
from turntrace.context.limits import window_of
from turntrace.context.nodes import context_node, pre_model_hook
from turntrace.context.overfull import Overfull
from turntrace.context.strategies import AsyncStrategy, Chain, ClearToolResults, DropOldestTurns, KeepLast, Strategy
from turntrace.context.summarize import Summarize
from turntrace.context.tracker import ContextTracker, Window
from turntrace.errors import ContextError, ContextOverflowError

__all__ = [
    "AsyncStrategy",
    "Chain",
    "ClearToolResults",
    "ContextError",
    "ContextOverflowError",
    "ContextTracker",
    "DropOldestTurns",
    "KeepLast",
    "MessageCounter",
    "Overfull",
    "Strategy",
    "Summarize",
    "Window",
    "context_node",
    "count_text",
    "encoding",
    "encoding_for_model",
    "pre_model_hook",
    "window_of",
]
