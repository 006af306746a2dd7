"""Parts by name: a slot is a table of functions whose keyword-only parameters are their knobs."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any


class RecipeError(ValueError):
    """A recipe, part, knob or value that unmask refuses; the message names value, rule and remedy."""


def nearest(name: str, choices: list[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `choices`, or all of them when none is close."""
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Choices: {', '.join(sorted(choices))}." if choices else ""


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """Return `value` as `annotation`, refusing what would change it (3.7 for an int, 'yes' for a bool)."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, inspect.Parameter.empty):
        return value
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return coerce(value, option, where)
            except RecipeError:
                continue
    elif annotation in (type(None), None) and value is None:
        return None
    elif (origin is typing.Literal and value in args) or (annotation is bool and isinstance(value, bool)):
        return value
    elif annotation is int and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) or value.is_integer():
            return int(value)
    elif annotation is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as a string; a recipe's author means the number.
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isnan(number):
            return number
    elif annotation is str and isinstance(value, str):
        return value
    elif (origin or annotation) in (tuple, list) and isinstance(value, list | tuple):
        return _coerce_sequence(value, origin or annotation, args, where)
    elif (origin or annotation) in (dict, Mapping) and isinstance(value, Mapping):
        return dict(value)
    if origin is typing.Literal:
        raise RecipeError(f"{where}: {value!r} is not allowed.{nearest(value, [str(a) for a in args])}")
    kind = getattr(annotation, "__name__", None) if origin is None else None
    name = "whole number" if annotation is int else kind or annotation
    raise RecipeError(f"{where}: {value!r:.80} is not a {name}.")


def _coerce_sequence(value: Any, kind: Any, args: tuple[Any, ...], where: str) -> Any:
    if not args:
        return kind(value)
    pairs: Iterable[tuple[Any, Any]]
    if kind is tuple and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise RecipeError(f"{where}: {list(value)!r} has {len(value)} entries, {len(args)} are needed.")
        pairs = zip(value, args, strict=True)
    else:
        pairs = ((item, args[0]) for item in value)
    return kind(coerce(item, option, f"{where}[{i}]") for i, (item, option) in enumerate(pairs))


class Slot:
    """A named table of interchangeable functions (`slot.register` adds one, `slot.build` binds knobs)."""

    def __init__(self, name: str, signature: str) -> None:
        self.name, self.signature = name, signature
        self._parts: dict[str, Callable[..., Any]] = {}

    def register(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Add `function` under its own name (a trailing underscore is dropped); use as a decorator."""
        name = function.__name__.rstrip("_")
        assert name not in self._parts, f"{self.name} '{name}' is registered twice"
        self._parts[name] = function
        return function

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def get(self, name: str) -> Callable[..., Any]:
        """Return the function called `name`, or import `package.module:function`; RecipeError otherwise."""
        if not isinstance(name, str):
            raise RecipeError(f"{self.name}: {name!r} is not a name; write `name` or `{{name: ..., knob: ...}}`.")
        if name in self._parts:
            return self._parts[name]
        if ":" in name:
            module_name, _, attribute = name.partition(":")
            try:
                function = getattr(importlib.import_module(module_name), attribute)
            except Exception as error:  # importing runs the user's code, which may raise anything
                raise RecipeError(f"{self.name}: cannot import '{name}' ({type(error).__name__}: {error}).") from error
            if not callable(function):
                raise RecipeError(f"{self.name}: '{name}' is {function!r:.80}, not a function.")
            return function
        raise RecipeError(f"{self.name}: unknown part '{name}'.{nearest(name, list(self._parts))}")

    def knobs(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the keyword-only parameters of `name` that a recipe may set."""
        try:
            parameters = inspect.signature(self.get(name), eval_str=True).parameters.values()
        except (TypeError, NameError) as error:
            raise RecipeError(f"{self.name}: the parameters of '{name}' cannot be read ({error}).") from error
        hidden = {"rng", "noise", "context", "state", "inner_step", "credit", "acting"}
        return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in hidden}

    def check(self, choice: Any, where: str | None = None) -> tuple[str, dict[str, Any]]:
        """Return (name, coerced knobs) of `name` or `{name: ..., knob: ...}`; RecipeError if it does not fit."""
        where = where or self.name
        if isinstance(choice, str):
            choice = {"name": choice}
        if not isinstance(choice, Mapping) or "name" not in choice:
            raise RecipeError(f"{where}: {choice!r} names no part; write `name` or `{{name: ..., knob: ...}}`.")
        name = choice["name"]
        try:
            allowed = self.knobs(name)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}" if where != self.name else str(error)) from error
        values: dict[str, Any] = {}
        for key, value in choice.items():
            if key == "name":
                continue
            if key not in allowed:
                hint = nearest(key, list(allowed)) or " It has no knobs."
                raise RecipeError(f"{where}: {self.name} '{name}' has no knob '{key}'.{hint}")
            values[key] = coerce(value, allowed[key].annotation, f"{where}.{key}")
        missing = [k for k, p in allowed.items() if p.default is p.empty and k not in values]
        if missing:
            raise RecipeError(f"{where}: {self.name} '{name}' needs the knob '{missing[0]}'.")
        return name, values

    def build(self, choice: Any, where: str | None = None) -> Callable[..., Any]:
        """Return the chosen function with its knobs bound."""
        name, values = self.check(choice, where)
        function = self.get(name)
        return partial(function, **values) if values else function


SLOTS: dict[str, Slot] = {
    name: Slot(name, signature)
    for name, signature in {
        "task": "(split, *, seed, ...) -> Rows",
        "schedule": "(masked_BL, step_B, open_B, *, state, ...) -> Quota(window_BL, count_B)",
        "score": "(statistics, position, noise, *, state, ...) -> score",
        "selection": "(score_BL, quota, *, state, ...) -> chosen_BL",
        "remasking": "(state, chosen_AL, score_AL, *, ...) -> retract_AL",
        "editing": "(state, *, ...) -> edited_AL",
        "canvas": "(row, frame, *, ...) -> Start(tokens, draft)",
        "exploration": "(batch, worker, step, *, ...) -> batch",
        "filter": "(right_B, reward_B, group_B, *, ...) -> kept_B",
        "transform": "(logits_KV, state, row_K, place_K, *, ...) -> logits_KV",
        "length": "(state, *, start, ...) -> Resize",
        "cache": "(state, layout, *, ...) -> Recompute",
        "reward": "(*, ...) -> function(prompts, completions, completion_ids, **columns) -> list[float | None]",
        "advantage": "(reward_B, group_B, *, ...) -> advantage_B",
        "estimator": "(trajectory, *, rng, context, inner_step, credit, ...) -> Views",
        "unit": "(actions) -> unit_A",
        "bound": "(logprob_A, terms, *, ...) -> value_U",
        "surrogate": "(log_ratio_U, advantage_U, *, ...) -> loss_U",
        "order": "(odds_NL, candidate_NL, *, ...) -> probability_NL",
        "speed": "(reward_B, steps_B, length_B, alpha_B, *, ...) -> reward_B",
        "divergence": "(logprob_K, reference_K) -> divergence_K",
        "weight": "(views, *, ...) -> (weight_K, mass_B)",
    }.items()
}
