"""Recipes: what a file, a method and overrides resolve to, and what is derived from it."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from unmask.recipes import crosschecks, loading, reading
from unmask.recipes.loading import dump_recipe, load_methods, load_recipe, parse_recipe
from unmask.recipes.reading import apply_override, merge, parse_yaml, shipped_recipes
from unmask.recipes.registry import SLOTS, RecipeError, coerce
from unmask.recipes.schema import ObjectiveSection, Recipe, SftRecipe
from unmask.recipes.sections import SamplerSection

BASE = """
name: base
model: {path: "unmask:tiny", lora: {rank: 4}}
task: {name: arithmetic, level: easy}
rollout:
  prompts: 4
  group: 2
  canvas: 32
  sampler: {schedule: {name: blocks, size: 16, per_step: 2}}
rewards: [arithmetic]
method: cj_grpo
optim: {lr: 1e-3, steps: 10}
"""


def base(*overrides: str) -> Recipe:
    recipe = parse_recipe(BASE, overrides)
    assert isinstance(recipe, Recipe)
    return recipe


def test_a_method_fills_the_objective() -> None:
    objective = base().objective
    assert objective.surrogate == {"name": "ppo_clip", "low": 0.5, "high": 0.5}
    assert (objective.beta, objective.inner_steps, objective.bound) == (0.04, 8, {"name": "sum"})
    assert objective.weight == {"name": "per_step_mean"}
    knobs = {"steps": "all", "k": None, "merge": 1, "block": None, "tokens": "until_eos"}
    assert objective.estimator == {"name": "trace", **knobs}


def test_the_recipes_own_objective_wins_knob_by_knob() -> None:
    objective = base("objective.surrogate.low=0.2", "objective.beta=0", "objective.unit=step").objective
    assert objective.surrogate == {"name": "ppo_clip", "low": 0.2, "high": 0.5}
    assert (objective.beta, objective.unit, objective.inner_steps) == (0, {"name": "step"}, 8)


def test_a_part_of_another_name_replaces_the_methods_part_with_its_knobs() -> None:
    assert base("objective.surrogate=importance").objective.surrogate == {"name": "importance"}


def test_a_part_of_the_same_name_keeps_the_methods_knobs() -> None:
    assert base("objective.surrogate=ppo_clip").objective.surrogate["low"] == 0.5


def test_an_objective_without_a_method_is_enough() -> None:
    text = BASE.replace(
        "method: cj_grpo",
        "objective: {estimator: trace, unit: token, surrogate: importance, weight: uniform, advantage: group_std}",
    )
    objective = parse_recipe(text).objective
    assert objective.advantage == {"name": "group_std", "eps": 1e-4, "sample": True}
    assert (objective.beta, objective.inner_steps, objective.old) == (0, 1, "rollout")
    assert objective.bound == {"name": "sum"}


@pytest.mark.parametrize(
    ("base_value", "top", "merged"),
    [
        ({"name": "a", "x": 1, "y": 2}, {"x": 3}, {"name": "a", "x": 3, "y": 2}),
        ({"name": "a", "x": 1}, {"name": "a", "y": 2}, {"name": "a", "x": 1, "y": 2}),
        ({"name": "a", "x": 1}, {"name": "b", "y": 2}, {"name": "b", "y": 2}),
        ({"name": "a", "x": 1}, "b", {"name": "b"}),
        ({"name": "a", "x": 1}, "a", {"name": "a", "x": 1}),
        ("a", {"x": 1}, {"name": "a", "x": 1}),
        ("a", "b", "b"),
        (
            {"eos": {"rule": "stop", "suppress": True}},
            {"eos": {"rule": "none"}},
            {"eos": {"rule": "none", "suppress": True}},
        ),
        ({"x": 1}, None, None),
        ([1, 2], [3], [3]),
    ],
)
def test_merge(base_value: Any, top: Any, merged: Any) -> None:
    assert merge(base_value, top) == merged


def test_overrides_are_yaml_and_reach_lists_and_bare_parts() -> None:
    data: dict[str, Any] = {"sampler": {"score": "random"}, "rewards": [{"name": "a"}], "lora": None}
    for override in (
        "sampler.score.k=3",
        "rewards.0.weight=0.5",
        "lora.rank=8",
        "betas=[0.9, 0.95]",
        "lr=1e-4",
        "x=null",
    ):
        apply_override(data, override)
    assert data == {
        "sampler": {"score": {"name": "random", "k": 3}},
        "rewards": [{"name": "a", "weight": 0.5}],
        "lora": {"rank": 8},
        "betas": [0.9, 0.95],
        "lr": 1e-4,
        "x": None,
    }


def test_an_override_may_hold_an_equals_sign_and_an_empty_value_is_null() -> None:
    data: dict[str, Any] = {}
    apply_override(data, "name=a=b")
    apply_override(data, "other=")
    assert data == {"name": "a=b", "other": None}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1e3", 1000.0),
        ("-2E5", -2e5),
        ("1.5e-3", 1.5e-3),
        ("3", 3),
        ("'1e-3'", "1e-3"),
        ("1e", "1e"),
        ("e5", "e5"),
    ],
)
def test_numbers_are_read_as_yaml_1_2_reads_them(text: str, value: Any) -> None:
    read = parse_yaml(text, "here")
    assert read == value and type(read) is type(value)


def test_yaml_anchors_and_merge_keys_work() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n"
    assert parse_yaml(text, "here") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


def test_yaml_builds_no_objects() -> None:
    with pytest.raises(RecipeError, match="could not determine a constructor"):
        parse_yaml("a: !!python/object/apply:os.getcwd []", "here")


def test_a_whole_float_is_an_integer_and_nothing_else_is_coerced() -> None:
    assert base("optim.steps=1e3").optim.steps == 1000
    for override in ("optim.steps=2.5", "optim.steps='3'", "optim.steps=true", "optim.lr=true", "optim.lr='1e-3'"):
        with pytest.raises(RecipeError, match=r"optim\.(steps|lr)"):
            base(override)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_resolve_and_survive_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    again = parse_recipe(dump_recipe(recipe))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_short_and_explain_themselves(name: str) -> None:
    lines = shipped_recipes()[name].splitlines()
    assert 15 <= len(lines) <= 45
    assert lines[0] == "# yaml-language-server: $schema=recipe.schema.json"
    assert lines[1].startswith("# ")


@pytest.mark.parametrize("name", [name for name, text in shipped_recipes().items() if "jsonl" not in text])
def test_shipped_recipes_have_data_with_the_columns_their_rewards_need(name: str) -> None:
    row = crosschecks.check_data(load_recipe(name, ["evaluation.problems=8"]))
    assert row["prompt"] and row["reference"]


USE = {"truth": False, "isolated": None, "limit_s": None}


def test_a_resolved_recipe_writes_every_knob_and_field_out() -> None:
    data = yaml.safe_load(dump_recipe(base()))
    assert data["rewards"] == [{**USE, "name": "arithmetic", "weight": 1.0, "extract": "gsm8k_hash", "rules": 1}]
    assert data["rollout"]["sampler"]["schedule"] == {"name": "blocks", "size": 16, "per_step": 2, "steps": None}
    assert data["model"]["lora"]["alpha"] == 8.0
    assert set(data) == set(Recipe.model_fields)
    assert "seed" not in data["task"]


def test_a_tuple_knob_survives_a_round_trip() -> None:
    recipe = base("task={name: countdown, numbers: [3, 3]}", "rewards=[countdown]")
    assert recipe.task["numbers"] == (3, 3)
    assert parse_recipe(dump_recipe(recipe)) == recipe


def test_the_evaluations_sampler_names_changes_only() -> None:
    sampler = base("evaluation.sampler.schedule.per_step=1", "rollout.sampler.eos.rule=none").evaluation.sampler
    assert sampler is not None
    assert sampler.schedule == {"name": "blocks", "size": 16, "per_step": 1, "steps": None}
    assert sampler.eos.rule == "none"
    assert base().evaluation.sampler is None


def test_a_supervised_evaluation_names_changes_to_the_default_sampler() -> None:
    recipe = load_recipe("tiny_sft", ["evaluation.sampler.schedule.per_step=4"])
    assert isinstance(recipe, SftRecipe)
    assert recipe.evaluation.sampler.schedule == {"name": "blocks", "size": 16, "per_step": 4, "steps": None}


def test_a_method_given_by_override_replaces_the_files() -> None:
    assert base("method=trace_step").objective.unit == {"name": "step"}


def test_a_method_that_changes_nothing_is_refused() -> None:
    resolved = dump_recipe(base())
    with pytest.raises(RecipeError, match="'trace_step' changes nothing"):
        parse_recipe(resolved, ["method=trace_step"])


def test_recipes_are_found_by_file_then_by_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml", "recipes/quickstart.yaml"):
        assert load_recipe(name).name == "quickstart"
    with pytest.raises(RecipeError, match="there is no file"):
        load_recipe("elsewhere/quickstart.yaml")
    (tmp_path / "quickstart.yaml").write_text(BASE)
    assert load_recipe("quickstart.yaml").name == "base"
    assert load_recipe("quickstart").name == "quickstart"


def test_a_run_folder_stands_for_its_resolved_recipe(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / reading.RESOLVED).write_text(dump_recipe(base()))
    assert load_recipe(tmp_path) == base()
    assert load_recipe(tmp_path / "checkpoints") == base()


def test_methods_has_only_keys_of_an_objective_and_says_where_it_comes_from() -> None:
    for name, row in load_methods().items():
        texts = {"summary", "source", "departs", "equation", "cost", "bias"}
        assert {*texts, "objective"} <= set(row) <= {*texts, "objective", "paper", "exploration", "value"}, name
        assert all(isinstance(row[key], str) and row[key] for key in texts), name
        assert set(row["objective"]) <= set(ObjectiveSection.model_fields), name


@pytest.mark.parametrize("name", load_methods())
def test_every_method_resolves_by_itself(name: str) -> None:
    of_positions = "positions" in load_methods()[name]["objective"].get("actions", [])
    acting = ["planner={}", "model.lora=null", "rollout.sampler.score=planner", "rollout.sampler.selection=planned"]
    objective = base(f"method={name}", *(acting if of_positions else [])).objective
    for key, value in load_methods()[name]["objective"].items():
        resolved = getattr(objective, key)
        if isinstance(resolved, dict):
            value = {"name": value} if isinstance(value, str) else value
            assert value.items() <= resolved.items()
        else:
            assert resolved == value


def test_cj_grpo_is_the_published_method() -> None:
    objective = load_methods()["cj_grpo"]["objective"]
    assert objective["surrogate"] == {"name": "ppo_clip", "low": 0.5, "high": 0.5}
    assert (objective["beta"], objective["divergence"]) == (0.04, "k3")
    assert (objective["advantage"], objective["weight"], objective["unit"]) == ("group_mean", "per_step_mean", "token")


def sampler(**schedule: Any) -> SamplerSection:
    loading.import_parts("schedule")
    return SamplerSection.model_validate({"schedule": schedule})


@pytest.mark.parametrize(
    ("schedule", "canvas", "steps"),
    [
        ({"name": "blocks", "size": 16, "per_step": 4}, 80, 20),
        ({"name": "blocks", "size": 16, "per_step": 5}, 80, 5 * 4),  # 5 5 5 1 in each block
        ({"name": "blocks", "size": 64, "steps": 32}, 128, 32),
        ({"name": "uniform", "steps": 7}, 32, 7),
        ({"name": "uniform", "steps": 32}, 32, 32),
        ({"name": "cosine", "steps": 8}, 64, 8),
    ],
)
def test_step_limit_counts_denoiser_calls(schedule: dict[str, Any], canvas: int, steps: int) -> None:
    assert crosschecks.step_limit(sampler(**schedule), canvas) == steps


def test_step_limit_of_detours_is_the_cap() -> None:
    """Tokens that come and go take more steps than planned; a rule that keeps to the schedule's count does not."""
    schedule = {"name": "blocks", "size": 16, "per_step": 4}
    for changes in ({"remasking": {"name": "doubt"}}, {"editing": {"name": "token_to_token"}}):
        assert crosschecks.step_limit(sampler(**schedule).model_copy(update=changes), 80) == 4 * 80
    rcr = {"remasking": {"name": "running_confidence"}, "selection": {"name": "all"}}
    assert crosschecks.step_limit(sampler(**schedule).model_copy(update=rcr), 80) == 20


def test_check_world() -> None:
    crosschecks.check_world(base(), 4)
    with pytest.raises(RecipeError, match=r"rollout\.prompts: 4 .* 3 processes; use a multiple of 3, for example 6"):
        crosschecks.check_world(base(), 3)
    with pytest.raises(RecipeError, match=r"sft\.batch: 64 rows .* 5 processes; .* 65"):
        crosschecks.check_world(load_recipe("tiny_sft", ["sft.batch=64"]), 5)
    with pytest.raises(RecipeError, match="nproc: 0"):
        crosschecks.check_world(base(), 0)


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["run.save_every=50"], r"run\.save_every 50 exceeds optim\.steps 10"),
        (["evaluation.every=50"], r"evaluation\.every 50"),
        (["objective.beta=0", "objective.reference=frozen_copy"], "not used at beta 0"),
        (["objective.surrogate=importance"], "does not bound the ratio over 8 inner steps"),
        (["objective.inner_steps=1", "objective.old=recompute"], "the ratio it gives is 1"),
        (["rollout.sampler.eos.suppress=true"], "never applies"),
        (["model.lora.dropout=0.1"], "dropout"),
    ],
)
def test_notes(overrides: list[str], note: str) -> None:
    assert crosschecks.notes(base()) == []
    (found,) = crosschecks.notes(base(*overrides))
    assert re.search(note, found)


def sections(model: type[BaseModel]) -> typing.Iterator[type[BaseModel]]:
    yield model
    for info in model.model_fields.values():
        for inner in (info.annotation, *typing.get_args(info.annotation)):
            for leaf in (inner, *typing.get_args(inner)):
                if isinstance(leaf, type) and issubclass(leaf, BaseModel):
                    yield from sections(leaf)


@pytest.mark.parametrize("model", sorted({*sections(Recipe), *sections(SftRecipe)}, key=repr))
def test_every_section_and_field_is_described(model: type[BaseModel]) -> None:
    assert model.__doc__
    bare = [name for name, info in model.model_fields.items() if not info.description]
    assert not bare
    assert model.model_config["extra"] == ("allow" if model.__name__ == "RewardEntry" else "forbid")


def test_the_walk_finds_all_sections() -> None:
    names = {model.__name__ for model in sections(Recipe)}
    assert {"LoraSection", "EosSection", "CorrectionSection", "RewardEntry", "EvaluationSection"} <= names


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (float("inf"), int),
        (float("nan"), int),
        (float("nan"), float),
        (10**400, float),
        (True, int),
        (True, float),
        ("x", float),
    ],
)
def test_coerce_refuses_what_is_no_number(value: Any, annotation: Any) -> None:
    with pytest.raises(RecipeError, match=r"here: .* is not a (whole number|float)\."):
        coerce(value, annotation, "here")


def test_parts_of_the_users_own_are_checked_like_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_parts_for_test.py").write_text(
        "def spread(reward_B, group_B, *, power: float = 2.0):\n    return 0 * reward_B\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    choice = base("objective.advantage={name: 'own_parts_for_test:spread', power: 3}").objective.advantage
    assert choice == {"name": "own_parts_for_test:spread", "power": 3.0}
    with pytest.raises(RecipeError, match=r"objective\.advantage: .* has no knob 'powr'\. Did you mean 'power'"):
        base("objective.advantage={name: 'own_parts_for_test:spread', powr: 3}")


def test_every_slot_has_a_module() -> None:
    assert set(loading.PART_MODULES) == set(SLOTS)
