"""What the typed sections of a recipe are made of, and the section of the sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MARK = "unmask-slot"


@dataclass(frozen=True)
class InSlot:
    """Marks a field, or the items of a list, as parts of the slot called `slot`."""

    slot: str

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Leave the slot's name in the JSON schema, where `recipes.editor` puts the parts."""
        return {MARK: self.slot}


def whole(value: Any) -> Any:
    """Return 1000.0 as 1000 (YAML reads 1e3 as a float); everything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def named(value: Any) -> Any:
    """Return the part `name` as `{"name": name}`; everything else unchanged."""
    return {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else value


def listed(value: Any) -> Any:
    """Return one string as a list of it."""
    return [value] if isinstance(value, str) else value


Int = Annotated[int, BeforeValidator(whole)]
TokenId = Annotated[int, Field(ge=0), BeforeValidator(whole)]
Count = Annotated[int, Field(ge=1), BeforeValidator(whole)]
Part = Annotated[dict[str, Any], BeforeValidator(named)]
Tracker = Literal["none", "tensorboard", "wandb", "trackio", "mlflow", "swanlab", "comet_ml", "clearml"]
NO_TRACKER: list[Tracker] = ["none"]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=False)


class EosSection(Section):
    """What an end-of-sequence token does to a rollout."""

    rule: Literal["stop", "none"] = Field(
        "stop", description="stop: a row ends with its first EOS; none: the canvas is filled"
    )
    suppress: bool = Field(False, description="EOS is never drawn, so every completion fills its canvas")


class ExplorationSection(Section):
    """What is done for groups that failed, or that tell nothing."""

    hints: Annotated[Part, InSlot("exploration")] | None = Field(
        None, description="what is done for a group whose rollouts are all wrong; null: nothing"
    )
    filter: Annotated[Part, InSlot("filter")] | None = Field(
        None, description="which groups are learnt from; null: all. Another has no gradient and no weight"
    )
    refills: Int = Field(0, ge=0, description="new problems, at most, for a group that `filter` refuses")
    successes: Int = Field(
        0, ge=0, description="problems whose latest right rollout is kept, for a group of theirs that fails; 0: none"
    )


class ValueSection(Section):
    """The value model, which gives every token an advantage of its own."""

    network: Literal["copy", "head"] = Field(
        "copy",
        description="copy: the denoiser once more, trained like the policy, with a scalar head; head: that head alone, "
        "on the policy's hidden states, which it does not change",
    )
    discount: float = Field(1.0, gt=0, le=1, description="factor of the return for each denoising step in between")
    decay: float = Field(1.0, ge=0, le=1, description="GAE's lambda; 1: reward less value, 0: one step ahead")
    clip: float = Field(0.2, gt=0, description="how far a value may move on a batch before its loss stops it")
    lr: float = Field(5.0e-6, gt=0, description="learning rate of the value model (AdamW, constant)")
    updates: Int = Field(1, ge=1, description="optimizer steps of the value model on each batch, before the policy's")


class Alarm(Section):
    """One alarm."""

    stop: bool = Field(False, description="stop the run; false: warn")


class GamingAlarm(Alarm):
    """Rewards of the rollouts rise while a held-out truth falls."""

    evaluations: Int = Field(3, ge=2, description="evaluations, the last of which is compared with the first")
    errors: float = Field(2.0, ge=0, description="standard errors beyond which a change counts")


class EntropyAlarm(Alarm):
    """Entropy stays low."""

    below: float = Field(1.0e-3, gt=0, description="mean entropy of scored tokens, in nats")
    updates: Int = Field(5, ge=1, description="updates in a row")


class EmptyAlarm(Alarm):
    """Completions say nothing."""

    above: float = Field(0.5, ge=0, lt=1, description="share of rollouts that are EOS alone, or blank")
    batches: Int = Field(3, ge=1, description="batches in a row")


class SilentAlarm(Alarm):
    """Groups do not tell their rollouts apart."""

    above: float = Field(0.95, ge=0, lt=1, description="share of rollouts of advantage 0")
    batches: Int = Field(10, ge=1, description="batches in a row")


class AlarmsSection(Section):
    """What a run that goes wrong says; null switches an alarm off."""

    gaming: GamingAlarm | None = Field(
        default_factory=lambda: GamingAlarm.model_validate({}),
        description="rewards of the rollouts rise while a held-out truth (without one: the exact rate) falls",
    )
    entropy: EntropyAlarm | None = Field(
        default_factory=lambda: EntropyAlarm.model_validate({}), description="the policy has stopped exploring"
    )
    empty: EmptyAlarm | None = Field(
        default_factory=lambda: EmptyAlarm.model_validate({}), description="completions end before they begin"
    )
    silent: SilentAlarm | None = Field(
        default_factory=lambda: SilentAlarm.model_validate({}), description="nothing is left to learn from"
    )


class SamplerSection(Section):
    """How a canvas is unmasked."""

    preset: str | None = Field(
        None, description="row of samplers.yaml that fills what is not written (`unmask samplers`)"
    )
    schedule: Annotated[Part, InSlot("schedule")] = Field(description="which positions are open and how many to decide")
    score: Annotated[Part, InSlot("score")] = Field({"name": "confidence"}, description="how open positions are ranked")
    selection: Annotated[Part, InSlot("selection")] = Field({"name": "top"}, description="which of them are decided")
    remasking: Annotated[Part, InSlot("remasking")] | None = Field(None, description="which decided tokens reopen")
    editing: Annotated[Part, InSlot("editing")] | None = Field(None, description="which decided tokens are replaced")
    length: Annotated[Part, InSlot("length")] | None = Field(None, description="how the canvas changes its length")
    transforms: list[Annotated[Part, InSlot("transform")]] = Field(
        default_factory=list, description="what is done to logits first, in this order"
    )
    cache: Annotated[Part, InSlot("cache")] | None = Field(
        None, description="which keys and values are kept between steps; null: none, every step computes all"
    )
    score_temperature: float = Field(1.0, gt=0, description="temperature of the distribution that scores see")
    top_p: float = Field(1.0, gt=0, le=1, description="smallest mass of likeliest tokens that the draw keeps")
    top_k: Int = Field(0, ge=0, description="number of likeliest tokens that the draw keeps; 0: all")
    guidance: float = Field(
        0.0, ge=0, description="classifier-free guidance: weight of a second call without the prompt"
    )
    max_steps: Count | None = Field(None, description="steps after which all is decided; null: four a position")
    exact: bool = Field(
        True, description="record the log-prob of positions that drawn tokens decide; false: the naive sum over tokens"
    )
    eos: EosSection = Field(
        default_factory=lambda: EosSection.model_validate({}), description="rules for end-of-sequence tokens"
    )
