"""The JSON schema of recipes for editors, from the same sections and registries that check them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter

from .loading import KINDS, import_parts, load_methods, load_samplers
from .registry import SLOTS
from .schema import RewardEntry
from .sections import MARK

OUTSIDE = {"type": "string", "pattern": "^[A-Za-z_][\\w.]*:[A-Za-z_]\\w*$"}


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of recipe files, which may leave to the method what it fills.

    A recipe is checked as what its `kind` says, rl without one. A part is a name or an object.
    """
    definitions: dict[str, Any] = {}
    for model in KINDS.values():
        schema = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= schema.pop("$defs", {})
        definitions[model.__name__] = schema
    for slot in SLOTS:
        import_parts(slot)
        definitions[f"part.{slot}"] = {"anyOf": list(_choices(slot))}
    _relax(definitions)
    definitions = {name: _tidy(schema) for name, schema in sorted(definitions.items())}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "unmask recipe",
        "$defs": definitions,
        "type": "object",
        **_by_kind(),
    }


def _by_kind() -> dict[str, Any]:
    """Return the choice among the kinds of recipes, of which rl need not be named."""
    found: dict[str, Any] = {"$ref": f"#/$defs/{KINDS['rl'].__name__}"}
    for kind in reversed([kind for kind in KINDS if kind != "rl"]):
        asked = {"properties": {"kind": {"const": kind}}, "required": ["kind"]}
        found = {"if": asked, "then": {"$ref": f"#/$defs/{KINDS[kind].__name__}"}, "else": found}
    return found


def schema_text() -> str:
    """Return the JSON schema as the text of `recipe.schema.json`."""
    return json.dumps(recipe_schema(), indent=1) + "\n"


def _relax(definitions: dict[str, Any]) -> None:
    """Undo what holds for resolved recipes only: keys that a method or the rollout's sampler may fill, short forms."""
    for name in ("ObjectiveSection", "SamplerSection"):
        definitions[name].pop("required", None)
    definitions["Recipe"]["required"].remove("objective")
    presets, choices = sorted(load_samplers()), definitions["SamplerSection"]
    definitions["SamplerChoices"] = choices
    choices["properties"]["preset"]["anyOf"][0] = {"enum": presets}
    definitions["SamplerSection"] = {
        "if": {"type": "string"},
        "then": {"enum": presets},
        "else": {"$ref": "#/$defs/SamplerChoices"},
    }
    definitions["Recipe"]["properties"]["method"] = {
        "anyOf": [{"enum": sorted(load_methods())}, {"type": "null"}],
        "description": definitions["Recipe"]["properties"]["method"]["description"],
    }
    trackers = definitions["RunSection"]["properties"]["report_to"]
    trackers["anyOf"] = [{"type": trackers.pop("type"), "items": trackers["items"]}, trackers.pop("items")]
    names = definitions["CorrectionSection"]["properties"]["name"]["enum"]
    definitions["ObjectiveSection"]["properties"]["correction"] = {
        "anyOf": [{"enum": names}, {"$ref": "#/$defs/CorrectionSection"}]
    }


def _tidy(node: Any) -> Any:
    """Replace marked parts by their slot's definition and drop generated titles, defaults of parts included."""
    if isinstance(node, list):
        return [_tidy(item) for item in node]
    if not isinstance(node, dict):
        return node
    if MARK in node:
        kept = {key: value for key, value in node.items() if key == "description"}
        return {"$ref": f"#/$defs/part.{node[MARK]}", **kept}
    return {key: _tidy(value) for key, value in node.items() if not (key == "title" and isinstance(value, str))}


def _choices(slot: str) -> Iterator[dict[str, Any]]:
    """Yield the forms a part may take: its bare name, an object with knobs, knobs alone, and code of the user's own."""
    use = _use() if slot == "reward" else {}
    bare = [name for name in SLOTS[slot] if not _required(slot, name)]
    yield {"enum": bare}
    yield OUTSIDE
    yield {"type": "object", "properties": {"name": OUTSIDE}, "required": ["name"]}
    for name in SLOTS[slot]:
        knobs = {key: _knob(parameter) for key, parameter in SLOTS[slot].knobs(name).items()}
        yield {
            "type": "object",
            "description": (inspect.getdoc(SLOTS[slot].get(name)) or "").partition("\n")[0],
            "properties": {"name": {"const": name}, **use, **knobs},
            "required": ["name", *_required(slot, name)],
            "additionalProperties": False,
        }
    every = {key: True for name in SLOTS[slot] for key in SLOTS[slot].knobs(name)}
    # Under a method, or over the rollout's sampler, knobs may stand without the name they belong to.
    yield {"type": "object", "properties": {**use, **every}, "additionalProperties": False, "minProperties": 1}


def _use() -> dict[str, Any]:
    """Return what an entry of `rewards` may say besides name and knobs."""
    properties = RewardEntry.model_json_schema()["properties"]
    return {key: value for key, value in properties.items() if key != "name"}


def _required(slot: str, name: str) -> list[str]:
    return [key for key, knob in SLOTS[slot].knobs(name).items() if knob.default is inspect.Parameter.empty]


def _knob(parameter: inspect.Parameter) -> dict[str, Any]:
    try:
        schema = TypeAdapter(parameter.annotation).json_schema()
    except PydanticSchemaGenerationError:
        schema = {}
    has_default = parameter.default is not inspect.Parameter.empty
    return {**schema, "default": parameter.default} if has_default else dict(schema)
