"""The ledger: the tables and the store."""

from turntrace.ledger.rows import own_from, own_text
from turntrace.ledger.statements import ABANDONED, INTERRUPT, INTERRUPTED, LATE_SUMS, OPEN
from turntrace.ledger.store import Ledger, SessionOpened, TurnBegun
from turntrace.ledger.taking_up import TurnTakenUp, TurnWritten
from turntrace.ledger.writing import LedgerWriter, StageWanted, TurnEnd

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
