"""What the ledger is told and tells; it knows nothing of databases, so whoever only needs this loads none."""

import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from turntrace.records import SessionFacts, Step, TurnOwn, TurnSummary

OPEN: Final = "open"
"""Status of a turn that has begun and has not ended."""

COMPLETED: Final = "completed"
"""Status of a turn that ended well."""

INTERRUPTED: Final = "interrupted"
"""Status of a turn that waits for a person, or that was handed over to another process."""

INTERRUPT: Final = "interrupt"
"""Type of the output of a turn that waits, or waited to its end, for a person."""

ABANDONED: Final = "abandoned"
"""Status of a turn that nobody ended, or answered."""

LATE_SUMS: Final = (
    *("spans", "tool_calls", "llm_calls", "input_tokens", "output_tokens", "cost_usd", "unpriced_calls", "prunings"),
)
"""What steps that end after their turn add to it."""


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """How a session was opened.

    Attributes:
        session: The session, begun or continued.
        is_new: Whether it began now.
        is_announced: Whether its ``session.start`` is on record: not so when the process was killed before.
        expired_id: The session of the same user and channel that had been silent too long and is to be ended.
        expired_activity_ns: When that was active last, in nanoseconds since 1970.
    """

    session: SessionFacts
    is_new: bool
    is_announced: bool = False
    expired_id: str | None = None
    expired_activity_ns: int = 0


class TurnBegun(NamedTuple):
    """A turn that has begun.

    Attributes:
        number: Its number in the conversation, from 1, without gaps.
        unanswered_id: The turn before it, where that waits for a person, who will not answer it any more.
    """

    number: int
    unanswered_id: str | None


@dataclass(frozen=True, slots=True)
class TurnWritten:
    """A turn as it is written down.

    Attributes:
        turn: What is known of it.
        steps: Its steps.
        spans: How many spans its trace has, the root left out.
        roots: How many roots it has: none while it waits, or where spans are not recorded.
    """

    turn: TurnSummary
    steps: tuple[Step, ...]
    spans: int
    roots: int = 0


@dataclass(frozen=True, slots=True)
class TurnTakenUp:
    """A turn that goes on.

    Attributes:
        turn: What is known of it.
        session: The session that it is in.
        before: What was written down when it began to wait; None when its process was killed before it could.
    """

    turn: TurnSummary
    session: SessionFacts
    before: TurnWritten | None


class TurnEnd(IntEnum):
    """What came of ending a turn; it is true when the turn ended by it."""

    ENDED_BEFORE = 0
    ENDED = 1
    ENDED_AFTER_SESSION = 2


class StageWanted(NamedTuple):
    """A step of a journey as the app asks for it.

    Attributes:
        name: Name of the journey.
        stages: Its stages, in order.
        stage: The stage to enter; None to stay where it stands.
        converts: Whether the journey is converted by it.
        session_id: The session in which this is.
        turn_number: Number of the turn in which this is; None for that of the session's last one.
        at_ns: When, in nanoseconds since 1970.
    """

    name: str
    stages: tuple[str, ...]
    stage: str | None
    converts: bool
    session_id: str
    turn_number: int | None
    at_ns: int


def own_text(own: TurnOwn) -> str | None:
    """Write what a turn began with as the ledger keeps it; None for nothing."""
    known = {name: value for name in TurnOwn.__slots__ if (value := getattr(own, name))}
    return json.dumps(known, separators=(",", ":")) if known else None


def own_from(text: str | None) -> TurnOwn:
    """Read back what `own_text` wrote."""
    known = json.loads(text) if text else {}
    return TurnOwn(**{**known, "tags": tuple(known.get("tags", ()))})
