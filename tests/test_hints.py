"""Hints are chunks of the solution at their places, drawn by a key, and never a token of the answer."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch

from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.problems import marked
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rollouts.canvases import Frame
from unmask.rollouts.hints import answer_spans, chunked_hint, hints, may_be_given
from unmask.rollouts.worker import token_offsets

TOKENIZER = byte_tokenizer()
MASK = 257
DRAWS = 400


def frame(length: int, key: float = 0.5) -> Frame:
    def encode(text: str) -> list[int]:
        return TOKENIZER(text, add_special_tokens=False)["input_ids"]

    return Frame(
        length, MASK, (256, 256), encode, torch.full((length,), key, dtype=torch.float64),
        lambda text: token_offsets(TOKENIZER, text),
    )  # fmt: skip


def texts(spans: list[tuple[int, int]], text: str) -> list[str]:
    return [text[a:b] for a, b in spans]


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("a+2=9\nb-3=6\n#### 6", None, ["6", " 6", "6"]),
        ("12+4=16, so 6\n#### 6", None, ["6", " 6", "6"]),
        ("it is 6.5, not 6\nThe answer is: 6", None, ["6", " 6", "6"]),
        (r"so $x=\frac{1}{2}$ and \boxed{\frac{1}{2}}", None, [r"\frac{1}{2}"] * 2),
        (r"an unfinished \boxed{\{1", None, [r"\{1"]),
        ("<reasoning>\n4 and 4\n</reasoning>\n<answer>\n4\n</answer>", None, ["4", "4", "\n4\n", "4"]),
        ("no mark but 12 here, 12.5 there", "12", ["12"]),
        ("no mark at all", None, []),
    ],
)  # fmt: skip
def test_where_the_answer_stands(text: str, answer: str | None, found: list[str]) -> None:
    assert texts(answer_spans(text, answer), text) == found


def test_marked_answers_alone() -> None:
    text = "b-3=6\n#### 6"
    assert texts(answer_spans(text, "6", everywhere=False), text) == [" 6"]


def test_tokens_that_touch_an_answer_are_not_given() -> None:
    """The word ` 6` is one token of which the answer is a part; an empty range could be part of anything."""
    assert may_be_given([(0, 3), (3, 5), (5, 6), (5, 5)], [(4, 5)]) == [True, False, True, False]
    assert may_be_given([(0, 3)], []) == [False]


def test_chunks_by_hand() -> None:
    """14 tokens, the answer at 9: chunks of 3 are 0-2, 3-5, 6-8 and 10-12; what is left of a run is never given."""
    allowed = [place != 9 for place in range(14)]
    seen = set()
    for seed in range(200):
        given = chunked_hint(allowed, random.Random(seed), low=0.5, high=0.5, shortest=3, longest=3)
        shown = [place for place in range(14) if given[place]]
        assert len(shown) == 6, "half of four chunks"
        seen.update(tuple(shown[i : i + 3]) for i in (0, 3))
    assert seen == {(0, 1, 2), (3, 4, 5), (6, 7, 8), (10, 11, 12)}


def test_shares_and_sizes_over_many_draws() -> None:
    """200 tokens without an answer: runs of 5 to 10 tokens, and a share of the chunks that is uniform in (0.2, 0.6)."""
    shares, sizes = [], []
    for seed in range(3000):
        given = chunked_hint([True] * 200, random.Random(seed), low=0.2, high=0.6, shortest=5, longest=10)
        shares.append(sum(given) / 200)
        sizes += [len(run) for run in "".join(".#"[g] for g in given).split(".") if run]
    assert min(sizes) == 5
    # floor(r N) / N with N about 26.7 chunks loses half a chunk on average; the remainder of the trace is at most 2 %.
    assert abs(sum(shares) / len(shares) - (0.4 - 0.5 / 26.7)) < 0.01
    assert 0.14 < min(shares) < 0.22 and 0.55 < max(shares) < 0.66


def test_a_pure_function_of_its_key() -> None:
    row = SLOTS["task"].build({"name": "arithmetic", "level": "hard"})("train", seed=0).row(3)
    one, again, other = (hints(row, frame(96, key)) for key in (0.25, 0.25, 0.75))
    assert one == again and one != other and one.hints


TASKS: dict[str, dict[str, Any]] = {
    "arithmetic": {"name": "arithmetic", "level": "hard"},
    "countdown": {"name": "countdown"},
    "sudoku": {"name": "sudoku"},
}
STYLES = ("boxed", "answer_tag", "gsm8k_hash")


def answers_of(text: str, answer: str) -> list[int]:
    """Return the characters that belong to an answer standing by itself, found character by character."""
    found = []
    for start in range(len(text) - len(answer) + 1):
        end = start + len(answer)
        before, after = text[max(start - 2, 0) : start], text[end : end + 2]
        number = bool(re.fullmatch(r"\d[.,]", before)) or bool(re.fullmatch(r"[.,]\d", after))
        joined = (before[-1:].isalnum() or before[-1:] == "_") or (after[:1].isalnum() or after[:1] == "_")
        if text[start:end] == answer and not joined and not number:
            found += range(start, end)
    return found


@pytest.mark.parametrize("name", TASKS)
def test_no_answer_leaks(name: str) -> None:
    """In hundreds of draws no token of the answer is given, wherever it stands, and others are where they were."""
    rows = SLOTS["task"].build(TASKS[name])("train", seed=0)
    leaked = given = 0
    for index in range(DRAWS):
        row = rows.row(index)
        text = row["reference"]
        forbidden = answers_of(text, text.rpartition("#### ")[2])
        shown = hints(row, frame(128, index / DRAWS)).tokens
        assert all(token in (MASK, byte) for token, byte in zip(shown, text.encode(), strict=False))
        leaked += any(shown[place] != MASK for place in forbidden)
        given += sum(token != MASK for token in shown)
    assert leaked == 0
    assert given / DRAWS > 5, "there are hints at all"


@pytest.mark.parametrize("style", STYLES)
def test_no_answer_leaks_from_published_styles(style: Any) -> None:
    solution = "She sells 16-3-4 = 9 eggs a day. She makes 9*2 = $18 every day, which is 18 in all; 180 is too much."
    row = {"prompt": "?", "answer": "18", "reference": marked("18", solution, style)}
    text = row["reference"]
    forbidden, leaked, last = answers_of(text, "18"), 0, 0
    assert len(forbidden) == 6
    for index in range(DRAWS):
        shown = hints(row, frame(160, index / DRAWS)).tokens
        leaked += any(shown[place] != MASK for place in forbidden)
        last += shown[text.index("180")] != MASK
    assert leaked == 0
    assert last > 20, "what merely contains the answer's digits may be given"


def test_without_a_known_answer_nothing_is_given() -> None:
    row = {"prompt": "?", "reference": "def f(x):\n    return x + 1\n"}
    assert set(hints(row, frame(32)).tokens) == {MASK}


@pytest.mark.parametrize(
    ("row", "knobs", "match"),
    [
        ({"prompt": "?"}, {}, r"no column 'reference' with a worked solution \(it has prompt\)"),
        ({"prompt": "?", "reference": "#### 1"}, {"low": 0.0}, "0 < low <= high <= 1"),
        ({"prompt": "?", "reference": "#### 1"}, {"shortest": 6, "longest": 5}, "1 <= shortest <= longest"),
    ],
)
def test_refusals(row: dict[str, Any], knobs: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        hints(row, frame(16), **knobs)
