"""From the recipe's list of rewards to callables, and the check of dataset columns before the first rollout."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..recipes.registry import SLOTS, RecipeError, coerce, nearest
from .verdicts import Isolation, RewardError, RewardFunction

TEXT_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})
TRL_ARGUMENTS = TEXT_ARGUMENTS | {"trainer_state", "log_extra", "log_metric"}
UNPASSED_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})
# Keys of an entry that say how a reward is used; every other key is a knob of its function.
USE = frozenset({"weight", "truth", "isolated", "limit_s"})


@dataclass(frozen=True)
class Reward:
    """A reward function (TRL's signature, sync or async), its name in metrics, and its weight in the total.

    With `isolation` the pool judges its rows in killable processes; `entry` is how a worker builds it. A `truth` is
    logged and never trained on.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    truth: bool = False
    isolation: Isolation | None = None
    entry: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not math.isfinite(self.weight):
            raise RecipeError(f"rewards.{self.name}.weight: {self.weight!r} is not a finite number.")
        if not callable(self.function):
            raise RecipeError(f"rewards.{self.name}: {self.function!r} is not callable; pass a reward function.")
        if self.isolation is not None and not self.entry:
            object.__setattr__(self, "entry", importable(self.function, f"rewards.{self.name}"))


def build_rewards(
    section: Sequence[Any], where: str = "rewards", *, allow_code_execution: bool = False
) -> list[Reward]:
    """Return the rewards of a recipe's list; each entry is a name, a mapping, a callable or a Reward.

    `{name: ..., weight: 1.0, knob: ...}`. A name registered in slot "reward" is a factory: it is called with the
    knobs and returns the reward function. `package.module:function` is a reward function as TRL takes it; knobs are
    bound to its named parameters. One that takes none of TRL's prompts, completions and completion_ids and no
    `**kwargs` cannot be a reward function: it is taken for a factory, as `trl.rewards:get_soft_overlong_punishment`.
    `truth: true` logs a reward and never trains on it; `isolated: true` and `limit_s` judge it in the pool. Repeated
    names get a suffix (`answer_format_2`). Raises RecipeError, also for a reward that runs a model's code unless
    `allow_code_execution`.
    """
    if isinstance(section, str | Mapping) or not isinstance(section, Sequence):
        raise RecipeError(f"{where}: {section!r:.80} is not a list; write `{where}: [{{name: ..., weight: 1.0}}]`.")
    rewards: list[Reward] = []
    for index, entry in enumerate(section):
        reward = _build(entry, f"{where}[{index}]")
        taken, name, count = {other.name for other in rewards}, reward.name, 1
        while name in taken:
            count += 1
            name = f"{reward.name}_{count}"
        if getattr(reward.function, "runs_code", False) and not allow_code_execution:
            raise RecipeError(
                f"{where}[{index}]: reward '{name}' runs code that the model writes (in a sandbox); if that is meant, "
                "say `allow_code_execution: true` at the top of the recipe."
            )
        rewards.append(replace(reward, name=name))
    if not rewards:
        raise RecipeError(f"{where}: the list is empty; a run needs a reward.{nearest('', list(SLOTS['reward']))}")
    if all(reward.weight == 0 or reward.truth for reward in rewards):
        raise RecipeError(f"{where}: every weight is 0, so nothing would be learnt; give one reward another weight.")
    return rewards


def build_plain(entry: Mapping[str, Any]) -> Reward:
    """Return the reward of a checked entry, to be called in this process; a worker of the pool does."""
    return _build({key: value for key, value in entry.items() if key not in USE}, "rewards")


def _build(entry: Any, where: str) -> Reward:
    if isinstance(entry, Reward):
        return entry
    if callable(entry):
        mark = getattr(entry, "isolation", None)
        return Reward(callable_name(entry), entry, isolation=mark)
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise RecipeError(f"{where}: {entry!r:.80} names no reward; write `name` or `{{name: ..., weight: 1.0}}`.")
    choice = {key: value for key, value in entry.items() if key not in USE}
    truth = coerce(entry.get("truth", False), bool, f"{where}.truth")
    weight = coerce(entry.get("weight", 0.0 if truth else 1.0), float, f"{where}.weight")
    if truth and weight != 0:
        raise RecipeError(f"{where}.weight: {weight:g}, but a `truth` is never trained on; leave its weight out.")
    name = choice["name"]
    if isinstance(name, str) and ":" in name:
        function = _from_path(choice, where)
        mark = getattr(SLOTS["reward"].get(name), "isolation", None) or getattr(function, "isolation", None)
        return Reward(name.rpartition(":")[2], function, weight, truth, _isolation(entry, mark, where), choice)
    factory = SLOTS["reward"].build(choice, where)
    mark = getattr(SLOTS["reward"].get(name), "isolation", None)
    return Reward(name, factory(), weight, truth, _isolation(entry, mark, where), choice)


def _isolation(entry: Mapping[str, Any], mark: Isolation | None, where: str) -> Isolation | None:
    """Return how an entry is isolated: as its function is marked, or as the entry says."""
    asked = coerce(entry.get("isolated"), bool | None, f"{where}.isolated")
    limit = coerce(entry.get("limit_s"), float | None, f"{where}.limit_s")
    if mark is not None and asked is False:
        raise RecipeError(f"{where}.isolated: '{entry['name']}' may hang or crash and always runs in the pool.")
    if mark is None and not asked:
        if limit is not None:
            raise RecipeError(f"{where}.limit_s: has no effect on a reward that is not isolated; say isolated: true.")
        return None
    mark = mark or Isolation()
    if limit is None:
        return mark
    if limit <= 0:
        raise RecipeError(f"{where}.limit_s: {limit:g} must be above 0 seconds.")
    return replace(mark, limit_s=limit)


def importable(function: RewardFunction, where: str) -> dict[str, Any]:
    """Return the entry by which another process finds `function` (or a partial of it); RecipeError if it cannot."""
    knobs: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        if function.args:
            raise RecipeError(f"{where}: an isolated partial binds its knobs by keyword, not by position.")
        knobs, function = {**function.keywords, **knobs}, function.func
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or getattr(sys.modules.get(module), name, None) is not function:
        raise RecipeError(
            f"{where}: '{callable_name(function)}' of {module} cannot be imported by another process; put it into a "
            "module as a function of its own, or do not isolate it."
        )
    return {"name": f"{module}:{name}", **knobs}


def _from_path(choice: Mapping[str, Any], where: str) -> RewardFunction:
    """Import `package.module:function`, bind its knobs, and call it first if it is a factory."""
    path = choice["name"]
    try:
        function = SLOTS["reward"].get(path)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    factory = is_factory(function)
    knobs = _check_knobs(function, choice, where, required=factory)
    if not factory:
        return functools.partial(function, **knobs) if knobs else function
    try:
        made = function(**knobs)
    except Exception as error:
        raise RecipeError(f"{where}: '{path}' refused its knobs {knobs}: {error}") from error
    if not callable(made):
        raise RecipeError(
            f"{where}: '{path}' returned {made!r:.80}; a reward function takes `completions`, a factory returns one."
        )
    return made


def _check_knobs(function: RewardFunction, choice: Mapping[str, Any], where: str, *, required: bool) -> dict[str, Any]:
    allowed = {name: p for name, p in _named(function).items() if name not in TRL_ARGUMENTS}
    knobs = {}
    for key, value in choice.items():
        if key == "name":
            continue
        if key not in allowed:
            hint = nearest(key, list(allowed)) or " It has no knobs."
            raise RecipeError(f"{where}: '{choice['name']}' has no parameter '{key}'.{hint}")
        annotation = allowed[key].annotation
        # An annotation that is still text could not be resolved; the function then sees the recipe's value as it is.
        knobs[key] = value if isinstance(annotation, str) else coerce(value, annotation, f"{where}.{key}")
    missing = [name for name, p in allowed.items() if p.default is p.empty and name not in knobs]
    if required and missing:
        raise RecipeError(f"{where}: '{choice['name']}' needs the parameter '{missing[0]}'.")
    return knobs


def callable_name(function: Callable[..., Any]) -> str:
    """Return the name of a function, of the function inside a partial, or of a callable object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_factory(function: RewardFunction) -> bool:
    """Tell whether `function` cannot take what TRL passes to a reward function, so that it must return one."""
    return not takes_everything(function) and not TEXT_ARGUMENTS & _named(function).keys()


def takes_everything(function: RewardFunction) -> bool:
    """Tell whether `function` has `**kwargs`, or hides its signature."""
    parameters = _parameters(function)
    return parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _named(function: RewardFunction) -> dict[str, inspect.Parameter]:
    parameters = (_parameters(function) or {}).values()
    return {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter] | None:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    try:
        return inspect.signature(function, eval_str=True).parameters
    except Exception:  # annotations are any expression; those that do not resolve stay text
        return parameters


def accepted_arguments(function: RewardFunction, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `arguments` that `function` takes; a knob bound by a partial wins over a column of its name."""
    bound = function.keywords if isinstance(function, functools.partial) else {}
    names = set(arguments) if takes_everything(function) else _named(function).keys()
    return {name: value for name, value in arguments.items() if name in names and name not in bound}


def needed_columns(reward: Reward) -> list[str]:
    """Return the columns without which a reward cannot be called: its named parameters without default."""
    named = _named(reward.function).items()
    return [name for name, p in named if name not in TRL_ARGUMENTS and p.default is p.empty]


def check_columns(rewards: Sequence[Reward], row: Mapping[str, Any]) -> None:
    """Raise RewardError when `row`, a row of the dataset, lacks a column that a reward needs.

    A reward needs its named parameters without default that are none of TRL's own arguments. Needs no rollout.
    """
    clash = sorted(set(row) & (TRL_ARGUMENTS - UNPASSED_COLUMNS))
    if clash:
        raise RewardError(f"rewards: the dataset's column '{clash[0]}' has the name of an argument; rename the column.")
    columns = [name for name in row if name not in UNPASSED_COLUMNS]
    for reward in rewards:
        for name in needed_columns(reward):
            if name in columns:
                continue
            hint = nearest(name, columns) or " It has no column besides the prompt."
            raise RewardError(
                f"reward '{reward.name}' needs the column '{name}', which the dataset lacks; add it, or drop the "
                f"reward.{hint}"
            )
