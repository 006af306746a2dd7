"""`denoise`, the one loop that turns prompts into trajectories, whatever the parts of the sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .caches import check_cache
from .choices import Scored, rollout_choice
from .columns import Cached
from .drafts import drafts_by_step, note_draft
from .forward import Forward, LogitSource, Rows, shared_rows
from .measures import Statistics, measure_rows
from .planned import note_plan
from .ranking import rank
from .revisions import commit
from .sampler import Sampler
from .schedules import narrowed
from .shadow import check_shadow
from .state import Record, State
from .trajectory import Trajectory

CHECK_EVERY = 4  # steps between two looks of the host at a device that computes asynchronously


class LogitError(ValueError):
    """Logits that are no distribution over the allowed tokens; the message names rollout, step and position."""


@torch.no_grad()
def denoise(
    denoiser: LogitSource,
    sampler: Sampler,
    prompt_BQ: Tensor,
    prompt_mask_BQ: Tensor,
    canvas_BL: Tensor,
    rollout_id_B: Tensor,
    *,
    seed: int,
    step: int = 0,
    group_B: Tensor | None = None,
    draft_BL: Tensor | None = None,
    static: bool | None = None,
    drafts: bool = False,
    anyone: Callable[[bool], bool] | None = None,
    on_step: Callable[[Tensor], None] | None = None,
) -> Trajectory:
    """Fill the masks of `canvas_BL` step by step and record how each token was decided.

    One denoiser call a step over the rows that are not finished; the LM head runs at the asked positions only, in
    chunks. Noise is keyed by (seed, step, rollout id, denoising step, position), so a rollout does not depend on what
    else is in the batch. Every step commits at least one position of every live row, and `sampler.max_steps` bounds
    their number. Rows of one `group_B` that start alike share the first call. `draft_BL` are tokens of the canvas that
    a remasking or editing may take back; the others stay. `static` (default: on every device but the CPU) keeps shapes
    to powers of two of rows and a fixed number of positions and looks at the device's state every fourth step only.
    `anyone` tells every rank whether any of them still has live rows (`rl.distributed.anyone`): with weights that each
    forward gathers, all ranks call the denoiser until the last row is done. `on_step` sees `tokens_BL` after each step.
    `drafts` records what each step drew at every masked position. Raises LogitError where the logits are NaN, or -inf
    for every allowed token.
    """
    run = _Run.start(
        denoiser, sampler, prompt_BQ, prompt_mask_BQ, canvas_BL, rollout_id_B, seed, step, group_B, draft_BL
    )
    run.static = canvas_BL.device.type != "cpu" if static is None else static
    run.drafts = drafts
    if run.forward.cached is not None:
        run.forward.cached.static, run.forward.cached.lockstep = run.static, anyone is not None
    run.compact()
    live = len(run.alive_A) > 0
    # Every rank answers at every look, live or not: it is a sum over ranks.
    while live if anyone is None else anyone(live):
        for _ in range(CHECK_EVERY if run.static else 1):
            run.decide()
            if on_step is not None:
                on_step(run.record.tokens_BL)
        run.compact()
        run.check()
        live = bool(run.unfinished().any())
    return _trajectory(run)


@dataclass
class _Run:
    """One `denoise`: the record of all rows, and which of them are live."""

    denoiser: LogitSource
    sampler: Sampler
    forward: Forward
    record: Record
    prompt_BQ: Tensor
    prompt_mask_BQ: Tensor
    rollout_id_B: Tensor
    group_B: Tensor
    offset_B: Tensor
    alive_A: Tensor
    eos: Tensor
    broken: Tensor
    memory: dict[str, Tensor]
    seed: int
    step: int
    static: bool = False
    drafts: bool = False

    @property
    def banned(self) -> tuple[int, ...]:
        """The token ids that are never drawn."""
        return self.sampler.banned(self.denoiser.family)

    @staticmethod
    def start(
        denoiser: LogitSource,
        sampler: Sampler,
        prompt_BQ: Tensor,
        prompt_mask_BQ: Tensor,
        canvas_BL: Tensor,
        rollout_id_B: Tensor,
        seed: int,
        step: int,
        group_B: Tensor | None,
        draft_BL: Tensor | None,
    ) -> _Run:
        """Return a run that has not called the denoiser yet."""
        family, device = denoiser.family, canvas_BL.device
        check_cache(sampler.cache, denoiser)
        if sampler.shadow:
            check_shadow(denoiser)
        forward = Forward(
            denoiser,
            prompt_BQ,
            prompt_mask_BQ,
            resizes=sampler.length is not None,
            guidance=sampler.guidance,
            shared_B=shared_rows(prompt_BQ, canvas_BL, group_B),
            cached=None if sampler.cache is None else Cached(denoiser, sampler.cache),
            shadow=sampler.region_width(canvas_BL.shape[1]) if sampler.shadow else 0,
        )
        length_B = sampler.start_length(canvas_BL)
        record = Record.start(canvas_BL, draft_BL, length_B, family.mask_token_id)
        own_B = torch.arange(len(canvas_BL), device=device)
        return _Run(
            denoiser=denoiser,
            sampler=sampler,
            forward=forward,
            record=record,
            prompt_BQ=prompt_BQ,
            prompt_mask_BQ=prompt_mask_BQ,
            rollout_id_B=rollout_id_B,
            group_B=own_B if group_B is None else torch.unique(group_B, return_inverse=True)[1],
            offset_B=block_offset(family, prompt_mask_BQ),
            alive_A=own_B,
            eos=torch.tensor(family.eos_token_ids, device=device),
            broken=torch.full((len(canvas_BL), 3), -1, device=device),
            memory={},
            seed=seed,
            step=step,
        )

    def state(self) -> State:
        """Return what the parts may read of the live rows."""
        return self.record.rows(
            self.alive_A,
            offset_A=self.offset_B[self.alive_A],
            rollout_id_A=self.rollout_id_B[self.alive_A],
            group_A=self.group_B[self.alive_A],
            mask_token_id=self.denoiser.family.mask_token_id,
            eos_token_ids=tuple(self.denoiser.family.eos_token_ids),
            seed=self.seed,
            step=self.step,
            memory=self.memory,
        )

    def unfinished(self) -> Tensor:
        """Return which of the live rows have a position that the EOS rule wants decided, or linger over a region."""
        tokens_AL, steps_A = self.record.tokens_BL[self.alive_A], self.record.steps_B[self.alive_A]
        exists_AL = torch.arange(tokens_AL.shape[1], device=tokens_AL.device) < self.record.length_B[self.alive_A, None]
        masked_AL = (tokens_AL == self.denoiser.family.mask_token_id) & exists_AL
        open_AL = masked_AL
        if self.sampler.eos_rule == "stop":
            ends_AL = torch.isin(tokens_AL, self.eos) & exists_AL
            # Undecided before any end: the first mask comes before the first EOS.
            open_AL = masked_AL & (ends_AL.cumsum(dim=1) == 0)
        lingers_A = self.sampler.lingers(self.memory, masked_AL)
        return (open_AL.any(dim=1) | lingers_A) & (steps_A < self.sampler.steps_allowed(tokens_AL.shape[1]))

    def compact(self) -> None:
        """Drop finished rows: all of them, or down to the next power of two where shapes are static."""
        self.record.settle()
        live_A = self.unfinished()
        count = int(live_A.sum())
        size = count if not self.static else min(len(live_A), 1 << max(count - 1, 0).bit_length()) if count else 0
        if size == len(live_A):
            return
        # The live rows in their order, then finished ones that fill the bucket.
        kept_A = torch.argsort((~live_A).to(torch.int8), stable=True)[:size].sort().values
        self.alive_A = self.alive_A[kept_A]
        self.memory = {name: value[kept_A] for name, value in self.memory.items()}
        self.forward.select(kept_A)

    def decide(self) -> None:
        """Take one denoising step of the live rows."""
        state, sampler, live_A = self.state(), self.sampler, self.unfinished()
        if sampler.length is not None:
            self.record.lengths.append(self.record.length_B.clone())
        # The last allowed step commits all that is left; a finished row in a bucket has nothing open.
        last_A = state.step_A >= sampler.steps_allowed(state.canvas_AL.shape[1]) - 1
        quota = sampler.quota(state)
        window_AL = torch.where(last_A[:, None], state.masked_AL, quota.window_BL) & live_A[:, None]
        count_A = torch.where(last_A, state.canvas_AL.shape[1], quota.count_B)
        quota = quota._replace(window_BL=window_AL, count_B=count_A)
        state.window_AL, state.quota = window_AL, quota
        rows, flat_K, state.statistics = self._measure(state, live_A)
        quota = state.quota = narrowed(sampler.schedule, state, live_A & ~last_A)
        window_AL = state.window_AL = quota.window_BL
        if self.drafts:
            note_draft(self.record, state, self.alive_A, live_A)
        score_AL = sampler.scores(state)
        keys_AL = sampler.keys(state, score_AL)
        place_AL = rank(torch.where(window_AL, keys_AL.clamp(min=torch.finfo(keys_AL.dtype).min), -torch.inf))
        chosen_AL = sampler.choose(state, score_AL, quota) & window_AL
        # Whatever a selection of the user's says, a live row commits something: the loop ends.
        chosen_AL |= (place_AL == 0) & window_AL & ~chosen_AL.any(dim=1, keepdim=True)
        chosen_AL = (chosen_AL & ~sampler.waits(state)[:, None]) | (window_AL & last_A[:, None])
        state.chosen_AL = chosen_AL
        rank_AL = rank(torch.where(chosen_AL, -place_AL.double(), -torch.inf))
        scored = Scored(score_AL, chosen_AL, rank_AL, window_AL)
        if sampler.exact_choice:
            choice_A = rollout_choice(sampler, rows, flat_K, scored, state, self.banned)
            self.record.note(self.alive_A, "choice_logprobs", choice_A)
        elif sampler.plans:
            note_plan(self.record, state, scored, self.alive_A, live_A & ~last_A, sampler.keeps_features)
        self.memory = commit(self.record, sampler, state, scored, self.alive_A, live_A & ~last_A)
        self.record.steps_B[self.alive_A] = state.step_A + live_A

    def _measure(self, state: State, live_A: Tensor) -> tuple[Rows, Tensor, Statistics]:
        """Call the denoiser; return the logits of the asked positions, these positions, and their statistics."""
        sampler, (rows_A, length) = self.sampler, state.canvas_AL.shape
        asked_AL = asked_positions(sampler.reach, state, live_A)
        if self.drafts:
            asked_AL = asked_AL | (state.masked_AL & live_A[:, None])
        most = length if self.drafts else most_asked(sampler, self.forward.calls, length)
        flat_K = positions_of(asked_AL, most if self.static else None)
        safe_K = flat_K.clamp(max=rows_A * length - 1)
        called = self.forward(state, self.alive_A, asked_AL, safe_K)
        state.hidden = None if called.hidden_KD is None else (called.hidden_KD, flat_K)
        rows = sampler.transformed(called, state, safe_K)
        uniform_K = state.uniform("draw").view(-1)[safe_K]
        request = sampler.request(self.banned, state.eos_token_ids)
        current_K = state.canvas_AL.view(-1)[safe_K] if "current" in request.needs else None
        found = measure_rows(rows.logits, len(flat_K), rows.vocabulary, uniform_K, request, current_K)
        table = found.table(flat_K, rows_A, length)
        self._note_broken(state, table, asked_AL)
        return rows, flat_K, table

    def _note_broken(self, state: State, table: Statistics, asked_AL: Tensor) -> None:
        """Remember the first position of each row without a distribution; `check` raises, one look a few steps."""
        broken_AL = asked_AL & table.confidence.isnan()
        first_A = broken_AL.to(torch.int8).argmax(dim=1)
        seen_A3 = torch.stack([state.rollout_id_A, state.step_A, first_A], dim=1)
        self.broken[self.alive_A] = torch.where(broken_AL.any(dim=1, keepdim=True), seen_A3, self.broken[self.alive_A])

    def check(self) -> None:
        """Raise LogitError if some row's logits were no distribution."""
        if bool((self.broken[:, 0] >= 0).any()):
            rollout, step, position = min(self.broken[self.broken[:, 0] >= 0].tolist(), key=lambda found: found[1])
            raise LogitError(
                f"rollout {rollout}, step {step}: the logits at canvas position {position} are NaN, infinite or -inf "
                "for every allowed token; check the weights, or resume from an earlier checkpoint."
            )


def _trajectory(run: _Run) -> Trajectory:
    """Return what a run has recorded."""
    record, sampler, family = run.record, run.sampler, run.denoiser.family
    resizes = sampler.length is not None
    return Trajectory(
        prompt_BQ=run.prompt_BQ,
        prompt_mask_BQ=run.prompt_mask_BQ,
        tokens_BL=record.tokens_BL,
        source_BL=record.source_BL,
        born_BL=record.born_BL,
        rank_BL=record.rank_BL,
        logprob_BL=record.logprob_BL,
        steps_B=record.steps_B,
        rollout_id_B=run.rollout_id_B,
        temperature=sampler.temperature,
        mask_token_id=family.mask_token_id,
        eos_token_ids=tuple(family.eos_token_ids),
        banned_token_ids=run.banned,
        choice_logprob_BS=record.by_step("choice_logprobs") if sampler.exact_choice or sampler.plans else None,
        retracted=record.lifetimes() if sampler.revises else None,
        length_BS=record.lengths_by_step() if resizes else None,
        appeared_BL=record.appeared_BL if resizes else None,
        offset_B=None if family.attention == "full" else run.offset_B,
        **record.seen(),
        **drafts_by_step(record),
    )


def asked_positions(reach: str, state: State, live_A: Tensor) -> Tensor:
    """Return `asked_AL`, the positions whose statistics a step needs; see `Sampler.reach`."""
    assert state.window_AL is not None and state.quota is not None
    if reach == "window":
        return state.window_AL
    if reach == "everywhere":
        return state.exists_AL & ~state.given_AL & live_A[:, None]
    if reach == "open":
        return state.masked_AL & live_A[:, None]
    asked_AL = state.stood_AL & live_A[:, None]
    if reach == "region" and state.quota.region_BL is not None:
        asked_AL &= state.quota.region_BL
    return asked_AL | state.window_AL


def most_asked(sampler: Sampler, step: int, length: int) -> int:
    """Return the most positions that a row asks for at a step: the last allowed one opens the whole canvas."""
    return length if step >= sampler.steps_allowed(length) - 1 else sampler.width(length)


def positions_of(asked_AL: Tensor, width: int | None) -> Tensor:
    """Return the asked positions as row x L + position: just those, or `width` a row without a look of the host.

    In the second case the places that a row does not need hold A x L, one behind the last position.
    """
    if width is None:
        return asked_AL.view(-1).nonzero().squeeze(1)
    rows, length = asked_AL.shape
    place_AW = torch.argsort((~asked_AL).to(torch.int8), dim=1, stable=True)[:, :width]
    row_A1 = torch.arange(rows, device=asked_AL.device)[:, None]
    flat_AW = torch.where(asked_AL.gather(1, place_AW), row_A1 * length + place_AW, rows * length)
    return flat_AW.view(-1)


def block_offset(family: Any, prompt_mask_BQ: Tensor) -> Tensor:
    """Return how many tokens of each prompt share a block with the first of its canvas (`shared_block` families)."""
    tokens_B = prompt_mask_BQ.sum(dim=1)
    if family.attention == "full" or family.alignment != "shared_block":
        return torch.zeros_like(tokens_B)
    return tokens_B % (family.block_length or 1)
