"""Recipe files as plain dictionaries: finding them, reading YAML strictly, dotted overrides, merging."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .registry import RecipeError, nearest

RESOLVED = "recipe.yaml"  # the name under which a run folder holds its resolved recipe
SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")
NOT_RECIPES = {"methods", "protocols", "samplers"}


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice and reads 1e-3 as a number (YAML 1.2; PyYAML says a string)."""


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys: set[str] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a word", key_node.start_mark)
        if key in keys:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is written twice", key_node.start_mark)
        keys.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, source: str) -> Any:
    """Return the one YAML document of `text`; RecipeError with line and column otherwise."""
    try:
        return yaml.load(text, Loader=StrictLoader)  # a SafeLoader: plain data only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = " ".join(str(error.problem or error.context or "not valid YAML").split())
        raise RecipeError(f"{source}{where}: not readable as YAML ({problem}).") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not readable as YAML ({' '.join(str(error).split())}).") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: not readable as YAML ({error}).") from error


def shipped_recipes() -> dict[str, str]:
    """Return the text of every recipe that comes with unmask, by name (without `.yaml`)."""
    folder = resources.files(__package__)
    files = (entry for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    found = {entry.name.removesuffix(".yaml"): entry for entry in files}
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found) if name not in NOT_RECIPES}


def find_recipe(path_or_name: str | Path) -> tuple[str, str]:
    """Return (text, source) of a recipe file, of a run folder's resolved recipe, or of a shipped recipe.

    A shipped recipe is found as `NAME`, `NAME.yaml` or `recipes/NAME.yaml` when no such file exists.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        for folder in (path, path.parent):
            if (folder / RESOLVED).is_file():
                return _read(folder / RESOLVED), str(folder / RESOLVED)
        raise RecipeError(f"recipe: '{path}' is a folder without {RESOLVED}; name a recipe file or a run folder.")
    if path.exists():
        return _read(path), str(path)
    shipped = shipped_recipes()
    name = path.name.removesuffix(".yaml")
    if name in shipped and path.parent in (Path("."), Path("recipes")):
        return shipped[name], f"{name}.yaml"
    raise RecipeError(
        f"recipe: there is no file '{path_or_name}' and no shipped recipe '{name}'.{nearest(name, list(shipped))}"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"recipe: cannot read '{path}' ({reason}).") from error


def read_mapping(text: str, source: str) -> dict[str, Any]:
    """Return the mapping that a recipe's text holds; RecipeError when it holds something else."""
    data = parse_yaml(text, source)
    if data is None:
        raise RecipeError(f"{source}: the file is empty; start from a shipped recipe with `unmask cp`.")
    if not isinstance(data, dict):
        raise RecipeError(f"{source}: holds a {type(data).__name__}, a recipe is a mapping of `key: value` lines.")
    return data


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set `key.path=value` in `data`; the value is read as YAML, `rewards.0.weight` reaches into a list.

    A part written as a bare name becomes `{name: ...}` when a knob of it is set.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override '{override}': write key.path=value, for example optim.lr=1e-4.")
    value = parse_yaml(text, f"override '{override}'")
    place: Any = data
    for depth, key in enumerate(keys[:-1]):
        place = _descend(place, key, ".".join(keys[: depth + 1]), override)
    if isinstance(place, list):
        place[_index(place, keys[-1], override)] = value
    else:
        place[keys[-1]] = value


def _descend(place: Any, key: str, where: str, override: str) -> Any:
    if isinstance(place, list):
        slot: Any = _index(place, key, override)
        inner = place[slot]
    else:
        slot, inner = key, place.get(key)
    if inner is None:
        inner = {}
    elif isinstance(inner, str):
        inner = {"name": inner}
    elif not isinstance(inner, dict | list):
        raise RecipeError(f"override '{override}': {where} is {inner!r} and holds no keys.")
    place[slot] = inner
    return inner


def _index(place: Sequence[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise RecipeError(f"override '{override}': '{key}' is no index of a list of {len(place)}; count from 0.")
    return int(key)


def merge(base: Any, top: Any) -> Any:
    """Return `base` with `top` laid over it, key by key; a part of another name replaces the whole part.

    `{name: ppo_clip, low: 0.5}` under `{low: 0.2}` or `{name: ppo_clip, low: 0.2}` keeps the part; under `importance`
    nothing of it stays.
    """
    if isinstance(top, str) and isinstance(base, Mapping) and "name" in base:
        top = {"name": top}
    if isinstance(base, str) and isinstance(top, Mapping):
        base = {"name": base}
    if not isinstance(base, Mapping) or not isinstance(top, Mapping):
        return top
    if "name" in top and top["name"] != base.get("name"):
        return dict(top)
    return {
        key: merge(base[key], top[key]) if key in base and key in top else {**base, **top}[key]
        for key in {**base, **top}
    }
