"""`unmask prefer`: from a recipe of pairs to a trained adapter or model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..policies.adapters import lora_config
from ..policies.denoiser import Denoiser
from ..policies.reference import build_reference
from ..recipes.loading import dump_recipe
from ..recipes.preferences import PreferenceRecipe
from ..recipes.registry import RecipeError
from ..recipes.tasks import Stored
from ..rollouts.noise import generator
from .distributed import rank, reduce_gradients, world_size
from .finite import require_finite_gradient
from .optimizers import build_optimizer
from .preference import Pair, Preference, paired, pairs_of
from .records import Records
from .run import free_folder, save_policy
from .runfolder import manifest, no_empty_folder, run_folder, write_atomically, write_json
from .settings import cpu_backend, device_of
from .targets import load_policy
from .trainer_inputs import prepare


class PreferenceTrainer(Trainer):
    """transformers.Trainer on pairs; batch n has the pairs n x batch and following of epochs shuffled by the seed.

    What a step does is a function of its number and the seed, on any number of ranks and after a resume.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        pairs: list[Pair],
        preference: Preference,
        *,
        batch: int,
        canvas: int,
        reference: str = "auto",
        optim: dict[str, Any],
        args: TrainingArguments,
        records: Records | None = None,
    ) -> None:
        if batch % world_size():
            raise RecipeError(f"preference.batch: {batch} pairs cannot be shared evenly by {world_size()} processes.")
        self.denoiser, self.preference, self.batch, self.canvas = denoiser, preference, batch, canvas
        self.pairs, self.optim, self.records = Stored(pairs, "train", args.seed), optim, records
        super().__init__(model=denoiser.model, args=args, train_dataset=range(args.max_steps))  # type: ignore[arg-type]
        self.remove_callback(PrinterCallback)
        self.reference: Any = build_reference(denoiser, reference, beta=preference.beta)
        self.model_accepts_loss_kwargs, self._metrics = False, dict[str, float]()

    def get_train_dataloader(self) -> DataLoader:
        """Return step numbers."""
        return DataLoader(range(self.args.max_steps), batch_size=1, collate_fn=lambda items: {"step": items[0]})  # type: ignore[arg-type]

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Build the recipe's optimizer once."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.denoiser.model.named_parameters(), **self.optim)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Add one batch's gradient; returns its loss."""
        step, share = int(inputs["step"]), self.batch // world_size()
        first = rank() * share
        pairs = [self.pairs.row(step * self.batch + first + offset) for offset in range(share)]
        tokenizer, family, device = self.denoiser.tokenizer, self.denoiser.family, self.denoiser.device
        trajectory = paired(pairs, tokenizer, family, canvas=self.canvas, first_id=first).to(device)
        model.train()
        rng = generator(self.args.seed, "preference", step)
        self._metrics = self.preference.backward(self.denoiser, self.reference, trajectory, rng=rng)
        reduce_gradients(self.denoiser.model.parameters(), average=False)
        require_finite_gradient(self.denoiser.model.parameters(), step)
        return trajectory.logprob_BL.new_tensor(self._metrics["loss"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a record to the run's folder and to every tracker."""
        if "loss" in logs:
            logs = {**logs, **{name: value for name, value in self._metrics.items() if name != "loss"}}
            if self.records is not None and rank() == 0:
                kept = {name: value for name, value in logs.items() if name != "epoch"}
                self.records.write(self.state.global_step, kept)
        super().log(logs, start_time)


def prefer(recipe: PreferenceRecipe) -> dict[str, Any]:
    """Run a preference recipe; write the policy, `metrics.jsonl`, recipe and manifest, and return the summary."""
    pairs, denoiser, canvas = pairs_of(recipe), _load(recipe), recipe.pairs.canvas
    section, folder = recipe.preference, free_folder(run_folder(recipe))
    folder.mkdir(parents=True, exist_ok=True)
    with no_empty_folder(folder):
        # Every pair is looked at before the first step, not when its turn comes.
        paired(pairs, denoiser.tokenizer, denoiser.family, canvas=canvas)
        names = ("beta", "draws", "per_token", "sft", "chunk")
        trainer = PreferenceTrainer(
            denoiser,
            pairs,
            Preference(**{name: getattr(section, name) for name in names}),
            batch=section.batch,
            canvas=canvas,
            reference=section.reference,
            optim=_optim(recipe),
            args=_arguments(recipe, folder),
            records=Records(folder),
        )
        write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
        output = trainer.train()
    save_policy(denoiser, folder)
    summary = {
        "run": folder.name,
        "folder": str(folder),
        "pairs": len(pairs),
        "steps": recipe.optim.steps,
        "loss": output.training_loss,
        "wall_s": output.metrics["train_runtime"],
    }
    seeds = {"run": recipe.run.seed}
    record = manifest(device=denoiser.device, dtype=recipe.model.dtype, seeds=seeds, ranks=world_size())
    write_json(folder / "manifest.json", record)
    write_json(folder / "summary.json", summary)
    return summary


def _load(recipe: PreferenceRecipe) -> Denoiser:
    denoiser, lora = load_policy(recipe), recipe.model.lora
    return denoiser if lora is None else prepare(denoiser, lora_config(denoiser, **lora.model_dump()), recipe.run.seed)


def _optim(recipe: PreferenceRecipe) -> dict[str, Any]:
    optim = recipe.optim
    chosen = {"name": optim.optimizer, "lr": optim.lr, "matrix_lr": optim.matrix_lr}
    return chosen | {"weight_decay": optim.weight_decay, "betas": tuple(optim.betas)}


def _arguments(recipe: PreferenceRecipe, folder: Path) -> TrainingArguments:
    optim, run = recipe.optim, recipe.run
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=optim.steps,
        per_device_train_batch_size=1,
        learning_rate=optim.lr,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(optim.schedule, optim.schedule),
        warmup_steps=optim.warmup,
        max_grad_norm=optim.max_grad_norm,
        logging_steps=1,
        save_strategy="steps" if run.save_every else "no",
        save_steps=run.save_every or 500,
        save_total_limit=run.keep,
        report_to=list(run.report_to),
        remove_unused_columns=False,
        seed=run.seed,
        data_seed=run.seed,
        use_cpu=device_of(recipe.model.device) == "cpu",
        ddp_backend=cpu_backend(recipe.model.device),
        dataloader_pin_memory=False,
        disable_tqdm=rank() != 0,
    )
