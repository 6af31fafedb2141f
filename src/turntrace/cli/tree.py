"""A session as a tree: what happened in its turns, on its journeys and at its end."""

import time
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from turntrace.analytics.filters import FAILED
from turntrace.cli.lists import totals_of, user_of
from turntrace.cli.lookup import Named
from turntrace.cli.render import bar, clock, count, duration, is_plain, money, percent, safe
from turntrace.records import Step, TurnSummary
from turntrace.summaries import Feedback, SessionSummary, StageEntered

_KINDS: Final = {"chain": "node", "generation": "llm"}
_STYLES: Final = {"completed": "green", "failed": "red", "abandoned": "red", "interrupted": "yellow", "open": "yellow"}
_ACTIONS: Final = {
    "asked_question": "the agent had asked something",
    "answered": "the agent had answered",
    "called_tool": "the agent had called a tool",
    "failed": "the agent had failed",
    "interrupted": "the agent waited for a person",
}
_BAR: Final = 10
_WIDE: Final = 60
_MS: Final = 1_000_000


def session_tree(
    console: Console,
    session: SessionSummary,
    turns: Sequence[tuple[TurnSummary, Sequence[Step]]],
    journey: Sequence[StageEntered] = (),
    feedback: Sequence[Feedback] = (),
    *,
    named: Named | None = None,
    now_ns: int | None = None,
) -> None:
    """Show a session as a tree: its turns, the runs of the graph, nodes, calls of models and tools, journeys, the end.

    Args:
        console: Where to show it.
        session: The session.
        turns: Its turns with their steps, in order.
        journey: The steps of journeys in it, in order.
        feedback: The feedback on it and on its turns.
        named: What was asked for, which is marked in it.
        now_ns: The time, in nanoseconds since 1970: what waits has waited until then. Default: now.
    """
    now_ns = time.time_ns() if now_ns is None else now_ns
    drawing = _Drawing(console, now_ns, [turn for turn, _ in turns], feedback, named or Named([session.id]))
    tree = Tree(session_head(session), guide_style="dim")
    conversation = None
    for turn, steps in turns:
        if turn.conversation_id != conversation:
            conversation = turn.conversation_id
            branch = tree.add(drawing.conversation(conversation))
        _add_steps(branch.add(drawing.turn(turn)), turn, steps)
    for name in dict.fromkeys(step.name for step in journey):
        drawing.add_journey(tree, session, [step for step in journey if step.name == name])
    for given in feedback:
        if given.turn_id is None:
            tree.add(_feedback_line(given))
    tree.add(drawing.end(session))
    console.print(tree)


def session_head(session: SessionSummary) -> Text:
    """Return the lines that say which session it is and what it adds up to."""
    head = Text.assemble(
        ("session ", "bold"), (safe(session.id), "bold"), f"  {safe(session.channel)}, user ", user_of(session), "\n"
    )
    about = {"tier": session.tier, "org": session.org_id, "locale": session.locale, "client": session.client_version}
    known = "".join(f", {name} {safe(value)}" for name, value in about.items() if value is not None)
    head.append(f"{clock(session.started_ns, 'second')} UTC{known}\n")
    head.append(totals_of(session))
    for number, what in ((session.failed_turns, "failed turn"), (session.prunings, "pruning")):
        if number:
            head.append(f", {count(number, what)}")
    if session.wait_ms:
        head.append(f", waited {duration(session.wait_ms)} for a person")
    if session.unpriced_calls:
        head.append(f", {count(session.unpriced_calls, 'call')} without a known price")
    if session.user_satisfaction is not None:
        head.append(f", satisfied {percent(session.user_satisfaction)}")
    return head


# --- turns, journeys, the end -----------------------------------------------------------------------------------------
class _Drawing:
    """What the lines of one tree have in common.

    Args:
        console: Where it is shown.
        now_ns: The time, in nanoseconds since 1970.
        turns: The session's turns.
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

    def turn(self, turn: TurnSummary) -> Text:
        """Return the lines of a turn: what it was, what it took, what is to be said beyond."""
        line = Text.assemble((f"turn {turn.number}", "bold"), f"  {clock(turn.started_ns, 'time')}  ")
        line.append(safe(turn.status), style=_STYLES.get(turn.status or "", ""))
        if turn.intent is not None:
            line.append("  intent ").append(safe(turn.intent), style="bold")
        line.append(self._kinds(turn))
        if turn.error is not None:
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
        facts = Text(duration(turn.latency_ms) if turn.ended_ns is not None else "", style="cyan")
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
        if turn.status in FAILED or turn.id == self._asked.turn_id:
            found.append(Text(f"trace {safe(turn.trace_id)}", style="dim"))
        found += [_feedback_line(given) for given in self._feedback if given.turn_id == turn.id]
        return found

    def _named(self, turn_id: str) -> str:
        known = self._turns.get(turn_id)
        return f"the turn {safe(turn_id)} of another session" if known is None else f"turn {known.number}"

    def add_journey(self, tree: Tree, session: SessionSummary, steps: Sequence[StageEntered]) -> None:
        """Add a journey with its steps."""
        branch = tree.add(Text.assemble("journey ", (safe(steps[0].name), "bold")))
        was_converted = False
        stage = None
        for step in steps:
            line = Text(f"{clock(step.at_ns, 'time')}  ")
            if step.stage != stage:
                line.append(f"{safe(step.stage)} ({step.stage_number} of {step.total_stages})")
                line.append(" back" if step.is_back else "", style="yellow")
            elif step.converted and not was_converted:
                line.append(safe(step.stage))
            if step.time_in_stage_ms is not None and step.stage != stage:
                line.append(f"  after {duration(step.time_in_stage_ms)}")
            if step.converted and not was_converted:
                line.append("  converted", style="green")
                if step.name == session.journey_name and session.journey_conversion_time_ms is not None:
                    line.append(f", {duration(session.journey_conversion_time_ms)} after its first step")
            was_converted, stage = step.converted, step.stage
            branch.add(line)

    def end(self, session: SessionSummary) -> Text:
        """Return the lines about the end."""
        if session.ended_ns is None:
            ago = duration(max(0, self._now_ns - session.last_activity_ns) / _MS)
            return Text(f"open, last active {ago} ago", style="yellow")
        line = Text.assemble(("end", "bold"), f"  {clock(session.ended_ns, 'time')}  ")
        line.append(safe(session.end_reason), style="red" if session.end_reason == "error" else "")
        silent = (session.ended_ns - session.last_activity_ns) / _MS
        if silent >= 1000:
            line.append(f" after {duration(silent)} of silence")
        if session.dropoff:
            where = "" if session.last_turn is None else f" after turn {session.last_turn}"
            intent = "" if session.last_intent is None else f" ({safe(session.last_intent)})"
            action = session.last_action
            last = "" if action is None else f": {_ACTIONS.get(action, safe(action))}"
            line.append(f"\ndrop-off{where}{intent}{last}", style="yellow")
        return line


def _feedback_line(given: Feedback) -> Text:
    return Text(f"feedback {safe(given.name)} {given.value:.2g}", style="green" if given.value >= 0.5 else "red")


# --- steps ------------------------------------------------------------------------------------------------------------
def _add_steps(branch: Tree, turn: TurnSummary, steps: Sequence[Step]) -> None:
    known = {step.span_id for step in steps}
    below: dict[str | None, list[Step]] = {}
    # A pruning stands before the call that it was made for, which begins in the same millisecond.
    for step in sorted(steps, key=lambda step: (step.start_ms, step.kind != "event")):
        # What hangs on a span of other code is shown below the turn: the ledger keeps our own steps only.
        below.setdefault(step.parent_id if step.parent_id in known else turn.root_span_id, []).append(step)
    waiting = [(branch, step) for step in reversed(below.get(turn.root_span_id, []))]
    while waiting:
        above, step = waiting.pop()
        node = above.add(_step_line(step))
        waiting += [(node, child) for child in reversed(below.get(step.span_id, []))]


def _step_line(step: Step) -> Text:
    line = Text.assemble((f"{safe(_KINDS.get(step.kind, step.kind))} ", "dim"), safe(step.name))
    if step.kind != "event":
        line.append(f"  {duration(step.duration_ms)}", style="cyan")
    if step.attempt is not None:
        line.append(f"  attempt {step.attempt}", style="yellow")
    if step.input_tokens is not None:
        line.append(f"  {step.input_tokens:,} in, {step.output_tokens or 0:,} out")
    if step.cost_usd is not None:
        line.append(f"  {money(step.cost_usd)}")
    if step.error is not None:
        line.append(f"  {safe(step.error)}", style="red")
    return line
