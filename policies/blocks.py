"""Block-causal attention: which block a token is in, who sees whom, and a cache that only clean blocks enter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .layout import Family

PADDING = 1 << 30  # the block of padded tokens: later than all others, so that nothing else sees them


class _BlockLayer(DynamicLayer):
    """Keys and values of one layer; an update returns old and new ones, and keeps the first `keep` new columns."""

    keep: int = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stored, keys, values = self.get_seq_length(), key_states, value_states
        if stored and self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        if self.keep:
            # A copy of what is kept: a view would hold the whole concatenation.
            end = stored + self.keep
            self.keys, self.values = (x if x.shape[-2] == end else x[..., :end, :].clone() for x in (keys, values))
        return keys, values


class BlockCache:
    """The exact cache of a block-causal model: keys and values of finished blocks, which nothing later can change.

    `block_BK` is the block of every stored token (PADDING where a row had none there), `next_B` each row's next
    position, `last_B1D` the last stored hidden state, from which shifted families predict the next block's first token.
    """

    def __init__(self, layers: int) -> None:
        self.keys = Cache(layers=[_BlockLayer() for _ in range(layers)])
        self.block_BK: Tensor | None = None
        self.next_B: Tensor | None = None
        self.last_B1D: Tensor | None = None
        self.padded = False

    def __len__(self) -> int:
        """The number of stored columns."""
        return 0 if self.block_BK is None else self.block_BK.shape[1]

    def keep(self, columns: int) -> None:
        """Set how many columns of the next forward are stored."""
        for layer in self.keys.layers:
            layer.keep = columns  # type: ignore[union-attr]

    def store(self, block_BT: Tensor, position_BT: Tensor, hidden_BTD: Tensor, columns: int) -> None:
        """Record the first `columns` tokens of the forward that has just run."""
        stored = block_BT[:, :columns]
        self.block_BK = stored if self.block_BK is None else torch.cat([self.block_BK, stored], dim=1)
        self.next_B = position_BT[:, columns - 1] + 1
        self.last_B1D = hidden_BTD[:, columns - 1 : columns]

    def select(self, row_B: Tensor) -> None:
        """Keep only the rows `row_B` (indices), in that order: finished rows leave the batch."""
        for layer in self.keys.layers:
            layer.keys, layer.values = layer.keys[row_B], layer.values[row_B]  # type: ignore[union-attr, index]
        if self.block_BK is not None and self.next_B is not None and self.last_B1D is not None:
            self.block_BK, self.next_B, self.last_B1D = self.block_BK[row_B], self.next_B[row_B], self.last_B1D[row_B]


def positions(shape: torch.Size, padding_mask_BT: Tensor | None, start_B: Tensor | None, device: Any) -> Tensor:
    """Return each token's position, counted from its row's first real token, or from `start_B` behind a cache."""
    if padding_mask_BT is None:
        position_BT = torch.arange(shape[1], device=device).expand(shape)
    else:
        position_BT = (padding_mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)
    return position_BT if start_B is None else position_BT + start_B[:, None]


def block_ids(family: Family, position_BT: Tensor, padding_mask_BT: Tensor | None, stored: int = 0) -> Tensor:
    """Return each token's block: of its own position, or of its column where rows are padded to whole blocks.

    `stored` columns precede those at hand.
    """
    length = family.block_length or 1
    block_BT = position_BT // length
    if family.alignment == "left_pad_to_block":
        column_T = torch.arange(stored, stored + position_BT.shape[1], device=position_BT.device)
        block_BT = (column_T // length).expand(position_BT.shape)
    return block_BT if padding_mask_BT is None else block_BT.masked_fill(~padding_mask_BT.bool(), PADDING)


def place_in_block(family: Family, padding_mask_BT: Tensor) -> Tensor | None:
    """Return how many columns of its block precede each column, or None with full attention."""
    position_BT, block_BT = places(family, padding_mask_BT)
    if block_BT is None:
        return None
    if family.alignment == "left_pad_to_block":
        position_BT = torch.arange(position_BT.shape[1], device=position_BT.device).expand(position_BT.shape)
    return position_BT % (family.block_length or 1)


def places(family: Family, padding_mask_BT: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return position and block of every column as `Denoiser.hidden` counts them; no blocks with full attention."""
    device = padding_mask_BT.device
    if family.attention == "full":
        return torch.arange(padding_mask_BT.shape[1], device=device).expand(padding_mask_BT.shape), None
    position_BT = positions(padding_mask_BT.shape, padding_mask_BT, None, device)
    return position_BT, block_ids(family, position_BT, padding_mask_BT)


def block_mask(query_BQ: Tensor, key_BK: Tensor) -> Tensor:
    """Return bool [B, 1, Q, K], true where a query may attend: keys of its own block and of earlier ones."""
    return (query_BQ[:, :, None] >= key_BK[:, None, :])[:, None]


def doubled_mask(block_BT: Tensor) -> Tensor:
    """Return the bool mask [B, 1, 2T, 2T] of the pass over [x_t ; x_0].

    A noisy token sees its own noisy block and the clean blocks before it; a clean token sees clean blocks up to its own
    (BD3-LM, Arriola et al. 2025, section 4; SDAR's training mask).
    """
    query, key = block_BT[:, :, None], block_BT[:, None, :]
    noisy = torch.cat([query == key, query > key], dim=2)
    clean = torch.cat([torch.zeros_like(query == key), query >= key], dim=2)
    return torch.cat([noisy, clean], dim=1)[:, None]


def hide_padding(config: Any, padding_mask_BT: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mask that hides padding: query by key where that is taken, as the stock one is looked at first."""
    if config.model_type == "modernbert" or config._attn_implementation not in ("sdpa", "eager"):
        return padding_mask_BT.to(torch.long)
    rows, columns = padding_mask_BT.shape
    return attention(padding_mask_BT.bool()[:, None, None].expand(rows, 1, columns, columns))


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bool mask as 0 and the dtype's minimum, which eager attention adds (it would add a bool as 0 and 1)."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
