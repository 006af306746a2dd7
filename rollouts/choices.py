"""The choice of positions as an action: its log-probability where drawn tokens or a random order decide it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .categorical import best_logprob, log_odds, log_probs
from .forward import Rows
from .measures import Statistics, chunks, token_odds
from .ranking import Bar
from .sampler import Sampler
from .state import State
from .traits import bare, knobs_of, traits_of, wants


class Scored(NamedTuple):
    """A step's scores (-inf outside the window), its chosen positions, their order, and the window; all `[N, L]`."""

    score_AL: Tensor
    chosen_AL: Tensor
    rank_AL: Tensor
    window_AL: Tensor


def choice_logprob(
    sampler: Sampler, logits_WV: Tensor, scored: Scored, state: State, banned: tuple[int, ...]
) -> Tensor:
    """Return `choice_N`, the log-probability of each row's positions; `logits_WV` are those of the window.

    With a drawn score it is that of every open position staying below its bar (samplers.md section 1.3): the scores of
    the chosen positions are those of their drawn tokens, others are ignored. With a random order it is that of the
    recorded order, from the scores (section 1.2). Differentiable in logits and scores. At temperature 0 it is certain.
    """
    if not sampler.draws_first:
        return bare(sampler.selection).order_logprob(*scored, **knobs_of(sampler.selection))
    if sampler.temperature == 0:
        return torch.zeros(len(scored.score_AL), device=logits_WV.device)
    (bar_NL, tie_NL), open_NL = _bars(sampler, scored), scored.window_AL & ~scored.chosen_AL
    row_K = open_NL.nonzero()[:, 0]
    tail_K = tail_logprob(
        logits_WV[open_NL[scored.window_AL]],
        bar_NL[open_NL],
        tie_NL[open_NL],
        temperature=sampler.temperature,
        score_temperature=sampler.score_temperature,
        banned=banned,
        adjust=_adjustment(sampler, state, row_K),
    )
    return tail_K.new_zeros(len(scored.score_AL)).index_add(0, row_K, tail_K)


def rollout_choice(
    sampler: Sampler, rows: Rows, flat_K: Tensor, scored: Scored, state: State, banned: tuple[int, ...]
) -> Tensor:
    """Return `choice_A` as `choice_logprob`, from logits that are computed a second time, a chunk at a time.

    `rows` are the logits of the positions `flat_K` (row x L + position; A x L is none): at least those of the window.
    """
    if not sampler.draws_first or sampler.temperature == 0:
        return choice_logprob(sampler, scored.score_AL, scored, state, banned)
    open_AL, (rows_A, length) = scored.window_AL & ~scored.chosen_AL, scored.score_AL.shape
    safe_K = flat_K.clamp(max=rows_A * length - 1)
    row_K = safe_K // length
    open_K = open_AL.view(-1)[safe_K] & (flat_K < rows_A * length)
    bar_K, tie_K = (table.reshape(-1)[safe_K] for table in _bars(sampler, scored))
    parts = [
        tail_logprob(
            rows.logits(start, stop),
            bar_K[start:stop],
            tie_K[start:stop],
            temperature=sampler.temperature,
            score_temperature=sampler.score_temperature,
            banned=banned,
            adjust=_adjustment(sampler, state, row_K[start:stop]),
        )
        for start, stop in chunks(len(bar_K), rows.vocabulary, bar_K.device)
    ]
    tail_K = torch.cat(parts).masked_fill(~open_K, 0.0)
    return scored.score_AL.new_zeros(rows_A).index_add(0, row_K, tail_K)


def _bars(sampler: Sampler, scored: Scored) -> Bar:
    """Return the selection's bars."""
    score_NL, chosen_NL, _, window_NL = scored
    selection = sampler.selection
    return bare(selection).bar(score_NL, chosen_NL, window_NL, **knobs_of(selection))


def _adjustment(sampler: Sampler, state: State, row_K: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return what turns log p of every token into its score, where that is not log p itself."""
    tokens = getattr(bare(sampler.score), "tokens", None)
    return None if tokens is None else partial(tokens, state=state, row_K=row_K, **knobs_of(sampler.score))


def tail_logprob(
    logits_KV: Tensor,
    bar_K: Tensor,
    tie_K: Tensor,
    *,
    temperature: float,
    score_temperature: float,
    banned: tuple[int, ...] = (),
    adjust: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return log q({v : log p(v) < bar}), the log-probability that a position's draw stayed below the bar.

    Shapes: `logits_KV`, `bar_K` and `tie_K` (True where a draw that equals the bar loses, because the tie goes to the
    smaller index) give `logprob_K`. p is at `score_temperature`, q at `temperature` (samplers.md section 1.3), and
    `adjust` turns log p into the score of every token, where that is another. Differentiable in the logits through q;
    the set of tokens below is a step function.
    """
    # Ties are real where positions have equal logits: scores must be computed just as the rollout's were.
    full = logits_KV.detach() if logits_KV.dtype == torch.float64 else logits_KV.detach().float()
    score_KV = torch.nn.functional.logsigmoid(token_odds(full, temperature=score_temperature, banned=banned))
    if adjust is not None:
        score_KV = adjust(score_KV)
    below_KV = (score_KV < bar_K[:, None]) | (tie_K[:, None] & (score_KV == bar_K[:, None]))
    logq_KV = log_probs(logits_KV, temperature=temperature, banned=banned)
    return logq_KV.masked_fill(~below_KV, -torch.inf).logsumexp(dim=-1)


def replayed_scores(sampler: Sampler, logits_WV: Tensor, state: State, banned: tuple[int, ...]) -> Tensor:
    """Return `score_NL` of recorded canvases, differentiable in the logits of their windows.

    With a drawn score these are the scores of the tokens that `state.canvas_AL` holds at the window's positions (mask
    id where nothing was chosen, whose score is ignored).
    """
    assert state.window_AL is not None
    logp_WV = log_probs(logits_WV, temperature=sampler.score_temperature, banned=banned)
    flat_W = state.window_AL.view(-1).nonzero().squeeze(1)
    mass_WV = logp_WV.exp()
    confidence_W, best_W = best_logprob(logp_WV), logp_WV.argmax(dim=1)
    needs, token_W, drawn_W = traits_of(sampler.score).needs, best_W, None
    if "drawn" in needs:
        token_W = state.canvas_AL.view(-1)[flat_W]
        odds_WV = token_odds(logits_WV.detach(), temperature=sampler.score_temperature, banned=banned)
        drawn_W = odds_WV.gather(1, token_W[:, None]).squeeze(1)
    statistics = Statistics(
        token=token_W,
        logprob=torch.zeros_like(confidence_W),
        best=best_W,
        confidence=confidence_W,
        odds=log_odds(logp_WV).gather(1, best_W[:, None]).squeeze(1),
        drawn=drawn_W,
        second=logp_WV.topk(2, dim=1).values[:, 1] if "second" in needs else None,
        entropy=torch.special.entr(mass_WV).sum(dim=1) if "entropy" in needs else None,
        eos=mass_WV[:, list(state.eos_token_ids)].sum(dim=1).log() if "eos" in needs else None,
    )
    state.statistics = statistics.table(flat_W, *state.canvas_AL.shape)
    more = {"state": state} if wants(sampler.score, "state") else {}
    place_NL = torch.arange(state.canvas_AL.shape[1], device=logits_WV.device).expand_as(state.canvas_AL)
    score_NL = sampler.score(state.statistics, place_NL, state.uniform("score"), **more)
    return score_NL.masked_fill(~state.window_AL, -torch.inf)
