"""Networks of the unmasking policy: features of every position in, one logit a position (and a number a row) out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

# What every position of a row shares, or what says which positions there are: it conditions the block (adaLN).
CONDITIONS = ("masked", "time", "left", "alpha")
ROPE_BASE = 10_000.0
LONGEST_PERIOD = 10_000.0  # steps


class Logits(NamedTuple):
    """`logit_BL` of the positions, and `count_BC` of how many where the planner has a head for it."""

    logit_BL: Tensor
    count_BC: Tensor | None


class Linear(nn.Module):
    """The baseline: a weighted sum of the features, and of their mean over the canvas for the number."""

    def __init__(self, features: Sequence[str], *, counts: int, bias: float) -> None:
        super().__init__()
        self.output = nn.Linear(len(features), 1)
        self.count = nn.Linear(len(features), counts) if counts else None
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.output.bias, bias)
        if self.count is not None:
            nn.init.zeros_(self.count.weight)

    def forward(self, feature_BLF: Tensor) -> Logits:
        """Return the logits."""
        count_BC = None if self.count is None else self.count(feature_BLF.mean(dim=1))
        return Logits(self.output(feature_BLF).squeeze(-1), count_BC)


class Transformer(nn.Module):
    """One block whose norms are scaled and shifted by mask bit and time (arXiv 2512.09106, section 4).

    Residual gates are 1 + alpha and the condition's matrix starts at 0, so that at first neither mask nor time matters
    and every logit is near `bias`. With the single feature of the paper, width 128, 2 heads, mlp 512 and `time`
    published it has its 331,265 parameters. `published` encodes the share t of the steps with period 1, which makes all
    its 128 numbers cos t or sin t; `true` encodes the step itself with periods of 6 to 60,000 steps.
    """

    def __init__(
        self,
        features: Sequence[str],
        *,
        width: int,
        heads: int,
        mlp: int,
        time: str,
        counts: int,
        bias: float,
        everywhere: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.time = heads, time
        # Whether logits of decided positions are read, or enter the mean that counts are told from.
        self.everywhere = everywhere or counts > 0
        self.token_F = [i for i, name in enumerate(features) if name not in CONDITIONS]
        self.row_F = [i for i, name in enumerate(features) if name in ("left", "alpha")]
        self.mask_at = features.index("masked") if "masked" in features else None
        self.time_at = features.index("time") if "time" in features else None
        self.enter = nn.Linear(len(self.token_F), width)
        self.mask = nn.Embedding(2, width)
        self.clock = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.rows = nn.Linear(len(self.row_F), width, bias=False) if self.row_F else None
        self.condition = nn.Linear(width, 6 * width)
        self.query, self.key, self.value, self.join = (nn.Linear(width, width) for _ in range(4))
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(width) for _ in range(3))
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)
        self.output = nn.Linear(width, 1)
        self.count = nn.Linear(width, counts) if counts else None
        for parameter in self.condition.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(self.output.bias, bias)

    def forward(self, feature_BLF: Tensor) -> Logits:
        """Return the logits, on a CPU 0 at decided positions where nobody reads those.

        All features of decided positions but the row's must be 0 there, as `rollouts.features.observe` has them.
        """
        mask_BL = torch.ones_like(feature_BLF[..., 0]) if self.mask_at is None else feature_BLF[..., self.mask_at]
        # Of all conditions only the mask bit tells the positions of a row apart: two of each are computed.
        given = self.condition(self._given(feature_BLF)).chunk(6, dim=-1)
        # To ask which are open waits for other devices, but not for a CPU.
        asked = _open(mask_BL) if not self.everywhere and feature_BLF.is_cpu else None
        if asked is None:
            # Each position takes its own by a product, which is exact and whose gradient is a sum in a fixed order.
            bits_BL2 = torch.stack([1 - mask_BL, mask_BL], dim=-1)
            scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = (bits_BL2 @ value_B2W for value_B2W in given)
            hidden = self.enter(feature_BLF[..., self.token_F])
        else:
            scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = (
                value_B2W[:, 1].index_select(0, asked.row_K) for value_B2W in given
            )
            hidden = self.enter(feature_BLF.flatten(0, 1).index_select(0, asked.flat_K)[:, self.token_F])
        normed = torch.addcmul(shift_1, self.norm_1(hidden), 1 + scale_1)
        if asked is None:
            attended = _attend(self, normed)
        else:
            # The decided positions of a row are alike.
            decided_BW = torch.addcmul(given[1][:, 0], self.norm_1(self.enter.bias), 1 + given[0][:, 0])
            attended = _attend_open(self, normed, decided_BW, asked)
        hidden = torch.addcmul(hidden, 1 + gate_1, self.join(attended))
        inner = torch.addcmul(shift_2, self.norm_2(hidden), 1 + scale_2)
        hidden = self.norm_3(torch.addcmul(hidden, 1 + gate_2, self.down(gelu(self.up(inner)))))
        logit = self.output(hidden).squeeze(-1)
        if asked is not None:
            logit = logit.new_zeros(mask_BL.numel()).index_copy(0, asked.flat_K, logit).view_as(mask_BL)
        return Logits(logit, None if self.count is None else self.count(hidden.mean(dim=1)))

    def _given(self, feature_BLF: Tensor) -> Tensor:
        """Return the condition of a decided and of an open position of each row `[B, 2, width]`."""
        time_B = torch.zeros_like(feature_BLF[:, 0, 0]) if self.time_at is None else feature_BLF[:, 0, self.time_at]
        given = self.mask.weight + self.clock(self._encoded(time_B, feature_BLF.shape[1]))[:, None]
        return given if self.rows is None else given + self.rows(feature_BLF[:, 0, self.row_F])[:, None]

    def _encoded(self, time_B: Tensor, length: int) -> Tensor:
        half = self.mask.weight.shape[1] // 2
        if self.time == "published":
            angle_BH = time_B[:, None].expand(-1, half)
        else:
            place_H = torch.arange(half, device=time_B.device) / half
            angle_BH = time_B[:, None] * length * torch.exp(-math.log(LONGEST_PERIOD) * place_H)
        return torch.cat([angle_BH.cos(), angle_BH.sin()], dim=1)


class Hidden(nn.Module):
    """UPO's head: a transformer block on the denoiser's hidden states, an MLP on them and the features (2510.05725).

    What comes behind the named features are the last hidden states of the canvas, of width `hidden`. The published head
    is a copy of the denoiser's last block, prompt and all; this one is a block of `width`, which any family can have
    and whose input is no larger than the canvas. The MLP has three hidden layers of `mlp`, as published.
    """

    def __init__(
        self, features: Sequence[str], *, hidden: int, width: int, heads: int, mlp: int, counts: int, bias: float
    ) -> None:
        super().__init__()
        self.heads, self.hidden = heads, hidden
        self.norm_0, self.enter = nn.LayerNorm(hidden), nn.Linear(hidden, width)
        self.query, self.key, self.value, self.join = (nn.Linear(width, width) for _ in range(4))
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(width) for _ in range(3))
        self.up, self.down = nn.Linear(width, mlp), nn.Linear(mlp, width)
        sizes = (width + len(features), mlp, mlp, mlp)
        layers = [
            nn.Sequential(nn.Linear(before, after), nn.LayerNorm(after), nn.SiLU()) for before, after in pairwise(sizes)
        ]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(mlp, 1)
        self.count = nn.Linear(mlp, counts) if counts else None
        nn.init.constant_(self.output.bias, bias)

    def forward(self, feature_BLF: Tensor) -> Logits:
        """Return the logits."""
        named, state = feature_BLF[..., : -self.hidden], feature_BLF[..., -self.hidden :]
        x = self.enter(self.norm_0(state))
        x = x + self.join(_attend(self, self.norm_1(x)))
        x = x + self.down(gelu(self.up(self.norm_2(x))))
        x = self.layers(torch.cat([self.norm_3(x), named], dim=-1))
        count_BC = None if self.count is None else self.count(x.mean(dim=1))
        return Logits(self.output(x).squeeze(-1), count_BC)


class _Open(NamedTuple):
    """The K open positions of a batch: their rows, and their places in the canvas `[B, L]`, flattened.

    `place_BQ` lists each row's own from left to right, filled with decided ones up to Q, the most of any row; `query_K`
    is where in it, flattened, the K stand.
    """

    length: int
    place_BQ: Tensor
    row_K: Tensor
    flat_K: Tensor
    query_K: Tensor


def _open(mask_BL: Tensor) -> _Open:
    """Return the positions whose mask bit is not 0."""
    open_BL, length = mask_BL != 0, mask_BL.shape[1]
    count_B1 = open_BL.sum(dim=1, keepdim=True)
    most = int(count_B1.max()) if len(open_BL) else 0
    place_BQ = torch.argsort((~open_BL).to(torch.int8), dim=1, stable=True)[:, :most]
    query_K = (torch.arange(most, device=mask_BL.device) < count_B1).flatten().nonzero().squeeze(1)
    row_K = query_K // max(most, 1)
    return _Open(length, place_BQ, row_K, row_K * length + place_BQ.flatten()[query_K], query_K)


def _attend(block: Any, normed_BLW: Tensor) -> Tensor:
    """Return what the heads of a block attend to, before its matrix `join`."""
    place_L = torch.arange(normed_BLW.shape[1], device=normed_BLW.device)
    query, key, value = (
        matrix(normed_BLW).unflatten(-1, (block.heads, -1)).transpose(1, 2)
        for matrix in (block.query, block.key, block.value)
    )
    found = scaled_dot_product_attention(_rotate(query, place_L), _rotate(key, place_L), value)
    return found.transpose(1, 2).flatten(-2)


def _attend_open(block: Any, normed_KW: Tensor, decided_BW: Tensor, asked: _Open) -> Tensor:
    """Return what the open positions attend to `[K, W]`, `decided_BW` being at all others of their row."""
    heads, width = (block.heads, -1), decided_BW.shape[1]

    def canvas(matrix: nn.Module) -> Tensor:
        whole_BLW = matrix(decided_BW)[:, None].expand(-1, asked.length, -1)
        given = whole_BLW.flatten(0, 1).index_copy(0, asked.flat_K, matrix(normed_KW))
        return given.view(whole_BLW.shape).unflatten(-1, heads).transpose(1, 2)

    query = normed_KW.new_zeros(asked.place_BQ.numel(), width).index_copy(0, asked.query_K, block.query(normed_KW))
    query = query.view(*asked.place_BQ.shape, width).unflatten(-1, heads).transpose(1, 2)
    key = _rotate(canvas(block.key), torch.arange(asked.length, device=normed_KW.device))
    found = scaled_dot_product_attention(_rotate(query, asked.place_BQ[:, None]), key, canvas(block.value))
    return found.transpose(1, 2).reshape(-1, width).index_select(0, asked.query_K)


def _rotate(x_BHLD: Tensor, place: Tensor) -> Tensor:
    """Return queries or keys with RoPE at their places `[L]` or `[B, 1, L]`: neighbouring entries are a pair."""
    width = x_BHLD.shape[-1]
    pair_D = torch.arange(width // 2, device=x_BHLD.device, dtype=x_BHLD.dtype) * 2 / width
    angle = place[..., None].to(x_BHLD.dtype) * torch.exp(-math.log(ROPE_BASE) * pair_D)
    turned = torch.view_as_complex(x_BHLD.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)
