"""A journey: the stages that a user passes on the way to a conversion, over as many sessions as it takes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from turntrace import attributes as a
from turntrace.errors import ConfigurationError
from turntrace.identity import check_text, derived_id
from turntrace.ledger import StageWanted
from turntrace.lifecycle.ending import end_span
from turntrace.lifecycle.jobs import SpanJob
from turntrace.lifecycle.session_jobs import EndSession, tags_of
from turntrace.summaries import JourneySummary, StageEntered

if TYPE_CHECKING:
    from turntrace.ledger import LedgerWriter
    from turntrace.lifecycle.session import Session
    from turntrace.lifecycle.turn import Turn


class Journey:
    """A journey of the user of a session. It is made by `Session.journey` or `Turn.journey`.

    It belongs to the user and goes on in later sessions; that of an unknown user belongs to the session.

    Attributes:
        name: Its name.
        stages: Its stages, in order.
    """

    def __init__(self, session: "Session", name: str, stages: Sequence[str], turn: "Turn | None" = None) -> None:
        self.name = name
        self.stages = tuple(stages)
        self._session = session
        self._turn = turn

    def __repr__(self) -> str:
        return f"<Journey {self.name!r} of {self._session!r}>"

    def enter(self, stage: str) -> None:
        """Enter a stage; entering the one where it stands does nothing, going back is recorded as such.

        Nobody waits for it to be written.

        Args:
            stage: One of the journey's stages.

        Raises:
            ConfigurationError: If it is none of them.
        """
        if stage not in self.stages:
            raise ConfigurationError(
                f"The journey {self.name!r} has no stage {stage!r:.80}. Its stages are {', '.join(self.stages)}."
            )
        self._submit(stage, converts=False)

    def convert(self) -> None:
        """Mark the journey as converted, at the stage where it stands; a second time does nothing."""
        self._submit(None, converts=True)

    def _submit(self, stage: str | None, *, converts: bool) -> None:
        session, turn = self._session, self._turn or self._session.running_turn()
        wanted = StageWanted(
            name=self.name,
            stages=self.stages,
            stage=stage,
            converts=converts,
            session_id=session.id,
            turn_number=None if turn is None else turn.number,
            at_ns=session.tracker.clock(),
        )
        session.tracker.submit(EnterStage(session, wanted, turn))

    def summary(self) -> JourneySummary | None:
        """Return where the journey stands, once all that was entered is written down; None before its first stage."""
        return self._session.tracker.ledger.journey(self._session.user_id, self._session.id, self.name)

    async def asummary(self) -> JourneySummary | None:
        """Return what `summary` returns, without blocking the event loop."""
        return await self._session.tracker.run_off_loop(self.summary)


class EnterStage(SpanJob):
    """Writes down a step of a journey, with its event."""

    def __init__(self, session: "Session", wanted: StageWanted, turn: "Turn | None") -> None:
        super().__init__(session.tracker)
        self._session = session
        self._wanted = wanted
        self._turn = turn
        self._recorded = 0

    def write(self, ledger: "LedgerWriter") -> None:
        """Enter the stage and put its event into the outbox, in one transaction."""
        session = ledger.session(self._session.id)
        # Whose it is, is known of the session by now, or not at all any more: it was erased.
        entered = None if session is None else ledger.enter_stage(session.user_id, self._wanted)
        if entered is None:
            return
        if not self._spans:
            self._keep(self._event(entered))
            if self._turn is not None and self._turn.account.is_closed:
                # The row of the turn may be written after this one, in the same transaction.
                self._tracker.submit(_CountSpans(self._turn, self._recorded))
            elif self._turn is not None:
                self._turn.account.spans += self._recorded
        self._put_spans(ledger)
        if session is not None and session.ended_ns is not None:
            EndSession(self._tracker, session.id).write(ledger)  # its totals are sent again with this

    def _event(self, entered: StageEntered) -> Any:
        target, at_ns = self._tracker.target, entered.at_ns
        attributes = {**entered.attributes(), a.LANGFUSE_OBSERVATION_TYPE: "event"}
        with target.capturing() as ended:
            if self._turn is not None:
                parent = self._turn.root.span
                attributes = {**self._turn.tags, **attributes}
                span = target.start(
                    a.JOURNEY_STAGE, attributes=attributes, start_ns=at_ns, parent=parent, has_ended=True
                )
            else:
                parts = (a.JOURNEY_STAGE, self._session.id, entered.name, entered.stage, str(at_ns))
                ids = (int(derived_id(*parts), 16), int(derived_id(*parts, "span")[:16], 16))
                attributes = {**tags_of(self._session.facts), **attributes, a.LANGFUSE_TRACE_NAME: a.JOURNEY_STAGE}
                attributes[a.GEN_AI_OPERATION_NAME] = a.JOURNEY_STAGE
                span = target.start_root(
                    a.JOURNEY_STAGE, attributes=attributes, start_ns=at_ns, ids=ids, has_ended=True
                )
            self._recorded = int(span.is_recording())
            end_span(span, at_ns, None)
        return ended


class _CountSpans:
    """Adds spans to the row of a turn that has ended."""

    def __init__(self, turn: "Turn", spans: int) -> None:
        self._turn = turn
        self._spans = spans

    def prepare(self) -> None:
        """Do nothing: all is known."""

    def write(self, ledger: "LedgerWriter") -> None:
        """Add them."""
        ledger.add_to_turn(self._turn.words, {"spans": self._spans})


def checked_journeys(journeys: Any) -> dict[str, tuple[str, ...]]:
    """Return the stages of journeys by their names, or say why they cannot be ones."""
    if journeys is None:
        return {}
    if not isinstance(journeys, Mapping):
        raise ConfigurationError(
            f"journeys is a {type(journeys).__name__}. Allowed is a mapping from their names to their stages: "
            'journeys={"onboarding": ["signup", "connect", "done"]}.'
        )
    return {check_text(name, "name"): checked_stages(name, stages) for name, stages in journeys.items()}


def checked_stages(name: str, stages: Any) -> tuple[str, ...]:
    """Return the stages of a journey, or say why they cannot be ones."""
    if isinstance(stages, str) or not isinstance(stages, Sequence) or not stages:
        raise ConfigurationError(
            f"The stages of the journey {name!r} are {stages!r:.60}. Allowed is a list of their names in order: "
            'stages=["signup", "connect", "done"].'
        )
    found = tuple(check_text(stage, "stage") for stage in stages)
    if len(set(found)) < len(found):
        twice = next(stage for stage in found if found.count(stage) > 1)
        raise ConfigurationError(
            f"The journey {name!r} has the stage {twice!r} twice. Give each stage a name of its own."
        )
    return found


class NoJourney:
    """Stands for a journey where no turn runs: takes everything and does nothing."""

    name = ""
    stages: tuple[str, ...] = ()

    def enter(self, stage: str) -> None:
        """Do nothing."""

    def convert(self) -> None:
        """Do nothing."""

    def summary(self) -> None:
        """Return nothing."""

    async def asummary(self) -> None:
        """Return nothing."""
