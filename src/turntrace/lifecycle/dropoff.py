"""Whether a session that has ended is a drop-off: whether silence ended it while something was open."""

from dataclasses import dataclass

from turntrace.summaries import SessionSummary

OPEN_ACTIONS = ("asked_question", "failed", "interrupted")
"""What the agent did last where something was open."""


@dataclass(frozen=True, slots=True)
class DropoffFacts:
    """What the rule for drop-offs is told of a session that has ended.

    Attributes:
        session: The session, with its end and its totals.
        last_action: What the agent did last: ``asked_question``, ``answered``, ``called_tool``, ``failed`` or
            ``interrupted``; None in a session without a turn.
        last_intent: What the user wanted in the last turn, where the app said so.
        open_journeys: Names of the journeys that this session took a step of and that are not converted.
    """

    session: SessionSummary
    last_action: str | None
    last_intent: str | None
    open_journeys: tuple[str, ...]


def is_dropoff(facts: DropoffFacts) -> bool:
    """Tell whether silence ended a session while something was open.

    Open is what the agent asked or failed at last, what it waits for a person for, and a journey that is not converted.
    """
    if facts.session.end_reason != "inactive_timeout":
        return False
    return facts.last_action in OPEN_ACTIONS or bool(facts.open_journeys)
