"""Generated tasks: disjoint splits, enough held-out problems, and traces that an independent reading confirms."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

from unmask.recipes import problems  # noqa: F401 (registers every task)
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.recipes.tasks import ARITHMETIC_LEVELS, Rows, split_of

DIFFICULTIES = [
    *[("arithmetic", {"level": level}) for level in ARITHMETIC_LEVELS],
    *[("countdown", {"numbers": [count, count]}) for count in (3, 4)],
    ("countdown", {"operators": "+-", "largest": 12}),  # what the shipped model is trained on
    *[("sudoku", {"clues": list(clues)}) for clues in ((6, 7), (8, 9), (10, 12))],
]
NAMES = [f"{name}-{next(iter(knobs.values()))}" for name, knobs in DIFFICULTIES]


def rows_of(name: str, knobs: dict, split: str, seed: int = 0) -> Rows:
    return SLOTS["task"].build({"name": name, **knobs})(split, seed=seed)


@pytest.mark.parametrize(("name", "knobs"), DIFFICULTIES, ids=NAMES)
def test_a_thousand_distinct_held_out_problems_that_training_never_shows(name: str, knobs: dict) -> None:
    heldout = rows_of(name, knobs, "heldout")
    prompts = [heldout.row(index)["prompt"] for index in range(1000)]
    assert len(set(prompts)) == 1000
    assert {split_of(prompt) for prompt in prompts} == {"heldout"}
    train = rows_of(name, knobs, "train")
    assert {split_of(train.row(index)["prompt"]) for index in range(500)} == {"train"}


@pytest.mark.parametrize(("name", "knobs"), DIFFICULTIES, ids=NAMES)
def test_rows_follow_from_seed_and_index(name: str, knobs: dict) -> None:
    first, again, other = (rows_of(name, knobs, "train", seed) for seed in (3, 3, 4))
    assert [first.row(i) for i in (5, 0, 5)] == [again.row(5), again.row(0), again.row(5)]
    assert [first.row(i) for i in range(8)] != [other.row(i) for i in range(8)]
    one, two = (rows_of(name, knobs, "heldout", seed) for seed in (3, 4))
    assert [one.row(i) for i in range(8)] == [two.row(i) for i in range(8)], (
        "held-out problems are the same in every run"
    )


def test_arithmetic_traces_compute_what_they_say() -> None:
    rows = rows_of("arithmetic", {"level": "mixed"}, "train")
    lengths = set()
    for index in range(300):
        row = rows.row(index)
        value, *operations = row["prompt"].split(" ")
        *lines, last = row["reference"].split("\n")
        assert len(lines) == len(operations)
        for line, operation in zip(lines, operations, strict=True):
            written, result = line.split("=")
            assert written == operation
            value = str((int(value) + int(operation[1:].replace("+", ""))) % 10)
            assert result == value
        assert last == f"#### {value}" == f"#### {row['answer']}"
        lengths.add(len(row["reference"]) + 1)
    assert min(lengths) >= 40 and max(lengths) <= 96 and len(lengths) > 5


def test_countdown_traces_use_every_number_once() -> None:
    rows = rows_of("countdown", {}, "train")
    for index in range(300):
        row = rows.row(index)
        left = sorted(row["numbers"])
        *lines, last = row["reference"].split("\n")
        for line in lines:
            a, operator, b, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", line).groups()
            x, y = Fraction(a), Fraction(b)
            assert {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[operator] == int(result)
            left.remove(int(a))
            left.remove(int(b))
            left.append(int(result))
        assert left == [row["target"]]
        assert sorted(map(int, re.findall(r"\d+", last.removeprefix("#### ")))) == sorted(row["numbers"])


def test_sudoku_traces_fill_every_blank_validly() -> None:
    rows = rows_of("sudoku", {"clues": [4, 12]}, "train")
    for index in range(100):
        row = rows.row(index)
        trace, answer = row["reference"].split("\n#### ")
        assert trace.replace("\n", "") == answer
        assert all(clue in ("0", digit) for clue, digit in zip(row["puzzle"], answer, strict=True))
        grid = [answer[r : r + 4] for r in range(0, 16, 4)]
        columns = ["".join(column) for column in zip(*grid, strict=True)]
        boxes = [grid[r][c : c + 2] + grid[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
        assert all(sorted(unit) == list("1234") for unit in [*grid, *columns, *boxes])


def test_a_task_with_too_few_problems_says_so() -> None:
    rows = rows_of("arithmetic", {"operations": [1, 1], "operators": "+", "largest": 1}, "heldout")
    with pytest.raises(RecipeError, match=r"only \d+ distinct held-out problems .* lower evaluation.problems"):
        rows.row(1000)


def test_training_rows_of_a_file_are_shuffled_anew_each_epoch(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{i}"}}\n' for i in range(64)))
    train = SLOTS["task"].build({"name": "jsonl", "path": str(path)})("train", seed=0)
    heldout = SLOTS["task"].build({"name": "jsonl", "path": str(path)})("heldout", seed=0)
    assert train.size + heldout.size == 64
    epochs = [[train.row(epoch * train.size + i)["prompt"] for i in range(train.size)] for epoch in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    assert not set(epochs[0]) & {heldout.row(i)["prompt"] for i in range(heldout.size)}
