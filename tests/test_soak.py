"""The short form of the soak; the long one is run by hand: ``python tests/soak.py --seconds 600 --conversations 2000``.

That takes eleven minutes, with four workers and three kills (``--workers``, ``--kills``), thirty turns a second where
the machine can (``--rate``), and ``--seed N`` for another chance. ``--postgres`` has the ledger on PostgreSQL,
``--races`` adds turns at which two processes are at the same moment, ``--only`` and ``--without`` choose among the
kinds of turns, and ``--json`` and ``--keep`` leave behind what to look at.
"""

from dataclasses import replace
from pathlib import Path

from soak import Plan, soak
from turntrace import attributes as a

SHORT = Plan(seconds=20, conversations=80, workers=3, seed=1, rate=20, kills=2)


def test_in_the_end_of_a_short_soak_the_workers_the_ledger_the_spans_and_the_scores_agree(tmp_path: Path) -> None:
    result = soak(SHORT, tmp_path)
    assert not result.differences, str(result)
    # So little as one span, one value or one word that is not as it should be would have been seen.
    root = next(span for span in result.spans if span.name == a.SPAN_TURN)
    others = [span for span in result.spans if span is not root]
    said = {**root.attributes, a.TURN_STATUS: "lost", a.TURN_LLM_CALLS: -1}
    assert result.check(others, result.scores)
    assert result.check([*others, replace(root, attributes=said)], result.scores)
    score_id, score = next(iter(result.scores.items()))
    assert result.check(result.spans, {**result.scores, score_id: {**score, "value": "another"}})
    assert result.check(result.spans, {**result.scores, "unknown": score})
