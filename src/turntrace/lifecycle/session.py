"""A session, one sitting of a user, and the conversations in it."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from turntrace.errors import StateError
from turntrace.identity import check_id, check_text
from turntrace.lifecycle.feedback import FEEDBACK_NAME, PutFeedback
from turntrace.lifecycle.here import current_turn
from turntrace.lifecycle.journey import Journey
from turntrace.lifecycle.running import is_abandoning
from turntrace.lifecycle.turn import Turn
from turntrace.records import SessionFacts
from turntrace.summaries import SessionSummary

if TYPE_CHECKING:
    from turntrace.lifecycle.tracker import SessionTracker


class Session:
    """One sitting of a user. It is made by `SessionTracker.session` or `SessionTracker.start_session`.

    As a block it ends when the block is left: with the reason ``user_exit``, or ``error`` when an exception leaves it.

    Attributes:
        tracker: The tracker that it belongs to.
        facts: What is known of it from its start.
    """

    def __init__(self, tracker: "SessionTracker", facts: SessionFacts) -> None:
        self.tracker = tracker
        self.facts = facts

    def __repr__(self) -> str:
        return f"<Session {self.id!r}>"

    @property
    def id(self) -> str:
        """Id of the session."""
        return self.facts.id

    @property
    def user_id(self) -> str | None:
        """Hash of the user's id, None for an unknown user."""
        return self.facts.user_id

    def conversation(self, conversation_id: str | None = None, *, topic: str | None = None) -> "Conversation":
        """Begin or continue a conversation in this session.

        Args:
            conversation_id: Its id, which is LangGraph's ``thread_id``; a new one by default.
            topic: What it is about, safe to log.

        Raises:
            IdentityError: If the id or the topic cannot be used.
        """
        chosen = self.tracker.new_id() if conversation_id is None else check_id(conversation_id, "conversation_id")
        return Conversation(self, chosen, None if topic is None else check_text(topic, "topic"))

    def journey(self, name: str, stages: Sequence[str] | None = None) -> Journey:
        """Begin or continue a journey of the user.

        Args:
            name: Its name.
            stages: Its stages, in order. Default: those that the tracker was given, or that the journey began with.

        Raises:
            ConfigurationError: If the stages cannot be used, or are nowhere said.
            LedgerError: If the ledger is asked for them and cannot be read.
        """
        return Journey(self, check_text(name, "name"), self.tracker.stages_of(self, name, stages))

    def feedback(self, value: float | bool, name: str = FEEDBACK_NAME, comment: str | None = None) -> None:
        """Give feedback on the whole sitting. Nobody waits for it to be written.

        Args:
            value: True, False, or a number from 0 to 1.
            name: Its name; feedback of the same name on the same session replaces it.
            comment: What the user said; it leaves only as far as the content policy allows.

        Raises:
            ConfigurationError: If the value cannot be used.
        """
        self.tracker.submit(PutFeedback(self.tracker, self.id, None, value, name, comment))

    def running_turn(self) -> Turn | None:
        """Return the turn of this session that runs here, or None."""
        turn = current_turn()
        return turn if turn and turn.conversation.session.id == self.id else None

    def end(self, reason: str = "user_exit") -> None:
        """End the session; ending it again does nothing. Nobody waits for it to be written.

        Args:
            reason: ``user_exit``, ``completed``, ``inactive_timeout``, ``error``, ``handoff``, ``shutdown``, or a word
                of the app's own.

        Raises:
            IdentityError: If the reason is not a string of 1 to 200 characters.
        """
        self.tracker.end_session(self.id, reason)

    async def aend(self, reason: str = "user_exit") -> None:
        """End the session, as `end` does, which does not wait either."""
        self.end(reason)

    def summary(self) -> SessionSummary:
        """Return what the ledger knows of the session, once all that has ended is written down.

        Raises:
            StateError: If the ledger does not know the session any more.
        """
        found = self.tracker.session_summary(self.id)
        if found is None:
            raise StateError(f"The ledger has no session {self.id!r}: it was erased.")
        return found

    async def asummary(self) -> SessionSummary:
        """Return what `summary` returns, without blocking the event loop."""
        return await self.tracker.run_off_loop(self.summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self.end("user_exit" if error is None or is_abandoning(error) else "error")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.__exit__(kind, error, traceback)


class Conversation:
    """A topic or thread within a session; it may go on in a later one.

    Attributes:
        session: The session that it goes on in now.
        id: Its id, which is LangGraph's ``thread_id``.
        topic: What it is about, when that is known.
    """

    def __init__(self, session: Session, conversation_id: str, topic: str | None = None) -> None:
        self.session = session
        self.id = conversation_id
        self.topic = topic

    def __repr__(self) -> str:
        return f"<Conversation {self.id!r} of {self.session!r}>"

    def start_turn(self, message: Any = None, *, role: str = "user") -> Turn:
        """Begin a turn, which ends with `Turn.end`.

        Args:
            message: What the user said: a text, or a message in any form that LangGraph takes; None when the agent
                begins the exchange. Of it only length and kind are recorded unless the content policy allows more.
            role: ``user``, or ``assistant`` when the agent began the exchange.

        While the ledger cannot be written the turn begins all the same; it is written down, and given its number, when
        the ledger is back.

        Raises:
            StateError: If the role is neither.
        """
        if role not in ("user", "assistant"):
            raise StateError(f"The role of a turn cannot be {role!r:.40}. Allowed are user and assistant.")
        return self.session.tracker.start_turn(self, message, role=role)

    def turn(self, message: Any = None, *, role: str = "user") -> "TurnBlock":
        """Give the block of a turn: ``with conversation.turn("Hello") as turn:``, or the same with ``async with``.

        Takes what `start_turn` takes. The turn begins and ends with the block. Within it every run of a graph joins
        the turn, also one that is given neither callback nor config.
        """
        return TurnBlock(self, message, role)

    def resume_turn(self) -> Turn:
        """Go on with the turn of this conversation that waits for a person, in this process or after another.

        It is the same turn and the same trace; the time that was waited is counted apart::

            with conversation.resume_turn() as turn:
                graph.invoke(Command(resume="yes"), turn.config)

        Raises:
            StateError: If no turn of the conversation waits.
            LedgerError: If the ledger cannot be written.
        """
        turn = self.session.tracker.resume_newest(self.id)
        if turn is None:
            raise StateError(
                f"No turn of the conversation {self.id!r} waits for a person. A new one begins with "
                "conversation.turn(...) or conversation.start_turn(...)."
            )
        return turn

    async def aresume_turn(self) -> Turn:
        """Go on with the turn that waits, as `resume_turn` does, without blocking the event loop."""
        return await self.session.tracker.run_off_loop(self.resume_turn)

    async def astart_turn(self, message: Any = None, *, role: str = "user") -> Turn:
        """Begin a turn, as `start_turn` does, without blocking the event loop while the ledger is asked."""
        begun: list[Turn] = []
        left = threading.Event()

        def begin() -> Turn:
            begun.append(self.start_turn(message, role=role))
            if left.is_set():
                begun[0].end("abandoned")
            return begun[0]

        try:
            return await self.session.tracker.run_off_loop(begin)
        except asyncio.CancelledError:  # the thread goes on and begins it all the same
            left.set()
            for turn in begun:
                turn.end("abandoned")
            raise


class TurnBlock:
    """The block of a turn: it begins when the block is entered and ends when it is left."""

    def __init__(self, conversation: Conversation, message: Any, role: str) -> None:
        self._conversation = conversation
        self._message = message
        self._role = role
        self._turn: Turn | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"The turn has not begun, so it has no {name!r} yet. Write: with conversation.turn(...) as turn: "
            "or, without a block, turn = conversation.start_turn(...) and in the end turn.end()."
        )

    def __enter__(self) -> Turn:
        self._turn = self._conversation.start_turn(self._message, role=self._role)
        return self._turn.__enter__()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._turn is not None:
            self._turn.__exit__(kind, error, traceback)

    async def __aenter__(self) -> Turn:
        self._turn = await self._conversation.astart_turn(self._message, role=self._role)
        return self._turn.__enter__()

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.__exit__(kind, error, traceback)


class SessionBlock:
    """The block of a session: it begins when the block is entered and ends when it is left."""

    def __init__(self, start: Callable[[], Session], astart: Callable[[], Awaitable[Session]]) -> None:
        self._start = start
        self._astart = astart
        self._session: Session | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"The session has not begun, so it has no {name!r} yet. Write: with tracker.session(...) as session: "
            "or, without a block, session = tracker.start_session(...) and in the end session.end()."
        )

    def __enter__(self) -> Session:
        self._session = self._start()
        return self._session

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._session is not None:
            self._session.__exit__(kind, error, traceback)

    async def __aenter__(self) -> Session:
        self._session = await self._astart()
        return self._session

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.__exit__(kind, error, traceback)
