"""Datasets as rows `{"prompt": ..., "reference": ..., **columns}`, and generated problems with worked traces."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from .registry import SLOTS, RecipeError

Row = dict[str, Any]
Split = Literal["train", "heldout"]
HELDOUT_SHARE = 8  # one problem in eight, chosen by a hash of its prompt, is never trained on
MAX_TRIES = 200_000

task = SLOTS["task"]


class Rows(Protocol):
    """Rows by index; `size` is None when the task can generate rows without end."""

    size: int | None

    def row(self, index: int) -> Row: ...


def split_of(prompt: str) -> Split:
    """Return the split a problem belongs to; a function of its text alone, so seeds and ranges cannot leak it."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return "heldout" if digest[0] % HELDOUT_SHARE == 0 else "train"


class Generated:
    """Problems drawn by `make(rng)`: train rows without end, held-out rows distinct and the same in every run."""

    size: int | None = None

    def __init__(self, make: Callable[[random.Random], Row], split: Split, seed: int) -> None:
        self._make, self._split, self._seed = make, split, seed
        self._heldout: list[Row] = []
        self._seen: set[str] = set()
        self._attempt = 0

    def row(self, index: int) -> Row:
        """Return row `index`; raises RecipeError when a task has fewer distinct held-out problems."""
        if self._split == "train":
            return self._draw_train(index)
        while len(self._heldout) <= index:
            self._draw_heldout(index)
        return self._heldout[index]

    def _draw_train(self, index: int) -> Row:
        rng = random.Random(f"train/{self._seed}/{index}")
        for _ in range(MAX_TRIES):
            row = self._make(rng)
            if split_of(_text(row)) == "train":
                return row
        raise RecipeError(f"task: {MAX_TRIES} draws gave no training problem; widen its ranges.")

    def _draw_heldout(self, wanted: int) -> None:
        for _ in range(MAX_TRIES):
            row = self._make(random.Random(f"heldout/{self._attempt}"))
            self._attempt += 1
            if split_of(_text(row)) == "heldout" and _text(row) not in self._seen:
                self._seen.add(_text(row))
                self._heldout.append(row)
                return
        raise RecipeError(
            f"task: only {len(self._heldout)} distinct held-out problems exist at these knobs, {wanted + 1} were "
            "asked for; lower evaluation.problems or widen the task's ranges."
        )


def _text(row: Row) -> str:
    return row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"])


class Stored:
    """Rows held in memory; training wraps around in an order shuffled anew each epoch."""

    def __init__(self, rows: Sequence[Row], split: Split, seed: int) -> None:
        self._rows, self._split, self._seed = rows, split, seed
        self.size: int | None = len(rows)

    def row(self, index: int) -> Row:
        """Return row `index`."""
        epoch, offset = divmod(index, len(self._rows))
        if self._split == "heldout":
            return self._rows[offset]
        order = list(range(len(self._rows)))
        random.Random(f"epoch/{self._seed}/{epoch}").shuffle(order)
        return self._rows[order[offset]]


ARITHMETIC_LEVELS = {"easy": (6, 7), "medium": (8, 10), "hard": (11, 14)}


@task.register
def arithmetic(
    split: Split,
    *,
    seed: int = 0,
    level: Literal["easy", "medium", "hard", "mixed"] = "mixed",
    operations: tuple[int, int] | None = None,
    operators: str = "+-",
    largest: int = 3,
) -> Rows:
    """Chains of operations with operands 0..`largest` modulo 10; the trace has one line an operation.

    Prompt `7 a+2 b-3`: start at 7, then apply the lettered operations in order, each result modulo 10.
    Trace `a+2=9` `b-3=6` and `#### 6`: every line repeats its operation and gives the running value.
    `operations` (lowest, highest count) overrides `level`; `operators` are some of `+-*`.
    """
    if operations is not None:
        low, high = operations
        if not 1 <= low <= high <= 26:
            raise RecipeError(f"task.operations: {[low, high]} must satisfy 1 <= low <= high <= 26 (one letter each).")
    else:
        levels = ARITHMETIC_LEVELS.values() if level == "mixed" else [ARITHMETIC_LEVELS[level]]
        low, high = min(a for a, _ in levels), max(b for _, b in levels)

    if not 1 <= largest <= 9:
        raise RecipeError(f"task.largest: {largest} must lie between 1 and 9, operands are single digits.")
    if not operators or set(operators) - set("+-*"):
        raise RecipeError(f"task.operators: '{operators}' must be some of + - *.")

    def make(rng: random.Random) -> Row:
        value = rng.randrange(10)
        prompt, trace = [str(value)], []
        for letter in "abcdefghijklmnopqrstuvwxyz"[: rng.randint(low, high)]:
            operator, operand = rng.choice(operators), rng.randint(0, largest)
            result = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 10
            prompt.append(f"{letter}{operator}{operand}")
            trace.append(f"{letter}{operator}{operand}={result}")
            value = result
        return {
            "prompt": " ".join(prompt),
            "reference": "\n".join([*trace, f"#### {value}"]),
            "answer": str(value),
        }

    return Generated(make, split, seed)


@task.register
def countdown(
    split: Split,
    *,
    seed: int = 0,
    numbers: tuple[int, int] = (3, 4),
    largest: int = 15,
    largest_target: int = 99,
    operators: str = "+-*/",
) -> Rows:
    """Reach a target with `operators`, some of `+-*/`, from `numbers` numbers in 1..`largest`, each used exactly once.

    Prompt `3 5 8 -> 19`, trace `8*3=24` `24-5=19`, answer `#### 8*3-5`; the numbers are sorted. Intermediate
    results are positive integers of at most `largest_target`.
    """
    if not 2 <= numbers[0] <= numbers[1] <= 6:
        raise RecipeError(f"task.numbers: {list(numbers)} must satisfy 2 <= low <= high <= 6.")
    if largest < 2 or largest_target < 2:
        raise RecipeError("task: largest and largest_target must be at least 2.")
    if not operators or set(operators) - set("+-*/"):
        raise RecipeError(f"task.operators: '{operators}' must be some of + - * /.")

    def make(rng: random.Random) -> Row:
        while True:
            # Sorted, so that the same numbers in another order are the same problem to `split_of`.
            start = sorted(rng.randint(1, largest) for _ in range(rng.randint(*numbers)))
            solved = _countdown_walk(start, largest_target, operators, rng)
            if solved is None:
                continue
            trace, expression, target = solved
            return {
                "prompt": " ".join(map(str, start)) + f" -> {target}",
                "reference": "\n".join([*trace, f"#### {expression}"]),
                "numbers": start,
                "target": target,
            }

    return Generated(make, split, seed)


def _countdown_walk(
    start: list[int], ceiling: int, operators: str, rng: random.Random
) -> tuple[list[str], str, int] | None:
    """Combine all numbers by random allowed operations; None when a step leaves the allowed range."""
    items = [(value, str(value), 3) for value in start]  # value, text, precedence of its outermost operator
    trace = []
    while len(items) > 1:
        first = items.pop(rng.randrange(len(items)))
        second = items.pop(rng.randrange(len(items)))
        (a, a_text, a_rank), (b, b_text, b_rank) = sorted((first, second), key=lambda item: -item[0])
        results = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if a % b == 0 else 0}
        operator = rng.choice(operators)
        result = results[operator]
        if not 0 < result <= ceiling:
            return None
        rank = 1 if operator in "+-" else 2
        left = f"({a_text})" if a_rank < rank else a_text
        right = f"({b_text})" if b_rank < rank or (operator in "-/" and b_rank == rank) else b_text
        trace.append(f"{a}{operator}{b}={result}")
        items.append((result, f"{left}{operator}{right}", rank))
    value, expression, _ = items[0]
    return trace, expression, value


SUDOKU_CLUES = {4: (6, 12), 9: (36, 60)}


def _solved_sudoku(side: int, rng: random.Random) -> str:
    """Return a completed grid: any 4x4, or a regular 9x9 with digits, bands, and the lines inside bands shuffled."""
    if side == 4:
        return rng.choice(_sudoku_grids())

    def shuffled() -> list[int]:
        return [3 * band + line for band in rng.sample(range(3), 3) for line in rng.sample(range(3), 3)]

    digits, rows, columns = rng.sample("123456789", 9), shuffled(), shuffled()
    return "".join(digits[(3 * (row % 3) + row // 3 + column) % 9] for row in rows for column in columns)


@functools.cache
def _sudoku_grids() -> list[str]:
    """Return all 288 completed 4x4 grids as 16-digit strings."""
    rows = ["".join(p) for p in itertools.permutations("1234")]
    grids = []
    for combination in itertools.product(rows, repeat=4):
        columns = zip(*combination, strict=True)
        boxes = (combination[r][c : c + 2] + combination[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2))
        if all(len(set(unit)) == 4 for unit in (*columns, *boxes)):
            grids.append("".join(combination))
    return grids


@task.register
def sudoku(split: Split, *, seed: int = 0, side: Literal[4, 9] = 4, clues: tuple[int, int] | None = None) -> Rows:
    """Sudoku of `side` x `side` with `clues` (lowest, highest) given cells; any valid completion is right.

    Prompt `1030 0002 ...` (0 = blank), trace the completed rows, one a line, answer `#### ` and all digits. Where a
    cell stands is fixed, so in which order cells are best decided is left to the sampler. `clues` are 6 to 12 of 16,
    or 36 to 60 of 81, where they are not given.
    """
    low, high = clues or SUDOKU_CLUES[side]
    if not 0 <= low <= high < side**2:
        raise RecipeError(f"task.clues: {[low, high]} must satisfy 0 <= low <= high <= {side**2 - 1}.")

    def make(rng: random.Random) -> Row:
        solution = _solved_sudoku(side, rng)
        given = set(rng.sample(range(side**2), rng.randint(low, high)))
        puzzle = "".join(digit if cell in given else "0" for cell, digit in enumerate(solution))
        rows = [solution[r : r + side] for r in range(0, side**2, side)]
        return {
            "prompt": " ".join(puzzle[r : r + side] for r in range(0, side**2, side)),
            "reference": "\n".join([*rows, f"#### {solution}"]),
            "puzzle": puzzle,
        }

    return Generated(make, split, seed)
