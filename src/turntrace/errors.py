"""Every error that turntrace raises to its caller.

::

    TurntraceError
    ├── ConfigurationError   a setting or an argument that cannot be used
    ├── IdentityError        an id that Langfuse would refuse or that means two things
    ├── StateError           a call that does not fit the state of its object
    ├── TranscriptError      a recorded conversation that cannot be read
    ├── ContextError         messages that cannot be counted or fitted
    │   └── ContextOverflowError   messages that stay too many tokens, whatever is pruned
    ├── LedgerError          the ledger cannot be opened, read or written
    └── DeliveryError        Langfuse cannot be asked

Each message says what was passed, what is allowed, and what to type instead. Inside the callback and the node wrapper
none of these reaches the app: there they are caught, logged once a kind, and counted.
"""


class TurntraceError(Exception):
    """Base of all errors that turntrace raises."""


class ConfigurationError(TurntraceError, ValueError):
    """A setting or an argument that cannot be used."""


class IdentityError(TurntraceError, ValueError):
    """An id that Langfuse would refuse, or that means two things."""


class StateError(TurntraceError, RuntimeError):
    """A call that does not fit the state of its object, as a turn's block that is entered twice."""


class TranscriptError(TurntraceError, ValueError):
    """A recorded conversation that cannot be read."""


class ContextError(TurntraceError, ValueError):
    """Messages that cannot be counted or fitted into a model's window."""


class ContextOverflowError(ContextError):
    """Messages that stay too many tokens for the model, whatever the strategy prunes.

    Attributes:
        tokens: Tokens of what is left.
        limit: Tokens that fit.
        biggest: The biggest messages of what is left: position in what was given, role, tokens.
    """

    def __init__(self, message: str, *, tokens: int, limit: int, biggest: tuple[tuple[int, str, int], ...]) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit
        self.biggest = biggest

    @property
    def over_by(self) -> int:
        """Tokens too many."""
        return self.tokens - self.limit


class LedgerError(TurntraceError, RuntimeError):
    """The ledger cannot be opened, read or written."""


class DeliveryError(TurntraceError, RuntimeError):
    """Langfuse cannot be asked: it does not answer, or not as one."""
