"""The doctor: whether what turntrace needs is there, and whether Langfuse has what the ledger has."""

from turntrace.doctor.checks import Check, run_checks
from turntrace.doctor.verify import Comparison, LedgerTurn, read_turns, verify, waiting_of

__all__ = ["Check", "Comparison", "LedgerTurn", "read_turns", "run_checks", "verify", "waiting_of"]
