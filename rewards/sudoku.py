"""Reward of sudoku, 4x4 and 9x9: any valid completion of the given clues is right."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from typing import Any

from ..recipes.registry import SLOTS
from .extraction import Extract, Rules, extract_answer
from .verdicts import LogExtra, RewardFunction, Verdict, check_share, column_error, report, text_of

MOST = 288  # completions that partial credit looks at: all there are of 4x4, the first of an open 9x9
MOST_NODES = 20_000


@SLOTS["reward"].register
def sudoku(*, extract: Extract = "gsm8k_hash", rules: Rules = 1, partial: float = 0.0) -> RewardFunction:
    """1 for 16 or 81 digits that keep the clues of column `puzzle` (as many, 0 = blank) and obey the rules of sudoku.

    `extract` and `rules` (their version) say where the answer stands; blanks and line ends inside it are ignored.
    `partial`, in [0, 1), is multiplied by the share of blank cells filled as in the nearest valid completion (of an
    open 9x9 puzzle, one of the first 288), for wrong answers that keep the clues; with 0 it is all or nothing.
    Outcomes: ok, wrong, unparsable (no answer, or not as many digits).
    """
    check_share("sudoku", "partial", partial)

    def sudoku_reward(
        completions: list[Any], puzzle: list[Any], log_extra: LogExtra | None = None, **_: Any
    ) -> list[float | None]:
        rows = zip(completions, puzzle, strict=True)
        return report([judge_sudoku(text_of(text), clues, extract, partial, rules) for text, clues in rows], log_extra)

    return sudoku_reward


def judge_sudoku(
    text: str, puzzle: Any, extract: Extract = "gsm8k_hash", partial: float = 0.0, rules: Rules = 1
) -> Verdict:
    """Judge one completion; raises RewardError when the row's `puzzle` is no string of 16 digits 0-4 or 81 of 0-9."""
    if puzzle is None:
        return Verdict()
    clues = "".join(puzzle.split()) if isinstance(puzzle, str) else ""
    if not re.fullmatch(r"[0-4]{16}|[0-9]{81}", clues):
        rule = "which is not a string of 16 digits from 0 (blank) to 4, nor of 81 from 0 to 9"
        raise column_error("sudoku", "puzzle", puzzle, rule)
    answer = extract_answer(text, extract, rules)
    grid = "".join((answer or "").split())
    if not re.fullmatch(f"[0-9]{{{len(clues)}}}", grid):
        return Verdict(0.0, "unparsable", answer and answer[:200])
    if not keeps_clues(grid, clues):
        return Verdict(0.0, "wrong", answer)
    if is_valid(grid):
        return Verdict(1.0, "ok", answer)
    return Verdict(partial * nearest_share(grid, clues) if partial else 0.0, "wrong", answer)


def keeps_clues(grid: str, clues: str) -> bool:
    """Tell whether `grid` has every non-blank digit of `clues` in its place."""
    return all(clue in ("0", digit) for clue, digit in zip(clues, grid, strict=True))


@functools.cache
def units(cells: int) -> tuple[tuple[int, ...], ...]:
    """Return the cells of every row, column and box of a grid of 16 or 81 cells."""
    side = {16: 4, 81: 9}[cells]
    box = {4: 2, 9: 3}[side]
    rows = [tuple(range(side * row, side * row + side)) for row in range(side)]
    columns = [tuple(range(column, cells, side)) for column in range(side)]
    corners = [side * row + column for row in range(0, side, box) for column in range(0, side, box)]
    boxes = [tuple(corner + side * r + c for r in range(box) for c in range(box)) for corner in corners]
    return (*rows, *columns, *boxes)


def is_valid(grid: str) -> bool:
    """Tell whether every row, column and box of `grid` (16 or 81 characters) holds every digit once."""
    digits = set("123456789"[: 4 if len(grid) == 16 else 9])
    return all({grid[cell] for cell in unit} == digits for unit in units(len(grid)))


@functools.cache
def _neighbours(cells: int) -> tuple[frozenset[int], ...]:
    return tuple(
        frozenset(other for unit in units(cells) if cell in unit for other in unit) - {cell} for cell in range(cells)
    )


def completions(clues: str) -> Iterator[str]:
    """Yield the valid completions of `clues`; the cell with the fewest digits left is filled first.

    Ends early after MOST_NODES cells have been tried.
    """
    digits = "123456789"[: 4 if len(clues) == 16 else 9]
    neighbours, tried = _neighbours(len(clues)), itertools.count()

    def choices(grid: list[str], cell: int) -> list[str]:
        taken = {grid[other] for other in neighbours[cell]}
        return [digit for digit in digits if digit not in taken]

    def fill(grid: list[str]) -> Iterator[str]:
        open_cells = [cell for cell, digit in enumerate(grid) if digit == "0"]
        if not open_cells:
            yield "".join(grid)
            return
        cell = min(open_cells, key=lambda cell: len(choices(grid, cell)))
        for digit in choices(grid, cell):
            if next(tried) >= MOST_NODES:
                return
            yield from fill([*grid[:cell], digit, *grid[cell + 1 :]])

    return (grid for grid in fill(list(clues)) if is_valid(grid))


@functools.lru_cache(maxsize=4096)
def first_completions(clues: str) -> tuple[str, ...]:
    """Return at most MOST completions of `clues`; the same puzzle comes once for every rollout of its group."""
    return tuple(itertools.islice(completions(clues), MOST))


def nearest_share(grid: str, clues: str) -> float:
    """Return the largest share of the blanks of `clues` on which `grid` agrees with a valid completion (0 if none)."""
    blanks = [cell for cell, clue in enumerate(clues) if clue == "0"]
    agreement = (sum(grid[cell] == solution[cell] for cell in blanks) for solution in first_completions(clues))
    return max(agreement, default=0) / max(len(blanks), 1)
