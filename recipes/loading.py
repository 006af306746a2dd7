"""load_recipe(): a YAML recipe becomes a checked Recipe; no weights are read and no device is touched."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from .explaining import explain
from .preferences import PreferenceRecipe
from .reading import apply_override, find_recipe, merge, parse_yaml, read_mapping
from .registry import SLOTS, RecipeError, nearest
from .schema import Recipe, RewardEntry, SftEvaluationSection, SftRecipe
from .sections import InSlot

PART_MODULES = {
    "task": "recipes.problems",
    "canvas": "rollouts.hints",
    "exploration": "rollouts.exploration",
    "filter": "rl.filters",
    "schedule": "rollouts.sampler",
    "score": "rollouts.sampler",
    "selection": "rollouts.sampler",
    "remasking": "rollouts.remasking",
    "editing": "rollouts.remasking",
    "length": "rollouts.lengths",
    "transform": "rollouts.transforms",
    "cache": "rollouts.caches",
    "reward": "rewards",
    "advantage": "rl.advantages",
    "estimator": "rl.drafts",
    "unit": "rl.units",
    "bound": "rl.bounds",
    "surrogate": "rl.surrogates",
    "order": "rl.orders",
    "speed": "rl.speed",
    "divergence": "rl.divergences",
    "weight": "rl.weights",
}
AnyRecipe = Recipe | SftRecipe | PreferenceRecipe
KINDS: dict[str, type[AnyRecipe]] = {"rl": Recipe, "sft": SftRecipe, "preference": PreferenceRecipe}
PLAIN = (type(None), bool, int, float, str, list, tuple, dict)


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Return the resolved recipe of a file, a run folder or a shipped name, with `key.path=value` overrides applied.

    The method's row lies under `objective`, every part is checked against its registry and carries all its knobs,
    and contradictory choices are refused. Raises RecipeError, one line that names key, value, rule and remedy.
    """
    text, source = find_recipe(path_or_name)
    return parse_recipe(text, overrides, source=source)


def parse_recipe(text: str, overrides: Sequence[str] = (), *, source: str = "recipe") -> AnyRecipe:
    """Return the resolved recipe of a YAML text; see `load_recipe`."""
    data = read_mapping(text, source)
    written = typing.cast("dict[str, Any]", parse_yaml(text, source))
    for override in overrides:
        apply_override(data, override)
    try:
        _refuse_idle_method(written, data)
        return resolve(data)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from error


def resolve(data: dict[str, Any]) -> AnyRecipe:
    """Return the resolved recipe of a plain dictionary; see `load_recipe`."""
    kind = data.get("kind", "rl")
    if not isinstance(kind, str) or kind not in KINDS:
        raise RecipeError(f"kind: {kind!r} is not one of {', '.join(KINDS)}.{nearest(str(kind), list(KINDS))}")
    written = data.get("objective")
    data = _with_evaluation_sampler(_with_samplers(_with_method(data)), kind)
    try:
        recipe = KINDS[kind].model_validate(data)
    except ValidationError as error:
        raise RecipeError(explain(error, KINDS[kind])) from error
    check_parts(recipe)
    from .correcting import settle_correction
    from .crosschecks import check_recipe

    check_recipe(recipe)
    if isinstance(recipe, Recipe):
        settle_correction(recipe, written if isinstance(written, dict) else {})
    return recipe


def check_parts(section: BaseModel) -> None:
    """Check every part of a validated section against its registry and write out all its knobs."""
    for place in parts_of(section):
        place.put(_checked(place))


def dump_recipe(recipe: AnyRecipe) -> str:
    """Return the recipe as YAML; loading it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)


@functools.cache
def load_methods() -> dict[str, dict[str, Any]]:
    """Return methods.yaml: for each method its texts (`summary`, `source`, ...) and its `objective`."""
    text = resources.files(__package__).joinpath("methods.yaml").read_text(encoding="utf-8")
    return read_mapping(text, "methods.yaml")


def _with_method(data: dict[str, Any]) -> dict[str, Any]:
    name = data.get("method")
    if name is None:
        return data
    methods = load_methods()
    if not isinstance(name, str) or name not in methods:
        raise RecipeError(f"method: unknown method {name!r}.{nearest(str(name), list(methods))}")
    filled = {key: methods[name][key] for key in ("objective", "exploration", "value") if key in methods[name]}
    return {**data, **{key: merge(row, data.get(key) or {}) for key, row in filled.items()}}


def _refuse_idle_method(written: dict[str, Any], data: dict[str, Any]) -> None:
    """Refuse an override of `method` under which every choice of the file's own `objective` stays."""
    before, after = written.get("method"), data.get("method")
    if before == after or before is None or after is None:
        return
    if {**_with_method({**data, "method": before}), "method": after} == _with_method(data):
        raise RecipeError(
            f"method: '{after}' changes nothing, the file sets every choice of it; remove them from `objective`."
        )


@functools.cache
def load_samplers() -> dict[str, dict[str, Any]]:
    """Return samplers.yaml: for each published decoding method its `summary`, `source`, `departs` and `sampler`."""
    text = resources.files(__package__).joinpath("samplers.yaml").read_text(encoding="utf-8")
    return read_mapping(text, "samplers.yaml")


def _with_samplers(data: dict[str, Any]) -> dict[str, Any]:
    """Fill `rollout.sampler` and `evaluation.sampler` from the row of samplers.yaml that they name."""
    for name in ("rollout", "evaluation"):
        section = data.get(name)
        if isinstance(section, dict) and section.get("sampler") is not None:
            data = {**data, name: {**section, "sampler": named_sampler(section["sampler"], f"{name}.sampler")}}
    return data


def named_sampler(choice: Any, where: str = "sampler") -> Any:
    """Return a sampler section with the choices of its `preset` filled in; a bare name is a preset."""
    if isinstance(choice, str):
        choice = {"preset": choice}
    if not isinstance(choice, dict) or choice.get("preset") is None:
        return choice
    rows, name = load_samplers(), choice["preset"]
    if not isinstance(name, str) or name not in rows:
        raise RecipeError(f"{where}.preset: unknown sampler {name!r}.{nearest(str(name), list(rows))}")
    # A copy: overrides write into what they are given, and the rows are everyone's.
    return merge(copy.deepcopy(rows[name]["sampler"]), choice)


def _with_evaluation_sampler(data: dict[str, Any], kind: str) -> dict[str, Any]:
    """Lay `evaluation.sampler` over the rollout's sampler (SFT: over the default), so that it may name changes only."""
    evaluation = data.get("evaluation")
    changes = evaluation.get("sampler") if isinstance(evaluation, dict) else None
    if not isinstance(evaluation, dict) or not isinstance(changes, dict):
        return data
    rollout = data.get("rollout")
    base = rollout.get("sampler") if isinstance(rollout, dict) else None
    if kind == "sft":
        base = SftEvaluationSection.model_validate({}).sampler.model_dump()
    # A named sampler stands for itself; anything else changes the rollout's.
    merged = changes if changes.get("preset") is not None else merge(base, changes)
    return {**data, "evaluation": {**evaluation, "sampler": merged}}


@dataclass(frozen=True)
class Place:
    """Where in a recipe a part stands: its key path, its slot, and the object and attribute (or index) that hold it."""

    where: str
    slot: str
    value: Any
    holder: Any
    key: str | int

    def put(self, value: Any) -> None:
        """Replace the part."""
        if isinstance(self.key, int):
            self.holder[self.key] = value
        else:
            setattr(self.holder, self.key, value)


def parts_of(section: BaseModel, prefix: str = "") -> Iterator[Place]:
    """Yield every part of a validated section, in the order of its fields."""
    for name, info in type(section).model_fields.items():
        value, where, slot = getattr(section, name), prefix + name, slot_of(info)
        if value is None:
            continue
        if slot is not None and isinstance(value, list):
            yield from (Place(f"{where}.{i}", slot, item, value, i) for i, item in enumerate(value))
        elif slot is not None:
            yield Place(where, slot, value, section, name)
        elif isinstance(value, BaseModel):
            yield from parts_of(value, f"{where}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from parts_of(item, f"{where}.{index}.")


def slot_of(info: FieldInfo) -> str | None:
    """Return the slot a field (or the items of a list field) is marked with."""

    def marks(annotation: Any) -> Iterator[InSlot]:
        yield from (mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, InSlot))
        for inner in typing.get_args(annotation):
            yield from marks(inner)

    own = [mark for mark in info.metadata if isinstance(mark, InSlot)]
    found = [*own, *marks(info.annotation)]
    return found[0].slot if found else None


def import_parts(slot: str) -> None:
    """Import the module that registers the parts of `slot` (most of them import torch)."""
    importlib.import_module(f"...{PART_MODULES[slot]}", __name__)


def _checked(place: Place) -> Any:
    import_parts(place.slot)
    if isinstance(place.value, RewardEntry):
        return _checked_reward(place)
    name, values = SLOTS[place.slot].check(place.value, place.where)
    return {"name": name, **defaults(place.slot, name), **values}


def _checked_reward(place: Place) -> RewardEntry:
    from ..rewards.building import USE, build_rewards

    entry = place.value.model_dump()
    # The builder names an entry by its index in the list it is given, so the others are padded away.
    try:
        # Whether code may run is the recipe's to say, and checked there.
        stand_in = {**entry, "weight": 1.0, "truth": False}
        build_rewards([stand_in], where=place.where, allow_code_execution=True)
    except RecipeError as error:
        raise RecipeError(str(error).replace(f"{place.where}[0]", place.where)) from error
    if entry["name"] not in SLOTS["reward"]:
        return place.value
    use = {key: value for key, value in entry.items() if key in USE}
    knobs = {key: value for key, value in entry.items() if key not in USE}
    name, values = SLOTS["reward"].check(knobs, place.where)
    return RewardEntry(name=name, **use, **{**defaults("reward", name), **values})


def defaults(slot: str, name: str) -> dict[str, Any]:
    """Return the default of every knob of a part that has one and that YAML can hold.

    A task's `seed` is left out: `run.seed` decides it.
    """
    knobs = SLOTS[slot].knobs(name)
    hidden = {"seed"} if slot == "task" else set()
    return {
        key: knob.default
        for key, knob in knobs.items()
        if knob.default is not inspect.Parameter.empty and isinstance(knob.default, PLAIN) and key not in hidden
    }
