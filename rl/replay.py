"""Replay: log-probabilities of recorded actions under a denoiser, on the canvases that were sampled from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..rollouts.categorical import log_probs
from ..rollouts.choices import Scored, choice_logprob, replayed_scores
from ..rollouts.forward import LogitSource, window_logits
from .sharding import whole
from .views import Views

IMPOSSIBLE = -100.0  # nats; stands for log 0 of a recorded choice that the policy can no longer make


class Scores(NamedTuple):
    """`logprob_A` of the actions (K tokens, then C choices, see `Views.actions`) and `entropy_K`, both in nats."""

    logprob_A: Tensor
    entropy_K: Tensor


def chunks(views: Views, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive runs of at most `size` views."""
    for start in range(0, len(views), size):
        yield start, min(start + size, len(views))


def replay(denoiser: LogitSource, views: Views) -> Scores:
    """Return the log-probs of the actions of `views` in one forward, differentiable in the denoiser's parameters.

    log softmax(logits / temperature) in fp32 without the tokens that the rollout banned, exactly as `denoise` recorded
    it. The LM head runs at the scored tokens only; at the whole window where choices are scored, since a choice depends
    on the distributions at the positions that were *not* chosen. The entropy is that of the scored distributions,
    without gradient.
    """
    trajectory, scored_NL = views.trajectory, views.scored()
    asked_NL = scored_NL if views.sampler is None else views.window()
    logits_WV = window_logits(
        denoiser,
        views.prompts(),
        trajectory.prompt_mask_BQ[views.row_N],
        views.canvas(),
        asked_NL,
        views.exists(),
        clean_BL=views.finished() if views.clean else None,
    )
    # Without choices every row is a scored one, and a copy of K x V numbers is saved.
    logits_KV = logits_WV if views.sampler is None else logits_WV[scored_NL[asked_NL]]
    logp_KV = log_probs(logits_KV, temperature=trajectory.temperature, banned=trajectory.banned_token_ids)
    logprob_K = logp_KV.gather(1, views.target_K[:, None]).squeeze(1)
    with torch.no_grad():
        entropy_K = torch.special.entr(logp_KV.detach().exp()).sum(dim=1)
    if views.sampler is None:
        return Scores(logprob_K, entropy_K)
    return Scores(torch.cat([logprob_K, _choices(views, logits_WV, asked_NL)]), entropy_K)


def _choices(views: Views, logits_WV: Tensor, window_NL: Tensor) -> Tensor:
    """Return the log-probability of each view's choice of positions."""
    trajectory, sampler = views.trajectory, views.sampler
    assert sampler is not None
    banned = trajectory.banned_token_ids
    # All tokens of the step set the bar, also those behind an EOS, which are no actions.
    token_NL, rank_NL = map(views.seen, trajectory.drawn_at(views.row_N, views.step_N))
    chosen_NL, rank_NL = token_NL != trajectory.mask_token_id, rank_NL.long()
    state = views.state()
    # The drawn tokens stand where they were drawn; elsewhere the score is not read.
    state.canvas_AL = torch.where(chosen_NL, token_NL, state.canvas_AL)
    state.window_AL = window_NL
    if not sampler.draws_first:
        score_NL = replayed_scores(sampler, logits_WV, state, banned)
        return choice_logprob(sampler, logits_WV, Scored(score_NL, chosen_NL, rank_NL, window_NL), state, banned)
    with torch.no_grad():
        score_NL = replayed_scores(sampler, logits_WV.detach(), state, banned)
    scored = Scored(score_NL, chosen_NL, rank_NL, window_NL)
    choice_N = choice_logprob(sampler, logits_WV, scored, state, banned)
    possible_N = choice_N > -torch.inf
    if bool(possible_N.all()) or bool(choice_N.isnan().any()):
        return choice_N
    # Every token of a position left open beats the bar now: the ratio is 0 and so is its gradient, whereas that of
    # log 0 is NaN. Only the other views are differentiated.
    kept_WV = logits_WV[possible_N[window_NL.nonzero()[:, 0]]]
    index_N = possible_N.nonzero()[:, 0]
    kept_scored, kept_state = Scored(*(table[possible_N] for table in scored)), views.where(possible_N).state()
    kept = choice_logprob(sampler, kept_WV, kept_scored, kept_state, banned)
    return torch.full_like(choice_N, IMPOSSIBLE).index_copy(0, index_N, kept)


@torch.no_grad()
def replay_all(denoiser: LogitSource, views: Views, size: int) -> Scores:
    """Return the scores of all views without gradient, `size` views a forward."""
    with whole(denoiser):
        parts = [replay(denoiser, views.part(start, stop)) for start, stop in chunks(views, size)]
    return join(views, parts)


def join(views: Views, parts: list[Scores]) -> Scores:
    """Return the scores of consecutive chunks of `views` as one; empty for no views."""
    if not parts:
        empty = views.trajectory.logprob_BL.new_zeros(0)
        return Scores(empty, empty)
    tokens = [len(part.entropy_K) for part in parts]
    logprob_K = [part.logprob_A[:n] for part, n in zip(parts, tokens, strict=True)]
    choice_C = [part.logprob_A[n:] for part, n in zip(parts, tokens, strict=True)]
    return Scores(torch.cat([*logprob_K, *choice_C]), torch.cat([part.entropy_K for part in parts]))
