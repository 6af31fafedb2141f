"""The turn that runs here: inside a node, a tool, or a turn's block."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, cast

from turntrace.attributes import AttributeValue
from turntrace.current import current_scope, enter, leave
from turntrace.lifecycle.journey import NoJourney
from turntrace.lifecycle.steps import OpenStep
from turntrace.lifecycle.turn import Turn


class _NoTurn:
    """Stands for the turn where none runs, as in an app's own unit tests: takes everything and does nothing."""

    id = ""
    number = 0
    intent = None
    is_finished = True
    tags: Mapping[str, AttributeValue] = MappingProxyType({})

    @property
    def input(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    @property
    def config(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "<no turn>"

    def set_intent(self, intent: str) -> None:
        """Do nothing."""

    def set_answer(self, message: Any) -> None:
        """Do nothing."""

    def feedback(self, value: float | bool, name: str = "", comment: str | None = None) -> None:
        """Do nothing."""

    def journey(self, name: str, stages: Any = None) -> NoJourney:
        """Return a journey that takes everything and does nothing."""
        return NoJourney()

    def end(self, status: str = "completed", *, error: BaseException | None = None) -> None:
        """Do nothing."""

    async def aend(self, status: str = "completed", *, error: BaseException | None = None) -> None:
        """Do nothing."""


_NO_TURN: Final = cast(Turn, _NoTurn())


def current_turn() -> Turn:
    """Return the turn that runs here: inside a node, a tool, or a turn's block.

    Where no turn runs, as in an app's own unit tests, something that is false and takes the same calls without doing
    anything is returned, so that a node needs no ``if``.
    """
    scope = current_scope()
    turn = None if scope is None else scope.turn
    return turn if isinstance(turn, Turn) else _NO_TURN


@contextmanager
def current_step(turn: Turn, step: OpenStep) -> Iterator[None]:
    """Make a step's span current for the time of a block, unless it is already."""
    scope = current_scope()
    if scope is not None and scope.step is step:
        yield
        return
    entered = enter(turn, step)
    try:
        yield
    finally:
        leave(*entered)
