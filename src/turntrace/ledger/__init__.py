"""The ledger: the tables and the store."""

from turntrace.ledger.store import Ledger, LedgerWriter, OutboxItem, SessionOpened

__all__ = ["Ledger", "LedgerWriter", "OutboxItem", "SessionOpened"]
