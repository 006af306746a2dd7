"""The reward `math` on a table of answers whose verdicts were decided by hand, known false verdicts included."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unmask.rewards import RewardError, build_rewards, score, verification
from unmask.rewards.notation import MAX_CHARACTERS, MAX_DEPTH, MAX_DIGITS, normalise, too_large
from unmask.rewards.pool import Pool
from unmask.rewards.verification import compare, judge_math, warm

# One case a line: the rule of extraction, the completion, the gold answer, and the verdict that is right; `known` is
# what the reward says instead, where it is wrong.
TABLE = [json.loads(line) for line in Path(__file__).with_name("golden_math.jsonl").read_text().splitlines()]
KNOWN = [case for case in TABLE if "known" in case]
KINDS = {
    "integers", "decimals", "fractions", "mixed numbers", "percent", "currency", "thousands separators", "units",
    "powers and roots", "expressions", "equations", "inequalities", "intervals", "tuples and points", "sets and lists",
    "matrices", "nested braces", "unicode", "words", "times and ratios", "bases and subscripts",
    "infinity and the undefined", "no answer", "truncated", "several boxes", "text around", "answer tags", "gsm8k",
    "last number", "too large",
}  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(workers=2)
    yield made
    made.close()


def test_every_verdict_of_the_table() -> None:
    warm()
    wrong = []
    for case in TABLE:
        found = judge_math(case["text"], case["gold"], case["rule"])
        if found.outcome != case.get("known", case["verdict"]) or found.value != float(found.outcome == "ok"):
            wrong.append(f"{case['kind']}: {case['text']} for {case['gold']} is {found}, not {case['verdict']}")
    assert not wrong, "\n".join(wrong)


def test_the_table_is_large_and_its_false_verdicts_are_few() -> None:
    assert len(TABLE) >= 300 and {case["kind"] for case in TABLE} == KINDS
    assert len({(case["text"], case["gold"], case["rule"]) for case in TABLE}) == len(TABLE)
    assert min(Counter(case["verdict"] for case in TABLE).values()) >= 25
    assert len(KNOWN) <= 0.03 * len(TABLE) and all(case["known"] != case["verdict"] for case in KNOWN)


def table(pool: Pool, cases: list[tuple[str, Any]], **knobs: Any) -> Any:
    rewards = build_rewards([{"name": "math", **knobs}])
    rows = [{"prompt": "p", "answer": gold} for _, gold in cases]
    texts = [text for text, _ in cases]
    return score(rewards, rows, ["p"] * len(rows), texts, [[1]] * len(rows), pool=pool)


def test_the_pool_gives_the_same_verdicts(pool: Pool) -> None:
    cases = [case for case in TABLE if case["rule"] == "boxed"]
    got = table(pool, [(case["text"], case["gold"]) for case in cases])
    assert got.outcome == [case.get("known", case["verdict"]) for case in cases]
    assert got.codes["math"] == got.outcome


def test_what_hangs_the_verifier_ends_within_the_limit(pool: Pool) -> None:
    """Such an answer is left out; the answers that are known to hang are told apart before.

    It would take for ever; rows that are to be judged have a second twice and take milliseconds.
    """
    hanging = r"\boxed{(9999!)!}"
    assert not too_large("(9999!)!")
    got = table(pool, [(hanging, "5"), (r"\boxed{5}", "5"), (r"\boxed{9^{9^{9^9}}}", "5")], limit_s=3.0)
    assert got.outcome == ["timeout", "ok", "unparsable"]
    assert got.total_B[0].isnan() and got.total_B[1:].tolist() == [1.0, 0.0]
    assert got.extra["extracted"][1:] == ["5", "9^{9^{9^9}}"] and "no verdict" in got.extra["cause"][0]


NUMBERS = ["0", "-0", "007", "7", "-7", "7.0", "7.000001", "0.5", "-0.5", "0.333333", "123456789.123457", "1.000000"]
NUMBERS += ["123456789.123456", "999999999999999", "3/4", "6/8", "-3/4", r"\frac{3}{4}", r"-\frac{3}{4}"]
NUMBERS += [r"\frac{6}{8}", r"\dfrac{1}{3}", "14/2", r"\frac{1}{2}", "3/0", "+7", "5.", "0.3333333", "2^3"]


def test_plain_numbers_are_compared_as_the_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = list(itertools.product(NUMBERS, NUMBERS))
    short = [compare(*pair) for pair in pairs]
    for name in ("_decimal", "_rational"):
        monkeypatch.setattr(verification, name, lambda text: None)
    differing = [pair for pair, found in zip(pairs, short, strict=True) if compare(*pair) != found]
    assert not differing and {True, False} <= set(short)


def test_golds_are_text_or_numbers(pool: Pool) -> None:
    boxed = r"\boxed{0.5}"
    got = table(pool, [(boxed, 0.5), (boxed, "1/2"), (r"\boxed{3}", 3), (boxed, None)])
    assert got.outcome == ["ok", "ok", "ok", "error"] and got.total_B[3].isnan()
    for gold, rule in ((True, "neither text nor a number"), ([1], "neither text"), ("  ", "is empty")):
        with pytest.raises(RewardError, match=f"reward 'math': column 'answer' holds .*{rule}"):
            judge_math(boxed, gold)


def test_limits_of_an_answer_are_inclusive() -> None:
    assert not too_large("1" * MAX_DIGITS) and too_large("1" * (MAX_DIGITS + 1))
    assert not too_large("(" * MAX_DEPTH) and too_large("(" * (MAX_DEPTH + 1))
    assert not too_large("x" * MAX_CHARACTERS) and too_large("x" * (MAX_CHARACTERS + 1))
    assert not any(map(too_large, ["2^{3^4}", "10^{9999}", "9999!", "x^{y^{z}}", "2^{100}", "10^{-12}", "e^{x^2}"]))
    assert all(map(too_large, ["10^{99999}", "99999!", "2^{3^{4^5}}", "9^9^9^9", "5**5**5**5", "9^{999^{99}}", "3!!!"]))


@pytest.mark.parametrize(
    ("answer", "notation"),
    [
        ("2½", r"2\frac{1}{2}"),
        ("x²", "x^{2}"),
        ("√(x+1)", r"\sqrt{x+1}"),
        ("1.5e-3", r"1.5\times10^{-3}"),
        (r"\boxed{$1{,}234$}.", "1234"),
        ("no solution", r"\text{no solution}"),
        (r"\sin x", r"\sin x"),
        ("5\x00\u202e6", "56"),
        ("", ""),
    ],
)
def test_notation(answer: str, notation: str) -> None:
    assert normalise(answer) == notation
    assert normalise(notation) == notation


@pytest.mark.parametrize(("answer", "gold"), [(r"\frac{", "5"), ("}{", "5"), (r"\begin{pmatrix}1", "5"), ("^", "5")])
def test_what_is_no_mathematics(answer: str, gold: str) -> None:
    assert not compare(normalise(answer), gold)
