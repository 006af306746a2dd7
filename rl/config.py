"""UnmaskConfig: transformers' TrainingArguments plus the names that TRL's GRPOConfig uses for the same things."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from ..recipes.registry import RecipeError

# Fields that GRPOConfig has under the same name and with the same meaning.
SAME_NAMES = (
    "num_generations",
    "num_iterations",
    "max_prompt_length",
    "max_completion_length",
    "temperature",
    "epsilon",
    "epsilon_high",
    "beta",
    "reward_weights",
)
COUNTS = (
    "num_prompts",
    "num_generations",
    "num_iterations",
    "max_prompt_length",
    "max_completion_length",
    "rollout_batch_size",
    "chunk_size",
    "eval_problems",
    "keep_checkpoints",
)
# Fields of GRPOConfig that only say how its batch is cut up; `num_prompts` follows from them.
BATCH_NAMES = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "steps_per_generation",
)
# Fields of TrainingArguments that UnmaskTrainer would ignore, and what to do instead of setting them.
WITHOUT_EFFECT = {
    "per_device_train_batch_size": "set num_prompts, num_generations and chunk_size",
    "gradient_accumulation_steps": "set num_prompts, num_generations and chunk_size",
    "auto_find_batch_size": "set chunk_size and rollout_batch_size",
    "per_device_eval_batch_size": "set rollout_batch_size",
    "bf16": "load the model with load_denoiser(path, dtype='bfloat16')",
    "fp16": "load the model with load_denoiser(path, dtype='bfloat16')",
    "bf16_full_eval": "load the model with load_denoiser(path, dtype='bfloat16')",
    "fp16_full_eval": "load the model with load_denoiser(path, dtype='bfloat16')",
    "optim": "pass UnmaskTrainer(optim={'name': 'adamw'}) or 'muon'",
    "optim_args": "pass UnmaskTrainer(optim={...})",
    "optim_target_modules": "adapt modules by peft_config",
    "adam_epsilon": "leave it at its default",
    "label_smoothing_factor": "choose the loss by UnmaskTrainer(objective=...)",
    "neftune_noise_alpha": "leave it out; noise would make the ratio of a fresh rollout differ from 1",
    "torch_compile": "leave it out; compiled forwards are not supported yet",
    "use_liger_kernel": "leave it out; Liger replaces a loss that is not used here",
    "fsdp": "set sharding='fsdp', which shares the weights out by torch's own FSDP2",
    "deepspeed": "set sharding='fsdp', which shares the weights out by torch's own FSDP2",
    "load_best_model_at_end": "evaluate the checkpoints (unmask evaluate) and choose one",
    "save_only_model": "leave it out; a checkpoint without the optimizer cannot be resumed exactly",
    "train_sampling_strategy": "sort the dataset itself; every epoch is shuffled by the seed",
}


@dataclass
class UnmaskConfig(TrainingArguments):
    """Arguments of `UnmaskTrainer`: those of TrainingArguments with their meaning, and ours with TRL's names.

    One optimizer step is one `training_step`: a batch of `num_prompts` x `num_generations` rollouts over all ranks is
    collected every `num_iterations` steps, and the objective cuts it into forwards by itself (`chunk_size` views each,
    gradients summed). Every step is logged unless `logging_steps` says otherwise; `save_total_limit` is another name of
    `keep_checkpoints`. A field of TrainingArguments that would have no effect is refused when it is set.
    """

    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between records of metrics.jsonl."})
    num_prompts: int = field(default=16, metadata={"help": "Prompts a batch, all ranks together."})
    num_generations: int = field(default=8, metadata={"help": "Rollouts of each prompt (group)."})
    num_iterations: int = field(default=1, metadata={"help": "Optimizer steps on each batch (inner steps)."})
    max_prompt_length: int = field(default=512, metadata={"help": "Longest prompt in tokens; longer ones are refused."})
    max_completion_length: int = field(default=256, metadata={"help": "Canvas length in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the draw and of its log-probability."})
    epsilon: float = field(default=0.2, metadata={"help": "Lower clip of the ratio when no objective is given."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip; None: epsilon."})
    beta: float = field(default=0.0, metadata={"help": "Weight of the divergence when no objective is given."})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight a reward; None: 1."})
    rollout_batch_size: int = field(default=64, metadata={"help": "Rollouts a denoising forward."})
    chunk_size: int = field(default=32, metadata={"help": "Views a training forward."})
    reference: str = field(default="auto", metadata={"help": "auto, adapter_off, frozen_copy, old or none."})
    sharding: str = field(default="none", metadata={"help": "fsdp: weights and optimizer shared among the processes."})
    log_rollouts_every: int = field(default=10, metadata={"help": "Batches between stored rollouts (0: never)."})
    eval_problems: int = field(default=512, metadata={"help": "Held-out problems an evaluation."})
    eval_temperature: float | None = field(default=None, metadata={"help": "That of evaluation; None: temperature."})
    keep_checkpoints: int = field(default=2, metadata={"help": "Complete checkpoints kept on disk."})

    def __post_init__(self) -> None:
        """Validate our own fields; TrainingArguments validates its."""
        for entry in fields(self):
            # 1 is what the batch size is set to below, so that a copy of a config passes too.
            usual = (entry.default, 1) if entry.name == "per_device_train_batch_size" else (entry.default,)
            if entry.name in WITHOUT_EFFECT and getattr(self, entry.name) not in usual:
                value, remedy = getattr(self, entry.name), WITHOUT_EFFECT[entry.name]
                raise RecipeError(f"UnmaskConfig.{entry.name}: {value} has no effect here; {remedy}.")
        self.per_device_train_batch_size = 1
        if self.save_total_limit is not None:
            # Trainer would delete before the new checkpoint is complete.
            self.keep_checkpoints, self.save_total_limit = self.save_total_limit, None
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise RecipeError(f"UnmaskConfig.{name}: {getattr(self, name)} must be at least 1.")
        if self.sharding not in ("none", "fsdp"):
            raise RecipeError(f"UnmaskConfig.sharding: '{self.sharding}' is neither none nor fsdp.")
        if self.temperature < 0:
            raise RecipeError(f"UnmaskConfig.temperature: {self.temperature} must be at least 0.")
        self.remove_unused_columns = False
        self.dataloader_pin_memory = False
        self.ignore_data_skip = False
        super().__post_init__()

    @property
    def evaluation_temperature(self) -> float:
        """The temperature of evaluation."""
        return self.temperature if self.eval_temperature is None else self.eval_temperature

    @classmethod
    def from_grpo(cls, config: Any, **overrides: Any) -> UnmaskConfig:
        """Return the UnmaskConfig that means what a `trl.GRPOConfig` says.

        What was set among the fields of TrainingArguments and the shared GRPO names carries over, and the batch becomes
        `num_prompts = generation_batch_size / num_generations`. What GRPOConfig leaves at its default is
        UnmaskTrainer's to choose: loss, advantage and sampler are its own. Raises RecipeError naming every GRPO field
        that was set away from its default and has no counterpart here, so that nothing is ignored silently.
        """
        defaults = type(config)(output_dir=config.output_dir, report_to=config.report_to, use_cpu=config.use_cpu)
        base = {f.name for f in fields(TrainingArguments) if f.init} - set(BATCH_NAMES)
        moved = {f.name for f in fields(config) if f.init and getattr(config, f.name) != getattr(defaults, f.name)}
        unsupported = moved - base - set(SAME_NAMES) - set(BATCH_NAMES)
        if unsupported:
            raise RecipeError(
                f"from_grpo: {', '.join(sorted(unsupported))} set away from the default and without a counterpart; "
                "unset them, or choose the recipe's parts instead (unmask parts)."
            )
        if config.steps_per_generation != config.gradient_accumulation_steps:
            raise RecipeError(
                f"from_grpo: steps_per_generation {config.steps_per_generation} shares a batch among several optimizer "
                "steps, each of num_iterations uses all of it here; set it to gradient_accumulation_steps "
                f"{config.gradient_accumulation_steps}."
            )
        values = {name: getattr(config, name) for name in base & moved}
        values |= {name: getattr(config, name) for name in ("output_dir", "report_to", "learning_rate", "use_cpu")}
        shared = {name: getattr(config, name, None) for name in SAME_NAMES}
        values |= {name: value for name, value in shared.items() if value is not None}
        values["num_prompts"] = max(1, config.generation_batch_size // config.num_generations)
        return cls(**(values | overrides))
