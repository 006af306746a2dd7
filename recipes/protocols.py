"""Evaluation protocols: named rows of protocols.yaml that fix everything a score depends on, and one hash of it."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from .crosschecks import check_sampler
from .explaining import explain
from .loading import check_parts, named_sampler
from .reading import merge, read_mapping
from .registry import RecipeError, nearest
from .schema import Recipe, RewardEntry
from .sections import Count, InSlot, Int, Part, SamplerSection, Section, named

NAME = re.compile(r"[a-z0-9_]+@[a-z0-9._-]+")
# What says something about a protocol and nothing about a score.
UNHASHED = ("name", "summary", "source", "departs")
# Where a copy of the data lies; what it holds has a hash of its own in every result.
PLACES = ("path", "heldout_path")


class Protocol(Section):
    """Everything a score depends on beside the weights: problems, prompt, decoding, and what counts as right."""

    name: str = Field(pattern=rf"^{NAME.pattern}$", description="TASK@WHOSE")
    version: Int = Field(1, ge=1, description="a released row never changes; what has to becomes the next version")
    summary: str = Field(description="what it is, in a sentence")
    source: str = Field(description="where it was published")
    departs: str = Field("", description="where it differs from what was published")
    task: Annotated[Part, InSlot("task")] = Field(description="problems, with the revision of their data")
    problems: Count | None = Field(None, description="the first held-out problems; null: all of a stored dataset")
    template: str | None = Field(None, description="prompt written from a row's columns; null: the task's own")
    shots: Int = Field(0, ge=0, description="training problems with worked solutions before the question, as turns")
    prefill: str = Field("", description="text with which the assistant's turn begins")
    prompt_limit: Int = Field(4096, ge=1, description="longest prompt in tokens")
    canvas: Int = Field(ge=1, description="completion positions")
    start: Annotated[Part, InSlot("canvas")] = Field({"name": "blank"}, description="the canvas before the first step")
    sampler: SamplerSection = Field(description="schedule (steps, blocks), scores, selection, EOS rule")
    temperature: float = Field(ge=0, description="temperature of the token draw")
    rewards: list[Annotated[RewardEntry, InSlot("reward"), BeforeValidator(named)]] = Field(
        min_length=1, description="the first says what is right, and which extractor finds the answer"
    )

    @property
    def hash(self) -> str:
        """SHA-256 of the resolved choices, in hexadecimal."""
        return hash_of(self.model_dump(mode="json"))


def hash_of(choices: dict[str, Any]) -> str:
    """Return the hash of a protocol's plain data; names, remarks and the place of a copy of the data do not count.

    Choices that are off (null, empty) are left out, so that a new option leaves the hashes of old rows alone.
    """
    kept = {key: value for key, value in choices.items() if key not in UNHASHED}
    kept["task"] = {key: value for key, value in kept["task"].items() if key not in PLACES}
    return digest(_without_idle(kept))


def digest(value: Any) -> str:
    """Return SHA-256 of a value's canonical JSON, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_idle(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _without_idle(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner not in (None, "", [], {})}
    return [_without_idle(inner) for inner in value] if isinstance(value, list) else value


@functools.cache
def shipped_protocols() -> dict[str, dict[str, Any]]:
    """Return protocols.yaml: rows by name."""
    text = resources.files(__package__).joinpath("protocols.yaml").read_text(encoding="utf-8")
    return read_mapping(text, "protocols.yaml")


def load_protocol(name: str, places: dict[str, Any] | None = None) -> Protocol:
    """Return a shipped protocol, or the one that a YAML file holds (`FILE.yaml`, one row below its name).

    A row may say `like: NAME` and only what differs from that row. `places` are the task's `path` and `heldout_path`,
    a copy of the same data. Raises RecipeError for what is unknown or does not fit.
    """
    rows = shipped_protocols()
    if name not in rows and name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(f"protocol: there is no file '{name}'.")
        own = read_mapping(path.read_text(encoding="utf-8"), name)
        if len(own) != 1:
            raise RecipeError(f"{name}: holds {len(own)} rows; a protocol's file has one, `NAME@WHOSE: {{...}}`.")
        (name,) = own
        if name in rows:
            raise RecipeError(f"protocol: '{name}' is a shipped protocol, which is fixed; choose another name.")
        rows = {**rows, **own}
    if name not in rows:
        raise RecipeError(f"protocol: unknown protocol {name!r}.{nearest(name, list(rows))}")
    data = {"name": name, **_row(rows, name)}
    data["task"] = {**named(data.get("task")), **(places or {})}
    return resolve_protocol(data)


def _row(rows: dict[str, Any], name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    row = rows[name]
    if not isinstance(row, dict):
        raise RecipeError(f"protocol '{name}': holds a {type(row).__name__}, a protocol is a mapping of its choices.")
    base = row.get("like")
    if base is None:
        return row
    if base not in rows or base in (*seen, name):
        raise RecipeError(f"protocol '{name}': like {base!r} names no other row.{nearest(str(base), list(rows))}")
    changes = {key: value for key, value in row.items() if key != "like"}
    # Only rows of one name share their remarks; those of the row below would say what no longer holds.
    return merge({**_row(rows, base, (*seen, name)), "departs": ""}, changes)


def resolve_protocol(data: dict[str, Any]) -> Protocol:
    """Return the checked protocol of a mapping, with every part's knobs and every default written out."""
    where = f"protocol '{data.get('name')}'"
    try:
        if data.get("sampler") is not None:
            data = {**data, "sampler": named_sampler(data["sampler"])}
        protocol = Protocol.model_validate(data)
        check_parts(protocol)
        check_sampler(protocol.sampler, protocol.canvas, "sampler", "canvas")
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error, Protocol)}") from error
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    return protocol


def protocol_of(recipe: Recipe) -> Protocol:
    """Return what a recipe's own evaluation fixes, as a protocol."""
    temperature = recipe.evaluation.temperature
    choices = {
        "name": f"{re.sub('[^a-z0-9_]', '_', recipe.task['name'].lower())}@recipe",
        "summary": f"The held-out evaluation of the recipe {recipe.name}.",
        "source": recipe.name,
        "task": recipe.task,
        "problems": recipe.evaluation.problems,
        "prompt_limit": recipe.rollout.prompt_limit,
        "canvas": recipe.rollout.canvas,
        "start": recipe.rollout.start,
        "sampler": recipe.evaluation.sampler or recipe.rollout.sampler,
        "temperature": recipe.rollout.temperature if temperature is None else temperature,
        "rewards": recipe.rewards,
    }
    return Protocol.model_validate(choices)


def recipe_hash(recipe: Any) -> str:
    """Return SHA-256 of a resolved recipe; its name and where it writes do not count."""
    data = recipe.model_dump(mode="json")
    run = {key: value for key, value in data["run"].items() if key not in ("directory", "keep", "report_to")}
    return digest(_without_idle({**{key: value for key, value in data.items() if key != "name"}, "run": run}))
