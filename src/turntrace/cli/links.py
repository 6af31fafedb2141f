"""Where sessions are in Langfuse."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from turntrace.cli.render import safe, working
from turntrace.errors import DeliveryError, TurntraceError
from turntrace.settings import read_langfuse_settings

if TYPE_CHECKING:
    from turntrace.report import LangfusePlace


def langfuse_place() -> "LangfusePlace | None":
    """Return where the sessions' pages in Langfuse are; None without keys, or when it does not answer."""
    settings = read_langfuse_settings()
    if not settings.has_keys:
        return None
    from turntrace.export import LangfuseServer
    from turntrace.report import LangfusePlace

    server = LangfuseServer(settings)
    try:
        project = server.project_id()
    except (DeliveryError, LookupError, TypeError):
        return None
    finally:
        server.close()
    return None if project is None else LangfusePlace(settings.server, project)


def say_where(console: Console, session_ids: Sequence[str]) -> None:
    """Say where sessions are in Langfuse, or how to get there; nothing without Langfuse's keys."""
    try:
        settings = read_langfuse_settings()
        if not settings.has_keys:
            return
        with working("Asking Langfuse for its project"):
            place = langfuse_place()
    except TurntraceError as error:
        console.print(Text(f"in Langfuse: {safe(error)}", style="dim"), soft_wrap=True)
        return
    if place is not None:
        for session_id in session_ids:
            console.print(Text(f"in Langfuse: {safe(place.session_url(session_id))}", style="dim"), soft_wrap=True)
    else:
        words = f"in Langfuse: Sessions, by the session's id; {settings.server} did not say which project it is in"
        console.print(Text(safe(words), style="dim"), soft_wrap=True)
