"""One turn of which several processes did a part: putting the parts together."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from turntrace.ledger.shapes import LATE_SUMS, TurnWritten
from turntrace.records import Step, TurnSummary

_ADDED: Final = (
    *(name for name in LATE_SUMS if name != "spans"),
    *("agent_runs", "messages_pruned", "tokens_pruned", "counted_tokens", "counted_of_tokens"),
)
_FILLED: Final = ("input_length", "input_type", "has_attachments", "intent", "time_to_first_token_ms", "model")
_WINDOW: Final = ("context_tokens", "context_messages", "context_limit")


def put_together(
    turn: TurnSummary, steps: Sequence[Step], other: TurnWritten, before: TurnWritten | None
) -> tuple[TurnSummary, list[Step]]:
    """Return a turn with what another part of it did; how it ended is as the first says.

    Args:
        turn: The turn as the part knows it whose word on the end counts.
        steps: The steps that this part knows.
        other: The turn as the other part knows it.
        before: What both knew from before; None when they knew nothing in common.
    """
    known = TurnSummary(id="") if before is None else before.turn
    more: dict[str, Any] = {
        name: getattr(turn, name) + (getattr(other.turn, name) - getattr(known, name)) for name in _ADDED
    }
    more |= {name: getattr(other.turn, name) for name in _FILLED if getattr(turn, name) is None}
    if (other.turn.context_tokens or 0) > (turn.context_tokens or 0):
        more |= {name: getattr(other.turn, name) for name in _WINDOW}
    seen = {step.span_id for step in steps}
    both = [*steps, *(step for step in other.steps if step.span_id not in seen)]
    return replace(turn, **more), sorted(both, key=lambda step: step.start_ms + step.duration_ms)
