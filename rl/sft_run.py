"""`unmask sft`: from a recipe to a trained denoiser folder, with held-out results and a manifest beside the weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments

from ..policies.denoiser import Denoiser
from ..policies.loading import load_denoiser, new_denoiser
from ..policies.saving import whole_folder
from ..policies.tokenizers import completion_ids
from ..recipes.loading import dump_recipe
from ..recipes.registry import SLOTS, RecipeError
from ..recipes.schema import SftRecipe
from ..rewards import Scorer, build_rewards
from ..rollouts.sampler import build_sampler
from ..rollouts.worker import RolloutWorker
from .distributed import rank, world_size
from .evaluate import Evaluation, evaluate, heldout_rows
from .manifests import run_manifest
from .runfolder import run_folder, write_atomically, write_json
from .settings import cpu_backend, device_of
from .sft import Aligned, SftBatches, SftTrainer, Source

logger = logging.getLogger(__name__)


def build_model(recipe: SftRecipe) -> Denoiser:
    """Return the recipe's new or loaded denoiser."""
    section = recipe.model
    device = device_of(section.device)
    if section.init is not None:
        denoiser = new_denoiser(**section.init.model_dump(), seed=recipe.run.seed)
        denoiser.model.to(device)
        if section.attention is not None:
            denoiser.model.set_attn_implementation(section.attention)
        return denoiser
    assert section.path is not None
    return load_denoiser(
        section.path,
        dtype=section.dtype,
        device=device,
        family=section.family,
        attention=section.attention,
        mask_token_id=section.mask_token_id,
        block_length=section.block_length,
    )


def sources(recipe: SftRecipe) -> list[Source]:
    """Return the recipe's training tasks."""
    return [
        Source(
            name=entry.task["name"],
            rows=SLOTS["task"].build(entry.task)("train", seed=recipe.run.seed),
            weight=entry.weight,
            canvas=entry.canvas,
            start=entry.start,
        )
        for entry in recipe.tasks
    ]


def aligned(source: Source, long: str, denoiser: Denoiser) -> Source:
    """Return the source with solutions that fit its canvas, as `sft.long` says."""
    if long == "refuse":
        return source

    @lru_cache(maxsize=4096)
    def tokens(text: str) -> int:
        return len(completion_ids(denoiser.tokenizer, text, denoiser.family.end_id))

    rewrite = None if long == "drop" else SLOTS["task"].get(long)
    return replace(source, rows=Aligned(source.rows, tokens, source.canvas, rewrite))


def label(choice: dict[str, Any]) -> str:
    """Return a task's name in results: `arithmetic/hard`, `arithmetic/1-2` by operations, else the task's own name."""
    if choice.get("operations"):
        return f"{choice['name']}/{'-'.join(map(str, choice['operations']))}"
    return f"{choice['name']}/{choice['level']}" if choice.get("level") else choice["name"]


def evaluate_tasks(recipe: SftRecipe, denoiser: Denoiser, problems: int) -> dict[str, Evaluation]:
    """Return held-out results by task at the recipe's evaluation decoding."""
    sampler = build_sampler(recipe.evaluation.sampler.model_dump(), temperature=recipe.evaluation.temperature)
    results: dict[str, Evaluation] = {}
    total, quiet = problems * len(recipe.tasks), rank() != 0
    bar = tqdm(total=total, unit="problem", desc="evaluation", dynamic_ncols=True, disable=quiet)
    for index, entry in enumerate(recipe.tasks):
        choice = entry.reward or {"name": entry.task["name"]}
        rewards = build_rewards([choice], allow_code_execution=recipe.allow_code_execution)
        rows = heldout_rows(SLOTS["task"].build(entry.task)("heldout", seed=0), problems)
        worker = RolloutWorker(
            denoiser=denoiser,
            tokenizer=denoiser.tokenizer,
            sampler=sampler,
            scorer=Scorer(rewards),
            group=1,
            canvas=entry.canvas,
            prompt_limit=10**6,
            seed=0,
        )
        name = label(entry.task)
        results[f"{name}-{index}" if name in results else name] = evaluate(worker, rows, progress=bar.update)
    bar.close()
    return results


class EvaluationCallback(TrainerCallback):
    """Evaluates every `evaluation.every` steps and logs `eval/TASK/exact`."""

    def __init__(self, recipe: SftRecipe, denoiser: Denoiser) -> None:
        self.recipe, self.denoiser = recipe, denoiser

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run the evaluation when it is due."""
        every = self.recipe.evaluation.every
        if every and state.global_step % every == 0 and state.global_step < state.max_steps:
            results = evaluate_tasks(self.recipe, self.denoiser, min(32, self.recipe.evaluation.problems))
            for name, result in results.items():
                logger.info("step %d: %s exact %.3f (n=%d)", state.global_step, name, result.exact, result.n)


def training_arguments(recipe: SftRecipe, folder: Path) -> TrainingArguments:
    """Return the Trainer's arguments for a recipe's `optim` and `run` sections."""
    optim = recipe.optim
    schedule = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}[optim.schedule]
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=optim.steps,
        per_device_train_batch_size=1,
        learning_rate=optim.lr,
        lr_scheduler_type=schedule,
        warmup_steps=optim.warmup,
        max_grad_norm=optim.max_grad_norm,
        logging_steps=max(1, min(50, optim.steps // 20)),
        save_strategy="steps" if recipe.run.save_every else "no",
        save_steps=recipe.run.save_every or 500,
        save_total_limit=recipe.run.keep,
        report_to=list(recipe.run.report_to),
        remove_unused_columns=False,
        seed=recipe.run.seed,
        data_seed=recipe.run.seed,
        use_cpu=device_of(recipe.model.device) == "cpu",
        ddp_backend=cpu_backend(recipe.model.device),
        dataloader_pin_memory=False,
    )


def sft(recipe: SftRecipe, *, resume: Path | None = None) -> dict[str, Any]:
    """Train, evaluate and save a recipe's denoiser; return the summary that `summary.json` holds.

    `resume` is a checkpoint folder of the same run.
    """
    checkpoint = None if resume is None else str(resume)
    folder = run_folder(recipe)
    if recipe.sft.batch % world_size():
        raise RecipeError(f"sft.batch: {recipe.sft.batch} does not divide among {world_size()} ranks.")
    denoiser = build_model(recipe)
    arguments = training_arguments(recipe, folder)
    if rank() == 0:
        write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
    trainer = SftTrainer(
        denoiser,
        optim={
            "name": recipe.optim.optimizer,
            "lr": recipe.optim.lr,
            "matrix_lr": recipe.optim.matrix_lr,
            "weight_decay": recipe.optim.weight_decay,
            "betas": recipe.optim.betas,
        },
        autocast=recipe.sft.autocast,
        args=arguments,
        train_dataset=SftBatches(
            [aligned(source, recipe.sft.long, denoiser) for source in sources(recipe)],
            denoiser.tokenizer,
            denoiser.family,
            batch=recipe.sft.batch // world_size(),
            steps=recipe.optim.steps * world_size(),
            seed=recipe.run.seed,
            mask=recipe.sft.mask,
            half_life=recipe.sft.half_life,
            full_canvas=recipe.sft.full_canvas,
        ),
        callbacks=[EvaluationCallback(recipe, denoiser)],
    )
    output = trainer.train(resume_from_checkpoint=checkpoint)
    denoiser.model.eval()
    results = evaluate_tasks(recipe, denoiser, recipe.evaluation.problems)
    summary = {
        "run": recipe.name,
        "wall_s": output.metrics["train_runtime"],
        "loss": output.training_loss,
        "parameters": sum(p.numel() for p in denoiser.model.parameters()),
        "heldout": {name: result.as_dict() for name, result in results.items()},
    }
    if rank() == 0:
        record = run_manifest(recipe, denoiser, recipe=dump_recipe(recipe), **summary)
        write_json(folder / "manifest.json", record)
        with whole_folder(folder / "model") as unfinished:
            denoiser.save(unfinished)
            write_json(unfinished / "manifest.json", record)
        write_json(folder / "summary.json", summary)
    return summary
