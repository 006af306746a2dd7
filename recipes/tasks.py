"""Datasets as rows `{"prompt": ..., "reference": ..., **columns}`: generated problems with worked traces, and JSONL."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
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
            if split_of(row["prompt"]) == "train":
                return row
        raise RecipeError(f"task: {MAX_TRIES} draws gave no training problem; widen its ranges.")

    def _draw_heldout(self, wanted: int) -> None:
        for _ in range(MAX_TRIES):
            row = self._make(random.Random(f"heldout/{self._attempt}"))
            self._attempt += 1
            if split_of(row["prompt"]) == "heldout" and row["prompt"] not in self._seen:
                self._seen.add(row["prompt"])
                self._heldout.append(row)
                return
        raise RecipeError(
            f"task: only {len(self._heldout)} distinct held-out problems exist at these knobs, {wanted + 1} were "
            "asked for; lower evaluation.problems or widen the task's ranges."
        )


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
def sudoku(split: Split, *, seed: int = 0, clues: tuple[int, int] = (6, 12)) -> Rows:
    """4x4 sudoku with `clues` (lowest, highest) given cells; any valid completion is right.

    Prompt `1030 0002 ...` (0 = blank), trace the four completed rows, one a line, answer `#### ` and 16 digits. Where
    a cell stands is fixed, so in which order cells are best decided is left to the sampler.
    """
    if not 0 <= clues[0] <= clues[1] <= 15:
        raise RecipeError(f"task.clues: {list(clues)} must satisfy 0 <= low <= high <= 15.")
    grids = _sudoku_grids()

    def make(rng: random.Random) -> Row:
        solution = rng.choice(grids)
        given = set(rng.sample(range(16), rng.randint(*clues)))
        puzzle = "".join(digit if cell in given else "0" for cell, digit in enumerate(solution))
        rows = [solution[r : r + 4] for r in range(0, 16, 4)]
        return {
            "prompt": " ".join(puzzle[r : r + 4] for r in range(0, 16, 4)),
            "reference": "\n".join([*rows, f"#### {solution}"]),
            "puzzle": puzzle,
        }

    return Generated(make, split, seed)


@task.register
def jsonl(
    split: Split, *, path: str, seed: int = 0, prompt_column: str = "prompt", heldout_path: str | None = None
) -> Rows:
    """Rows of a JSON-lines file; without `heldout_path` the file is split by a hash of the prompt."""
    source = Path(heldout_path if heldout_path and split == "heldout" else path).expanduser()
    if not source.is_file():
        raise RecipeError(f"task.path: there is no file '{source}'.")
    rows = []
    for number, line in enumerate(source.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{source}:{number}: not a line of JSON ({error.msg}).") from error
        if not isinstance(row, dict) or prompt_column not in row:
            raise RecipeError(f"{source}:{number}: the row has no column '{prompt_column}'; set task.prompt_column.")
        row["prompt"] = row[prompt_column]
        if heldout_path or split_of(json.dumps(row["prompt"])) == split:
            rows.append(row)
    if not rows:
        raise RecipeError(f"{source}: the dataset is empty (no {split} row).")
    return Stored(rows, split, seed)
