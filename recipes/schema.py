"""The recipe's typed sections: unknown keys forbidden, nothing coerced that would change its value."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .planning import PlannerSection
from .sections import (
    NO_TRACKER,
    AlarmsSection,
    Count,
    ExplorationSection,
    InSlot,
    Int,
    Part,
    RunName,
    SamplerSection,
    Section,
    TokenId,
    Tracker,
    ValueSection,
    listed,
    named,
)

Action = Literal["tokens", "positions"]
TOKENS: list[Action] = ["tokens"]


class LoraSection(Section):
    """A low-rank adapter; without this section all weights are trained."""

    rank: Int = Field(16, ge=1, description="rank of the adapter's two factors")
    alpha: float = Field(0.0, ge=0, description="scale numerator (the update is alpha / rank); 0 means 2 x rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="adapter dropout; above 0 log-probs differ between passes")
    targets: list[str] | None = Field(None, min_length=1, description="module names; null: the family's linear layers")

    @model_validator(mode="after")
    def _scale(self) -> LoraSection:
        self.alpha = self.alpha or 2.0 * self.rank
        return self


class ModelSection(Section):
    """The denoiser that is trained."""

    path: str = Field(min_length=1, description="folder, hub id, or `unmask:tiny` (the shipped model)")
    family: str | None = Field(None, description="checkpoint layout; null: recognised by config.json")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the weights")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto: cuda if there is one")
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        None, description="attention kernel; null: sdpa"
    )
    mask_token_id: TokenId | None = Field(None, description="mask id; null: config.json's, else the tokenizer's")
    block_length: Count | None = Field(None, description="block of a block-causal family; null: config.json's")
    context: Count | None = Field(None, description="longest sequence, for which RoPE is rescaled (NTK); null: as is")
    quantization: Literal["4bit"] | None = Field(None, description="4bit: NF4 base under a LoRA adapter (bitsandbytes)")
    sharding: Literal["none", "fsdp"] = Field(
        "none", description="fsdp: weights, gradients and optimizer shared out among the processes (FSDP2, --nproc)"
    )
    lora: LoraSection | None = Field(None, description="adapter; null trains all weights")


class RolloutSection(Section):
    """One batch of rollouts."""

    prompts: Int = Field(ge=1, description="problems a batch, all ranks together")
    group: Int = Field(ge=1, description="rollouts of each problem")
    canvas: Int = Field(ge=1, description="completion positions")
    prompt_limit: Int = Field(256, ge=1, description="longest prompt in tokens; longer ones are refused")
    temperature: float = Field(1.0, ge=0, description="temperature of the token draw")
    micro_batch: Int = Field(64, ge=1, description="rows of one rollout forward")
    start: Annotated[Part, InSlot("canvas")] = Field(
        {"name": "blank"}, description="what stands on the canvas before the first step"
    )
    sampler: SamplerSection = Field(description="how the canvas is unmasked")


class RewardEntry(BaseModel):
    """One reward: a part of slot `reward`, its weight, and its knobs beside them."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    name: str = Field(min_length=1, description="reward, or `package.module:function` with TRL's signature")
    weight: float = Field(1.0, description="factor in the total; 0 logs the reward without training on it")
    truth: bool = Field(False, description="a measure that is logged as truth/NAME and never trained on")
    isolated: bool | None = Field(None, description="judge rows in killable processes; null: as the reward is marked")
    limit_s: float | None = Field(None, gt=0, description="isolated: seconds for one completion; null: the reward's")

    @model_validator(mode="after")
    def _truth(self) -> RewardEntry:
        if self.truth and "weight" not in self.model_fields_set:
            self.weight = 0.0
        return self


class LimitsSection(Section):
    """The largest shares of a reward's last 1024 verdicts; above one of them the run stops with the cause."""

    timeout: float = Field(0.05, ge=0, le=1, description="verdicts that did not come in time, twice")
    error: float = Field(0.05, ge=0, le=1, description="verdicts that failed, twice")
    unparsable: float = Field(1.0, ge=0, le=1, description="completions without an answer; 1: never stops")


class ScoringSection(Section):
    """How rewards are computed."""

    workers: Int = Field(0, ge=0, description="processes for isolated rewards; 0: one a core, shared by the ranks")
    memory_mb: Int = Field(2048, ge=64, description="memory of one of them")
    limits: LimitsSection = Field(
        default_factory=lambda: LimitsSection.model_validate({}), description="failures that stop a run"
    )


class CorrectionSection(Section):
    """Importance correction between the rollout's log-probs and the recomputed ones."""

    name: Literal["none", "truncated", "masked"] = Field(
        "none", description="weight old / rollout; truncated: at most the ceiling; masked: 0 beyond it or its inverse"
    )
    ceiling: float | None = Field(None, gt=0, description="largest weight; null: 2.0 where there is a correction")

    @model_validator(mode="after")
    def _ceiling(self) -> CorrectionSection:
        if self.name != "none" and self.ceiling is None:
            self.ceiling = 2.0
        return self


class ObjectiveSection(Section):
    """The policy-gradient objective; `method` fills what is not written here."""

    actions: list[Action] = Field(
        default_factory=lambda: list(TOKENS), min_length=1, description="what is trained: draws; a planner's choices"
    )
    estimator: Annotated[Part, InSlot("estimator")] = Field(description="which views of a rollout are scored")
    unit: Annotated[Part, InSlot("unit")] = Field(description="tokens that share one importance ratio")
    bound: Annotated[Part, InSlot("bound")] = Field(
        {"name": "sum"}, description="how the log-probs of a unit combine to the number whose change is its log-ratio"
    )
    surrogate: Annotated[Part, InSlot("surrogate")] = Field(description="loss of a ratio and an advantage")
    weight: Annotated[Part, InSlot("weight")] = Field(description="weight of each scored token")
    advantage: Annotated[Part, InSlot("advantage")] = Field(description="from the rewards of a group to advantages")
    divergence: Annotated[Part, InSlot("divergence")] = Field(
        {"name": "k3"}, description="estimate of KL to the reference"
    )
    beta: float = Field(0.0, ge=0, description="weight of the divergence; 0 needs no reference")
    over: Literal["token", "unit"] = Field(
        "token", description="token: divergence of each scored token; unit: of a unit's summed estimate, by its tokens"
    )
    divergence_weight: Annotated[Part, InSlot("weight")] | None = Field(
        None, description="weight of each scored token in the divergence; null: as `weight`"
    )
    reference: Literal["auto", "adapter_off", "frozen_copy", "old", "none"] = Field(
        "auto",
        description="auto: none at beta 0, else adapter_off with LoRA and frozen_copy without; old: the policy before "
        "the batch's first inner step",
    )
    correction: Annotated[CorrectionSection, BeforeValidator(named)] = Field(
        default_factory=lambda: CorrectionSection.model_validate({}),
        description="off-policy correction; unset: truncated, with old: recompute, where the sampler draws from other "
        "distributions than the policy (approximate cache, guidance, top_p)",
    )
    inner_steps: Int = Field(1, ge=1, description="optimizer steps on each batch of rollouts")
    redraw: bool = Field(False, description="draw the estimator's canvases anew for each inner step")
    old: Literal["rollout", "recompute", "none"] = Field(
        "rollout", description="where the ratio's denominator comes from; none: 1, for surrogates without a ratio"
    )
    chunk: Int = Field(32, ge=1, description="views of one training forward")
    ratio_limit: float | None = Field(
        1.0e4, gt=1, description="importance ratio of a unit beyond which the run stops; null: none"
    )


class OptimSection(Section):
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: hidden matrices by Muon, the rest by AdamW")
    lr: float = Field(gt=0, description="peak learning rate")
    matrix_lr: float = Field(0.02, gt=0, description="learning rate of the matrices that Muon steps")
    steps: Int = Field(ge=1, description="optimizer steps of the run")
    warmup: Int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="learning rate after the warm-up")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay, matrices only")
    betas: Annotated[tuple[float, float], Field(strict=False)] = Field((0.9, 0.99), description="AdamW's betas")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient norm is clipped to this; 0: not clipped")


class EvaluationSection(Section):
    """Held-out evaluation."""

    every: Int = Field(0, ge=0, description="optimizer steps between evaluations; 0: only before and after")
    problems: Int = Field(512, ge=1, description="held-out problems")
    temperature: float | None = Field(None, ge=0, description="temperature of the draw; null: the rollout's")
    sampler: SamplerSection | None = Field(None, description="changes to the rollout's sampler; null: none")


class RunSection(Section):
    """Seeds, checkpoints and logs."""

    seed: Int = Field(0, ge=0, description="seed of data, rollouts and initialisation")
    directory: str = Field("runs", min_length=1, description="folder that holds the run's folder")
    save_every: Int = Field(0, ge=0, description="optimizer steps between checkpoints; 0: only at the end")
    keep: Int = Field(2, ge=1, description="checkpoints kept on disk")
    report_to: Annotated[list[Tracker], BeforeValidator(listed)] = Field(
        default_factory=lambda: list(NO_TRACKER), description="trackers besides metrics.jsonl"
    )
    log_rollouts_every: Int = Field(10, ge=0, description="batches between stored rollouts (parquet); 0: never")


class Recipe(Section):
    """One reinforcement-learning run."""

    kind: Literal["rl"] = Field("rl", description="rl here; sft for the supervised stage")
    name: RunName = Field(description="name of the run and of its folder")
    model: ModelSection = Field(description="the denoiser")
    task: Annotated[Part, InSlot("task")] = Field(description="problems")
    rollout: RolloutSection = Field(description="one batch of rollouts")
    exploration: ExplorationSection = Field(
        default_factory=lambda: ExplorationSection.model_validate({}),
        description="what is done for groups that failed, or that tell nothing; a method may fill it",
    )
    rewards: list[Annotated[RewardEntry, InSlot("reward"), BeforeValidator(named)]] = Field(
        min_length=1, description="rewards and their weights"
    )
    scoring: ScoringSection = Field(
        default_factory=lambda: ScoringSection.model_validate({}), description="pool and limits of the rewards"
    )
    allow_code_execution: bool = Field(False, description="rewards may run model-written code in a sandbox")
    method: str | None = Field(None, description="row of methods.yaml that fills `objective` (unmask methods)")
    objective: ObjectiveSection = Field(description="the objective; wins over the method's row")
    value: ValueSection | None = Field(
        None, description="the value model that advantages of tokens come from; null: none, a method may fill it"
    )
    planner: PlannerSection | None = Field(None, description="the unmasking policy that is trained; null: none")
    optim: OptimSection = Field(description="optimizer")
    evaluation: EvaluationSection = Field(
        default_factory=lambda: EvaluationSection.model_validate({}), description="held-out evaluation"
    )
    alarms: AlarmsSection = Field(
        default_factory=lambda: AlarmsSection.model_validate({}), description="what a run that goes wrong says"
    )
    run: RunSection = Field(
        default_factory=lambda: RunSection.model_validate({}), description="seeds, checkpoints, logs"
    )


class InitSection(Section):
    """A new model in LLaDA's shape with the byte tokenizer."""

    hidden_size: Int = Field(ge=2, description="width of the residual stream")
    layers: Int = Field(ge=1, description="transformer blocks")
    heads: Int = Field(ge=1, description="attention heads")
    mlp: Int = Field(ge=1, description="inner width of the MLP")
    max_length: Int = Field(512, ge=8, description="longest prompt and completion together")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary embedding")


class SftModelSection(Section):
    """The denoiser of the supervised stage: a checkpoint, or a new model."""

    path: str | None = Field(None, min_length=1, description="folder, hub id or `unmask:tiny`; null with `init`")
    init: InitSection | None = Field(None, description="sizes of a new model; null with `path`")
    family: str | None = Field(None, description="checkpoint layout; null: recognised by config.json")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the weights")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto: cuda if there is one")
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        None, description="attention kernel; null: sdpa"
    )
    mask_token_id: TokenId | None = Field(None, description="mask id; null: config.json's, else the tokenizer's")
    block_length: Count | None = Field(None, description="block of a block-causal family; null: config.json's")


class SftTask(Section):
    """One task of the mixture."""

    task: Annotated[Part, InSlot("task")] = Field(description="problems with worked references")
    canvas: Int = Field(ge=1, description="completion positions of a full canvas")
    weight: float = Field(1.0, gt=0, description="share of the batches")
    start: float = Field(0.0, ge=0, lt=1, description="share of the steps after which the task joins the mixture")
    reward: Annotated[Part, InSlot("reward")] | None = Field(
        None, description="what scores held-out completions; null: the reward with the task's name"
    )


class SftSection(Section):
    """The masked-diffusion cross-entropy."""

    batch: Int = Field(64, ge=1, description="rows an optimizer step, all ranks together")
    mask: Literal["exact", "bernoulli", "late"] = Field(
        "exact", description="exact: k ~ U{1..L} hidden; bernoulli: each with t; late: exact, later tokens likelier"
    )
    half_life: float = Field(0.1, gt=0, description="late: share of canvas or block over which odds double at t = 0")
    full_canvas: float = Field(0.3, ge=0, le=1, description="share of batches padded to the whole canvas with EOS")
    long: str = Field(
        "refuse",
        pattern=r"^(refuse|drop|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
        description="solutions beyond the task's canvas: refuse stops where one does not fit; drop takes another row; "
        "`package.module:function` (row, canvas) returns a shorter text",
    )
    autocast: bool = Field(False, description="forward in bfloat16, weights in model.dtype: faster on GPUs, AMX")


class SftEvaluationSection(Section):
    """Held-out evaluation of each task."""

    every: Int = Field(0, ge=0, description="optimizer steps between evaluations; 0: only after")
    problems: Int = Field(256, ge=1, description="held-out problems of each task")
    temperature: float = Field(0.0, ge=0, description="temperature of the draw; 0: the likeliest token")
    sampler: SamplerSection = Field(
        default_factory=lambda: SamplerSection.model_validate(
            {"schedule": {"name": "blocks", "size": 16, "per_step": 1}}
        ),
        description="sampler of the evaluation (default: blocks of 16, one token a step)",
    )


class SftRecipe(Section):
    """One supervised run."""

    kind: Literal["sft"] = Field(description="sft: the supervised stage")
    name: RunName = Field(description="name of the run and of its folder")
    model: SftModelSection = Field(description="the denoiser")
    tasks: list[SftTask] = Field(min_length=1, description="mixture of tasks")
    sft: SftSection = Field(default_factory=lambda: SftSection.model_validate({}), description="loss and batches")
    optim: OptimSection = Field(description="optimizer")
    allow_code_execution: bool = Field(False, description="rewards may run model-written code in a sandbox")
    evaluation: SftEvaluationSection = Field(
        default_factory=lambda: SftEvaluationSection.model_validate({}), description="held-out evaluation"
    )
    run: RunSection = Field(
        default_factory=lambda: RunSection.model_validate({}), description="seeds, checkpoints, logs"
    )
