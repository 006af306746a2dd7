"""What no single key can tell: choices that contradict each other, a task that lacks what a reward needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .correcting import check_density, correction_notes
from .objectivechecks import check_objective
from .preferences import PreferenceRecipe, check_preference
from .registry import SLOTS, RecipeError
from .schema import EvaluationSection, Recipe, SftEvaluationSection, SftRecipe
from .sections import SamplerSection

GROUP_ADVANTAGES = {"group_mean", "group_std", "leave_one_out", "step_difference"}
POSITIONAL_SCORES = {"random", "left_to_right"}
POSITIONAL_SELECTIONS = {"top", "all", "plackett_luce", "entropy_budget"}


def check_recipe(recipe: Recipe | SftRecipe | PreferenceRecipe) -> None:
    """Raise RecipeError at the first contradiction of a recipe whose sections and parts are valid by themselves."""
    if isinstance(recipe, PreferenceRecipe):
        check_preference(recipe)
        _check_model(recipe.model)
        _check_optim(recipe.optim)
        return
    if isinstance(recipe, SftRecipe):
        _check_sft(recipe)
        return
    _check_model(recipe.model)
    _check_sharding(recipe)
    _check_task(recipe.task, "task")
    _check_rewards(recipe)
    _check_rollout(recipe)
    _check_exploration(recipe)
    check_objective(recipe)
    _check_optim(recipe.optim)
    _check_evaluation(recipe.evaluation, recipe.rollout.canvas, "rollout.canvas")


def check_world(recipe: Recipe | SftRecipe | PreferenceRecipe, ranks: int) -> None:
    """Raise RecipeError when a batch cannot be shared evenly by `ranks` processes; called at launch."""
    if ranks < 1:
        raise RecipeError(f"nproc: {ranks} is no number of processes; use 1 or more.")
    if isinstance(recipe, Recipe) and recipe.model.sharding == "fsdp" and ranks == 1:
        raise RecipeError(
            "model.sharding: fsdp shares the weights among processes and there is one; start several (--nproc 8), or "
            "set model.sharding to none."
        )
    if isinstance(recipe, Recipe):
        where, rows, what = "rollout.prompts", recipe.rollout.prompts, "prompts (a group stays on one process)"
    elif isinstance(recipe, SftRecipe):
        where, rows, what = "sft.batch", recipe.sft.batch, "rows"
    else:
        where, rows, what = "preference.batch", recipe.preference.batch, "pairs"
    if rows % ranks:
        raise RecipeError(
            f"{where}: {rows} {what} cannot be shared evenly by {ranks} processes; "
            f"use a multiple of {ranks}, for example {-(-rows // ranks) * ranks}."
        )


def check_data(recipe: Recipe | SftRecipe) -> dict[str, Any]:
    """Build the task's splits and return one training row; no weights are read.

    Raises RecipeError for missing, malformed or empty files, for a row without the columns that the rewards need, and
    when a generated task has fewer held-out problems than `evaluation.problems`.
    """
    from ..rewards.building import build_rewards, check_columns

    row: dict[str, Any] = {}
    for where, choice, rewards in _tasks(recipe):
        build = SLOTS["task"].build(choice, where)
        row = build("train", seed=recipe.run.seed).row(0)
        if "prompt" not in row:
            raise RecipeError(f"{where}: the rows of '{choice['name']}' have no column 'prompt'; a task must give one.")
        if isinstance(recipe, SftRecipe) and "reference" not in row:
            raise RecipeError(
                f"{where}: the rows have no column 'reference'; supervised training needs worked solutions."
            )
        if isinstance(recipe, Recipe) and recipe.exploration.hints is not None:
            column = recipe.exploration.hints.get("column")
            if column is not None and column not in row:
                raise RecipeError(
                    f"exploration.hints.column: the rows of '{choice['name']}' have no column '{column}'; name the one "
                    "with worked solutions."
                )
        check_columns(build_rewards(rewards, allow_code_execution=recipe.allow_code_execution), row)
        # Drawing the last one proves that there are so many; a stored dataset with fewer is evaluated whole.
        held = build("heldout", seed=recipe.run.seed)
        held.row(min(recipe.evaluation.problems, held.size or recipe.evaluation.problems) - 1)
    return row


def notes(recipe: Recipe | SftRecipe | PreferenceRecipe) -> list[str]:
    """Return what is allowed but probably not meant, one sentence each."""
    due = {"run.save_every": recipe.run.save_every}
    if not isinstance(recipe, PreferenceRecipe):
        due["evaluation.every"] = recipe.evaluation.every
    found = [
        f"{key} {value} exceeds optim.steps {recipe.optim.steps}, so it only happens at the end."
        for key, value in due.items()
        if value > recipe.optim.steps
    ]
    if not isinstance(recipe, Recipe):
        return found
    objective, eos = recipe.objective, recipe.rollout.sampler.eos
    if objective.beta == 0 and objective.reference not in ("auto", "none"):
        found.append(f"objective.reference '{objective.reference}' is not used at beta 0.")
    if objective.inner_steps > 1 and objective.surrogate["name"] == "importance":
        found.append(f"surrogate 'importance' does not bound the ratio over {objective.inner_steps} inner steps.")
    if objective.inner_steps == 1 and objective.old == "recompute" and objective.correction.name == "none":
        found.append("old: recompute costs a forward a view; with one inner step the ratio it gives is 1 everywhere.")
    found += correction_notes(recipe)
    if eos.suppress and eos.rule == "stop":
        found.append("eos.rule 'stop' never applies while EOS is suppressed.")
    if recipe.model.lora is not None and recipe.model.lora.dropout > 0:
        found.append("model.lora.dropout above 0: rollouts run without it, so the first ratio differs from 1.")
    return found


def _tasks(recipe: Recipe | SftRecipe) -> Iterator[tuple[str, dict[str, Any], list[Any]]]:
    """Yield (where, task choice, rewards) of every task."""
    if isinstance(recipe, Recipe):
        yield "task", recipe.task, [entry.model_dump() for entry in recipe.rewards]
        return
    for index, entry in enumerate(recipe.tasks):
        yield f"tasks.{index}.task", entry.task, [entry.reward or {"name": entry.task["name"]}]


def _check_model(model: Any) -> None:
    if model.attention == "flash_attention_2" and (model.dtype == "float32" or model.device in ("cpu", "mps")):
        raise RecipeError(
            f"model.attention: flash_attention_2 needs CUDA and bfloat16, not {model.device} and {model.dtype}; "
            "use sdpa or set model.dtype to bfloat16."
        )


def _check_sharding(recipe: Recipe) -> None:
    model = recipe.model
    if model.sharding == "none":
        return
    if model.quantization is not None:
        raise RecipeError(
            f"model.sharding: fsdp cannot share out {model.quantization} weights; set model.quantization to null, or "
            "model.sharding to none (each process then holds the whole base)."
        )
    if model.device == "mps" or ":" in model.device:
        raise RecipeError(f"model.sharding: fsdp takes a device a process, not {model.device}; use cuda, cpu or auto.")
    if recipe.optim.optimizer == "muon":
        raise RecipeError(
            "model.sharding: fsdp keeps rows of a matrix on each process, muon needs whole ones; use optimizer adamw."
        )


def _check_task(choice: dict[str, Any], where: str) -> None:
    if "seed" in choice:
        raise RecipeError(f"{where}.seed: {choice['seed']} has no effect; the data follow run.seed.")


def _check_rewards(recipe: Recipe) -> None:
    from ..rewards.building import build_rewards

    build_rewards([entry.model_dump() for entry in recipe.rewards], allow_code_execution=recipe.allow_code_execution)


def _check_rollout(recipe: Recipe) -> None:
    rollout, advantage = recipe.rollout, recipe.objective.advantage["name"]
    if rollout.temperature <= 0 and "tokens" in recipe.objective.actions:
        raise RecipeError(
            f"rollout.temperature: {rollout.temperature:g} decodes greedily: rollouts of a group are equal and no "
            "behaviour log-prob exists for the ratio; set it above 0 (evaluation.temperature may be 0)."
        )
    if rollout.group == 1 and advantage in GROUP_ADVANTAGES:
        raise RecipeError(
            f"rollout.group: 1 rollout has no group to compare with, but objective.advantage is '{advantage}'; "
            "use 2 or more."
        )
    check_sampler(rollout.sampler, rollout.canvas, "rollout.sampler", "rollout.canvas")
    if "tokens" in recipe.objective.actions:
        check_density(recipe)


def _check_exploration(recipe: Recipe) -> None:
    exploration, start = recipe.exploration, recipe.rollout.start["name"]
    if exploration.hints is not None and start != "blank":
        raise RecipeError(
            f"exploration.hints: hints stand at their places on a blank canvas, rollout.start is '{start}'; set it to "
            "blank, or leave hints out."
        )
    if exploration.refills and exploration.filter is None:
        raise RecipeError(
            f"exploration.refills: {exploration.refills}, but no filter refuses a group; set exploration.filter to "
            "signal."
        )


def check_sampler(sampler: SamplerSection, canvas: int, where: str, canvas_key: str) -> None:
    """Raise RecipeError when schedule, score and selection do not fit each other or the canvas."""
    schedule, score, selection = sampler.schedule, sampler.score["name"], sampler.selection["name"]
    steps = schedule.get("steps")
    if steps is not None and steps > canvas:
        raise RecipeError(
            f"{where}.schedule.steps: {steps} exceeds {canvas_key} {canvas}, and a step decides at least one token; "
            f"use at most {canvas}."
        )
    _probe(sampler, canvas, where, canvas_key)
    if score in POSITIONAL_SCORES and selection not in POSITIONAL_SELECTIONS and selection in SLOTS["selection"]:
        raise RecipeError(
            f"{where}.selection: {selection} compares a probability, score '{score}' is none; "
            "use score confidence, margin or entropy, or selection top."
        )


def _probe(sampler: SamplerSection, canvas: int, where: str, canvas_key: str) -> None:
    """Call schedule, score and selection once on a blank canvas: parts check their own knobs when they are called."""
    import torch

    from ..rollouts.caches import Layout
    from ..rollouts.measures import Statistics
    from ..rollouts.sampler import build_sampler
    from ..rollouts.state import State

    state = State.of(torch.full((1, canvas), -1), -1)
    state.statistics = Statistics.blank(1, canvas)
    try:
        built = build_sampler(sampler.model_dump())
        state.quota = built.quota(state)
        state.window_AL = state.quota.window_BL
        # A planner's file may not be there yet.
        if sampler.score["name"] != "planner":
            built.choose(state, built.scores(state), state.quota)
        if built.cache is not None:
            built.cache(state, Layout.of(state))
    except RecipeError as error:
        raise RecipeError(f"{where}.{error} ({canvas_key}: {canvas})") from error


def step_limit(sampler: SamplerSection, canvas: int) -> int:
    """Return the most denoiser calls of one rollout: the schedule is run on a blank canvas, left to right.

    Where a step can undo what others did, look again, or lengthen the canvas, it is the sampler's cap.
    """
    import torch

    from ..rollouts.sampler import build_sampler
    from ..rollouts.state import State
    from ..rollouts.traits import traits_of

    built = build_sampler(sampler.model_dump())
    reopens = built.remasking is not None and not traits_of(built.remasking).drops
    if reopens or built.editing is not None or built.length is not None:
        return built.steps_allowed(canvas)
    if traits_of(built.schedule).plans:
        # Lengths of blocks are drawn: no more is known than that a step decides a position.
        return min(canvas, built.steps_allowed(canvas))
    canvas_BL, steps = torch.full((1, canvas), -1), 0
    while bool((canvas_BL < 0).any()):
        state = State.of(canvas_BL, -1, step=steps)
        state.open_A = torch.tensor([canvas])
        quota = built.quota(state)
        canvas_BL[0, quota.window_BL[0].nonzero().squeeze(1)[: int(quota.count_B)]] = 0
        steps += 1
    return steps


def _check_optim(optim: Any) -> None:
    if optim.warmup >= optim.steps and optim.warmup > 0:
        raise RecipeError(f"optim.warmup: {optim.warmup} must be smaller than optim.steps {optim.steps}.")
    for index, beta in enumerate(optim.betas):
        if not 0 <= beta < 1:
            raise RecipeError(f"optim.betas.{index}: {beta:g} must lie in [0, 1).")


def _check_evaluation(evaluation: EvaluationSection | SftEvaluationSection, canvas: int, canvas_key: str) -> None:
    if evaluation.sampler is not None:
        check_sampler(evaluation.sampler, canvas, "evaluation.sampler", canvas_key)


def _check_sft(recipe: SftRecipe) -> None:
    from ..rewards import building  # noqa: F401 (importing registers the rewards)

    model = recipe.model
    if (model.path is None) == (model.init is None):
        state = "neither is there" if model.path is None else "both are there"
        raise RecipeError(f"model: needs exactly one of path (a checkpoint) and init (a new model); {state}.")
    if model.init is not None and model.init.hidden_size % (2 * model.init.heads):
        raise RecipeError(
            f"model.init.heads: {model.init.heads} heads do not divide hidden_size {model.init.hidden_size} into even "
            "widths; use another number of heads."
        )
    _check_model(model)
    _check_optim(recipe.optim)
    if all(entry.start > 0 for entry in recipe.tasks):
        earliest = min(entry.start for entry in recipe.tasks)
        raise RecipeError(f"tasks: the earliest starts at {earliest:g} of the steps; one task must have start 0.")
    for index, entry in enumerate(recipe.tasks):
        _check_task(entry.task, f"tasks.{index}.task")
        _check_evaluation(recipe.evaluation, entry.canvas, f"tasks.{index}.canvas")
        if entry.reward is None and entry.task["name"] not in SLOTS["reward"]:
            raise RecipeError(
                f"tasks.{index}.reward: there is no reward called '{entry.task['name']}'; name the one that scores it."
            )
