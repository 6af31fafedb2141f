"""The tracker: begins sessions and turns, and has what ends written down."""

import asyncio
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from opentelemetry import trace

from turntrace.boundary import never_breaks, off_watched_loop
from turntrace.content import ContentLevel, ContentPolicy, classify_input
from turntrace.errors import ConfigurationError
from turntrace.export import Pace, SpanTarget, open_target
from turntrace.forking import at_exit, in_child, lock_of
from turntrace.identity import check_id, check_text, new_id
from turntrace.lifecycle.asking import Afterwards
from turntrace.lifecycle.checks import (
    UserHasher,
    checked_classifier,
    checked_dropoff,
    checked_flag,
    checked_function,
    checked_provider,
    checked_timeout,
    checked_type,
    hash_key_of,
    idle_ns_of,
    outbox_bytes_of,
    text_or_none,
    with_stand_in,
)
from turntrace.lifecycle.dropoff import DropoffFacts, is_dropoff
from turntrace.lifecycle.evaluating import Evaluator, Evaluators
from turntrace.lifecycle.journey import checked_journeys, checked_stages
from turntrace.lifecycle.sending import Sending
from turntrace.lifecycle.session import Session, SessionBlock
from turntrace.lifecycle.sittings import Sittings
from turntrace.lifecycle.sweep import Sweeper
from turntrace.lifecycle.turns import Turns
from turntrace.lifecycle.windows import Windows
from turntrace.lifecycle.writer import Job, time_left
from turntrace.records import SessionFacts
from turntrace.settings import read_settings
from turntrace.summaries import SessionSummary

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from turntrace.lifecycle.turn import Turn

_STOP_S: Final = 30.0


class SessionTracker(Turns, Afterwards):
    """Begins sessions and turns, numbers them, and has them written down.

    One tracker serves all requests of a process, from any thread and event loop. It keeps a ledger of what happened
    (see `turntrace.ledger`) and sends spans to Langfuse when its keys are set; without keys they wait in the ledger.

    Args:
        ledger: Where the ledger is: a SQLAlchemy URL or engine. Default: ``TURNTRACE_LEDGER_URL``, else a SQLite file
            in the user's data folder. ``"sqlite://"`` keeps it in memory.
        content: What of the content is recorded: a `ContentPolicy` or its level. Default: ``TURNTRACE_CONTENT``, else
            ``metadata``, which records lengths, types and counts only.
        idle_after: Silence after which the next turn begins a new session: seconds or a `timedelta`. Default:
            ``TURNTRACE_IDLE_AFTER``, else 30 minutes.
        user_hash_key: Secret key for hashing user ids. Default: ``TURNTRACE_USER_HASH_KEY``, else a random one that
            is made once and kept in the ledger.
        channel: Channel of sessions that are given none. Default: ``TURNTRACE_CHANNEL``, else ``unknown``.
        tracer_provider: The app's own OpenTelemetry provider. Default: the one that Langfuse's client uses, or the one
            set for the process.
        outbox: Whether spans go into the ledger's outbox, from where they are sent to Langfuse. Default: unless
            the app's own provider or client sends them.
        outbox_max_mb: How many megabytes may wait there; beyond it the oldest are dropped, which is logged. Default:
            ``TURNTRACE_OUTBOX_MAX_MB``, else 512.
        pace: How long the sender waits for what.
        propagate: Whether turns travel to other servers: what runs inside a turn has its ids as W3C baggage, which an
            instrumented HTTP client sends along, and a run that another server asked for joins the turn that it came
            with. Default: ``TURNTRACE_PROPAGATE``, else no: ids leave the process in spans only, and none that comes
            from outside is believed.
        journeys: The journeys of the app: from their names to their stages, in order.
        dropoff: Says of a session that has ended whether it is a drop-off. Default: `turntrace.lifecycle.dropoff`'s.
        evaluators: Functions from the `SessionSummary` of a session that has ended to named scores, sync or async.
        evaluator_timeout: Seconds that one of them may take for a session.
        sweep_every: Seconds from one sweep to the next (see `sweep`), by a thread of this tracker's. Default: none.
        classify: Says what kind of message a user's is (``turn.input_type``). Default: a rule, see
            `turntrace.content.classify_input`.
        clock: Tells the time in nanoseconds since 1970.
        ids: Makes ids of 32 hexadecimal digits.

    Raises:
        ConfigurationError: If an argument or an environment variable cannot be used.
        LedgerError: If the ledger cannot be opened.
    """

    callback_factory: ClassVar[Callable[["SessionTracker"], Any] | None] = None
    """Makes the callback handler of a tracker; set by `turntrace.graph`, which this floor does not know."""

    def __init__(
        self,
        ledger: "str | Engine | None" = None,
        *,
        content: ContentPolicy | ContentLevel | None = None,
        idle_after: float | timedelta | None = None,
        user_hash_key: str | bytes | None = None,
        channel: str | None = None,
        tracer_provider: trace.TracerProvider | None = None,
        outbox: bool | None = None,
        outbox_max_mb: float | None = None,
        pace: Pace | None = None,
        propagate: bool | None = None,
        journeys: Mapping[str, Sequence[str]] | None = None,
        dropoff: Callable[[DropoffFacts], bool] = is_dropoff,
        evaluators: Sequence[Evaluator] = (),
        evaluator_timeout: float = 10.0,
        sweep_every: float | None = None,
        classify: Callable[[str], str] = classify_input,
        clock: Callable[[], int] = time.time_ns,
        ids: Callable[[], str] = new_id,
    ) -> None:
        from turntrace.ledger import Ledger  # with SQLAlchemy, which whoever only imports turntrace does without

        settings = read_settings()
        level = settings.content if content is None else content
        self.content = level if isinstance(level, ContentPolicy) else ContentPolicy(level)
        self.idle_ns = idle_ns_of(settings.idle_after if idle_after is None else idle_after)
        named = (settings.channel, "TURNTRACE_CHANNEL") if channel is None else (channel, "channel")
        self.channel = check_text(*named)
        self.propagate = settings.propagate if propagate is None else checked_flag(propagate, "propagate")
        self.classify = checked_classifier(classify)
        self._dropoff = checked_dropoff(dropoff)
        self._stages = checked_journeys(journeys)
        self.clock = with_stand_in(
            checked_function(clock, "clock", "without arguments that returns nanoseconds since 1970"),
            time.time_ns,
            "telling the time by clock=... (the system's is taken instead)",
        )
        self.new_id = with_stand_in(
            checked_function(ids, "ids", "without arguments that returns an id of 32 hexadecimal digits"),
            new_id,
            "making an id by ids=... (a random one is taken instead)",
        )
        self.ledger = off_watched_loop(lambda: Ledger(settings.ledger if ledger is None else ledger))
        hash_key = off_watched_loop(lambda: hash_key_of(user_hash_key, settings.user_hash_key, self.ledger))
        self._hasher = UserHasher(hash_key)
        to_outbox = None if outbox is None else checked_flag(outbox, "outbox")
        provider = checked_provider(tracer_provider)
        self.target: SpanTarget = off_watched_loop(lambda: open_target(provider, outbox=to_outbox))
        max_bytes = outbox_bytes_of(settings.outbox_max_mb if outbox_max_mb is None else outbox_max_mb)
        self._sending = Sending(self.ledger, self.target, max_bytes, pace)
        self._writer = self._sending.writer
        self.ledger.settle = self._writer.settle  # whoever asks the ledger sees all that has ended
        self._sittings = Sittings(self, self._writer)
        self.windows = Windows()
        Turns.__init__(self)
        self._forgotten: dict[str, int] = {}
        self._handler: Any = None
        self._lock = lock_of(self)
        self._is_shut_down = False
        weak = weakref.ref(self)
        at_exit(lambda: None if (alive := weak()) is None else alive._at_exit())
        self._evaluators = Evaluators(self, evaluators, evaluator_timeout)
        self._sweeper = None if sweep_every is None else Sweeper(self, sweep_every)
        if self._sweeper is not None:
            self._sweeper.start()
            in_child(self._sweeper.start_in_child)

    def __repr__(self) -> str:
        return f"<SessionTracker on {self.ledger.url}>"

    # --- sessions -----------------------------------------------------------------------------------------------------
    def start_session(
        self,
        *,
        user_id: str | int | None = None,
        session_id: str | None = None,
        channel: str | None = None,
        session_type: str = "chat",
        tier: str | None = None,
        org_id: str | None = None,
        locale: str | None = None,
        client_version: str | None = None,
    ) -> Session:
        """Begin a session, which ends with `Session.end`.

        While the ledger cannot be written it begins all the same, and is written down when the ledger is back.

        Args:
            user_id: The user's id; only its hash is kept. None for an unknown user.
            session_id: Its id. The session of that id is continued, also when it had ended. Default: a new one.
            channel: Where the user is: web, mobile, api, slack, ... Default: the tracker's.
            session_type: ``chat``, ``api`` or ``batch``.
            tier: The user's tier, safe to log.
            org_id: The user's organisation, safe to log.
            locale: Language and region, as ``de-AT``.
            client_version: Version of the client.

        Raises:
            IdentityError: If an id or a text cannot be used.
            ConfigurationError: If the type is unknown.
        """
        wanted = SessionFacts(
            id=self.new_id() if session_id is None else check_id(session_id, "session_id"),
            user_id=None if user_id is None else self.hash_user(user_id),
            channel=self.channel if channel is None else check_text(channel, "channel"),
            type=checked_type(session_type),
            tier=text_or_none(tier, "tier"),
            org_id=text_or_none(org_id, "org_id"),
            locale=text_or_none(locale, "locale"),
            client_version=text_or_none(client_version, "client_version"),
            started_ns=self.clock(),
        )
        return self._sittings.open(wanted, given_id=True)

    def session(self, **facts: Any) -> SessionBlock:
        """Give the block of a session: ``with tracker.session(user_id=...) as session:``, or with ``async with``.

        Takes what `start_session` takes. The session begins with the block and ends when it is left: with the reason
        ``user_exit``, or ``error`` when an exception leaves it.
        """
        return SessionBlock(lambda: self.start_session(**facts), lambda: self.astart_session(**facts))

    async def astart_session(self, **facts: Any) -> Session:
        """Begin a session, as `start_session` does, without blocking the event loop while the ledger is asked."""
        return await self.run_off_loop(self.start_session, **facts)

    def end_session(self, session_id: str, reason: str = "user_exit") -> None:
        """End a session by its id; ending it again does nothing. Nobody waits for it to be written.

        Args:
            session_id: Its id.
            reason: As for `Session.end`.

        Raises:
            IdentityError: If the id or the reason cannot be used.
        """
        self._sittings.end(check_id(session_id, "session_id"), check_text(reason, "reason"))

    def hash_user(self, user_id: str | int) -> str:
        """Return the hash that stands for a user in the ledger and in Langfuse.

        Raises:
            IdentityError: If the id is empty or not a string or number.
        """
        return self._hasher(user_id)

    def stages_of(self, session: Session, name: str, stages: Sequence[str] | None) -> tuple[str, ...]:
        """Return the stages of a journey: those given, those of the tracker, or those that it began with.

        Raises:
            ConfigurationError: If they cannot be used, or are nowhere said.
        """
        if stages is not None:
            self._stages[name] = checked_stages(name, stages)
        known = self._stages.get(name)
        if known is None:
            begun = off_watched_loop(lambda: self.ledger.journey(session.user_id, session.id, name, settled=False))
            if begun is not None:
                known = self._stages[name] = begun.stages
        if known is None:
            raise ConfigurationError(
                f"The stages of the journey {name!r} are not known. Say them where it begins: "
                f"session.journey({name!r}, stages=[...]), or for all: SessionTracker(journeys={{{name!r}: [...]}})."
            )
        return known

    def is_dropoff(self, facts: DropoffFacts) -> bool:
        """Tell whether a session that has ended is a drop-off, by the rule of this tracker."""
        found = never_breaks("deciding on a drop-off by dropoff=...", exits=True)(self._dropoff)(facts)
        return is_dropoff(facts) if found is None else bool(found)

    def evaluate(self, session: SessionSummary) -> None:
        """Have a session that has ended evaluated."""
        self._evaluators.submit(session)

    def forget_sessions(self, session_ids: Sequence[str]) -> None:
        """Let no run fall into sessions that were erased."""
        self._forgotten.update(dict.fromkeys(session_ids, self.clock()))
        self._sittings.forget(session_ids)

    def is_forgotten(self, turn: "Turn") -> bool:
        """Tell whether the session of a turn was erased by this process since the turn began."""
        return turn.started_ns <= self._forgotten.get(turn.conversation.session.id, -1)

    # --- what is written down -----------------------------------------------------------------------------------------
    def submit(self, job: Job) -> bool:
        """Have something written down soon; returns at once, and tells whether it will be (see `Writer.submit`)."""
        return self._writer.submit(job)

    def flush_writer(self) -> bool:
        """Wait until all that has ended is in the ledger; tell whether it is."""
        return self._writer.drain(_STOP_S)

    def use(self, handler: Any) -> None:
        """Use a handler for the turns' configs and blocks, unless there is one: the first that an app makes."""
        with self._lock:
            if self._handler is None:
                self._handler = handler

    def callbacks(self) -> list[Any]:
        """Return what goes into a config's ``callbacks``: one handler, the same each time."""
        with self._lock:
            handler = self._handler
        if handler is None and SessionTracker.callback_factory is None:
            import_module("turntrace.graph")  # which knows the callback, and which nobody may have loaded yet
        if handler is None and SessionTracker.callback_factory is not None:
            self.use(SessionTracker.callback_factory(self))
            handler = self._handler
        return [] if handler is None else [handler]

    # --- the end ------------------------------------------------------------------------------------------------------
    def flush(self, timeout: float | None = 30.0) -> bool:
        """Wait until all that has ended is in the ledger, and have it sent, unless Langfuse takes nothing now.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            Whether all is in the ledger; what cannot be sent waits there.

        Raises:
            ConfigurationError: If the timeout is no number of seconds.
        """
        left = time_left(checked_timeout(timeout))
        if self._evaluators.are_any:
            self._writer.drain(left())
            self._evaluators.drain(left())
        return self._sending.flush(left())

    async def aflush(self, timeout: float | None = 30.0) -> bool:
        """Do what `flush` does, without blocking the event loop."""
        return await asyncio.to_thread(self.flush, timeout)

    def shutdown(self, *, end_sessions: bool = False) -> None:
        """Write down all that has ended and close the ledger.

        Sessions stay open, and a later process goes on with them, unless they are to be ended.

        Args:
            end_sessions: Whether the open sessions that this process began or went on with end now, with the reason
                ``shutdown``.
        """
        if self._sweeper is not None:
            self._sweeper.stop(_STOP_S)
        if end_sessions:
            for session_id in self._sittings.used():
                self.end_session(session_id, "shutdown")
        self.flush()
        self._sending.stop(_STOP_S)
        self.ledger.close()
        self._is_shut_down = True

    def _at_exit(self) -> None:
        if not self._is_shut_down:
            self.flush(self._writer.time_to_exit())
            self._sending.stop(self._writer.time_to_exit())

    async def ashutdown(self, *, end_sessions: bool = False) -> None:
        """Do what `shutdown` does, without blocking the event loop."""
        await asyncio.to_thread(self.shutdown, end_sessions=end_sessions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.ashutdown()
