"""Optimizers by name: AdamW, or Muon for the hidden matrices with AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Together(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters behind one interface (Muon takes matrices only).

    The parameter groups are the members' own dictionaries, so a scheduler that writes `lr` reaches the members.
    """

    def __init__(self, members: list[torch.optim.Optimizer]) -> None:
        self.members = members
        groups = [group for member in members for group in member.param_groups]
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for member in self.members for group in member.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every member; `closure` is called once before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members:
            member.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every member."""
        for member in self.members:
            member.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the members' states in order."""
        return {"members": [member.state_dict() for member in self.members], "state": {}, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the members' states."""
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_state_dict(state)
        self._share_groups()


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    name: str = "adamw",
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.99),
    matrix_lr: float = 0.02,
) -> torch.optim.Optimizer:
    """Return the optimizer over the trainable parameters.

    `adamw` decays matrices only. `muon` (Jordan 2024; torch.optim.Muon) steps the hidden matrices with `matrix_lr` and
    embeddings, head and norms by AdamW with `lr`.
    """
    trainable = [(key, parameter) for key, parameter in named_parameters if parameter.requires_grad]
    hidden = [p for key, p in trainable if p.ndim == 2 and "embed" not in key and "lm_head" not in key]
    chosen = {id(p) for p in hidden}
    if name == "muon":
        rest = [p for _, p in trainable if id(p) not in chosen]
        # An adapter has matrices only; neither library optimizer takes an empty list.
        members: list[torch.optim.Optimizer] = []
        if hidden:
            members.append(torch.optim.Muon(hidden, lr=matrix_lr, weight_decay=weight_decay, momentum=0.95))
        if rest:
            members.append(torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=0.0))
        return Together(members)
    if name == "adamw":
        matrices = [p for _, p in trainable if p.ndim >= 2]
        vectors = [p for _, p in trainable if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)
    raise ValueError(f"optim.optimizer: '{name}' is not one of adamw, muon.")
