"""The unmasking policy: features of a canvas to one distribution over positions, for rollout, loss and evaluation."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..recipes.registry import RecipeError, nearest
from .planner_blocks import INSIDE, Pooled, check_blocks, ends
from .planner_distributions import FALLBACKS, Bernoulli, Categorical, Count, Distribution, PlackettLuce
from .planner_networks import Hidden, Linear, Transformer
from .planner_remasking import MOST, Remasking

logger = logging.getLogger(__name__)
# In `rollouts.features`, which computes them.
FEATURES = (
    "odds",
    "margin",
    "entropy",
    "eos",
    "persistence",
    "frontier",
    "candidate",
    "masked",
    "time",
    "left",
    "alpha",
)
# Of decided tokens, which a planner that takes some back looks at besides.
STANDING_FEATURES = ("standing", "current")
NETWORKS = ("transformer", "linear", "hidden")
DISTRIBUTIONS = ("bernoulli", "plackett_luce", "count", "categorical", "remasking", "blocks")
FILE = "planner.safetensors"


@dataclass(frozen=True)
class PlannerSpec:
    """What a planner is: its features by name, network, distribution and sizes; RecipeError for impossible ones.

    `shortlist` keeps the candidates to so many of the most confident (0: all); `hidden` is the width of the denoiser's
    hidden states, which network `hidden` reads (0: none). With distribution `remasking`, `budget` is the most tokens
    that a step takes back, and `back_bias` the logit of taking one back before training, as `bias` is that of opening.
    With distribution `blocks` it chooses no positions but the end of the next block, from `lengths`, and reads the
    hidden states of the last `past` blocks (0: none).
    """

    features: tuple[str, ...] = FEATURES
    network: Literal["transformer", "linear", "hidden"] = "transformer"
    distribution: Literal["bernoulli", "plackett_luce", "count", "categorical", "remasking", "blocks"] = "bernoulli"
    fallback: Literal["sampled", "argmax", "none"] = "sampled"
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    width: int = 128
    heads: int = 2
    mlp: int = 512
    time: Literal["true", "published"] = "true"
    bias: float = -2.0
    budget: int = 4
    back_bias: float = -6.0
    shortlist: int = 0
    hidden: int = 0
    lengths: tuple[int, ...] = (4, 8, 16, 32)
    past: int = 4

    def __post_init__(self) -> None:
        for name, value, allowed in (
            *(("features", feature, (*FEATURES, *STANDING_FEATURES)) for feature in self.features),
            ("network", self.network, NETWORKS),
            ("distribution", self.distribution, DISTRIBUTIONS),
            ("fallback", self.fallback, FALLBACKS),
            ("time", self.time, ("true", "published")),
        ):
            if value not in allowed:
                raise RecipeError(f"planner.{name}: unknown '{value}'.{nearest(value, list(allowed))}")
        if self.sizes:
            check_blocks(self)
        elif (self.network == "hidden") != (self.hidden > 0):
            raise RecipeError("planner.hidden: network 'hidden' reads as many numbers a position; others read none.")
        if self.shortlist < 0 or (self.shortlist and self.distribution != "categorical"):
            raise RecipeError(f"planner.shortlist: {self.shortlist} must be 0, or above it with categorical choices.")
        if not self.hidden and not set(self.features) - {"masked", "time", "left", "alpha"}:
            raise RecipeError("planner.features: none of them tells positions apart; add odds, for one.")
        if not self.counts or self.counts[0] != 1 or list(self.counts) != sorted(set(self.counts)):
            raise RecipeError(f"planner.counts: {list(self.counts)} must begin with 1 and rise.")
        if not self.remasks and set(self.features) & set(STANDING_FEATURES):
            raise RecipeError(
                f"planner.features: {', '.join(STANDING_FEATURES)} tell of decided tokens; use distribution remasking."
            )
        if not 1 <= self.budget <= MOST:
            raise RecipeError(f"planner.budget: {self.budget} must lie between 1 and {MOST} tokens a step.")
        if self.heads < 1 or self.width % (2 * self.heads):
            raise RecipeError(f"planner.heads: {self.heads} heads do not divide width {self.width} into even widths.")

    @property
    def remasks(self) -> bool:
        """Whether the planner takes tokens back."""
        return self.distribution == "remasking"

    @property
    def sizes(self) -> bool:
        """Whether the planner chooses lengths of blocks, and no positions."""
        return self.distribution == "blocks"

    @property
    def heads_out(self) -> tuple[int, ...]:
        """The numbers that a head of the network's own has a logit for."""
        return self.counts if self.distribution == "count" else self.lengths if self.sizes else ()

    @staticmethod
    def of(values: Mapping[str, Any]) -> PlannerSpec:
        """Return the spec of a recipe's `planner` section or of a file; other keys are not read.

        Features that are None are all that the distribution has a use for.
        """
        known = {field.name: values[field.name] for field in fields(PlannerSpec) if field.name in values}
        if known.get("features", ()) is None:
            kind = known.get("distribution")
            known["features"] = FEATURES + (STANDING_FEATURES if kind == "remasking" else ())
            if kind == "blocks":
                known["features"] = tuple(name for name in FEATURES if name not in INSIDE)
        lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return PlannerSpec(**(known | lists))


@dataclass(frozen=True)
class Planner:
    """A network with its spec; `fingerprint` is that of the denoiser it was trained on ("" for none)."""

    spec: PlannerSpec
    network: torch.nn.Module
    fingerprint: str = ""

    def distribution(
        self,
        feature_BLF: Tensor,
        candidate_BL: Tensor,
        standing_BL: Tensor | None = None,
        *,
        past_BMD: Tensor | None = None,
        temperature: float | Tensor = 1.0,
    ) -> Distribution:
        """Return the distribution over `candidate_BL`; `temperature` (a number, or one a row `[B, 1]`) divides logits.

        `standing_BL` are the tokens that a planner with distribution `remasking` may take back, `past_BMD` the states
        of the last blocks that one with distribution `blocks` reads. Rollout, loss and evaluation all use this one:
        what is trained is what was sampled.
        """
        spec = self.spec
        logit_BL, count_BC = self.network(feature_BLF) if past_BMD is None else self.network(feature_BLF, past_BMD)
        if spec.remasks:
            assert standing_BL is not None, "a planner that takes tokens back is told which"
            logit_BL = logit_BL + (spec.back_bias - spec.bias) * standing_BL
            return Remasking(logit_BL / temperature, candidate_BL, standing_BL, spec.budget)
        return self.of_logits(
            logit_BL / temperature, candidate_BL, None if count_BC is None else count_BC / temperature
        )

    def of_logits(self, logit_BL: Tensor, candidate_BL: Tensor, count_BC: Tensor | None = None) -> Distribution:
        """Return the spec's distribution of given logits, for planners that take nothing back."""
        spec = self.spec
        if spec.distribution == "bernoulli":
            return Bernoulli(logit_BL, candidate_BL, spec.fallback)
        if spec.distribution == "plackett_luce":
            return PlackettLuce(logit_BL, candidate_BL)
        if spec.distribution == "categorical":
            return Categorical(logit_BL, candidate_BL)
        assert count_BC is not None, "a planner that counts has a head for it"
        if spec.sizes:
            return ends(logit_BL, candidate_BL, count_BC, spec.lengths)
        return Count(logit_BL, candidate_BL, count_BC, spec.counts)

    def save(self, directory: str | Path, **notes: Any) -> Path:
        """Write weights, spec, fingerprint and `notes` as one safetensors file; returns its path."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        about = {"spec": asdict(self.spec), "fingerprint": self.fingerprint, "notes": notes}
        save_file(state, folder / FILE, metadata={"planner": json.dumps(about, sort_keys=True)})
        return folder / FILE


def new_planner(spec: PlannerSpec, *, seed: int = 0, fingerprint: str = "") -> Planner:
    """Return an untrained planner; one that counts begins slowly."""
    counts = len(spec.heads_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"width": spec.width, "heads": spec.heads, "mlp": spec.mlp}
        start: dict[str, Any] = {"counts": counts, "bias": spec.bias}
        if spec.network == "linear":
            network: torch.nn.Module = Linear(spec.features, **start)
        elif spec.network == "hidden":
            network = Hidden(spec.features, hidden=spec.hidden, **sizes, **start)
        else:
            everywhere = spec.distribution == "remasking"
            network = Transformer(spec.features, time=spec.time, everywhere=everywhere, **sizes, **start)
        if spec.sizes:
            # From equal chances: which of the lengths is the slow, sure one depends on what happens inside.
            network.get_parameter("count.bias").data.zero_()
            if spec.past:
                network = Pooled(network, past=spec.past, hidden=spec.hidden, lengths=counts)
        elif counts:
            # Slow at first, as a negative bias makes independent positions: each doubling is e times less likely. From
            # equal chances the slow, sure numbers would die out before their small advantage is learnt.
            network.get_parameter("count.bias").data.copy_(-torch.tensor(spec.counts).log2())
    return Planner(spec, network, fingerprint)


def read_planner(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `Planner.save` wrote: spec, fingerprint and notes, and the weights."""
    with safe_open(file, framework="pt") as opened:
        about: dict[str, Any] = json.loads(opened.metadata()["planner"])
        return about, {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def load_planner(path: str | Path, *, fingerprint: str | None = None) -> Planner:
    """Return the planner of a file, or of the folder that holds it or a run's `planner`.

    Raises RecipeError when there is none or it is damaged; another `fingerprint` than the one it was trained with is a
    warning, since a policy of confidences may serve another denoiser.
    """
    found = [Path(path), Path(path) / FILE, Path(path) / "planner" / FILE]
    file = next((candidate for candidate in found if candidate.is_file()), None)
    if file is None:
        raise RecipeError(f"planner: '{path}' holds no {FILE}; name a trained planner's folder, or its run's.")
    try:
        about, state = read_planner(file)
        planner = new_planner(PlannerSpec.of(about["spec"]), fingerprint=about["fingerprint"])
        planner.network.load_state_dict(state)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
        raise RecipeError(f"planner: '{file}' is damaged ({type(error).__name__}: {error}).") from error
    planner.network.eval().requires_grad_(False)
    if fingerprint is not None and planner.fingerprint not in ("", fingerprint):
        logger.warning(
            "planner: '%s' was trained with denoiser %s, this one is %s; confidences may mean something else.",
            file,
            planner.fingerprint,
            fingerprint,
        )
    return planner


def fingerprint_of(denoiser: Any) -> str:
    """Return 16 hex digits that tell a base model: its family, sizes, and a few entries of its embedding.

    Adapters, dtype and quantisation do not change it.
    """
    table = denoiser.base.get_input_embeddings().weight
    entries = table[: min(64, len(table)), :8].detach().to("cpu", torch.bfloat16).float().tolist()
    text = json.dumps([denoiser.family.name, list(table.shape), entries])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
