"""Hints: parts of a worked solution at their own places on the canvas, and no token of its answer (IGPO).

Inpainting-guided policy optimization, arXiv 2509.10396 (trajectory_rl.md section 5). Its released code always gives the
last chunk, and with it the answer in half of the draws; here tokens of the answer are left out before chunks are cut.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ..recipes.registry import RecipeError
from .canvases import Frame, Start, canvas

# What introduces an answer that ends with its line, and the one that ends with a tag.
LINE = re.compile(r"(?<!#)####(?!#)|(?i:\bthe (?:final )?answer is\b:?)")
TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
BOXED = re.compile(r"\\boxed\s*\{")
Span = tuple[int, int]


def answer_spans(text: str, answer: str | None = None, *, everywhere: bool = True) -> list[Span]:
    r"""Return where the answer stands in a worked solution, as character ranges; none where it cannot be found.

    Marked answers are what follows `####` or "the answer is" in its line, what `\boxed{...}` and `<answer>` hold, and
    the text `answer`. With `everywhere` so is every place where such a text stands by itself (6 in `a+2=6`, not in 16).
    """
    marked = list(_marked(text))
    known = {text[start:end].strip(" \t\r\n.$") for start, end in marked} | {(answer or "").strip()}
    if not everywhere and marked:
        return marked
    found = [span for word in sorted(known - {""}) for span in _alone(text, word)]
    return sorted({*marked, *found})


def _marked(text: str) -> Iterator[Span]:
    for match in LINE.finditer(text):
        end = re.compile(r"[\r\n]|\Z").search(text, match.end())
        yield match.end(), len(text) if end is None else end.start()
    for match in TAG.finditer(text):
        yield match.span(1)
    for match in BOXED.finditer(text):
        depth, place = 1, match.end()
        while place < len(text) and depth:
            # Escaped braces are text.
            escaped = text[place] == "\\"
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            place += 2 if escaped else 1
        yield match.end(), len(text) if depth else place - 1


def _alone(text: str, word: str) -> Iterator[Span]:
    before = r"(?<!\w)(?<!\d[.,])" if word[0].isalnum() else ""
    after = r"(?!\w)(?![.,]\d)" if word[-1].isalnum() else ""
    for match in re.finditer(before + re.escape(word) + after, text):
        yield match.span()


def may_be_given(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return which tokens touch none of the `spans`; without any none may be given, as the answer could be anywhere.

    A token that covers no character of its own (part of one) may not be given next to a span either.
    """
    if not spans:
        return [False] * len(offsets)
    return [all(end <= a or start >= b for a, b in spans) and start < end for start, end in offsets]


def chunked_hint(
    allowed: Sequence[bool], rng: random.Random, *, low: float, high: float, shortest: int, longest: int
) -> list[bool]:
    """Return which tokens of a solution are given: floor(r N) of its N chunks, at least one, r ~ U(`low`, `high`).

    Runs of `allowed` tokens are cut into chunks of U{`shortest`..`longest`}; what is left of a run is a chunk of its
    own if it is no shorter than `shortest`, and is never given otherwise. A pure function of its arguments.
    """
    if not 0 < low <= high <= 1:
        raise RecipeError(f"hints.low, high: {low}, {high} must satisfy 0 < low <= high <= 1, they are shares.")
    if not 1 <= shortest <= longest:
        raise RecipeError(f"hints.shortest, longest: {shortest}, {longest} must satisfy 1 <= shortest <= longest.")
    ratio = rng.uniform(low, high)
    chunks: list[range] = []
    start = 0
    while start < len(allowed):
        end = start
        while end < len(allowed) and allowed[end]:
            end += 1
        while end - start >= shortest:
            size = min(rng.randint(shortest, longest), end - start)
            chunks.append(range(start, start + size))
            start += size
        start = max(start, end) + 1
    shown = rng.sample(chunks, max(1, int(ratio * len(chunks)))) if chunks else []
    given = {place for chunk in shown for place in chunk}
    return [place in given for place in range(len(allowed))]


@canvas.register
def hints(
    row: dict[str, Any],
    frame: Frame,
    *,
    column: str = "reference",
    low: float = 0.2,
    high: float = 0.6,
    shortest: int = 5,
    longest: int = 10,
    answer: Literal["everywhere", "marked"] = "everywhere",
) -> Start:
    """A share U(`low`, `high`) of the chunks of the column's worked solution, at their places; never its answer (IGPO).

    Chunks have `shortest` to `longest` tokens. The answer is where it is marked, or `everywhere` its text stands by
    itself. Where it is not found, nothing is given. What exceeds the canvas is cut.
    """
    allowed = hintable(row, frame, column=column, answer=answer)
    # One uniform keys a generator: how many numbers a hint takes depends on its chunks.
    rng = random.Random(f"hints/{frame.uniform_L[0].item()}")
    given = chunked_hint(allowed, rng, low=low, high=high, shortest=shortest, longest=longest)
    ids = frame.encode(str(row[column]))[: frame.length]
    shown = [token if keep else frame.mask_token_id for token, keep in zip(ids, given, strict=True)]
    return Start(shown + frame.masks(frame.length - len(shown)), hints=True)


def hintable(row: dict[str, Any], frame: Frame, *, column: str, answer: str) -> list[bool]:
    """Return which tokens of the worked solution, as far as the canvas goes, are none of its answer."""
    if row.get(column) is None:
        raise RecipeError(
            f"hints: the task row has no column '{column}' with a worked solution (it has {', '.join(map(str, row))})."
        )
    assert frame.offsets is not None, "hints need to know where tokens lie in the text"
    text, known = str(row[column]), row.get("answer")
    spans = answer_spans(text, None if known is None else str(known), everywhere=answer == "everywhere")
    return may_be_given(frame.offsets(text), spans)[: frame.length]
