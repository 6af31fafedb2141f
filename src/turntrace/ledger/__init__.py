"""The ledger: the tables and the store."""

from turntrace.ledger.statements import LATE_SUMS
from turntrace.ledger.store import Ledger, SessionOpened
from turntrace.ledger.writing import LedgerWriter, StageWanted, TurnEnd

__all__ = ["LATE_SUMS", "Ledger", "LedgerWriter", "SessionOpened", "StageWanted", "TurnEnd"]
