"""A session as a tree: what happened in its turns, on its journeys and at its end."""

import shlex
import time
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from turntrace.cli.lists import totals_of, user_of
from turntrace.cli.lookup import Named
from turntrace.cli.render import clock, count, duration, money, percent, safe
from turntrace.cli.turns import TurnLines, feedback_line
from turntrace.records import Step, TurnSummary
from turntrace.summaries import Feedback, SessionSummary, StageEntered

_KINDS: Final = {"chain": "node", "generation": "llm"}
_ACTIONS: Final = {
    "asked_question": "the agent had asked something",
    "answered": "the agent had answered",
    "called_tool": "the agent had called a tool",
    "failed": "the agent had failed",
    "interrupted": "the agent waited for a person",
}
_MS: Final = 1_000_000

TurnWithSteps = tuple[TurnSummary, Sequence[Step]]


def session_tree(
    console: Console,
    session: SessionSummary,
    turns: Sequence[TurnWithSteps],
    journey: Sequence[StageEntered] = (),
    feedback: Sequence[Feedback] = (),
    *,
    named: Named | None = None,
    brief: bool = False,
    now_ns: int | None = None,
) -> None:
    """Show a session as a tree: its turns, the runs of the graph, nodes, calls of models and tools, journeys, the end.

    Where a turn was asked for, it alone is shown whole: by its number nothing beside it, by its id or trace also the
    one before and the one after, each in a line. A line says how to see all.

    Args:
        console: Where to show it.
        session: The session.
        turns: Its turns with their steps, in order.
        journey: The steps of journeys in it, in order.
        feedback: The feedback on the session and on its turns.
        named: What was asked for, which is marked in it.
        brief: Whether turns and journeys are a line each, without what happened in them.
        now_ns: The time, in nanoseconds since 1970: what waits has waited until then. Default: now.
    """
    now_ns = time.time_ns() if now_ns is None else now_ns
    named = named or Named([session.id])
    lines = TurnLines(console, now_ns, [turn for turn, _ in turns], feedback, named)
    tree = Tree(session_head(session), guide_style="dim")
    wanted = () if len(turns) == 1 else named.only or _around(turns, None if brief else named.turn_id)
    shown = [each for each in turns if not wanted or each[0].id in wanted]
    conversation = None
    for turn, steps in shown:
        if turn.conversation_id != conversation:
            conversation = turn.conversation_id
            branch = tree.add(lines.conversation(conversation))
        if brief or (wanted and named.turn_id not in (None, turn.id)):
            branch.add(lines.brief(turn))
        else:
            _add_steps(branch.add(lines.turn(turn)), turn, steps)
    if not wanted:
        _add_rest(tree, session, journey, feedback, brief=brief, now_ns=now_ns)
        console.print(tree)
        return
    console.print(tree)
    of_all = f"{len(shown):,} of {count(len(turns), 'turn')}"
    more = f"turntrace show {shlex.quote(safe(session.id))} shows all, with --brief a line each"
    console.print(Text(f"{of_all}; {more}", style="dim"))


def _around(turns: Sequence[TurnWithSteps], turn_id: str | None) -> Sequence[str]:
    """Return the ids of a turn and of those before and after it; none where it is not among them."""
    ids = [turn.id for turn, _ in turns]
    return () if turn_id not in ids else ids[max(0, ids.index(turn_id) - 1) : ids.index(turn_id) + 2]


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


# --- journeys, the end ------------------------------------------------------------------------------------------------
def _add_rest(
    tree: Tree,
    session: SessionSummary,
    journey: Sequence[StageEntered],
    feedback: Sequence[Feedback],
    *,
    brief: bool,
    now_ns: int,
) -> None:
    """Add what is told of the whole session: its journeys, the feedback on it, how it ended."""
    for name in dict.fromkeys(step.name for step in journey):
        _add_journey(tree, session, [step for step in journey if step.name == name], brief=brief)
    for given in feedback:
        if given.turn_id is None:
            tree.add(feedback_line(given))
    tree.add(_end(session, now_ns))


def _add_journey(tree: Tree, session: SessionSummary, steps: Sequence[StageEntered], *, brief: bool) -> None:
    head = Text.assemble("journey ", (safe(steps[0].name), "bold"))
    branch = tree.add(head)
    if brief:
        head.append(f"  {safe(steps[-1].stage)} ({steps[-1].stage_number} of {steps[-1].total_stages})")
        head.append("  converted" if steps[-1].converted else "", style="green")
        return
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


def _end(session: SessionSummary, now_ns: int) -> Text:
    if session.ended_ns is None:
        ago = duration(max(0, now_ns - session.last_activity_ns) / _MS)
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
