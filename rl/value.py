"""TraceRL's diffusion value model: what a rollout will be worth, told at every token of every step it saw."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..policies.denoiser import Denoiser
from ..recipes.registry import RecipeError
from ..rollouts.forward import LogitSource, window_logits
from ..rollouts.sampler import Sampler
from ..rollouts.trajectory import Trajectory
from .credit import Credit
from .distributed import rank, reduce_gradients, total
from .losses import NonFiniteError
from .objective import Objective
from .optimizers import build_optimizer
from .replay import chunks
from .returns import step_targets, value_loss
from .sharding import whole
from .surprise import weigh
from .views import Views

NETWORKS = ("copy", "head")
FILE = "value.safetensors"  # of a checkpoint: what is trained, and the optimizer's tensors


@dataclass(frozen=True)
class ValueSettings:
    """How a value model is built and trained; the fields are those of a recipe's `value` section."""

    network: str = "copy"
    discount: float = 1.0
    decay: float = 1.0
    clip: float = 0.2
    lr: float = 5e-6
    updates: int = 1

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise RecipeError(f"value.network: '{self.network}' is not one of {', '.join(NETWORKS)}.")


class ValueNetwork(nn.Module):
    """A linear head without bias, 0 at first, on hidden states of a `trunk` of its own or, without, of the policy."""

    def __init__(self, width: int, trunk: nn.Module | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, 1, bias=False, dtype=dtype)
        nn.init.zeros_(self.head.weight)


@dataclass
class Critic:
    """The value model with its optimizer; gives tokens their advantages and learns the returns of their batch.

    V_j is the head's value of the hidden state at token j's position on the canvas that its step saw, so it knows what
    was decided before, and not what j became. Before the policy's first update on a batch, advantages and returns are
    taken from the values as they are (`returns.step_targets`), and `updates` optimizer steps are made on

        1/mass sum_j w_j value_loss(V_j, V_j before the batch, R_j)

    with weights and mass of the objective. `own` is the denoiser around the network's trunk, whose logits are hidden
    states; None where the policy's are read, without gradient.
    """

    network: ValueNetwork
    settings: ValueSettings
    optimizer: torch.optim.Optimizer
    own: LogitSource | None = None
    max_grad_norm: float = 1.0
    metrics: dict[str, float] = field(default_factory=dict)

    def credit(
        self, policy: Any, objective: Objective, trajectory: Trajectory, credit: Credit, sampler: Sampler
    ) -> Credit:
        """Return the advantages of tokens for the rewards `credit` of rollouts, and learn from the batch.

        A rollout whose reward does not apply (NaN) teaches nothing. `metrics` then holds `value/loss` of the first
        update, `value/explained_variance` 1 - Var(R - V) / Var(R) of the values before it, over all tokens of all ranks
        (0 where all returns are equal), and `value/mean`. Every rank must call this. Raises RecipeError for credit that
        tells steps apart, NonFiniteError for a gradient that is not finite.
        """
        if credit.by != "rollout":
            raise RecipeError("value: it values rollouts, the advantage tells steps apart; name another.")
        views = objective.estimator(trajectory, rng=None, context=sampler, inner_step=(0, 1))
        with whole(policy):  # once for all: ranks have different numbers of chunks
            return self._learnt(policy, objective, views, credit)

    def _learnt(self, policy: Any, objective: Objective, views: Views, credit: Credit) -> Credit:
        """Return the advantages of the views' tokens, and make the batch's optimizer steps."""
        views, weight_K, mass_B = weigh(objective.weight, policy, views, objective.chunk)
        applies_B = credit.applies_B
        kept_N = applies_B[views.row_N]
        weight_K, views = weight_K[kept_N[views.view_K]], views.where(kept_N)
        mass = total(float((mass_B * applies_B).double().sum())) or 1.0
        with torch.no_grad():
            old_K = self.values(policy, views, objective.chunk)
        found = step_targets(
            old_K,
            credit.value.nan_to_num(0.0),
            views.row_K,
            _steps(views),
            discount=self.settings.discount,
            decay=self.settings.decay,
        )
        self.metrics = _fit(old_K.double(), found.return_K)
        return_K = found.return_K.to(old_K.dtype)
        for update in range(self.settings.updates):
            loss = self._update(policy, views, weight_K / mass, old_K, return_K, objective.chunk)
            if update == 0:
                self.metrics["value/loss"] = loss
        advantage_BL = credit.value.new_full(views.trajectory.tokens_BL.shape, torch.nan)
        advantage_BL[views.row_K, views.position_K] = found.advantage_K.to(advantage_BL.dtype)
        return Credit(advantage_BL, by="position")

    def values(self, policy: Any, views: Views, chunk: int) -> Tensor:
        """Return `value_K` of all scored tokens, `chunk` views a forward."""
        parts = [self._values(policy, views.part(start, stop)) for start, stop in chunks(views, chunk)]
        return torch.cat(parts) if parts else self.network.head.weight.new_zeros(0)

    def _values(self, policy: Any, views: Views) -> Tensor:
        """Return `value_K` of the scored tokens of some views, differentiable in what is trained."""
        if self.own is not None:
            hidden_KD = _hidden(self.own, views)
        else:
            with torch.no_grad():
                hidden_KD = _hidden(replace(policy, output=nn.Identity()), views)
        return self.network.head(hidden_KD).squeeze(1)

    def _update(self, policy: Any, views: Views, share_K: Tensor, old_K: Tensor, return_K: Tensor, chunk: int) -> float:
        """Make one optimizer step on a batch and return the loss before it, over all ranks."""
        self.optimizer.zero_grad()
        loss = old_K.new_zeros(())
        for start, stop in chunks(views, chunk):
            kept_K = views.tokens(start, stop)
            value_K = self._values(policy, views.part(start, stop))
            lost_K = value_loss(value_K, old_K[kept_K], return_K[kept_K], clip=self.settings.clip)
            part = torch.dot(share_K[kept_K].to(lost_K.dtype), lost_K)
            part.backward()
            loss += part.detach()
        reduce_gradients(self.network.parameters(), average=False)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.max_grad_norm or math.inf)
        if not bool(norm.isfinite()):
            raise NonFiniteError(
                f"value: the norm of its gradient is {norm.item()}; nothing was stepped. Lower value.lr, and resume "
                "from the last checkpoint."
            )
        self.optimizer.step()
        return total(loss.item())

    def save(self, folder: Path) -> None:
        """Write what is trained and the optimizer's tensors into a checkpoint; all ranks hold the same, one writes."""
        if rank() != 0:
            return
        tensors = {}
        for name, parameter in self._trained():
            tensors[f"{name}/weight"] = parameter.detach()
            tensors |= {f"{name}/{key}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, bit for bit."""
        named = dict(self._trained())
        with torch.no_grad(), safe_open(folder / FILE, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                name, _, kind = key.rpartition("/")
                parameter, value = named[name], file.get_tensor(key)
                if kind == "weight":
                    parameter.copy_(value)
                else:  # a count of steps stays on the CPU, where Adam keeps it
                    moved = value.to(parameter.device) if value.shape == parameter.shape else value
                    self.optimizer.state[parameter][kind] = moved

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]


def build_critic(
    settings: ValueSettings | None, denoiser: Denoiser, optim: Mapping[str, Any], max_grad_norm: float
) -> Critic | None:
    """Return the critic of a policy, None without settings.

    `copy` starts from the denoiser as it is and trains what the policy trains, all weights or an adapter, without LM
    head; `head` reads the policy's own hidden states. The optimizer is AdamW without decay, with the policy's betas.
    """
    if settings is None:
        return None
    width, own, trunk = denoiser.base.config.hidden_size, None, None
    if settings.network == "copy":
        trunk = copy.deepcopy(denoiser.model).eval()
        own = replace(denoiser, model=trunk, output=nn.Identity(), root=None)
        own.base.set_output_embeddings(nn.Identity())
    network = ValueNetwork(width, trunk).to(denoiser.device)
    betas = tuple(optim.get("betas", (0.9, 0.999)))
    optimizer = build_optimizer(network.named_parameters(), lr=settings.lr, betas=betas)
    return Critic(network, settings, optimizer, own, max_grad_norm)


def _hidden(source: LogitSource, views: Views) -> Tensor:
    """Return the hidden states `[K, D]` at the scored tokens."""
    mask_NQ = views.trajectory.prompt_mask_BQ[views.row_N]
    clean = views.finished() if views.clean else None
    exists = views.exists()
    return window_logits(source, views.prompts(), mask_NQ, views.canvas(), views.scored(), exists, clean_BL=clean)


def _steps(views: Views) -> Tensor:
    """Return the step of each scored token: its view's, or its own where a view holds steps of several blocks."""
    if views.clean:
        return views.trajectory.born_BL[views.row_K, views.position_K].long()
    return views.step_N[views.view_K]


def _fit(value_K: Tensor, return_K: Tensor) -> dict[str, float]:
    """Return how well values tell returns, over all ranks."""
    gap_K = return_K - value_K
    names = ("count", "value", "return", "square", "gap", "gap_square")
    sums = (torch.ones_like(value_K), value_K, return_K, return_K.square(), gap_K, gap_K.square())
    found = {name: total(float(part.sum())) for name, part in zip(names, sums, strict=True)}
    count = max(found["count"], 1.0)
    spread = found["square"] / count - (found["return"] / count) ** 2
    left = found["gap_square"] / count - (found["gap"] / count) ** 2
    explained = 1.0 - left / spread if spread > 1e-12 else 0.0  # equal returns, up to rounding, have no variance
    return {"value/explained_variance": explained, "value/mean": found["value"] / count}
