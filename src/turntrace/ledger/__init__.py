"""The ledger: the tables and the store."""

from typing import TYPE_CHECKING, Any

from turntrace.ledger.shapes import (
    ABANDONED,
    INTERRUPT,
    INTERRUPTED,
    LATE_SUMS,
    OPEN,
    SessionOpened,
    StageWanted,
    TurnBegun,
    TurnEnd,
    TurnTakenUp,
    TurnWritten,
    own_from,
    own_text,
)

if TYPE_CHECKING:
    from turntrace.ledger.store import Ledger
    from turntrace.ledger.writing import LedgerWriter

__all__ = [
    "ABANDONED",
    "INTERRUPT",
    "INTERRUPTED",
    "LATE_SUMS",
    "OPEN",
    "Ledger",
    "LedgerWriter",
    "SessionOpened",
    "StageWanted",
    "TurnBegun",
    "TurnEnd",
    "TurnTakenUp",
    "TurnWritten",
    "own_from",
    "own_text",
]


def __getattr__(name: str) -> Any:
    """Load the database's library when the ledger is asked for: it is half of what importing turntrace would take."""
    if name == "Ledger":
        from turntrace.ledger.store import Ledger

        return Ledger
    if name == "LedgerWriter":
        from turntrace.ledger.writing import LedgerWriter

        return LedgerWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
