"""From canvases to the logits of chosen positions: the one place where sampler and trainer call the denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .columns import Cached
from .shadow import shadowed
from .state import State


class LogitSource(Protocol):
    """What rollouts and training need of a denoiser; `Denoiser` has `hidden` and `head` too, which save memory."""

    family: Any

    def logits(
        self,
        input_ids_BT: Tensor,
        *,
        padding_mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> Tensor: ...


class Rows(NamedTuple):
    """Logits of K asked positions, a chunk at a time: `logits(start, stop)` gives fp32 `[stop - start, V]`.

    `hidden_KD` are the states that they are computed from, where the denoiser has any to show.
    """

    logits: Callable[[int, int], Tensor]
    vocabulary: int
    hidden_KD: Tensor | None = None


def window_logits(
    denoiser: LogitSource,
    prompt_BQ: Tensor,
    prompt_mask_BQ: Tensor,
    canvas_BL: Tensor,
    positions_BL: Tensor,
    exists_BL: Tensor | None = None,
    *,
    clean_BL: Tensor | None = None,
) -> Tensor:
    """Return logits `[K, V]` of a prompt + canvas at `positions_BL`, in row-major order.

    Positions outside `exists_BL` are seen by no other and counted by none. With `clean_BL`, the canvas without masks,
    every block is scored behind clean ones, in one pass over [x_t ; x_0].
    """
    positions_BT = torch.cat([torch.zeros_like(prompt_mask_BQ), positions_BL], dim=1)
    ids_BT, options = _inputs(prompt_BQ, prompt_mask_BQ, canvas_BL, exists_BL, not bool(prompt_mask_BQ.all()))
    if clean_BL is not None:
        assert exists_BL is None, "blocks have no length to change"
        clean: Any = denoiser
        clean_BT = torch.cat([prompt_BQ, clean_BL], dim=1)
        return clean.train_logits(ids_BT, clean_BT, positions_BT=positions_BT, **options)
    return denoiser.logits(ids_BT, positions_BT=positions_BT, **options)


def _inputs(
    prompt_BQ: Tensor, prompt_mask_BQ: Tensor, canvas_BL: Tensor, exists_BL: Tensor | None, padded: bool
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return ids and what says which of them are real; without padding no mask, so that SDPA may use flash."""
    ids_BT = torch.cat([prompt_BQ, canvas_BL], dim=1)
    if exists_BL is None:
        if not padded:
            return ids_BT, {"padding_mask_BT": None}
        return ids_BT, {"padding_mask_BT": torch.cat([prompt_mask_BQ, torch.ones_like(canvas_BL).bool()], dim=1)}
    mask_BT = torch.cat([prompt_mask_BQ, exists_BL], dim=1)
    # A position that does not exist yet may lie between others: ids count the real ones.
    position_BT = (mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)
    return ids_BT, {"padding_mask_BT": mask_BT, "position_ids_BT": position_BT}


@dataclass
class Forward:
    """The denoiser calls of one `denoise`: live rows in, logits of the asked positions out.

    `guidance` g > 0 adds a second call with the prompt masked: l = l_without + (1 + g)(l_with - l_without)
    (unsupervised classifier-free guidance, Nie et al. 2024, SMDM). `shared_B` points each row at the row whose first
    call serves it; None where prompts or canvases of a group differ. `cached` keeps keys and values between calls.
    `shadow` > 0: decided tokens of the schedule's region, at most so many, are predicted by shadow columns.
    """

    denoiser: LogitSource
    prompt_BQ: Tensor
    prompt_mask_BQ: Tensor
    resizes: bool = False
    guidance: float = 0.0
    shared_B: Tensor | None = None
    cached: Cached | None = None
    shadow: int = 0
    calls: int = 0

    def __post_init__(self) -> None:
        # Asked once: a look at a device's tensor in every step would make the host wait.
        self.padded = not bool(self.prompt_mask_BQ.all())
        if self.cached is not None:
            self.cached.padded = self.padded

    def __call__(self, state: State, alive_A: Tensor, asked_AL: Tensor, flat_K: Tensor) -> Rows:
        """Return the logits of the canvas positions `flat_K` (row x L + position) of the live rows.

        They point at the positions `asked_AL`, but for those that only fill a static shape.
        """
        exists_AL = state.exists_AL if self.resizes else None
        first = self.shared_B if self.calls == 0 else None
        self.calls += 1
        prompts = [self.prompt_BQ[alive_A]]
        if self.guidance > 0:
            prompts.append(torch.full_like(prompts[0], state.mask_token_id))
        if self.cached is not None:
            mask_AQ, lead_A = self.prompt_mask_BQ[alive_A], None
            if first is not None:
                lead_A = torch.searchsorted(alive_A, first[alive_A])
            found = self.cached(state, prompts, mask_AQ, asked_AL, flat_K, lead_A)
            predicted = [self._headed(features_KD) for features_KD in found]
        else:
            predicted = [self._rows(p, alive_A, state, exists_AL, flat_K, first) for p in prompts]
        if self.guidance == 0:
            return predicted[0]
        rows, free = predicted
        scale = 1 + self.guidance

        def guided(start: int, stop: int) -> Tensor:
            without, held = free.logits(start, stop), rows.logits(start, stop)
            # What either call forbids has no difference: what the prompt's call says of it stands.
            return torch.where((without == -torch.inf) | (held == -torch.inf), held, without.lerp(held, scale))

        return Rows(guided, rows.vocabulary, rows.hidden_KD)

    def select(self, kept_A: Tensor) -> None:
        """Keep what is known of the live rows `kept_A` alone."""
        if self.cached is not None:
            self.cached.select(kept_A)

    def _headed(self, features_KD: Tensor) -> Rows:
        denoiser: Any = self.denoiser
        size = denoiser.family.vocab_size
        return Rows(lambda start, stop: denoiser.head(features_KD[start:stop]), size, features_KD)

    def _rows(
        self,
        prompt_AQ: Tensor,
        alive_A: Tensor,
        state: State,
        exists_AL: Tensor | None,
        flat_K: Tensor,
        first_B: Tensor | None,
    ) -> Rows:
        mask_AQ, canvas_AL = self.prompt_mask_BQ[alive_A], state.canvas_AL
        denoiser, length = self.denoiser, canvas_AL.shape[1]
        if not hasattr(denoiser, "hidden"):
            positions_AL = torch.zeros_like(canvas_AL, dtype=torch.bool).view(-1).index_fill(0, flat_K, True)
            asked_AL = positions_AL.view(canvas_AL.shape)
            logits_KV = window_logits(denoiser, prompt_AQ, mask_AQ, canvas_AL, asked_AL, exists_AL)
            logits_KV = logits_KV if logits_KV.dtype == torch.float64 else logits_KV.float()
            # Padding of static shapes repeats a position. The indexing copies: transforms and statistics overwrite.
            index_K = (asked_AL.view(-1).cumsum(0) - 1)[flat_K]
            return Rows(lambda start, stop: logits_KV[index_K[start:stop]], logits_KV.shape[1])
        if first_B is None:
            hidden_ALD = self._hidden(prompt_AQ, mask_AQ, state, exists_AL)
            return self._headed(hidden_ALD.flatten(0, 1)[flat_K])
        lead_A, index_A = torch.unique(first_B[alive_A], return_inverse=True)
        lead_R = torch.searchsorted(alive_A, lead_A)
        hidden_RLD = self._hidden(prompt_AQ, mask_AQ, state, exists_AL, lead_R)
        return self._headed(hidden_RLD[index_A[flat_K // length], flat_K % length])

    def _hidden(
        self, prompt_AQ: Tensor, mask_AQ: Tensor, state: State, exists_AL: Tensor | None, row_R: Tensor | None = None
    ) -> Tensor:
        """Return the canvases' hidden states `[R, L, D]`, of all live rows or of some."""
        kept = slice(None) if row_R is None else row_R
        denoiser: Any = self.denoiser
        canvas_RL = state.canvas_AL[kept]
        exists_RL = None if exists_AL is None else exists_AL[kept]
        ids, options = _inputs(prompt_AQ[kept], mask_AQ[kept], canvas_RL, exists_RL, self.padded)
        if not self.shadow:
            return denoiser.hidden(ids, **options)[:, -canvas_RL.shape[1] :]
        assert state.quota is not None
        region_AL = state.exists_AL if state.quota.region_BL is None else state.quota.region_BL
        padding = options["padding_mask_BT"]
        return shadowed(denoiser, ids, padding, region_AL[kept], state.masked_AL[kept], self.shadow)


def shared_rows(prompt_BQ: Tensor, canvas_BL: Tensor, group_B: Tensor | None) -> Tensor | None:
    """Return, for every row, the first row of its group; None unless the rows of every group start alike."""
    if group_B is None:
        return None
    _, index_B = torch.unique(group_B, return_inverse=True)
    row_B = torch.arange(len(group_B), device=group_B.device)
    first_G = torch.full_like(row_B, len(row_B)).scatter_reduce(0, index_B, row_B, "amin")
    first_B = first_G[index_B]
    alike = (prompt_BQ == prompt_BQ[first_B]).all() & (canvas_BL == canvas_BL[first_B]).all()
    return first_B if bool(alike) and bool((first_B != row_B).any()) else None
