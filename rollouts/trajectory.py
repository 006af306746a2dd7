"""A trajectory is data: which step decided which token, from which every canvas the denoiser saw is rebuilt exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

PAD, SAMPLED, GIVEN, EDITED, HINT = 0, 1, 2, 3, 4
NEVER = -1
DRAFTS = ("draft_BSL", "draft_logprob_BSL", "draft_window_BSL")
BY_STEP = ("choice_logprob_BS", "length_BS", "features_BSLF", "candidate_BSL", "end_BS", "past_BSMD", *DRAFTS)


class Lifetimes(NamedTuple):
    """R tokens that were taken back: entry r stood at `position_R` of rollout `row_R` from `born_R` to `died_R`.

    `[born, died)`: the step that committed the token and the step that took it back, so that the canvases before steps
    born + 1 to died show it. `born` is -1 for a given token, `rank` for one that was not drawn. `rank_R` and
    `logprob_R` are as in `Trajectory`. Ascending in `row_R`.
    """

    row_R: Tensor
    position_R: Tensor
    token_R: Tensor
    born_R: Tensor
    died_R: Tensor
    rank_R: Tensor
    logprob_R: Tensor

    @staticmethod
    def none(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Lifetimes:
        """Return an empty list."""
        # Tables of their own: a checkpoint stores no two that share memory.
        whole = {name: torch.zeros(0, dtype=torch.long, device=device) for name in Lifetimes._fields[:-1]}
        return Lifetimes(**whole, logprob_R=torch.zeros(0, dtype=dtype, device=device))

    def select(self, index_B: Tensor, rows: int) -> Lifetimes:
        """Return the entries of the rollouts `index_B` of `rows`, renumbered in their order."""
        if index_B.dtype == torch.bool:
            index_B = index_B.nonzero().squeeze(1)
        first_B = torch.searchsorted(self.row_R, torch.arange(rows + 1, device=self.row_R.device))
        count_N = (first_B[1:] - first_B[:-1])[index_B]
        row_R = torch.repeat_interleave(count_N)
        entry_R = _ranges(first_B[index_B], count_N)
        return Lifetimes(row_R, *(value[entry_R] for value in self[1:]))

    def to(self, device: torch.device | str) -> Lifetimes:
        """Return the list on `device`."""
        return Lifetimes(*(value.to(device) for value in self))


class Actions(NamedTuple):
    """The tokens that a policy drew, as flat lists: rollout, canvas position, step, token and behaviour log-prob."""

    row_K: Tensor
    position_K: Tensor
    step_K: Tensor
    token_K: Tensor
    logprob_K: Tensor


@dataclass(frozen=True)
class Trajectory:
    """How B canvases of L tokens were decided, in O(L) a rollout.

    Shapes: `B` rollouts, `Q` prompt tokens (left padded), `L` canvas, `S` steps of the longest row.
    `tokens_BL` is the final canvas with the mask id where nothing was decided (behind the first EOS, when the sampler
    stops there). `source_BL` says PAD (undecided), SAMPLED, GIVEN, EDITED (by a rule) or HINT (given, from a worked
    solution). `born_BL` is the step, counted from 0, that committed a token and `rank_BL` its place inside the step;
    both are -1 where nothing was sampled. `logprob_BL` is the behaviour log-probability in nats at `temperature`, 0
    where nothing was sampled.
    `choice_logprob_BS` is the log-probability of the *positions* chosen at a step where they depend on drawn tokens or
    a random order (samplers.md 1.2, 1.3). `banned_token_ids`, the mask and where it is suppressed EOS, had probability
    0. `offset_B` counts the prompt's tokens in the canvas's first block, where a block-causal family has any there.

    `retracted` are the tokens that a remasking took back or an editing replaced. Where the canvas changes its length,
    `length_BS` is the number of positions at each step and, in one column more, at the end, and `appeared_BL` the step
    from which on a position exists: the canvas of a step is the first `length` of the positions that have appeared, in
    their order.

    Where drafts were asked for (`rollouts.drafts`), `draft_BSL` holds the token (int32) that a step drew at each
    position that was masked before it, the mask id elsewhere, `draft_logprob_BSL` its log-probability and
    `draft_window_BSL` whether the step could have committed it.

    Where a planner is trained, `features_BSLF` is what it saw at each step (fp16) and `candidate_BSL` what it could
    choose from, nothing at a step that was not its own: its update calls no denoiser. Candidates that the step saw
    decided are those that it could take back. Where it chooses the lengths of blocks, `end_BS` (int16) is the end of
    the block that begins at a step, behind its last position, 0 where none does; `candidate_BSL` are last positions it
    could have, and `past_BSMD` (fp16) is what the planner saw of the M blocks before.
    """

    prompt_BQ: Tensor
    prompt_mask_BQ: Tensor
    tokens_BL: Tensor
    source_BL: Tensor
    born_BL: Tensor
    rank_BL: Tensor
    logprob_BL: Tensor
    steps_B: Tensor
    rollout_id_B: Tensor
    temperature: float
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...] = ()
    choice_logprob_BS: Tensor | None = None
    retracted: Lifetimes | None = None
    length_BS: Tensor | None = None
    appeared_BL: Tensor | None = None
    offset_B: Tensor | None = None
    draft_BSL: Tensor | None = None
    draft_logprob_BSL: Tensor | None = None
    draft_window_BSL: Tensor | None = None
    features_BSLF: Tensor | None = None
    candidate_BSL: Tensor | None = None
    end_BS: Tensor | None = None
    past_BSMD: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens_BL.shape[0]

    @property
    def canvas(self) -> int:
        """The canvas length L."""
        return self.tokens_BL.shape[1]

    def canvas_before(self, row_N: Tensor, step_N: Tensor) -> Tensor:
        """Return `canvas_NL`, the exact canvas that the denoiser saw at step `step_N` of rollout `row_N`."""
        born_NL = self.born_BL[row_N]
        decided_NL = is_given(self.source_BL[row_N]) | ((born_NL >= 0) & (born_NL < step_N[:, None]))
        canvas_NL = torch.where(decided_NL, self.tokens_BL[row_N], self.mask_token_id)
        if self.retracted is None:
            return canvas_NL
        past = self.retracted.select(row_N, len(self))
        shown_R = (past.born_R < step_N[past.row_R]) & (step_N[past.row_R] <= past.died_R)
        canvas_NL[past.row_R[shown_R], past.position_R[shown_R]] = past.token_R[shown_R]
        return canvas_NL

    def drawn_at(self, row_N: Tensor, step_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return `token_NL` (mask id: none) and `rank_NL` (-1) of what step `step_N` of rollout `row_N` drew.

        Tokens that were taken back later are among them.
        """
        here_NL = (self.source_BL[row_N] == SAMPLED) & (self.born_BL[row_N] == step_N[:, None])
        token_NL = torch.where(here_NL, self.tokens_BL[row_N], self.mask_token_id)
        rank_NL = torch.where(here_NL, self.rank_BL[row_N], NEVER)
        if self.retracted is not None:
            past = self.retracted.select(row_N, len(self))
            here_R = (past.born_R == step_N[past.row_R]) & (past.rank_R >= 0)
            place = past.row_R[here_R], past.position_R[here_R]
            token_NL[place] = past.token_R[here_R]
            rank_NL[place] = past.rank_R[here_R].to(rank_NL.dtype)
        return token_NL, rank_NL

    def taken_at(self, row_N: Tensor, step_N: Tensor) -> Tensor:
        """Return `taken_NL`, the tokens that step `step_N` of rollout `row_N` took back or replaced."""
        taken_NL = torch.zeros_like(self.born_BL[row_N], dtype=torch.bool)
        if self.retracted is not None:
            past = self.retracted.select(row_N, len(self))
            here_R = past.died_R == step_N[past.row_R]
            taken_NL[past.row_R[here_R], past.position_R[here_R]] = True
        return taken_NL

    def exists_before(self, row_N: Tensor, step_N: Tensor) -> Tensor | None:
        """Return `exists_NL`, the positions that the canvas had at a step; None where no length ever changed."""
        if self.length_BS is None or self.appeared_BL is None:
            return None
        appeared_NL = self.appeared_BL[row_N] <= step_N[:, None]
        return appeared_NL & (appeared_NL.cumsum(dim=1) <= self.length_BS[row_N, step_N][:, None])

    @property
    def length_B(self) -> Tensor:
        """Tokens up to and including the first EOS; L without one."""
        ends_BL = torch.isin(self.tokens_BL, torch.tensor(self.eos_token_ids, device=self.tokens_BL.device))
        first_B = ends_BL.to(torch.int8).argmax(dim=1) + 1
        return torch.where(ends_BL.any(dim=1), first_B, self.canvas)

    def action_BL(self, tokens: str = "until_eos") -> Tensor:
        """Return which tokens are actions of the policy: the sampled ones, `until_eos` or `all` of them."""
        sampled_BL = self.source_BL == SAMPLED
        if tokens == "all":
            return sampled_BL
        if tokens != "until_eos":
            raise ValueError(f"tokens: '{tokens}' is not one of until_eos, all.")
        return sampled_BL & self._until_eos()

    def hint_BL(self, tokens: str = "until_eos") -> Tensor:
        """Return which tokens are hints, `until_eos` or `all` of them."""
        hint_BL = self.source_BL == HINT
        return hint_BL & self._until_eos() if tokens == "until_eos" else hint_BL

    def _until_eos(self) -> Tensor:
        return torch.arange(self.canvas, device=self.born_BL.device) < self.length_B[:, None]

    def actions(self, tokens: str = "until_eos") -> Actions:
        """Return the tokens that are actions of the policy, those taken back included, by rollout and step.

        `until_eos` leaves out the positions behind the final canvas's first EOS.
        """
        action_BL = self.action_BL(tokens)
        row_K, position_K = action_BL.nonzero(as_tuple=True)
        found = [row_K, position_K, *(x[row_K, position_K] for x in (self.born_BL, self.tokens_BL, self.logprob_BL))]
        if self.retracted is not None:
            past = self.retracted
            kept_R = past.rank_R >= 0
            if tokens == "until_eos":
                kept_R &= past.position_R < self.length_B[past.row_R]
            lists = (past.row_R, past.position_R, past.born_R, past.token_R, past.logprob_R)
            found = [torch.cat([a, b[kept_R].to(a.dtype)]) for a, b in zip(found, lists, strict=True)]
        row_K, position_K, step_K = found[0], found[1], found[2].long()
        steps = int(self.steps_B.max()) + 1 if len(self) else 1
        order_K = torch.argsort((row_K * steps + step_K) * self.canvas + position_K)
        return Actions(*(x[order_K] for x in (row_K, position_K, step_K, found[3], found[4])))

    def select(self, index_B: Tensor) -> Trajectory:
        """Return the rollouts `index_B` (indices or a bool mask)."""
        kept = {name: value[index_B] for name, value in self._tensors().items()}
        past = None if self.retracted is None else self.retracted.select(index_B, len(self))
        return replace(self, **kept, retracted=past)

    def to(self, device: torch.device | str) -> Trajectory:
        """Return the trajectory on `device`."""
        moved = {name: value.to(device) for name, value in self._tensors().items()}
        return replace(self, **moved, retracted=None if self.retracted is None else self.retracted.to(device))

    def without_drafts(self) -> Trajectory:
        """Return the trajectory without its drafts, for what is kept until the last inner step."""
        return replace(self, draft_BSL=None, draft_logprob_BSL=None, draft_window_BSL=None)

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Join trajectories along B; prompts are padded left and step tables right to the longest."""
        first = parts[0]
        width = max(part.prompt_BQ.shape[1] for part in parts)
        joined: dict[str, Any] = {}
        for name in first._tensors():
            values = [getattr(part, name) for part in parts]
            if name.startswith("prompt"):
                values = [torch.nn.functional.pad(v, (width - v.shape[1], 0)) for v in values]
            elif name in BY_STEP:
                steps = max(v.shape[1] for v in values)
                values = [_longer(v, steps, first.mask_token_id if name == "draft_BSL" else 0) for v in values]
            joined[name] = torch.cat(values)
        if first.retracted is not None:
            offset, lists = 0, []
            for part in parts:
                assert part.retracted is not None
                lists.append(part.retracted._replace(row_R=part.retracted.row_R + offset))
                offset += len(part)
            joined["retracted"] = Lifetimes(*map(torch.cat, zip(*lists, strict=True)))
        return replace(first, **joined)

    def _tensors(self) -> dict[str, Any]:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    def validate(self) -> None:
        """Assert what every trajectory satisfies (used by tests and after loading a checkpoint)."""
        sampled = self.source_BL == SAMPLED
        decided = sampled | (self.source_BL == EDITED)
        assert bool(((self.born_BL >= 0) == decided).all()), "exactly the sampled and edited tokens have a step"
        assert bool((self.born_BL < self.steps_B[:, None]).all()), "no token is born after the last step"
        assert bool((self.logprob_BL[~sampled] == 0).all()), "only sampled tokens have a log-probability"
        assert bool((self.logprob_BL <= 0).all()), "a log-probability is at most 0"
        undecided = self.tokens_BL == self.mask_token_id
        assert bool((undecided == (self.source_BL == PAD)).all()), "undecided tokens, and only those, are masks"
        if self.draft_BSL is not None:
            row_N, step_N = (torch.arange(self.draft_BSL.shape[1]) < self.steps_B.cpu()[:, None]).nonzero(as_tuple=True)
            open_NL = self.canvas_before(row_N, step_N) == self.mask_token_id
            drawn_NL = self.draft_BSL[row_N, step_N] != self.mask_token_id
            assert bool((open_NL == drawn_NL).all()), "a draft fills the open positions, and only those"
            token_NL, _ = self.drawn_at(row_N, step_N)
            kept_NL = token_NL != self.mask_token_id
            assert bool((self.draft_BSL[row_N, step_N][kept_NL] == token_NL[kept_NL]).all()), "commits are of the draft"
        if self.retracted is not None:
            past = self.retracted
            assert bool((past.born_R < past.died_R).all()), "a token that was taken back stood for a step at least"
            assert bool((past.row_R.diff() >= 0).all()), "lifetimes are sorted by rollout"
            assert bool((past.died_R < self.steps_B[past.row_R]).all()), "nothing is taken back after the last step"


def is_given(source: Tensor) -> Tensor:
    """Return where a table of sources says that a token was on the canvas before the first step."""
    return (source == GIVEN) | (source == HINT)


def _ranges(first_N: Tensor, count_N: Tensor) -> Tensor:
    """Return first_0, ..., first_0 + count_0 - 1, first_1, ... as one list."""
    start_N = count_N.cumsum(0) - count_N
    owner_R = torch.repeat_interleave(count_N)
    return torch.arange(len(owner_R), device=first_N.device) - start_N[owner_R] + first_N[owner_R]


def _longer(table_BS: Tensor, steps: int, value: float = 0) -> Tensor:
    """Return a table of steps with `value` up to `steps` of them."""
    sides = (0, 0) * (table_BS.ndim - 2) + (0, steps - table_BS.shape[1])
    return torch.nn.functional.pad(table_BS, sides, value=value)
