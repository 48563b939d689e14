"""Random problems against dense float64 algebra: right, or said."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.truth.case import Case, draw
from tests.truth.judge import Outcome, judged
from tests.truth.known import known

CASES = 300
SEEDS, THOUSANDS = range(1, 6), 1000
TALLY: Counter[Outcome] = Counter()

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("number", range(CASES))
def test_a_random_case(number):
    case = draw(number)
    verdict = judged(case)
    TALLY[verdict.outcome] += 1
    if verdict.outcome is Outcome.WRONG and (reason := known(case, verdict.why)):
        pytest.xfail(reason)
    assert verdict.outcome is not Outcome.WRONG, f"{verdict.why}\n{case}"


def test_most_are_judged_and_right():
    """To say that something went wrong is no way out."""
    if TALLY.total() < CASES:
        pytest.skip("not all cases were run")
    assert TALLY[Outcome.RIGHT] >= 0.7 * CASES, TALLY
    assert TALLY[Outcome.UNJUDGED] <= 0.1 * CASES, TALLY


@pytest.mark.thousands
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
def test_thousands_of_random_cases(seed):
    wrong = []
    for number in range(THOUSANDS):
        case: Case = draw(number, seed)
        if not known(case) and (verdict := judged(case)).outcome is Outcome.WRONG:
            wrong.append(f"python -m tests.truth --seed {seed} --first {number} --cases 1 --all\n    {verdict.why}")
    assert not wrong, "\n".join(wrong)
