"""What is said at the support desk of the demo, by its users and by the model."""

from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class Ask:
    """The model asks for a tool to be called."""

    tool: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outage:
    """The model's provider does not answer."""


Answer: TypeAlias = str | Ask | Outage
Exchange: TypeAlias = tuple[str, list[Answer]]
"""What a user says, and what the model answers to it, call by call."""

LATE_ORDER: list[Exchange] = [
    ("Hi, where is my order 4711?", [Ask("order_status", {"order": "4711"}), "It left our warehouse this morning."]),
    ("When will it be here?", ["The carrier says tomorrow between nine and noon. Does that work for you?"]),
    ("No, I am away tomorrow.", ["I can hold it at the pick-up point for seven days. Shall I?"]),
    ("Yes please, do that.", ["Done. You will get a code by text message as soon as it is there."]),
]

REFUND: list[Exchange] = [
    (
        "Me again, about order 4711. It arrived broken, I want my money back.",
        [
            Ask("order_status", {"order": "4711"}),
            Ask("refund", {"order": "4711", "amount": 49.9}),  # a person approves it, and it fails: see `Payments`
            Ask("refund", {"order": "4711", "amount": 49.9}),
            "I am sorry about that. I have sent your 49.90 back; it takes two to three days.",
        ],
    ),
    ("Do I have to send it back?", ["No, you can throw it away."]),
    ("Thanks, that was quick!", ["You are welcome. Is there anything else?"]),
    ("No, that is all.", ["Then have a good day."]),
]

SHIPPING: list[Exchange] = [
    ("Do you ship to Norway?", ["Yes, to all of Norway. It takes five to eight days."]),
    ("What does it cost?", ["12.50 for up to five kilograms, 19.00 for more. How heavy will it be?"]),
    ("About eight kilograms.", ["Then it is 19.00."]),
    ("And express?", ["Unfortunately, I can't offer express to Norway."]),
]

INVOICES: list[Exchange] = [
    ("List the status of orders 5001 and 5002.", [Ask("order_status", {"order": "5001"}), "Both are paid and packed."]),
    ("Send the invoices of May to our accounting.", ["To which address should I send them?"]),
    ("To the one in our contract.", ["I cannot see contracts. Would you like me to hand you to a colleague?"]),
    ("Yes, hand me over.", ["A colleague takes over now. They can see all that we wrote."]),
]

PASSWORD: list[Exchange] = [
    ("I cannot sign in any more.", ["Let us get you back in. Do you see an error message?"]),
    (
        "It says that my account is locked.",
        ["That happens after five wrong passwords. Shall I send you a link?"],
    ),
    ("Send it to me.", ["It is on its way, and works for an hour."]),
    ("It does not work.", ["Did you open it in the same browser?"]),
    ("Yes, and I still cannot sign in.", [Outage()]),
]

ANSWERS = {said: answers for script in (LATE_ORDER, REFUND, SHIPPING, INVOICES, PASSWORD) for said, answers in script}
"""The model's answers, by what the user said."""
