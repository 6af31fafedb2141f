"""The turns of a tracker: they begin, go on when they had waited, and are written down when they end."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from turntrace.errors import LedgerError, StateError
from turntrace.forking import in_child
from turntrace.lifecycle.beginning import begun_turn
from turntrace.lifecycle.closing import FinishTurn, SettleTurn
from turntrace.lifecycle.late import BeginTurnLate
from turntrace.lifecycle.resuming import forked_from, is_to_resume, resumed_turn
from turntrace.lifecycle.session import Conversation, Session
from turntrace.lifecycle.sittings import Sittings, key_of_run
from turntrace.lifecycle.travelling import tags_in, visited
from turntrace.lifecycle.turn import TURN_ID_KEY, Turn
from turntrace.lifecycle.writer import Writer
from turntrace.records import SessionFacts, TurnRequest

if TYPE_CHECKING:
    from turntrace.ledger import Ledger
    from turntrace.lifecycle.tracker import SessionTracker

_WRITTEN_S: Final = 5.0
_NUMBERS: Final = 2_000


class Turns:
    """The part of a tracker that has the turns."""

    ledger: "Ledger"
    channel: str
    propagate: bool
    idle_ns: int
    clock: Callable[[], int]
    new_id: Callable[[], str]
    hash_user: Callable[[str | int], str]
    _sittings: Sittings
    _writer: Writer

    def __init__(self) -> None:
        self._turns: dict[str, Turn] = {}
        self._finishing: dict[str, Turn] = {}
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._late: dict[str, str] = {}
        in_child(self._leave_to_parent)

    def _leave_to_parent(self) -> None:
        """Forget, in a process that was forked, what only the parent writes down."""
        self._finishing, self._late = {}, {}

    # --- what begins --------------------------------------------------------------------------------------------------
    def start_turn(self, conversation: Conversation, message: Any = None, *, role: str = "user") -> Turn:
        """Begin a turn of a conversation, as `Conversation.start_turn` does."""
        turn = self._begin(conversation, TurnRequest(), message, role, active_since_ns=0)
        if turn is None:  # the session had ended: this opens it again
            self._sittings.open_again(conversation.session)
            turn = self._begin(conversation, TurnRequest(), message, role, active_since_ns=0)
        if turn is None:
            raise StateError(f"The session {conversation.session.id!r} is ended again and again while a turn begins.")
        return turn

    def begin_turn(self, request: TurnRequest, message: Any = None) -> Turn:
        """Begin the turn of a run that stands alone: in the session that it names, or in the open one of its user.

        Without a session of its own the turn falls into the open session of the user and channel (without a user: of
        the conversation), when that was active within the idle time; else that one ends and a new one begins.

        Args:
            request: What the run says about itself; its ids have been checked.
            message: What the user said.
        """
        user_id = None if request.user_id is None else self.hash_user(request.user_id)
        channel = self.channel if request.channel is None else request.channel
        key = key_of_run(request, user_id, channel)
        now = self.clock()
        since = 0 if request.session_id is not None else now - self.idle_ns
        tried = session = self._sittings.known(key)
        for _ in range(3):
            if session is None:
                wanted = SessionFacts(
                    id=request.session_id or self.new_id(),
                    user_id=user_id,
                    channel=channel,
                    type="chat",
                    tier=request.tier,
                    org_id=request.org_id,
                    locale=request.locale,
                    client_version=request.client_version,
                    started_ns=now,
                )
                tried = session = self._sittings.open_for_run(key, wanted, request, tried)
            conversation = Conversation(session, request.conversation_id or session.id, request.topic)
            turn = self._begin(conversation, request, message, "user", active_since_ns=since)
            if turn is not None:
                return turn
            session = None  # it has ended meanwhile, or was silent for too long
        raise StateError("No session stays open for this turn: another process ends each that is begun.")

    def _begin(
        self, conversation: Conversation, request: TurnRequest, message: Any, role: str, *, active_since_ns: int
    ) -> Turn | None:
        self._sittings.wait_for_end(conversation.session.id)
        turn = begun_turn(self._tracker, conversation, request, message, role, active_since_ns)
        if turn is not None:
            self._turns[turn.id] = turn
        return turn

    # --- while the ledger is away -------------------------------------------------------------------------------------
    @property
    def is_ledger_away(self) -> bool:
        """Whether the ledger could not be written when it was tried last; the writer goes on trying."""
        return self._writer.is_ledger_away

    def note_ledger_away(self, error: LedgerError) -> None:
        """Note that the ledger cannot be written now."""
        self._writer.note_away(error)

    def begins_late(self, conversation_id: str) -> bool:
        """Tell whether a turn of a conversation is to be written down later: turns keep the order they began in."""
        return self.is_ledger_away or (bool(self._late) and conversation_id in list(self._late.values()))

    def begin_late(self, turn: Turn, job: BeginTurnLate) -> bool:
        """Have the beginning of a turn written down later; tell whether it will be."""
        self._late[turn.id] = turn.conversation.id
        if self._writer.submit(job):
            return True
        self.began_late(turn)
        return False

    def began_late(self, turn: Turn) -> None:
        """Note that the beginning of a turn is written, or cannot be. Called by the writer."""
        self._late.pop(turn.id, None)

    def open_again(self, session: Session) -> None:
        """Have the ledger hold a session open that this process has.

        Raises:
            LedgerError: If the ledger cannot be written.
        """
        self._sittings.open_again(session)

    def note_number(self, conversation_id: str, number: int) -> None:
        """Note the number of the newest turn of a conversation."""
        self._numbers[conversation_id] = number
        if len(self._numbers) > _NUMBERS:
            self._numbers.popitem(last=False)

    def next_number(self, conversation_id: str) -> int:
        """Guess the number of the next turn of a conversation, as far as this process knows."""
        number = self._numbers.get(conversation_id, 0) + 1
        self.note_number(conversation_id, number)
        return number

    def live_turn(self, turn_id: str) -> Turn | None:
        """Return a turn of this process that has not ended, or None."""
        return self._turns.get(turn_id)

    # --- what goes on -------------------------------------------------------------------------------------------------
    def resume_turn(self, carrier: Mapping[str, str]) -> Turn:
        """Go on with a turn that another process handed over, or that waits for a person.

        It is the same turn and the same trace. It ends with `Turn.end`, or with its block::

            with tracker.resume_turn(job["turn"]) as turn:
                graph.invoke(inputs, turn.config)

        A job may be delivered again, since queues deliver at least once. A turn that failed, or that was closed as
        abandoned while the job lay in the queue, is made whole by it and ends as the job does now. Where the turn is
        completed, or another worker is at it, the run is one more agent run of it: what it uses is added.

        Args:
            carrier: What `Turn.carrier` returned.

        Raises:
            StateError: If it is no carrier, or the ledger does not have the turn.
            LedgerError: If the ledger cannot be written.
        """
        turn_id = carrier.get(TURN_ID_KEY) if isinstance(carrier, Mapping) else None
        if not isinstance(turn_id, str) or not turn_id.isascii() or not turn_id.isprintable() or not turn_id:
            raise StateError(
                f"The carrier of a turn is what turn.carrier() returned, and this has no {TURN_ID_KEY!r}: "
                f"{carrier!r:.80}. Pass it on as it is: tracker.resume_turn(job['turn'])."
            )
        self._wait_until_written(lambda turn: turn.id == turn_id)
        found = self.ledger.resume_turn(turn_id, now_ns=self.clock())
        if found is None:
            raise StateError(
                f"The ledger {self.ledger.url} has no turn {turn_id!r:.80}: it is in another ledger, or was erased. "
                "Give the tracker that goes on the ledger of the one that called turn.carrier()."
            )
        return self._went_on(resumed_turn(self._tracker, found))

    async def aresume_turn(self, carrier: Mapping[str, str]) -> Turn:
        """Go on with a turn, as `resume_turn` does, without blocking the event loop."""
        return await self._tracker.run_off_loop(self.resume_turn, carrier)

    def resume_newest(self, conversation_id: str) -> Turn | None:
        """Go on with the newest turn of a conversation if it waits for a person, else return None."""
        return self._resume(conversation_id, None, answers=True)

    def resume_for_run(self, request: TurnRequest, checkpoint_id: str | None, *, answers: bool) -> Turn | None:
        """Find the turn that a run goes on with: the newest one of its conversation, if that waits for a person.

        Args:
            request: What the run says about itself.
            checkpoint_id: LangGraph's checkpoint that the run is to go on from, when it names one.
            answers: Whether the run answers what the turn waits for; else it goes on without any input.
        """
        if request.conversation_id is None:
            return None
        for turn in list(self._turns.values()):  # one that the app has not ended yet
            if turn.interrupted and turn.conversation.id == request.conversation_id:
                return turn
        if self.is_ledger_away:
            return None
        try:
            return self._resume(request.conversation_id, checkpoint_id, answers=answers)
        except LedgerError as error:  # the run is a turn of its own, and is not lost
            self.note_ledger_away(error)
            return None

    def _resume(self, conversation_id: str, checkpoint_id: str | None, *, answers: bool) -> Turn | None:
        self._wait_until_written(lambda turn: turn.conversation.id == conversation_id)
        found = self.ledger.resume_newest(
            conversation_id,
            lambda turn: not self.holds(turn.id) and is_to_resume(turn, checkpoint_id, answers=answers),
            now_ns=self.clock(),
        )
        return None if found is None else self._went_on(resumed_turn(self._tracker, found))

    def forked_from(self, request: TurnRequest, checkpoint_id: str | None, *, has_input: bool) -> str | None:
        """Return the id of the turn that a run replays from a checkpoint, or without one goes on from.

        Args:
            request: What the run says about itself.
            checkpoint_id: LangGraph's checkpoint that it begins at, when it names one.
            has_input: Whether it is given something new.
        """
        if request.conversation_id is None or self.is_ledger_away:
            return None
        self._wait_until_written(lambda turn: turn.conversation.id == request.conversation_id)
        try:
            return forked_from(self.ledger, request, checkpoint_id, has_input=has_input)
        except LedgerError as error:
            self.note_ledger_away(error)
            return None

    def visit(self, carriers: Iterable[Mapping[str, Any] | None]) -> Turn | None:
        """Find the turn of another process that a run belongs to, where it may travel (``propagate=True``).

        Args:
            carriers: Where its ids may stand: headers by lower-case names, and None for what is current here.
        """
        if not self.propagate:
            return None
        for carrier in carriers:
            found = tags_in(carrier)
            if found is not None:
                return visited(self._tracker, *found)
        return None

    def _went_on(self, turn: Turn) -> Turn:
        self._turns[turn.id] = turn
        self._sittings.went_on(turn.conversation.session)
        return turn

    def _wait_until_written(self, is_meant: Callable[[Turn], bool]) -> None:
        if not self.is_ledger_away and any(is_meant(turn) for turn in list(self._finishing.values())):
            self._writer.drain(_WRITTEN_S)

    @property
    def _tracker(self) -> "SessionTracker":
        return cast("SessionTracker", self)

    # --- what ends ----------------------------------------------------------------------------------------------------
    def finish(self, turn: Turn, status: str, ended_ns: int) -> None:
        """Have a turn that has ended written down. Called by `Turn.end`."""
        self._finishing[turn.id] = turn
        if self._turns.get(turn.id) is turn:  # not when the same was taken up here again
            del self._turns[turn.id]
        if turn.is_lost or not self._writer.submit(FinishTurn(turn, status, ended_ns)):
            self.finished(turn)

    def finished(self, turn: Turn) -> None:
        """Note that the end of a turn is written, or cannot be. Called by the writer."""
        if self._finishing.get(turn.id) is turn:
            del self._finishing[turn.id]

    def holds(self, turn_id: str) -> bool:
        """Tell whether a turn runs in this process, or its end is still to be written."""
        return turn_id in self._turns or turn_id in self._finishing

    def settle(self, turn: Turn) -> None:
        """Have the steps of a turn that have ended written down while it goes on."""
        if not turn.is_lost:
            self._writer.submit(SettleTurn(turn))
