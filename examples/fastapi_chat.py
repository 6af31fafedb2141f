"""A chat service: whole answers and server-sent events, many users at once, one callback handler for all of them.

Run it: ``python examples/fastapi_chat.py`` serves on http://127.0.0.1:8000. With ``--once`` it serves on a free port,
has two users talk with it, shows what turntrace knows of them, and exits. It needs ``pip install fastapi uvicorn``; it
needs no Langfuse and no keys.

    curl -N http://127.0.0.1:8000/chat/stream -H 'X-User-Id: ann' -H 'Content-Type: application/json' \
        -d '{"thread_id": "parcel", "text": "Where is my parcel?"}'
"""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any

import httpx
import uvicorn
from fastapi import Depends, FastAPI, Header
from fastapi.responses import StreamingResponse
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from pydantic import BaseModel

from turntrace import SessionCallbackHandler, SessionTracker

# --- the agent --------------------------------------------------------------------------------------------------------
model = FakeListChatModel(responses=["Your parcel arrives on Friday."], sleep=0.005)  # streams a letter at a time


async def agent(state: MessagesState) -> dict:
    """Answer with the model."""
    return {"messages": [await model.ainvoke(state["messages"])]}


# One tracker and one handler serve the whole process: no state of a request is kept in either.
tracker = SessionTracker("sqlite://")  # in memory, for the example; leave it out for a ledger that stays
handler = SessionCallbackHandler(tracker)
graph = (
    StateGraph(MessagesState)
    .add_node("agent", agent)
    .add_edge(START, "agent")
    .compile(checkpointer=InMemorySaver())
    .with_config(callbacks=[handler])
)


# --- the service ------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Write down and send what is left when the service stops; sessions stay open for the next process."""
    yield
    await tracker.ashutdown()


app = FastAPI(lifespan=lifespan)


class Question(BaseModel):
    """What a client sends."""

    thread_id: str
    text: str

    @property
    def input(self) -> dict[str, Any]:
        """The input of the graph: only what is new, the checkpointer has the rest."""
        return {"messages": [("user", self.text)]}


def config_of(
    question: Question,
    x_user_id: Annotated[str, Header()],  # take it from your login, not from a header that anybody can set
    x_channel: Annotated[str, Header()] = "web",
) -> dict[str, Any]:
    """Say who asks: the only thing that turntrace wants to know of a request."""
    return {
        "configurable": {"thread_id": question.thread_id},
        "metadata": {"user_id": x_user_id, "channel": x_channel},
    }


Config = Annotated[dict[str, Any], Depends(config_of)]


@app.post("/chat")
async def chat(question: Question, config: Config) -> dict[str, str]:
    """Answer when the answer is complete."""
    result = await graph.ainvoke(question.input, config)
    return {"answer": result["messages"][-1].content}


@app.post("/chat/stream")
async def chat_stream(question: Question, config: Config) -> StreamingResponse:
    """Answer letter by letter, as server-sent events."""

    # Async, also where the nodes are not: a `graph.stream` that a client leaves may wait for its own thread for ever.
    async def events() -> AsyncIterator[str]:
        # When the client goes away, the server cancels or drops this, and `aclosing` ends the run of the graph with
        # it. The turn is then on record as abandoned.
        async with aclosing(graph.astream(question.input, config, stream_mode="messages")) as parts:
            async for message, _ in parts:
                if message.content:
                    yield f"data: {json.dumps(message.content)}\n\n"  # JSON: a text may hold line ends
        yield "event: end\ndata: null\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


# --- two users, for `--once` ------------------------------------------------------------------------------------------
async def talk(url: str) -> None:
    """Let ann ask twice, and bob leave in the middle of his answer."""
    ann, bob = {"X-User-Id": "ann@example.com"}, {"X-User-Id": "bob@example.com", "X-Channel": "mobile"}
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        question = {"thread_id": "parcel", "text": "Where is my parcel?"}
        whole = await client.post("/chat", json=question, headers=ann)
        print(f"ann, whole:    {whole.json()['answer']}")

        async with client.stream("POST", "/chat/stream", json=question, headers=ann) as answer:
            print(f"ann, streamed: {''.join([part async for part in parts_of(answer)])}")

        async with client.stream("POST", "/chat/stream", json={**question, "thread_id": "bobs"}, headers=bob) as answer:
            parts = parts_of(answer)
            print(f"bob, leaves:   {''.join([await anext(parts) for _ in range(11)])}")
            await parts.aclose()


async def parts_of(answer: httpx.Response) -> AsyncIterator[str]:
    """Read server-sent events."""
    async with aclosing(answer.aiter_lines()) as lines:
        async for line in lines:
            if line.startswith("data: ") and (part := json.loads(line.removeprefix("data: "))):
                yield part


async def once() -> None:
    """Serve on a free port until two users have talked, and look at their sessions."""
    with socket.create_server(("127.0.0.1", 0)) as listening:  # who connects before it serves, waits
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        await talk(f"http://127.0.0.1:{listening.getsockname()[1]}")
        while handler.open_runs:  # the server has yet to notice that bob went away
            await asyncio.sleep(0.01)
        for session in reversed(tracker.ledger.sessions()):
            print(f"\nsession of user {str(session.user_id)[:12]} on {session.channel}, turns: {session.total_turns}")
            for turn, steps in tracker.ledger.turns(session.id):
                print(f"  turn {turn.number} of {turn.conversation_id}: {turn.status}, {len(steps)} steps")
        server.should_exit = True
        await serving


if __name__ == "__main__":
    if "--once" in sys.argv:
        asyncio.run(once())
    else:
        uvicorn.run(app, host="127.0.0.1", port=8000)
