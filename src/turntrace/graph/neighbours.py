"""Other handlers beside ours: what makes the same spans once more is said once."""

import logging
from typing import Any, Final

from langgraph.config import get_config

logger = logging.getLogger("turntrace")

_THEIRS: Final = "langfuse."


class Neighbours:
    """Looks for handlers of Langfuse's own beside ours, until one is found."""

    def __init__(self) -> None:
        self._said = False

    def look(self) -> None:
        """Look which handlers hear the run that is around this one, and say so when Langfuse's own does."""
        if self._said:
            return
        try:
            handlers: Any = getattr(get_config().get("callbacks"), "handlers", None) or ()
        except RuntimeError:  # outside of a graph
            return
        for handler in handlers:
            kind = type(handler)
            if kind.__module__.startswith(_THEIRS):
                self._said = True
                logger.warning(
                    "turntrace: Langfuse's own %s hears the same runs: each step is two spans, and Langfuse counts "
                    "the tokens and the cost twice. Remove one of both handlers: turntrace's makes all of the spans, "
                    "with the session on each.",
                    kind.__qualname__,
                )
                return


neighbours: Final = Neighbours()
"""One for the process, so that it is said once."""
