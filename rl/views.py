"""Views: which tokens are scored on which canvases, as flat lists of actions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rollouts.sampler import Sampler
from ..rollouts.state import State
from ..rollouts.trajectory import HINT, Trajectory, is_given

VIEW_TABLES, TOKEN_TABLES = ("hidden_NL", "prompt_hidden_NQ", "sample_N"), ("factor_K", "entropy_K")


class Actions(NamedTuple):
    """The A = K + C actions of some views: K scored tokens in the order of `Views`, then C choices, one a view.

    `row_A` and `view_A` say whose action it is, `sample_A` of which of the estimator's `draws`, `place_A` at which
    position of all canvases end to end (choices: behind them, one number each), `token_A` is False for choices. C is 0
    unless choices are scored.
    """

    row_A: Tensor
    view_A: Tensor
    sample_A: Tensor
    place_A: Tensor
    token_A: Tensor
    draws: int = 1


@dataclass(frozen=True)
class Views:
    """N canvases of a trajectory and the K tokens that are scored on them.

    A view is the canvas before step `step_N` of rollout `row_N`. It is rebuilt when it is scored, a chunk at a time: no
    N x L table exists, and memory is that of the K <= B x L tokens however many steps there were. `view_K` (ascending),
    `position_K` (ascending inside a view) and `target_K` list the tokens. `inclusion_N` is the probability with which
    the estimator kept the view; `count_B` tokens and `views_B` views are what it would score of a rollout if it kept
    all. `behaviour_K` are the rollout's own log-probs of the tokens, on these very canvases where `recorded`. With a
    `sampler` each view has one more action, the choice of its positions (samplers.md section 1.3).

    *Estimated* views show canvases that no step saw: `hidden_NL` says which of the step's tokens are under the mask,
    and `prompt_hidden_NQ`, where given, which of the prompt's. `factor_K` is what each log-prob counts in the estimate
    of its rollout's log-likelihood, and `sample_N` which of the estimator's `draws` a view belongs to. The rollout has
    no log-prob of these. With `clean` a view is scored behind the clean blocks of its rollout, in one pass over
    [x_t ; x_0] (block-causal families). `entropy_K` is the old policy's at each token, in nats, where a weight asks.
    """

    trajectory: Trajectory
    row_N: Tensor
    step_N: Tensor
    inclusion_N: Tensor
    view_K: Tensor
    position_K: Tensor
    target_K: Tensor
    behaviour_K: Tensor
    count_B: Tensor
    views_B: Tensor
    sampler: Sampler | None = None
    hidden_NL: Tensor | None = None
    prompt_hidden_NQ: Tensor | None = None
    factor_K: Tensor | None = None
    sample_N: Tensor | None = None
    draws: int = 1
    clean: bool = False
    recorded: bool = True
    entropy_K: Tensor | None = None

    def __len__(self) -> int:
        return self.row_N.shape[0]

    @property
    def row_K(self) -> Tensor:
        """The rollout of each scored token."""
        return self.row_N[self.view_K]

    @property
    def actions(self) -> Actions:
        """The scored tokens, followed by one choice a view where choices are scored."""
        choices = 0 if self.sampler is None else len(self)
        view_C = torch.arange(choices, device=self.view_K.device)
        view_A = torch.cat([self.view_K, view_C])
        token_A = torch.arange(len(view_A), device=view_A.device) < len(self.view_K)
        sample_A = torch.zeros_like(view_A) if self.sample_N is None else self.sample_N[view_A]
        length = self.trajectory.canvas
        place_K = self.row_K * length + self.position_K
        place_A = torch.cat([place_K, len(self.trajectory) * length + view_C])
        return Actions(self.row_N[view_A], view_A, sample_A, place_A, token_A, self.draws)

    @property
    def hint_K(self) -> Tensor:
        """Which scored tokens are hints."""
        return self.trajectory.source_BL[self.row_K, self.position_K] == HINT

    @property
    def estimated(self) -> bool:
        """Whether the canvases are an estimator's own, so that the rollout's log-probs are those of other events."""
        return self.hidden_NL is not None

    def prompts(self) -> Tensor:
        """Return `prompt_NQ`, mask id where the estimator hides a token."""
        prompt_NQ = self.trajectory.prompt_BQ[self.row_N]
        if self.prompt_hidden_NQ is None:
            return prompt_NQ
        return prompt_NQ.masked_fill(self.prompt_hidden_NQ, self.trajectory.mask_token_id)

    def seen(self, table_NL: Tensor) -> Tensor:
        """Return a table of positions as the step saw them: those that its canvas had come first, in their order."""
        exists_NL = self.trajectory.exists_before(self.row_N, self.step_N)
        if exists_NL is None:
            return table_NL
        return table_NL.gather(1, torch.argsort((~exists_NL).to(torch.int8), dim=1, stable=True))

    def exists(self) -> Tensor | None:
        """Return `exists_NL`, which of the seen positions the step's canvas had; None where no length ever changed."""
        exists_NL = self.trajectory.exists_before(self.row_N, self.step_N)
        return None if exists_NL is None else self.seen(exists_NL)

    def canvas(self) -> Tensor:
        """Return `canvas_NL`, what the denoiser saw, mask id where undecided."""
        canvas_NL = self.trajectory.canvas_before(self.row_N, self.step_N)
        if self.hidden_NL is not None:
            canvas_NL.masked_fill_(self.hidden_NL, self.trajectory.mask_token_id)
        return self.seen(canvas_NL)

    def finished(self) -> Tensor:
        """Return `tokens_NL`, the canvases without anything hidden: x_0 of the pass over [x_t ; x_0]."""
        return self.seen(self.trajectory.canvas_before(self.row_N, self.step_N))

    def scored(self) -> Tensor:
        """Return `scored_NL`, true at the scored tokens; its row-major order is that of the K tokens."""
        scored_NL = torch.zeros(len(self), self.trajectory.canvas, dtype=torch.bool, device=self.view_K.device)
        scored_NL[self.view_K, self.position_K] = True
        return self.seen(scored_NL)

    def window(self) -> Tensor:
        """Return `window_NL`, the positions that the selection could choose from; needs a `sampler`."""
        assert self.sampler is not None, "only a sampler knows its window"
        return self.sampler.quota(self.state()).window_BL

    def state(self) -> State:
        """Return what a sampler's parts may read of the recorded canvases."""
        trajectory, row_N = self.trajectory, self.row_N
        state = State.of(self.canvas(), trajectory.mask_token_id, eos_token_ids=trajectory.eos_token_ids)
        exists_NL = self.exists()
        if exists_NL is not None:
            state = replace(state, exists_AL=exists_NL, masked_AL=state.masked_AL & exists_NL)
        # Tokens of a draft count as given until they are taken back: what was open is what the first call saw open.
        start_N = torch.zeros_like(self.step_N)
        open_NL = trajectory.canvas_before(row_N, start_N) == trajectory.mask_token_id
        first_NL = trajectory.exists_before(row_N, start_N)
        return replace(
            state,
            given_AL=self.seen(is_given(trajectory.source_BL[row_N])),
            step_A=self.step_N,
            open_A=(open_NL if first_NL is None else open_NL & first_NL).sum(1),
            offset_A=state.offset_A if trajectory.offset_B is None else trajectory.offset_B[row_N],
            born_AL=self.seen(trajectory.born_BL[row_N]),
            rollout_id_A=trajectory.rollout_id_B[row_N],
        )

    def tokens(self, start: int, stop: int) -> slice:
        """Return the slice of the K tokens that belongs to the views `start` to `stop`."""
        edges = torch.searchsorted(self.view_K, torch.tensor([start, stop], device=self.view_K.device)).tolist()
        return slice(edges[0], edges[1])

    def part(self, start: int, stop: int) -> Views:
        """Return the views `start` to `stop`."""
        kept_N, kept_K = slice(start, stop), self.tokens(start, stop)
        return self._replaced(kept_N, kept_K, self.view_K[kept_K] - start)

    def where(self, keep_N: Tensor) -> Views:
        """Return the views for which the bool `keep_N` is true."""
        keep_K = keep_N[self.view_K]
        return self._replaced(keep_N, keep_K, (keep_N.cumsum(0) - 1)[self.view_K[keep_K]])

    def only(self, keep_K: Tensor) -> Views:
        """Return estimated views without the tokens for which `keep_K` is false, which stay hidden."""
        left = {name: getattr(self, name)[keep_K] for name in ("view_K", "position_K", "target_K", "behaviour_K")}
        left |= {name: value[keep_K] for name, value in self.optional(TOKEN_TABLES).items()}
        place_K = self.row_K * self.trajectory.canvas + self.position_K
        place = torch.unique(place_K[keep_K])
        count_B = torch.bincount(place // self.trajectory.canvas, minlength=len(self.trajectory))
        seen_N = torch.zeros_like(self.row_N, dtype=torch.bool)
        seen_N[left["view_K"]] = True
        kept = replace(self, **left, count_B=count_B).where(seen_N)
        return replace(kept, views_B=torch.bincount(kept.row_N, minlength=len(self.trajectory)))

    def _replaced(self, index_N: Tensor | slice, index_K: Tensor | slice, view_K: Tensor) -> Views:
        return replace(
            self,
            row_N=self.row_N[index_N],
            step_N=self.step_N[index_N],
            inclusion_N=self.inclusion_N[index_N],
            view_K=view_K,
            position_K=self.position_K[index_K],
            target_K=self.target_K[index_K],
            behaviour_K=self.behaviour_K[index_K],
            **{name: value[index_N] for name, value in self.optional(VIEW_TABLES).items()},
            **{name: value[index_K] for name, value in self.optional(TOKEN_TABLES).items()},
        )

    def optional(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return those of the named tables that these views have."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}
