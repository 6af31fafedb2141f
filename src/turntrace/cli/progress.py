"""How far a command is, and what `turntrace replay` shows: lines that cannot be played, and what it came to."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from turntrace.cli.render import is_watched, money, safe, stderr
from turntrace.demo.replay import Totals
from turntrace.demo.transcripts import Line, Source


class WatchedProgress(Progress):
    """Shows on stderr how far something is where somebody watches, and nothing at all where nobody does.

    Args:
        *columns: What it shows, from left to right.
    """

    def __init__(self, *columns: ProgressColumn) -> None:
        console = stderr()
        super().__init__(*columns, console=console, transient=True, expand=True, disable=not is_watched(console))

    def stop(self) -> None:
        """Take it away; older versions of rich print an empty line here even where nothing was shown."""
        if not self.disable:
            super().stop()


class ReplayProgress:
    """Shows on stderr how far a replay is, where somebody watches, and names lines that cannot be played.

    Args:
        sources: What is replayed.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        sizes = [source.size for source in sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        self._progress = WatchedProgress(
            TextColumn("replaying"),
            BarColumn(bar_width=None),
            *([] if total is None else [TaskProgressColumn()]),
            TextColumn("{task.fields[lines]:,} lines"),
            TimeElapsedColumn(),
        )
        self._task = self._progress.add_task("", total=total, lines=0)
        self._lines = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def line_done(self, line: Line) -> None:
        """Note that a line is done."""
        self._lines += 1
        self._progress.update(self._task, advance=line.length, lines=self._lines)

    def problem(self, line: Line, why: str) -> None:
        """Name a line that cannot be played."""
        self._progress.console.print(Text(f"{safe(line.source)}:{line.number}: {safe(why)}"), soft_wrap=True)


def replay_totals(console: Console, totals: Totals, *, ledger_url: str) -> None:
    """Show what a replay came to."""
    unpriced = f" ({totals.unpriced_calls:,} calls have no known price)" if totals.unpriced_calls else ""
    rows = (
        ("conversations", f"{totals.conversations:,}", ""),
        ("sessions", f"{totals.sessions:,}", ""),
        ("turns", f"{totals.turns:,}", ""),
        ("messages", f"{totals.messages:,}", ""),
        ("LLM calls", f"{totals.llm_calls:,}", ""),
        ("tool calls", f"{totals.tool_calls:,}", ""),
        ("tokens in", f"{totals.input_tokens:,}", ""),
        ("tokens out", f"{totals.output_tokens:,}", ""),
        ("cost", money(totals.cost_usd, 4), unpriced),
        ("", "", ""),
        ("played", f"{totals.played:,}", ""),
        ("continued", f"{totals.continued:,}", " from where an earlier replay had stopped"),
        ("skipped", f"{totals.skipped:,}", " complete in the ledger already"),
        ("malformed", f"{totals.malformed:,}", " named above"),
    )
    width = max(len(figure) for _, figure, _ in rows)
    for name, figure, note in rows:
        line = Text(f"{name:<14}{figure:>{width}}" if name else "")
        console.print(line.append("" if figure == "0" else note, style="dim"), soft_wrap=True)
    console.print(Text(f"\nThe ledger: {safe(ledger_url)}"), soft_wrap=True)
