"""Sudoku 9x9, formats, and d1's published rewards beside ours: values by hand, defects shown and absent."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rewards import build_rewards
from unmask.rewards.formatting import has_tags, over_length, repeated_share
from unmask.rewards.published import form_of, stripped, walked
from unmask.rewards.sudoku import completions, first_completions, is_valid, judge_sudoku, nearest_share, units

SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
CLUES = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"  # Wikipedia's example
OPEN = "0" * 81


def test_units_of_a_grid() -> None:
    for cells, side in ((16, 4), (81, 9)):
        assert len(units(cells)) == 3 * side and {len(set(unit)) for unit in units(cells)} == {side}
        assert all(sum(cell in unit for unit in units(cells)) == 3 for cell in range(cells))


def test_nine_by_nine() -> None:
    assert list(completions(CLUES)) == [SOLVED] and is_valid(SOLVED)
    assert judge_sudoku(f"#### {SOLVED}", CLUES)[:2] == (1.0, "ok")
    assert judge_sudoku(f"#### {SOLVED}", OPEN)[:2] == (1.0, "ok")
    rows = " ".join(SOLVED[i : i + 9] for i in range(0, 81, 9))
    assert judge_sudoku(f"#### {rows}", CLUES)[:2] == (1.0, "ok")
    swapped = SOLVED.translate(str.maketrans("12", "21"))
    assert is_valid(swapped) and judge_sudoku(f"#### {swapped}", CLUES)[:2] == (0.0, "wrong")
    assert judge_sudoku(f"#### {SOLVED[:80]}", CLUES)[:2] == (0.0, "unparsable")
    assert judge_sudoku(f"#### {CLUES}", CLUES)[:2] == (0.0, "wrong")


def test_blank_cells_of_nine_by_nine() -> None:
    blanks = [cell for cell, clue in enumerate(CLUES) if clue == "0"]
    assert len(blanks) == 51
    wrong = list(SOLVED)
    for cell in blanks[:3]:
        wrong[cell] = "1" if wrong[cell] != "1" else "2"
    spoiled = "".join(wrong)
    assert nearest_share(spoiled, CLUES) == 48 / 51
    assert judge_sudoku(f"#### {spoiled}", CLUES, partial=0.5).value == pytest.approx(0.5 * 48 / 51)
    filled = "".join("1" if clue == "0" else clue for clue in CLUES)
    assert judge_sudoku(f"#### {filled}", CLUES).value == 0.0  # all or nothing
    ones = sum(SOLVED[cell] == "1" for cell in blanks) / 51
    assert judge_sudoku(f"#### {filled}", CLUES, partial=0.9).value == pytest.approx(0.9 * ones)


def test_an_open_puzzle_is_searched_for_a_while_only() -> None:
    assert len(first_completions(OPEN)) == 288 and all(map(is_valid, first_completions(OPEN)))
    assert list(completions("55" + "0" * 79)) == []


def test_every_four_by_four_puzzle_has_its_completions() -> None:
    grids = list(completions("0" * 16))
    assert len(set(grids)) == 288
    rng = random.Random(0)
    for grid in rng.sample(grids, 20):
        clues = "".join(digit if rng.random() < 0.5 else "0" for digit in grid)
        fitting = {g for g in grids if all(c in ("0", d) for c, d in zip(clues, g, strict=True))}
        assert set(completions(clues)) == fitting


TAGS = [
    ("<reasoning>a</reasoning><answer>b</answer>", True),
    ("<reasoning>\na\nb\n</reasoning>\n<answer>\nb\n</answer>\n", True),
    ("  <reasoning>a</reasoning>  <answer>b</answer>", True),
    ("<answer>b</answer><reasoning>a</reasoning>", False),
    ("<reasoning>a</reasoning><answer></answer>", False),
    ("<reasoning>a</reasoning> so <answer>b</answer>", False),
    ("x<reasoning>a</reasoning><answer>b</answer>", False),
    ("<reasoning>a</reasoning><answer>b</answer>x", False),
    ("<reasoning>a</reasoning><answer>b</answer><answer>c</answer>", False),
    ("<reasoning>a<reasoning></reasoning><answer>b</answer>", False),
    ("<reasoning>a<answer>b</answer></reasoning>", False),
    ("<answer>b</answer>", False),
    ("", False),
]


@pytest.mark.parametrize(("text", "good"), TAGS)
def test_tags(text: str, good: bool) -> None:
    assert has_tags(text, ("reasoning", "answer")) is good
    [reward] = build_rewards([{"name": "tags", "names": ["reasoning", "answer"]}])
    assert reward.function(completions=[text]) == [float(good)]


def test_length_is_punished_softly() -> None:
    [reward] = build_rewards([{"name": "soft_length", "limit": 100, "buffer": 20}])
    lengths = [0, 80, 81, 90, 99, 100, 101, 1000]
    found = reward.function(completion_ids=[[1] * length for length in lengths])
    assert found == pytest.approx([0, 0, -0.05, -0.5, -0.95, -1, -1, -1])
    assert over_length(5, 5, 0) == 0.0 and over_length(6, 5, 0) == 1.0


def test_repetition() -> None:
    assert repeated_share(["a", "b", "c", "d"], 2) == 0 and repeated_share(["a", "b", "a", "b", "a"], 2) == 0.5
    assert repeated_share(["a"], 2) == 0 and repeated_share([], 1) == 0
    [reward] = build_rewards([{"name": "repetition", "words": 1}])
    assert reward.function(completions=["x x x x", "a b", ""]) == [-0.75, 0.0, 0.0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "tags", "names": []}, "must be different names"),
        ({"name": "tags", "names": ["a", "a"]}, "must be different names"),
        ({"name": "tags", "names": ["<a>"]}, "must be different names"),
        ({"name": "soft_length", "limit": 5, "buffer": 6}, "0 <= buffer <= limit"),
        ({"name": "soft_length"}, "needs the knob 'limit'"),
        ({"name": "repetition", "words": 0}, "at least 1"),
    ],
)
def test_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_rewards([entry])


def values_of(name: str, texts: list[str], **columns: Any) -> list[float]:
    logged: dict[str, list[Any]] = {}
    [reward] = build_rewards([name])
    found = reward.function(completions=texts, **columns, log_extra=lambda key, values: logged.update({key: values}))
    assert len(logged["outcome"]) == len(texts)
    return found


PERFECT = "<reasoning>\nthink\n</reasoning>\n<answer>\n5\n</answer>\n"


def test_d1_gsm8k_as_published() -> None:
    bare = PERFECT.rstrip("\n")
    texts = [PERFECT, bare, "5", "<answer>1,000</answer>", PERFECT.replace("think", "a\nb")]
    found = values_of("d1_gsm8k", texts, answer=["5", "5", "5", "1000", "5"])
    # 4 x 0.125 and 0.5 strict, 0.5 int, 2; the soft form fails, for its dot does not cross lines either
    assert found[0] == pytest.approx(0.5 + 0.5 + 0.5 + 2)
    # no line end behind the last tag: charged for the whole text, and -(-1) for the tag that ends it
    assert found[1] == pytest.approx(0.5 - 0.001 * len(bare) + 0.001 + 0.5 + 2)
    assert found[2] == pytest.approx(0.5 + 2) and found[3] == 0.0
    assert found[4] == pytest.approx(0.5 + 0.5 + 2)  # several lines of reasoning cost the strict form
    assert form_of(texts[4], re.DOTALL)["strict_format"] == 0.5  # in later revisions they do not
    assert form_of("<reasoning>a</reasoning> <answer>b</answer>", re.RegexFlag(0))["soft_format"] == 0.5


def test_d1_math_as_published() -> None:
    gold = r"so \boxed{\frac{1}{2}}"
    texts = [r"<answer>\boxed{\dfrac12}</answer>", r"\boxed{0.5}", r"<answer>0.5</answer>", r"\boxed{1/3}", ""]
    assert values_of("d1_math", texts, answer=[gold] * 5) == [2.75, 2.25, 0.75, 0.25, 0.25]
    pairs = [(r"\tfrac{1}{2}", r"\frac{1}{2}"), ("x=5", "5"), (r"5\text{ cm}", "5"), (r"\$5", "5"), ("3/4", r"\frac34")]
    pairs += [(r"\sqrt2", r"\sqrt{2}"), (r"90^\circ", "90"), (".5", "0.5"), (r"50\%", "50"), (r"\left(1\right)", "(1)")]
    assert all(stripped(one) == stripped(other) for one, other in pairs)
    assert stripped("10") != stripped("1") and stripped("x=y=5") == "x=y=5"


def test_d1_countdown_as_published() -> None:
    rows: dict[str, Any] = {"numbers": [[3, 5, 8]] * 8, "target": [19] * 8}
    texts = ["3*8-5", "3*8+5", "3*8", "nonsense", "8**3", "3*8-5.0", "9**9**9**9", "(3*8)-5"]
    found = values_of("d1_countdown", [f"<answer>{text}</answer>" for text in texts], **rows)
    assert found == [1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 1.0]
    assert values_of("d1_countdown", ["3*8-5", ""], numbers=[[3, 5, 8]] * 2, target=[19] * 2) == [0.0, 0.0]
    # what its evaluator takes, ours does not
    assert walked("2**3") == 8 and walked("7//2") == 3 and walked("-2**2") == -4 and walked("4**0.5") == 2
    assert (
        walked("(0-8)**(1/3)") is None and walked("1/0") is None and walked("9**9**9") is None and walked("x") is None
    )
    [ours] = build_rewards(["countdown"])
    assert ours.function(completions=["#### 2**3", "#### 7//2"], numbers=[[2, 3], [7, 2]], target=[8, 3]) == [0.0, 0.0]


def test_d1_sudoku_as_published() -> None:
    solution, puzzle = "1342243141233214", "1040003140230014"
    constant = "<answer>" + "1" * 16 + "</answer>"
    texts = [f"<answer>{solution}</answer>", constant, "<answer>13</answer>", solution, "<answer>none</answer>"]
    found = values_of("d1_sudoku", texts, puzzle=[puzzle] * 5, solution=[solution] * 5)
    blanks = [cell for cell in range(16) if puzzle[cell] == "0"]
    ones = sum(solution[cell] == "1" for cell in blanks) / len(blanks)
    assert found == [1.0, ones, 1 / len(blanks), 0.0, 0.0]
    spoiled = "2" + solution[1:]  # a given cell is changed: theirs does not look, ours does
    assert values_of("d1_sudoku", [f"<answer>{spoiled}</answer>"], puzzle=[puzzle], solution=[solution]) == [1.0]
    assert judge_sudoku(f"<answer>{spoiled}</answer>", puzzle, "answer_tag").value == 0.0


def test_published_rewards_are_marked_and_isolated() -> None:
    names = [name for name in SLOTS["reward"] if name.startswith("d1_")]
    assert len(names) == 4
    for name in names:
        assert "as published" in (SLOTS["reward"].get(name).__doc__ or "")
        assert build_rewards([name])[0].isolation is not None


def test_components_are_logged() -> None:
    numbers: dict[str, float] = {}
    [reward] = build_rewards(["d1_gsm8k"])
    reward.function(
        completions=[PERFECT, ""], answer=["5", "5"], log_metric=lambda key, value: numbers.update({key: value})
    )
    assert numbers == {
        "d1_gsm8k/xmlcount": 0.25,
        "d1_gsm8k/soft_format": 0.0,
        "d1_gsm8k/strict_format": 0.25,
        "d1_gsm8k/int": 0.25,
        "d1_gsm8k/correct": 1.0,
    }
