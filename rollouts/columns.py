"""The cached forward: every live row computes the columns that its cache asks for and sees those that are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..policies.blocks import places
from ..policies.store import Store
from .caches import Layout, Recompute
from .state import State

WIDTHS = 16  # widths of static shapes are multiples of this
SPARED = 0.8  # two forwards instead of one, where they compute less than this share of its columns


class Table(NamedTuple):
    """What a step needs of R rows: real columns, those to compute, those that are seen, position and block of each."""

    real_RT: Tensor
    columns_RT: Tensor
    shown_RT: Tensor
    position_RT: Tensor
    block_RT: Tensor | None


class Call(NamedTuple):
    """One forward: R rows (the last may be repeated ones that fill a static shape) and the columns of each.

    `column_RC` are the columns that a row computes, ascending, filled up with the store's dummy; None: whole rows.
    """

    row_R: Tensor
    every_row: bool
    column_RC: Tensor | None = None
    position_RC: Tensor | None = None
    mask_R1CK: Tensor | None = None


@dataclass
class Cached:
    """The denoiser behind a store of keys and values, one for each prompt that rows are predicted with.

    `padded` says whether any prompt is. `static` rounds the shapes of forwards up to a few; `lockstep` makes it exactly
    one forward a step, as ranks that share weights need it. How many columns each row computes is looked at once a
    step, and decides what the forwards are.
    """

    denoiser: Any
    policy: Callable[..., Recompute]
    padded: bool = True
    static: bool = False
    lockstep: bool = False
    stores: list[Store] = field(default_factory=list)
    seen_AT: Tensor | None = None

    def __call__(
        self,
        state: State,
        prompts: Sequence[Tensor],
        prompt_mask_AQ: Tensor,
        asked_AL: Tensor,
        flat_K: Tensor,
        lead_A: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the features `[K, D]` of the canvas positions `flat_K` (row x L + position) for each prompt table.

        `asked_AL` are the positions that must be computed. `lead_A` points each row at the row whose forward serves it.
        """
        ids_AT = torch.cat([prompts[0], state.canvas_AL], dim=1)
        if self.seen_AT is None:
            self.seen_AT = torch.full_like(ids_AT, -1)
        table = self._table(state, ids_AT, prompt_mask_AQ, asked_AL)
        self.seen_AT = torch.where(table.columns_RT, ids_AT, self.seen_AT)
        rows, index_A = torch.arange(len(ids_AT), device=ids_AT.device), None
        if lead_A is not None:
            rows, index_A = torch.unique(lead_A, return_inverse=True)
            table = _merged(table, rows, index_A)
        if not self.stores:
            layers = self.denoiser.base.config.num_hidden_layers
            self.stores = [Store(layers, len(rows), ids_AT.shape[1], rows.device) for _ in prompts]
        calls, address_RL = self._calls(table, prompt_mask_AQ.shape[1])
        address_AL = address_RL if index_A is None else address_RL[index_A]
        found = []
        for store, prompt_AQ in zip(self.stores, prompts, strict=True):
            ids_RT = torch.cat([prompt_AQ, state.canvas_AL], dim=1)[rows]
            hidden = [self._forward(call, store, ids_RT, table).flatten(0, 1) for call in calls]
            found.append(torch.cat(hidden)[address_AL.reshape(-1)[flat_K]])
            if index_A is not None:
                store.select(index_A)
        return found

    def select(self, kept_A: Tensor) -> None:
        """Keep the live rows `kept_A` alone."""
        if self.seen_AT is not None:
            self.seen_AT = self.seen_AT[kept_A]
        for store in self.stores:
            store.select(kept_A)

    def _table(self, state: State, ids_AT: Tensor, prompt_mask_AQ: Tensor, asked_AL: Tensor) -> Table:
        """Return what the policy wants, completed: what is asked is computed, what is computed is seen."""
        assert self.seen_AT is not None
        prompt, real_AT = prompt_mask_AQ.shape[1], torch.cat([prompt_mask_AQ, state.exists_AL], dim=1)
        position_AT, block_AT = places(self.denoiser.family, real_AT)
        asked_AT = F.pad(asked_AL, (prompt, 0))
        if self.denoiser.family.logit_shift:
            # The column before a position scores it; the first column has none before it.
            first_AT = F.pad(asked_AT[:, :1], (0, asked_AT.shape[1] - 1))
            asked_AT = F.pad(asked_AT[:, 1:], (0, 1)) | first_AT
        stored_AT, changed_AT = self.seen_AT >= 0, real_AT & (self.seen_AT != ids_AT)
        wanted = self.policy(state, Layout(prompt, real_AT, asked_AT, stored_AT, changed_AT, block_AT))
        columns_AT = (wanted.columns_AT | asked_AT) & real_AT & asked_AL.any(dim=1, keepdim=True)
        shown_AT = stored_AT if wanted.visible_AT is None else stored_AT & wanted.visible_AT
        return Table(real_AT, columns_AT, shown_AT | columns_AT, position_AT, block_AT)

    def _calls(self, table: Table, prompt: int) -> tuple[list[Call], Tensor]:
        """Return the forwards of a step, and where each canvas position's row is in their joined results `[R, L]`."""
        rows, columns = table.real_RT.shape
        device, shift = table.real_RT.device, self.denoiser.family.logit_shift
        whole_R = (table.columns_RT == table.real_RT).all(dim=1)
        counts, whole = torch.stack([table.columns_RT.sum(dim=1), whole_R.long()]).tolist()
        place_L = torch.arange(prompt, columns, device=device)
        address_RL = torch.zeros(rows, len(place_L), dtype=torch.long, device=device)
        calls, base = [], 0
        for chosen, width in share_out(counts, whole, lockstep=self.lockstep):
            filled = chosen + chosen[:1] * (self._bucket(len(chosen), rows) - len(chosen))
            row_R = torch.tensor(filled, device=device, dtype=torch.long)
            every_row = len(chosen) == rows
            if width is None:
                calls.append(Call(row_R, every_row))
                width, slot_RL = columns, place_L.expand(len(chosen), -1)
            else:
                width = min(-(-width // WIDTHS) * WIDTHS, columns) if self.static else width
                mine_RT = table.columns_RT[row_R]
                mine_RT[len(chosen) :] = False
                calls.append(_partial(table, row_R, every_row, mine_RT, width, self.stores[0]))
                source_L = (place_L - shift).clamp(min=0)
                slot_RL = (mine_RT.cumsum(dim=1)[: len(chosen), source_L] - 1).clamp(min=0)
            first_R1 = base + width * torch.arange(len(chosen), device=device)[:, None]
            address_RL[row_R[: len(chosen)]] = first_R1 + slot_RL
            base += width * len(row_R)
        return calls, address_RL

    def _bucket(self, count: int, rows: int) -> int:
        return min(1 << max(count - 1, 0).bit_length(), rows) if self.static and count else count

    def _forward(self, call: Call, store: Store, ids_RT: Tensor, table: Table) -> Tensor:
        """Return the hidden states of one forward, `[R, C, D]`; whole rows are aligned."""
        store.expect(call.row_R, call.column_RC, every_row=call.every_row)
        ids_RT = ids_RT[call.row_R]
        if call.column_RC is None:
            # As without a cache: no mask where nothing is padded.
            padding = table.real_RT[call.row_R] if self.padded else None
            return self.denoiser.hidden(ids_RT, padding_mask_BT=padding, store=store)
        ids_RC = F.pad(ids_RT, (0, 1)).gather(1, call.column_RC)
        return self.denoiser.columns(ids_RC, call.position_RC, call.mask_R1CK, store)


def share_out(
    counts: Sequence[int], whole: Sequence[int], *, lockstep: bool = False
) -> list[tuple[list[int], int | None]]:
    """Return the forwards of a step as (rows, columns of a row), given how many columns each row computes.

    Rows that compute all they have go together, as whole rows (None); where no row computes less, with those that
    compute none, as without a cache. Of the others the widest set the width, so they make two forwards where that
    spares a fifth of the columns. In `lockstep` it is one forward whatever they compute.
    """
    rows = list(range(len(counts)))
    idle = rows != [] and not any(counts)
    if not idle and all(whole[row] or not counts[row] for row in rows):
        return [(rows, None)]
    if lockstep or idle:
        return [(rows, max(1, *counts))]
    full = [row for row in rows if whole[row]]
    groups: list[tuple[list[int], int | None]] = [(full, None)] if full else []
    narrow = sorted((row for row in rows if counts[row] and not whole[row]), key=lambda row: (counts[row], row))
    if not narrow:
        return groups
    width, size = [counts[row] for row in narrow], len(narrow)
    # The columns of two forwards, cut behind the i-th row; without a cut there is one.
    cost = [(i + 1) * width[i] + (size - i - 1) * width[-1] for i in range(size)]
    cut = cost.index(min(cost)) + 1 if min(cost) <= SPARED * cost[-1] else size
    return groups + [(sorted(part), counts[part[-1]]) for part in (narrow[:cut], narrow[cut:]) if part]


def _partial(table: Table, row_R: Tensor, every_row: bool, mine_RT: Tensor, width: int, store: Store) -> Call:
    """Return the forward of the columns `mine_RT` of some rows, in `width` places each."""
    columns, dummy = mine_RT.shape[1], store.dummy
    order_RC = torch.argsort((~mine_RT).to(torch.int8), dim=1, stable=True)[:, :width]
    column_RC = torch.where(mine_RT.gather(1, order_RC), order_RC, dummy)
    idle_RC = column_RC == dummy
    shown_RK = F.pad(table.shown_RT[row_R], (0, store.room - columns))
    mask_RCK = shown_RK[:, None, :] & ~idle_RC[:, :, None]
    if table.block_RT is not None:
        block_RT = table.block_RT[row_R]
        query_RC = F.pad(block_RT, (0, 1)).gather(1, column_RC)
        mask_RCK &= query_RC[:, :, None] >= F.pad(block_RT, (0, store.room - columns))[:, None, :]
    # What fills a short row sees itself alone: a softmax over nothing would be NaN.
    mask_RCK[:, :, dummy] = idle_RC
    position_RC = F.pad(table.position_RT[row_R], (0, 1)).gather(1, column_RC)
    return Call(row_R, every_row, column_RC, position_RC, mask_RCK[:, None])


def _merged(table: Table, lead_G: Tensor, index_A: Tensor) -> Table:
    """Return the table of the leading rows, which compute what any row of theirs wants."""

    def either(value_AT: Tensor) -> Tensor:
        counts = torch.zeros(len(lead_G), value_AT.shape[1], dtype=torch.int32, device=value_AT.device)
        return counts.index_add(0, index_A, value_AT.to(torch.int32)) > 0

    return Table(
        real_RT=table.real_RT[lead_G],
        columns_RT=either(table.columns_RT),
        shown_RT=either(table.shown_RT),
        position_RT=table.position_RT[lead_G],
        block_RT=None if table.block_RT is None else table.block_RT[lead_G],
    )
