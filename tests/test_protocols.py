"""Named protocols: what a row resolves to, what its hash depends on, and which files and overrides are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from unmask.recipes.loading import load_recipe
from unmask.recipes.protocols import (
    UNHASHED,
    hash_of,
    load_protocol,
    protocol_of,
    recipe_hash,
    resolve_protocol,
    shipped_protocols,
)
from unmask.recipes.registry import RecipeError
from unmask.rl.evaluation import protocol_rows, split_overrides

NAMES = list(shipped_protocols())
WANTED = ["gsm8k@d1", "gsm8k@llada", "math500@d1", "humaneval@fast-dllm", "countdown@d1", "sudoku@d1"]
TINY = ["arithmetic@tiny", "countdown@tiny", "sudoku@tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_every_row_resolves_to_itself(name: str) -> None:
    protocol = load_protocol(name)
    again = resolve_protocol(copy.deepcopy(protocol.model_dump(mode="json")))
    assert again == protocol and again.hash == protocol.hash and len(protocol.hash) == 64
    assert protocol.summary.endswith(".") and protocol.source


def test_the_issues_names_are_there_and_no_two_hashes_are_equal() -> None:
    assert {*WANTED, *TINY} <= set(NAMES)
    assert len({load_protocol(name).hash for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    ("name", "shots", "canvas", "size", "per_step"),
    [("gsm8k@d1", 0, 256, 32, 2), ("gsm8k@d1-512", 0, 512, 32, 2), ("gsm8k@llada", 4, 256, 8, 1)],
)
def test_rows_hold_the_published_sizes(name: str, shots: int, canvas: int, size: int, per_step: int) -> None:
    protocol = load_protocol(name)
    assert (protocol.shots, protocol.canvas, protocol.temperature) == (shots, canvas, 0.0)
    assert (protocol.sampler.schedule["size"], protocol.sampler.schedule["per_step"]) == (size, per_step)
    # The commit of the data is part of the hash.
    assert len(protocol.task["revision"]) == 40


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    if isinstance(value, list):
        return [leaf for index, inner in enumerate(value) for leaf in leaves(inner, (*path, index))]
    return [path]


def changed(data: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    data = copy.deepcopy(data)
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


def other(value: Any) -> Any:
    return (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else f"{value}x"


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def test_the_hash_depends_on_every_choice_and_on_nothing_else() -> None:
    protocol = load_protocol("gsm8k@d1")
    data = protocol.model_dump(mode="json")
    assert hash_of(data) == protocol.hash
    every = leaves(data)
    kept = [path for path in every if hash_of(changed(data, path, other(at(data, path)))) == protocol.hash]
    assert set(kept) == {*((name,) for name in UNHASHED), ("task", "path")}
    assert len(every) - len(kept) > 20


def test_a_new_choice_that_is_off_leaves_the_hash_alone() -> None:
    data = load_protocol("sudoku@tiny").model_dump(mode="json")
    for off in (None, [], ""):
        assert hash_of(changed(data, ("sampler", "novelty"), off)) == hash_of(data)
    for on in (0, False, "name", {"name": "x"}):
        assert hash_of(changed(data, ("sampler", "novelty"), on)) != hash_of(data)


def test_the_place_of_a_copy_is_no_choice(tmp_path: Path) -> None:
    assert load_protocol("gsm8k@d1", {"path": str(tmp_path)}).hash == load_protocol("gsm8k@d1").hash


def write(path: Path, row: dict[str, Any], name: str = "mine@me") -> str:
    path.write_text(yaml.safe_dump({name: row}))
    return str(path)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", {"like": "gsm8k@d1", "summary": "Longer.", "canvas": 512})
    protocol = load_protocol(file)
    assert (protocol.name, protocol.canvas, protocol.departs) == ("mine@me", 512, "")
    assert protocol.hash == load_protocol("gsm8k@d1-512").hash, "the same choices have the same hash, whatever the name"


@pytest.mark.parametrize(
    ("row", "name", "words"),
    [
        ({"like": "gsm8k@d2"}, "mine@me", "names no other row. Did you mean 'gsm8k@d1'"),
        ({"like": "gsm8k@d1"}, "gsm8k@d1", "is a shipped protocol, which is fixed"),
        ({"like": "gsm8k@d1", "canvvas": 3}, "mine@me", "canvvas"),
        ({"like": "gsm8k@d1", "canvas": 0}, "mine@me", "canvas"),
        ({"like": "gsm8k@d1"}, "Mine", "name"),
        ({"like": "mine@me"}, "mine@me", "names no other row"),
        ({"like": "gsm8k@d1", "rewards": ["arithmetics"]}, "mine@me", "arithmetic"),
        ({"like": "gsm8k@d1", "sampler": {"schedule": {"size": 512}}}, "mine@me", "canvas"),
    ],
)
def test_refusals(tmp_path: Path, row: dict[str, Any], name: str, words: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        load_protocol(write(tmp_path / "mine.yaml", row, name))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown protocol 'gsm8k@d3'\. Did you mean"):
        load_protocol("gsm8k@d3")
    with pytest.raises(RecipeError, match=r"there is no file 'none\.yaml'"):
        load_protocol("none.yaml")
    (tmp_path / "two.yaml").write_text("a@b: {}\nc@d: {}\n")
    with pytest.raises(RecipeError, match="holds 2 rows"):
        load_protocol(str(tmp_path / "two.yaml"))


def test_overrides_of_what_a_protocol_fixes_are_refused() -> None:
    running = ("model.dtype=bfloat16", "rollout.micro_batch=4")
    assert split_overrides([*running, "task.path=/data"]) == (running, {"path": "/data"})
    for override in ("rollout.canvas=512", "evaluation.temperature=1", "task.level=easy"):
        with pytest.raises(RecipeError, match="a protocol fixes it"):
            split_overrides([override])


def gsm8k(folder: Path) -> str:
    for split, count in (("train", 5), ("test", 3)):
        rows = [f'{{"question": "{split} {i}?", "answer": "one <<1=1>>two\\n#### {i}"}}' for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return str(folder)


def test_worked_examples_are_turns_before_the_question(tmp_path: Path) -> None:
    rows = protocol_rows(load_protocol("gsm8k@llada", {"path": gsm8k(tmp_path)}), None)
    assert len(rows) == 3
    turns = rows[1]["prompt"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 4 + ["user"]
    assert turns[-1]["content"].startswith("test 1?\n") and turns[0]["content"].startswith("train ")
    assert turns[1]["content"].startswith("one two\n\\boxed{") and len({turn["content"] for turn in turns[::2]}) == 5
    # Every problem has the same examples.
    assert turns[:-1] == rows[0]["prompt"][:-1]


def test_the_template_writes_the_prompt(tmp_path: Path) -> None:
    (row, *_) = protocol_rows(load_protocol("gsm8k@d1", {"path": gsm8k(tmp_path)}), 1)
    assert row["prompt"].endswith("\n\ntest 0?") and "\\boxed{} between" in row["prompt"] and row["answer"] == "0"
    (row,) = protocol_rows(load_protocol("countdown@d1"), 1)
    assert str(row["numbers"]) in row["prompt"] and str(row["target"]) in row["prompt"]
    assert len(protocol_rows(load_protocol("sudoku@d1"), None)) == 256


def test_a_recipes_evaluation_is_a_protocol() -> None:
    recipe = load_recipe("cj_grpo_tiny_arithmetic")
    # The same choices as the shipped row; the recipe's other keys do not matter.
    assert protocol_of(recipe).hash == load_protocol("arithmetic@tiny").hash  # type: ignore[arg-type]
    other_seed = load_recipe("cj_grpo_tiny_arithmetic", ["run.seed=3"])
    assert protocol_of(other_seed).hash == protocol_of(recipe).hash  # type: ignore[arg-type]
    assert recipe_hash(other_seed) != recipe_hash(recipe)
    assert recipe_hash(load_recipe("cj_grpo_tiny_arithmetic", ["name=x", "run.directory=y"])) == recipe_hash(recipe)
