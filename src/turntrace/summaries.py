"""What the ledger knows of sessions, users and journeys, as frozen dataclasses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from turntrace import attributes as a
from turntrace.attributes import AttributeValue
from turntrace.records import Record, elapsed_ms, iso_time, word

NS_PER_DAY: Final = 86_400 * 1_000_000_000


class _Totals:
    """What follows from totals: of a session, or of all sessions of a user."""

    __slots__ = ()

    input_tokens: int
    output_tokens: int
    active_ms: int
    total_turns: int

    @property
    def total_tokens(self) -> int:
        """Input and output tokens of all calls."""
        return self.input_tokens + self.output_tokens

    @property
    def avg_turn_latency_ms(self) -> float | None:
        """Mean working time of a turn, in milliseconds; None without any turn."""
        return self.active_ms / self.total_turns if self.total_turns else None

    @property
    def avg_turn_tokens(self) -> float | None:
        """Mean tokens of a turn; None without any turn."""
        return self.total_tokens / self.total_turns if self.total_turns else None


@dataclass(frozen=True, slots=True)
class SessionSummary(_Totals, Record):
    """What the ledger knows of a session.

    Attributes:
        started_ns: When it began, in nanoseconds since 1970.
        last_activity_ns: When its last turn began or ended.
        ended_ns: When it was ended; None while it is open.
        active_ms: Time that the agent worked.
        wait_ms: Time that turns waited for a person.
        unpriced_calls: Calls of models whose price is not known: they are not in ``total_cost_usd``.
        failed_turns: Turns that ended with an error.
        prunings: How often something was pruned from what a model was given.
        user_satisfaction: Mean of the feedback, from 0 to 1; None without any.
        dropoff: Whether it ended by silence while something was open; None while it is open.
        last_turn: Number of its last turn, in that turn's conversation.
        last_intent: What the user wanted in it.
        last_action: What the agent did last: ``asked_question``, ``answered``, ``called_tool``, ``failed`` or
            ``interrupted``.
        last_turn_ns: When its last turn ended, in nanoseconds since 1970.
        journey_name: The journey that was entered last in it.
        journey_stage: The stage of that journey.
        journey_converted: Whether that journey was converted.
        journey_conversion_turn: Number of the turn in which it was.
        journey_conversion_time_ms: From the journey's first stage to its conversion.
    """

    id: str
    user_id: str | None = None
    channel: str | None = None
    type: str | None = None
    tier: str | None = None
    org_id: str | None = None
    locale: str | None = None
    client_version: str | None = None
    previous_id: str | None = None
    started_ns: int = 0
    last_activity_ns: int = 0
    ended_ns: int | None = None
    end_reason: str | None = word(a.SESSION_END_REASON)
    total_turns: int = word(a.SESSION_TOTAL_TURNS, default=0)
    failed_turns: int = 0
    llm_calls: int = 0
    tool_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    total_cost_usd: float = word(a.SESSION_TOTAL_COST_USD, default=0.0)
    unpriced_calls: int = 0
    active_ms: int = word(a.SESSION_ACTIVE_MS, default=0)
    wait_ms: int = word(a.SESSION_WAIT_MS, default=0)
    prunings: int = 0
    user_satisfaction: float | None = word(a.SESSION_USER_SATISFACTION)
    dropoff: bool | None = word(a.DROPOFF_DETECTED)
    last_turn: int | None = word(a.DROPOFF_LAST_TURN)
    last_intent: str | None = word(a.DROPOFF_LAST_INTENT)
    last_action: str | None = word(a.DROPOFF_AGENT_LAST_ACTION)
    last_turn_ns: int | None = None
    journey_name: str | None = word(a.JOURNEY_NAME)
    journey_stage: str | None = word(a.JOURNEY_STAGE)
    journey_converted: bool | None = word(a.JOURNEY_CONVERTED)
    journey_conversion_turn: int | None = word(a.JOURNEY_CONVERSION_TURN)
    journey_conversion_time_ms: int | None = word(a.JOURNEY_CONVERSION_TIME_MS)
    user_sessions_total: int | None = word(a.USER_SESSIONS_TOTAL)
    user_avg_session_length: float | None = word(a.USER_AVG_SESSION_LENGTH)
    user_retention_days: int | None = word(a.USER_RETENTION_DAYS)

    @property
    def duration_ms(self) -> int:
        """From the first to the last activity, in milliseconds."""
        return elapsed_ms(self.started_ns, self.last_activity_ns)

    def attributes(self) -> dict[str, AttributeValue]:
        """Return the attributes that the span ``session.end`` has beyond those of every span of the session."""
        rendered = Record.attributes(self)
        rendered[a.SESSION_START_TIME] = iso_time(self.started_ns)
        rendered[a.SESSION_DURATION_MS] = self.duration_ms
        rendered[a.SESSION_TOTAL_TOKENS] = self.total_tokens
        if self.avg_turn_latency_ms is not None and self.avg_turn_tokens is not None:
            rendered[a.SESSION_AVG_TURN_LATENCY_MS] = self.avg_turn_latency_ms
            rendered[a.SESSION_AVG_TURN_TOKENS] = self.avg_turn_tokens
        if self.ended_ns is not None:
            rendered[a.SESSION_END_TIME] = iso_time(self.ended_ns)
            rendered[a.SESSION_INACTIVE_TIMEOUT] = self.end_reason == "inactive_timeout"
            rendered[a.SESSION_IDLE_TIME_MS] = elapsed_ms(self.last_activity_ns, self.ended_ns)
            if self.last_turn_ns is not None:
                rendered[a.DROPOFF_TIME_SINCE_LAST_TURN_MS] = elapsed_ms(self.last_turn_ns, self.ended_ns)
        return rendered


@dataclass(frozen=True, slots=True)
class UserSummary(_Totals):
    """What the ledger knows of a user, over all sessions.

    Attributes:
        user_id: Hash of the user's id.
        sessions_total: Sessions so far.
        open_sessions: Of them, those that have not ended.
        total_turns: Turns that have ended, of all sessions.
        first_session_ns: When the first session began, in nanoseconds since 1970.
        latest_session_ns: When the latest one began.
        last_activity_ns: When the user was active last.
        active_ms: Time that the agent worked for the user.
        unpriced_calls: Calls of models whose price is not known: they are not in ``total_cost_usd``.
        user_satisfaction: Mean of the user's feedback, from 0 to 1; None without any.
        dropoffs: Sessions that ended by silence while something was open.
        journeys: The user's journeys by name: the stage of each, and whether it was converted.
    """

    user_id: str
    sessions_total: int = 0
    open_sessions: int = 0
    total_turns: int = 0
    failed_turns: int = 0
    first_session_ns: int = 0
    latest_session_ns: int = 0
    last_activity_ns: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    total_cost_usd: float = 0.0
    unpriced_calls: int = 0
    active_ms: int = 0
    wait_ms: int = 0
    prunings: int = 0
    user_satisfaction: float | None = None
    dropoffs: int = 0
    journeys: Mapping[str, "JourneySummary"] = field(default_factory=dict)

    @property
    def avg_session_length(self) -> float:
        """Mean turns of a session."""
        return self.total_turns / self.sessions_total if self.sessions_total else 0.0

    @property
    def retention_days(self) -> int:
        """Whole days from the first to the latest session."""
        return max(0, self.latest_session_ns - self.first_session_ns) // NS_PER_DAY


@dataclass(frozen=True, slots=True)
class JourneySummary:
    """Where a journey stands.

    Attributes:
        name: Its name.
        stages: Its stages, in order.
        stage: The stage that was entered last.
        started_ns: When its first stage was entered, in nanoseconds since 1970.
        entered_ns: When the stage was entered.
        converted_ns: When it was converted; None when it was not.
        conversion_turn: Number of the turn in which it was converted, in that turn's conversation.
    """

    name: str
    stages: tuple[str, ...]
    stage: str
    started_ns: int
    entered_ns: int
    converted_ns: int | None = None
    conversion_turn: int | None = None

    @property
    def stage_number(self) -> int:
        """Number of the stage, from 1; 0 for one that is not among the stages any more."""
        return self.stages.index(self.stage) + 1 if self.stage in self.stages else 0

    @property
    def converted(self) -> bool:
        """Whether it was converted."""
        return self.converted_ns is not None

    @property
    def conversion_time_ms(self) -> int | None:
        """From the first stage to the conversion, in milliseconds; None when it was not converted."""
        return None if self.converted_ns is None else elapsed_ms(self.started_ns, self.converted_ns)


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a user thought of a turn or of a session.

    Attributes:
        turn_id: The turn; None when it is about the session.
        name: Its name.
        value: From 0 to 1.
        at_ns: When it was given, in nanoseconds since 1970.
    """

    turn_id: str | None
    name: str
    value: float
    at_ns: int


@dataclass(frozen=True, slots=True)
class StageEntered(Record):
    """A step of a journey: what the event ``journey.stage`` says.

    Attributes:
        at_ns: When, in nanoseconds since 1970.
        time_in_stage_ms: How long the stage lasted that was left; None at the first.
        is_back: Whether the stage comes before the one that was left.
    """

    name: str = word(a.JOURNEY_NAME)
    stage: str = word(a.JOURNEY_STAGE)
    stage_number: int = word(a.JOURNEY_STAGE_NUMBER)
    total_stages: int = word(a.JOURNEY_TOTAL_STAGES)
    at_ns: int = 0
    time_in_stage_ms: int | None = word(a.JOURNEY_TIME_IN_STAGE_MS)
    converted: bool = word(a.JOURNEY_CONVERTED, default=False)
    conversion_turn: int | None = word(a.JOURNEY_CONVERSION_TURN)
    conversion_time_ms: int | None = word(a.JOURNEY_CONVERSION_TIME_MS)
    is_back: bool = False
