"""`unmask reward check`: gold answers must score 1, empty and corrupted ones must not, and no trick may pay."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from ..recipes.registry import SLOTS, RecipeError
from ..recipes.schema import Recipe
from ..recipes.tasks import Row
from ..rewards import Scorer
from ..rewards.extraction import extract_answer
from .cli_summary import console
from .evaluate import heldout_rows
from .settings import rewards_of, scoring_of

TOLERANCE = 1e-6
FILLER = "Let me think about this again. "
TRICKS = (
    "empty",
    "end of sequence only",
    "format without an answer",
    "copied prompt",
    "copied prompt as the answer",
    "many answers",
    "tag spam",
    "padding",
)


@dataclass(frozen=True)
class Finding:
    """One kind of completion over all rows: mean total, the most above an honest wrong answer, and the verdict."""

    name: str
    mean: float
    excess: float
    passed: bool
    example: str


def reward_check(recipe: Recipe, rows: int = 16) -> list[Finding]:
    """Score gold answers, corrupted ones and tricks on held-out problems; print and return the findings.

    RecipeError when a gold answer does not have the outcome ok, or no wrong answer can be made of the others' golds.
    """
    task = SLOTS["task"].build(recipe.task, "task")
    problems = heldout_rows(task("heldout", seed=0), rows)
    scorer = Scorer(rewards_of(recipe), scoring_of(recipe))
    golds = [_gold(scorer, row, index) for index, row in enumerate(problems)]
    wrong, wrong_totals = _honest_wrong(scorer, problems, golds)
    totals, outcomes = _totals(scorer, problems, golds)
    findings = [
        Finding("gold", _mean(totals), 0.0, all(code == "ok" for code in outcomes), golds[0]),
        Finding("honest wrong answer", _mean(wrong_totals), 0.0, True, wrong[0]),
    ]
    for name in TRICKS:
        texts = [_trick(name, row, gold, bad) for row, gold, bad in zip(problems, golds, wrong, strict=True)]
        ids = [[0] for _ in texts] if name == "end of sequence only" else None
        found, codes = _totals(scorer, problems, texts, ids)
        excess = max(total - honest for total, honest in zip(found, wrong_totals, strict=True))
        passed = excess <= TOLERANCE and "ok" not in codes
        findings.append(Finding(name, _mean(found), excess, passed, texts[0]))
    for kind in ("cut short", "other digits"):
        texts = [_corrupted(kind, gold, bad) for gold, bad in zip(golds, wrong, strict=True)]
        found, codes = _totals(scorer, problems, texts)
        findings.append(Finding(f"corrupted: {kind}", _mean(found), 0.0, "ok" not in codes, texts[0]))
    _show(findings, len(problems))
    return findings


def _totals(
    scorer: Scorer, rows: Sequence[Row], texts: Sequence[str], ids: list[list[int]] | None = None
) -> tuple[list[float], list[str]]:
    """Return total and outcome of each completion; its length in tokens is taken to be its words."""
    ids = ids or [[0] * (len(text.split()) + 1) for text in texts]
    table = scorer(rows, [row["prompt"] for row in rows], texts, ids)
    return table.total_B.nan_to_num(0.0).tolist(), table.outcome


def candidates(row: Row) -> list[str]:
    """Return completions that would be right: the worked reference, and its answer in every form."""
    reference = row.get("reference")
    found = [reference] if isinstance(reference, str) else []
    answers = [row[name] for name in ("answer", "solution") if isinstance(row.get(name), str | int | float)]
    if isinstance(reference, str):
        answers += [extract_answer(reference, rule) for rule in ("gsm8k_hash", "boxed", "answer_tag")]
        found.append(f"```python\n{reference}\n```")
    for answer in dict.fromkeys(str(answer) for answer in answers if answer is not None):
        found += [
            f"#### {answer}",
            rf"\boxed{{{answer}}}",
            f"<reasoning>\nso\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
        ]
        found += [
            f"<reasoning>\nso\n</reasoning>\n<answer>\n\\boxed{{{answer}}}\n</answer>\n",
            f"<think>\nso\n</think>\n{answer}",
        ]
    return found


def _gold(scorer: Scorer, row: Row, index: int) -> str:
    texts = candidates(row)
    if texts:
        totals, outcomes = _totals(scorer, [row] * len(texts), texts)
        right = [i for i, code in enumerate(outcomes) if code == "ok"]
        if right:
            return texts[max(right, key=lambda i: totals[i])]
    raise RecipeError(
        f"reward check: row {index} has no gold answer that scores 1 (of its reference and answer in every form); does "
        "`extract` fit the task? Check the row and the rewards' knobs."
    )


def _honest_wrong(scorer: Scorer, rows: Sequence[Row], golds: Sequence[str]) -> tuple[list[str], list[float]]:
    """Return for each row a completion in the form of its gold whose answer is another row's, and its total."""
    texts: list[str] = []
    for index, row in enumerate(rows):
        others = [golds[(index + step) % len(golds)] for step in range(1, len(golds))]
        outcomes = _totals(scorer, [row] * len(others), others)[1] if others else []
        wrong = [text for text, code in zip(others, outcomes, strict=True) if code == "wrong"]
        if not wrong:
            raise RecipeError(
                f"reward check: no other row's answer is wrong for row {index}; check more rows (--rows)."
            )
        texts.append(wrong[0])
    return texts, _totals(scorer, rows, texts)[0]


def _trick(name: str, row: Row, gold: str, wrong: str) -> str:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    numbers = [str(number) for number in range(100)]
    if name == "format without an answer":
        return "<reasoning>\n\n</reasoning>\n<answer>\n\n</answer>\n\\boxed{}\n```python\n\n```\n#### "
    if name == "copied prompt":
        return prompt
    if name == "copied prompt as the answer":
        line = " ".join(prompt.split())
        return f"<answer>{prompt}</answer>\n\\boxed{{{prompt}}}\n```python\n{prompt}\n```\n#### {line}"
    if name == "many answers":
        each = [(f"<answer>{n}</answer>", rf"\boxed{{{n}}}", f"#### {n}") for n in numbers]
        # What is right stands among them, and so does what is wrong after it: only a reward that takes any would pay.
        return "\n".join([*itertools.chain.from_iterable(each), gold, wrong])
    if name == "tag spam":
        return "<reasoning>" * 50 + "<answer>" * 50 + "</answer>" * 50 + "</reasoning>" * 50
    if name == "padding":
        return FILLER * 100 + "\n" + wrong
    return ""


def _corrupted(kind: str, gold: str, wrong: str) -> str:
    if kind == "cut short":
        return gold[: len(gold) // 3]
    changed = gold.translate(str.maketrans("0123456789", "1234567890"))
    return wrong if changed == gold else changed


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _show(findings: Sequence[Finding], rows: int) -> None:
    table = Table(
        "completion", "mean total", "most above an honest wrong answer", "", title=f"{rows} held-out problems"
    )
    for finding in findings:
        excess = "" if finding.name in ("gold", "honest wrong answer") else f"{finding.excess:+.3g}"
        table.add_row(finding.name, f"{finding.mean:.3f}", excess, "ok" if finding.passed else "FAILS")
    out = console()
    out.print(table)
    failed = [finding for finding in findings if not finding.passed]
    for finding in failed:
        out.print(f"fails: {finding.name}, for example {finding.example!r:.200}", soft_wrap=True)
    out.print(f"{len(failed)} of {len(findings)} kinds fail" if failed else "no trick pays")
