"""The built-in rewards on completions with verdicts known by hand."""

from __future__ import annotations

import time
from typing import Any

import pytest

from unmask.recipes import tasks
from unmask.recipes.registry import RecipeError
from unmask.rewards import build_rewards
from unmask.rewards.countdown import countdown, judge_countdown
from unmask.rewards.extraction import extract_answer
from unmask.rewards.formatting import answer_format
from unmask.rewards.mathematics import arithmetic, judge_arithmetic, parse_number
from unmask.rewards.sudoku import completions, is_valid, judge_sudoku, keeps_clues, nearest_share, sudoku
from unmask.rewards.verdicts import RewardError, text_of

EXTRACTIONS = [
    ("gsm8k_hash", "a\n#### 5", "5"),
    ("gsm8k_hash", "#### 5\n#### 7", "7"),
    ("gsm8k_hash", "#### 5\nand so on", "5"),
    ("gsm8k_hash", "#### 5 #### 7", "7"),
    ("gsm8k_hash", "1+1=2 ####  2 ", "2"),
    ("gsm8k_hash", "#### 5\r\nx", "5"),
    ("gsm8k_hash", "#### 5\n####", None),
    ("gsm8k_hash", "### 5", None),
    ("gsm8k_hash", "##### 5", None),
    ("gsm8k_hash", "5", None),
    ("gsm8k_hash", "", None),
    ("answer_tag", "<answer>5</answer>", "5"),
    ("answer_tag", "<answer>4</answer><answer>\n5\n</answer> tail", "5"),
    ("answer_tag", "<answer>4 <answer>5</answer>", "5"),
    ("answer_tag", "<answer>5</answer><answer>6", "5"),
    ("answer_tag", "<answer>55", None),
    ("answer_tag", "5</answer>", None),
    ("answer_tag", "</answer>5<answer>", None),
    ("answer_tag", "<answer> </answer>", None),
    ("boxed", r"so \boxed{5}.", "5"),
    ("boxed", r"\boxed{4} \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    ("boxed", r"\boxed {5}", "5"),
    ("boxed", r"\boxed{\{1,2\}}", r"\{1,2\}"),
    ("boxed", r"\boxed{\{1} 2}", r"\{1"),
    ("boxed", r"\boxed{5", None),
    ("boxed", r"\boxed{4} \boxed{5", None),
    ("boxed", r"\boxed{}", None),
    ("boxed", r"\boxed 5", None),
    ("boxed", r"\boxed{5" + "\\", None),
    ("last_number", "7-5", "5"),
    ("last_number", "it is -5.", "-5"),
    ("last_number", "4 then 1,234.50 dollars", "1,234.50"),
    ("last_number", "a7+8=5 b5*3=5", "5"),
    ("last_number", "none ٣", None),
]


@pytest.mark.parametrize(("rule", "text", "answer"), EXTRACTIONS)
def test_extraction(rule: Any, text: str, answer: str | None) -> None:
    assert extract_answer(text, rule) == answer


COUNTDOWN = [  # completion, numbers, target, value, outcome
    ("3*8=24\n24-5=19\n#### 3*8-5", [3, 8, 5], 19, 1.0, "ok"),
    ("#### 8*3-5", [3, 8, 5], 19, 1.0, "ok"),
    ("#### -5+3*8", [3, 8, 5], 19, 1.0, "ok"),
    ("#### ((3*8)-5)", [5, 8, 3], 19, 1.0, "ok"),
    ("#### 8/(3-8/3)", [3, 3, 8, 8], 24, 1.0, "ok"),
    ("#### 1/3*3", [1, 3, 3], 1, 1.0, "ok"),
    ("#### 4+4", [4, 4], 8, 1.0, "ok"),
    ("#### 3*8-5", [3.0, 8.0, 5.0], 19.0, 1.0, "ok"),
    ("#### 3*8+5", [3, 8, 5], 19, 0.0, "wrong"),
    ("#### 3*8", [3, 8, 5], 24, 0.0, "wrong"),  # 5 unused
    ("#### 3*8-5+5-5", [3, 8, 5], 19, 0.0, "wrong"),  # 5 three times
    ("#### 4*4", [4, 2], 16, 0.0, "wrong"),  # 4 twice, 2 never
    ("#### 38-5", [3, 8, 5], 33, 0.0, "wrong"),  # concatenation is another number
    ("#### 19", [3, 8, 5], 19, 0.0, "wrong"),
    ("#### 3*8-5+0", [3, 8, 5], 19, 0.0, "wrong"),
    ("#### 3/(8-8)", [3, 8, 8], 0, 0.0, "wrong"),
    ("#### 7/2", [7, 2], 3, 0.0, "wrong"),  # no integer division
    ("#### 3*8-5=19", [3, 8, 5], 19, 0.0, "unparsable"),
    ("#### 8**3", [8, 3], 512, 0.0, "unparsable"),
    ("#### 7//2", [7, 2], 3, 0.0, "unparsable"),
    ("#### __import__('os').system('true')", [3, 8], 11, 0.0, "unparsable"),
    ("#### 9**9**9**9**9", [9] * 5, 9, 0.0, "unparsable"),
    ("#### " + "(" * 10_000 + "3+8" + ")" * 10_000, [3, 8], 11, 0.0, "unparsable"),
    ("#### ３+８", [3, 8], 11, 0.0, "unparsable"),
    ("#### 3+8 is it", [3, 8], 11, 0.0, "unparsable"),
    ("####", [3, 8], 11, 0.0, "unparsable"),
    ("3+8", [3, 8], 11, 0.0, "unparsable"),
    ("", [3, 8], 11, 0.0, "unparsable"),
    ("#### 3+8", None, 11, None, None),
    ("#### 3+8", [3, 8], None, None, None),
]


@pytest.mark.parametrize(("text", "numbers", "target", "value", "outcome"), COUNTDOWN)
def test_countdown(text: str, numbers: Any, target: Any, value: float | None, outcome: str | None) -> None:
    assert judge_countdown(text, numbers, target)[:2] == (value, outcome)


@pytest.mark.parametrize(
    ("answer", "value"), [("3*8-5", 1.0), ("3*8+5", 0.1), ("3*8", 0.0), ("3/(8-8)-5", 0.0), ("3*8-", 0.0)]
)
def test_countdown_partial_credit_needs_every_number_once(answer: str, value: float) -> None:
    assert judge_countdown(f"#### {answer}", [3, 8, 5], 19, partial=0.1).value == value
    assert judge_countdown("#### 3/(5-5)", [3, 5, 5], 19, partial=0.1).value == 0.0  # it has no value at all


SOLVED = "1342243141233214"  # rows 1342 2431 4123 3214
CLUES = "1040003140230014"
OTHER = "1234341221434321"
SUDOKU = [  # completion, puzzle, value, outcome
    (f"b=3 d=2\n#### {SOLVED}", CLUES, 1.0, "ok"),
    (f"#### {SOLVED}", "1040 0031 4023 0014", 1.0, "ok"),
    ("#### 1342 2431 4123 3214", CLUES, 1.0, "ok"),
    (f"#### {SOLVED}", "0" * 16, 1.0, "ok"),  # any valid grid completes an empty puzzle
    (f"#### {OTHER}", "0" * 16, 1.0, "ok"),
    (f"#### {SOLVED}", SOLVED, 1.0, "ok"),
    (f"#### {OTHER}", CLUES, 0.0, "wrong"),  # valid, but not this puzzle
    ("#### 1342243141233241", CLUES, 0.0, "wrong"),  # clues p and o changed
    ("#### 1342243141233114", CLUES, 0.0, "wrong"),  # a repeated 1
    ("#### " + "1234" * 4, "0" * 16, 0.0, "wrong"),  # rows right, columns wrong
    ("#### 1234234134124123", "0" * 16, 0.0, "wrong"),  # rows and columns right, boxes wrong
    ("#### " + "1" * 16, "0" * 16, 0.0, "wrong"),
    (f"#### {CLUES}", CLUES, 0.0, "wrong"),  # blanks left open
    ("#### 5678243141233214", "0" * 16, 0.0, "wrong"),
    (f"#### {SOLVED[:15]}", CLUES, 0.0, "unparsable"),
    (f"#### {SOLVED}4", CLUES, 0.0, "unparsable"),
    (f"#### {SOLVED[:15]}x", CLUES, 0.0, "unparsable"),
    ("#### " + SOLVED.translate({ord(d): chr(0x660 + int(d)) for d in "1234"}), CLUES, 0.0, "unparsable"),
    (SOLVED, CLUES, 0.0, "unparsable"),
    ("", CLUES, 0.0, "unparsable"),
    (f"#### {SOLVED}", "1100" + "0" * 12, 0.0, "wrong"),  # no completion exists
    (f"#### {SOLVED}", None, None, None),
]


@pytest.mark.parametrize(("text", "puzzle", "value", "outcome"), SUDOKU)
def test_sudoku(text: str, puzzle: Any, value: float | None, outcome: str | None) -> None:
    assert judge_sudoku(text, puzzle)[:2] == (value, outcome)


def test_sudoku_grids_and_partial_credit() -> None:
    grids = list(completions("0" * 16))
    assert len(grids) == len(set(grids)) == 288 and all(is_valid(grid) for grid in grids)  # 4! x 2! x 2! x 3, known
    assert keeps_clues(SOLVED, CLUES) and not keeps_clues(OTHER, CLUES)
    one_cell_wrong = "1342243141233114"  # 9 clues stand, 7 blanks (b d e f j m n), n is wrong
    assert CLUES.count("0") == 7 and [g for g in grids if keeps_clues(g, CLUES)] == [SOLVED]
    assert nearest_share(one_cell_wrong, CLUES) == 6 / 7
    assert judge_sudoku(f"#### {one_cell_wrong}", CLUES, partial=0.7).value == pytest.approx(0.6)
    assert judge_sudoku(f"#### {OTHER}", CLUES, partial=0.5).value == 0.0  # clues broken
    assert judge_sudoku(f"#### {SOLVED}", CLUES, partial=0.5).value == 1.0
    # twelve completions: the nearest counts, so no particular solution is preferred
    pair = [g for g in grids if keeps_clues(g, SOLVED[:4] + "0" * 12)]
    assert len(pair) == 12
    for grid in pair:
        spoiled = grid[:15] + ("1" if grid[15] != "1" else "2")
        assert nearest_share(spoiled, SOLVED[:4] + "0" * 12) == 11 / 12
    assert judge_sudoku("#### " + "1" * 16, "11" + "0" * 14, partial=0.5).value == 0.0  # no completion exists


NUMBERS = [
    ("5", 5, 1),
    ("-5", -5, 1),
    ("+5", 5, 1),
    ("1,234", 1234, 1),
    ("$18", 18, 1),
    ("-$18", -18, 1),
    ("0.50", 1, 2),
    ("7.", 7, 1),
    ("007", 7, 1),
]


@pytest.mark.parametrize(("text", "numerator", "denominator"), NUMBERS)
def test_numbers(text: str, numerator: int, denominator: int) -> None:
    found = parse_number(text)
    assert found is not None and found * denominator == numerator


@pytest.mark.parametrize("text", ["", "five", "1 2", "12,34", "1e5", "0x5", "٣", "5%", "--5", "1/2", "nan", "9" * 65])
def test_not_a_number(text: str) -> None:
    assert parse_number(text) is None


ARITHMETIC = [  # completion, answer, value, outcome
    ("a7+8=5\n#### 5", "5", 1.0, "ok"),
    ("#### 5.0", "5", 1.0, "ok"),
    ("#### 5", 5, 1.0, "ok"),
    ("#### 0.1", 0.1, 1.0, "ok"),
    ("#### 6", "5", 0.0, "wrong"),
    ("#### -5", "5", 0.0, "wrong"),
    ("#### five", "5", 0.0, "unparsable"),
    ("#### 5 5", "5", 0.0, "unparsable"),
    ("5", "5", 0.0, "unparsable"),
    ("#### 5", None, None, None),
]


@pytest.mark.parametrize(("text", "answer", "value", "outcome"), ARITHMETIC)
def test_arithmetic(text: str, answer: Any, value: float | None, outcome: str | None) -> None:
    assert judge_arithmetic(text, answer)[:2] == (value, outcome)


FORMATS = [
    ("gsm8k_hash", "x\n#### 5", 1.0),
    ("gsm8k_hash", "#### 5\n#### 5", 0.0),
    ("gsm8k_hash", "####", 0.0),
    ("gsm8k_hash", "5", 0.0),
    ("answer_tag", "<answer>5</answer>", 1.0),
    ("answer_tag", "<answer>5</answer></answer>", 0.0),
    ("answer_tag", "<answer><answer>5</answer>", 0.0),
    ("answer_tag", "<answer></answer>", 0.0),
    ("boxed", r"\boxed{5}", 1.0),
    ("boxed", r"\boxed{5}\boxed{5}", 0.0),
    ("boxed", r"\boxed{5", 0.0),
    ("boxed", r"\boxed{\boxed{5}}", 0.0),
]


@pytest.mark.parametrize(("style", "text", "value"), FORMATS)
def test_answer_format(style: Any, text: str, value: float) -> None:
    assert answer_format(style=style)(completions=[text, [{"role": "assistant", "content": text}]]) == [value, value]


def test_every_extraction_rule_reaches_the_reward() -> None:
    assert countdown(extract="boxed")(completions=[r"\boxed{3+8}"], numbers=[[3, 8]], target=[11]) == [1.0]
    assert countdown(extract="answer_tag")(completions=["#### 3+8"], numbers=[[3, 8]], target=[11]) == [0.0]
    assert countdown(partial=0.25)(completions=["#### 3-8"], numbers=[[3, 8]], target=[11]) == [0.25]
    assert sudoku(extract="answer_tag")(completions=[f"<answer>{SOLVED}</answer>"], puzzle=[CLUES]) == [1.0]
    assert sudoku(partial=0.7)(completions=["#### 1342243141233114"], puzzle=[CLUES]) == [pytest.approx(0.6)]
    assert arithmetic(extract="last_number")(completions=["so it is 5"], answer=["5"]) == [1.0]


@pytest.mark.parametrize("name", ["arithmetic", "countdown", "sudoku"])
def test_reference_completions_of_the_tasks_are_right(name: str) -> None:
    rows = tasks.task.build({"name": name})("heldout")
    batch = [rows.row(index) for index in range(200)]
    columns = {key: [row[key] for row in batch] for key in batch[0] if key != "prompt"}
    logged: dict[str, list[Any]] = {}
    [reward, form] = build_rewards([name, "answer_format"])
    texts = [row["reference"] for row in batch]
    assert reward.function(completions=texts, log_extra=logged.__setitem__, **columns) == [1.0] * 200
    assert logged["outcome"] == ["ok"] * 200
    assert form.function(completions=texts, **columns) == [1.0] * 200
    # and the reference of another problem is almost never right
    shifted = reward.function(completions=texts[1:] + texts[:1], **columns)
    assert sum(value or 0.0 for value in shifted) < 50


BAD_COLUMNS = [
    (lambda: judge_countdown("", "3 8", 11), "'numbers' holds '3 8'"),
    (lambda: judge_countdown("", 38, 11), "'numbers' holds 38"),
    (lambda: judge_countdown("", [3, 0.5], 11), "'numbers' holds 0.5"),
    (lambda: judge_countdown("", [3, True], 11), "'numbers' holds True"),
    (lambda: judge_countdown("", [3, 8], "11"), "'target' holds '11'"),
    (lambda: judge_countdown("", [3, 8], float("nan")), "'target' holds nan"),
    (lambda: judge_sudoku("", "123"), "'puzzle' holds '123'"),
    (lambda: judge_sudoku("", 1040003140230014), "'puzzle' holds 1040003140230014"),
    (lambda: judge_sudoku("", "5" + "0" * 15), "'puzzle' holds '5000000000000000'"),
    (lambda: judge_arithmetic("", "five"), "'answer' holds 'five'"),
    (lambda: judge_arithmetic("", [5]), "'answer' holds [5]"),
    (lambda: judge_arithmetic("", float("inf")), "'answer' holds inf"),
    (lambda: judge_arithmetic("", True), "'answer' holds True"),
]


@pytest.mark.parametrize(("judge", "message"), BAD_COLUMNS, ids=[message for _, message in BAD_COLUMNS])
def test_a_bad_dataset_value_is_an_error_and_never_a_reward(judge: Any, message: str) -> None:
    with pytest.raises(RewardError) as error:
        judge()
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("factory", [countdown, sudoku])
@pytest.mark.parametrize("partial", [1.0, -0.1, float("nan")])
def test_partial_credit_stays_below_a_right_answer(factory: Any, partial: float) -> None:
    with pytest.raises(RecipeError, match=r"partial: .* must lie in \[0, 1\)"):
        factory(partial=partial)


def test_text_of_both_formats() -> None:
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert text_of("x") == "x" and text_of(messages) == "ab" and text_of([]) == ""
    assert text_of([{"role": "assistant", "content": None}]) == ""


def test_a_megabyte_of_markers_takes_no_time() -> None:
    texts = [
        mark * (1_000_000 // len(mark))
        for mark in ("####", "#### ", "<answer>", "</answer>", r"\boxed{", "1,", "-", "1")
    ]
    start = time.thread_time()  # of this thread: the machine may have other work
    for text in texts:
        for rule in ("gsm8k_hash", "answer_tag", "boxed", "last_number"):
            extract_answer(text, rule)
            judge_countdown(text, [3, 8], 11, "gsm8k_hash")
    assert time.thread_time() - start < 10
