"""An onboarding with stages: how far users come, where they drop off, and what those who stay have in common.

Run it alone: ``python examples/journeys.py``. It needs no server and no keys. Its clock is set by hand, so that days of
silence take no time.
"""

from langchain_core.messages import AIMessage
from langgraph.graph import START, StateGraph

from turntrace import ConversationState, SessionCallbackHandler, SessionTracker, current_turn, track_graph
from turntrace.analytics import dropoff_by_action, dropoff_by_turn, funnel, outcomes
from turntrace.testing import Clock

clock = Clock()  # in an app leave it out: the tracker has the time of day
tracker = SessionTracker(
    "sqlite://",  # in memory, for the example; leave it out for a ledger that stays
    journeys={"onboarding": ["signup", "connect", "first_answer"]},
    clock=clock,
)

# What the assistant says, and what that is a step to; a real one would find out by what its tools did.
ANSWERS = {
    "Hi": ("Welcome! Which mailbox do you use?", "signup"),
    "Gmail": ("Connected. What do you want to know about your mail?", "connect"),
    "Fax": ("A fax is not a mailbox. Do you have another one?", None),
    "Who wrote today?": ("Your aunt did.", "first_answer"),
}


def assistant(state: ConversationState) -> dict:
    """Answer, and say how far the user has come."""
    answer, stage = ANSWERS[state["messages"][-1].content]
    journey = current_turn().journey("onboarding")  # in a node, a tool, or what these call; outside: session.journey
    if stage:
        journey.enter(stage)
    if stage == "first_answer":
        journey.convert()
    clock.advance(seconds=20)
    return {"messages": [AIMessage(answer)]}


graph = track_graph(StateGraph(ConversationState).add_node("assistant", assistant).add_edge(START, "assistant"))
graph = graph.compile().with_config(callbacks=[SessionCallbackHandler(tracker)])


def say(user: str, text: str) -> str:
    """Let a user say something, and return the id of the turn."""
    config = {"configurable": {"thread_id": f"{user}'s"}, "metadata": {"user_id": user, "channel": "web"}}
    result = graph.invoke({"messages": [("user", text)]}, config)
    clock.advance(minutes=1)
    return result["turn_id"]


def main() -> None:
    """Let five users begin, of whom three arrive, one of them days later; and look at the funnel."""
    for user in ("ann", "bob"):
        for text in ("Hi", "Gmail"):
            say(user, text)
        # Feedback by the id of the turn, also from another process: hand it to your client with the answer.
        tracker.feedback(True, turn_id=say(user, "Who wrote today?"))
    say("cyd", "Hi")
    for text in ("Hi", "Fax"):
        turn_id = say("dee", text)
    tracker.feedback(False, turn_id=turn_id)
    for text in ("Hi", "Gmail"):
        say("eve", text)

    # Nobody says that a user has gone. A sweep ends what was silent for 30 minutes (idle_after=...), as of that time.
    # In an app it is a thread, SessionTracker(sweep_every=60), or `turntrace sweep` from cron.
    clock.advance(minutes=60)
    print(f"the sweep ended {tracker.sweep().sessions} sessions")

    # A journey belongs to the user, not to the session: three days later eve goes on where she stood.
    clock.advance(minutes=3 * 24 * 60)
    say("eve", "Who wrote today?")
    clock.advance(minutes=60)
    tracker.sweep()

    onboarding = funnel(tracker.ledger, "onboarding")
    print(f"\n{onboarding.name}: {onboarding.converted} of {onboarding.begun} users arrived, {onboarding.rate:.0%}")
    for stage in onboarding.stages:
        print(f"  {stage.number}. {stage.stage:<14}{'#' * stage.entered:<6}{stage.entered} users")

    print("\ndropped off after turn (of those who ended there)")
    for point in dropoff_by_turn(tracker.ledger):
        print(f"  {point.at}: {point.dropoffs} of {point.ended}")
    print("dropped off when the agent had last")
    for point in dropoff_by_action(tracker.ledger):
        print(f"  {point.at}: {point.dropoffs} of {point.ended}")

    print("\nsessions by their outcome")
    for outcome in outcomes(tracker.ledger):
        liked = "no feedback" if outcome.satisfaction is None else f"satisfaction {outcome.satisfaction:.0%}"
        print(f"  {outcome.outcome}: n = {outcome.n}, {outcome.turns:.1f} turns, {liked}")


if __name__ == "__main__":
    main()
