"""The JSON schema for editors agrees with the loader: on shipped recipes, on mistakes, and with the committed file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from operator import ge, gt, le, lt
from typing import Any

import pytest
import yaml

from unmask.recipes.editor import recipe_schema, schema_text
from unmask.recipes.loading import dump_recipe, load_recipe, parse_recipe
from unmask.recipes.reading import SCHEMA_FILE, apply_override, parse_yaml, shipped_recipes
from unmask.recipes.sections import MARK

KINDS: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}
RULES = {"minimum": ge, "maximum": le, "exclusiveMinimum": gt, "exclusiveMaximum": lt}
KNOWN = {
    "$schema", "$defs", "$ref", "title", "description", "default", "type", "enum", "const", "pattern", "minimum",
    "exclusiveMinimum", "maximum", "exclusiveMaximum", "minLength", "minItems", "maxItems", "minProperties", "items",
    "prefixItems", "properties", "required", "additionalProperties", "anyOf", "if", "then", "else",
}  # fmt: skip


def problems(value: Any, schema: Any, root: dict[str, Any], where: str = "") -> Iterator[str]:
    """Yield where `value` breaks `schema`: the part of JSON schema that ours uses, and an assertion that it is all."""
    if schema is True:
        return
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if "$ref" in schema:
        yield from problems(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root, where)
    if "anyOf" in schema and not any(not list(problems(value, s, root, where)) for s in schema["anyOf"]):
        yield f"{where}: fits none"
    if "if" in schema:
        holds = not list(problems(value, schema["if"], root, where))
        yield from problems(value, schema["then" if holds else "else"], root, where)
    kind = schema.get("type")
    if kind is not None and (not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "boolean")):
        yield f"{where}: not {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: not in {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        yield f"{where}: not {schema['const']}"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{where}: not {schema['pattern']}"
    yield from _number_problems(value, schema, where)
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9):
            yield f"{where}: {len(value)} items"
        schemas = [*schema.get("prefixItems", []), *[schema.get("items", True)] * len(value)]
        for index, item in enumerate(value):
            yield from problems(item, schemas[index], root, f"{where}.{index}")
    if isinstance(value, dict):
        yield from _object_problems(value, schema, root, where)


def _number_problems(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        for rule, holds in RULES.items():
            if rule in schema and not holds(value, schema[rule]):
                yield f"{where}: {rule}"


def _object_problems(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any], where: str) -> Iterator[str]:
    known = schema.get("properties", {})
    yield from (f"{where}: {key} is missing" for key in schema.get("required", []) if key not in value)
    if len(value) < schema.get("minProperties", 0):
        yield f"{where}: empty"
    for key, item in value.items():
        if key in known:
            yield from problems(item, known[key], root, f"{where}.{key}")
        elif schema.get("additionalProperties", True) is False:
            yield f"{where}: {key} is unknown"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe_schema()


def test_the_committed_file_is_what_the_code_makes() -> None:
    assert SCHEMA_FILE.read_text() == schema_text(), "run `unmask schema --out recipes/recipe.schema.json`"


def test_no_mark_is_left(schema: dict[str, Any]) -> None:
    assert MARK not in str(schema)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_and_resolved_recipes_fit(name: str, schema: dict[str, Any]) -> None:
    assert list(problems(parse_yaml(shipped_recipes()[name], name), schema, schema)) == []
    assert list(problems(yaml.safe_load(dump_recipe(load_recipe(name))), schema, schema)) == []


@pytest.mark.parametrize(
    "override",
    [
        "rollout.sampler.score=random",
        "rollout.sampler.schedule={name: uniform, steps: 8}",
        "rollout.sampler.selection={name: threshold, level: 0.8}",
        "rollout.sampler.selection='my.parts:greedy'",
        "objective.surrogate={low: 0.1}",
        "evaluation.sampler.schedule.per_step=1",
        "objective.correction=truncated",
        "run.report_to=[wandb, tensorboard]",
        "run.report_to=wandb",
        "model.lora=null",
        "method=trace_step",
        "rewards=[arithmetic]",
        "rewards.0={name: 'my:reward', weight: 2, anything: 3}",
    ],
)
def test_what_the_loader_takes_fits(override: str, schema: dict[str, Any]) -> None:
    data = parse_yaml(shipped_recipes()["quickstart"], "quickstart")
    apply_override(data, override)
    assert list(problems(data, schema, schema)) == []


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("rollout.grup=2", ".rollout: grup is unknown"),
        ("rollout.group=0", ".rollout.group: minimum"),
        ("optim.lr=0", ".optim.lr: exclusiveMinimum"),
        ("optim.steps=two", ".optim.steps: not integer"),
        ("optim.betas=[0.9]", ".optim.betas: 1 items"),
        ("optim.schedule=cosin", ".optim.schedule: not in"),
        ("rollout.sampler.score=confidance", ".rollout.sampler.score: fits none"),
        ("rollout.sampler.schedule=uniform", ".rollout.sampler.schedule: fits none"),
        ("rollout.sampler.schedule={name: uniform, steps: many}", ".rollout.sampler.schedule: fits none"),
        ("rollout.sampler.schedule={name: uniform, steps: 8, size: 4}", ".rollout.sampler.schedule: fits none"),
        ("task={name: arithmetic, level: esy}", ".task: fits none"),
        ("method=cj_gpro", ".method: fits none"),
        ("rewards=[]", ".rewards: 0 items"),
        ("rewards.0={name: arithmetic, strict: true}", ".rewards.0: fits none"),
        ("kind=sft", ": tasks is missing"),
        ("run.report_to=wandbb", ".run.report_to: fits none"),
    ],
)
def test_mistakes_do_not_fit(override: str, where: str, schema: dict[str, Any]) -> None:
    data = parse_yaml(shipped_recipes()["quickstart"], "quickstart")
    apply_override(data, override)
    assert any(problem.startswith(where) for problem in problems(data, schema, schema))


PAIRS = """
kind: preference
name: preferred
model: {path: "unmask:tiny", lora: {rank: 16}}
pairs: {file: pairs.jsonl, canvas: 96}
optim: {lr: 1.0e-4, steps: 100}
"""


def test_preference_recipes_have_a_schema(schema: dict[str, Any]) -> None:
    data = parse_yaml(PAIRS, "pairs")
    assert list(problems(data, schema, schema)) == []
    resolved = yaml.safe_load(dump_recipe(parse_recipe(PAIRS)))
    assert resolved.keys() > data.keys() and list(problems(resolved, schema, schema)) == []
    for override, where in (
        ("preference.betta=1", ".preference: betta is unknown"),
        ("preference.beta=0", ".preference.beta: exclusiveMinimum"),
        ("rollout.canvas=8", ": rollout is unknown"),
        ("kind=sft", ": pairs is unknown"),
        ("kind=preferences", ".kind: not rl"),
    ):
        wrong = parse_yaml(PAIRS, "pairs")
        apply_override(wrong, override)
        assert any(problem.startswith(where) for problem in problems(wrong, schema, schema)), override


def test_a_recipe_without_method_and_objective_sections_is_left_to_the_loader(schema: dict[str, Any]) -> None:
    data = parse_yaml(shipped_recipes()["quickstart"], "quickstart")
    del data["objective"]
    assert list(problems(data, schema, schema)) == []
    del data["rollout"]
    assert list(problems(data, schema, schema)) == [": rollout is missing"]
