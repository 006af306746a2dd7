"""What `unmask check | parts | methods | cp` print; no weights are read."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..recipes.crosschecks import check_data, check_world, notes, step_limit
from ..recipes.loading import AnyRecipe, import_parts, load_methods, load_samplers
from ..recipes.preferences import PreferenceRecipe
from ..recipes.protocols import load_protocol, shipped_protocols
from ..recipes.reading import SCHEMA_FILE, shipped_recipes
from ..recipes.registry import SLOTS, RecipeError, nearest
from ..recipes.schema import ModelSection, Recipe, SftModelSection, SftRecipe
from ..recipes.sections import SamplerSection
from .check_facts import attempts, exploration_words, preference_facts, trained_words
from .estimators import most_canvases

MACHINE = 8  # devices that `check` assumes for a sharded recipe
SAMPLER_SLOTS = ("schedule", "score", "selection", "remasking", "editing", "transform", "length", "cache")


def console() -> Console:
    """Return a console that wraps at the terminal's width and prints brackets as they are."""
    return Console(highlight=False, markup=False, emoji=False)


def words(choice: dict[str, Any]) -> str:
    """Return a part and its knobs as `name(knob=value, ...)`, without knobs that are null or say nothing."""
    hidden = {"name", "weight"} | ({"truth"} if choice.get("truth") is False else set())
    knobs = [f"{key}={value}" for key, value in choice.items() if key not in hidden and value is not None]
    return f"{choice['name']}({', '.join(knobs)})" if knobs else str(choice["name"])


def summary(recipe: AnyRecipe, target: str, nproc: int | None = None) -> dict[str, Any]:
    """Return what a recipe will do, key by key, with the state of its data and the next command.

    `nproc` processes share its work (None: one, or up to `MACHINE` where the recipe shares out its weights).
    """
    if nproc is None:
        nproc = 1
        if isinstance(recipe, Recipe) and recipe.model.sharding == "fsdp":
            nproc = max(2, math.gcd(MACHINE, recipe.rollout.prompts))
    check_world(recipe, nproc)
    _check_model(recipe.model)
    if isinstance(recipe, PreferenceRecipe):
        return preference_facts(recipe, target)
    facts = _sft_facts(recipe) if isinstance(recipe, SftRecipe) else _rl_facts(recipe, nproc)
    facts["notes"] = notes(recipe)
    missing = _missing_file(recipe)
    if missing is None:
        check_data(recipe)
        facts["data"] = "rows have a prompt and every column the rewards need"
    else:
        facts["data"] = f"not checked: there is no file '{missing}' yet"
    command = "sft" if isinstance(recipe, SftRecipe) else "train"
    launch = f"unmask {command} {target}" + (f" --nproc {nproc}" if nproc > 1 else "")
    facts["next"] = launch if missing is None else f"put the data at {missing}, then {launch}"
    if missing is not None and not Path(missing).suffix:
        facts["data"] = f"not checked: {missing} is on the hub"
        facts["next"] = f"unmask data check {target}, then {launch}"
    return facts


def _check_model(section: ModelSection | SftModelSection) -> None:
    """Refuse a folder on this machine that would not load; a hub id, or one of another machine, is not looked at."""
    from ..policies.loading import is_here, open_checkpoint

    if section.path is None or not is_here(section.path):
        return
    open_checkpoint(
        section.path,
        family=section.family,
        attention=section.attention,
        mask_token_id=section.mask_token_id,
        block_length=section.block_length,
        context=section.context if isinstance(section, ModelSection) else None,
    )


def _missing_file(recipe: Recipe | SftRecipe) -> str | None:
    """Return the first dataset that is not on this machine: a recipe can be checked before its data are there."""
    choices = [recipe.task] if isinstance(recipe, Recipe) else [entry.task for entry in recipe.tasks]
    for choice in choices:
        if "revision" not in choice and choice["name"] not in ("jsonl", "parquet"):
            continue
        paths = [choice.get("path"), choice.get("heldout_path") or choice.get("path")]
        for path in paths:
            if path is None or not Path(path).expanduser().exists():
                return path or f"the hub's {choice['name']}"
    return None


def _rl_facts(recipe: Recipe, nproc: int) -> dict[str, Any]:
    _check_cache(recipe)
    rollout, objective, more = recipe.rollout, recipe.objective, attempts(recipe.exploration)
    rollouts, nfe = rollout.prompts * rollout.group, step_limit(rollout.sampler, rollout.canvas)
    canvases = most_canvases(objective.estimator, nfe, rollout.canvas)
    views = rollouts * canvases
    # One pass finds the ratios of units that span views, a second one has the gradient.
    spans = canvases > 1 and getattr(SLOTS["unit"].get(objective.unit["name"]), "spans_views", False)
    once = views * ((objective.old == "recompute") + (objective.beta > 0))
    fresh = once if objective.redraw else once / objective.inner_steps
    valued = 0 if recipe.value is None else views * (1 + recipe.value.updates)
    forwards = views * (2 if spans else 1) + fresh + (valued + more * rollouts * nfe) / objective.inner_steps
    evaluation = recipe.evaluation.sampler or rollout.sampler
    temperature = rollout.temperature if recipe.evaluation.temperature is None else recipe.evaluation.temperature
    return {
        "recipe": recipe.name,
        "model": f"{recipe.model.path}, {recipe.model.dtype}, {trained_words(recipe.model)}",
        "task": words(recipe.task),
        "memory": _memory_words(recipe, nproc),
        "rewards": ", ".join(f"{entry.weight:g} x {words(entry.model_dump())}" for entry in recipe.rewards),
        "method": recipe.method or "written out in objective",
        "objective": _objective_words(recipe),
        "sampler": f"{_sampler_words(rollout.sampler)}, temperature {rollout.temperature:g}",
        "log_probs": _status_words(rollout.sampler.model_dump(), rollout.temperature),
        "canvas": rollout.canvas,
        "nfe_at_most": nfe,
        "rollouts_a_batch": rollouts,
        "exploration": exploration_words(recipe.exploration, words) or "none",
        "updates_a_batch": objective.inner_steps,
        "forwards_an_update_at_most": round(forwards),
        "updates": recipe.optim.steps,
        "rollouts_at_most": more * rollouts * -(-recipe.optim.steps // objective.inner_steps),
        "evaluation": f"{recipe.evaluation.problems} problems, {_sampler_words(evaluation)}, "
        f"temperature {temperature:g}",
    }


def _check_cache(recipe: Recipe) -> None:
    """Refuse a cache that the model's family cannot have, where its config is at hand."""
    from ..rollouts.caches import check_family
    from .memory import known_config, on_meta

    choice, vendor = recipe.rollout.sampler.cache, known_config(recipe.model.path)
    if choice is not None and vendor is not None:
        check_family(SLOTS["cache"].build(choice), on_meta(recipe, vendor).family)


def _memory_words(recipe: Recipe, nproc: int) -> str:
    """Return what a device will hold, by what holds it."""
    from .memory import estimate

    found = estimate(recipe, nproc)
    if found is None:
        return f"not estimated: '{recipe.model.path}' is no local folder and its sizes are not known"
    parts = {
        "weights": found.weights,
        "adapter": found.adapter,
        "gradients and optimizer": found.optimizer,
        "value model": found.value,
        "layers gathered for an update": found.gathered,
        "a chunk's activations": found.activations,
        "weights gathered for rollouts": found.whole,
        "a rollout step's tables": found.rollout,
    }
    words = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items() if size)
    devices = f"on each of {nproc} devices" if recipe.model.sharding == "fsdp" else "a device"
    return f"about {_gigabytes(found.total)} {devices} ({words})"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _sft_facts(recipe: SftRecipe) -> dict[str, Any]:
    evaluation, share = recipe.evaluation, sum(entry.weight for entry in recipe.tasks)
    init, nfe = recipe.model.init, {e.task["name"]: step_limit(evaluation.sampler, e.canvas) for e in recipe.tasks}
    model = recipe.model.path if init is None else f"new: {', '.join(f'{k} {v}' for k, v in init.model_dump().items())}"
    return {
        "recipe": recipe.name,
        "model": f"{model}, {recipe.model.dtype}",
        "tasks": ", ".join(f"{e.weight / share:.0%} {words(e.task)} on {e.canvas}" for e in recipe.tasks),
        "loss": f"masked-diffusion cross-entropy, {recipe.sft.mask} masks, full canvas in {recipe.sft.full_canvas:.0%}",
        "canvas": max(entry.canvas for entry in recipe.tasks),
        "nfe_at_most": max(nfe.values()),
        "updates": recipe.optim.steps,
        "rows": recipe.optim.steps * recipe.sft.batch,
        "evaluation": f"{evaluation.problems} problems a task, {_sampler_words(evaluation.sampler)}",
    }


def _sampler_words(sampler: SamplerSection) -> str:
    chosen = [sampler.schedule, sampler.score, sampler.selection]
    more = {name: getattr(sampler, name) for name in ("remasking", "editing", "length", "cache")}
    chosen += [{**choice, "name": f"{name} {choice['name']}"} for name, choice in more.items() if choice is not None]
    return " / ".join(map(words, chosen))


def _status_words(section: dict[str, Any], temperature: float) -> str:
    """Return what the log-probabilities of a sampler's rollouts are worth, with the reason where they are not exact."""
    from ..rollouts.sampler import build_sampler

    built = build_sampler(section, temperature=temperature)
    reason = built.refusal or built.mismatch
    return built.status if reason is None else f"{built.status} ({reason})"


def _objective_words(recipe: Recipe) -> str:
    o = recipe.objective
    choices = [words(choice) for choice in (o.estimator, o.unit, o.surrogate, o.weight, o.advantage)]
    return ", ".join([*choices, f"{words(o.bound)} in a unit", f"beta {o.beta:g} x {words(o.divergence)}"])


def print_summary(facts: dict[str, Any]) -> None:
    """Print the facts as a table, then the notes and the next command."""
    out = console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if key not in ("notes", "next"):
            table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    out.print(table)
    for note in facts["notes"]:
        out.print(f"note: {note}", soft_wrap=True)
    out.print(f"ok; next: {facts['next']}", soft_wrap=True)


def print_parts(slot: str | None) -> None:
    """Print every part of `slot` (None: of all slots) with knobs, defaults and the first line of its docstring."""
    if slot is not None and slot not in SLOTS:
        raise RecipeError(f"parts: unknown slot '{slot}'.{nearest(slot, list(SLOTS))}")
    out = console()
    for name in [slot] if slot is not None else list(SLOTS):
        import_parts(name)
        table = Table(title=f"{name}   {SLOTS[name].signature}", title_justify="left", box=None, padding=(0, 2, 0, 0))
        headings = ("part", "knobs", "what it is", *(("log-probs",) if name in SAMPLER_SLOTS else ()))
        for heading in headings:
            table.add_column(heading, overflow="fold", style="bold" if heading == "part" else "")
        for part in SLOTS[name]:
            line = (inspect.getdoc(SLOTS[name].get(part)) or "").partition("\n")[0]
            cells = [part, "\n".join(map(_knob, SLOTS[name].knobs(part).values())), line]
            table.add_row(*cells, *((_part_status(name, part),) if name in SAMPLER_SLOTS else ()))
        out.print(table)
        out.print()
    out.print(
        "A part of your own: `package.module:function`; its keyword-only parameters are its knobs.", soft_wrap=True
    )


def _part_status(slot: str, name: str) -> str:
    """Return what a part of a sampler leaves of the log-probabilities, and why."""
    from ..rollouts.sampler import traits_named

    found = traits_named(slot, name)
    return f"{found.status}: {found.learns}" if found.learns else found.status


def _knob(parameter: inspect.Parameter) -> str:
    kind = inspect.formatannotation(parameter.annotation).replace("typing.", "")
    literal = re.fullmatch(r"Literal\[(.*)\]", kind)
    default = "required" if parameter.default is parameter.empty else f"= {parameter.default}"
    return f"{parameter.name}: {literal.group(1).replace(', ', ' | ') if literal else kind} {default}"


def print_methods(name: str | None) -> None:
    """Print the methods, or everything about the one called `name`."""
    rows, out = load_methods(), console()
    if name is None:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("method", "what it is", "estimator", "ratio over", "surrogate", "advantage", "forwards"):
            table.add_column(heading, overflow="fold", style="bold" if heading == "method" else "")
        for method, row in rows.items():
            picks = [row["objective"][key] for key in ("estimator", "unit", "surrogate", "advantage")]
            names = [p if isinstance(p, str) else p["name"] for p in picks]
            table.add_row(method, row["summary"], *names, row["cost"])
        out.print(table)
        out.print("forwards: a rollout's, of S steps, L tokens and mu inner steps; a backward counts two.")
        out.print("`unmask methods NAME` shows equation, bias and choices; a recipe's `objective` overrides them.")
        return
    if name not in rows:
        raise RecipeError(f"methods: unknown method '{name}'.{nearest(name, list(rows))}")
    out.print(yaml.safe_dump({name: rows[name]}, sort_keys=False, width=100), end="", soft_wrap=True)


def print_samplers(name: str | None) -> None:
    """Print the named samplers and what their log-probs are, or everything about the one called `name`."""
    rows, out = load_samplers(), console()
    if name is None:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("sampler", "what it is", "log-probs"):
            table.add_column(heading, overflow="fold", style="bold" if heading == "sampler" else "")
        for preset, row in rows.items():
            table.add_row(preset, row["summary"], _status_words(row["sampler"], 1.0))
        out.print(table)
        out.print("`unmask samplers NAME` shows the choices of one; `sampler: {preset: NAME, ...}` overrides them.")
        return
    if name not in rows:
        raise RecipeError(f"samplers: unknown sampler '{name}'.{nearest(name, list(rows))}")
    shown = {**rows[name], "log-probs above temperature 0": _status_words(rows[name]["sampler"], 1.0)}
    out.print(yaml.safe_dump({name: shown}, sort_keys=False, width=100), end="", soft_wrap=True)


def print_protocols(name: str | None) -> None:
    """Print the named protocols with their hashes, or everything that the one called `name` fixes."""
    out = console()
    if name is None:
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("protocol", style="bold", no_wrap=True)
        table.add_column("hash", no_wrap=True)
        table.add_column("what it is", overflow="fold")
        for row in shipped_protocols():
            protocol = load_protocol(row)
            table.add_row(row, protocol.hash[:12], protocol.summary)
        out.print(table)
        out.print("`unmask protocols NAME` shows what one fixes; `unmask evaluate MODEL --protocol NAME` uses it.")
        return
    protocol = load_protocol(name)
    shown = {**protocol.model_dump(mode="json", exclude={"name"}), "hash": protocol.hash}
    out.print(yaml.safe_dump({name: shown}, sort_keys=False, width=100), end="", soft_wrap=True, markup=False)


def print_recipes() -> None:
    """Print the shipped recipes with the first comment line of each."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("recipe", style="bold", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for name, text in shipped_recipes().items():
        comments = [line[2:] for line in text.splitlines() if line.startswith("# ") and "$schema" not in line]
        table.add_row(name, comments[0] if comments else "")
    console().print(table)


def copy_recipe(name: str, target: Path, *, force: bool) -> Path:
    """Copy a shipped recipe to a file or into a folder and return the file; an existing file needs `force`.

    The copy says which version of unmask it came from and points editors to the installed schema.
    """
    shipped, name = shipped_recipes(), Path(name).name.removesuffix(".yaml")
    if name not in shipped:
        raise RecipeError(f"cp: there is no shipped recipe '{name}'.{nearest(name, list(shipped))}")
    path = target / f"{name}.yaml" if target.is_dir() else target
    if not path.parent.is_dir():
        raise RecipeError(f"cp: there is no folder '{path.parent}'; make it first.")
    if path.exists() and not force:
        raise RecipeError(f"cp: '{path}' exists; choose another name, or overwrite it with --force.")
    text = shipped[name].replace("$schema=recipe.schema.json", f"$schema={SCHEMA_FILE}")
    path.write_text(f"# from unmask {__version__}: {name}.yaml\n{text}", encoding="utf-8")
    return path
