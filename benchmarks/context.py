"""What fitting a conversation into the model's window costs, next to counting it anew, in the same run.

The history has 1,000 messages of varied text, about 114,000 tokens: as in _app.py a question, an answer, and in every
third turn a call of a tool with its result. Each round does everything once, or a few times where it is quick, in an
order that changes; what it needs is made before the clock starts. CPU time of the calling thread; a ratio is of the two
figures of one round.

- fitting: `ContextTracker.fit` with 3 new messages, next to a recount by tiktoken and to LangChain's `trim_messages`;
  of the same objects as at the call before, as in an agent's loop, and unpickled, as a checkpointer gives them to the
  first call of a turn;
- a turn: the same at several lengths, next to a turn without a tool of the app of _app.py without turntrace;
- memory: what 10,000 conversations leave behind in one tracker, and what 10,000 more add.

    python benchmarks/context.py [--rounds 50] [--conversations 10000] [--json FILE]
"""

import gc
import json
import pickle
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any
from uuid import UUID

from _app import build_app, question
from _tables import Report, arguments, middle, summary
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage, trim_messages
from langgraph.checkpoint.memory import InMemorySaver

from turntrace import ContextTracker
from turntrace.context import MessageCounter, encoding_for_model

MODEL = "gpt-4o"
ROOM = 10_000_000  # a limit that nothing reaches
MESSAGES = 1_000
LENGTHS = (10, 100, 500, 1_000, 2_000)
NEW = 3
WARM_UP = 3
OFTEN = 5
ROLES = {"human": "user", "ai": "assistant", "tool": "tool"}

RECOUNT, TRIM = "recount by tiktoken", "trim_messages with tiktoken"
FIT, FRESH = "fit, 3 new", "fit, 3 new, unpickled"
CACHED, CACHED_FRESH = "one pass over cached counts", "one pass, unpickled"
PRUNE, PRUNE_FRESH = "fit, prunes to half", "fit, prunes to half, unpickled"
# A case, what it is set against, which of the two is to be so many times the other at least or at most.
TARGETS = (
    (FIT, "faster than", RECOUNT, 40.0),
    (FIT, "faster than", TRIM, 100.0),
    (FRESH, "faster than", RECOUNT, None),
    (PRUNE, "at most", CACHED, 3.0),
    (PRUNE_FRESH, "at most", CACHED_FRESH, 3.0),
)

VOCABULARY = (
    "a about account after again agree all also although always amount and another answer any application april are "
    "around arrive ask as at available average back balance bank because before begin between bill book both branch "
    "bring browser build business but by call cancel card carefully case change charge check choose city clear close "
    "code collect come company compare complete concern confirm connection consider contact continue contract copy "
    "cost could country couple courier create credit current customer damage data date day december decide deliver "
    "delivery department describe detail device did different discount do document does double down download due "
    "during each early either electric else email end enough enter error even every exactly example expect explain "
    "express extra fact fail family far few figure file final find fine first five follow for form found four free "
    "friday friend from full general get give go good got great group guarantee had half hand happen has have he help "
    "her here high him his holiday home hope hour house how however hundred idea if important in include increase "
    "information instead insurance interest into invoice is issue it item its january job just keep kind know label "
    "large last late later learn least leave left less let letter level limit line list little local long look lose "
    "lot low machine made mail main make manager many march mark matter may maybe me mean meeting member mention "
    "message might minute missing monday money month more morning most move much must my name near need network never "
    "new next night no none normal not note nothing notice now number of off offer office often old on once one online "
    "only open option or order other our out over own package page paid paper parcel part past pay people per perhaps "
    "person phone place plan please point policy possible post prefer present price print private probably problem "
    "process product promise proof provide purchase question quick quite rate rather reach read ready real reason "
    "receipt receive recent record reduce refund region register remain remember remove repair replace reply report "
    "request require return review right room rule safe sale same saturday save say screen second section security see "
    "seem sell send september serial service set several shall she ship shop short should show side sign similar since "
    "size small so software some something soon sorry sort standard start state stay step still stock stop store "
    "street subject such suggest summer supplier support sure system take team tell ten term test than thank that the "
    "their them then there these they thing think this those though three through ticket time to today together "
    "tomorrow too total track train transfer travel try tuesday turn two type under unit until up update upon us use "
    "user usual value version very visit wait want warehouse warranty was way we week well were what when where "
    "whether which while white who why will window wish with within without word work world would write wrong year yes "
    "yesterday yet you your "
    "reimbursement chargeback thermostat unsubscribed refurbished dispatcher Heidelberg Kowalczyk misrouted prorated "
    "DHL-4471 €129.90 v2.14.3 12:45 #88213 2024-11-03 XK-9920 75% ERR_TIMEOUT"
)
WORDS = VOCABULARY.split()


# --- what is counted --------------------------------------------------------------------------------------------------
def text(words: int, rng: random.Random) -> str:
    """Write sentences of about so many words."""
    rest = round(words * rng.uniform(0.75, 1.25))
    sentences = []
    while rest > 0:
        chosen = rng.choices(WORDS, k=min(rest, rng.randint(5, 18)))
        if len(chosen) > 9:
            chosen[len(chosen) // 2] += ","
        sentences.append(" ".join(chosen)[0].upper() + " ".join(chosen)[1:] + rng.choice("....?!"))
        rest -= len(chosen)
    return " ".join(sentences)


def conversation(rng: random.Random, question: int = 36, answer: int = 122, result: int = 238) -> Iterator[BaseMessage]:
    """Yield the messages of turns without end, of about so many words each."""

    def new_id() -> str:
        return str(UUID(int=rng.getrandbits(128), version=4))

    for number in count(1):
        yield HumanMessage(text(question, rng), id=new_id())
        if number % 3 == 0:
            call = {"name": "look_up", "args": {"query": text(4, rng)}, "id": f"call_{rng.getrandbits(96):x}"}
            yield AIMessage("", tool_calls=[call], id=new_id())
            yield ToolMessage(text(result, rng), tool_call_id=call["id"], id=new_id())
        yield AIMessage(text(answer, rng), id=new_id())


def new_messages(rng: random.Random) -> list[BaseMessage]:
    """Return what one turn adds: the last answer's call of a tool, its result, and the next question."""
    _, call, result, _, question = islice(conversation(rng), 4, 9)
    return [call, result, question]


def recount(messages: list[BaseMessage], encode: Callable[[str], list[int]]) -> int:
    """Count as OpenAI's cookbook does, and a call of a tool as turntrace does."""
    tokens = 3
    for message in messages:
        tokens += 3 + len(encode(ROLES[message.type])) + len(encode(message.content))
        if message.type == "ai" and message.tool_calls:
            for call in message.tool_calls:
                arguments = json.dumps(call["args"], ensure_ascii=False)
                tokens += 3 + len(encode(call["name"])) + len(encode(arguments))
    return tokens


# --- measuring --------------------------------------------------------------------------------------------------------
@dataclass
class Case:
    """Something to time: what makes the call ready, which is not timed, and what it cost in each round."""

    name: str
    ready: Callable[[], Callable[[], Any]]
    often: int = OFTEN
    us: list[float] = field(default_factory=list)

    def once(self) -> float:
        call = self.ready()
        start = time.thread_time_ns()
        call()
        return (time.thread_time_ns() - start) / 1e3


def measure(cases: Sequence[Case], rounds: int) -> None:
    """Run every case in every round, several times where it is quick; a round's figure is their median."""
    order = random.Random(1)
    for round_ in range(-WARM_UP, rounds):
        gc.collect()  # here for all, and in nothing that is measured
        gc.disable()
        for case in order.sample(cases, len(cases)):
            figure = statistics.median([case.once() for _ in range(case.often)])
            if round_ >= 0:
                case.us.append(figure)
        gc.enable()


def ratios(over: Case, under: Case) -> list[float]:
    return [high / low for high, low in zip(over.us, under.us, strict=True)]


# --- fitting ----------------------------------------------------------------------------------------------------------
def fitting(history: list[BaseMessage], rng: random.Random) -> list[Case]:
    """Return the cases on a history of 1,000 messages."""
    encode = encoding_for_model(MODEL).encode_ordinary
    tracker = ContextTracker(MODEL, limit=ROOM)
    total = tracker.count(history)
    pruning = ContextTracker(MODEL, limit=total, threshold=0.5)
    counter = MessageCounter(MODEL)
    pickled = pickle.dumps(history)

    def count_list(messages: list[BaseMessage]) -> int:
        return recount(messages, encode)

    def trim() -> list[BaseMessage]:
        return trim_messages(history, strategy="last", max_tokens=total // 2, token_counter=count_list)

    def with_new() -> Callable[[], Any]:
        messages = history + new_messages(rng)
        tracker.fit(history)  # as the call of the model before did
        return lambda: tracker.fit(messages)

    def unpickled() -> Callable[[], Any]:
        messages = pickle.loads(pickled) + new_messages(rng)
        return lambda: tracker.fit(messages)

    def fresh_pass() -> Callable[[], Any]:
        messages = pickle.loads(pickled)
        return lambda: sum(counter.counts(messages))

    def fresh_prune() -> Callable[[], Any]:
        messages = pickle.loads(pickled)
        return lambda: pruning.fit(messages)

    kept = pruning.fit(history)
    if not total == recount(history, encode) == sum(counter.counts(history)) + 3:
        raise SystemExit("turntrace and the recount do not agree; the figures would say nothing.")
    if not 0.4 * total < kept.tokens <= 0.5 * total or tracker.fit(history).decision.pruned:
        raise SystemExit("fit did not prune what it was to prune; the figures would say nothing.")
    return [
        Case(RECOUNT, lambda: lambda: recount(history, encode), often=1),
        Case(TRIM, lambda: trim, often=1),
        Case(FIT, with_new),
        Case(FRESH, unpickled),
        Case(CACHED, lambda: lambda: sum(counter.counts(history))),
        Case(CACHED_FRESH, fresh_pass),
        Case(PRUNE, lambda: lambda: pruning.fit(history)),
        Case(PRUNE_FRESH, fresh_prune),
    ]


def show_fitting(report: Report, cases: Sequence[Case], tokens: int) -> None:
    by_name = {case.name: case for case in cases}
    rows = [[case.name, middle(case.us), f"{statistics.median(case.us) * 1e3 / MESSAGES:,.0f}"] for case in cases]
    report.table(f"Fitting {tokens:,} tokens", ("1,000 messages", "caller CPU, µs", "a message, ns"), rows)
    found = {}
    for name, how, other, target in TARGETS:
        faster = how == "faster than"
        times = ratios(by_name[other], by_name[name]) if faster else ratios(by_name[name], by_name[other])
        found[f"{name} / {other}"] = summary(times)
        ratio = statistics.median(times)
        if target is None:
            report.say(f"{name} is {middle(times)} times {how} {other}.")
        elif faster:
            report.target(f"{name}, faster than {other}", ratio, at_least=target, unit=" times")
        else:
            report.target(f"{name}, to {other}", ratio, at_most=target, unit=" times")
    report.results["fitting"] = {"us": {case.name: summary(case.us) for case in cases}, "ratios": found}


# --- a turn -----------------------------------------------------------------------------------------------------------
def turns(messages: Sequence[BaseMessage], rng: random.Random) -> list[Case]:
    """Return two cases a length: `fit`, and a turn of the bare app."""
    tracker = ContextTracker(MODEL, limit=ROOM)
    tracker.count(messages)
    saver = InMemorySaver()
    app = build_app(saver)
    threads = count(1)

    def fit(length: int) -> Callable[[], Any]:
        given = [*messages[:length], *new_messages(rng)]
        tracker.fit(messages[:length])
        return lambda: tracker.fit(given)

    def turn(length: int) -> Callable[[], Any]:
        thread: Any = {"configurable": {"thread_id": str(next(threads))}}
        for old in list(saver.storage):
            saver.delete_thread(old)
        app.update_state(thread, {"messages": list(messages[:length])}, as_node="route")
        return lambda: app.invoke({"messages": [("user", question(1))]}, thread)

    cases = []
    for length in LENGTHS:
        cases.append(Case(f"fit {length}", lambda length=length: fit(length)))
        cases.append(Case(f"turn {length}", lambda length=length: turn(length), often=1))
    return cases


def show_turns(report: Report, cases: Sequence[Case]) -> None:
    by_name = {case.name: case for case in cases}
    rows, found = [], {}
    for length in LENGTHS:
        fit, turn = by_name[f"fit {length}"], by_name[f"turn {length}"]
        share = [ratio * 100 for ratio in ratios(fit, turn)]
        each = f"{statistics.median(fit.us) * 1e3 / (length + NEW):,.0f}"
        rows.append([f"{length:,}", middle(fit.us), each, middle(turn.us), middle(share)])
        found[length] = {"fit_us": summary(fit.us), "turn_us": summary(turn.us), "share_pct": summary(share)}
    header = ("messages", "fit, 3 new, µs", "a message, ns", "bare turn, µs", "fit's share, %")
    report.table("Fit beside a bare turn", header, rows)
    first, last = LENGTHS[0], LENGTHS[-1]
    for what in ("fit", "turn"):
        added = found[last][f"{what}_us"]["median"] - found[first][f"{what}_us"]["median"]
        report.say(f"From {first} to {last:,} messages a {what} gets {added:,.0f} µs longer.")
    report.results["turns"] = found


# --- memory -----------------------------------------------------------------------------------------------------------
def memory(report: Report, conversations: int) -> None:
    """Fit so many conversations of 20 messages by one tracker, twice, and say what each time left behind."""
    tracker = ContextTracker(MODEL, limit=ROOM)
    rng = random.Random(3)
    tracker.fit(list(islice(conversation(rng, 4, 4, 4), 20)))
    rows, found = [], {}
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for name in ("first", "second"):
        highest = 0
        for number in range(conversations):
            tracker.fit(list(islice(conversation(rng, 4, 4, 4), 20)))
            if number % 100 == 0:
                highest = max(highest, tracemalloc.get_traced_memory()[0])
        gc.collect()
        found[name] = (tracemalloc.get_traced_memory()[0] - before) / 1e6
        found[f"{name}, most"] = (highest - before) / 1e6
        rows.append([f"the {name} {conversations:,}", f"{found[name]:.1f}", f"{found[f'{name}, most']:.1f}"])
    tracemalloc.stop()
    report.table("Memory of one tracker", ("conversations of 20", "left behind, MB", "at most meanwhile, MB"), rows)
    added = found["second, most"] - found["first, most"]
    report.target(f"what the second {conversations:,} conversations add to the most", added, at_most=1.0, unit=" MB")
    report.results["memory_mb"] = found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--conversations", type=int, default=10_000, help="for the memory; 0 leaves it out")
    options = parser.parse_args()
    report = Report("Cost of fitting", __doc__)
    messages = list(islice(conversation(random.Random(1)), max(LENGTHS)))
    history, rng = messages[:MESSAGES], random.Random(2)
    tokens = ContextTracker(MODEL, limit=ROOM).count(history)
    cases = fitting(history, rng)
    measure(cases, options.rounds)
    show_fitting(report, cases, tokens)
    cases = turns(messages, rng)
    measure(cases, options.rounds)
    show_turns(report, cases)
    report.say("Medians, in brackets the middle half.")
    if options.conversations:
        memory(report, options.conversations)
    report.write(options.json)


if __name__ == "__main__":
    main()
