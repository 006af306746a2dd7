"""pydantic's errors as one line each: key path, value, rule, remedy."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from .registry import nearest

# What other trainers call it (TRL, transformers, LLaDA's and d1's scripts).
ELSEWHERE = {
    "batch_size": "rollout.prompts",
    "per_device_train_batch_size": "rollout.prompts",
    "num_generations": "rollout.group",
    "group_size": "rollout.group",
    "max_completion_length": "rollout.canvas",
    "gen_length": "rollout.canvas",
    "max_prompt_length": "rollout.prompt_limit",
    "block_length": "rollout.sampler.schedule.size",
    "block_size": "rollout.sampler.schedule.size",
    "diffusion_steps": "rollout.sampler.schedule.steps",
    "remasking": "rollout.sampler.score",
    "num_iterations": "objective.inner_steps",
    "kl_coef": "objective.beta",
    "epsilon": "objective.surrogate.low",
    "learning_rate": "optim.lr",
    "max_steps": "optim.steps",
    "warmup_steps": "optim.warmup",
    "lr_scheduler_type": "optim.schedule",
    "eval_steps": "evaluation.every",
    "save_steps": "run.save_every",
    "save_total_limit": "run.keep",
    "output_dir": "run.directory",
    "reward_funcs": "rewards",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "attn_implementation": "model.attention",
    "full": "model.lora (null, or no lora section, trains all weights)",
    "full_finetune": "model.lora (null, or no lora section, trains all weights)",
}
RULES = {
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is not true or false",
    "string_type": "is not text",
    "dict_type": "names no part; write `name` or `{name: ..., knob: ...}`",
    "model_type": "is not a section; write its keys below it, indented",
    "model_attributes_type": "is not a section; write its keys below it, indented",
    "list_type": "is not a list; write `[...]`",
    "tuple_type": "is not a list; write `[...]`",
}


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line for the first problem of `error`; an unknown key comes first, it explains a missing one."""
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    line = _sentence(dict(first), model)
    return line if len(problems) == 1 else f"{line} (1 of {len(problems)} problems)"


def _sentence(problem: dict[str, Any], model: type[BaseModel]) -> str:
    loc, kind, value = tuple(problem["loc"]), problem["type"], problem["input"]
    where, context = ".".join(map(str, loc)), problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{where}: unknown key '{loc[-1]}'.{_hint(loc, model)}"
    if kind == "missing":
        return f"{where}: is missing.{_need(loc, model)}"
    shown = "nothing" if value is None else f"{value!r:.80}"
    if kind == "literal_error":
        choices = _literals(context["expected"])
        return f"{where}: {shown} is not allowed; choose one of {', '.join(choices)}.{_close(value, choices)}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        sign = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}[kind]
        return f"{where}: {shown} is out of range; it must be {sign} {next(iter(context.values()))}."
    if kind in ("too_short", "string_too_short"):
        return f"{where}: is empty.{_need(loc, model)}"
    if kind == "string_pattern_mismatch":
        return f"{where}: {shown} does not have the form {context['pattern']}.{_need(loc, model)}"
    return f"{where}: {shown} {RULES.get(kind, problem['msg'])}.{_need(loc, model)}"


def _literals(expected: str) -> list[str]:
    return [word.strip(" '") for word in expected.replace(" or ", ",").split(",")]


def _close(value: Any, choices: list[str]) -> str:
    hint = nearest(value, choices) if isinstance(value, str) else ""
    return hint if hint.startswith(" Did") else ""


def _hint(loc: tuple[Any, ...], model: type[BaseModel]) -> str:
    key, siblings = str(loc[-1]), list(fields_at(model, loc[:-1]) or {})
    if key in ELSEWHERE:
        return f" Here it is called {ELSEWHERE[key]}."
    homes = [path for path in key_paths(model) if path.rpartition(".")[2] == key]
    return f" There is {homes[0]}." if homes else nearest(key, siblings)


def _need(loc: tuple[Any, ...], model: type[BaseModel]) -> str:
    """Return what a field is for, and how an objective's field is best filled."""
    parent = fields_at(model, loc[:-1]) or {}
    info = parent.get(str(loc[-1]))
    what = f" It says: {info.description}." if info is not None and info.description else ""
    if loc[:1] == ("objective",) and len(loc) <= 2:
        return f"{what} Name a method (see `unmask methods`) or set it."
    return what


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)


def fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> dict[str, Any] | None:
    """Return the fields of the section at `loc`; None where there is no section."""
    for key in loc:
        if isinstance(key, int):
            continue
        info = model.model_fields.get(str(key))
        inner = next(_models_in(info.annotation), None) if info is not None else None
        if inner is None:
            return None
        model = inner
    return dict(model.model_fields)


def key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every key of a recipe, sections before what they hold."""
    for name, info in model.model_fields.items():
        yield prefix + name
        for inner in _models_in(info.annotation):
            yield from key_paths(inner, f"{prefix}{name}.")
