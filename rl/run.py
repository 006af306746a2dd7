"""What the commands do: train, supervised training and evaluation, from a recipe or a run's folder."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from ..policies.adapters import lora_config
from ..policies.denoiser import Denoiser, load_denoiser
from ..recipes.loading import dump_recipe, load_recipe
from ..recipes.registry import SLOTS, RecipeError
from ..recipes.schema import Recipe, SftRecipe
from ..rewards import build_rewards
from ..rollouts.sampler import build_sampler
from . import sft_run
from .checkpoints import CheckpointWriteError, complete_checkpoints, discard_incomplete
from .config import UnmaskConfig
from .distributed import rank, world_size
from .evaluate import Evaluation, heldout_rows
from .evaluate import evaluate as evaluate_rows
from .objective import build_objective
from .runfolder import manifest, run_folder, write_atomically, write_json
from .settings import cpu_backend, device_of
from .trainer import UnmaskTrainer

logger = logging.getLogger(__name__)
WORKER = "UNMASK_WORKER"  # set in the processes that torchrun starts for us


class RunError(ValueError):
    """A run that cannot start or go on; the message names cause and remedy."""


def train(recipe: Recipe, *, nproc: int = 1, resume: Path | None = None) -> dict[str, Any]:
    """Run an RL recipe and return its summary: held-out results before and after, steps, wall seconds.

    `nproc` > 1 starts torchrun on this machine. `resume` is a run's folder or one of its checkpoints.
    """
    if nproc > 1 and WORKER not in os.environ:
        return _launch(recipe, nproc, resume)
    folder, checkpoint = _place(recipe, resume)
    started = time.perf_counter()
    trainer = build_trainer(recipe, folder)
    if rank() == 0:
        write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
        write_json(folder / "manifest.json", run_manifest(recipe, trainer.denoiser))
    before_file = folder / "before.json"
    if checkpoint is None or not before_file.is_file():
        before = _evaluated(trainer)
        if rank() == 0:
            write_json(before_file, before)
    else:
        before = json.loads(before_file.read_text())
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if rank() == 0:
            save_policy(trainer.denoiser, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointWriteError(
            f"{folder}: could not write ({error}); free some space, then `unmask train --resume {folder}`. Earlier "
            "checkpoints are intact."
        ) from error
    after = _evaluated(trainer)
    summary = {
        "run": folder.name,
        "folder": str(folder),
        "steps": recipe.optim.steps,
        "before": before,
        "after": after,
        "n": after["n"],
        "wall_s": time.perf_counter() - started,
    }
    if rank() == 0:
        write_json(folder / "summary.json", summary)
        show_summary(summary, folder)
    return summary


def build_trainer(recipe: Recipe, folder: Path) -> UnmaskTrainer:
    """Return the trainer of a recipe; loads the weights."""
    denoiser = load_policy(recipe)
    config = arguments(recipe, folder)
    lora = recipe.model.lora
    peft_config = None
    if lora is not None:
        peft_config = lora_config(denoiser, **lora.model_dump())
    evaluation_sampler = (recipe.evaluation.sampler or recipe.rollout.sampler).model_dump()
    task = SLOTS["task"].build(recipe.task)
    return UnmaskTrainer(
        model=denoiser,
        reward_funcs=build_rewards([entry.model_dump() for entry in recipe.rewards]),
        args=config,
        train_dataset=task("train", seed=recipe.run.seed),
        eval_dataset=task("heldout", seed=0),
        peft_config=peft_config,
        sampler=build_sampler(recipe.rollout.sampler.model_dump(), temperature=recipe.rollout.temperature),
        eval_sampler=build_sampler(evaluation_sampler),
        objective=build_objective(recipe.objective.model_dump()),
        advantage=SLOTS["advantage"].build(recipe.objective.advantage),
        optim={"name": recipe.optim.optimizer, "matrix_lr": recipe.optim.matrix_lr, "betas": tuple(recipe.optim.betas)},
    )


def load_policy(recipe: Recipe) -> Denoiser:
    """Return the recipe's denoiser without adapter."""
    section = recipe.model
    return load_denoiser(
        section.path,
        dtype=section.dtype,
        device=device_of(section.device),
        family=section.family,
        attention=section.attention,
        mask_token_id=section.mask_token_id,
    )


def arguments(recipe: Recipe, folder: Path) -> UnmaskConfig:
    """Return the trainer's arguments for a recipe."""
    optim, run = recipe.optim, recipe.run
    schedule = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}[optim.schedule]
    device = device_of(recipe.model.device)
    return UnmaskConfig(
        output_dir=str(folder),
        max_steps=optim.steps,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        lr_scheduler_type=schedule,
        warmup_steps=optim.warmup,
        max_grad_norm=optim.max_grad_norm,
        logging_steps=1,
        eval_strategy="steps" if recipe.evaluation.every else "no",
        eval_steps=recipe.evaluation.every or None,
        save_strategy="steps" if run.save_every else "no",
        save_steps=run.save_every or 500,
        report_to=list(run.report_to),
        run_name=folder.name,
        seed=run.seed,
        use_cpu=device == "cpu",
        ddp_backend=cpu_backend(recipe.model.device),
        num_prompts=recipe.rollout.prompts,
        num_generations=recipe.rollout.group,
        num_iterations=recipe.objective.inner_steps,
        max_prompt_length=recipe.rollout.prompt_limit,
        max_completion_length=recipe.rollout.canvas,
        temperature=recipe.rollout.temperature,
        rollout_batch_size=recipe.rollout.micro_batch,
        reference=recipe.objective.reference,
        log_rollouts_every=run.log_rollouts_every,
        eval_problems=recipe.evaluation.problems,
        eval_temperature=recipe.evaluation.temperature,
        keep_checkpoints=run.keep,
    )


def _place(recipe: Recipe, resume: Path | None) -> tuple[Path, Path | None]:
    """Return (run folder, checkpoint to resume from); a new run never overwrites an old one."""
    if resume is None:
        folder = run_folder(recipe)
        if world_size() == 1 and WORKER not in os.environ:
            folder = _free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder, None
    folder = resume.parent if resume.name.startswith("checkpoint-") else resume
    found = complete_checkpoints(folder)
    if not found:
        raise RunError(f"--resume: '{folder}' holds no complete checkpoint; set run.save_every, or start anew.")
    checkpoint = resume if resume in found else found[-1]
    if rank() == 0:
        discard_incomplete(folder)
    return folder, checkpoint


def _free(folder: Path) -> Path:
    """Return `folder`, or the first of `folder-2`, `folder-3`, ... that no run has used."""
    number, candidate = 1, folder
    while candidate.exists() and any(candidate.iterdir()):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _launch(recipe: Recipe, nproc: int, resume: Path | None) -> dict[str, Any]:
    """Run the recipe in `nproc` processes under torchrun and return the summary that rank 0 wrote."""
    folder = resume if resume is not None else _free(run_folder(recipe))
    folder = folder.parent if folder.name.startswith("checkpoint-") else folder
    plan = folder / "launch.yaml"
    fixed = recipe.model_copy(
        update={"name": folder.name, "run": recipe.run.model_copy(update={"directory": str(folder.parent)})}
    )
    write_atomically(plan, dump_recipe(fixed))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc)]
    command += ["--module", "unmask.rl.launch", str(plan)] + (["--resume", str(resume)] if resume else [])
    environment = {"OMP_NUM_THREADS": "1", **os.environ, WORKER: "1"}
    code = subprocess.run(command, env=environment, check=False).returncode
    if code != 0:
        raise RunError(f"torchrun ended with code {code}; the first error above is the cause.")
    return json.loads((folder / "summary.json").read_text())


def _evaluated(trainer: UnmaskTrainer) -> dict[str, Any]:
    metrics = trainer.evaluate()
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}


def run_manifest(recipe: Recipe | SftRecipe, denoiser: Denoiser) -> dict[str, Any]:
    """Return the manifest of a run."""
    return manifest(
        device=denoiser.device,
        dtype=recipe.model.dtype,
        seeds={"run": recipe.run.seed},
        ranks=world_size(),
        model=str(recipe.model.path),
    )


def save_policy(denoiser: Denoiser, folder: Path) -> None:
    """Write the adapter as peft does, or all weights in the vendor's layout."""
    if isinstance(denoiser.model, PeftModel):
        denoiser.model.save_pretrained(str(folder / "adapter"))
    else:
        denoiser.save(folder / "model")


def sft(recipe: SftRecipe, *, nproc: int = 1, resume: Path | None = None) -> dict[str, Any]:
    """Run a supervised recipe and return its summary."""
    if nproc > 1 and WORKER not in os.environ:
        return _launch(recipe, nproc, resume)  # type: ignore[arg-type]
    summary = sft_run.sft(recipe, resume=resume)
    if rank() == 0:
        folder = run_folder(recipe)
        table = Table(
            "task", "held-out exact", "n", "NFE", title=f"{recipe.name}: {summary['wall_s'] / 60:.1f} minutes"
        )
        for name, result in summary["heldout"].items():
            table.add_row(
                name, f"{result['exact']:.3f} ± {result['stderr']:.3f}", str(result["n"]), f"{result['nfe']:.1f}"
            )
        console = Console()
        console.print(table)
        console.print(f"weights: {folder / 'model'}\nnext: unmask sample {folder / 'model'}")
    return summary


def evaluate(target: str, *, overrides: Sequence[str] = (), problems: int | None = None) -> dict[str, Any]:
    """Evaluate a run's folder, a recipe's untrained model, or a checkpoint folder; print and return the result."""
    recipe, denoiser = open_target(target, overrides)
    rewards = build_rewards([entry.model_dump() for entry in recipe.rewards])
    rows = heldout_rows(SLOTS["task"].build(recipe.task)("heldout", seed=0), problems or recipe.evaluation.problems)
    worker = evaluation_worker(recipe, denoiser, rewards)
    from tqdm.auto import tqdm

    with tqdm(total=len(rows), unit="problem", dynamic_ncols=True) as bar:
        result: Evaluation = evaluate_rows(worker, rows, progress=bar.update)
    table = Table("held-out exact", "n", "mean reward", "NFE", "length", "tokens/s", title=target)
    exact = f"{result.exact:.3f} ± {result.stderr:.3f}"
    table.add_row(
        exact,
        str(result.n),
        f"{result.reward:.3f}",
        f"{result.nfe:.1f}",
        f"{result.length:.1f}",
        f"{result.tokens_per_s:.0f}",
    )
    console = Console()
    console.print(table)
    console.print("outcomes: " + ", ".join(f"{name} {count}" for name, count in sorted(result.outcomes.items())))
    console.print(f"next: unmask sample {target}")
    return result.as_dict() | {"target": target, "manifest": run_manifest(recipe, denoiser)}


def evaluation_worker(recipe: Recipe, denoiser: Denoiser, rewards: Any) -> Any:
    """Return the worker that decodes as a recipe's evaluation does."""
    from functools import partial

    from ..rollouts.worker import RolloutWorker
    from .trainer import score_batch

    temperature = recipe.evaluation.temperature
    sampler = build_sampler(
        (recipe.evaluation.sampler or recipe.rollout.sampler).model_dump(),
        temperature=recipe.rollout.temperature if temperature is None else temperature,
    )
    return RolloutWorker(
        denoiser=denoiser,
        tokenizer=denoiser.tokenizer,
        sampler=sampler,
        scorer=partial(score_batch, rewards),
        group=1,
        canvas=recipe.rollout.canvas,
        prompt_limit=recipe.rollout.prompt_limit,
        seed=recipe.run.seed,
        micro_batch=recipe.rollout.micro_batch,
    )


def open_target(target: str, overrides: Sequence[str] = ()) -> tuple[Recipe, Denoiser]:
    """Return the recipe and the denoiser (adapter on) that a run's folder, a recipe or a checkpoint folder names."""
    folder = Path(target).expanduser()
    if target == "unmask:tiny" or (folder / "config.json").is_file():
        recipe = load_recipe("cj_grpo_tiny_arithmetic.yaml", [*overrides, f"model.path={target}"])
        assert isinstance(recipe, Recipe)
        return recipe, load_policy(recipe)
    recipe = load_recipe(folder / "recipe.yaml" if folder.is_dir() else target, overrides)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"'{target}' is a recipe of kind sft; name its model folder ({run_folder(recipe) / 'model'})."
        )
    if (folder / "model" / "config.json").is_file():
        return recipe, load_denoiser(
            str(folder / "model"), dtype=recipe.model.dtype, device=device_of(recipe.model.device)
        )
    denoiser = load_policy(recipe)
    if (folder / "adapter").is_dir():
        model = PeftModel.from_pretrained(denoiser.model, str(folder / "adapter")).eval()
        denoiser = replace(denoiser, model=model)
    elif folder.is_dir():
        raise RunError(
            f"'{folder}' holds neither adapter nor model; the run has not finished (unmask train --resume {folder})."
        )
    return recipe, denoiser


def show_summary(summary: dict[str, Any], folder: Path) -> None:
    """Print before and after, and where to look next."""
    table = Table(
        "", "held-out exact", "mean reward", "NFE", "length", title=f"{summary['run']}: {summary['wall_s']:.0f} s"
    )
    for name in ("before", "after"):
        row = summary[name]
        exact = f"{row['exact']:.3f} ± {row['stderr']:.3f}"
        table.add_row(name, exact, f"{row['reward']:.3f}", f"{row['nfe']:.1f}", f"{row['length']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"n = {summary['n']} held-out problems; metrics, rollouts and recipe are in {folder}")
    console.print(f"next: unmask sample {folder}    |    unmask evaluate {folder} --problems 1000")
