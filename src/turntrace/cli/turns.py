"""The lines of a turn in a session's tree: whole, or one line of it."""

from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from turntrace.analytics import slow_above_ms
from turntrace.analytics.filters import FAILED
from turntrace.cli.lookup import Named
from turntrace.cli.render import bar, clock, count, duration, is_plain, money, percent, safe
from turntrace.records import TurnSummary
from turntrace.summaries import Feedback

_STYLES: Final = {"completed": "green", "failed": "red", "abandoned": "red", "interrupted": "yellow", "open": "yellow"}
_BAR: Final = 10
_WIDE: Final = 60
_MS: Final = 1_000_000


class TurnLines:
    """What the lines of the turns of one session have in common.

    Args:
        console: Where they are shown.
        now_ns: The time, in nanoseconds since 1970.
        turns: All turns of the session.
        feedback: The feedback on the session and on its turns.
        named: What was asked for.
    """

    def __init__(
        self,
        console: Console,
        now_ns: int,
        turns: Sequence[TurnSummary],
        feedback: Sequence[Feedback],
        named: Named,
    ) -> None:
        self._now_ns = now_ns
        self._turns = {turn.id: turn for turn in turns}
        self._feedback = feedback
        self._asked = named
        self._plain = is_plain(console)
        self._bar = _BAR if console.width >= _WIDE else 0
        self._arrow = "->" if self._plain else "\u2192"
        self._slow_ms = slow_above_ms(turns)
        self._widths = (
            max((len(str(turn.number)) for turn in turns), default=0),
            max((len(safe(turn.status)) for turn in turns), default=0),
            max((len(self._took(turn)) for turn in turns), default=0),
        )

    def conversation(self, conversation_id: str) -> Text:
        """Return the line of a conversation, which says so where it had begun in another session."""
        line = Text(f"conversation {safe(conversation_id)}")
        numbers = sorted(turn.number for turn in self._turns.values() if turn.conversation_id == conversation_id)
        if numbers[0] > 1:
            last = f"s {numbers[0]:,} to {numbers[-1]:,}" if len(numbers) > 1 else f" {numbers[0]:,}"
            line.append(f", turn{last} of it")
        return self._marked(line, conversation_id == self._asked.conversation_id)

    def _marked(self, line: Text, is_it: bool) -> Text:
        return line.append("  <- asked for", style="bold cyan") if is_it else line

    def brief(self, turn: TurnSummary) -> Text:
        """Return the one line of a turn, cut where the terminal ends."""
        number, status, took = self._widths
        line = Text(no_wrap=True, overflow="crop" if self._plain else "ellipsis")
        line.append(f"turn {turn.number:<{number}}", style="bold").append(f"  {clock(turn.started_ns, 'time')}  ")
        line.append(f"{safe(turn.status):<{status}}", style=_STYLES.get(turn.status or "", ""))
        line.append(f"  {self._took(turn):>{took}}", style="cyan")
        if self._is_slow(turn):
            line.append("  slow", style="bold yellow")
        if turn.error is not None and turn.error != turn.status:
            line.append(f"  {safe(turn.error)}", style="red")
        self._marked(line, turn.id == self._asked.turn_id)
        for given in self._feedback_on(turn):
            line.append("  ").append_text(given)
        if turn.intent is not None:
            line.append("  intent ").append(safe(turn.intent), style="bold")
        if turn.wait_ms:
            line.append(f"  waited {duration(turn.wait_ms)}", style="yellow")
        if turn.llm_calls:
            line.append(f"  {turn.input_tokens + turn.output_tokens:,} tokens, {money(turn.cost_usd)}")
        return line

    def turn(self, turn: TurnSummary) -> Text:
        """Return the lines of a turn: what it was, what it took, what is to be said beyond."""
        line = Text.assemble((f"turn {turn.number}", "bold"), f"  {clock(turn.started_ns, 'time')}  ")
        line.append(safe(turn.status), style=_STYLES.get(turn.status or "", ""))
        if turn.intent is not None:
            line.append("  intent ").append(safe(turn.intent), style="bold")
        line.append(self._kinds(turn))
        if turn.error is not None and turn.error != turn.status:
            line.append(f"  {safe(turn.error)}", style="red")
        self._marked(line, turn.id == self._asked.turn_id)
        for more in (self._figures(turn), *self._remarks(turn)):
            if more:
                line.append("\n").append_text(more)
        return line

    def _kinds(self, turn: TurnSummary) -> str:
        asked = "" if turn.input_type is None else f" {safe(turn.input_type)}"
        answered = turn.output_type not in (None, "interrupt")
        answer = f" {self._arrow} {safe(turn.output_type)}" if answered else ""
        return f" {asked}{answer}" if asked or answer else ""

    def _figures(self, turn: TurnSummary) -> Text:
        facts = Text(self._took(turn), style="cyan")
        if self._is_slow(turn):
            facts.append(" slow", style="bold yellow")
        if turn.time_to_first_token_ms is not None:
            facts.append(f", first token {duration(turn.time_to_first_token_ms)}", style="default")
        if turn.llm_calls or turn.input_tokens or turn.output_tokens:
            tokens = f"{turn.input_tokens + turn.output_tokens:,} tokens"
            facts.append(f", {tokens}, {money(turn.cost_usd)}", style="default")
            if turn.unpriced_calls:
                facts.append(f" ({turn.unpriced_calls:,} without a known price)", style="yellow")
        if turn.context_window_pct is not None:
            facts.append(", window ", style="default")
            if self._bar:
                facts.append_text(bar(turn.context_window_pct, self._bar, plain=self._plain)).append(" ")
            facts.append(percent(turn.context_window_pct), style="default")
        return facts

    def _remarks(self, turn: TurnSummary) -> list[Text]:
        found = []
        if turn.status == "interrupted" and turn.ended_ns is not None:
            waits = duration(max(0, self._now_ns - turn.ended_ns) / _MS)
            found.append(Text(f"waits for a person, {waits} so far", style="yellow"))
        elif turn.status == "open":
            runs = duration(max(0, self._now_ns - turn.started_ns) / _MS)
            found.append(Text(f"has not ended, began {runs} ago", style="yellow"))
        if turn.wait_ms:
            found.append(Text(f"waited {duration(turn.wait_ms)} for a person", style="yellow"))
        if turn.prunings:
            tokens = f", {turn.tokens_pruned:,} tokens" if turn.tokens_pruned else ""
            found.append(Text(f"pruned {count(turn.messages_pruned, 'message')}{tokens}", style="magenta"))
        if turn.forked_from is not None:
            found.append(Text(f"forked from {self._named(turn.forked_from)}", style="magenta"))
        if turn.status in FAILED or turn.id in (self._asked.turn_id, *self._asked.only):
            found.append(Text(f"trace {safe(turn.trace_id)}", style="dim"))
        return [*found, *self._feedback_on(turn)]

    def _took(self, turn: TurnSummary) -> str:
        return "" if turn.ended_ns is None else duration(turn.latency_ms)

    def _is_slow(self, turn: TurnSummary) -> bool:
        return self._slow_ms is not None and turn.ended_ns is not None and turn.latency_ms > self._slow_ms

    def _feedback_on(self, turn: TurnSummary) -> list[Text]:
        return [feedback_line(given) for given in self._feedback if given.turn_id == turn.id]

    def _named(self, turn_id: str) -> str:
        known = self._turns.get(turn_id)
        return f"the turn {safe(turn_id)} of another session" if known is None else f"turn {known.number}"


def feedback_line(given: Feedback) -> Text:
    """Return what a user thought."""
    return Text(f"feedback {safe(given.name)} {given.value:.2g}", style="green" if given.value >= 0.5 else "red")
