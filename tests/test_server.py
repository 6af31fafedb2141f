"""A chat service with FastAPI: many requests at once, streams that clients leave, and the spans of the requests."""

import asyncio
import json
import queue
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Header, Request, Response
from fastapi.responses import StreamingResponse
from langchain_core.messages import AIMessage, BaseMessage
from langgraph.checkpoint.memory import InMemorySaver
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import SpanKind, Tracer

from apps import MODEL, App, FakeModel, config_of
from turntrace import SessionCallbackHandler, current_turn, track_graph
from turntrace import attributes as a
from turntrace.records import TurnSummary
from turntrace.testing import Capture, CapturedSpan, assert_all_tagged, captured_spans

USERS = 40
WAYS = ("/chat", "/chat/sync", "/chat/stream", "/chat/stream/sync", "/chat/stream/mixed")
"""How each user asks, all at once: for whole answers and for streams, from async code, sync code, and both."""

ASKED_BY = "asked.by"
PATIENCE_S = 30
WORD = "word" * 25_000
WORDS = 300
"""Of the long answer: 30 MB, more than is on its way between a server and a client that does not read."""

Scope = MutableMapping[str, Any]
ASGIApp = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


class ServerSpans:
    """Middleware that makes a span of each request, which says whose it is; it knows nothing of turntrace."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        user = dict(scope["headers"]).get(b"x-user-id", b"").decode()
        name = f"{scope['method']} {scope['path']}"
        with self._tracer.start_as_current_span(name, kind=SpanKind.SERVER, attributes={ASKED_BY: user}):
            await self._app(scope, receive, send)
            assert not current_turn()


class TurnEnds(SpanProcessor):
    """Tells of each turn that has ended."""

    def __init__(self) -> None:
        self.roots: queue.Queue[ReadableSpan] = queue.Queue()

    def on_end(self, span: ReadableSpan) -> None:
        if span.name == a.SPAN_TURN:
            self.roots.put(span)


class Service:
    """A chat service on one handler, and all that is to be looked at afterwards."""

    def __init__(self, capture: Capture, path: Path, *, tracked: bool, model: FakeModel, telemetry: Any = None) -> None:
        self.capture = capture
        self.ends = TurnEnds()
        capture.provider.add_span_processor(self.ends)
        self.tracker = capture.tracker(f"sqlite:///{path / 'server.db'}")
        self.handler = SessionCallbackHandler(self.tracker)
        self._tracer = capture.provider.get_tracer("own")
        self._tracked = tracked
        self._model = model
        self._saver = InMemorySaver()
        self.app = self._routes(self._graph(False), self._graph(True), telemetry)
        if telemetry is None:
            self.app.add_middleware(ServerSpans, tracer=capture.provider.get_tracer("asgi"))

    def _own_span(self, name: str) -> None:
        with self._tracer.start_as_current_span(f"{name}.own"):
            pass

    def _graph(self, is_async: bool) -> Any:
        builder = App(is_async=is_async, spans=self._own_span, model=self._model).child()
        built = track_graph(builder) if self._tracked else builder
        return built.compile(checkpointer=self._saver).with_config(callbacks=[self.handler])

    def _routes(self, graph: Any, agraph: Any, telemetry: Any) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
            yield
            await self.tracker.ashutdown()

        # Newer ones make spans of requests themselves, on the provider of the process where there is one.
        options: dict[str, Any] = {"telemetry": telemetry or {"tracing": False}}
        app = FastAPI(lifespan=lifespan, **options)

        def asked(thread_id: str, user_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
            return {"messages": [("user", f"I am {user_id}")]}, config_of(thread_id, user_id=user_id, channel="web")

        def streamed(graph: Any, thread_id: str, user_id: str) -> StreamingResponse:
            async def events() -> AsyncIterator[str]:
                async for message, _ in graph.astream(*asked(thread_id, user_id), stream_mode="messages"):
                    yield event(message)

            return StreamingResponse(events(), media_type="text/event-stream")

        @app.post("/chat")
        async def chat(thread_id: str, x_user_id: str = Header()) -> str:
            result = await agraph.ainvoke(*asked(thread_id, x_user_id))
            return str(result["messages"][-1].text)

        @app.post("/chat/sync")
        def chat_sync(thread_id: str, x_user_id: str = Header()) -> str:
            return str(graph.invoke(*asked(thread_id, x_user_id))["messages"][-1].text)

        @app.post("/chat/stream")
        async def stream(thread_id: str, x_user_id: str = Header()) -> StreamingResponse:
            return streamed(agraph, thread_id, x_user_id)

        @app.post("/chat/stream/mixed")  # its nodes are sync
        async def stream_mixed(thread_id: str, x_user_id: str = Header()) -> StreamingResponse:
            return streamed(graph, thread_id, x_user_id)

        @app.post("/chat/stream/sync")
        def stream_sync(thread_id: str, x_user_id: str = Header()) -> StreamingResponse:
            def events() -> Iterator[str]:
                for message, _ in graph.stream(*asked(thread_id, x_user_id), stream_mode="messages"):
                    yield event(message)

            return StreamingResponse(events(), media_type="text/event-stream")

        return app

    @contextmanager
    def served(self) -> Iterator["Served"]:
        """Serve by uvicorn; the server stops at the end of the block."""
        server = Served(self.app)
        try:
            yield server
        finally:
            server.stop()
        server.stopped()

    def spans(self) -> list[CapturedSpan]:
        return captured_spans(self.capture.spans())

    def root_ended(self) -> bool:
        """Wait for the root of a run to end; tell whether it did."""
        try:
            self.ends.roots.get(timeout=PATIENCE_S)
        except queue.Empty:
            return False
        return True

    def nothing_is_open(self) -> None:
        assert self.handler.open_runs == 0
        for span in self.spans():
            if a.TURN_ID in span.attributes:
                assert self.tracker.live_turn(str(span.attributes[a.TURN_ID])) is None
        assert not current_turn()
        assert not trace.get_current_span().get_span_context().is_valid

    def turns(self) -> list[TurnSummary]:
        """Return the turns of the one session that there is."""
        [session] = self.tracker.ledger.sessions()
        return [turn for turn, _ in self.tracker.ledger.turns(session.id)]

    def roots_are_below_their_requests(self) -> None:
        """Assert that the root of each turn is the child of the span of the request that it served."""
        spans = self.spans()
        assert_all_tagged(spans)
        requests = {span.span_id: span for span in spans if ASKED_BY in span.attributes}
        roots = [span for span in spans if span.name == a.SPAN_TURN]
        assert sorted(str(root.parent_id) for root in roots) == sorted(requests)
        for root in roots:
            request = requests[str(root.parent_id)]
            assert (root.trace_id, request.parent_id) == (request.trace_id, None)
            assert root.attributes[a.USER_ID] == self.tracker.hash_user(str(request.attributes[ASKED_BY]))


class Served:
    """An app that uvicorn serves in a thread."""

    def __init__(self, app: FastAPI) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))  # who connects before it serves, waits
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]})
        self._thread.start()

    def client(self) -> httpx.Client:
        url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        return httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False)

    def stop(self) -> None:
        self._server.should_exit = True

    def stopped(self) -> None:
        """Wait until it has stopped."""
        self._thread.join(PATIENCE_S)
        self._listening.close()
        assert not self._thread.is_alive()


def event(message: Any) -> str:
    return f"data: {json.dumps(message.text if isinstance(message, AIMessage) else '')}\n\n"


def text_of(answer: httpx.Response) -> str:
    """Return what the user reads, of a whole answer or of a stream."""
    if answer.headers["content-type"] == "application/json":
        return str(answer.json())
    lines = answer.text.splitlines()
    return "".join(json.loads(line.removeprefix("data: ")) for line in lines if line)


def says_who_asked(messages: Sequence[BaseMessage]) -> str:
    return f"{messages[-1].text}, you say."


@pytest.fixture(params=["callback", "tracked"])
def tracked(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "tracked")


# --- many at once -----------------------------------------------------------------------------------------------------
@pytest.fixture
def asked(capture: Capture, tmp_path: Path, tracked: bool) -> Service:
    """Give a service that has answered 200 requests of 40 users, all at once."""
    model = FakeModel(says=says_who_asked, delay=0.0005)
    service = Service(capture, tmp_path, tracked=tracked, model=model)

    async def ask(client: httpx.AsyncClient, user: int, number: int) -> None:
        who, way = f"user {user}", WAYS[number]
        thread = f"c-{user}-{number % 2}"  # two conversations each
        answer = await client.post(way, params={"thread_id": thread}, headers={"X-User-Id": who})
        assert answer.status_code == 200
        assert text_of(answer) == f"I am {who}, you say."

    async def main() -> None:
        transport = httpx.ASGITransport(app=service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=PATIENCE_S) as client:
            await asyncio.gather(*(ask(client, user, number) for number in range(len(WAYS)) for user in range(USERS)))
        assert not current_turn()

    asyncio.run(main())
    return service


def test_each_user_has_one_session_and_each_conversation_all_its_numbers(asked: Service) -> None:
    asked.nothing_is_open()
    sessions = asked.tracker.ledger.sessions(limit=1000)
    assert len(sessions) == USERS
    assert {session.user_id for session in sessions} == {asked.tracker.hash_user(f"user {n}") for n in range(USERS)}
    assert {session.total_turns for session in sessions} == {len(WAYS)}
    for user in range(USERS):
        assert asked.tracker.ledger.turn_numbers(f"c-{user}-0") == [1, 2, 3]
        assert asked.tracker.ledger.turn_numbers(f"c-{user}-1") == [1, 2]
    for session in sessions:
        for turn, _ in asked.tracker.ledger.turns(session.id):
            assert (turn.status, turn.user_id, turn.llm_calls) == ("completed", session.user_id, 1)


def test_every_span_belongs_to_the_user_who_asked(asked: Service) -> None:
    asked.roots_are_below_their_requests()
    spans = asked.spans()
    tracker = asked.tracker
    session_of = {session.user_id: session.id for session in tracker.ledger.sessions(limit=1000)}
    requests = {span.trace_id: span for span in spans if ASKED_BY in span.attributes}
    assert len(requests) == USERS * len(WAYS)
    counted: Counter[str] = Counter()
    for span in spans:
        request = requests.get(span.trace_id)
        if request is None:
            assert span.name == "session.start"
        elif span is not request:
            user = tracker.hash_user(str(request.attributes[ASKED_BY]))
            assert (span.attributes[a.USER_ID], span.attributes[a.SESSION_ID]) == (user, session_of[user])
            counted[span.name] += 1
    del counted[a.SPAN_PRUNE]  # turns of one conversation at once overwrite each other's messages in its checkpoint
    names = (a.SPAN_TURN, "LangGraph", "inner", "inner.own", "expert", "expert.own", MODEL)
    assert counted == dict.fromkeys(names, USERS * len(WAYS))


@pytest.mark.skipif(not hasattr(FastAPI(), "_telemetry"), reason="this FastAPI makes no spans of its own")
def test_a_turn_is_in_the_trace_of_the_request_that_fastapi_makes_itself(capture: Capture, tmp_path: Path) -> None:
    telemetry = {"tracer_provider": capture.provider}
    service = Service(capture, tmp_path, tracked=False, model=FakeModel(), telemetry=telemetry)
    with service.served() as server, server.client() as client:
        assert client.post("/chat", params=PARAMS, headers=HEADERS).status_code == 200
    [root] = [span for span in service.spans() if span.name == a.SPAN_TURN]
    [request] = [span for span in service.spans() if span.scope == "fastapi" and span.parent_id is None]
    assert root.trace_id == request.trace_id


# --- streams that are left --------------------------------------------------------------------------------------------
def talks_long_at_first(messages: Sequence[BaseMessage]) -> str:
    asked = [message for message in messages if message.type == "human"]
    return " ".join([WORD] * WORDS) if len(asked) == 1 else "Welcome back."


def read_some(answer: httpx.Response) -> Iterator[str]:
    """Read three words of an answer, and return the rest."""
    lines = (line for line in answer.iter_lines() if "word" in line)
    for _ in range(3):
        assert next(lines)
    return lines


def with_http_middleware(app: FastAPI) -> None:
    """Add middleware as FastAPI's documentation shows it, which runs what is below it in a task of its own."""

    @app.middleware("http")
    async def passed(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        return await call_next(request)


PARAMS = {"thread_id": "c-1"}
HEADERS = {"X-User-Id": "ann"}


@pytest.mark.parametrize("middleware", [False, True], ids=["plain", "http-middleware"])
@pytest.mark.parametrize("way", ["/chat/stream", "/chat/stream/mixed"])
@pytest.mark.parametrize("delay", [0.0, 0.002], ids=["server-waits-for-client", "client-waits-for-server"])
def test_a_client_that_goes_away(
    capture: Capture, tmp_path: Path, tracked: bool, way: str, middleware: bool, delay: float
) -> None:
    service = Service(capture, tmp_path, tracked=tracked, model=FakeModel(says=talks_long_at_first, delay=delay))
    if middleware:
        with_http_middleware(service.app)
    with service.served() as server:
        with server.client() as client, client.stream("POST", way, params=PARAMS, headers=HEADERS) as answer:
            read_some(answer)
        noticed = service.root_ended()
        if noticed:
            service.nothing_is_open()
            with server.client() as client:  # the user comes back, in the same session
                answer = client.post("/chat", params=PARAMS, headers=HEADERS)
                assert answer.json() == "Welcome back."
    # Behind Starlette's HTTP middleware a busy server may notice that nobody reads only when it stops.
    assert noticed or (middleware and service.root_ended())
    service.nothing_is_open()
    left, *later = service.turns()
    assert left.status in ("abandoned", "failed")
    assert [(turn.number, turn.status, turn.session_id) for turn in later] == (
        [(2, "completed", left.session_id)] if noticed else []
    )
    service.roots_are_below_their_requests()


def test_a_server_that_stops_in_the_middle_of_an_answer(capture: Capture, tmp_path: Path, tracked: bool) -> None:
    service = Service(capture, tmp_path, tracked=tracked, model=FakeModel(says=talks_long_at_first, delay=0.05))
    with service.served() as server, server.client() as client:
        with client.stream("POST", "/chat/stream", params=PARAMS, headers=HEADERS) as answer:
            rest = read_some(answer)
            server.stop()
            with pytest.raises(httpx.RemoteProtocolError):
                list(rest)
        server.stopped()
    service.nothing_is_open()
    [left] = service.turns()
    assert (left.status, left.error) == ("abandoned", "CancelledError")
    service.roots_are_below_their_requests()
