"""The running canvas: what the parts of a sampler may read, and the record from which a trajectory is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .measures import Statistics
from .noise import uniform
from .trajectory import EDITED, GIVEN, NEVER, PAD, SAMPLED, Lifetimes

if TYPE_CHECKING:
    from .planned import Planned
    from .schedules import Quota


@dataclass
class State:
    """The live rows of a rollout before a step's commits; parts read it, the engine alone writes it.

    Shapes: `A` live rows, `L` canvas. `canvas_AL` holds the mask id where undecided (`masked_AL`), `exists_AL` is False
    behind a canvas's present end. `given_AL` are tokens of the start that nothing may take back, `draft_AL` those that
    may be. `step_A` counts denoiser calls from 0, `open_A` is the number of positions that were
    open at the start, `offset_A` the tokens of the prompt that share a block with the canvas's first. `born_AL` is the
    step that committed a token (-1: none, or given), `committed_AL` the score it was committed with (NaN: none).
    `group_A` numbers the groups of rollouts from 0. `window_AL`, `quota`, `hidden` (states `[K, D]` and the positions,
    row x L + position, that they are of), `statistics`, `planned` and `chosen_AL` are those of the step and None before
    they are known. `memory` keeps what a part wants to find again at the next step:
    tensors whose first dimension is A.
    """

    canvas_AL: Tensor
    masked_AL: Tensor
    exists_AL: Tensor
    given_AL: Tensor
    draft_AL: Tensor
    step_A: Tensor
    open_A: Tensor
    offset_A: Tensor
    born_AL: Tensor
    committed_AL: Tensor
    rollout_id_A: Tensor
    group_A: Tensor
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    seed: int
    step: int
    window_AL: Tensor | None = None
    quota: Quota | None = None
    hidden: tuple[Tensor, Tensor] | None = None
    statistics: Statistics | None = None
    planned: Planned | None = None
    chosen_AL: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(canvas_AL: Tensor, mask_token_id: int, *, step: int = 0, eos_token_ids: tuple[int, ...] = ()) -> State:
        """Return the state of canvases of which nothing else is known, for calling parts by themselves."""
        masked_AL, zero_A = canvas_AL == mask_token_id, torch.zeros_like(canvas_AL[:, 0])
        return State(
            canvas_AL=canvas_AL,
            masked_AL=masked_AL,
            exists_AL=torch.ones_like(masked_AL),
            given_AL=~masked_AL,
            draft_AL=torch.zeros_like(masked_AL),
            step_A=zero_A + step,
            open_A=masked_AL.sum(1),
            offset_A=zero_A,
            born_AL=torch.full_like(canvas_AL, NEVER, dtype=torch.int16),
            committed_AL=torch.full(canvas_AL.shape, torch.nan, device=canvas_AL.device),
            rollout_id_A=torch.arange(len(canvas_AL), device=canvas_AL.device),
            group_A=torch.arange(len(canvas_AL), device=canvas_AL.device),
            mask_token_id=mask_token_id,
            eos_token_ids=eos_token_ids,
            seed=0,
            step=0,
        )

    @property
    def stood_AL(self) -> Tensor:
        """Tokens that the step's call saw and that may be taken back: decided ones, and those of a draft."""
        return ~self.masked_AL & self.exists_AL & ~self.given_AL

    def uniform(self, purpose: str) -> Tensor:
        """Return fp64 uniforms `[A, L]` keyed by (seed, purpose, step, rollout, denoising step, position)."""
        place_L = torch.arange(self.canvas_AL.shape[1], device=self.canvas_AL.device)
        return uniform(self.seed, purpose, self.step, self.rollout_id_A[:, None], self.step_A[:, None], place_L)


@dataclass
class Record:
    """All rows of a running `denoise`, finished or not, and what is known of every position.

    `draft_BL` are given tokens that may be taken back, `longest_B` the most positions each canvas had so far. What was
    taken back lies in `retracted` as dense tables a step, until `settle` makes lists of them.
    """

    tokens_BL: Tensor
    source_BL: Tensor
    draft_BL: Tensor
    born_BL: Tensor
    rank_BL: Tensor
    logprob_BL: Tensor
    committed_BL: Tensor
    steps_B: Tensor
    open_B: Tensor
    length_B: Tensor
    longest_B: Tensor
    appeared_BL: Tensor
    choice_logprobs: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    candidates: list[Tensor] = field(default_factory=list)
    ends: list[Tensor] = field(default_factory=list)
    pasts: list[Tensor] = field(default_factory=list)
    retracted: list[tuple[Tensor, ...]] = field(default_factory=list)
    settled: list[tuple[Tensor, ...]] = field(default_factory=list)
    lengths: list[Tensor] = field(default_factory=list)
    drafts: list[tuple[Tensor, ...]] = field(default_factory=list)

    @staticmethod
    def start(canvas_BL: Tensor, draft_BL: Tensor | None, length_B: Tensor, mask_token_id: int) -> Record:
        """Return the record of a canvas on which nothing has been sampled yet."""
        masked_BL = canvas_BL == mask_token_id
        draft_BL = torch.zeros_like(masked_BL) if draft_BL is None else draft_BL
        empty = torch.full_like(canvas_BL, NEVER, dtype=torch.int16)
        exists_BL = torch.arange(canvas_BL.shape[1], device=canvas_BL.device) < length_B[:, None]
        return Record(
            tokens_BL=canvas_BL.clone(),
            source_BL=torch.where(masked_BL, PAD, GIVEN).to(torch.int8),
            draft_BL=draft_BL & ~masked_BL,
            born_BL=empty,
            rank_BL=empty.clone(),
            logprob_BL=torch.zeros(canvas_BL.shape, device=canvas_BL.device),
            committed_BL=torch.full(canvas_BL.shape, torch.nan, device=canvas_BL.device),
            steps_B=torch.zeros(len(canvas_BL), dtype=torch.long, device=canvas_BL.device),
            open_B=(masked_BL & exists_BL).sum(1),
            length_B=length_B.clone(),
            longest_B=length_B.clone(),
            appeared_BL=torch.zeros_like(empty),
        )

    def rows(self, alive_A: Tensor, **more: Any) -> State:
        """Return the state of the rows `alive_A`."""
        canvas_AL = self.tokens_BL[alive_A]
        place_L = torch.arange(canvas_AL.shape[1], device=canvas_AL.device)
        exists_AL = place_L < self.length_B[alive_A][:, None]
        given_AL, draft_AL = self.source_BL[alive_A] == GIVEN, self.draft_BL[alive_A]
        return State(
            canvas_AL=canvas_AL,
            masked_AL=(canvas_AL == more["mask_token_id"]) & exists_AL,
            exists_AL=exists_AL,
            given_AL=given_AL & ~draft_AL,
            draft_AL=given_AL & draft_AL,
            step_A=self.steps_B[alive_A],
            open_A=self.open_B[alive_A],
            born_AL=self.born_BL[alive_A],
            committed_AL=self.committed_BL[alive_A],
            **more,
        )

    def retract(self, alive_A: Tensor, taken_AL: Tensor, step_A: Tensor, mask_token_id: int) -> None:
        """Take back the tokens of `taken_AL`: write down their lifetimes and mask them."""
        names = ("tokens_BL", "born_BL", "rank_BL", "logprob_BL")
        self.retracted.append((alive_A, taken_AL, step_A, *(getattr(self, name)[alive_A] for name in names)))
        for name, empty in (
            ("tokens_BL", mask_token_id),
            ("source_BL", PAD),
            ("born_BL", NEVER),
            ("rank_BL", NEVER),
            ("logprob_BL", 0.0),
            ("committed_BL", torch.nan),
        ):
            table = getattr(self, name)
            table[alive_A] = table[alive_A].masked_fill(taken_AL, empty)

    def write(
        self,
        alive_A: Tensor,
        chosen_AL: Tensor,
        token_AL: Tensor,
        logprob_AL: Tensor,
        score_AL: Tensor,
        rank_AL: Tensor,
        step_A: Tensor,
    ) -> None:
        """Commit the chosen tokens with log-probability, score, order and step; dense writes, no host sync."""
        born_AL = step_A[:, None].expand_as(token_AL)
        source_AL = torch.full_like(token_AL, SAMPLED)
        for name, value_AL in (
            ("tokens_BL", token_AL),
            ("logprob_BL", logprob_AL),
            ("committed_BL", score_AL),
            ("rank_BL", rank_AL),
            ("born_BL", born_AL),
            ("source_BL", source_AL),
        ):
            table = getattr(self, name)
            table[alive_A] = torch.where(chosen_AL, value_AL.to(table.dtype), table[alive_A])

    def overwrite(self, alive_A: Tensor, edited_AL: Tensor, token_AL: Tensor, score_AL: Tensor, step_A: Tensor) -> None:
        """Put tokens that the sampler's rule, and no draw, decided: they have a step, and are no actions."""
        source_AL = torch.full_like(token_AL, EDITED)
        for name, value_AL in (
            ("tokens_BL", token_AL),
            ("committed_BL", score_AL),
            ("born_BL", step_A[:, None].expand_as(token_AL)),
            ("source_BL", source_AL),
        ):
            table = getattr(self, name)
            table[alive_A] = torch.where(edited_AL, value_AL.to(table.dtype), table[alive_A])

    def settle(self) -> None:
        """Make lists of what was taken back since the last call, in one look of the host at the device.

        The live rows have been the same since then.
        """
        if not self.retracted:
            return
        alive_A = self.retracted[0][0]
        taken_SAL, step_SA, *tables = (torch.stack(values) for values in list(zip(*self.retracted, strict=True))[1:])
        step_R, row_R, position_R = taken_SAL.nonzero(as_tuple=True)
        token_R, born_R, rank_R, logprob_R = (table[step_R, row_R, position_R] for table in tables)
        lists = (token_R, born_R.long(), step_SA[step_R, row_R], rank_R.long(), logprob_R)
        self.settled.append((alive_A[row_R], position_R, *lists))
        self.retracted.clear()

    def lifetimes(self) -> Lifetimes:
        """Return the tokens that were taken back, by rollout."""
        self.settle()
        if not self.settled:
            return Lifetimes.none(self.tokens_BL.device, self.logprob_BL.dtype)
        joined = [torch.cat(values) for values in zip(*self.settled, strict=True)]
        order_R = torch.argsort(joined[0], stable=True)
        return Lifetimes(*(value[order_R] for value in joined))

    def lengths_by_step(self) -> Tensor:
        """Return the lengths that the canvases had at each step, and at the end `[B, S + 1]`."""
        return torch.stack([*self.lengths, self.length_B], dim=1)

    def by_step(self, name: str) -> Tensor:
        """Return one of the lists of steps as a table `[B, S, ...]`."""
        steps = getattr(self, name)
        return torch.stack(steps, dim=1) if steps else self.logprob_BL[:, :0]

    def seen(self) -> dict[str, Tensor]:
        """Return the ends of blocks that a planner chose, and what it saw and could choose from where it was kept."""
        names = {"features_BSLF": "features", "candidate_BSL": "candidates", "end_BS": "ends", "past_BSMD": "pasts"}
        return {field: self.by_step(name) for field, name in names.items() if getattr(self, name)}

    def note(self, alive_A: Tensor, name: str, value_A: Tensor) -> None:
        """Add a step's table of the rows `alive_A` to one of the lists, 0 in the others."""
        empty_B = value_A.new_zeros(len(self.tokens_BL), *value_A.shape[1:])
        getattr(self, name).append(empty_B.index_copy(0, alive_A, value_A))
