"""The recipe's section of a learned unmasking policy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .sections import Count, InSlot, Int, Part, Section


class ExpertSection(Section):
    """Rollouts that a confidence threshold drives, from which the planner learns."""

    levels: list[float] = Field(min_length=1, description="thresholds in (0, 1], an expert rollout a group for each")
    block: Count | None = Field(None, description="the expert decodes in blocks of this size; null: the canvas")
    warmup: Int = Field(0, ge=0, description="batches that the expert drives alone and the planner imitates")
    by_alpha: bool = Field(
        False,
        description="warmup: each rollout is told a trade-off of its own, whose threshold lies between the levels, the "
        "first for the lowest alpha",
    )
    labels: Literal["choices", "final"] = Field(
        "choices",
        description="imitated are the expert's choices; final: which likeliest tokens are those of the end (Learn2PD)",
    )
    steering: Literal["none", "cloning", "mixture"] = Field(
        "none", description="after them: cloning of its better rollouts; mixture: as published"
    )
    weight: float = Field(1.0, ge=0, description="cloning: weight of A+ log p(expert's choices)")
    anneal: Int = Field(0, ge=0, description="cloning: batches over which the weight falls to 0; 0: it stays")


class PlannerSection(Section):
    """The unmasking policy that a run trains (objective.actions: [positions]; with tokens beside: the denoiser too)."""

    path: str | None = Field(None, min_length=1, description="a trained planner to go on from; null: a new one")
    network: Literal["transformer", "linear", "hidden"] = Field(
        "transformer", description="one adaLN block; linear: a baseline; hidden: UPO's head on hidden states"
    )
    distribution: Literal["bernoulli", "plackett_luce", "count", "categorical", "remasking", "blocks"] = Field(
        "bernoulli",
        description="each position by itself; in order with a stop; a number first; one a step; with remasking; "
        "blocks: no positions, but where each block ends (schedule planned)",
    )
    fallback: Literal["sampled", "argmax", "none"] = Field(
        "sampled", description="bernoulli: what an empty draw opens; none: nothing, which costs a call"
    )
    counts: list[Int] = Field([1, 2, 4, 8, 16, 32], min_length=1, description="count: numbers of positions")
    features: list[str] | None = Field(None, min_length=1, description="what it sees; null: all (rollouts/features.py)")
    width: Int = Field(128, ge=2, description="width of the transformer")
    heads: Int = Field(2, ge=1, description="its attention heads")
    mlp: Int = Field(512, ge=1, description="inner width of its MLP")
    time: Literal["true", "published"] = Field("true", description="encoding of the step; published: of period 1")
    bias: float = Field(-2.0, description="logit of every position before training")
    budget: Int = Field(4, ge=1, description="remasking: most tokens taken back a step, always fewer than it opens")
    back_bias: float = Field(-6.0, description="remasking: logit of taking a token back before training")
    lengths: list[Int] = Field([4, 8, 16, 32], min_length=1, description="blocks: lengths that a block may have")
    past: Int = Field(4, ge=0, description="blocks: of so many last blocks the pooled hidden states are read; 0: none")
    speed: Annotated[Part, InSlot("speed")] = Field(
        {"name": "multiplicative"}, description="reward of a correct answer by its calls"
    )
    alpha: float | Annotated[tuple[float, float], Field(strict=False)] = Field(
        1.0, description="trade-off of speed: a number, or [low, high] drawn a group and told to the planner"
    )
    target_nfe: float | None = Field(None, gt=0, description="calls a rollout; alpha then follows by dual ascent")
    dual_rate: float = Field(0.1, gt=0, description="target_nfe: change of alpha for calls e times the target")
    expert: ExpertSection | None = Field(None, description="threshold rollouts to imitate; null: none")
    order: Annotated[Part, InSlot("order")] | None = Field(
        None, description="categorical: the order that the planner is held to; null: none"
    )
    shortlist: Int = Field(0, ge=0, description="categorical: only so many most confident positions compete; 0: all")
    pull: float = Field(1e-4, ge=0, description="weight of its divergence from that order")
    lr: float | None = Field(
        None, gt=0, description="its learning rate where the denoiser is trained too, at optim.lr; null: the same"
    )
    entropy: float = Field(0.0, ge=0, description="weight of the entropy of a choice; only after a warm start")
    chunk: Int = Field(64, ge=1, description="steps of one training forward")
