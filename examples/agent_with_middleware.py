"""An agent of langchain's ``create_agent``: its turns are tracked, and its model is given what fits into its window.

Run it alone: ``python examples/agent_with_middleware.py``. It needs ``pip install 'turntrace[langchain]'``, and neither
a server nor keys.
"""

from collections.abc import Sequence
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.checkpoint.memory import InMemorySaver

from turntrace import ContextTracker, SessionCallbackHandler, SessionTracker
from turntrace.context import Chain, ClearToolResults, DropOldestTurns
from turntrace.middleware import SessionMiddleware


class ShopModel(BaseChatModel):
    """Stands for a real model, as ``ChatOpenAI("gpt-4o-mini")``: looks an item up, then says what it found."""

    @property
    def _llm_type(self) -> str:
        return "shop"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return LangSmithParams(ls_provider="openai", ls_model_name="gpt-4o-mini", ls_model_type="chat")

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Any:
        """Take tools, as models do that can call them."""
        return self.bind(tools=[convert_to_openai_tool(each) for each in tools], **kwargs)

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        last = messages[-1]
        if isinstance(last, ToolMessage):
            answer = AIMessage(f"Here you are: {str(last.content).partition('.')[0]}.")
        else:
            item = str(last.content).rstrip("?").split()[-1]
            answer = AIMessage("", tool_calls=[{"name": "look_up", "args": {"item": item}, "id": f"call-{item}"}])
        return ChatResult(generations=[ChatGeneration(message=answer)])


@tool
def look_up(item: str) -> str:
    """Look an item of the shop up."""
    return f"{item} costs 5 euros. " + "Customers say that it is good, and that it comes in a nice box. " * 5


def main() -> None:
    """Ask for some items in one conversation, and look at what its window went through."""
    context = ContextTracker(
        "gpt-4o-mini",
        limit=500,  # so small for the example; left out, it is what the model can be given: 128,000
        threshold=0.8,  # above 400 tokens the strategy is asked
        strategy=Chain(ClearToolResults(keep=1), DropOldestTurns()),  # the second only if the first is not enough
    )
    tracker = SessionTracker("sqlite://")  # in memory, for the example; leave it out for a ledger that stays
    agent = create_agent(
        ShopModel(),
        [look_up],
        system_prompt="You sell tea, and what one needs for it.",
        middleware=[SessionMiddleware(context)],  # brings the ids into the state, and prunes what the model is given
        checkpointer=InMemorySaver(),
    ).with_config(callbacks=[SessionCallbackHandler(tracker)])  # tracks the turns

    config = {"configurable": {"thread_id": "tea"}, "metadata": {"user_id": "ann@example.com", "channel": "web"}}
    for item in ("Sencha", "Matcha", "cups", "pots", "honey", "kettles"):
        result = agent.invoke({"messages": [("user", f"What do you charge for {item}?")]}, config)
    print(f"turn {result['turn_number']}: {result['messages'][-1].content}")
    print(f"the state still has all {len(result['messages'])} messages\n")

    session_id = result["session_id"]
    for turn, _steps in tracker.ledger.turns(session_id):
        fill = f"{turn.context_tokens} of {turn.context_limit} tokens, {turn.context_window_pct:.0%}"
        pruned = f"{turn.messages_pruned} messages pruned" if turn.prunings else "nothing pruned"
        print(f"turn {turn.number}: {turn.tool_calls} tool call, {turn.llm_calls} model calls, {fill}, {pruned}")

    # Each call of the model is a decision, also where nothing was to be done: what triggered it, what it did.
    for _turn_id, decision in tracker.ledger.decisions(session_id):
        if decision.pruned:
            print(f"{decision.trigger}: {decision.tokens_before} -> {decision.tokens_after} tokens")
    print(f"in all: {tracker.session_summary(session_id).prunings} prunings")


if __name__ == "__main__":
    main()
