"""The recipe of a preference run: pairs of completions, and the loss that favours one of each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .registry import RecipeError
from .schema import ModelSection, OptimSection, RunSection
from .sections import Int, RunName, Section


class PairsSection(Section):
    """Where the pairs come from: a file, or the stored rollouts of a run."""

    file: str | None = Field(None, description="JSON lines with prompt, chosen and rejected; null with `run`")
    run: str | None = Field(
        None, description="folder of a run: the best against the worst stored rollout of a group; null with `file`"
    )
    margin: float = Field(0.0, ge=0, description="run: rewards of a pair differ by more than this")
    most: Int = Field(1, ge=1, description="run: pairs of a group at most")
    canvas: Int = Field(ge=1, description="longest completion in tokens, end included; longer ones are refused")


class PreferenceSection(Section):
    """VRPO: DPO on estimates of the ELBO, on masks that policy and reference share (LLaDA 1.5)."""

    batch: Int = Field(64, ge=1, description="pairs an optimizer step, all ranks together")
    beta: float = Field(0.2, gt=0, description="weight of the difference of log-ratios")
    draws: Int = Field(8, ge=1, description="canvases of each completion, one mask each")
    per_token: bool = Field(False, description="divide each ELBO by its number of tokens")
    sft: float = Field(0.05, ge=0, description="weight of the chosen completion's likelihood, a token")
    chunk: Int = Field(32, ge=1, description="canvases of one training forward")
    reference: Literal["auto", "adapter_off", "frozen_copy"] = Field(
        "auto", description="auto: adapter_off with LoRA and frozen_copy without"
    )


class PreferenceRecipe(Section):
    """One preference run."""

    kind: Literal["preference"] = Field(description="preference: learning from pairs")
    name: RunName = Field(description="name of the run and of its folder")
    model: ModelSection = Field(description="the denoiser")
    pairs: PairsSection = Field(description="pairs of completions")
    preference: PreferenceSection = Field(
        default_factory=lambda: PreferenceSection.model_validate({}), description="the loss and its estimate"
    )
    optim: OptimSection = Field(description="optimizer")
    run: RunSection = Field(
        default_factory=lambda: RunSection.model_validate({}), description="seeds, checkpoints, logs"
    )


def check_preference(recipe: PreferenceRecipe) -> None:
    """Raise RecipeError where a preference recipe contradicts itself."""
    if (recipe.pairs.file is None) == (recipe.pairs.run is None):
        state = "neither is there" if recipe.pairs.file is None else "both are there"
        raise RecipeError(f"pairs: needs exactly one of file and run; {state}.")
    if recipe.preference.reference == "adapter_off" and recipe.model.lora is None:
        raise RecipeError("preference.reference: adapter_off needs model.lora; use frozen_copy without an adapter.")
    if recipe.model.sharding != "none":
        raise RecipeError("model.sharding: preference runs hold whole models; set it to none.")
