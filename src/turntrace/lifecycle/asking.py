"""What can be asked of a tracker and told to it afterwards: summaries, feedback, erasing, the sweep."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from turntrace.errors import StateError
from turntrace.identity import check_id
from turntrace.lifecycle.checks import checked_time, idle_ns_of
from turntrace.lifecycle.erasing import Forgotten, forget_before, forget_user
from turntrace.lifecycle.feedback import FEEDBACK_NAME, PutFeedback
from turntrace.lifecycle.sweep import Swept, sweep
from turntrace.summaries import SessionSummary, UserSummary

if TYPE_CHECKING:
    from turntrace.ledger import Ledger
    from turntrace.lifecycle.tracker import SessionTracker

R = TypeVar("R")


class Afterwards:
    """The part of a tracker that looks at what is on record."""

    ledger: "Ledger"
    idle_ns: int
    clock: Callable[[], int]
    hash_user: Callable[[str | int], str]

    # --- summaries ----------------------------------------------------------------------------------------------------
    def session_summary(self, session_id: str) -> SessionSummary | None:
        """Return what the ledger knows of a session, once all that has ended is written down; None if it has none.

        Raises:
            IdentityError: If it is no id that a session can have.
        """
        return self.ledger.session(check_id(session_id, "session_id"))

    async def asession_summary(self, session_id: str) -> SessionSummary | None:
        """Return what `session_summary` returns, without blocking the event loop."""
        return await self.run_off_loop(self.session_summary, session_id)

    def user_summary(self, user_id: str | int) -> UserSummary | None:
        """Return what the ledger knows of a user over all sessions; None if it has none.

        Args:
            user_id: The user's id; it is hashed, and found by its hash.

        Raises:
            IdentityError: If the id is empty or not a string or number.
        """
        return self.ledger.user(self.hash_user(user_id))

    async def auser_summary(self, user_id: str | int) -> UserSummary | None:
        """Return what `user_summary` returns, without blocking the event loop."""
        return await self.run_off_loop(self.user_summary, user_id)

    # --- feedback -----------------------------------------------------------------------------------------------------
    def feedback(
        self,
        value: float | bool,
        *,
        turn_id: str | None = None,
        session_id: str | None = None,
        name: str = FEEDBACK_NAME,
        comment: str | None = None,
    ) -> None:
        """Give feedback on a turn or a session by its id, also later and from another process.

        Args:
            value: True, False, or a number from 0 to 1.
            turn_id: The turn; it stands in the graph's state, and as `Turn.id`.
            session_id: The session, for feedback on the whole sitting.
            name: Its name; feedback of the same name on the same subject replaces it.
            comment: What the user said; it leaves only as far as the content policy allows.

        Raises:
            StateError: If not exactly one of the ids is given, or the ledger does not know it.
            ConfigurationError: If the value cannot be used.
        """
        if (turn_id is None) == (session_id is None):
            raise StateError(
                "feedback needs the id of what it is about: exactly one of turn_id=... and session_id=... ."
            )
        turn: tuple[str, str] | None = None
        if turn_id is not None:
            found = self.ledger.turn(check_id(turn_id, "turn_id"))
            if found is None:
                raise StateError(f"The ledger has no turn {turn_id!r}: pass the id of one of its turns.")
            session_id, turn = found.session_id, (found.id, found.trace_id or "")
        elif session_id is not None and self.ledger.session(check_id(session_id, "session_id")) is None:
            raise StateError(f"The ledger has no session {session_id!r}: pass the id of one of its sessions.")
        tracker = cast("SessionTracker", self)
        tracker.submit(PutFeedback(tracker, str(session_id), turn, value, name, comment))

    async def afeedback(self, value: float | bool, **about: Any) -> None:
        """Give feedback, as `feedback` does, without blocking the event loop while the ledger is asked."""
        await self.run_off_loop(self.feedback, value, **about)

    # --- the sweep ----------------------------------------------------------------------------------------------------
    def sweep(self, now: int | None = None, *, idle_after: float | timedelta | None = None) -> Swept:
        """End the sessions that have been silent too long, and close turns whose process died.

        Each is ended once, however many workers sweep at once. A session ends at the time when it had been silent for
        long enough. A turn is closed as ``abandoned`` when it has not ended and its session was silent as long.

        Args:
            now: The time, in nanoseconds since 1970. Default: the tracker's clock.
            idle_after: Silence in seconds, or a `timedelta`. Default: the tracker's.

        Raises:
            ConfigurationError: If the time or the idle time cannot be used.
            LedgerError: If the ledger cannot be written.
        """
        idle_ns = self.idle_ns if idle_after is None else idle_ns_of(idle_after)
        return sweep(cast("SessionTracker", self), self.clock() if now is None else checked_time(now), idle_ns)

    async def asweep(self, now: int | None = None, *, idle_after: float | timedelta | None = None) -> Swept:
        """Do what `sweep` does, without blocking the event loop."""
        return await self.run_off_loop(self.sweep, now, idle_after=idle_after)

    # --- erasing ------------------------------------------------------------------------------------------------------
    def forget_user(self, user_id: str | int) -> Forgotten:
        """Erase a user from the ledger and from what waits to be sent.

        What Langfuse has been sent stays there: what is returned says which sessions and which user to delete.

        Args:
            user_id: The user's id.

        Raises:
            IdentityError: If the id is empty or not a string or number.
            LedgerError: If the ledger cannot be written.
        """
        return forget_user(cast("SessionTracker", self), self.hash_user(user_id))

    def forget_before(self, before: datetime | timedelta) -> int:
        """Erase the sessions from the ledger that ended before a time, with all that belongs to them, as for retention.

        What Langfuse was sent is not touched, nor what waits to be sent. A conversation goes with its last turn: should
        it go on, its turns are numbered from 1 again.

        Args:
            before: The time (UTC where it has no zone), or how long ago: ``timedelta(days=90)``.

        Returns:
            How many sessions were erased.

        Raises:
            ConfigurationError: If it is neither.
            LedgerError: If the ledger cannot be written.
        """
        return forget_before(cast("SessionTracker", self), before)

    async def aforget_user(self, user_id: str | int) -> Forgotten:
        """Do what `forget_user` does, without blocking the event loop."""
        return await self.run_off_loop(self.forget_user, user_id)

    async def run_off_loop(self, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
        """Run a function that asks the ledger in a thread, so that the event loop goes on."""
        return await asyncio.to_thread(function, *args, **kwargs)
