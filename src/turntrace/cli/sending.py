"""``turntrace export``: sends what waits in the outbox, and shows what does."""

import time
from datetime import UTC, datetime
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from turntrace.cli.progress import WatchedProgress
from turntrace.cli.render import duration, safe, stdout
from turntrace.errors import ConfigurationError
from turntrace.export import Delivered, LangfuseServer, Outcome, Pace, Sender, Sent
from turntrace.ledger import Ledger
from turntrace.settings import read_langfuse_settings
from turntrace.waiting import OutboxStatus, Waiting

SENT_ALL: Final = 0
SOMETHING_WAITS: Final = 1
_LOOK_S: Final = 1.0
_TRIES: Final = 4
"""How often a server that takes nothing is asked before the command gives up; the pause grows each time."""


def send(ledger: Ledger, *, watch: bool, again: bool) -> int:
    """Send what waits, and return the exit code.

    Args:
        ledger: The ledger.
        watch: Whether to go on, and send what comes.
        again: Whether to try what was set apart again.

    Raises:
        ConfigurationError: If there are no keys of Langfuse's.
    """
    settings = read_langfuse_settings()
    if not settings.has_keys:
        raise ConfigurationError(
            "There is no Langfuse to send to: set LANGFUSE_PUBLIC_KEY, LANGFUSE_SECRET_KEY and LANGFUSE_BASE_URL "
            "(turntrace export --status shows what waits)."
        )
    if again:
        ledger.to_send.try_again()
    sender = Sender(ledger.to_send, LangfuseServer(settings))
    try:
        with _progress(ledger.to_send.status()) as progress:
            sent, refused = _send_all(sender, ledger, progress, watch=watch)
    finally:
        sender.stop(0)
    console = stdout()
    status = ledger.to_send.status()
    console.print(Text(f"Sent {sent:,} spans and scores to {safe(sender.server.url)}."), soft_wrap=True)
    if refused:
        console.print(Text(f"{refused:,} were refused and set apart: turntrace export --status says why."))
    if status.is_empty:
        console.print(Text("Nothing waits."))
        return SENT_ALL
    why = "" if sender.failing is None else f": {safe(sender.failing.words)}"
    console.print(Text(f"{_count(status)} wait{why}"), soft_wrap=True)
    if sender.failing is not None and sender.failing.outcome is Outcome.CLOSED:
        console.print(Text("The keys or the address are not right: turntrace doctor says which."))
    return SOMETHING_WAITS


class _Totals:
    """What was sent and what was refused, so far."""

    items = refused = 0


def _send_all(sender: Sender, ledger: Ledger, progress: Progress, *, watch: bool) -> tuple[int, int]:
    totals = _Totals()
    try:
        _send_until_done(sender, ledger, progress, totals, watch=watch)
    except KeyboardInterrupt:
        if not watch:
            raise
    return totals.items, totals.refused


def _send_until_done(sender: Sender, ledger: Ledger, progress: Progress, totals: _Totals, *, watch: bool) -> None:
    task, pace, failures = progress.task_ids[0], Pace(), 0

    def note(done: Delivered) -> None:
        totals.items += done.items
        totals.refused += len(done.refused)
        progress.advance(task, done.items + len(done.refused))

    while True:
        sent = sender.send_waiting(on_sent=note)
        failures = failures + 1 if sent.stopped_by is not None and not sent.items else 0
        if not watch and (sent.is_all or _gives_up(sent, failures)):
            return
        if sent.busy_s > 0:
            progress.update(task, description="another process is sending")
        elif sent.stopped_by is not None:
            progress.update(task, description=f"waiting: {safe(sent.stopped_by.words)[:40]}")
        time.sleep(_LOOK_S if sent.stopped_by is None else pace.delay(failures, sent.stopped_by))
        status = ledger.to_send.status()
        left = status.spans.items + status.scores.items
        progress.update(task, description="sending", total=progress.tasks[0].completed + left)


def _gives_up(sent: Sent, failures: int) -> bool:
    if sent.stopped_by is None:
        return False
    return sent.stopped_by.outcome is Outcome.CLOSED or failures >= _TRIES


def _progress(status: OutboxStatus) -> Progress:
    progress = WatchedProgress(
        TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn()
    )
    progress.add_task("sending", total=status.spans.items + status.scores.items)
    return progress


def show_status(console: Console, status: OutboxStatus, *, ledger_url: str) -> None:
    """Show what waits, what was set apart and why, and how old the oldest is."""
    for name, waiting in (("spans", status.spans), ("scores", status.scores)):
        console.print(Text(f"{name} that wait   ".ljust(20) + _line(waiting)), soft_wrap=True)
    if status.oldest_ns is not None:
        at = datetime.fromtimestamp(status.oldest_ns / 1e9, UTC)
        age = duration(max(0.0, time.time_ns() - status.oldest_ns) / 1e6)
        console.print(Text("oldest".ljust(20) + f"{at:%Y-%m-%d %H:%M:%S} UTC, {age} ago"), soft_wrap=True)
    apart = sum(items for _, items in status.refused)
    console.print(Text("set apart".ljust(20) + f"{apart:,}"))
    for why, items in status.refused:
        console.print(Text(f"  {items:,}: {safe(why)}"), soft_wrap=True)
    if status.refused:
        console.print(Text("  turntrace export --again sends these once more"), soft_wrap=True)
    if status.dropped:
        console.print(Text("dropped".ljust(20) + f"{status.dropped:,}, since more waited than outbox_max_mb allows"))
    console.print(Text(f"\nThe ledger: {safe(ledger_url)}"), soft_wrap=True)


def _line(waiting: Waiting) -> str:
    return f"{waiting.items:,}" + (f"  ({waiting.size / 1e6:,.1f} MB)" if waiting.items else "")


def _count(status: OutboxStatus) -> str:
    return f"{status.spans.items:,} spans and {status.scores.items:,} scores"
