"""The planner of block lengths: what it reads of the blocks before, and its distribution over where the next one ends.

Of CtrlDiff (arXiv 2505.14455) the state alone is known to us: the hidden states of the last M blocks, pooled by learned
weights (eq. 11), and entropy. Its set of actions, its reward and its algorithm were not to be found. Here a block ends
at one of a few lengths, which a categorical chooses from that state and the features of the open positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..recipes.registry import RecipeError
from .planner_distributions import Categorical
from .planner_networks import Logits

if TYPE_CHECKING:
    from .planner import PlannerSpec

# Features of a step inside a block: a planner of lengths acts where one begins, and may end it at any distance.
INSIDE = ("persistence", "candidate")


class Pooled(nn.Module):
    """A network and, beside it, CtrlDiff's state (arXiv 2505.14455, eq. 11): one logit a length from the last blocks.

    With `past_BMD` as (h, e) of block m, its mean hidden state and behind it its mean entropy, the newest last and
    zeros where there was none, the logits of lengths get W [norm(sum_m w_m h_m), sum_m w_m e_m] + c, all of w, W, c
    learned. W and c start at 0, every w_m at 1/M.
    """

    def __init__(self, network: nn.Module, *, past: int, hidden: int, lengths: int) -> None:
        super().__init__()
        self.network = network
        self.weight = nn.Parameter(torch.full((past,), 1 / past))
        self.norm = nn.LayerNorm(hidden)
        self.length = nn.Linear(hidden + 1, lengths)
        nn.init.zeros_(self.length.weight)
        nn.init.zeros_(self.length.bias)

    def forward(self, feature_BLF: Tensor, past_BMD: Tensor) -> Logits:
        """Return the logits of ends and of lengths."""
        logit_BL, length_BC = self.network(feature_BLF)
        pooled_BD = torch.einsum("m,bmd->bd", self.weight, past_BMD)
        state_BD = torch.cat([self.norm(pooled_BD[:, :-1]), pooled_BD[:, -1:]], dim=1)
        return Logits(logit_BL, length_BC + self.length(state_BD))


def block_ends(first_B1: Tensor, lengths: tuple[int, ...], canvas: int) -> Tensor:
    """Return `candidate_BL`, the last positions of blocks that begin at `first_B1` and have one of the lengths.

    Blocks that would leave the canvas are not among them; where all would, the canvas's last position is the only one.
    """
    place_L = torch.arange(canvas, device=first_B1.device)
    candidate_BL = torch.zeros_like(first_B1 + place_L, dtype=torch.bool)
    for length in lengths:
        candidate_BL |= place_L + 1 - first_B1 == length
    return torch.where(candidate_BL.any(dim=1, keepdim=True), candidate_BL, place_L == canvas - 1)


def ends(logit_BL: Tensor, candidate_BL: Tensor, length_BC: Tensor, lengths: tuple[int, ...]) -> Categorical:
    """Return the distribution over the candidate ends: softmax of an end's own logit plus that of its length.

    `candidate_BL` are those of `block_ends`: the first is the shortest length away from the block's begin. A single
    end has probability 1, whatever its length.
    """
    place_L = torch.arange(candidate_BL.shape[1], device=candidate_BL.device)
    first_B1 = candidate_BL.to(torch.int8).argmax(dim=1, keepdim=True) + 1 - lengths[0]
    which_BLC = (place_L + 1 - first_B1)[..., None] == torch.tensor(lengths, device=candidate_BL.device)
    bonus_BL = torch.where(which_BLC, length_BC[:, None], 0.0).sum(dim=2)
    return Categorical(logit_BL + bonus_BL, candidate_BL)


def check_blocks(spec: PlannerSpec) -> None:
    """Raise RecipeError for lengths, features and sizes that a planner of block lengths cannot have."""
    lengths = spec.lengths
    if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
        raise RecipeError(f"planner.lengths: {list(lengths)} must begin with 1 or more and rise.")
    if spec.past < 0:
        raise RecipeError(f"planner.past: {spec.past} must be 0 (no hidden states) or a number of blocks.")
    if spec.network == "hidden":
        raise RecipeError("planner.network: 'hidden' reads states a position, blocks the last ones'; use transformer.")
    if (spec.past > 0) != (spec.hidden > 0):
        raise RecipeError("planner.hidden: a planner of lengths reads hidden states just where past is above 0.")
    told = [name for name in INSIDE if name in spec.features]
    if told:
        raise RecipeError(f"planner.features: {', '.join(told)} tells of a step inside a block; drop it with blocks.")
